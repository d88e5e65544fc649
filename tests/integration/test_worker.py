"""One worker process, its horse, and real jobs on a real server."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import RQ, Project, wait_until
from redis import Redis
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus, requeue_job
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from rq_models import Client, ModelWorker
from rq_models import worker as worker_module
from rq_models.errors import InvalidOutput, JobCancelled, ModelBroken, ModelCrashed, ModelError, ModelTimeout
from rq_models.registry import Serving, read_counters, read_model
from rq_models.settings import Settings

DOUBLER = """
    class Model:
        version = "1.2"
        def predict(self, data):
            print("predicting", data["x"], flush=True)
            return {"twice": 2 * data["x"]}
"""

MOODY = """
    import os, sys, time, ctypes, threading, logging

    class Model:
        example = {"do": "answer"}

        def predict(self, data):
            do = data["do"]
            if do == "answer":
                return "fine"
            if do == "raise":
                raise KeyError("petal")
            if do == "segfault":
                print("the last words", flush=True)
                ctypes.string_at(0)
            if do == "exit":
                os._exit(7)
            if do == "sys.exit":
                sys.exit(3)
            if do == "memory":
                import resource
                resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
                ctypes.CDLL(None).abort()
            if do == "swallow":
                while True:
                    try:
                        time.sleep(0.05)
                    except Exception:
                        pass
            if do == "c":
                ctypes.CDLL(None).sleep(600)
            if do == "hold":
                open(data["flag"], "w").close()
                while not os.path.exists(data["until"]):
                    time.sleep(0.01)
                return "held"
            if do == "log":
                logging.getLogger("churn").warning("a logged line")
                sys.stderr.write("a line on stderr\\n")
                return None
            if do == "set":
                return {1, 2}
"""


@pytest.fixture
def client(redis_url: str):
    with Client(redis_url) as client:
        yield client


def serving(connection: Redis, model: str) -> Serving:
    (one,) = read_model(connection, model).serving
    return one


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_a_prediction_goes_through_and_the_model_stays_loaded(project, start_worker, client, connection):
    project.add("doubler", DOUBLER)
    worker = start_worker(project, "doubler")
    assert serving(connection, "doubler").state == "cold"

    assert client.predict("doubler", {"x": 21}, timeout=60) == {"twice": 42}

    first = serving(connection, "doubler")
    assert (first.state, first.version, first.loads) == ("warm", "1.2", 1)
    jobs = client.enqueue_many("doubler", [{"x": n} for n in range(1000)])
    assert client.wait_all(jobs, timeout=110) == [{"twice": 2 * n} for n in range(1000)]
    last = serving(connection, "doubler")
    assert (last.loads, last.horse_pid) == (1, first.horse_pid)
    assert "predicting 999" in worker.log


def test_preload_warms_before_the_first_job(project, start_worker, connection):
    project.add("doubler", DOUBLER, preload=True)
    start_worker(project, "doubler")
    wait_until(lambda: serving(connection, "doubler").state == "warm", "the model is warm")


def test_rqs_own_command_starts_the_same_worker(project, start_worker, client, connection):
    project.add("doubler", DOUBLER)
    command = [RQ, "worker", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker"]
    worker = start_worker(project, "doubler", "doubler", command=command)
    assert client.predict("doubler", {"x": 4}, timeout=60) == {"twice": 8}
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("queues", "says"),
    [(["doubler", "other"], "exactly one model, not 2 (doubler, other)"), (["nobody"], "'nobody' is not configured")],
)
def test_a_worker_given_the_wrong_queues_refuses_with_a_sentence(project, queues, says):
    project.add("doubler", DOUBLER)
    project.add("other", DOUBLER)
    done = subprocess.run(
        [RQ, "worker", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker", *queues],
        cwd=project.root,
        env=project.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_rq_info_can_construct_the_worker(project, start_worker):
    project.add("doubler", DOUBLER)
    start_worker(project, "doubler")
    done = subprocess.run(
        [RQ, "info", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker"],
        cwd=project.root,
        env=project.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "doubler" in done.stdout


class TestFailures:
    """What a model can do wrong harms its own job only."""

    @pytest.fixture(autouse=True)
    def moody(self, project: Project, start_worker, client: Client, connection: Redis):
        project.add("moody", MOODY, job_timeout=2)
        self.worker = start_worker(project, "moody")
        self.client = client
        self.connection = connection
        yield
        assert self.client.predict("moody", {"do": "answer"}, timeout=60) == "fine"
        assert self.worker.process.poll() is None, "the worker's own process goes on"

    def predict(self, do: str, **more: object) -> object:
        return self.client.predict("moody", {"do": do, **more}, timeout=60)

    def test_an_exception_is_a_model_error_with_its_type(self):
        with pytest.raises(ModelError, match="petal") as caught:
            self.predict("raise")
        assert caught.value.type == "KeyError"
        assert "moody_module.py" in caught.value.traceback

    def test_a_segfault_fails_that_job_with_the_last_lines(self):
        assert self.predict("answer") == "fine"
        before = serving(self.connection, "moody")
        with pytest.raises(ModelCrashed, match="SIGSEGV") as caught:
            self.predict("segfault")
        assert "the last words" in caught.value.traceback
        assert "Segmentation fault" in caught.value.traceback, "faulthandler's lines belong to the last words"
        assert self.predict("answer") == "fine"
        after = serving(self.connection, "moody")
        assert after.pid == before.pid
        assert after.horse_pid != before.horse_pid
        assert after.loads == 2

    def test_os_exit_and_abort_are_crashes(self):
        with pytest.raises(ModelCrashed, match="exit status 7"):
            self.predict("exit")
        with pytest.raises(ModelCrashed, match="SIGABRT"):
            self.predict("memory")

    def test_sys_exit_is_an_error_and_the_horse_stays(self):
        self.predict("answer")
        before = serving(self.connection, "moody").horse_pid
        with pytest.raises(ModelError) as caught:
            self.predict("sys.exit")
        assert caught.value.type == "SystemExit"
        assert serving(self.connection, "moody").horse_pid == before

    @pytest.mark.parametrize("do", ["swallow", "c"])
    def test_job_timeout_holds(self, do: str):
        with pytest.raises(ModelTimeout, match="job_timeout"):
            self.predict(do)

    def test_output_that_is_no_json_fails_loudly(self):
        with pytest.raises(InvalidOutput, match="set"):
            self.predict("set")

    def test_none_is_a_result(self):
        assert self.predict("log") is None
        assert "a logged line" in self.worker.log
        assert "a line on stderr" in self.worker.log

    def test_a_horse_killed_from_outside_costs_a_retry_not_the_job(self, tmp_path):
        flag, until = tmp_path / "flag", tmp_path / "until"
        job = self.client.enqueue("moody", {"do": "hold", "flag": str(flag), "until": str(until)}, job_timeout=100)
        wait_until(flag.exists, "the prediction runs")
        retries = job.retries_left
        flag.unlink()
        os.killpg(serving(self.connection, "moody").horse_pid, signal.SIGKILL)
        wait_until(flag.exists, "it runs again in a new horse")
        until.touch()
        assert job.wait(timeout=60) == "held"
        job.refresh()
        assert job.retries_left == retries - 1

    def test_stop_job_stops_it(self, tmp_path):
        flag = tmp_path / "flag"
        job = self.client.enqueue("moody", {"do": "hold", "flag": str(flag), "until": "/nowhere"}, job_timeout=100)
        wait_until(flag.exists, "the prediction runs")
        send_stop_job_command(self.connection, job.id, serializer=JSONSerializer)
        with pytest.raises(JobCancelled, match="stopped"):
            job.wait(timeout=60)
        assert job.get_status() == JobStatus.STOPPED


def test_the_callers_own_retry_covers_the_models_exceptions(project, start_worker, client, tmp_path):
    project.add(
        "flaky",
        """
        import pathlib

        class Model:
            def predict(self, data):
                tries = pathlib.Path(data["tries"])
                tries.write_text(tries.read_text() + "." if tries.exists() else ".")
                if len(tries.read_text()) < data["enough"]:
                    raise ConnectionError("not yet")
                return len(tries.read_text())
        """,
    )
    start_worker(project, "flaky")
    patient = client.enqueue("flaky", {"tries": str(tmp_path / "a"), "enough": 3}, retry=Retry(max=2))
    assert patient.wait(timeout=60) == 3
    final = client.enqueue("flaky", {"tries": str(tmp_path / "b"), "enough": 3})
    with pytest.raises(ModelError, match="not yet"):
        final.wait(timeout=60)
    assert (tmp_path / "b").read_text() == ".", "the model's exceptions are final by default"


def test_retry_on_lists_what_may_be_retried(project, start_worker, client, tmp_path):
    project.add(
        "flaky",
        """
        import pathlib

        class Model:
            def predict(self, data):
                flag = pathlib.Path(data)
                if not flag.exists():
                    flag.touch()
                    raise ConnectionError("not yet")
                return "done"
        """,
        retry_on=["ConnectionError"],
    )
    start_worker(project, "flaky")
    assert client.predict("flaky", str(tmp_path / "flag"), timeout=60) == "done"


@pytest.mark.parametrize(
    ("class_path", "source", "says"),
    [
        ("nowhere.at_all:Model", "", "nowhere"),
        ("broken_module:Nope", "class Model: pass", "Nope"),
        ("broken_module:Model", "import not_installed_anywhere", "not_installed_anywhere"),
        (
            "broken_module:Model",
            "class Model:\n    predict = print\n    def __init__(self): raise OSError('no weights')",
            "no weights",
        ),
    ],
)
def test_a_model_that_does_not_load_fails_its_jobs_and_says_why(
    project, start_worker, client, connection, class_path, source, says
):
    project.add("broken", source)
    project.config.write_text(project.config.read_text().replace("broken_module:Model", class_path))
    start_worker(project, "broken")
    with pytest.raises(ModelBroken, match=says):
        client.predict("broken", {}, timeout=60)
    one = serving(connection, "broken")
    assert one.state == "broken"
    assert says in one.error


HOLDING = """
    import os, subprocess, sys, time

    class Model:
        def predict(self, data):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(data["flag"] + ".part", "w") as flag:
                flag.write(f"{os.getpid()} {child.pid}")
            os.rename(data["flag"] + ".part", data["flag"])
            while not os.path.exists(data["until"]):
                time.sleep(0.01)
            child.kill()
            child.wait()
            return "held"
"""


class TestStopping:
    @pytest.fixture
    def held(self, project: Project, start_worker, client: Client, tmp_path):
        """A worker in the middle of a prediction whose model has a child of its own."""
        project.add("holding", HOLDING)
        self.worker = start_worker(project, "holding")
        self.flag, self.until = tmp_path / "flag", tmp_path / "until"
        job = client.enqueue("holding", {"flag": str(self.flag), "until": str(self.until)})
        wait_until(self.flag.exists, "the prediction runs")
        self.pids = [int(pid) for pid in self.flag.read_text().split()]
        return job

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_warm_shutdown_finishes_the_job_in_hand(self, held, connection, signum):
        os.kill(self.worker.pid, signum)
        wait_until(lambda: "warm shut down" in self.worker.log, "the worker heard")
        self.until.touch()
        assert held.wait(timeout=60) == "held"
        assert self.worker.process.wait(60) == 0
        assert not any(alive(pid) for pid in self.pids)
        assert read_model(connection, "holding").serving == ()

    def test_an_idle_worker_leaves_at_once(self, project, start_worker, connection):
        project.add("doubler", DOUBLER)
        worker = start_worker(project, "doubler")
        assert worker.stop() == 0
        assert read_model(connection, "doubler").serving == ()

    def test_a_killed_worker_leaves_no_orphan(self, held):  # noqa: ARG002
        os.kill(self.worker.pid, signal.SIGKILL)
        self.worker.process.wait(60)
        wait_until(lambda: not any(alive(pid) for pid in self.pids), "the horse and its child are gone")


SECURITY = """
    class Model:
        def predict(self, data):
            return data
"""


class TestOnlyModelsRun:
    """Decision 8: whatever a job names, only this queue's model runs."""

    @pytest.fixture(autouse=True)
    def echo(self, project: Project, start_worker, client: Client, connection: Redis, tmp_path):
        self.trap = tmp_path / "trap"
        # A module that would leave a trace if anything imported it, on the worker's own path.
        (project.root / "trap_module.py").write_text(
            f"def spring(*args, **kwargs): open({str(self.trap)!r}, 'w').close()\nspring()\n"
        )
        project.add("echo", SECURITY)
        project.add("other", SECURITY)
        self.worker = start_worker(project, "echo")
        self.client = client
        self.queue = Queue("echo", connection=connection, serializer=JSONSerializer)
        yield
        assert client.predict("echo", "still here", timeout=60) == "still here"
        assert not self.trap.exists(), "something was imported or run"

    def failure(self, job: Job) -> str:
        wait_until(lambda: job.get_status() == JobStatus.FAILED, "the job has failed")
        record = job.latest_result().return_value
        assert record["kind"] == "InvalidJob"
        assert record["retryable"] is False
        return record["message"]

    @pytest.mark.parametrize(
        "function",
        [
            "os.system",
            "builtins.print",
            "print",
            "trap_module.spring",
            "rq_models.jobs.other",
            "rq_models.jobs.ModelJob",
            "rq_models.jobs.",
            "rq_models.jobs.echo.predict",
        ],
    )
    def test_another_function_fails_and_nothing_is_imported(self, function):
        job = self.queue.enqueue_call(function, args=(f"touch {self.trap}",))
        assert "runs 'rq_models.jobs.echo' only" in self.failure(job)

    def test_a_method_of_an_instance_fails(self):
        job = self.queue.create_job("rq_models.jobs.echo", args=("x",))
        job._instance = {"x": 1}
        self.queue.enqueue_job(job)
        self.failure(job)

    @pytest.mark.parametrize("field", ["success_callback_name", "failure_callback_name", "stopped_callback_name"])
    def test_a_callback_path_fails_the_job(self, field):
        job = self.queue.create_job("rq_models.jobs.echo", args=("x",))
        setattr(job, f"_{field}", "trap_module.spring")
        self.queue.enqueue_job(job)
        assert "trap_module.spring" in self.failure(job)

    def test_a_webhook_fails_the_job_and_is_not_sent(self):
        with socket.create_server(("127.0.0.1", 0)) as receiver:
            receiver.setblocking(False)
            url = f"http://127.0.0.1:{receiver.getsockname()[1]}/"
            hooks = [Webhook(url, "finished"), Webhook(url, "failed")]
            job = self.queue.enqueue_call("rq_models.jobs.echo", args=("x",), webhooks=hooks)
            assert url in self.failure(job)
            # The worker is done with this job when it has answered the next one.
            assert self.client.predict("echo", "next", timeout=60) == "next"
            with pytest.raises(BlockingIOError):
                receiver.accept()

    def test_wrong_arguments_fail(self):
        for args, kwargs in [((), {}), (("a", "b"), {}), (("a",), {"b": 1})]:
            job = self.queue.enqueue_call("rq_models.jobs.echo", args=args, kwargs=kwargs)
            assert "exactly one argument" in self.failure(job)

    def test_pickled_data_is_not_unpickled(self):
        import pickle

        class Trap:
            def __reduce__(self):
                return (open, (str(trap), "w"))

        trap = self.trap
        job = self.queue.create_job("rq_models.jobs.echo", args=("x",))
        job.save()
        job.connection.hset(job.key, mapping={"data": pickle.dumps(Trap()), "meta": pickle.dumps(Trap())})
        self.queue.push_job_id(job.id)
        assert "is not JSON" in self.failure(Job(job.id, connection=job.connection, serializer=JSONSerializer))

    def test_a_queue_entry_without_a_job_is_dropped_and_logged(self):
        self.queue.push_job_id("no-such-job")
        wait_until(lambda: "no-such-job has no job to run, dropped" in self.worker.log, "the entry was dropped")


def test_an_allowed_callback_is_called(project, start_worker, client, connection, tmp_path):
    (project.root / "hooks.py").write_text(
        f"def done(job, connection, result): open({str(tmp_path / 'done')!r}, 'w').write(str(result))\n"
    )
    project.add("echo", SECURITY, allowed_callbacks=["hooks.done"])
    project_environ = project.environ
    assert "PYTHONPATH" not in project_environ or project_environ["PYTHONPATH"]
    start_worker(project, "echo")
    queue = Queue("echo", connection=connection, serializer=JSONSerializer)
    job = queue.create_job("rq_models.jobs.echo", args=("x",))
    job._success_callback_name = "hooks.done"
    queue.enqueue_job(job)
    wait_until(lambda: job.get_status() == JobStatus.FINISHED, "the job has finished")
    assert (tmp_path / "done").read_text() == "x"


def test_an_exception_handler_that_raises_loses_no_end(project, start_worker, client):
    (project.root / "hooks.py").write_text("def report(job, *exc_info): raise OSError('nobody to report to')\n")
    project.add("moody", MOODY)
    command = [RQ, "worker", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker"]
    worker = start_worker(project, "moody", "--exception-handler", "hooks.report", "moody", command=command)
    assert client.predict("moody", {"do": "answer"}, timeout=60) == "fine"

    jobs = client.enqueue_many("moody", [{"do": do} for do in ("answer", "raise", "set", "answer")])
    first, failed, no_json, last = client.wait_all(jobs, timeout=60, return_exceptions=True)

    assert (first, last) == ("fine", "fine")
    assert isinstance(failed, ModelError)
    assert failed.type == "KeyError"
    assert isinstance(no_json, InvalidOutput)
    assert f"exception handler of job {jobs[1].id}" in worker.log
    assert "nobody to report to" in worker.log
    assert worker.process.poll() is None


def test_a_model_imports_its_own_modules_and_not_ours(project, start_worker, client):
    for name in ("cache", "frames", "contract", "loop"):
        (project.root / f"{name}.py").write_text(f"whose = 'the model, {name}'\n")
    project.add(
        "own",
        """
        import cache, frames, contract, loop
        class Model:
            def predict(self, data):
                return [cache.whose, frames.whose, contract.whose, loop.whose]
        """,
    )
    start_worker(project, "own")
    assert client.predict("own", None, timeout=60) == [
        f"the model, {name}" for name in ("cache", "frames", "contract", "loop")
    ]


def test_the_horse_gets_its_env_and_no_address(project, start_worker, client):
    project.add(
        "environ",
        """
        import os
        class Model:
            def predict(self, data):
                return [os.environ.get(name) for name in data]
        """,
        env={"GREETING": "hello"},
    )
    start_worker(project, "environ")
    names = ["GREETING", "REDIS_URL", "PYTHONPATH", "VIRTUAL_ENV"]
    assert client.predict("environ", names, timeout=60) == ["hello", None, None, None]


def test_another_interpreter_runs_the_model(project, start_worker, client, tmp_path):
    link = tmp_path / "python"
    link.symlink_to(os.path.realpath(sys.executable))
    project.add(
        "where",
        """
        import sys
        class Model:
            def predict(self, data):
                return [sys.executable, "redis" in sys.modules, "rq" in sys.modules]
        """,
        python=str(link),
    )
    start_worker(project, "where")
    assert client.predict("where", None, timeout=60) == [str(link), False, False]


def test_a_missing_interpreter_is_a_configuration_error(project):
    project.add("where", SECURITY, python="/nowhere/python")
    done = project.run("worker", "where")
    assert done.returncode == 3
    assert "models.where.python: there is no interpreter /nowhere/python" in done.stderr


def test_a_failed_job_can_be_requeued_by_rqs_own_means(project, start_worker, client, connection, tmp_path):
    project.add(
        "mended",
        """
        import pathlib
        class Model:
            def predict(self, data):
                if not pathlib.Path(data).exists():
                    raise FileNotFoundError(data)
                return "found"
        """,
    )
    start_worker(project, "mended")
    job = client.enqueue("mended", str(tmp_path / "file"))
    with pytest.raises(ModelError):
        job.wait(timeout=60)
    (tmp_path / "file").touch()
    requeue_job(job.id, connection=connection, serializer=JSONSerializer)
    assert client.job(job.id).wait(timeout=60) == "found"
    assert connection.zscore("rq:failed:mended", job.id) is None


def test_a_queued_job_can_be_cancelled_and_never_runs(project, start_worker, client, connection, tmp_path):
    project.add("echo", SECURITY)
    with Client(connection=connection, check_model=False, check_worker=False) as early:
        cancelled, kept = early.enqueue_many("echo", ["cancelled", "kept"])
    cancelled.cancel()
    start_worker(project, "echo")
    assert client.job(kept.id).wait(timeout=60) == "kept"
    with pytest.raises(JobCancelled):
        client.job(cancelled.id).wait(timeout=60)
    assert connection.hget(cancelled.key, "attempts") is None


@pytest.mark.parametrize(("nan", "expected"), [("null", [1.0, None, None]), ("error", "output[1]")])
def test_nan_becomes_null_or_an_error_and_never_invalid_json(project, start_worker, client, nan, expected):
    project.add("nans", "class Model:\n    def predict(self, data): return [1.0, float('nan'), float('inf')]", nan=nan)
    start_worker(project, "nans")
    job = client.enqueue("nans", None)
    if nan == "null":
        assert job.wait(timeout=60) == expected
    else:
        with pytest.raises(InvalidOutput, match=re.escape(expected)):
            job.wait(timeout=60)


def test_every_attempt_is_counted(project, start_worker, client, connection):
    project.add("never", "class Model:\n    def predict(self, data): raise OSError('no')")
    start_worker(project, "never")
    job = client.enqueue("never", None, retry=Retry(max=2))
    with pytest.raises(ModelError):
        job.wait(timeout=60)
    assert connection.hget(job.key, "attempts") == b"3"


def test_counters_count_what_happened(project, start_worker, client, connection):
    project.add("half", "class Model:\n    def predict(self, data):\n        assert data\n        return data")
    start_worker(project, "half")
    jobs = client.enqueue_many("half", [1, 0, 2])
    client.wait_all(jobs, timeout=60, return_exceptions=True)
    counters = read_counters(connection, "half")
    assert (counters.predictions, counters.failures, counters.loads) == (2, {"ModelError": 1}, 1)
    assert 1 <= counters.batches <= 3
    assert sum(counters.wait) == sum(counters.model) == 3


def test_an_unproven_rq_is_said_at_start(project, connection, monkeypatch, caplog):
    project.add("echo", SECURITY)
    monkeypatch.setattr(worker_module, "RQ_VERSION", "3.7.1")
    monkeypatch.setattr(ModelWorker, "_install_signal_handlers", lambda _: None)
    monkeypatch.chdir(project.root)
    worker = ModelWorker(["echo"], connection=connection, settings=Settings.load("config"))
    with caplog.at_level("WARNING", logger="rq.worker"):
        worker.work(burst=True)
    assert "RQ 3.7.1 was not tested" in caplog.text
