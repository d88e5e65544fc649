"""Ends the processes of a supervisor that was killed: run by file path, standard library only.

A SIGKILL leaves the supervisor no chance to do so itself, and of all that it held, the pipe's end is what every system
announces the closing of. The children are in this process's group, and each holds an end of a second pipe, given as
an argument, by which the last of them to leave is noticed. Groups of their own are named on the input, one a line.
"""

import os
import select
import signal
import sys
from contextlib import suppress

PATIENCE = 30.0
"""Seconds for a warm shutdown, which finishes the prediction in hand."""


def main() -> None:
    """Wait until the supervisor is gone, then end what it left, and this process with it."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    groups = [int(line) for line in sys.stdin.buffer]
    _signal_all(groups, signal.SIGTERM)
    select.select([int(end) for end in sys.argv[1:]], [], [], PATIENCE)
    _signal_all(groups, signal.SIGKILL)


def _signal_all(groups: list[int], signum: signal.Signals) -> None:
    # 0 is this process's own group, the last because it does not outlive its own SIGKILL.
    for group in [*groups, 0]:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signum)


if __name__ == "__main__":
    main()
