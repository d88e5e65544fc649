"""The output: each chunk writes its part beside it, and one merge makes the file of all parts.

A part of a text is the text itself, without a header; one of Parquet is an Arrow stream. A merge of text only copies,
and one of Parquet makes row groups of a fixed size: where the input was cut shows nowhere. What failed stands in a
second file, row by row, and its rows are numbered within the part until the merge knows where the part stands.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from rq_models.scoring.columns import MISFIT, as_json, as_text, parsed, plain, received
from rq_models.scoring.files import BadFile, Draft, names, opened, remove, remove_folder, size_of, told
from rq_models.scoring.formats import Format, Slice, format_of
from rq_models.scoring.runs import errors_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rq_models.errors import ErrorRecord
    from rq_models.scoring.columns import Column
    from rq_models.scoring.formats import Inspected

_TYPES = {"f8": pa.float64(), "i8": pa.int64(), "b1": pa.bool_(), "str": pa.string(), "json": pa.string()}
_COPIED = 1 << 20
"""Bytes copied at a time."""
_PARSED = {"f8": pa.float64(), "i8": pa.int64(), "b1": pa.bool_()}
_GROUP, _GROUP_BYTES = 1 << 17, 1 << 26
"""Rows of a row group of Parquet, and the size above which it has fewer."""
_PREDICTION = "prediction"
_LEVEL = 2
"""Of packing: a third of the time that 6 takes, and a tenth more bytes."""
_NOTHING = type(None)
_PYTHON: dict[pa.DataType, set[type]] = {
    pa.int64(): {int, _NOTHING},
    pa.float64(): {int, float, _NOTHING},
    pa.bool_(): {bool, _NOTHING},
}
"""What JSONL may hold in a typed column."""
_encode = json.JSONEncoder(ensure_ascii=False).encode
_strict = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",\n", ": ")).encode
_CONTENT = 2000
"""Characters of a failed row's cell that are kept."""


@dataclass(frozen=True)
class Layout:
    """The columns of an output.

    Attributes:
        kept: those that are carried over from the input.
        predicted: name and kind of those that the model gives, in the order of its answers.
    """

    kept: pa.Schema
    predicted: tuple[tuple[str, str], ...]

    @property
    def schema(self) -> pa.Schema:
        """All columns, the predicted ones last."""
        return pa.schema([*self.kept, *(pa.field(name, _TYPES[kind]) for name, kind in self.predicted)])

    def dumps(self) -> str:
        """Return it as text; `loads` reads it."""
        return json.dumps({"kept": self.kept.serialize().to_pybytes().hex(), "predicted": self.predicted})

    @classmethod
    def loads(cls, text: str) -> Layout:
        """Return the layout that `dumps` made a text of."""
        stored = json.loads(text)
        kept = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(stored["kept"])))
        return cls(kept, tuple((name, kind) for name, kind in stored["predicted"]))


def layout(
    found: Inspected, keep: Sequence[str], outputs: Sequence[Mapping[str, Any]], typed: Mapping[str, str] | None = None
) -> Layout:
    """Return the columns of an output.

    Args:
        found: the input.
        keep: its columns that are carried over.
        outputs: name and kind of what the model gives; one named "" becomes ``prediction``. A name that is taken by a
            kept column gets ``predicted_`` before it.
        typed: kinds of columns that are text in the input and not in the output.
    """
    taken = {name: found.schema.field(name) for name in keep}
    for name, kind in (typed or {}).items():
        if name in taken and kind in _PARSED:
            taken[name] = pa.field(name, _TYPES[kind])
    predicted: list[tuple[str, str]] = []
    for output in outputs:
        name = output["name"] or _PREDICTION
        while name in taken or name in dict(predicted):
            name = f"predicted_{name}"
        predicted.append((name, output["kind"]))
    return Layout(pa.schema(list(taken.values())), tuple(predicted))


def folder_name(run: str, attempt: int, execution: str) -> str:
    """Return the name, in the folder of an output's parts, of what belongs to the plan of one execution."""
    return f"{run}-{attempt}-{execution}"


def parts_folder(output: str, name: str = "") -> str:
    """Return where the parts of an output stand until it is whole: those of one plan, or of all."""
    return f"{output}.parts/{name}".rstrip("/")


def clear_up(output: str, run: str, attempt: int, but: str = "") -> None:
    """Remove what the plans of a run have left behind, up to this attempt; nothing that is somebody else's.

    Args:
        output: of the run.
        run: its id.
        attempt: a later one may be at work.
        but: the name of what is to stay.
    """
    for name in names(parts_folder(output)):
        of, _, rest = name.partition("-")
        number = rest.partition("-")[0]
        if of == run and number.isdecimal() and int(number) <= attempt and name != but:
            remove(parts_folder(output, name))
    remove_folder(parts_folder(output))


class PartWriter:
    """Writes one part; it appears at `close`, and its errors before it.

    Args:
        address: of the part.
        form: of the final output.
        columns: of the output.

    Attributes:
        rows: written so far.
        failed: of these.
    """

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._draft.size

    def __init__(self, address: str, form: Format, columns: Layout) -> None:
        self.rows = self.failed = 0
        self._address, self._form, self._layout = address, form, columns
        self._draft = Draft(address)
        self._errors: Draft | None = None
        self._stream: pa.RecordBatchWriter | None = None
        if form.name == "parquet":
            self._stream = pa.ipc.new_stream(pa.PythonFile(self._draft, mode="w"), columns.schema)

    def write(
        self,
        part: Slice,
        answered: Sequence[Column],
        blob: bytes | memoryview,
        failed: Iterable[tuple[int, ErrorRecord]],
    ) -> None:
        """Append rows.

        Args:
            part: what was read.
            answered: the columns of the model's answer.
            blob: their data.
            failed: rows of the slice that the model has no prediction for, and why.
        """
        wrong: dict[int, Any] = dict(failed)
        for one in part.broken:
            wrong[one.row] = {"kind": "InvalidInput", "type": None, "message": one.message, "retryable": False}
        # First of all, because here more may turn out to be wrong.
        kept = [self._kept(part, field, wrong) for field in self._layout.kept]
        predicted, at = [], 0
        data, lost = memoryview(blob), set(wrong)
        for column in answered:
            predicted.append(received(column, data[at : at + column["bytes"]], part.rows, lost))
            at += column["bytes"]
        if [column["kind"] for column in answered] != [kind for _, kind in self._layout.predicted]:
            raise ValueError(f"the answer has the columns {answered}, and not {self._layout.predicted}")
        with told(self._address):
            if self._form.name == "jsonl":
                self._draft.write(_lines(self._layout.schema.names, [plain(one) for one in (*kept, *predicted)]))
            else:
                arrays = [*kept, *(as_json(one) if isinstance(one, list) else one for one in predicted)]
                if self._stream is not None:
                    self._stream.write_batch(pa.record_batch(arrays, schema=self._layout.schema))
                else:
                    self._draft.write(_cells(arrays, self._layout.schema.names))
        if wrong:
            self._note(part, wrong)
        self.rows += part.rows
        self.failed += len(wrong)

    def _kept(self, part: Slice, field: pa.Field, wrong: dict[int, Any]) -> Any:
        values = part.columns[field.name]
        if part.is_text and not pa.types.is_string(field.type):
            kind: Any = next(kind for kind, given in _PARSED.items() if given == field.type)
            array = parsed(values, kind)
            return array if isinstance(array, pa.Array) else _fitting(array, field, wrong)
        if self._form.name == "jsonl":
            return values
        if not isinstance(values, list):
            return values.cast(field.type)
        if self._form.name == "csv" or pa.types.is_string(field.type):
            return as_text(values)
        # Told a type, Arrow takes 5.5 for an integer and true for a number.
        if _PYTHON[field.type].issuperset(map(type, values)):
            try:
                return pa.array(values, field.type)
            except MISFIT:
                pass
        return _fitting(values, field, wrong)

    def _note(self, part: Slice, wrong: dict[int, Any]) -> None:
        """Write failed rows down: number within the part, error, and what was in them."""
        if self._errors is None:
            self._errors = Draft(errors_of(self._address))
        contents = {one.row: one.content for one in part.broken}
        for row in sorted(wrong):
            content: Any = contents.get(row)
            if content is None:
                content = {name: _clipped(plain(column[row : row + 1])[0]) for name, column in part.columns.items()}
            line = {"row": self.rows + row, "error": wrong[row], "input": content}
            self._errors.write((json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Let the part appear; its errors are there before it."""
        with told(self._address):
            if self._stream is not None:
                self._stream.close()
        if self._errors is not None:
            self._errors.close()
        self._draft.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        self._draft.discard()
        if self._errors is not None:
            self._errors.discard()


def _clipped(value: Any) -> Any:
    return value[:_CONTENT] if isinstance(value, str) else value


def _fitting(values: list[Any], field: pa.Field, wrong: dict[int, Any]) -> pa.Array:
    """Return the values that are of the column's type; the rows of others fail: the output has no place for them."""
    found: list[Any] = []
    for row, value in enumerate(values):
        try:
            number = value
            if type(value) is float and field.type == pa.int64() and value.is_integer():
                number = int(value)
            elif type(value) not in _PYTHON[field.type]:
                raise OverflowError
            elif field.type == pa.float64() and value is not None:
                number = float(value)
            found.append(pa.scalar(number, field.type).as_py())
        except MISFIT:
            message = f"column {field.name!r}: {_encode(value)[:80]} is no {field.type}, which it was at first"
            wrong.setdefault(row, {"kind": "InvalidInput", "type": None, "message": message, "retryable": False})
            found.append(None)
    return pa.array(found, field.type)


def _lines(names: list[str], columns: list[list[Any]]) -> bytes:
    """Return rows as lines of JSON."""
    form = "{" + ", ".join(_encode(name).replace("%", "%%") + ": %s" for name in names) + "}\n"
    rows = zip(*map(_texts, columns), strict=True)
    # Half of a character that UTF-16 has in two becomes its escape, which is JSON's, too.
    return "".join(map(form.__mod__, rows)).encode(errors="backslashreplace")


def _texts(values: list[Any]) -> list[str]:
    """Return each value's JSON; NaN and infinities, which it has not, are nulls."""
    try:
        # One call for all: no string of JSON holds a newline.
        texts = _strict(values)[1:-1].split(",\n")
    except ValueError:
        return _texts(json.loads(_encode(values), parse_constant=lambda _: None))
    return texts if len(texts) == len(values) else [_encode(value) for value in values]


def _cells(columns: list[pa.Array], names: list[str]) -> bytes:
    """Return columns as CSV without a header."""
    plainly = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_decimal)
    columns = [one if any(is_so(one.type) for is_so in plainly) else as_text(one) for one in columns]
    if len(columns) == 1:
        # A null alone would be a blank line, and who reads that takes it for no row.
        columns = [columns[0].cast(pa.string()).fill_null("")]
    batch = pa.record_batch(columns, names=names)
    text = io.BytesIO()
    try:
        arrow_csv.write_csv(batch, text, arrow_csv.WriteOptions(include_header=False, quoting_style="none"))
        return text.getvalue() if len(columns) > 1 else _quoted(columns)
    except pa.ArrowInvalid:
        # Arrow would give quotes to all text of these rows, and to none of the next.
        return _quoted(columns)


def _quoted(columns: list[pa.Array]) -> bytes:
    """Return columns as CSV in which those cells have quotes that need them."""
    text = io.StringIO()
    cells = [column.cast(pa.string()).fill_null("").to_pylist() for column in columns]
    csv.writer(text, lineterminator="\n").writerows(zip(*cells, strict=True))
    return text.getvalue().encode()


def errors_of(part: str) -> str:
    """Return where the failed rows of a part stand."""
    return f"{part}.errors"


class Part(NamedTuple):
    """A part of an output: where it is, how many rows it has, how many of them failed, and its size in bytes."""

    address: str
    rows: int
    failed: int
    size: int


def merge(  # noqa: PLR0913 - what, from where, to where
    parts: Sequence[Part],
    output: str,
    columns: Layout,
    aside: str,
    *,
    row_bytes: float = 0.0,
    beat: Callable[[], None] = lambda: None,
) -> int:
    """Make the output of its parts; it appears whole, and the file of failed rows before it.

    Args:
        parts: in order.
        output: where to.
        columns: of the output.
        aside: a folder on the same disk for the unfinished file.
        row_bytes: about how large a row of the input is.
        beat: called often.

    Returns:
        how many rows it has.
    """
    form = format_of(output)
    for part in parts:
        if (found := size_of(part.address)) != part.size:
            lost = f"{part.size} bytes were written and {found} are there; --restart (restart=True) starts over"
            raise BadFile(part.address, lost)
        beat()
    rows = sum(part.rows for part in parts)
    _merge_errors(parts, errors_address(output), aside, beat)
    with told(output), Draft(output, aside) as draft:
        if form.name == "parquet":
            _merge_rows(parts, draft, columns.schema, row_bytes, beat)
            return rows
        file: Any = draft
        if form.gzip:
            # Without a time in it, so that the same rows make the same bytes.
            file = gzip.GzipFile(fileobj=draft, mode="wb", mtime=0, compresslevel=_LEVEL, filename="")
        if form.name == "csv":
            file.write(_quoted([pa.array([name]) for name in columns.schema.names]))
        for part in parts:
            with told(part.address), closing(opened(part.address)) as text:
                while data := text.read(_COPIED):
                    file.write(data)
                    beat()
        if file is not draft:
            file.close()
    return rows


def _merge_rows(
    parts: Sequence[Part], draft: Draft, schema: pa.Schema, row_bytes: float, beat: Callable[[], None]
) -> None:
    """Write all rows as Parquet, in groups of the same number."""
    group = _GROUP
    while group > 1 and group * row_bytes > _GROUP_BYTES:
        group //= 2
    total, waiting, have = 0, [], 0
    with parquet.ParquetWriter(pa.PythonFile(draft, mode="w"), schema) as writer:
        for part in parts:
            with told(part.address), closing(opened(part.address)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    waiting.append(batch)
                    have += batch.num_rows
                    while have >= group:
                        table = pa.Table.from_batches(waiting)
                        writer.write_table(table.slice(0, group).combine_chunks())
                        rest = table.slice(group)
                        waiting, have = rest.to_batches(), rest.num_rows
                        total += group
                    beat()
        if have:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
    rows = sum(part.rows for part in parts)
    if total + have != rows:
        # Before it appears.
        lost = f"its parts have {total + have} rows, not {rows}; --restart (restart=True) starts over"
        raise BadFile(draft.address, lost)


def _merge_errors(parts: Sequence[Part], output: str, aside: str, beat: Callable[[], None]) -> None:
    """Write the failed rows of all parts, each with its number in the input, from 1."""
    if not any(part.failed for part in parts):
        # One of another run would be taken for this one's.
        remove(output)
        return
    before = 0
    with Draft(output, aside) as draft:
        for part in parts:
            if part.failed:
                with told(part.address), closing(_buffered(errors_of(part.address))) as lines:
                    for line in lines:
                        record = json.loads(line)
                        record["row"] += before + 1
                        draft.write((json.dumps(record) + "\n").encode())
            before += part.rows
            beat()


def _buffered(address: str) -> io.BufferedReader:
    # A store's own files read a whole block for each line.
    return io.BufferedReader(cast("io.RawIOBase", opened(address)), _COPIED)


def remove_part(address: str) -> None:
    """Remove a part that nobody wants."""
    remove(address)
    remove(errors_of(address))
