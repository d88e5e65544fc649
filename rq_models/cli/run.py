"""The commands that keep running: ``up``, ``worker``, ``redis`` and ``dashboard``."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time

import click
from redis import exceptions as redis_errors

from rq_models import server
from rq_models.cli.app import App, say
from rq_models.errors import ConfigurationError
from rq_models.pool import Child, Pool
from rq_models.registry import read_models

DASHBOARD_PORT = 9181
_REDIS_PATIENCE = 10.0
_POLL = 0.1
_PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--no-dashboard", is_flag=True, help="Leave the dashboard out.")
@click.option("--port", default=DASHBOARD_PORT, show_default=True, type=_PORT, help="The dashboard's.")
@click.pass_obj
def up(app: App, no_dashboard: bool, port: int) -> None:
    """Run all of it here, until Ctrl-C.

    Redis, if none answers yet, the workers of each model, and the dashboard.
    """
    app.announce()
    models = _processes(app, None, None)
    with_dashboard = not no_dashboard and importlib.util.find_spec("rq_dashboard") is not None
    if with_dashboard and _answers(port):
        raise click.ClickException(f"port {port} for the dashboard is taken; choose another with --port")
    if not (with_dashboard or no_dashboard):
        say("no dashboard, it is not installed; run: pip install 'rq-models[dashboard]'")
    own_server = server.find(app.settings) is not None
    say(f"{'starting' if own_server else 'using the'} Redis at {app.masked_url}")
    if not own_server:
        _await_redis(app)
    _supervise(app, models, own_server=own_server, port=port if with_dashboard else None)


@click.command()
@click.argument("model", required=False)
@click.option("-n", "count", type=click.IntRange(min=1), help="Processes for each model; else 'workers' in its table.")
@click.pass_obj
def worker(app: App, model: str | None, count: int | None) -> None:
    """Serve MODEL, or every model.

    MODEL alone is served in this process, several workers in processes of their own.

    The first SIGTERM or Ctrl-C lets the prediction in hand finish; a second one, a second later, stops it.
    """
    models = _processes(app, model, count)
    if model is not None and count in (None, 1):
        from rq_models.worker import run_worker  # noqa: PLC0415 - RQ's worker takes 0.1 s to import

        _await_redis(app)
        sys.exit(run_worker(app.settings, model))
    app.announce()
    _await_redis(app)
    _supervise(app, models)


@click.command()
@click.pass_obj
def redis(app: App) -> None:
    """Serve the configured address by a Valkey.

    The address must be a loopback one; the data is kept in .rq-models/ beside the configuration.
    """
    app.announce()
    if program := server.find(app.settings):
        say(f"serving {app.masked_url}; Ctrl-C stops it")
        server.serve(app.settings, program)
    # Leaving would end everything that a process manager started beside this.
    say(f"a Redis answers at {app.masked_url} already and is used as it is; waiting for Ctrl-C")
    stops = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    signal.sigwait(stops)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Any other needs a user name and a password.")
@click.option("--port", default=DASHBOARD_PORT, show_default=True, type=_PORT)
@click.option("--username", envvar="RQ_MODELS_DASHBOARD_USERNAME", help="Also RQ_MODELS_DASHBOARD_USERNAME.")
@click.option("--password", envvar="RQ_MODELS_DASHBOARD_PASSWORD", help="Better by RQ_MODELS_DASHBOARD_PASSWORD.")
@click.pass_obj
def dashboard(app: App, host: str, port: int, username: str | None, password: str | None) -> None:
    """Serve queues, jobs and models as web pages."""
    from rq_models.dashboard import serve  # noqa: PLC0415 - an extra

    serve(app.redis_url, host=host, port=port, username=username, password=password)


def _processes(app: App, model: str | None, count: int | None) -> list[str]:
    """Return the model of each process to start."""
    settings = app.settings
    if not settings.models:
        raise ConfigurationError(f"{settings.files[0]}: no models; add a table [models.<name>]")
    found = settings.models if model is None else {model: settings.model(model)}
    return [name for name in sorted(found) for _ in range(count or found[name].workers)]


def _command(*arguments: str) -> list[str]:
    """Return the command line that runs our own command in this interpreter."""
    # -P: the folder it is started in holds the models, and none of its modules may take the place of ours.
    return [sys.executable, "-P", "-m", "rq_models", *arguments]


def _supervise(app: App, models: list[str], *, own_server: bool = False, port: int | None = None) -> None:
    """Run the workers, and beside them the server and the dashboard on this port, until a stop is asked for."""
    settings = app.settings
    # Not in their command lines: the address may hold a password, and everybody on the machine reads command lines.
    environ = {"REDIS_URL": settings.redis_url, "RQ_MODELS_CONFIG": str(settings.files[0].parent)}
    with Pool({**os.environ, **environ}, say) as pool:
        # It is stopped last: a worker asked to stop still writes its last result.
        if own_server:
            pool.start("redis", _command("redis"), last=True)
            # Not by patience: reading much data takes as long as it takes, and its death is noticed.
            if not pool.wait(lambda: _pings(app)):
                return
        workers = [pool.start(model, _command("worker", model), reloads=True) for model in models]
        if port:
            pool.start("dashboard", _command("dashboard", "--port", str(port)))
        if pool.wait(lambda: _all_serve(app, workers) and (port is None or _answers(port))):
            say(f"ready: {', '.join(sorted(set(models)))}")
            if port:
                say(f"dashboard: http://127.0.0.1:{port}")
            pool.keep()


def _pings(app: App) -> bool:
    """Return whether Redis answers; it may refuse us, which raises."""
    try:
        return bool(app.connection.ping())
    except (redis_errors.AuthenticationError, redis_errors.AuthorizationError):
        raise
    except (redis_errors.ConnectionError, redis_errors.TimeoutError):
        return False


def _await_redis(app: App) -> None:
    """Wait for a server that is starting beside us, as `honcho start` and containers do; not for long."""
    if _pings(app):
        return
    say(f"waiting for Redis at {app.masked_url}")
    deadline = time.monotonic() + _REDIS_PATIENCE
    while not _pings(app):
        if time.monotonic() > deadline:
            app.connection.ping()
        time.sleep(_POLL)


def _all_serve(app: App, workers: list[Child]) -> bool:
    here = socket.gethostname()
    statuses = read_models(app.connection, app.settings.models)
    return {child.process.pid for child in workers} <= {
        one.pid for status in statuses for one in status.serving if one.host == here
    }


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1)
        return trial.connect_ex(("127.0.0.1", port)) == 0
