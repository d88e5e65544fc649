"""What no queue can exceed: the model without one, the server without a client that thinks, a batch without a job."""

import socket
import time
from collections.abc import Callable
from typing import Any

from iris_model.iris_predict import IrisModel
from iris_model.schemas import IrisInput
from redis.connection import parse_url

from benchmarks import iris
from benchmarks.client import FLOWERS
from benchmarks.matmul import ROWS, Matmul
from benchmarks.processes import RQ_MODELS, Ground, paused, wait_until
from benchmarks.turn import DRAIN_LIMIT, Plan
from rq_models import Client

BATCH = 64
_SECONDS = 0.5
"""For each limit."""
_PIPELINE = 1000
_MOST_BATCHES = 40


def limits(_: Plan) -> dict[str, float]:
    """Return rows a second of the iris model in this process, and commands a second of the server."""
    model = IrisModel()
    rows = [FLOWERS[n % len(FLOWERS)][1] for n in range(BATCH)]
    valid = [IrisInput.model_validate(row) for row in rows]

    def validated() -> None:
        for output in model.predict_batch([IrisInput.model_validate(row) for row in rows]):
            output.model_dump()

    began = time.process_time()
    rate = _rate(validated)
    cpu = (time.process_time() - began) / (rate * _SECONDS)
    return {
        "single": _rate(lambda: iris.predict(rows[0], model)),
        "raw_batch": BATCH * _rate(lambda: model.predict_batch(valid)),
        "validated_batch": BATCH * rate,
        "model_cpu": 1e6 * cpu / BATCH,
        "server_commands": _server_commands(),
    }


def _rate(call: Callable[[], object]) -> float:
    """Return calls a second."""
    began, calls = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < _SECONDS:
        call()
        calls += 1
    return calls / seconds


def _server_commands() -> float:
    """Return SETs a second of one connection, `_PIPELINE` at a time, encoded beforehand."""
    request = b"".join(b"*3\r\n$3\r\nSET\r\n$8\r\nkey:%04d\r\n$5\r\nvalue\r\n" % n for n in range(_PIPELINE))
    with Ground.prepared() as ground:
        address = parse_url(ground.url)
        with socket.create_connection((address["host"], address["port"])) as connection:

            def exchange() -> None:
                connection.sendall(request)
                left = len(b"+OK\r\n") * _PIPELINE
                while left:
                    left -= len(connection.recv(left))

            return _PIPELINE * _rate(exchange)


def matrix(plan: Plan) -> dict[str, float]:
    """Return rows a second of a model with an expensive batch: called in a plain loop, and drained from its queue."""
    batches = min(max(plan.jobs // ROWS, 1), _MOST_BATCHES)
    rows: list[dict[str, Any]] = [{"x": [n % 7, n % 5, n % 3, 1.0]} for n in range(batches * ROWS)]
    model = Matmul()
    model.predict_batch(rows[:ROWS])

    def plain_loop() -> float:
        began = time.perf_counter()
        for start in range(0, len(rows), ROWS):
            model.predict_batch(rows[start : start + ROWS])
        return time.perf_counter() - began

    # Before and after: what the machine gives changes within seconds.
    loop = plain_loop()
    with Ground.prepared() as ground, Client(f"{ground.url}/0", check_model=False, check_worker=False) as client:
        first = client.enqueue("matmul", rows[0])
        worker = ground.start(*RQ_MODELS, "worker", "matmul")
        first.wait(DRAIN_LIMIT)
        with paused(worker):
            client.enqueue_many("matmul", rows)
            began = time.perf_counter()
        all_done = lambda: ground.connection.zcard("rq:finished:matmul") > len(rows)  # noqa: E731 - it is said here
        wait_until(all_done, "the batches are done", DRAIN_LIMIT)
        drain = time.perf_counter() - began
    loop = (loop + plain_loop()) / 2
    return {
        "batch_ms": 1000 * loop / batches,
        "loop": len(rows) / loop,
        "matrix_drain": len(rows) / drain,
        "efficiency": loop / drain,
    }
