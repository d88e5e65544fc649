"""What is known of each model in Redis: its card, and who serves it.

Keys, all under ``<RQ's prefix>-models:`` (``rq-models:`` by default):

    rq-models:models               set of the names of all models ever published; no TTL
    rq-models:card:<model>         JSON of `Card`; kept 30 days after the last worker renewed it
    rq-models:serving:<model>      zset of lease ids, scored by their expiry in server time; 30 days
    rq-models:lease:<id>           JSON of `Serving`; expires by itself unless its worker renews it
    rq-models:counters:<model>     hash of counters, see `Counters`; 30 days after the last job
    rq-models:handed:<queue>       list of jobs that wake a worker each, empty but for the moment until that takes them
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from redis.exceptions import OutOfMemoryError, ResponseError
from rq.defaults import RQ_KEY_PREFIX

from rq_models.health import is_about_one_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis import Redis

PREFIX = f"{RQ_KEY_PREFIX}-models:"
MODELS_KEY = f"{PREFIX}models"
CARD_TTL = 30 * 24 * 3600
"""Seconds that a model nobody serves any more is remembered as 'nobody serves it' instead of 'no such model'."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds of the histograms' buckets, in seconds."""

T = TypeVar("T")


def card_key(model: str) -> str:
    """Return the key of a model's card."""
    return f"{PREFIX}card:{model}"


def serving_key(model: str) -> str:
    """Return the key of the set of leases that serve a model."""
    return f"{PREFIX}serving:{model}"


def counters_key(model: str) -> str:
    """Return the key of a model's counters."""
    return f"{PREFIX}counters:{model}"


def handed_key(queue: str) -> str:
    """Return the key of the list by which the server hands a job to one of the workers that wait for it."""
    return f"{PREFIX}handed:{queue}"


def lease_key(lease: str) -> str:
    """Return the key of one worker process's lease."""
    return f"{PREFIX}lease:{lease}"


@dataclass(frozen=True)
class Card:
    """What a client needs to know of a model; schemas are None until a worker has loaded it."""

    name: str
    display_name: str | None = None
    qualified_name: str | None = None
    version: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    example: Any = None
    batch: bool = False
    job_timeout: int = 60
    result_ttl: int = 3600
    failure_ttl: int = 604800
    retries: int = 3
    max_queued: int | None = None
    max_input_bytes: int | None = None


@dataclass(frozen=True)
class Serving:
    """One live worker process of a model."""

    lease: str
    worker: str
    host: str
    pid: int
    horse_pid: int | None = None
    state: str = "cold"
    """``cold`` (not loaded yet), ``warm`` or ``broken`` (the last load failed; `error` says why)."""
    version: str | None = None
    loads: int = 0
    error: str | None = None
    pool: str | None = None
    """Of the processes that one ``rq-models worker`` or ``up`` has started; by it they know each other's pids."""


@dataclass(frozen=True)
class ModelStatus:
    """A model as the registry knows it now."""

    name: str
    card: Card | None
    serving: tuple[Serving, ...]

    @property
    def state(self) -> str:
        """``warm`` if any worker is warm, else ``cold``, ``broken`` or ``unserved``."""
        states = {one.state for one in self.serving}
        return next((state for state in ("warm", "cold", "broken") if state in states), "unserved")


def _decode(cls: type[T], raw: bytes | str | None) -> T | None:
    """Return the record, or None where there is none or where something else wrote the key."""
    if raw is None:
        return None
    try:
        fields = json.loads(raw)
        known = {key: fields[key] for key in cls.__dataclass_fields__ if key in fields}  # type: ignore[attr-defined]
        return cls(**known)
    except (ValueError, TypeError, RecursionError):
        return None


def _encode(record: Card | Serving) -> str:
    return json.dumps(asdict(record), allow_nan=False)


def _sound(reply: Any) -> Any:
    """Return what a key holds, or None if it is something that nobody here has written."""
    if isinstance(reply, Exception):
        if isinstance(reply, ResponseError) and is_about_one_key(reply):
            return None
        raise reply
    return reply


def publish_card(connection: Redis, card: Card, *, only_if_unserved: bool = False) -> None:
    """Write a model's card.

    A worker that has not loaded the model yet knows no schema. It passes `only_if_unserved`, and so neither hides what
    a warm worker published nor leaves the schema of an older version standing, which might refuse good input.
    """
    if only_if_unserved:
        status = read_model(connection, card.name)
        if status is not None and any(one.state == "warm" for one in status.serving):
            return
    with connection.pipeline() as pipe:
        pipe.sadd(MODELS_KEY, card.name)
        pipe.set(card_key(card.name), _encode(card), ex=CARD_TTL)
        pipe.execute()


def renew_lease(connection: Redis, model: str, serving: Serving, ttl: float) -> None:
    """Say for `ttl` more seconds that this worker process is alive and serves the model."""
    seconds, micros = connection.time()
    now = seconds + micros / 1e6
    with connection.pipeline() as pipe:
        pipe.set(lease_key(serving.lease), _encode(serving), px=int(ttl * 1000))
        pipe.zadd(serving_key(model), {serving.lease: now + ttl})
        pipe.zremrangebyscore(serving_key(model), "-inf", now)
        pipe.expire(serving_key(model), CARD_TTL)
        pipe.expire(card_key(model), CARD_TTL)
        try:
            pipe.execute()
        except OutOfMemoryError:
            # A full server still lets a key live on; else all workers would count as dead.
            connection.pexpire(lease_key(serving.lease), int(ttl * 1000))
            raise
        except ResponseError as error:
            if not is_about_one_key(error):
                raise
            # Somebody else's; the next renewal makes it anew.
            connection.delete(serving_key(model))


def drop_lease(connection: Redis, model: str, lease: str) -> None:
    """Say that this worker process serves the model no more."""
    with connection.pipeline() as pipe:
        pipe.delete(lease_key(lease))
        pipe.zrem(serving_key(model), lease)
        pipe.execute()


def read_models(connection: Redis, names: Iterable[str] | None = None) -> list[ModelStatus]:
    """Return the state of these models, or of all ever published, sorted by name; unknown names are left out."""
    if names is None:
        names = (name.decode() for name in cast("set[bytes]", connection.smembers(MODELS_KEY)))
    wanted = sorted(names)
    if not wanted:
        return []
    with connection.pipeline(transaction=False) as pipe:
        for name in wanted:
            pipe.get(card_key(name))
            pipe.zrange(serving_key(name), 0, -1)
        found = [_sound(reply) for reply in pipe.execute(raise_on_error=False)]
    cards, leases = found[::2], [ids or [] for ids in found[1::2]]
    lease_ids = [lease.decode() for ids in leases for lease in ids]
    records = cast("list[bytes | None]", connection.mget([lease_key(one) for one in lease_ids])) if lease_ids else []
    # A lease that has run out is gone from its own key, whatever the zset says.
    alive = {lease: one for lease, raw in zip(lease_ids, records, strict=True) if (one := _decode(Serving, raw))}
    statuses = [
        ModelStatus(name, _decode(Card, card), tuple(alive[key] for one in ids if (key := one.decode()) in alive))
        for name, card, ids in zip(wanted, cards, leases, strict=True)
    ]
    return [status for status in statuses if status.card or status.serving]


def read_model(connection: Redis, name: str) -> ModelStatus | None:
    """Return the state of one model, or None if no worker ever published it."""
    return next(iter(read_models(connection, [name])), None)


def count_queued(connection: Redis, *models: str) -> list[int]:
    """Return for each model how many jobs wait in its queue, or are on the way from there to a worker."""
    with connection.pipeline(transaction=False) as pipe:
        for model in models:
            pipe.llen(f"{RQ_KEY_PREFIX}:queue:{model}")
            pipe.llen(handed_key(model))
        found: list[int] = pipe.execute()
    return [sum(pair) for pair in zip(found[::2], found[1::2], strict=True)]


@dataclass(frozen=True)
class Counters:
    """What a model has done since it was first served, over all its workers.

    Attributes:
        predictions: jobs that succeeded.
        failures: runs that failed, by the error's kind; a run that was retried counts.
        batches: how often runs were finished together, so ``(predictions + failures) / batches`` is the mean size.
        wait: runs by the seconds they had waited in the queue: for each of `BUCKETS`, and one more, how many.
        model: runs by the seconds that their prediction took; all of a batch have the batch's.
        loads: how often a worker loaded the model.
    """

    predictions: int
    failures: dict[str, int]
    batches: int
    wait: tuple[int, ...]
    model: tuple[int, ...]
    loads: int


def read_counters(connection: Redis, model: str) -> Counters:
    """Return a model's counters, all 0 for one that has done nothing."""
    raw = cast("dict[bytes, bytes]", connection.hgetall(counters_key(model)))
    found = {name.decode(): int(count) for name, count in raw.items()}
    labels = [*(f"{bound:g}" for bound in BUCKETS), "inf"]
    return Counters(
        predictions=found.get("predictions", 0),
        failures={
            name.removeprefix("failures:"): count for name, count in found.items() if name.startswith("failures:")
        },
        batches=found.get("batches", 0),
        wait=tuple(found.get(f"wait:{label}", 0) for label in labels),
        model=tuple(found.get(f"model:{label}", 0) for label in labels),
        loads=found.get("loads", 0),
    )
