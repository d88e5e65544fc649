"""The socket and the server.

Werkzeug's threaded server comes with Flask and is enough here: the dashboard has a handful of users, who look at it
through loopback or a proxy. Neither its debugger nor its reloader is ever on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import click
from werkzeug.serving import WSGIRequestHandler, make_server

from rq_models.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask

IDLE_TIMEOUT = 60
"""Seconds after which a connection on which nothing is asked is closed, and its thread ends."""


class _Handler(WSGIRequestHandler):
    timeout = IDLE_TIMEOUT

    def log_request(self, *_: Any) -> None:
        """Say nothing: each open page asks every few seconds."""

    def log_error(self, *_: Any) -> None:
        """Say nothing of clients that went away; what fails inside is logged by the application."""

    def version_string(self) -> str:
        return "rq-models"


def run(app: Flask, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    with _listen(host, port) as listener:
        port = listener.getsockname()[1]
        # A socket of our own, because werkzeug's way with a taken port is to print and exit.
        server = make_server(host, port, app, threaded=True, request_handler=_Handler, fd=listener.fileno())
    try:
        with _interrupted_by_sigterm():
            click.echo(f"dashboard: http://{f'[{host}]' if ':' in host else host}:{port}/")
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _listen(host: str, port: int) -> socket.socket:
    if port not in range(65536):
        raise ConfigurationError(f"the dashboard's port must be 0 to 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as werkzeug chooses it
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"the dashboard's port {port} on {host} is taken; stop what listens there or choose another port"
        else:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            message = f"the dashboard cannot listen on {host} port {port}: {why}"
        raise ConfigurationError(message) from None


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, by which process managers stop a service, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
