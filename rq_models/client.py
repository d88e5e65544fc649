"""The client: enqueue predictions and wait for their results."""

from __future__ import annotations

import copy
import difflib
import os
import re
import time
import uuid
import zlib
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from importlib.resources import files
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, TypeVar, Unpack, cast

from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry as ConnectionRetry
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError
from rq.job import JOB_ID_PATTERN, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from rq_models.errors import ConfigurationError, InvalidJob, JobNotFound, NoWorker, QueueFull, UnknownModel
from rq_models.health import FATAL, UNREACHABLE, place, refusal
from rq_models.inputs import InputCheck, as_json
from rq_models.jobs import FUNCTION_PREFIX, ModelJob, require_size
from rq_models.line import exchange
from rq_models.registry import MODELS_KEY, Card, ModelStatus, handed_key, read_model, read_models
from rq_models.results import BEGINNING, Ended, judge, value_of
from rq_models.scoring.run import Run, ScoreOptions, begin
from rq_models.scoring.runs import read_all
from rq_models.waiting import FIRST_PAUSE, HURRY, LONGEST_PAUSE, Wait, Waiter, look

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rq import Callback, Repeat, Retry, Webhook
    from rq.types import JobDependencyType

CONNECTIONS = 8
"""At most, for the commands of a client; threads that find all in use wait for one."""
PATIENCE = 30.0
RENEWING = 5.0
"""Seconds after an outage within which the workers have said again that they serve."""
CARD_AGE = 2.0
"""Seconds that a client goes by what it has read of a model."""
PER_SCRIPT, BYTES_PER_SCRIPT = 500, 8 << 20
"""Jobs, and bytes of input, enqueued in one step: meanwhile the server does nothing else."""
_ENQUEUE = files("rq_models").joinpath("enqueue.lua").read_text("utf-8")
_TAKE_BACK = files("rq_models").joinpath("take_back.lua").read_text("utf-8")
_QUEUE_FULL = re.compile(r"QUEUEFULL (\d+)$")
_WORTH_COMPRESSING = 1024
_LONGEST_DEADLINE = 10**9
_HURRIED = 5.0
"""Seconds; who has less does not ask by a connection that may wait as long for an answer."""
CANCELLED_TTL = 3600
"""Seconds that a job given up is kept."""
NOBODY_WAITS: ContextVar[threading.Event | None] = ContextVar("nobody_waits", default=None)
"""Set when whoever asked has left, which a thread that asks for him can't notice by itself."""
T = TypeVar("T")


class ManyOptions(TypedDict, total=False):
    """Options of several jobs, by RQ's names and with RQ's meaning; the defaults are the model's own settings.

    `deadline` is ours: seconds after which the job is not run any more.
    """

    job_timeout: int | str
    result_ttl: int
    failure_ttl: int
    ttl: int
    at_front: bool
    depends_on: JobDependencyType
    retry: Retry
    repeat: Repeat
    deadline: float
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
    deadline: float | None = None
    """The time after which it is not run any more, as this client has set it."""
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

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        """Return the fields of its hash."""
        fields = super().to_dict(include_meta, include_result)
        return fields if self.deadline is None else {**fields, "deadline": f"{self.deadline:.3f}"}

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
        check_input: refuse to enqueue an input that breaks the model's published schema, or is too large.
        patience: seconds for which a Redis that is away is asked again before its error is raised; a `predict` that has
            a timeout is not patient for longer. A job enqueued again because the answer was lost is enqueued once.

    Raises:
        ConfigurationError: there is no address, or it is none.
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
        self._patience, self._disturbed = patience, -RENEWING
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
                became of it: that job is returned. And `deadline`: a job whose turn has not come after so many seconds
                is not run any more and fails, with `DeadlineExceeded`.

        Raises:
            UnknownModel, NoWorker, InvalidInput, QueueFull: said before anything is queued.
            InvalidJob: the id is another model's job's.
            TypeError: there is no such option.
            ValueError: the deadline is no number of seconds.
        """
        (job,) = jobs = self._prepare(model, [data], options, many=False)
        known = self._submit(jobs, options)
        return self.job(job.id) if known and "job_id" in options else job

    def enqueue_many(self, model: str, rows: Iterable[Any], **options: Unpack[ManyOptions]) -> list[ClientJob]:
        """Enqueue a prediction for each row, all of them or, if one is refused, none; see `enqueue`.

        They go by the `PER_SCRIPT`: an error of Redis in the middle of more may leave the first ones queued.
        """
        jobs = self._prepare(model, rows, options)
        self._submit(jobs, options)
        return jobs

    def predict(self, model: str, data: Any, timeout: float | None = None, **options: Unpack[Options]) -> Any:
        """Enqueue one prediction and return its result.

        When it gives up (the timeout is over, or an interrupt comes), it takes the job back if it is still queued.

        Raises: what `enqueue` and `ClientJob.wait` do.
        """
        began = time.monotonic()
        return self._predict(self._prepare(model, [data], options, timeout, many=False), timeout, options, began)[0]

    def predict_many(
        self, model: str, rows: Iterable[Any], timeout: float | None = None, **options: Unpack[ManyOptions]
    ) -> list[Any]:
        """Enqueue a prediction for each row and return the results in the same order.

        The first that fails is raised, and what is still queued then is taken back; see `predict`.
        """
        began = time.monotonic()
        return self._predict(self._prepare(model, rows, options, timeout), timeout, options, began)

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
            job = cast("ClientJob", self._ask(lambda: ClientJob.fetch(job_id, connection=self.connection)))
        except NoSuchJobError:
            raise nothing from None
        except RedisError:
            raise
        except Exception as error:  # noqa: BLE001 - RQ's reader trusts every field, and anybody can write them
            raise InvalidJob(f"job {job_id!r} can't be read: {type(error).__name__}: {error}", job_id=job_id) from None
        job.client = self
        return job

    def score(
        self,
        model: str,
        input: str | os.PathLike[str],  # noqa: A002 - what it is
        output: str | os.PathLike[str],
        **options: Unpack[ScoreOptions],
    ) -> Run:
        """Begin to score a file, or go on with it if it was begun before; return at once.

        Each row of the input is predicted by the model's ordinary workers, between the predictions that are enqueued
        singly. What it is to become stands in the output when all of it is done, and not before.

        Args:
            model: its name.
            input: CSV, JSON Lines (both also with ``.gz``) or Parquet: a path that the workers have, too, or an address
                that fsspec knows.
            output: likewise; rows that fail go to ``<output>.errors.jsonl``.
            options: see `ScoreOptions`.

        Raises:
            UnknownModel: no worker ever served it.
            NoWorker: none serves it now.
            InvalidRun: an address holds a password, or what was begun before is something else (`RunConflict`).
        """
        self._look_up(model)
        return begin(self.connection, self._ask, model, input, output, options)

    def run(self, run: str) -> Run:
        """Return a run by its id, in any process, or raise UnknownRun."""
        found = Run(self.connection, self._ask, run)
        found.progress()
        return found

    def runs(self) -> list[Run]:
        """Return the runs of the last 30 days, the latest first."""
        return [Run(self.connection, self._ask, one.id) for one in self._ask(lambda: list(read_all(self.connection)))]

    def models(self) -> list[ModelStatus]:
        """Return every model that was ever published, its card and who serves it, sorted by name."""
        return self._ask(lambda: read_models(self.connection))

    # -- the rules, of `AsyncClient` too --------------------------------------------------------------------------

    def _ask(self, call: Callable[[], T], limit: float | None = None) -> T:
        """Return what a call returns; while Redis is away it is made again, for as long as this client is patient.

        It must do no harm when it is made twice: if only the answer was lost, it has been done.
        """
        until = time.monotonic() + (self._patience if limit is None else min(limit, self._patience))
        pause = FIRST_PAUSE
        while True:
            try:
                return call()
            except UNREACHABLE as error:
                self._disturbed = time.monotonic()
                if isinstance(error, FATAL):
                    raise self._said(error) from None
                if self._disturbed + pause >= until or _nap(pause):
                    raise
            except ResponseError as error:
                raise self._said(error) from None
            pause = min(2 * pause, LONGEST_PAUSE)

    def _prepare(
        self,
        model: str,
        rows: Iterable[Any],
        options: ManyOptions,
        limit: float | None = None,
        *,
        many: bool = True,
    ) -> list[ClientJob]:
        """Check everything, and make the jobs; with Redis away, wait no longer than the limit."""
        if self._closed:
            raise RuntimeError("this client is closed")
        if many and "job_id" in options:
            raise TypeError("several jobs can't have one job_id")
        known = self._look_up(model, limit)
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
        jobs = [first, *(_another(first, data) for data in inputs[1:])]
        if self._check_input and known.card.max_input_bytes is not None:
            _require_sizes(jobs, known.card.max_input_bytes, many=many)
        return jobs

    def _look_up(self, model: str, limit: float | None = None) -> _Known:
        known = self._known.get(model)
        if known is not None and time.monotonic() < known.until:
            return known
        hurried = limit is not None and limit < _HURRIED
        connection = self._waiter.hasty if hurried else self.connection
        status = self._ask(lambda: read_model(connection, model), limit)
        while status and not status.serving and self._check_worker and time.monotonic() < self._disturbed + RENEWING:
            # The workers have been cut off, too, and come back as soon as this client.
            if _nap(LONGEST_PAUSE / 10):
                break
            status = self._ask(lambda: read_model(connection, model), limit)
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
        seconds = given.pop("deadline", None)
        if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds <= _LONGEST_DEADLINE):
            raise ValueError(f"deadline must be a number of seconds, more than 0, not {seconds!r:.80}")
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
        job.deadline = None if seconds is None else time.time() + seconds
        job._status = JobStatus.QUEUED  # noqa: SLF001 - as RQ's own queues do before they save it
        job.client, job.since = self, BEGINNING
        return job

    def _submit(self, jobs: list[ClientJob], options: ManyOptions, wait: Wait | None = None) -> int:
        """Enqueue jobs, and return how many were there already."""
        known = 0
        if options.get("depends_on") and jobs:
            to = self._known[jobs[0].origin]
            if to.card.max_queued is not None and (waiting := to.queue.count) + len(jobs) > to.card.max_queued:
                raise self._full(jobs, waiting)
            at_front = bool(options.get("at_front"))
            known = sum(self._ask(partial(self._enqueue_dependent, to.queue, job, at_front=at_front)) for job in jobs)
        for command in self._commands(jobs, options):
            limit = None if wait is None else wait.deadline - time.monotonic()
            try:
                known += self._ask(partial(self._send, command, wait), limit)
            except ResponseError as error:
                raise self._refusal(jobs, error) from None
        if known and "job_id" in options:
            (job,) = jobs
            origin = self.job(job.id).origin
            if origin != job.origin:
                raise InvalidJob(f"job id {job.id!r} is in use by a job of {origin}; choose another", job_id=job.id)
        if wait is not None:
            self._waiter.queued(wait)
        return known

    def _send(self, command: list[Any], wait: Wait | None) -> int:
        knock = self._waiter.knock() if wait is not None else ()
        return cast("int", exchange(self.connection, command, *knock)[0])

    def _enqueue_dependent(self, queue: Queue, job: ClientJob, *, at_front: bool) -> int:
        """Let RQ enqueue it, who watches the jobs it depends on; it does not look whether there is one of this id."""
        if self.connection.exists(job.key):
            return 1
        queue.enqueue_job(job, at_front=at_front)
        return 0

    def _refusal(self, jobs: list[ClientJob], error: ResponseError) -> Exception:
        """Return what the caller is told when the server refuses to enqueue the jobs."""
        full = _QUEUE_FULL.search(str(error))
        return self._full(jobs, int(full[1])) if full else self._said(error)

    def _said(self, error: RedisError) -> RedisError:
        """Return an error of the same class that says in a sentence what to change; or itself, if it is a rare one."""
        said = refusal(error, place(self.connection))
        return type(error)(said) if said else error

    def _full(self, jobs: list[ClientJob], waiting: int) -> QueueFull:
        model, number = jobs[0].origin, len(jobs)
        most = self._known[model].card.max_queued
        return QueueFull(
            f"model '{model}': {waiting} jobs wait and {number} more would be over max_queued, which is {most}; "
            "try again later, or start more workers"
        )

    def _commands(self, jobs: list[ClientJob], options: ManyOptions) -> list[list[Any]]:
        """Return what enqueues jobs that differ in their id and input only; see enqueue.lua."""
        commands: list[list[Any]] = []
        if not jobs or options.get("depends_on"):
            return commands
        first = jobs[0]
        room = longest = 0
        created = utcformat(first.created_at)
        same = first.enqueued_at is first.created_at
        times = ("created_at", created, "enqueued_at", created if same else utcformat(first.enqueued_at or now()))
        flat = (*(first.shared or _shared(first)), *times)
        push = "LPUSH" if options.get("at_front") else "RPUSH"
        limit = self._known[first.origin].card.max_queued
        # The first script decides for all of them.
        most: int | str = "" if limit is None else limit - len(jobs)
        keys = (Queue.redis_queue_namespace_prefix + first.origin, Queue.redis_queues_keys)
        # The first of them comes to stand at the front last.
        for job in reversed(jobs) if push == "LPUSH" else jobs:
            # RQ reads both; for a small input, compressing takes longer than it saves.
            data = job.data if len(job.data) < _WORTH_COMPRESSING else zlib.compress(job.data)
            if room < len(data) or len(commands[-1]) >= longest:
                start = ["EVAL", _ENQUEUE, 2, *keys, RQ_KEY_PREFIX, push, first.ttl or 0, most, len(flat), *flat]
                commands.append(start)
                most = ""
                room, longest = BYTES_PER_SCRIPT, len(commands[-1]) + 2 * PER_SCRIPT
            commands[-1] += (job.id, data)
            room -= len(data)
        return commands

    def _predict(self, jobs: list[ClientJob], timeout: float | None, options: ManyOptions, began: float) -> list[Any]:
        # It joins first, so that what enqueues also reads, or calls whoever reads.
        with self._watch(jobs, timeout, queued=False, since=began) as wait:
            known = 0
            try:
                commands = self._commands(jobs, options)
                alone = len(commands) == 1 and "job_id" not in options
                try:
                    if not alone or not self._waiter.enqueue(wait, commands[0]):
                        known = self._submit(jobs, options, wait)
                except ResponseError as error:
                    raise self._refusal(jobs, error) from None
                return self._collect(wait)
            except QueueFull:
                # There is nothing to take back, and to look for it in a long queue would be work at the worst time.
                raise
            except BaseException:
                if not (known and "job_id" in options):
                    # Else somebody has enqueued it before, who may wait for it.
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
        if time.monotonic() < self._waiter.silent_until:
            raise TimeoutError(f"{len(wait.pending)} jobs had not ended {after}: Redis does not answer")
        try:
            seen = look(self._waiter.hasty, [job_id for job_id in wait.jobs if job_id in wait.pending])
        except UNREACHABLE as error:
            self._waiter.silent_until = time.monotonic() + HURRY
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
        if time.monotonic() < self._waiter.silent_until:
            return
        with suppress(RedisError):
            self._take_back([wait.jobs[job_id] for job_id in wait.pending], self._waiter.hasty)

    def _take_back(self, jobs: list[ClientJob], connection: Redis | None = None) -> list[ClientJob]:
        """Cancel those of the jobs that are still queued, and return them."""
        taken: list[ClientJob] = []
        for some in (jobs[at : at + PER_SCRIPT] for at in range(0, len(jobs), PER_SCRIPT)):
            lists = [(Queue.redis_queue_namespace_prefix + job.origin, handed_key(job.origin)) for job in some]
            arguments: list[Any] = [RQ_KEY_PREFIX, CANCELLED_TTL, *(job.id for job in some)]
            answers = (connection or self.connection).eval(_TAKE_BACK, 2 * len(some), *chain(*lists), *arguments)
            taken += [job for job, answer in zip(some, cast("list[int]", answers), strict=True) if answer]
        return taken


def _nap(seconds: float) -> bool:
    """Sleep; return whether nobody waits for the end of it any more."""
    left = NOBODY_WAITS.get()
    if left is not None:
        return left.wait(seconds)
    time.sleep(seconds)
    return False


def _require_sizes(jobs: list[ClientJob], most: int, *, many: bool) -> None:
    for index, job in enumerate(jobs):
        # Most are far from it, and cost no more than this.
        if len(job.data) > most:
            require_size(job.data, job.origin, most, f"rows[{index}]" if many else "input")


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
        # The client itself knows what may be asked again, and for how long.
        retry = ConnectionRetry(NoBackoff(), 0)
        return Redis.from_pool(BlockingConnectionPool.from_url(address, max_connections=CONNECTIONS, retry=retry))
    except ValueError:
        raise ConfigurationError(
            f'{where} is no Redis address; expected e.g. "redis://127.0.0.1:6379/0" (rediss:// for TLS)'
        ) from None
