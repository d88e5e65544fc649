"""Who takes part: what runs the workers, and what on the server tells how far they are."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from redis import Redis

from benchmarks import iris
from benchmarks.processes import RQ_MODELS, Ground
from rq_models.registry import read_model


@dataclass(frozen=True)
class Contender:
    """One way to have predictions made.

    Attributes:
        title: for people.
        module: its client side, and but for ours its tasks.
        command: runs its workers.
        processes: that load the model.
        queued: command that counts the jobs in the queue.
        finished: command that counts the results, in the given database.
        max_batch_size: ours only.
        environ: what its processes and clients are told.
        leaves_out: measures that its settings don't suit.
    """

    title: str
    module: str
    command: tuple[str, ...]
    processes: int
    queued: str
    finished: str = "DBSIZE"
    database: int = 1
    max_batch_size: int = 64
    environ: Mapping[str, str] = field(default_factory=dict)
    leaves_out: frozenset[str] = frozenset()

    @property
    def handed(self) -> int:
        """How many jobs the server hands at once to a process that waits."""
        # What is predicted one by one, ours takes as much at a time as it does in a moment.
        return 64 if self.is_ours else 1

    @property
    def is_ours(self) -> bool:
        """Whether it is rq-models."""
        return self.module == "benchmarks.ours"

    def count_warm(self, ground: Ground) -> int:
        """Return how many of its processes have loaded the model."""
        if self.is_ours:
            status = read_model(ground.connection, "iris_model")
            return sum(one.state == "warm" for one in status.serving) if status else 0
        with Redis.from_url(f"{ground.url}/{iris.NOTES}") as notes:
            return int(notes.scard(iris.WARM))


def _ours(title: str, processes: int, max_batch_size: int = 64) -> Contender:
    return Contender(
        f"rq-models, {title}",
        "benchmarks.ours",
        (*RQ_MODELS, "worker", "iris_model", "-n", str(processes)),
        processes,
        "LLEN rq:queue:iris_model",
        "ZCARD rq:finished:iris_model",
        database=0,
        max_batch_size=max_batch_size,
    )


def _module(arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments.split())


def _huey(processes: int, *, quiet: bool = False) -> Contender:
    return Contender(
        f"huey, {processes} process{'es' * (processes > 1)}{', no notifications' * quiet}",
        "benchmarks.huey_app",
        _module(f"huey.bin.huey_consumer benchmarks.huey_app.huey -q -n -k process -w {processes}"),
        processes,
        "LLEN huey.redis.bench",
        "HLEN huey.results.bench",
        database=0,
        environ={"BENCH_HUEY_QUIET": "1"} if quiet else {},
        # Without them a waiting client polls, ten times a second.
        leaves_out=frozenset({"cold", "closed", "concurrent"} if quiet else ()),
    )


def _dramatiq(processes: int) -> Contender:
    return Contender(
        f"dramatiq, {processes} process{'es' * (processes > 1)} × 8 threads",  # noqa: RUF001 - times
        "benchmarks.dramatiq_app",
        _module(f"dramatiq benchmarks.dramatiq_app --processes {processes} --threads 8"),
        processes,
        "LLEN dramatiq:default",
        # Idle workers poll; its default of 1000 ms costs latency, and less than this costs the drain.
        environ={"dramatiq_worker_timeout": "5"},
    )


CONTENDERS = {
    "ours": _ours("1 worker", 1),
    "ours-2": _ours("2 workers", 2),
    "ours-1by1": _ours("max_batch_size = 1", 1, max_batch_size=1),
    "rq": Contender(
        "RQ SimpleWorker",
        "benchmarks.rq_simple",
        _module("rq.cli worker -w rq.worker.SimpleWorker -S json --quiet bench"),
        1,
        "LLEN rq:queue:bench",
        "ZCARD rq:finished:bench",
        database=0,
    ),
    "celery": Contender(
        "Celery, prefork 2",
        "benchmarks.celery_app",
        _module(
            "celery -A benchmarks.celery_app worker --pool prefork --concurrency 2 --loglevel WARNING "
            "--without-gossip --without-mingle --without-heartbeat"
        ),
        2,
        "LLEN celery",
    ),
    "huey-1": _huey(1),
    "huey-2": _huey(2),
    "huey-1-quiet": _huey(1, quiet=True),
    "huey-2-quiet": _huey(2, quiet=True),
    "dramatiq-1": _dramatiq(1),
    "dramatiq-2": _dramatiq(2),
}
