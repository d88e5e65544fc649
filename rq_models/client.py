"""The client: enqueue predictions and wait for their results."""

from __future__ import annotations

import copy
import difflib
import os
import time
import uuid
import zlib
from contextlib import suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, Unpack, cast

from redis import BlockingConnectionPool, Redis
from redis.exceptions import RedisError
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError
from rq.job import JOB_ID_PATTERN, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from rq_models.errors import ConfigurationError, InvalidJob, JobNotFound, NoWorker, UnknownModel
from rq_models.inputs import InputCheck, as_json
from rq_models.jobs import FUNCTION_PREFIX, ModelJob
from rq_models.registry import MODELS_KEY, Card, ModelStatus, read_model, read_models
from rq_models.results import BEGINNING, Ended, judge, value_of
from rq_models.waiting import UNREACHABLE, Wait, Waiter, look

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rq import Callback, Repeat, Retry, Webhook
    from rq.types import JobDependencyType

CONNECTIONS = 8
"""At most, for the commands of a client; threads that find all in use wait for one."""
CARD_AGE = 2.0
"""Seconds that a client goes by what it has read of a model."""
PER_SCRIPT, BYTES_PER_SCRIPT = 500, 8 << 20
"""Jobs, and bytes of input, enqueued in one step: meanwhile the server does nothing else."""
_ENQUEUE = files("rq_models").joinpath("enqueue.lua").read_text("utf-8")
_WORTH_COMPRESSING = 1024
CANCELLED_TTL = 3600
"""Seconds that a job given up is kept."""


class ManyOptions(TypedDict, total=False):
    """Options of several jobs, by RQ's names and with RQ's meaning; the defaults are the model's own settings."""

    job_timeout: int | str
    result_ttl: int
    failure_ttl: int
    ttl: int
    at_front: bool
    depends_on: JobDependencyType
    retry: Retry
    repeat: Repeat
    meta: dict[str, Any]
    description: str
    on_success: Callback
    on_failure: Callback
    on_stopped: Callback
    webhooks: Sequence[Webhook]


class Options(ManyOptions, total=False):
    """Options of one job."""

    job_id: str


class ClientJob(ModelJob):
    """A prediction: an RQ job that can be waited for."""

    client: Client | None = None
    shared: tuple[Any, ...] | None = None
    """Fields and values of its hash that all jobs made like this one have, as `_shared` returns them."""
    since: str | None = None
    """Id of the result stream's entry after which the result comes, or None if only Redis knows."""
    ended: Ended | None = None
    """How it ended, if that was read and not yet asked for."""

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

    def outcome(self) -> Any:
        """Return the result, or raise the error, of a job that has just ended."""
        ended, self.ended = self.ended, None
        return value_of(self.id, ended or Ended("missing"))


class _Known(NamedTuple):
    card: Card
    check: InputCheck
    queue: Queue  # made once: RQ's constructor costs more than the rest of an enqueueing
    until: float
    usual: list[ClientJob]
    """One made without options, when there is one: RQ's way to make another takes ten times as long as `_another`."""


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
        self.connection = connection if connection is not None else _connected(url)
        if self.connection.connection_pool.connection_kwargs.get("decode_responses"):
            raise ConfigurationError("the connection has decode_responses=True; RQ needs one without")
        self._check_model, self._check_worker, self._check_input = check_model, check_worker, check_input
        self._known: dict[str, _Known] = {}
        self._closed = False
        self._waiter, self._pid = Waiter(self.connection), os.getpid()

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
            options: RQ's own, by RQ's names; `job_id` among them. An id that exists is not enqueued again, whatever
                became of it: that job is returned.

        Raises:
            UnknownModel, NoWorker, InvalidInput: said before anything is queued.
            InvalidJob: the id is another model's job's.
            TypeError: there is no such option.
        """
        (job,) = jobs = self._prepare(model, [data], options, many=False)
        known = self._submit(jobs, options)
        return self.job(job.id) if known and "job_id" in options else job

    def enqueue_many(self, model: str, rows: Iterable[Any], **options: Unpack[ManyOptions]) -> list[ClientJob]:
        """Enqueue a prediction for each row, all of them or, if one is refused, none; see `enqueue`."""
        jobs = self._prepare(model, rows, options)
        self._submit(jobs, options)
        return jobs

    def predict(self, model: str, data: Any, timeout: float | None = None, **options: Unpack[Options]) -> Any:
        """Enqueue one prediction and return its result.

        When it gives up (the timeout is over, or an interrupt comes), it takes the job back if it is still queued.

        Raises: what `enqueue` and `ClientJob.wait` do.
        """
        return self._predict(self._prepare(model, [data], options, many=False), timeout, options)[0]

    def predict_many(
        self, model: str, rows: Iterable[Any], timeout: float | None = None, **options: Unpack[ManyOptions]
    ) -> list[Any]:
        """Enqueue a prediction for each row and return the results in the same order.

        The first that fails is raised, and what is still queued then is taken back; see `predict`.
        """
        return self._predict(self._prepare(model, rows, options), timeout, options)

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
        with self._watch(jobs, timeout) as wait:
            return self._collect(wait, return_exceptions=return_exceptions)

    def as_completed(self, jobs: Iterable[ClientJob], timeout: float | None = None) -> Iterator[ClientJob]:
        """Yield each job when it has ended; its ``wait()`` then returns at once, or raises.

        Raises:
            TimeoutError: they have not all ended after so many seconds.
        """
        with self._watch(jobs, timeout) as wait:
            while wait.pending:
                yield from self._waiter.next(wait) or self._last_look(wait)

    def job(self, job_id: str) -> ClientJob:
        """Return a job by its id, in any process.

        Raises:
            JobNotFound: there is none.
            InvalidJob: something stands there that can't be read.
        """
        nothing = JobNotFound(f"there is no job {job_id!r}: it was deleted, or it has expired", job_id=job_id)
        if not JOB_ID_PATTERN.fullmatch(str(job_id)):
            raise nothing
        try:
            job = cast("ClientJob", ClientJob.fetch(job_id, connection=self.connection))
        except NoSuchJobError:
            raise nothing from None
        except RedisError:
            raise
        except Exception as error:  # noqa: BLE001 - RQ's reader trusts every field, and anybody can write them
            raise InvalidJob(f"job {job_id!r} can't be read: {type(error).__name__}: {error}", job_id=job_id) from None
        job.client = self
        return job

    def models(self) -> list[ModelStatus]:
        """Return every model that was ever published, its card and who serves it, sorted by name."""
        return read_models(self.connection)

    # -- the rules, of `AsyncClient` too --------------------------------------------------------------------------

    def _prepare(self, model: str, rows: Iterable[Any], options: ManyOptions, *, many: bool = True) -> list[ClientJob]:
        """Check everything, and make the jobs."""
        if self._closed:
            raise RuntimeError("this client is closed")
        if many and "job_id" in options:
            raise TypeError("several jobs can't have one job_id")
        known = self._look_up(model)
        inputs = []
        for index, row in enumerate(rows):
            name = f"rows[{index}]" if many else ""
            inputs.append(as_json(row, name))
            if self._check_input:
                known.check.require(inputs[-1], name)
        if not inputs:
            return []
        if options:
            first = self._make(known, inputs[0], **options)
        else:
            if not known.usual:
                known.usual.append(self._make(known, None))
                known.usual[0].shared = _shared(known.usual[0])
            first = _another(known.usual[0], inputs[0])
            first.created_at = first.enqueued_at = now()
        return [first, *(_another(first, data) for data in inputs[1:])]

    def _look_up(self, model: str) -> _Known:
        known = self._known.get(model)
        if known is not None and time.monotonic() < known.until:
            return known
        status = read_model(self.connection, model)
        if status is None and self._check_model:
            names = sorted(name.decode() for name in cast("set[bytes]", self.connection.smembers(MODELS_KEY)))
            close = difflib.get_close_matches(model, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names) or 'none yet'}"
            raise UnknownModel(f"no worker ever published a model '{model}'; {hint}")
        if self._check_worker and not (status and status.serving):
            raise NoWorker(f"nobody serves model '{model}' now; start a worker: rq-models worker {model}")
        card = status.card if status and status.card else Card(model)
        # The compiled check outlives the card, as long as the schema is the same.
        same = known is not None and known.card.input_schema == card.input_schema
        check = known.check if known is not None and same else InputCheck(card.input_schema)
        queue = Queue(model, connection=self.connection, job_class=ClientJob, serializer=JSONSerializer)
        self._known[model] = fresh = _Known(card, check, queue, time.monotonic() + CARD_AGE, [])
        return fresh

    def _make(self, known: _Known, data: Any, **given: Any) -> ClientJob:
        given.pop("at_front", None)
        card = known.card
        created = known.queue.create_job(
            FUNCTION_PREFIX + card.name,
            args=[data],
            timeout=given.pop("job_timeout", card.job_timeout),
            result_ttl=given.pop("result_ttl", card.result_ttl),
            failure_ttl=given.pop("failure_ttl", card.failure_ttl),
            # RQ's own default, for an empty one too, holds the arguments, which may be large, or private.
            description=given.pop("description", "") or card.name,
            **given,
        )
        job = cast("ClientJob", created)
        if not given.get("retry") and card.retries:
            # Without intervals it covers the system's faults only.
            job.retries_left = card.retries
        job.enqueued_at = now()
        job._status = JobStatus.QUEUED  # noqa: SLF001 - as RQ's own queues do before they save it
        job.client, job.since = self, BEGINNING
        return job

    def _submit(self, jobs: list[ClientJob], options: ManyOptions, wait: Wait | None = None) -> int:
        """Enqueue jobs, and return how many were there already."""
        known = 0
        if options.get("depends_on"):
            for job in jobs:
                # RQ watches the others, which takes several round trips.
                self._known[job.origin].queue.enqueue_job(job, at_front=bool(options.get("at_front")))
        for command in self._commands(jobs, options):
            with self.connection.pipeline(transaction=False) as pipe:
                pipe.execute_command(*command)
                if wait is not None:
                    self._waiter.knock(pipe)
                known += pipe.execute()[0]
        if known and "job_id" in options:
            (job,) = jobs
            origin = self.job(job.id).origin
            if origin != job.origin:
                raise InvalidJob(f"job id {job.id!r} is in use by a job of {origin}; choose another", job_id=job.id)
        if wait is not None:
            self._waiter.queued(wait)
        return known

    def _commands(self, jobs: list[ClientJob], options: ManyOptions) -> list[list[Any]]:
        """Return what enqueues jobs that differ in their id and input only; see enqueue.lua."""
        commands: list[list[Any]] = []
        if not jobs or options.get("depends_on"):
            return commands
        first = jobs[0]
        room = longest = 0
        times = ("created_at", utcformat(first.created_at), "enqueued_at", utcformat(first.enqueued_at or now()))
        flat = (*(first.shared or _shared(first)), *times)
        push = "LPUSH" if options.get("at_front") else "RPUSH"
        keys = (Queue.redis_queue_namespace_prefix + first.origin, Queue.redis_queues_keys)
        # The first of them comes to stand at the front last.
        for job in reversed(jobs) if push == "LPUSH" else jobs:
            # RQ reads both; for a small input, compressing takes longer than it saves.
            data = job.data if len(job.data) < _WORTH_COMPRESSING else zlib.compress(job.data)
            if room < len(data) or len(commands[-1]) >= longest:
                commands.append(["EVAL", _ENQUEUE, 2, *keys, RQ_KEY_PREFIX, push, first.ttl or 0, len(flat), *flat])
                room, longest = BYTES_PER_SCRIPT, len(commands[-1]) + 2 * PER_SCRIPT
            commands[-1] += (job.id, data)
            room -= len(data)
        return commands

    def _predict(self, jobs: list[ClientJob], timeout: float | None, options: ManyOptions) -> list[Any]:
        # It joins first, so that what enqueues also reads, or calls whoever reads.
        with self._watch(jobs, timeout, queued=False) as wait:
            try:
                commands = self._commands(jobs, options)
                alone = len(commands) == 1 and "job_id" not in options
                if not alone or not self._waiter.enqueue(wait, commands[0]):
                    self._submit(jobs, options, wait)
                return self._collect(wait)
            except BaseException:
                self._give_up(wait)
                raise

    def _collect(self, wait: Wait, *, return_exceptions: bool = False) -> list[Any]:
        try:
            while wait.pending:
                wait.settle(self._waiter.next(wait) or self._last_look(wait), return_exceptions=return_exceptions)
        except TimeoutError as error:
            if not return_exceptions:
                raise
            return wait.outcomes(error)
        return wait.outcomes()

    def _watch(self, jobs: Iterable[ClientJob], timeout: float | None, **how: Any) -> Wait:
        jobs = list(jobs)
        for job in jobs:
            if job.result_ttl == 0:
                raise ValueError(f"job {job.id} has result_ttl=0: its result is not kept, so nobody can wait for it")
        if self._pid != os.getpid():
            # The waits of the parent, and its socket, are the parent's.
            self._waiter, self._pid = Waiter(self.connection), os.getpid()
        return Wait(self._waiter, jobs, timeout, **how)

    def _last_look(self, wait: Wait) -> list[ClientJob]:
        """Return the jobs that have ended after all, or raise TimeoutError."""
        after = f"after {wait.timeout:g} s"
        try:
            seen = look(self.connection, [job_id for job_id in wait.jobs if job_id in wait.pending])
        except UNREACHABLE as error:
            raise TimeoutError(
                f"{len(wait.pending)} jobs had not ended {after}: Redis does not answer ({error})"
            ) from error
        for job_id, status, entries in seen:
            ended, _ = judge(status, entries)
            if ended is not None:
                wait.found[job_id] = ended
        ended_jobs = self._waiter.take(wait)
        if not ended_jobs:
            job_id, status, _ = seen[0]
            others = f" ({len(seen)} of {len(wait.jobs)} jobs have not ended)" if len(wait.jobs) > 1 else ""
            raise TimeoutError(f"job {job_id} of {wait.jobs[job_id].origin} is still {status.decode()} {after}{others}")
        return ended_jobs

    def _give_up(self, wait: Wait) -> None:
        """Take back what is still queued."""
        with suppress(RedisError):
            self._take_back([wait.jobs[job_id] for job_id in wait.pending])

    def _take_back(self, jobs: list[ClientJob]) -> list[ClientJob]:
        """Cancel those of the jobs that are still queued, and return them."""
        with self.connection.pipeline() as pipe:
            for job in jobs:
                pipe.lrem(Queue.redis_queue_namespace_prefix + job.origin, 1, job.id)
            taken = [job for job, count in zip(jobs, pipe.execute(), strict=True) if count]
            for job in taken:
                job.set_status(JobStatus.CANCELED, pipeline=pipe)
                # RQ never clears rq:canceled, and callers may give up often: so these are not listed there, and expire.
                pipe.expire(job.key, CANCELLED_TTL)
            pipe.execute()
        return taken


def _shared(job: ClientJob) -> tuple[Any, ...]:
    """Return the fields of a job's hash, and their values, but for its input and its times."""
    bare = copy.copy(job)
    bare._data = b""  # noqa: SLF001 - RQ would compress the input, for nothing
    fields = {
        name: value for name, value in bare.to_dict().items() if name not in ("data", "created_at", "enqueued_at")
    }
    return tuple(part for pair in fields.items() for part in pair)


def _another(first: ClientJob, data: Any) -> ClientJob:
    """Return a job like the first one, for another input; RQ's own way to make one takes ten times as long."""
    job = copy.copy(first)
    job._id = str(uuid.uuid4())  # noqa: SLF001 - the setter looks at each character of it
    job.args = [data]
    job.meta = dict(first.meta)
    return job


def _connected(url: str | None) -> Redis:
    """Return a connection with a bounded pool of its own."""
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
        return Redis.from_pool(BlockingConnectionPool.from_url(address, max_connections=CONNECTIONS))
    except ValueError:
        raise ConfigurationError(
            f'{where} is no Redis address; expected e.g. "redis://127.0.0.1:6379/0" (rediss:// for TLS)'
        ) from None
