"""A worker played by the test itself, one step at a time, with RQ's own methods; and what is counted on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis import Connection, ConnectionPool, Redis
from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from rq_models.errors import RqModelsError
from rq_models.jobs import ModelJob
from rq_models.registry import Card, Serving, drop_lease, publish_card, renew_lease

SCHEMA = {
    "type": "object",
    "properties": {"petal_width": {"type": "number"}, "name": {"type": "string"}},
    "required": ["petal_width"],
}


class PlayedWorker:
    """Serves one model, but only as far as a test tells it to."""

    def __init__(self, connection: Redis, model: str = "iris", **card: Any) -> None:
        self.connection, self.model = connection, model
        self.queue = Queue(model, connection=connection, job_class=ModelJob, serializer=JSONSerializer)
        self.publish(**card)
        renew_lease(connection, model, Serving("lease", "played", "here", 1, state="warm"), 3600)

    def publish(self, **card: Any) -> None:
        publish_card(self.connection, Card(self.model, **{"version": "1", "input_schema": SCHEMA, **card}))

    def leave(self) -> None:
        drop_lease(self.connection, self.model, "lease")

    def take(self) -> ModelJob:
        """Wait for a job and start it."""
        _, job_id = self.connection.blpop([self.queue.key], timeout=4)
        job = ModelJob.fetch(job_id.decode(), connection=self.connection)
        with self.connection.pipeline() as pipe:
            job.prepare_for_execution("played", pipe)
            pipe.execute()
        return job

    def finish(self, job: ModelJob, value: Any) -> None:
        job._result = value
        job.model_version = "1"
        with self.connection.pipeline() as pipe:
            job._handle_success(job.result_ttl, pipe)
            job.cleanup(job.result_ttl, pipe)
            pipe.execute()

    def fail(self, job: ModelJob, error: RqModelsError | None, traceback: str = "Traceback\n  model.py\nOops") -> None:
        job.error = None if error is None else error.record()
        with self.connection.pipeline() as pipe:
            job.set_status(JobStatus.FAILED, pipeline=pipe)
            job._handle_failure(traceback, pipe)
            pipe.execute()

    def echo(self) -> None:
        """Take one job and return its input."""
        job = self.take()
        self.finish(job, job.args[0])


def counting(connection: Redis) -> tuple[Redis, Callable[[], int]]:
    """Return another connection to the same place, and how often it has sent anything since it was last asked."""
    sent: list[Any] = []

    class Counting(Connection):
        def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            sent.append(command)
            super().send_packed_command(command, check_health)

    def count() -> int:
        number = len(sent)
        sent.clear()
        return number

    kwargs = {key: connection.connection_pool.connection_kwargs[key] for key in ("host", "port", "db")}
    return Redis.from_pool(ConnectionPool(connection_class=Counting, **kwargs)), count
