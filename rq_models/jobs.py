"""The functions that RQ calls, and the Job class that allows nothing else.

A prediction by model ``iris_model`` is an RQ job whose function is ``rq_models.jobs.iris_model``. This module resolves
that name (PEP 562) to a callable that predicts from a module-level cache in this very process, so that a stock
``SimpleWorker`` with the JSON serializer can run the same job. `ModelWorker` never calls it: its horse predicts.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer

from rq_models.results import unpacked as _unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.client import Pipeline

    from rq_models.errors import ErrorRecord


FUNCTION_PREFIX = f"{__name__}."
_AROUND = len(f'["{FUNCTION_PREFIX}", null, [], {{}}]')
_CALLBACKS = ("_success_callback_name", "_failure_callback_name", "_stopped_callback_name")


def __getattr__(name: str) -> Callable[[Any], Any]:
    """Return the prediction function of a configured model."""
    # First of all: importing a name from this module asks for __path__, and a client needs no settings.
    if name.startswith("__"):
        raise AttributeError(name)
    from rq_models.errors import ConfigurationError  # noqa: PLC0415 - as said above
    from rq_models.settings import Settings  # noqa: PLC0415 - likewise

    try:
        settings = Settings.load()
        model = settings.model(name)
    except ConfigurationError as error:
        # RQ takes an AttributeError for "no such function" and says so in the job's failure.
        raise AttributeError(error.message) from None
    return _predictor(name, model.class_path, model.nan)


def _predictor(name: str, class_path: str, nan: str) -> Callable[[Any], Any]:
    def predict(data: Any) -> Any:
        from rq_models.errors import from_record  # noqa: PLC0415 - model code is imported on the first job, not before
        from rq_models.host import cache  # noqa: PLC0415 - likewise

        outcome = cache.get(name, class_path, nan).predict(data)
        if "error" in outcome:
            raise from_record(outcome["error"], traceback=outcome["traceback"])
        return outcome["value"]

    return predict


_decode = json.JSONDecoder().decode


def require_size(data: bytes, model: str, most: int, name: str = "input") -> None:
    """Raise InvalidInput if the input in a job's data, which is JSON, is more than so many bytes.

    Args:
        data: with the model's function around the input.
        model: its name.
        most: its ``max_input_bytes``.
        name: what the message calls the input.
    """
    size = len(data) - _AROUND - len(model)
    if size > most:
        from rq_models.errors import InvalidInput  # noqa: PLC0415 - every name in this module is taken from the models

        raise InvalidInput(f"{name}: {size} bytes of JSON are more than models.{model}.max_input_bytes ({most})")


def parse_data(raw: bytes, model: str, most: int) -> list[Any]:
    """Return what a job's data field holds: function name, instance, arguments, keyword arguments.

    Raises:
        ValueError: it is not JSON, compressed or not, of this form.
        InvalidInput: the input is larger than the model allows; see `require_size`.
    """
    # A producer need not compress; RQ reads both, too.
    raw = _unpacked(raw)
    if len(raw) > most:
        require_size(raw, model, most)
    try:
        # What the server holds is UTF-8; `json.loads` would look for other encodings first.
        data = _decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its data is not JSON: {error}") from None
    if not isinstance(data, list) or len(data) != 4:  # noqa: PLR2004 - the four above
        raise ValueError('its data is not of the form ["function", null, [input], {}]')
    return data


class ModelResult(Result):
    """A result stream entry that also says which version of the model made it."""

    model_version: str | None = None

    def serialize(self) -> dict[str, Any]:
        """Return the fields of the stream entry."""
        fields = super().serialize()
        if self.model_version:
            fields["model_version"] = self.model_version
        return fields


class ModelJob(Job):
    """An RQ job whose data is JSON, whose function is a prediction and nothing else.

    Attributes:
        model_version: version of the model that ran the job, set by the worker before it finishes the job.
        error: record of the failure, likewise.
        may_retry: False when a fault is final, whatever retries are left.
    """

    allowed_callbacks: frozenset[str] = frozenset()
    """Set by the worker for its process: what jobs may want called."""

    def __init__(
        self,
        id: str | None = None,  # noqa: A002 - RQ's signature
        connection: Any = None,
        serializer: Any = None,  # noqa: ARG002 - likewise
    ) -> None:
        # Whatever serializer the caller passes, nothing from Redis is ever unpickled.
        super().__init__(id, connection=connection, serializer=JSONSerializer)
        self.model_version: str | None = None
        self.error: ErrorRecord | None = None
        self.may_retry = True

    def restore(self, raw_data: Any) -> None:
        """Take on what a job's hash holds; data that is too large stays compressed, where RQ would fill the memory."""
        super().restore({**raw_data, b"data": b""} if b"data" in raw_data else raw_data)
        self.data = raw_data[b"data"]
        with suppress(ValueError):
            self.data = _unpacked(self.data)

    @property
    def model(self) -> str | None:
        """The model this job asks for, or None if it asks for anything else."""
        name = self.func_name
        if isinstance(name, str) and name.startswith(FUNCTION_PREFIX) and self.instance is None:
            return name[len(FUNCTION_PREFIX) :]
        return None

    @property
    def callbacks(self) -> list[str]:
        """Every import path and address that the job wants called when it ends."""
        paths = [path for name in _CALLBACKS if (path := getattr(self, name))]
        return paths + [webhook.url for webhook in self.webhooks]

    @property
    def should_retry(self) -> bool:
        """Whether a failure now puts the job back into its queue."""
        return self.may_retry and super().should_retry

    # RQ imports and calls what a job hash names, also when it only cleans up after a dead worker. Here nothing is
    # imported and nothing is sent unless the configuration lists it.

    def _allows(self, path: str | None) -> bool:
        return path in self.allowed_callbacks

    @property
    def success_callback(self) -> Any:
        """The function to call on success, if the configuration lists it."""
        return super().success_callback if self._allows(self._success_callback_name) else None

    @property
    def failure_callback(self) -> Any:
        """The function to call on failure, if the configuration lists it."""
        return super().failure_callback if self._allows(self._failure_callback_name) else None

    @property
    def stopped_callback(self) -> Any:
        """The function to call when it is stopped, if the configuration lists it."""
        return super().stopped_callback if self._allows(self._stopped_callback_name) else None

    def send_webhooks(self, status: Any, *, exc_string: str | None = None) -> None:
        """Send the webhooks that the configuration lists."""
        self.webhooks = [webhook for webhook in self.webhooks if self._allows(webhook.url)]
        super().send_webhooks(status, exc_string=exc_string)

    # The two methods below do what RQ's do, in its order, and add the version and the error record to the result. They
    # serve the jobs that RQ's own methods finish; finish.lua does the same for all others. `execution` is what RQ
    # passes through to the result: execution_id, execution_started_at and execution_ended_at.

    def _handle_success(  # type: ignore[override]
        self, result_ttl: int, pipeline: Pipeline, worker_name: str = "", **execution: Any
    ) -> None:
        self.set_status(JobStatus.FINISHED, pipeline=pipeline)
        # RQ leaves meta out, so that what the caller changes meanwhile is not overwritten.
        self.save(pipeline=pipeline, include_meta=False, include_result=False)
        self._add_result(pipeline, Result.Type.SUCCESSFUL, result_ttl, worker_name, self._result, **execution)
        self.finished_job_registry.add(self, result_ttl, pipeline)

    def _handle_failure(  # type: ignore[override]
        self, exc_string: str, pipeline: Pipeline, worker_name: str = "", **execution: Any
    ) -> None:
        self.failed_job_registry.add(self, ttl=self.failure_ttl, exc_string=exc_string, pipeline=pipeline)
        execution["exc_string"] = exc_string
        self._add_result(pipeline, Result.Type.FAILED, self.failure_ttl, worker_name, self.error, **execution)

    def _add_result(
        self, pipeline: Pipeline, kind: Result.Type, ttl: int | None, worker_name: str, value: Any, **fields: Any
    ) -> None:
        result = ModelResult(
            job_id=self.id,
            type=kind,
            connection=self.connection,
            return_value=value,
            worker_name=worker_name,
            serializer=JSONSerializer,
            **fields,
        )
        result.model_version = self.model_version
        result.save(ttl=ttl, pipeline=pipeline)
