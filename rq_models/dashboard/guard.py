"""Who may ask, and what may change state."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from urllib.parse import urlsplit

from flask import Response, request

from rq_models.errors import ConfigurationError

# rq-dashboard has scripts inside its pages, which it compiles into functions, and style attributes.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks each request before any view sees it.

    Raises:
        ConfigurationError: the address can be reached from elsewhere, and user name or password is missing.
    """

    def __init__(self, host: str, username: str | None = None, password: str | None = None) -> None:
        if bool(username) != bool(password):
            raise ConfigurationError("the dashboard needs both a user name and a password, or neither")
        if not is_loopback(host) and not username:
            raise ConfigurationError(
                f"the dashboard shows and deletes jobs: to bind it to {host or 'all addresses'} give a user name and a "
                "password, or bind it to 127.0.0.1"
            )
        self.token = secrets.token_urlsafe(32)
        """What state-changing requests carry. It is only on the dashboard's own pages, which no other site can read."""
        self._credentials = f"{username}:{password}".encode() if username and password else None

    def check(self) -> Response | None:
        """Return the refusal of the current request, or None."""
        if self._credentials is None:
            # A page of another site may have made its own name resolve to this machine, to read with its visitor's
            # browser (DNS rebinding). With a password no name is refused: the browser sends it to no other name.
            if not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
                return _refusal(403, "without a password this dashboard answers under localhost or 127.0.0.1 only")
        elif not self._knows_user(self._credentials):
            response = _refusal(401, "user name and password, please")
            response.headers["WWW-Authenticate"] = 'Basic realm="rq-models", charset="UTF-8"'
            return response
        methods = (request.url_rule.methods if request.url_rule else None) or ()
        if "POST" in methods and request.method not in ("POST", "OPTIONS"):
            return _refusal(405, "this changes state: POST only")
        if request.method == "POST":
            origin = request.headers.get("Origin")
            if origin is not None and origin.partition("://")[2] != request.host:
                return _refusal(403, "requests from other sites may not change anything here")
            if not hmac.compare_digest(request.headers.get("X-CSRFToken", "").encode(), self.token.encode()):
                return _refusal(403, "the page is out of date; reload it")
        return None

    @staticmethod
    def seal(response: Response) -> Response:
        """Add the headers that keep the browser from doing more with a response than it should."""
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if not (request.endpoint or "").endswith("static"):
            response.headers["Cache-Control"] = "no-store"
        return response

    @staticmethod
    def _knows_user(expected: bytes) -> bool:
        given = request.authorization
        if given is None or given.type != "basic":
            return False
        return hmac.compare_digest(f"{given.username}:{given.password}".encode(), expected)


def _refusal(status: int, why: str) -> Response:
    return Response(f"{why}\n", status, mimetype="text/plain")
