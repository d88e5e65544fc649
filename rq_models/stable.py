"""The stable: keeps one model's horse. Warms it, runs jobs through it, and brings up another when it dies."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

from rq_models.errors import ModelCrashed, ModelFault, RqModelsError
from rq_models.horse import Horse, Interrupted, Item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rq_models.settings import ModelSettings

Came: TypeAlias = "dict[str, Any] | RqModelsError | None"
"""What came of an item: its outcome, or the fault that was its own, or None if it was not decided any more."""


class Stable:
    """The horses of one worker, one at a time.

    Args:
        name: the model's name.
        model: its settings.
        root: the project's root.
        log: is given each line that the model prints.
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
        log: Callable[[str], None],
        warmed: Callable[[dict[str, Any], int], None],
        lost: Callable[[], None],
        broken: Callable[[ModelFault], None],
    ) -> None:
        self.horse: Horse | None = None
        self._name, self._model, self._root = name, model, root
        self._log, self._warmed, self._lost, self._broken = log, warmed, lost, broken
        self._loads_of_former_horses = 0
        self._killed_for: str | None = None
        self.closing = threading.Event()

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

    def warm(self, beat: Callable[[], None]) -> Horse:
        """Return a horse that holds the model; the first call, and the first after a death, loads it.

        Loading has a time limit of its own, outside the jobs'.

        Raises:
            ModelFault: it does not load.
        """
        if self.horse is not None and self.is_warm:
            return self.horse
        try:
            try:
                horse, card = self._load(beat)
            except ModelCrashed as error:
                if not error.retryable or self.closing.is_set():
                    raise
                # Something outside killed it, which says nothing of the model.
                horse, card = self._load(beat)
        except ModelFault as error:
            self.drop()
            if not self.closing.is_set():
                self._broken(error)
            raise
        self._warmed(card, horse.pid)
        return horse

    def _load(self, beat: Callable[[], None]) -> tuple[Horse, dict[str, Any]]:
        # A failed import leaves half of itself in the process: each attempt gets a fresh one.
        self.drop()
        horse = self.horse = Horse(self._name, self._model, self._root, self._log)
        return horse, horse.start().load(beat)

    def predict(  # noqa: C901 - all that can become of a batch, in one place
        self, items: list[Item], beat: Callable[[], None]
    ) -> Iterator[Sequence[tuple[Item, Came]]]:
        """Yield items, some at a time, each with what came of it.

        They go in together. What a death or a hang of the horse leaves undecided runs again, each alone if it can't be
        told whose fault it was: so only the guilty fail, and the innocent lose nothing.
        """
        self._forget_kill()
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
                groups.insert(0, group)
                if not self.closing.is_set():
                    yield [(item, error) for group in groups for item in group]
                    return
            except Interrupted as interrupted:
                if not horse.alive:
                    self.drop()
                if self.closing.is_set() or self._killed_for not in (None, group[0].id):
                    # A stop that came too late for its own job hit the next one.
                    groups.insert(0, group)
                elif interrupted.suspects > 1:
                    groups[:0] = [[item] for item in group]
                else:
                    yield [(group[0], interrupted.fault)]
                    if group[1:]:
                        groups.insert(0, group[1:])
                self._forget_kill()
        if groups:
            # The last first: each goes back to the front of the queue.
            yield [(item, None) for group in groups for item in group][::-1]

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
