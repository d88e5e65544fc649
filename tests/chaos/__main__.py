"""A game of chaos: clients, workers and a server, and a monkey; scripts/chaos --help."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from chaos.clients import ChaosClient, Pace
from chaos.plan import PER_MINUTE, Fault, make_plan
from chaos.score import ROWS_PER_MINUTE, ScoreGame
from chaos.system import PATIENCE, System, Violation
from chaos.verdict import Verdict, judge
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

CLIENTS = 4
JOBS_PER_MINUTE = 2500
MINUTES, SCORE_MINUTES = 10, 4
SCORE_PER_MINUTE = 20
"""Faults: a file has no clients who wait for calm between two of them."""
_DEADLY = ("kill a worker", "kill the pool", "stop a worker", "cut", "stall", "restart", "kill the server")
_SHOWN = 20
_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
INTERRUPTED = 130


class Game:
    """One game, and what is shown of it.

    Args:
        system: what is broken.
        plan: how.
        jobs: how many.
        seconds: for how long.
        seed: of the clients.
        console: where to tell.
    """

    def __init__(
        self, system: System, plan: list[Fault], jobs: int, seconds: float, seed: int, console: Console
    ) -> None:
        self._system, self._plan, self._seconds, self._console = system, plan, seconds, console
        self._pace = Pace(jobs, seconds)
        self.clients = [ChaosClient(system.url, self._pace, seed * CLIENTS + number) for number in range(CLIENTS)]
        self.faults: Counter[str] = Counter()
        self.deaths: list[float] = []
        self.missed = 0
        self._began = time.monotonic()
        self._next_line = _EVERY
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=seconds)

    def play(self) -> None:
        """Play it to its end: all jobs are enqueued, all faults over, and all clients have got what they waited for.

        Raises:
            Violation: it does not end.
        """
        with self._progress:
            for client in self.clients:
                client.start()
            try:
                for fault in self._plan:
                    self._wait(fault.at)
                    self._break(fault)
                self._wait(self._seconds)
                self._system.calm_down()
                deadline = time.monotonic() + 2 * PATIENCE
                while any(client.is_alive() for client in self.clients) and time.monotonic() < deadline:
                    self._show()
            finally:
                self._pace.stopped.set()
            if stuck := [client.name for client in self.clients if client.is_alive()]:
                raise Violation(f"these still wait: {', '.join(stuck)}")
            redis = self._system.direct
            self._system.wait_until(
                lambda: not redis.exists("rq:queue:chaos", "rq:wip:chaos"), "nothing is queued or started"
            )

    def _wait(self, until: float) -> None:
        while (left := until - (time.monotonic() - self._began)) > 0:
            self._show(left)

    def _break(self, fault: Fault) -> None:
        at = time.time()
        if self._system.carry_out(fault):
            self.faults[fault.kind] += 1
            if fault.kind.startswith(_DEADLY):
                self.deaths.append(at)
        else:
            self.missed += 1
        with (self._system.folder / "faults.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S', time.localtime(at))} {fault}\n")

    def _show(self, left: float = 1.0) -> None:
        records = sum(len(client.records) for client in self.clients)
        answered = sum(1 for client in self.clients for record in client.records if record.took is not None)
        now = time.monotonic() - self._began
        line = f"{records:,} jobs acknowledged, {answered:,} answered, {self.faults.total()} faults"
        self._progress.update(self._task, completed=min(now, self._seconds), description=line)
        if now >= self._next_line and not self._console.is_terminal:
            self._console.print(f"{now:6.1f} s  {line}")
            self._next_line += _EVERY
        time.sleep(min(left, 0.2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/chaos",
        description="Break things on purpose while jobs run, and look whether any was lost, wrong or stuck.",
    )
    parser.add_argument(
        "--score", action="store_true", help="score a file instead, undisturbed and disturbed, and compare"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"for which things are broken (default: {MINUTES}, with --score {SCORE_MINUTES})"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the plan and of the clients (default: 1)")
    parser.add_argument("--jobs", type=int, help=f"in all (default: {JOBS_PER_MINUTE} a minute)")
    parser.add_argument("--rows", type=int, help=f"of the file (default: {ROWS_PER_MINUTE} a minute)")
    parser.add_argument("--keep", action="store_true", help="keep logs and data, also when all went well")
    options = parser.parse_args()
    if any(number is not None and number <= 0 for number in (options.minutes, options.jobs, options.rows)):
        parser.error("all numbers must be above 0")
    options.minutes = options.minutes or (SCORE_MINUTES if options.score else MINUTES)
    options.jobs = options.jobs or round(JOBS_PER_MINUTE * options.minutes)
    options.rows = options.rows or round(ROWS_PER_MINUTE * options.minutes)
    return options


def _report(console: Console, game: Game, verdict: Verdict, seconds: float) -> None:
    console.print(f"faults: {game.faults.total()}, missed: {game.missed}")
    for kind, count in sorted(game.faults.items()):
        console.print(f"  {count:4}  {kind}")
    counts = verdict.counts
    console.print(
        f"jobs: {counts['acknowledged']:,} acknowledged; {counts['ended']:,} ended: {counts['run once']:,} run once, "
        f"{counts['run again']:,} again, {counts['recovered']:,} recovered of them, "
        f"{counts['taken back']:,} taken back by their client"
    )
    console.print(f"slowest recovery: {verdict.recovery[0]:.1f} s ({verdict.recovery[1]})")
    console.print(f"slowest answer: {verdict.answer[0]:.1f} s ({verdict.answer[1]})")
    console.print(f"violations: {len(verdict.violations)} in {seconds:.0f} s")
    for violation in verdict.violations[:_SHOWN]:
        console.print(f"  {violation}")


def _play(options: argparse.Namespace, plan: list[Fault], folder: Path, console: Console) -> bool:
    """Play a game and report; return whether all went well."""
    began = time.monotonic()
    with System(folder, keep=round(60 * options.minutes) + 3600) as system:
        game = Game(system, plan, options.jobs, 60 * options.minutes, options.seed, console)
        late: list[str] = []
        for step in (game.play, system.calm_down):
            late += _violations(step)
        verdict = judge(system.direct, game.clients, game.deaths)
        late += _violations(system.stop)
        verdict.violations[:0] = late
    _report(console, game, verdict, time.monotonic() - began)
    return not verdict.violations


def _play_score(options: argparse.Namespace, plan: list[Fault], folder: Path, console: Console) -> bool:
    """Play a game of a file and report; return whether all went well."""
    with System(folder, keep=3600) as system:
        game = ScoreGame(system, plan, options.rows, options.seed, console)
        violations = list(_violations(game.play)) or [*game.judge(), *_violations(system.stop)]
    console.print(f"faults: {game.faults.total()}, {game.kills} of them kills, missed: {game.missed}")
    for kind, count in sorted(game.faults.items()):
        console.print(f"  {count:4}  {kind}")
    console.print(f"violations: {len(violations)}")
    for violation in violations[:_SHOWN]:
        console.print(f"  {violation}")
    return not violations


def _violations(step: object) -> Iterable[str]:
    try:
        step()  # type: ignore[operator]
    except Violation as violation:
        return [str(violation)]
    return []


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Play one game and return the exit status: 1 if anything went wrong."""
    options = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    plan = make_plan(options.seed, options.minutes, SCORE_PER_MINUTE if options.score else PER_MINUTE)
    what = f"{options.rows:,} rows" if options.score else f"{options.jobs:,} jobs"
    console.print(f"seed {options.seed}: {len(plan)} faults in {options.minutes:g} minutes, {what}")
    for fault in plan:
        console.print(str(fault))
    folder = Path(tempfile.mkdtemp(prefix="rq-models-chaos-"))
    try:
        well = (_play_score if options.score else _play)(options, plan, folder, console)
    except Violation as violation:
        console.print(f"it did not begin: {violation}")
        well = False
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        return INTERRUPTED
    if well and not options.keep:
        shutil.rmtree(folder)
    else:
        console.print(f"logs and data: {folder}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
