"""The plan of a run: which columns go to the model, what comes back, and where the input is cut."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Kind: TypeAlias = Literal["f8", "i8", "b1", "str", "json"]

_KINDS: dict[str, Kind] = {"number": "f8", "integer": "i8", "boolean": "b1", "string": "str"}
_LONGEST_REF = 10


class Misfit(Exception):
    """The file's columns are not what the model asks for; one sentence."""


@dataclass(frozen=True)
class Wanted:
    """One column that the model is given, or gives back.

    Attributes:
        kind: how its values cross to the model's process.
        omit: whether a row without a value lacks this entry, because the model takes no null there.
    """

    name: str
    kind: Kind
    omit: bool = False


@dataclass(frozen=True)
class Plan:
    """What is fixed for all attempts of a run.

    Attributes:
        fingerprint: of the input.
        version: of the model.
        names: all columns of the file.
        inputs: those that the model is given.
        whole: whether the only one of them is the input itself, and not an entry of it.
        outputs: what the model gives back; one with the name ``""`` is the output itself.
        layout: the columns of the output, as `rq_models.scoring.parts` spells them.
        slice_rows: rows that the model is given at a time.
        rows: of the whole input, estimated; of Parquet they are known.
        row_bytes: about how large one is.
        folder: name of the folder of its parts; see `rq_models.scoring.parts`.
        pieces: where each chunk begins and ends: bytes of a text, rows of a Parquet file.
    """

    fingerprint: str
    version: str
    names: list[str]
    inputs: list[Wanted]
    whole: bool
    outputs: list[Wanted]
    layout: str
    slice_rows: int
    rows: int
    row_bytes: float
    folder: str
    pieces: list[tuple[int, int]]

    def stored(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return asdict(self)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Plan:
        """Return it from what is stored."""
        sides = {side: [Wanted(**one) for one in stored[side]] for side in ("inputs", "outputs")}
        return cls(**{**stored, **sides, "pieces": [(start, end) for start, end in stored["pieces"]]})


def inputs(
    schema: dict[str, Any] | None, columns: Sequence[str], guess: dict[str, Kind], *, sampled: bool = False
) -> tuple[list[Wanted], bool]:
    """Return the columns that the model is given, and whether the only one is the input itself.

    Args:
        schema: JSON Schema of the model's input; None if nothing is known of it: then it is given all columns.
        columns: of the file.
        guess: their kinds by what the file holds.
        sampled: whether later rows of the file may have columns that are not among these.

    Raises:
        Misfit: a column is missing, or the model takes no rows of columns.
    """
    schema = _resolved(schema or {}, schema or {})
    if schema.get("type") not in (None, "object"):
        if len(columns) != 1:
            raise Misfit(
                f"the model's input is one {schema['type']} and no row of columns, so the file must have one column; "
                f"it has {len(columns)}: {listed(columns)}"
            )
        kind, _ = _kind(schema, schema)
        return [Wanted(columns[0], kind)], True
    properties: dict[str, Any] = schema.get("properties") or {}
    if not properties:
        return [Wanted(name, guess[name], omit=True) for name in columns], False
    missing = [name for name in schema.get("required") or () if name not in columns]
    if missing:
        raise Misfit(f"the model needs the columns {listed(missing)}, which the file lacks; it has {listed(columns)}")
    found = []
    absent = properties.keys() - set(columns) if sampled else set()
    for name, declared in properties.items():
        if name in columns or name in absent:
            kind, nullable = _kind(declared, schema)
            found.append(Wanted(name, kind, omit=not nullable or name in absent))
    if properties.keys().isdisjoint(columns):
        raise Misfit(f"the model takes {listed(properties)}, and the file has none of them; it has {listed(columns)}")
    return found, False


def input_names(schema: dict[str, Any] | None) -> list[str] | None:
    """Return the names of the model's inputs in their order, for files without a header."""
    return list(_resolved(schema or {}, schema or {}).get("properties") or ()) or None


def outputs(schema: dict[str, Any] | None) -> list[Wanted] | None:
    """Return what the model gives back, or None if its schema does not say."""
    schema = _resolved(schema or {}, schema or {})
    if properties := schema.get("properties"):
        return [Wanted(name, _kind(declared, schema)[0]) for name, declared in properties.items()]
    kind, _ = _kind(schema, schema)
    return [Wanted("", kind)] if schema.get("type") in _KINDS else None


def guessed_outputs(values: Iterable[Any]) -> list[Wanted]:
    """Return what a model without a schema gives back, by some of its outputs; None among them is a failed row."""
    some = [value for value in values if value is not None]
    if not some or not all(isinstance(value, dict) for value in some):
        return [Wanted("", _guessed(some))]
    names = dict.fromkeys(name for value in some for name in value)
    return [Wanted(name, _guessed([value[name] for value in some if value.get(name) is not None])) for name in names]


def _guessed(values: list[Any]) -> Kind:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "b1"
    if kinds == {str}:
        return "str"
    # What was whole in a sample need not be whole in the next row.
    return "f8" if kinds and kinds <= {int, float} else "json"


def _resolved(declared: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a schema with its reference followed."""
    for _ in range(_LONGEST_REF):
        if not isinstance(declared, dict) or not str(declared.get("$ref", "")).startswith("#/"):
            break
        found: Any = root
        for step in declared["$ref"][2:].split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        declared = found
    return declared if isinstance(declared, dict) else {}


def _kind(declared: Any, root: dict[str, Any]) -> tuple[Kind, bool]:
    """Return the kind of a declared value, and whether it may be null."""
    declared = _resolved(declared, root)
    options = [_resolved(one, root) for one in declared.get("anyOf") or declared.get("oneOf") or [declared]]
    if isinstance(declared.get("type"), list):
        options = [{"type": one} for one in declared["type"]]
    types: set[Any] = set()
    for option in options:
        listed = option.get("enum") or ([option["const"]] if "const" in option else [])
        types |= (
            {"string" if all(isinstance(one, str) for one in listed) else "any"} if listed else {option.get("type")}
        )
    nullable = "null" in types or None in types
    types.discard("null")
    if types == {"integer", "number"}:
        types = {"number"}
    (only,) = types if len(types) == 1 else ("any",)
    return _KINDS.get(str(only), "json"), nullable


def listed(names: Iterable[str]) -> str:
    """Return names for a message."""
    names = list(names)
    some = ", ".join(repr(name) for name in names[:20])
    return f"{some} and {len(names) - 20} more" if len(names) > 20 else some or "no columns"  # noqa: PLR2004 - as above


def grown(rows: int, seconds: float, aim: float, most: int) -> int:
    """Return how many rows to try next, for a slice that takes about `aim` seconds: never more than twice as many."""
    if seconds <= 0:
        return min(2 * rows, most)
    return max(1, min(math.floor(rows * aim / seconds), 2 * rows, most))
