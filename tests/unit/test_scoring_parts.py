import csv
import errno
import gzip
import io
import json
import struct
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from rq_models.scoring import files
from rq_models.scoring.columns import as_text, received
from rq_models.scoring.files import BadFile, Draft, told
from rq_models.scoring.formats import Broken, Format, Inspected, Slice, format_of
from rq_models.scoring.parts import Layout, Part, PartWriter, clear_up, layout, merge, parts_folder
from rq_models.scoring.runs import errors_address

ERROR = {"kind": "ModelError", "type": "ValueError", "message": "no", "retryable": False}


def found(**kinds):
    return Inspected(list(kinds), {name: str(kind) for name, kind in kinds.items()}, 1, pa.schema(list(kinds.items())))


def floats(*values, nulls=()):
    column = {"name": "y", "kind": "f8", "bytes": 8 * len(values), "nulls": list(nulls)}
    return column, struct.pack(f"<{len(values)}d", *values)


def texts(*values):
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value.encode()))
    data = struct.pack(f"<{len(ends)}i", *ends) + "".join(values).encode()
    return {"name": "s", "kind": "str", "bytes": len(data)}, data


def objects(*values):
    data = json.dumps(values).encode()
    return {"name": "", "kind": "json", "bytes": len(data)}, data


def scored(output, columns, *slices):
    """Write each slice, its answer and its failed rows as a part of its own, and merge them."""
    done = []
    for number, (part, answer, failed) in enumerate(slices):
        address = f"{parts_folder(output)}/{number}"
        writer = PartWriter(address, format_of(output), columns)
        writer.write(part, [column for column, _ in answer], b"".join(data for _, data in answer), failed)
        writer.close()
        done.append(Part(address, writer.rows, writer.failed, writer.size))
    return merge(done, output, columns, parts_folder(output))


def errors_of(output):
    with fsspec.open(errors_address(output)) as file:
        return [json.loads(line) for line in file]


def test_the_layout_survives_being_stored():
    columns = layout(
        found(id=pa.string(), at=pa.timestamp("us", "UTC")), ["at"], [{"name": "", "kind": "json", "omit": False}]
    )
    assert Layout.loads(columns.dumps()) == columns
    assert columns.schema.names == ["at", "prediction"]


def test_a_predicted_column_gives_way_to_a_kept_one():
    columns = layout(found(y=pa.string(), predicted_y=pa.string()), ["y", "predicted_y"], [{"name": "y", "kind": "f8"}])
    assert columns.schema.names == ["y", "predicted_y", "predicted_predicted_y"]
    assert layout(found(y=pa.string()), [], [{"name": "y", "kind": "f8"}]).schema.names == ["y"]


def test_csv(tmp_path):
    output = str(tmp_path / "out.csv")
    columns = layout(
        found(id=pa.string(), t=pa.string()), ["id", "t"], [{"name": "y", "kind": "f8"}, {"name": "s", "kind": "str"}]
    )
    first = Slice(2, {"id": pa.array(["007", "8"]), "t": pa.array(["a", "b"])}, [], is_text=True)
    second = Slice(
        2,
        {"id": pa.array(["9", None]), "t": pa.array(['c, "d"\ne', None])},
        [Broken(1, "it has 1 fields, not 2", "x")],
        is_text=True,
    )
    rows = scored(
        output,
        columns,
        (first, [floats(0.5, 2), texts("u", "v")], [(1, ERROR)]),
        (second, [floats(3, 4), texts("é", "w")], []),
    )
    assert rows == 4
    text = (tmp_path / "out.csv").read_bytes()
    assert b"\n007,a,0.5,u\n8,b,,\n" in text
    assert list(csv.reader(io.StringIO(text.decode(), newline=""))) == [
        ["id", "t", "y", "s"],
        ["007", "a", "0.5", "u"],
        ["8", "b", "", ""],
        ["9", 'c, "d"\ne', "3", "é"],
        ["", "", "", ""],
    ]
    assert [(line["row"], line["error"]["kind"], line["input"]) for line in errors_of(output)] == [
        (2, "ModelError", {"id": "8", "t": "b"}),
        (4, "InvalidInput", "x"),
    ]


def test_a_row_of_one_empty_cell_is_no_blank_line(tmp_path):
    output = str(tmp_path / "out.csv")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}])
    scored(output, columns, (Slice(2, {}, []), [floats(1, 2)], [(0, ERROR)]))
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ['""', "2"]


def test_columns_that_csv_has_not_are_text(tmp_path):
    output = str(tmp_path / "out.csv")
    at = pa.array([datetime(2020, 1, 2, tzinfo=UTC)])
    values = {"at": at, "l": pa.array([[1, 2]]), "b": pa.array([b"x"])}
    columns = layout(found(**{name: one.type for name, one in values.items()}), values, [{"name": "", "kind": "json"}])
    scored(output, columns, (Slice(1, values, []), [objects({"a": None})], []))
    row = list(csv.reader((tmp_path / "out.csv").read_text().splitlines()))[1]
    assert row == ["2020-01-02T00:00:00+00:00", "[1, 2]", "x", '{"a": null}']


def test_packed_parts_are_members_of_one_file(tmp_path):
    output = str(tmp_path / "out.csv.gz")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}, {"name": "s", "kind": "str"}])
    part = Slice(1, {}, [])
    scored(output, columns, (part, [floats(1), texts("a")], []), (part, [floats(2), texts("b")], []))
    assert gzip.decompress((tmp_path / "out.csv.gz").read_bytes()).decode().splitlines()[1:] == ["1,a", "2,b"]


def test_jsonl_carries_values_as_they_stood(tmp_path):
    output = str(tmp_path / "out.jsonl")
    columns = layout(
        found(a=pa.int64(), b=pa.string()), ["a", "b"], [{"name": "", "kind": "json"}, {"name": "y", "kind": "f8"}]
    )
    part = Slice(3, {"a": [1, 2.5, None], "b": [{"c": [1, 2]}, "\ud800%\u2028\né", float("inf")]}, [])
    scored(output, columns, (part, [objects({"z": 1}, [], 5), floats(1, float("nan"), 2, nulls=[2])], []))
    lines = (tmp_path / "out.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"a": 1, "b": {"c": [1, 2]}, "prediction": {"z": 1}, "y": 1.0},
        {"a": 2.5, "b": "\ud800%\u2028\né", "prediction": [], "y": None},
        {"a": None, "b": None, "prediction": 5, "y": None},
    ]
    assert not Path(errors_address(output)).exists()


def test_parquet_has_the_types(tmp_path):
    output = str(tmp_path / "out.parquet")
    kept = pa.array([[1], None])
    kinds = ["f8", "str", "json"]
    columns = layout(found(l=kept.type, n=pa.int32()), ["l", "n"], [{"name": kind, "kind": kind} for kind in kinds])
    part = Slice(2, {"l": kept, "n": pa.array([1, None], pa.int32())}, [])
    answer = [floats(1, 2), texts("a", "b"), objects({"z": 1}, None)]
    assert scored(output, columns, (part, answer, []), (part, answer, [(0, ERROR)])) == 4
    table = parquet.read_table(output)
    assert table.schema.equals(columns.schema)
    assert [list(row.values()) for row in table.to_pylist()] == [
        [[1], 1, 1.0, "a", '{"z": 1}'],
        [None, None, 2.0, "b", None],
        [[1], 1, None, None, None],
        [None, None, 2.0, "b", None],
    ]
    assert errors_of(output)[0]["row"] == 3
    assert errors_of(output)[0]["input"] == {"l": [1], "n": 1}


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_where_the_input_was_cut_shows_nowhere(tmp_path, name):
    columns = layout(found(a=pa.string(), n=pa.int64()), ["a", "n"], [{"name": "y", "kind": "str"}])
    rows = [("plain", 1), ('with "quotes", and commas', 2), (None, 3), ("two\nlines", 4), ("plain again", 5)]
    made = []
    for number, ends in enumerate([[5], [1, 5], [2, 3, 4, 5]]):
        (tmp_path / str(number)).mkdir()
        output, start, parts = str(tmp_path / str(number) / name), 0, []
        for end in ends:
            some = rows[start:end]
            values = {"a": pa.array([a for a, _ in some], pa.string()), "n": pa.array([n for _, n in some])}
            answer = [texts(*(f"p{n}" for _, n in some))]
            parts.append((Slice(len(some), values, []), answer, [(0, ERROR)] if start == 0 else []))
            start = end
        assert scored(output, columns, *parts) == 5
        made.append((tmp_path / str(number) / name).read_bytes())
    assert made[0] == made[1] == made[2]


def test_large_parts_become_groups_of_one_size(tmp_path):
    output = str(tmp_path / "out.parquet")
    columns = layout(found(n=pa.int64()), ["n"], [{"name": "y", "kind": "f8"}])
    parts = [
        (Slice(size, {"n": pa.array(range(start, start + size))}, []), [floats(*[0.5] * size)], [])
        for start, size in ((0, 100_000), (100_000, 100_000), (200_000, 70_000))
    ]
    assert scored(output, columns, *parts) == 270_000
    file = parquet.ParquetFile(output)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        131_072,
        131_072,
        7_856,
    ]
    assert file.read(["n"]).column("n").to_pylist() == list(range(270_000))


def test_numbers_of_a_csv_are_numbers_where_they_can_be(tmp_path):
    inspected = found(a=pa.string(), n=pa.string(), b=pa.string(), id=pa.string())
    typed = {"a": "f8", "n": "i8", "b": "b1", "id": "str"}
    columns = layout(inspected, ["a", "n", "b", "id"], [{"name": "y", "kind": "f8"}], typed)
    cells = {"a": ["1.50", "", "x"], "n": ["1", "2", "3"], "b": ["true", "0", ""], "id": ["007", "", "9"]}
    part = Slice(3, {name: pa.array(some) for name, some in cells.items()}, [], is_text=True)
    for name in ("out.parquet", "out.jsonl"):
        scored(str(tmp_path / name), columns, (part, [floats(1, 2, 3)], []))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = [
        {"a": 1.5, "n": 1, "b": True, "id": "007", "y": 1.0},
        {"a": None, "n": 2, "b": False, "id": "", "y": 2.0},
        # What is no number has no place in the column; the model was not asked about such a row, or it refused it.
        {"a": None, "n": 3, "b": None, "id": "9", "y": None},
    ]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    assert lines == rows
    assert [one["row"] for one in errors_of(str(tmp_path / "out.parquet"))] == [3]


def test_no_rows_are_a_file_with_columns(tmp_path):
    columns = layout(found(a=pa.string()), ["a"], [{"name": "y", "kind": "i8"}])
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        assert merge([], str(tmp_path / name), columns, str(tmp_path)) == 0
    assert parquet.read_table(tmp_path / "out.parquet").schema.names == ["a", "y"]
    assert next(csv.reader((tmp_path / "out.csv").read_text().splitlines())) == ["a", "y"]
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_whole_number_is_one_however_it_is_written(tmp_path):
    output = str(tmp_path / "out.parquet")
    columns = layout(found(n=pa.string()), ["n"], [{"name": "y", "kind": "f8"}], {"n": "i8"})
    cells = Slice(3, {"n": pa.array(["34", "34.0", ""])}, [], is_text=True)
    scored(output, columns, (cells, [floats(1, 2, 3)], []))
    table = parquet.read_table(output)
    assert (table.schema.field("n").type, table["n"].to_pylist()) == (pa.int64(), [34, 34, None])
    assert not Path(errors_address(output)).exists()


def test_a_signature_in_a_clients_words_is_not_told():
    with pytest.raises(BadFile) as caught, told("https://host/a.csv?sig=secret"):
        raise OSError("403, url='https://me:secret@host/a.csv?sig=secret'")
    assert str(caught.value) == "https://host/a.csv: it is damaged: 403, url='https://host/a.csv'"


def test_a_value_that_has_no_place_in_its_column_is_left_out_and_told(tmp_path):
    output = str(tmp_path / "out.parquet")
    columns = layout(
        found(n=pa.int64(), f=pa.float64(), t=pa.string(), b=pa.bool_()),
        ["n", "f", "t", "b"],
        [{"name": "y", "kind": "f8"}],
    )
    values = {"n": [1, 5.5, None], "f": [2**60 + 1, 2, 0.5], "t": ["a", [1], 2], "b": [True, None, 1]}
    scored(output, columns, (Slice(3, values, []), [floats(1, 2, 3)], []))
    table = parquet.read_table(output).to_pydict()
    assert table["n"] == [1, None, None]
    assert table["f"] == [2.0**60, 2.0, 0.5]
    assert table["t"] == ["a", "[1]", "2"]
    assert table["b"] == [True, None, None]
    assert [line["row"] for line in errors_of(output)] == [2, 3]
    assert "5.5 is no int64" in errors_of(output)[0]["error"]["message"]


def test_errors_of_an_earlier_run_do_not_stay(tmp_path):
    output = str(tmp_path / "out.csv")
    (tmp_path / "out.csv.errors.jsonl").write_text("{}\n")
    (tmp_path / "out.csv").write_text("old")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}, {"name": "z", "kind": "f8"}])
    scored(output, columns, (Slice(1, {}, []), [floats(1), floats(2)], []))
    assert not Path(errors_address(output)).exists()
    assert (tmp_path / "out.csv").read_text().endswith("1,2\n")


def test_a_store_without_folders(tmp_path):
    output = "memory://bucket/out.csv"
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}, {"name": "s", "kind": "str"}])
    scored(output, columns, (Slice(1, {}, []), [floats(1), texts("a")], [(0, ERROR)]))
    with fsspec.open(output) as file:
        assert file.read().splitlines()[1] == b","
    assert errors_of(output)[0]["row"] == 1


def test_nothing_appears_before_the_end_and_nothing_after_a_failure(tmp_path):
    output = str(tmp_path / "out.csv")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}])
    writer = PartWriter(str(tmp_path / "part"), Format("csv"), columns)
    column, data = floats(1)
    writer.write(Slice(1, {}, []), [column], data, [(0, ERROR)])
    assert not (tmp_path / "part").exists()
    writer.discard()
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadFile, match="no such file"):
        merge([Part(str(tmp_path / "gone"), 1, 0, 1)], output, columns, parts_folder(output))
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_not_what_was_written_is_refused(tmp_path):
    output = str(tmp_path / "out.csv")
    part = Part(f"{parts_folder(output)}/r-1-x/part", 2, 0, 8)
    (tmp_path / "out.csv.parts" / "r-1-x").mkdir(parents=True)
    (tmp_path / "out.csv.parts" / "r-1-x" / "part").write_text("1\n2\n")
    with pytest.raises(BadFile, match="8 bytes were written and 4 are there; --restart"):
        merge([part], output, layout(found(), [], []), parts_folder(output))
    assert not Path(output).exists()


def test_an_output_that_lacks_rows_does_not_appear(tmp_path):
    output = str(tmp_path / "out.parquet")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}])
    writer = PartWriter(str(tmp_path / "part"), format_of(output), columns)
    column, data = floats(1, 2)
    writer.write(Slice(2, {}, []), [column], data, [])
    writer.close()
    with pytest.raises(BadFile, match="its parts have 2 rows, not 3; --restart"):
        merge([Part(str(tmp_path / "part"), 3, 0, writer.size)], output, columns, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_wide_rows_make_small_groups(tmp_path):
    output = str(tmp_path / "out.parquet")
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}])
    writer = PartWriter(str(tmp_path / "part"), format_of(output), columns)
    column, data = floats(*range(10))
    writer.write(Slice(10, {}, []), [column], data, [])
    writer.close()
    part = Part(str(tmp_path / "part"), 10, 0, writer.size)
    assert merge([part], output, columns, str(tmp_path), row_bytes=1 << 24) == 10
    source = parquet.ParquetFile(output)
    assert [source.metadata.row_group(n).num_rows for n in range(source.num_row_groups)] == [4, 4, 2]
    assert source.read()["y"].to_pylist() == [float(n) for n in range(10)]


@pytest.mark.parametrize("root", ["{tmp_path}", "memory://clear"])
def test_what_plans_leave_behind_is_removed_and_nothing_else(tmp_path, root):
    output = root.format(tmp_path=tmp_path) + "/out.csv"
    names = {"run-1-x", "run-2-y", "run-2-z", "run-3-w", "other-1-x", "mine"}
    for name in names:
        with Draft(f"{parts_folder(output, name)}/part") as draft:
            draft.write(b"1")
    clear_up(output, "run", 2, "run-2-z")
    assert set(files.names(parts_folder(output))) == {"run-2-z", "run-3-w", "other-1-x", "mine"}
    clear_up(str(tmp_path / "none.csv"), "run", 2)
    for name in ("other-1-x", "mine"):
        files.remove(parts_folder(output, name))
    clear_up(output, "run", 3)
    assert not files.names(parts_folder(output))


def test_a_full_disk_is_told(tmp_path):
    draft = Draft(str(tmp_path / "out.csv"))
    draft._file.close()
    draft._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - `discard` closes it
    with pytest.raises(BadFile, match=r"out\.csv: no space is left there$"):
        draft.write(b"x")
    draft.discard()
    assert not list(tmp_path.iterdir())


def test_a_network_that_fails_may_work_later():
    with pytest.raises(BadFile, match=r"^s3://b/a: reset$") as raised, told("s3://me:pw@b/a"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert raised.value.retryable
    with pytest.raises(KeyError), told("a"):
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize(
    ("column", "data"),
    [
        ({"name": "y", "kind": "f8", "bytes": 9}, b"x" * 9),
        ({"name": "y", "kind": "str", "bytes": 4}, b"x" * 4),
        ({"name": "y", "kind": "str", "bytes": 12}, struct.pack("<3i", 0, 1, 1 << 30)),
        ({"name": "y", "kind": "str", "bytes": 14}, struct.pack("<3i", 0, 1, 2) + b"\xff\xff"),
        ({"name": "y", "kind": "json", "bytes": 3}, b"[1]"),
    ],
)
def test_a_damaged_answer_is_refused(column, data):
    with pytest.raises(ValueError, match=r"."):
        received(column, memoryview(data), 2, set())


def test_an_answer_of_other_columns_is_refused(tmp_path):
    columns = layout(found(), [], [{"name": "y", "kind": "f8"}])
    writer = PartWriter(str(tmp_path / "part"), Format("parquet"), columns)
    column, data = texts("a")
    with pytest.raises(ValueError, match="columns"):
        writer.write(Slice(1, {}, []), [column], data, [])
    writer.discard()


def test_half_a_character_is_its_escape():
    assert as_text(["\ud800", "é", None]).to_pylist() == ["\\ud800", "é", None]
