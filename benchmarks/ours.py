"""rq-models as its users have it: one client for the process, shared by its threads."""

import os
from typing import Any

from rq_models import Client
from rq_models.client import ClientJob

_URL = os.environ["BENCH_REDIS_URL"] + "/0"
_MODEL = "iris_model"
_PATIENCE = 60

_client = Client(_URL)
# A cold start begins with a job queued before there ever was a worker, which a client refuses by default.
_unchecked = Client(_URL, check_model=False, check_worker=False)


def enqueue_early(row: dict[str, Any]) -> ClientJob:
    """Queue a job for a worker to come."""
    return _unchecked.enqueue(_MODEL, row)


def enqueue(row: dict[str, Any]) -> ClientJob:
    """Queue one job."""
    return _client.enqueue(_MODEL, row)


def enqueue_many(rows: list[dict[str, Any]]) -> list[ClientJob]:
    """Queue many."""
    return _client.enqueue_many(_MODEL, rows)


def result(job: ClientJob) -> Any:
    """Wait for the result."""
    return job.wait(_PATIENCE)


def predict(row: dict[str, Any]) -> Any:
    """Queue one job and wait for its result."""
    return _client.predict(_MODEL, row, _PATIENCE)
