"""The benchmark's arithmetic, and one small run of it; nothing here depends on how long anything takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("psutil") is None:
    pytest.skip("the benchmark needs psutil, of the extra 'bench'", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# The benchmark is run where it lies, and installed nowhere.
sys.path.append(str(ROOT))

from benchmarks.contenders import CONTENDERS  # noqa: E402 - found by the line above
from benchmarks.report import TARGETS, WITHOUT, Results, Summary  # noqa: E402 - likewise


def _held(results: Results, beginning: str) -> dict[str, object]:
    (target,) = [target for target in TARGETS if target.promise.startswith(beginning)]
    return target.held(results)


def _results(**figures: float) -> Results:
    """Return results with one metric of each contender: ``ours_2=...`` is that of ours-2."""
    results = Results()
    for name, drain in figures.items():
        results.add(name.replace("_", "-"), {"drain": drain})
    return results


def test_a_figure_is_the_median_of_its_rounds_with_its_spread():
    summary = Summary.of([90, 130, 100])

    assert summary == (100, 90, 130)
    assert summary.cells() == ["100", "90.0", "130", "40%"]


def test_a_target_is_a_ratio_of_medians():
    results = _results(ours=100)
    for drain in (1900, 2100, 9000):
        results.add("ours", {"drain": drain})
    results.add("celery", {"drain": 100})

    assert _held(results, "drain: 20 times Celery's") == {
        "promise": "drain: 20 times Celery's",
        "measured": 20,
        "met": True,
        "from": "rq-models, 1 worker 2,000, Celery, prefork 2 100",
    }


def test_a_target_takes_the_best_of_those_with_as_many_processes():
    results = _results(ours=1000, ours_1by1=99, huey_1=50, huey_2=300, dramatiq_2=200, huey_2_quiet=250)

    assert _held(results, "drain: 5 times")["measured"] == pytest.approx(1000 / 300)
    assert _held(results, "drain: 5 times")["met"] is False
    assert _held(results, "drain, max_batch_size = 1")["measured"] == pytest.approx(99 / 50)
    assert _held(results, "drain, max_batch_size = 1")["met"] is False


@pytest.mark.parametrize(("busy", "met"), [(89, False), (91, True)])
def test_the_second_worker_may_find_both_cores_busy(busy, met):
    results = _results(ours=100, ours_2=120)
    results.add("ours-2", {"busy": busy})

    assert _held(results, "drain, 2 workers")["met"] is met


@pytest.mark.parametrize(("worker_cpu", "met"), [(60, True), (70, True), (90, False)])
def test_the_workers_own_time_is_what_the_model_leaves(worker_cpu, met):
    results = Results()
    results.add("ours", {"worker_cpu": worker_cpu})
    results.add(WITHOUT, {"model_cpu": 25})

    assert _held(results, "worker CPU")["met"] is met


@pytest.mark.parametrize(("p99", "met"), [(24.9, True), (25.1, False)])
def test_single_predictions_wait_for_two_slices_at_most(p99, met):
    results = Results()
    results.add("ours", {"score_p99_idle": 5, "score_p99": p99, "score_slice": 10})

    assert _held(results, "file: single")["met"] is met


@pytest.mark.parametrize(("rate", "met"), [(84, False), (86, True)])
def test_a_file_is_held_against_the_script(rate, met):
    results = Results()
    results.add("script", {"score": 100})
    results.add("ours", {"score": rate})

    assert _held(results, "file, 1 worker")["met"] is met


def test_the_worker_that_grows_most_counts():
    results = Results()
    results.add("ours", {"score_memory": 50})
    results.add("ours-2", {"score_memory": 120})

    assert _held(results, "file: a worker's memory")["measured"] == 120


def test_what_was_not_measured_is_not_judged():
    assert {target.held(Results())["met"] for target in TARGETS} == {None}


def test_a_small_run(tmp_path):
    path = tmp_path / "results.json"
    options = [
        "--only",
        "drain,memory",
        "--jobs",
        "50",
        "--rounds",
        "1",
        "--contenders",
        "ours,rq",
        "--json",
        str(path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert CONTENDERS["rq"].title in done.stdout
    written = json.loads(path.read_text())
    assert written["failures"] == []
    assert set(written["medians"]) == {"ours", "rq"}
    for figures in written["medians"].values():
        assert {"drain", "worker_cpu", "server_cpu", "commands", "round_trips", "memory"} <= set(figures)
    # RQ's own count, from its source: a change of it is worth knowing.
    assert written["medians"]["rq"]["round_trips"] == pytest.approx(20, abs=2)
    assert written["medians"]["ours"]["round_trips"] < 1
    assert "drain: 50 times RQ SimpleWorker's" in [target["promise"] for target in written["targets"]]


def test_a_small_file(tmp_path):
    path = tmp_path / "results.json"
    options = ["--only", "score", "--rows", "30000", "--predictions", "20", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["failures"] == []
    medians = written["medians"]
    assert set(medians) == {"script", "ours", "ours-2"}
    assert set(medians["script"]) == {"score"}
    assert {"score", "score_busy", "score_memory", "score_slice"} == set(medians["ours-2"])
    assert {"score_p50_idle", "score_p50", "score_p99_idle", "score_p99"} < set(medians["ours"])
    assert [one["met"] for one in written["targets"] if one["promise"].startswith("file")].count(None) == 0
