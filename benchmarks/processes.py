"""The processes of a turn, the embedded server and the workers: their start, what they cost, and their end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import psutil
from redis import Redis
from redis.exceptions import RedisError

from benchmarks import matmul
from benchmarks.client import Failed
from rq_models import guardian

ROOT = Path(__file__).parent.parent
RQ_MODELS = (sys.executable, "-P", "-m", "rq_models")
PATIENCE = 60
"""Seconds for a process to start or to end."""
_CONFIG = """
[models.iris_model]
class = "iris_model.iris_predict:IrisModel"
max_batch_size = {}
[models.matmul]
class = "matmul:Matmul"
"""
_STRAY = ("RQ_REDIS_URL", "RQ_MODELS_ENV", "RQ_KEY_PREFIX", "PYTHONPATH")


def wait_until(condition: Callable[[], object], what: str, limit: float = PATIENCE) -> None:
    """Wait for a condition; raise Failed when the limit, in seconds, is over."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {limit} s in vain until {what}")
        time.sleep(0.005)


class Ground:
    """A project in a temporary folder with a fresh embedded server: where one turn takes place.

    Attributes:
        server: its process.
        connection: to its first database.
        environ: what our own commands, the contender and its clients are told.
    """

    server: psutil.Popen

    def __init__(self, folder: Path, max_batch_size: int, environ: Mapping[str, str]) -> None:
        self._log = folder / "log"
        self._started: list[psutil.Popen] = []
        # Should this process be killed, the guardian ends what it leaves.
        self._guardian = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", "-S", guardian.__file__], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        (folder / "config").mkdir()
        (folder / "config" / "base.toml").write_text(_CONFIG.format(max_batch_size))
        shutil.copy(matmul.__file__, folder)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.url = f"redis://127.0.0.1:{probe.getsockname()[1]}"
        self.connection = Redis.from_url(f"{self.url}/0")
        ours = {"REDIS_URL": f"{self.url}/0", "RQ_MODELS_CONFIG": str(folder / "config")}
        self.environ = {**ours, "BENCH_REDIS_URL": self.url, **environ}

    @classmethod
    @contextmanager
    def prepared(
        cls, max_batch_size: int = 64, environ: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator["Ground"]:
        """Start the server; at the end kill it and whatever else was started."""
        with TemporaryDirectory(prefix="rq-models-bench-", ignore_cleanup_errors=True) as folder:
            ground = cls(Path(folder), max_batch_size, environ)
            try:
                ground.server = ground.start(*RQ_MODELS, "redis")
                wait_until(ground._is_ours, "the embedded server answers")
                yield ground
            except Failed as failure:
                tail = "\n".join(ground._log.read_text(errors="replace").splitlines()[-20:])
                raise Failed(f"{failure}; the log of its processes ends with:\n{tail}") from failure
            finally:
                ground._end()

    def _is_ours(self) -> bool:
        with suppress(RedisError):
            return bool(self.connection.info("server")["process_id"] == self.server.pid)
        return False

    def start(self, *command: str) -> psutil.Popen:
        """Start a process, in a session of its own: a terminal's Ctrl-C leaves its end to us."""
        environ = {name: value for name, value in os.environ.items() if name not in _STRAY}
        with self._log.open("ab") as log:
            process = psutil.Popen(
                command,
                cwd=ROOT,
                env={**environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        assert self._guardian.stdin is not None  # noqa: S101 - asked for above
        self._guardian.stdin.write(b"+%d\n" % process.pid)
        return process

    def _end(self) -> None:
        self.connection.close()
        for process in reversed(self._started):
            # Stopped first: what stands still can't start another one while they are being counted.
            left = [process]
            with suppress(psutil.NoSuchProcess), paused(process):
                left = family(process)
                for one in left:
                    one.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            psutil.wait_procs(left, timeout=PATIENCE)
        self._guardian.kill()
        self._guardian.wait()


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it has started."""
    return [process, *process.children(recursive=True)]


@contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    """Stop a process and all that it has started, and let them go on at the end."""
    stopped = family(process)
    try:
        for one in stopped:
            one.suspend()
        yield
    finally:
        for one in stopped:
            with suppress(psutil.NoSuchProcess):
                one.resume()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time that a process and all that it has started have used."""
    return float(sum(times.user + times.system for times in (one.cpu_times() for one in family(process))))


def megabytes(process: psutil.Process) -> float:
    """Return the memory they hold: their share of what is shared (PSS), or where the system can't say, RSS."""
    infos = [one.memory_full_info() for one in family(process)]
    return float(sum(getattr(info, "pss", info.rss) for info in infos)) / 1e6


def busy_seconds() -> list[tuple[float, float]]:
    """Return for each core the seconds that it was busy, and all its seconds."""
    return [(sum(one) - one.idle - getattr(one, "iowait", 0.0), sum(one)) for one in psutil.cpu_times(percpu=True)]
