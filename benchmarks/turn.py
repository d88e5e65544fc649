"""One contender's turn of a round: everything that is measured of it, on a fresh server."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
from redis import Redis

from benchmarks.client import ClientProcess, Failed
from benchmarks.contenders import Contender
from benchmarks.processes import Ground, busy_seconds, cpu_seconds, megabytes, paused

DRAIN_LIMIT = 600
"""Seconds."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.002, 0.05
"""Seconds between two looks at how far a drain is."""
CLIENT_PROCESSES = 2
"""Among which the concurrent clients, which are threads, are shared out."""
_WARM_UP, _WARM_UPS = 200, 50
_MOST_ENQUEUED = 2000
"""One by one: workers of ours that stand still for longer than their lease are taken for dead."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        measures: which.
        jobs: in a drain.
        predictions: in a closed loop.
        clients: at once.
        seconds: for which these ask.
        rows: of a file.
    """

    measures: frozenset[str]
    jobs: int
    predictions: int
    clients: int
    seconds: float
    rows: int


@dataclass(frozen=True)
class Turn:
    """A contender, with a client process and workers that are warm; `results` is where its results are counted."""

    contender: Contender
    ground: Ground
    client: ClientProcess
    workers: psutil.Popen
    results: Redis

    def finished(self) -> int:
        """Return how many results there are."""
        return int(self.results.execute_command(*self.contender.finished.split()))

    def warm_up(self) -> None:
        """Send jobs until each process has loaded the model."""
        for _ in range(_WARM_UPS):
            self.client.ask("enqueue", _WARM_UP)
            self.client.ask("check")
            if self.contender.count_warm(self.ground) >= self.contender.processes:
                return
        raise Failed(f"fewer than {self.contender.processes} processes have loaded the model")

    def closed(self, plan: Plan) -> dict[str, float]:
        """One client, which asks for the next prediction when it has the last."""
        _, latencies = self.client.ask("loop", 1, plan.predictions, 60)
        return {"p50": 1000 * statistics.median(latencies), "p99": 1000 * p99(latencies)}

    def concurrent(self, plan: Plan) -> dict[str, float]:
        """Many clients at once, for some seconds."""
        count = min(CLIENT_PROCESSES, plan.clients)
        threads = [len(range(n, plan.clients, count)) for n in range(count)]
        with ExitStack() as stack:
            environ = self.ground.environ
            clients = [stack.enter_context(ClientProcess(self.contender.module, environ)) for _ in threads]
            # Twice: the first time imports and connects.
            for seconds in (0.5, plan.seconds):
                for client, share in zip(clients, threads, strict=True):
                    client.tell("loop", share, float("inf"), seconds)
                answers = [client.answer() for client in clients]
        return {
            "concurrent": sum(len(latencies) / seconds for seconds, latencies in answers),
            "concurrent_p99": 1000 * p99([one for _, latencies in answers for one in latencies]),
        }

    def drain(self, plan: Plan) -> dict[str, float]:
        """Queue jobs while the workers stand still, let them go, and wait for the last result."""
        with paused(self.workers):
            before = self.finished()
            if self.client.ask("enqueue", plan.jobs, "enqueue_many") is None:
                self.client.ask("enqueue", plan.jobs)
            queued = int(self.ground.connection.execute_command(*self.contender.queued.split()))
            # A worker that blocked was handed the first job, or ours a batch, but has not seen it yet.
            if queued < plan.jobs - self.contender.processes * self.contender.handed:
                raise Failed(f"only {queued} of {plan.jobs} jobs are queued while the workers stand still")
            costs, cores, began = self._costs(), busy_seconds(), time.perf_counter()
        polls = 1
        while (done := self.finished() - before) < plan.jobs:
            seconds = time.perf_counter() - began
            if seconds > DRAIN_LIMIT:
                raise Failed(f"{plan.jobs} jobs are not done within {DRAIN_LIMIT} s")
            polls += 1
            # Seldom at first, often at the end: looking takes the server and a core from those who are measured.
            left = seconds * (plan.jobs - done) / max(done, 1)
            time.sleep(min(max(left / 4, SHORTEST_PAUSE), LONGEST_PAUSE))
        seconds = time.perf_counter() - began
        busy = [(b - a) / ((y - x) or 1) for (a, x), (b, y) in zip(cores, busy_seconds(), strict=True)]
        worker, server, commands, reads, writes = (b - a for a, b in zip(costs, self._costs(), strict=True))
        self.client.ask("check")
        return {
            "drain": queued / seconds,
            "worker_cpu": 1e6 * worker / plan.jobs,
            "server_cpu": 1e6 * server / plan.jobs,
            "busy": 100 * min(busy),
            # Each poll is a command, a read and a write, and so is the second look at the costs.
            "commands": (commands - polls - 1) / plan.jobs,
            # A large request takes several reads and a large reply several writes, but one round trip.
            "round_trips": (min(reads, writes) - polls - 1) / plan.jobs,
        }

    def _costs(self) -> tuple[float, ...]:
        """Return CPU seconds of workers and server, and the server's counts of commands, reads and writes."""
        info = self.ground.connection.info("stats")
        counts = (info[f"total_{what}_processed"] for what in ("commands", "reads", "writes"))
        return (cpu_seconds(self.workers), cpu_seconds(self.ground.server), *counts)

    def memory(self, _: Plan) -> dict[str, float]:
        """What the workers hold."""
        return {"memory": megabytes(self.workers)}

    def enqueue(self, plan: Plan) -> dict[str, float]:
        """Queue jobs by a call for each and by one for all while the workers stand still; the last of a turn."""
        count = min(plan.jobs, _MOST_ENQUEUED)
        with paused(self.workers):
            seconds = {how: self.client.ask("enqueue", count, how) for how in ("enqueue", "enqueue_many")}
        return {how: count / took for how, took in seconds.items() if took is not None}


MEASURES: dict[str, Callable[[Turn, Plan], dict[str, float]]] = {
    "closed": Turn.closed,
    "concurrent": Turn.concurrent,
    "drain": Turn.drain,
    "memory": Turn.memory,
    "enqueue": Turn.enqueue,
}
"""In this order; before them, when there is no worker yet, comes `cold`."""


def take(contender: Contender, plan: Plan) -> dict[str, float]:
    """Return the contender's figures of this round, by the names in `report.METRICS`, or raise Failed."""
    measures = plan.measures - contender.leaves_out
    with (
        Ground.prepared(contender.max_batch_size, contender.environ) as ground,
        ClientProcess(contender.module, ground.environ) as client,
        Redis.from_url(f"{ground.url}/{contender.database}") as results,
    ):
        client.ask("enqueue", 1, "enqueue_early" if contender.is_ours else "enqueue")
        began = time.perf_counter()
        turn = Turn(contender, ground, client, ground.start(*contender.command), results)
        client.ask("check")
        figures = {"cold": time.perf_counter() - began} if "cold" in measures else {}
        turn.warm_up()
        for name, measure in MEASURES.items():
            if name in measures:
                figures |= measure(turn, plan)
        return figures


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[len(values) * 99 // 100]
