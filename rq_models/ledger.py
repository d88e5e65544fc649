"""The ledger: a run of a job is entered in Redis by one script and closed by another, however many jobs come together.

Both scripts are beside this file. Round trips are what a queue costs, and one step is what makes a kill harmless: a job
is queued or started, started or ended, and never in between. A job passes here as its stored fields; an `rq.job.Job` is
made of them only where RQ's own methods are needed, because that costs more than the rest of its way.
"""

from __future__ import annotations

import base64
import json
import math
import time
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution
from rq.job import JobStatus
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, parse_timeout, utcformat

from rq_models.jobs import ModelJob
from rq_models.line import Script
from rq_models.registry import BUCKETS, CARD_TTL, counters_key, handed_key, lease_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis import Redis
    from rq.queue import Queue

    from rq_models.errors import RqModelsError

_HERE = files("rq_models")
GIVEN_UP, DONE, HAS_DEPENDENTS, UNWRITABLE = 0, 1, 2, 3
"""What `Ledger.closed` says of each run."""
_CLAIM_SECONDS = 3600
_encode = json.JSONEncoder().encode
_LARGEST = 10**9
"""Seconds; Redis refuses expiries that overflow, in the middle of a script."""
_CALLBACKS = (b"success_callback_name", b"failure_callback_name", b"stopped_callback_name")
# RQ saves these with every job, empty if unset; a foreign producer may have left them out.
_ALWAYS = (*_CALLBACKS, b"group_id")
# What only RQ's own methods know how to finish.
_HANGING = (*_ALWAYS, b"webhooks", b"repeats_left", b"rate_limit_key")
_FIELDS = (
    *_HANGING,
    b"timeout",
    b"result_ttl",
    b"failure_ttl",
    b"retries_left",
    b"retry_intervals",
    b"enqueue_at_front_on_retry",
    b"enqueued_at",
    b"dependency_ids",
    b"deadline",
    b"status",
)
"""What is read of every job, beside its data, the number of its runs and that of its deaths."""
_READ = (b"data", b"attempts", b"deaths", *_FIELDS)
LEASE_LENGTH = 12
"""Characters of a lease's name, hexadecimal digits: by them its runs are known from those of stock workers."""
DEATHS = 3
"""Workers that may die of a job that they run alone."""


def _script(name: str) -> str:
    # Constants of a script cost the server nothing, arguments a microsecond for each three.
    fields = ", ".join(f"'{field.decode()}'" for field in _FIELDS)
    source = _HERE.joinpath(name).read_text("utf-8").replace("$FIELDS", fields)
    # Lua counts from one.
    numbers = {"$HANGING": len(_HANGING), "$STATUS": _READ.index(b"status") + 1, "$LEASE_LENGTH": LEASE_LENGTH}
    for constant, number in numbers.items():
        source = source.replace(constant, str(number))
    return source


@dataclass(eq=False)
class Taken:
    """A job in hand, and this run of it.

    Attributes:
        id: the job's.
        run: the execution's id.
        fields: of the job's hash as it was stored, `_FIELDS` of a plain job, and all of another.
        at: when it was taken.
        started_at, ended_at: of the prediction, with the rest of its batch.
        model_version: of the model that ran it.
        is_plain: whether nothing hangs on this job but itself; its dependents only finish.lua can see.
        is_suspect: whether it is written down that the worker has no other job in hand.
    """

    id: str
    run: str
    fields: dict[bytes, bytes | None]
    at: datetime
    worker: str
    queue: str
    connection: Redis
    started_at: datetime = field(init=False)
    ended_at: datetime = field(init=False)
    model_version: str | None = None
    is_plain: bool = True
    is_suspect: bool = False

    def __post_init__(self) -> None:
        self.started_at = self.ended_at = self.at

    def number(self, name: bytes) -> int | None:
        """Return a stored number, None if there is none; RQ writes timeouts as ``"1h"``, too.

        Raises:
            ValueError: it is no number, or too large for one of seconds.
        """
        raw = self.fields.get(name)
        return _number(raw, name) if raw else None

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed.

        Raises:
            ValueError: that is no time.
        """
        raw = self.fields.get(b"deadline")
        if not raw:
            return False
        try:
            deadline = float(raw)
        except ValueError:
            deadline = math.nan
        if not math.isfinite(deadline):
            raise ValueError(f"its deadline is {raw[:40]!r}, not a time in seconds")
        return deadline < time.time()

    @cached_property
    def execution(self) -> Execution:
        """The record of this run, for RQ's own methods."""
        execution = Execution(self.run, self.id, self.connection, worker_name=self.worker)
        execution.created_at = execution.last_heartbeat = self.at
        return execution

    @cached_property
    def job(self) -> ModelJob:
        """The job, for RQ's own methods; of what can't be read, only the data is left."""
        job = ModelJob(self.id, connection=self.connection)
        try:
            job.restore(self.connection.hgetall(job.key) if self.is_plain else self.fields)
        except RedisError:
            raise
        except Exception:  # noqa: BLE001 - whatever stands in Redis, it is this job's failure only
            job.data = self.fields.get(b"data") or b""
        job.origin = self.queue
        job._status = JobStatus.STARTED  # noqa: SLF001 - the script has written it, as prepare_for_execution does
        job.started_at = job.last_heartbeat = self.at
        job.worker_name = self.worker
        self.execution._job = job  # noqa: SLF001 - as RQ's own Execution.create does
        return job


@dataclass(eq=False)
class Ending:
    """How a run ends.

    Attributes:
        status: ``finished``, ``failed``, ``stopped`` or ``queued``, which is a retry.
        ttl: seconds to keep the job and its result; -1 for ever.
        value: the output of a finished job, or the error record of a failed one.
        put_back: the run was given up undecided: a retry that costs none, at the front.
        behind: but at the back.
        error: the failure itself.
    """

    taken: Taken
    status: JobStatus
    ttl: int = 0
    value: Any = None
    error: RqModelsError | None = None
    put_back: bool = False
    behind: bool = False

    @property
    def exc_string(self) -> str | None:
        """The failure as RQ shows it."""
        if self.error is None:
            return None
        return self.error.traceback or f"{type(self.error).__name__}: {self.error}"

    def counters(self) -> list[str]:
        """Return the names of the model's counters that this run raises."""
        if self.put_back:
            return []
        taken = self.taken
        seconds = (taken.ended_at - taken.started_at).total_seconds()
        return [self.counter, *self.waited, f"model:{_bucket(seconds)}"]

    @property
    def counter(self) -> str:
        """Name of the counter of such ends."""
        return "predictions" if self.status == JobStatus.FINISHED else f"failures:{type(self.error).__name__}"

    @property
    def waited(self) -> tuple[str, ...]:
        """Name of the counter of jobs that waited as long, if it is known."""
        queued = _instant(self.taken.fields.get(b"enqueued_at") or b"")
        return (f"wait:{_bucket((self.taken.at - queued).total_seconds())}",) if queued else ()


class Ledger:
    """The runs of one worker.

    Args:
        connection: a client that never repeats a command by itself: a repeated take would take the next jobs.
        queue: the one queue.
        worker: the worker's name.
        lease: the prefix of its execution ids.
    """

    def __init__(self, connection: Redis, queue: Queue, worker: str, lease: str) -> None:
        self.connection = connection
        self._queue = queue.name
        self._worker = worker
        self._lease = lease
        self._runs = 0
        self._suspect = self._closes_first = False
        self._at = now()
        self._take = Script(connection, _script("take.lua"))
        self._finish = Script(connection, _script("finish.lua"))
        self._recover = Script(connection, _script("recover.lua"))
        self._list = queue.key
        self._handed = handed_key(queue.name)
        self._worker_key = f"{RQ_KEY_PREFIX}:worker:{worker}"
        self._executions = f"{self._worker_key}:executions"
        self._wip = f"{RQ_KEY_PREFIX}:wip:{queue.name}"
        self._finished = f"{RQ_KEY_PREFIX}:finished:{queue.name}"
        self._failed = f"{RQ_KEY_PREFIX}:failed:{queue.name}"
        self._counters = counters_key(queue.name)

    def ask_for_jobs(  # noqa: PLR0913 - what a take has to know
        self,
        limit: int,
        max_bytes: int,
        ttl: int,
        wait: float = 0,
        *,
        suspect: bool = True,
        alone: Taken | None = None,
        ahead: bool = False,
        closing: Sequence[Ending] = (),
    ) -> None:
        """Ask for up to `limit` jobs from the front of the queue, to be moved to ``started``; see `jobs`.

        Args:
            limit: how many at most.
            max_bytes: stop when the jobs taken hold as much data; the first is taken whatever its size.
            ttl: seconds that the records of these runs live without a heartbeat.
            wait: seconds to wait for the first job; never for more than is there then.
            suspect: if it is one job, write down that it is in hand alone. Not before the model is loaded, nor while
                another job runs: what kills this worker then is not this job's doing. See `Ledger.suspect`.
            alone: the job in hand meanwhile, to be suspected by the way.
            ahead: whether another batch is in hand meanwhile.
            closing: runs to be closed before, in the same round trip; `closed` comes before `jobs` then.
        """
        self._at = at = now()
        # A job wakes one of the workers that wait; with a move of the queue onto itself, which moves nothing, it would
        # wake them all. Whatever becomes of this worker, the next take of any worker begins with what was moved.
        before: list[tuple[Any, ...]] = [("BLMOVE", self._list, self._handed, "LEFT", "RIGHT", wait)] if wait else []
        if closing:
            before.insert(0, self._closing(closing))
        self._take.call(
            keys=(self._list, self._wip, self._worker_key, self._executions, WORKERS_SUSPENDED, self._handed),
            args=(
                limit,
                RQ_KEY_PREFIX,
                self._worker,
                self._lease,
                self._runs,
                utcformat(at),
                at.timestamp(),
                ttl,
                max_bytes,
                int(suspect),
                f"{alone.id}:{alone.run}" if alone else "",
                int(ahead),
            ),
            after=before,
        )
        self._closes_first = bool(closing)
        self._runs += limit
        self._suspect = suspect
        if alone:
            alone.is_suspect = True

    @property
    def asked(self) -> bool:
        """Whether jobs were asked for that nobody has seen yet."""
        return self._take.expected > 0

    @property
    def answered(self) -> bool:
        """Whether `jobs` has an answer to what was asked."""
        return self._take.answers(0)

    def hang_up(self) -> None:
        """Expect no answer any more; what was given all the same is put back by the next `recover`."""
        self._take.close()

    def wait_for_jobs(self, seconds: float) -> None:
        """Wait until `jobs` has an answer; this may be interrupted."""
        self._take.wait(seconds)

    def stop_waiting(self) -> None:
        """Let `jobs` have an answer at once."""
        self._take.unblock()

    def jobs(self) -> list[Taken | str] | None:
        """Return the jobs asked for, oldest first; bare ids where there is none to run; None while RQ is suspended."""
        reply, at = self._take.result(), self._at
        if reply is None:
            return None
        taken: list[Taken | str] = []
        for entry in filter(None, reply):
            if entry[1]:
                taken.append(self._taken(entry, at))
            else:
                taken.append(entry[0].decode(errors="backslashreplace"))
        jobs = [one for one in taken if isinstance(one, Taken)]
        if len(jobs) == 1:
            jobs[0].is_suspect = self._suspect
        return taken

    def _taken(self, entry: Any, at: datetime) -> Taken:
        job_id, run, values, *whole = entry
        fields = dict(zip(_READ, values, strict=True))
        one = Taken(job_id.decode(), run.decode(), fields, at, self._worker, self._queue, self.connection)
        for flat in whole:
            one.fields |= zip(flat[::2], flat[1::2], strict=True)
            one.is_plain = False
        return one

    def recover(
        self, in_hand: Iterable[Taken], ttl: int, *, dead: bool, buried: Iterable[str] = (), deaths: int = DEATHS
    ) -> tuple[int, list[Taken]]:
        """Put back, at the front, the jobs of runs that nobody holds any more; see recover.lua.

        Args:
            in_hand: the runs that this worker knows of; its others are put back.
            ttl: see `ask_for_jobs`.
            dead: put back what workers held whose lease is gone, too.
            buried: leases of workers that are known to be dead; what they held is put back in any case.
            deaths: how many workers may die of a job.

        Returns:
            how many were put back, and the jobs of which so many workers died: they are this worker's, to be failed.
        """
        at = now()
        self._recover.call(
            (self._wip, self._list, self._handed),
            (
                RQ_KEY_PREFIX,
                lease_key(""),
                self._lease,
                self._worker,
                utcformat(at),
                int(time.time()) + ttl,
                deaths,
                self._runs,
                int(dead),
                *(f"{one.id}:{one.run}" for one in in_hand),
                *buried,
            ),
        )
        back, poison = self._recover.result()
        self._runs += len(poison)
        return back, [self._taken(entry, at) for entry in poison]

    def close(self, endings: Sequence[Ending], *, release: bool = True) -> None:
        """Ask for runs to be closed in one step; see `closed`.

        Args:
            endings: of the runs; if there are none, nothing is asked.
            release: leave a job with dependents to RQ's own methods, which release them.
        """
        if endings:
            self._finish.ask(self._closing(endings, release=release))

    def _closing(self, endings: Sequence[Ending], *, release: bool = True) -> tuple[Any, ...]:
        forms: dict[tuple[Any, ...], int] = {}
        runs: list[Any] = []
        for ending in endings:
            runs += (forms.setdefault(_form(ending), len(forms) + 1), *_run(ending))
        arguments = [RQ_KEY_PREFIX, CARD_TTL, self._worker, int(time.time()), int(release), len(forms), len(endings)]
        for form in forms:
            arguments += _spelled(*form)
        arguments += runs
        keys = [
            self._wip,
            self._finished,
            self._failed,
            self._list,
            self._worker_key,
            self._executions,
            self._counters,
        ]
        return self._finish.command(keys, arguments)

    def closed(self) -> list[int]:
        """Return for each of the runs `DONE`, `GIVEN_UP`, `HAS_DEPENDENTS` or `UNWRITABLE`."""
        line = self._take if self._closes_first else self._finish
        self._closes_first = False
        return self._finish.heard(line.answer)  # type: ignore[no-any-return]

    def leave(self) -> None:
        """Let go of the connections."""
        self._take.close()
        self._finish.close()
        self._recover.close()

    def claim(self, job_id: str, run: str) -> bool:
        """Return whether this run is still this worker's to finish, and keep it so while RQ's own methods finish it.

        They take several round trips and have no fence. For that time no cleanup may take the run for abandoned.
        """
        member = f"{job_id}:{run}"
        with self.connection.pipeline() as pipe:
            pipe.zadd(self._wip, {member: int(time.time()) + _CLAIM_SECONDS}, xx=True)
            # Whether the score has changed would not tell: it may be the same.
            pipe.zscore(self._wip, member)
            return pipe.execute()[1] is not None

    def suspect(self, taken: Taken) -> None:
        """Write down that this job is in hand alone: if this worker dies now, it may be by its doing."""
        record = f"{RQ_KEY_PREFIX}:execution:{taken.id}:{taken.run}"
        with self.connection.pipeline() as pipe:
            pipe.hset(record, "alone", 1)
            # It may be gone, and the run with it.
            pipe.expire(record, _CLAIM_SECONDS)
            pipe.execute()
        taken.is_suspect = True

    def count(self, *names: str) -> None:
        """Raise counters of the model by one, for what no script finishes."""
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hincrby(self._counters, name, 1)
            pipe.expire(self._counters, CARD_TTL)
            pipe.execute()


def _form(ending: Ending) -> tuple[Any, ...]:
    """Return what many runs of a batch have in common."""
    taken, status = ending.taken, ending.status
    if status == JobStatus.FINISHED:
        kind = "finished"
    elif status == JobStatus.QUEUED:
        at_front = (ending.put_back and not ending.behind) or taken.fields.get(b"enqueue_at_front_on_retry") == b"1"
        kind = "LPUSH" if at_front else "RPUSH"
    else:
        kind = "failed"
    counters = () if ending.put_back else (ending.counter, *ending.waited)
    depends = bool(taken.fields.get(b"dependency_ids"))
    return kind, status, taken.at, taken.started_at, taken.ended_at, ending.ttl, depends, taken.model_version, counters


def _spelled(  # noqa: PLR0913, PLR0917 - finish.lua's order
    kind: str,
    status: JobStatus,
    at: datetime,
    started: datetime,
    ended: datetime,
    ttl: int,
    depends: bool,
    version: str | None,
    counters: tuple[str, ...],
) -> list[Any]:
    """Return a form as finish.lua is told it."""
    seconds = (ended - started).total_seconds()
    counters = (*counters, f"model:{_bucket(seconds)}") if counters else ()
    times = (at.timestamp(), utcformat(started), utcformat(ended), ended.timestamp(), f"{seconds:.6f}")
    return [kind, status.value, *times, ttl, int(depends), version or "", len(counters), *counters]


def _run(ending: Ending) -> tuple[Any, ...]:
    """Return what finish.lua is told of one run only."""
    taken = ending.taken
    further: list[Any] = []
    for name in _ALWAYS:
        if taken.fields.get(name) is None:
            further += [name, ""]
    exception = value = b""
    if ending.status == JobStatus.QUEUED:
        if not ending.put_back:
            further += ["enqueued_at", utcformat(now()), "retries_left", (taken.number(b"retries_left") or 1) - 1]
    else:
        # As `rq.results.Result.serialize`.
        if ending.value is not None:
            value = base64.b64encode(_encode(ending.value).encode())
        if ending.status != JobStatus.FINISHED:
            further += ["failure_ttl", ending.ttl]
            text = (ending.exc_string or "").encode(errors="replace")
            exception = base64.b64encode(zlib.compress(text))
    return taken.id, taken.run, value, exception, len(further), *further


# The jobs of a batch say the same of most things.


@lru_cache(maxsize=256)
def _number(raw: bytes, name: bytes) -> int:
    try:
        number = int(parse_timeout(raw.decode()) or 0)
    except Exception:  # noqa: BLE001 - RQ's TimeoutFormatError is no ValueError
        raise ValueError(f"its {name.decode()} is {raw[:40]!r}, not a number") from None
    if abs(number) > _LARGEST:
        raise ValueError(f"its {name.decode()} is {raw[:40].decode()}, more than {_LARGEST}")
    return number


@lru_cache(maxsize=256)
def _instant(raw: bytes) -> datetime | None:
    try:
        instant = datetime.fromisoformat(raw.decode())  # RQ's own reader of its dates takes 20 µs
    except ValueError:
        return None  # a foreign producer left it out, or wrote something else
    return instant if instant.tzinfo else None


def _bucket(seconds: float) -> str:
    return next((f"{bound:g}" for bound in BUCKETS if seconds <= bound), "inf")
