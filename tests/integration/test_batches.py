"""Micro-batches across jobs: together for speed, and still each job on its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import RQ, wait_until
from redis import Redis
from rq import Repeat, Retry
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from rq_models import Client, DeadlineExceeded, InvalidInput, JobCancelled, ModelCrashed, ModelError, ModelTimeout
from rq_models.registry import read_model

# It tells with each answer how many were predicted together, and does what its input says.
GROUPED = """
    import ctypes, os, time
    from dataclasses import dataclass

    @dataclass
    class Order:
        do: str = "answer"
        path: str = ""

    class Model:
        def predict(self, order: Order):
            return self.predict_batch([order])[0]

        def predict_batch(self, orders):
            for order in orders:
                if order.do == "raise":
                    raise ValueError("not this one")
                if order.do == "crash":
                    ctypes.string_at(0)
                if order.do == "hang":
                    ctypes.CDLL(None).sleep(600)
                if order.do == "swallow":
                    while True:
                        try:
                            time.sleep(0.05)
                        except Exception:
                            pass
                if order.do == "short":
                    return []
                if order.do == "hold":
                    open(order.path, "w").close()
                    while not os.path.exists(order.path + ".go"):
                        time.sleep(0.01)
            return [len(orders)] * len(orders)
"""


@pytest.fixture
def client(redis_url):
    with Client(redis_url, check_worker=False, check_model=False) as client:
        yield client


@pytest.fixture
def grouped(project, start_worker, client):
    """A warm worker of a model that predicts in batches."""
    project.add("grouped", GROUPED, job_timeout=2)
    worker = start_worker(project, "grouped")
    assert client.predict("grouped", {}, timeout=60) == 1
    return worker


def outcomes(client: Client, jobs: list) -> list:
    return client.wait_all(jobs, timeout=100, return_exceptions=True)


def test_what_waits_is_predicted_together(grouped, client):
    jobs = client.enqueue_many("grouped", [{}] * 200)
    assert outcomes(client, jobs) == [64] * 192 + [8] * 8


def test_max_batch_size_is_the_models(project, start_worker, client):
    project.add("grouped", GROUPED, max_batch_size=3)
    start_worker(project, "grouped")
    client.predict("grouped", {}, timeout=60)
    assert outcomes(client, client.enqueue_many("grouped", [{}] * 7)) == [3] * 6 + [1]


def test_max_wait_ms_waits_for_company(project, start_worker, client):
    project.add("grouped", GROUPED, max_wait_ms=3000, preload=True)
    start_worker(project, "grouped")
    wait_until(lambda: client.models()[0].state == "warm", "the model is warm")
    first = client.enqueue("grouped", {})
    second = client.enqueue("grouped", {})
    assert outcomes(client, [first, second]) == [2, 2]


def test_max_batch_bytes_ends_a_batch(project, start_worker, client):
    project.add("grouped", GROUPED, max_batch_bytes=1)
    start_worker(project, "grouped")
    assert outcomes(client, client.enqueue_many("grouped", [{}] * 3)) == [1, 1, 1]


def test_an_invalid_item_fails_alone(grouped, client):
    client_without_check = Client(connection=client.connection, check_input=False)
    jobs = client_without_check.enqueue_many("grouped", [{}, {"do": 3}, {}])
    first, wrong, last = outcomes(client, jobs)
    assert (first, last) == (2, 2)
    assert isinstance(wrong, InvalidInput)
    client_without_check.close()


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        ("raise", ModelError, "not this one"),
        ("crash", ModelCrashed, "SIGSEGV"),
        ("hang", ModelTimeout, "job_timeout"),
        ("swallow", ModelTimeout, "job_timeout"),
    ],
)
def test_only_the_guilty_fails_and_the_innocent_lose_no_retry(grouped, client, do, error, says):
    jobs = client.enqueue_many("grouped", [{}, {}, {"do": do}, {}])
    *innocent, last = (result for index, result in enumerate(outcomes(client, jobs)) if index != 2)
    assert [*innocent, last] == [1, 1, 1], "run again, each alone"
    with pytest.raises(error, match=says):
        jobs[2].wait(timeout=60)
    for job in jobs:
        job.refresh()
        assert job.retries_left == 3


def test_a_batch_of_the_wrong_length_is_the_models_error(grouped, client):
    for result in outcomes(client, client.enqueue_many("grouped", [{}, {"do": "short"}])):
        assert isinstance(result, ModelError)
        assert "given 2 inputs and returned 0 outputs" in str(result)


def test_each_jobs_own_timeout_holds(grouped, client):
    patient = client.enqueue("grouped", {}, job_timeout=90)
    short = client.enqueue("grouped", {"do": "swallow"}, job_timeout=1)
    assert patient.wait(timeout=60) in (1, 2)
    with pytest.raises(ModelTimeout, match="1 s"):
        short.wait(timeout=60)


@pytest.fixture
def held(grouped, client, tmp_path):
    """Three jobs in one batch, which is in the middle of its prediction."""
    path = tmp_path / "held"
    rows = [{}, {"do": "hold", "path": str(path)}, {}]
    jobs = client.enqueue_many("grouped", rows, job_timeout=100)
    wait_until(path.exists, "the batch is being predicted")
    return jobs, path.with_name("held.go")


def test_stop_job_on_one_member_touches_that_member_alone(held, grouped, client, connection):
    jobs, go = held
    before = read_model(connection, "grouped").serving[0].horse_pid
    send_stop_job_command(connection, jobs[0].id, serializer=JSONSerializer)
    go.touch()
    assert jobs[1].wait(timeout=60) == 3
    assert jobs[2].wait(timeout=60) == 3
    with pytest.raises(JobCancelled, match="stopped"):
        jobs[0].wait(timeout=60)
    assert jobs[0].get_status() == JobStatus.STOPPED
    assert read_model(connection, "grouped").serving[0].horse_pid == before


def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(held, grouped, client, connection):
    jobs, go = held
    connection.script_flush()
    go.touch()
    assert [job.wait(timeout=60) for job in jobs] == [3, 3, 3]
    assert client.predict("grouped", {}, timeout=60) == 1
    wait_until(lambda: connection.zcard("rq:wip:grouped") == 0, "all runs are closed")
    assert not [line for line in grouped.log.splitlines() if "trying again" in line or "given up" in line]


def test_cancel_on_one_member_touches_that_member_alone(held, client):
    jobs, go = held
    jobs[2].cancel()
    go.touch()
    assert [job.wait(timeout=60) for job in jobs[:2]] == [3, 3]
    with pytest.raises(JobCancelled):
        jobs[2].wait(timeout=60)
    assert jobs[2].get_status() == JobStatus.CANCELED


@pytest.mark.parametrize("dependent", [False, True])
def test_a_run_given_up_meanwhile_writes_nothing(grouped, client, connection, tmp_path, dependent):
    path = tmp_path / "held"
    job = client.enqueue("grouped", {"do": "hold", "path": str(path)}, job_timeout=100)
    if dependent:
        # Then RQ's own methods would finish it.
        client.enqueue("grouped", {}, depends_on=job)
    wait_until(path.exists, "it is being predicted")
    # As a recovery does that took the worker for dead.
    assert connection.zremrangebyrank("rq:wip:grouped", 0, -1) == 1
    path.with_name("held.go").touch()
    wait_until(lambda: f"job {job.id} was given up" in grouped.log, "the worker noticed")
    assert job.latest_result() is None
    assert job.get_status() == JobStatus.STARTED


def test_a_horse_killed_from_outside_costs_a_batch_nothing(held, client, connection):
    jobs, go = held
    go.touch()
    read_model(connection, "grouped")
    os.killpg(read_model(connection, "grouped").serving[0].horse_pid, signal.SIGKILL)
    assert all(result in (1, 3) for result in outcomes(client, jobs))


def test_a_model_without_predict_batch_is_called_item_by_item(project, start_worker, client):
    project.add(
        "single",
        """
        import ctypes
        class Model:
            calls = 0
            def predict(self, data):
                if data == "crash":
                    ctypes.string_at(0)
                Model.calls += 1
                return Model.calls
        """,
    )
    start_worker(project, "single")
    jobs = client.enqueue_many("single", ["a", "b", "crash", "c", "d"])
    *_, crashed, fourth, fifth = outcomes(client, jobs)
    assert isinstance(crashed, ModelCrashed)
    assert [jobs[0].wait(), jobs[1].wait()] == [1, 2], "what came before the crash counts, and is not run again"
    assert (fourth, fifth) == (1, 2), "what came after runs in a new process"


# It takes a while to load, as models do.
UNEVEN = """
    import ctypes, os, time
    class Model:
        def __init__(self):
            time.sleep(0.3)
        def predict(self, path):
            if path == "crash":
                ctypes.string_at(0)
            while path and not os.path.exists(path):
                time.sleep(0.01)
            return path
"""
UNEVEN_BATCH = (
    UNEVEN
    + """
        def predict_batch(self, paths):
            raise AssertionError("it was given several at once")
"""
)


@pytest.fixture(params=["it has no predict_batch", "max_batch_size is 1"])
def uneven(request, project, start_worker, client):
    """A warm worker that predicts one by one, so quickly so far that it takes several jobs at once."""
    if request.param == "max_batch_size is 1":
        project.add("uneven", UNEVEN_BATCH, max_batch_size=1)
    else:
        project.add("uneven", UNEVEN)
    worker = start_worker(project, "uneven")
    assert client.wait_all(client.enqueue_many("uneven", [""] * 20), timeout=60) == [""] * 20
    return worker


@contextmanager
def paused(worker) -> Iterator[None]:
    worker.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.process.send_signal(signal.SIGCONT)


@pytest.mark.usefixtures("uneven")
def test_an_answer_does_not_wait_for_the_slow_one_behind_it(client, tmp_path):
    go = tmp_path / "go"
    first, second, slow, last = client.enqueue_many("uneven", ["", "", str(go), ""])
    assert client.wait_all([first, second], timeout=60) == ["", ""]
    go.touch()
    assert client.wait_all([slow, last], timeout=60) == [str(go), ""]


@pytest.mark.usefixtures("uneven")
def test_what_stands_behind_a_slow_one_goes_back_for_another_worker(
    project, start_worker, client, connection, tmp_path
):
    go = tmp_path / "go"
    first, slow, *rest = client.enqueue_many("uneven", ["", str(go), "", "", ""])
    ids = [job.id.encode() for job in rest]
    assert first.wait(timeout=60) == ""
    # Now or after having been taken: nothing may wait in the hands of a worker that is busy.
    wait_until(lambda: connection.lrange("rq:queue:uneven", 0, -1) == ids, "they are in the queue, in their order")
    assert slow.get_status() == JobStatus.STARTED

    start_worker(project, "uneven")

    assert client.wait_all(rest, timeout=60) == ["", "", ""]
    assert slow.get_status() == JobStatus.STARTED
    assert connection.zcard("rq:wip:uneven") == 1
    for job in rest:
        job.refresh()
        assert job.retries_left == 3
    go.touch()
    assert slow.wait(timeout=60) == str(go)
    counts = [
        connection.hget(key, "failed_job_count") for key in connection.scan_iter("rq:worker:uneven*", _type="hash")
    ]
    assert counts == [None, None], "to be put back is no failure"


def test_what_stands_behind_a_crash_runs_in_the_next_process(uneven, client):
    jobs = client.enqueue_many("uneven", ["", "crash", "", "", ""], job_timeout=1000)
    first, crashed, *rest = outcomes(client, jobs)
    assert isinstance(crashed, ModelCrashed)
    assert [first, *rest] == [""] * 4
    for job in jobs:
        job.refresh()
        assert job.retries_left == 3
    assert "unexpected" not in uneven.log


def test_a_worker_told_to_stop_when_all_is_handed_back_leaves_in_peace(uneven, client, connection):
    horse = read_model(connection, "uneven").serving[0].horse_pid
    os.kill(horse, signal.SIGSTOP)
    try:
        jobs = client.enqueue_many("uneven", [""] * 5)
        taken = lambda: any(connection.hget(job.key, "attempts") == b"1" for job in jobs)  # noqa: E731 - it is said here
        wait_until(taken, "they are taken")
        wait_until(lambda: connection.llen("rq:queue:uneven") >= 4, "what is not begun has come back")
        uneven.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "warm shut down" in uneven.log, "the worker heard it")
    finally:
        os.kill(horse, signal.SIGCONT)
    assert uneven.process.wait(60) == 0
    assert "unexpected" not in uneven.log
    assert connection.zcard("rq:wip:uneven") == 0
    assert {job.get_status() for job in jobs} <= {JobStatus.QUEUED, JobStatus.FINISHED}


def test_jobs_do_not_wait_in_hand_for_the_load(project, start_worker, client, connection, tmp_path):
    gate = tmp_path / "gate"
    wait = f"while os.path.exists({str(gate)!r}): time.sleep(0.01)"
    project.add("uneven", UNEVEN.replace("time.sleep(0.3)", wait))
    start_worker(project, "uneven")
    assert outcomes(client, client.enqueue_many("uneven", [""] * 20)) == [""] * 20
    gate.touch()

    _, crash, *rest = client.enqueue_many("uneven", ["", "crash", "", "", ""])

    assert isinstance(outcomes(client, [crash])[0], ModelCrashed)
    ids = [job.id.encode() for job in rest]
    wait_until(lambda: connection.zcard("rq:wip:uneven") == 1, "one of them waits for the load")
    wait_until(lambda: connection.lrange("rq:queue:uneven", 0, -1) == ids[1:], "and the others in the queue")
    gate.unlink()
    assert outcomes(client, rest) == [""] * 3


def test_a_crash_changes_nothing_of_the_order(project, start_worker, client, tmp_path):
    diary = tmp_path / "diary"
    project.add(
        "diarist",
        f"""
        import os
        class Model:
            def predict(self, data):
                with open({str(diary)!r}, "a") as diary:
                    diary.write(f"{{data}}\\n")
                if data == 150:
                    os._exit(3)
        """,
    )
    start_worker(project, "diarist")
    outcomes(client, client.enqueue_many("diarist", range(300)))
    assert diary.read_text().split() == [str(n) for n in range(300)]


def test_a_burst_goes_on_behind_an_entry_without_a_job(project, client, connection):
    project.add("uneven", UNEVEN)
    connection.rpush("rq:queue:uneven", "nosuchjob")
    jobs = client.enqueue_many("uneven", [""] * 3)
    command = [RQ, "worker", "--burst", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker", "uneven"]
    subprocess.run(command, cwd=project.root, env=project.environ, check=True, timeout=100)
    assert [job.get_status() for job in jobs] == [JobStatus.FINISHED] * 3


def test_a_backlog_of_jobs_that_are_late_is_ended(uneven, client, connection):
    """None of them comes to the model, and together they are more than one script can end."""
    count = 20_000
    with paused(uneven):
        jobs = client.enqueue_many("uneven", [""] * count, deadline=0.001)
    assert isinstance(outcomes(client, jobs[-1:])[0], DeadlineExceeded)
    # All but what the worker may have had in hand when it was stopped.
    wait_until(lambda: connection.zcard("rq:wip:uneven") == 0, "all of them are ended")
    assert connection.zcard("rq:failed:uneven") >= count - 64
    assert client.predict("uneven", "", timeout=60) == ""


@pytest.mark.usefixtures("uneven")
def test_stop_job_reaches_what_stands_behind_a_slow_one(client, connection, tmp_path):
    def stops_it() -> bool:
        go = tmp_path / f"go{len(list(tmp_path.iterdir()))}"
        slow, stopped, last = client.enqueue_many("uneven", [str(go), "", ""])
        wait_until(lambda: slow.get_status() == JobStatus.STARTED, "the slow one runs")
        try:
            send_stop_job_command(connection, stopped.id, serializer=JSONSerializer)
        except Exception:  # noqa: BLE001 - not taken, or back already: of all that can be wrong RQ has several errors
            go.touch()
            client.wait_all([slow, stopped, last], timeout=60, return_exceptions=True)
            return False
        wait_until(lambda: stopped.get_status() == JobStatus.STOPPED, "it is stopped while the slow one runs")
        assert slow.get_status() == JobStatus.STARTED
        go.touch()
        assert client.wait_all([slow, last], timeout=60) == [str(go), ""]
        return True

    wait_until(stops_it, "it was stopped while it stood behind the slow one")


def test_a_second_worker_gets_its_share_of_slow_jobs(project, start_worker, client, tmp_path):
    project.add(
        "pair",
        """
        import os, time
        class Model:
            def predict(self, path):
                # Comes back only when two of them are at it at the same time.
                os.mkdir(path + f".{os.getpid()}")
                folder, name = os.path.split(path)
                while len([one for one in os.listdir(folder) if one.startswith(name + ".")]) < 2:
                    time.sleep(0.01)
                return "met"
        """,
    )
    start_worker(project, "pair")
    start_worker(project, "pair")
    jobs = client.enqueue_many("pair", [str(tmp_path / "meeting")] * 2)
    assert client.wait_all(jobs, timeout=60) == ["met", "met"]


def shut_down_cold(grouped):
    """Tell the worker to stop, and then to stop at once."""
    grouped.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "warm shut down" in grouped.log, "the worker heard the first")

    def insists() -> bool:
        # Two signals within a second count as one: a terminal's and a supervisor's often come together.
        grouped.process.send_signal(signal.SIGTERM)
        return "cold shutdown" in grouped.log

    wait_until(insists, "the worker heard the second")
    assert grouped.process.wait(60) == 0


def test_a_cold_shutdown_puts_everything_back_and_costs_no_retry(held, grouped, client, connection):
    jobs, _ = held
    shut_down_cold(grouped)
    assert connection.lrange("rq:queue:grouped", 0, -1) == [job.id.encode() for job in jobs]
    for job in jobs:
        job.refresh()
        assert (job.get_status(), job.retries_left) == (JobStatus.QUEUED, 3)
    assert connection.zcard("rq:wip:grouped") == 0


@pytest.mark.parametrize("options", [{"retry": Retry(3, interval=60)}, {"repeat": Repeat(times=1)}])
def test_what_rq_itself_would_finish_is_put_back_like_all_else(grouped, client, connection, tmp_path, options):
    """Neither retried later, which costs one of its retries, nor failed, because it has none."""
    path = tmp_path / "held"
    jobs = client.enqueue_many("grouped", [{"do": "hold", "path": str(path)}, {}], job_timeout=100, **options)
    left = jobs[0].retries_left
    wait_until(path.exists, "the batch is being predicted")
    shut_down_cold(grouped)
    assert connection.lrange("rq:queue:grouped", 0, -1) == [job.id.encode() for job in jobs]
    for job in jobs:
        job.refresh()
        assert (job.get_status(), job.retries_left) == (JobStatus.QUEUED, left)
    assert connection.zcard("rq:wip:grouped") == 0


def test_order_is_kept_and_at_front_goes_first(project, start_worker, client):
    project.add(
        "counter",
        """
        class Model:
            calls = 0
            def predict(self, data):
                Model.calls += 1
                return Model.calls
        """,
    )
    jobs = [client.enqueue("counter", None) for _ in range(3)]
    first = client.enqueue("counter", None, at_front=True)
    start_worker(project, "counter")
    assert outcomes(client, [first, *jobs]) == [1, 2, 3, 4]


def test_256_queued_jobs_cost_the_worker_at_most_12_round_trips(grouped, client, connection: Redis):
    def commands() -> int:
        """Scripts that the worker has run: each a round trip of its own, and nothing else is; see `Script`."""
        stats = connection.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

    def idle() -> bool:
        return connection.hget(next(connection.scan_iter("rq:worker:grouped*", _type="hash")), "state") == b"idle"

    wait_until(idle, "the worker is idle")
    before = commands()
    jobs = client.enqueue_many("grouped", [{}] * 256)
    assert outcomes(client, jobs) == [64] * 256
    wait_until(idle, "the worker is idle again")
    assert commands() - before <= 12
