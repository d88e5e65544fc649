"""Stock RQ: a SimpleWorker that keeps the model between jobs, JSON, and waiting on the result stream."""

from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job

from benchmarks import iris

_queue = Queue("bench", connection=Redis.from_url(f"{iris.URL}/0?{iris.LIMIT}"), serializer="json")
_TASK = "benchmarks.iris.predict"
_TTL = 3600


def enqueue(row: dict[str, Any]) -> Job:
    """Queue one job."""
    return _queue.enqueue(_TASK, row, result_ttl=_TTL)


def enqueue_many(rows: list[dict[str, Any]]) -> list[Job]:
    """Queue many, by RQ's own way in one pipeline."""
    return _queue.enqueue_many([Queue.prepare_data(_TASK, args=(row,), result_ttl=_TTL) for row in rows])


def result(job: Job) -> Any:
    """Wait for the result."""
    found = job.latest_result(timeout=iris.PATIENCE)
    return found and found.return_value
