"""The stable: keeps one model's horse. Warms it, runs jobs through it, and brings up another when it dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rq_models.errors import ModelFault, RqModelsError
from rq_models.horse import Horse, Item

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rq_models.settings import ModelSettings


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

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the jobs that the model works on just now."""
        return self.horse.running if self.horse is not None else ()

    @property
    def loads(self) -> int:
        """How often the model was loaded, by all horses so far."""
        return self._loads_of_former_horses + (self.horse.loads if self.horse is not None else 0)

    def warm(self, beat: Callable[[], None]) -> Horse:
        """Return a horse that holds the model; the first call, and the first after a death, loads it.

        Loading has a time limit of its own, outside the jobs'.

        Raises:
            ModelFault: it does not load.
        """
        horse = self.horse
        if horse is not None and horse.alive and horse.card is not None:
            return horse
        # A failed import leaves half of itself in the process: each attempt gets a fresh one.
        self.drop()
        horse = self.horse = Horse(self._name, self._model, self._root, self._log)
        try:
            card = horse.start().load(beat)
        except ModelFault as error:
            self.drop()
            self._broken(error)
            raise
        self._warmed(card, horse.pid)
        return horse

    def predict(
        self, items: list[Item], beat: Callable[[], None]
    ) -> Iterator[tuple[Item, dict[str, Any] | RqModelsError]]:
        """Yield each item with its outcome, or with the fault that was its own.

        They go in together. What a death or a hang of the horse leaves undecided runs again, each alone if it can't be
        told whose fault it was: so only the guilty fail, and the innocent lose nothing.
        """
        groups = [items]
        while groups:
            group = groups.pop(0)
            try:
                horse = self.warm(beat)
            except ModelFault as error:
                yield from ((item, error) for item in group)
                continue
            run = horse.predict(group, beat)
            yield from zip(group, run.outcomes, strict=False)
            undecided = group[len(run.outcomes) :]
            if run.fault is None:
                continue
            if not horse.alive:
                self.drop()
            if run.suspects > 1:
                groups[:0] = [[item] for item in undecided]
            elif self._killed_for not in (None, undecided[0].id):
                # A stop that came too late for its own job hit the next one.
                groups.insert(0, undecided)
            else:
                yield undecided[0], run.fault
                if undecided[1:]:
                    groups.insert(0, undecided[1:])
            self._killed_for = None

    def stop(self, job_id: str) -> None:
        """Kill the horse if this job is all it works on, so that nobody else is hurt; from any thread."""
        if self.running == (job_id,):
            self._killed_for = job_id
            self.kill()

    def kill(self) -> None:
        """Kill the horse, from any thread."""
        if self.horse is not None:
            self.horse.kill()

    def drop(self) -> None:
        """Let the horse go."""
        horse, self.horse = self.horse, None
        if horse is not None:
            was_warm = horse.card is not None
            self._loads_of_former_horses += horse.loads
            horse.close()
            if was_warm:
                self._lost()
