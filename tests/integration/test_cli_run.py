"""The commands that keep running, as real processes: worker, up, dashboard, and a project made by init."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import RQ_MODELS, Project, RunningWorker, free_port, wait_until
from redis import Redis
from redis.exceptions import RedisError

from rq_models.cli import main
from rq_models.registry import Serving, read_models

MODEL = """
    class Model:
        def predict(self, data):
            return data
"""
SLOW = """
    import pathlib, time

    class Model:
        def predict(self, data):
            pathlib.Path(data).touch()
            while pathlib.Path(data).exists():
                time.sleep(0.01)
            return "done"
"""
Spawn = Callable[..., RunningWorker]


def serving(connection: Redis) -> list[Serving]:
    with suppress(RedisError):
        return [one for status in read_models(connection) for one in status.serving]
    return []


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        # A zombie in a container without an init is as dead as can be.
        state = Path(f"/proc/{pid}/stat")
        return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
    return False


def all_gone(pids: set[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


@pytest.fixture
def server_port() -> int:
    return free_port()


# -- worker ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_a_worker_that_is_not_configured(project: Project, options: list[str]) -> None:
    project.add("known", MODEL)

    result = project.run("worker", "nosuch", *options)

    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert "'nosuch' is not configured" in line
    assert "known" in line


@pytest.mark.parametrize("arguments", [["worker"], ["worker", "one"], ["worker", "one", "-n", "2"]])
def test_a_worker_without_redis(project: Project, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_models.cli.run._REDIS_PATIENCE", 0.2)
    project.add("one", MODEL)

    result = CliRunner().invoke(
        main, ["--url", "redis://127.0.0.1:1/0", "--config", str(project.config.parent), *arguments]
    )

    assert result.exit_code == 8
    assert "waiting for Redis" in result.stderr
    assert "rq-models redis" in result.stderr.splitlines()[-1]


def test_a_worker_waits_for_a_redis_that_starts_late(spawn: Spawn, project: Project, server_port: int) -> None:
    project.add("one", MODEL)
    environ = {**project.environ, "REDIS_URL": f"redis://127.0.0.1:{server_port}/0"}
    worker = spawn([RQ_MODELS, "worker", "one"], cwd=project.root, env=environ)
    wait_until(lambda: "waiting for Redis" in worker.log, "it waits")

    spawn([RQ_MODELS, "redis"], cwd=project.root, env=environ)

    with Redis.from_url(environ["REDIS_URL"]) as client:
        wait_until(lambda: [one.pid for one in serving(client)] == [worker.pid], "it serves")
    assert worker.stop() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_one_worker_runs_in_this_process(
    project: Project, start_worker, connection: Redis, signum: signal.Signals
) -> None:
    project.add("one", MODEL)
    worker = start_worker(project, "one")

    assert [one.pid for one in serving(connection)] == [worker.pid]
    assert worker.stop(signum) == 0
    assert serving(connection) == []


def test_without_a_model_every_configured_one_is_served(spawn: Spawn, project: Project, connection: Redis) -> None:
    project.add("one", MODEL)
    project.add("two", MODEL, workers=2)
    worker = spawn([RQ_MODELS, "worker"], cwd=project.root, env=project.environ)
    wait_until(lambda: len(serving(connection)) == 3, "all serve")

    states = {status.name: len(status.serving) for status in read_models(connection)}

    assert states == {"one": 1, "two": 2}
    assert f"read {project.config}; Redis at {project.redis_url}" in worker.log


def test_a_worker_that_is_killed_comes_back(spawn: Spawn, project: Project, connection: Redis) -> None:
    project.add("one", MODEL)
    worker = spawn([RQ_MODELS, "worker", "one", "-n", "2"], cwd=project.root, env=project.environ)
    wait_until(lambda: "rq-models: ready: one" in worker.log, "both serve")
    before = {one.pid for one in serving(connection)}
    victim = min(before)

    os.kill(victim, signal.SIGKILL)

    wait_until(lambda: {one.pid for one in serving(connection)} - before, "another one serves")
    assert "was killed by SIGKILL; starting it again in 0.1 s" in worker.log
    pids = {one.pid for one in serving(connection)}
    assert worker.stop() == 0
    assert all_gone(pids)


def test_workers_die_with_their_supervisor(spawn: Spawn, project: Project, connection: Redis) -> None:
    project.add("one", MODEL, preload=True)
    worker = spawn([RQ_MODELS, "worker", "one", "-n", "2"], cwd=project.root, env=project.environ)
    wait_until(lambda: [one.state for one in serving(connection)] == ["warm", "warm"], "both are warm")
    pids = {pid for one in serving(connection) for pid in (one.pid, one.horse_pid)}

    worker.stop(signal.SIGKILL)

    wait_until(lambda: all_gone(pids), "workers and horses are gone")


# -- up ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def up(spawn: Spawn, project: Project) -> Callable[..., RunningWorker]:
    def start(*arguments: str, port: int | None = None, **environ: str) -> RunningWorker:
        if port is not None:
            environ["REDIS_URL"] = f"redis://127.0.0.1:{port}/0"
        process = spawn([RQ_MODELS, "up", *arguments], cwd=project.root, env={**project.environ, **environ})
        wait_until(lambda: "rq-models: ready" in process.log or process.process.poll() is not None, "all is up")
        return process

    return start


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_up_runs_all_of_it_and_leaves_nothing(up, project: Project, server_port: int, signum: signal.Signals) -> None:
    project.add("one", MODEL, preload=True)
    project.add("two", MODEL, workers=2)
    page = free_port()
    process = up("--port", str(page), port=server_port)
    assert process.process.poll() is None, process.log
    with Redis(port=server_port) as client:
        wait_until(lambda: any(one.horse_pid for one in serving(client)), "one is warm")
        assert len(serving(client)) == 3
        pids = {pid for one in serving(client) for pid in (one.pid, one.horse_pid) if pid}
        pids.add(client.info("server")["process_id"])
    browser = http.client.HTTPConnection("127.0.0.1", page, timeout=30)
    browser.request("GET", "/")
    assert browser.getresponse().status in (200, 302)
    browser.close()

    assert process.stop(signum) == 0

    assert all_gone(pids)
    assert f"dashboard: http://127.0.0.1:{page}" in process.log
    assert f"read {project.config}; Redis at redis://127.0.0.1:{server_port}/0" in process.log
    assert "rq-models: ready: one, two" in process.log
    for port in (server_port, page):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_a_killed_up_leaves_nothing(up, project: Project, server_port: int) -> None:
    project.add("one", MODEL, preload=True)
    process = up("--no-dashboard", port=server_port)
    with Redis(port=server_port) as client:
        wait_until(lambda: any(one.horse_pid for one in serving(client)), "it is warm")
        pids = {pid for one in serving(client) for pid in (one.pid, one.horse_pid)}
        pids.add(client.info("server")["process_id"])

    process.stop(signal.SIGKILL)

    wait_until(lambda: all_gone(pids), "all are gone")


def test_the_prediction_in_hand_is_finished_before_the_server_stops(
    up, project: Project, server_port: int, tmp_path: Path
) -> None:
    project.add("slow", SLOW)
    flag = tmp_path / "runs"
    process = up("--no-dashboard", port=server_port)
    caller = subprocess.Popen(
        [RQ_MODELS, "--url", f"redis://127.0.0.1:{server_port}/0", "predict", "slow", f'"{flag}"'],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(flag.exists, "it predicts")

    process.process.send_signal(signal.SIGINT)
    wait_until(lambda: "warm shut down" in process.log, "the worker was asked to stop")
    flag.unlink()

    assert caller.communicate(timeout=60)[0] == '"done"\n'
    assert process.process.wait(60) == 0


def test_a_redis_that_answers_is_used_and_not_emptied(up, project: Project, connection: Redis) -> None:
    project.add("one", MODEL)
    connection.set("theirs", "value")

    process = up("--no-dashboard")

    assert "using the Redis" in process.log
    assert process.stop() == 0
    assert connection.get("theirs") == b"value"


def test_another_program_on_the_port_of_redis(up, project: Project) -> None:
    project.add("one", MODEL)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = up("--no-dashboard", port=listener.getsockname()[1])

    assert process.process.wait(60) == 8
    assert "something that is no Redis answers" in process.log
    assert "Traceback" not in process.log


def test_another_program_on_the_dashboards_port(up, project: Project, connection: Redis) -> None:
    project.add("one", MODEL)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = up("--port", str(port))

    assert process.process.wait(60) == 1
    assert f"port {port} for the dashboard is taken; choose another with --port" in process.log
    assert serving(connection) == []


def test_a_worker_that_dies_at_the_start_ends_up(up, project: Project, tmp_path: Path) -> None:
    project.add("one", MODEL)
    # Python imports this before anything else.
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif 'worker' in sys.orig_argv: os._exit(9)\n")

    process = up("--no-dashboard", PYTHONPATH=str(tmp_path))

    assert process.process.wait(60) == 9
    assert "one ended with exit status 9; stopping" in process.log


def test_a_server_that_is_killed_comes_back_with_its_data(up, project: Project, server_port: int) -> None:
    project.add("one", MODEL)
    process = up("--no-dashboard", port=server_port)
    with Redis(port=server_port) as client:
        client.set("kept", "value")
        client.waitaof(1, 0, 10_000)
        os.kill(client.info("server")["process_id"], signal.SIGKILL)

    wait_until(lambda: "redis was killed by SIGKILL; starting it again in 0.1 s" in process.log, "it is noticed")
    with Redis(port=server_port) as client:
        wait_until(lambda: serving(client), "the worker serves again")
        assert client.get("kept") == b"value"
    predicted = CliRunner().invoke(main, ["--url", f"redis://127.0.0.1:{server_port}/0", "predict", "one", "[1]"])
    assert predicted.stdout == "[1]\n", predicted.stderr
    assert process.stop() == 0


def test_without_models_there_is_nothing_to_run(project: Project) -> None:
    for command in ("up", "worker"):
        result = project.run(command)
        assert result.returncode == 3
        assert "[models.<name>]" in result.stderr.splitlines()[-1]


def test_much_data_is_read_before_workers_start(up, project: Project, server_port: int) -> None:
    project.add("one", MODEL)
    process = up("--no-dashboard", port=server_port)
    with Redis(port=server_port) as client:
        client.config_set("appendfsync", "no")
        client.eval("for i = 1, 300000 do redis.call('set', 'key' .. i, i) end", 0)
    assert process.stop() == 0

    process = up("--no-dashboard", port=server_port)

    assert "rq-models: ready: one" in process.log
    assert process.stop() == 0


def test_honcho_does_the_same(spawn: Spawn, project: Project, server_port: int) -> None:
    project.add("one", MODEL)
    procfile = Path(__file__).parents[2] / "Procfile"
    environ = {**project.environ, "REDIS_URL": f"redis://127.0.0.1:{server_port}/0"}
    environ["PATH"] = f"{Path(RQ_MODELS).parent}{os.pathsep}{environ['PATH']}"
    honcho = [sys.executable, "-m", "honcho", "-f", str(procfile), "-d", str(project.root), "start", "redis", "worker"]

    process = spawn(honcho, cwd=project.root, env=environ)

    with Redis.from_url(environ["REDIS_URL"]) as client:
        wait_until(lambda: serving(client), "the worker serves")
        pids = {one.pid for one in serving(client)} | {client.info("server")["process_id"]}
    process.stop(signal.SIGINT)
    wait_until(lambda: all_gone(pids), "all are gone")


# -- dashboard ---------------------------------------------------------------------------------------------------------


def test_the_dashboard_serves_and_stops(spawn: Spawn, project: Project) -> None:
    port = free_port()
    process = spawn([RQ_MODELS, "dashboard", "--port", str(port)], cwd=project.root, env=project.environ)
    wait_until(lambda: str(port) in process.log, "it listens")

    browser = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    browser.request("GET", "/")

    assert browser.getresponse().status in (200, 302)
    browser.close()
    assert process.stop() == 0


def test_the_dashboard_is_not_for_everybody(project: Project) -> None:
    result = project.run("dashboard", "--host", "0.0.0.0", "--port", str(free_port()))  # noqa: S104 - that is the point

    assert result.returncode == 3
    assert len(result.stderr.splitlines()) == 1
    assert "password" in result.stderr


def test_the_dashboards_port_may_be_taken(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = project.run("dashboard", "--port", str(listener.getsockname()[1]))

    assert result.returncode in (1, 3)
    assert len(result.stderr.splitlines()) == 1


def test_without_its_extra_the_sentence_has_the_command(project: Project) -> None:
    # In a fresh interpreter: once imported by another test, the package would be there after all.
    code = "import sys; sys.modules['rq_dashboard'] = None; from rq_models.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "dashboard"],
        cwd=project.root,
        env=project.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 3
    assert "pip install 'rq-models[dashboard]'" in result.stderr


# -- init --------------------------------------------------------------------------------------------------------------


def test_a_new_project_runs_as_it_is_and_its_test_passes(spawn: Spawn, tmp_path: Path, server_port: int) -> None:
    environ = {**os.environ, "REDIS_URL": f"redis://127.0.0.1:{server_port}/0"}
    subprocess.run([RQ_MODELS, "init", "churn-2"], cwd=tmp_path, check=True)
    root = tmp_path / "churn-2"

    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    process = spawn([RQ_MODELS, "up", "--no-dashboard"], cwd=root, env=environ)
    wait_until(lambda: "rq-models: ready" in process.log or process.process.poll() is not None, "all is up")
    predicted = subprocess.run(
        [RQ_MODELS, "predict", "churn-2", '{"tenure_months": 3, "monthly_charges": 80}'],
        cwd=root,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert tests.returncode == 0, tests.stdout
    assert "2 passed" in tests.stdout
    assert predicted.stdout == '{"probability": 0.611, "leaves": true}\n', predicted.stderr
    assert process.stop() == 0
