"""The dashboard: rq-dashboard for JSON jobs, with its holes closed, and a page of the models.

`create_app` builds the application, `serve` runs it until Ctrl-C or SIGTERM. Both need the extra ``dashboard``.

    records.py   RQ's jobs, queues and workers as a dashboard may read them: nothing is unpickled
    guard.py     who may ask, from where, and what may change state
    app.py       rq-dashboard's views and templates, made safe; the models page; the errors
    server.py    the socket and the server
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rq_models.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection

    from flask import Flask

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 9181


def create_app(
    redis_url: str,
    *,
    username: str | None = None,
    password: str | None = None,
    host: str = DEFAULT_HOST,
    allowed_hosts: Collection[str] = (),
) -> Flask:
    """Return the dashboard as a WSGI application.

    Args:
        redis_url: the server to show; its password is on no page and in no error.
        username: asked for by HTTP basic authentication together with `password`; both or neither.
        password: see `username`.
        host: the address that the application will be bound to. On any that is not loopback, user name and password
            are required.
        allowed_hosts: further names under which browsers reach it, for example that of a proxy in front.

    One process must serve all requests: the token that its buttons send is made here and differs between processes.

    Raises:
        ConfigurationError: the extra is not installed, user name or password is missing, or the Redis address is none.
    """
    _require_extra()
    from rq_models.dashboard.app import build  # noqa: PLC0415 - needs the extra
    from rq_models.dashboard.guard import Guard  # noqa: PLC0415 - likewise

    return build(redis_url, Guard(host, allowed_hosts, username, password))


def serve(  # noqa: PLR0913 - each is an option of the command line
    redis_url: str,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    username: str | None = None,
    password: str | None = None,
    allowed_hosts: Collection[str] = (),
) -> None:
    """Serve the dashboard until Ctrl-C or SIGTERM; prints its address once it listens. Port 0 takes any free one.

    Raises:
        ConfigurationError: as `create_app`, or the address cannot be listened on.
    """
    app = create_app(redis_url, username=username, password=password, host=host, allowed_hosts=allowed_hosts)
    from rq_models.dashboard.server import run  # noqa: PLC0415 - needs the extra

    run(app, host, port)


def _require_extra() -> None:
    try:
        import rq_dashboard  # noqa: F401, PLC0415 - itself imports the rest of the extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the dashboard is not installed (no module {error.name}); run: pip install 'rq-models[dashboard]'"
        ) from None
