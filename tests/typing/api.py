"""The public API as a type checker sees it: checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

from rq import Retry
from rq.job import Job, JobStatus

from rq_models import (
    AsyncClient,
    AsyncJob,
    Card,
    Client,
    ClientJob,
    InvalidInput,
    JobCancelled,
    ModelStatus,
    RqModelsError,
)
from rq_models.testing import ServeModels


def blocking() -> None:
    with Client("redis://127.0.0.1:6379/0", check_input=False) as client:
        job = client.enqueue("iris", {"petal_width": 0.2}, job_id="one", at_front=True, retry=Retry(max=3))
        assert_type(job, ClientJob)
        as_rq_knows_it: Job = job
        assert_type(job.wait(timeout=10), Any)
        assert_type(client.job(as_rq_knows_it.id), ClientJob)
        jobs = client.enqueue_many("iris", [1, 2], result_ttl=60)
        assert_type(jobs, list[ClientJob])
        assert_type(client.wait_all(jobs, timeout=1.5, return_exceptions=True), list[Any])
        assert_type(client.as_completed(jobs), Iterator[ClientJob])
        assert_type(client.predict("iris", [1.5], 10, job_timeout="1m", deadline=0.5), Any)
        assert_type(client.predict_many("iris", iter([1])), list[Any])
        assert_type(client.models(), list[ModelStatus])
        assert_type(client.models()[0].card, Card | None)
        client.enqueue("iris", 1, jobid="one")  # type: ignore[call-arg]
        client.enqueue("iris", 1, result_ttl="soon")  # type: ignore[arg-type]
        client.enqueue_many("iris", [1], job_id="one")  # type: ignore[call-arg]


async def awaiting() -> None:
    async with AsyncClient() as client:
        job = await client.enqueue("iris", 1, meta={"a": 1})
        assert_type(job, AsyncJob)
        assert_type(await job.wait(timeout=10), Any)
        assert_type(await job.status(), JobStatus)
        assert_type(await job.cancel(), bool)
        assert_type(await client.predict_many("iris", [1], timeout=1), list[Any])
        assert_type(client.as_completed([job]), AsyncIterator[AsyncJob])
        assert_type(await client.job("one"), AsyncJob)
        assert_type(await client.models(), list[ModelStatus])


def errors() -> None:
    try:
        Client().predict("iris", 1)
    except InvalidInput as error:
        assert_type(error.type, str | None)
    except JobCancelled as error:
        assert_type(error.job_id, str | None)
    except RqModelsError as error:
        assert_type(error.retryable, bool)


def a_users_test(serve_models: ServeModels) -> None:
    assert_type(serve_models(churn=object), Client)
