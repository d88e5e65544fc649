"""A client that runs its jobs itself, as it enqueues them: what `testing.serve_models` returns."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from rq.job import JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now

from rq_models.client import Client
from rq_models.errors import ConfigurationError, InvalidJob, ModelBroken, ModelFault, RqModelsError, from_record
from rq_models.host.contract import LoadError, Model, construct, load_class
from rq_models.jobs import ModelJob
from rq_models.registry import Card, Serving, publish_card, renew_lease

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rq_models.client import ClientJob, ManyOptions
    from rq_models.waiting import Wait

_FOREVER = 1e9


class InProcessClient(Client):
    """A `Client` over a Redis that is only pretended, and the worker of all its models as well.

    Args:
        models: by name: a class, an instance, or the path ``package.module:Class``.

    Raises:
        ConfigurationError: fakeredis is not installed.
        ModelBroken: a model can't be loaded, or fails on its own example.
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        try:
            from fakeredis import FakeRedis, FakeServer  # noqa: PLC0415 - in the extra `testing` only
        except ImportError:
            raise ConfigurationError("serve_models needs fakeredis: pip install 'rq-models[testing]'") from None
        super().__init__(connection=FakeRedis(server=FakeServer()))
        # A model of one thread, as in production; re-entrant, for a model that asks another one.
        self._lock = threading.RLock()
        self._models = {name: _load(name, model) for name, model in models.items()}
        for name, model in self._models.items():
            publish_card(self.connection, Card(**model.card))
            serving = Serving(f"in-process-{name}", "in-process", "localhost", 0, state="warm")
            renew_lease(self.connection, name, serving, _FOREVER)

    def _submit(self, jobs: list[ClientJob], options: ManyOptions, wait: Wait | None = None) -> int:
        known = super()._submit(jobs, options, wait)
        self._work()
        for job in jobs:
            # It has ended: whoever waits need but look.
            job.since = None
        return known

    def _predict(self, jobs: list[ClientJob], timeout: float | None, options: ManyOptions, _: float) -> list[Any]:
        self._submit(jobs, options)
        return self.wait_all(jobs, timeout)

    def _work(self) -> None:
        """Run whatever is queued, and what that releases."""
        with self._lock:
            again = True
            while again:
                again = False
                for name in self._models:
                    queue = Queue(name, self.connection, job_class=ModelJob, serializer=JSONSerializer)
                    while job_id := cast("bytes | None", self.connection.lpop(queue.key)):
                        again = True
                        job = ModelJob.fetch(job_id.decode(), connection=self.connection)
                        self._run_job(cast("ModelJob", job), queue)

    def _run_job(self, job: ModelJob, queue: Queue) -> None:
        job.model_version = self._models[queue.name].card["version"] or None
        with self.connection.pipeline() as pipe:
            job.prepare_for_execution("in-process", pipe)
            pipe.execute()
        error = self._answer(job, queue.name)
        job.ended_at = now()
        with self.connection.pipeline() as pipe:
            if error is None:
                ttl = job.get_result_ttl(Card.result_ttl)
                job._handle_success(ttl, pipe)  # noqa: SLF001 - our own, named by RQ
                job.cleanup(ttl, pipeline=pipe, remove_from_queue=False)
            # Only a caller's own Retry brings intervals; the default retries are for faults of the system.
            elif job.should_retry and job.retry_intervals is not None and isinstance(error, ModelFault):
                job.retry(queue, pipe)
            else:
                job.set_status(JobStatus.FAILED, pipeline=pipe)
                job._handle_failure(error.traceback or str(error), pipe)  # noqa: SLF001 - likewise
            pipe.execute()
        queue.enqueue_dependents(job)

    def _answer(self, job: ModelJob, model: str) -> RqModelsError | None:
        """Leave the result in the job, or the record of the error that is returned."""
        if job.callbacks:
            error: RqModelsError = InvalidJob(f"job {job.id} wants '{job.callbacks[0]}' called")
        elif job.model != model:
            error = InvalidJob(f"job {job.id} names '{job.func_name}'")
        else:
            outcome = self._models[model].predict(job.args[0])
            if "value" in outcome:
                job._result = outcome["value"]  # noqa: SLF001 - where RQ's own methods look for it
                return None
            error = from_record(outcome["error"], traceback=outcome["traceback"])
        job.error = error.record()
        return error


def _load(name: str, given: Any) -> Model:
    try:
        given = load_class(given) if isinstance(given, str) else given
        model = Model(name, construct(given) if isinstance(given, type) else given)
    except LoadError as error:
        raise ModelBroken(f"{name}: {error.message}", type=error.type, traceback=error.traceback) from error
    example = model.card["example"]
    outcome = {} if example is None else model.predict(example)
    if "error" in outcome:
        raise ModelBroken(
            f"{name}: it fails on its own example: {outcome['error']['message']}", traceback=outcome["traceback"]
        )
    return model
