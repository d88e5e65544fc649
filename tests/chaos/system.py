"""What is broken: a server, a pool of two workers, and the proxy through which all of it talks. Loopback only."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import psutil
from chaos.plan import LEASE, Fault
from chaos.proxy import Proxy
from redis import Redis
from redis.exceptions import RedisError

from rq_models.registry import read_model

MODEL = "chaos"
WORKERS = 2
PATIENCE = 60.0
"""Seconds for anything that must come about."""
_LOOK = 5.0
"""Seconds to wait for a victim: a worker may just be starting."""
_MARK = "RQ_MODELS_CHAOS"
_SLOW = "slow"
_SOURCE = """
import os, time

SLOW = os.path.join(os.path.dirname(__file__), "slow")

class Model:
    example = {"n": 1, "seconds": 0}

    def predict_batch(self, orders):
        # Rows of a file do not say how long they take.
        each = 0.002 if os.path.exists(SLOW) else 0
        time.sleep(sum(order.get("seconds", each) for order in orders))
        if any(order["n"] < 0 for order in orders):
            raise ValueError("there are no negative numbers here")
        return [{"n": order["n"], "square": order["n"] ** 2} for order in orders]

    def predict(self, order):
        return self.predict_batch([order])[0]
"""
_STRAY = ("REDIS_URL", "RQ_REDIS_URL", "RQ_MODELS_ENV", "RQ_KEY_PREFIX")


class Violation(Exception):
    """Something that was promised did not come about."""


class System:
    """All processes of a game: a context manager. It ends only processes that it has started, known by a mark.

    Args:
        folder: for the project, the server's data and all logs.
        keep: seconds to keep results.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._mark = uuid.uuid4().hex
        self._timers: list[threading.Timer] = []
        self.pools = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._output: IO[bytes] = stack.enter_context((self.folder / "processes.log").open("ab"))
            stack.callback(self.kill_all)
            port = _free_port()
            self.direct = Redis(port=port, retry=None)
            stack.callback(self.direct.close)
            self._write_project(port)
            self._start_server()
            self.proxy = stack.enter_context(Proxy(port))
            self.url = f"redis://127.0.0.1:{self.proxy.port}/0"
            self._start_pool()
            self.wait_until(self.is_warm, "all workers are warm")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        self._stack.close()

    def wait_until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Wait for a condition.

        Raises:
            Violation: it did not come about.
        """
        deadline = time.monotonic() + patience
        while True:
            with suppress(RedisError, psutil.Error):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise Violation(f"waited {patience:g} s in vain until {what}")
            time.sleep(0.02)

    def is_warm(self) -> bool:
        """Whether both workers have loaded the model, and say so; before, a client would not know of it."""
        status = read_model(self.direct, MODEL)
        return status is not None and [one.state for one in status.serving] == ["warm"] * WORKERS

    def carry_out(self, fault: Fault) -> bool:
        """Break it; return whether there was anything to break. What is to be mended again mends itself later."""
        kind, seconds = fault.kind, fault.seconds
        if kind in ("restart the server", "kill the server"):
            self._restart_server(seconds, kill=kind.startswith("kill"))
        elif kind.startswith("cut"):
            some = random.Random(fault.victim)  # noqa: S311 - as the plan says
            self.proxy.cut(lambda: kind != "cut some connections" or some.random() < 0.5, half_open=seconds)
        elif kind.startswith("stall"):
            self.proxy.stall()
            self._later(seconds, self.proxy.flow)
        elif kind.startswith("kill the pool"):
            workers = self._workers() if kind.endswith("workers") else []
            self.pool.kill()
            for worker in workers:
                _signal(worker, signal.SIGKILL)
            self.pool.wait(PATIENCE)
            self._start_pool()
        else:
            return self._hurt(kind, fault.victim, seconds)
        return True

    def _hurt(self, kind: str, number: int, seconds: float) -> bool:
        deadline = time.monotonic() + _LOOK
        while not (victims := self._horses() if "horse" in kind else self._workers()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        victim = victims[number % len(victims)]
        if kind.startswith("kill"):
            return _signal(victim, signal.SIGKILL)
        self._later(seconds, lambda: _signal(victim, signal.SIGCONT))
        return _signal(victim, signal.SIGSTOP)

    @contextmanager
    def slow_model(self) -> Iterator[None]:
        """Let each row of a file take 2 ms, so that there is time to break something."""
        (self.folder / _SLOW).touch()
        yield
        (self.folder / _SLOW).unlink()

    def calm_down(self) -> None:
        """Wait until all that was to be mended is mended, and what was started again is up."""
        for timer in self._timers:
            timer.join()
        self.wait_until(self.direct.ping, "the server answers")
        self.wait_until(lambda: len(self._workers()) == WORKERS, "both workers are there again")

    def stop(self) -> None:
        """Stop it all as a user would.

        Raises:
            Violation: something does not end, or not well.
        """
        self.pool.terminate()
        status = self.pool.wait(PATIENCE)
        if status != 0:
            raise Violation(f"the pool ended with {status}")
        self.wait_until(lambda: len(self.processes()) == 1, "only the server is left of all processes")
        self._server.terminate()
        self._server.wait(PATIENCE)
        if left := self.processes():
            raise Violation(f"processes left: {left}")

    def processes(self) -> list[psutil.Process]:
        """Return every process of this game that runs."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def kill_all(self) -> None:
        """End what is left."""
        while left := self.processes():
            for process in left:
                _signal(process, signal.SIGKILL)
            time.sleep(0.02)
        for process in (getattr(self, "pool", None), getattr(self, "_server", None)):
            if process is not None:
                process.wait()

    def _later(self, seconds: float, mend: Callable[[], object]) -> None:
        self._timers.append(threading.Timer(seconds, mend))
        self._timers[-1].start()

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _workers(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            found = psutil.Process(self.pool.pid).children()
            return sorted((one for one in found if "worker" in one.cmdline()), key=lambda one: one.pid)
        return []

    def _horses(self) -> list[psutil.Process]:
        horses: list[psutil.Process] = []
        for worker in self._workers():
            with suppress(psutil.Error):
                horses += worker.children()
        return horses

    def _write_project(self, port: int) -> None:
        (self.folder / "config").mkdir()
        (self.folder / "chaos_module.py").write_text(_SOURCE)
        # Deaths of its process cost a job retries: so many that bad luck alone never fails one.
        (self.folder / "config" / "base.toml").write_text(
            f'redis_url = "redis://127.0.0.1:{port}/0"\n'
            f'[models.{MODEL}]\nclass = "chaos_module:Model"\npreload = true\nlease = {LEASE}\nretries = 100\n'
            f"result_ttl = {self._keep}\n"
        )

    def _run(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if name not in _STRAY}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "rq_models", *arguments],
            cwd=self.folder,
            env={**inherited, "RQ_MODELS_CONFIG": str(self.folder / "config"), _MARK: self._mark, **environ},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _start_server(self) -> None:
        self._server = self._run("redis")
        self.wait_until(self.direct.ping, "the server answers")

    def _restart_server(self, pause: float, *, kill: bool) -> None:
        if kill:
            # With `everysec`, writes wait while the disk is busy with an fsync, and a server killed then loses what it
            # has acknowledged. That is promised to nobody; what is tested here are our own promises.
            with suppress(RedisError):
                self.direct.config_set("appendfsync", "no")
            self._server.kill()
        else:
            self._server.terminate()
        self._server.wait(PATIENCE)
        time.sleep(pause)
        self._start_server()

    def _start_pool(self) -> None:
        self.pools += 1
        self.pool = self._run("worker", MODEL, "-n", str(WORKERS), REDIS_URL=self.url)


def _signal(process: psutil.Process, signum: signal.Signals) -> bool:
    with suppress(psutil.Error):
        process.send_signal(signum)
        return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
