"""The horse's life: how often it is tried to load, when it is replaced, and that no job notices."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import Project, wait_until
from redis import Redis

from rq_models import Client, memory
from rq_models.errors import ModelBroken
from rq_models.registry import Serving, read_model

# Its process's number tells horses apart. Each load leaves a mark, waits at the gate, and may be forbidden.
MODEL = """
    import os, pathlib, time

    HERE = pathlib.Path(__file__).parent

    class Model:
        def __init__(self):
            with (HERE / "loads").open("a") as loads:
                loads.write(f"{os.getpid()}\\n")
            while (HERE / "gate").exists():
                time.sleep(0.01)
            if (HERE / "forbidden").exists():
                raise OSError("no weights today")

        def predict(self, data):
            return os.getpid()
"""


@pytest.fixture
def client(redis_url: str):
    with Client(redis_url) as client:
        yield client


def serving(connection: Redis) -> Serving:
    (one,) = read_model(connection, "mortal").serving
    return one


def loads(project: Project) -> list[int]:
    path = project.root / "loads"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class TestRecycling:
    def test_a_horse_is_replaced_after_max_jobs(self, project, start_worker, client, connection):
        project.add("mortal", MODEL, max_jobs=3, max_batch_size=1)
        worker = start_worker(project, "mortal")

        pids = client.wait_all(client.enqueue_many("mortal", [None] * 10), timeout=60)

        assert sorted(Counter(pids).values()) == [1, 3, 3, 3]
        assert pids == sorted(pids, key=loads(project).index), "one after the other"
        assert serving(connection).pid == worker.pid
        assert "made 3 predictions" in worker.log

    def test_a_batch_is_never_parted(self, project, start_worker, client):
        source = MODEL + "\n        def predict_batch(self, data):\n            return [os.getpid()] * len(data)\n"
        project.add("mortal", source, max_jobs=1, preload=True)
        start_worker(project, "mortal")
        wait_until(lambda: loads(project), "it loads")

        pids = client.wait_all(client.enqueue_many("mortal", [None] * 64), timeout=60)

        assert len(set(pids)) < 64

    def test_with_overlap_the_old_one_serves_until_the_new_one_is_ready(
        self, project, start_worker, client, connection
    ):
        project.add("mortal", MODEL, max_jobs=1, swap="overlap", preload=True)
        start_worker(project, "mortal")
        wait_until(lambda: serving(connection).state == "warm", "the first one is warm")
        gate = project.root / "gate"
        gate.touch()
        old = client.predict("mortal", None, timeout=60)
        wait_until(lambda: len(loads(project)) > 1, "its successor loads")

        assert client.wait_all(client.enqueue_many("mortal", [None] * 50), timeout=60) == [old] * 50

        gate.unlink()
        wait_until(lambda: client.predict("mortal", None, timeout=60) != old, "the new one takes over")
        wait_until(lambda: not is_alive(old), "the old one has left")

    def test_with_overlap_a_successor_that_fails_changes_nothing(self, project, start_worker, client, connection):
        project.add("mortal", MODEL, max_jobs=1, swap="overlap", preload=True)
        forbidden = project.root / "forbidden"
        worker = start_worker(project, "mortal")
        wait_until(lambda: serving(connection).state == "warm", "the first one is warm")
        forbidden.touch()
        old = client.predict("mortal", None, timeout=60)
        wait_until(lambda: "no successor" in worker.log, "its successor fails")

        assert client.predict("mortal", None, timeout=60) == old
        assert serving(connection).state == "warm"
        assert "no weights today" in worker.log

        forbidden.unlink()
        wait_until(lambda: client.predict("mortal", None, timeout=60) != old, "the next one takes over")

    @pytest.mark.parametrize("swap", ["restart", "overlap"])
    def test_a_horse_is_replaced_when_it_holds_too_much(self, project, start_worker, client, connection, swap):
        project.add(
            "mortal",
            """
            import subprocess, sys

            class Model:
                def predict(self, data):
                    if data == "leak":
                        hoard = "hoard = b'x' * (300 << 20); print('held', flush=True); input()"
                        child = subprocess.Popen(
                            [sys.executable, "-c", hoard], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                        )
                        child.stdout.readline()
                        self.child = child
                        return child.pid
            """,
            max_memory="250MB",
            swap=swap,
        )
        worker = start_worker(project, "mortal")
        client.predict("mortal", None, timeout=60)
        old = serving(connection).horse_pid

        hoarder = client.predict("mortal", "leak", timeout=60)

        wait_until(lambda: serving(connection).horse_pid not in (old, None), "another one is warm")
        wait_until(lambda: not (is_alive(old) or is_alive(hoarder)), "the old one has left, and its child")
        assert client.predict("mortal", None, timeout=60) is None
        assert "MiB of memory" in worker.log

    def test_memory_is_that_of_the_whole_group(self, monkeypatch):
        group = os.getpgrp()
        held = memory.resident(group)
        assert held > 10 << 20
        if Path("/bin/ps").exists():
            monkeypatch.setattr(memory, "_PROC", Path("/nowhere"))
            assert 0.5 * held < memory.resident(group) < 2 * held


class TestLoading:
    def test_it_is_tried_again_before_anybody_is_told(self, project, start_worker, client, connection):
        failing = MODEL.replace('if (HERE / "forbidden").exists()', 'if len((HERE / "loads").read_text().split()) < 3')
        project.add("mortal", failing)
        worker = start_worker(project, "mortal")

        assert client.predict("mortal", None, timeout=60) == loads(project)[2]

        assert len(loads(project)) == 3
        assert serving(connection).state == "warm"
        assert "no weights today; trying again in 0.5 s" in worker.log
        assert "trying again in 1 s" in worker.log

    def test_a_broken_model_says_why_and_recovers_by_itself(self, project, start_worker, client, connection):
        project.add("mortal", MODEL, load_retries=1)
        forbidden = project.root / "forbidden"
        forbidden.touch()
        worker = start_worker(project, "mortal")

        with pytest.raises(ModelBroken, match="no weights today"):
            client.predict("mortal", None, timeout=60)

        assert len(loads(project)) == 2
        assert (serving(connection).state, serving(connection).horse_pid) == ("broken", None)
        assert "no weights today" in serving(connection).error
        listed = project.run("models")
        assert "broken" in listed.stdout
        assert "no weights today" in listed.stderr

        with pytest.raises(ModelBroken, match="no weights today"):
            client.predict("mortal", None, timeout=60)
        assert len(loads(project)) == 3, "what is known to be broken is tried once more, without a pause"

        forbidden.unlink()
        assert client.predict("mortal", None, timeout=60) == loads(project)[3]
        now = serving(connection)
        assert (now.state, now.error, now.pid) == ("warm", None, worker.pid)

    def test_a_stop_ends_the_wait_and_costs_the_jobs_nothing(self, project, start_worker, client, connection):
        project.add("mortal", MODEL, load_retries=1000)
        (project.root / "forbidden").touch()
        worker = start_worker(project, "mortal")
        jobs = client.enqueue_many("mortal", [None] * 3)
        wait_until(lambda: "trying again in 1 s" in worker.log, "it tries again")

        assert worker.stop() == 0

        assert connection.lrange("rq:queue:mortal", 0, -1) == [job.id.encode() for job in jobs]
        assert [job.get_status() for job in jobs] == ["queued"] * 3
        assert [connection.hget(job.key, "retries_left") for job in jobs] == [b"3"] * 3

        (project.root / "forbidden").unlink()
        start_worker(project, "mortal")
        assert len(set(client.wait_all(jobs, timeout=60))) == 1

    def test_a_stop_ends_the_wait_of_a_worker_that_loads_for_nobody(self, project, start_worker):
        project.add("mortal", MODEL, load_retries=1000, preload=True)
        (project.root / "forbidden").touch()
        worker = start_worker(project, "mortal")
        wait_until(lambda: "trying again in 1 s" in worker.log, "it tries again")

        assert worker.stop() == 0
