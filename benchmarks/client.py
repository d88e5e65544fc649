"""A process that plays the clients of one contender: it enqueues, waits and checks what it gets, as it is told."""

import importlib
import itertools
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Self

FLOWERS = [
    ("setosa", {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}),
    ("versicolor", {"sepal_length": 6.0, "sepal_width": 2.9, "petal_length": 4.5, "petal_width": 1.5}),
    ("virginica", {"sepal_length": 6.9, "sepal_width": 3.1, "petal_length": 5.4, "petal_width": 2.1}),
]
LIMIT = 300
"""Seconds for one order; only a broken contender needs as many."""
CHECKED = 500
"""At most, of the results of a drain: how many are fetched and compared."""

_context = multiprocessing.get_context("spawn")


class Failed(Exception):
    """A contender or a measure did not do what it must; the message says what."""


class ClientProcess:
    """The handle on such a process: a context manager.

    Args:
        module: the contender's, with ``enqueue``, ``result`` and, if it has them, ``enqueue_many`` and ``predict``.
        environ: what it is told beside the environment.
    """

    def __init__(self, module: str, environ: dict[str, str]) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, module, environ), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def tell(self, order: str, *args: Any) -> None:
        """Give an order: the name of a method of `_Clients`."""
        self._pipe.send((order, args))

    def answer(self) -> Any:
        """Return what came of the order, or raise Failed."""
        try:
            answer = self._pipe.recv() if self._pipe.poll(LIMIT) else Failed(f"no answer within {LIMIT} s")
        except (EOFError, OSError):
            answer = Failed("the client process has died")
        if isinstance(answer, Failed):
            raise answer
        return answer

    def ask(self, order: str, *args: Any) -> Any:
        """Give an order and wait for the answer."""
        self.tell(order, *args)
        return self.answer()


class _Clients:
    def __init__(self, module: Any) -> None:
        self._module = module
        self._predict = getattr(module, "predict", lambda row: module.result(module.enqueue(row)))
        self._handles: list[Any] = []

    def enqueue(self, count: int, how: str = "enqueue") -> float | None:
        """Queue so many jobs, each by a call of the contender's `how`, or all by one if that is "enqueue_many".

        Returns:
            The seconds it took, or None if the contender has no such way.
        """
        rows = [FLOWERS[n % len(FLOWERS)][1] for n in range(count)]
        call = getattr(self._module, how, None)
        if call is None:
            return None
        began = time.perf_counter()
        self._handles = call(rows) if how == "enqueue_many" else [call(row) for row in rows]
        return time.perf_counter() - began

    def check(self) -> None:
        """Wait for results of what was queued last, and compare them: at most `CHECKED`, from all over."""
        for n in range(0, len(self._handles), len(self._handles) // CHECKED + 1):
            _require(FLOWERS[n % len(FLOWERS)][0], self._module.result(self._handles[n]))

    def loop(self, threads: int, count: float, seconds: float) -> tuple[float, list[float]]:
        """Predict one after the other in each of some threads, until either limit.

        Returns:
            The seconds until all had their last result, and each prediction's seconds.
        """
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._one_loop, count, began + seconds) for _ in range(threads)]
            latencies = [latency for future in futures for latency in future.result()]
        return time.perf_counter() - began, latencies

    def _one_loop(self, count: float, deadline: float) -> list[float]:
        latencies: list[float] = []
        for species, row in itertools.cycle(FLOWERS):
            began = time.perf_counter()
            if began >= deadline or len(latencies) >= count:
                break
            answer = self._predict(row)
            latencies.append(time.perf_counter() - began)
            _require(species, answer)
        return latencies


def _require(species: str, answer: Any) -> None:
    if answer != {"species": species}:
        raise Failed(f"expected {species}, got {answer!r}")


def _serve(pipe: Connection, module: str, environ: dict[str, str]) -> None:
    # A terminal's Ctrl-C is for the benchmark, which ends this process; if it can't, the pipe's end does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environ)
    clients = _Clients(importlib.import_module(module))
    while True:
        try:
            order, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(clients, order)(*args))
        except Exception as error:  # noqa: BLE001 - whatever a contender raises, the benchmark reports
            pipe.send(Failed(f"{order}: {type(error).__name__}: {error}"))
