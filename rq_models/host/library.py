"""Reads objects of the ``schema`` library, known by their attributes: nothing is imported.

A model is given its input as it came, as the older ``MLModel`` is, which validates for itself; except that integers
become floats where the object takes floats only: the library is strict about that, and JSON has no such difference.
What is published is never stricter than the object: where it is not plain what that takes, anything is.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

from .refusal import InputError, checked

_TYPES = {float: "number", int: "integer", str: "string", bool: "boolean", list: "array", dict: "object"}


def read(declared: Any) -> Tuple[Dict[str, Any], Callable[[Any], Any]]:
    """Return the JSON Schema of such an object, and its check, which raises `InputError`."""

    def convert(value: Any) -> Any:
        try:
            checked(declared.validate, value)
        except InputError:
            value = _with_floats(declared, value)
            checked(declared.validate, value)
        return value

    return _published(declared), convert


def as_float(value: Any) -> Any:
    """Return an integer as a float, unless it is too large for one, and anything else as it is."""
    return float(value) if type(value) is int and abs(value) < 1 << 1000 else value


def _bare(declared: Any) -> Any:
    """Return what is inside Schema, Optional and Literal."""
    while hasattr(declared, "schema"):
        declared = declared.schema
    return declared


def _parts(declared: Any) -> Any:
    """Return what And and Or, which is one too, are made of."""
    return declared.args if any(cls.__name__ == "And" for cls in type(declared).__mro__) else ()


def _with_floats(declared: Any, value: Any) -> Any:
    declared = _bare(declared)
    if declared is float:
        return as_float(value)
    if isinstance(declared, dict) and isinstance(value, dict):
        items = {_bare(key): item for key, item in declared.items()}
        return {key: _with_floats(items.get(key, items.get(str)), one) for key, one in value.items()}
    if isinstance(declared, list) and isinstance(value, list):
        for part in declared:
            value = [_with_floats(part, one) for one in value]
    for part in _parts(declared):
        value = _with_floats(part, value)
    return value


def _published(declared: Any) -> Dict[str, Any]:
    declared = _bare(declared)
    if isinstance(declared, dict):
        properties = {_bare(key): _published(item) for key, item in declared.items() if isinstance(_bare(key), str)}
        return {"type": "object", "properties": properties, "required": [key for key in declared if type(key) is str]}
    if isinstance(declared, list):
        return {"type": "array", "items": _published(declared[0])} if len(declared) == 1 else {"type": "array"}
    if declared is None or isinstance(declared, (str, int, float)):
        return {"const": declared}
    parts = [_published(part) for part in _parts(declared)]
    if parts and type(declared).__name__ == "And":
        return parts[0]  # what stands behind a converter describes no input
    if parts:
        return {"anyOf": parts} if all(parts) else {}
    return {"type": _TYPES[declared]} if isinstance(declared, type) and declared in _TYPES else {}
