"""The stable: keeps one model's horse. Warms it, runs jobs through it, and brings up another when it dies."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from rq_models.errors import ModelFault, ModelTimeout, RqModelsError
from rq_models.horse import Horse, Interrupted, Item
from rq_models.host import columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rq_models.settings import ModelSettings

Came: TypeAlias = "dict[str, Any] | RqModelsError | None"
"""What came of an item: its outcome, or the fault that was its own, or None if it was not decided any more."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds between two attempts to load; doubled each time."""
_SLICE = 0.1
_log = logging.getLogger("rq.worker.stable")


class GaveUp(Exception):
    """The rows are not decided: the worker is leaving, or their job was stopped."""


def _nothing() -> None:
    pass


class Stable:
    """The horses of one worker, one at work at a time.

    Args:
        name: the model's name.
        model: its settings.
        root: the project's root.
        log: is given each line that the model prints, and the horse that it came from.
        warmed: is told the card and the process id when a horse holds the model.
        lost: is told when a warm horse is gone.
        broken: is told why the model does not load.
    """

    def __init__(  # noqa: PLR0913 - what a horse needs, and whom to tell
        self,
        name: str,
        model: ModelSettings,
        root: Path,
        *,
        log: Callable[[Horse, str], None],
        warmed: Callable[[dict[str, Any], int], None],
        lost: Callable[[], None],
        broken: Callable[[ModelFault], None],
    ) -> None:
        self.horse: Horse | None = None
        self.model = model
        self._name, self._root = name, root
        self._log, self._warmed, self._lost, self._broken = log, warmed, lost, broken
        self._loads_of_former_horses = 0
        self._killed_for: str | None = None
        self._is_broken = False
        self.closing = threading.Event()
        self.stopping = False
        """Whether the worker finishes what is in hand and leaves: then nothing waits for another attempt to load."""

    # Other threads ask, too, and the horse may be dropped meanwhile: so it is looked up once.

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the jobs that the model works on just now."""
        horse = self.horse
        return horse.running if horse is not None else ()

    @property
    def loads(self) -> int:
        """How often the model was loaded, by all horses so far."""
        horse = self.horse
        return self._loads_of_former_horses + (horse.loads if horse is not None else 0)

    @property
    def is_warm(self) -> bool:
        """Whether a living horse holds the model."""
        horse = self.horse
        return horse is not None and horse.alive and horse.card is not None

    def new_horse(self, model: ModelSettings) -> Horse:
        """Return another horse of these settings; it is not started."""
        horse = Horse(self._name, model, self._root, lambda line: self._log(horse, line))
        return horse

    def warm(self, beat: Callable[[], None]) -> Horse:
        """Return a horse that holds the model; the first call, and the first after a death, loads it.

        Loading has a time limit of its own, outside the jobs'. It is tried again up to `load_retries` times after a
        growing pause, for what passes by itself: a file server that restarts, a card whose memory another process
        still holds. A load that took too long is not: it has waited enough.

        Once these attempts have failed the model is known to be broken, and each later call makes one attempt, without
        a pause. So the jobs that come then learn of it at the price of one load for each batch, and the first one
        after the repair runs. To answer them by what is known already, for a while, would be cheaper; but whoever has
        just repaired a file and tries again would be told of the old fault.

        Raises:
            ModelFault: it does not load.
        """
        if self.horse is not None and self.is_warm:
            return self.horse
        retries = 0 if self._is_broken else self.model.load_retries
        pause = _FIRST_PAUSE
        while True:
            # A failed import leaves half of itself in the process: each attempt gets a fresh one.
            self.drop()
            horse = self.horse = self.new_horse(self.model)
            self._forget_kill()
            try:
                card = horse.start().load(beat)
                break
            except ModelFault as error:
                self.drop()
                if self._is_leaving:
                    raise
                if not retries or isinstance(error, ModelTimeout):
                    self._is_broken = True
                    self._broken(error)
                    raise
                _log.warning("%s; trying again in %g s", error, pause)
                if not self._pause(pause, beat):
                    raise
            retries -= 1
            pause = min(pause * 2, _LONGEST_PAUSE)
        self._is_broken = False
        self._warmed(card, horse.pid)
        return horse

    @property
    def _is_leaving(self) -> bool:
        return self.stopping or self.closing.is_set()

    def _pause(self, seconds: float, beat: Callable[[], None]) -> bool:
        """Wait, unless the worker is leaving; return whether it is not."""
        until = time.monotonic() + seconds
        while not self._is_leaving and (left := until - time.monotonic()) > 0:
            beat()
            time.sleep(min(left, _SLICE))
        return not self._is_leaving

    def unrun(self, items: Sequence[Item], error: ModelFault) -> list[tuple[Item, Came]]:
        """Return what comes of items whose model did not load: its fault, or nothing yet if the worker is leaving.

        What comes to nothing is told the last first: each goes back to the front of the queue.
        """
        came: Came = None if self._is_leaving else error
        told = [(item, came) for item in items]
        return told[::-1] if came is None else told

    def switch(self, horse: Horse, model: ModelSettings) -> None:
        """Let a horse that holds the model already take over, with the settings it was made of; between two batches."""
        assert horse.card is not None  # noqa: S101 - it holds the model
        former, self.horse, self.model = self.horse, horse, model
        self._forget_kill()
        self._is_broken = False
        if former is not None:
            self._loads_of_former_horses += former.loads
            former.close()
        self._warmed(horse.card, horse.pid)

    def predict(  # noqa: C901 - all that can become of a batch, in one place
        self, items: list[Item], beat: Callable[[], None]
    ) -> Iterator[Sequence[tuple[Item, Came]]]:
        """Yield items, some at a time, each with what came of it.

        They go in together. What a death or a hang of the horse leaves undecided runs again, each alone, if it can't be
        told whose fault it was, and else is given up, the last first: so only the guilty fail, and the innocent lose
        nothing. Meanwhile `take_back` may be called: nothing comes of what it returns.
        """
        groups = [items]
        while groups and not self.closing.is_set():
            group = groups.pop(0)
            try:
                horse = self.warm(beat)
                for outcomes in horse.predict(group, beat):
                    decided, group = group[: len(outcomes)], group[len(outcomes) :]
                    if decided:
                        yield list(zip(decided, outcomes, strict=True))
            except ModelFault as error:
                yield self.unrun([item for some in (group, *groups) for item in some], error)
                return
            except Interrupted as interrupted:
                group = horse.left
                if not horse.alive:
                    self.drop()
                if not group:
                    # All that it had begun is decided; the rest was taken back.
                    self._forget_kill()
                    continue
                if self.closing.is_set() or self._killed_for not in (None, group[0].id):
                    # A stop that came too late for its own job hit the next one.
                    groups.insert(0, group)
                elif interrupted.suspects > 1:
                    groups[:0] = [[item] for item in group]
                else:
                    yield [(group[0], interrupted.fault)]
                    # The rest was not begun, and need not wait for another horse here.
                    yield [(item, None) for item in group[:0:-1]]
                self._forget_kill()
        if groups:
            # The last first, as above.
            yield [(item, None) for group in groups for item in group][::-1]

    def take_back(self) -> list[Item]:
        """Return the items that the horse has not begun and does not begin any more.

        Those of a batch that died together stay: they run one by one for once, and would come back together.
        """
        return self.horse.take_back() if self.horse is not None else []

    def score(
        self,
        question: dict[str, Any],
        blob: bytes | memoryview,
        job_id: str,
        beat: Callable[[], None],
        between: Callable[[], None] = _nothing,
    ) -> dict[str, Any]:
        """Return the horse's answer to a slice of a job's rows; see `Horse.score`.

        When the horse dies the slice is tried once more, whole: a kill from outside is not the rows' doing, and what
        comes of them must not depend on it. When it dies again, or hangs, its rows are tried one by one, and each that
        kills the horse fails alone.

        Args:
            question: what is asked of the rows.
            blob: the data of the question's columns.
            job_id: whose rows they are.
            beat: called about once a second meanwhile.
            between: called between two rows that are tried one by one, so that others need not wait for all of them;
                it may predict by this stable. What it raises ends the matter.

        Raises:
            ModelFault: the model does not load.
            InvalidInput: the question can't be sent or read.
            GaveUp: the worker is leaving, or the job was stopped.
        """
        came = self._score_once(question, blob, job_id, beat)
        if isinstance(came, ModelFault) and not isinstance(came, ModelTimeout):
            _log.warning("%s; trying its %d rows again", came, question["rows"])
            came = self._score_once(question, blob, job_id, beat)
        if not isinstance(came, ModelFault):
            return came
        if question["rows"] == 1:
            return columns.lost(question, came.record())
        _log.warning("%s; trying its %d rows one by one", came, question["rows"])
        answers: list[dict[str, Any]] = []
        for alone, part in columns.singles(question, blob):
            if answers:
                between()
            came = self._score_once(alone, part, job_id, beat)
            if isinstance(came, ModelFault) and came.retryable:
                # It may have been killed from outside just now.
                came = self._score_once(alone, part, job_id, beat)
            answers.append(columns.lost(alone, came.record()) if isinstance(came, ModelFault) else came)
        return columns.join(answers)

    def _score_once(
        self, question: dict[str, Any], blob: bytes | memoryview, job_id: str, beat: Callable[[], None]
    ) -> dict[str, Any] | ModelFault:
        """Return the horse's answer, or what it died of."""
        while not self.closing.is_set():
            try:
                horse = self.warm(beat)
            except ModelFault:
                if self._is_leaving:
                    break
                raise
            try:
                return horse.score(question, blob, (job_id,), question["timeout"], beat)
            except Interrupted as interrupted:
                if not horse.alive:
                    self.drop()
                fault = interrupted.fault
                if not isinstance(fault, ModelFault):
                    raise fault from None
                if self._killed_for == job_id:
                    break
                # A stop that came too late for its own job hit this one: that does not count.
                if self._killed_for is None and not self.closing.is_set():
                    return fault
        raise GaveUp

    def _forget_kill(self) -> None:
        self._killed_for = None

    def stop(self, job_id: str) -> None:
        """Kill the horse if this job is all it works on, so that nobody else is hurt; from any thread."""
        if self.running == (job_id,):
            self._killed_for = job_id
            self.kill()

    def kill(self) -> None:
        """Kill the horse, from any thread."""
        horse = self.horse
        if horse is not None:
            horse.kill()

    def abandon(self) -> None:
        """Kill the horse and bring up no other: what it has not decided stays undecided."""
        self.closing.set()
        self.kill()

    def drop(self) -> None:
        """Let the horse go."""
        horse, self.horse = self.horse, None
        if horse is not None:
            was_warm = horse.card is not None
            self._loads_of_former_horses += horse.loads
            horse.close()
            if was_warm:
                self._lost()
