"""An upgrade while jobs flow, and a farewell: reload, SIGHUP and drain, with real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from conftest import RQ_MODELS, Project, RunningWorker, wait_until
from redis import Redis
from rq.command import send_command

from rq_models import Client
from rq_models.registry import Serving, read_model

VERSIONED = """
    import pathlib, time

    HERE = pathlib.Path(__file__).parent

    class Model:
        version = "1"
        example = "an example"

        def __init__(self):
            (HERE / f"loading-{self.version}").touch()
            while (HERE / f"gate-{self.version}").exists():
                time.sleep(0.01)

        def predict(self, data):
            return self.version
"""
HOLDING = """
    import pathlib, time

    class Model:
        def predict(self, data):
            pathlib.Path(data + ".held").touch()
            while not pathlib.Path(data).exists():
                time.sleep(0.01)
            return "done"
"""
Spawn = Callable[..., RunningWorker]


@pytest.fixture
def client(redis_url: str):
    with Client(redis_url) as client:
        yield client


def all_serving(connection: Redis, model: str = "wine") -> tuple[Serving, ...]:
    return read_model(connection, model).serving


def serving(connection: Redis) -> Serving:
    (one,) = all_serving(connection)
    return one


def change(project: Project, old: str = 'version = "1"', new: str = 'version = "2"') -> None:
    module = project.root / "wine_module.py"
    text = module.read_text()
    assert old in text
    module.write_text(text.replace(old, new))


class TestReload:
    def test_jobs_flow_all_the_time_and_say_which_version_made_them(
        self, project, start_worker, spawn, client, connection
    ):
        project.add("wine", VERSIONED)
        worker = start_worker(project, "wine")
        made: list[tuple[str, str]] = []
        enough = threading.Event()

        def keep_asking() -> None:
            while not enough.is_set():
                jobs = client.enqueue_many("wine", range(20))
                made.extend((job.wait(timeout=60), job.model_version) for job in jobs)

        asker = threading.Thread(target=keep_asking)
        asker.start()
        try:
            wait_until(lambda: made, "the old version answers")
            change(project)
            gate = project.root / "gate-2"
            gate.touch()
            command = spawn([RQ_MODELS, "reload", "wine"], cwd=project.root, env=project.environ)
            wait_until((project.root / "loading-2").exists, "the new version loads")
            before = len(made)
            wait_until(lambda: len(made) > before + 20, "the old one goes on meanwhile")
            assert {value for value, _ in made} == {"1"}
            gate.unlink()
            assert command.process.wait(60) == 0
            after = len(made)
            wait_until(lambda: len(made) > after + 40, "the new one answers")
        finally:
            enough.set()
            asker.join()

        assert command.log.splitlines() == [f"{serving(connection).worker}: serves version 2"]
        values = [value for value, _ in made]
        assert values == sorted(values), "what came after the switch is all of the new version"
        assert set(values) == {"1", "2"}
        assert [version for _, version in made] == values
        assert (serving(connection).pid, serving(connection).version) == (worker.pid, "2")
        assert read_model(connection, "wine").card.version == "2"

    def test_a_new_version_that_fails_leaves_the_old_one_in_its_place(self, project, start_worker, client, connection):
        project.add("wine", VERSIONED, load_retries=0)
        start_worker(project, "wine")
        assert client.predict("wine", None, timeout=60) == "1"
        before = serving(connection)
        change(project, "return self.version", "raise RuntimeError('corked')")

        done = project.run("reload", "wine")

        assert done.returncode == 6
        (line,) = done.stdout.splitlines()
        assert line.startswith(f"{before.worker}: stays with version 1: ")
        assert "fails on its own example" in line
        assert "corked" in line
        assert client.predict("wine", None, timeout=60) == "1"
        after = serving(connection)
        assert (after.state, after.horse_pid, after.error) == ("warm", before.horse_pid, None)

    def test_a_broken_configuration_is_refused_with_file_and_key(self, project, start_worker, client):
        project.add("wine", VERSIONED)
        worker = start_worker(project, "wine")
        assert client.predict("wine", None, timeout=60) == "1"
        project.config.write_text(project.config.read_text() + "job_timout = 3\n")

        # Its own configuration is of no use to this command now, but the address is all it needs.
        done = project.run("--url", project.redis_url, "reload", "wine")

        assert done.returncode == 3
        assert f"{project.config}: models.wine.job_timout: unknown key" in done.stdout
        assert "not reloaded" in worker.log
        assert client.predict("wine", None, timeout=60) == "1"

    def test_the_new_configuration_counts_from_then_on(self, project, start_worker, client, connection):
        project.add("wine", VERSIONED, job_timeout=50)
        start_worker(project, "wine")
        assert client.predict("wine", None, timeout=60) == "1"
        project.config.write_text(project.config.read_text().replace("job_timeout = 50", "job_timeout = 70"))

        assert project.run("reload", "wine").returncode == 0

        assert read_model(connection, "wine").card.job_timeout == 70

    def test_the_new_model_is_given_no_batch_of_the_old_size(self, project, start_worker, client):
        batches = (
            "\n        def predict_batch(self, many):\n            return [[self.version, len(many)]] * len(many)\n"
        )
        project.add("wine", VERSIONED + batches, max_batch_size=100)
        start_worker(project, "wine")
        assert client.predict("wine", None, timeout=60) == "1"
        change(project)
        project.config.write_text(project.config.read_text().replace("max_batch_size = 100", "max_batch_size = 5"))
        jobs, enough = [], threading.Event()

        def keep_a_backlog() -> None:
            while not enough.is_set():
                jobs.extend(client.enqueue_many("wine", [None] * 1000))
                client.wait_all(jobs[-1000:-500], timeout=60)

        asker = threading.Thread(target=keep_a_backlog)
        asker.start()
        try:
            assert project.run("reload", "wine").returncode == 0
        finally:
            enough.set()
            asker.join()

        made = [value if isinstance(value, list) else [value, 1] for value in client.wait_all(jobs, timeout=100)]
        assert max(size for version, size in made if version == "1") == 100
        assert max(size for version, size in made if version == "2") <= 5

    def test_a_broken_model_is_mended_by_it(self, project, start_worker, client, connection):
        project.add("wine", VERSIONED.replace("import pathlib", "import pathlibb, pathlib"), load_retries=0)
        start_worker(project, "wine")
        job = client.enqueue("wine", None)
        wait_until(lambda: serving(connection).state == "broken", "it is broken")
        change(project, "pathlibb, ", "")

        assert project.run("reload", "wine").returncode == 0

        assert serving(connection).state == "warm"
        assert client.predict("wine", None, timeout=60) == "1"
        assert job.get_status() == "failed"

    def test_a_sighup_to_a_worker_reloads_it(self, project, start_worker, connection):
        project.add("wine", VERSIONED, preload=True)
        worker = start_worker(project, "wine")
        wait_until(lambda: serving(connection).version == "1", "the old version is warm")
        change(project)

        os.kill(worker.pid, signal.SIGHUP)

        wait_until(lambda: serving(connection).version == "2", "the new version is warm")
        assert worker.stop() == 0

    def test_a_pool_passes_sighup_on_to_its_workers(self, project, spawn, connection):
        project.add("wine", VERSIONED, preload=True)
        pool = spawn([RQ_MODELS, "worker", "wine", "-n", "2"], cwd=project.root, env=project.environ)
        wait_until(lambda: "ready" in pool.log, "both serve")
        wait_until(lambda: [one.version for one in all_serving(connection)] == ["1", "1"], "both are warm")
        pids = {one.pid for one in all_serving(connection)}
        change(project)

        os.kill(pool.pid, signal.SIGHUP)

        wait_until(lambda: [one.version for one in all_serving(connection)] == ["2", "2"], "both have the new version")
        assert {one.pid for one in all_serving(connection)} == pids
        assert pool.stop() == 0

    def test_each_of_several_workers_has_its_line(self, project, spawn, connection):
        project.add("wine", VERSIONED, preload=True)
        pool = spawn([RQ_MODELS, "worker", "wine", "-n", "2"], cwd=project.root, env=project.environ)
        wait_until(lambda: "ready" in pool.log, "both serve")

        done = project.run("reload", "wine")

        assert done.returncode == 0
        assert sorted(done.stdout.splitlines()) == sorted(
            f"{one.worker}: serves version 1" for one in all_serving(connection)
        )

    def test_requests_that_come_meanwhile_are_answered_too(self, project, start_worker, spawn, connection):
        project.add("wine", VERSIONED)
        start_worker(project, "wine")
        gate = project.root / "gate-1"
        gate.touch()
        first = spawn([RQ_MODELS, "reload", "wine"], cwd=project.root, env=project.environ)
        wait_until((project.root / "loading-1").exists, "the first one's successor loads")
        # Anybody can publish anything, and nobody waits for this one's answer.
        send_command(connection, serving(connection).worker, "reload", token=["not", "a", "text"])
        second = spawn([RQ_MODELS, "reload", "wine"], cwd=project.root, env=project.environ)
        gate.unlink()

        assert (first.process.wait(60), second.process.wait(60)) == (0, 0)

    def test_a_worker_killed_meanwhile_is_a_failure(self, project, start_worker, spawn, connection):
        project.add("wine", VERSIONED, lease=1)
        worker = start_worker(project, "wine")
        (project.root / "gate-1").touch()
        name = serving(connection).worker
        command = spawn([RQ_MODELS, "reload", "wine"], cwd=project.root, env=project.environ)
        wait_until((project.root / "loading-1").exists, "the successor loads")

        worker.stop(signal.SIGKILL)

        assert command.process.wait(60) == 1
        assert command.log.splitlines() == [f"{name}: left before it had reloaded"]

    def test_a_worker_stopped_meanwhile_leaves_no_process(self, project, start_worker, connection):
        touched = '(HERE / f"loading-{self.version}").touch()'
        written = '(HERE / "pids").open("a").write(f"{__import__(\'os\').getpid()} ")'
        project.add("wine", VERSIONED.replace(touched, f"{written}; {touched}"))
        worker = start_worker(project, "wine")
        (project.root / "gate-1").touch()
        os.kill(worker.pid, signal.SIGHUP)
        wait_until((project.root / "loading-1").exists, "the successor loads")

        assert worker.stop() == 0
        (pid,) = (project.root / "pids").read_text().split()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
        assert read_model(connection, "wine").serving == ()

    def test_nobody_to_reload(self, project, start_worker):
        project.add("wine", VERSIONED)
        assert project.run("reload", "wine").returncode == 5
        start_worker(project, "wine").stop()

        done = project.run("reload", "wine")

        assert done.returncode == 5
        assert "nobody serves model 'wine'" in done.stderr

    def test_it_waits_no_longer_than_told(self, project, start_worker):
        project.add("wine", VERSIONED)
        start_worker(project, "wine")
        (project.root / "gate-1").touch()

        done = project.run("reload", "wine", "--timeout", "0.1")

        assert done.returncode == 7
        assert "not reloaded after 0.1 s" in done.stderr


# Takes the terminal on its standard input for its own, as a login shell does, and becomes the command.
LOGIN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("arguments", [["wine"], ["wine", "-n", "2"]])
def test_a_terminal_that_is_closed_ends_what_runs_in_it(project, connection, tmp_path, arguments):
    project.add("wine", VERSIONED)
    master, slave = os.openpty()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", LOGIN, RQ_MODELS, "worker", *arguments],
            cwd=project.root,
            env=project.environ,
            stdin=slave,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.close(slave)
    try:
        count = 2 if "-n" in arguments else 1
        wait_until(
            lambda: (status := read_model(connection, "wine")) and len(status.serving) == count, "all of them serve"
        )
    finally:
        os.close(master)

    assert process.wait(60) == 0
    assert read_model(connection, "wine").serving == ()


class TestDrain:
    @pytest.fixture
    def holding(self, project: Project, start_worker, client: Client, tmp_path):
        """A worker in the middle of the first of three jobs."""
        project.add("wine", HOLDING)
        self.worker = start_worker(project, "wine")
        self.until = tmp_path / "until"
        jobs = client.enqueue_many("wine", [str(self.until)] * 3)
        wait_until((tmp_path / "until.held").exists, "the prediction runs")
        return jobs

    def leaves_the_rest(self, connection: Redis, jobs: list) -> None:
        first, *rest = jobs
        assert first.wait(timeout=60) == "done"
        assert connection.lrange("rq:queue:wine", 0, -1) == [job.id.encode() for job in rest]
        assert [job.get_status() for job in rest] == ["queued"] * 2
        assert [connection.hget(job.key, "attempts") for job in rest] == [None] * 2
        assert all_serving(connection) == ()

    def test_it_waits_until_what_is_in_hand_is_done_and_nothing_else_is_taken(
        self, project, spawn, connection, holding
    ):
        command = spawn([RQ_MODELS, "drain", "wine"], cwd=project.root, env=project.environ)
        wait_until(lambda: "warm shut down" in self.worker.log, "the worker heard")
        name = serving(connection).worker
        assert command.process.poll() is None
        self.until.touch()

        assert command.process.wait(60) == 0
        assert self.worker.process.wait(60) == 0
        assert command.log.splitlines() == [
            f"{name}: left",
            "rq-models: nobody serves wine; 2 jobs wait in its queue",
        ]
        self.leaves_the_rest(connection, holding)

    def test_so_does_sigterm(self, connection, holding):
        os.kill(self.worker.pid, signal.SIGTERM)
        wait_until(lambda: "warm shut down" in self.worker.log, "the worker heard")
        self.until.touch()

        assert self.worker.process.wait(60) == 0
        self.leaves_the_rest(connection, holding)

    def test_asking_twice_kills_nothing(self, project, connection, holding):
        for _ in range(2):
            done = project.run("drain", "wine", "--timeout", "1.5")
            assert done.returncode == 7
            assert f"not left after 1.5 s: {serving(connection).worker}" in done.stderr
        self.until.touch()

        assert self.worker.process.wait(60) == 0
        self.leaves_the_rest(connection, holding)

    def test_a_pool_starts_nothing_again(self, project, spawn):
        project.add("wine", HOLDING)
        pool = spawn([RQ_MODELS, "worker", "wine", "-n", "2"], cwd=project.root, env=project.environ)
        wait_until(lambda: "ready" in pool.log, "both serve")

        done = project.run("drain", "wine")

        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 2
        assert pool.process.wait(60) == 0
        assert "starting it again" not in pool.log

    def test_where_nobody_serves_it_is_done_already(self, project, start_worker):
        project.add("wine", HOLDING)
        assert project.run("drain", "wine").returncode == 5, "no such model"
        start_worker(project, "wine").stop()
        assert project.run("drain", "wine").returncode == 0
