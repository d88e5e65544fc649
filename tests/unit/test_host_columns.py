from __future__ import annotations

import dataclasses
import enum
import struct
import warnings
from typing import Annotated, Any

import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_models.host import columns
from rq_models.host.output import OutputError

# How long a single example takes depends on the machine.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

RECORD = {"kind": "ModelCrashed", "type": None, "message": "it died", "retryable": False}
VALUES = {
    "f8": st.floats(allow_nan=False),
    "i8": st.integers(-(2**63), 2**63 - 1),
    "b1": st.booleans(),
    "str": st.text(st.characters(exclude_categories=["Cs"])),
    "json": st.recursive(
        st.integers() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner | st.none()) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
}


def shape(name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, **more}


def question(
    shapes: list[dict[str, Any]], values: list[list[Any]], *, whole: bool = False, outputs: Any = None
) -> tuple[dict[str, Any], bytes]:
    heads, blob = columns.encode(shapes, values)
    asked = {"op": "score", "rows": len(values[0]), "columns": heads, "whole": whole, "outputs": outputs}
    return {**asked, "timeout": None}, blob


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    kinds = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4))
    count = draw(st.integers(1, 12))
    shapes = [shape(f"c{index}", kind, omit=draw(st.booleans())) for index, kind in enumerate(kinds)]
    return shapes, [draw(st.lists(st.none() | VALUES[kind], min_size=count, max_size=count)) for kind in kinds]


# The wire.


@unhurried
@given(tables(), st.data())
def test_what_is_encoded_and_cut_is_decoded_as_it_was(table: Any, data: st.DataObject) -> None:
    shapes, values = table
    asked, blob = question(shapes, values)
    start = data.draw(st.integers(0, asked["rows"]))
    stop = data.draw(st.integers(start, asked["rows"]))

    part, piece = columns.cut(asked, memoryview(blob), start, stop)
    alone = list(columns.singles(asked, blob))

    assert [list(column) for column in columns.decode(asked["columns"], blob, asked["rows"])] == values
    assert part["rows"] == stop - start
    assert [list(column) for column in columns.decode(part["columns"], piece, part["rows"])] == [
        column[start:stop] for column in values
    ]
    assert columns.rows(part, piece) == columns.rows(asked, blob)[start:stop]
    assert [row for one in alone for row in columns.rows(*one)] == columns.rows(asked, blob)
    assert [one["rows"] for one, _ in alone] == [1] * asked["rows"]


@unhurried
@given(tables(), st.data())
def test_answers_to_parts_are_joined_into_the_answer_to_the_whole(table: Any, data: st.DataObject) -> None:
    shapes, values = table
    outputs = [shape(one["name"], one["kind"]) for one in shapes]
    asked, blob = question(outputs, values, outputs=outputs)
    answers = []
    for number, (one, part) in enumerate(columns.singles(asked, blob)):
        answer = {"rows": 1, "columns": one["columns"], "blob": part, "failed": [], "seconds": 0.5}
        answers.append(columns.lost(one, RECORD) if number == 1 else answer)

    joined = columns.join(answers)

    expected = [[None if index == 1 else value for index, value in enumerate(column)] for column in values]
    assert [list(column) for column in columns.decode(joined["columns"], joined["blob"], joined["rows"])] == expected
    assert joined["failed"] == ([[1, RECORD]] if len(answers) > 1 else [])
    assert joined["seconds"] == 0.5 * len([answer for answer in answers if not answer["failed"]])
    assert [(head["name"], head["kind"]) for head in joined["columns"]] == [
        (one["name"], one["kind"]) for one in outputs
    ]


def test_the_layout_is_as_it_is_told():
    shapes = [shape("f", "f8"), shape("i", "i8"), shape("b", "b1"), shape("s", "str"), shape("j", "json")]

    heads, blob = columns.encode(shapes, [[1.5, None], [-1, 2], [True, False], ["ü", None], [{"a": 1}, None]])

    parts = [
        struct.pack("<dd", 1.5, 0),
        struct.pack("<qq", -1, 2),
        b"\x01\x00",
        struct.pack("<iii", 0, 2, 2) + "ü".encode(),
        b'[{"a":1},null]',
    ]
    assert blob == b"".join(parts)
    assert [head["bytes"] for head in heads] == [len(part) for part in parts]
    assert [head.get("nulls") for head in heads] == [[1], None, None, [1], [1]]


def test_a_null_is_none_or_left_out():
    asked, blob = question([shape("a", "f8"), shape("b", "str", omit=True)], [[None, 1.0], [None, "x"]])

    assert columns.rows(asked, blob) == [{"a": None}, {"a": 1.0, "b": "x"}]


def test_a_row_may_be_its_only_value():
    assert columns.rows(*question([shape("text", "str")], [["a", None]], whole=True)) == ["a", None]
    with pytest.raises(columns.ColumnError, match="one column"):
        columns.rows(*question([shape("a", "f8"), shape("b", "f8")], [[1.0], [2.0]], whole=True))


def test_rows_of_no_columns_are_empty():
    assert columns.rows({"rows": 2, "columns": [], "whole": False}, b"") == [{}, {}]


@pytest.mark.parametrize(
    ("column", "blob"),
    [
        (shape("a", "f8", bytes=8), bytes(8)),
        (shape("a", "f8", bytes=16), bytes(15)),
        (shape("a", "f8", bytes=16), bytes(17)),
        (shape("a", "f9", bytes=16), bytes(16)),
        (shape("a", "f8", bytes=16, nulls=[2]), bytes(16)),
        (shape("a", "str", bytes=4), bytes(4)),
        (shape("a", "str", bytes=13), struct.pack("<iii", 0, 1, 1) + b"\xff"),
        (shape("a", "json", bytes=3), b"[1]"),
        (shape("a", "json", bytes=3), b"[1,"),
        (shape("a", "json", bytes=1), b"1"),
    ],
)
def test_damaged_columns_are_refused(column, blob):
    with pytest.raises(columns.ColumnError):
        columns.decode([column], blob, 2)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("f8", "1"), ("f8", 10**400), ("i8", 1.5), ("i8", 2**63), ("str", 1), ("str", "\ud800"), ("json", {1})],
)
def test_what_is_not_of_the_kind_makes_no_column(kind, value):
    with pytest.raises(columns.ColumnError, match="'a'"):
        columns.encode([shape("a", kind)], [[value]])


# Outputs.


@dataclasses.dataclass
class Point:
    x: Any
    note: Any = None


class Plain(pydantic.BaseModel):
    x: float | None = None
    note: str = ""


class Rounded(pydantic.BaseModel):
    x: Annotated[float, pydantic.PlainSerializer(round)]


class Nested(pydantic.BaseModel):
    x: list[int] | Annotated[float, pydantic.PlainSerializer(round)]


class Dumping(pydantic.BaseModel):
    x: float

    def model_dump(self, **options: Any) -> dict[str, Any]:  # noqa: ARG002 - pydantic's
        return {"x": 7.0}


class Excluded(pydantic.BaseModel):
    x: float = pydantic.Field(exclude=True)


class Colour(enum.Enum):
    RED = "red"


def both_ways(results: list[Any], outputs: list[dict[str, Any]]) -> tuple[Any, Any]:
    """What is taken at once, as lists, and what each result gives."""
    taken = columns.take(results, outputs)
    each = [columns.entries(result, outputs, "error") for result in results]
    return taken and [list(column) for column in taken], [list(column) for column in zip(*each, strict=True)]


@pytest.mark.parametrize(
    ("results", "kind"),
    [
        ([{"x": 1.5}, {"x": 2}], "f8"),
        ([{"x": 1}, {"x": None}, {}], "i8"),
        ([Point(True), Point(False, object())], "b1"),
        ([Point("a"), Point(None)], "str"),
        ([Plain(x=1.0), Plain()], "f8"),
        ([Plain(x=1.0)], "json"),
        ([{"x": "\ud800"}], "json"),
    ],
)
def test_what_is_taken_at_once_is_what_each_would_give(results, kind):
    at_once, each = both_ways(results, [shape("x", kind)])

    assert at_once == each


@pytest.mark.parametrize(
    ("results", "kind", "expected"),
    [
        ([{"x": 1.0}, Point(2.0)], "f8", [1.0, 2.0]),
        ([{"x": np.float64(1.5)}], "f8", [1.5]),
        ([{"x": 2.0}], "i8", [2]),
        ([{"x": Colour.RED}], "str", ["red"]),
        ([{"x": [1, (2,)]}, {"x": 1}], "json", [[1, [2]], 1]),
        ([{"x": 1e308}, {"x": 1e308}], "f8", [1e308, 1e308]),
        ([Rounded(x=1.6)], "f8", [2.0]),
        ([Nested(x=1.6)], "f8", [2.0]),
        ([Dumping(x=1.6)], "f8", [7.0]),
        ([Excluded(x=1.6)], "f8", [None]),
        ([Plain.model_construct()], "f8", [None]),
    ],
)
def test_what_is_not_plain_is_looked_at_one_by_one(results, kind, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at_once, each = both_ways(results, [shape("x", kind)])

    assert at_once is None or at_once == [expected]
    assert each == [expected]
    assert [type(value) for value in each[0]] == [type(value) for value in expected]


def test_the_whole_output_is_a_column():
    assert both_ways(["a", "b"], [shape("", "str")]) == ([["a", "b"]], [["a", "b"]])
    assert both_ways([{"a": 1}, None], columns.WHOLE) == (None, [[{"a": 1}, None]])


def test_nan_is_null_if_the_model_says_so():
    results = [{"x": float("nan")}]

    assert columns.take(results, [shape("x", "f8")]) is None
    assert columns.entries(results[0], [shape("x", "f8")], "null") == [None]
    with pytest.raises(OutputError, match=r"output.x: nan is not JSON"):
        columns.entries(results[0], [shape("x", "f8")], "error")


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        ({"x": "abc"}, "f8", "output.x: should be a number, got 'abc'"),
        ({"x": True}, "f8", "output.x: should be a number, got True"),
        ({"x": 10**400}, "f8", "output.x: should be a number, got a value of type int"),
        ({"x": 1.5}, "i8", "output.x: should be an integer of 64 bits, got 1.5"),
        ({"x": 2**63}, "i8", f"output.x: should be an integer of 64 bits, got {2**63}"),
        ({"x": 1}, "b1", "output.x: should be a boolean, got 1"),
        ({"x": 1}, "str", "output.x: should be a string of Unicode characters, got 1"),
        ({"x": "\ud800"}, "str", "output.x: should be a string of Unicode characters, got '\\ud800'"),
        ({"x": [object()]}, "json", "output.x[0]: object is not JSON"),
        ([1], "f8", "output: should be an object with x, got a list of 1"),
        (None, "f8", "output: should be an object with x, got None"),
        (Colour.RED, "f8", "output: should be an object with x, got 'red'"),
    ],
)
def test_an_output_that_does_not_fit_says_which_column(result, kind, message):
    assert columns.take([result], [shape("x", kind)]) is None
    with pytest.raises(OutputError) as caught:
        columns.entries(result, [shape("x", kind)], "error")
    assert str(caught.value) == message
