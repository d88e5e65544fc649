"""RQ's records as the dashboard reads them: nothing is unpickled, and no record breaks a page, whoever wrote it."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, cast

from rq import Queue, Worker
from rq.exceptions import DeserializationError, InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer

if TYPE_CHECKING:
    from redis import Redis

NOT_JSON = "(not JSON: not opened here)"
REGISTRIES = {
    "failed": FailedJobRegistry,
    "deferred": DeferredJobRegistry,
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "canceled": CanceledJobRegistry,
}
# What decoding a record of another application, or of another version of RQ, can raise.
_UNDECODABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, zlib.error)


class _Reader:
    """What RQ asks of a serializer, for values that are only shown."""

    dumps = staticmethod(JSONSerializer.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        try:
            # A browser can't parse NaN and the infinities as Python writes them.
            return json.loads(data, parse_constant=str)
        except (ValueError, RecursionError):
            return NOT_JSON


class DashboardJob(Job):
    """A job that is looked at, deleted or requeued, and never run."""

    def __init__(self, id: str | None = None, connection: Any = None, serializer: Any = None) -> None:  # noqa: A002, ARG002 - RQ's signature
        super().__init__(None, connection=connection, serializer=JSONSerializer)
        # RQ refuses ids that other applications have, with dots for example; here they are only looked up.
        self._id = id
        self.undecodable = False

    def restore(self, raw_data: Any) -> None:
        """Take over what the stored hash says, as far as it can be understood."""
        try:
            super().restore(raw_data)
        except (NoSuchJobError, *_UNDECODABLE):
            self.undecodable = True

    @property
    def foreign(self) -> bool:
        """Whether this is another application's job: what it calls is not stored as JSON."""
        try:
            return self.undecodable or not isinstance(self.func_name, str)
        except DeserializationError:
            return True

    @property
    def label(self) -> str:
        """The job in one line; whoever enqueued it chose the words."""
        text = self.description or ""
        return f"[foreign job] {text}".rstrip() if self.foreign else text

    @property
    def dependency_ids(self) -> list[bytes]:  # type: ignore[override]
        """The ids as RQ 1 returned them: rq-dashboard 0.9.0 decodes each."""
        return [one.encode() for one in super().dependency_ids]

    def get_call_string(self) -> str | None:
        """Return the call as Python would write it, or the label of what is no such call."""
        try:
            return self.label if self.foreign else super().get_call_string()
        except _UNDECODABLE:
            return self.label

    def get_meta(self, refresh: bool = True) -> Any:  # noqa: ARG002 - RQ's signature
        """Return the stored metadata, or the words that stand for what is not JSON."""
        raw = cast("bytes | None", self.connection.hget(self.key, "meta"))
        return _Reader.loads(raw) if raw else {}

    def latest_result(self, timeout: int = 0) -> Result | None:
        """Return the latest result; a value that is not JSON is replaced by words, a broken entry by None."""
        try:
            return Result.fetch_latest(self, serializer=_Reader, timeout=timeout)
        except _UNDECODABLE:
            return None

    def _fetch_status(self) -> JobStatus:
        try:
            return super()._fetch_status()
        except (InvalidJobOperation, ValueError):
            # None, or one that this version of RQ does not know: it must not keep the job from being shown and deleted.
            return JobStatus.CREATED


class DashboardQueue(Queue):
    """A queue whose compaction can't lose a job."""

    def compact(self) -> None:
        """Drop ids of jobs that are gone; RQ's own empties the queue first and fills it again from this process."""
        ids = self.get_job_ids()
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.exists(DashboardJob.key_for(job_id))
            found = pipe.execute()
        for job_id, exists in zip(ids, found, strict=True):
            if not exists:
                self.connection.lrem(self.key, 0, job_id)


class DashboardWorker(Worker):
    """A worker as its own process describes it in Redis."""

    @classmethod
    def all(cls, connection: Redis | None = None, **_: Any) -> list[DashboardWorker]:  # type: ignore[override]
        """Return every registered worker, its jobs read as JSON; RQ's own takes the default, which unpickles."""
        found = super().all(connection=connection, job_class=DashboardJob, serializer=JSONSerializer)
        return [worker for worker in found if isinstance(worker, cls)]

    def _set_connection(self, connection: Redis) -> Redis:
        # RQ's raises the socket timeout of the whole pool to that of a worker, some seven minutes.
        return connection

    def get_current_job(self) -> Job | None:
        """Return the job of one of its executions, or None when it is idle or the job is already gone."""
        try:
            return super().get_current_job()
        except NoSuchJobError:
            return None


def page_of_jobs(  # noqa: PLR0913, PLR0917 - rq-dashboard calls it with these
    queue_name: str, registry_name: str, offset: int, per_page: int, order: str, connection: Redis
) -> tuple[int, list[DashboardJob]]:
    """Return how many jobs the list holds, and those on one page of it. A look changes nothing in Redis."""
    key: str = (REGISTRIES.get(registry_name) or Queue)(queue_name, connection=connection).key
    is_list = registry_name not in REGISTRIES
    total = connection.llen(key) if is_list else connection.zcard(key)
    first, last = offset, offset + per_page - 1
    if order == "dsc":
        first, last = max(0, total - offset - per_page), total - offset - 1
    entries: list[Any] = []
    if last >= 0:
        entries = connection.lrange(key, first, last) if is_list else connection.zrange(key, first, last)
    if order == "dsc":
        entries.reverse()
    # An entry of the started registry is "<job id>:<execution id>".
    ids = [entry.decode(errors="replace").partition(":")[0] for entry in entries]
    return total, [job for job in DashboardJob.fetch_many(ids, connection) if isinstance(job, DashboardJob)]


def requeue(job_id: str, connection: Redis) -> DashboardJob:
    """Put a failed job back into its queue, its data as they are.

    Raises:
        NoSuchJobError: it has expired or was deleted.
        InvalidJobOperation: it is not in the failed registry, or can't be written back unharmed.
    """
    job = cast("DashboardJob", DashboardJob.fetch(job_id, connection=connection))
    if job.undecodable:
        raise InvalidJobOperation(f"job {job_id} is not as this version of RQ writes it")
    job.requeue()
    return job
