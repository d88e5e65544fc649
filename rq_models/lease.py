"""The lease: a worker's word that it is alive and what it serves, renewed by a thread that does nothing else."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.exceptions import RedisError
from redis.retry import Retry

from rq_models.health import explain, place
from rq_models.registry import Serving, drop_lease, renew_lease

if TYPE_CHECKING:
    from collections.abc import Callable

_RENEWALS, _ATTEMPTS = 3, 20
"""In the time that a lease lasts: how often it is renewed, and how often that is tried while it fails."""
_log = logging.getLogger("rq.worker.lease")


def own_connection(connection: Redis, **changes: Any) -> Redis:
    """Return a client on connections of its own to the same server, which never repeats a command by itself.

    A command whose reply was lost may have been carried out: a script that takes jobs would take the next ones.
    """
    pool = connection.connection_pool
    options = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0), **changes}
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))


class Lease(threading.Thread):
    """Renew ``rq-models:lease:<id>`` until `release`.

    Args:
        connection: any client of the server; the lease uses a connection of its own.
        model: the model served.
        serving: what to publish at first; `update` changes it.
        refresh: called before each renewal, for what changes without an event.
    """

    def __init__(
        self, connection: Redis, model: str, serving: Serving, refresh: Callable[[Serving], Serving], *, ttl: float
    ) -> None:
        super().__init__(daemon=True, name=f"{model}-lease")
        self._connection = own_connection(connection, socket_timeout=ttl / 2, socket_connect_timeout=ttl / 2)
        self._model = model
        self._serving = serving
        self._refresh = refresh
        self._ttl = ttl
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._renewed, self._failed = time.monotonic(), -math.inf

    @property
    def is_sound(self) -> bool:
        """Whether it was held without a doubt for as long as it lasts.

        If not, the server was away or this machine slept, and the leases of others may have run out for no death.
        """
        now = time.monotonic()
        return now - self._renewed < self._ttl <= now - self._failed

    @property
    def serving(self) -> Serving:
        """What is published now."""
        return self._serving

    def update(self, **fields: Any) -> None:
        """Change what is published, now; a server that is away hears of it at the next renewal."""
        self._renew(**fields)

    def run(self) -> None:
        """Renew until released; a server that is away is tried again at the next turn."""
        while not self._released.wait(self._ttl / (_RENEWALS if self._renewed >= self._failed else _ATTEMPTS)):
            self._renew()

    def release(self) -> None:
        """Stop renewing and say so."""
        self._released.set()
        with self._lock:
            try:
                drop_lease(self._connection, self._model, self._serving.lease)
            except RedisError as error:
                _log.warning("lease of %s not released, it will expire: %s", self._model, error)
            self._connection.close()

    def _renew(self, **fields: Any) -> None:
        with self._lock:
            self._serving = self._refresh(replace(self._serving, **fields))
            if self._released.is_set():
                return
            try:
                renew_lease(self._connection, self._model, self._serving, self._ttl)
            except RedisError as error:
                if self._renewed >= self._failed:
                    _log.warning("lease of %s not renewed: %s", self._model, explain(error, place(self._connection)))
                self._failed = time.monotonic()
                return
            now = time.monotonic()
            if now - self._renewed >= self._ttl:
                # It had run out. Said first: whoever asks at this moment must not take it for sound.
                self._failed = now
            self._renewed = now
