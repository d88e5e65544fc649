"""Why an input does not fit, in one line that names the field and never holds the whole input."""

from __future__ import annotations

import re
from typing import Any, Callable, Optional, Sequence

from .output import Key, Misfit, clip, where

_SHOWN = 80
_REASON = 160
_KEY_ERROR = re.compile(r"(?:'.*' )?Key '(.*)' error:", re.DOTALL)


class InputError(Misfit):
    """The input does not fit the model's schema.

    Attributes:
        type: class name of the exception that the model's own validation raised; None when it was ours.
    """

    def __init__(self, why: str, path: Sequence[Key] = (), type: Optional[str] = None) -> None:  # noqa: A002 - as in the error record
        super().__init__(why, path)
        self.type = type

    def __str__(self) -> str:
        return f"{where('', self.path) or 'input'}: {self.why}"


def wrong(expected: str, value: Any) -> InputError:
    """Return the error of a value that is not what was expected."""
    return InputError(f"Input should be {expected}, got {show(value)}")


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


def checked(validate: Callable[[Any], Any], value: Any) -> Any:
    """Return what a library's validation makes of a value; its error becomes an `InputError`."""
    try:
        return validate(value)
    except Exception as error:
        refusal = explain(error, value)
        if refusal is None:
            raise
        raise refusal from error


def explain(error: Optional[BaseException], data: Any) -> Optional[InputError]:
    """Return what a pydantic or ``schema`` error says of `data`, or None if it is neither.

    Both are known by their attributes, so that neither library need be there.
    """
    errors = getattr(error, "errors", None)
    if callable(errors) and type(error).__name__ == "ValidationError":
        return _of_pydantic(errors(), data)
    if isinstance(errors, list) and isinstance(getattr(error, "autos", None), list):
        return _of_library(error, data)
    return None


def _of_pydantic(errors: Any, data: Any) -> InputError:
    first = errors[0]
    path = [key for key in first["loc"] if key != "__root__"]
    why = clip(str(first["msg"]), _REASON)
    # A missing field has the whole object around it for a value, and one too many is wrong whatever it holds.
    if "missing" not in first["type"] and "extra" not in first["type"]:
        # Version 1 does not say what it saw.
        why += f", got {show(first['input'] if 'input' in first else _at(path, data))}"
    return InputError(why + (f"; and {len(errors) - 1} more" if len(errors) > 1 else ""), path, "ValidationError")


def _of_library(error: Any, data: Any) -> InputError:
    path = [match[1] for match in map(_KEY_ERROR.fullmatch, filter(None, error.autos)) if match]
    # The schema's author may have given words of his own; else the innermost of the library's counts.
    texts = [text for text in [*error.autos, *error.errors] if text and not _KEY_ERROR.fullmatch(text)]
    why = texts[-1] if texts else str(error)
    value = _at(path, data)
    if isinstance(value, (dict, list)):
        why = why.partition(" in {")[0].replace(repr(value), show(value))
    return InputError(clip(why, _REASON), path, type(error).__name__)


def _at(path: Sequence[Any], data: Any) -> Any:
    for key in path:
        try:
            data = data[key]
        except (LookupError, TypeError):
            return data
    return data
