"""Columns between Arrow and the wire: one way for what the model is asked, the other way for what it answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import pyarrow as pa
from pyarrow import compute

if TYPE_CHECKING:
    from rq_models.scoring.formats import Slice

Kind = Literal["f8", "i8", "b1", "str", "json"]
ARROW = {"f8": pa.float64(), "i8": pa.int64(), "b1": pa.bool_(), "str": pa.string()}
_BYTES = {"f8": 8, "i8": 8, "b1": 1}
_TAKES: dict[Kind, Callable[[pa.DataType], bool]] = {
    "f8": lambda given: pa.types.is_integer(given) or pa.types.is_floating(given) or pa.types.is_decimal(given),
    "i8": lambda given: pa.types.is_integer(given) or pa.types.is_floating(given),
    "b1": pa.types.is_boolean,
    "str": lambda given: pa.types.is_string(given) or pa.types.is_large_string(given),
}
# What Arrow says of values that do not fit a type, or each other.
MISFIT = (pa.ArrowException, OverflowError, UnicodeError)
# As pydantic reads them.
_TRUTHS = dict.fromkeys(("true", "t", "1", "yes", "y", "on"), True)
_TRUTHS |= dict.fromkeys(("false", "f", "0", "no", "n", "off"), False)
_encode = json.JSONEncoder().encode


class Column(TypedDict, total=False):
    """The wire's description of a column, whose data are elsewhere; see `rq_models.host.columns`."""

    name: str
    kind: Kind
    bytes: int
    nulls: list[int]
    omit: bool


def kind_of(arrow_type: str) -> Kind:
    """Return the kind in which a column is sent if no schema says better, by its type of `formats.inspect`."""
    if arrow_type.startswith(("int", "uint")):
        return "i8"
    if arrow_type in {"double", "float", "halffloat"} or arrow_type.startswith("decimal"):
        return "f8"
    if arrow_type == "bool":
        return "b1"
    return "str" if arrow_type.startswith(("string", "large_string", "timestamp", "date", "time")) else "json"


def wire_column(part: Slice, name: str, kind: Kind, *, omit: bool = False) -> tuple[Column, bytes | memoryview]:
    """Return a column for the model, and its data.

    Cells of a CSV become what `kind` says; a blank one is a null, but in text. If one of the values does not fit, all
    go as JSON, each as it stands, so that the model refuses that row in its own words.

    Args:
        part: the rows.
        name: of the column.
        kind: as what the model wants it.
        omit: whether a null is left out of its row.
    """
    values = part.columns[name]
    fitting = _fitting(values, kind, is_text=part.is_text)
    if fitting is None:
        if part.is_text:
            values = [_spelled(cell, kind) for cell in values.to_pylist()]
        data: bytes | memoryview = _encode(plain(values)).encode()
        nulls: list[int] = []
        kind = "json"
    else:
        data = _data(fitting)
        empty = compute.is_null(fitting, nan_is_null=True)
        nulls = compute.indices_nonzero(empty).to_pylist()
    column = Column(name=name, kind=kind, bytes=len(data), omit=omit)
    if nulls:
        column["nulls"] = nulls
    return column, data


def _fitting(values: Any, kind: Kind, *, is_text: bool) -> pa.Array | None:
    """Return the values as an array of the kind's type, None if that takes more than a cast."""
    if kind == "json":
        return None
    try:
        # Without a type: with one, Arrow takes 5.5 for an integer and true for a number.
        array = pa.array(values) if isinstance(values, list) else values
        # Even so it takes [1.5, true] for numbers.
        if isinstance(values, list) and pa.types.is_floating(array.type) and bool in set(map(type, values)):
            return None
        if is_text:
            return array if kind == "str" else _without_nan(_cells(array, ARROW[kind]))
        if pa.types.is_null(array.type) or _TAKES[kind](array.type):
            # An integer may have no equal among the floats; an integer of a float must be one.
            return _without_nan(array).cast(ARROW[kind], safe=kind != "f8")
        if kind == "str" and pa.types.is_temporal(array.type) and not pa.types.is_duration(array.type):
            return pa.array(plain(array), ARROW[kind])
    except MISFIT:
        pass
    return None


def _without_nan(array: pa.Array) -> pa.Array:
    if not pa.types.is_floating(array.type):
        return array
    return compute.if_else(compute.is_nan(array), pa.scalar(None, array.type), array)


def _cells(array: pa.Array, wanted: pa.DataType) -> pa.Array:
    try:
        return array.cast(wanted)
    except pa.ArrowInvalid:
        array = compute.utf8_trim_whitespace(array)
        return compute.if_else(compute.equal(array, ""), pa.scalar(None, array.type), array).cast(wanted)


def _spelled(cell: str | None, kind: Kind) -> Any:
    """Return the value that a cell of a CSV spells, or the cell."""
    text = (cell or "").strip()
    if not text:
        return None
    try:
        if kind == "json":
            return json.loads(text)
        if kind == "b1":
            return _TRUTHS.get(text.lower(), cell)
        if kind == "i8" and text[:2] in {"0x", "0X"}:
            return int(text, 16)  # as Arrow reads it
        number = int(text) if kind == "i8" and text.lstrip("+-").isdigit() else float(text)
    except (ValueError, RecursionError):
        return cell
    # Python reads 1_000 as a number; nobody else does.
    return cell if "_" in text else None if math.isnan(number) else number


def parsed(cells: pa.Array, kind: Kind) -> Any:
    """Return what cells of a CSV spell: an array of the kind, or a list of values and of cells that spell none."""
    array = _fitting(cells, kind, is_text=True)
    return [_spelled(cell, kind) for cell in cells.to_pylist()] if array is None else array


def plain(values: Any) -> list[Any]:
    """Return values, or those of an array, as JSON has them: times in ISO's form, bytes as text."""
    if isinstance(values, list):
        return values
    kinds, given = pa.types, values.type
    if kinds.is_timestamp(given) and given.unit == "ns":
        # Python's times have no nanoseconds.
        values = values.cast(pa.timestamp("us", given.tz), safe=False)
    try:
        found: list[Any] = values.to_pylist()
    except (ValueError, OverflowError):
        found = values.cast(pa.string()).to_pylist()  # a year after 9999, say
    if kinds.is_integer(given) or kinds.is_boolean(given) or kinds.is_string(given):
        return found
    return [_plain(value) for value in found]


def _plain(value: Any) -> Any:  # noqa: PLR0911 - a table
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _data(array: pa.Array) -> bytes | memoryview:
    """Return the data of an array as the wire has them; without a copy if they are numbers."""
    rows, at = len(array), array.offset
    if not rows:
        return bytes(4) if pa.types.is_string(array.type) else b""
    if pa.types.is_boolean(array.type):
        return _data(array.cast(pa.uint8()))
    buffers = array.buffers()
    if not pa.types.is_string(array.type):
        width = array.type.bit_width // 8
        return memoryview(buffers[1])[at * width : (at + rows) * width]
    offsets = pa.Array.from_buffers(pa.int32(), rows + 1, [None, buffers[1]], offset=at)
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    if first:
        # A number without a type would make them int64.
        offsets = compute.subtract(offsets, offsets[0])
    return b"".join((_data(offsets), memoryview(buffers[2])[first:last] if last > first else b""))


def received(column: Column, data: memoryview, rows: int, lost: set[int]) -> Any:
    """Return a column of an answer: an array, or the list of values if it is JSON.

    Args:
        column: its description.
        data: its bytes.
        rows: how many it has.
        lost: rows that have no value.

    Raises:
        ValueError: the data are not what the description says.
    """
    kind = column["kind"]
    lost = lost.union(column.get("nulls", ()))
    if kind == "json":
        values = json.loads(bytes(data))
        if not isinstance(values, list) or len(values) != rows:
            raise ValueError(f"column {column['name']!r} is no list of {rows} values")
        return [None if row in lost else value for row, value in enumerate(values)] if lost else values
    if kind == "str":
        head = 4 * (rows + 1)
        buffers = [None, pa.py_buffer(data[:head]), pa.py_buffer(data[head:])]
        fits = len(data) >= head
    else:
        buffers = [None, pa.py_buffer(data)]
        fits = len(data) == rows * _BYTES[kind]
    if not fits:
        raise ValueError(f"column {column['name']!r} has {len(data)} bytes of kind {kind} for {rows} rows")
    array = pa.Array.from_buffers(pa.uint8() if kind == "b1" else ARROW[kind], rows, buffers)
    # A wrong offset would be read as an address in this process.
    array.validate(full=True)
    array = array.cast(ARROW[kind])
    if not lost:
        return array
    mask = bytearray(rows)
    for row in lost:
        mask[row] = 1
    empty = pa.Array.from_buffers(pa.uint8(), rows, [None, pa.py_buffer(mask)]).cast(pa.bool_())
    return compute.if_else(empty, pa.scalar(None, array.type), array)


def as_text(values: Any) -> pa.Array:
    """Return values as text: strings as they are, all else as JSON."""
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in plain(values)
    ]
    try:
        return pa.array(texts, pa.string())
    except UnicodeError:  # half of a character that UTF-16 has in two
        return pa.array([text and text.encode(errors="backslashreplace").decode() for text in texts], pa.string())


def as_json(values: list[Any]) -> pa.Array:
    """Return values as the text of their JSON; None stays a null."""
    return pa.array([None if value is None else _encode(value) for value in values], pa.string())
