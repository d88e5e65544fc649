"""Files scored by real workers: formats, what goes on between slices, and runs that are interrupted."""

from __future__ import annotations

import csv
import gzip
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Project, wait_until
from pyarrow import parquet
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from rq_models import Client, RunConflict, RunFailed
from rq_models.jobs import ModelJob
from rq_models.scoring import runs
from rq_models.scoring.run import Run

# Each slice waits at its first row, once there is a file named "hold"; "go-on" lets all slices of the file go.
STEADY = """
    import os, time
    from dataclasses import dataclass

    HERE = os.path.dirname(__file__)

    @dataclass
    class Input:
        n: int

    @dataclass
    class Output:
        square: int

    class Model:
        def __init__(self):
            self.version = open(os.path.join(HERE, "version.txt")).read()

        def predict(self, data: Input) -> Output:
            return self.predict_batch([data])[0]

        def predict_batch(self, rows):
            first = rows[0].n
            if os.path.exists(os.path.join(HERE, "hold")):
                open(os.path.join(HERE, f"held-{first}"), "w").close()
                gates = [f"go-{first}", "go-on"] if first >= 0 else [f"go-{first}"]
                while not any(os.path.exists(os.path.join(HERE, gate)) for gate in gates):
                    time.sleep(0.001)
            return [Output(row.n ** 2) for row in rows]
"""
ROWS = 50


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


class Steady:
    """The model, and a file for it."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.root, self.source, self.output = project.root, folder / "rows.csv", folder / "scored.csv"
        self.set_version("1")
        self.write(range(ROWS))
        project.add("steady", STEADY, lease=1)

    def set_version(self, version: str) -> None:
        (self.root / "version.txt").write_text(version)

    def write(self, numbers: range) -> None:
        self.source.write_text("n\n" + "".join(f"{n}\n" for n in numbers))

    def hold(self, *but: int) -> None:
        (self.root / "hold").touch()
        self.let_go(*but)

    def let_go(self, *slices: int) -> None:
        for first in slices:
            (self.root / f"go-{first}").touch()

    def go_on(self) -> None:
        (self.root / "go-on").touch()

    def wait_until_held(self, first: int) -> None:
        wait_until((self.root / f"held-{first}").exists, f"the slice of row {first} is at work")

    def release(self) -> None:
        (self.root / "hold").unlink(missing_ok=True)
        self.let_go(*range(ROWS))

    def begin(self, client: Client, **options: Any) -> Run:
        return client.score("steady", self.source, self.output, slice_rows=10, **options)

    def check(self, run: Run) -> None:
        assert str(run.wait(60)) == "50 in = 50 out + 0 failed"
        expected = "".join(f"{n},{n * n}\n" for n in range(ROWS))
        assert self.output.read_text() == f"n,square\n{expected}"
        assert not Path(f"{self.output}.errors.jsonl").exists()
        parts = Path(f"{self.output}.parts")
        wait_until(lambda: not parts.exists(), "the parts are gone")


@pytest.fixture
def steady(project: Project, tmp_path: Path) -> Iterator[Steady]:
    steady = Steady(project, tmp_path)
    yield steady
    steady.release()


def chunk(run: Run, connection: Redis, attempt: int = 1) -> ModelJob:
    return ModelJob.fetch(f"{run.id}-{attempt}-0", connection=connection)


def test_a_prediction_overtakes_between_two_slices(steady, project, start_worker, client, connection):
    steady.write(range(200_000))
    steady.hold(0, -5)
    start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    job = client.enqueue("steady", {"n": -5})

    steady.go_on()

    assert job.wait(60) == {"square": 25}
    assert run.progress().state == "running"
    assert run.cancel()


def test_a_prediction_that_has_ended_does_not_wait_for_a_slice(steady, project, start_worker, client):
    start_worker(project, "steady")
    assert client.enqueue("steady", {"n": 2}).wait(60) == {"square": 4}
    steady.hold()
    job = client.enqueue("steady", {"n": -1})
    steady.wait_until_held(-1)
    run = steady.begin(client)
    steady.let_go(-1)
    steady.wait_until_held(0)

    assert job.wait(20) == {"square": 1}

    assert run.cancel()
    steady.release()


def test_a_chunk_that_meets_another_version_goes_back(steady, project, start_worker, client, connection):
    steady.hold(0)
    first = start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    first.stop(signal.SIGKILL)

    steady.set_version("2")
    second = start_worker(project, "steady")
    wait_until(lambda: int(connection.hget(chunk(run, connection).key, "attempts")) >= 3, "it was tried, and put back")
    job = chunk(run, connection)
    assert (run.progress().state, job.retries_left) == ("running", 5)
    assert second.stop() == 0

    steady.release()
    steady.set_version("1")
    start_worker(project, "steady")
    steady.check(run)


def test_a_run_whose_version_no_worker_has_ends_with_a_sentence(steady, project, start_worker, client, connection):
    steady.hold(0)
    first = start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    first.stop(signal.SIGKILL)
    steady.release()

    steady.set_version("2")
    second = start_worker(project, "steady")
    with pytest.raises(RunFailed, match="the version of model steady has changed since the run began; --restart"):
        run.wait(60)
    assert connection.llen("rq:queue:steady.bulk") == 0

    assert second.stop() == 0
    steady.set_version("1")
    start_worker(project, "steady")
    steady.check(steady.begin(client))


def test_a_chunk_that_is_stopped_alone_ends_its_run(steady, project, start_worker, client, connection):
    steady.hold(0)
    start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)

    send_stop_job_command(connection, chunk(run, connection).id, serializer=JSONSerializer)
    steady.release()

    with pytest.raises(RunFailed, match="cancelled after 0 rows"):
        run.wait(60)
    steady.check(steady.begin(client))


def test_a_step_of_which_too_many_workers_die_ends_its_run(steady, project, start_worker, client, connection):
    steady.hold(0)
    worker = start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    connection.hset(chunk(run, connection).key, "deaths", 9)
    worker.stop(signal.SIGKILL)
    steady.release()

    start_worker(project, "steady")

    with pytest.raises(RunFailed, match=f"10 workers died while they did step {run.id}-1-0; it may take more memory"):
        run.wait(60)
    wait_until(lambda: chunk(run, connection).get_status() == JobStatus.FAILED, "its job has ended, too")
    steady.check(steady.begin(client))


def test_a_merge_that_did_not_end_may_replace_what_it_made(steady, project, start_worker, client, connection):
    steady.hold(0)
    start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    runs.end(connection, run.record, "merging")
    steady.output.write_text("whole, but for the word that it is")
    Path(f"{steady.output}.errors.jsonl").write_text("{}")
    assert run.cancel()
    steady.release()

    steady.check(steady.begin(client))


def test_nobody_elses_file_beside_the_parts_is_removed(steady, project, start_worker, client):
    mine = Path(f"{steady.output}.parts/mine")
    mine.parent.mkdir()
    mine.touch()
    start_worker(project, "steady")
    run = steady.begin(client)
    assert str(run.wait(60)) == "50 in = 50 out + 0 failed"
    wait_until(lambda: list(mine.parent.iterdir()) == [mine], "the parts are gone")


def test_too_many_failed_rows_are_too_many_again(steady, project, start_worker, client):
    steady.source.write_text("n\n1\nx\ny\n4\n")
    start_worker(project, "steady")
    for _ in range(2):
        with pytest.raises(RunFailed, match="2 rows failed"):
            steady.begin(client, max_errors=1).wait(60)
    assert not steady.output.exists()
    assert str(steady.begin(client, max_errors=2).wait(60)) == "4 in = 2 out + 2 failed"


def test_a_cut_connection_does_not_keep_predictions_waiting(steady, project, start_worker, client, connection):
    steady.write(range(200_000))
    steady.hold(0)
    start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    for one in connection.client_list():
        if one["name"].endswith(":ledger"):
            connection.client_kill_filter(_id=one["id"])
    steady.release()

    assert client.predict("steady", {"n": 7}, timeout=60) == {"square": 49}

    assert not run.progress().is_over, "the file was at work all the time"
    assert run.cancel()


def test_who_is_to_leave_serves_no_more(steady, project, start_worker, client, connection):
    steady.write(range(200_000))
    steady.hold(0)
    worker = start_worker(project, "steady")
    steady.begin(client)
    steady.wait_until_held(10)
    first = client.enqueue("steady", {"n": -1})
    steady.go_on()
    steady.wait_until_held(-1)
    later = client.enqueue("steady", {"n": -2})
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "warm shut down" in worker.log, "it has heard")

    steady.let_go(-1)

    assert worker.process.wait(60) == 0
    assert first.wait(10) == {"square": 1}
    assert later.get_status() == JobStatus.QUEUED


def test_a_worker_that_is_to_leave_puts_its_chunk_back(steady, project, start_worker, client, connection):
    steady.hold(0)
    worker = start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)

    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "warm shut down" in worker.log, "it has heard")
    steady.let_go(10)

    assert worker.process.wait(60) == 0
    job = chunk(run, connection)
    assert (job.get_status(), job.retries_left) == (JobStatus.QUEUED, 5)
    assert connection.lrange("rq:queue:steady.bulk", 0, -1) == [job.id.encode()]
    steady.release()
    start_worker(project, "steady")
    steady.check(run)


def test_a_cancelled_run_stops_within_a_slice_and_goes_on_later(steady, project, start_worker, client, connection):
    steady.hold(0)
    start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)

    assert run.cancel()
    assert not run.cancel()
    steady.let_go(10)

    wait_until(lambda: chunk(run, connection).get_status() == JobStatus.STOPPED, "the chunk is given up")
    assert not (steady.root / "held-20").exists()
    with pytest.raises(RunFailed, match="cancelled after 0 rows"):
        run.wait(10)
    steady.release()
    steady.check(steady.begin(client))


def test_a_changed_input_or_version_is_refused(steady, project, start_worker, client):
    steady.hold(0)
    worker = start_worker(project, "steady")
    run = steady.begin(client)
    steady.wait_until_held(10)
    assert run.cancel()
    steady.release()

    with pytest.raises(RunConflict, match="slice_rows was 10 and is not given"):
        client.score("steady", steady.source, steady.output)
    content = steady.source.read_text()
    steady.source.write_text(f"{content}7\n")
    with pytest.raises(RunFailed, match=r"the input /.*rows.csv has changed since the run began; --restart"):
        steady.begin(client).wait(60)

    assert worker.stop() == 0
    steady.set_version("2")
    start_worker(project, "steady")
    steady.write(range(ROWS))
    steady.check(steady.begin(client, restart=True))


def test_each_progress_is_told_until_the_end(steady, project, start_worker, client):
    start_worker(project, "steady")
    seen = list(steady.begin(client))
    assert seen[-1].state == "finished"
    assert (seen[-1].rows, seen[-1].predicted, seen[-1].total, seen[-1].is_over) == (50, 50, 50, True)
    assert [run.id for run in client.runs()] == [seen[-1].run]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    if ".csv" in path.name:
        return [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"n": range(ROWS)}), path)
        return
    lines = [f"{n}\n" for n in range(ROWS)] if ".csv" in path.name else [f'{{"n": {n}}}\n' for n in range(ROWS)]
    text = "".join(["n\n", *lines] if ".csv" in path.name else lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_every_format_becomes_every_other(project, start_worker, client, tmp_path):
    Steady(project, tmp_path)
    start_worker(project, "steady")
    begun = []
    names = ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.ndjson.gz", "rows.parquet"]
    for given in names:
        write(tmp_path / given)
        for made in names:
            output = tmp_path / f"{given.replace('.', '-')}.to.{made}"
            begun.append((client.score("steady", tmp_path / given, output), output))
    for run, output in begun:
        assert str(run.wait(100)) == "50 in = 50 out + 0 failed"
        assert read(output) == [{"n": n, "square": n * n} for n in range(ROWS)], output.name
