"""What the figures come to: medians, spreads, ratios, and the targets they are held against."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS

METRICS = {
    "drain": "Drain of queued jobs, jobs/s",
    "concurrent": "Concurrent clients, predictions/s",
    "concurrent_p99": "Concurrent clients, p99, ms",
    "p50": "Closed loop of one client, p50, ms",
    "p99": "Closed loop of one client, p99, ms",
    "enqueue": "Enqueue one by one, jobs/s",
    "enqueue_many": "Enqueue in bulk, jobs/s",
    "worker_cpu": "Worker CPU in the drain, µs/job",
    "server_cpu": "Server CPU in the drain, µs/job",
    "commands": "Redis commands in the drain, those in scripts included, per job",
    "round_trips": "Redis round trips in the drain, per job",
    "busy": "The less busy core in the drain, %",
    "memory": "Memory of the workers, MB",
    "cold": "Cold start, process to first result, s",
    "score": "A file scored, CSV to Parquet, rows/s",
    "score_busy": "The less busy core while a file is scored, %",
    "score_memory": "What a worker's memory grows by when it scores its first file, its horse's apart, MB",
    "score_slice": "Slice of a file, ms",
    "score_p50_idle": "One client, p50, no file is scored, ms",
    "score_p50": "One client, p50, while files are scored, ms",
    "score_p99_idle": "One client, p99, no file is scored, ms",
    "score_p99": "One client, p99, while files are scored, ms",
}
LIMITS = {
    "single": "iris model in this process, one by one, validated, rows/s",
    "validated_batch": "predict_batch of 64 in this process, validated, rows/s",
    "raw_batch": "predict_batch of 64 in this process, bare, rows/s",
    "model_cpu": "predict_batch of 64 in this process, validated, CPU, µs/row",
    "server_commands": "SETs of the same server, pipelined, commands/s",
    "batch_ms": "matrix model: one predict_batch of 64, ms",
    "loop": "matrix model: predict_batch in a plain loop, rows/s",
    "matrix_drain": "matrix model: drained from its queue by 1 worker, jobs/s",
    "efficiency": "matrix model: drain ÷ plain loop",
}
SCRIPT = "script"
TITLES = {name: contender.title for name, contender in CONTENDERS.items()} | {SCRIPT: "a script, 1 process"}
REFERENCE = "ours"
WITHOUT = "limits"
"""Stands in the contender's place for what is measured without one."""


class Summary(NamedTuple):
    """A figure over all rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Sum up the values of the rounds, at least one."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def cells(self) -> list[str]:
        """Return it for a table; the last is the spread, from lowest to highest as a part of the median."""
        spread = (self.highest - self.lowest) / abs(self.median) if self.median else 0
        return [*map(figure, self), f"{spread:.0%}"]


class Results:
    """The figures of all rounds: `values` by contender and metric."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, figures: dict[str, float]) -> None:
        """Add what one turn has measured."""
        for metric, value in figures.items():
            self.values.setdefault(name, {}).setdefault(metric, []).append(value)

    def __call__(self, name: str, metric: str) -> Summary:
        """Return a figure; raise KeyError if it was not measured."""
        return Summary.of(self.values[name][metric])

    def best(self, metric: str, choose: Callable[..., str] = max, processes: int | None = None) -> str:
        """Return the best other contender by `choose` (min or max), of those with so many processes.

        Raises:
            KeyError: none of them was measured.
        """
        names = [name for name, one in CONTENDERS.items() if not one.is_ours and processes in (None, one.processes)]
        measured = [name for name in names if metric in self.values.get(name, {})]
        if not measured:
            raise KeyError(metric)
        return choose(measured, key=lambda name: self(name, metric).median)


class Target(NamedTuple):
    """What was promised: a measure, which returns a figure and how it comes, and the bound that it must keep."""

    promise: str
    measure: Callable[[Results], tuple[float, str]]
    at_least: float = 0
    at_most: float = float("inf")

    def held(self, results: Results) -> dict[str, Any]:
        """Return the promise, what was measured, and whether it is met: both None if it was not measured."""
        try:
            measured, source = self.measure(results)
        except KeyError:
            return {"promise": self.promise, "measured": None, "met": None, "from": "not measured"}
        met = self.at_least <= measured <= self.at_most
        return {"promise": self.promise, "measured": measured, "met": met, "from": source}


def _ratio(results: Results, metric: str, ours: str, other: str) -> tuple[float, str]:
    mine, theirs = results(ours, metric).median, results(other, metric).median
    return mine / theirs, f"{TITLES[ours]} {figure(mine)}, {TITLES[other]} {figure(theirs)}"


def _second_worker(results: Results, metric: str, busy_metric: str, other: str) -> tuple[float, str]:
    ratio, source = _ratio(results, metric, "ours-2", other)
    busy = results("ours-2", busy_metric).median
    enough = busy > 90  # noqa: PLR2004 - percent, as promised
    return max(ratio, 1.5) if enough else ratio, f"{ratio:.2f} times, the less busy core {busy:.0f} % busy; {source}"


def _beyond_model(results: Results) -> tuple[float, str]:
    worker, own = results("ours", "worker_cpu").median, results(WITHOUT, "model_cpu").median
    return worker - own, f"{figure(worker)} less the model's own {figure(own)}"


def _growth(results: Results) -> tuple[float, str]:
    names = [name for name in ("ours", "ours-2") if "score_memory" in results.values.get(name, {})]
    worst = max(names, key=lambda name: results(name, "score_memory").median, default="ours")
    return results(worst, "score_memory").median, TITLES[worst]


def _single_meanwhile(results: Results) -> tuple[float, str]:
    busy, idle, part = (results("ours", f"score_{name}").median for name in ("p99", "p99_idle", "slice"))
    return busy - idle - 2 * part, f"p99 {figure(busy)} less {figure(idle)}, and less 2 slices of {figure(part)}"


TARGETS = [
    Target("drain: 20 times Celery's", lambda of: _ratio(of, "drain", "ours", "celery"), 20),
    Target("drain: 50 times RQ SimpleWorker's", lambda of: _ratio(of, "drain", "ours", "rq"), 50),
    Target(
        "drain: 5 times the best other's of 2 processes",
        lambda of: _ratio(of, "drain", "ours", of.best("drain", processes=2)),
        5,
    ),
    Target(
        "drain, 2 workers: 1.5 times 1, or both cores over 90 % busy",
        lambda of: _second_worker(of, "drain", "busy", "ours"),
        1.5,
    ),
    Target(
        "drain, max_batch_size = 1: twice the best other's of 1 process",
        lambda of: _ratio(of, "drain", "ours-1by1", of.best("drain", processes=1)),
        2,
    ),
    Target(
        "closed loop, p50: at most 0.8 of the best other's",
        lambda of: _ratio(of, "p50", "ours", of.best("p50", min)),
        at_most=0.8,
    ),
    Target(
        "concurrent clients, 1 worker: twice the best other's",
        lambda of: _ratio(of, "concurrent", "ours", of.best("concurrent")),
        2,
    ),
    Target(
        "concurrent clients, 2 workers: twice the best other's",
        lambda of: _ratio(of, "concurrent", "ours-2", of.best("concurrent")),
        2,
    ),
    Target("worker CPU beyond the model's own: at most 60 µs/job", _beyond_model, float("-inf"), 60),
    Target("round trips: at most 0.1 a job", lambda of: (of("ours", "round_trips").median, ""), at_most=0.1),
    Target("matrix model: 0.9 of the plain loop", lambda of: (of(WITHOUT, "efficiency").median, ""), 0.9),
    Target("file, 1 worker: 0.85 of a script", lambda of: _ratio(of, "score", "ours", SCRIPT), 0.85),
    Target(
        "file, 2 workers: 1.5 times a script, or both cores over 90 % busy",
        lambda of: _second_worker(of, "score", "score_busy", SCRIPT),
        1.5,
    ),
    Target("file: a worker's memory grows by at most 100 MB", _growth, at_most=100),
    Target("file: single predictions wait at most 2 slices longer, p99, ms", _single_meanwhile, float("-inf"), 0),
]


def show(results: Results, console: Console) -> None:
    """Print all that was measured, and the targets."""

    def table(title: str, *headings: str) -> Table:
        style = box.SIMPLE_HEAD if console.is_terminal else None
        made = Table(title=title, box=style, title_justify="left", title_style="bold")
        for heading in headings:
            made.add_column(heading, justify="right" if heading not in ("", "from") else "left")
        return made

    columns = ("", "median", "lowest", "highest", "spread")
    for metric, title in METRICS.items():
        measured = [name for name in TITLES if metric in results.values.get(name, {})]
        made = table(title, *columns, "rq-models, 1 worker, ÷ it")
        for name in measured:
            summary = results(name, metric)
            comparable = REFERENCE in measured and summary.median
            ratio = figure(results(REFERENCE, metric).median / summary.median) if comparable else ""
            made.add_row(TITLES[name], *summary.cells(), ratio)
        if measured:
            console.print(made, "")
    if WITHOUT in results.values:
        made = table("Limits", *columns)
        for metric in results.values[WITHOUT]:
            made.add_row(LIMITS[metric], *results(WITHOUT, metric).cells())
        console.print(made, "")
    made = table("Targets", "", "measured", "met", "from")
    for target in TARGETS:
        held = target.held(results)
        met = {True: "yes", False: "NO", None: ""}[held["met"]]
        made.add_row(target.promise, "" if held["measured"] is None else figure(held["measured"]), met, held["from"])
    console.print(made)


def figure(value: float) -> str:
    """Return a number for people: no more digits than it can have measured."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"  # noqa: PLR2004
