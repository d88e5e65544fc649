"""What a caller may send: JSON, of the structure that the model's card publishes.

The check against the published schema is never stricter than the model, which may convert what it is given: pydantic
makes a number of "1.5" and a set of a list with duplicates, and takes a field by another name. So only what no
conversion could save is refused here. All else is left to the model, whose own word on it is `InvalidInput` as well.
Patterns and formats are left to it too: a regular expression from Redis could keep this process busy for ever.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

from rq_models.errors import InvalidInput
from rq_models.host.output import OutputError, clip, to_json, where
from rq_models.host.refusal import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jsonschema.protocols import Validator

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
        if self._schema is None:
            return
        try:
            if _fits(self._schema, data):
                return
            error = next(self._validator.iter_errors(data), None)
        except Exception:  # noqa: BLE001 - the schema may be anybody's, broken in any way; the model knows better
            self._schema = None
            return
        if error is not None:
            while error.context:  # of a union's members, the one that got furthest is what was meant
                error = max(error.context, key=lambda one: len(one.relative_path))
            raise InvalidInput(f"{where(name, list(error.absolute_path)) or 'input'}: {clip(error.message, 300)}")

    @functools.cached_property
    def _validator(self) -> Validator:
        from referencing import Registry  # noqa: PLC0415 - takes longer to import than all of this package

        lenient = _lenient()
        lenient.check_schema(self._schema)
        # An empty registry fetches nothing: a schema that refers to an address is not checked.
        validator: Validator = lenient(self._schema, registry=Registry())
        return validator


_CLASSES = {
    "number": (int, float),
    "integer": (int,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
_RULES = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "enum", "const", "items", "prefixItems", "minItems"}
_RULES |= {"properties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
"""What `_lenient` checks beside the type, and the names of the fields."""


def _fits(schema: Any, data: Any) -> bool:
    """Say whether an input plainly is what a plain schema asks for; False says nothing.

    The library takes ten times as long, and ten thousand times as long for a list of ten thousand numbers.
    """
    kind = schema.get("type") if isinstance(schema, dict) else None
    if not isinstance(kind, str) or type(data) not in _CLASSES.get(kind, ()):
        return False
    rules = schema.keys() & _RULES
    match kind:
        case "array":
            return rules <= {"items"} and ("items" not in rules or all(_fits(schema["items"], one) for one in data))
        case "object":
            fields = schema.get("properties", {})
            same = rules <= {"properties"} and fields.keys() == data.keys() >= set(schema.get("required", ()))
            return same and all(_fits(fields[name], one) for name, one in data.items())
        case "number" | "integer":
            return rules <= _WITHIN.keys() and all(_WITHIN[rule](data, schema[rule]) for rule in rules)
    return not rules


_WITHIN: dict[str, Callable[[Any, Any], Any]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


@functools.cache
def _lenient() -> Any:
    """Return the class of JSON Schema validators that find wrong only what no model's conversion could save.

    Keywords that are not named here are not checked: `not` and `if` would turn leniency into strictness, `uniqueItems`
    is what a set says of a list that it drops duplicates from, floats are no multiples, texts may be stripped first.
    """
    from jsonschema import Draft202012Validator, validators  # noqa: PLC0415 - as above

    known = Draft202012Validator.VALIDATORS
    kept = {"$ref", "$dynamicRef", "allOf", "anyOf", "items", "prefixItems", "minItems"}
    kept |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    rules = {
        **{name: rule if name in kept else _unchecked for name, rule in known.items()},
        "type": _type,
        "enum": _enum,
        "const": lambda validator, option, value, schema: _enum(validator, [option], value, schema),
        "oneOf": known["anyOf"],  # that several members could take it is no fault of the input
        "properties": _properties,
        "required": _required,
        "additionalProperties": _additional,
    }
    return validators.extend(Draft202012Validator, validators=rules)


def _error(message: str, **details: Any) -> Any:
    from jsonschema import ValidationError  # noqa: PLC0415 - as above

    return ValidationError(message, **details)


# Each of these takes what jsonschema calls them with: the validator, the keyword's value, the input, the schema around.


def _unchecked(*_: Any) -> tuple[()]:
    return ()


def _type(_: Any, types: Any, value: Any, schema: Any) -> Iterator[Any]:
    names = [types] if isinstance(types, str) else types
    # A format or a tuple may be written in many ways: a duration as a number, a named tuple as an object.
    if not schema.keys() & {"format", "prefixItems"} and not any(_could_be(name, value) for name in names):
        yield _error(f"Input should be {' or '.join(_EXPECTED[name] for name in names)}, got {show(value)}")


def _enum(_: Any, options: Any, value: Any, __: Any) -> Iterator[Any]:
    if not any(_alike(option, value) for option in options):
        yield _error(f"Input should be {clip(' or '.join(map(show, options)), 200)}, got {show(value)}")


def _properties(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
    for name in wanted if isinstance(value, dict) else ():
        # What pydantic 1 publishes does not say which of its fields with a default may be null.
        if name in value and (value[name] is not None or name in schema.get("required", ())):
            yield from validator.descend(value[name], wanted[name], path=name)


def _required(_: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        missing = [name for name in wanted if name not in value]
        # A field with an alias may stand here under its other name.
        if len(missing) > len(value.keys() - schema.get("properties", {}).keys()):
            yield from (_error("Field required", path=[name]) for name in missing)


def _additional(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
    # That there is one too many (`wanted` is False) is left to the model: it may be an alias.
    if isinstance(value, dict) and isinstance(wanted, dict) and "patternProperties" not in schema:
        for name in value.keys() - schema.get("properties", {}).keys():
            yield from validator.descend(value[name], wanted, path=name)


def _could_be(name: str, value: Any) -> bool:
    """Say whether a model that publishes this type might take the value."""
    match name:
        case "number" | "integer":
            return _is_number(value)
        case "string":
            return isinstance(value, str | int | float)
        case "boolean":
            return value in (0, 1) or str(value).strip().lower() in _TRUTHS
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str | int | float) and float(value) is not None
    except OverflowError:
        return True
    except ValueError:
        return False


def _alike(option: Any, value: Any) -> bool:
    """Say whether a model might take one for the other: an Enum may ignore case, and 1.5 and "1" are 1 to some."""
    both_numbers = _is_number(option) and _is_number(value)
    return option == value or both_numbers or str(option).casefold() == str(value).strip().casefold()
