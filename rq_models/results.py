"""What a job's end looks like in Redis, and what it means: the prediction, or an exception.

Nothing that is read here is unpickled, imported or trusted to be what a worker of rq-models wrote.
"""

from __future__ import annotations

import base64
import json
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rq.defaults import RQ_KEY_PREFIX

from rq_models.errors import InvalidOutput, JobCancelled, JobLost, JobNotFound, RqModelsError, from_record

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = f"{RQ_KEY_PREFIX}:results:"
BEGINNING = "0-0"
"""The id before that of any entry."""
MAX_DATA = 64 * 1024 * 1024
"""Bytes of JSON in one job at most, when decompressed: a bomb of some kilobytes would fill the memory."""
SUCCESS, RETRIED = b"1", b"4"
"""Types of entries; the second is followed by another run, and ends nothing."""


class Ended(NamedTuple):
    """How a job ended: with an entry in its result stream, or without one."""

    how: Literal["result", "cancelled", "missing"]
    entry: Mapping[bytes, bytes] = {}


def judge(status: Any, entries: Any) -> tuple[Ended | None, str | bytes]:
    """Return how a job has ended, or None if it has not, and the id of its latest entry.

    Args:
        status: as HGET replied.
        entries: as XREVRANGE replied: the latest entry, or nothing.
    """
    latest, entry = entries[0] if entries else (BEGINNING, {})
    result = Ended("result", entry) if entry and entry.get(b"type") != RETRIED else Ended("missing")
    if status == b"canceled":
        return Ended("cancelled"), latest
    if status in (None, b"finished", b"failed", b"stopped"):
        return result, latest
    return None, latest


def value_of(job_id: str, ended: Ended) -> Any:
    """Return a job's result, or raise what its record describes.

    Raises:
        RqModelsError: the job failed, was cancelled, or is gone.
    """
    if ended.how == "cancelled":
        raise JobCancelled(f"job {job_id} was cancelled", job_id=job_id)
    if ended.how == "missing":
        raise JobNotFound(f"there is no job {job_id}: it was deleted, or its result has expired", job_id=job_id)
    raw, failed = ended.entry.get(b"return_value"), ended.entry.get(b"type") != SUCCESS
    try:
        value = None if raw is None else json.loads(base64.b64decode(raw))
    except (ValueError, RecursionError):
        if not failed:
            raise InvalidOutput(
                f"the result of job {job_id} is not JSON; what put it there is no worker of rq-models", job_id=job_id
            ) from None
        value = None
    if not failed:
        return value
    raise _failure(job_id, value, _traceback(ended.entry.get(b"exc_string", b"")))


def unpacked(data: bytes) -> bytes:
    """Return what RQ has compressed, or what nobody has.

    Raises:
        ValueError: it is more than `MAX_DATA` bytes.
    """
    # What begins as the list it must be is not compressed.
    if not data.startswith(b"["):
        with suppress(zlib.error):
            reader = zlib.decompressobj()
            data = reader.decompress(data, MAX_DATA)
            if reader.unconsumed_tail:
                raise ValueError(f"its data is more than {MAX_DATA} bytes")
    return data


def _traceback(packed: bytes) -> str:
    with suppress(ValueError):
        return unpacked(base64.b64decode(packed)).decode(errors="replace")
    return ""


def _failure(job_id: str, record: Any, traceback: str) -> RqModelsError:
    """Return the exception of a failed job; where RQ itself failed it there is no record, only its text."""
    if isinstance(record, dict):
        return from_record(record, job_id=job_id, traceback=traceback)
    last = (traceback.strip().splitlines() or [""])[-1]
    if "AbandonedJobError" in last:
        return JobLost(f"the worker that held job {job_id} disappeared", job_id=job_id, traceback=traceback)
    if last.startswith("Job stopped by user"):
        return JobCancelled(f"job {job_id} was stopped on request", job_id=job_id, traceback=traceback)
    return from_record(record, job_id=job_id, traceback=traceback)
