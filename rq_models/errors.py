"""Every error of rq-models, by whose fault it is.

RqModelsError
├── CallerFault           the caller's: repeating the call unchanged is useless
│   ├── ConfigurationError
│   ├── UnknownModel
│   ├── NoWorker
│   ├── InvalidInput
│   ├── InvalidJob
│   ├── InvalidRun
│   │   └── RunConflict
│   ├── UnknownRun
│   └── QueueFull
├── ModelFault            the model's
│   ├── ModelBroken
│   ├── ModelError
│   ├── ModelTimeout
│   ├── ModelCrashed
│   └── InvalidOutput
└── SystemFault           the system's
    ├── JobLost
    ├── JobCancelled
    ├── DeadlineExceeded
    ├── RunFailed
    └── JobNotFound

A wait that expires raises the builtin ``TimeoutError``, which ``ModelTimeout`` is not: the job goes on.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict


class ErrorRecord(TypedDict):
    """What a failed job's result carries beside RQ's traceback."""

    kind: str
    type: str | None
    message: str
    retryable: bool


class RqModelsError(Exception):
    """Root of all errors raised by rq-models.

    Attributes:
        message: one sentence for a person.
        type: the name of the exception that the model raised, if it was the model that spoke.
        retryable: whether the same job may succeed when it is run again.
        job_id: the job concerned, if there is one.
        traceback: the model's traceback as text, for a log; never part of ``str(error)``.
    """

    retryable_by_default: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        type: str | None = None,  # noqa: A002 - the field's name in the error record
        retryable: bool | None = None,
        job_id: str | None = None,
        traceback: str | None = None,
    ) -> None:
        self.message = message or " ".join((self.__doc__ or "").split())
        super().__init__(self.message)
        self.type = type
        self.retryable = self.retryable_by_default if retryable is None else retryable
        self.job_id = job_id
        self.traceback = traceback

    def record(self) -> ErrorRecord:
        """Return the JSON form that is stored with the job; `from_record` reads it back."""
        return {
            "kind": type(self).__name__,
            "type": self.type,
            "message": self.message,
            "retryable": self.retryable,
        }


class CallerFault(RqModelsError):
    """The caller's fault."""


class ConfigurationError(CallerFault):
    """The configuration is wrong."""


class UnknownModel(CallerFault):
    """No worker ever published a model of this name."""


class NoWorker(CallerFault):
    """Nobody serves this model now."""


class InvalidInput(CallerFault):
    """The input does not fit the model's schema, or the model refused it."""


class InvalidJob(CallerFault):
    """The job asks for something that is not a prediction by this queue's model."""


class InvalidRun(CallerFault):
    """What is asked of a scoring run can't be done."""


class RunConflict(InvalidRun):
    """The output belongs to a run of something else."""


class UnknownRun(CallerFault):
    """There is no run of this id; runs are remembered for 30 days."""


class QueueFull(CallerFault):
    """The model's queue holds as many jobs as it may; later there may be room."""

    retryable_by_default = True


class ModelFault(RqModelsError):
    """The model's fault."""


class ModelBroken(ModelFault):
    """The model could not be loaded.

    `stage` is ``missing`` (no such module or class), ``broken`` (the module failed inside), ``init`` (the constructor
    raised) or ``example`` (it failed on its own example).
    """

    retryable_by_default = True
    stage: str = "missing"


class ModelError(ModelFault):
    """The model raised an exception."""


class ModelTimeout(ModelFault):
    """The prediction took longer than its job_timeout."""


class ModelCrashed(ModelFault):
    """The model's process died during the prediction."""


class InvalidOutput(ModelFault):
    """What the model returned is not JSON, or too large."""


class SystemFault(RqModelsError):
    """The system's fault."""


class JobLost(SystemFault):
    """The worker that held the job disappeared, and no retry was left."""

    retryable_by_default = True


class JobCancelled(SystemFault):
    """The job was cancelled or stopped on request."""


class DeadlineExceeded(SystemFault):
    """The job's deadline had passed before its turn came, so it was not run."""


class RunFailed(SystemFault):
    """The run was given up or cancelled; what it has done is kept, and it can be continued."""


class JobNotFound(SystemFault):
    """There is no job of this id; its result may have expired."""


def _tree(cls: type[RqModelsError]) -> dict[str, type[RqModelsError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


_BY_KIND = _tree(RqModelsError)


def from_record(record: Any, *, job_id: str | None = None, traceback: str | None = None) -> RqModelsError:
    """Return the exception that an error record describes.

    Anything may stand in Redis: an unknown kind, or no record at all, becomes a plain `ModelError`.
    """
    if not isinstance(record, dict) or not isinstance(record.get("message"), str):
        last = (traceback or "").strip().splitlines()[-1:] or ["the job failed without saying why"]
        return ModelError(last[0], job_id=job_id, traceback=traceback)
    kind, cause = record.get("kind"), record.get("type")
    cls = _BY_KIND.get(kind, ModelError) if isinstance(kind, str) else ModelError
    return cls(
        record["message"],
        type=cause if isinstance(cause, str) else None,
        retryable=record.get("retryable") is True,
        job_id=job_id,
        traceback=traceback,
    )
