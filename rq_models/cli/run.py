"""The commands that keep running: ``up``, ``worker``, ``redis`` and ``dashboard``."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import click
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from rq_models import server
from rq_models.cli.app import App, say
from rq_models.cli.outcome import ExitCode
from rq_models.errors import ConfigurationError
from rq_models.pool import Child, Pool, rq_models_command
from rq_models.registry import read_models

if TYPE_CHECKING:
    from rq_models.settings import Settings

DASHBOARD_PORT = 9181
_REDIS_PATIENCE = 10.0
_POLL = 0.1
_NO_DASHBOARD = "is not installed; run: pip install 'rq-models[dashboard]'"
_PORT = click.IntRange(1, 65535)
# What a child that ends like this would meet again at once.
_FINAL = frozenset({ExitCode.USAGE, ExitCode.CONFIGURATION})


@click.command()
@click.option("--no-dashboard", is_flag=True, help="Leave the dashboard out.")
@click.option("--port", default=DASHBOARD_PORT, show_default=True, type=_PORT, help="The dashboard's.")
@click.pass_obj
def up(app: App, no_dashboard: bool, port: int) -> None:
    """Run all of it here, until Ctrl-C.

    Redis, if none answers yet, the workers of each model, and the dashboard.
    """
    settings = app.settings
    app.announce()
    workers = _workers(settings, None, None)
    with_dashboard = not no_dashboard and _dashboard_installed()
    if with_dashboard:
        _check_port_is_free(port)
    elif not no_dashboard:
        say(f"no dashboard, it {_NO_DASHBOARD}")
    own_server = server.to_be_started(settings)
    say(f"{'starting' if own_server else 'using the'} Redis at {settings.masked_url}")
    if not own_server:
        _await_redis(app)
    with Pool(_environ(settings), prefix=True, patient=False, say=say) as pool:
        # Before the server, which they need to the end: a worker asked to stop still writes its last result.
        if own_server:
            pool.start(Child("redis", rq_models_command("redis"), essential=True, last=True))
            # Not by patience: reading much data takes as long as it takes, and its death is noticed.
            pool.wait(lambda: server.probe(settings.redis_url) == "redis")
        for child in workers:
            pool.start(child)
        if with_dashboard:
            pool.start(Child("dashboard", rq_models_command("dashboard", "--port", str(port)), essential=True))
        names = [child.name for child in workers]
        if pool.wait(lambda: _all_serve(app, names, pool) and (not with_dashboard or _answers(port))):
            pool.settle()
            say(f"ready: {', '.join(sorted(settings.models))}")
            if with_dashboard:
                say(f"dashboard: http://127.0.0.1:{port}")
            pool.wait()
    if pool.status:
        raise click.exceptions.Exit(pool.status)


@click.command()
@click.argument("model", required=False)
@click.option("-n", "count", type=click.IntRange(min=1), help="Processes for each model; else 'workers' in its table.")
@click.pass_obj
def worker(app: App, model: str | None, count: int | None) -> None:
    """Serve MODEL, or every model.

    MODEL alone is served in this process, several workers in processes of their own.

    The first SIGTERM or Ctrl-C lets the prediction in hand finish; a second one, a second later, stops it.
    """
    settings = app.settings
    if model is not None and count in (None, 1):
        from rq_models.worker import run_worker  # noqa: PLC0415 - RQ's worker takes 0.1 s to import

        settings.model(model)
        _await_redis(app)
        raise click.exceptions.Exit(run_worker(settings, model))
    app.announce()
    children = _workers(settings, model, count)
    _await_redis(app)
    with Pool(_environ(settings), prefix=False, patient=True, say=say) as pool:
        for child in children:
            pool.start(child)
        pool.wait()
    if pool.status:
        raise click.exceptions.Exit(pool.status)


@click.command()
@click.pass_obj
def redis(app: App) -> None:
    """Serve the configured address by a Valkey.

    The address must be a loopback one; the data is kept in .rq-models/ beside the configuration.
    """
    settings = app.settings
    app.announce()
    if server.to_be_started(settings):
        say(f"serving {settings.masked_url}; Ctrl-C stops it")
        server.serve(settings)
    # Leaving would end everything that a process manager started beside this.
    say(f"a Redis answers at {settings.masked_url} already and is used as it is; waiting for Ctrl-C")
    signal.sigwait(_block(signal.SIGINT, signal.SIGTERM))


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Any other needs a user name and a password.")
@click.option("--port", default=DASHBOARD_PORT, show_default=True, type=_PORT)
@click.option("--username", envvar="RQ_MODELS_DASHBOARD_USERNAME", help="Also RQ_MODELS_DASHBOARD_USERNAME.")
@click.option("--password", envvar="RQ_MODELS_DASHBOARD_PASSWORD", help="Better by RQ_MODELS_DASHBOARD_PASSWORD.")
@click.pass_obj
def dashboard(app: App, host: str, port: int, username: str | None, password: str | None) -> None:
    """Serve queues, jobs and models as web pages."""
    if not _dashboard_installed():
        raise ConfigurationError(f"the dashboard {_NO_DASHBOARD}")
    from rq_models.dashboard import serve  # noqa: PLC0415 - an extra

    if host == "127.0.0.1":
        _check_port_is_free(port)
    serve(app.redis_url, host=host, port=port, username=username, password=password)


def _await_redis(app: App) -> None:
    """Wait for a server that is starting beside us, as `honcho start` and containers do; not for long."""
    deadline = None
    while True:
        try:
            app.connection.ping()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisConnectionError, RedisTimeoutError):
            if deadline is None:
                say(f"waiting for Redis at {app.masked_url}")
                deadline = time.monotonic() + _REDIS_PATIENCE
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL)
        else:
            return


def _workers(settings: Settings, model: str | None, count: int | None) -> list[Child]:
    if not settings.models:
        raise ConfigurationError(f"{settings.files[0]}: no models; add a table [models.<name>]")
    return [
        Child(f"{name}.{number + 1}", rq_models_command("worker", name), final=_FINAL)
        for name in ([model] if model is not None else sorted(settings.models))
        for number in range(count or settings.model(name).workers)
    ]


def _environ(settings: Settings) -> dict[str, str]:
    """Return the environment by which our own commands read these same settings.

    Not their command lines: the address may hold a password, and everybody on the machine reads command lines.
    """
    return {
        **os.environ,
        "REDIS_URL": settings.redis_url,
        "RQ_MODELS_CONFIG": str(settings.files[0].parent),
        "PYTHONUNBUFFERED": "1",
    }


def _all_serve(app: App, names: list[str], pool: Pool) -> bool:
    running = pool.pids(*names)
    here = socket.gethostname()
    statuses = read_models(app.connection, app.settings.models)
    serving = {one.pid for status in statuses for one in status.serving if one.host == here}
    return len(running) == len(names) and running <= serving


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _check_port_is_free(port: int) -> None:
    if _answers(port):
        raise click.ClickException(f"port {port} for the dashboard is taken; choose another with --port")


def _dashboard_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("rq_dashboard", "six"))


def _block(*signals: signal.Signals) -> tuple[signal.Signals, ...]:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals
