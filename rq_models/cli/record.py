"""A job as Redis holds it, for a person to read: nothing is unpickled, and no record is too strange to be shown."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rq.job import Job

from rq_models.errors import JobNotFound, RqModelsError
from rq_models.jobs import FUNCTION_PREFIX
from rq_models.results import RESULTS, Ended, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis import Redis

_TIMES = ("enqueued_at", "started_at", "ended_at")


@dataclass(frozen=True)
class JobRecord:
    """One job and its latest result."""

    id: str
    model: str | None
    """None for a job that is no prediction: another application's, or one that can't be decoded."""
    status: str
    input: Any
    timeout: float | None
    attempts: int
    worker: str | None
    version: str | None
    times: dict[str, str]
    has_output: bool
    output: Any
    error: RqModelsError | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record for ``--json``."""
        return {
            "id": self.id,
            "model": self.model,
            "status": self.status,
            "version": self.version,
            "worker": self.worker,
            "attempts": self.attempts,
            **self.times,
            "input": self.input,
            "output": self.output,
            "error": self.error.record() if self.error else None,
            "traceback": self.error.traceback if self.error else None,
        }


def read_record(connection: Redis, job_id: str) -> JobRecord:
    """Return one job, or raise JobNotFound."""
    found = read_records(connection, [job_id])
    if not found:
        raise JobNotFound(f"there is no job {job_id}; it may have expired", job_id=job_id)
    return found[0]


def read_records(connection: Redis, job_ids: Sequence[str]) -> list[JobRecord]:
    """Return these jobs in one round trip; those that are gone are left out."""
    with connection.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hgetall(Job.key_for(job_id))
            pipe.xrevrange(f"{RESULTS}{job_id}", count=1)
        replies = pipe.execute()
    pairs = zip(job_ids, replies[::2], replies[1::2], strict=True)
    return [_record(job_id, fields, entries) for job_id, fields, entries in pairs if fields]


def _record(job_id: str, fields: dict[bytes, bytes], entries: list[tuple[bytes, dict[bytes, bytes]]]) -> JobRecord:
    text = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in fields.items()}
    entry = entries[0][1] if entries else {}
    last = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in entry.items()}
    status = text.get("status", "unknown")
    has_output, output, error = False, None, None
    # After a requeue the last run's entry is still there, and says nothing of this one.
    if entry and status in ("finished", "failed", "stopped"):
        try:
            output, has_output = value_of(job_id, Ended("result", entry)), True
        except RqModelsError as raised:
            error = raised
    model, data = _call(fields.get(b"data", b""))
    return JobRecord(
        id=job_id,
        model=model,
        status=status,
        input=data,
        timeout=float(text["timeout"]) if text.get("timeout", "").isdecimal() else None,
        attempts=int(text["attempts"]) if text.get("attempts", "").isdecimal() else 0,
        worker=last.get("worker_name") or text.get("worker_name") or None,
        version=last.get("model_version") or None,
        times={name: text[name] for name in _TIMES if text.get(name)},
        has_output=has_output,
        output=output,
        error=error,
    )


def _call(data: bytes) -> tuple[str | None, Any]:
    """Return the model and the input of a prediction, or twice None for any other job."""
    with suppress(zlib.error):
        data = zlib.decompress(data)
    try:
        function, instance, args, _ = json.loads(data)
        if instance is None and function.startswith(FUNCTION_PREFIX) and len(args) == 1:
            return function.removeprefix(FUNCTION_PREFIX), args[0]
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return None, None
