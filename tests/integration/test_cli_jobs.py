"""The commands that look at models and jobs, against a real worker: models, job, failed, replay."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import Project, wait_until
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from rq_models.cli import main
from rq_models.jobs import FUNCTION_PREFIX, ModelJob
from rq_models.registry import Card, publish_card

MODEL = """
    from dataclasses import dataclass

    @dataclass
    class Input:
        x: float

    class Model:
        version = "1.2"
        def predict(self, data: Input):
            print("predicting", data.x)
            if data.x < 0:
                raise ArithmeticError("no roots\\nof negative numbers")
            return {"root": data.x ** 0.5}
"""


@pytest.fixture
def run(project: Project):
    def run(*arguments: str, **options: Any) -> Result:
        line = ["--url", project.redis_url, "--config", str(project.config.parent), *arguments]
        return CliRunner().invoke(main, line, **options)

    return run


@pytest.fixture
def served(project: Project, start_worker) -> str:
    project.add("root", MODEL)
    start_worker(project, "root")
    return "root"


def enqueue(connection: Redis, data: Any, model: str = "root", **options: Any) -> ModelJob:
    queue = Queue(model, connection=connection, serializer=JSONSerializer, job_class=ModelJob)
    return queue.enqueue_call(f"{FUNCTION_PREFIX}{model}", args=(data,), **options)


def ended(connection: Redis, data: Any, **options: Any) -> str:
    job = enqueue(connection, data, **options)
    wait_until(lambda: job.get_status() in ("finished", "failed"), "the job ends")
    return job.id


def test_models_as_a_table(run, connection: Redis, served: str, project: Project) -> None:
    ended(connection, {"x": -1})
    project.add("never_started", MODEL)
    enqueue(connection, 1, model="never_started")
    publish_card(connection, Card(name="left", version="0.9"))

    table = run("models")

    assert table.exit_code == 0
    assert [line.split() for line in table.stdout.splitlines()] == [
        ["name", "version", "workers", "state", "queued", "failed"],
        ["left", "0.9", "0", "unserved", "0", "0"],
        ["never_started", "-", "0", "unserved", "1", "0"],
        ["root", "1.2", "1", "warm", "0", "1"],
    ]


def test_counting_does_not_clean_up(run, connection: Redis, project: Project) -> None:
    publish_card(connection, Card(name="root"))
    # RQ's own `registry.count` would drop this expired entry.
    connection.zadd("rq:failed:root", {"expired": 1})

    assert run("models").stdout.splitlines()[1].split()[-1] == "1"
    assert connection.zcard("rq:failed:root") == 1


def test_models_need_no_configuration(connection: Redis, redis_url: str) -> None:
    publish_card(connection, Card(name="root", version="3"))

    result = CliRunner().invoke(main, ["models"], env={"REDIS_URL": redis_url, "RQ_MODELS_CONFIG": "/nowhere"})

    assert result.stdout.splitlines()[1].split() == ["root", "3", "0", "unserved", "0", "0"]


def test_a_finished_job(run, connection: Redis, served: str) -> None:
    job_id = ended(connection, {"x": 4})

    text = run("job", job_id)

    lines = dict(line.split(maxsplit=1) for line in text.stdout.splitlines())
    assert lines["status"] == "finished"
    assert lines["model"] == "root"
    assert lines["version"] == "1.2"
    assert lines["worker"].startswith("root-")
    assert lines["attempts"] == "1"
    assert lines["input"] == '{"x": 4}'
    assert lines["output"] == '{"root": 2.0}'
    assert {"enqueued", "started", "ended"} <= lines.keys()
    assert "error" not in lines


def test_a_failed_job_shows_the_models_traceback(run, connection: Redis, served: str) -> None:
    job_id = ended(connection, {"x": -1})

    text = run("job", job_id)

    assert "error     ModelError (ArithmeticError): no roots of negative numbers\n" in text.stdout
    assert 'raise ArithmeticError("no roots' in text.stdout
    assert "Traceback" in text.stdout


def test_the_input_can_be_left_out(run, connection: Redis) -> None:
    job = enqueue(connection, {"x": "private"})

    result = run("job", job.id, "--no-input")

    assert result.exit_code == 0
    assert "private" not in result.output


def test_a_job_cannot_steer_the_terminal(run, connection: Redis) -> None:
    job = enqueue(connection, {"x": "\x1b[2Jred\x9b\ud800"})
    connection.hset(job.key, "worker_name", "\x1b]0;title\x07")

    result = run("job", job.id)

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\x9b" not in result.output


def test_another_applications_job_is_shown_and_not_unpickled(run, connection: Redis) -> None:
    job = Job.create(print, ("unpickled",), connection=connection, origin="root")
    job.save()
    assert pickle.loads(job.data)[0] == "builtins.print"

    assert "none: this is no prediction" in run("job", job.id).stdout
    assert run("replay", job.id).exit_code == 4
    assert run("failed", "requeue", job.id).exit_code == 9


@pytest.mark.parametrize("command", [["job"], ["replay"], ["failed", "requeue"]])
def test_no_such_job(run, command: list[str]) -> None:
    result = run(*command, "nosuch")

    assert result.exit_code == 9
    assert "nosuch" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_replay_runs_a_failed_input_again_here(run, connection: Redis, served: str) -> None:
    job_id = ended(connection, {"x": -1})
    before = connection.hgetall(f"rq:job:{job_id}")

    result = run("replay", job_id)

    assert result.exit_code == 6
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert "predicting -1.0" in lines
    assert any("in predict" in line for line in lines)
    said = f"the model raised ArithmeticError: no roots of negative numbers; see rq-models job {job_id}"
    assert lines[-1] == f"rq-models: {said}"
    assert connection.hgetall(f"rq:job:{job_id}") == before


def test_replay_prints_the_output(run, connection: Redis, project: Project) -> None:
    project.add("root", MODEL)
    job = enqueue(connection, {"x": 9})

    result = run("replay", job.id)

    assert result.exit_code == 0
    assert result.stdout == '{"root": 3.0}\n'
    assert "root 1.2 loaded" in result.stderr


def test_replay_of_a_model_that_is_not_configured_here(run, connection: Redis) -> None:
    job = enqueue(connection, {"x": 9})

    result = run("replay", job.id)

    assert result.exit_code == 3
    assert "Add a table [models.root]" in result.stderr


def test_failed_jobs_are_listed_newest_first(run, connection: Redis, served: str) -> None:
    first = ended(connection, {"x": -1})
    second = ended(connection, {"x": "many"})
    # The times that are shown have no more than seconds; the order is that of the records.
    connection.hset(f"rq:job:{first}", "ended_at", "2020-01-02T03:04:05.000000Z")

    everything = run("failed").stdout.splitlines()
    of_model = run("failed", "list", "root").stdout.splitlines()

    assert everything == of_model
    assert everything[0].split()[:2] == ["id", "model"]
    assert everything[1].split()[:2] == [second, "root"]
    assert "InvalidInput" in everything[1]
    assert "x" in everything[1]
    assert everything[2].split()[:3] == [first, "root", "2020-01-02T03:04:05"]
    assert everything[2].endswith("ModelError    no roots of negative numbers")
    assert len(run("failed", "list", "root", "-n", "1").stdout.splitlines()) == 2


def test_requeueing_by_id_runs_the_job_again(run, connection: Redis, served: str) -> None:
    job_id = ended(connection, {"x": -1})

    result = run("failed", "requeue", job_id)

    assert result.exit_code == 0
    assert result.stdout == "requeued 1 of 1\n"
    wait_until(lambda: connection.hget(f"rq:job:{job_id}", "attempts") == b"2", "it runs again")
    wait_until(lambda: connection.zscore("rq:failed:root", job_id), "it fails again")


def test_requeueing_all_of_a_model(run, connection: Redis, served: str, start_worker, project: Project) -> None:
    project.add("other", MODEL)
    start_worker(project, "other")
    ids = [ended(connection, {"x": -1}) for _ in range(2)]
    left = ended(connection, {"x": -1}, model="other")

    result = run("failed", "requeue", "--all", "root")

    assert result.stdout == "requeued 2 of 2\n"
    for job_id in ids:
        wait_until(lambda job_id=job_id: connection.hget(f"rq:job:{job_id}", "attempts") == b"2", "it runs again")
    assert connection.hget(f"rq:job:{left}", "attempts") == b"1"
    wait_until(lambda: connection.zcard("rq:failed:root") == 2, "both failed again")
    assert run("failed", "requeue", "--all").stdout == "requeued 3 of 3\n"


def test_requeueing_a_job_that_did_not_fail(run, connection: Redis) -> None:
    job = enqueue(connection, {"x": 1})

    result = run("failed", "requeue", job.id)

    assert result.exit_code == 9
    assert "it is queued" in result.stderr
    assert connection.llen("rq:queue:root") == 1


def test_requeue_wants_to_know_what(run) -> None:
    result = run("failed", "requeue")

    assert result.exit_code == 2
    assert "--all" in result.stderr
