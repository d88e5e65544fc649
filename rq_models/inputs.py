"""What a caller may send: JSON, of the structure that the model's card publishes.

The check against the published schema is never stricter than the model, which may convert what it is given: pydantic
makes a number of "1.5" and a set of a list with duplicates, and takes a field by another name. So only what no
conversion could save is refused here. All else is left to the model, whose own word on it is `InvalidInput` as well.
Patterns and formats are left to it too: a regular expression from Redis could keep this process busy for ever.
"""

from __future__ import annotations

import functools
import json
import math
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rq_models.errors import InvalidInput
from rq_models.host.output import OutputError, clip, to_json, where
from rq_models.host.refusal import show

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jsonschema.protocols import Validator

LARGEST_SCHEMA = 1 << 18
"""Characters of JSON; a larger schema is not looked at."""
LONGEST_CHECK = 1.0
"""Seconds; whatever has not been found wrong by then is left to the model."""

_EXPECTED = {
    "number": "a valid number",
    "integer": "a valid integer",
    "string": "a valid string",
    "boolean": "a valid boolean",
    "null": "null",
    "array": "a valid list",
    "object": "a valid object",
}
_TRUTHS = {"0", "1", "f", "t", "n", "y", "no", "yes", "off", "on", "false", "true"}
# Taken as they are. Keywords named neither here nor in `_lenient` are not checked: `not` and `if` would turn leniency
# into strictness, `uniqueItems` is what a set says of a list that it drops duplicates from, floats are no multiples.
_KEPT = {
    *("allOf", "items", "prefixItems", "propertyNames", "minItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_until: ContextVar[float] = ContextVar("_until")


class _TooLongError(Exception):
    """The check took longer than it is worth."""


def as_json(data: Any, name: str = "") -> Any:
    """Return the input in plain lists, dicts and scalars.

    Args:
        data: JSON-able, or numpy, a dataclass or a pydantic object, which are converted.
        name: what a message calls the input as a whole; default ``input``.

    Raises:
        InvalidInput: something in it is not JSON; the message begins with its path.
    """
    try:
        return to_json(data)
    except OutputError as error:
        # What follows the semicolon is advice for a model's author.
        raise InvalidInput(f"{where(name, error.path) or 'input'}: {error.why.partition(';')[0]}") from None


class InputCheck:
    """Checks inputs against one published JSON Schema."""

    def __init__(self, schema: dict[str, Any] | None) -> None:
        self._schema = schema

    def require(self, data: Any, name: str = "") -> None:
        """Raise InvalidInput if the model would refuse the input for certain.

        Args:
            data: the input as JSON.
            name: what a message calls the input as a whole.
        """
        if self._validator is None:
            return
        token = _until.set(time.monotonic() + LONGEST_CHECK)
        try:
            error = next(self._validator.iter_errors(data), None)
        except Exception:  # noqa: BLE001 - the schema may be anybody's, broken in any way; the model knows better
            return
        finally:
            _until.reset(token)
        if error is not None:
            path, message = _explain(error)
            raise InvalidInput(f"{where(name, path) or 'input'}: {clip(message, 300)}")

    @functools.cached_property
    def _validator(self) -> Validator | None:
        if self._schema is None:
            return None
        from jsonschema import Draft202012Validator  # noqa: PLC0415 - takes longer to import than all of this package
        from referencing import Registry  # noqa: PLC0415 - likewise

        try:
            if len(json.dumps(self._schema)) > LARGEST_SCHEMA:
                return None
            Draft202012Validator.check_schema(self._schema)
        except Exception:  # noqa: BLE001 - no JSON Schema of this version, or one too deep to look at
            return None
        # An empty registry fetches nothing: a schema that refers to an address is not checked.
        validator: Validator = _lenient()(self._schema, registry=Registry())
        return validator


def _explain(error: Any) -> tuple[list[Any], str]:
    """Return the path to what is wrong, and why; of a union's members, the one that got furthest is what was meant."""
    while error.context:
        deepest = max(error.context, key=lambda one: len(one.relative_path))
        if not deepest.relative_path:
            whys = [one.message.removeprefix("Input should be ").split(", got ")[0] for one in error.context]
            return list(error.absolute_path), _should_be(" or ".join(dict.fromkeys(whys)), error.instance)
        error = deepest
    return list(error.absolute_path), error.message


def _should_be(expected: str, value: Any) -> str:
    return f"Input should be {clip(expected, 200)}, got {show(value)}"


def _error(message: str, **details: Any) -> Any:
    from jsonschema import ValidationError  # noqa: PLC0415 - as above

    return ValidationError(message, **details)


def _hurry() -> None:
    if time.monotonic() > _until.get():
        raise _TooLongError


# Each of these takes what jsonschema calls them with: the validator, the keyword's value, the input, the schema around.


def _type(_: Any, types: Any, value: Any, schema: Any) -> Iterator[Any]:
    _hurry()
    names = [types] if isinstance(types, str) else types
    if not any(_could_be(name, value, schema) for name in names):
        yield _error(_should_be(" or ".join(_EXPECTED[name] for name in names), value))


def _ref(validator: Any, ref: Any, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - as above

    _hurry()
    yield from Draft202012Validator.VALIDATORS["$ref"](validator, ref, value, schema) or ()


def _enum(_: Any, options: Any, value: Any, __: Any) -> Iterator[Any]:
    if not any(_alike(option, value) for option in options):
        yield _error(_should_be(" or ".join(map(show, options)), value))


def _const(validator: Any, option: Any, value: Any, schema: Any) -> Iterator[Any]:
    yield from _enum(validator, [option], value, schema)


def _any(validator: Any, members: Any, value: Any, _: Any) -> Iterator[Any]:
    errors = []
    for member in members:
        error = next(validator.descend(value, member), None)
        if error is None:
            return
        errors.append(error)
    yield _error("fits no member of a union", context=errors)


def _properties(validator: Any, properties: Any, value: Any, schema: Any) -> Iterator[Any]:
    for name in properties if isinstance(value, dict) else ():
        # What pydantic 1 publishes does not say which of its fields with a default may be null.
        if name in value and (value[name] is not None or name in schema.get("required", ())):
            yield from validator.descend(value[name], properties[name], path=name)


def _required(_: Any, required: Any, value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        missing = [name for name in required if name not in value]
        # A field with an alias may stand here under its other name.
        if len(missing) > len(_others(value, schema)):
            yield from (_error("Field required", path=[name]) for name in missing)


def _additional(validator: Any, extra: Any, value: Any, schema: Any) -> Iterator[Any]:
    if not isinstance(value, dict) or "patternProperties" in schema:
        return
    others = _others(value, schema)
    if isinstance(extra, dict):
        for name in others:
            yield from validator.descend(value[name], extra, path=name)
    elif extra is False and len(others) > len(schema.get("properties", {}).keys() - value.keys()):
        yield from (_error("Unexpected field", path=[name]) for name in others)


def _min_length(_: Any, least: Any, value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, str) and "format" not in schema and len(value) < least:
        yield _error(f"Input should have at least {least} characters, got {show(value)}")


def _max_length(_: Any, most: Any, value: Any, schema: Any) -> Iterator[Any]:
    # The model may strip it first, and of bytes (a format) the length is another.
    if isinstance(value, str) and "format" not in schema and len(value.strip()) > most:
        yield _error(f"Input should have at most {most} characters, got {show(value)}")


def _max_items(_: Any, most: Any, value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, list) and not schema.get("uniqueItems") and len(value) > most:
        yield _error(f"Input should have at most {most} items, got {show(value)}")


_LENIENT = {
    "type": _type,
    "$ref": _ref,
    "enum": _enum,
    "const": _const,
    "anyOf": _any,
    "oneOf": _any,  # that several members could take it is no fault of the input
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "minLength": _min_length,
    "maxLength": _max_length,
    "maxItems": _max_items,
}


@functools.cache
def _lenient() -> Any:
    """Return the class of JSON Schema validators that find wrong only what no model's conversion could save."""
    from jsonschema import Draft202012Validator, validators  # noqa: PLC0415 - as above

    known = Draft202012Validator.VALIDATORS
    rules = {name: _LENIENT.get(name, rule if name in _KEPT else None) for name, rule in known.items()}
    return validators.extend(Draft202012Validator, validators=rules)


def _could_be(name: str, value: Any, schema: Mapping[str, Any]) -> bool:  # noqa: PLR0911 - one line per type
    """Say whether a model that publishes this type might take the value."""
    match name:
        case "number" | "integer":
            # A format on a number is a duration or the like, which may be written as a text.
            return isinstance(value, int | float) or (
                isinstance(value, str) and ("format" in schema or _number(value) is not None)
            )
        case "string":
            return isinstance(value, str | int | float)
        case "boolean":
            return _number(value) in (0, 1) or (isinstance(value, str) and value.strip().lower() in _TRUTHS)
        case "null":
            return value is None
        case "array":
            # A named tuple may be given by its names.
            return isinstance(value, list) or (isinstance(value, dict) and "prefixItems" in schema)
        case "object":
            return isinstance(value, dict) or _pairs(value)
    return True


def _pairs(value: Any) -> bool:
    """Say whether pydantic 1, which calls dict(), would make an object of it."""
    try:
        return isinstance(value, list | str) and dict(value) is not None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def _alike(option: Any, value: Any) -> bool:
    """Say whether a model might take one for the other: an Enum may ignore case, and 1.5 and "1" are 1 to some."""
    if option == value:
        return True
    if any(one is None or isinstance(one, dict | list) for one in (option, value)):
        return False
    wanted, number = _number(option), _number(value)
    if wanted is not None and number is not None and math.isfinite(number):
        return wanted in (number, math.trunc(number))
    return str(option).strip().casefold() == str(value).strip().casefold()


def _others(value: dict[str, Any], schema: Mapping[str, Any]) -> list[str]:
    return [name for name in value if name not in schema.get("properties", {})]
