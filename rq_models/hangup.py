"""SIGHUP says two things: an operator's "read your configuration again", and the system's "your terminal is gone".

By the time of the second, a process that had a terminal has none any more. To reload for that, and to run on with
nobody at the keyboard, would surprise whoever closed the window.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def on_hang_up(reload: Callable[[], None], stop: Callable[[int, FrameType | None], None]) -> Any:
    """Have SIGHUP reload, or stop where it says that the terminal is gone; return the former handler.

    Where it was ignored until now, by nohup or by our own pool, somebody else sees to it that this process ends: there
    it never stops anything.
    """
    had_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()

    def handle(signum: int, frame: FrameType | None) -> None:
        if had_terminal and not _has_terminal():
            stop(signum, frame)
        else:
            reload()

    return signal.signal(signal.SIGHUP, handle)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
