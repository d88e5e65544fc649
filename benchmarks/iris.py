"""The job of every contender, a validated iris prediction, and what their clients and tasks share."""

import os
import threading
from typing import Any

from iris_model.iris_predict import IrisModel
from iris_model.schemas import IrisInput
from redis import Redis

URL = os.environ.get("BENCH_REDIS_URL", "")
"""Of the turn's server, without a database number. Results go to database 1 where a contender can part them."""
NOTES = "15"
"""Database in which each process that has loaded the model is noted, in the set `WARM`."""
WARM = "warm"
PATIENCE = 60
"""Seconds that a client waits for a result."""
LIMIT = f"socket_timeout={2 * PATIENCE}"
"""For addresses: blocking reads outlast redis-py's default time limit of a socket."""

_lock = threading.Lock()
_loaded: list[IrisModel] = []


def load() -> IrisModel:
    """Return a new model, and note that this process has one."""
    model = IrisModel()
    with Redis.from_url(f"{URL}/{NOTES}") as notes:
        notes.sadd(WARM, os.getpid())
    return model


def predict(data: dict[str, Any], model: IrisModel | None = None) -> dict[str, Any]:
    """Validate, predict, and return what JSON can hold; without a model by this process's, loaded on the first call."""
    if model is None:
        if not _loaded:
            with _lock:
                _loaded[:] = _loaded or [load()]
        model = _loaded[0]
    return model.predict(IrisInput.model_validate(data)).model_dump()
