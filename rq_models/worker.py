"""ModelWorker: one model, one queue. Take a job, let the horse predict, finish the job, report.

The straight line is `ModelWorker.work_once`. Everything that Redis holds of a job is written by this process and by
RQ's own methods, so a model that crashes loses no result; model code runs in the horse only.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from redis import Redis
from redis.exceptions import RedisError
from rq.command import parse_payload
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.exceptions import StopRequested
from rq.job import JOB_ID_PATTERN, JobStatus
from rq.job_lifecycle import call_exception_handlers
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.version import VERSION as RQ_VERSION
from rq.worker.base import WorkerStatus

from rq_models import orders
from rq_models.errors import (
    ConfigurationError,
    DeadlineExceeded,
    JobCancelled,
    JobLost,
    ModelFault,
    RqModelsError,
)
from rq_models.hangup import on_hang_up
from rq_models.health import FATAL, eviction, explain, place, read_info, too_old
from rq_models.jobs import ModelJob
from rq_models.lease import Lease, own_connection
from rq_models.ledger import (
    DEATHS,
    GIVEN_UP,
    HAS_DEPENDENTS,
    LEASE_LENGTH,
    UNWRITABLE,
    Ending,
    Ledger,
    Taken,
)
from rq_models.pool import POOL_VARIABLE
from rq_models.registry import Card, Serving, drop_lease, publish_card, read_model
from rq_models.rq_worker import PEEK, REPLY_TIMEOUT, RUN_TTL, RQWorker
from rq_models.scoring.runs import bulk_name
from rq_models.scoring.work import DEATHS as STEP_DEATHS
from rq_models.scoring.work import Scorer
from rq_models.settings import Settings
from rq_models.stable import Stable
from rq_models.succession import Succession
from rq_models.verdicts import Verdicts, given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from rq.worker import DequeueStrategy

    from rq_models.horse import Horse, Item
    from rq_models.settings import ModelSettings

PROVEN_RQ = "3.0"
_SLICE = 0.01
"""Seconds of work after which finished jobs are not kept back any longer."""
_HELD = 0.1
"""Seconds that jobs may wait in this worker's hands, beside a worker that may be idle; the next beat puts them back."""
_MOST_HELD = 64
"""Jobs taken at a time that are predicted one by one."""
_MOST_FINISHED = 1000
"""Runs finished at a time: as many as the largest batch has. A script that lists more than 8,000 fails."""
_SERVED = 1.0
"""Seconds for which single predictions alone are served in the middle of a file; then there is a slice of it."""
_LONGEST_PAUSE = 10.0
_RECOVERY = 2.0
"""Seconds between two looks for what dead workers held."""
_PUBLISHED = ("job_timeout", "result_ttl", "failure_ttl", "retries", "max_queued", "max_input_bytes")
"""Settings that clients go by."""


class ModelWorker(RQWorker):
    """An RQ worker that serves one configured model from its own queue.

    It takes what `rq.worker.Worker` takes; the job class and the serializer are always ours. `settings` is read from
    ``config/`` when the work starts, unless it is given.
    """

    def __init__(self, *args: Any, settings: Settings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.verdicts = Verdicts(self.queues[0].name if self.queues else "", lambda: self.model, self._report_failure)
        self._lease_id = secrets.token_hex(LEASE_LENGTH // 2)
        self._in_hand: dict[str, Taken] = {}
        self._ended: list[Ending] = []
        self._unsettled: tuple[list[Ending], list[Ending]] = ([], [])
        """Endings of which the server has been told, and those of which RQ's own methods will tell it."""
        self._next_recovery = self._trusts_leases_from = self._serves_from = self._asked_at = 0.0
        self._asked_for = 1
        self._more_waits = False
        """Whether the last answer held as many jobs as were asked for."""
        self._may_look_ahead = False
        self._alone: Taken | None = None
        """The job in the horse's hands, if it has no other: to be written down as a suspect meanwhile."""
        self._began = self._flushed = 0.0
        """When the batch in hand was begun, and when results were sent last."""
        self._is_behind = False
        """Whether the batch before has results that are not sent."""
        self._handed_back = 0
        """How many jobs of the batch in hand have gone back to the queue undecided."""
        self._dropped = 0
        """How many entries of the last answer were no jobs."""
        self._seconds_per_job = self._batch_seconds = 1.0
        self._cold = False

    @property
    def model(self) -> ModelSettings:
        """The settings of the one model."""
        assert self.settings is not None  # noqa: S101 - read in work(), before anything asks
        return self.settings.model(self.queue.name)

    @property
    def horse_pid(self) -> int:
        """Process id of a horse that is at work, else 0."""
        return self.stable.horse.pid if self.stable.running and self.stable.horse else 0

    # -- the loop ---------------------------------------------------------------------------------------------------

    def work(  # noqa: PLR0913, PLR0917 - RQ's signature
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy | None = None,  # noqa: ARG002 - there is one queue
    ) -> bool:
        """Serve until stopped: take, predict, finish; return whether any job was run.

        The arguments are RQ's. A server that is away is waited for; stock RQ quits.

        Raises:
            SystemExit: with a sentence, when the queues and the configuration don't go together.
        """
        try:
            self.settings = check_queues(self.queue_names(), self.settings)
        except ConfigurationError as error:
            # RQ's command would print the traceback of anything else.
            raise SystemExit(error.message) from None
        self.ledger = Ledger(
            own_connection(self.connection, socket_timeout=REPLY_TIMEOUT, client_name=f"{self.name}:ledger"),
            self.queue,
            self.name,
            self._lease_id,
        )
        self.stable = Stable(
            self.queue.name,
            self.model,
            self.settings.root,
            log=self._log_model,
            warmed=self._report_warm,
            lost=lambda: self.lease.update(state="cold", horse_pid=None),
            broken=self._report_broken,
        )
        bulk = Queue(bulk_name(self.queue.name), connection=self.connection, serializer=JSONSerializer)
        self.scorer = Scorer(
            Ledger(self.ledger.connection, bulk, self.name, self._lease_id),
            self.stable,
            self.verdicts,
            self.connection,
            model=lambda: self.model,
            in_hand=self._in_hand,
            between=self._serve,
            beat=self._beat_beside,
            is_leaving=lambda: self._stop_requested,
        )
        self.succession = Succession(
            self.stable,
            self.queue.name,
            read=lambda: check_queues(self.queue_names(), self._settings.again()),
            adopt=self._adopt,
            answer=self._answer,
            wake=self._wake,
        )
        self._adopt(self.settings)
        self._patiently(lambda: self.sign_on(logging_level, date_format, log_format))
        self._report_start()
        if with_scheduler:
            self._patiently(lambda: self._start_scheduler(burst, logging_level, date_format, log_format))
        self._install_signal_handlers()
        self.lease = Lease(self.connection, self.queue.name, self._serving(), self._refresh, ttl=self.model.lease)
        done = 0
        try:
            self._patiently(lambda: publish_card(self.connection, self._card({}), only_if_unserved=True))
            self.lease.update()
            self.lease.start()
            self._patiently(self._bury_siblings)
            self._patiently(self._look_at_server)
            if self.model.preload:
                # If it fails, it is logged and on the card; the first job tries again.
                with suppress(ModelFault):
                    self.stable.warm(self._beat)
            # What is there now stays; to look through it again and again costs tens of milliseconds each time.
            gc.collect()
            gc.freeze()
            done = self._loop(burst, max_jobs, max_idle_time)
        except StopRequested:
            pass
        finally:
            if self.ledger.asked:
                with suppress(RedisError):
                    self._hand_back()
            self._flush_until_written()
            self.teardown()
        return done > 0

    def _patiently(self, step: Callable[[], object]) -> None:
        """Take a step of the start, again and again until the server lets it."""
        pause = 0.0
        while True:
            try:
                step()
            except RedisError as error:
                said = explain(error, place(self.connection))
                if isinstance(error, FATAL):
                    raise SystemExit(said) from None
                pause = min(pause * 2 or 0.1, _LONGEST_PAUSE)
                self.log.error("Worker %s: not started: %s; trying again in %.1f s", self.name, said, pause)
                self.interruptible(time.sleep, pause)
            else:
                return

    def _look_at_server(self) -> None:
        """Refuse a server that can't do what is needed, and say so of one that might lose jobs."""
        info = read_info(self.connection)
        if wrong := too_old(info, place(self.connection)):
            raise SystemExit(wrong)
        if warning := eviction(info):
            self.log.warning("Worker %s: %s", self.name, warning)
        if info.get("uptime_in_seconds", self.model.lease) < self.model.lease:
            self._distrust_leases()

    def _loop(self, burst: bool, max_jobs: int | None, max_idle_time: int | None) -> int:
        done, pause, idle_since = 0, 0.0, time.monotonic()
        wait = 0 if burst else min(PEEK, max_idle_time or PEEK)
        # With a number of jobs to run, none may be taken beyond it.
        self._may_look_ahead = max_jobs is None
        while not self._stop_requested and (max_jobs is None or done < max_jobs):
            try:
                if pause:
                    # What the rest stumbled over, a full server say, may let these pass.
                    self._flush()
                self._recover_if_due()
                self.maintain_if_due()
                self.succession.tend(self._beat)
                limit = self._batch_size() if max_jobs is None else min(self._batch_size(), max_jobs - done)
                # What ends now may put jobs into the queue: retries, dependents.
                ending = bool(self._ended)
                scored = max_jobs is None and not self._more_waits and self._score(burst=burst)
                ran = scored
                if not self._stop_requested:
                    ran += self.work_once(limit, 0 if scored else wait)
                done, pause = done + ran, 0.0
                if ran or ending or self._handed_back or self._dropped:
                    idle_since = time.monotonic()
                elif burst or (max_idle_time is not None and time.monotonic() - idle_since >= max_idle_time):
                    break
            except RedisError as error:
                # Away, loading, full, read-only: what is queued is safe there, and waiting is all there is to do.
                self._next_recovery = 0.0
                pause = min(pause * 2 or 0.1, _LONGEST_PAUSE)
                results = f"; {len(self._ended)} results not written" if self._ended else ""
                said = explain(error, place(self.connection))
                self.log.error("Worker %s: %s%s; trying again in %.1f s", self.name, said, results, pause)
                self.interruptible(time.sleep, pause)
        return done

    def _score(self, *, burst: bool) -> int:
        """Run the steps of scoring runs that wait, and single predictions between; return how many steps."""
        done = 0
        try:
            while not self._stop_requested and (burst or self.scorer.is_due):
                # Whoever waits for a prediction that has ended does not wait for a step as well.
                self._flush()
                if not self.scorer.work_once():
                    break
                done += 1
                self._serve()
        finally:
            if self.ledger.asked:
                # The loop looks by itself again.
                self._wake()
        return done

    def _serve(self) -> None:
        """Serve what has come meanwhile; between two slices of a file. No round trip tells that there is nothing."""
        began = time.monotonic()
        if began < self._serves_from:
            return
        try:
            if self.ledger.asked:
                if not self.ledger.answered:
                    if began - self._asked_at > PEEK + REPLY_TIMEOUT:
                        # A connection that has fallen silent.
                        self.ledger.hang_up()
                    return
                # People go first, but for the worker's own affairs.
                while not self._stop_requested and self.work_once(self._batch_size()):
                    if time.monotonic() - began > _SERVED:
                        self._flush()
                        break
            self._recover_if_due()
            self.maintain_if_due()
            self.succession.tend(self._beat_beside)
            self._asked_at = time.monotonic()
            if not self.ledger.asked:
                self._ask_for_jobs(self._batch_size(), PEEK, suspect=self.stable.is_warm)
        except RedisError as error:
            # There is nobody to serve; the file goes on.
            self._serves_from = time.monotonic() + _SERVED
            self._note_outage(error)

    def work_once(self, limit: int, wait: float = 0) -> int:
        """Take up to `limit` jobs of what there is, run them, and return how many.

        Their results are on the way when this returns, or go with the next call: `_flush_until_written` waits for them.

        Args:
            limit: how many at most.
            wait: seconds to wait for the first, but never for more than is there then.
        """
        self._handed_back = 0
        taken = self.take(limit, wait)
        if not taken:
            return 0
        self._began = self._flushed = time.monotonic()
        self._is_behind = bool(self._ended)
        left = ran = len(taken)
        try:
            self._look_ahead(taken)
            for endings in self.predict(taken):
                self._ended += endings
                left -= len(endings)
                # What is ready does not wait for the slow ones behind it; the last go when the horse is busy again.
                if left and time.monotonic() - self._flushed > _SLICE:
                    # With the server away they wait for the end; what is being predicted goes on.
                    with suppress(RedisError):
                        self._flush()
        except StopRequested:
            pass  # nothing is in hand any more
        except Exception as error:  # a bug of ours must cost no job more than a retry
            self.log.exception("Worker %s: unexpected error", self.name)
            lost = JobLost(f"the worker failed unexpectedly: {type(error).__name__}: {error}")
            decided = {ending.taken.id for ending in self._ended}
            undecided = [one for one in taken if one.id in self._in_hand and one.id not in decided]
            self._ended += [self.verdicts.failure(one, lost) for one in undecided]
        if self._is_behind and self.ledger.asked:
            # Nothing of this batch came to the horse, and so no beat, which would have sent those.
            with suppress(RedisError):
                self.finish()
        self._alone = None
        self._batch_seconds = time.monotonic() - self._began
        ran -= self._handed_back
        self._seconds_per_job = self._batch_seconds / max(ran, 1)
        return ran

    def _batch_size(self, held: int = 0) -> int:
        """Return how many jobs to take: a batch, or of what is predicted one by one as much as is done in a moment.

        More would wait in this worker's hands while another worker is idle.

        Args:
            held: how many jobs are predicted before.
        """
        horse = self.stable.horse
        if horse is None or not self.stable.is_warm:
            # The others need not wait here for the load.
            return 1
        if horse.predicts_together:
            return self.model.max_batch_size
        size = max(1, min(_MOST_HELD, int(_SLICE / max(self._seconds_per_job, 1e-6))))
        if self.model.max_jobs is not None:
            left = self.model.max_jobs - horse.predicted - held
            # If there are none, another horse is loading, and this one serves until that is ready.
            size = min(size, left) if left > 0 else size
        return size

    def _flush(self) -> None:
        """Finish what has ended so far."""
        self._settle()
        self.finish()
        self._settle()

    def _flush_until_written(self) -> None:
        """Finish what has ended, however long the server is away: the answers are here and nowhere else."""
        pause = 0.0
        while self._ended or any(self._unsettled):
            try:
                self._flush()
            except RedisError as error:
                pause = min(pause * 2 or 0.1, _LONGEST_PAUSE)
                said = explain(error, place(self.connection))
                self.log.error("Worker %s: results not written: %s; trying again in %.1f s", self.name, said, pause)
                if self._cold:
                    return
                time.sleep(pause)

    # -- take -------------------------------------------------------------------------------------------------------

    def take(self, limit: int, wait: float) -> list[Taken]:
        """Move what waits, up to a batch, from the queue to ``started`` and return it, oldest first.

        The results of the batch before go first. Where many jobs wait, these were asked for already, see `_look_ahead`,
        and those results go when the horse is busy again.
        """
        self.heartbeat_if_due()
        if not self.ledger.asked:
            wait = 0 if self._more_waits else wait
            if wait and self.model.max_wait_ms:
                self.finish()
                self._wait_for_company(wait)
                wait = 0
            self._finish_by(lambda plain: self._ask_for_jobs(limit, wait, suspect=self.stable.is_warm, closing=plain))
            try:
                self._settle()
            except RedisError:
                # What the server says to the rest of the packet is of no use later; what it gives is put back.
                self.ledger.hang_up()
                raise
            if wait and not self.ledger.answered:
                try:
                    self.interruptible(self.ledger.wait_for_jobs, wait)
                except StopRequested:
                    # What is taken at this very moment is still run.
                    self.ledger.stop_waiting()
        taken = self._given()
        self._more_waits = len(taken or ()) + self._dropped >= self._asked_for
        if not taken:
            self._flush()
        if taken is None:
            self._wait_while_suspended()
            return []
        self._in_hand |= {one.id: one for one in taken}
        # In place: the thread that hears commands adds to it meanwhile.
        self.verdicts.stopped.intersection_update(self._in_hand)
        self._state = WorkerStatus.BUSY if taken else WorkerStatus.IDLE
        return taken

    def _given(self) -> list[Taken] | None:
        """Return the jobs that were asked for, oldest first; None while RQ is suspended."""
        entries = self.ledger.jobs()
        for entry in entries or ():
            if isinstance(entry, str):
                why = "has no job to run" if JOB_ID_PATTERN.fullmatch(entry) else "is no job id, see RQ's rules"
                self.log.warning("Worker %s: queue entry %.100s %s, dropped", self.name, entry, why)
        jobs = [entry for entry in entries or () if isinstance(entry, Taken)]
        self._dropped = len(entries or ()) - len(jobs)
        return None if entries is None else jobs

    def _ask_for_jobs(self, limit: int, wait: float = 0, **how: Any) -> None:
        self._asked_for = limit
        self.ledger.ask_for_jobs(limit, self.model.max_batch_bytes, RUN_TTL, wait, **how)

    def _look_ahead(self, taken: list[Taken]) -> None:
        """Where many jobs wait, have the server look for the next batch before this one goes to the horse.

        So the server is at work while this process is. If this batch takes longer than its like, what was found goes
        back to where it came from, see `_hand_back`.
        """
        if (
            self._more_waits
            and self._may_look_ahead
            and not self._stop_requested
            and self._batch_seconds < _HELD
            and self.stable.is_warm
            and not self._wears_out(len(taken))
            and time.monotonic() < self._next_recovery
        ):
            alone = taken[0] if len(taken) == 1 and not taken[0].is_suspect else None
            try:
                self._ask_for_jobs(self._batch_size(len(taken)), suspect=False, alone=alone, ahead=True)
            except RedisError as error:
                self._note_outage(error)

    def _wears_out(self, count: int) -> bool:
        """Whether the horse is to be replaced after so many more predictions; jobs would wait for that here."""
        horse, most = self.stable.horse, self.model.max_jobs
        return horse is not None and most is not None and horse.predicted + count >= most

    def _hand_back(self) -> None:
        """Put back, at the front, the jobs in hand that are not begun; it costs them no retry."""
        waiting = [self._in_hand[item.id] for item in self.stable.take_back()]
        self._handed_back += len(waiting)
        self._give_back(waiting)
        if self.ledger.asked:
            self._more_waits = False
            self._give_back(self._given() or ())
        self._flush()

    def _give_back(self, jobs: Sequence[Taken]) -> None:
        # Each goes to the front, so the last goes first, and all of them before what goes back already, which is older.
        self._ended[:0] = [
            self.verdicts.failure(one, JobCancelled()) if one.id in self.verdicts.stopped else given_back(one)
            for one in reversed(jobs)
        ]

    def _wait_for_company(self, seconds: float) -> None:
        """Wait for a job, and then, as the configuration asks, for others to join it."""
        queue = self.queue.key
        if self.interruptible(self.ledger.connection.blmove, queue, queue, seconds, "LEFT", "LEFT") is not None:
            self.interruptible(time.sleep, self.model.max_wait_ms / 1000)

    def _wait_while_suspended(self) -> None:
        if self._state != WorkerStatus.SUSPENDED:
            self.log.info("Worker %s: suspended, run 'rq resume' to go on", self.name)
            self.set_state(WorkerStatus.SUSPENDED)
        # In the middle of a file that goes on.
        if self.scorer.job_id is None:
            self.interruptible(time.sleep, 1)

    # -- recover ----------------------------------------------------------------------------------------------------

    def _recover_if_due(self) -> None:
        """Put back what workers held that are dead, and what this one was given by an answer that was lost.

        Such an answer may yet come about: a server that has not noticed the end of a connection takes jobs for it.
        """
        now_ = time.monotonic()
        # With an answer under way, this worker does not know all that it holds; `_look_ahead` lets that end.
        if now_ < self._next_recovery or self.ledger.asked:
            return
        self._next_recovery = now_ + min(_RECOVERY, self.model.lease)
        self._recover(dead=now_ >= self._trusts_leases_from and self.lease.is_sound)

    def _recover(self, *, dead: bool, buried: Iterable[str] = ()) -> None:
        back, poison = self.ledger.recover(self._in_hand.values(), RUN_TTL, dead=dead, buried=buried)
        steps_back, steps = self.scorer.ledger.recover(
            self._in_hand.values(), RUN_TTL, dead=dead, buried=buried, deaths=STEP_DEATHS
        )
        back += steps_back
        if back:
            self.log.warning("Worker %s: put back %d jobs that nobody holds any more", self.name, back)
        for one in poison:
            self._in_hand[one.id] = one
            message = f"{DEATHS} workers died while they ran this job alone; it is not run again"
            self._ended.append(self.verdicts.failure(one, JobLost(message, retryable=False)))
        for one in steps:
            self.scorer.bury(one)

    def _distrust_leases(self) -> None:
        """Give the others as long as a lease to renew theirs: the server was away just now."""
        self._trusts_leases_from = time.monotonic() + self.model.lease

    def _bury_siblings(self) -> None:
        """Put back what processes of the same pool held that are dead, without waiting for the end of their leases."""
        status = read_model(self.connection, self.queue.name)
        siblings = [one for one in status.serving if one.pool == _POOL] if status and _POOL else []
        if dead := [one.lease for one in siblings if not _runs(one.pid)]:
            self._recover(dead=False, buried=dead)
        for lease in dead:
            drop_lease(self.connection, self.queue.name, lease)

    # -- predict ----------------------------------------------------------------------------------------------------

    def predict(self, taken: list[Taken]) -> Iterator[list[Ending]]:
        """Run jobs through the horse and yield how they end, as soon as they have."""
        items: list[Item] = []
        for one in taken:
            try:
                items.append(self.verdicts.item(one))
            except RqModelsError as error:
                yield [self.verdicts.failure(one, error)]
        if not items:
            return
        was_cold = not self.stable.is_warm
        try:
            # Now, so that loading does not count as working on these jobs.
            self.stable.warm(self._beat)
        except ModelFault as error:
            yield [self.verdicts.ending(self._in_hand[item.id], came) for item, came in self.stable.unrun(items, error)]
            return
        began = now()
        stopped = [item for item in items if item.id in self.verdicts.stopped]
        yield [self.verdicts.failure(self._in_hand[item.id], JobCancelled()) for item in stopped]
        # Loading takes its time.
        late = [item for item in items if was_cold and item not in stopped and self._in_hand[item.id].is_late]
        yield [self.verdicts.failure(self._in_hand[item.id], DeadlineExceeded()) for item in late]
        left = [item for item in items if item not in stopped and item not in late]
        self._alone = self._in_hand[left[0].id] if len(left) == 1 else None
        self._began = time.monotonic()
        for some in self.stable.predict(left, self._beat) if left else ():
            ended = now()
            # Of the horse that gave these answers; a crash may have brought up another in the middle of the batch.
            version = self.lease.serving.version
            endings = []
            for item, came in some:
                one = self._in_hand[item.id]
                one.started_at, one.ended_at, one.model_version = began, ended, version
                endings.append(self.verdicts.ending(one, came))
            back = sum(ending.put_back for ending in endings)
            self._handed_back += back
            if back and self.ledger.asked:
                # What was taken ahead is younger, and goes to the front before these do.
                with suppress(RedisError):
                    self._hand_back()
            began = ended
            yield endings

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:  # noqa: ARG002 - RQ's signature
        """Kill the horse, from any thread: for RQ's kill-horse command and a cold shutdown."""
        self.stable.kill()

    # -- finish -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Ask the server to record how these runs have ended; `_settle` hears what it says."""
        if self._ended:
            self._finish_by(self.ledger.close)

    def _finish_by(self, tell: Callable[[list[Ending]], None]) -> None:
        """Have the server told of what has ended, but for what RQ's own methods tell it of."""
        self._settle()
        ended, rest = self._ended[:_MOST_FINISHED], self._ended[_MOST_FINISHED:]
        plain = [ending for ending in ended if self._is_plain(ending)]
        others = [ending for ending in ended if not self._is_plain(ending)]
        tell(plain)
        self._unsettled, self._ended, self._flushed = (plain, others), rest, time.monotonic()

    def _settle(self) -> None:
        """Hear what became of the runs that were to be recorded; those that are no plain ones RQ records now."""
        (plain, others), self._unsettled = self._unsettled, ([], [])
        left = [*plain, *others]
        try:
            for ending, answer in zip(plain, self.ledger.closed() if plain else (), strict=True):
                if answer == HAS_DEPENDENTS:
                    others.append(ending)
                    continue
                if answer == GIVEN_UP:
                    self.log.warning("Worker %s: job %s was given up meanwhile", self.name, ending.taken.id)
                elif answer == UNWRITABLE:
                    self.log.error("Worker %s: job %s could not be finished whole", self.name, ending.taken.id)
                left.remove(ending)
                self._let_go(ending)
            for ending in others:
                self.finish_by_rq(ending)
                left.remove(ending)
                self._let_go(ending)
        finally:
            # Whoever waits for the server comes back to it; the fence makes a repetition harmless.
            self._ended = [*left, *self._ended]

    def _let_go(self, ending: Ending) -> None:
        if self._in_hand.get(ending.taken.id) is ending.taken:
            del self._in_hand[ending.taken.id]

    def _is_plain(self, ending: Ending) -> bool:
        if ending.put_back:
            # To RQ it would be a failure: a retry spent, or the end of a job that has none.
            return True
        if ending.status == JobStatus.QUEUED:
            intervals = ending.taken.fields.get(b"retry_intervals") or b""
            # Retries that wait go through RQ's scheduled registry.
            return ending.taken.is_plain and intervals.strip(b"[0, ]") == b""
        # A job that is not kept at all is deleted with all its traces.
        return ending.taken.is_plain and ending.ttl != 0

    # -- report -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Do what is due while the horse works, and keep the worker and its jobs from being taken for dead."""
        if self._stop_requested and not self._in_hand and not self.stable.is_warm:
            # Loading for nobody.
            raise StopRequested
        try:
            self._look_after_batch()
            if self.ledger.asked or not self._in_hand:
                # This batch has just begun; of the one before, which may have ended, no run must beat any more.
                self.heartbeat_if_due()
        except RedisError as error:
            self._note_outage(error, "no heartbeat: ")
        else:
            self._beat_beside()

    def _look_after_batch(self) -> None:
        """Write the results of the batch before; if this one takes its time, hand back what is not begun of it."""
        now_ = time.monotonic()
        if not self.stable.running or now_ - self._began > _HELD:
            # Or while the horse loads.
            self._hand_back()
            left = self.stable.horse.left if self.stable.horse and self.stable.running else []
            if len(left) == 1:
                self._alone = self._in_hand[left[0].id]
        if self._alone and not self._alone.is_suspect:
            self.ledger.suspect(self._alone)
        if not self.ledger.asked:
            if self._is_behind or now_ - self._flushed > _SLICE:
                self._flush()
        elif self._is_behind:
            # What the server says to these is heard with the next batch, which is near.
            self.finish()
        self._is_behind = False

    def _beat_beside(self) -> None:
        """Keep the worker, its jobs and their executions from being taken for dead."""
        if time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + self.job_monitoring_interval / 2
        in_hand = list(self._in_hand.values())
        try:
            # RQ would make the record of a run anew that is given up.
            with self.connection.pipeline(transaction=False) as pipe:
                for taken in in_hand:
                    pipe.exists(taken.execution.key)
                found = pipe.execute()
            for taken, is_there in zip(in_hand, found, strict=True):
                if is_there:
                    self.maintain_heartbeats(taken.job, taken.execution)
        except RedisError as error:
            self._note_outage(error, "no heartbeat: ")

    def _note_outage(self, error: RedisError, what: str = "") -> None:
        # What an answer that was lost gave to this worker is looked for as soon as may be.
        self._next_recovery = 0.0
        self.log.warning("Worker %s: %s%s", self.name, what, explain(error, place(self.connection)))

    def _adopt(self, settings: Settings) -> None:
        """Go by these settings from now on; the address and the lease are those of the start."""
        if self.ledger.asked:
            # By the settings of before: a batch of that size may be too large for the new model.
            try:
                self._hand_back()
            except RedisError as error:
                self._note_outage(error)
        self.settings = settings
        self.default_result_ttl = self.model.result_ttl
        # The operator listed them; RQ imports them here, and they are found beside the models.
        ModelJob.allowed_callbacks = frozenset(self.model.allowed_callbacks)
        if self.model.allowed_callbacks and str(settings.root) not in sys.path:
            sys.path.append(str(settings.root))

    @property
    def _settings(self) -> Settings:
        assert self.settings is not None  # noqa: S101 - read in work(), before anything asks
        return self.settings

    def _card(self, card: dict[str, Any]) -> Card:
        known = {key: card[key] for key in Card.__dataclass_fields__ if key in card and key != "name"}
        limits = {key: getattr(self.model, key) for key in _PUBLISHED}
        return Card(name=self.queue.name, **{**known, **limits})

    def _serving(self) -> Serving:
        return Serving(lease=self._lease_id, worker=self.name, host=socket.gethostname(), pid=os.getpid(), pool=_POOL)

    def _refresh(self, serving: Serving) -> Serving:
        state = serving.state if self.stable.is_warm or serving.state != "warm" else "cold"
        return replace(serving, state=state, loads=self.stable.loads)

    def _report_start(self) -> None:
        read = ", ".join(str(path) for path in self._settings.files)
        where = self.connection.connection_pool.connection_kwargs
        address = where.get("path") or f"{where.get('host')}:{where.get('port')}/{where.get('db')}"
        self.log.info("Worker %s: read %s; Redis at %s", self.name, read, address)
        if not RQ_VERSION.startswith(f"{PROVEN_RQ}."):
            self.log.warning("Worker %s: RQ %s was not tested, %s was", self.name, RQ_VERSION, PROVEN_RQ)

    def _log_model(self, horse: Horse, line: str) -> None:
        first, *more = horse.running or ("",)
        jobs = f" {first}" * bool(first) + f" and {len(more)} more" * bool(more)
        _model_log.info("[%s %s%s] %s", self.queue.name, horse.pid or "-", jobs, line)

    def _report_warm(self, card: dict[str, Any], pid: int) -> None:
        # What no server can store as text is no reason not to predict.
        version = str(card.get("version") or "").encode(errors="replace").decode() or None
        self.lease.update(state="warm", error=None, horse_pid=pid, version=version)
        try:
            publish_card(self.connection, self._card({**card, "version": version}))
            self.ledger.count("loads")
        except RedisError as error:
            self.log.error("Worker %s: card not published: %s", self.name, error)
        self.log.info("Worker %s: model %s is warm", self.name, self.queue.name)

    def _report_failure(self, taken: Taken, how: str, error: RqModelsError) -> None:
        self.log.warning("Worker %s: job %s %s: %s: %s", self.name, taken.id, how, type(error).__name__, error)
        if self._exc_handlers:
            try:
                call_exception_handlers(self._exc_handlers, taken.job, type(error), error, None)
            except Exception:
                # Somebody else's code; the jobs' ends are not to be lost by it.
                self.log.exception("Worker %s: exception handler of job %s", self.name, taken.id)

    def _report_broken(self, error: ModelFault) -> None:
        self.lease.update(state="broken", error=error.message, horse_pid=None, version=None)
        self.log.error("Worker %s: %s\n%s", self.name, error.message, error.traceback or "")

    def _answer(self, token: str, error: RqModelsError | None) -> None:
        version = self.lease.serving.version
        try:
            orders.answer(self.connection, token, orders.Answer(self.name, version, error and error.record()))
        except RedisError as away:
            self.log.error("Worker %s: the reload's outcome is not told: %s", self.name, away)

    # -- stop -------------------------------------------------------------------------------------------------------

    def _install_signal_handlers(self) -> None:
        super()._install_signal_handlers()
        on_hang_up(self.succession.ask, self.request_stop)

    def _wake(self) -> None:
        """End the wait for jobs, if there is one, from any thread: there is something else to do."""
        with suppress(RedisError):
            self.ledger.stop_waiting()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        """First SIGTERM or Ctrl-C: finish what is in hand, take nothing more, leave."""
        self._shutdown_requested_date = now()
        signal.signal(signal.SIGINT, self.request_force_stop)
        signal.signal(signal.SIGTERM, self.request_force_stop)
        self.handle_warm_shutdown_request()
        self._stop_requested = self.stable.stopping = True
        if self._may_be_interrupted:
            raise StopRequested

    def handle_payload(self, message: Any) -> None:
        """Carry out a command; RQ's own ``stop-job`` knows the first job of a batch only. Runs on the pubsub thread."""
        try:
            payload = parse_payload(message)
            command = payload.get("command")
            if command in ("stop-job", "stop-execution"):
                self._stop_job(str(payload.get("job_id")))
            elif command == orders.RELOAD:
                self.succession.ask(str(payload.get("token")))
                self._wake()
            elif command == orders.LOOK:
                self.scorer.look_soon()
                self._wake()
            elif command == orders.DRAIN:
                # Once: the second signal would kill the prediction in hand.
                if not self._stop_requested:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            else:
                super().handle_payload(message)
        except Exception:
            # Anybody can publish anything; the thread that would die of it is the only one that hears commands.
            self.log.exception("Worker %s: command ignored", self.name)

    def _stop_job(self, job_id: str) -> None:
        # Whether it is in hand or not: this very moment it may be on its way here. The next take forgets all others.
        self.verdicts.stopped.add(job_id)
        if job_id not in self._in_hand and not self.ledger.asked:
            self.log.warning("Worker %s: told to stop job %s, which is not in hand", self.name, job_id)
            return
        # In a batch its result is dropped instead, and a step of a scoring run ends after the slice at work.
        if job_id != self.scorer.job_id:
            self.stable.stop(job_id)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        """Second signal: kill the horse; what it had not decided goes back to the front of the queue."""
        # A terminal's Ctrl-C and a supervisor's SIGTERM often come together; RQ takes two within a second for one.
        if self._shutdown_requested_date is None or (now() - self._shutdown_requested_date).total_seconds() < 1:
            return
        self.log.warning("Worker %s: cold shutdown", self.name)
        self._cold = True
        self.stable.abandon()

    def teardown(self) -> None:
        """Leave Redis and the machine as if this worker had never been."""
        if self._stop_requested:
            # It is leaving already; one more signal must not end it in the middle of signing off.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.succession.close()
        self.scorer.close()
        self.stable.drop()
        self.lease.release()
        self.ledger.leave()
        self.scorer.ledger.leave()
        try:
            super().teardown()
        except RedisError as error:
            self.log.warning("Worker %s: not signed off, Redis is away: %s", self.name, error)


_model_log = logging.getLogger("rq.worker.model")


_POOL = os.environ.get(POOL_VARIABLE)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_queues(queues: list[str], settings: Settings | None = None) -> Settings:
    """Return the settings, or raise ConfigurationError unless these queues are exactly one configured model.

    With two queues RQ pops without a trace: a worker killed then loses the job for ever.
    """
    settings = settings or Settings.load()
    if len(queues) != 1:
        raise ConfigurationError(
            f"a ModelWorker serves exactly one model, not {len(queues)} ({', '.join(queues)}); "
            "start one worker for each"
        )
    python = settings.model(queues[0]).python
    if os.sep in python and not os.access(python, os.X_OK):
        raise ConfigurationError(f"{settings.where(queues[0], 'python')}: there is no interpreter {python}; make it")
    return settings


def run_worker(settings: Settings, model: str, log_level: str = "INFO") -> int:
    """Serve one model in this process until it is stopped; return the exit status.

    Raises:
        ConfigurationError: the model is not configured.
        redis.exceptions.RedisError: the server does not answer at the start.
    """
    check_queues([model], settings)
    connection = Redis.from_url(settings.redis_url)
    name = f"{model}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    worker = ModelWorker(
        [model],
        name=name,
        connection=connection,
        settings=settings,
        maintenance_interval=30,
        job_monitoring_interval=10,
    )
    worker.work(logging_level=log_level)
    return 0
