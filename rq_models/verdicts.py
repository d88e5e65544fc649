"""Verdicts: what the model is given of a job, and what becomes of it: finished, failed, retried, stopped, put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rq.job import JobStatus

from rq_models.errors import (
    CallerFault,
    DeadlineExceeded,
    InvalidJob,
    JobCancelled,
    ModelCrashed,
    ModelFault,
    RqModelsError,
    from_record,
)
from rq_models.horse import Item
from rq_models.jobs import FUNCTION_PREFIX, parse_data
from rq_models.ledger import Ending

if TYPE_CHECKING:
    from collections.abc import Callable

    from rq_models.ledger import Taken
    from rq_models.settings import ModelSettings
    from rq_models.stable import Came


class Verdicts:
    """The rules of one model.

    Args:
        name: the model's name.
        model: returns its settings, which a reload changes.
        told: is told of each failure: the run, what becomes of the job in a word, and why.

    Attributes:
        stopped: ids of jobs that were stopped on request: whatever comes of them, that is how they end.
    """

    def __init__(
        self,
        name: str,
        model: Callable[[], ModelSettings],
        told: Callable[[Taken, str, RqModelsError], None],
    ) -> None:
        self.stopped: set[str] = set()
        self._name, self._model, self._told = name, model, told

    def ending(self, taken: Taken, came: Came) -> Ending:
        """Return how a run ends of which this came."""
        if came is None:
            return given_back(taken)
        if isinstance(came, RqModelsError):
            return self.failure(taken, came)
        if "error" in came:
            return self.failure(taken, from_record(came["error"], traceback=came["traceback"]))
        if taken.id in self.stopped:
            return self.failure(taken, JobCancelled())
        return Ending(taken, JobStatus.FINISHED, self._ttl(taken, b"result_ttl"), came["value"])

    def item(self, taken: Taken) -> Item:
        """Return what the horse is given of a job, or raise why it is not run; nothing that it names is imported."""
        job_id, model = taken.id, self._model()
        wanted = f"{FUNCTION_PREFIX}{self._name}"
        if not taken.is_plain:
            for path in taken.job.callbacks:
                if path not in model.allowed_callbacks:
                    raise InvalidJob(
                        f"job {job_id} wants '{path:.200}' called, which models.{self._name}.allowed_callbacks "
                        "does not list"
                    )
        try:
            if taken.is_late:
                raise DeadlineExceeded
            data = taken.fields.get(b"data") or b""
            name, instance, args, kwargs = parse_data(data, self._name, model.max_input_bytes)
            timeout = taken.number(b"timeout") or model.job_timeout
            for limit in (b"result_ttl", b"failure_ttl", b"retries_left"):
                taken.number(limit)
        except ValueError as error:
            raise InvalidJob(f"job {job_id} can't be read: {error}") from None
        if name != wanted or instance is not None:
            raise InvalidJob(f"job {job_id} names '{name!s:.200}'; queue {self._name} runs '{wanted}' only")
        if not isinstance(args, list) or len(args) != 1 or kwargs:
            raise InvalidJob(f"job {job_id} must have exactly one argument, the input")
        return Item(job_id, args[0], timeout if timeout > 0 else None)

    # -- decide -----------------------------------------------------------------------------------------------------

    def failure(self, taken: Taken, error: RqModelsError) -> Ending:
        """Return how a failed run ends: for good, or with the job back in its queue if this fault may be retried."""
        if taken.id in self.stopped:
            error = JobCancelled(f"job {taken.id} was stopped on request")
        error.job_id = taken.id
        if isinstance(error, JobCancelled):
            status = JobStatus.STOPPED
        else:
            status = JobStatus.QUEUED if self._may_retry(taken, error) else JobStatus.FAILED
        how = "retried" if status == JobStatus.QUEUED else status.value
        self._told(taken, how, error)
        return Ending(taken, status, self._ttl(taken, b"failure_ttl"), error.record(), error)

    def _may_retry(self, taken: Taken, error: RqModelsError) -> bool:
        """Decide whether a fault may spend a retry: the system's always, the caller's never, the model's if listed."""
        try:
            left = taken.number(b"retries_left") or 0
        except ValueError:
            left = 0
        if isinstance(error, CallerFault) or left <= 0:
            return False
        if not isinstance(error, ModelFault):
            return error.retryable
        if isinstance(error, ModelCrashed) and error.retryable:
            return True
        # Retry(...) always brings intervals; the client's own default, for the system's faults, brings none.
        asked_by_caller = bool(taken.fields.get(b"retry_intervals"))
        return asked_by_caller or not {error.type, type(error).__name__}.isdisjoint(self._model().retry_on)

    def _ttl(self, taken: Taken, name: bytes) -> int:
        """Return for how long a job is kept: what it says, else what the model's settings say."""
        try:
            ttl = taken.number(name)
        except ValueError:
            ttl = None
        default = self._model().result_ttl if name == b"result_ttl" else self._model().failure_ttl
        return max(default if ttl is None else ttl, -1)


def given_back(taken: Taken, *, behind: bool = False) -> Ending:
    """Return the end of a run that was not begun, or not decided: its job goes to the front, and spends no retry.

    Args:
        taken: the run.
        behind: its job goes to the back.
    """
    return Ending(taken, JobStatus.QUEUED, put_back=True, behind=behind)
