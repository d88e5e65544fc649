"""What a model says of its input and output, as JSON Schema and as a function that checks and converts.

A model may say it by dataclasses, TypedDicts and builtin hints, which are compiled here; by pydantic classes, version 1
or 2; or by objects of the ``schema`` library. The last two are known by their methods, so neither need be installed.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import json
import logging
import sys
import typing
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from .library import read as read_library
from .output import Key, clip, to_json
from .refusal import InputError, checked, explain, wrong

Json = Dict[str, Any]
Convert = Optional[Callable[[Any], Any]]
"""Takes a JSON value and returns what `predict` is given for it, or raises `InputError`; None: the value itself."""

_LOG = logging.getLogger("rq_models")
_NO_FIELD: Any = dataclasses.field()  # of a TypedDict: no default
_DEFS = "#/$defs/"
_ARRAYS: Dict[Any, Callable[[Any], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Collection: list,
    collections.abc.Iterable: list,
}
_OBJECTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class Shape(NamedTuple):
    """One side of a model: its JSON Schema, or None if nothing is known of it, and its conversion."""

    json: Optional[Json]
    convert: Convert


UNKNOWN = Shape(None, None)


def shape(declared: Any, *, output: bool = False, checks_itself: bool = False) -> Shape:
    """Return the shape that a schema or a type hint declares.

    Args:
        declared: a type hint, a pydantic class, an object of the ``schema`` library, or a JSON Schema in a dict. The
            last is published as it is, and nothing is checked here.
        output: whether it is the output's, for pydantic, which tells the two apart.
        checks_itself: see `library.read`.
    """
    builder = _Builder(output=output)
    try:
        if isinstance(declared, dict):
            return Shape(to_json(declared), None)
        if not isinstance(declared, type) and hasattr(declared, "validate") and hasattr(declared, "schema"):
            found, convert = read_library(declared, checks_itself=checks_itself)
        else:
            found, convert = builder.read(declared)
        found = to_json(builder.whole(found), nan="null")
    except Exception as error:  # noqa: BLE001 - hints are the model's code, and may raise anything
        # The model may well run; only its card is the poorer for it.
        _LOG.warning("can't read the schema %.200r: %s: %s", declared, type(error).__name__, clip(str(error), 200))
        return UNKNOWN
    return Shape(found or None, convert)


def hints(thing: Any) -> Dict[str, Any]:
    """Return the evaluated type hints of a function or class, with what Annotated and Required say."""
    extras: Any = {"include_extras": True} if sys.version_info >= (3, 9) else {}
    return typing.get_type_hints(thing, **extras)


def _special(hint: Any) -> Optional[str]:
    return getattr(typing.get_origin(hint), "_name", None)


# Scalars. bool is an int to Python and never a number to JSON.


def _float(value: Any) -> Any:
    kind = type(value)
    if kind is float:
        return value
    if kind is int:
        try:
            return float(value)
        except OverflowError:
            pass
    raise wrong("a valid number", value)


def _int(value: Any) -> Any:
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():  # 5.0 is an integer to JSON Schema
        return int(value)
    raise wrong("a valid integer", value)


def _exact(kind: type, name: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise wrong(name, value)

    return convert


_SCALARS: Dict[Any, Tuple[str, Callable[[Any], Any]]] = {
    float: ("number", _float),
    int: ("integer", _int),
    str: ("string", _exact(str, "a valid string")),
    bool: ("boolean", _exact(bool, "a valid boolean")),
    type(None): ("null", _exact(type(None), "null")),
}


def _inside(key: Key, convert: Convert, value: Any) -> Any:
    try:
        return value if convert is None else convert(value)
    except InputError as error:
        error.under(key)
        raise


def _array(item: Convert, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, list):
            raise wrong("a valid list", value)
        return make(value if item is None else [_inside(index, item, one) for index, one in enumerate(value)])

    return convert


def _fixed(items: List[Convert]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(items):
            raise wrong(f"a list of {len(items)}", value)
        return tuple(_inside(index, items[index], one) for index, one in enumerate(value))

    return convert


def _mapping(item: Convert) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            raise wrong("a valid object", value)
        return value if item is None else {key: _inside(key, item, one) for key, one in value.items()}

    return convert


def _choice(pairs: List[Tuple[Any, Any]]) -> Callable[[Any], Any]:
    """Return the conversion of a value that must equal the first of a pair, to the second."""
    allowed = clip(" or ".join(repr(given) for given, _ in pairs), 200)

    def convert(value: Any) -> Any:
        for given, taken in pairs:
            if given == value and isinstance(given, bool) == isinstance(value, bool):
                return taken
        raise wrong(allowed, value)

    return convert


def _either(members: List[Convert]) -> Convert:
    """Return the conversion to whichever member takes the value as it is, or else to the first that takes it."""
    converts = [member for member in members if member is not None]
    if len(converts) < len(members):
        return None  # one of them takes anything

    def convert(value: Any) -> Any:
        taken = []
        errors: List[InputError] = []
        for member in converts:
            try:
                done = member(value)
            except InputError as error:
                errors.append(error)
            else:
                if done is value:
                    return value
                taken.append(done)
        if taken:
            return taken[0]
        # Whoever got furthest into the value is the one that was meant.
        deepest = max(errors, key=lambda error: len(error.problems[0][0]))
        if deepest.problems[0][0]:
            raise deepest
        whys = [error.problems[0][1].split(", got ")[0].replace("Input should be ", "") for error in errors]
        raise wrong(clip(" or ".join(dict.fromkeys(whys)), 200), value)

    return convert


def _record(
    fields: Dict[str, Convert], required: List[str], make: Callable[[Dict[str, Any]], Any], *, closed: bool
) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            raise wrong("a valid object", value)
        done = {name: _inside(name, item, value[name]) for name, item in fields.items() if name in value}
        missing = [name for name in required if name not in done]
        if missing:
            raise InputError([([name], "Field required") for name in missing])
        if len(done) < len(value):
            extra = {name: one for name, one in value.items() if name not in done}
            if closed:
                raise InputError([([name], "Unexpected field") for name in extra])
            done.update(extra)
        return make(done)

    return convert


class _Builder:
    """Reads one declaration, and collects the definitions that its JSON Schema refers to."""

    def __init__(self, *, output: bool) -> None:
        self._output = output
        self._defs: Dict[str, Dict[str, Any]] = {"$defs": {}, "definitions": {}}
        self._seen: Dict[Any, Tuple[Json, Convert]] = {}

    def whole(self, found: Json) -> Json:
        """Return the schema with its definitions, the outermost one laid open."""
        name = found.get("$ref", "")[len(_DEFS) :] if len(found) == 1 else ""
        if name in self._defs["$defs"]:
            found = dict(self._defs["$defs"][name])
            if f'"{_DEFS}{name}"' not in json.dumps([found, self._defs], default=str):
                del self._defs["$defs"][name]
        return {**found, **{key: defs for key, defs in self._defs.items() if defs}}

    def read(self, hint: Any) -> Tuple[Json, Convert]:  # noqa: PLR0911 - one branch per kind of hint
        """Return the JSON Schema of a hint, {} for one that is not known, and its conversion."""
        if hasattr(hint, "__metadata__"):  # Annotated
            return self.read(hint.__origin__)
        for alias in ("__supertype__", "__value__"):  # NewType, and the `type` statement
            if hasattr(hint, alias):
                return self.read(getattr(hint, alias))
        if hint is None or hint in _SCALARS:
            name, convert = _SCALARS[type(None) if hint is None else hint]
            return {"type": name}, convert
        origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        if origin is Union or type(hint).__name__ == "UnionType":
            read = [self.read(one) for one in arguments]
            return {"anyOf": [found for found, _ in read]} if all(found for found, _ in read) else {}, _either(
                [convert for _, convert in read]
            )
        if _special(hint) == "Literal":
            return self._choose([(one.value if isinstance(one, enum.Enum) else one, one) for one in arguments])
        if isinstance(origin, type):
            if origin in _ARRAYS:
                return self._read_array(origin, arguments)
            if origin in _OBJECTS:
                found, item = self.read(arguments[1] if arguments else Any)
                return {"type": "object", **({"additionalProperties": found} if found else {})}, _mapping(item)
            return self._read_class(origin, hint)
        return {}, None

    def _read_array(self, kind: Any, arguments: Tuple[Any, ...]) -> Tuple[Json, Convert]:
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            read = [self.read(one) for one in arguments if one != ()]
            size = len(read)
            found = {"type": "array", "prefixItems": [one for one, _ in read], "minItems": size, "maxItems": size}
            return found, _fixed([convert for _, convert in read])
        found, item = self.read(arguments[0] if arguments else Any)
        return {"type": "array", **({"items": found} if found else {})}, _array(item, _ARRAYS[kind])

    def _choose(self, pairs: List[Tuple[Any, Any]]) -> Tuple[Json, Convert]:
        return {"enum": [given for given, _ in pairs]}, _choice(pairs)

    def _read_class(self, cls: Any, hint: Any) -> Tuple[Json, Convert]:
        if hasattr(hint, "model_validate") or hasattr(hint, "parse_obj"):
            # BaseModel itself says nothing of what is in it.
            return ({}, None) if cls.__module__.startswith("pydantic") else self._read_pydantic(hint)
        if issubclass(cls, enum.Enum):
            return self._choose([(member.value, member) for member in cls])
        if dataclasses.is_dataclass(cls) or (issubclass(cls, dict) and hasattr(cls, "__total__")):
            if cls not in self._seen:
                self._read_record(cls)
            return self._seen[cls]
        return {}, None

    def _read_record(self, cls: Any) -> None:
        name = cls.__name__
        if name in self._defs["$defs"]:
            name = f"{cls.__module__}.{cls.__qualname__}"
        found: Json = {"type": "object", "title": cls.__name__, "properties": {}, "required": []}
        self._defs["$defs"][name] = found
        # It may hold itself: what it becomes is looked up when it is called.
        late: List[Callable[[Any], Any]] = []
        self._seen[cls] = ({"$ref": _DEFS + name}, lambda value: late[0](value))  # noqa: PLW0108 - empty until then
        types, converts = hints(cls), {}
        if dataclasses.is_dataclass(cls):
            fields = [(field.name, field) for field in dataclasses.fields(cls) if field.init]
            needed = {
                key
                for key, field in fields
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            }
            found["additionalProperties"] = False
        else:
            fields = [(key, _NO_FIELD) for key in types]
            needed = set(getattr(cls, "__required_keys__", types if cls.__total__ else ()))
        for key, field in fields:
            hint = types[key]
            # A class with postponed annotations has these marks only here, and not in __required_keys__.
            while _special(hint) in ("Required", "NotRequired", "ReadOnly"):
                needed = needed - {key} if _special(hint) == "NotRequired" else needed
                needed = needed | {key} if _special(hint) == "Required" else needed
                hint = typing.get_args(hint)[0]
            schema, converts[key] = self.read(hint)
            plain = type(field.default) in _SCALARS
            found["properties"][key] = {**schema, "default": field.default} if plain else schema
        found["required"] = [key for key, _ in fields if key in needed]
        make = _maker(cls) if dataclasses.is_dataclass(cls) else _same
        late.append(_record(converts, found["required"], make, closed="additionalProperties" in found))

    def _read_pydantic(self, cls: Any) -> Tuple[Json, Convert]:
        try:
            if hasattr(cls, "model_validate"):
                mode = "serialization" if self._output else "validation"
                # What comes out is dumped by the fields' own names.
                found = cls.model_json_schema(mode=mode, by_alias=not self._output)
            else:
                found = cls.schema()
        except Exception as error:  # noqa: BLE001 - pydantic's own, which is not ours to import
            _LOG.warning("%s has no JSON Schema: %s", cls.__name__, clip(str(error), 200))
            found = {}
        for key, defs in self._defs.items():
            defs.update(found.pop(key, {}))
        if not hasattr(cls, "model_validate"):
            validate = cls.parse_obj
        elif cls.model_config.get("strict"):
            # Strict about Python's types it would refuse a date that JSON can only write as a string.
            validate = lambda value: cls.model_validate_json(json.dumps(value))  # noqa: E731 - one of three alike
        else:
            validate = cls.model_validate
        return found, lambda value: checked(validate, value)


def _same(value: Any) -> Any:
    return value


def _maker(cls: Any) -> Callable[[Dict[str, Any]], Any]:
    def make(fields: Dict[str, Any]) -> Any:
        try:
            return cls(**fields)
        except (ValueError, TypeError, AssertionError) as error:
            # Raised by __post_init__, where a dataclass does its own checks.
            why = clip(str(error), 160) or type(error).__name__
            raise explain(error, fields) or InputError([([], why)], type(error).__name__) from error

    return make
