"""Machine-learning models behind RQ queues: warm workers, typed errors, a thin client."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq_models.aclient import AsyncClient, AsyncJob
    from rq_models.client import Client, ClientJob
    from rq_models.errors import (
        CallerFault,
        ConfigurationError,
        DeadlineExceeded,
        InvalidInput,
        InvalidJob,
        InvalidOutput,
        InvalidRun,
        JobCancelled,
        JobLost,
        JobNotFound,
        ModelBroken,
        ModelCrashed,
        ModelError,
        ModelFault,
        ModelTimeout,
        NoWorker,
        QueueFull,
        RqModelsError,
        RunConflict,
        RunFailed,
        SystemFault,
        UnknownModel,
        UnknownRun,
    )
    from rq_models.registry import Card, ModelStatus, Serving
    from rq_models.scoring.run import Run
    from rq_models.scoring.runs import Progress
    from rq_models.worker import ModelWorker

    __version__: str

__all__ = [  # noqa: RUF022 - by theme
    # enqueue and wait
    "AsyncClient",
    "AsyncJob",
    "Client",
    "ClientJob",
    # what client.models() returns
    "Card",
    "ModelStatus",
    "Serving",
    # what client.score() returns
    "Progress",
    "Run",
    # for `rq worker -w rq_models.ModelWorker`
    "ModelWorker",
    # errors, by whose fault it is
    "RqModelsError",
    "CallerFault",
    "ConfigurationError",
    "InvalidInput",
    "InvalidJob",
    "InvalidRun",
    "RunConflict",
    "NoWorker",
    "QueueFull",
    "UnknownModel",
    "UnknownRun",
    "ModelFault",
    "InvalidOutput",
    "ModelBroken",
    "ModelCrashed",
    "ModelError",
    "ModelTimeout",
    "SystemFault",
    "DeadlineExceeded",
    "JobCancelled",
    "JobLost",
    "JobNotFound",
    "RunFailed",
]

_ROOMS = {
    "AsyncClient": "aclient",
    "AsyncJob": "aclient",
    "Client": "client",
    "ClientJob": "client",
    "Card": "registry",
    "ModelStatus": "registry",
    "Serving": "registry",
    "ModelWorker": "worker",
    "Progress": "scoring.runs",
    "Run": "scoring.run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that importing this package loads next to nothing."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - as said above

        return version("rq-models")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
