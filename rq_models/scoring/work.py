"""The worker's side of scoring: the steps of runs, taken from ``<model>.bulk`` one at a time.

`Scorer.work_once` takes a step and runs it. What reads or writes files runs on a thread beside, some slices ahead of
the model and some behind it; the main thread gives slices to the horse, and between two of them lets the worker serve
single predictions. Nothing of a chunk is visible before it is committed; see `rq_models.scoring.runs`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError
from rq.exceptions import StopRequested
from rq.job import JobStatus
from rq.utils import now

from rq_models.errors import (
    ConfigurationError,
    InvalidInput,
    InvalidRun,
    JobCancelled,
    JobLost,
    ModelFault,
    RunFailed,
    UnknownRun,
)
from rq_models.health import is_about_one_key
from rq_models.ledger import Ending
from rq_models.rq_worker import RUN_TTL
from rq_models.scoring import runs
from rq_models.scoring.plan import Misfit
from rq_models.stable import GaveUp
from rq_models.verdicts import given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from redis import Redis

    from rq_models.ledger import Ledger, Taken
    from rq_models.scoring.runs import Record
    from rq_models.settings import ModelSettings
    from rq_models.stable import Stable
    from rq_models.verdicts import Verdicts

T = TypeVar("T")

_LOOK = 1.0
"""Seconds between two looks at the queue, at most."""
_POLL = 0.01
DEATHS = 10
"""Workers that may die in the middle of one step."""
_LONGEST_PAUSE = 1.0
"""Seconds; as long a signal may not be heeded."""
_ALLOCATOR = "ARROW_DEFAULT_MEMORY_POOL"
_log = logging.getLogger("rq.worker.scoring")


class OtherVersion(GaveUp):
    """A step belongs to a run that was begun with another version of the model than this worker has."""


class Scorer:
    """Runs the steps of one model's runs.

    Args:
        ledger: of the queue ``<model>.bulk``.
        stable: keeps the horse.
        verdicts: of the model; it knows which jobs were stopped.
        connection: of the server.
        model: returns the model's settings, which a reload changes.
        in_hand: the worker's jobs; the step at work is one of them.
        between: serves single predictions; called between two slices.
        beat: called about once a second.
        is_leaving: whether the worker is to finish what is in hand and leave.
    """

    def __init__(  # noqa: PLR0913 - what a worker lends it
        self,
        ledger: Ledger,
        stable: Stable,
        verdicts: Verdicts,
        connection: Redis,
        *,
        model: Callable[[], ModelSettings],
        in_hand: dict[str, Taken],
        between: Callable[[], None],
        beat: Callable[[], None],
        is_leaving: Callable[[], bool],
    ) -> None:
        self.ledger = ledger
        self.job_id: str | None = None
        """Of the step at work."""
        self.connection, self.model = connection, model
        self._stable, self._verdicts, self._in_hand, self._is_leaving = stable, verdicts, in_hand, is_leaving
        self._serve, self._beat = between, beat
        self.missed_since: dict[tuple[str, int], float] = {}
        """Since when no worker has the version of the model that a run was begun with, by its id and attempt."""
        self._next_look = 0.0
        self._leave = threading.Event()
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="scoring")

    @property
    def is_due(self) -> bool:
        """Whether to look for a step."""
        return time.monotonic() >= self._next_look

    def look_soon(self) -> None:
        """Look for a step as soon as there is nothing else to do; from any thread."""
        self._next_look = 0.0

    def work_once(self) -> bool:
        """Run the step that waits first; return whether there was one.

        Raises:
            RedisError: the server is away; nothing is taken, or it is in hand and is put back by a recovery.
        """
        self._next_look = time.monotonic() + _LOOK
        self.ledger.ask_for_jobs(1, 1, RUN_TTL)
        taken = next((one for one in self.ledger.jobs() or () if not isinstance(one, str)), None)
        if taken is None:
            return False
        self.job_id = taken.id
        self._in_hand[taken.id] = taken
        try:
            ending = self._run(taken)
            self.tell(partial(self._close, ending))
        finally:
            self.job_id = None
            self._in_hand.pop(taken.id, None)
        if ending.status == JobStatus.QUEUED:
            # Not at once: a store that fails needs time.
            self._next_look = time.monotonic() + _LOOK
            return False
        self._next_look = 0.0
        return True

    def bury(self, taken: Taken) -> None:
        """Let the run of a step fail of which too many workers have died."""
        record = None
        try:
            run, attempt, _ = _parsed(taken)
            found = self.tell(partial(runs.read, self.connection, run))
            record = found if found.attempt == attempt else None
        except RedisError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever stands there, the job ends
            _log.warning("step %s: %s", taken.id, error)
        why = f"{DEATHS} workers died while they did step {taken.id}; it may take more memory than they have"
        self.tell(partial(self._close, self._given_up(taken, record, why)))

    def close(self) -> None:
        """Let what is read or written come to an end."""
        self._leave.set()
        self._clerk.shutdown(cancel_futures=True)

    def _close(self, ending: Ending) -> None:
        self.ledger.close([ending])
        self.ledger.closed()

    def tell(self, step: Callable[[], T]) -> T:
        """Tell the server something, however long it is away: it is known here and nowhere else.

        Raises:
            RedisError: it is away, and this worker must leave at once; or a key holds something else than it should.
        """
        pause = 0.0
        while True:
            try:
                return step()
            except RedisError as error:
                if self._stable.closing.is_set() or is_about_one_key(error):
                    raise
                pause = min(pause * 2 or 0.1, _LONGEST_PAUSE)
                _log.error("%s; trying again in %.1f s", error, pause)
                time.sleep(pause)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _run(self, taken: Taken) -> Ending:
        """Run a step and return how it ends; nothing that it raises ends the worker, but that the server is away."""
        record = None
        try:
            run, attempt, step = _parsed(taken)
            with suppress(UnknownRun):
                record = self.tell(partial(runs.read, self.connection, run))
            if record is None or record.attempt != attempt or record.progress.is_over:
                if record is not None and step == runs.MERGE and record.progress.state == "finished":
                    # By one that died before it could clear up.
                    self.aside(self.aside(_steps).clear_up, record)
                return self._done(taken, "its run is over")
            return self._step(taken, record, step)
        except (GaveUp, StopRequested) as error:
            return self._left_off(taken, record, behind=isinstance(error, OtherVersion))
        except (InvalidRun, InvalidInput, ModelFault, ConfigurationError, Misfit) as error:
            return self._given_up(taken, record, str(error))
        except RedisError as error:
            if not is_about_one_key(error):
                raise
            why = f"the run's record in Redis is damaged: {error}"
            if record is not None:
                with suppress(RedisError):
                    runs.end(self.connection, record, "failed", why, by=taken)
            return self._verdicts.failure(taken, RunFailed(why, retryable=False))
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker goes on
            return self._failed(taken, record, error)

    def _left_off(self, taken: Taken, record: Record | None, *, behind: bool = False) -> Ending:
        if taken.id not in self._verdicts.stopped:
            # Not by this worker, just now: another has the model's version, or it is leaving.
            return given_back(taken, behind=behind)
        # If somebody meant this job only: its run does not go on without it.
        if record is not None and self.tell(partial(runs.end, self.connection, record, "cancelled", by=taken)):
            self.tell(partial(runs.clear, self.connection, record, taken.id))
        return self._verdicts.failure(taken, JobCancelled())

    def _failed(self, taken: Taken, record: Record | None, error: Exception) -> Ending:
        """Return how a step ends that a store, or a mistake of ours, has ended: it is tried again, some times."""
        from rq_models.scoring.files import BadFile  # noqa: PLC0415 - it imports fsspec

        if taken.id in self._verdicts.stopped:
            return self._left_off(taken, record)
        message = str(error)
        if not isinstance(error, BadFile):
            _log.exception("step %s", taken.id)
            message = f"{type(error).__name__}: {error}"
        elif not error.retryable:
            return self._given_up(taken, record, message)
        ending = self._verdicts.failure(taken, JobLost(message))
        return self._given_up(taken, record, message) if ending.status == JobStatus.FAILED else ending

    def _step(self, taken: Taken, record: Record, step: str | int) -> Ending:
        steps = self.aside(_steps)
        if step == runs.PLAN:
            steps.plan(self, record, taken)
        elif step == runs.MERGE:
            steps.merge(self, record, taken)
        else:
            steps.chunk(self, record, taken, int(step))
        return self._done(taken, None)

    def _done(self, taken: Taken, note: str | None) -> Ending:
        taken.ended_at = now()
        # What planned a run shows how far it has come, in its meta.
        ttl = runs.KEPT_PLAN if taken.id.endswith(f"-{runs.PLAN}") else runs.KEPT
        return Ending(taken, JobStatus.FINISHED, ttl, note)

    def _given_up(self, taken: Taken, record: Record | None, why: str) -> Ending:
        """Let the whole run fail, with the one sentence that says why."""
        if record is not None and self.tell(partial(runs.end, self.connection, record, "failed", why, by=taken)):
            self.tell(partial(runs.clear, self.connection, record, taken.id))
        elif record is not None:
            self._tidy(record)
        return self._verdicts.failure(taken, RunFailed(why, retryable=False))

    def _tidy(self, record: Record) -> None:
        """Remove what this step, which came too late, has left of a run that others have finished."""
        with suppress(Exception):  # how the step ends does not depend on it
            now_ = self.tell(partial(runs.read, self.connection, record.id))
            if now_.progress.state == "finished":
                self.submit(_steps().clear_up, now_).result()

    def between(self) -> None:
        """Serve single predictions; then raise GaveUp if this step is not to go on."""
        if self._is_leaving() or self.job_id in self._verdicts.stopped:
            raise GaveUp
        self._serve()

    def submit(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Have something done on the thread beside, after what was begun there before."""
        return self._clerk.submit(call, *args, **kwargs)

    def aside(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Have something done on the thread beside, and serve meanwhile."""
        work = self.submit(call, *args, **kwargs)
        return self.result(work)

    def result(self, work: Future[T]) -> T:
        """Wait for what is done on the thread beside, and serve meanwhile."""
        next_beat = time.monotonic() + 1
        while not work.done():
            wait_for([work], timeout=_POLL)
            if work.done():
                break
            self.between()
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + 1
        return work.result()

    def card(self) -> dict[str, Any]:
        """Return the card of the model, which is loaded if it is not yet."""
        try:
            return self._stable.warm(self._beat).card or {}
        except ModelFault:
            if self._is_leaving():
                raise GaveUp from None
            raise

    def version(self) -> str:
        """Return the version of the model that is loaded now."""
        return str(self.card().get("version") or "")

    def ask(self, question: dict[str, Any], blob: bytes) -> dict[str, Any]:
        """Return the horse's answer to a slice; see `Stable.score`."""
        return self._stable.score(question, blob, self.job_id or "", self._beat, self.between)

    def pulse(self) -> None:
        """Let long work on the thread beside end when nobody waits for it any more."""
        if self._leave.is_set():
            raise GaveUp

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Let what was begun on the thread beside have ended when this has."""
        self._leave.clear()
        try:
            yield
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Wait until nothing is done on the thread beside, as soon as may be."""
        self._leave.set()
        self.submit(int).result()


def _steps() -> Any:
    # pyarrow's own allocator keeps what was freed, 20 MB in each worker; which one it takes is settled by its import.
    given = os.environ.get(_ALLOCATOR)
    os.environ.setdefault(_ALLOCATOR, "system")
    try:
        from rq_models.scoring import steps  # noqa: PLC0415 - 60 MB that only scoring needs
    except ImportError as error:
        message = f"scoring files needs {error.name} where the workers are; there, pip install 'rq-models[score]'"
        raise ConfigurationError(message) from None
    finally:
        if given is None:
            # The model's process, which may have it too, is none of ours.
            os.environ.pop(_ALLOCATOR, None)
    return steps


def _parsed(taken: Taken) -> tuple[str, int, str | int]:
    """Return run, attempt and step of a job; raise InvalidRun if it is none of ours."""
    data = taken.fields.get(b"data") or b""
    with suppress(ValueError, TypeError):
        name, _, (run, attempt, step), _ = json.loads(data)
        if name == runs.STEP and isinstance(run, str) and isinstance(attempt, int) and isinstance(step, str | int):
            return run, attempt, step
    raise InvalidRun(f"job {taken.id} is no step of a run")
