from __future__ import annotations

import collections
import datetime as dt
import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
import pytest
from pydantic.v1 import BaseModel as BaseModelV1

from rq_models.host.output import OutputError, clip, to_json, where


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: float
    parts: list[Any]


class Dated(pydantic.BaseModel):
    day: dt.date
    values: list[float]


class DatedV1(BaseModelV1):
    day: dt.date


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024 - of the older kind, too


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, "b", None, True, 2.5]}, {"a": [1, "b", None, True, 2.5]}),
        ((1, (2,)), [1, [2]]),
        (Pair(1, [2]), [1, [2]]),
        ({1: "a", 2.5: "b", None: "c", np.int64(7): "e"}, {"1": "a", "2.5": "b", "null": "c", "7": "e"}),
        ({True: 1, Colour.RED: 2}, {"true": 1, "red": 2}),
        (collections.OrderedDict(a=np.float32(0.5)), {"a": 0.5}),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (np.array([Point(1.0, [])], dtype=object), [{"x": 1.0, "parts": []}]),
        ([np.float64(1.5), np.bool_(True), np.str_("s"), np.int8(3)], [1.5, True, "s", 3]),
        ([Colour.RED, Level.HIGH], ["red", 3]),
        (Point(np.float64(2), [Point(1, [])]), {"x": 2.0, "parts": [{"x": 1, "parts": []}]}),
        (Dated(day="2026-01-02", values=[1]), {"day": "2026-01-02", "values": [1.0]}),
        ([DatedV1(day="2026-01-02")], [{"day": "2026-01-02"}]),
        ("ü\ud800", "ü\ud800"),
        (-(2**70), -(2**70)),
    ],
)
def test_what_becomes_json(value, expected):
    found = to_json(value)

    assert found == expected
    assert repr(found) == repr(expected)  # of the plain types, all the way down


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"scores": [1, 2, 3, {4}]}, "output.scores[3]: set is not JSON"),
        ([b"bytes"], "output[0]: bytes is not JSON"),
        (dt.date(2026, 1, 2), "output: date is not JSON"),
        ({"x": np.array([1j])}, "output.x[0]: complex is not JSON"),
        ({(1, 2): 3}, "output: a key of type tuple is not JSON"),
        ({1: 2, "1": 3}, "output: two keys become the same string"),
        pytest.param({"n": 10**5000}, "output.n: an integer of thousands of digits", id="digits"),
        (Point(1, [object()]), "output.parts[0]: object is not JSON"),
    ],
)
def test_what_does_not_says_where_it_is(value, message):
    with pytest.raises(OutputError) as raised:
        to_json(value)

    assert str(raised.value) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(math.inf)])
def test_nan_is_an_error_or_null(value):
    assert to_json({"x": [value]}, nan="null") == {"x": [None]}
    with pytest.raises(OutputError, match=r"^output\.x\[0\]: -?(nan|inf) is not JSON"):
        to_json({"x": [value]})


def test_a_value_that_contains_itself_is_an_error():
    endless: dict[str, Any] = {}
    endless["again"] = [endless]

    with pytest.raises(OutputError, match="contains itself") as raised:
        to_json(endless)
    assert len(str(raised.value)) < 300


def test_a_value_whose_conversion_never_ends_is_an_error():
    class Endless:
        def tolist(self):
            return self

    with pytest.raises(OutputError, match="contains itself"):
        to_json(Endless())


def test_a_path_is_written_as_a_person_would():
    assert where("output", ["a", 3, "b"]) == "output.a[3].b"
    assert where("", ["a", "b"]) == "a.b"
    assert len(where("", ["k" * 10_000] * 100)) < 1000


def test_clipping_keeps_both_ends_in_one_line():
    assert clip("a\n b", 10) == "a b"
    clipped = clip("begin " + "x" * 10_000 + " end", 50)
    assert len(clipped) == 50
    assert clipped.startswith("begin ")
    assert clipped.endswith(" end")
