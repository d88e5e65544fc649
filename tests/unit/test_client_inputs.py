"""The check of inputs before they are queued: right about what is wrong, and never stricter than the model."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import pytest
from pydantic import v1
from schema import And, Or, Schema, Use
from schema import Optional as Maybe

from rq_models.errors import InvalidInput
from rq_models.host.schemas import shape
from rq_models.inputs import InputCheck, as_json

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"

    @classmethod
    def _missing_(cls, value: object) -> Colour | None:
        return next((one for one in cls if isinstance(value, str) and one.value == value.lower()), None)


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Point(NamedTuple):
    x: float
    y: float


class Inner(pydantic.BaseModel):
    a: int
    b: str = "b"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class V1Inner(v1.BaseModel):
    a: int
    b: float | None


HINTS = [
    float,
    int,
    str,
    bool,
    type(None),
    Any,
    dict,
    list[int],
    set[int],
    tuple[int, str],
    tuple[float, ...],
    dict[str, float],
    dict[int, float],
    dict[Colour, int],
    float | None,
    int | str,
    list[int] | Inner,
    Literal["a", 1, True],
    Colour,
    Size,
    Point,
    Inner,
    list[Inner],
    Annotated[Cat | Dog, pydantic.Field(discriminator="kind")],
    dt.datetime,
    dt.timedelta,
    decimal.Decimal,
    uuid.UUID,
    bytes,
    pydantic.SecretStr,
    pydantic.Json,
    pydantic.PositiveInt,
    Annotated[float, pydantic.Field(gt=0, le=10, multiple_of=0.1)],
    Annotated[str, pydantic.Field(min_length=2, max_length=4, pattern="^[a-z]+$")],
    Annotated[str, pydantic.StringConstraints(strip_whitespace=True, max_length=3)],
    Annotated[list[int], pydantic.Field(min_length=1, max_length=2)],
    Annotated[set[int], pydantic.Field(min_length=1, max_length=2)],
    Annotated[bytes, pydantic.Field(max_length=2)],
]
VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 10**30, 0.0, 1.0, 1.5, 0.3, 5.7, 1e308),
    *(
        "",
        "1",
        "1.5",
        " 2 ",
        "1_000",
        "1e3",
        "nan",
        "inf",
        "true",
        "YES",
        "off",
        "asdfg",
        "red",
        "RED",
        "a",
        "ab",
        "[1]",
    ),
    *("abcdefg", "  abc  ", "2020-01-01", "2020-01-01T10:00:00Z", "P1DT2H", "01:02:03", str(uuid.UUID(int=1)), "é"),
    *([], [1], [1, 2], [1, 1, 1], ["1", "2"], [1, "a"], [1, 2, 3], [None], [1.5], ["a"], [[1]], [["a", 1]]),
    *([{"a": 1}], [{"a": "x"}], {}, {"a": 1}, {"a": "1", "b": "c"}, {"a": "x"}, {"b": "c"}, {"a": 1, "c": 1}),
    *({"x": 1, "y": 2}, {"1": 2}, {"red": 1}, {"kind": "cow"}),
    *({"kind": "cat", "lives": 9}, {"kind": "dog", "tricks": ["sit"]}, {"kind": "dog", "lives": 9}),
]


def refusal(schema: Any, data: Any) -> str | None:
    check = schema if isinstance(schema, InputCheck) else InputCheck(schema)
    try:
        check.require(data)
    except InvalidInput as error:
        return str(error)
    return None


def accepted(validate: Any, data: Any) -> bool:
    try:
        validate(data)
    except Exception:  # noqa: BLE001 - whatever the library raises
        return False
    return True


def compare(schema: Any, validate: Any, values: list[Any]) -> int:
    """Check that whatever validates passes; return how many of the others are refused here already."""
    check = InputCheck(schema)
    refused = [value for value in values if refusal(check, value)]
    assert [(value, refusal(check, value)) for value in refused if accepted(validate, value)] == []
    return len(refused)


@pytest.mark.parametrize("hint", HINTS, ids=str)
@pytest.mark.parametrize("default", [..., None], ids=["required", "optional"])
def test_it_is_never_stricter_than_pydantic(hint, default):
    class Model(pydantic.BaseModel):
        field: hint = default

    values = [{"field": value} for value in VALUES] + [{}, {"fields": 1}, {"field": 1, "more": 2}, [], None, 1]
    assert compare(Model.model_json_schema(), Model.model_validate, values) >= 2  # what is no object
    compare(pydantic.TypeAdapter(hint).json_schema(), pydantic.TypeAdapter(hint).validate_python, VALUES)


@pytest.mark.parametrize(
    "hint",
    [
        *(float, int, str, bool, dict, list[int], set[int], float | None, int | str, Colour, Size, V1Inner),
        *(list[V1Inner], dict[str, V1Inner], Literal["a", 1], dt.timedelta, dt.datetime, v1.conint(gt=0)),
        *(v1.constr(max_length=3, strip_whitespace=True), v1.conset(int, max_items=2), tuple[int, str]),
        list[int | None],
    ],
    ids=str,
)
@pytest.mark.parametrize("default", [..., None, 0], ids=["required", "none", "zero"])
def test_it_is_never_stricter_than_pydantic_1(hint, default):
    Model = v1.create_model("Model", field=(hint, default))  # noqa: N806 - a class
    values = [{"field": value} for value in VALUES] + [{}, {"field": 1, "more": 2}]
    # It calls dict(), and so takes pairs for an object, and nothing for an empty one. Here they are taken for wrong.
    pairs = ("", [], [["a", 1]])
    values = [value for value in values if all(one not in pairs for one in value.values())]
    # What it publishes says nothing of null. A null for a field without a default, or in a list, is taken for wrong.
    if default is ... or hint == list[int | None]:
        values = [value for value in values if value not in ({"field": None}, {"field": [None]})]
    compare(Model.schema(), Model.parse_obj, values)


def test_aliases_count_under_either_name():
    class Model(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(populate_by_name=True, extra="forbid")
        petal_width: float = pydantic.Field(alias="petalWidth")
        other: int = 1

    values = [{"petalWidth": 1}, {"petal_width": 1}, {"petal_width": 1, "other": 2}, {}]
    assert compare(Model.model_json_schema(), Model.model_validate, values) == 1


@pytest.mark.parametrize(
    "library",
    [
        Schema({"a": float, Maybe("b"): str}),
        Schema({"a": Or(int, str), str: object}),
        Schema({"a": And(Use(float), lambda n: n > 0)}, ignore_extra_keys=True),
        Schema([{"a": int}]),
    ],
    ids=["keys", "or", "converter", "list"],
)
def test_it_is_never_stricter_than_the_schema_library(library):
    published = shape(library)
    compare(published.json, published.convert, [*VALUES, *({"a": value} for value in VALUES)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"petal_width": "asdfg"}, "petal_width: Input should be a valid number, got 'asdfg'"),
        ({"petal_width": None}, "petal_width: Input should be a valid number, got None"),
        ({"petal_width": [1]}, "petal_width: Input should be a valid number, got a list of 1"),
        ({"petal_width": 99}, "petal_width: 99 is greater than the maximum of 10"),
        ({}, "petal_width: Field required"),
        ([1], "input: Input should be a valid object, got a list of 1"),
        ({"petal_width": 1, "colour": "blue"}, "colour: Input should be 'red' or 'green', got 'blue'"),
        ({"petal_width": 1, "inner": [{"a": 1}, {"a": "x"}]}, "inner[1].a: Input should be a valid integer, got 'x'"),
        ({"petal_width": 1, "inner": 5}, "inner: Input should be a valid list, got 5"),
        (
            {"petal_width": "x" * 5000},
            f"petal_width: Input should be a valid number, got '{'x' * 80}'... of 5000 characters",
        ),
    ],
)
def test_what_is_wrong_is_one_short_line_that_begins_with_the_field(data, message):
    class Model(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        petal_width: float = pydantic.Field(le=10)
        colour: Colour | None = None
        inner: list[Inner] | None = None

    assert refusal(Model.model_json_schema(), data) == message


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "no such type"},
        {"type": 5},
        {"minimum": "a", "exclusiveMinimum": True},
        {"required": "abc"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"properties": {"a": {"pattern": "(x+x+)+y"}}},
        {"pattern": "("},
        {"not": {}},
        {"unevaluatedProperties": False},
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_a_schema_that_is_no_use_is_no_check(schema):
    assert refusal(schema, {"a": "x" * 40}) is None


def test_a_schema_nested_too_deeply_is_no_check():
    schema: dict[str, Any] = {"type": "number"}
    for _ in range(3000):
        schema = {"allOf": [schema]}
    assert refusal(schema, "asdfg") is None


def test_nothing_is_fetched():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/schema"
        assert refusal({"$ref": address}, 5) is None
        assert refusal({"$schema": address, "$id": address, "type": "string"}, []) is not None
        server.shutdown()
        thread.join()
    assert asked == []


def test_a_good_input_costs_little():
    class Model(pydantic.BaseModel):
        sepal_length: float = pydantic.Field(gt=0)
        sepal_width: float
        petal_length: float
        petal_width: float

    check, data = InputCheck(Model.model_json_schema()), dict.fromkeys(Model.model_fields, 1.5)
    check.require(data)
    began = time.process_time()
    for _ in range(100):
        check.require(data)
    assert (time.process_time() - began) / 100 < 0.01


def test_what_plainly_fits_is_not_given_to_the_library(monkeypatch):
    class Row(pydantic.BaseModel):
        name: str
        size: Annotated[float, pydantic.Field(gt=0, le=10)]
        pixels: list[list[int]]
        tags: list[Any]

    row = {"name": "x", "size": 10, "pixels": [[1, 2]] * 100, "tags": [None, "y"]}
    wrong = [
        row | {"size": 10.5},
        row | {"size": 0},
        row | {"pixels": [["x"]]},
        row | {"name": []},
        {"name": "x"},
        [row],
    ]
    check = InputCheck(Row.model_json_schema())
    for data in wrong:
        with pytest.raises(InvalidInput):
            check.require(data)
    del check.__dict__["_validator"]
    monkeypatch.setattr(InputCheck, "_validator", None)
    check.require(row)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": [1, float("nan")]}, "a[1]: nan is not JSON"),
        (object(), "input: object is not JSON"),
        ({"a": {(1, 2): 3}}, "a: a key of type tuple is not JSON"),
    ],
)
def test_what_is_no_json_is_named_by_its_path(data, message):
    with pytest.raises(InvalidInput) as caught:
        as_json(data)
    assert str(caught.value) == message


def test_a_structure_that_holds_itself_is_no_json():
    data: list[Any] = []
    data.append(data)
    with pytest.raises(InvalidInput, match="contains itself"):
        as_json(data)
