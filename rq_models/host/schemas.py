"""What a model says of its input and output, as JSON Schema and as a function that checks and converts.

A model may say it by dataclasses, TypedDicts and builtin hints, which are compiled here; by pydantic classes, version 1
or 2; or by objects of the ``schema`` library. The last two are known by their methods, so neither need be installed.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import logging
import sys
import typing
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from .library import as_float
from .library import read as read_library
from .output import Key, clip, to_json
from .refusal import InputError, checked, wrong

Json = Dict[str, Any]
Convert = Callable[[Any], Any]
"""Takes a JSON value and returns what `predict` is given for it, or raises `InputError`."""

_LOG = logging.getLogger("rq_models")
# Their names in JSON Schema and in messages.
_SCALARS = {
    float: ("number", "a valid number"),
    int: ("integer", "a valid integer"),
    str: ("string", "a valid string"),
    bool: ("boolean", "a valid boolean"),
    type(None): ("null", "null"),
}


class Shape(NamedTuple):
    """One side of a model: its JSON Schema, or None if nothing is known of it, and its conversion."""

    json: Optional[Json]
    convert: Convert


def anything(value: Any) -> Any:
    """Return the value: the conversion of what is not known."""
    return value


UNKNOWN = Shape(None, anything)


def shape(declared: Any, *, output: bool = False) -> Shape:
    """Return the shape that a schema or a type hint declares.

    Args:
        declared: a type hint, a pydantic class, an object of the ``schema`` library, or a JSON Schema in a dict. The
            last is published as it is, and nothing is checked here. None declares nothing.
        output: whether it is the output's, for pydantic, which tells the two apart.
    """
    reader = _Reader(output=output)
    try:
        if declared is None:
            return UNKNOWN
        if isinstance(declared, dict):
            return Shape(to_json(declared), anything)
        if not isinstance(declared, type) and hasattr(declared, "validate") and hasattr(declared, "schema"):
            found, convert = read_library(declared)
        else:
            found, convert = reader.read(declared)
        return Shape(to_json({**found, **reader.definitions}, nan="null") or None, convert)
    except Exception as error:  # noqa: BLE001 - hints are the model's code, and may raise anything
        # The model may well run; only its card is the poorer for it.
        _LOG.warning("can't read the schema %.200r: %s: %s", declared, type(error).__name__, clip(str(error), 200))
        return UNKNOWN


def hints(thing: Any) -> Dict[str, Any]:
    """Return the evaluated type hints of a function or class, with what Annotated and Required say."""
    extras: Any = {"include_extras": True} if sys.version_info >= (3, 9) else {}
    return typing.get_type_hints(thing, **extras)


def _special(hint: Any) -> Optional[str]:
    # By name: on older Pythons these come from typing_extensions.
    return getattr(typing.get_origin(hint), "_name", None)


def _scalar(kind: Any) -> Tuple[Json, Convert]:
    name, expected = _SCALARS[kind]

    def convert(value: Any) -> Any:
        done = as_float(value) if kind is float else value
        if kind is int and type(value) is float and value.is_integer():  # 5.0 is an integer to JSON Schema
            done = int(value)
        if type(done) is kind:  # bool is an int to Python, and no number to JSON
            return done
        raise wrong(expected, value)

    return {"type": name}, convert


def _inside(key: Key, convert: Convert, value: Any) -> Any:
    try:
        return convert(value)
    except InputError as error:
        error.path.insert(0, key)
        raise


def _choice(members: Any) -> Tuple[Json, Convert]:
    """Read an Enum or the arguments of a Literal."""
    pairs = [(getattr(member, "value", member), member) for member in members]
    allowed = clip(" or ".join(repr(given) for given, _ in pairs), 200)

    def convert(value: Any) -> Any:
        for given, taken in pairs:
            if given == value and isinstance(given, bool) == isinstance(value, bool):
                return taken
        raise wrong(allowed, value)

    return {"enum": [given for given, _ in pairs]}, convert


def _either(members: List[Convert]) -> Convert:
    """Return the conversion to the first member that takes the value."""

    def convert(value: Any) -> Any:
        errors = []
        for member in members:
            try:
                return member(value)
            except InputError as error:
                errors.append(error)
        # Whoever got furthest into the value is the one that was meant.
        deepest = max(errors, key=lambda error: len(error.path))
        if deepest.path:
            raise deepest
        whys = [error.why.split(", got ")[0].replace("Input should be ", "") for error in errors]
        raise wrong(clip(" or ".join(whys), 200), value)

    return convert


class _Reader:
    """Reads one declaration, and collects the definitions that pydantic's part of it refers to."""

    def __init__(self, *, output: bool) -> None:
        self.definitions: Dict[str, Json] = {}
        self._output = output

    def read(self, hint: Any) -> Tuple[Json, Convert]:  # noqa: PLR0911 - one branch per kind of hint
        """Return the JSON Schema of a hint, {} for one that is not known, and its conversion."""
        if hasattr(hint, "__metadata__"):  # Annotated
            return self.read(hint.__origin__)
        if hint in _SCALARS:
            return _scalar(hint)
        kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        if kind is Union or type(hint).__name__ == "UnionType":
            read = [self.read(one) for one in arguments]
            found = [schema for schema, _ in read]
            return {"anyOf": found} if all(found) else {}, _either([convert for _, convert in read])
        if _special(hint) == "Literal":
            return _choice(arguments)
        if kind in (list, tuple, set, frozenset, dict):
            return self._read_container(kind, arguments)
        if hasattr(kind, "model_validate") or hasattr(kind, "parse_obj"):
            return self._read_pydantic(kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return _choice(kind)
        if dataclasses.is_dataclass(kind) or hasattr(kind, "__total__"):
            return self._read_record(kind)
        return {}, anything

    def _read_container(self, kind: Any, arguments: Tuple[Any, ...]) -> Tuple[Json, Convert]:
        """Read a list or dict or the like; a tuple that gives each item a type of its own is not looked into."""
        is_dict = kind is dict
        alike = arguments and (kind is not tuple or arguments[-1] is Ellipsis)
        found, item = self.read(arguments[1 if is_dict else 0]) if alike else ({}, anything)

        def convert(value: Any) -> Any:
            if not isinstance(value, dict if is_dict else list):
                raise wrong("a valid object" if is_dict else "a valid list", value)
            pairs = enumerate(value) if isinstance(value, list) else value.items()
            done = {key: _inside(key, item, one) for key, one in pairs}
            return done if is_dict else kind(done.values())

        name, inner = ("object", "additionalProperties") if is_dict else ("array", "items")
        return {"type": name, inner: found} if found else {"type": name}, convert

    def _read_record(self, cls: Any) -> Tuple[Json, Convert]:
        """Read a dataclass, which takes its own fields only, or a TypedDict, which lets others pass."""
        closed = dataclasses.is_dataclass(cls)
        types = hints(cls)
        if closed:
            defaults = {one.name: one.default for one in inspect.signature(cls).parameters.values()}
            types = {name: types[name] for name in defaults}
            optional = {name for name, default in defaults.items() if default is not inspect.Parameter.empty}
        else:
            defaults = {}
            optional = set(getattr(cls, "__optional_keys__", () if cls.__total__ else types))
        properties: Dict[str, Json] = {}
        converts: Dict[str, Convert] = {}
        required = []
        for name, hint in types.items():
            needed = name not in optional
            mark = _special(hint)
            if mark in ("Required", "NotRequired"):
                # A class with postponed annotations has these marks only here, and not in __optional_keys__.
                needed = mark == "Required"
                hint = typing.get_args(hint)[0]  # noqa: PLW2901 - what is marked
            found, converts[name] = self.read(hint)
            default = defaults.get(name, inspect.Parameter.empty)
            properties[name] = {**found, "default": default} if type(default) in _SCALARS else found
            required += [name] if needed else []

        def convert(value: Any) -> Any:
            if not isinstance(value, dict):
                raise wrong("a valid object", value)
            for name in required:
                if name not in value:
                    raise InputError("Field required", [name])
            for name in value:
                if closed and name not in converts:
                    raise InputError("Unexpected field", [name])
            done = {name: _inside(name, converts.get(name, anything), one) for name, one in value.items()}
            return _construct(cls, done) if closed else done

        schema = {"type": "object", "title": cls.__name__, "properties": properties, "required": required}
        return {**schema, "additionalProperties": False} if closed else schema, convert

    def _read_pydantic(self, cls: Any) -> Tuple[Json, Convert]:
        modern = hasattr(cls, "model_validate")
        try:
            if not modern:
                found = cls.schema()
            elif self._output:
                # What comes out is dumped by the fields' own names.
                found = cls.model_json_schema(mode="serialization", by_alias=False)
            else:
                found = cls.model_json_schema()
        except Exception as error:  # noqa: BLE001 - pydantic's own, which is not ours to import
            _LOG.warning("%s has no JSON Schema: %s", cls.__name__, clip(str(error), 200))
            found = {}
        for key in {"$defs", "definitions"} & set(found):
            self.definitions.setdefault(key, {}).update(found.pop(key))
        validate = cls.model_validate if modern else cls.parse_obj
        if modern and cls.model_config.get("strict"):
            # Strict about Python's types it would refuse a date that JSON can only write as a string.
            validate = lambda value: cls.model_validate_json(json.dumps(value))  # noqa: E731 - one of three alike
        return found, lambda value: checked(validate, value)


def _construct(cls: Any, fields: Dict[str, Any]) -> Any:
    try:
        return cls(**fields)
    except (ValueError, TypeError, AssertionError) as error:
        # Raised by __post_init__, where a dataclass does its own checks.
        name = type(error).__name__
        raise InputError(clip(str(error), 160) or name, type=name) from error
