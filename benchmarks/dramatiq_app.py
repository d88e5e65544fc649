"""Dramatiq with Redis as broker and for results."""

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks import iris

_backend = RedisBackend(url=f"{iris.URL}/1?{iris.LIMIT}")
_broker = RedisBroker(url=f"{iris.URL}/0?{iris.LIMIT}")
_broker.add_middleware(Results(backend=_backend, store_results=True, result_ttl=3_600_000))
dramatiq.set_broker(_broker)
_task = dramatiq.actor(iris.predict)


def enqueue(row: dict[str, Any]) -> dramatiq.Message:
    """Queue one message."""
    return _task.send(row)


def result(message: dramatiq.Message) -> Any:
    """Wait for the result."""
    return message.get_result(backend=_backend, block=True, timeout=iris.PATIENCE * 1000)
