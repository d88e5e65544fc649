"""RQ's worker, where its ways are not ours: connections, heartbeats, maintenance, and the ends that only RQ can record.

`ModelWorker` is made of this and of the straight line; nothing else derives from it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import DataError, RedisError
from redis.retry import Retry
from rq.callbacks import execute_failure_callback
from rq.exceptions import StopRequested
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import Worker
from rq.worker.base import WorkerStatus

from rq_models.errors import InvalidJob
from rq_models.health import is_about_one_key
from rq_models.jobs import ModelJob

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis
    from rq.executions import Execution
    from rq.queue import Queue

    from rq_models.ledger import Ending, Ledger
    from rq_models.verdicts import Verdicts

PEEK = 1
"""Seconds that an idle worker waits for a job before it looks around."""
REPLY_TIMEOUT = PEEK + 10
"""Seconds that the server may take to answer."""
RUN_TTL = 3600
"""Seconds that a run's records live without a heartbeat. Who died is known by the lease, long before RQ's own cleanup,
which any stock worker does and ``rq info`` too, takes the run for abandoned and spends a retry on it."""


class GivenUp(Exception):
    """This run is not this worker's to finish any more."""


class RQWorker(Worker):
    """An RQ worker of one queue, for JSON jobs of ours, that leaves taking and finishing to whoever derives from it."""

    job_class = ModelJob
    log_result_lifespan = False
    ledger: Ledger
    verdicts: Verdicts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # RQ's command passes its own defaults for both, so class attributes alone would never win.
        super().__init__(*args, **{**kwargs, "job_class": ModelJob, "serializer": JSONSerializer})
        for queue in self.queues:
            queue.serializer, queue.job_class = JSONSerializer, ModelJob
        self.log.addFilter(_is_worth_a_line)
        self._may_be_interrupted = False
        self._next_heartbeat = 0.0

    @property
    def queue(self) -> Queue:
        """The one queue."""
        return self.queues[0]

    @property
    def connection_timeout(self) -> int:
        """Seconds that the server may take to answer; RQ's seven minutes are for a wait that is not done here."""
        return REPLY_TIMEOUT

    def _set_connection(self, connection: Redis) -> Redis:
        connection = super()._set_connection(connection)
        # What got no answer may have been done, so nothing is repeated but by those who know whether it may be; and
        # they have a model to look after meanwhile.
        connection.set_retry(Retry(NoBackoff(), 0))
        return connection

    def _set_ip_address(self, connection: Redis) -> None:
        try:
            super()._set_ip_address(connection)
        except RedisError:
            # A server that is away is waited for when the work starts.
            self.ip_address = "unknown"

    def sign_on(self, *logging_options: Any) -> None:
        """Do what RQ does at the start; what an earlier attempt has done already is no obstacle."""
        hears_commands: Any = self.pubsub_thread
        if self.birth_date is not None:
            self.connection.delete(self.key)
            if self.pubsub is not None and not hears_commands:
                self.pubsub.close()
        if hears_commands:
            self.register_birth()
            self.set_state(WorkerStatus.STARTED)
        else:
            self.bootstrap(*logging_options)

    def finish_by_rq(self, ending: Ending) -> None:
        """Let RQ record this run, with all that hangs on it: dependents, repeats, groups, rate limits, callbacks."""
        try:
            if self.ledger.claim(ending.taken.id, ending.taken.run):
                self._claimed_by_rq(ending)
            else:
                self.log.warning("Worker %s: job %s was given up meanwhile", self.name, ending.taken.id)
        except GivenUp:
            self.log.info("Worker %s: the end of job %s was written already", self.name, ending.taken.id)
        except Exception as error:
            # What redis-py can't even send is this job's own fault.
            if isinstance(error, RedisError) and not (isinstance(error, DataError) or is_about_one_key(error)):
                raise
            # A key of this job's, or a bug; no repetition would mend it, and the other jobs wait.
            self.log.exception("Worker %s: job %s finished without what hangs on it", self.name, ending.taken.id)
            self.ledger.close([ending], release=False)
            self.ledger.closed()

    def _claimed_by_rq(self, ending: Ending) -> None:
        taken, job, execution = ending.taken, ending.taken.job, ending.taken.execution
        self.ledger.count("batches", *ending.counters())
        job.started_at, job.ended_at, job.model_version = taken.started_at, taken.ended_at, taken.model_version
        job.redis_server_version = self.get_redis_server_version()
        if ending.status == JobStatus.FINISHED:
            try:
                self._finalize_success(job, self.queue, execution, ending.value)
            except (RedisError, GivenUp):
                raise
            except Exception as error:
                if job.success_callback is not None:
                    # Somebody else's code, by whose failure RQ fails the job.
                    message = f"the success callback raised {type(error).__name__}: {error}"
                    self.finish_by_rq(self.verdicts.failure(taken, InvalidJob(message)))
                    return
                # A dependent that RQ can't read, say: no reason to lose a good result.
                self.log.exception("Worker %s: job %s finished without its dependents", self.name, job.id)
                self.ledger.close([ending], release=False)
                self.ledger.closed()
            return
        job.failure_ttl, job.error, job.may_retry = ending.ttl, ending.value, ending.status == JobStatus.QUEUED
        if ending.status == JobStatus.STOPPED:
            self._stopped_job_id = job.id
            self._handle_stopped_job(job, self.queue, execution)
            return
        if ending.status == JobStatus.FAILED and ending.error is not None:
            try:
                execute_failure_callback(job, self.death_penalty_class, type(ending.error), ending.error, None)
            except Exception:
                self.log.exception("Worker %s: failure callback of job %s", self.name, job.id)
        self.handle_job_failure(job, self.queue, exc_string=ending.exc_string or "", execution=execution)

    def cleanup_execution(self, job: ModelJob, pipeline: Any, execution: Execution | None = None) -> None:  # type: ignore[override]
        """Let RQ write a run's end, of which this is a part, unless it is written already.

        Its transaction begins anew when its answer is lost, and knows no fence.
        """
        if execution is not None and not self.ledger.claim(job.id, execution.id):
            raise GivenUp
        super().cleanup_execution(job, pipeline, execution)

    def handle_execution_ended(self, job: ModelJob, queue: Queue, heartbeat_ttl: int) -> None:  # type: ignore[override]  # noqa: ARG002
        """Note the end of a run; RQ's own also writes a heartbeat, which the result's save writes anyway."""
        job.ended_at = job.last_heartbeat = now()

    def get_heartbeat_ttl(self, job: ModelJob, working_time: float = 0.0) -> int:  # type: ignore[override]  # noqa: ARG002
        """Return for how long a beat holds; RQ's own shrinks with the job's time left, and falls below zero."""
        return RUN_TTL

    def maintain_if_due(self) -> None:
        """Run RQ's maintenance; a job that RQ can't read must end neither it nor this worker."""
        if not self.should_run_maintenance_tasks:
            return
        try:
            self.run_maintenance_tasks()
        except Exception as error:
            if isinstance(error, RedisError) and not is_about_one_key(error):
                raise
            self.log.exception("Worker %s: maintenance", self.name)
            self.last_cleaned_at = now()  # type: ignore[assignment]  # RQ declares it by its first value, None
            self.queue.release_maintenance_lock()

    def heartbeat_if_due(self) -> None:
        """Say that this worker lives, so that RQ's registry keeps it."""
        if time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + self.job_monitoring_interval / 2
            with self.connection.pipeline(transaction=False) as pipe:
                self.heartbeat(pipeline=pipe)
                pipe.execute()

    def interruptible(self, wait: Callable[..., Any], *args: Any) -> Any:
        """Wait for something while no job is in hand: a request to stop ends it."""
        self._may_be_interrupted = True
        try:
            # Looked at with the flag up: a signal from here on raises by itself.
            if self._stop_requested:
                raise StopRequested
            return wait(*args)
        finally:
            self._may_be_interrupted = False

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        # RQ's handler lets the thread die of all but a ConnectionError, and stop-job with it.
        if isinstance(exc, RedisError | OSError) and not isinstance(exc, RedisConnectionError):
            exc = RedisConnectionError(str(exc))
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Drop what RQ says of its own housekeeping, every 30 seconds for ever."""
    housekeeping = ("Worker %s: cleaning ", "Worker %s: subscribing ", "Worker %s: unsubscribing ")
    return record.levelno > logging.INFO or not str(record.msg).startswith(housekeeping)
