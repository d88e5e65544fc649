"""The horse: answers its parent's questions, one frame each, until there is nobody to ask.

``{"op": "load", "name", "class", "root", "nan"}`` is answered by ``{"op": "loaded", "card", "warmed"}``, or by
``{"op": "broken", "stage", "type", "message", "traceback"}`` and may be asked again. ``{"op": "predict", "items"}``,
where an item is ``{"id", "input", "timeout"}``, is answered by ``{"op": "predicted", "outcomes"}``. Each of these
answers has ``loads`` and ``seconds``, too. A frame whose JSON can't be read gets ``{"op": "refused", "message"}``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
import time
from _signal import getsignal  # type: ignore[import-not-found]  # the public one spends 2 µs on making enums
from typing import Any, Dict, List, Optional

from . import cache, frames
from .contract import LoadError, Model, Outcome, TimeLimit, error_outcome, failure, load_class, trace

_REPEAT = 0.25
"""Seconds after which a prediction that swallowed its time limit is told again."""
_STRAY_FORK = 70
_ENDING = (signal.SIGTERM, signal.SIGINT)


def main(channel: int) -> None:
    """Answer on this descriptor until it ends, then end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    faulthandler.enable()
    _Horse(channel).run()


def _guarded(model: Model, data: Any) -> Outcome:
    """Predict. While this function is on the stack, and only then, a time limit may be raised."""
    return model.predict(data)


def _ignore(signum: int, frame: Any) -> None:
    """Do nothing; a function, because children of the model would inherit SIG_IGN and could not be stopped any more."""


def _hold_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)


def _free_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


class _Horse:
    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._pid = os.getpid()
        self._name = ""
        self._deadline = 0.0
        self._handlers = ((signal.SIGALRM, self._expire), *((signum, _ignore) for signum in _ENDING))
        # A signal sent to a fork at once would be ignored, as it is here, and lost: it has to wait.
        os.register_at_fork(before=_hold_signals, after_in_parent=_free_signals, after_in_child=self._become_a_child)

    def run(self) -> None:
        """Never returns."""
        while True:
            self._turn()

    def _turn(self) -> None:
        self._keep_signals()
        try:
            question = frames.read(self._channel)
            answer = None if question is None else self._answer(question)
        except frames.FrameError as error:
            answer = {"op": "refused", "message": str(error)}
        _flush()
        if os.getpid() != self._pid:
            # A fork that the model made in predict came back from it, and would answer as well.
            os._exit(_STRAY_FORK)
        if answer is None:
            os._exit(0)
        self._send(answer)

    def _answer(self, question: Dict[str, Any]) -> Dict[str, Any]:
        started = time.monotonic()
        if question["op"] == "load":
            answer = self._load(question)
        else:
            outcomes = [self._predict(item) for item in question["items"]]
            answer = {"op": "predicted", "outcomes": outcomes}
        return {**answer, "seconds": time.monotonic() - started, "loads": cache.LOADS.get(self._name, 0)}

    def _load(self, question: Dict[str, Any]) -> Dict[str, Any]:
        name, root = question["name"], question["root"]
        if sys.path[:1] != [root]:
            sys.path.insert(0, root)
        self._name = name
        try:
            load_class(question["class"])
            # After the model's modules, so that their own format wins; before its constructor, so that it is heard.
            if not logging.root.handlers:
                logging.basicConfig(level=logging.INFO, stream=sys.stderr)
            model = cache.get(name, question["class"], question["nan"])
            example = model.card["example"]
            outcome = {} if example is None else model.predict(example)
            if "error" in outcome:
                cache.MODELS.pop(name)
                record = outcome["error"]
                kind = record["type"] or record["kind"]
                message = f"it fails on its own example: {kind}: {record['message']}"
                return _broken("example", record["type"], message, outcome["traceback"])
        except LoadError as error:
            return _broken(error.stage, error.type, error.message, error.traceback)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt: nobody but the model can have raised it
            kind = type(error).__name__
            return _broken("init", kind, kind, trace(error))
        return {"op": "loaded", "card": model.card, "warmed": example is not None}

    def _predict(self, item: Dict[str, Any]) -> Outcome:
        model = cache.MODELS.get(self._name)
        if model is None:
            return error_outcome("ModelBroken", None, "the model is not loaded")
        limit: Optional[float] = item["timeout"]
        self._keep_signals()
        self._deadline = time.monotonic() + limit if limit else float("inf")
        try:
            if limit:
                signal.setitimer(signal.ITIMER_REAL, limit, _REPEAT)
            outcome = _guarded(model, item["input"])
        except TimeLimit as error:
            return _late(limit, trace(error))
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt: nobody but the model can have raised it
            outcome = failure(error, item["input"])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        # The model swallowed the limit, or C code returned after it.
        return _late(limit) if time.monotonic() >= self._deadline else outcome

    def _expire(self, _signum: int, frame: Any) -> None:
        left = self._deadline - time.monotonic()
        if left > 0:
            # The model used the process's only timer for something of its own.
            if left != float("inf"):
                signal.setitimer(signal.ITIMER_REAL, left, _REPEAT)
            return
        while frame is not None:
            if frame.f_code is _guarded.__code__:
                raise TimeLimit
            frame = frame.f_back

    def _keep_signals(self) -> None:
        """Take back what the model may have taken."""
        for signum, handler in self._handlers:
            if getsignal(signum) is not handler:
                signal.signal(signum, handler)
                signal.siginterrupt(signum, signum == signal.SIGALRM)

    def _become_a_child(self) -> None:
        """Make a fork of the model's own an ordinary process, which can be stopped and can't speak to the parent."""
        with contextlib.suppress(OSError):
            os.close(self._channel)
        self._channel = -1  # in a fork of the fork this number may be another file's
        for signum, _ in self._handlers:
            signal.signal(signum, signal.SIG_DFL)
        _free_signals()

    def _send(self, answer: Dict[str, Any]) -> None:
        try:
            frame = frames.encode(answer)
        except frames.FrameError:
            outcomes: List[Outcome] = answer["outcomes"]
            share = frames.MAX_FRAME // len(outcomes) - 1024
            answer["outcomes"] = [_fitting(outcome, share) for outcome in outcomes]
            frame = frames.encode(answer)
        try:
            frames.write_bytes(self._channel, frame)
        except OSError:
            os._exit(0)


def _broken(stage: str, kind: Optional[str], message: str, trace: str) -> Dict[str, Any]:
    return {"op": "broken", "stage": stage, "type": kind, "message": message, "traceback": trace}


def _late(limit: Optional[float], where: str = "") -> Outcome:
    return error_outcome("ModelTimeout", None, f"the prediction took longer than job_timeout ({limit:g} s)", where)


def _fitting(outcome: Outcome, share: int) -> Outcome:
    try:
        if len(frames.encode(outcome)) <= share:
            return outcome
    except frames.FrameError:
        pass
    return error_outcome("InvalidOutput", None, f"output: more than {share} bytes of JSON, which is too large")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the model may have closed or replaced it
            stream.flush()
