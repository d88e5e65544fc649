"""The socket and the server.

Werkzeug's threaded server comes with Flask and is enough here: the dashboard has a handful of users, who look at it
through loopback or a proxy. Neither its debugger nor its reloader is ever on.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import Any

import click
from werkzeug.serving import WSGIRequestHandler, make_server

from rq_models.dashboard.app import DEFAULT_HOST, create_app
from rq_models.errors import ConfigurationError


class _Handler(WSGIRequestHandler):
    timeout = 60
    """Seconds after which a connection on which nothing is asked is closed, and its thread ends."""

    def log(self, *_: Any) -> None:
        """Say nothing: each open page asks every few seconds, and what fails inside is logged by the application."""


def serve(
    redis_url: str, host: str = DEFAULT_HOST, port: int = 9181, username: str | None = None, password: str | None = None
) -> None:
    """Serve the dashboard until Ctrl-C or SIGTERM, in the main thread; prints its address once it listens.

    Port 0 takes any free one.

    Raises:
        ConfigurationError: as `create_app`, or the address cannot be listened on.
    """
    app = create_app(redis_url, host, username, password)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as werkzeug chooses it
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigurationError(f"the dashboard cannot listen on {host} port {port}: {error.strerror}") from None
    with listener:
        port = listener.getsockname()[1]
        # A socket of our own, because werkzeug's way with a taken port is to print and exit.
        server = make_server(host, port, app, threaded=True, request_handler=_Handler, fd=listener.fileno())
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        click.echo(f"dashboard: http://{f'[{host}]' if ':' in host else host}:{port}/")
        server.serve_forever()
