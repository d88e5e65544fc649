"""The formats of files: what a file holds, where it may be cut into pieces, and the rows of a piece.

A row that cannot be read is one broken row, whatever is wrong with it; only what concerns the whole file is `BadFile`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from rq_models.scoring.files import BadFile, Draft, opened, size_of, told
from rq_models.scoring.records import RECORD, blocks, boundary, line_ends, record_ends, repaired

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_BLOCK = 1 << 19
"""Bytes that are parsed at a time: the first slice comes after as many."""
_SAMPLE = 1 << 20
_CONTENT = 2000
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Format:
    """A format: ``csv``, ``jsonl`` or ``parquet``, and whether it is packed with gzip."""

    name: Literal["csv", "jsonl", "parquet"]
    gzip: bool = False


FORMATS = {
    ".csv": Format("csv"),
    ".csv.gz": Format("csv", gzip=True),
    ".jsonl": Format("jsonl"),
    ".ndjson": Format("jsonl"),
    ".jsonl.gz": Format("jsonl", gzip=True),
    ".ndjson.gz": Format("jsonl", gzip=True),
    ".parquet": Format("parquet"),
    ".pq": Format("parquet"),
}


@dataclass(frozen=True)
class Inspected:
    """What a file holds.

    Attributes:
        columns: their names, in order; of JSONL, the keys of the first rows.
        types: their Arrow types; of text, as the first megabyte looks.
        row_bytes: about how large a row is, unpacked.
        schema: the columns as they are carried to the output: those of CSV are text.
    """

    columns: list[str]
    types: dict[str, str]
    row_bytes: float
    schema: pa.Schema


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read.

    Attributes:
        row: its number in the slice, from 0.
        message: why, for a person.
        content: the beginning of its text.
    """

    row: int
    message: str
    content: str


@dataclass
class Slice:
    """Some rows, by columns; in place of a broken row stand nulls.

    Attributes:
        rows: how many, the broken ones among them.
        columns: Arrow arrays; of JSONL, lists of the values as they stood, None for a missing one.
        broken: the rows that cannot be read.
        is_text: whether the columns are the cells of a CSV, which are numbers if they look like it.
    """

    rows: int
    columns: dict[str, Any]
    broken: list[Broken] = field(default_factory=list)
    is_text: bool = False


def format_of(address: str) -> Format:
    """Return the format that the file's name says.

    Raises:
        BadFile: none.
    """
    name = (address.partition("?")[0] if "://" in address else address).lower()
    for ending in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(ending):
            return FORMATS[ending]
    raise BadFile(address, f"its format is unknown; the name should end in {', '.join(FORMATS)}")


def inspect(address: str, *, header: bool = True, names: Sequence[str] | None = None) -> Inspected:
    """Look what a file holds, by its beginning.

    Args:
        address: of the file.
        header: whether the first row of a CSV is its header.
        names: columns of a CSV without one.

    Raises:
        BadFile: it cannot be read, it is not what its name says, or its columns are too few, too many or ambiguous.
    """
    form = format_of(address)
    size_of(address)  # which knows a folder from a file
    with told(address), closing(opened(address)) as file:
        if form.name == "parquet":
            source = parquet.ParquetFile(file)
            schema = source.schema_arrow
            groups = [source.metadata.row_group(number) for number in range(source.num_row_groups)]
            row_bytes = max((one.total_byte_size / max(one.num_rows, 1) for one in groups), default=0.0)
            columns = schema.names
            types = {one.name: str(one.type) for one in schema}
            carried = pa.schema([pa.field(one.name, _decoded(one.type)) for one in schema])
        else:
            sample = _sample(file, form)
            text = form.name == "csv"
            inferred = _csv_types(address, sample, header, names) if text else _json_types(address, sample)
            columns, row_bytes = list(inferred), len(sample) / max(sample.count(b"\n"), 1)
            types = {name: str(kind) for name, kind in inferred.items()}
            carried = pa.schema([(name, pa.string() if text else kind) for name, kind in inferred.items()])
    return Inspected(_distinct(address, columns), types, row_bytes, carried)


def split(
    address: str,
    rows_wanted: int,
    *,
    header: bool = True,
    spool: str | None = None,
    beat: Callable[[], None] = lambda: None,
) -> list[tuple[int, int]]:
    """Cut a file into pieces of whole rows: bytes of its unpacked text, from and to; or rows of a Parquet file.

    Args:
        address: of the file.
        rows_wanted: about how many rows a piece should have; of Parquet, exactly.
        header: whether the first row of a CSV is its header.
        spool: where a packed file is unpacked to: its pieces are those of that file.
        beat: called often.

    Raises:
        BadFile: it cannot be read, or a record has no end.
    """
    form = format_of(address)
    with told(address):
        if form.name == "parquet":
            with closing(opened(address)) as file:
                rows = parquet.ParquetFile(file).metadata.num_rows
            return [(at, min(at + rows_wanted, rows)) for at in range(0, rows, rows_wanted)]
        if form.gzip:
            if spool is None:
                raise ValueError("a packed file needs a spool")
            with closing(opened(address)) as packed, gzip.open(packed) as text, Draft(spool) as draft:
                while block := text.read(_SAMPLE):
                    draft.write(block)
                    beat()
            address = spool
        size, quoted = size_of(address), form.name == "csv"
        with closing(opened(address)) as file:
            sample = file.read(_SAMPLE)
            start = len(_BOM) if sample.startswith(_BOM) else 0
            if quoted and header and (first := RECORD.search(sample, start)):
                start = first.end()
            if start >= size:
                return []
            lines = max(sample.count(b"\n", start), 1)
            wanted = max(rows_wanted * (len(sample) - start) // lines, 64)
            pieces: list[tuple[int, int]] = []
            ends = record_ends if quoted else line_ends
            for end in ends(address, file, start, size, wanted):
                pieces.append((start, end))
                start = end
                beat()
            return pieces


def read(  # noqa: PLR0913 - a file and what is wanted of it
    address: str, form: Format, piece: tuple[int, int], *, names: Sequence[str], wanted: Sequence[str], slice_rows: int
) -> Iterator[Slice]:
    """Read the rows of a piece.

    Args:
        address: of the file; of a packed one, its spool.
        form: of the file as it was given.
        piece: of `split`.
        names: all columns of the file, see `inspect`.
        wanted: those to read.
        slice_rows: how many rows each slice has; the last may have fewer.

    Raises:
        BadFile: the file cannot be read any more.
    """
    with told(address), closing(opened(address)) as file:
        if form.name == "parquet":
            slices = _parquet_slices(file, piece, wanted, slice_rows)
        else:
            texts = blocks(address, file, *piece, _BLOCK, quoted=form.name == "csv")
            if form.name == "csv":
                slices = (_csv_slice(block, names, wanted) for block in texts)
            else:
                slices = (_json_slice(block, wanted) for block in texts)
        yield from _of_rows(slices, slice_rows)


def _of_rows(slices: Iterable[Slice], rows: int) -> Iterator[Slice]:
    """Cut and join slices to the same number of rows."""
    parts: list[Slice] = []
    have = 0
    for part in slices:
        at = 0
        while have + part.rows - at >= rows:
            upto = at + rows - have
            yield _joined([*parts, _cut(part, at, upto)])
            parts, have, at = [], 0, upto
        if at < part.rows:
            parts.append(_cut(part, at, part.rows))
            have += part.rows - at
    if parts:
        yield _joined(parts)


def _cut(part: Slice, start: int, end: int) -> Slice:
    columns = {name: column[start:end] for name, column in part.columns.items()}
    broken = [Broken(one.row - start, one.message, one.content) for one in part.broken if start <= one.row < end]
    return Slice(end - start, columns, broken, part.is_text)


def _joined(parts: list[Slice]) -> Slice:
    if len(parts) == 1:
        return parts[0]
    rows, broken = 0, []
    for part in parts:
        broken += [Broken(one.row + rows, one.message, one.content) for one in part.broken]
        rows += part.rows
    columns: dict[str, Any] = {}
    for name, first in parts[0].columns.items():
        pieces = [part.columns[name] for part in parts]
        columns[name] = [*chain.from_iterable(pieces)] if isinstance(first, list) else pa.concat_arrays(pieces)
    return Slice(rows, columns, broken, parts[0].is_text)


def _sample(file: IO[bytes], form: Format) -> bytes:
    """Return whole records from the beginning."""
    with gzip.open(file) if form.gzip else file as text:
        data = text.read(_SAMPLE).removeprefix(_BOM)
    if len(data) < _SAMPLE - len(_BOM):
        return data
    return data[: (boundary(data) if form.name == "csv" else data.rfind(b"\n") + 1)] or data


def _distinct(address: str, columns: list[str]) -> list[str]:
    for name in columns:
        if columns.count(name) > 1:
            raise BadFile(address, f"there is more than one column {name!r}")
    return columns


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


# CSV


def _csv_types(address: str, sample: bytes, header: bool, names: Sequence[str] | None) -> dict[str, pa.DataType]:
    record = RECORD.search(sample)
    if record is None:
        return dict.fromkeys(names or (), pa.string())
    try:
        cells = next(csv.reader(io.StringIO(record[0].decode(), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFile(address, f"its first row cannot be read: {error}; a CSV file must be UTF-8") from None
    if not header and len(cells) != len(names or ()):
        raise BadFile(address, f"it has {len(cells)} columns, not the {len(names or ())} of the model")
    columns = _distinct(address, cells if header else list(names or ()))
    rows = sample[record.end() :] if header else sample
    if not rows.strip():
        return dict.fromkeys(columns, pa.string())
    options = arrow_csv.ConvertOptions(check_utf8=False)
    table = _parsed(rows.decode(errors="replace").encode(), columns, options, lambda _: "skip")
    return {one.name: pa.string() if pa.types.is_null(one.type) else one.type for one in table.schema}


def _parsed(
    block: bytes, names: Sequence[str], options: arrow_csv.ConvertOptions, handler: Callable[[Any], str]
) -> pa.Table:
    return arrow_csv.read_csv(
        pa.BufferReader(block),
        # All at once: a record may be as long as the block.
        arrow_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(names)),
        arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=handler),
        options,
    )


def _csv_slice(block: bytes, names: Sequence[str], wanted: Sequence[str]) -> Slice:
    text = pa.string()
    options = arrow_csv.ConvertOptions(
        # The text was looked at.
        check_utf8=False,
        include_columns=list(wanted),
        column_types=dict.fromkeys(wanted, text),
    )
    block, damages = repaired(block, len(names))
    broken: list[Broken] = []

    def note(row: Any) -> str:
        # Arrow counts rows from 1, without the blank ones.
        number = row.number - 1
        ragged = f"it has {row.actual_columns} fields, not {row.expected_columns}", row.text
        message, content = damages.get(number, ragged)
        broken.append(Broken(number, message, content[:_CONTENT]))
        return "skip"

    table = _parsed(block, names, options, note)
    columns = {name: _flat(table.column(name)) for name in wanted}
    rows = table.num_rows + len(broken)
    if broken:
        # Arrow leaves such rows out.
        gone, good = {one.row for one in broken}, iter(range(rows))
        places = pa.array([None if row in gone else next(good) for row in range(rows)], pa.int64())
        columns = {name: column.take(places) for name, column in columns.items()}
    return Slice(rows, columns, broken, is_text=True)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


# JSONL

# NaN is no JSON, but pandas and others write it where there is no number.
_decode = json.JSONDecoder(
    parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.__getitem__
).raw_decode


def _json_rows(block: bytes) -> Iterator[dict[str, Any] | Broken]:
    """Return the rows of a block, numbered within it."""
    number = 0
    for raw in block.removeprefix(_BOM).split(b"\n"):
        line = ""
        try:
            line = raw.decode().strip()
            if not line:
                continue
            value, end = _decode(line)
            message = "" if end == len(line) and isinstance(value, dict) else "it is no JSON object"
        except UnicodeDecodeError:
            message = "it is not UTF-8"
        except (ValueError, RecursionError) as error:
            message = f"it is no JSON: {error}"
        if message:
            yield Broken(number, message, (line or raw.decode(errors="backslashreplace"))[:_CONTENT])
        else:
            yield value
        number += 1


def _json_slice(block: bytes, wanted: Sequence[str]) -> Slice:
    rows = list(_json_rows(block))
    broken = [row for row in rows if isinstance(row, Broken)]
    values: list[dict[str, Any]] = [{} if isinstance(row, Broken) else row for row in rows] if broken else rows  # type: ignore[assignment]
    return Slice(len(rows), {name: [row.get(name) for row in values] for name in wanted}, broken)


def _json_types(address: str, sample: bytes) -> dict[str, pa.DataType]:
    found = list(_json_rows(sample))
    rows = [row for row in found if isinstance(row, dict)]
    if found and not rows:
        raise BadFile(address, "none of its first lines is a JSON object")
    # A dict keeps the order in which the keys are met.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _json_type([row.get(name) for row in rows]) for name in names}


def _json_type(values: list[Any]) -> pa.DataType:
    """Return the type that holds the values; text, if it must be their JSON."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


# Parquet


def _parquet_slices(file: IO[bytes], piece: tuple[int, int], wanted: Sequence[str], rows: int) -> Iterator[Slice]:
    # With a buffer, a column's chunk is not read whole: a file may be one group of rows.
    source = parquet.ParquetFile(file, buffer_size=_SAMPLE)
    groups: list[int] = []
    first = at = 0
    for number in range(source.num_row_groups):
        count = source.metadata.row_group(number).num_rows
        if at < piece[1] and at + count > piece[0]:
            first = first if groups else at
            groups.append(number)
        at += count
    if not groups:
        return
    at = first
    for batch in source.iter_batches(rows, row_groups=groups, columns=list(wanted), use_threads=False):
        start, end = max(piece[0] - at, 0), min(piece[1] - at, batch.num_rows)
        at += batch.num_rows
        if start < end:
            part = batch.slice(start, end - start)
            columns = {name: part.column(name) for name in wanted}
            yield Slice(part.num_rows, {name: one.cast(_decoded(one.type)) for name, one in columns.items()})
        if at >= piece[1]:
            return
