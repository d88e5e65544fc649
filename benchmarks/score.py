"""A file scored: by an obvious script, and by one and by two workers of ours, who also serve single predictions."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from iris_model.iris_predict import IrisModel
from iris_model.schemas import IrisInput
from pyarrow import csv, parquet
from redis import Redis

from benchmarks import score_script
from benchmarks.client import LIMIT, ClientProcess, Failed
from benchmarks.contenders import CONTENDERS
from benchmarks.processes import ROOT, Ground, busy_seconds
from benchmarks.report import SCRIPT
from benchmarks.turn import DRAIN_LIMIT, Plan, Turn, p99
from rq_models import Client
from rq_models.scoring.run import Run

_MODEL = "iris_model"
_RANGES = {
    "sepal_length": (4.3, 7.9),
    "sepal_width": (2.0, 4.4),
    "petal_length": (1.0, 6.9),
    "petal_width": (0.1, 2.5),
}
"""Of the 150 flowers, in centimetres."""
_SEED = 1
_CHECKED = 1000
"""At most, of the rows of an output."""
_AT_ONCE = 5
"""Predictions between two looks at a run."""
_POLL = 0.02


def _write_flowers(path: Path, rows: int) -> None:
    """Write a CSV of flowers that nobody has seen, the same ones each time."""
    random = np.random.default_rng(_SEED)
    columns: dict[str, Any] = {"id": np.arange(rows)}
    for name, (least, most) in _RANGES.items():
        columns[name] = random.uniform(least, most, rows).round(1)
    csv.write_csv(pa.table(columns), path)


def _check(source: Path, output: Path) -> None:
    """Raise Failed if the output is not the input with what the model says of its rows; some of them are looked at."""
    flowers, scored = csv.read_csv(source), parquet.read_table(output)
    if scored.num_rows != flowers.num_rows:
        raise Failed(f"{flowers.num_rows} rows were scored, and {scored.num_rows} are there")
    some = list(range(0, flowers.num_rows, flowers.num_rows // _CHECKED + 1))
    rows = flowers.take(some).to_pylist()
    inputs = [IrisInput(**{name: row[name] for name in _RANGES}) for row in rows]
    expected = [(row["id"], one.species) for row, one in zip(rows, IrisModel().predict_batch(inputs), strict=True)]
    found = scored.take(some)
    if list(zip(map(int, found["id"].to_pylist()), found["species"].to_pylist(), strict=True)) != expected:
        raise Failed("the rows that were scored have not the species that the model takes them for")


def _script(plan: Plan, source: Path, output: Path) -> dict[str, float]:
    done = subprocess.run(  # noqa: S603 - our own file
        [sys.executable, score_script.__file__, source, output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DRAIN_LIMIT,
        check=False,
    )
    if done.returncode:
        raise Failed(f"the script has failed:\n{done.stderr}")
    return {"score": plan.rows / float(done.stdout)}


def _ours(name: str, plan: Plan, source: Path, output: Path) -> dict[str, float]:
    contender = CONTENDERS[name]
    with (
        Ground.prepared(contender.max_batch_size) as ground,
        ClientProcess(contender.module, ground.environ) as client,
        Client(f"{ground.url}/0") as ours,
        Redis.from_url(f"{ground.url}/0") as results,
    ):
        client.ask("enqueue", 1, "enqueue_early")
        workers = ground.start(*contender.command)
        client.ask("check")
        Turn(contender, ground, client, workers, results).warm_up()
        begin = partial(ours.score, _MODEL, source, output, overwrite=True)
        figures = _undisturbed(plan, begin, _workers(workers))
        if contender.processes == 1:
            figures |= _served_meanwhile(plan, begin, client)
        return figures


def _undisturbed(plan: Plan, begin: Callable[[], Run], workers: list[psutil.Process]) -> dict[str, float]:
    """Have the file scored, and watch what it takes; the first one, so that to import what it needs is part of it."""
    before = [worker.memory_info().rss for worker in workers]
    grown = [0] * len(workers)
    cores, began = busy_seconds(), time.perf_counter()
    run = begin()
    while not run.progress().is_over:
        if time.perf_counter() - began > DRAIN_LIMIT:
            raise Failed(f"{plan.rows} rows are not scored within {DRAIN_LIMIT} s: {run.progress()}")
        now = [worker.memory_info().rss for worker in workers]
        grown = [max(most, held - first) for most, held, first in zip(grown, now, before, strict=True)]
        time.sleep(_POLL)
    seconds = time.perf_counter() - began
    busy = [(b - a) / ((y - x) or 1) for (a, x), (b, y) in zip(cores, busy_seconds(), strict=True)]
    if str(run.progress()) != f"{plan.rows:,} in = {plan.rows:,} out + 0 failed":
        raise Failed(f"run {run.id}: {run.progress().error or run.progress()}")
    rate = plan.rows / seconds
    return {
        "score": rate,
        "score_busy": 100 * min(busy),
        "score_memory": max(grown) / 1e6,
        "score_slice": 1000 * (run.record.plan or {})["slice_rows"] / rate,
    }


def _served_meanwhile(plan: Plan, begin: Callable[[], Run], client: ClientProcess) -> dict[str, float]:
    """Have one client ask for single predictions, first with nothing else to do and then while files are scored."""
    _, idle = client.ask("loop", 1, plan.predictions, LIMIT)
    busy: list[float] = []
    run, deadline = begin(), time.monotonic() + LIMIT
    while len(busy) < plan.predictions:
        if time.monotonic() > deadline:
            raise Failed(f"only {len(busy)} predictions were made while a file was scored, within {LIMIT} s")
        before = run.record
        if before.progress.is_over:
            run = begin()
        if before.progress.state != "running":
            time.sleep(_POLL)
            continue
        _, latencies = client.ask("loop", 1, _AT_ONCE, LIMIT)
        after = run.record
        # Before and after a file is scored, when it is planned say, nothing is in their way.
        if (after.attempt, after.progress.state) == (before.attempt, "running"):
            busy += latencies
    run.cancel()
    return {
        "score_p50_idle": 1000 * statistics.median(idle),
        "score_p99_idle": 1000 * p99(idle),
        "score_p50": 1000 * statistics.median(busy),
        "score_p99": 1000 * p99(busy),
    }


def _workers(process: psutil.Popen) -> list[psutil.Process]:
    """Return those that work: the process itself, or those that it keeps running; not the horses."""
    found = [child for child in process.children() if "worker" in child.cmdline()]
    return found or [process]


def _take(measure: Callable[[Plan, Path, Path], dict[str, float]], plan: Plan) -> dict[str, float]:
    with TemporaryDirectory(prefix="rq-models-bench-") as folder:
        source, output = Path(folder, "flowers.csv"), Path(folder, "scored.parquet")
        _write_flowers(source, plan.rows)
        figures = measure(plan, source, output)
        _check(source, output)
        return figures


STEPS = {SCRIPT: partial(_take, _script)} | {name: partial(_take, partial(_ours, name)) for name in ("ours", "ours-2")}
"""The turns, by the names of those who take them."""
