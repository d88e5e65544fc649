"""What a user's own test suite needs: a pytest plugin, active wherever rq-models is installed.

pytest imports it for every run, so nothing else is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rq_models.client import Client


class ServeModels(Protocol):
    """The type of the fixture `serve_models`."""

    def __call__(self, **models: Any) -> Client:
        """Serve these models, and return a client of them."""


@pytest.fixture
def serve_models() -> Iterator[ServeModels]:
    """Serve models inside the test's own process: no server, no worker, and the rest as in production.

    ``client = serve_models(churn=Churn, iris_model="iris_model.iris_predict:IrisModel")`` takes classes, instances or
    paths of classes, and returns a `rq_models.Client`. Inputs and outputs pass through JSON and the models' schemas;
    errors have the types that they have in production. A job is run as it is enqueued, by the thread that enqueues it,
    so no time limit is kept. RQ's callbacks are refused, as they are where the configuration lists none.
    """
    from rq_models.inprocess import InProcessClient  # noqa: PLC0415 - as said above

    clients: list[Client] = []

    def serve(**models: Any) -> Client:
        clients.append(InProcessClient(models))
        return clients[-1]

    yield serve
    for client in clients:
        client.close()
