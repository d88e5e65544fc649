"""A game in which a file is scored twice: undisturbed, and while things are broken. Nobody may see a difference."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from chaos.plan import Fault
from chaos.system import MODEL, System, Violation
from chaos.verdict import leftovers
from rich.console import Console

from rq_models import Client, Progress, Run
from rq_models.scoring.runs import bulk_name

ROWS_PER_MINUTE = 50_000
_KILLS = ("kill", "restart")
_EVERY = 10.0
"""Seconds between two lines."""
_POLL = 0.1
_LONGEST = 600.0
"""Seconds for what is left of the file when nothing is broken any more."""


def write_rows(path: Path, rows: int, seed: int) -> int:
    """Write a CSV in which one row of a thousand is refused by the model, and another one cannot be read.

    Returns:
        how many will fail.
    """
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    bad = 0
    with path.open("w") as file:
        file.write("n,note\n")
        for number in range(rows):
            kind = chance.random()
            bad += kind < 0.002
            n = -number - 1 if kind < 0.001 else number
            file.write(f"{n},a note on row {number}{',' * (0.001 <= kind < 0.002)}\n")
    return bad


class ScoreGame:
    """One game, and what is told of it.

    Args:
        system: what is broken.
        plan: how.
        rows: of the file.
        seed: of the file.
        console: where to tell.

    Attributes:
        faults: by kind, those that there was something to break for.
        missed: how many others.
    """

    def __init__(self, system: System, plan: list[Fault], rows: int, seed: int, console: Console) -> None:
        self._system, self._plan, self._rows, self._console = system, plan, rows, console
        self._source = system.folder / "rows.csv"
        self._bad = write_rows(self._source, rows, seed)
        self.faults: Counter[str] = Counter()
        self.missed = 0

    @property
    def kills(self) -> int:
        """How often a horse, a worker, the pool or the server was killed."""
        return sum(count for kind, count in self.faults.items() if kind.startswith(_KILLS))

    def play(self) -> None:
        """Play it to its end.

        Raises:
            Violation: the file is not scored, or not in time.
        """
        with Client(self._system.url) as client:
            self._finish(self._begin(client, "calm"))
            with self._system.slow_model():
                run = self._begin(client, "wild")
                began, next_line = time.monotonic(), _EVERY
                for fault in self._plan:
                    while (now := time.monotonic() - began) < fault.at:
                        time.sleep(min(fault.at - now, _POLL))
                        if now >= next_line:
                            self._console.print(f"{now:6.1f} s  {self.faults.total()} faults; {run.progress()}")
                            next_line += _EVERY
                    self._break(fault)
                early = run.progress().is_over
            self._system.calm_down()
            self._finish(run)
        if early:
            raise Violation("the file was scored before all was broken; more --rows are needed")
        keys = [f"rq:{kind}:{bulk_name(MODEL)}" for kind in ("queue", "wip")]
        # The step that made the output also removes its parts, when the run is finished already.
        self._system.wait_until(lambda: not self._system.direct.exists(*keys), "no step is queued or started")

    def _begin(self, client: Client, name: str) -> Run:
        folder = self._system.folder / name
        folder.mkdir()
        return client.score(MODEL, self._source, folder / "scored.csv")

    def _finish(self, run: Run) -> None:
        try:
            progress: Progress = run.wait(_LONGEST)
        except Exception as error:
            raise Violation(f"the file is not scored: {error}") from error
        self._console.print(f"{progress} in {progress.seconds:.1f} s")

    def _break(self, fault: Fault) -> None:
        if self._system.carry_out(fault):
            self.faults[fault.kind] += 1
        else:
            self.missed += 1
        with (self._system.folder / "faults.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {fault}\n")

    def judge(self) -> Iterator[str]:
        """Yield what is not as it should be, now that all is over."""
        calm, wild = (self._system.folder / name for name in ("calm", "wild"))
        names = ["scored.csv", "scored.csv.errors.jsonl"]
        for folder in (calm, wild):
            if (found := sorted(one.name for one in folder.iterdir())) != names:
                yield f"in {folder.name} are {found} and not {names}"
                return
        for name in names:
            if (calm / name).read_bytes() != (wild / name).read_bytes():
                yield f"{name} is another one when things are broken"
        # Both could be wrong in the same way.
        rows = (wild / names[0]).read_text().splitlines()[1:]
        if len(rows) != self._rows:
            yield f"{len(rows)} rows are there of {self._rows}"
        wrong = [row for row in rows if not _is_right(row)]
        if len(wrong) != self._bad or (wild / names[1]).read_bytes().count(b"\n") != self._bad:
            yield f"{len(wrong)} rows have no right prediction, not {self._bad}, such as {wrong[:3]}"
        yield from leftovers(self._system.direct)


def _is_right(row: str) -> bool:
    """Return whether a row of the output has its square."""
    n, _, *predicted = row.split(",")
    return "" not in predicted and list(map(float, predicted)) == [int(n), int(n) ** 2]
