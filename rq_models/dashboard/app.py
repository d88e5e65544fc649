"""The Flask application: rq-dashboard's views and templates, made safe, and what was added to them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rq_dashboard
from flask import Flask, Response, jsonify, render_template, request, url_for
from jinja2 import DictLoader
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer

from rq_models.dashboard import metrics
from rq_models.dashboard.guard import Guard
from rq_models.dashboard.records import StoredJob, StoredWorker, page_of_jobs, read_job
from rq_models.registry import count_queued, read_models
from rq_models.settings import check_url, mask_url

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

DEFAULT_HOST = "127.0.0.1"
_PACKAGE = Path(rq_dashboard.__file__).parent
_METADATA = "<p><strong>Metadata</strong>"
_OURS = """
<% if (d.error) { %><p><strong>Error</strong>:<br><%- d.error.kind %>: <%- d.error.message %></p><% } %>
<p><strong>Model version</strong>:<br><%- d.model_version %></p>
<p><strong>Attempts</strong>:<br><%- d.attempts %></p>
"""


def create_app(
    redis_url: str, host: str = DEFAULT_HOST, username: str | None = None, password: str | None = None
) -> Flask:
    """Return the dashboard as a WSGI application.

    Args:
        redis_url: the server to show; its password is on no page and in no error.
        host: the address that the application will be bound to. On any that is not loopback, user name and password
            are required.
        username: asked for by HTTP basic authentication together with `password`; both or neither.
        password: see `username`.

    One process must serve all requests: the token that its buttons send is made here and differs between processes.

    Raises:
        ConfigurationError: user name or password is missing, or the Redis address is none.
    """
    guard = Guard(host, username, password)
    check_url(redis_url, "the dashboard's Redis address")
    app = Flask(__name__, static_folder=_PACKAGE / "static")
    # One client with a pool is safe for all threads.
    redis = Redis.from_url(redis_url, socket_connect_timeout=3, socket_timeout=10)
    app.redis_conn = redis  # type: ignore[attr-defined] # where rq-dashboard's views look for it
    masked = mask_url(redis_url)
    app.config["RQ_DASHBOARD_REDIS_URL"] = (masked,)  # its only use is to be shown
    app.jinja_env.autoescape = True  # Flask leaves out templates named ``.js``, which are parts of pages here
    views = _load_views()
    app.before_request(guard.check)
    app.after_request(guard.seal)
    app.context_processor(
        lambda: {
            "csrf_token": guard.token,
            "poll_interval": 2500,  # ms
            "rq_url_prefix": url_for("rq_dashboard.queues_overview"),
            "current_instance": 0,
            "instance_list": [masked],
            "rq_version": views.rq_version,
            "rq_dashboard_version": views.rq_dashboard_version,
        }
    )
    app.register_blueprint(views.blueprint)
    app.view_functions["rq_dashboard.job_info"] = lambda job_id, **_: jsonify(read_job(redis, job_id))
    app.add_url_rule("/models", "models", lambda: _models(redis))
    app.add_url_rule("/metrics", "metrics", lambda: Response(metrics.render(redis), content_type=metrics.CONTENT_TYPE))
    said = f"Redis at {masked} does not answer as it should"
    app.register_error_handler(RedisError, lambda error: _sentence(503, f"{said} ({error})"))
    app.register_error_handler(NoSuchJobError, lambda _: _sentence(404, "There is no such job; it may have expired"))
    app.register_error_handler(InvalidJobOperation, lambda error: _sentence(409, str(error) or "Not possible now"))
    return app


def _load_views() -> Any:
    """Return a copy of rq-dashboard's module of views that reads through our classes.

    Its views look these names up in their module. The copy is ours alone: whatever else imports rq_dashboard in this
    process keeps the module as released.
    """
    spec: Any = importlib.util.find_spec("rq_dashboard.web")
    views: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(views)
    views.config.serializer = JSONSerializer
    views.Job, views.Worker = StoredJob, StoredWorker
    views.requeue_job = lambda job_id, connection: StoredJob.fetch(job_id, connection=connection).requeue()
    views.get_queue_registry_jobs_count = page_of_jobs
    views.serialize_current_job = lambda job: job or "idle"
    views.RedisConnectionError = ()  # caught by no view: our handler answers, and not with a 200
    # The one that puts a new connection on the application at each request.
    views.blueprint.before_request_funcs.clear()
    folder = _PACKAGE / "templates"
    files = [path for path in folder.rglob("*") if path.is_file()]
    views.blueprint.jinja_loader = DictLoader(
        {path.relative_to(folder).as_posix(): secured(path.read_text("utf-8")) for path in files}
    )
    return views


def secured(source: str) -> str:
    """Return a template of rq-dashboard with all its text escaped, and our rows on the page of a job."""
    # Underscore's <%= inserts as it is, <%- escapes. Where 0.9.0 escapes by itself, once is enough.
    source = re.sub(r"<%=\s*\$\('<div/>'\)\.text\((.+?)\)\.html\(\)\s*%>", r"<%- \1 %>", source)
    source = source.replace("<%=", "<%-").replace(_METADATA, _OURS + _METADATA)
    # A queue's name in quotes inside a script; it comes from the URL.
    return source.replace("'{{ queue.name }}'", "{{ queue.name|tojson }}")


def _models(connection: Redis) -> str:
    """Show the models that workers have published."""
    rows = []
    for status in read_models(connection):
        queue = Queue(status.name, connection=connection)
        rows.append((status, *count_queued(connection, status.name), connection.zcard(queue.failed_job_registry.key)))
    return render_template("models.html", rows=rows, active_tab="models")


def _sentence(status: int, message: str) -> ResponseReturnValue:
    """Answer with a sentence, as JSON where a script asks."""
    if request.headers.get("X-Requested-With") or request.path.endswith(".json"):
        return jsonify(error=message), status
    return render_template("error.html", message=message), status
