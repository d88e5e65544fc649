"""The Flask application: rq-dashboard's views and templates, made safe, and what was added to them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rq_dashboard
from flask import Flask, abort, current_app, jsonify, render_template, request, url_for
from jinja2 import FileSystemLoader
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from werkzeug.exceptions import HTTPException

from rq_models.dashboard.guard import Guard, page_nonce
from rq_models.dashboard.records import (
    REGISTRIES,
    DashboardJob,
    DashboardQueue,
    DashboardWorker,
    page_of_jobs,
    requeue,
)
from rq_models.registry import read_models
from rq_models.settings import check_url, mask_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask.typing import ResponseReturnValue
    from jinja2 import Environment

POLL_INTERVAL = 2500
"""Milliseconds between two looks of an open page."""
CONNECT_TIMEOUT = 3
SOCKET_TIMEOUT = 10
_PACKAGE = Path(rq_dashboard.__file__).parent
_MAX_PER_PAGE = 1000
_MAX_PAGE = 10**9


class Dashboard(Flask):
    """A Flask application that carries the connection where rq-dashboard's views look for it."""

    redis_conn: Redis

    def select_jinja_autoescape(self, filename: str | None) -> bool:  # noqa: ARG002 - Flask's signature
        """Escape in every template: Flask leaves out those named ``.js``, which are parts of pages here."""
        return True


def build(redis_url: str, guard: Guard) -> Dashboard:
    """Return the application; see `rq_models.dashboard.create_app`."""
    check_url(redis_url, "the dashboard's Redis address")
    app = Dashboard(__name__, static_folder=_PACKAGE / "static")
    # One client with a pool is safe for all threads; rq-dashboard puts a new one on the application at each request.
    app.redis_conn = Redis.from_url(redis_url, socket_connect_timeout=CONNECT_TIMEOUT, socket_timeout=SOCKET_TIMEOUT)
    masked = mask_url(redis_url)
    app.config["RQ_DASHBOARD_REDIS_URL"] = (masked,)  # its only use is to be shown
    views = _load_views()
    app.before_request(guard.check)
    app.before_request(_check_arguments)
    app.after_request(guard.seal)
    app.context_processor(
        lambda: {
            "csp_nonce": page_nonce(),
            "csrf_token": guard.token,
            "poll_interval": POLL_INTERVAL,
            "rq_url_prefix": url_for("rq_dashboard.queues_overview"),
            "current_instance": 0,
            "instance_list": [masked],
            "rq_version": views.rq_version,
            "rq_dashboard_version": views.rq_dashboard_version,
        }
    )
    app.register_blueprint(views.blueprint)
    app.view_functions["rq_dashboard.requeue_all"] = _requeue_all
    app.view_functions["rq_dashboard.jobs_overview"] = _first_queue(app.view_functions["rq_dashboard.jobs_overview"])
    app.add_url_rule("/models", "models", _models)
    _handle_errors(app, masked)
    return app


def _load_views() -> Any:
    """Return a copy of rq-dashboard's module of views that reads through our classes.

    Its views look these names up in their module. The copy is ours alone: whatever else imports rq_dashboard in this
    process keeps the module as released, and each application has its own.
    """
    name = f"{rq_dashboard.__name__}._rq_models"
    spec = importlib.util.spec_from_file_location(name, rq_dashboard.web.__file__)
    if spec is None or spec.loader is None:
        raise ImportError(f"{rq_dashboard.web.__file__} cannot be loaded")
    views: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = views  # where Flask looks up the folder of a blueprint while it is made
    try:
        spec.loader.exec_module(views)
    finally:
        del sys.modules[name]
    views.config.serializer = JSONSerializer
    views.Job, views.Queue, views.Worker = DashboardJob, DashboardQueue, DashboardWorker
    views.requeue_job = requeue
    views.format_job_description = lambda job: job.label
    views.get_queue_registry_jobs_count = lambda *where: _serialized(views, *page_of_jobs(*where))
    views.RedisConnectionError = ()  # caught by no view: our handler answers, and not with a 200
    views.blueprint.before_request_funcs.clear()  # the one that exchanges the application's connection
    views.blueprint.jinja_loader = _SafeTemplates(_PACKAGE / "templates")
    return views


def _serialized(views: Any, total: int, jobs: list[DashboardJob]) -> tuple[int, list[Any]]:
    return total, [views.serialize_job(job) for job in jobs]


class _SafeTemplates(FileSystemLoader):
    """rq-dashboard's templates, in which a job's text can't become markup or script."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, path, up_to_date = super().get_source(environment, template)
        return secured(template, source), path, up_to_date


def secured(name: str, source: str) -> str:
    """Return a template of rq-dashboard with all its text escaped, and the page's nonce on its scripts."""
    # Underscore's <%= inserts as it is, <%- escapes. Where 0.9.0 escapes by itself, once is enough.
    source = re.sub(r"<%=\s*\$\('<div/>'\)\.text\((.+?)\)\.html\(\)\s*%>", r"<%- \1 %>", source)
    source = source.replace("<%=", "<%-")
    # A name in quotes inside a script; it comes from the URL.
    source = re.sub(r"'\{\{ ?([\w.]+) ?\}\}'", r"{{ \1|tojson }}", source) if name.endswith(".js") else source
    if name.endswith("/job.js"):
        # The page of a job would stop refreshing for good at the first answer that fails.
        source = re.sub(r"if \(err\) \{\s*return;", "if (err) { return done && done();", source)
    return re.sub(r"<script(?=[\s>])", '<script nonce="{{ csp_nonce }}"', source)


def _check_arguments() -> None:
    """Answer 404 to addresses that rq-dashboard's views would fail on."""
    arguments = request.view_args or {}
    if arguments.get("instance_number", 0) != 0:
        abort(404)  # there is one server
    if arguments.get("registry_name", "queued") not in ("queued", *REGISTRIES):
        abort(404)
    for name, most in (("page", _MAX_PAGE), ("per_page", _MAX_PER_PAGE)):
        value = str(arguments.get(name, 1))
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(most)) and 1 <= int(value) <= most):
            abort(404)


def _requeue_all(queue_name: str) -> ResponseReturnValue:
    """Put back what can be put back; rq-dashboard stops at the first job that has expired meanwhile."""
    connection = _connection()
    count = 0
    for job_id in FailedJobRegistry(queue_name, connection=connection).get_job_ids(cleanup=False):
        try:
            requeue(job_id, connection)
        except (NoSuchJobError, InvalidJobOperation):
            continue
        count += 1
    return jsonify(status="OK", count=count)


def _first_queue(view: Callable[..., Any]) -> Callable[..., ResponseReturnValue]:
    """Let the tab "Jobs" open on a queue that exists, instead of ``default``."""

    def jobs_overview(queue_name: str | None, **arguments: Any) -> ResponseReturnValue:
        if queue_name is None:
            queue_name = min((queue.name for queue in DashboardQueue.all(connection=_connection())), default=None)
        return view(queue_name=queue_name, **arguments)  # type: ignore[no-any-return]

    return jobs_overview


def _models() -> ResponseReturnValue:
    """Show the models that workers have published."""
    connection = _connection()
    statuses = read_models(connection)
    with connection.pipeline(transaction=False) as pipe:
        for status in statuses:
            pipe.llen(DashboardQueue(status.name, connection=connection).key)
            pipe.zcard(FailedJobRegistry(status.name, connection=connection).key)
        counts = pipe.execute()
    rows = list(zip(statuses, counts[::2], counts[1::2], strict=True))
    return render_template("models.html", rows=rows, active_tab="models")


def _connection() -> Redis:
    return cast("Dashboard", current_app).redis_conn


def _handle_errors(app: Dashboard, masked_url: str) -> None:
    """Answer with a sentence, as JSON where a script asks; the traceback goes to the log only."""

    def answer(status: int, title: str, message: str) -> ResponseReturnValue:
        if request.headers.get("X-Requested-With") or request.method == "POST" or request.path.endswith(".json"):
            return jsonify(error=message), status
        return render_template("error.html", title=title, message=message), status

    def redis_away(error: Exception) -> ResponseReturnValue:
        return answer(503, "Redis does not answer", f"Redis at {masked_url} does not answer ({type(error).__name__}).")

    def redis_refused(error: Exception) -> ResponseReturnValue:
        app.logger.error("Redis at %s refused: %s", masked_url, error)
        return answer(502, "Redis refused", f"Redis at {masked_url} refused a command ({type(error).__name__}).")

    def no_job(_: Exception) -> ResponseReturnValue:
        return answer(404, "No such job", "There is no job of this id; it may have expired or been deleted.")

    def not_now(error: Exception) -> ResponseReturnValue:
        return answer(409, "Not possible", str(error) or "The job's state does not allow this; reload the page.")

    def other(error: HTTPException) -> ResponseReturnValue:
        if error.code is None or error.response is not None:
            return error  # a redirect
        return answer(error.code, error.name, error.description or error.name)

    app.register_error_handler(RedisError, redis_refused)
    app.register_error_handler(RedisConnectionError, redis_away)
    app.register_error_handler(RedisTimeoutError, redis_away)
    app.register_error_handler(NoSuchJobError, no_job)
    app.register_error_handler(InvalidJobOperation, not_now)
    app.register_error_handler(HTTPException, other)
