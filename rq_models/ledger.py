"""The ledger: a run of a job is entered in Redis by one script and closed by another, however many jobs come together.

Both scripts are beside this file. Round trips are what a queue costs, and one step is what makes a kill harmless: a job
is queued or started, started or ended, and never in between.
"""

from __future__ import annotations

import base64
import json
import math
import time
import zlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution
from rq.job import JobStatus
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, utcformat

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
GIVEN_UP, DONE, HAS_DEPENDENTS = 0, 1, 2
"""What `Ledger.finish` says of each run."""
# RQ saves these with every job, empty if unset; a foreign producer may have left them out.
_EMPTY = ("success_callback_name", "failure_callback_name", "stopped_callback_name", "group_id")


class Taken(NamedTuple):
    """A job in hand and the record of this run of it."""

    job: ModelJob
    execution: Execution


@dataclass
class Ending:
    """How a run ends; the job's failure_ttl is set by then.

    Attributes:
        status: ``finished``, ``failed``, ``stopped`` or ``queued``, which is a retry.
        value: the output of a finished job, or the error record of a failed one.
        exc_string: the failure as RQ shows it.
        error: the failure itself.
    """

    taken: Taken
    status: JobStatus
    value: Any = None
    exc_string: str | None = None
    error: RqModelsError | None = None


class Ledger:
    """The runs of one worker.

    Args:
        connection: a client that never repeats a command by itself: a repeated take would take the next jobs.
        queue: the one queue.
        worker: the worker's name.
        lease: the prefix of its execution ids.
        result_ttl: seconds that a result is kept if its job does not say; -1 for ever.
    """

    def __init__(self, connection: Redis, queue: Queue, worker: str, lease: str, result_ttl: int) -> None:
        self.connection = connection
        self._queue = queue
        self._worker = worker
        self._lease = lease
        self._result_ttl = result_ttl
        self._runs = 0
        self._take = connection.register_script(_TAKE)
        self._finish = connection.register_script(_FINISH)
        name = queue.name
        self._worker_key = f"{RQ_KEY_PREFIX}:worker:{worker}"
        self._executions_key = f"{self._worker_key}:executions"
        self._wip = f"{RQ_KEY_PREFIX}:wip:{name}"
        self._finished = f"{RQ_KEY_PREFIX}:finished:{name}"
        self._failed = f"{RQ_KEY_PREFIX}:failed:{name}"

    def take(self, limit: int, max_bytes: int, ttl: int) -> list[Taken | str] | None:
        """Move up to `limit` jobs from the front of the queue to ``started``; never wait for more than is there.

        Args:
            limit: how many at most.
            max_bytes: stop when the jobs taken hold as much data; the first is taken whatever its size.
            ttl: seconds that the records of these runs live without a heartbeat.

        Returns:
            the jobs, oldest first, with the bare id for an entry that had no job; None while RQ is suspended.
        """
        started = now()
        reply = self._take(
            keys=[self._queue.key, self._wip, self._worker_key, self._executions_key, WORKERS_SUSPENDED],
            args=[
                limit,
                RQ_KEY_PREFIX,
                self._worker,
                self._lease,
                self._runs,
                utcformat(started),
                started.timestamp(),
                ttl,
                max_bytes,
            ],
        )
        if reply is None:
            return None
        self._runs += limit
        return [self._taken(raw_id.decode(errors="backslashreplace"), run.decode(), f) for raw_id, run, f in reply]

    def _taken(self, job_id: str, run: str, fields: list[bytes]) -> Taken | str:
        if not run:
            return job_id
        job = ModelJob(job_id, connection=self.connection)
        execution = Execution(run, job_id, self.connection, worker_name=self._worker)
        execution._job = job  # noqa: SLF001 - as RQ's own Execution.create does
        pairs = iter(fields)
        record = dict(zip(pairs, pairs, strict=True))
        job.missing_fields = [name for name in _EMPTY if name.encode() not in record]
        try:
            job.restore(record)
        except Exception as error:  # noqa: BLE001 - whatever stands in Redis, it is this job's failure only
            job.unreadable = f"{type(error).__name__}: {error}"
            # Failing it saves it again; what could not be read is not worth keeping but for the data.
            job.data = record.get(b"data", b"")
        job.origin = self._queue.name
        job._status = JobStatus.STARTED  # noqa: SLF001 - the script has written it, as prepare_for_execution does
        job.started_at = job.last_heartbeat = execution.created_at
        job.worker_name = self._worker
        return Taken(job, execution)

    def finish(self, endings: Sequence[Ending]) -> list[int]:
        """Close runs in one step and return for each `DONE`, `GIVEN_UP` or `HAS_DEPENDENTS`."""
        arguments: list[Any] = [RQ_KEY_PREFIX, CARD_TTL, len(endings)]
        for ending in endings:
            arguments += self._arguments(ending)
        keys = [
            self._wip,
            self._finished,
            self._failed,
            self._queue.key,
            self._worker_key,
            self._executions_key,
            counters_key(self._queue.name),
        ]
        return self._finish(keys=keys, args=arguments)  # type: ignore[no-any-return]

    def count(self, *names: str) -> None:
        """Raise counters of the model by one, for what no script finishes."""
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hincrby(counters_key(self._queue.name), name, 1)
            pipe.expire(counters_key(self._queue.name), CARD_TTL)
            pipe.execute()

    def holds(self, taken: Taken) -> bool:
        """Return whether this run is still this worker's to finish."""
        return self.connection.zscore(self._wip, taken.execution.composite_key) is not None

    def _arguments(self, ending: Ending) -> list[Any]:
        (job, execution), status = ending.taken, ending.status
        assert job.started_at is not None and job.ended_at is not None  # noqa: S101, PT018 - set by take and predict
        ended = utcformat(job.ended_at)
        fields: dict[str, Any] = {
            **dict.fromkeys(job.missing_fields, ""),
            "status": status.value,
            "started_at": utcformat(job.started_at),
            "ended_at": ended,
            "last_heartbeat": ended,
            "worker_name": self._worker,
        }
        entry: dict[str, Any] = {}
        if status == JobStatus.QUEUED:
            kind = "retry_front" if job.enqueue_at_front_on_retry else "retry"
            ttl, score = 0, 0.0
            fields |= {"retries_left": (job.retries_left or 1) - 1, "enqueued_at": utcformat(now())}
        else:
            kind = "finished" if status == JobStatus.FINISHED else "failed"
            ttl = job.get_result_ttl(self._result_ttl) if status == JobStatus.FINISHED else job.failure_ttl or 0
            # Each as its registry writes it: the finished one marks "for ever" by infinity, the failed one by -1.
            forever = math.inf if status == JobStatus.FINISHED else -1.0
            score = forever if ttl == -1 else int(time.time()) + ttl
            entry = self._entry(ending, execution)
            if status != JobStatus.FINISHED:
                fields["failure_ttl"] = job.failure_ttl
        seconds = (job.ended_at - job.started_at).total_seconds()
        counters = counters_of(ending)
        flat_fields = [part for pair in fields.items() for part in pair]
        flat_entry = [part for pair in entry.items() for part in pair]
        score_text = "+inf" if score == math.inf else f"{score:.0f}"
        return [
            job.id, execution.id, kind, ttl, score_text, f"{seconds:.6f}",
            len(flat_fields), *flat_fields, len(flat_entry), *flat_entry, len(counters), *counters,
        ]  # fmt: skip

    def _entry(self, ending: Ending, execution: Execution) -> dict[str, Any]:
        """Return the fields of the result stream, as `rq.results.Result.serialize` and our version field."""
        job = ending.taken.job
        succeeded = ending.status == JobStatus.FINISHED
        kind = Result.Type.SUCCESSFUL if succeeded else Result.Type.FAILED
        entry: dict[str, Any] = {"type": kind.value, "worker_name": self._worker}
        if ending.exc_string is not None:
            entry["exc_string"] = base64.b64encode(zlib.compress(ending.exc_string.encode(errors="replace")))
        if ending.value is not None:
            entry["return_value"] = base64.b64encode(json.dumps(ending.value).encode())
        entry["execution_id"] = execution.id
        entry["execution_started_at"] = execution.created_at.timestamp()
        assert job.ended_at is not None  # noqa: S101 - set by whoever made the ending
        entry["execution_ended_at"] = job.ended_at.timestamp()
        if job.model_version:
            entry["model_version"] = job.model_version
        return entry


def counters_of(ending: Ending) -> list[str]:
    """Return the names of the model's counters that this run raises."""
    job, execution = ending.taken
    if ending.status == JobStatus.FINISHED:
        names = ["predictions"]
    else:
        names = [f"failures:{type(ending.error).__name__}"]
    if job.enqueued_at is not None:
        names.append(f"wait:{_bucket((execution.created_at - job.enqueued_at).total_seconds())}")
    if job.started_at is not None and job.ended_at is not None:
        names.append(f"model:{_bucket((job.ended_at - job.started_at).total_seconds())}")
    return names


def _bucket(seconds: float) -> str:
    return next((f"{bound:g}" for bound in BUCKETS if seconds <= bound), "inf")
