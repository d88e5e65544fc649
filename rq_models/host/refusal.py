"""Why an input does not fit, in one line that names the field and never holds the whole input."""

from __future__ import annotations

import re
from typing import Any, Callable, List, Optional, Tuple

from .output import Key, clip, where

_SHOWN = 80
_REPORTED = 3
_REASON = 160
_KEY_ERROR = re.compile(r"(?:'.*' )?Key '(.*)' error:", re.DOTALL)
_WRONG_KEY = re.compile(r"(Wrong keys? .*?) in \{.*", re.DOTALL)


class InputError(Exception):
    """The input does not fit the model's schema.

    Attributes:
        problems: for each one the path to the value, outermost key first, and what is wrong with it.
        type: class name of the exception that the model's own validation raised; None when it was ours.
    """

    def __init__(self, problems: List[Tuple[List[Key], str]], type: Optional[str] = None) -> None:  # noqa: A002 - as in the error record
        super().__init__(problems)
        self.problems = problems
        self.type = type

    def __str__(self) -> str:
        lines = [f"{where('', path) or 'input'}: {why}" for path, why in self.problems[:_REPORTED]]
        more = len(self.problems) - _REPORTED
        return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")

    def under(self, key: Key) -> None:
        """Say that all of it was found inside this key."""
        for path, _ in self.problems:
            path.insert(0, key)


def wrong(expected: str, value: Any) -> InputError:
    """Return the error of a value that is not what was expected."""
    return InputError([([], f"Input should be {expected}, got {show(value)}")])


def show(value: Any) -> str:
    """Return a value as a message may show it: scalars, the longest of them cut; of the others only what they are."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}... of {len(value)} characters"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < _SHOWN):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def explain(error: Optional[BaseException], data: Any) -> Optional[InputError]:
    """Return what a pydantic or ``schema`` error says of `data`, or None if it is neither.

    Both are known by their attributes, so that neither library need be there.
    """
    errors = getattr(error, "errors", None)
    if callable(errors) and type(error).__name__ == "ValidationError":
        return InputError([_pydantic(one, data) for one in errors()], type(error).__name__)
    if isinstance(errors, list) and isinstance(getattr(error, "autos", None), list):
        return InputError([_library(error, data)], type(error).__name__)
    return None


def checked(validate: Callable[[Any], Any], value: Any) -> Any:
    """Return what a library's validation makes of a value; its error becomes an `InputError`."""
    try:
        return validate(value)
    except Exception as error:
        refusal = explain(error, value)
        if refusal is None:
            raise
        raise refusal from error


def _pydantic(one: Any, data: Any) -> Tuple[List[Key], str]:
    path = [key for key in one["loc"] if key != "__root__"]
    why = clip(str(one["msg"]), _REASON)
    # A missing field has the whole object around it for a value, and one too many is wrong whatever it holds.
    if "missing" not in one["type"] and "extra" not in one["type"]:
        # Version 1 does not say what it saw.
        why += f", got {show(one['input'] if 'input' in one else _at(path, data))}"
    return path, why


def _library(error: Any, data: Any) -> Tuple[List[Key], str]:
    path: List[Key] = []
    why = str(error)
    for text in error.autos:
        match = _KEY_ERROR.fullmatch(text or "")
        if match:
            path.append(match[1])
        elif text:
            why = text
    value = _at(path, data)
    if isinstance(value, (dict, list)):
        why = _WRONG_KEY.sub(r"\1", why).replace(repr(value), show(value))
    own_words = [text for text in error.errors if text]
    return path, clip(own_words[-1] if own_words else why, _REASON)


def _at(path: List[Key], data: Any) -> Any:
    for key in path:
        try:
            data = data[key]
        except (LookupError, TypeError):
            return data
    return data
