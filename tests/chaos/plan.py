"""What is broken, and when: the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

LEASE = 3.0
"""Seconds; the workers' leases in this game. Some stops outlast it."""
KINDS = {
    "kill the horse of a worker": 0.0,
    "stop the horse of a worker": 3.0,
    "kill a worker": 0.0,
    "stop a worker": 2 * LEASE,
    "kill the pool": 0.0,
    "kill the pool and its workers": 0.0,
    "restart the server": 3.0,
    "kill the server": 3.0,
    "cut some connections": 0.0,
    "cut all connections": 0.0,
    "cut all connections, half-open": 4.0,
    "stall all connections": 3.0,
}
"""Every kind of fault, and for how many seconds it lasts at most."""
PER_MINUTE = 12
_CALM = 3.0
"""Seconds at the beginning in which nothing happens."""


@dataclass(frozen=True)
class Fault:
    """One thing to break.

    Attributes:
        at: seconds after the beginning.
        kind: one of `KINDS`.
        seconds: for which it lasts.
        victim: which of several.
    """

    at: float
    kind: str
    seconds: float
    victim: int

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.at:6.1f} s  {self.kind}{lasting}"


def make_plan(seed: int, minutes: float, per_minute: int = PER_MINUTE) -> list[Fault]:
    """Return the faults of a game, evenly spread; each kind comes once before any comes again."""
    chance = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    count = round(minutes * per_minute)
    every = (60 * minutes - _CALM) / max(count, 1)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(sorted(KINDS), len(KINDS))
    faults = []
    for number, kind in enumerate(kinds[:count]):
        at = _CALM + every * (number + chance.uniform(0, 0.6))
        seconds = round(KINDS[kind] * chance.uniform(0.1, 1), 1)
        faults.append(Fault(at, kind, seconds, chance.randrange(100)))
    return faults
