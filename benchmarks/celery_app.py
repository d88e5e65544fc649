"""Celery in the classic shape of a model server: a Task class that keeps its model, Redis as broker and backend."""

from typing import Any

from celery import Celery, Task
from celery.result import AsyncResult
from iris_model.iris_predict import IrisModel

from benchmarks import iris

app = Celery("bench", broker=f"{iris.URL}/0", backend=f"{iris.URL}/1")
app.conf.update(
    # The default of 4 fetches too few of such short tasks at a time; more than this gains nothing.
    worker_prefetch_multiplier=64,
    worker_disable_rate_limits=True,
    broker_pool_limit=64,
    result_expires=3600,
)


class Prediction(Task):
    """Loads its model on the first task in each process of the pool."""

    name = "bench.predict"
    model: IrisModel | None = None

    def run(self, data: dict[str, Any]) -> dict[str, Any]:
        """Predict, in the worker."""
        if self.model is None:
            self.model = iris.load()
        return iris.predict(data, self.model)


_task = app.register_task(Prediction())


def enqueue(row: dict[str, Any]) -> AsyncResult:
    """Queue one task."""
    return _task.delay(row)


def result(handle: AsyncResult) -> Any:
    """Wait for the result."""
    return handle.get(timeout=iris.PATIENCE)
