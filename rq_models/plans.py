"""The rules of both clients: what is checked, asked and written for each verb.

A plan is a generator that yields what it needs done and is sent what came of it: a function that fills a pipeline, for
the replies; `Next`, for a job that has ended; `ByRq`, for nothing. `Client` carries plans out blocking, `AsyncClient`
awaiting.
"""

from __future__ import annotations

import difflib
import math
import time
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypedDict, TypeVar, cast

from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.job import JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now

from rq_models.errors import JobNotFound, NoWorker, RqModelsError, UnknownModel
from rq_models.inputs import InputCheck, as_json
from rq_models.jobs import FUNCTION_PREFIX, ModelJob
from rq_models.registry import MODELS_KEY, Card, reading
from rq_models.results import BEGINNING, Ended, judge, value_of
from rq_models.waiting import UNREACHABLE, Book, Wait

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rq import Callback, Repeat, Retry, Webhook
    from rq.types import JobDependencyType

    from rq_models.registry import Fill

CARD_AGE = 2.0
"""Seconds that a client goes by what it has read of a model."""
PER_PIPELINE, BYTES_PER_PIPELINE = 1000, 1 << 23
"""Jobs in one transaction, and bytes of their inputs: meanwhile the server does nothing else."""
CANCELLED_TTL = 3600
"""Seconds that a job given up is kept."""
LOOK_AHEAD = 1000
"""Places of the queue in which a job that is late is looked for."""


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


class WaitableJob(ModelJob):
    """A prediction as its client knows it."""

    since: str | None = None
    ended: Ended | None = None
    """How it ended, if that was read and not yet asked for."""


J = TypeVar("J", bound=WaitableJob)
T = TypeVar("T")


class Next(NamedTuple):
    """Wait until one of the jobs has ended, or until the deadline (monotonic); answer: as `Waiter.next`."""

    wait: Any
    deadline: float


class ByRq(NamedTuple):
    """Enqueue these jobs by RQ's own methods: they depend on others, which takes several round trips."""

    jobs: Sequence[WaitableJob]
    at_front: bool

    def enqueue(self, connection: Any) -> None:
        """Do it, blocking."""
        for job in self.jobs:
            job.connection = connection
            _queue(job.origin, connection, type(job)).enqueue_job(job, at_front=self.at_front)


Step: TypeAlias = "Fill | Next | ByRq"
Plan: TypeAlias = Generator[Step, Any, T]


class Checks(NamedTuple):
    """Which checks come before enqueueing."""

    model: bool
    worker: bool
    input: bool


class _Known(NamedTuple):
    card: Card
    check: InputCheck
    queue: Queue  # made once: RQ's constructor costs more than the rest of an enqueueing
    until: float


class Planner(Generic[J]):
    """Makes plans for one client."""

    def __init__(self, connection: Any, job_class: type[J], watch: Callable[..., Wait], checks: Checks) -> None:
        self._connection = connection
        self._job_class = job_class
        self.watch = watch
        self._checks = checks
        self._known: dict[str, _Known] = {}

    def enqueue(self, model: str, rows: Iterable[Any], options: ManyOptions, *, many: bool = True) -> Plan[list[J]]:
        """Check and enqueue; nothing is queued if one of the rows is refused."""
        jobs = yield from self._prepare(model, rows, options, many=many)
        yield from self._submit(jobs, options)
        return jobs

    def predict(
        self, model: str, rows: Iterable[Any], timeout: float | None, options: ManyOptions, *, many: bool = True
    ) -> Plan[list[Any]]:
        """Enqueue and wait; whoever gives up takes back what is still queued."""
        patience = Patience(timeout)
        jobs = yield from self._prepare(model, rows, options, many=many)
        _require_results(jobs)
        with self.watch(jobs, queued=False) as wait:
            try:
                yield from self._submit(jobs, options, wait.knock)
                wait.queued()
                return (yield from self._collect(wait, jobs, patience, {}, return_exceptions=False))
            except (Exception, KeyboardInterrupt, SystemExit, CancelledError):
                with suppress(RedisError):
                    yield from self.cancel([job for job in jobs if job.id in wait.pending])
                raise

    def wait_all(self, jobs: Iterable[J], timeout: float | None, *, return_exceptions: bool) -> Plan[list[Any]]:
        """Wait for the results, in the order of the jobs."""
        patience = Patience(timeout)
        jobs = list(jobs)
        _require_results(jobs)
        known = {}
        for job in jobs:
            if job.ended is not None:
                known[job.id], job.ended = job.ended, None
        with self.watch([job for job in jobs if job.id not in known]) as wait:
            return (yield from self._collect(wait, jobs, patience, known, return_exceptions=return_exceptions))

    def some_ended(self, wait: Wait, jobs: Mapping[str, J], patience: Patience) -> Plan[dict[str, Ended]]:
        """Wait until at least one more of the jobs has ended; raise TimeoutError when patience has.

        Args:
            wait: for these jobs.
            jobs: by id.
            patience: how long.
        """
        got = yield Next(wait, patience.deadline)
        found = dict([got]) if got else (yield from self._last_look(wait, jobs, patience))
        for job_id in found:
            # It may be run again: then what is there already does not count.
            jobs[job_id].since = None
        return found

    def cancel(self, jobs: Sequence[J]) -> Plan[list[J]]:
        """Take back those of the jobs that are still queued, and return them."""
        if not jobs:
            return []

        def take_back(pipe: Any) -> None:
            for job in jobs:
                pipe.lrem(_queue_key(job), 1, job.id)

        counts = yield take_back
        taken = [job for job, count in zip(jobs, counts, strict=True) if count]

        def mark(pipe: Any) -> None:
            for job in taken:
                job.set_status(JobStatus.CANCELED, pipeline=pipe)
                # RQ never clears rq:canceled, and callers may give up often: so these are not listed there, and expire.
                pipe.expire(job.key, CANCELLED_TTL)

        if taken:
            yield mark
        return taken

    def fetch(self, job_id: str) -> Plan[J]:
        """Read a job."""
        nothing = JobNotFound(f"there is no job {job_id!r}: it was deleted, or it has expired", job_id=job_id)
        try:
            job = self._job_class(job_id, connection=self._connection)
        except (ValueError, TypeError):
            raise nothing from None
        (stored,) = yield lambda pipe: pipe.hgetall(job.key)
        try:
            job.restore(stored)
        except (NoSuchJobError, ValueError):
            raise nothing from None
        return job

    def status(self, job: J) -> Plan[JobStatus]:
        """Read the status of a job."""
        (status,) = yield lambda pipe: pipe.hget(job.key, "status")
        if status is None:
            raise JobNotFound(f"there is no job {job.id}: it was deleted, or it has expired", job_id=job.id)
        return JobStatus(status.decode())

    def _prepare(self, model: str, rows: Iterable[Any], options: ManyOptions, *, many: bool) -> Plan[list[J]]:
        known_options = (ManyOptions if many else Options).__annotations__
        if unknown := options.keys() - known_options.keys():
            raise TypeError(f"unknown option '{min(unknown)}'; there are: {', '.join(known_options)}")
        known = yield from self._look_up(model)
        inputs = []
        for index, row in enumerate(rows):
            name = f"rows[{index}]" if many else ""
            inputs.append(as_json(row, name))
            if self._checks.input:
                known.check.require(inputs[-1], name)
        return [self._job(known.card, known.queue, data, options) for data in inputs]

    def _look_up(self, model: str) -> Plan[_Known]:
        known = self._known.get(model)
        if known is not None and time.monotonic() < known.until:
            return known
        status = next(iter((yield from reading([model]))), None)
        if status is None and self._checks.model:
            (members,) = yield lambda pipe: pipe.smembers(MODELS_KEY)
            names = sorted(name.decode() for name in members)
            close = difflib.get_close_matches(model, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names) or 'none yet'}"
            raise UnknownModel(f"no worker ever published a model '{model}'; {hint}")
        if self._checks.worker and not (status and status.serving):
            raise NoWorker(f"nobody serves model '{model}' now; start a worker: rq-models worker {model}")
        card = status.card if status and status.card else Card(model)
        # The compiled check outlives the card, as long as the schema is the same.
        same = known is not None and known.card.input_schema == card.input_schema
        check = known.check if known is not None and same else InputCheck(card.input_schema)
        queue = _queue(model, self._connection, self._job_class)
        self._known[model] = fresh = _Known(card, check, queue, time.monotonic() + CARD_AGE)
        return fresh

    def _job(self, card: Card, queue: Queue, data: Any, options: ManyOptions) -> J:
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        given.pop("at_front", None)
        created = queue.create_job(
            FUNCTION_PREFIX + card.name,
            args=[data],
            timeout=given.pop("job_timeout", card.job_timeout),
            result_ttl=given.pop("result_ttl", card.result_ttl),
            failure_ttl=given.pop("failure_ttl", card.failure_ttl),
            # RQ's own default, for an empty one too, holds the arguments, which may be large, or private.
            description=given.pop("description", "") or card.name,
            meta=dict(given.pop("meta", {})),
            **given,
        )
        job = cast("J", created)
        if "retry" not in given and card.retries:
            # Without intervals it covers the system's faults only.
            job.retries_left = card.retries
        job.enqueued_at = now()
        if "job_id" not in given:
            job.since = BEGINNING
        return job

    def _submit(self, jobs: list[J], options: ManyOptions, knock: Callable[[Any], None] | None = None) -> Plan[None]:
        at_front = bool(options.get("at_front"))
        if options.get("depends_on"):
            yield ByRq(jobs, at_front)
            return
        # The first of them comes to stand at the front last.
        for chunk in _chunks(jobs[::-1] if at_front else jobs):

            def write(pipe: Any, chunk: list[J] = chunk) -> None:
                key, push = _queue_key(chunk[0]), pipe.lpush if at_front else pipe.rpush
                pipe.sadd(Queue.redis_queues_keys, key)
                for job in chunk:
                    job.save(pipeline=pipe)
                    job.cleanup(ttl=job.ttl, pipeline=pipe)
                    push(key, job.id)
                if knock is not None:
                    knock(pipe)

            yield write

    def _collect(
        self, wait: Wait, jobs: Sequence[J], patience: Patience, found: dict[str, Ended], *, return_exceptions: bool
    ) -> Plan[list[Any]]:
        by_id = {job.id: job for job in jobs}
        results: dict[str, Any] = {}
        while True:
            for job_id, ended in found.items():
                by_id[job_id].model_version = ended.entry.get(b"model_version", b"").decode() or None
                try:
                    results[job_id] = value_of(job_id, ended)
                except RqModelsError as error:
                    if not return_exceptions:
                        raise
                    results[job_id] = error
            if not wait.pending:
                return [results[job.id] for job in jobs]
            try:
                found = yield from self.some_ended(wait, by_id, patience)
            except TimeoutError as error:
                if not return_exceptions:
                    raise
                return [results.get(job.id, error) for job in jobs]

    def _last_look(self, wait: Wait, jobs: Mapping[str, J], patience: Patience) -> Plan[dict[str, Ended]]:
        left = [job for job_id, job in jobs.items() if job_id in wait.pending]
        first = left[0]

        def ask(pipe: Any) -> None:
            Book.ask(pipe, [job.id for job in left])
            pipe.lpos(_queue_key(first), first.id, maxlen=LOOK_AHEAD)

        try:
            *replies, place = yield ask
        except UNREACHABLE as error:
            raise TimeoutError(f"job {first.id} had not ended {patience}: Redis does not answer ({error})") from error
        found = {}
        for job, status, entries in zip(left, replies[::2], replies[1::2], strict=True):
            ended, _ = judge(status, entries)
            if ended is not None:
                found[job.id] = ended
                wait.drop(job.id)
        if found:
            return found
        where = "" if place is None else f", with {place} before it in the queue"
        others = f" ({len(left)} of {len(jobs)} jobs have not ended)" if len(jobs) > 1 else ""
        raise TimeoutError(f"job {first.id} of {first.origin} is still {replies[0].decode()} {patience}{where}{others}")


class Patience:
    """How long somebody waits, in seconds from now; None is for ever."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout

    def __str__(self) -> str:
        return f"after {self.timeout:g} s"


def _queue(name: str, connection: Any, job_class: type[ModelJob]) -> Queue:
    return Queue(name, connection=connection, job_class=job_class, serializer=JSONSerializer)


def _chunks(jobs: list[J]) -> Iterator[list[J]]:
    chunk, size = [], 0
    for job in jobs:
        chunk.append(job)
        size += len(job.data)
        if len(chunk) == PER_PIPELINE or size > BYTES_PER_PIPELINE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _queue_key(job: WaitableJob) -> str:
    return Queue.redis_queue_namespace_prefix + job.origin


def _require_results(jobs: Iterable[WaitableJob]) -> None:
    for job in jobs:
        if job.result_ttl == 0:
            raise ValueError(f"job {job.id} has result_ttl=0: its result is not kept, so nobody can wait for it")
