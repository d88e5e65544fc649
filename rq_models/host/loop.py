"""The horse: answers its parent's questions, a frame each, until there is nobody to ask.

``{"op": "load", "name", "class", "root", "nan", "max_output_bytes"}`` is answered by ``{"op": "loaded", "card",
"warmed"}``, or by ``{"op": "broken", "stage", "type", "message", "traceback"}`` and may be asked again. ``{"op":
"predict", "items", "together"}``, where an item is ``{"id", "input", "timeout"}``, is answered by ``{"op": "predicted",
"outcomes"}``: by one frame for all items when the model is to predict them together and they go into one; else by one
frame for each, in order, after an empty one if together was tried in vain. If the question has ``tickets``, a byte is
read from the pipe of that name before each item; when there is none, the parent has taken the rest back, and an empty
frame tells it that this is understood. ``{"op": "score"}``, whose fields are told in `columns`, is answered by ``{"op":
"scored"}``; rows that are predicted one by one give a sign of life before it about once a second, ``{"op":
"scoring"}``. Each of these answers has ``loads``, too. What can't be read gets ``{"op": "refused", "message"}``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import io
import logging
import os
import signal
import sys
import time
from _signal import getsignal  # type: ignore[import-not-found]  # the public one spends 2 µs on making enums
from typing import Any, Callable, Dict, Iterator, List, Optional, TypeVar

from . import cache, columns, frames
from .contract import LoadError, Model, Outcome, Scored, TimeLimit, error_outcome, failure, load_class, table, trace

T = TypeVar("T")

_CHUNK = 1 << 16
_REPEAT = 0.25
"""Seconds after which a prediction that swallowed its time limit is told again."""
_SIGN_OF_LIFE = 1.0
"""Seconds between two while rows are predicted one by one."""
_STRAY_FORK = 70
_ENDING = (signal.SIGTERM, signal.SIGINT)
_hold_signals = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, _ENDING)
_free_signals = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _ENDING)


def main(channel: int, tickets: int) -> None:
    """Answer on this channel until it ends, then end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    faulthandler.enable()
    _Horse(channel, tickets).run()


_NOT_LOADED = error_outcome("ModelBroken", None, "the model is not loaded")


def _guarded(predict: Callable[[Any], T], data: Any) -> T:
    """Predict. While this function is on the stack, and only then, a time limit may be raised."""
    return predict(data)


def _ignore(signum: int, frame: Any) -> None:
    """Do nothing; a function, because children of the model would inherit SIG_IGN and could not be stopped any more."""


class _Horse:
    def __init__(self, channel: int, tickets: int) -> None:
        self._channel, self._tickets = channel, tickets
        self._decoder = frames.Decoder()
        self._pid = os.getpid()
        self._name = ""
        self._max_output = 0
        self._deadline = 0.0
        self._where = ""
        self._handlers = ((signal.SIGALRM, self._expire), *((signum, _ignore) for signum in _ENDING))
        # A signal sent to a fork at once would be ignored, as it is here, and lost: it has to wait.
        os.register_at_fork(before=_hold_signals, after_in_parent=_free_signals, after_in_child=self._become_a_child)

    def run(self) -> None:
        """Answer whatever is asked; never returns."""
        while True:
            self._keep_signals()
            try:
                for question in self._decoder.feed(self._receive()):
                    self._answer(question)
            except frames.FrameError as error:
                self._send({"op": "refused", "message": str(error)})

    def _receive(self) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionResetError):  # the parent died with bytes of ours unread
            data = os.read(self._channel, _CHUNK)
        if not data:
            _flush()
            os._exit(0)
        return data

    def _answer(self, question: Dict[str, Any]) -> None:
        if question["op"] == "load":
            self._send(self._load(question))
        elif question["op"] == "score":
            self._score(question)
        else:
            for outcomes in self._predict_all(question):
                self._send({"op": "predicted", "outcomes": outcomes})

    def _load(self, question: Dict[str, Any]) -> Dict[str, Any]:
        name, root = question["name"], question["root"]
        if sys.path[:1] != [root]:
            sys.path.insert(0, root)
        self._name, self._max_output = name, question["max_output_bytes"]
        try:
            load_class(question["class"])
            # After the model's modules, so that their own format wins; before its constructor, so that it is heard.
            if not logging.root.handlers:
                logging.basicConfig(level=logging.INFO, stream=sys.stderr)
            model = cache.get(name, question["class"], question["nan"])
            example = model.card["example"]
            outcome = {} if example is None else model.predict(example)
        except LoadError as error:
            return {"op": "broken", **vars(error)}
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt: nobody but the model can have raised it
            return {"op": "broken", **vars(LoadError("init", type(error).__name__, error))}
        if "error" in outcome:
            cache.MODELS.pop(name)
            record = outcome["error"]
            message = f"it fails on its own example: {record['type'] or record['kind']}: {record['message']}"
            said = {"type": record["type"], "message": message, "traceback": outcome["traceback"]}
            return {"op": "broken", "stage": "example", **said}
        # What is loaded stays. Else the collector would look through all of it, 60 ms with some libraries, again and
        # again while slices of rows come and go.
        gc.collect()
        gc.freeze()
        return {"op": "loaded", "card": model.card, "warmed": example is not None}

    def _predict_all(self, question: Dict[str, Any]) -> Iterator[List[Outcome]]:
        items = question["items"]
        model = cache.MODELS.get(self._name)
        if model is not None and question["together"]:
            limits = [item["timeout"] for item in items if item["timeout"]]
            inputs = [item["input"] for item in items]
            together = self._within(min(limits, default=None), model.predict_together, inputs)
            # None: it raised, or took too long. One by one it will be seen whose fault that was.
            yield together or []
            if together:
                return
        for item in items:
            if "tickets" in question and not self._has_ticket():
                yield []
                return
            if model is None:
                yield [_NOT_LOADED]
            else:
                yield [self._alone(item["timeout"], model.predict, item["input"])]

    def _has_ticket(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._tickets, 1))
        return False

    def _score(self, question: Dict[str, Any]) -> None:
        """Answer a question of rows."""
        model = cache.MODELS.get(self._name)
        outputs, limit = question["outputs"] or columns.WHOLE, question["timeout"]
        try:
            rows = columns.rows(question, question.get("blob", b""))
        except columns.ColumnError as error:
            self._send({"op": "refused", "message": str(error)})
            return
        began = time.monotonic()
        scored: Optional[Scored] = None
        if model is None:
            scored = table([_NOT_LOADED] * len(rows), len(outputs))
        else:
            if len(rows) > 1 and model.card["batch"]:
                scored = self._within(limit, functools.partial(model.score_together, outputs=outputs), rows)
            if scored is None:
                scored = table(list(self._score_each(model, rows, outputs, limit, began)), len(outputs))
        values, failed = scored
        answer = {
            "op": "scored",
            "rows": len(rows),
            "failed": [[index, outcome["error"]] for index, outcome in failed.items()],
            "seconds": time.monotonic() - began,
        }
        try:
            heads, blob = columns.encode(outputs, values)
            self._send({**answer, "columns": heads}, blob)
        except (columns.ColumnError, frames.FrameError) as error:
            record = error_outcome("InvalidOutput", None, f"output: {error}; score fewer rows at a time")["error"]
            refusal = columns.lost(question, record)
            self._send(refusal, refusal.pop("blob"))

    def _score_each(
        self, model: Model, rows: List[Any], outputs: List[columns.Json], limit: Optional[float], heard: float
    ) -> Iterator[Outcome]:
        """Predict one row after the other; the parent last heard of this process at `heard`."""
        score = functools.partial(model.score_alone, outputs=outputs)
        for row in rows:
            if time.monotonic() - heard >= _SIGN_OF_LIFE:
                self._send({"op": "scoring"})
                heard = time.monotonic()
            yield self._alone(limit, score, row)

    def _alone(self, limit: Optional[float], predict: Callable[[Any], Outcome], data: Any) -> Outcome:
        """Return the outcome of one input, whatever becomes of it short of the process's death."""
        try:
            outcome = self._within(limit, predict, data)
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt: nobody but the model can have raised it
            return failure(error, data)
        if outcome is None:
            message = f"the prediction took longer than job_timeout ({limit:g} s)"
            return error_outcome("ModelTimeout", None, message, self._where)
        return outcome

    def _within(self, limit: Optional[float], predict: Callable[[Any], T], data: Any) -> Optional[T]:
        """Return what `predict` does, or None if that took more than `limit` seconds."""
        self._keep_signals()
        self._where = ""
        self._deadline = time.monotonic() + limit if limit else float("inf")
        try:
            if limit:
                signal.setitimer(signal.ITIMER_REAL, limit, _REPEAT)
            result = _guarded(predict, data)
        except TimeLimit as error:
            self._where = trace(error)
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        # The model may have swallowed the limit, or C code may have returned after it.
        return result if time.monotonic() < self._deadline else None

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
        for descriptor in (self._channel, self._tickets):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._channel = self._tickets = -1  # in a fork of the fork these numbers may be other files'
        for signum, _ in self._handlers:
            signal.signal(signum, signal.SIG_DFL)
        _free_signals()

    def _send(self, answer: Dict[str, Any], blob: bytes = b"") -> None:
        _flush()
        if os.getpid() != self._pid:
            # A fork that the model made in predict came back from it, and would answer as well.
            os._exit(_STRAY_FORK)
        answer["loads"] = cache.LOADS.get(self._name, 0)
        try:
            for frame in frames.pieces(answer, blob) if "outcomes" not in answer else self._frames(answer):
                frames.write(self._channel, frame)
        except OSError:
            os._exit(0)

    def _frames(self, answer: Dict[str, Any]) -> Iterator[bytes]:
        """Yield the frame of an answer, or the frames if its outcomes don't go into one.

        An output that is too large becomes an error. Each is measured only if all of them together are that large.
        """
        frame = b""
        with contextlib.suppress(frames.FrameError):  # all of it is JSON, so it is the size
            frame = frames.encode(answer)
        if frame and len(frame) <= self._max_output:
            yield frame
            return
        outcomes = [self._limited(outcome) for outcome in answer["outcomes"]]
        try:
            yield frames.encode({**answer, "outcomes": outcomes})
        except frames.FrameError:
            if len(outcomes) > 1:
                for outcome in outcomes:
                    yield from self._frames({**answer, "outcomes": [outcome]})
                return
            message = f"output: more than {frames.MAX_FRAME} bytes of JSON, which is too large"
            yield frames.encode({**answer, "outcomes": [error_outcome("InvalidOutput", None, message)]})

    def _limited(self, outcome: Outcome) -> Outcome:
        size = len(frames.body_of(outcome["value"])) if "value" in outcome else 0
        if size <= self._max_output:
            return outcome
        where = f"models.{self._name}.max_output_bytes ({self._max_output})"
        return error_outcome("InvalidOutput", None, f"output: {size} bytes of JSON are more than {where}")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the model may have closed or replaced it
            stream.flush()
