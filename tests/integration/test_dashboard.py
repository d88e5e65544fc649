"""The dashboard against a real server. A test that closes a hole also shows it in rq-dashboard as released."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest
import rq_dashboard.cli
from conftest import wait_until
from rq import Queue, SimpleWorker
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import DefaultSerializer, JSONSerializer
from werkzeug.serving import make_server

from rq_models import Client
from rq_models.dashboard import create_app
from rq_models.registry import Card, Serving, publish_card, renew_lease
from rq_models.scoring import runs

MARKUP = """<script>document.body.id="ran"</script><img src="/static/x" onerror='document.body.id="ran"'>"""
SETTINGS = {"result_ttl": 600, "failure_ttl": 600}
LOOKS: list = []


def double(value):
    return 2 * value


def fail(value):
    raise ValueError(value)


def look():
    """A job that looks at the dashboards while it runs."""
    return [one() for one in LOOKS]


@pytest.fixture
def ours(redis_url):
    return create_app(redis_url).test_client()


@pytest.fixture
def plain(redis_url, monkeypatch):
    """rq-dashboard 0.9.0 as its command line sets it up, with --json."""
    return released(redis_url, monkeypatch, JSONSerializer)


def released(redis_url, monkeypatch, serializer):
    app = rq_dashboard.cli.make_flask_app(None, None, None, "")
    app.config["RQ_DASHBOARD_REDIS_URL"] = redis_url
    monkeypatch.setattr(rq_dashboard.web.config, "serializer", serializer, raising=False)
    rq_dashboard.web.setup_rq_connection(app)
    return app.test_client()


@pytest.fixture
def queue(connection):
    return Queue("churn", connection=connection, serializer=JSONSerializer)


@pytest.fixture
def mailer(connection):
    """The queue of another application, which pickles."""
    return Queue("mailer", connection=connection)


def work(queue):
    worker = SimpleWorker([queue], connection=queue.connection, serializer=queue.serializer)
    worker.work(burst=True, logging_level="ERROR")


def start(queue, job, name):
    """Leave in Redis what a worker does that is running this job."""
    worker = SimpleWorker([queue], name, connection=queue.connection, prepare_for_work=False)
    worker.pid, worker.hostname = 1, "host"
    worker.register_birth()
    job.set_status(JobStatus.STARTED)
    with queue.connection.pipeline() as pipe:
        Execution.create(job, 600, pipe, worker_name=name)
        pipe.execute()


def addresses(connection, *names):
    """Every address that may be looked at."""
    ids = [key.decode().split(":")[2] for key in connection.keys("rq:job:*") if connection.type(key) == b"hash"]
    registries = ("queued", "failed", "deferred", "started", "finished", "scheduled", "canceled")
    lists = [f"{name}/{registry}/8/{order}/1" for name in names for registry in registries for order in ("asc", "dsc")]
    return [
        *("/", "/models", "/metrics", "/0/view/jobs", "/0/view/workers", "/0/data/queues.json", "/0/data/workers.json"),
        *(f"/0/view/job/{one}" for one in ids),
        *(f"/0/data/job/{one}.json" for one in ids),
        *(f"/0/view/jobs/{one}" for one in lists),
        *(f"/0/data/jobs/{one}.json" for one in lists),
    ]


def change(client, path):
    """Ask for a change as the pages' own buttons do."""
    token = re.search(r'"X-CSRFToken": "([^"]+)"', client.get("/").text)[1]
    return client.post(path, headers={"X-CSRFToken": token})


def test_the_workers_page_shows_a_running_json_job(ours, plain, queue):
    def answer(client):
        found = client.get("/0/data/workers.json")
        return [found.status_code, found.json]

    LOOKS[:] = [lambda: answer(plain), lambda: answer(ours)]
    try:
        job = queue.enqueue(look, description="a look", **SETTINGS)
        work(queue)
    finally:
        LOOKS.clear()
    (released_status, _), (status, found) = job.return_value()
    assert released_status == 500
    assert status == 200
    assert found["workers"][0]["current_job"]["job_id"] == job.id
    assert found["workers"][0]["current_job"]["call_string"] == "a look"


def test_a_job_with_dependencies_is_shown(ours, plain, queue):
    first = queue.enqueue(double, 1, **SETTINGS)
    second = queue.enqueue(double, 2, depends_on=[first, queue.enqueue(double, 3)], **SETTINGS)
    path = f"/0/data/job/{second.id}.json"
    assert plain.get(path).status_code == 500
    found = ours.get(path).json
    assert len(found["depends_on"]) == 2
    assert first.id in found["depends_on"]
    assert found["depends_on_status"] == ["active", "active"]
    assert change(ours, f"/job/{first.id}/delete").json == {"status": "OK"}
    assert sorted(ours.get(path).json["depends_on_status"]) == ["active", "expired"]


def test_a_scoring_run_is_the_jobs_of_a_queue_beside_the_models(ours, connection):
    publish_card(connection, Card("churn"))
    run = runs.begin(connection, runs.Asked("churn", "/in.csv", "/out.csv"), restart=False)
    connection.zadd("rq:wip:churn.bulk", {f"{run}-1-plan:x": 2e9})
    record, plan = runs.read(connection, run), {"pieces": [[0, 5], [5, 9]], "rows": 9}
    assert runs.keep_plan(connection, SimpleNamespace(id=f"{run}-1-plan", run="x"), record, plan)
    runs.enqueue(connection, "churn", run, 1, [0, 1])
    connection.zadd("rq:wip:churn.bulk", {f"{run}-1-0:x": 2e9})
    part = {"part": "p", "rows": 5, "failed": 1}
    runs.commit(connection, SimpleNamespace(id=f"{run}-1-0", run="x"), runs.read(connection, run), 0, part)

    assert {ours.get(path).status_code for path in addresses(connection, "churn.bulk")} <= {200, 308}
    shown = ours.get("/0/data/jobs/churn.bulk/queued/8/asc/1.json").json["jobs"]
    assert [job["id"] for job in shown] == [f"{run}-1-plan", f"{run}-1-0", f"{run}-1-1"]
    assert {job["description"] for job in shown} == {f"a step of scoring run {run}"}
    far = ours.get(f"/0/data/job/{run}-1-plan.json").json["metadata"]
    assert json.loads(far) == {"rows": 5, "failed": 1, "chunks_done": 1, "chunks": 2}
    assert ".bulk" not in ours.get("/models").text
    assert ".bulk" not in ours.get("/metrics").text


class Bomb:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ("where", "serializer"),
    # Its option --json is no protection for the metadata.
    [("meta", JSONSerializer), ("meta", DefaultSerializer), ("data", DefaultSerializer), ("result", DefaultSerializer)],
)
def test_nothing_is_unpickled(ours, queue, connection, redis_url, tmp_path, monkeypatch, where, serializer):
    folder = tmp_path / "made"
    job = queue.enqueue(double, 1, description="innocent", **SETTINGS)
    start(queue, job, "busy")
    bomb = pickle.dumps(Bomb(folder))
    if where == "result":
        job.set_status(JobStatus.FINISHED)
        connection.xadd(f"rq:results:{job.id}", {"type": 1, "return_value": b64encode(bomb)})
    else:
        connection.hset(job.key, where, bomb)
    for path in addresses(connection, "churn"):
        assert ours.get(path).status_code in (200, 308)
    assert ours.get(f"/0/data/job/{job.id}.json").json["id"] == job.id
    for path in (f"/job/{job.id}/requeue", "/requeue/churn", "/queue/churn/compact"):
        assert change(ours, path).status_code in (200, 409)
    assert not folder.exists()

    client = released(redis_url, monkeypatch, serializer)
    for path in addresses(connection, "churn"):
        client.get(path)
    assert folder.exists()

    folder.rmdir()
    assert change(ours, f"/job/{job.id}/delete").json == {"status": "OK"}
    assert change(ours, "/queue/churn/queued/empty").json == {"status": "OK"}
    assert not folder.exists()
    assert not connection.exists(job.key)


def test_another_applications_jobs_are_shown_as_foreign(ours, plain, mailer, connection):
    done = mailer.enqueue(double, (1, 2), job_id="done", meta={"set": {1, 2}}, **SETTINGS)
    broken = mailer.enqueue(fail, {1, 2}, job_id="broken", **SETTINGS)
    work(mailer)
    running = mailer.enqueue(double, 1, job_id="running")
    start(mailer, running, "their-worker")
    connection.lrem(mailer.key, 0, "running")
    mailer.enqueue(double, 1, job_id="waiting")
    mailer.enqueue(double, 1, job_id="deferred", depends_on="waiting")
    mailer.enqueue(double, 1, job_id="canceled").cancel()
    # What RQ 3 would not write: an id with dots, a job without its data, one from a version of the future.
    connection.hset("rq:job:report.2024", mapping=connection.hgetall("rq:job:waiting"))
    connection.hset("rq:job:torn", mapping={"attempts": 1})
    connection.hset("rq:job:future", mapping={**connection.hgetall("rq:job:waiting"), b"status": b"dreaming"})
    connection.rpush(mailer.key, "report.2024", "torn", "future", "nothing")
    connection.xadd("rq:results:future", {"type": 99, "return_value": "?"})

    paths = addresses(connection, "mailer")
    assert 500 in [plain.get(path).status_code for path in paths]
    answers = {path: ours.get(path).status_code for path in paths}
    unreadable = [path for path, status in answers.items() if status not in (200, 308)]
    assert sorted(unreadable) == ["/0/view/job/future", "/0/view/job/torn"]
    assert ours.get("/0/view/job/torn").status_code == 409
    shown = {}
    for registry in ("queued", "failed", "deferred", "started", "finished", "canceled"):
        shown[registry] = ours.get(f"/0/data/jobs/mailer/{registry}/8/asc/1.json").json["jobs"]
        assert all(job["description"].startswith("[foreign job]") for job in shown[registry])
    assert {registry: [job["id"] for job in jobs] for registry, jobs in shown.items()} == {
        "queued": ["waiting", "report.2024", "torn", "future"],
        "failed": ["broken"],
        "deferred": ["deferred"],
        "started": ["running"],
        "finished": ["done"],
        "canceled": ["canceled"],
    }
    (worker,) = ours.get("/0/data/workers.json").json["workers"]
    assert worker["name"] == "their-worker"
    assert worker["current_job"]["call_string"].startswith("[foreign job]")
    found = ours.get("/0/data/job/done.json").json
    assert found["result"] is None
    assert "is not JSON" in found["error"]["message"]
    assert found["metadata"] == "(not JSON: not opened here)"
    assert "ValueError" in ours.get("/0/data/job/broken.json").json["exc_info"]

    # It can be put back, byte for byte; what can't be written back unharmed is not.
    before = connection.hmget(done.key, "data", "meta")
    assert change(ours, "/job/broken/requeue").json == {"status": "OK"}
    assert broken.get_status() == "queued"
    assert pickle.loads(Job.fetch("broken", connection=connection).data)[2] == ({1, 2},)
    assert connection.hmget(done.key, "data", "meta") == before
    assert change(ours, "/job/future/requeue").status_code == 409


def test_looking_changes_nothing(ours, plain, queue, connection):
    for value in range(3):
        queue.enqueue(double, value, **SETTINGS)
    work(queue)
    start(queue, queue.enqueue(double, 1), "busy")
    queue.enqueue(double, 1).delete()
    queue.push_job_id("gone")

    def state():
        return {key: connection.dump(key) for key in connection.scan_iter()}

    before = state()
    for path in addresses(connection, "churn"):
        ours.get(path)
    assert state() == before
    for path in addresses(connection, "churn"):
        plain.get(path)
    assert state() != before


def test_a_link_on_another_page_cannot_requeue(ours, plain, queue):
    jobs = [queue.enqueue(fail, value, **SETTINGS) for value in range(2)]
    work(queue)
    assert ours.get("/requeue/churn").status_code == 405
    assert ours.post("/requeue/churn").status_code == 403
    assert ours.post(f"/job/{jobs[0].id}/delete").status_code == 403
    assert [job.get_status() for job in jobs] == ["failed", "failed"]
    assert change(ours, "/requeue/churn").json == {"status": "OK", "count": 2}
    assert [job.get_status() for job in jobs] == ["queued", "queued"]
    work(queue)
    assert plain.get("/requeue/churn").status_code == 200
    assert plain.post(f"/job/{jobs[0].id}/delete", headers={"Origin": "http://evil.example"}).status_code == 200
    assert [Job.exists(job.id, queue.connection) for job in jobs] == [False, True]


@pytest.mark.parametrize("registry", ["queued", "finished"])
@pytest.mark.parametrize("order", ["asc", "dsc"])
def test_each_page_holds_its_own_jobs(ours, plain, queue, registry, order):
    ids = [queue.enqueue(double, value, **SETTINGS).id for value in range(20)]
    if registry == "finished":
        work(queue)

    def page(client, number):
        return [job["id"] for job in client.get(f"/0/data/jobs/churn/{registry}/8/{order}/{number}.json").json["jobs"]]

    pages = [page(ours, number) for number in (1, 2, 3)]
    assert [len(one) for one in pages] == [8, 8, 4]
    assert sorted(itertools.chain(*pages)) == sorted(ids)
    if registry == "finished":
        assert [len(page(plain, number)) for number in (1, 2, 3)] != [8, 8, 4]
    assert page(ours, 4) == []


def test_a_job_that_is_gone_is_404(ours, plain):
    for path in ("/0/view/job/missing", "/0/data/job/missing.json"):
        assert plain.get(path).status_code == 500
        assert ours.get(path).status_code == 404


def test_the_connection_is_shared_and_stays(ours, plain, queue):
    for client, stays in ((ours, True), (plain, False)):
        before = client.application.redis_conn
        client.get("/0/data/queues.json")
        client.get("/0/data/workers.json")
        assert (client.application.redis_conn is before) == stays
    start(queue, queue.enqueue(double, 1), "busy")
    ours.get("/0/data/workers.json")
    # RQ's workers raise it to minutes when they are constructed, for all who share the pool.
    assert ours.application.redis_conn.connection_pool.connection_kwargs["socket_timeout"] < 60


def test_a_redis_that_refuses_is_said_without_a_traceback(ours, connection):
    connection.set("rq:queues", "not a set")
    answer = ours.get("/0/data/queues.json")
    assert answer.status_code == 503
    assert "WRONGTYPE" in answer.json["error"]


def test_the_models_page(ours, connection):
    assert "No models yet" in ours.get("/models").text
    publish_card(connection, Card("iris_model", version="0.1.0", description=MARKUP))
    publish_card(connection, Card("churn"))
    for name, state in (("a", "warm"), ("b", "cold")):
        renew_lease(connection, "iris_model", Serving(name, name, "host", 1, state=state), 60)
    renew_lease(connection, "price", Serving("c", "c", "host", 1, state="broken", error="no <xgboost>"), 60)
    publish_card(connection, Card("price"))
    queue = Queue("iris_model", connection=connection, serializer=JSONSerializer)
    queue.enqueue(fail, 1, **SETTINGS)
    work(queue)
    for _ in range(3):
        queue.enqueue(double, 1)
    page = ours.get("/models").text
    rows = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)[1:]]
    assert [row[0] for row in rows] == ["churn", "iris_model", "price"]
    assert rows[0][1:] == ["unserved", "0", "0", "0"]
    assert rows[1][-5:] == ["0.1.0", "warm", "2", "3", "1"]
    assert "broken" in rows[2]
    assert "no &lt;xgboost&gt;" in page
    assert MARKUP not in page


SIGNED = """
    class Model:
        version = "1.2"
        def predict(self, data):
            if data < 0:
                raise ArithmeticError("<i>negative</i>")
            return data ** 0.5
"""


def test_the_page_of_a_prediction_and_the_metrics(ours, project, start_worker, connection):
    project.add("root", SIGNED)
    start_worker(project, "root")
    with Client(project.redis_url) as client:
        jobs = client.enqueue_many("root", [4, 9, -1])
        client.wait_all(jobs, timeout=60, return_exceptions=True)
    found = ours.get(f"/0/data/job/{jobs[0].id}.json").json
    assert [found[name] for name in ("result", "error", "model_version", "attempts")] == [2.0, None, "1.2", "1"]
    failed = ours.get(f"/0/data/job/{jobs[2].id}.json").json
    assert (failed["error"]["kind"], failed["error"]["type"]) == ("ModelError", "ArithmeticError")
    assert "<i>negative</i>" in failed["error"]["message"]
    page = ours.get(f"/0/view/job/{jobs[2].id}").text
    for shown in ("d.error.kind", "d.error.message", "d.model_version", "d.attempts"):
        assert f"<%- {shown} %>" in page

    publish_card(connection, Card('odd "\\\n" name'))
    answer = ours.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    for line in (
        "# TYPE rq_models_predictions_total counter",
        'rq_models_predictions_total{model="root"} 2',
        'rq_models_predictions_total{model="odd \\"\\\\\\n\\" name"} 0',
        'rq_models_failures_total{model="root",kind="ModelError"} 1',
        'rq_models_loads_total{model="root"} 1',
        "# TYPE rq_models_queue_wait_seconds histogram",
        'rq_models_queue_wait_seconds_bucket{model="root",le="+Inf"} 3',
        'rq_models_queue_wait_seconds_count{model="root"} 3',
        'rq_models_model_seconds_bucket{model="root",le="60"} 3',
        "# TYPE rq_models_queued gauge",
        'rq_models_queued{model="root"} 0',
        'rq_models_workers{model="root",state="warm"} 1',
        'rq_models_workers{model="root",state="broken"} 0',
    ):
        assert line in lines
    assert any(line.startswith('rq_models_batches_total{model="root"} ') for line in lines)
    names = [re.match(r"(?:# TYPE )?(rq_models_[a-z_]+?)(?:_bucket|_count)?[ {]", line)[1] for line in lines]
    assert len(list(itertools.groupby(names))) == len(set(names)) == 8  # each metric's lines stand together


def test_a_queue_name_in_the_address_is_no_script(ours, plain):
    path = "/0/view/jobs/');ran();('/queued/8/asc/1"
    assert ".val('');ran();('')" in plain.get(path).text
    assert "');ran();('" not in ours.get(path).text


def test_pages_insert_no_text_as_markup(ours, plain, queue, connection):
    hostile(queue)
    paths = [path for path in addresses(connection, "churn") if not path.endswith(".json")]
    assert "<%=" in "".join(plain.get(path).text for path in paths)
    made = "".join(ours.get(path).text for path in paths)
    assert "<%-" in made
    assert "<%=" not in made
    assert MARKUP not in made


def hostile(queue):
    """Put markup into everything that a page shows; returns the addresses of the pages."""
    done = queue.enqueue(double, MARKUP, description=MARKUP, meta={MARKUP: MARKUP}, **SETTINGS)
    queue.enqueue(fail, MARKUP, description=MARKUP, **SETTINGS)
    work(queue)
    start(queue, queue.enqueue(double, MARKUP, description=MARKUP), f"worker {MARKUP}")
    other = Queue(f"queue {MARKUP}", connection=queue.connection, serializer=JSONSerializer)
    other.enqueue(double, 1)
    queue.connection.hset("rq:job:" + MARKUP.replace(":", ""), mapping=queue.connection.hgetall(done.key))
    queue.connection.rpush(queue.key, MARKUP.replace(":", ""))
    # The last two are those on which the released dashboard runs it; the others fail there, or escape it themselves.
    lists = [f"/0/view/jobs/churn/{registry}/8/asc/1" for registry in ("queued", "failed")]
    return [*lists, "/0/view/workers", "/", f"/0/view/job/{done.id}"]


@pytest.fixture(scope="session")
def chromium():
    """Debian's browser; in CI, as root, it is installed where it is missing."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            if not shutil.which("chromium"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(["apt-get", "-qq", *arguments], env=environ, timeout=300, check=False)
    if not shutil.which("chromium"):
        pytest.skip("no chromium on PATH; root installs it from Debian if CI=true is set")


@pytest.mark.timeout(900)
def test_a_browser_runs_no_text_as_script(chromium, ours, plain, queue, tmp_path):
    pages = hostile(queue)
    with served(plain.application) as base:
        doms = [browse(base + page, tmp_path / "plain")[0] for page in pages[-2:]]
    assert [ran(dom) for dom in doms] == [True, True]
    publish_card(queue.connection, Card("churn", description=MARKUP))
    with served(ours.application) as base:
        for page in ["/models", *pages]:
            dom, console = browse(base + page, tmp_path / "ours")
            assert not ran(dom), page
            assert "&lt;img src=" in dom, page  # it is there, as text
            assert "<img" not in dom, page
            assert "Content Security Policy" not in console, page  # nothing of the page's own was refused
            assert "Uncaught" not in console, page


def ran(dom):
    return 'id="ran"' in re.search("<body[^>]*>", dom)[0]


@contextlib.contextmanager
def served(app):
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def browse(url, profile):
    """What the page has become after its scripts ran for some seconds, and what the browser had to say."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_served_over_http(spawn, queue, redis_url, tmp_path):
    job = queue.enqueue(double, 1)
    program = "import sys; from rq_models.dashboard import serve; serve(sys.argv[1], port=0)"
    server = spawn([sys.executable, "-c", program, redis_url], cwd=tmp_path, env=dict(os.environ))
    wait_until(lambda: "\n" in server.log, "the dashboard says its address")
    base = re.search(r"dashboard: (http://127\.0\.0\.1:\d+/)", server.log)[1]

    with urllib.request.urlopen(f"{base}0/view/job/{job.id}") as page:  # noqa: S310 - our own
        token = re.search(r'"X-CSRFToken": "([^"]+)"', page.read().decode())[1]
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    delete = urllib.request.Request(f"{base}job/{job.id}/delete", method="POST")  # noqa: S310 - likewise
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(delete)  # noqa: S310 - likewise
    with refused.value:
        assert refused.value.code == 403
    assert Job.exists(job.id, queue.connection)
    delete.add_header("X-CSRFToken", token)
    with urllib.request.urlopen(delete) as answer:  # noqa: S310 - likewise
        assert json.load(answer) == {"status": "OK"}
    assert not Job.exists(job.id, queue.connection)

    # Many at once, on one connection each.
    ids = [queue.enqueue(double, value).id for value in range(8)]
    seen, port = [], int(base.rsplit(":", 1)[1].strip("/"))
    threads = [threading.Thread(target=look_often, args=(port, one, seen)) for one in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(ids * 10)
    assert server.stop() == 0
    assert "Traceback" not in server.log


def look_often(port, job_id, seen):
    connection = HTTPConnection("127.0.0.1", port)
    for _ in range(10):
        connection.request("GET", f"/0/data/job/{job_id}.json")
        seen.append(json.load(connection.getresponse())["id"])
    connection.close()


def test_the_package_holds_the_pages(ours):
    folder = Path(sys.modules["rq_models.dashboard"].__file__).parent / "templates"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.html")} == {
        "error.html",
        "models.html",
        "rq_dashboard/inline_js.html",
        "rq_dashboard/navbar.html",
    }
