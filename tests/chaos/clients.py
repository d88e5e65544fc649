"""Clients that enqueue, singly and in bulk, and wait; each keeps its own record of what Redis acknowledged."""

from __future__ import annotations

import random
import threading
import time
import uuid
from dataclasses import dataclass, field

from chaos.system import MODEL
from redis.exceptions import RedisError

from rq_models import Client, NoWorker, RqModelsError

_LARGEST = 150
"""Jobs of a bulk."""
_PAUSE = 0.05
_PATIENCE = 120.0
"""Seconds after which a job counts as stuck."""


@dataclass
class Record:
    """One job that Redis acknowledged: its input, when, and what its client got and how long it took."""

    id: str
    n: int
    at: float = field(default_factory=time.time)
    outcome: object = None
    took: float | None = None

    def end(self, outcome: object) -> None:
        """Write down what the client got."""
        self.outcome, self.took = outcome, time.time() - self.at


class Pace:
    """Says when jobs are due, so that they are spread over the whole game.

    Args:
        jobs: in all.
        seconds: over which to spread them.
    """

    def __init__(self, jobs: int, seconds: float) -> None:
        self._jobs, self._seconds = jobs, seconds
        self._began = time.monotonic()
        self._taken = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def take(self, most: int) -> range:
        """Return the numbers of up to so many jobs that are due; none if none is."""
        due = min(self._jobs, round(self._jobs * (time.monotonic() - self._began) / self._seconds) + 1)
        with self._lock:
            first = self._taken
            self._taken = min(first + most, max(due, first))
            return range(first, self._taken)

    @property
    def is_over(self) -> bool:
        """Whether there are no more jobs."""
        return self._taken >= self._jobs or self.stopped.is_set()


class ChaosClient(threading.Thread):
    """One client: enqueues what is due, in its own way, and waits for it, until there are no more jobs.

    Args:
        url: of Redis, through the proxy.
        pace: shared with the others.
        seed: of what it chooses.
    """

    def __init__(self, url: str, pace: Pace, seed: int) -> None:
        super().__init__(daemon=True, name=f"client-{seed}")
        self._url, self._pace = url, pace
        self._chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.records: list[Record] = []
        self.given_up: set[str] = set()
        """Jobs of which this client does not know whether they are in Redis, or which it took back."""
        self.errors: list[str] = []

    def run(self) -> None:
        """Play; whatever goes wrong that should not is among `errors`."""
        try:
            with Client(self._url) as client:
                while not self._pace.is_over:
                    self._play(client)
        except Exception as error:  # noqa: BLE001 - it is what this is for
            self.errors.append(f"{self.name}: {type(error).__name__}: {error}")

    def _play(self, client: Client) -> None:
        way = self._chance.choice([self._one, self._one, self._predict, self._predict, self._many])
        numbers = self._pace.take(self._chance.randint(2, _LARGEST) if way == self._many else 1)
        if not numbers:
            time.sleep(_PAUSE)
        elif len(numbers) > 1:
            self._many(client, [self._order(n) for n in numbers])
        else:
            (way if way != self._many else self._one)(client, [self._order(n) for n in numbers])

    def _order(self, n: int) -> dict[str, object]:
        # Most are quick; some are so slow that something happens meanwhile.
        most = self._chance.choices([0.002, 0.1, 1.0], [40, 10, 1])[0]
        return {"n": n, "seconds": round(self._chance.uniform(0, most), 4)}

    def _one(self, client: Client, orders: list[dict[str, object]]) -> None:
        job_id = str(uuid.uuid4())
        while not self._pace.stopped.is_set():
            try:
                # By its id it may be repeated, after an answer that was lost.
                job = client.enqueue(MODEL, orders[0], job_id=job_id)
            except (RedisError, NoWorker):
                time.sleep(_PAUSE)
                continue
            record = self._acknowledged(job_id, orders[0])
            self._collect(client, [job], [record])
            return
        self.given_up.add(job_id)

    def _predict(self, client: Client, orders: list[dict[str, object]]) -> None:
        while not self._pace.stopped.is_set():
            job_id = str(uuid.uuid4())
            try:
                began = time.time()
                value = client.predict(MODEL, orders[0], timeout=_PATIENCE, job_id=job_id)
            except NoWorker:
                time.sleep(_PAUSE)
            except (RedisError, TimeoutError) as error:
                self.given_up.add(job_id)
                if isinstance(error, TimeoutError) and not isinstance(error, RedisError):
                    self.errors.append(f"{self.name}: job {job_id}: {error}")
                    return
                time.sleep(_PAUSE)
            else:
                record = self._acknowledged(job_id, orders[0])
                record.at = began
                record.end(value)
                return

    def _many(self, client: Client, orders: list[dict[str, object]]) -> None:
        while not self._pace.stopped.is_set():
            try:
                jobs = client.enqueue_many(MODEL, orders)
            except (RedisError, NoWorker):
                # Some may be in Redis; nobody waits for those, but they must end well, too.
                time.sleep(_PAUSE)
                continue
            records = [self._acknowledged(job.id, order) for job, order in zip(jobs, orders, strict=True)]
            self._collect(client, jobs, records)
            return

    def _acknowledged(self, job_id: str, order: dict[str, object]) -> Record:
        self.records.append(Record(job_id, int(str(order["n"]))))
        return self.records[-1]

    def _collect(self, client: Client, jobs: list, records: list[Record]) -> None:
        by_id = {record.id: record for record in records}
        try:
            for job in client.as_completed(jobs, timeout=_PATIENCE):
                try:
                    by_id[job.id].end(job.wait())
                except RqModelsError as error:
                    by_id[job.id].end(error)
        except TimeoutError as error:
            self.errors.append(f"{self.name}: stuck: {error}")
