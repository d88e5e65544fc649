"""The asyncio client: the verbs of `Client`, awaited. The rules behind both are in `plans`."""
# ruff: noqa: ASYNC109 - the verbs take what the blocking client's take

from __future__ import annotations

import asyncio
import math
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

import redis
from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rq_models.client import connected, require_bytes
from rq_models.errors import ConfigurationError
from rq_models.plans import ByRq, Checks, Next, Options, Patience, Planner, WaitableJob
from rq_models.registry import ModelStatus, reading
from rq_models.waiting import (
    FATAL,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_SLEEP,
    UNREACHABLE,
    Book,
    Wait,
    reading_arguments,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from rq.job import JobStatus

    from rq_models.plans import ManyOptions, Plan, Step
    from rq_models.results import Ended
    from rq_models.waiting import Waitable

T = TypeVar("T")


class AsyncJob:
    """A prediction that can be awaited; nothing here blocks.

    Attributes:
        id: the job's id, as RQ knows it.
        model: the model it asks for.
        model_version: version of the model that ran it, once it was waited for.
    """

    def __init__(self, client: AsyncClient, record: WaitableJob) -> None:
        self._client = client
        self._record = record
        self.id: str = record.id
        self.model = record.origin

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r}, model={self.model!r})"

    @property
    def model_version(self) -> str | None:
        """Version of the model that ran the job, once it was waited for."""
        return self._record.model_version

    async def wait(self, timeout: float | None = None) -> Any:
        """Return the prediction as soon as it is there; see `ClientJob.wait`."""
        return (await self._client.wait_all([self], timeout))[0]

    async def status(self) -> JobStatus:
        """Return its status now, or raise JobNotFound."""
        client = self._client
        return await client._run(client._planner.status(self._record))  # noqa: SLF001 - two faces of one thing

    async def cancel(self) -> bool:
        """Take the job back if it is still queued; say whether it was."""
        client = self._client
        return bool(await client._run(client._planner.cancel([self._record])))  # noqa: SLF001 - two faces of one thing


class AsyncClient:
    """Enqueues predictions and awaits results. An async context manager; many tasks of one event loop may share it.

    Args:
        url: of Redis; default: the environment's ``REDIS_URL``, else what ``config/`` says.
        connection: a `redis.asyncio.Redis` to use instead; it stays open when the client is closed.
        check_model: see `Client`, also for the others.
        check_worker: likewise.
        check_input: likewise.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        connection: Redis | None = None,
        check_model: bool = True,
        check_worker: bool = True,
        check_input: bool = True,
    ) -> None:
        self._owns_connection = connection is None
        self.connection: Redis = connected(Redis, BlockingConnectionPool, url) if connection is None else connection
        require_bytes(self.connection)
        self._url = url
        self._closed = False
        self._waiter = AsyncWaiter(self.connection)
        checks = Checks(model=check_model, worker=check_worker, input=check_input)
        self._planner = Planner(self.connection, WaitableJob, self._waiter.watch, checks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; whoever waits gets a RuntimeError."""
        self._closed = True
        await self._waiter.close()
        if self._owns_connection:
            await self.connection.aclose()

    async def enqueue(self, model: str, data: Any, **options: Unpack[Options]) -> AsyncJob:
        """Enqueue one prediction; see `Client.enqueue`."""
        (record,) = await self._run(self._planner.enqueue(model, [data], options, many=False))
        return AsyncJob(self, record)

    async def enqueue_many(self, model: str, rows: Iterable[Any], **options: Unpack[ManyOptions]) -> list[AsyncJob]:
        """Enqueue a prediction for each row; see `Client.enqueue_many`."""
        return [AsyncJob(self, record) for record in await self._run(self._planner.enqueue(model, rows, options))]

    async def predict(self, model: str, data: Any, timeout: float | None = None, **options: Unpack[Options]) -> Any:
        """Enqueue one prediction and return its result; see `Client.predict`. A cancelled task takes its job back."""
        return (await self._run(self._planner.predict(model, [data], timeout, options, many=False)))[0]

    async def predict_many(
        self, model: str, rows: Iterable[Any], timeout: float | None = None, **options: Unpack[ManyOptions]
    ) -> list[Any]:
        """Enqueue a prediction for each row and return the results in the same order; see `Client.predict_many`."""
        return await self._run(self._planner.predict(model, rows, timeout, options))

    async def wait_all(
        self, jobs: Iterable[AsyncJob], timeout: float | None = None, *, return_exceptions: bool = False
    ) -> list[Any]:
        """Return the results of the jobs, in their order; see `Client.wait_all`."""
        records = [job._record for job in jobs]  # noqa: SLF001 - two faces of one thing
        return await self._run(self._planner.wait_all(records, timeout, return_exceptions=return_exceptions))

    async def as_completed(self, jobs: Iterable[AsyncJob], timeout: float | None = None) -> AsyncIterator[AsyncJob]:
        """Yield each job when it has ended; see `Client.as_completed`."""
        by_id, patience = {job.id: job for job in jobs}, Patience(timeout)
        records = {job_id: job._record for job_id, job in by_id.items()}  # noqa: SLF001 - two faces of one thing
        with self._waiter.watch(records.values()) as wait:
            while wait.pending:
                for job_id, ended in (await self._run(self._planner.some_ended(wait, records, patience))).items():
                    records[job_id].ended = ended
                    yield by_id[job_id]

    async def job(self, job_id: str) -> AsyncJob:
        """Return a job by its id, or raise JobNotFound."""
        return AsyncJob(self, await self._run(self._planner.fetch(job_id)))

    async def models(self) -> list[ModelStatus]:
        """Return every model that was ever published, its card and who serves it, sorted by name."""
        return await self._run(reading())

    async def _run(self, plan: Plan[T]) -> T:
        answer: Any = None
        error: BaseException | None = None
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            while True:
                step = plan.send(answer) if error is None else plan.throw(error)
                cancelled = task.cancelling()
                try:
                    answer, error = await self._carry_out(step), None
                    if task.cancelling() > cancelled:
                        # Python 3.11's wait_for, which redis-py sends by, swallows a cancellation now and then.
                        error = asyncio.CancelledError()
                except GeneratorExit:
                    raise
                except BaseException as raised:  # noqa: BLE001 - also a cancellation: the plan may have to take jobs back
                    error = raised
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            error = None  # it holds this frame, which holds it

    async def _carry_out(self, step: Step) -> Any:
        if self._closed:
            raise RuntimeError("this client is closed")
        if isinstance(step, Next):
            return await self._waiter.next(step.wait, step.deadline)
        if isinstance(step, ByRq):
            return await asyncio.to_thread(self._enqueue_by_rq, step)
        async with self.connection.pipeline() as pipe:
            step(pipe)
            return await pipe.execute()

    def _enqueue_by_rq(self, step: ByRq) -> None:
        if not self._owns_connection:
            raise ConfigurationError("depends_on needs an AsyncClient that was made from an address")
        with connected(redis.Redis, redis.BlockingConnectionPool, self._url) as connection:
            step.enqueue(connection)


class AsyncWaiter:
    """The asyncio side of waiting: one task reads for all, as long as anybody waits."""

    def __init__(self, connection: Redis) -> None:
        self.book = Book()
        self._connection = connection
        retry = Retry(NoBackoff(), 0)
        self._reader = Redis.from_pool(ConnectionPool(**{**reading_arguments(connection), "retry": retry}))
        self._task: asyncio.Task[None] | None = None
        self._waits: set[TaskWait] = set()
        self._pause = FIRST_PAUSE
        self._closed = False

    def watch(self, jobs: Iterable[Waitable], *, queued: bool = True) -> TaskWait:
        """Return a wait for these jobs."""
        return TaskWait(self.book, nullcontext(), jobs, queued=queued)

    async def close(self) -> None:
        """Stop reading."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._reader.aclose()

    async def next(self, wait: TaskWait, deadline: float) -> tuple[str, Ended] | None:
        """Return one of the wait's jobs that has ended, or None when the deadline (monotonic) has passed."""
        self._waits.add(wait)
        try:
            while True:
                wait.woken.clear()
                done = wait.pop()
                if done is not None:
                    return done
                if self._closed:
                    raise RuntimeError("the client was closed while this job was waited for")
                if wait.error is not None:
                    raise wait.error
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                if self._task is None or self._task.done():
                    self._task = asyncio.create_task(self._read())
                elif wait.unheard:
                    await self._announce(wait)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LONGEST_SLEEP)):
                        await wait.woken.wait()
        finally:
            self._waits.discard(wait)

    async def _announce(self, wait: TaskWait) -> None:
        # If it fails: the read ends within a second by itself.
        with suppress(redis_errors.RedisError):
            async with self._connection.pipeline(transaction=False) as pipe:
                wait.knock(pipe)
                await pipe.execute()

    async def _read(self) -> None:
        error: Exception | None = None
        try:
            while self.book.watches and not self._closed:
                await self._turn()
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is raised in those who wait
            error = raised
        finally:
            for wait in self._waits:
                wait.error = error
                wait.notify()

    async def _turn(self) -> None:
        """See `Waiter._turn`."""
        try:
            job_ids = self.book.due()
            if job_ids:
                async with self._reader.pipeline() as pipe:
                    self.book.ask(pipe, job_ids)
                    self.book.looked(job_ids, await pipe.execute(raise_on_error=False))
            else:
                self.book.read(await self._reader.xread(self.book.streams(), block=self.book.block(math.inf)))
            self._pause = FIRST_PAUSE
        except FATAL:
            raise
        except UNREACHABLE:
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        except redis_errors.ResponseError:
            if not self.book.refused():
                raise
        finally:
            self.book.reading = False


class TaskWait(Wait):
    """A task's wait."""

    def __init__(self, book: Book, lock: nullcontext[None], jobs: Iterable[Waitable], *, queued: bool) -> None:
        self.woken = asyncio.Event()
        self.error: Exception | None = None
        super().__init__(book, lock, jobs, queued=queued)

    def notify(self) -> None:
        """Wake the task."""
        self.woken.set()
