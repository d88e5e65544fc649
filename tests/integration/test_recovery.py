"""Leases, recovery and the fence: what a dead worker held is run again, and a worker that was given up writes nothing.

Real processes are killed, stopped and cut off. The model writes down who predicted what, and holds on as it is told.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos.proxy import Proxy
from conftest import RQ, Project, RunningWorker, wait_until
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from rq_models import Client, JobCancelled, JobLost
from rq_models.registry import lease_key, read_model

# Each line of the diary is a call: the worker's pid, and the numbers it was given. An order with `until` is held until
# that file is there, or one of that name and the worker's pid.
HELD = """
    import os, signal, time

    class Model:
        def predict(self, order):
            return self.predict_batch([order])[0]

        def predict_batch(self, orders):
            worker = os.getppid()
            with open(orders[0]["diary"], "a") as diary:
                diary.write(" ".join(map(str, [worker, *(order["n"] for order in orders)])) + "\\n")
            for order in orders:
                if order.get("kill"):
                    os.kill(worker, signal.SIGKILL)
                    time.sleep(600)
                until = order.get("until")
                while until and not os.path.exists(until) and not os.path.exists(f"{until}.{worker}"):
                    time.sleep(0.01)
            return [order["n"] ** 2 for order in orders]
"""
NOT_SOON = 3600
"""Seconds: with such a lease nothing waits for its end."""
GHOST = "ghost:0123456789ab-1"
"""A run of a worker that never was."""


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


class Held:
    """The model that holds on, what it wrote down, and the workers that serve it."""

    def __init__(self, project: Project, start_worker: Callable[..., RunningWorker], client: Client, tmp: Path) -> None:
        self.project, self.client = project, client
        self._start_worker = start_worker
        self._diary, self.until = tmp / "diary", tmp / "until"

    def start(self, *arguments: str) -> RunningWorker:
        """Start a worker, and wait until it holds the model."""
        worker = self._start_worker(self.project, "held", *arguments)
        wait_until(lambda: worker.log.count("is warm") == int((1, *arguments)[-1]), "the model is warm")
        return worker

    def order(self, n: int, **more: object) -> dict[str, object]:
        return {"n": n, "diary": str(self._diary), **more}

    def held_order(self, n: int) -> dict[str, object]:
        return self.order(n, until=str(self.until))

    def release(self, worker: int | None = None) -> None:
        """Let all go on, or only the model of the worker with this pid."""
        Path(f"{self.until}.{worker}" if worker else self.until).touch()

    @property
    def calls(self) -> list[list[int]]:
        """The numbers of each call so far."""
        return [call for _, *call in self._lines()]

    @property
    def workers(self) -> list[int]:
        """The worker of each call so far."""
        return [worker for worker, *_ in self._lines()]

    def wait_for_calls(self, count: int) -> None:
        wait_until(lambda: len(self.calls) >= count, f"the model was called {count} times")

    def _lines(self) -> list[list[int]]:
        # The last part is a line that is not whole yet, or nothing.
        *lines, _ = self._diary.read_text().split("\n") if self._diary.exists() else [""]
        return [[int(number) for number in line.split()] for line in lines]


@pytest.fixture
def make_held(project: Project, start_worker, client: Client, tmp_path: Path) -> Callable[..., Held]:
    def make(**settings: object) -> Held:
        project.add("held", HELD, **{"lease": 1, "preload": True, **settings})
        return Held(project, start_worker, client, tmp_path)

    return make


@pytest.fixture
def held(make_held: Callable[..., Held]) -> Held:
    return make_held()


def stored(connection: Redis, job: Any, field: str) -> str | None:
    value = connection.hget(job.key, field)
    return value.decode() if value is not None else None


def assert_nothing_left(connection: Redis) -> None:
    """Wait until nothing is started, queued or recorded as a run."""
    wait_until(lambda: connection.zcard("rq:wip:held") == 0, "nothing is started")
    assert connection.llen("rq:queue:held") == 0
    assert not list(connection.scan_iter("rq:execution*"))
    assert not [key for key in connection.scan_iter("rq:worker:*:executions") if connection.scard(key)]


@contextmanager
def stopped(connection: Redis, worker: int) -> Iterator[None]:
    """Keep a worker from running, but its horse and its threads' connections as they are."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def lease_of(connection: Redis, worker: int) -> str:
    (lease,) = [one.lease for one in read_model(connection, "held").serving if one.pid == worker]
    return lease


def wait_for_a_recovery(connection: Redis) -> None:
    """Wait until a worker has looked for what dead ones held: it finds a ghost then."""
    connection.zadd("rq:wip:held", {GHOST: 2**40})
    wait_until(lambda: connection.zscore("rq:wip:held", GHOST) is None, "a worker looked for what dead ones held")


def test_a_killed_workers_job_runs_again_on_another(held: Held, client: Client, connection: Redis, no_leaked_keys):
    first = held.start()
    job = client.enqueue("held", held.held_order(3))
    held.wait_for_calls(1)
    second = held.start()

    first.stop(signal.SIGKILL)
    held.wait_for_calls(2)
    held.release()

    assert job.wait(timeout=60) == 9
    assert held.workers == [first.pid, second.pid]
    assert (stored(connection, job, "attempts"), stored(connection, job, "deaths")) == ("2", "1")
    assert stored(connection, job, "retries_left") == "3", "it was nobody's fault"
    assert connection.xlen(f"rq:results:{job.id}") == 1
    assert "put back 1 jobs" in second.log
    assert_nothing_left(connection)


def test_a_killed_workers_batch_comes_back_in_order_and_runs_one_by_one(
    held: Held, client: Client, connection: Redis, no_leaked_keys
):
    first = held.start()
    jobs = client.enqueue_many("held", [held.order(1), held.held_order(2), *(held.order(n) for n in (3, 4, 5))])
    held.wait_for_calls(1)
    second = held.start()
    later = client.enqueue("held", held.held_order(6))
    held.wait_for_calls(2)

    first.stop(signal.SIGKILL)
    held.release()

    assert client.wait_all([*jobs, later], timeout=60) == [1, 4, 9, 16, 25, 36]
    assert held.calls == [[1, 2, 3, 4, 5], [6], [1], [2], [3], [4], [5]]
    assert set(held.workers[1:]) == {second.pid}
    for job in jobs:
        assert stored(connection, job, "retries_left") == "3"
        assert stored(connection, job, "deaths") == "0", "only a death while alone counts"
    assert_nothing_left(connection)


def test_a_killed_child_of_a_pool_is_restarted_and_its_job_runs_at_once(
    make_held: Callable[..., Held], client: Client, connection: Redis, no_leaked_keys
):
    held = make_held(lease=NOT_SOON)
    pool = held.start("-n", "2")
    job = client.enqueue("held", held.held_order(7))
    held.wait_for_calls(1)
    killed = held.workers[0]

    os.kill(killed, signal.SIGKILL)
    held.wait_for_calls(2)
    held.release()

    assert job.wait(timeout=60) == 49
    assert killed not in held.workers[1:]
    assert "held was killed by SIGKILL; starting it again" in pool.log
    wait_until(lambda: len(read_model(connection, "held").serving) == 2, "both serve again")
    assert stored(connection, job, "attempts") == "2"
    assert pool.stop() == 0
    assert_nothing_left(connection)


def test_a_job_that_kills_three_workers_is_failed_and_its_company_succeeds(
    make_held: Callable[..., Held], client: Client, connection: Redis, no_leaked_keys
):
    held = make_held(lease=NOT_SOON)
    pool = held.start("-n", "2")

    before, poison, after = client.enqueue_many("held", [held.order(1), held.order(2, kill=True), held.order(3)])

    with pytest.raises(JobLost, match="3 workers died while they ran this job alone") as caught:
        poison.wait(timeout=100)
    assert not caught.value.retryable
    assert client.wait_all([before, after], timeout=60) == [1, 9]
    assert held.calls[0] == [1, 2, 3]
    assert held.calls.count([2]) == 3
    assert poison.get_status() == JobStatus.FAILED
    assert stored(connection, poison, "deaths") == "3"
    assert [stored(connection, job, "retries_left") for job in (before, poison, after)] == ["3"] * 3
    assert pool.log.count("was killed by SIGKILL") == 4
    assert_nothing_left(connection)


def test_a_worker_that_was_given_up_writes_no_second_result(held: Held, client: Client, connection: Redis):
    first = held.start()
    job = client.enqueue("held", held.held_order(4))
    held.wait_for_calls(1)
    second = held.start()

    with stopped(connection, first.pid):
        held.wait_for_calls(2)
        held.release(second.pid)
        assert job.wait(timeout=60) == 16
        held.release(first.pid)

    wait_until(lambda: f"job {job.id} was given up" in first.log, "the first worker noticed")
    assert held.workers == [first.pid, second.pid]
    assert connection.xlen(f"rq:results:{job.id}") == 1
    assert stored(connection, job, "worker_name").split("-")[-2] == str(second.pid)
    assert_nothing_left(connection)
    second.stop()
    assert client.predict("held", held.order(5), timeout=60) == 25, "it goes on with other jobs"


def test_a_worker_that_was_given_up_does_not_end_the_run_of_another(held: Held, client: Client, connection: Redis):
    first = held.start()
    job = client.enqueue("held", held.held_order(4))
    held.wait_for_calls(1)
    second = held.start()

    with stopped(connection, first.pid):
        held.wait_for_calls(2)
        held.release(first.pid)
    wait_until(lambda: f"job {job.id} was given up" in first.log, "the first worker noticed")

    assert connection.zcard("rq:wip:held") == 1
    assert (stored(connection, job, "status"), connection.xlen(f"rq:results:{job.id}")) == ("started", 0)
    held.release(second.pid)
    assert job.wait(timeout=60) == 16
    assert connection.xlen(f"rq:results:{job.id}") == 1
    assert_nothing_left(connection)


def test_a_worker_whose_own_lease_ran_out_takes_nobody_for_dead(held: Held, client: Client, connection: Redis):
    first, second = held.start(), held.start()
    job = client.enqueue("held", held.held_order(4))
    held.wait_for_calls(1)
    busy, idle = (first, second) if held.workers == [first.pid] else (second, first)
    leases = [lease_key(lease_of(connection, worker.pid)) for worker in (first, second)]

    # As when the machine sleeps, or the server was away.
    with stopped(connection, busy.pid):
        with stopped(connection, idle.pid):
            wait_until(lambda: not connection.exists(*leases), "both leases have run out")
            looked = idle.log.count("put back")
        wait_until(lambda: connection.exists(*leases), "the idle worker has its lease again")
        os.kill(busy.pid, signal.SIGCONT)
        wait_until(lambda: connection.exists(*leases) == 2, "the other one, too")

    wait_for_a_recovery(connection)
    assert idle.log.count("put back") == looked
    held.release()
    assert job.wait(timeout=60) == 16
    assert stored(connection, job, "attempts") == "1"


@pytest.mark.parametrize(
    "command",
    [["info"], ["worker", "--burst", "-w", "rq.worker.SimpleWorker", "-S", "json", "held"]],
    ids=["rq info", "a stock worker"],
)
def test_stock_rq_harms_no_run_of_ours(held: Held, client: Client, connection: Redis, command: list[str]):
    worker = held.start()
    job = client.enqueue("held", held.held_order(6))
    held.wait_for_calls(1)

    subprocess.run(
        [RQ, *command],
        cwd=held.project.root,
        env={**held.project.environ, "RQ_REDIS_URL": held.project.redis_url, "PYTHONPATH": str(held.project.root)},
        timeout=60,
        check=True,
        capture_output=True,
    )

    assert (stored(connection, job, "status"), connection.zcard("rq:wip:held")) == ("started", 1)
    held.release()
    assert job.wait(timeout=60) == 36
    assert held.workers == [worker.pid]
    assert "given up" not in worker.log


def test_ours_harms_no_run_of_a_stock_worker(held: Held, client: Client, connection: Redis, spawn):
    held.start().stop()
    held.client = client = Client(connection=connection, check_worker=False)
    job = client.enqueue("held", held.held_order(6))
    environ = {**held.project.environ, "RQ_REDIS_URL": held.project.redis_url, "PYTHONPATH": str(held.project.root)}
    command = [RQ, "worker", "--burst", "-w", "rq.worker.SimpleWorker", "-S", "json", "held"]
    spawn(command, cwd=held.project.root, env=environ)
    held.wait_for_calls(1)
    ours = held.start()

    wait_for_a_recovery(connection)

    assert "put back" not in ours.log
    assert stored(connection, job, "status") == "started"
    held.release()
    assert job.wait(timeout=60) == 36
    assert len(held.calls) == 1


def waiting(connection: Redis) -> list[dict[str, str]]:
    """The connections on which a worker waits for jobs."""
    return [one for one in connection.client_list() if one["name"].endswith(":ledger") and "b" in one["flags"]]


@pytest.fixture
def proxy(redis_server) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def distant(make_held: Callable[..., Held], redis_server, proxy: Proxy) -> tuple[Held, RunningWorker]:
    """A worker behind the proxy, with a lease that does not end."""
    held = make_held(lease=NOT_SOON)
    config = held.project.config
    config.write_text(config.read_text().replace(f":{redis_server.port}/", f":{proxy.port}/"))
    return held, held.start()


def test_jobs_whose_announcement_was_lost_are_put_back_by_their_worker(
    distant: tuple[Held, RunningWorker], client: Client, connection: Redis, proxy: Proxy
):
    held, worker = distant
    jobs: list[Any] = []

    def loses_the_answer() -> bool:
        proxy.stall()
        try:
            # It has just begun to wait, so what comes now is taken for it, by the server alone.
            if all(one["idle"] != "0" for one in waiting(connection)):
                return False
            jobs[:] = client.enqueue_many("held", [held.order(n) for n in (1, 2, 3)])
            wait_until(lambda: stored(connection, jobs[-1], "status") == "started", "the server gave them away")
            proxy.cut()
        finally:
            proxy.flow()
        return True

    wait_until(loses_the_answer, "it was cut off while it waited")

    assert client.wait_all(jobs, timeout=60) == [1, 4, 9]
    assert "put back 3 jobs" in worker.log
    assert held.calls == [[1, 2, 3]]
    assert [stored(connection, job, "retries_left") for job in jobs] == ["3"] * 3
    assert_nothing_left(connection)
    assert worker.stop() == 0


def test_jobs_given_to_a_connection_that_only_the_server_believes_in_are_put_back(
    distant: tuple[Held, RunningWorker], client: Client, connection: Redis, proxy: Proxy
):
    held, worker = distant
    jobs: list[Any] = []

    def cuts_it_off() -> bool:
        before = {one["id"] for one in waiting(connection)}
        if not before:
            return False
        proxy.cut(half_open=30)
        wait_until(lambda: {one["id"] for one in waiting(connection)} != before, "the worker comes back, or is late")
        # The one that came first is served first: it belongs to nobody any more.
        if before & {one["id"] for one in waiting(connection)}:
            jobs[:] = client.enqueue_many("held", [held.order(n) for n in (1, 2, 3)])
        return bool(jobs)

    wait_until(cuts_it_off, "it waits on two connections, as the server sees it")
    assert client.wait_all(jobs, timeout=60) == [1, 4, 9]
    assert "put back 3 jobs" in worker.log
    assert_nothing_left(connection)
    assert worker.stop() == 0


@pytest.fixture
def ahead(make_held: Callable[..., Held]) -> Held:
    """A worker that takes the next batch while it is busy with one, as soon as there are enough jobs."""
    held = make_held(lease=NOT_SOON, max_batch_size=4)
    held.start()
    return held


def look_ahead(held: Held, connection: Redis) -> tuple[list[Any], list[Any], list[Any]]:
    """Enqueue some, which are quick, some, which are held, and some for which the worker looks ahead meanwhile."""
    orders = [held.order(n) for n in range(8)] + [held.held_order(n) for n in range(8, 12)]
    jobs = held.client.enqueue_many("held", [*orders, *(held.order(n) for n in range(12, 20))])
    wait_until(lambda: stored(connection, jobs[11], "status") == "started", "the worker holds a batch")
    return jobs[:8], jobs[8:12], jobs[12:]


def test_jobs_taken_ahead_go_back_when_a_batch_takes_its_time(ahead: Held, client: Client, connection: Redis):
    found: list[Any] = []

    def looked_ahead() -> bool:
        ahead.until.unlink(missing_ok=True)
        quick, slow, later = look_ahead(ahead, connection)
        wait_until(lambda: connection.llen("rq:queue:held") == 8, "all that is not begun is in the queue again")
        found[:] = quick, slow, later
        if any(stored(connection, job, "attempts") == "1" for job in later):
            # There were as many before they were taken, too.
            wait_until(lambda: connection.llen("rq:queue:held") == 8, "what was taken ahead has come back")
            return True
        # The batch before was not quick enough on this machine, just now.
        ahead.release()
        client.wait_all([*slow, *later], timeout=60)
        return False

    wait_until(looked_ahead, "the worker took jobs ahead")
    quick, slow, later = found
    assert connection.lrange("rq:queue:held", 0, -1) == [job.id.encode() for job in later], "in their order"
    other = ahead.start()

    assert client.wait_all([*quick, *later], timeout=60) == [n**2 for n in (*range(8), *range(12, 20))]
    assert ahead.workers[-1] == other.pid
    assert [job.get_status() for job in slow] == [JobStatus.STARTED] * 4
    assert {stored(connection, job, "retries_left") for job in later} == {"3"}
    ahead.release()
    assert client.wait_all(slow, timeout=60) == [n**2 for n in range(8, 12)]
    assert_nothing_left(connection)


def test_stop_job_reaches_a_job_that_was_taken_ahead(ahead: Held, client: Client, connection: Redis):
    def stops_it() -> bool:
        ahead.until.unlink(missing_ok=True)
        quick, slow, later = look_ahead(ahead, connection)
        taken = later[0]
        try:
            send_stop_job_command(connection, taken.id, serializer=JSONSerializer)
        except Exception:  # noqa: BLE001 - not taken, or back already: of all that can be wrong RQ has several errors
            commanded = False
        else:
            commanded = True
        wait_until(lambda: stored(connection, taken, "status") != "started", "it was put back, or stopped")
        is_stopped = taken.get_status() == JobStatus.STOPPED
        ahead.release()
        outcomes = client.wait_all([*quick, *slow, *later], timeout=60, return_exceptions=True)
        assert isinstance(outcomes[12], JobCancelled) == is_stopped
        assert [*outcomes[:12], *outcomes[13:]] == [n**2 for n in range(20) if n != 12]
        return commanded and is_stopped

    wait_until(stops_it, "it was stopped while it was taken ahead")
    assert_nothing_left(connection)


def alone(connection: Redis, job: Any) -> list[bytes | None]:
    """What each run of a job that is not over says of whether its worker has no other job in hand."""
    return [connection.hget(key, "alone") for key in connection.scan_iter(f"rq:execution:{job.id}:*")]


def test_a_death_does_not_count_against_a_job_that_was_taken_ahead(
    make_held: Callable[..., Held], client: Client, connection: Redis
):
    held = make_held(max_batch_size=4)
    workers = [held.start()]

    def dies_meanwhile() -> bool:
        held.until.unlink(missing_ok=True)
        # The last is the only one that there is to look ahead for.
        orders = [held.order(n) for n in range(8)] + [held.held_order(n) for n in range(8, 12)]
        jobs = client.enqueue_many("held", [*orders, held.order(12)])
        wait_until(lambda: stored(connection, jobs[11], "status") == "started", "the worker holds a batch")
        later = jobs[12]
        with stopped(connection, workers[-1].pid):
            # Empty if it was not taken ahead, or has gone back already.
            runs = alone(connection, later)
            if runs:
                workers[-1].process.kill()
        if runs:
            assert runs == [None]
            workers[-1].process.wait(60)
            workers.append(held.start())
        held.release()
        assert client.wait_all(jobs, timeout=60) == [n**2 for n in range(13)]
        # What the worker put back in its last moment has no number of deaths.
        assert stored(connection, later, "deaths") in ("0", None)
        return stored(connection, later, "deaths") == "0"

    wait_until(dies_meanwhile, "a worker died while a job was taken ahead")
    assert_nothing_left(connection)


@pytest.mark.parametrize(("max_batch_size", "behind"), [(4, 0), (1, 0), (1, 3)])
def test_a_death_counts_against_a_job_that_was_taken_ahead_and_is_predicted_alone(
    make_held: Callable[..., Held], client: Client, connection: Redis, max_batch_size: int, behind: int
):
    held = make_held(max_batch_size=max_batch_size)
    first = held.start()
    orders = [*(held.order(n) for n in range(40)), held.held_order(40), *(held.order(41 + n) for n in range(behind))]
    jobs = client.enqueue_many("held", orders)
    job = jobs[40]
    wait_until(lambda: held.calls[-1:] == [[40]] and alone(connection, job) == [b"1"], "it is predicted, a suspect")
    assert not any(alone(connection, later) == [b"1"] for later in jobs[41:])

    first.stop(signal.SIGKILL)
    held.start()
    wait_until(lambda: stored(connection, job, "deaths") == "1", "it is put back")
    held.release()

    assert client.wait_all(jobs, timeout=60) == [n**2 for n in range(41 + behind)]
    assert {stored(connection, later, "deaths") for later in jobs[41:]} <= {"0", None}
    assert_nothing_left(connection)
