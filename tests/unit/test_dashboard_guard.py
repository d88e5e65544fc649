"""Who may ask the dashboard, and what it answers when Redis is away: nothing listens at its address here."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import rq_dashboard
from rq.job import Job

from rq_models.dashboard import create_app, serve
from rq_models.dashboard.app import secured
from rq_models.errors import ConfigurationError

SECRET = "hunter2"  # noqa: S105 - that it is shown nowhere is what is tested
NOWHERE = f"redis://user:{SECRET}@127.0.0.1:1/0"
CHANGES = [
    ("/job/one/delete", "delete_job_view"),
    ("/job/one/requeue", "requeue_job_view"),
    ("/requeue/churn", "requeue_all"),
    ("/queue/churn/failed/empty", "empty_queue"),
    ("/queue/churn/compact", "compact_queue"),
]


def token_of(client):
    """The token as a page's own script has it; pages for errors carry it too."""
    return re.search(r'"X-CSRFToken": "([^"]+)"', client.get("/models").text)[1]


def status(client, path, **headers):
    """Ask and close: a static file stays open until its response is closed."""
    with client.get(path, headers=headers) as answer:
        return answer.status_code


@pytest.fixture
def client():
    return create_app(NOWHERE).test_client()


def basic(username, password):
    return {"Authorization": "Basic " + b64encode(f"{username}:{password}".encode()).decode()}


def test_the_extra_declares_six_which_rq_dashboard_imports_undeclared():
    declared = importlib.metadata.requires("rq-dashboard")
    assert not any(one.startswith("six") for one in declared)
    ours = importlib.metadata.requires("rq-models")
    assert any(one.startswith("six") and 'extra == "dashboard"' in one for one in ours)


def test_a_missing_extra_is_one_sentence_with_the_command_that_adds_it():
    program = "import sys; sys.modules['six'] = None; "
    plain = subprocess.run([sys.executable, "-c", f"{program}import rq_dashboard"], capture_output=True, check=False)
    assert plain.returncode != 0
    ours = subprocess.run(
        [sys.executable, "-c", f"{program}from rq_models.dashboard import serve; serve('redis://127.0.0.1:1')"],
        capture_output=True,
        text=True,
        check=False,
    )
    last = ours.stderr.splitlines()[-1]
    assert "ConfigurationError: the dashboard is not installed" in last
    assert "pip install 'rq-models[dashboard]'" in last


def test_another_user_of_rq_dashboard_in_the_process_keeps_it_as_released():
    create_app(NOWHERE)
    assert rq_dashboard.web.Job is Job
    assert not [name for name in sys.modules if name.endswith("_rq_models") and name.startswith("rq_dashboard")]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1", "models.example.com"])  # noqa: S104
def test_an_address_that_others_reach_needs_user_name_and_password(host):
    for given in ({}, {"username": "ann"}, {"password": "pw"}):
        with pytest.raises(ConfigurationError, match="user name and a password"):
            serve(NOWHERE, host=host, port=0, **given)
    create_app(NOWHERE, host=host, username="ann", password="pw")  # noqa: S106


def test_loopback_needs_none_but_half_of_them_is_a_mistake():
    create_app(NOWHERE, host="::1")
    with pytest.raises(ConfigurationError, match="both"):
        create_app(NOWHERE, username="ann")


def test_a_taken_port_and_a_bad_address_are_sentences():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            serve(NOWHERE, port=port)
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        serve(NOWHERE, host="192.0.2.1", port=0, username="ann", password="pw")  # noqa: S106


def test_what_is_no_redis_address_is_a_sentence():
    with pytest.raises(ConfigurationError, match="the dashboard's Redis address is no Redis address"):
        create_app(f"http://user:{SECRET}@127.0.0.1")


def test_basic_authentication_covers_every_address():
    client = create_app(NOWHERE, username="änn", password="pä:ss").test_client()  # noqa: S106
    for path in ("/", "/models", "/metrics", "/static/css/main.css", "/0/data/queues.json", "/nowhere"):
        for headers in ({}, basic("änn", "wrong"), basic("wrong", "pä:ss"), {"Authorization": "Bearer x"}):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, "Basic" in answer.headers["WWW-Authenticate"]) == (401, True)
    assert status(client, "/static/css/main.css", **basic("änn", "pä:ss")) == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9181", "127.0.0.1.evil.com", "192.0.2.1", "[", "a b"])
def test_a_host_name_that_is_not_ours_is_refused(client, host):
    assert status(client, "/static/css/main.css", Host=host) in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1:9181", "localhost", "LOCALHOST:80", "[::1]:9181", "127.1.2.3"])
def test_loopback_names_are_ours(client, host):
    assert status(client, "/static/css/main.css", Host=host) == 200


def test_with_a_password_no_name_is_refused_for_no_browser_sends_it_to_another():
    client = create_app(NOWHERE, host="0.0.0.0", username="ann", password="pw").test_client()  # noqa: S104, S106
    assert status(client, "/static/css/main.css", Host="models.example.com") == 401
    assert status(client, "/static/css/main.css", Host="models.example.com", **basic("ann", "pw")) == 200


def test_these_are_all_requests_that_change_state(client):
    posts = {rule.endpoint for rule in client.application.url_map.iter_rules() if "POST" in rule.methods}
    assert posts == {f"rq_dashboard.{name}" for _, name in CHANGES}


@pytest.mark.parametrize("path", [path for path, _ in CHANGES])
def test_a_change_needs_post_the_token_and_our_own_pages(client, path):
    token = {"X-CSRFToken": token_of(client)}
    assert client.get(path).status_code == 405
    assert client.get(path, headers=token).status_code == 405
    assert client.head(path).status_code == 405
    assert client.post(path).status_code == 403
    assert client.post(path, headers={"X-CSRFToken": "wrong"}).status_code == 403
    assert client.post(path, headers={"X-CSRFToken": "é"}).status_code == 403
    assert client.post(path, data={"csrf_token": token["X-CSRFToken"]}).status_code == 403
    for elsewhere in (
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "null"},
    ):
        assert client.post(path, headers={**token, **elsewhere}).status_code == 403
    for here in ({}, {"Origin": "http://localhost"}):
        answer = client.post(path, headers={**token, **here, "X-Requested-With": "XMLHttpRequest"})
        assert answer.status_code == 503  # let through; there is no Redis
        assert "does not answer" in answer.json["error"]


def test_the_token_is_another_in_each_process(client):
    assert token_of(client) == token_of(client)
    assert token_of(client) != token_of(create_app(NOWHERE).test_client())


@pytest.mark.parametrize(
    "path",
    ["/", "/models", "/metrics", "/0/view/jobs", "/0/view/workers", "/0/view/job/one", "/0/data/queues.json",
     "/0/data/workers.json", "/0/data/job/one.json", "/0/data/jobs/churn/failed/8/asc/1.json"],
)  # fmt: skip
def test_without_redis_a_page_says_so_and_keeps_the_password(client, path):
    answer = client.get(path)
    assert answer.status_code == 503
    assert "redis://user:***@127.0.0.1:1/0 does not answer" in answer.text
    assert "Traceback" not in answer.text
    assert SECRET not in answer.text
    assert answer.is_json == path.endswith(".json")


@pytest.mark.parametrize("url", [f"redis://:p@{SECRET}@127.0.0.1:1/0", f"redis://127.0.0.1:1/0?password={SECRET}"])
def test_passwords_that_rq_dashboard_shows_are_masked(url):
    assert SECRET in rq_dashboard.web.escape_format_instance_list(url)[0]
    assert SECRET not in create_app(url).test_client().get("/").text


def test_pages_need_nothing_from_elsewhere(client):
    sources = re.findall(r'(?:<script[^>]* src|<link[^>]* href)="([^"]*)"', client.get("/models").text)
    assert sources
    assert all(source.startswith("/static/") for source in sources)
    assert [status(client, source) for source in sources] == [200] * len(sources)


@pytest.mark.parametrize("template", ["job.html", "jobs.html", "queues.html", "workers.html", "scripts/jobs.js"])
def test_every_template_of_rq_dashboard_is_escaped_once(template):
    source = (Path(rq_dashboard.__file__).parent / "templates" / "rq_dashboard" / template).read_text()
    made = secured(source)
    assert "<%=" not in made
    assert ".html() %>" not in made
    added = 4 if template == "job.html" else 0
    assert made.count("<%-") == source.count("<%=") + source.count("<%-") + added
