"""Reads objects of the ``schema`` library, known by the names of their classes: nothing is imported.

Its own ``json_schema`` is stricter than the object itself in places (converters, predicates, flags of a regular
expression, keys that are no strings), and a client that trusted it would refuse good input. Here those become
"anything".
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

from .refusal import checked

Json = Dict[str, Any]
Convert = Optional[Callable[[Any], Any]]

_TYPES = {float: "number", int: "integer", str: "string", bool: "boolean", list: "array", dict: "object"}
_WRAPPERS = {"Schema", "Optional", "Literal"}


def read(declared: Any, *, checks_itself: bool) -> Tuple[Json, Convert]:
    """Return the JSON Schema of such an object, and its conversion, which raises `InputError`.

    Args:
        declared: the object.
        checks_itself: the model is an `MLModel`, which by its contract validates what it is given. What was converted
            already might not pass a second time, so it is given the input as it came. Any other model is given what
            validation returned. Either way floats that JSON wrote as integers are made floats first: the library is
            strict about that, and JSON has no such difference.
    """
    found, loosen = _Reader(type(declared)).read(declared, extra=False)

    def convert(value: Any) -> Any:
        value = loosen(value) if loosen else value
        done = checked(declared.validate, value)
        return value if checks_itself else done

    return found, convert


def _to_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < 1 << 1000 else value


class _Reader:
    """Builds the JSON Schema, and the function that makes integers floats where only floats are taken."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._converting = 0
        """How many converters it met: what stands after one in an And describes no input."""

    def read(self, given: Any, *, extra: bool) -> Tuple[Json, Convert]:  # noqa: PLR0911 - one branch per kind
        names = {cls.__name__ for cls in type(given).__mro__}
        if names & _WRAPPERS:
            found, loosen = self.read(given.schema, extra=extra or getattr(given, "ignore_extra_keys", False))
            notes = {"title": getattr(given, "name", None), "description": getattr(given, "description", None)}
            return {**found, **{key: note for key, note in notes.items() if note}}, loosen
        if isinstance(given, dict):
            return self._read_dict(given, extra)
        if "And" in names:  # Or is one, too
            return (self._read_or if "Or" in names else self._read_and)(given.args, extra)
        if type(given) is list:
            found, loosen = self._read_or(given, extra)
            items = (lambda value: [loosen(one) for one in value] if type(value) is list else value) if loosen else None
            return {"type": "array", **({"items": found} if found else {})}, items
        if isinstance(given, type):
            return {"type": _TYPES[given]} if given in _TYPES else {}, _to_float if given is float else None
        if given is None or isinstance(given, (str, int, float)):
            return {"const": given}, None
        if "Regex" in names and "flags" not in repr(given):
            return {"type": "string", "pattern": given.pattern_str}, None
        # Use, a validator of the model's own, a predicate: the first two may convert.
        self._converting += hasattr(given, "validate")
        return {}, None

    def _read_and(self, args: Any, extra: bool) -> Tuple[Json, Convert]:
        found, loosens = [], []
        for one in args:
            before = self._converting
            part, loosen = self.read(one, extra=extra)
            found += [part] if part else []
            loosens += [loosen] if loosen else []
            if self._converting > before:
                break

        def convert(value: Any) -> Any:
            for loosen in loosens:
                value = loosen(value)
            return value

        return {"allOf": found} if len(found) > 1 else found[0] if found else {}, convert if loosens else None

    def _read_or(self, args: Any, extra: bool) -> Tuple[Json, Convert]:
        read = [self.read(one, extra=extra) for one in args]
        found = [part for part, _ in read]
        schema = {} if not all(found) else found[0] if len(found) == 1 else {"anyOf": found} if found else {}
        loosens = [loosen for _, loosen in read if loosen]
        if all(loosen is _to_float for loosen in loosens):
            takes_integers = any(not part or part.get("type") == "integer" for part in found)
            return schema, _to_float if loosens and not takes_integers else None
        members = [(self._schema(one, ignore_extra_keys=extra), loosen) for one, (_, loosen) in zip(args, read)]  # noqa: B905 - Python 3.8

        def convert(value: Any) -> Any:
            for member, loosen in members:
                loosened = loosen(value) if loosen else value
                if member.is_valid(loosened):
                    return loosened
            return value

        return schema, loosens[0] if len(members) == 1 else convert

    def _read_dict(self, given: Dict[Any, Any], extra: bool) -> Tuple[Json, Convert]:
        properties: Dict[str, Json] = {}
        required, loosens, others = [], {}, []
        for key, item in given.items():
            part, loosen = self.read(item, extra=extra)
            optional = _is_a("Optional", key)
            default = getattr(key, "default", item)
            if optional and (default is None or isinstance(default, (str, int, float))):
                part = {**part, "default": default}
            name = key
            while hasattr(name, "schema") and not _is_a("Hook", name):
                name = name.schema
            if isinstance(name, str):
                properties[name] = part
                required += [] if optional else [name]
                if loosen:
                    loosens[name] = loosen
            else:
                others.append(loosen)
        # Which of several patterns a key falls under is for the library to say.
        other = others[0] if len(others) == 1 else None

        def convert(value: Any) -> Any:
            if type(value) is not dict:
                return value
            done = dict(value)
            for key, one in value.items():
                loosen = loosens.get(key) if key in properties else other
                if loosen:
                    done[key] = loosen(one)
            return done

        found = {"type": "object", "properties": properties, "required": required}
        return {**found, "additionalProperties": extra or bool(others)}, convert if loosens or other else None


def _is_a(name: str, thing: Any) -> bool:
    return any(cls.__name__ == name for cls in type(thing).__mro__)
