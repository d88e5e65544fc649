"""The processes that `rq-models up` and `rq-models worker -n` start, keep running and stop.

They are in a process group of their own, so a terminal's Ctrl-C reaches this process alone and a child gets exactly
one request to stop. A guardian process leads that group and ends it when this process is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rq_models import guardian
from rq_models.hangup import on_hang_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a child that died is started again; doubled each time it does not live for `LONGEST_PAUSE`."""
POOL_VARIABLE = "RQ_MODELS_POOL"
"""Names the pool to its children, so that one knows by a pid which of the others are dead."""
_POLL = 0.05


@dataclass(eq=False)
class Child:
    """A running process: by its name for messages, and its command.

    `last`: it is stopped after all others have left, because they need it until then. `reloads`: it reads its
    configuration again on a SIGHUP.
    """

    name: str
    command: list[str]
    last: bool
    reloads: bool
    process: subprocess.Popen[bytes]
    pause: float = FIRST_PAUSE
    began: float = 0.0
    due: float | None = None
    """When to start it again, if it is to wait for that."""


class Pool:
    """Starts children, restarts those that die, stops all: a context manager, for the main thread.

    Args:
        environ: the children's environment.
        say: prints a message for a person.
    """

    def __init__(self, environ: dict[str, str], say: Callable[[str], None]) -> None:
        self._environ = {**environ, POOL_VARIABLE: uuid.uuid4().hex}
        self._say = say
        self._children: list[Child] = []
        self._requests = 0
        self._reload_requested = False

    def __enter__(self) -> Self:
        self._cleanup = ExitStack()
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._cleanup.callback(signal.signal, signum, signal.signal(signum, self._request_stop))
        self._cleanup.callback(signal.signal, signal.SIGHUP, on_hang_up(self._request_reload, self._request_stop))
        theirs, self._alive = os.pipe()
        # Isolated and without site: it needs nothing, and must not notice where it is started.
        self._guardian = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", "-S", guardian.__file__, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            pass_fds=[theirs],
        )
        os.close(theirs)
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._stop()
        finally:
            os.close(self._alive)
            self._guardian.kill()
            self._guardian.communicate()
            self._cleanup.close()

    def start(self, name: str, command: list[str], *, last: bool = False, reloads: bool = False) -> Child:
        """Run a command from now on, until the pool stops."""
        child = Child(name, command, last, reloads, self._spawn(command), began=time.monotonic())
        self._children.append(child)
        return child

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait until the condition holds, or a stop is asked for; return whether it holds.

        Raises:
            SystemExit: a child ended meanwhile; what ends by itself before all is up would only end again.
        """
        while not self._requests:
            for child in self._children:
                status = child.process.poll()
                if status is not None and status >= 0:
                    self._say(f"{child.name} {_ending(status)}; stopping")
                    sys.exit(max(status, 1))
                self._tend(child)
            if until():
                return True
            time.sleep(_POLL)
        return False

    def keep(self) -> None:
        """Start again what dies, until a stop is asked for or every child has left of its own accord."""
        while self._children and not self._requests:
            if self._reload_requested:
                self._reload_requested = False
                for child in self._children:
                    if child.reloads and child.process.poll() is None:
                        child.process.send_signal(signal.SIGHUP)
            for child in self._children:
                self._tend(child)
            self._children = [child for child in self._children if child.process.returncode != 0]
            time.sleep(_POLL)

    def _tend(self, child: Child) -> None:
        now = time.monotonic()
        if child.due is not None:
            if now >= child.due:
                child.process, child.began, child.due = self._spawn(child.command), now, None
        elif status := child.process.poll():
            if now - child.began > LONGEST_PAUSE:
                child.pause = FIRST_PAUSE
            self._say(f"{child.name} {_ending(status)}; starting it again in {child.pause:g} s")
            child.due = now + child.pause
            child.pause = min(child.pause * 2, LONGEST_PAUSE)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        # A child begins with SIGHUP ignored: so it neither dies of one that comes before it listens, nor takes one for
        # the end of the terminal, which is the pool's to notice.
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            return subprocess.Popen(  # noqa: S603 - the pool's owner says what to run
                command,
                stdin=subprocess.DEVNULL,
                env=self._environ,
                process_group=self._guardian.pid,
                pass_fds=[self._alive],
            )
        finally:
            signal.signal(signal.SIGHUP, handler)

    def _request_reload(self) -> None:
        self._reload_requested = True

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        self._requests += 1

    def _stop(self) -> None:
        """Stop all children, those that the others need last, and wait for them."""
        self._requests = max(self._requests, 1)
        for last in (False, True):
            sent = 0
            while running := [one for one in self._children if one.last is last and one.process.poll() is None]:
                # Each further request is passed on: a worker takes one that comes a second later for "at once".
                if sent < self._requests:
                    sent = self._requests
                    for child in running:
                        child.process.terminate()
                time.sleep(_POLL)


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
