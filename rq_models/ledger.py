"""The ledger: a run of a job is entered in Redis by one script and closed by another, however many jobs come together.

Both scripts are beside this file. Round trips are what a queue costs, and one step is what makes a kill harmless: a job
is queued or started, started or ended, and never in between. A job passes here as its stored fields; an `rq.job.Job` is
made of them only where RQ's own methods are needed, because that costs more than the rest of its way.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution
from rq.job import JobStatus
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, parse_timeout, utcformat

from rq_models.jobs import ModelJob
from rq_models.registry import BUCKETS, CARD_TTL, counters_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis import Redis
    from rq.queue import Queue

    from rq_models.errors import RqModelsError

_HERE = files("rq_models")
_TAKE = _HERE.joinpath("take.lua").read_text("utf-8")
_FINISH = _HERE.joinpath("finish.lua").read_text("utf-8")
GIVEN_UP, DONE, HAS_DEPENDENTS, UNWRITABLE = 0, 1, 2, 3
"""What `Ledger.finish` says of each run."""
_CLAIM_SECONDS = 3600
_LARGEST = 10**9
"""Seconds; Redis refuses expiries that overflow, in the middle of a script."""
_CALLBACKS = (b"success_callback_name", b"failure_callback_name", b"stopped_callback_name")
# RQ saves these with every job, empty if unset; a foreign producer may have left them out.
_ALWAYS = (*_CALLBACKS, b"group_id")
# What only RQ's own methods know how to finish.
_HANGING = (*_ALWAYS, b"webhooks", b"repeats_left", b"rate_limit_key")


@dataclass(eq=False)
class Taken:
    """A job in hand, and this run of it.

    Attributes:
        id: the job's.
        run: the execution's id.
        fields: the job's hash as it was stored.
        at: when it was taken.
        started_at, ended_at: of the prediction, with the rest of its batch.
        model_version: of the model that ran it.
    """

    id: str
    run: str
    fields: dict[bytes, bytes]
    at: datetime
    worker: str
    queue: str
    connection: Redis
    started_at: datetime = field(init=False)
    ended_at: datetime = field(init=False)
    model_version: str | None = None

    def __post_init__(self) -> None:
        self.started_at = self.ended_at = self.at

    def number(self, name: bytes) -> int | None:
        """Return a stored number, None if there is none; RQ writes timeouts as ``"1h"``, too.

        Raises:
            ValueError: it is no number, or too large for one of seconds.
        """
        raw = self.fields.get(name)
        if not raw:
            return None
        try:
            number = int(parse_timeout(raw.decode()) or 0)
        except Exception:  # noqa: BLE001 - RQ's TimeoutFormatError is no ValueError
            raise ValueError(f"its {name.decode()} is {raw[:40]!r}, not a number") from None
        if abs(number) > _LARGEST:
            raise ValueError(f"its {name.decode()} is {raw[:40].decode()}, more than {_LARGEST}")
        return number

    @property
    def is_plain(self) -> bool:
        """Whether nothing hangs on this job but itself; its dependents only the script can see."""
        return not any(self.fields.get(name) for name in _HANGING)

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
            job.restore(self.fields)
        except Exception:  # noqa: BLE001 - whatever stands in Redis, it is this job's failure only
            job.data = self.fields.get(b"data", b"")
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
        error: the failure itself.
    """

    taken: Taken
    status: JobStatus
    ttl: int = 0
    value: Any = None
    error: RqModelsError | None = None
    put_back: bool = False

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
        succeeded = self.status == JobStatus.FINISHED
        names = ["predictions" if succeeded else f"failures:{type(self.error).__name__}"]
        try:
            # RQ's own reader of its dates takes 20 µs.
            waited = (taken.at - datetime.fromisoformat(taken.fields[b"enqueued_at"].decode())).total_seconds()
            names.append(f"wait:{_bucket(waited)}")
        except (KeyError, ValueError, TypeError):
            # A foreign producer left it out, or wrote something else.
            pass
        names.append(f"model:{_bucket((taken.ended_at - taken.started_at).total_seconds())}")
        return names


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
        self._take = connection.register_script(_TAKE)
        self._finish = connection.register_script(_FINISH)
        self._list = queue.key
        self._worker_key = f"{RQ_KEY_PREFIX}:worker:{worker}"
        self._executions = f"{self._worker_key}:executions"
        self._wip = f"{RQ_KEY_PREFIX}:wip:{queue.name}"
        self._finished = f"{RQ_KEY_PREFIX}:finished:{queue.name}"
        self._failed = f"{RQ_KEY_PREFIX}:failed:{queue.name}"
        self._counters = counters_key(queue.name)

    def take(self, limit: int, max_bytes: int, ttl: int) -> list[Taken | str] | None:
        """Move up to `limit` jobs from the front of the queue to ``started``; never wait for more than is there.

        Args:
            limit: how many at most.
            max_bytes: stop when the jobs taken hold as much data; the first is taken whatever its size.
            ttl: seconds that the records of these runs live without a heartbeat.

        Returns:
            the jobs, oldest first, with the bare id for an entry that had no job; None while RQ is suspended.
        """
        at = now()
        reply = self._take(
            keys=[self._list, self._wip, self._worker_key, self._executions, WORKERS_SUSPENDED],
            args=[
                limit,
                RQ_KEY_PREFIX,
                self._worker,
                self._lease,
                self._runs,
                utcformat(at),
                at.timestamp(),
                ttl,
                max_bytes,
            ],
        )
        if reply is None:
            return None
        self._runs += limit
        taken: list[Taken | str] = []
        for raw_id, run, flat in reply:
            job_id = raw_id.decode(errors="backslashreplace")
            if run:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                taken.append(Taken(job_id, run.decode(), fields, at, self._worker, self._queue, self.connection))
            else:
                taken.append(job_id)
        return taken

    def finish(self, endings: Sequence[Ending], *, release: bool = True) -> list[int]:
        """Close runs in one step and return for each `DONE`, `GIVEN_UP`, `HAS_DEPENDENTS` or `UNWRITABLE`.

        Args:
            endings: of the runs.
            release: leave a job with dependents to RQ's own methods, which release them.
        """
        arguments: list[Any] = [RQ_KEY_PREFIX, CARD_TTL, self._worker, int(time.time()), int(release), len(endings)]
        for ending in endings:
            arguments += _arguments(ending)
        keys = [
            self._wip,
            self._finished,
            self._failed,
            self._list,
            self._worker_key,
            self._executions,
            self._counters,
        ]
        return self._finish(keys=keys, args=arguments)  # type: ignore[no-any-return]

    def claim(self, taken: Taken) -> bool:
        """Return whether this run is still this worker's to finish, and keep it so while RQ's own methods finish it.

        They take several round trips and have no fence. For that time no cleanup may take the run for abandoned.
        """
        later = {f"{taken.id}:{taken.run}": int(time.time()) + _CLAIM_SECONDS}
        return self.connection.zadd(self._wip, later, xx=True, ch=True) == 1

    def count(self, *names: str) -> None:
        """Raise counters of the model by one, for what no script finishes."""
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hincrby(self._counters, name, 1)
            pipe.expire(self._counters, CARD_TTL)
            pipe.execute()


def _arguments(ending: Ending) -> list[Any]:
    """Return what finish.lua is told of one run, in its order."""
    taken = ending.taken
    started, ended = taken.started_at, taken.ended_at
    fields: list[Any] = []
    for name in _ALWAYS:
        if name not in taken.fields:
            fields += [name, ""]
    entry: list[Any] = []
    if ending.status == JobStatus.QUEUED:
        at_front = ending.put_back or taken.fields.get(b"enqueue_at_front_on_retry") == b"1"
        kind = "retry_front" if at_front else "retry"
        fields += ["enqueued_at", utcformat(now())]
        if not ending.put_back:
            fields += ["retries_left", (taken.number(b"retries_left") or 1) - 1]
    else:
        kind = "finished" if ending.status == JobStatus.FINISHED else "failed"
        if kind == "failed":
            fields += ["failure_ttl", ending.ttl]
            exc_string = (ending.exc_string or "").encode(errors="replace")
            entry += ["exc_string", base64.b64encode(zlib.compress(exc_string))]
        # As `rq.results.Result.serialize`, with the version of the model.
        result = Result.Type.SUCCESSFUL if kind == "finished" else Result.Type.FAILED
        entry += ["type", result.value, "worker_name", taken.worker]
        if ending.value is not None:
            entry += ["return_value", base64.b64encode(json.dumps(ending.value).encode())]
        entry += ["execution_id", taken.run, "execution_started_at", _timestamp(taken.at)]
        entry += ["execution_ended_at", _timestamp(ended)]
        if taken.model_version:
            entry += ["model_version", taken.model_version]
    counters = ending.counters()
    return [
        taken.id,
        taken.run,
        kind,
        ending.status.value,
        _text(started),
        _text(ended),
        f"{(ended - started).total_seconds():.6f}",
        ending.ttl,
        int(bool(taken.fields.get(b"dependency_ids"))),
        len(fields),
        *fields,
        len(entry),
        *entry,
        len(counters),
        *counters,
    ]


# All of a batch have the same times.
_text = lru_cache(maxsize=8)(utcformat)


@lru_cache(maxsize=8)
def _timestamp(at: datetime) -> float:
    return at.timestamp()


def _bucket(seconds: float) -> str:
    return next((f"{bound:g}" for bound in BUCKETS if seconds <= bound), "inf")
