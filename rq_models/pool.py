"""The processes that `rq-models up` and `rq-models worker -n` start, keep running and stop.

Each child leads a session of its own, so a terminal's Ctrl-C reaches this process alone and a child gets exactly one
request to stop. A guardian process ends the children when this one is killed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from rq_models import guardian

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a child that died is started again; doubled each time it does not live for `LONGEST_PAUSE`."""
SAME_REQUEST = 1.0
_POLL = 0.05
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(eq=False)
class Child:
    """One process to keep running.

    Attributes:
        name: for messages and as the prefix of its output.
        command: what to run.
        essential: its end is the end of all, however long it ran.
        last: it is stopped after all others have left, because they need it until then.
        final: exit statuses that starting it again would not change.
    """

    name: str
    command: list[str]
    essential: bool = False
    last: bool = False
    final: frozenset[int] = frozenset()
    process: subprocess.Popen[str] | None = field(default=None, init=False)
    thread: threading.Thread | None = field(default=None, init=False)


class Pool:
    """Starts children, restarts those that die, stops all: a context manager, for the main thread.

    Args:
        environ: the children's environment.
        prefix: put each child's name before each line of its output, or leave the output alone.
        patient: restart a child even if it dies before `settle` was called.
        say: prints a message for a person.
    """

    def __init__(self, environ: dict[str, str], *, prefix: bool, patient: bool, say: Callable[[str], None]) -> None:
        self.status = 0
        self._environ = environ
        self._prefix = prefix
        self._settled = patient
        self._say = say
        self._output = sys.stdout
        self._children: list[Child] = []
        self._stopping = threading.Event()
        self._requests = 0
        self._requested_at = -SAME_REQUEST
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._cleanup = ExitStack()
        for signum in _STOPS:
            self._cleanup.callback(signal.signal, signum, signal.signal(signum, self._request_stop))
        # Isolated and without site: it needs nothing, and must not notice where it is started.
        self._guardian = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", "-S", guardian.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._stop()
        finally:
            self._guardian.communicate()
            self._cleanup.close()

    def start(self, child: Child) -> None:
        """Run a child from now on, until the pool stops."""
        self._children.append(child)
        child.thread = threading.Thread(target=self._keep, args=(child,), name=child.name)
        child.thread.start()

    def pids(self, *names: str) -> set[int]:
        """Return the process ids of the children that run now, or of those named."""
        running = [child for child in self._children if not names or child.name in names]
        return {child.process.pid for child in running if child.process is not None}

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the condition holds, a stop is asked for, or nothing runs any more; return whether it holds."""
        while not self._stopping.is_set() and any(child.thread and child.thread.is_alive() for child in self._children):
            if until():
                return True
            # In slices: the system may hand a signal to another thread, and only the main thread runs its handler.
            self._stopping.wait(_POLL)
        return False

    def settle(self) -> None:
        """Say that all is up: from here on a child that dies is started again."""
        self._settled = True

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        # A terminal's Ctrl-C and somebody's SIGTERM often come together: within a second they are one request.
        now = time.monotonic()
        if now - self._requested_at >= SAME_REQUEST:
            self._requests += 1
            self._requested_at = now
        self._stopping.set()

    def _stop(self) -> None:
        """Stop all children, those that the others need last, and wait for them."""
        self._stopping.set()
        for last in (False, True):
            group = [child for child in self._children if child.last is last]
            sent = 0
            while any(child.thread and child.thread.is_alive() for child in group):
                # Each further request to stop is passed on: a worker takes the second for "at once".
                if sent == 0 or self._requests > max(sent, 1):
                    sent = max(self._requests, 1)
                    for child in group:
                        self._signal(child, signal.SIGTERM)
                time.sleep(_POLL)

    def _signal(self, child: Child, signum: signal.Signals) -> None:
        with self._lock, suppress(ProcessLookupError):
            if child.process is not None:
                child.process.send_signal(signum)

    def _keep(self, child: Child) -> None:
        """Run a child again and again; this is what its thread does."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            status = self._run(child)
            if self._stopping.is_set() or (status == 0 and not child.essential):
                return
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            if child.essential or not self._settled or status in child.final:
                self._say(f"{child.name} {how}; stopping")
                self.status = status if status > 0 else 1
                self._stopping.set()
                return
            if time.monotonic() - began > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            self._say(f"{child.name} {how}; starting it again in {pause:g} s")
            if self._stopping.wait(pause):
                return
            pause = min(pause * 2, LONGEST_PAUSE)

    def _run(self, child: Child) -> int:
        with self._lock:
            # Under the lock, so that a stop either prevents the start or finds the process.
            if self._stopping.is_set():
                return 0
            child.process = subprocess.Popen(  # noqa: S603 - the pool's owner says what to run
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._prefix else None,
                stderr=subprocess.STDOUT if self._prefix else None,
                env=self._environ,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._tell_guardian("+", child.process.pid)
        if child.process.stdout is not None:
            for line in child.process.stdout:
                # Whoever read our output may have gone; the child must still be able to write.
                with suppress(OSError, ValueError):
                    self._output.write(f"{child.name} | {line.rstrip()}\n")
                    self._output.flush()
            child.process.stdout.close()
        status = child.process.wait()
        with self._lock:
            self._tell_guardian("-", child.process.pid)
            child.process = None
        return status

    def _tell_guardian(self, sign: str, pid: int) -> None:
        stdin = self._guardian.stdin
        # Without a guardian, all goes on but for what it guards against.
        with suppress(OSError, ValueError):
            if stdin is not None:
                stdin.write(f"{sign}{pid}\n".encode())
                stdin.flush()


def rq_models_command(*arguments: str) -> list[str]:
    """Return the command line that runs our own command in this interpreter."""
    # -P: the folder it is started in holds the models, and none of its modules may take the place of ours.
    return [sys.executable, "-P", "-m", "rq_models", *arguments]
