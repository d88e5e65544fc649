"""How a run is shown while it goes on: a bar on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rq_models.cli.app import say
from rq_models.cli.outcome import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from rq_models.scoring.run import Run
    from rq_models.scoring.runs import Progress

EVERY = 10.0
"""Seconds between two lines where no bar can be drawn."""
_PAUSE = 0.2
_ASK_AGAIN = 2.0
_WIDEST = 100
_COLOURS = {"finished": "green", "failed": "red", "cancelled": "red"}


def follow(run: Run, model: str, problem: Callable[[], str]) -> None:
    """Show a run until it is over.

    Args:
        run: it may have come some way.
        model: its name.
        problem: returns why nothing can happen now, or ""; asked every few seconds.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        _print_lines(run, problem)
        return
    with Live(console=console, auto_refresh=False) as live:
        for progress, why in _looks(run, problem):
            live.update(drawn(model, progress, why), refresh=True)


def _print_lines(run: Run, problem: Callable[[], str]) -> None:
    until, told = time.monotonic() + EVERY, ""
    for progress, why in _looks(run, problem):
        if why and why != told:
            say(why)
        told = why
        if progress.is_over:
            say(f"{progress.state} after {clock(progress.seconds)}: {figures(progress)}")
        elif time.monotonic() >= until:
            until += EVERY
            say(f"{progress.state}: {', '.join(part for part in (figures(progress), ahead(progress)) if part)}")


def _looks(run: Run, problem: Callable[[], str]) -> Iterator[tuple[Progress, str]]:
    """Yield how far it is and what is in its way, again and again until it is over."""
    why, asked = "", time.monotonic()
    while True:
        progress = run.progress()
        if progress.is_over:
            yield progress, ""
            return
        if time.monotonic() >= asked + _ASK_AGAIN:
            why, asked = problem(), time.monotonic()
        yield progress, why
        time.sleep(_PAUSE)


def drawn(model: str, progress: Progress, why: str = "") -> RenderableType:
    """Return the bar, the figures below it, and below them what is in the way."""
    # Without a total, it moves to and fro; nothing can be shorter than nothing.
    total = None if progress.total is None and not progress.is_over else max(progress.total or 0, 1)
    empty = progress.total == 0 and progress.state == "finished"
    bar = ProgressBar(total=total, completed=1 if empty else progress.rows, pulse=total is None)
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    colour = _COLOURS.get(progress.state, "cyan")
    at = ahead(progress) or progress.state
    row.add_row(Text(printable(model), "bold"), bar, Text(at, colour))
    lines: list[RenderableType] = [Constrain(row, _WIDEST), Text(figures(progress), "dim")]
    if why:
        lines.append(Text(printable(why), "yellow"))
    return Group(*lines)


def figures(progress: Progress) -> str:
    """Return rows, speed and failures: ``450,000 of about 1,000,000 rows, 12,345 rows/s, 13 failed``."""
    about = "" if progress.chunks_done == progress.chunks else "about "
    of = "" if progress.total is None or progress.is_over else f" of {about}{progress.total:,}"
    parts = [f"{progress.rows:,}{of} rows"]
    if progress.rows_per_second > 0:
        parts.append(f"{speed(progress)} rows/s")
    return ", ".join([*parts, f"{progress.failed:,} failed"])


def ahead(progress: Progress) -> str:
    """Return ``45%, 0:00:44 left``, as far as it is known; "" for a run that predicts no rows now."""
    if progress.state != "running":
        return ""
    # Clocks that differ make the first seconds negative.
    left = progress.seconds_left if progress.rows_per_second > 0 else None
    return percent(progress) + (f", {clock(left)} left" if left is not None else "")


def percent(progress: Progress) -> str:
    """Return how much of the rows is done; 100% when it is finished, however many they were."""
    if progress.state == "finished":
        return "100%"
    return f"{min(100 * progress.rows // progress.total, 100)}%" if progress.total else "0%"


def speed(progress: Progress) -> str:
    """Return rows a second, with a decimal where these are few."""
    value = max(progress.rows_per_second, 0.0)
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"  # noqa: PLR2004 - two digits are enough


def clock(seconds: float) -> str:
    """Return a duration as ``0:01:05``."""
    return str(timedelta(seconds=round(max(seconds, 0))))
