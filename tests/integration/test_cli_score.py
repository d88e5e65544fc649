"""``rq-models score`` and ``runs``. The first part plays the worker, step by step; the second has real ones."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import RQ_MODELS, Project, wait_until
from redis import Redis
from rich.console import Console

from rq_models import Client
from rq_models.cli import bar, main
from rq_models.registry import Card, Serving, drop_lease, publish_card, renew_lease
from rq_models.scoring import runs
from rq_models.scoring.runs import Asked, Progress, Record

LEASE = Serving("lease", "iris-1", "host", 1, state="warm")
PLAN = {"pieces": [[0, 10], [10, 20]], "rows": 1800}


@pytest.fixture
def run(redis_url: str) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--url", redis_url, *arguments])

    return run


@pytest.fixture
def served(connection: Redis) -> None:
    """A model that somebody says to serve; the tests do its work."""
    publish_card(connection, Card("iris"))
    renew_lease(connection, "iris", LEASE, 600)


class Started:
    """A command that is running: what it says on stdout and, read from a file or a terminal, on stderr."""

    def __init__(self, process: subprocess.Popen[str], read: Callable[[], str]) -> None:
        self.process = process
        self.read = read

    def end(self) -> tuple[int, str, str]:
        stdout, _ = self.process.communicate(timeout=60)
        return self.process.returncode, stdout, self.read()


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start ``rq-models`` with a pipe, or on a terminal of its own."""
    begun: list[subprocess.Popen[str]] = []
    opened: list[int] = []

    def start(*arguments: str, terminal: bool = False) -> Started:
        environ = {**os.environ, "REDIS_URL": redis_url, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
        command = [RQ_MODELS, *arguments]
        if not terminal:
            log = tmp_path / "stderr"
            with log.open("w") as file:
                begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environ))
            return Started(begun[-1], log.read_text)
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        opened.append(ours)
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environ))
        os.close(theirs)
        said: list[bytes] = []

        def read() -> str:
            try:
                while chunk := os.read(ours, 65536):
                    said.append(chunk)
            except OSError:  # nothing more just now, or ever
                pass
            return b"".join(said).decode(errors="replace")

        return Started(begun[-1], read)

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for one in opened:
        os.close(one)


def asked(**options: Any) -> Asked:
    return Asked(**{"model": "iris", "input": "/data/in.csv", "output": "/data/out.csv", **options})


def begun(connection: Redis, **options: Any) -> Record:
    return runs.read(connection, runs.begin(connection, asked(**options), restart=False))


def plan(connection: Redis, run: str) -> Record:
    record = runs.read(connection, run)
    job_id = runs.step_id(run, record.attempt, runs.PLAN)
    connection.zadd("rq:wip:iris.bulk", {f"{job_id}:x": 2e9})
    assert runs.keep_plan(connection, SimpleNamespace(id=job_id, run="x"), record, PLAN)
    return runs.read(connection, run)


def commit(connection: Redis, record: Record, number: int, rows: int = 1000, failed: int = 0) -> None:
    job_id = runs.step_id(record.id, record.attempt, number)
    connection.zadd("rq:wip:iris.bulk", {f"{job_id}:x": 2e9})
    part = {"part": "p", "rows": rows, "failed": failed}
    runs.commit(connection, SimpleNamespace(id=job_id, run="x"), record, number, part)


def only_run(connection: Redis) -> str:
    wait_until(lambda: connection.zcard(runs.RUNS_KEY) == 1, "the run is begun")
    return connection.zrange(runs.RUNS_KEY, 0, -1)[0].decode()


def plain(text: str) -> str:
    """Return what a terminal was told without the codes that move its cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_in_a_pipe_there_are_plain_lines(served, start, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv")
    record = plan(connection, only_run(connection))
    commit(connection, record, 0)
    commit(connection, record, 1, rows=800, failed=13)
    runs.end(connection, record, "finished")

    code, stdout, stderr = command.end()

    assert (code, stdout) == (0, "1,800 in = 1,787 out + 13 failed\n")
    first, last, where = stderr.splitlines()
    assert first == f"rq-models: run {record.id}: iris scores /data/in.csv into /data/out.csv"
    assert re.fullmatch(r"rq-models: finished after 0:00:\d\d: 1,800 rows, [\d,.]+ rows/s, 13 failed", last)
    assert where == "rq-models: the failed rows are in /data/out.csv.errors.jsonl"


def test_without_failed_rows_no_file_of_them_is_named(served, start, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv")
    runs.end(connection, plan(connection, only_run(connection)), "finished")

    code, stdout, stderr = command.end()

    assert (code, stdout) == (0, "0 in = 0 out + 0 failed\n")
    assert "errors.jsonl" not in stderr


def test_now_and_then_a_line(connection: Redis, redis_url: str, capsys, monkeypatch: pytest.MonkeyPatch):
    record = begun(connection)

    def work() -> Iterator[str]:
        planned = plan(connection, record.id)
        yield "nobody serves it"
        commit(connection, planned, 0)
        yield "nobody serves it"
        runs.end(connection, planned, "merging")
        yield ""
        runs.end(connection, planned, "finished")
        yield ""

    monkeypatch.setattr(bar, "EVERY", 0)
    monkeypatch.setattr(bar, "_ASK_AGAIN", 0)
    steps = work()
    with Client(redis_url) as client:
        bar.follow(client.run(record.id), "iris", lambda: next(steps))

    lines = [line.removeprefix("rq-models: ") for line in capsys.readouterr().err.splitlines()]
    assert lines.count("nobody serves it") == 1
    assert lines[:3] == [
        "nobody serves it",
        "planning: 0 rows, 0 failed",
        "running: 0 of about 1,800 rows, 0 failed, 0%",
    ]
    assert lines[3].startswith("running: 1,000 of about 2,000 rows, ")
    assert " rows/s, 0 failed, 50%, 0:00:" in lines[3]
    assert lines[3].endswith(" left")
    assert lines[4].startswith("merging: 1,000 of about 2,000 rows, ")
    assert lines[5].startswith("finished after 0:00:0")
    assert len(lines) == 6


def test_on_a_terminal_there_is_a_bar(served, start, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv", terminal=True)
    wait_until(lambda: "planning" in command.read(), "it shows that the run is planned")
    record = plan(connection, only_run(connection))
    wait_until(lambda: "0 of about 1,800 rows" in plain(command.read()), "it shows the plan")
    commit(connection, record, 0, failed=3)
    wait_until(lambda: "3 failed" in plain(command.read()), "it shows the first chunk")
    shown = plain(command.read())
    assert re.search(
        r"iris +━+[^\r\n]* 50%, 0:00:\d\d left *\r\n1,000 of about 2,000 rows, [\d,.]+ rows/s, 3 failed", shown
    )
    commit(connection, record, 1, rows=800)
    runs.end(connection, record, "merging")
    wait_until(lambda: "merging" in command.read(), "it shows that the parts are merged")
    runs.end(connection, record, "finished")

    code, stdout, stderr = command.end()

    assert (code, stdout) == (0, "1,800 in = 1,797 out + 3 failed\n")
    assert re.search(r"iris +━+ +finished *\r\n1,800 rows, [\d,.]+ rows/s, 3 failed", plain(stderr))
    assert stderr.rstrip().endswith("the failed rows are in /data/out.csv.errors.jsonl")


@pytest.mark.parametrize("terminal", [True, False])
def test_that_nobody_serves_the_model_is_said_where_one_looks(served, start, connection: Redis, terminal: bool):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv", terminal=terminal)
    record = plan(connection, only_run(connection))
    drop_lease(connection, "iris", LEASE.lease)
    said = "nobody serves iris now; start a worker: rq-models worker iris"

    wait_until(lambda: said in plain(command.read()), "it says so")
    runs.end(connection, record, "finished")

    assert command.end()[0] == 0


def test_that_the_model_is_broken_is_said(served, start, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv")
    broken = Serving("lease", "iris-1", "host", 1, state="broken", error="OSError: no weights\nfound")
    renew_lease(connection, "iris", broken, 600)

    wait_until(lambda: "rq-models: iris does not load: OSError: no weights found\n" in command.read(), "it says so")


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_leaves_the_run_alone(served, start, connection: Redis, terminal: bool):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv", terminal=terminal)
    wait_until(lambda: f"run {only_run(connection)}: iris scores" in command.read(), "it follows the run")
    run = only_run(connection)
    command.process.send_signal(signal.SIGINT)

    code, stdout, stderr = command.end()

    assert (code, stdout) == (130, "")
    last = plain(stderr).strip().splitlines()[-1]
    assert last == f"rq-models: run {run} goes on; to look at it or to end it: rq-models runs show|cancel {run}"
    assert runs.read(connection, run).progress.state == "planning"


def test_a_run_that_fails(served, start, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv")
    record = plan(connection, only_run(connection))
    commit(connection, record, 0)
    runs.end(connection, record, "failed", error="/data/in.csv: it is damaged")

    code, stdout, stderr = command.end()

    assert (code, stdout) == (10, "")
    assert stderr.splitlines()[-2:] == [
        "rq-models: 1,000 rows are done and kept",
        "rq-models: /data/in.csv: it is damaged",
    ]


def test_a_run_that_somebody_cancels(served, start, run, connection: Redis):
    command = start("score", "iris", "/data/in.csv", "/data/out.csv")
    name = only_run(connection)

    cancelled = run("runs", "cancel", name)

    assert (cancelled.exit_code, cancelled.stdout) == (0, f"{name}: cancelled; 0 rows are done and kept\n")
    code, _, stderr = command.end()
    assert code == 10
    assert stderr.splitlines()[-1] == f"rq-models: run {name} was cancelled after 0 rows"
    again = run("runs", "cancel", name)
    assert (again.exit_code, again.stdout) == (0, f"{name}: cancelled already; 0 rows are done and kept\n")


def test_a_run_that_goes_on_says_so(served, run, connection: Redis):
    record = plan(connection, begun(connection).id)
    commit(connection, record, 0)
    runs.cancel(connection, record.id)

    result = run("score", "iris", "/data/in.csv", "/data/out.csv", "--detach")

    assert (result.exit_code, result.stdout) == (0, f"{record.id}\n")
    assert "into /data/out.csv; 1,000 rows are done already" in result.stderr


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((), {}),
        (("--keep", "all"), {"keep": None}),
        (("--keep", "none"), {"keep": ()}),
        (("--keep", "a,the b"), {"keep": ("a", "the b")}),
        (("--keep", '"a,b",c'), {"keep": ("a,b", "c")}),
        (("--no-header",), {"header": False}),
        (("--max-errors", "0"), {"max_errors": 0}),
        (("--overwrite", "--slice-rows", "7"), {"overwrite": True, "slice_rows": 7}),
    ],
)
def test_what_is_asked_for(served, run, connection: Redis, options: tuple[str, ...], fields: dict[str, Any]):
    result = run("score", "iris", "/data/in.csv", "/data/out.csv", "--detach", *options)

    assert result.exit_code == 0
    assert runs.read(connection, result.stdout.strip()).asked == asked(**fields)


def test_restart_is_asked_for(served, run, connection: Redis):
    begun(connection, input="/data/other.csv")

    refused = run("score", "iris", "/data/in.csv", "/data/out.csv", "--detach")
    assert refused.exit_code == 4
    assert "input was /data/other.csv and is /data/in.csv; --restart" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1

    result = run("score", "iris", "/data/in.csv", "/data/out.csv", "--detach", "--restart")
    assert result.exit_code == 0
    assert runs.read(connection, result.stdout.strip()).attempt == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("irs", "in.csv", "out.csv"), 5),
        (("iris", "same.csv", "./same.csv"), 4),
        (("iris", "s3://user:secret@bucket/in.csv", "out.csv"), 4),
        (("iris", "in.csv"), 2),
        (("iris", "in.csv", "out.csv", "--max-errors", "-1"), 2),
        (("iris", "in.csv", "out.csv", "--slice-rows", "0"), 2),
    ],
)
def test_what_is_refused_at_once(served, run, connection: Redis, arguments: tuple[str, ...], code: int):
    result = run("score", *arguments)

    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "secret" not in result.stderr
    assert not connection.exists(runs.RUNS_KEY)


def test_nobody_serves_it(run, connection: Redis):
    publish_card(connection, Card("iris"))

    result = run("score", "iris", "in.csv", "out.csv")

    assert result.exit_code == 5
    assert not connection.exists(runs.RUNS_KEY)


def test_no_redis():
    result = CliRunner().invoke(main, ["--url", "redis://127.0.0.1:1/0", "score", "iris", "in.csv", "out.csv"])

    assert result.exit_code == 8
    assert len(result.stderr.splitlines()) == 1


def test_runs_as_a_table(run, connection: Redis):
    done = plan(connection, begun(connection).id)
    commit(connection, done, 0, failed=1)
    commit(connection, done, 1)
    runs.end(connection, done, "finished")
    half = plan(connection, begun(connection, output="s3://out/half.csv?signature=secret").id)
    commit(connection, half, 0, rows=500)
    fresh = begun(connection, output="/data/fresh.csv")

    result = run("runs")

    assert result.exit_code == 0
    headers, *lines = result.stdout.splitlines()
    assert re.split(r" {2,}", headers) == [
        *("id", "model", "state", "done", "rows", "failed", "rows/s", "began (UTC)", "input", "output")
    ]
    cells = [line.split() for line in lines]
    assert [[*row[:6], *row[8:]] for row in cells] == [
        [fresh.id, "iris", "planning", "0%", "0", "0", "/data/in.csv", "/data/fresh.csv"],
        [half.id, "iris", "running", "50%", "500", "0", "/data/in.csv", "s3://out/half.csv"],
        [done.id, "iris", "finished", "100%", "2,000", "1", "/data/in.csv", "/data/out.csv"],
    ]
    assert cells[0][6] == "0.0"
    assert float(cells[2][6].replace(",", "")) > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", cells[0][7])


def test_no_runs(run):
    result = run("runs")

    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def test_a_run_is_shown(run, connection: Redis):
    record = plan(connection, begun(connection, keep=("a", "b")).id)
    commit(connection, record, 0, failed=2)

    def shown() -> dict[str, str]:
        result = run("runs", "show", record.id)
        assert result.exit_code == 0
        return {line[:10].strip(): line[10:] for line in result.stdout.splitlines()}

    going = shown()
    assert going["state"] == "running"
    assert (going["model"], going["keep"], going["chunks"]) == ("iris", "a, b", "1 of 2")
    assert (going["input"], going["output"]) == ("/data/in.csv", "/data/out.csv")
    assert re.fullmatch(r"1,000 of about 2,000 rows, [\d,.]+ rows/s, 2 failed", going["rows"])
    assert re.fullmatch(r"50%, 0:00:\d\d left", going["ahead"])
    assert {"began", "so far"} <= going.keys()
    assert not {"error", "errors", "took"} & going.keys()

    commit(connection, record, 1)
    runs.end(connection, record, "finished")
    assert shown()["errors"] == "/data/out.csv.errors.jsonl"
    assert "took" in shown()


def test_the_error_of_a_run_is_one_line_that_steers_no_terminal(run, connection: Redis):
    record = begun(connection)
    runs.end(connection, record, "failed", error="no\n\x1b[2Jspace")

    result = run("runs", "show", record.id)

    assert "error     no \ufffd[2Jspace\n" in result.stdout


@pytest.mark.parametrize("command", ["show", "cancel"])
def test_an_unknown_run(run, command: str):
    result = run("runs", command, "nosuch")

    assert result.exit_code == 9
    assert "nosuch" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_job_of_a_step_says_of_which_run(run, connection: Redis):
    record = begun(connection)
    runs.enqueue(connection, "iris", record.id, 1, [7])

    planning, chunk = (run("job", f"{record.id}-1-{step}") for step in ("plan", 7))

    assert planning.exit_code == chunk.exit_code == 0
    assert "model     iris\n" in chunk.stdout
    assert (
        f"step      chunk 7 of scoring run {record.id}, attempt 1; see 'rq-models runs show {record.id}'\n"
        in chunk.stdout
    )
    assert f"step      plan of scoring run {record.id}, attempt 1" in planning.stdout
    assert run("replay", f"{record.id}-1-7").exit_code == 4


def progress(**fields: Any) -> Progress:
    known = {"state": "running", "rows": 0, "failed": 0, "chunks": 4, "chunks_done": 0, "total": 400, "seconds": 0.0}
    return Progress(**{"run": "r", "rows_before": 0, "error": None, **known, **fields})


def drawing(width: int, shown: Progress, why: str = "") -> list[str]:
    console = Console(width=width)
    with console.capture() as drawn:
        console.print(bar.drawn("iris", shown, why))
    return [line.rstrip() for line in drawn.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bar_fits(width: int):
    lines = drawing(width, progress(rows=100, chunks_done=1, seconds=2.0, failed=3), "nobody")

    assert [len(line) <= min(width, 100) for line in lines] == [True] * 3
    assert lines[0].startswith("iris  ━")
    assert lines[0].endswith("  25%, 0:00:06 left")
    assert lines[1:] == ["100 of about 400 rows, 50 rows/s, 3 failed", "nobody"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"state": "planning", "chunks": 0, "total": None}, ["planning", "0 rows, 0 failed"]),
        # It goes on from what was done before; the speed is that of the new rows.
        (
            {"rows": 300, "rows_before": 200, "seconds": 40.0},
            ["75%, 0:00:40 left", "300 of about 400 rows, 2.5 rows/s, 0 failed"],
        ),
        ({"rows": 200, "rows_before": 200, "seconds": 40.0}, ["50%", "200 of about 400 rows, 0 failed"]),
        ({"rows": 399, "chunks_done": 4}, ["99%", "399 of 400 rows, 0 failed"]),
        ({"state": "merging", "rows": 400, "chunks_done": 4}, ["merging", "400 of 400 rows, 0 failed"]),
        ({"state": "finished", "rows": 0, "total": 0, "chunks": 0}, ["finished", "0 rows, 0 failed"]),
        ({"state": "failed", "rows": 5, "failed": 5}, ["failed", "5 rows, 5 failed"]),
        # Clocks may differ.
        ({"rows": 5, "seconds": -3.0}, ["1%", "5 of about 400 rows, 0 failed"]),
    ],
)
def test_what_the_bar_says(fields: dict[str, Any], says: list[str]):
    first, second = drawing(80, progress(**fields))

    assert re.fullmatch(rf"iris  [ ━╸╺-]+  {re.escape(says[0])}", first)
    assert second == says[1]


# -- with a real worker ------------------------------------------------------------------------------------------------

MODEL = """
    from dataclasses import dataclass

    @dataclass
    class Input:
        x: float

    @dataclass
    class Output:
        root: float

    class Model:
        version = "1.2"
        def predict(self, data: Input) -> Output:
            if data.x < 0:
                raise ArithmeticError("no roots of negative numbers")
            return Output(data.x ** 0.5)
"""


@pytest.fixture
def folder(project: Project, start_worker, tmp_path: Path) -> Path:
    """A file to score and a worker that can: of 1000 rows one is broken, and of two there is no root."""
    project.add("root", MODEL)
    start_worker(project, "root")
    rows = [f"row {n},{n * n}" for n in range(1000)]
    rows[7], rows[8], rows[999] = "row 7,-1", "row 8,8,8", "row 999,-4"
    (tmp_path / "in.csv").write_text("\n".join(["name,x", *rows, ""]))
    return tmp_path


def test_a_file_is_scored(folder: Path, start):
    code, stdout, stderr = start("score", "root", f"{folder}/in.csv", f"{folder}/out.csv").end()

    assert (code, stdout) == (0, "1,000 in = 997 out + 3 failed\n")
    assert stderr.splitlines()[-1] == f"rq-models: the failed rows are in {folder}/out.csv.errors.jsonl"
    with (folder / "out.csv").open(newline="") as file:
        rows = [(row["name"], row["root"]) for row in csv.DictReader(file)]
    # Those that failed are in their places, and nothing is predicted for them.
    assert [name for name, _ in rows] == [f"row {n}" for n in range(7)] + ["row 7", rows[8][0]] + [
        f"row {n}" for n in range(9, 1000)
    ]
    assert [n for n, (_, root) in enumerate(rows) if not root] == [7, 8, 999]
    assert all(float(root) == n for n, (_, root) in enumerate(rows) if root)
    failed = [json.loads(line) for line in (folder / "out.csv.errors.jsonl").read_text().splitlines()]
    assert len(failed) == 3
    assert "no roots of negative numbers" in str(failed[0])


def test_a_run_with_too_many_failed_rows(folder: Path, start):
    code, stdout, stderr = start("score", "root", f"{folder}/in.csv", f"{folder}/out.csv", "--max-errors", "1").end()

    assert (code, stdout) == (10, "")
    assert "max_errors" in stderr.splitlines()[-1]
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize(
    ("given", "output", "options", "says"),
    [
        ("in.csv", "out.xlsx", (), "out.xlsx: its format is unknown"),
        ("in.csv", "there.csv", (), "there.csv: it exists already"),
        ("in.csv", "nosuch/out.csv", (), "there is no folder"),
        ("in.csv", "out.csv", ("--keep", "nam"), "keep names 'nam'; the input has 'name', 'x'"),
        ("nosuch.csv", "out.csv", (), "nosuch.csv: there is no such file"),
        ("other.csv", "out.csv", (), "the model needs the columns 'x', which the file lacks; it has 'name', 'y'"),
        ("torn.parquet", "out.csv", (), "torn.parquet: it is damaged"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(
    folder: Path, start, given: str, output: str, options: tuple[str, ...], says: str
):
    (folder / "there.csv").write_text("mine\n")
    (folder / "other.csv").write_text("name,y\na,1\n")
    (folder / "torn.parquet").write_bytes(b"PAR1" + bytes(100))

    code, stdout, stderr = start("score", "root", f"{folder}/{given}", f"{folder}/{output}", *options).end()

    assert (code, stdout) == (10, "")
    assert says in stderr.splitlines()[-1]
    assert len(stderr.splitlines()) == 3
    assert "Traceback" not in stderr
    assert (folder / "there.csv").read_text() == "mine\n"
    assert not (folder / "out.csv").exists()
