"""``rq-models predict`` against a real worker: what it prints, and how it exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import Project
from redis import Redis

from rq_models.cli import main
from rq_models.registry import Card, publish_card

MODEL = """
    import time
    from typing import TypedDict

    class Flower(TypedDict):
        petal_width: float

    class Model:
        def predict(self, data: Flower):
            if data["petal_width"] < 0:
                raise ValueError("no such petal")
            if data["petal_width"] > 100:
                time.sleep(600)
            return {"species": "setosa"}
"""


@pytest.fixture
def served(project: Project, start_worker) -> None:
    # Short, so that the one that never ends does.
    project.add("iris", MODEL, job_timeout=2)
    start_worker(project, "iris")


@pytest.fixture
def predict(redis_url: str):
    def predict(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(main, ["--url", redis_url, "predict", *arguments], **options)

    return predict


def test_the_output_is_json_on_stdout(served, project: Project) -> None:
    # The one test of the command as a process of its own.
    result = project.run("predict", "iris", '{"petal_width": 1}')

    assert (result.returncode, result.stdout, result.stderr) == (0, '{"species": "setosa"}\n', "")


def test_input_from_a_file_and_from_stdin(served, predict, tmp_path: Path) -> None:
    file = tmp_path / "flower.json"
    file.write_text('{"petal_width": 1}')

    assert predict("iris", f"@{file}").stdout == '{"species": "setosa"}\n'
    assert predict("iris", "-", input=file.read_text()).stdout == '{"species": "setosa"}\n'


def test_a_wrong_field_is_named(served, predict, connection: Redis) -> None:
    assert predict("iris", '{"petal_width": 1}').exit_code == 0

    result = predict("iris", '{"petal_width": "asdfg"}')

    assert result.exit_code == 4
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "petal_width" in line
    assert "asdfg" in line


@pytest.mark.parametrize("text", ["{", "{'a': 1}", "NaN", "", "@/nowhere", "[" * 100_000])
def test_what_is_no_json_is_bad_input(predict, text: str) -> None:
    result = predict("iris", text)

    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1


def test_no_such_model(predict, connection: Redis) -> None:
    publish_card(connection, Card(name="iris"))

    result = predict("irs", "1")

    assert result.exit_code == 5
    assert "iris" in result.stderr


def test_nobody_serves_it(predict, connection: Redis) -> None:
    publish_card(connection, Card(name="iris"))

    result = predict("iris", "1")

    assert result.exit_code == 5
    assert connection.llen("rq:queue:iris") == 0


def test_the_models_own_failure(served, predict) -> None:
    result = predict("iris", '{"petal_width": -1}')

    assert result.exit_code == 6
    assert result.stderr.startswith("rq-models: the model raised ValueError: no such petal; see rq-models job ")
    assert result.stderr.count("\n") == 1


def test_no_result_in_time(served, predict) -> None:
    result = predict("iris", '{"petal_width": 101}', "--timeout", "0.2")

    assert result.exit_code == 7
    assert len(result.stderr.splitlines()) == 1


def test_no_redis() -> None:
    result = CliRunner().invoke(main, ["--url", "redis://127.0.0.1:1/0", "predict", "iris", "1"])

    assert result.exit_code == 8
    assert "rq-models redis" in result.stderr
