"""Which columns go to a model, what it gives back, and how many rows make a slice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rq_models.scoring.plan import Misfit, Plan, Wanted, grown, guessed_outputs, input_names, inputs, outputs

FLOWER = {
    "type": "object",
    "properties": {"length": {"type": "number"}, "petals": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["length", "petals"],
}
COLUMNS = ["name", "length", "colour", "petals"]
GUESS = dict.fromkeys(COLUMNS, "str")


def test_columns_go_to_the_model_by_name_and_in_its_order():
    wanted, whole = inputs(FLOWER, COLUMNS, GUESS)
    assert not whole
    assert [(one.name, one.kind) for one in wanted] == [("length", "f8"), ("petals", "i8"), ("name", "str")]


def test_what_the_model_can_do_without_may_be_missing():
    wanted, _ = inputs(FLOWER, ["length", "petals"], GUESS)
    assert [one.name for one in wanted] == ["length", "petals"]


def test_missing_columns_are_named():
    with pytest.raises(Misfit, match=r"needs the columns 'length', 'petals'.*it has 'name', 'colour'"):
        inputs(FLOWER, ["name", "colour"], GUESS)


def test_a_file_without_anything_for_the_model_is_refused():
    with pytest.raises(Misfit, match="none of them"):
        inputs({**FLOWER, "required": []}, ["colour"], GUESS)


def test_a_model_without_a_schema_is_given_every_column():
    wanted, whole = inputs(None, ["a", "b"], {"a": "f8", "b": "str"})
    assert (wanted, whole) == ([Wanted("a", "f8", omit=True), Wanted("b", "str", omit=True)], False)


def test_a_model_of_one_value_takes_the_only_column():
    assert inputs({"type": "string"}, ["text"], {"text": "str"}) == ([Wanted("text", "str")], True)
    with pytest.raises(Misfit, match="one string and no row of columns, so the file must have one column; it has 2"):
        inputs({"type": "string"}, ["text", "more"], {})


@pytest.mark.parametrize(
    ("declared", "kind", "omit"),
    [
        ({"type": "number"}, "f8", True),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "f8", False),
        ({"type": ["integer", "null"]}, "i8", False),
        ({"type": ["integer", "number"]}, "f8", True),
        ({"enum": ["a", "b"]}, "str", True),
        ({"const": "a"}, "str", True),
        ({"enum": ["a", 1]}, "json", True),
        ({"type": "array", "items": {"type": "number"}}, "json", True),
        ({"$ref": "#/$defs/Size"}, "i8", True),
        ({"anyOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]}, "i8", False),
        ({"$ref": "#/$defs/Loop"}, "json", False),
        ({"$ref": "#/nowhere"}, "json", False),
        ({}, "json", False),
        (True, "json", False),
    ],
)
def test_kinds_follow_the_schema(declared, kind, omit):
    schema = {
        "type": "object",
        "properties": {"a": declared},
        "$defs": {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
    assert inputs(schema, ["a"], {"a": "str"})[0] == [Wanted("a", kind, omit=omit)]


def test_the_schema_itself_may_be_a_reference():
    schema = {"$ref": "#/$defs/Flower", "$defs": {"Flower": FLOWER}}
    assert [one.name for one in inputs(schema, COLUMNS, GUESS)[0]] == ["length", "petals", "name"]
    assert input_names(schema) == ["length", "petals", "name"]


def test_outputs_follow_the_schema():
    assert outputs(FLOWER) == [Wanted("length", "f8"), Wanted("petals", "i8"), Wanted("name", "str")]
    assert outputs({"type": "number"}) == [Wanted("", "f8")]
    assert outputs(None) is None
    assert outputs({"type": "array"}) is None


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([{"a": 1}, {"a": 2.5, "b": "x"}, None], [Wanted("a", "f8"), Wanted("b", "str")]),
        ([{"a": None}, {"a": True}], [Wanted("a", "b1")]),
        ([1, 2], [Wanted("", "f8")]),
        ([{"a": 1}, 2], [Wanted("", "json")]),
        ([True, 1], [Wanted("", "json")]),
        ([None], [Wanted("", "json")]),
        ([], [Wanted("", "json")]),
    ],
)
def test_outputs_are_guessed_where_no_schema_says_them(values, found):
    assert guessed_outputs(values) == found


@pytest.mark.parametrize(
    ("rows", "seconds", "expected"),
    [(64, 0.0001, 128), (64, 0.008, 80), (64, 0.01, 64), (64, 0.1, 6), (64, 100, 1), (5000, 0.001, 8192), (64, 0, 128)],
)
def test_a_slice_grows_to_what_takes_its_time(rows, seconds, expected):
    assert grown(rows, seconds, 0.01, 8192) == expected


def test_a_plan_survives_being_stored():
    made = Plan(
        "1-2",
        "1.0",
        ["a"],
        [Wanted("a", "f8")],
        False,
        [Wanted("", "str")],
        "{}",
        64,
        10,
        8.5,
        "r-1-x",
        [(0, 5), (5, 9)],
    )
    assert Plan.of(json.loads(json.dumps(made.stored()))) == made
    assert replace(made, version="2.0") != made


def test_what_the_first_rows_lack_later_ones_may_have():
    schema = {"properties": {"a": {"type": "number"}, "b": {"anyOf": [{"type": "number"}, {"type": "null"}]}}}
    assert inputs(schema, ["a"], {}, sampled=True) == (
        [Wanted("a", "f8", omit=True), Wanted("b", "f8", omit=True)],
        False,
    )
    assert inputs(schema, ["a"], {}) == ([Wanted("a", "f8", omit=True)], False)
    with pytest.raises(Misfit, match="the file has none of them"):
        inputs(schema, ["z"], {}, sampled=True)
