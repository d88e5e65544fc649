"""The asyncio client: the verbs of `Client`, awaited.

A `Client` of its own does the work, in a few threads: each task awaits what one of them does for a round trip, and all
tasks that wait for results share one thread, which reads for them.
"""
# ruff: noqa: ASYNC109, SLF001 - the verbs take what the blocking client's take; and this is that one's other face

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, Unpack

from rq_models.client import CONNECTIONS, NOBODY_WAITS, PATIENCE, Client, ClientJob, ManyOptions, Options
from rq_models.errors import QueueFull
from rq_models.waiting import LONGEST_SLEEP

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from redis import Redis
    from rq.job import JobStatus

    from rq_models.registry import ModelStatus
    from rq_models.waiting import Wait

P = ParamSpec("P")
T = TypeVar("T")


class _Event(asyncio.Event):
    """An event of this loop that any thread may set."""

    def __init__(self) -> None:
        super().__init__()
        self._home = asyncio.get_running_loop()

    def set(self) -> None:
        self._home.call_soon_threadsafe(super().set)


class AsyncJob:
    """A prediction that can be awaited; nothing here blocks.

    Attributes:
        id: the job's id, as RQ knows it.
        model: the model it asks for.
    """

    def __init__(self, client: AsyncClient, job: ClientJob) -> None:
        self._client = client
        self._job = job
        self.id: str = job.id
        self.model = job.origin

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r}, model={self.model!r})"

    @property
    def model_version(self) -> str | None:
        """Version of the model that ran the job, once it was waited for."""
        return self._job.model_version

    async def wait(self, timeout: float | None = None) -> Any:
        """Return the prediction as soon as it is there; see `ClientJob.wait`."""
        return (await self._client.wait_all([self], timeout))[0]

    async def status(self) -> JobStatus:
        """Return its status now, or raise JobNotFound."""
        return (await self._client.job(self.id))._job.get_status(refresh=False)

    async def cancel(self) -> bool:
        """Take the job back if it is still queued; say whether it was."""
        return bool(await self._client._thread(self._client._client._take_back, [self._job]))


class AsyncClient:
    """Enqueues predictions and awaits results. An async context manager; many tasks of one event loop may share it.

    Args:
        url: of Redis; default: the environment's ``REDIS_URL``, else what ``config/`` says.
        connection: a blocking connection to use instead; it stays open when the client is closed.
        check_model: see `Client`, also for the others.
        check_worker: likewise.
        check_input: likewise.
        patience: likewise.
    """

    def __init__(  # noqa: PLR0913 - each has a default
        self,
        url: str | None = None,
        *,
        connection: Redis | None = None,
        check_model: bool = True,
        check_worker: bool = True,
        check_input: bool = True,
        patience: float = PATIENCE,
    ) -> None:
        self._client = Client(
            url,
            connection=connection,
            check_model=check_model,
            check_worker=check_worker,
            check_input=check_input,
            patience=patience,
        )
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="rq-models")
        # Those may all be patient with a server that is away; here one reads, and timeouts are on time.
        self._hasty = ThreadPoolExecutor(3, thread_name_prefix="rq-models-hasty")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; whoever waits gets a RuntimeError."""
        await asyncio.to_thread(self._client.close)

    async def enqueue(self, model: str, data: Any, **options: Unpack[Options]) -> AsyncJob:
        """Enqueue one prediction; see `Client.enqueue`."""
        return AsyncJob(self, await self._thread(self._client.enqueue, model, data, **options))

    async def enqueue_many(self, model: str, rows: Iterable[Any], **options: Unpack[ManyOptions]) -> list[AsyncJob]:
        """Enqueue a prediction for each row; see `Client.enqueue_many`."""
        return [AsyncJob(self, job) for job in await self._thread(self._client.enqueue_many, model, rows, **options)]

    async def predict(self, model: str, data: Any, timeout: float | None = None, **options: Unpack[Options]) -> Any:
        """Enqueue one prediction and return its result; see `Client.predict`. A cancelled task takes its job back."""
        began = time.monotonic()
        prepare = partial(self._client._prepare, model, [data], options, timeout, many=False)
        jobs = await self._in_time(prepare, timeout, began)
        return (await self._predict(jobs, timeout, options, began))[0]

    async def predict_many(
        self, model: str, rows: Iterable[Any], timeout: float | None = None, **options: Unpack[ManyOptions]
    ) -> list[Any]:
        """Enqueue a prediction for each row and return the results in the same order; see `Client.predict_many`."""
        began = time.monotonic()
        jobs = await self._in_time(partial(self._client._prepare, model, rows, options, timeout), timeout, began)
        return await self._predict(jobs, timeout, options, began)

    async def wait_all(
        self, jobs: Iterable[AsyncJob], timeout: float | None = None, *, return_exceptions: bool = False
    ) -> list[Any]:
        """Return the results of the jobs, in their order; see `Client.wait_all`."""
        with self._watch([job._job for job in jobs], timeout) as wait:
            return await self._collect(wait, return_exceptions=return_exceptions)

    async def as_completed(self, jobs: Iterable[AsyncJob], timeout: float | None = None) -> AsyncIterator[AsyncJob]:
        """Yield each job when it has ended; see `Client.as_completed`."""
        by_id = {job.id: job for job in jobs}
        with self._watch([job._job for job in by_id.values()], timeout) as wait:
            while wait.pending:
                for job in await self._next(wait):
                    yield by_id[job.id]

    async def job(self, job_id: str) -> AsyncJob:
        """Return a job by its id, or raise JobNotFound."""
        return AsyncJob(self, await self._thread(self._client.job, job_id))

    async def models(self) -> list[ModelStatus]:
        """Return every model that was ever published, its card and who serves it, sorted by name."""
        return await self._thread(self._client.models)

    async def _thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._threads, partial(function, *args, **kwargs))

    async def _hastily(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._hasty, partial(function, *args, **kwargs))

    async def _run(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        """Do it in a thread; a task that is cancelled meanwhile stays until it is done, so that it can be undone."""
        left, context = threading.Event(), copy_context()
        context.run(NOBODY_WAITS.set, left)
        begun = threads.submit(context.run, call)
        work = asyncio.wrap_future(begun)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            left.set()
            # What has not begun never does.
            if not begun.cancel():
                await asyncio.wait([work])
            raise

    async def _in_time(self, call: Callable[[], T], timeout: float | None, began: float) -> T:
        """Do it in a thread, unless the time is over before."""
        left = None if timeout is None else timeout - (time.monotonic() - began)
        try:
            async with asyncio.timeout(left) as limit:
                return await self._thread(call)
        except TimeoutError:
            if not limit.expired():
                # The call's own.
                raise
            raise TimeoutError(f"not known to be enqueued within {timeout:g} s: Redis does not answer") from None

    async def _predict(
        self, jobs: list[ClientJob], timeout: float | None, options: ManyOptions, began: float
    ) -> list[Any]:
        with self._watch(jobs, timeout, queued=False, since=began) as wait:
            known = 0
            try:
                submit = partial(self._client._submit, jobs, options, wait)
                known = await self._in_time(submit, timeout, began)
                return await self._collect(wait)
            except QueueFull:
                # See `Client._predict`.
                raise
            except (Exception, asyncio.CancelledError):
                if known and "job_id" in options:
                    # Likewise.
                    raise
                await self._hastily(self._client._give_up, wait)
                raise

    async def _collect(self, wait: Wait, *, return_exceptions: bool = False) -> list[Any]:
        try:
            while wait.pending:
                wait.settle(await self._next(wait), return_exceptions=return_exceptions)
        except TimeoutError as error:
            if not return_exceptions:
                raise
            return wait.outcomes(error)
        return wait.outcomes()

    def _watch(self, jobs: list[ClientJob], timeout: float | None, **how: Any) -> Wait:
        return self._client._watch(jobs, timeout, woken=_Event(), **how)

    async def _next(self, wait: Wait) -> list[ClientJob]:
        """Await that some of the jobs end, and return them; raise TimeoutError when the time is over."""
        waiter = self._client._waiter
        while True:
            wait.woken.clear()
            if ended := waiter.take(wait):
                return ended
            left = wait.deadline - time.monotonic()
            if left <= 0:
                return await self._hastily(self._client._last_look, wait)
            if waiter.claim():
                self._hasty.submit(waiter.read_for_all)
            elif waiter.unheard:
                # Not awaited: it only hurries a read that ends within a second anyway.
                self._threads.submit(waiter.call)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LONGEST_SLEEP)):
                    await wait.woken.wait()
