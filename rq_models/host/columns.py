"""Rows as columns, the form in which many rows cross between the horse and its parent.

A question asks to predict rows: ``{"op": "score", "rows": n, "columns": [...], "whole": bool, "outputs": [...] or None,
"timeout": seconds or None}``. A row is a dict of its columns' values; with ``whole`` there is one column, and the row
is its value. ``outputs`` are ``{"name", "kind"}``: entries of each output, or, if one is named "", the output itself;
None is short for that one as JSON. The answer is ``{"op": "scored", "rows": n, "failed": [[row number, error record],
...], "columns": [...], "seconds": float}``: its columns are the outputs, null in the rows that failed.

A column is ``{"name": str, "kind": str, "bytes": int, "nulls": [row numbers], "omit": bool}``. ``nulls`` may be absent;
``omit`` says of a question's column that a row is given no entry for a null, instead of None. The data of the columns
stand one after the other in the frame's blob, those of a column, all little-endian, by its kind:

- f8, i8: float64, int64; b1: bytes that are 0 or 1.
- str: n + 1 int32, where each value begins and the last one ends, then the values in UTF-8.
- json: a list of n values, as text.

At a null's place stands anything.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import json
import math
import operator
import struct
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from .frames import FrameError, body_of
from .output import OutputError, _plain, to_json
from .refusal import show

Json = Dict[str, Any]
Blob = Union[bytes, memoryview]
Values = Sequence[Any]

WHOLE = [{"name": "", "kind": "json"}]
"""The outputs that are meant by None."""

_FIXED = {"f8": ("d", 8), "i8": ("q", 8), "b1": ("?", 1)}
_NOTHING: Json = {"f8": 0.0, "i8": 0, "b1": False, "str": "", "json": None}
_OFFSET = 4
_LONG = 1 << 63
_EXPECTED = {
    "f8": "a number",
    "i8": "an integer of 64 bits",
    "b1": "a boolean",
    "str": "a string of Unicode characters",
}
# The types whose values are of a kind as they are, but for what `_fits` looks at; JSON may mix one of them with None.
_TYPES: Dict[str, Sequence[Any]] = {"f8": [{float, int}], "i8": [{int}], "b1": [{bool}], "str": [{str}]}
_TYPES["json"] = [{float}, {bool}, {str}]


class ColumnError(ValueError):
    """These are no columns of so many rows."""


def encode(shapes: Sequence[Json], columns: Sequence[Values]) -> Tuple[List[Json], bytes]:
    """Return columns and their data.

    Args:
        shapes: name and kind of each column, and ``omit`` if that is to be said.
        columns: the values of each; None is a null.

    Raises:
        ColumnError: a value is not of its column's kind.
    """
    heads, parts = [], []
    for shape, values in zip(shapes, columns):  # noqa: B905 - Python 3.8
        kind = shape["kind"]
        head = {**shape}
        if None in values:
            head["nulls"] = [index for index, value in enumerate(values) if value is None]
            values = [_NOTHING[kind] if value is None else value for value in values]  # noqa: PLW2901 - only the nulls
        try:
            data = _packed(kind, values)
        except (struct.error, OverflowError, UnicodeError, TypeError, AttributeError, FrameError) as error:
            raise ColumnError(f"column {shape['name']!r} is not {kind}: {error}") from error
        head["bytes"] = len(data)
        heads.append(head)
        parts.append(data)
    return heads, b"".join(parts)


def _packed(kind: str, values: Values) -> bytes:
    if kind == "json":
        return body_of(list(values))
    if kind == "str":
        text = "".join(values)
        data = text.encode()
        # In ASCII, which is the rule, characters are bytes.
        lengths = map(len, values if len(data) == len(text) else [value.encode() for value in values])
        return struct.pack(f"<{len(values) + 1}i", 0, *itertools.accumulate(lengths)) + data
    return struct.pack(f"<{len(values)}{_FIXED[kind][0]}", *values)


def decode(columns: Sequence[Json], blob: Blob, rows: int) -> List[Values]:
    """Return the values of each of these columns; a null is None.

    Raises:
        ColumnError: the columns are damaged, or have another number of rows.
    """
    found = []
    for column, data in _split(columns, blob):
        try:
            values = _unpacked(column["kind"], data, rows)
            nulls = column.get("nulls")
            if nulls:
                values = list(values)
                for index in nulls:
                    values[index] = None
        except (struct.error, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ColumnError(f"column {column.get('name')!r} can't be read: {error}") from error
        if len(values) != rows:
            raise ColumnError(f"column {column['name']!r} has {len(values)} rows of {rows}")
        found.append(values)
    return found


def _split(columns: Sequence[Json], blob: Blob) -> Iterator[Tuple[Json, memoryview]]:
    view = memoryview(blob).cast("B")
    end = 0
    for column in columns:
        start, end = end, end + column["bytes"]
        yield column, view[start:end]
    if end != len(view):
        raise ColumnError(f"the columns have {end} bytes, and there are {len(view)}")


def _unpacked(kind: str, data: memoryview, rows: int) -> Values:
    if kind == "json":
        return list(json.loads(bytes(data)))
    if kind == "str":
        begin = _OFFSET * (rows + 1)
        offsets, text = struct.unpack(f"<{rows + 1}i", data[:begin]), bytes(data[begin:])
        return [text[start:end].decode() for start, end in zip(offsets, offsets[1:])]  # noqa: B905, RUF007 - Python 3.8
    return struct.unpack(f"<{rows}{_FIXED[kind][0]}", data)


def rows(question: Json, blob: Blob) -> List[Any]:
    """Return the rows of a question, as the model's input schema is to see them.

    Raises:
        ColumnError: the columns are damaged.
    """
    count, columns = question["rows"], question["columns"]
    found = decode(columns, blob, count)
    if question["whole"]:
        if len(found) != 1:
            raise ColumnError(f"one column can be the whole row, not {len(found)}")
        return list(found[0])
    if not found:
        return [{} for _ in range(count)]
    first = columns[0]["name"]
    done = [{first: value} for value in found[0]]
    # Twice as fast as a dict of the names and values of each row.
    for column, values in zip(columns[1:], found[1:]):  # noqa: B905 - Python 3.8
        name = column["name"]
        for row, value in zip(done, values):  # noqa: B905 - Python 3.8
            row[name] = value
    for column in columns:
        if column.get("omit"):
            for index in set(column.get("nulls") or ()):
                done[index].pop(column["name"], None)
    return done


def cut(question: Json, blob: Blob, start: int, stop: int) -> Tuple[Json, bytes]:
    """Return the same question of the rows from `start` up to `stop`, and its blob.

    Raises:
        ColumnError: the columns are damaged.
    """
    heads, parts = [], []
    for column, data in _split(question["columns"], blob):
        try:
            part = _part(column["kind"], data, question["rows"], start, stop)
        except (struct.error, ValueError, TypeError, RecursionError) as error:
            raise ColumnError(f"column {column['name']!r} can't be cut: {error}") from error
        head = {**column, "bytes": len(part)}
        if column.get("nulls"):
            head["nulls"] = [index - start for index in column["nulls"] if start <= index < stop]
        heads.append(head)
        parts.append(part)
    return {**question, "rows": stop - start, "columns": heads}, b"".join(parts)


def _part(kind: str, data: memoryview, rows: int, start: int, stop: int) -> bytes:
    if kind == "json":
        # With infinities, which JSON Lines of some producers have.
        return json.dumps(_unpacked(kind, data, rows)[start:stop]).encode()
    if kind == "str":
        texts = data[_OFFSET * (rows + 1) :]
        offsets = struct.unpack(f"<{stop - start + 1}i", data[_OFFSET * start : _OFFSET * (stop + 1)])
        moved = struct.pack(f"<{len(offsets)}i", *(offset - offsets[0] for offset in offsets))
        return moved + bytes(texts[offsets[0] : offsets[-1]])
    width = _FIXED[kind][1]
    return bytes(data[width * start : width * stop])


def singles(question: Json, blob: Blob) -> Iterator[Tuple[Json, Blob]]:
    """Yield the same question of each row alone.

    Raises:
        ColumnError: the columns are damaged.
    """
    # By halves: to cut JSON it must be read as a whole, and a thousand times would take too long.
    count = question["rows"]
    if count == 1:
        yield question, blob
        return
    half = count // 2
    for start, stop in ((0, half), (half, count)):
        if start < stop:
            yield from singles(*cut(question, blob, start, stop))


def lost(question: Json, record: Any) -> Json:
    """Return the answer, with its blob, to a question all of whose rows failed for the same reason."""
    count = question["rows"]
    shapes = question["outputs"] or WHOLE
    return _answer(shapes, [[None] * count] * len(shapes), [[index, record] for index in range(count)], 0.0)


def join(answers: Sequence[Json]) -> Json:
    """Return the answers to parts of a question, one or more with their blobs, as the answer to the whole."""
    failed: List[Any] = []
    columns: List[List[Any]] = [[] for _ in answers[0]["columns"]]
    start = 0
    for answer in answers:
        failed += [[start + index, record] for index, record in answer["failed"]]
        for index, values in enumerate(decode(answer["columns"], answer["blob"], answer["rows"])):
            columns[index] += values
        start += answer["rows"]
    shapes = [{"name": column["name"], "kind": column["kind"]} for column in answers[0]["columns"]]
    return _answer(shapes, columns, failed, sum(answer["seconds"] for answer in answers))


def _answer(shapes: Sequence[Json], columns: Sequence[List[Any]], failed: List[Any], seconds: float) -> Json:
    heads, blob = encode(shapes, columns)
    count = len(columns[0])
    return {"op": "scored", "rows": count, "failed": failed, "columns": heads, "seconds": seconds, "blob": blob}


def take(results: Sequence[Any], outputs: Sequence[Json]) -> Optional[List[Values]]:
    """Return the columns of the model's results, if it is plain that each value is of its column's kind.

    It is when all results are of one class, whose entries can be told without looking at each, as those of most are.
    None says nothing but that `entries` has to look at each result.
    """
    classes = set(map(type, results))
    if len(classes) != 1:
        return None
    found = []
    for shape in outputs:
        values: Optional[Values] = results
        if shape["name"]:
            taker = _taker(*classes, shape["name"])
            try:
                values = None if taker is None else list(map(taker, results))
            except AttributeError:  # an entry that was never set
                return None
        if values is None or not _fits(values, shape["kind"]):
            return None
        found.append(values)
    return found


@functools.lru_cache(maxsize=256)
def _taker(cls: Any, name: str) -> Optional[Callable[[Any], Any]]:
    """Return what takes this entry out of an object of a class, if that gives the same as `to_json` would."""
    if cls is dict:
        return operator.methodcaller("get", name)
    if not name.isidentifier() or issubclass(cls, enum.Enum) or hasattr(cls, "tolist"):
        return None
    if dataclasses.is_dataclass(cls):
        return operator.attrgetter(name) if name in {field.name for field in dataclasses.fields(cls)} else None
    dump, schema = getattr(cls, "model_dump", None), getattr(cls, "__pydantic_core_schema__", None)
    # Of a pydantic object it does, unless it is told to dump itself in some other way.
    if getattr(dump, "__module__", None) != "pydantic.main" or not isinstance(schema, dict) or _dumps_specially(schema):
        return None
    return operator.attrgetter(name) if name in getattr(cls, "model_fields", ()) else None


def _dumps_specially(schema: Any) -> bool:
    if isinstance(schema, (list, tuple)):
        return any(map(_dumps_specially, schema))
    if not isinstance(schema, dict):
        return False
    return schema.get("root_model") is True or any(
        key.startswith("serialization") or (key != "metadata" and _dumps_specially(value))
        for key, value in schema.items()
        if isinstance(key, str)
    )


def _fits(values: Values, kind: str) -> bool:
    """Return whether all of these are nulls or of this kind, and none needs a closer look."""
    classes = set(map(type, values))
    if type(None) in classes:
        classes.remove(type(None))
        values = [value for value in values if value is not None]
    if not any(classes <= allowed for allowed in _TYPES[kind]):
        return False
    try:
        if kind == "str":
            "".join(values).encode()
        elif int in classes and kind == "f8":
            values = list(map(float, values))
        elif int in classes:
            return bool(min(values) >= -_LONG and max(values) < _LONG)
        # NaN, the infinities, and what adds up to one.
        return float not in classes or math.isfinite(sum(values))
    except (OverflowError, UnicodeError):
        return False


def entries(result: Any, outputs: Sequence[Json], nan: str) -> List[Any]:
    """Return what one of the model's results has for each column.

    Args:
        result: what the model returned for one input.
        outputs: name and kind of each column; one that is named "" is the whole result.
        nan: see `to_json`.

    Raises:
        OutputError: an entry is not of its column's kind, or the result is no object; it says which column.
    """
    if not outputs[0]["name"]:
        return [_fit(to_json(result, nan), outputs[0]["kind"])]
    opened = result
    if not isinstance(result, (dict, list, tuple, str, float, int, type(None))):
        opened = _plain(result)
    if not isinstance(opened, dict):
        names = ", ".join(shape["name"] for shape in outputs)
        raise OutputError(f"should be an object with {names}, got {show(opened)}")
    found = []
    for shape in outputs:
        try:
            found.append(_fit(to_json(opened.get(shape["name"]), nan), shape["kind"]))
        except OutputError as error:
            error.path.insert(0, shape["name"])
            raise
    return found


def _fit(value: Any, kind: str) -> Any:
    """Return a JSON value as one of this kind, or None if it is null."""
    if value is None or kind == "json":
        return value
    if kind == "i8" and type(value) is float and value.is_integer():
        value = int(value)
    if _fits([value], kind):
        return float(value) if kind == "f8" else value
    raise OutputError(f"should be {_EXPECTED[kind]}, got {show(value)}")
