"""Ends the processes of a supervisor that was killed: run by file path, standard library only.

Reads ``+<pid>`` and ``-<pid>`` lines, one for each process started and ended. When the input ends, what is left of
them is told to stop, and killed after a while. A SIGKILL leaves the supervisor no chance to do so itself, and of all
that it held, the pipe's end is what every system announces the closing of.
"""

import os
import signal
import sys
import time
from contextlib import suppress

PATIENCE = 30.0
"""Seconds for a warm shutdown, which finishes the prediction in hand."""


def main() -> None:
    """Read until the supervisor is gone, then end what it left."""
    left: dict[int, None] = {}
    for line in sys.stdin.buffer:
        pid = int(line[1:])
        if line.startswith(b"+"):
            left[pid] = None
        else:
            left.pop(pid, None)
    deadline = time.monotonic() + PATIENCE
    signum: int = signal.SIGTERM
    while left:
        for pid in list(left):
            # Each is the leader of a group of its own.
            try:
                os.killpg(pid, signum)
            except (ProcessLookupError, PermissionError):
                del left[pid]
        if signum == signal.SIGKILL:
            break
        # Signal 0 asks whether the group is still there.
        signum = signal.SIGKILL if time.monotonic() > deadline else 0
        time.sleep(0.05)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
