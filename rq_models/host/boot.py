"""A horse's first steps, run as ``python <path>/boot.py <channel> <lifeline> <tickets>``, inherited descriptors.

The channel carries frames to and from the parent. The lifeline is the reading end of a pipe whose other end only the
parent holds: it ends when the parent does, however it died. What the tickets are for is told in `loop`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib takes 5 ms to import
_PACKAGE = "_rq_models_host"


def _guard(lifeline: int, *others: int) -> None:
    """Leave a process behind that kills this one's group when the lifeline ends.

    Only another process can do that while the model holds the interpreter's lock, and to grandchildren as well. It is
    forked twice, so that a model that waits for its children never waits for this one.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(lifeline)
        return
    try:
        if os.fork():
            return
        for descriptor in (0, 1, 2, *others):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        while os.read(lifeline, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)
    finally:
        os._exit(0)


def main(channel: int, lifeline: int, tickets: int) -> None:
    """Become the horse that answers on this channel; never returns."""
    # systemd and honcho signal everybody; when this process ends is the parent's decision.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setsid()  # or the guardian would kill a stranger's group
    _guard(lifeline, channel, tickets)
    os.set_inheritable(channel, False)
    os.set_inheritable(tickets, False)
    # Python put this folder first, where a model's `import cache` would find ours.
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]  # noqa: PTH100 - as above
    sys.argv = sys.argv[:1]
    source = os.path.join(_HERE, "__init__.py")  # noqa: PTH118 - as above
    spec = importlib.util.spec_from_file_location(_PACKAGE, source, submodule_search_locations=[_HERE])
    assert spec is not None  # noqa: S101 - it is a Python file
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    importlib.import_module(f"{_PACKAGE}.loop").main(channel, tickets)


# A model that uses multiprocessing makes its children import this file again, under another name.
if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
