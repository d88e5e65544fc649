"""More than there is room or time for: refused at once, or failed alone, with the numbers; nothing else is harmed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Project, wait_until
from played_worker import PlayedWorker
from redis import Redis
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from rq_models import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidInput,
    InvalidJob,
    InvalidOutput,
    QueueFull,
)
from rq_models.client import PER_SCRIPT

ECHO = "class Model:\n    def predict(self, data): return data"

HOLD = """
    import os, time
    class Model:
        def predict(self, path):
            if path:
                open(path, "a").close()
                while not os.path.exists(path + ".go"):
                    time.sleep(0.01)
            return path
"""


@pytest.fixture
def client(redis_url: str):
    """Serves before any worker does, and leaves all checks of the input to the worker."""
    with Client(redis_url, check_model=False, check_worker=False, check_input=False) as client:
        yield client


@pytest.fixture
def strict(redis_url: str):
    with Client(redis_url) as client:
        yield client


def jobs_in(connection: Redis) -> set[bytes]:
    return set(connection.scan_iter("rq:job:*"))


# -- max_queued -----------------------------------------------------------------------------------------------------

VERBS = {
    "enqueue": lambda client: client.enqueue("iris", 1),
    "at_front": lambda client: client.enqueue("iris", 1, at_front=True),
    "job_id": lambda client: client.enqueue("iris", 1, job_id="new"),
    "depends_on": lambda client: client.enqueue("iris", 1, depends_on="first"),
    "enqueue_many": lambda client: client.enqueue_many("iris", [1, 2]),
    "many_at_front": lambda client: client.enqueue_many("iris", [1, 2], at_front=True),
    "predict": lambda client: client.predict("iris", 1, timeout=60),
    "predict_by_id": lambda client: client.predict("iris", 1, timeout=60, job_id="new"),
    "predict_many": lambda client: client.predict_many("iris", [1] * 2 * PER_SCRIPT, timeout=60),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_queue_refuses_every_verb_and_nothing_is_written(verb, connection, strict):
    PlayedWorker(connection, input_schema=None, max_queued=2)
    strict.enqueue("iris", "a", job_id="first")
    strict.enqueue("iris", "b", job_id="second")
    before = set(connection.scan_iter())
    with pytest.raises(QueueFull, match=r"model 'iris': 2 jobs wait and \d+ more .* max_queued, which is 2; try"):
        VERBS[verb](strict)
    assert connection.lrange("rq:queue:iris", 0, -1) == [b"first", b"second"]
    assert set(connection.scan_iter()) == before


@pytest.mark.parametrize("verb", VERBS)
def test_the_asyncio_client_refuses_the_same(verb, connection, redis_url):
    PlayedWorker(connection, input_schema=None, max_queued=1)

    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            await client.enqueue("iris", "a", job_id="first")
            with pytest.raises(QueueFull, match="max_queued, which is 1"):
                await VERBS[verb](client)

    asyncio.run(main())
    assert connection.lrange("rq:queue:iris", 0, -1) == [b"first"]
    assert jobs_in(connection) == {b"rq:job:first"}


def test_many_are_queued_all_or_none_however_many_scripts_that_takes(connection, strict):
    limit = 3 * PER_SCRIPT
    PlayedWorker(connection, input_schema=None, max_queued=limit)
    first = strict.enqueue("iris", 0)
    with pytest.raises(QueueFull, match=f"1 jobs wait and {limit} more"):
        strict.enqueue_many("iris", range(limit))
    assert connection.lrange("rq:queue:iris", 0, -1) == [first.id.encode()]
    assert len(jobs_in(connection)) == 1
    jobs = strict.enqueue_many("iris", range(limit - 1))
    assert connection.lrange("rq:queue:iris", 0, -1) == [job.id.encode() for job in (first, *jobs)]


def test_of_many_callers_at_once_only_as_many_get_in_as_fit(connection, redis_url):
    PlayedWorker(connection, input_schema=None, max_queued=100)

    def enqueue(client: Client) -> int:
        refused = 0
        for number in range(50):
            try:
                client.enqueue("iris", number)
            except QueueFull:
                refused += 1
        return refused

    with Client(redis_url) as one, Client(redis_url) as other, ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(enqueue, [one, other] * 4)) == 300
    assert connection.llen("rq:queue:iris") == 100


def test_a_repetition_is_not_refused(connection, strict):
    """The client itself repeats what got no answer; the queue is full of the very jobs then."""
    worker = PlayedWorker(connection, input_schema=None, max_queued=2)
    strict.enqueue("iris", "a", job_id="again")
    jobs = strict._prepare("iris", ["b"], {})
    assert [strict._submit(jobs, {}), strict._submit(jobs, {})] == [0, 1]
    assert strict.enqueue("iris", "c", job_id="again").id == "again"
    assert connection.llen("rq:queue:iris") == 2
    worker.echo()
    worker.echo()
    assert strict.predict("iris", "d", timeout=60, job_id="again") == "a"


def test_a_client_goes_on_after_a_refusal(connection, strict):
    worker = PlayedWorker(connection, input_schema=None, max_queued=1)
    with ThreadPoolExecutor(1) as threads:
        for number in range(2):
            waits = strict.enqueue("iris", "waits")
            for _ in range(3):
                with pytest.raises(QueueFull):
                    strict.predict("iris", "refused", timeout=60)
            worker.echo()
            assert waits.wait(timeout=60) == "waits"
            predicting = threads.submit(strict.predict, "iris", number, timeout=60)
            worker.echo()
            assert predicting.result(60) == number


def test_room_is_what_a_worker_makes(project: Project, start_worker, strict, connection, tmp_path):
    project.add("hold", HOLD, max_queued=2)
    start_worker(project, "hold")
    path = tmp_path / "held"
    held = strict.enqueue("hold", str(path))
    wait_until(path.exists, "the prediction runs, so nothing waits")
    waiting = strict.enqueue_many("hold", ["", ""])
    with pytest.raises(QueueFull, match="max_queued, which is 2"):
        strict.enqueue("hold", "")
    assert connection.llen("rq:queue:hold") == 2
    (tmp_path / "held.go").touch()
    assert strict.wait_all([held, *waiting], timeout=60) == [str(path), "", ""]
    assert strict.predict("hold", "", timeout=60) == ""


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_an_input_too_large_is_refused_before_it_is_queued(project, start_worker, strict, connection):
    project.add("echo", ECHO, max_input_bytes=100)
    start_worker(project, "echo")
    assert strict.predict("echo", "x" * 98, timeout=60) == "x" * 98
    before = jobs_in(connection)
    for verb in (strict.enqueue, strict.predict):
        with pytest.raises(InvalidInput, match=r"^input: 101 bytes of JSON .*models\.echo\.max_input_bytes \(100\)$"):
            verb("echo", "x" * 99)
    with pytest.raises(InvalidInput, match=r"^rows\[1\]: 5002 bytes of JSON"):
        strict.enqueue_many("echo", ["x", "x" * 5000], depends_on="other")
    assert jobs_in(connection) == before


def test_an_input_too_large_of_another_producer_fails_alone(project, start_worker, client, connection):
    project.add("echo", ECHO, max_input_bytes=100)
    first = client.enqueue("echo", "first")
    exact, beyond, large = client.enqueue_many("echo", ["x" * 98, "x" * 99, "x" * 5000])
    assert connection.hget(large.key, "data")[:1] != b"[", "it is compressed"
    plain = client.enqueue("echo", "replaced")
    connection.hset(plain.key, "data", json.dumps(["rq_models.jobs.echo", None, ["x" * 6000], {}]))
    foreign = client.enqueue("echo", "replaced")
    nested = json.dumps(["rq_models.jobs.echo", None, [[0] * (8 << 20)], {}]).encode()
    connection.hset(foreign.key, "data", zlib.compress(nested))
    last = client.enqueue("echo", "last")
    worker = start_worker(project, "echo")
    outcomes = client.wait_all([first, exact, last, beyond, large, plain, foreign], 60, return_exceptions=True)
    assert outcomes[:3] == ["first", "x" * 98, "last"]
    sizes = (101, 5002, 6002, 3 * (8 << 20))
    for size, outcome in zip(sizes, outcomes[3:], strict=True):
        assert type(outcome) is InvalidInput
        assert str(outcome) == f"input: {size} bytes of JSON are more than models.echo.max_input_bytes (100)"
    assert worker.process.poll() is None


BATCH = """
    class Model:
        def predict(self, times): return "x" * times
        def predict_batch(self, many): return [self.predict(times) for times in many]
"""


@pytest.mark.parametrize("source", [BATCH, BATCH.partition("def predict_batch")[0]], ids=["batch", "one by one"])
def test_an_output_too_large_fails_alone(project, start_worker, client, source):
    project.add("repeat", source, max_output_bytes=100)
    start_worker(project, "repeat")
    assert client.predict("repeat", 98, timeout=60) == "x" * 98
    with pytest.raises(InvalidOutput, match=r"^output: 101 bytes of JSON .*models\.repeat\.max_output_bytes \(100\)$"):
        client.predict("repeat", 99, timeout=60)
    outcomes = client.wait_all(client.enqueue_many("repeat", [1, 98, 5000, 2, 99, 98]), 60, return_exceptions=True)
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == ["x", "x" * 98, "xx", "x" * 98]
    assert [type(outcomes[number]) for number in (2, 4)] == [InvalidOutput] * 2
    assert "5002 bytes" in str(outcomes[2])


# -- deadline -------------------------------------------------------------------------------------------------------

# Notes each run, by the file that it is told.
NOTE = """
    class Model:
        def predict(self, path):
            with open(path, "a") as file:
                file.write("run\\n")
            return path
"""


def test_a_job_whose_deadline_has_passed_is_not_run(project, start_worker, client, connection, tmp_path):
    project.add("note", NOTE)
    paths = [tmp_path / name for name in ("late", "by retry", "by rq", "in time", "never")]
    late = client.enqueue("note", str(paths[0]), deadline=0.001)
    by_retry = client.enqueue("note", str(paths[1]), deadline=0.001, retry=Retry(max=3))
    # What hangs on it makes it a job that RQ's own methods finish.
    by_rq = client.enqueue("note", str(paths[2]), deadline=0.001)
    after = client.enqueue("note", str(tmp_path / "after"), depends_on=by_rq)
    in_time = client.enqueue("note", str(paths[3]), deadline=3600)
    never = client.enqueue("note", str(paths[4]))
    times = [float(connection.hget(job.key, "deadline")) for job in (late, by_retry, by_rq)]
    wait_until(lambda: time.time() > max(times), "the deadlines have passed")
    start_worker(project, "note")
    assert client.wait_all([in_time, never], timeout=60) == [str(path) for path in paths[3:]]
    for job in (late, by_retry, by_rq):
        with pytest.raises(DeadlineExceeded, match="not run") as caught:
            client.job(job.id).wait(timeout=60)
        assert (caught.value.job_id, caught.value.retryable) == (job.id, False)
        assert connection.hget(job.key, "status") == b"failed"
        assert connection.hget(job.key, "attempts") == b"1"
    assert [path.exists() for path in paths] == [False, False, False, True, True]
    assert after.get_status() == "deferred", "as after any failure"


def test_every_verb_takes_a_deadline_and_no_other_job_inherits_it(connection, strict, redis_url):
    worker = PlayedWorker(connection, input_schema=None)
    strict.enqueue("iris", 1)

    def with_deadline() -> list[bytes]:
        found = [key for key in jobs_in(connection) if connection.hexists(key, "deadline")]
        for key in found:
            assert float(connection.hget(key, "deadline")) == pytest.approx(time.time() + 3600, abs=60)
        connection.delete(worker.queue.key, *jobs_in(connection))
        return found

    strict.enqueue("iris", 1, deadline=3600)
    strict.enqueue_many("iris", [1, 2], deadline=3600.5)
    strict.enqueue("iris", 1, deadline=3600, depends_on="other")
    strict.enqueue("iris", 1)
    assert len(with_deadline()) == 4

    with ThreadPoolExecutor(1) as threads:
        for verb, data, number in ((strict.predict, 1, 1), (strict.predict_many, [1, 2], 2)):
            predicting = threads.submit(verb, "iris", data, timeout=60, deadline=3600)
            for _ in range(number):
                worker.echo()
            assert predicting.result(60) == data
    assert len(with_deadline()) == 3

    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            await client.enqueue("iris", 1, deadline=3600)
            await client.enqueue_many("iris", [1, 2], deadline=3600)
            await client.enqueue("iris", 1)

    asyncio.run(main())
    assert len(with_deadline()) == 3


@pytest.mark.parametrize("seconds", [0, -1, 0.0, math.nan, math.inf, "soon", 10**400])
def test_a_deadline_that_is_none_is_refused(connection, strict, seconds):
    PlayedWorker(connection, input_schema=None)
    with pytest.raises(ValueError, match="deadline must be a number of seconds, more than 0, not "):
        strict.enqueue("iris", 1, deadline=seconds)
    assert jobs_in(connection) == set()


@pytest.mark.parametrize("garbage", ["soon", "nan", "inf", b"\xff\xfe"])
def test_a_deadline_that_can_not_be_read_fails_that_job_alone(project, start_worker, client, connection, garbage):
    project.add("echo", ECHO)
    bad, good, empty = client.enqueue_many("echo", ["bad", "good", "empty"])
    connection.hset(bad.key, "deadline", garbage)
    connection.hset(empty.key, "deadline", "")
    start_worker(project, "echo")
    assert client.wait_all([good, empty], timeout=60) == ["good", "empty"]
    with pytest.raises(InvalidJob, match=r"can't be read: its deadline is b'.*', not a time"):
        bad.wait(timeout=60)


def test_a_deadline_outlives_a_retry(project, start_worker, client, connection, tmp_path):
    project.add("hold", HOLD)
    start_worker(project, "hold")
    path = tmp_path / "held"
    job = client.enqueue("hold", str(path), deadline=3600)
    wait_until(path.exists, "the prediction runs")
    # As if it had run for an hour, which nobody ends.
    stored = connection.hget(job.key, "deadline")
    connection.hset(job.key, "deadline", float(stored) - 7200)
    (pid,) = [one.horse_pid for status in client.models() for one in status.serving]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeadlineExceeded):
        job.wait(timeout=60)
    assert connection.hget(job.key, "attempts") == b"2"
    assert float(connection.hget(job.key, "deadline")) == float(stored) - 7200


def test_a_deadline_that_passes_while_the_model_loads(project, start_worker, client, tmp_path):
    loading, go, ran = tmp_path / "loading", tmp_path / "go", tmp_path / "ran"
    source = f"""
        import os, time
        class Model:
            def __init__(self):
                open({str(loading)!r}, "w").close()
                while not os.path.exists({str(go)!r}):
                    time.sleep(0.01)
            def predict(self, data):
                open({str(ran)!r}, "a").write(data)
    """
    project.add("slow", source)
    start_worker(project, "slow")
    job = client.enqueue("slow", "late", deadline=1)
    wait_until(lambda: time.time() > job.deadline, "the deadline has passed")
    go.touch()
    with pytest.raises(DeadlineExceeded):
        job.wait(timeout=60)
    assert client.predict("slow", "in time", timeout=60, deadline=3600) is None
    assert ran.read_text() == "in time"


def test_any_producer_can_set_a_deadline(project, start_worker, connection, client):
    project.add("echo", ECHO)
    job = Queue("echo", connection=connection, serializer=JSONSerializer).enqueue("rq_models.jobs.echo", "x")
    connection.hset(job.key, "deadline", 1_700_000_000)
    start_worker(project, "echo")
    with pytest.raises(DeadlineExceeded):
        client.job(job.id).wait(timeout=60)
