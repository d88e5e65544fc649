"""Who may ask, from where, and what may change state."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import Response, g, request

from rq_models.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection

TOKEN_HEADER = "X-CSRFToken"  # noqa: S105 - a name
_WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_READS = ("GET", "HEAD", "OPTIONS")
# Scripts run only with the nonce of their page. rq-dashboard's row templates (underscore) compile to functions, hence
# 'unsafe-eval'; its templates have style attributes, hence the exception for those.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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

    def __init__(
        self, host: str, allowed_hosts: Collection[str] = (), username: str | None = None, password: str | None = None
    ) -> None:
        if bool(username) != bool(password):
            raise ConfigurationError("the dashboard needs both a user name and a password, or neither")
        if not is_loopback(host) and not username:
            raise ConfigurationError(
                f"the dashboard shows and deletes jobs: to bind it to {host or 'all addresses'} give a user name and a "
                "password, or bind it to 127.0.0.1"
            )
        self.token = secrets.token_urlsafe(32)
        """What state-changing requests carry. It is only on the dashboard's own pages, which no other site can read."""
        self._credentials = (username.encode(), password.encode()) if username and password else None
        # Whoever binds to all addresses can't list the names that lead here. They need no list: a page that was made
        # to resolve to this address (DNS rebinding) has another origin, for which the browser sends no password.
        self._hosts = None if host in _WILDCARDS else {host.lower(), *(name.lower() for name in allowed_hosts)}

    def check(self) -> Response | None:
        """Return the refusal of the current request, or None."""
        if not self._knows_host():
            return _refuse(403, "this dashboard does not answer under that host name")
        if not self._knows_user():
            response = _refuse(401, "user name and password, please")
            response.headers["WWW-Authenticate"] = 'Basic realm="rq-models", charset="UTF-8"'
            return response
        methods = (request.url_rule.methods if request.url_rule else None) or ()
        if "POST" in methods and request.method not in ("POST", "OPTIONS"):
            response = _refuse(405, "this changes state: POST only")
            response.headers["Allow"] = "POST, OPTIONS"
            return response
        if request.method not in _READS:
            if not _same_origin():
                return _refuse(403, "requests from other sites may not change anything here")
            if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self.token.encode()):
                return _refuse(403, "the page is out of date; reload it")
        return None

    def seal(self, response: Response) -> Response:
        """Add the headers that keep the browser from doing more with a response than it should."""
        nonce = g.get("csp_nonce")
        scripts = f"'nonce-{nonce}' 'unsafe-eval'" if nonce else "'none'"
        response.headers["Content-Security-Policy"] = _POLICY.format(scripts=scripts)
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        if request.endpoint not in ("static", "rq_dashboard.static"):
            response.headers["Cache-Control"] = "no-store"
        return response

    def _knows_host(self) -> bool:
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:
            return False
        return self._hosts is None or is_loopback(name) or name in self._hosts

    def _knows_user(self) -> bool:
        if self._credentials is None:
            return True
        given = request.authorization
        if given is None or given.type != "basic":
            return False
        # Both are compared in any case: how long it takes must not tell which of them was wrong.
        name = hmac.compare_digest((given.username or "").encode(), self._credentials[0])
        return hmac.compare_digest((given.password or "").encode(), self._credentials[1]) and name


def page_nonce() -> str:
    """Return the nonce of the scripts on the page that is being rendered."""
    if "csp_nonce" not in g:
        g.csp_nonce = secrets.token_urlsafe(16)
    return str(g.csp_nonce)


def _same_origin() -> bool:
    """Whether what the browser says of the request's origin, if anything, is this very site."""
    source = request.headers.get("Origin") or request.headers.get("Referer")
    try:
        same = source is None or urlsplit(source).netloc.lower() == request.host.lower()
    except ValueError:
        return False
    return same and request.headers.get("Sec-Fetch-Site", "same-origin") == "same-origin"


def _refuse(status: int, why: str) -> Response:
    return Response(f"{why}\n", status, mimetype="text/plain")
