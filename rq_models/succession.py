"""The succession: which horse follows the one at work, and when.

A horse that has done its work is replaced (`max_jobs`, `max_memory`), and so is one whose worker is told to read its
configuration again. The next one loads beside it, on a thread, while it goes on with the jobs. The switch is the main
thread's, between two batches, so no job notices; and a successor that does not load changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from rq_models.errors import ConfigurationError, ModelBroken, ModelCrashed, ModelFault
from rq_models.memory import resident

if TYPE_CHECKING:
    from collections.abc import Callable

    from rq_models.errors import RqModelsError
    from rq_models.horse import Horse
    from rq_models.settings import ModelSettings, Settings
    from rq_models.stable import Stable

_LOOK = 1.0
"""Seconds between two looks at a horse's memory: each reads a file for every process of the machine."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a worn horse whose successor did not load is given another; doubled each time."""
_log = logging.getLogger("rq.worker.succession")


class Successor:
    """A horse that loads on a thread of its own.

    Args:
        horse: not started yet.
        model: the settings it was made of.
        wake: called when it has loaded, or failed to, on that thread.
    """

    def __init__(self, horse: Horse, model: ModelSettings, wake: Callable[[], None]) -> None:
        self.horse = horse
        self.model = model
        self.fault: ModelFault | None = None
        self._wake = wake
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._load, daemon=True, name=f"{horse.name}-successor")
        try:
            horse.start()
        except ModelBroken as error:
            self.fault = error
            self._done.set()
        else:
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has loaded, or failed to: then `fault` says why."""
        return self._done.is_set()

    def _load(self) -> None:
        try:
            self.horse.load()
        except ModelFault as error:
            self.fault = error
        except Exception as error:  # noqa: BLE001 - a bug of ours must not leave everybody waiting
            message = f"model {self.horse.name}: loading failed unexpectedly: {type(error).__name__}: {error}"
            self.fault = ModelBroken(message, traceback=traceback.format_exc())
        self._done.set()
        self._wake()

    def close(self) -> None:
        """Let it go, however far it has come."""
        self.horse.kill()
        if self._thread.ident is not None:
            self._thread.join()
        self.horse.close()


class Succession:
    """Replaces the horse of one worker when that is due.

    Args:
        stable: keeps the horse at work.
        name: the model's name.
        read: returns the configuration as it is now, or raises ConfigurationError.
        adopt: is given the configuration to go by from now on, before the switch.
        answer: is told, for each request to reload that has a token, the token and why it failed, or None.
        wake: ends the worker's wait for jobs, from any thread.
    """

    def __init__(  # noqa: PLR0913 - what a worker lends it
        self,
        stable: Stable,
        name: str,
        *,
        read: Callable[[], Settings],
        adopt: Callable[[Settings], None],
        answer: Callable[[str, RqModelsError | None], None],
        wake: Callable[[], None],
    ) -> None:
        self._stable, self._name = stable, name
        self._read, self._adopt, self._answer, self._wake = read, adopt, answer, wake
        self._asked: deque[str | None] = deque()
        self._answering: list[str | None] = []
        """Requests to reload that the successor under way is the answer to."""
        self._settings: Settings | None = None
        """What it was made of, unless it only replaces a worn horse."""
        self._successor: Successor | None = None
        self._next_look = self._not_before = 0.0
        self._pause = _FIRST_PAUSE

    def ask(self, token: str | None = None) -> None:
        """Have the configuration read again; from any thread or signal handler, because it only makes a note."""
        self._asked.append(token)

    def tend(self, beat: Callable[[], None]) -> None:
        """Do what is due; between two batches, on the main thread.

        Args:
            beat: called about once a second while no job can be run.
        """
        if self._asked and not self._answering:
            self._reload()
        elif self._successor is not None:
            if self._successor.done:
                self._switch(self._successor)
        elif why := self._worn():
            self._recycle(why, beat)

    def close(self) -> None:
        """Let the successor go, if there is one."""
        successor, self._successor = self._successor, None
        if successor is not None:
            successor.close()

    def _reload(self) -> None:
        """Begin what was asked for; what is asked from now on is for the next time: files may change again."""
        while self._asked:
            self._answering.append(self._asked.popleft())
        # One that only replaces a worn horse is of the old configuration.
        self.close()
        _log.info("model %s: reading the configuration again", self._name)
        try:
            self._settings = self._read()
            # Always beside the old one, whatever `swap` says: that one must be there if this one fails.
            self._begin(self._settings.model(self._name))
        except ConfigurationError as error:
            self._reloaded(error)

    def _begin(self, model: ModelSettings) -> None:
        self._successor = Successor(self._stable.new_horse(model), model, self._wake)

    def _switch(self, successor: Successor) -> None:
        self._successor = None
        fault = successor.fault
        if fault is None and not successor.horse.alive:
            fault = ModelCrashed(f"the process of model {self._name} died as soon as it had loaded")
        if fault is not None:
            successor.close()
        else:
            if self._settings is not None:
                self._adopt(self._settings)
            self._stable.switch(successor.horse, successor.model)
        if self._settings is not None:
            self._reloaded(fault)
        elif fault is not None:
            self._not_before = time.monotonic() + self._pause
            _log.error("model %s: no successor, again in %g s: %s", self._name, self._pause, fault)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        else:
            self._pause = _FIRST_PAUSE

    def _reloaded(self, error: RqModelsError | None) -> None:
        if error is not None:
            _log.error("model %s: not reloaded: %s\n%s", self._name, error, error.traceback or "")
        answering, self._answering, self._settings = self._answering, [], None
        for token in answering:
            if token is not None:
                self._answer(token, error)

    def _worn(self) -> str:
        """Return why the horse at work is to be replaced, or an empty text."""
        model, horse = self._stable.model, self._stable.horse
        now = time.monotonic()
        # A fresh one is never worn: a model that needs more than it may have would do nothing but load.
        if horse is None or not self._stable.is_warm or not horse.predicted or now < self._not_before:
            return ""
        if model.max_jobs is not None and horse.predicted >= model.max_jobs:
            return f"it has made {horse.predicted} predictions"
        if model.max_memory is not None and now >= self._next_look:
            self._next_look = now + _LOOK
            if (held := resident(horse.pid)) > model.max_memory:
                return f"it holds {held >> 20} MiB of memory"
        return ""

    def _recycle(self, why: str, beat: Callable[[], None]) -> None:
        _log.info("model %s: its process is replaced, %s", self._name, why)
        if self._stable.model.swap == "overlap":
            self._begin(self._stable.model)
            return
        # What is ready does not wait for the load.
        beat()
        self._stable.drop()
        with suppress(ModelFault):
            self._stable.warm(beat)
