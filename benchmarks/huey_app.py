"""Huey with Redis. Results wake who waits for them, which costs a round trip, unless BENCH_HUEY_QUIET is set."""

import os
from typing import Any

from huey import RedisHuey
from huey.api import Result

from benchmarks import iris

huey = RedisHuey("bench", url=f"{iris.URL}/0?{iris.LIMIT}", notify_result="BENCH_HUEY_QUIET" not in os.environ)
_task = huey.task()(iris.predict)


def enqueue(row: dict[str, Any]) -> Result:
    """Queue one task."""
    return _task(row)


def result(handle: Result) -> Any:
    """Wait for the result."""
    return handle.get(blocking=True, timeout=iris.PATIENCE)
