# ruff: noqa: UP007, UP045, PT017
# Optional and Union are what older models write. PT017 can't see that `check` may also return.

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, TypedDict, Union

import jsonschema
import pydantic
import pytest
import schema as library
from pydantic.v1 import BaseModel as BaseModelV1
from schema import And, Or, Regex, Schema, Use
from schema import Optional as Maybe

from rq_models.host.refusal import InputError, explain, show
from rq_models.host.schemas import UNKNOWN, anything, hints, shape


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Petal:
    width: float
    colour: Colour = Colour.RED
    note: Optional[str] = None
    count: int = 1
    limit: float = float("inf")
    tags: list[str] = field(default_factory=list)
    derived: float = field(init=False, default=0.0)


@dataclass
class Flower:
    name: str
    petals: list[Petal]


@dataclass
class Range:
    low: float
    high: float

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass
class Endless:
    children: list[Endless]


class Row(TypedDict):
    x: float
    y: NotRequired[int]


class Loose(TypedDict, total=False):
    x: Required[float]
    y: int


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    colour: Colour


class Item(pydantic.BaseModel):
    width: float
    names: list[str] = []


class Node(pydantic.BaseModel):
    children: list[Node] = []


class Basket(pydantic.BaseModel):
    items: list[Item]
    secret: str = ""


class ItemV1(BaseModelV1):
    width: float


def check(hint: Any, value: Any) -> Any:
    """Convert, and require that the published schema says the same as the conversion."""
    found = shape(hint)
    jsonschema.Draft202012Validator.check_schema(found.json)
    refused = list(jsonschema.Draft202012Validator(found.json).iter_errors(value))
    try:
        converted = found.convert(value)
    except InputError as error:
        assert refused, f"the schema takes what the conversion does not: {error}"
        raise
    assert not refused
    return converted


def refusal(hint: Any, value: Any) -> str:
    with pytest.raises(InputError) as raised:
        check(hint, value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 5, 5.0),
        (Annotated[float, ["metadata"]], 5, 5.0),
        (int, 5, 5),
        (int, 5.0, 5),
        (bool, True, True),
        (type(None), None, None),
        (Optional[float], None, None),
        (Optional[float], 3, 3.0),
        (Union[int, float], 3, 3),
        (Union[float, str], 3, 3.0),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (list, [1, "a"], [1, "a"]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (set[str], ["a", "a"], {"a"}),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (dict[str, Any], {"a": None}, {"a": None}),
        (dict, {"a": 1}, {"a": 1}),
        (Literal["a", 1], 1, 1),
        (Colour, "blue", Colour.BLUE),
        (Petal, {"width": 1}, Petal(1.0)),
        (Petal, {"width": 1, "colour": "blue", "note": "n", "tags": ["t"]}, Petal(1.0, Colour.BLUE, "n", tags=["t"])),
        (Flower, {"name": "f", "petals": [{"width": 2}]}, Flower("f", [Petal(2.0)])),
        (Row, {"x": 1}, {"x": 1.0}),
        (Row, {"x": 1, "y": 2, "z": "kept"}, {"x": 1.0, "y": 2, "z": "kept"}),
        (Loose, {"x": 1}, {"x": 1.0}),
        (list[Item], [{"width": 1}], [Item(width=1.0)]),
        (Node, {"children": [{}]}, Node(children=[Node()])),
        (ItemV1, {"width": 1}, ItemV1(width=1.0)),
        (Strict, {"colour": "red"}, Strict(colour=Colour.RED)),
    ],
    ids=str,
)
def test_what_a_hint_takes(hint, value, expected):
    found = check(hint, value)

    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (float, "asdfg", "input: Input should be a valid number, got 'asdfg'"),
        (float, True, "input: Input should be a valid number, got True"),
        (int, 5.5, "input: Input should be a valid integer, got 5.5"),
        (int, False, "input: Input should be a valid integer, got False"),
        (str, 5, "input: Input should be a valid string, got 5"),
        (bool, 1, "input: Input should be a valid boolean, got 1"),
        (list[float], {"a": 1}, "input: Input should be a valid list, got an object of 1"),
        (list[float], [1, None], "[1]: Input should be a valid number, got None"),
        (dict[str, list[int]], {"a": [1, "b"]}, "a[1]: Input should be a valid integer, got 'b'"),
        (Optional[float], "x", "input: Input should be a valid number or null, got 'x'"),
        (Union[int, Flower], {"petals": [], "name": 3}, "name: Input should be a valid string, got 3"),
        (Literal["a", 1], True, "input: Input should be 'a' or 1, got True"),
        (Colour, "green", "input: Input should be 'red' or 'blue', got 'green'"),
        (Petal, {"width": "asdfg"}, "width: Input should be a valid number, got 'asdfg'"),
        (Petal, {}, "width: Field required"),
        (Petal, {"width": 1, "wdith": 2}, "wdith: Unexpected field"),
        (Petal, [1], "input: Input should be a valid object, got a list of 1"),
        (Petal, {"width": 1, "derived": 2}, "derived: Unexpected field"),
        (Flower, {"name": "f", "petals": [{"width": 1}, {}]}, "petals[1].width: Field required"),
        (Row, {"y": 1}, "x: Field required"),
        (Row, {"x": 1, "y": "z"}, "y: Input should be a valid integer, got 'z'"),
        (Loose, {"y": 1}, "x: Field required"),
        (list[ItemV1], [{"width": "asdfg"}], "[0].width: value is not a valid float, got 'asdfg'"),
        (ItemV1, {}, "width: field required"),
        (Basket, {"items": [{}]}, "items[0].width: Field required"),
    ],
    ids=str,
)
def test_what_a_hint_refuses_names_the_field(hint, value, message):
    assert refusal(hint, value) == message


def test_an_integer_too_large_for_a_float_is_refused():
    with pytest.raises(InputError, match="a valid number, got a value of type int"):
        shape(float).convert(10**400)


def test_pydantic_says_the_first_that_is_wrong_and_how_much_more():
    with pytest.raises(InputError) as raised:
        shape(Basket).convert({"items": [{"width": "asdfg"}, {}, {"width": []}, {}, {}], "secret": "hidden"})

    message = str(raised.value)
    assert message.startswith("items[0].width: Input should be a valid number, unable to parse string")
    assert message.endswith("got 'asdfg'; and 4 more")
    assert "hidden" not in message
    assert raised.value.type == "ValidationError"


def test_a_message_never_shows_a_long_value():
    with pytest.raises(InputError) as raised:
        shape(Petal).convert({"width": "s" * 1_000_000})

    assert str(raised.value).endswith("... of 1000000 characters")
    assert len(str(raised.value)) < 200
    assert show({"secret": 1}) == "an object of 1"


def test_a_dataclass_may_check_for_itself():
    with pytest.raises(InputError, match=r"^\[0\]: low is above high$") as raised:
        shape(list[Range]).convert([{"low": 2, "high": 1}])
    assert raised.value.type == "ValueError"


def test_defaults_are_published_where_json_can_say_them():
    properties = shape(Petal).json["properties"]

    assert properties["count"] == {"type": "integer", "default": 1}
    assert properties["note"]["default"] is None
    assert "derived" not in properties


def test_a_single_class_is_published_without_detours():
    found = shape(Petal).json

    assert found["type"] == "object"
    assert found["required"] == ["width"]
    assert "$defs" not in found


@pytest.mark.parametrize("hint", [Any, object(), "unresolved", complex], ids=lambda hint: type(hint).__name__)
def test_what_says_nothing_is_not_checked(hint):
    found = shape(hint)

    assert found == UNKNOWN


def test_a_dataclass_that_holds_itself_is_reported_and_not_checked(caplog):
    assert shape(Endless) == UNKNOWN
    assert "can't read the schema <class" in caplog.text
    assert "Endless" in caplog.text


def test_a_hint_that_cannot_be_read_is_reported_and_not_checked(caplog):
    @dataclass
    class Unreadable:
        field: ThereForTypeCheckersOnly  # noqa: F821 - that is the point

    assert shape(Unreadable) == UNKNOWN
    assert "ThereForTypeCheckersOnly" in caplog.text


def test_a_json_schema_in_a_dict_is_published_as_it_is():
    assert shape({"type": "object"}) == ({"type": "object"}, anything)


def test_hints_keep_what_required_says():
    assert hints(Row)["y"] == NotRequired[int]


# Objects of the `schema` library.


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        (Schema({"x": float}), {"x": 5}, {"x": 5.0}),
        (Schema({"x": And(float, lambda x: x > 0)}), {"x": 5}, {"x": 5.0}),
        (Schema({"x": Or(float, None)}), {"x": 5}, {"x": 5.0}),
        (Schema({"x": Or(float, int)}), {"x": 5}, {"x": 5}),
        (Schema({"x": [float]}), {"x": [5, 1.5]}, {"x": [5.0, 1.5]}),
        (Schema({"x": Schema({Maybe("y"): float})}), {"x": {"y": 5}}, {"x": {"y": 5.0}}),
        (Schema({str: float}), {"a": 5}, {"a": 5.0}),
        (Schema({"n": int, str: float}), {"n": 5, "a": 5}, {"n": 5, "a": 5.0}),
        (Schema({library.Literal("x", description="d"): float}), {"x": 5}, {"x": 5.0}),
        (Schema(Or({"k": "a", "x": float}, {"k": "b", "x": int})), {"k": "b", "x": 5}, {"k": "b", "x": 5}),
        (Schema(Or({"k": "a", "x": float}, {"k": "b", "x": int})), {"k": "a", "x": 5}, {"k": "a", "x": 5.0}),
        (Schema({"x": Use(int)}), {"x": "5"}, {"x": "5"}),
        (Schema({"x": And(Use(int), int), "y": float}), {"x": "5", "y": 1}, {"x": "5", "y": 1.0}),
        (Schema({"x": Or(int, Use(float))}), {"x": "5"}, {"x": "5"}),
        (Schema({"x": Regex("^A", flags=2)}), {"x": "a"}, {"x": "a"}),
        (Schema({Regex("^f"): float, Regex("^i"): int}), {"f": 5.0, "i": 5}, {"f": 5.0, "i": 5}),
        (Schema({"x": int}, ignore_extra_keys=True), {"x": 1, "more": 2}, {"x": 1, "more": 2}),
        (Schema({Maybe("x", default=3): int}), {}, {}),
        (Schema([]), [], []),
        (Schema({"x": object, library.Forbidden("y"): object}), {"x": None}, {"x": None}),
    ],
    # Not its repr, which holds a function's address: parallel test processes must agree on the ids.
    ids=lambda value: type(value).__name__,
)
def test_what_a_schema_object_takes(declared, value, expected):
    found = check(declared, value)

    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("declared", "value", "message"),
    [
        (Schema({"x": float}), {"x": "asdfg"}, "x: 'asdfg' should be instance of 'float'"),
        (Schema({"x": float}), {"x": True}, "x: True should be instance of 'float'"),
        (Schema({"x": float}), {}, "input: Missing key: 'x'"),
        (Schema({"a": {"b": [float]}}), {"a": {"b": ["c"]}}, "a.b: 'c' should be instance of 'float'"),
        (Schema({"x": int}), [1], "input: a list of 1 should be instance of 'dict'"),
        (Schema({"x": And(str, error="not a name")}), {"x": 1}, "x: not a name"),
        (Schema({"x": str}, name="Flower"), {"x": 1}, "x: 1 should be instance of 'str'"),
    ],
    ids=str,
)
def test_what_a_schema_object_refuses_names_the_field(declared, value, message):
    assert refusal(declared, value) == message


@pytest.mark.parametrize(
    ("declared", "value", "message"),
    [
        (Schema({"x": int}), {"x": 1, "y": "secret"}, "input: Wrong key 'y'"),
        (Schema({"x": {"y": int}}), {"x": {"y": 1, "z": "secret"}}, "x: Wrong key 'z'"),
    ],
    ids=str,
)
def test_a_key_too_many_is_refused_without_what_it_holds(declared, value, message):
    with pytest.raises(InputError) as raised:
        shape(declared).convert(value)
    assert str(raised.value) == message


def test_a_schema_object_never_shows_a_long_value():
    with pytest.raises(InputError) as raised:
        shape(Schema({"x": Or(float, int)})).convert({"x": "s" * 1_000_000})

    assert str(raised.value).startswith("x: 's")
    assert str(raised.value).endswith("should be instance of 'int'")
    assert len(str(raised.value)) < 200


def test_a_schema_object_is_published_as_far_as_it_is_plain():
    declared = Schema({"x": And(float, lambda x: x > 0), Maybe("n"): Schema([int]), "k": Or("a", None), "u": Use(int)})

    assert shape(declared).json == {
        "type": "object",
        "properties": {
            "x": {"type": "number"},
            "n": {"type": "array", "items": {"type": "integer"}},
            "k": {"anyOf": [{"const": "a"}, {"const": None}]},
            "u": {},
        },
        "required": ["x", "k", "u"],
    }


def test_an_error_of_neither_library_is_not_explained():
    assert explain(ValueError("no"), {}) is None
    assert explain(None, {}) is None
