"""The parent's handle on the horse: the child process in which one model lives.

The horse is started by exec with the interpreter that the model's configuration names, so it shares nothing with this
process but four descriptors: a channel for frames, a pipe that carries whatever the model prints, a lifeline whose
closing tells the horse's guardian that this process is gone, and a pipe of tickets, see `Horse.take_back`.

A prediction's death is never waited for on the channel: a grandchild of the model may hold it open. A thread waits for
the process itself, then kills its process group, then wakes whoever is asking.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rq_models.errors import InvalidInput, ModelBroken, ModelCrashed, ModelFault, ModelTimeout, RqModelsError
from rq_models.host import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rq_models.settings import ModelSettings

_BOOT = Path(frames.__file__).with_name("boot.py")
# The first three would lead the model's interpreter to other packages than its own; the addresses may hold a password,
# and the horse has no business with Redis. A model that needs one of them gets it by `env` in its table.
_WITHHELD = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "REDIS_URL", "RQ_REDIS_URL"}
_TAIL_BYTES = 4096
# Each read sets so much memory aside, and frees it again; a megabyte at a time costs more than a small prediction.
_CHUNK = 1 << 16
_LONGEST_LINE = 8192
_BEAT, _SECOND_BEAT = 1.0, 0.25
"""Seconds between two calls of the asker's `beat` while the horse works; and, for who waits behind a slow prediction,
between the first two of a question."""
GRACE = 2.0
"""Seconds beyond its time limit that a horse may take to come back by itself; C code does not, and is killed."""
_EXIT_PATIENCE = 5.0
_IDLE_PATIENCE = 60.0
"""Seconds for a horse that has nothing to predict to say so."""
_LAST_WORDS_PATIENCE = 0.5
"""Seconds for a dead horse's pipe to end; a daemon that left its group may hold it for ever."""


@dataclass(frozen=True)
class Item:
    """One job's input on its way to the horse; `timeout` is in seconds, None means no limit."""

    id: str
    input: Any
    timeout: float | None


class Interrupted(Exception):
    """A prediction came to its end before all items were decided.

    Attributes:
        fault: why.
        suspects: how many of the undecided items, from the first, may have been the cause.
    """

    def __init__(self, fault: RqModelsError, suspects: int) -> None:
        super().__init__(fault, suspects)
        self.fault = fault
        self.suspects = suspects


def _nothing() -> None:
    pass


class Horse:
    """One model's process.

    Args:
        name: the model's name.
        model: its settings.
        root: the project's root, first on the model's ``sys.path``.
        log: is given each line that the model prints, on a thread of its own.

    Start it from the main thread. `kill` may be called from any thread; everything else belongs to one.
    """

    def __init__(self, name: str, model: ModelSettings, root: Path, log: Callable[[str], None]) -> None:
        self.name = name
        self.card: dict[str, Any] | None = None
        self.loads = 0
        self.predicted = 0
        """How many items it has decided."""
        self.running: tuple[str, ...] = ()
        """Ids of the jobs that the model works on just now: one, or a batch."""
        self.left: list[Item] = []
        """What it has been given and not decided."""
        self._model = model
        self._root = root
        self._log = log
        self._tail = self._line = b""
        self._output_lock = threading.Lock()
        self._exited = threading.Event()
        self._next_beat, self._between_beats = 0.0, _BEAT
        self._has_tickets = self._took_back = False
        self._broke = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id, 0 before `start`."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and not self._exited.is_set()

    @property
    def predicts_together(self) -> bool:
        """Whether it predicts several items by one call of the model."""
        return self.card is not None and self.card["batch"] and self._model.max_batch_size > 1

    @property
    def tail(self) -> str:
        """The last 4 KB that the model printed."""
        return self._tail.decode(errors="replace")

    def start(self) -> Self:
        """Start the process; the model is not loaded yet.

        Raises:
            ModelBroken: the configured interpreter can't be started.
        """
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        self._tickets, self._ticket_office = os.pipe()
        os.set_blocking(self._tickets, False)
        self._wake, wake = socket.socketpair()
        inherited = (theirs.fileno(), lifeline, self._tickets)
        environ = {key: value for key, value in os.environ.items() if key not in _WITHHELD}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the configuration names the interpreter
                [self._model.python, str(_BOOT), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                env={**environ, "PYTHONUNBUFFERED": "1", **self._model.env},
                start_new_session=True,
            )
        except OSError as error:
            for end in (ours, wake, self._wake):
                end.close()
            self._close_pipes()
            remedy = "; correct 'python' in its table" if error.errno in (errno.ENOENT, errno.EACCES) else ""
            raise ModelBroken(
                f"model {self.name}: its interpreter {self._model.python} does not start ({error.strerror}){remedy}",
                type=type(error).__name__,
            ) from None
        finally:
            theirs.close()
            os.close(lifeline)
        ours.setblocking(False)
        self._channel = ours
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._unsent: list[memoryview] = []
        self._decoder = frames.Decoder()
        self._answers: deque[dict[str, Any]] = deque()
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._printer = threading.Thread(target=self._forward_output, daemon=True, name=f"{self.name}-output")
        self._printer.start()
        threading.Thread(target=self._reap, args=(self._process, wake), daemon=True, name=f"{self.name}-reaper").start()
        return self

    def load(self, beat: Callable[[], None] = _nothing) -> dict[str, Any]:
        """Import the model, construct it and predict its example once; return its card.

        Args:
            beat: called about once a second meanwhile.

        Raises:
            ModelBroken: it can't be imported or constructed, or fails on its own example; `stage` says which.
            ModelCrashed: its process died meanwhile.
            ModelTimeout: it took longer than ``load_timeout``.
        """
        question = {
            "op": "load",
            "name": self.name,
            "class": self._model.class_path,
            "root": str(self._root),
            "nan": self._model.nan,
            "max_output_bytes": self._model.max_output_bytes,
        }
        limit = self._model.load_timeout
        self._say(question)
        answer = self._hear(limit, beat, f"loading took longer than load_timeout ({limit} s)")
        if answer["op"] == "broken":
            error = ModelBroken(
                f"model {self.name} does not load: {answer['message']}",
                type=answer["type"],
                traceback=answer["traceback"],
            )
            error.stage = answer["stage"]
            raise error
        self.card = answer["card"]
        self.loads = answer["loads"]
        return answer["card"]  # type: ignore[no-any-return]

    def predict(self, items: list[Item], beat: Callable[[], None] = _nothing) -> Iterator[list[dict[str, Any]]]:
        """Predict these items, together if the model can, and yield their outcomes in order, some at a time.

        An outcome is ``{"value": ...}`` or ``{"error": <error record>, "traceback": text}``. A time limit is an item's
        own. The horse enforces it by an exception; one that does not come back within a further `GRACE` is killed.
        Meanwhile `take_back` may be called: there are no outcomes of what it returns.

        Raises:
            Interrupted: what is `left` is not decided.
        """
        assert self.card is not None  # noqa: S101 - load() comes first
        together = len(items) > 1 and self.predicts_together
        self.left, self._took_back = list(items), False
        answering = False
        try:
            question = {"op": "predict", "items": [vars(item) for item in items], "together": together}
            try:
                if len(items) > 1 and not together:
                    self._issue_tickets(len(items))
                    question["tickets"] = True
                self._say(question)
            except frames.FrameError as error:
                refusal = InvalidInput(f"the input can't be given to the model: {error}")
                raise Interrupted(refusal, len(items)) from None
            answering = True
            # Whatever else the asker has to do is done now, while the horse works.
            self._next_beat, self._between_beats = 0.0, _SECOND_BEAT
            while self.left or self._took_back:
                at_work = self.left if together else self.left[:1]
                self.running = tuple(item.id for item in at_work)
                self._beat_if_due(beat)
                limits = [item.timeout for item in at_work if item.timeout is not None]
                limit = min(limits, default=None) if self.left else _IDLE_PATIENCE
                try:
                    answer = self._hear(limit, beat, f"the prediction took longer than job_timeout ({limit} s)")
                except ModelFault as fault:
                    answering = False
                    raise Interrupted(fault, len(self.left) if together else 1) from None
                if answer["op"] != "predicted":
                    answering = False
                    refusal = InvalidInput(f"the model's process can't read it: {answer['message']}")
                    raise Interrupted(refusal, len(self.left))
                # The first answer of a batch has all its outcomes, or none: then its items follow one by one. So has
                # the last one of a batch of which something was taken back: all that was begun has been answered.
                together = False
                if not answer["outcomes"]:
                    self._took_back = False
                self.loads = answer["loads"]
                self.predicted += len(answer["outcomes"])
                self.left = self.left[len(answer["outcomes"]) :]
                yield answer["outcomes"]
        finally:
            self._fall_idle(abandoned=answering and (bool(self.left) or self._took_back))

    def _issue_tickets(self, count: int) -> None:
        """Let the horse begin so many items: before each it takes a ticket, a byte out of a pipe.

        Whoever takes a ticket has the item, the horse or `take_back`: so it is certain at any time what it has not
        begun and never will, whatever it is busy with.
        """
        self._draw_tickets()  # of a question that it could not read
        os.write(self._ticket_office, bytes(count))
        self._has_tickets = True

    def _draw_tickets(self) -> int:
        with suppress(BlockingIOError):
            return len(os.read(self._tickets, _CHUNK))
        return 0

    def take_back(self) -> list[Item]:
        """Return the items that are to be predicted one by one and that it has not begun, nor ever will."""
        count = self._draw_tickets() if self._has_tickets else 0
        if not count:
            return []
        # It says so when it finds none; a question that came before would be answered by what this one had left.
        self._took_back = True
        back = self.left[-count:]
        del self.left[-count:]
        return back

    def score(
        self,
        question: dict[str, Any],
        blob: bytes | memoryview,
        jobs: tuple[str, ...],
        limit: float | None,
        beat: Callable[[], None] = _nothing,
    ) -> dict[str, Any]:
        """Predict rows that go in and come out as columns; see `rq_models.host.columns` for both.

        Args:
            question: its ``rows``, ``columns``, ``whole``, ``outputs`` and ``timeout``.
            blob: the columns' data; it is not copied.
            jobs: ids of the jobs whose rows they are.
            limit: seconds for all rows together, and then for each that is predicted alone; None means no limit. The
                horse enforces the question's ``timeout``; if it does not come back within a further `GRACE`, or says no
                more that it works on row after row, it is killed.
            beat: called about once a second meanwhile.

        Returns:
            ``{"op": "scored", "rows", "failed", "columns", "seconds", "blob"}``.

        Raises:
            Interrupted: nothing is decided. The horse is dead, unless the fault is `InvalidInput`: then the question
                can't be sent or read.
        """
        assert self.card is not None  # noqa: S101 - load() comes first
        count: int = question["rows"]
        answering = False
        try:
            try:
                self._say({**question, "op": "score"}, blob)
            except frames.FrameError as error:
                refusal = InvalidInput(f"the rows can't be given to the model: {error}")
                raise Interrupted(refusal, count) from None
            answering = True
            self.running = jobs
            self._next_beat = 0.0
            answer: dict[str, Any] = {"op": "scoring"}
            while answer["op"] == "scoring":
                self._beat_if_due(beat)
                try:
                    answer = self._hear(limit, beat, f"the prediction took longer than job_timeout ({limit} s)")
                except ModelFault as fault:
                    answering = False
                    raise Interrupted(fault, count) from None
            answering = False
            if answer["op"] != "scored":
                refusal = InvalidInput(f"the model's process can't read the rows: {answer['message']}")
                raise Interrupted(refusal, count)
            self.loads = answer.pop("loads")
            self.predicted += count
            answer.setdefault("blob", b"")
            return answer
        finally:
            self._fall_idle(abandoned=answering)

    def _fall_idle(self, *, abandoned: bool) -> None:
        self.running, self._has_tickets = (), False
        if abandoned:
            # Whoever asked went away in the middle: the answers to come must not be taken for the next question's.
            self.kill()
            self._exited.wait()

    def kill(self) -> None:
        """Kill the process and whatever it started; from any thread."""
        process = self._process
        if process is not None and not self._exited.is_set():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let the process leave by itself, or kill it."""
        if self._process is None:
            return
        if self.card is None or self.running:
            # In the middle of something that nobody waits for any more.
            self.kill()
        self._selector.close()
        self._channel.close()
        if not self._exited.wait(_EXIT_PATIENCE):
            self.kill()
            self._exited.wait()
        self._printer.join(_LAST_WORDS_PATIENCE)
        self._close_pipes()
        self._wake.close()
        if not self._printer.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def _close_pipes(self) -> None:
        for descriptor in (self._lifeline, self._tickets, self._ticket_office):
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self.start() if self._process is None else self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _say(self, question: dict[str, Any], blob: bytes | memoryview = b"") -> None:
        self._unsent = [memoryview(piece).cast("B") for piece in frames.pieces(question, blob)]
        # Most questions fit into the channel's buffer; `_hear` sends the rest of others, and notices a dead horse.
        with suppress(OSError):
            self._send()
        if self._unsent:
            self._selector.modify(self._channel, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _send(self) -> None:
        sent = self._channel.sendmsg(self._unsent)
        while self._unsent and sent >= len(self._unsent[0]):
            sent -= len(self._unsent.pop(0))
        if self._unsent:
            self._unsent[0] = self._unsent[0][sent:]
        else:
            self._selector.modify(self._channel, selectors.EVENT_READ)

    def _hear(self, limit: float | None, beat: Callable[[], None], late: str) -> dict[str, Any]:  # noqa: C901 - all that can happen
        """Return the horse's next answer.

        It reads while it writes: two sides that both only write stop at a few megabytes.
        """
        deadline = None if limit is None else time.monotonic() + limit + GRACE
        while not self._answers:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self.kill()
                self._exited.wait()
                raise ModelTimeout(late, traceback=self._last_words(late))
            self._beat_if_due(beat)
            ready = self._selector.select(max(min(self._next_beat, deadline or self._next_beat) - now, 0))
            try:
                for key, events in ready:
                    if key.fileobj is not self._channel:
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._send()
                    if events & selectors.EVENT_READ:
                        self._receive()
            except (OSError, frames.FrameError) as error:
                # It is about to end, or closed the channel, or wrote garbage into it: nobody can talk to it now.
                if isinstance(error, frames.FrameError) or not self._exited.wait(_EXIT_PATIENCE):
                    self._broke = f"broke the protocol and was killed ({str(error) or 'it closed its channel'})"
                    self.kill()
                    self._exited.wait()
            if self._exited.is_set() and not self._answers:
                # The answer may have been on its way already.
                with suppress(OSError, frames.FrameError):
                    self._receive()
                if not self._answers:
                    raise self._crash()
        self._drain()
        return self._answers.popleft()

    def _beat_if_due(self, beat: Callable[[], None]) -> None:
        # The time of the next one is the horse's, not a question's: many short ones must not put it off for ever.
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + self._between_beats
            self._between_beats = _BEAT
            beat()

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while data := self._channel.recv(_CHUNK):
                for answer in self._decoder.feed(data):
                    if not (isinstance(answer, dict) and "op" in answer):
                        raise frames.FrameError(f"unexpected answer {answer!r:.80}")
                    self._answers.append(answer)
                if self._answers and len(data) < _CHUNK:
                    # What else there is can wait until it is asked for.
                    return
            raise ConnectionResetError

    def _crash(self) -> ModelCrashed:
        assert self._process is not None  # noqa: S101 - only a started process can exit
        code = self._process.returncode
        if self._broke:
            reason = self._broke
        elif code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                reason += " (out of memory?)"
        else:
            reason = f"ended itself with exit status {code}"
        message = f"the process of model {self.name} {reason}"
        # SIGKILL comes from outside, the system's doing; all other ways to die are the model's own.
        from_outside = code == -signal.SIGKILL and not self._broke
        return ModelCrashed(message, retryable=from_outside, traceback=self._last_words(message))

    def _last_words(self, message: str) -> str:
        # The group is dead by now, so the pipe ends and the printer with it.
        self._printer.join(_LAST_WORDS_PATIENCE)
        return f"{message}\nThe last lines it printed:\n{self.tail}" if self.tail else message

    def _forward_output(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while selector.select() and self._drain():
                pass

    def _drain(self) -> bool:
        """Log what the model has printed so far; return whether more may come.

        The asker does so before it takes an answer, so that lines are logged under the job that printed them.
        """
        with self._output_lock:
            while True:
                try:
                    data = os.read(self._output, _CHUNK)
                except BlockingIOError:
                    return True
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                *lines, self._line = (self._line + data).split(b"\n")
                if len(self._line) > _LONGEST_LINE or not data:
                    lines, self._line = [*lines, self._line], b""
                for line in filter(None, lines):
                    self._log(line.decode(errors="replace").rstrip("\r"))
                if not data:
                    return False

    def _reap(self, process: subprocess.Popen[bytes], wake: socket.socket) -> None:
        if hasattr(os, "waitid"):
            # Look without reaping: while the zombie holds the pid, its group's number can't be anybody else's.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._exited.set()
        # Closing the other end is what wakes the asker.
        wake.close()
