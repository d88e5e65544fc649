"""The supervisor, with real processes: restarts, the order of stopping, and what is left when it is killed."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import RunningWorker, wait_until

from rq_models.pool import Pool

# Says that it runs, then waits; on SIGTERM it says so and leaves.
WAITS = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
out = pathlib.Path(sys.argv[1]).open("a", buffering=1)
try:
    print("started", file=out)
    signal.pause()
finally:
    print("stopped", file=out)
"""
DIES = 'import pathlib, sys; pathlib.Path(sys.argv[1]).open("a").write("started\\n"); sys.exit(int(sys.argv[2]))'


def python(source: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", source, *(str(one) for one in arguments)]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        # A zombie in a container without an init is as dead as can be.
        state = Path(f"/proc/{pid}/stat")
        return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
    return False


@pytest.fixture
def said() -> list[str]:
    return []


def make(said: list[str]) -> Pool:
    return Pool(dict(os.environ), said.append)


def run_until(pool: Pool, done: Callable[[], object]) -> None:
    """Let the pool keep its children until the condition holds."""

    def stop_when_done() -> None:
        wait_until(done, "what the test waits for")
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_when_done)
    watcher.start()
    pool.keep()
    watcher.join()


def test_leaving_stops_the_children(said: list[str], tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    with make(said) as pool:
        children = [pool.start(out.name, python(WAITS, out)) for out in outs]
        assert pool.wait(lambda: all(lines(out) == ["started"] for out in outs))
        pids = {child.process.pid for child in children}

    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)
    assert [lines(out) for out in outs] == [["started", "stopped"]] * 2
    assert said == []


def test_a_child_that_dies_is_started_again_after_a_growing_pause(said: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with make(said) as pool:
        pool.start("moody", python(DIES, out, 3))
        run_until(pool, lambda: len(said) >= 3)

    assert len(lines(out)) >= 3
    assert said[0] == "moody ended with exit status 3; starting it again in 0.1 s"
    assert [line.split()[-2] for line in said[:3]] == ["0.1", "0.2", "0.4"]


def test_a_killed_child_is_started_again(said: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with make(said) as pool:
        child = pool.start("one", python(WAITS, out))
        assert pool.wait(lambda: lines(out) == ["started"])
        os.kill(child.process.pid, signal.SIGKILL)
        run_until(pool, lambda: lines(out) == ["started", "started"])

    assert said == ["one was killed by SIGKILL; starting it again in 0.1 s"]


def test_a_death_before_all_is_up_ends_all(said: list[str], tmp_path: Path) -> None:
    with make(said) as pool:
        pool.start("one", python(WAITS, tmp_path / "one"))
        pool.start("two", python(DIES, tmp_path / "two", 7))
        with pytest.raises(SystemExit) as left:
            pool.wait(lambda: False)

    assert left.value.code == 7
    assert said == ["two ended with exit status 7; stopping"]
    assert len(lines(tmp_path / "two")) == 1


def test_when_every_child_has_left_by_itself_the_pool_is_done(said: list[str], tmp_path: Path) -> None:
    with make(said) as pool:
        pool.start("one", python(DIES, tmp_path / "out", 0))
        pool.keep()

    assert said == []


def test_the_last_one_is_stopped_after_the_others(said: list[str], tmp_path: Path) -> None:
    # The others take their time, and write into the same file.
    slow = WAITS.replace("finally:", "finally:\n    import time; time.sleep(0.3)")
    out = tmp_path / "out"
    named = 'print("stopped", file=out)'
    with make(said) as pool:
        pool.start("server", python(WAITS.replace(named, 'print("server", file=out)'), out), last=True)
        for name in ("one", "two"):
            pool.start(name, python(slow.replace(named, 'print("worker", file=out)'), out))
        assert pool.wait(lambda: lines(out) == ["started"] * 3)

    assert lines(out)[3:] == ["worker", "worker", "server"]


SUPERVISOR = textwrap.dedent("""
    import os, sys
    from rq_models.pool import Pool
    with Pool(dict(os.environ), print) as pool:
        child = pool.start("one", [sys.executable, "-c", *sys.argv[1:]])
        print("pids", child.process.pid, pool._guardian.pid, flush=True)
        pool.keep()
""")


def supervise(
    spawn: Callable[..., RunningWorker], tmp_path: Path, source: str
) -> tuple[RunningWorker, list[int], Path]:
    out = tmp_path / "out"
    parent = spawn(python(SUPERVISOR, source, out), cwd=tmp_path, env=dict(os.environ))
    wait_until(lambda: "pids" in parent.log and lines(out), "the child runs")
    return parent, [int(pid) for pid in parent.log.split()[1:]], out


def test_a_killed_supervisor_leaves_nothing(spawn: Callable[..., RunningWorker], tmp_path: Path) -> None:
    parent, pids, out = supervise(spawn, tmp_path, WAITS)

    parent.stop(signal.SIGKILL)

    wait_until(lambda: not any(is_alive(pid) for pid in pids), "child and guardian are gone")
    assert lines(out) == ["started", "stopped"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all(spawn: Callable[..., RunningWorker], tmp_path: Path, signum: signal.Signals) -> None:
    parent, pids, out = supervise(spawn, tmp_path, WAITS)

    assert parent.stop(signum) == 0

    assert not any(is_alive(pid) for pid in pids)
    assert lines(out) == ["started", "stopped"]


def test_a_request_to_reload_is_passed_on_to_those_that_can(said: list[str], tmp_path: Path) -> None:
    hears = WAITS.replace("out =", 'signal.signal(signal.SIGHUP, lambda *_: print("reload", file=out))\nout =')
    hears = hears.replace("signal.pause()", "while True: signal.pause()")
    one, other = tmp_path / "one", tmp_path / "other"
    with make(said) as pool:
        pool.start("one", python(hears, one), reloads=True)
        # Such a signal would end this one, which has no handler of its own.
        pool.start("other", python(WAITS, other))
        assert pool.wait(lambda: lines(one) == lines(other) == ["started"])
        os.kill(os.getpid(), signal.SIGHUP)
        run_until(pool, lambda: lines(one) == ["started", "reload"])

    assert lines(one) == ["started", "reload", "stopped"]
    assert lines(other) == ["started", "stopped"]
    assert said == []


def test_a_terminals_interrupt_reaches_the_children_once(spawn: Callable[..., RunningWorker], tmp_path: Path) -> None:
    # Ctrl-C goes to the whole foreground group; the child would be killed by a SIGINT, and says "stopped" by SIGTERM.
    parent, _, out = supervise(spawn, tmp_path, WAITS)

    os.killpg(parent.pid, signal.SIGINT)

    assert parent.process.wait(30) == 0
    assert lines(out) == ["started", "stopped"]


def test_each_request_is_passed_on(spawn: Callable[..., RunningWorker], tmp_path: Path) -> None:
    stubborn = """
import pathlib, signal, sys
seen = []
def stop(*_):
    print("asked", file=out)
    seen.append(1)
    if len(seen) > 1: sys.exit(0)
signal.signal(signal.SIGTERM, stop)
out = pathlib.Path(sys.argv[1]).open("a", buffering=1)
print("started", file=out)
while True: signal.pause()
"""
    parent, _, out = supervise(spawn, tmp_path, stubborn)
    os.kill(parent.pid, signal.SIGINT)
    wait_until(lambda: lines(out) == ["started", "asked"], "it was asked once")

    os.kill(parent.pid, signal.SIGINT)

    assert parent.process.wait(30) == 0
    assert lines(out) == ["started", "asked", "asked"]
