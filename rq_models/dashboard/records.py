"""RQ's records as the dashboard reads them: nothing is unpickled, and no record breaks a page, whoever wrote it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rq import Queue, Worker
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job

from rq_models.errors import RqModelsError
from rq_models.jobs import ModelJob
from rq_models.results import RESULTS, judge, unpacked, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis import Redis

NOT_JSON = "(not JSON: not opened here)"
_SHOWN_AS_STORED = ("created_at", "enqueued_at", "started_at", "ended_at", "attempts")


class StoredJob(ModelJob):
    """A job that is deleted or requeued, and never run: its data stay as they are."""

    def __init__(self, id: str | None = None, connection: Any = None, serializer: Any = None) -> None:  # noqa: A002, ARG002 - RQ's signature
        super().__init__(None, connection=connection)
        # RQ refuses ids that other applications have, with dots for example; here they are only looked up.
        self._id = id

    def restore(self, raw_data: Any) -> None:
        """Take over the stored hash, or raise InvalidJobOperation: it could not be written back unharmed."""
        try:
            super().restore(raw_data)
        except Exception as error:
            raise InvalidJobOperation(f"job {self.id} is not as this version of RQ writes it") from error


class StoredWorker(Worker):
    """A worker as its own process describes it in Redis."""

    def _set_connection(self, connection: Redis) -> Redis:
        # RQ's raises the socket timeout of the whole pool to that of a worker, some seven minutes.
        return connection

    def get_current_job(self) -> dict[str, Any] | None:  # type: ignore[override]
        """Return what a page shows of the job of one of its executions, or None."""
        execution = self.execution
        return next(iter(read_jobs(self.connection, [execution.job_id])), None) if execution else None


def read_job(connection: Redis, job_id: str) -> dict[str, Any]:
    """Return what the page of a job shows.

    Raises:
        NoSuchJobError: it has expired or was deleted.
    """
    for job in read_jobs(connection, [job_id]):
        found = [connection.exists(Job.key_for(one)) for one in job["depends_on"]]
        return {**job, "depends_on_status": ["active" if one else "expired" for one in found]}
    raise NoSuchJobError


def read_jobs(connection: Redis, job_ids: Iterable[str]) -> list[dict[str, Any]]:
    """Return these jobs as rq-dashboard's pages want them; those that are gone are left out."""
    ids = list(job_ids)
    with connection.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(Job.key_for(job_id))
            pipe.xrevrange(f"{RESULTS}{job_id}", count=1)
        replies = pipe.execute()
    found = zip(ids, replies[::2], replies[1::2], strict=True)
    return [_shown(job_id, fields, entries) for job_id, fields, entries in found if fields]


def page_of_jobs(  # noqa: PLR0913, PLR0917 - rq-dashboard calls it with these
    queue_name: str, registry_name: str, offset: int, per_page: int, order: str, connection: Redis
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many jobs the list holds, and those on one page of it. A look changes nothing in Redis."""
    queue = Queue(queue_name, connection=connection)
    first, last = offset, offset + per_page - 1
    if order == "dsc":
        first, last = -last - 1, -first - 1
    entries: Any
    if registry_name == "queued":
        total, entries = queue.count, connection.lrange(queue.key, first, last)
    else:
        registry = getattr(queue, f"{registry_name}_job_registry")
        total, entries = connection.zcard(registry.key), connection.zrange(registry.key, first, last)
    if order == "dsc":
        entries.reverse()
    # An entry of the started registry is "<job id>:<execution id>".
    jobs = read_jobs(connection, [entry.decode(errors="replace").partition(":")[0] for entry in entries])
    for job in jobs:
        del job["result"]  # it may be long, and no list shows it
    return total, jobs


def _shown(job_id: str, fields: dict[bytes, bytes], entries: list[tuple[bytes, dict[bytes, bytes]]]) -> dict[str, Any]:
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    data = fields.get(b"data", b"")
    with suppress(ValueError):
        data = unpacked(data)
    description = text.get("description", "")
    if not isinstance(_parsed(data), list):  # what it calls is not stored as JSON
        description = f"[foreign job] {description}".rstrip()
    meta, dependencies = fields.get(b"meta", b"{}"), _parsed(fields.get(b"dependency_ids", b"[]"))
    result, error = None, None
    ended, _ = judge(fields.get(b"status"), entries)
    if ended is not None and ended.how == "result":
        try:
            result = value_of(job_id, ended)
        except RqModelsError as raised:
            error = raised
    return {
        "id": job_id,
        "job_id": job_id,
        "origin": text.get("origin"),
        "status": text.get("status"),
        **{name: text.get(name) or None for name in _SHOWN_AS_STORED},
        "description": description,
        "call_string": description or job_id,
        "metadata": NOT_JSON if _parsed(meta) == NOT_JSON else meta.decode(errors="replace"),
        "depends_on": [str(one) for one in dependencies] if isinstance(dependencies, list) else [],
        "model_version": entries[0][1].get(b"model_version", b"").decode(errors="replace") if entries else None,
        "result": result,
        "error": error.record() if error else None,
        "exc_info": (error.traceback or str(error)) if error else None,
    }


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return NOT_JSON
