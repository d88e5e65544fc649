"""What a client holds of a run: how far it has come, its end, and the way to cancel it."""

from __future__ import annotations

import os
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast
from urllib.parse import urlsplit

from rq_models.errors import InvalidRun, RunFailed
from rq_models.scoring import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from redis import Redis

    from rq_models.scoring.runs import Progress, Record

Ask: TypeAlias = "Callable[[Callable[[], Any]], Any]"
"""Calls, and calls again while Redis is away."""

_POLL = 0.2
"""Seconds between two looks at a run."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class ScoreOptions(TypedDict, total=False):
    """How a file is scored.

    `keep`: columns of the input to be carried into the output; default: all. `header`: False for a CSV without the line
    that names its columns, which then are the model's inputs in their order. `overwrite`: let the output replace what
    is there. `restart`: start over, whatever was done before. `max_errors`: give up after so many failed rows, and keep
    what is done; default: never. `slice_rows`: rows that the model is given at a time; default: what takes about 10 ms.
    """

    keep: Sequence[str] | None
    header: bool
    overwrite: bool
    restart: bool
    max_errors: int | None
    slice_rows: int | None


class Run:
    """A file that is being scored, in this process or another.

    Iterate over it to see it progress: each `Progress` that differs from the one before, until it is over.

    Attributes:
        id: the run's id, which follows from its output.
    """

    def __init__(self, connection: Redis, ask: Ask, run: str) -> None:
        self.id = run
        self._connection, self._ask = connection, ask

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    @property
    def record(self) -> Record:
        """All that is known of it."""
        return cast("Record", self._ask(partial(runs.read, self._connection, self.id)))

    def progress(self) -> Progress:
        """Return how far it has come."""
        return self.record.progress

    def __iter__(self) -> Iterator[Progress]:
        last = None
        while True:
            progress = self.progress()
            seen = (progress.state, progress.rows, progress.chunks)
            if seen != last:
                yield progress
            if progress.is_over:
                return
            last = seen
            time.sleep(_POLL)

    def wait(self, timeout: float | None = None) -> Progress:
        """Wait for its end and return what came of it: each row of the input is predicted, or failed.

        Raises:
            RunFailed: it was given up, or cancelled; to begin it again goes on where it stopped.
            TimeoutError: it is not over after `timeout` seconds, and goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not (progress := self.progress()).is_over:
            left = _POLL if until is None else min(until - time.monotonic(), _POLL)
            if left <= 0:
                raise TimeoutError(f"run {self.id} is not over after {timeout:g} s: {progress}")
            time.sleep(left)
        if progress.state != "finished":
            raise RunFailed(progress.error or f"run {self.id} was cancelled after {progress.rows:,} rows")
        return progress

    def cancel(self) -> bool:
        """Stop it within a slice; return whether it was active. What is done is kept for the next time."""
        return cast("bool", self._ask(partial(runs.cancel, self._connection, self.id)))


def address(given: str | os.PathLike[str], name: str) -> str:
    """Return where a file is, for workers, which have other working directories.

    Raises:
        InvalidRun: it holds a password, which would be stored and shown.
    """
    text = os.fspath(given)
    if not _SCHEME.match(text):
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 - a Path would normalize more
    if urlsplit(text).password:
        raise InvalidRun(f"the {name} holds a password; give it to the workers by their environment instead")
    return text.removeprefix("file://")


def begin(  # noqa: PLR0913, PLR0917 - the client's, and the caller's
    connection: Redis,
    ask: Ask,
    model: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ScoreOptions,
) -> Run:
    """Begin a run; see `Client.score`."""
    keep = options.get("keep")
    if isinstance(keep, str):
        raise InvalidRun(f"keep is a list of columns; write [{keep!r}]")
    asked = runs.Asked(
        model=model,
        input=address(source, "input"),
        output=address(output, "output"),
        keep=None if keep is None else tuple(keep),
        header=options.get("header", True),
        overwrite=options.get("overwrite", False),
        max_errors=_number(options, "max_errors", 0),
        slice_rows=_number(options, "slice_rows", 1),
    )
    if asked.input == asked.output:
        raise InvalidRun(f"input and output are the same: {asked.input}")
    restart = options.get("restart", False)
    return Run(connection, ask, cast("str", ask(partial(runs.begin, connection, asked, restart=restart))))


def _number(options: ScoreOptions, name: Literal["max_errors", "slice_rows"], least: int) -> int | None:
    value: Any = options.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise InvalidRun(f"{name} is {value!r}, and must be a whole number from {least} on")
    return value
