"""The client: enqueue predictions and wait for their results."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from redis import BlockingConnectionPool, Redis

from rq_models.errors import ConfigurationError
from rq_models.plans import ByRq, Checks, Next, Options, Patience, Planner, WaitableJob
from rq_models.registry import ModelStatus, reading
from rq_models.waiting import ThreadWait, Waiter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rq_models.plans import ManyOptions, Plan, Step

CONNECTIONS = 8
"""At most, for the commands of a client; threads that find all in use wait for one."""

T = TypeVar("T")


class ClientJob(WaitableJob):
    """A prediction: an RQ job that can be waited for."""

    client: Client | None = None

    def wait(self, timeout: float | None = None) -> Any:
        """Return the prediction as soon as it is there.

        Args:
            timeout: seconds; default: for ever. The job goes on when they are over.

        Raises:
            RqModelsError: the job failed (`InvalidInput`, `ModelFault`), or was cancelled, lost or deleted.
            TimeoutError: it has not ended by then.
            ValueError: it has ``result_ttl=0``, so there is nothing to wait for.
        """
        if self.client is None:
            raise RuntimeError("this job came from no client; get it by client.job(id)")
        return self.client.wait_all([self], timeout)[0]


class Client:
    """Enqueues predictions and waits for results. A context manager; threads may share it, and it survives a fork.

    Args:
        url: of Redis; default: the environment's ``REDIS_URL``, else what ``config/`` says.
        connection: a connection to use instead; it stays open when the client is closed.
        check_model: refuse to enqueue for a model that no worker ever published.
        check_worker: refuse to enqueue for a model that nobody serves now.
        check_input: refuse to enqueue an input that breaks the model's published schema.

    Raises:
        ConfigurationError: there is no address, or it is none.
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
        self._closed = False
        self._waiter = Waiter(self.connection)
        self._pid = os.getpid()
        self._planner = Planner(
            self.connection, ClientJob, self._watch, Checks(model=check_model, worker=check_worker, input=check_input)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; whoever waits in another thread gets a RuntimeError."""
        self._closed = True
        if self._pid == os.getpid():
            self._waiter.close()
        if self._owns_connection:
            self.connection.close()

    def enqueue(self, model: str, data: Any, **options: Unpack[Options]) -> ClientJob:
        """Enqueue one prediction.

        Args:
            model: its configured name.
            data: the input: JSON-able, or numpy, a dataclass or a pydantic object.
            options: RQ's own, by RQ's names; `job_id` among them.

        Raises:
            UnknownModel, NoWorker, InvalidInput: said before anything is queued.
            TypeError: there is no such option.
        """
        return self._adopt(self._run(self._planner.enqueue(model, [data], options, many=False)))[0]

    def enqueue_many(self, model: str, rows: Iterable[Any], **options: Unpack[ManyOptions]) -> list[ClientJob]:
        """Enqueue a prediction for each row, all of them or, if one is refused, none; see `enqueue`."""
        return self._adopt(self._run(self._planner.enqueue(model, rows, options)))

    def predict(self, model: str, data: Any, timeout: float | None = None, **options: Unpack[Options]) -> Any:
        """Enqueue one prediction and return its result.

        When it gives up (the timeout is over, or an interrupt comes), it takes the job back if it is still queued.

        Raises: what `enqueue` and `ClientJob.wait` do.
        """
        return self._run(self._planner.predict(model, [data], timeout, options, many=False))[0]

    def predict_many(
        self, model: str, rows: Iterable[Any], timeout: float | None = None, **options: Unpack[ManyOptions]
    ) -> list[Any]:
        """Enqueue a prediction for each row and return the results in the same order.

        The first that fails is raised, and what is still queued then is taken back; see `predict`.
        """
        return self._run(self._planner.predict(model, rows, timeout, options))

    def wait_all(
        self, jobs: Iterable[ClientJob], timeout: float | None = None, *, return_exceptions: bool = False
    ) -> list[Any]:
        """Return the results of the jobs, in their order.

        Args:
            jobs: of this client or another.
            timeout: seconds for all of them; default: for ever.
            return_exceptions: put exceptions among the results instead of raising the first that comes.

        Raises: what `ClientJob.wait` does.
        """
        return self._run(self._planner.wait_all(jobs, timeout, return_exceptions=return_exceptions))

    def as_completed(self, jobs: Iterable[ClientJob], timeout: float | None = None) -> Iterator[ClientJob]:
        """Yield each job when it has ended; its ``wait()`` then returns at once, or raises.

        Raises:
            TimeoutError: they have not all ended after so many seconds.
        """
        by_id, patience = {job.id: job for job in jobs}, Patience(timeout)
        with self._watch(by_id.values()) as wait:
            while wait.pending:
                for job_id, ended in self._run(self._planner.some_ended(wait, by_id, patience)).items():
                    by_id[job_id].ended = ended
                    yield by_id[job_id]

    def job(self, job_id: str) -> ClientJob:
        """Return a job by its id, in any process.

        Raises:
            JobNotFound: there is none.
        """
        return self._adopt([self._run(self._planner.fetch(job_id))])[0]

    def models(self) -> list[ModelStatus]:
        """Return every model that was ever published, its card and who serves it, sorted by name."""
        return self._run(reading())

    def _adopt(self, jobs: list[ClientJob]) -> list[ClientJob]:
        for job in jobs:
            job.client = self
        return jobs

    def _watch(self, jobs: Iterable[WaitableJob], *, queued: bool = True) -> ThreadWait:
        if self._pid != os.getpid():
            # The waits of the parent, and its socket, are the parent's.
            self._waiter, self._pid = Waiter(self.connection), os.getpid()
        return self._waiter.watch(jobs, queued=queued)

    def _run(self, plan: Plan[T]) -> T:
        answer: Any = None
        error: BaseException | None = None
        try:
            while True:
                step = plan.send(answer) if error is None else plan.throw(error)
                try:
                    answer, error = self._carry_out(step), None
                except BaseException as raised:  # noqa: BLE001 - an interrupt too: the plan may have to take jobs back
                    error = raised
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            error = None  # it holds this frame, which holds it

    def _carry_out(self, step: Step) -> Any:
        if self._closed:
            raise RuntimeError("this client is closed")
        if isinstance(step, Next):
            return step.wait.next(step.deadline)
        if isinstance(step, ByRq):
            return step.enqueue(self.connection)
        with self.connection.pipeline() as pipe:
            step(pipe)
            return pipe.execute()


def connected(client_class: Any, pool_class: Any, url: str | None) -> Any:
    """Return a connection, blocking or asyncio, with a bounded pool of its own.

    Args:
        client_class: redis-py's client.
        pool_class: redis-py's pool, which waits for a free connection.
        url: see `Client`.
    """
    # Read here, too: an application that sets REDIS_URL needs no configuration folder, nor the time to import pydantic.
    where = "url" if url else "REDIS_URL"
    address = url or os.environ.get("REDIS_URL")
    if not address:
        from rq_models.settings import Settings  # noqa: PLC0415 - as above

        try:
            address = Settings.load().redis_url
        except ConfigurationError as error:
            raise ConfigurationError(f"{error.message}; or pass Client(url), or set REDIS_URL") from None
    try:
        # With protocol 3 redis-py 8's asyncio pool hands out connections that the server has closed meanwhile.
        pool = pool_class.from_url(address, max_connections=CONNECTIONS, protocol=2)
    except ValueError:
        raise ConfigurationError(
            f'{where} is no Redis address; expected e.g. "redis://127.0.0.1:6379/0" (rediss:// for TLS)'
        ) from None
    return client_class.from_pool(pool)


def require_bytes(connection: Any) -> None:
    """Raise ConfigurationError if the connection decodes what it reads; RQ's job hashes hold compressed bytes."""
    if connection.connection_pool.connection_kwargs.get("decode_responses"):
        raise ConfigurationError("the connection has decode_responses=True; RQ needs one without")
