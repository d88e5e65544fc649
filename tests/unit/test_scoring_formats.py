import gzip
import json
import os
import random
import struct
from datetime import UTC, date, datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from rq_models.scoring import records
from rq_models.scoring.columns import kind_of, wire_column
from rq_models.scoring.files import BadFile, check_output, fingerprint, shown
from rq_models.scoring.formats import Format, Slice, format_of, inspect, read, split


def rows_of(address, *, header=True, rows_wanted=3, slice_rows=2, names=None, spool=None):
    """All rows as dicts of Python values, and the broken ones by their number in the file."""
    columns = inspect(address, header=header, names=names).columns
    rows, broken = [], {}
    for piece in split(address, rows_wanted, header=header, spool=spool):
        slices = read(spool or address, format_of(address), piece, names=columns, wanted=columns, slice_rows=slice_rows)
        for part in slices:
            for one in part.broken:
                broken[len(rows) + one.row] = one
            values = {
                name: column if isinstance(column, list) else column.to_pylist()
                for name, column in part.columns.items()
            }
            rows += [{name: values[name][row] for name in columns} for row in range(part.rows)]
    return rows, broken


def written(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def wired(values, kind, *, is_text=False, omit=False):
    column, data = wire_column(Slice(len(values), {"x": values}, [], is_text), "x", kind, omit=omit)
    assert column["bytes"] == len(data)
    return column, bytes(data)


def test_a_format_is_known_by_the_name():
    assert format_of("a.b/IN.CSV.gz") == Format("csv", gzip=True)
    assert format_of("s3://b/x.pq") == Format("parquet")
    assert format_of("https://h/x.ndjson?sig=a.csv") == Format("jsonl")
    with pytest.raises(BadFile, match=r"^x\.txt: its format is unknown; .*\.csv, .*\.parquet"):
        format_of("x.txt")


def test_nobody_sees_a_password():
    assert shown("ftp://me:secret@host/in.csv?sig=1") == "ftp://host/in.csv"
    assert shown("a?b@c.csv") == "a?b@c.csv"


def test_what_a_csv_holds(tmp_path):
    found = inspect(written(tmp_path, "a.csv", '\ufeffid,"a\nb",ok\n007,1.5,true\n8,2,false\n'))
    assert found.columns == ["id", "a\nb", "ok"]
    assert found.types == {"id": "int64", "a\nb": "double", "ok": "bool"}
    assert [str(kind) for kind in found.schema.types] == ["string"] * 3
    assert found.row_bytes == ((tmp_path / "a.csv").stat().st_size - len(b"\xef\xbb\xbf")) / 4


def test_a_csv_without_a_header_has_the_models_columns(tmp_path):
    path = written(tmp_path, "a.csv", "1,2\n3,4\n")
    assert rows_of(path, header=False, names=["x", "y"])[0] == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    with pytest.raises(BadFile, match=r"a\.csv: it has 2 columns, not the 3 of the model"):
        inspect(path, header=False, names=["x", "y", "z"])


def test_rows_of_csv_are_read_whatever_is_in_the_cells(tmp_path):
    text = 'id,text\r\n007,"a, ""b""\r\nc"\r\n\r\n8, x \r\n9,5" pipe\r\n10,""\r\n11,é'
    rows, broken = rows_of(written(tmp_path, "a.csv", text))
    assert [tuple(row.values()) for row in rows] == [
        ("007", 'a, "b"\r\nc'),
        ("8", " x "),
        ("9", '5" pipe'),
        ("10", ""),
        ("11", "é"),
    ]
    assert not broken


def test_a_row_of_csv_that_cannot_be_read_fails_alone(tmp_path):
    data = b'a,b\n1,2\n\n3\n4,\xff\n5,6\n7,8,9\n10,"never\n closed\n'
    rows, broken = rows_of(written(tmp_path, "a.csv", data), rows_wanted=100, slice_rows=4)
    assert [row["a"] for row in rows] == ["1", None, None, "5", None, None]
    assert {number: (one.message, one.content.strip()) for number, one in broken.items()} == {
        1: ("it has 1 fields, not 2", "3"),
        2: ("it is not UTF-8", "4,\\xff"),
        4: ("it has 3 fields, not 2", "7,8,9"),
        5: ("a quote is opened and never closed", '10,"never\n closed'),
    }


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_csv_hold_each_row_once(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(records, "_WINDOW", 16)
    chance = random.Random(seed)  # noqa: S311 - no secret
    cells = ["1", "", '"a,b"', '"x\ny"', '"q""\n""q"', '5" pipe', '""', '"\n"', "é"]
    lines = [f"{number},{chance.choice(cells)},{chance.choice(cells)}" for number in range(200)]
    path = written(tmp_path, "a.csv", "n,a,b\n" + "\n".join(lines))
    rows, broken = rows_of(path, rows_wanted=chance.choice([1, 7, 50]), slice_rows=chance.choice([1, 3, 64]))
    assert [row["n"] for row in rows] == [str(number) for number in range(200)]
    assert not broken
    assert len(split(path, 20)) > 3


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_are_cut_wherever_their_ends_are(tmp_path, monkeypatch, end):
    monkeypatch.setattr(records, "_SCANNED", 5)
    lines = [json.dumps({"n": n, "text": "x" * (n % 17)}) for n in range(40)]
    path = written(tmp_path, "a.jsonl", "\n".join(lines) + end)
    for wanted in (1, 3, 40):
        rows, broken = rows_of(path, rows_wanted=wanted)
        assert [row["n"] for row in rows] == list(range(40))
        assert not broken


def test_slices_are_exact(tmp_path):
    path = written(tmp_path, "a.csv", "n\n" + "".join(f"{n}\n" for n in range(10)))
    (piece,) = split(path, 100)
    slices = list(read(path, Format("csv"), piece, names=["n"], wanted=["n"], slice_rows=4))
    assert [part.rows for part in slices] == [4, 4, 2]


def test_slices_join_blocks_and_keep_the_places_of_broken_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("rq_models.scoring.formats._BLOCK", 16)
    path = written(tmp_path, "a.csv", "n,m\n" + "".join(f"{n},1\n" if n % 5 else f"{n}\n" for n in range(40)))
    rows, broken = rows_of(path, rows_wanted=100, slice_rows=7)
    assert [row["n"] for row in rows] == [str(n) if n % 5 else None for n in range(40)]
    assert sorted(broken) == list(range(0, 40, 5))


def test_a_record_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST", 100)
    path = written(tmp_path, "a.csv", 'a\n1\n"' + "x\n" * 500)
    with pytest.raises(BadFile, match=r"a\.csv: a row that begins at byte 4 has no end within"):
        split(path, 10)
    path = written(tmp_path, "a.jsonl", "{}\n" * 50 + " " * 500)
    with pytest.raises(BadFile, match=r"a\.jsonl: a line that begins after byte"):
        split(path, 1)


def test_jsonl(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1, "s": "\\ud800"}\n\n{"b": [1], "a": 2.5}\r\n{"a": NaN}\n'
    data += b'[1]\n{"a": 1\n"b": 2}\n{"a":"\xff"}\n'
    path = written(tmp_path, "a.jsonl", data)
    found = inspect(path)
    assert found.columns == ["a", "s", "b"]
    assert found.types == {"a": "double", "s": "string", "b": "string"}
    rows, broken = rows_of(path, rows_wanted=2, slice_rows=3)
    assert rows[0] == {"a": 1, "s": "\ud800", "b": None}
    assert rows[1] == {"a": 2.5, "s": None, "b": [1]}
    assert rows[2]["a"] is None
    assert sorted(broken) == [3, 4, 5, 6]
    assert broken[3].message == "it is no JSON object"
    assert broken[4].message.startswith("it is no JSON: ")
    assert broken[6].message == "it is not UTF-8"


def test_a_file_without_one_object_is_no_jsonl(tmp_path):
    with pytest.raises(BadFile, match="none of its first lines is a JSON object"):
        inspect(written(tmp_path, "a.jsonl", '[\n  {"a":\n  1}\n]\n'))


def test_packed_text_is_unpacked_once_and_cut_there(tmp_path):
    path = written(tmp_path, "a.csv.gz", gzip.compress(b"n\n1\n") + gzip.compress(b"2\n"))
    beats = []
    spool = str(tmp_path / "parts" / "text")
    pieces = split(path, 1, spool=spool, beat=lambda: beats.append(1))
    assert pieces[0][0] == 2
    assert beats
    assert rows_of(path, spool=spool)[0] == [{"n": "1"}, {"n": "2"}]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["text"]


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"a\n" * 10000)[:-20]], ids=["none", "cut"])
def test_what_is_no_gzip_is_said(tmp_path, data):
    path = written(tmp_path, "a.csv.gz", data)
    with pytest.raises(BadFile, match=r"a\.csv\.gz: it is no gzip file, or a damaged one"):
        split(path, 10, spool=str(tmp_path / "spool"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv.gz"]


def test_parquet(tmp_path):
    path = str(tmp_path / "a.parquet")
    table = pa.table({"n": range(25), "d": pa.array(["x", "y", None, "x", "z"] * 5).dictionary_encode()})
    parquet.write_table(table, path, row_group_size=4)
    found = inspect(path)
    assert found.types["n"] == "int64"
    assert str(found.schema.field("d").type) == "string"
    assert split(path, 10) == [(0, 10), (10, 20), (20, 25)]
    rows, _ = rows_of(path, rows_wanted=7, slice_rows=3)
    assert rows == table.to_pylist()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_empty_file_has_no_pieces(tmp_path, name):
    assert split(written(tmp_path, name, b""), 10) == []


def test_a_header_alone_has_no_pieces(tmp_path):
    path = written(tmp_path, "a.csv", "a,b\n")
    assert inspect(path).columns == ["a", "b"]
    assert split(path, 10) == []


def test_failures_of_a_file_are_one_sentence(tmp_path):
    with pytest.raises(BadFile, match=r"none\.csv: there is no such file or folder$"):
        inspect(str(tmp_path / "none.csv"))
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(BadFile, match="this is a folder, not a file"):
        inspect(str(tmp_path / "d.csv"))
    with pytest.raises(BadFile, match=r"a\.parquet: it is damaged: Parquet"):
        inspect(written(tmp_path, "a.parquet", "PAR1 and no more"))
    with pytest.raises(BadFile, match=r"its first row cannot be read: .*must be UTF-8"):
        inspect(written(tmp_path, "a.csv", "größe\n1\n".encode("utf-16")))
    with pytest.raises(BadFile, match="more than one column 'a'"):
        inspect(written(tmp_path, "b.csv", "a,a\n1,2\n"))
    with pytest.raises(BadFile, match="nosuch"):
        inspect("nosuch://b/a.csv")


def test_a_file_that_became_shorter_is_told(tmp_path):
    path = written(tmp_path, "a.csv", "a\n1\n")
    with pytest.raises(BadFile, match="shorter"):
        list(read(path, Format("csv"), (2, 90), names=["a"], wanted=["a"], slice_rows=5))


def test_the_fingerprint_is_of_the_content(tmp_path):
    path = written(tmp_path, "a.csv", "a\n1\n")
    before = fingerprint(path)
    assert fingerprint(path) == before
    os.utime(path, ns=(0, 0))
    assert fingerprint(path) != before


def test_an_output_is_looked_at_before_the_work(tmp_path):
    path = written(tmp_path, "a.csv", "")
    check_output(path, overwrite=True)
    check_output(str(tmp_path / "new.csv"), overwrite=False)
    with pytest.raises(BadFile, match="it exists already"):
        check_output(path, overwrite=False)
    with pytest.raises(BadFile, match="there is no folder"):
        check_output(str(tmp_path / "no" / "a.csv"), overwrite=False)
    with pytest.raises(BadFile, match="this is a folder"):
        check_output(str(tmp_path), overwrite=True)


def test_cells_become_numbers():
    column, data = wired(pa.array(["1.5", "2", "nan"]), "f8", is_text=True)
    assert column == {"name": "x", "kind": "f8", "bytes": 24, "omit": False, "nulls": [2]}
    assert struct.unpack("<3d", data)[:2] == (1.5, 2.0)
    column, data = wired(pa.array(["1", " 2 ", "", "-7"]), "i8", is_text=True, omit=True)
    assert (column["kind"], column["nulls"], column["omit"]) == ("i8", [2], True)
    assert struct.unpack("<4q", data)[::3] == (1, -7)
    column, data = wired(pa.array(["true", "False", "1", "0", "TRUE"]), "b1", is_text=True)
    assert (column["kind"], data) == ("b1", b"\1\0\1\0\1")
    assert "nulls" not in column


def test_cells_stay_text():
    column, data = wired(pa.array(["zz", "", "é", None, "007"])[1:], "str", is_text=True)
    assert (column["kind"], column["nulls"]) == ("str", [2])
    assert data == struct.pack("<5i", 0, 0, 2, 2, 5) + "é007".encode()


def test_cells_mean_the_same_whatever_stands_beside_them():
    assert wired(pa.array(["0x1F"]), "i8", is_text=True)[1] == struct.pack("<q", 31)
    assert wired(pa.array(["nan", "1.5"]), "f8", is_text=True)[0]["nulls"] == [0]


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1.5", "abc", "", "1_0"], "f8", [1.5, "abc", None, "1_0"]),
        (["5", "5.0", "x"], "i8", [5, 5.0, "x"]),
        (["0x1F", "x"], "i8", [31, "x"]),
        (["nan", "x"], "f8", [None, "x"]),
        (["maybe", "TRUE", "no", "on"], "b1", ["maybe", True, False, True]),
        (["[1, 2]", "007", '{"a": 1}', "", "text"], "json", [[1, 2], "007", {"a": 1}, None, "text"]),
    ],
)
def test_cells_that_do_not_fit_go_as_they_stand(cells, kind, values):
    column, data = wired(pa.array(cells), kind, is_text=True)
    assert column["kind"] == "json"
    assert json.loads(data) == values


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.5, True], "f8"),
        ([1, 5.5], "i8"),
        ([1, True], "i8"),
        (["1.5"], "f8"),
        ([1], "str"),
        ([1], "b1"),
        ([2**70], "i8"),
        (["\ud800"], "str"),
        ([{"a": 1}, [2], None], "json"),
    ],
)
def test_values_of_json_that_do_not_fit_go_as_they_are(values, kind):
    column, data = wired(values, kind)
    assert column["kind"] == "json"
    assert json.loads(data) == values


def test_values_of_json_that_fit_go_as_numbers():
    assert struct.unpack("<2d", wired([1, 2.5], "f8")[1]) == (1.0, 2.5)
    assert struct.unpack("<d", wired([2**60 + 1], "f8")[1]) == (2.0**60,)
    assert struct.unpack("<2q", wired([1.0, 2], "i8")[1]) == (1, 2)
    column, data = wired([None, None], "f8")
    assert (column["nulls"], len(data)) == ([0, 1], 16)


@pytest.mark.parametrize(
    ("array", "kind", "sent", "values"),
    [
        (pa.array([1, 2], pa.int16()), "f8", "f8", (1.0, 2.0)),
        (pa.array([Decimal("1.5")]), "f8", "f8", (1.5,)),
        (pa.array([1.0, 2.0], pa.float32()), "i8", "i8", (1, 2)),
        (pa.array([1.0, 2.5]), "i8", "json", [1.0, 2.5]),
        (pa.array([True]), "f8", "json", [True]),
        (pa.array(["1.5"]), "f8", "json", ["1.5"]),
        (pa.array([[1], None]), "json", "json", [[1], None]),
        (pa.array([{"at": date(2020, 1, 2), "b": b"x"}]), "json", "json", [{"at": "2020-01-02", "b": "x"}]),
        (pa.array([float("nan"), 1.0]), "json", "json", [None, 1.0]),
        (pa.array([1], pa.timestamp("ns")), "json", "json", ["1970-01-01T00:00:00"]),
    ],
)
def test_columns_of_parquet(array, kind, sent, values):
    column, data = wired(array, kind)
    assert column["kind"] == sent
    found = json.loads(data) if sent == "json" else struct.unpack(f"<{len(array)}{'d' if sent == 'f8' else 'q'}", data)
    assert found == values


def test_integers_that_pandas_made_floats_are_integers_and_nulls():
    column, data = wired(pa.array([1.0, float("nan"), 3.0]), "i8")
    assert (column["kind"], column["nulls"], struct.unpack("<3q", data)[::2]) == ("i8", [1], (1, 3))


def test_times_go_as_iso():
    _, data = wired(pa.array([datetime(2020, 1, 2, 3, tzinfo=UTC)]), "str")
    assert data[8:] == b"2020-01-02T03:00:00+00:00"


def test_a_slice_of_an_array_is_sent_and_no_more():
    assert wired(pa.array([1.0, 2.0, 3.0])[1:2], "f8")[1] == struct.pack("<d", 2)
    assert wired(pa.array([True, False, True])[1:], "b1")[1] == b"\0\1"
    assert wired(pa.array(["a", "bc", "d"])[1:2], "str")[1] == struct.pack("<2i", 0, 2) + b"bc"


def test_the_kind_follows_the_type_where_nobody_says_better():
    kinds = {
        kind: kind_of(kind) for kind in ("int64", "double", "bool", "string", "timestamp[us]", "list<item: int64>")
    }
    assert list(kinds.values()) == ["i8", "f8", "b1", "str", "str", "json"]
