"""From whatever a model returns to JSON."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from typing import Any, Callable, Dict, Iterable, Iterator, Sequence, Tuple, Union

MAX_DEPTH = 200
"""Levels of nesting at most; JSON readers, Python's among them, give up at about a thousand."""

_MAX_BITS = 14_000  # CPython refuses to print an integer of more than 4,300 digits
_BASES: Tuple[Any, ...] = (str, int, float, dict, list, tuple)

Key = Union[str, int]


class Misfit(Exception):
    """A value that does not belong where it is.

    Attributes:
        why: what is wrong with it.
        path: keys and indexes that lead to it, outermost first.
    """

    def __init__(self, why: str, path: Sequence[Key] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.path = list(path)


class OutputError(Misfit):
    """The output is no JSON."""

    def __str__(self) -> str:
        return f"{where('output', self.path)}: {self.why}"


def where(root: str, path: Sequence[Key]) -> str:
    """Return a path as a person writes it, such as ``output.scores[3]``; of a very long one, both ends."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return clip((root + "".join(parts)).lstrip("."), 200)


def clip(text: str, limit: int) -> str:
    """Return the text in one line of at most `limit` characters; of a longer text, both ends."""
    text = " ".join(text.split())
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 1]}…{text[-tail:]}"


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
    if kind is int:
        if value.bit_length() > _MAX_BITS:
            raise OutputError("an integer of thousands of digits")
        return value
    if kind is float:
        if value - value == 0.0:  # false for NaN and the infinities
            return value
        if null:
            return None
        raise OutputError(f'{value} is not JSON; return a number, or set nan = "null" in the model\'s table')
    if depth >= MAX_DEPTH:
        raise OutputError(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
    if kind is list or kind is tuple:
        return [one for _, one in _each(enumerate(value), null, depth + 1)]
    if kind is dict:
        return _object(value, null, depth + 1)
    return _convert(_plain(value), null, depth + 1)


def _plain(value: Any) -> Any:
    """Return a value of one of the plain types, at its top level."""
    kind: Any = type(value)
    return _opener(kind)(value)


@functools.lru_cache(maxsize=256)
def _opener(cls: Any) -> Callable[[Any], Any]:
    """Return what makes a plain value of one of this class; asking a pydantic object what it has takes microseconds."""
    if issubclass(cls, enum.Enum):
        return lambda value: value.value
    if hasattr(cls, "tolist"):
        return lambda value: value.tolist()
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        return lambda value: {name: getattr(value, name) for name in names}
    if hasattr(cls, "model_dump"):
        return lambda value: value.model_dump(mode="json")
    if hasattr(cls, "__fields__"):  # pydantic 1
        return lambda value: json.loads(value.json())
    for kind in _BASES:
        if issubclass(cls, kind):
            return kind  # type: ignore[no-any-return]
    raise OutputError(f"{cls.__name__} is not JSON")


def _object(value: Dict[Any, Any], null: bool, depth: int) -> Dict[str, Any]:
    pairs = ((key if type(key) is str else _key(key), one) for key, one in value.items())
    done = dict(_each(pairs, null, depth))
    if len(done) != len(value):
        raise OutputError("two keys become the same string")
    return done


def _each(pairs: Iterable[Tuple[Any, Any]], null: bool, depth: int) -> Iterator[Tuple[Any, Any]]:
    for key, value in pairs:
        try:
            yield key, _convert(value, null, depth)
        except OutputError as error:
            error.path.insert(0, key)
            raise


def _key(key: Any) -> str:
    plain = to_json(key)
    if isinstance(plain, (list, dict)):
        raise OutputError(f"a key of type {type(key).__name__} is not JSON")
    return plain if isinstance(plain, str) else json.dumps(plain)
