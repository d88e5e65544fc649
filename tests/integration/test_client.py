"""The blocking client at enqueue: what is checked before, what is written, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import wait_until
from played_worker import SCHEMA, PlayedWorker, counting
from pydantic import BaseModel
from redis import Redis
from rq import Callback, Queue, Retry
from rq.job import Dependency, Job, JobStatus

from rq_models import (
    Client,
    ConfigurationError,
    InvalidInput,
    JobNotFound,
    NoWorker,
    UnknownModel,
)

GOOD = {"petal_width": 0.2}


@pytest.fixture
def worker(connection: Redis) -> PlayedWorker:
    return PlayedWorker(connection)


@pytest.fixture
def client(redis_url: str, worker: PlayedWorker):
    with Client(redis_url) as client:
        yield client


def queued(connection: Redis) -> int:
    return connection.llen("rq:queue:iris")


# -- the address ----------------------------------------------------------------------------------------------------


def test_the_argument_wins_over_the_environment_and_that_over_config(redis_url, project, monkeypatch, worker):
    monkeypatch.chdir(project.root)
    assert [status.name for status in Client().models()] == ["iris"]
    monkeypatch.setenv("REDIS_URL", f"{redis_url.rpartition('/')[0]}/4000")
    assert Client().models() == []
    assert [status.name for status in Client(redis_url).models()] == ["iris"]


def test_without_an_address_it_says_so_and_guesses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"Client\(url\).*REDIS_URL"):
        Client()


def test_an_address_that_is_none_is_not_repeated_since_it_may_hold_a_password(monkeypatch):
    with pytest.raises(ConfigurationError, match="url is no Redis address") as caught:
        Client("secret:6379")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("REDIS_URL", "localhost")
    with pytest.raises(ConfigurationError, match="REDIS_URL is no Redis address"):
        Client()


def test_a_connection_that_decodes_is_refused(redis_url):
    with pytest.raises(ConfigurationError, match="decode_responses"):
        Client(connection=Redis.from_url(redis_url, decode_responses=True))


def test_a_connection_passed_in_stays_open(connection, worker):
    with Client(connection=connection) as client:
        job = client.enqueue("iris", GOOD)
    assert client.connection is connection
    assert connection.exists(f"rq:job:{job.id}")


def test_a_closed_client_says_so(client):
    job = client.enqueue("iris", GOOD)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.enqueue("iris", GOOD)
    with pytest.raises(RuntimeError, match="closed"):
        job.wait()


# -- the job that is written ----------------------------------------------------------------------------------------


def test_a_job_has_the_fields_that_rq_writes(client, connection, worker):
    """The enqueueing is our own, for the sake of one round trip: it must leave what RQ's leaves."""
    ours = client.enqueue("iris", GOOD, ttl=900, meta={"who": "me"})
    theirs = worker.queue.enqueue_call(
        "rq_models.jobs.iris", (GOOD,), timeout=60, result_ttl=3600, failure_ttl=604800, ttl=900, meta={"who": "me"}
    )
    left = []
    for job in (ours, theirs):
        fields = connection.hgetall(job.key)
        assert connection.ttl(job.key) == pytest.approx(900, abs=60)
        for varying in (b"created_at", b"enqueued_at", b"description"):
            assert fields.pop(varying)
        left.append(fields)
    # RQ compresses even this; it reads both.
    left[1][b"data"] = zlib.decompress(left[1][b"data"])
    assert left[0] == {**left[1], b"retries_left": b"3"}
    assert connection.lrange("rq:queue:iris", 0, -1) == [ours.id.encode(), theirs.id.encode()]
    assert connection.smembers("rq:queues") == {b"rq:queue:iris"}


def test_the_data_is_json_and_the_description_tells_nothing_of_it(client, connection):
    job = client.enqueue("iris", {"petal_width": 1, "name": "o'Brien"})
    stored = connection.hgetall(job.key)
    assert json.loads(stored[b"data"]) == [
        "rq_models.jobs.iris",
        None,
        [{"petal_width": 1, "name": "o'Brien"}],
        {},
    ]
    assert stored[b"description"] == b"iris"


def test_defaults_are_the_models_own(connection, client, worker):
    worker.publish(job_timeout=7, result_ttl=8, failure_ttl=9, retries=0)
    job = client.enqueue("iris", GOOD)
    assert (job.timeout, job.result_ttl, job.failure_ttl, job.retries_left) == (7, 8, 9, None)


def test_the_default_retries_are_told_apart_from_a_callers_own(client):
    default, own = client.enqueue("iris", GOOD), client.enqueue("iris", GOOD, retry=Retry(max=5))
    assert (default.retries_left, default.retry_intervals) == (3, None)
    assert (own.retries_left, own.retry_intervals) == (5, [0])


def test_options_have_rqs_names_and_meaning(client, connection):
    client.enqueue("iris", GOOD, job_id="behind")
    job = client.enqueue(
        "iris",
        GOOD,
        job_id="mine",
        job_timeout="2m",
        result_ttl=-1,
        failure_ttl=5,
        at_front=True,
        description="d",
        meta={"a": 1},
        on_success=Callback("a.b"),
    )
    assert isinstance(job, Job)
    same = Job.fetch("mine", connection=connection, serializer="json")
    assert (same.timeout, same.result_ttl, same.failure_ttl, same.description) == (120, -1, 5, "d")
    assert (same.meta, same._success_callback_name) == ({"a": 1}, "a.b")
    assert connection.lrange("rq:queue:iris", 0, -1) == [b"mine", b"behind"]


def test_an_unknown_option_is_a_type_error(client, connection):
    with pytest.raises(TypeError, match="timout"):
        client.enqueue("iris", GOOD, timout=3)
    with pytest.raises(TypeError, match="job_id"):
        client.enqueue_many("iris", [GOOD, GOOD], job_id="one for all?")
    assert queued(connection) == 0


def test_a_dependent_job_waits_for_the_other(client, connection, worker):
    first = client.enqueue("iris", GOOD)
    second = client.enqueue("iris", GOOD, depends_on=Dependency(first))
    assert second.get_status() == JobStatus.DEFERRED
    assert queued(connection) == 1
    job = worker.take()
    worker.finish(job, 1)
    worker.queue.enqueue_dependents(job)
    worker.echo()
    assert second.wait(timeout=30) == GOOD


def test_many_rows_are_queued_in_order(client, connection):
    jobs = client.enqueue_many("iris", ({"petal_width": n} for n in range(2500)))
    assert connection.lrange("rq:queue:iris", 0, -1) == [job.id.encode() for job in jobs]
    assert client.enqueue_many("iris", []) == []
    front = client.enqueue_many("iris", [GOOD] * 3, at_front=True)
    assert connection.lrange("rq:queue:iris", 0, 2) == [job.id.encode() for job in front]


def test_a_refused_row_is_named_and_none_is_queued(client, connection):
    with pytest.raises(InvalidInput, match=r"^rows\[1\]\.petal_width: "):
        client.enqueue_many("iris", [GOOD, {"petal_width": "asdfg"}, GOOD])
    assert queued(connection) == 0


def test_a_job_is_found_again_by_its_id(client, redis_url):
    job = client.enqueue("iris", GOOD)
    with Client(redis_url) as another:
        assert another.job(job.id) == job
        assert another.job(job.id).model == "iris"
        for unknown in ("nobody", "not an id!", ""):
            with pytest.raises(JobNotFound):
                another.job(unknown)


# -- what is said before anything is queued -------------------------------------------------------------------------


def test_an_unknown_model_is_named_with_the_nearest(client, connection):
    with pytest.raises(UnknownModel, match="'irsi'; did you mean 'iris'"):
        client.enqueue("irsi", GOOD)
    with pytest.raises(UnknownModel, match="there are: iris"):
        client.predict("something else", GOOD)
    assert connection.smembers("rq:queues") == set()


def test_a_model_that_nobody_serves_any_more(client, connection, worker):
    worker.leave()
    with pytest.raises(NoWorker, match="rq-models worker iris"):
        client.enqueue("iris", GOOD)
    assert queued(connection) == 0


def test_an_input_that_breaks_the_schema(client, connection):
    with pytest.raises(InvalidInput) as caught:
        client.predict("iris", {"petal_width": "asdfg"}, timeout=10)
    assert str(caught.value) == "petal_width: Input should be a valid number, got 'asdfg'"
    assert queued(connection) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}, b"bytes"])
def test_an_input_that_is_no_json(client, connection, value):
    with pytest.raises(InvalidInput, match=r"^name\[0\]: .* not JSON$"):
        client.enqueue("iris", {"petal_width": 1, "name": [value]})
    assert queued(connection) == 0


def test_each_check_can_be_switched_off(redis_url, connection, worker):
    with Client(redis_url, check_input=False) as client:
        client.enqueue("iris", {"petal_width": "asdfg"})
    worker.leave()
    with Client(redis_url, check_worker=False) as client:
        client.enqueue("iris", GOOD)
        with pytest.raises(UnknownModel):
            client.enqueue("new", GOOD)
    with Client(redis_url, check_model=False) as client, pytest.raises(NoWorker):
        client.enqueue("new", GOOD)
    with Client(redis_url, check_model=False, check_worker=False) as client:
        assert client.enqueue("new", GOOD).retries_left == 3
    assert (queued(connection), connection.llen("rq:queue:new")) == (2, 1)


def test_a_schema_that_a_new_version_publishes_is_heard_of(redis_url, worker, monkeypatch):
    monkeypatch.setattr("rq_models.client.CARD_AGE", 0)
    with Client(redis_url) as client:
        client.enqueue("iris", GOOD)
        worker.publish(input_schema={**SCHEMA, "required": ["petal_width", "name"]})
        with pytest.raises(InvalidInput, match="name: Field required"):
            client.enqueue("iris", GOOD)


def test_numpy_dataclasses_and_pydantic_are_taken_as_input(client, connection):
    @dataclasses.dataclass
    class Flower:
        petal_width: object

    class Model(BaseModel):
        petal_width: float

    for data in (
        {"petal_width": np.float32(0.5)},
        Flower(np.array(0.5)),
        Model(petal_width=0.5),
    ):
        assert client.enqueue("iris", data).args == [{"petal_width": 0.5}]


# -- what it costs --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_clock(monkeypatch):
    """Nothing is asked again because a slow machine took long."""
    monkeypatch.setattr("rq_models.waiting.LOOK_EVERY", 3600)
    monkeypatch.setattr("rq_models.client.CARD_AGE", 3600)


def test_round_trips(connection, worker, no_clock):
    counted, count = counting(connection)
    with counted, Client(connection=counted) as client:
        client.enqueue("iris", GOOD)
        count()
        job = client.enqueue("iris", GOOD)
        assert count() == 1
        jobs = client.enqueue_many("iris", [GOOD] * 500)
        assert count() == 1
        for _ in range(502):
            worker.echo()
        job.wait(timeout=30)
        client.job(job.id).wait(timeout=30)
        count()  # the connections that read and that look have been opened now
        assert client.wait_all(jobs[:200], timeout=30) == [GOOD] * 200
        assert count() == 1
        client.job(job.id).wait(timeout=30)
        assert count() == 2


def test_a_prediction_is_one_round_trip(connection, worker, no_clock):
    counted, count = counting(connection)
    with counted, Client(connection=counted) as client, ThreadPoolExecutor(1) as threads:
        client.enqueue("iris", GOOD)
        worker.echo()
        for expected in (None, 1):
            predicting = threads.submit(client.predict, "iris", GOOD, timeout=60)
            wait_until(lambda: connection.llen("rq:queue:iris"), "it is queued")
            worker.echo()
            assert predicting.result(60) == GOOD
            # The first one opens the connection.
            assert count() == expected or expected is None


def test_a_queue_of_rqs_own_sees_our_jobs(client, connection):
    job = client.enqueue("iris", GOOD)
    assert Queue("iris", connection=connection, serializer="json").job_ids == [job.id]


def test_a_process_may_have_more_than_1024_open_files(client, worker):
    """As a web server does; `select` knows no higher descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2048), hard), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        with ThreadPoolExecutor(1) as threads:
            for _ in range(2):
                predicting = threads.submit(client.predict, "iris", GOOD, timeout=60)
                worker.echo()
                assert predicting.result(60) == GOOD
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_uses_connections_of_its_own(client, worker, connection):
    """The child waits while its parent does; each gets its own result."""
    mine = client.enqueue("iris", {"petal_width": 1})
    theirs = client.enqueue("iris", {"petal_width": 2})
    with pytest.raises(TimeoutError):
        mine.wait(timeout=0.01)  # opens the parent's reading connection
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, b"waiting")
            code = 0 if theirs.wait(timeout=60) == {"petal_width": 2} else 2
            code = code or (0 if client.enqueue("iris", GOOD, job_id="of-the-child").id else 3)
            client.close()
        finally:
            os._exit(code)
    os.close(writing)
    assert os.read(reading, 7) == b"waiting"
    worker.echo()
    assert mine.wait(timeout=60) == {"petal_width": 1}
    worker.echo()
    _, status = os.waitpid(child, 0)
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == 0
    assert connection.lrange("rq:queue:iris", 0, -1) == [b"of-the-child"]
    assert client.job(theirs.id).wait(timeout=30) == {"petal_width": 2}
