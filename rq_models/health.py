"""What a Redis must be for us, and what its refusals mean: one sentence each, that says what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

if TYPE_CHECKING:
    from redis import Redis
    from redis.exceptions import RedisError

OLDEST_REDIS = (6, 2)
UNREACHABLE = (redis_errors.ConnectionError, redis_errors.TimeoutError)
FATAL = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
"""Among the unreachable, by redis-py's classes, yet no attempt will mend it."""
_START = "Redis at "
_FULL = "is full; raise its maxmemory, or let results and failures expire sooner (result_ttl, failure_ttl)"
_UNSAVED = "takes no writes, as it can't save its data; mend its disk, its log says what is wrong"
# An old server puts a script's error behind words of its own; so it is looked for anywhere.
_REFUSALS = {
    "OOM command": _FULL,
    "used memory > 'maxmemory'": _FULL,
    "read only replica": "is a read-only replica; give the address of its primary",
    "Not enough good replicas": "takes no writes without more replicas; connect them, or lower min-replicas-to-write",
    "MISCONF": _UNSAVED,
    "unable to persist on disk": _UNSAVED,
}


def refusal(error: BaseException, where: str) -> str | None:
    """Return the sentence for an error by which a server refuses us until something is changed, else None."""
    text = str(error)
    if text.startswith(_START):
        return text
    if isinstance(error, redis_errors.NoPermissionError):
        return f"{_START}{where} does not let this user do that ({text}); extend its ACL"
    if isinstance(error, FATAL) or "NOAUTH" in text:
        # A client that gives no password is told about the protocol.
        why = "none was given" if text.startswith(("HELLO", "NOAUTH", "Authentication required")) else text
        return f"{_START}{where} refuses the user name or password ({why}); correct redis_url or REDIS_URL"
    return next((f"{_START}{where} {says}" for words, says in _REFUSALS.items() if words in text), None)


def explain(error: RedisError, where: str) -> str:
    """Return what an error of Redis means, in one sentence.

    Args:
        error: whatever redis-py raised.
        where: the address, without its password.
    """
    if said := refusal(error, where):
        return said
    if isinstance(error, redis_errors.BusyLoadingError):
        return f"{_START}{where} is still reading its data; try again in a moment"
    if isinstance(error, UNREACHABLE):
        return f"no Redis answers at {where} ({error}); run 'rq-models redis', or correct redis_url or REDIS_URL"
    return f"{_START}{where} answered: {error}"


def is_about_one_key(error: RedisError) -> bool:
    """Return whether the server is well, and a key holds something else than it should."""
    # A pipeline puts words of its own before it.
    return "WRONGTYPE" in str(error)


def place(connection: Redis) -> str:
    """Return where a connection leads to, without its password."""
    where = connection.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host')}:{where.get('port')}/{where.get('db')}")


def read_info(connection: Redis) -> dict[str, Any]:
    """Return what the server says of itself; nothing, if this user may not ask."""
    try:
        return dict(connection.info())
    except redis_errors.ResponseError:
        return {}


def name_of(info: dict[str, Any]) -> str:
    """Return the server's name and version."""
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version', '?')}"


def too_old(info: dict[str, Any], where: str) -> str | None:
    """Return the sentence for a server that lacks what we need, or None."""
    version = str(info.get("redis_version", ""))
    if not version or tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) >= OLDEST_REDIS:
        return None
    oldest = ".".join(map(str, OLDEST_REDIS))
    return f"{name_of(info)} at {where} is too old; {oldest} or newer is needed"


def eviction(info: dict[str, Any]) -> str | None:
    """Return the sentence for a server that drops jobs when it is full, or would with a limit; or None."""
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    if policy == "noeviction":
        return None
    if limit:
        return f"eviction: {policy} drops jobs at {limit >> 20} MiB; set maxmemory-policy noeviction"
    return f"eviction: {policy} would drop jobs once maxmemory is set; set maxmemory-policy noeviction"


def replica(info: dict[str, Any], where: str) -> str | None:
    """Return the sentence for a replica, or None: what is written there, if it can be, is lost."""
    if info.get("role") != "slave":
        return None
    primary = f"{info.get('master_host')}:{info.get('master_port')}"
    return f"{_START}{where} is a replica; give the address of its primary, {primary}"
