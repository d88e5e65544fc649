"""From whatever a model returns to JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any, Dict, List, Tuple, Union

MAX_DEPTH = 200
"""Levels of nesting at most; JSON readers, Python's among them, give up at about a thousand."""

_MAX_BITS = 14_000  # CPython refuses to print an integer of more than 4,300 digits
_INFINITY = float("inf")
_BASES: Tuple[Any, ...] = (int, float, dict, list, tuple)
_PLAIN_KEYS = (str, int, bool, float, type(None))

Key = Union[str, int]


class OutputError(Exception):
    """The output is no JSON.

    Attributes:
        path: keys and indexes that lead to the offending value, outermost first.
        why: what is wrong with it.
    """

    def __init__(self, why: str, path: List[Key]) -> None:
        super().__init__(why)
        self.why = why
        self.path = path

    def __str__(self) -> str:
        return f"{where('output', self.path)}: {self.why}"


def where(root: str, path: List[Key]) -> str:
    """Return a path as a person writes it, such as ``output.scores[3]``; of a very long one, both ends."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{clip(key, 60)}" for key in path]
    if len(parts) > 12:  # noqa: PLR2004 - about a line
        parts[8:-4] = ["..."]
    return (root + "".join(parts)).lstrip(".")


def clip(text: str, limit: int) -> str:
    """Return the text in one line of at most `limit` characters; of a longer text, both ends."""
    if len(text) > 2 * limit:
        text = text[:limit] + "…" + text[-limit:]
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    tail = limit // 3
    return text[: limit - tail - 1] + "…" + text[-tail:]


def to_json(value: Any, nan: str = "error") -> Any:
    """Return `value` in lists, dicts, strings, numbers, booleans and None.

    Tuples become lists; whatever has ``tolist`` (numpy, tensors) is asked for it; dataclasses, pydantic objects and
    enums are taken apart; keys become strings as JSON's do.

    Args:
        value: what a model returned.
        nan: NaN and the infinities become None if this is "null", and are errors if it is "error".

    Raises:
        OutputError: the value holds something else; it says where.
    """
    return _convert(value, nan == "null", 0)


def _convert(value: Any, null: bool, depth: int) -> Any:  # noqa: PLR0911 - one branch per type, commonest first
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is float:
        if value - value == 0.0:  # false for NaN and the infinities
            return value
        if null:
            return None
        raise OutputError(f'{value} is not JSON; return a number, or set nan = "null" in the model\'s table', [])
    if kind is int:
        if value.bit_length() > _MAX_BITS:
            raise OutputError("an integer of thousands of digits", [])
        return value
    if depth >= MAX_DEPTH:
        raise OutputError(f"nested more than {MAX_DEPTH} levels deep, or contains itself", [])
    if kind is dict:
        return _object(value, null, depth + 1)
    if kind is list or kind is tuple:
        return _array(value, null, depth + 1)
    return _convert(_plain(value), null, depth + 1)


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one branch per type
    """Return a value of one of the plain types, at its top level."""
    if isinstance(value, enum.Enum):
        return value.value
    if not isinstance(value, type):
        if callable(getattr(value, "tolist", None)):
            return value.tolist()
        if dataclasses.is_dataclass(value):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if callable(getattr(value, "model_dump", None)):
            return _dump(value)
        if callable(getattr(value, "json", None)) and hasattr(value, "__fields__"):
            return json.loads(value.json())
    if isinstance(value, str):
        return str.__str__(value)
    for kind in _BASES:
        if isinstance(value, kind):
            return kind(value)
    raise OutputError(f"{_name(value)} is not JSON", [])


def _dump(value: Any) -> Any:
    try:
        return value.model_dump(mode="json")
    except Exception as error:
        raise OutputError(f"{_name(value)} can't be dumped to JSON: {clip(str(error), 200)}", []) from error


def _array(values: Any, null: bool, depth: int) -> List[Any]:
    done: List[Any] = []
    try:
        for value in values:
            done.append(_convert(value, null, depth))  # noqa: PERF401 - its length is the index of what failed
    except OutputError as error:
        error.path.insert(0, len(done))
        raise
    return done


def _object(values: Dict[Any, Any], null: bool, depth: int) -> Dict[str, Any]:
    done: Dict[str, Any] = {}
    for key, value in values.items():
        name = key if type(key) is str else _key(key)
        try:
            done[name] = _convert(value, null, depth)
        except OutputError as error:
            error.path.insert(0, name)
            raise
    if len(done) != len(values):
        raise OutputError("two keys become the same string", [])
    return done


def _key(key: Any) -> str:
    plain = key if type(key) in _PLAIN_KEYS else _plain(key)
    if plain is None or type(plain) is bool:
        return json.dumps(plain)
    if isinstance(plain, (str, int)) or (isinstance(plain, float) and abs(plain) < _INFINITY):
        return str(plain)
    raise OutputError(f"a key of type {_name(key)} is not JSON", [])


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
