"""A script in the server, on a connection of its own: to ask and to hear the answer are two steps."""

from __future__ import annotations

import hashlib
import select
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoScriptError, RedisError, ResponseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis import Redis


class Script:
    """A script and its connection; what its user does between `ask` and `answer` runs beside the server's work.

    Nothing is ever asked again by itself: a script whose answer was lost may have run.

    Args:
        client: of the server; one connection of its pool is kept.
        source: in Lua.
    """

    def __init__(self, client: Redis, source: str) -> None:
        self._client = client
        self._connection: Any = None
        self._source = source
        self._sha = hashlib.sha1(source.encode()).hexdigest()  # noqa: S324 - the server's own name for it
        self._number = 0
        self._arguments: tuple[Any, ...] = ()
        self._expected = 0
        """Answers that are to come, the other command's among them."""

    def ask(self, keys: Sequence[str], args: Sequence[Any], *, after: Sequence[Any] = ()) -> None:
        """Run the script, once this other command is through, if there is one; don't wait for it.

        Raises:
            RedisError: the server is away.
        """
        if self._expected:
            # Whoever asked the last time did not stay for the answer.
            self.close()
        if self._connection is None:
            self._connection = self._client.connection_pool.get_connection()
            self._connection.send_command("CLIENT", "ID")
            self._number = self._connection.read_response()
        pack, self._arguments = self._connection.pack_command, (len(keys), *keys, *args)
        packed = [*(pack(*after) if after else ()), *pack("EVALSHA", self._sha, *self._arguments)]
        self._expected = 2 if after else 1
        try:
            self._connection.send_packed_command([b"".join(packed)], check_health=False)
        except RedisError:
            self.close()
            raise

    def wait(self, seconds: float) -> bool:
        """Return whether the answer has begun to come within that time; only this wait may be interrupted."""
        return bool(select.select([self._connection._sock], [], [], seconds)[0])  # noqa: SLF001 - it has no public name

    def unblock(self) -> None:
        """Let the command that the script comes after end at once."""
        self._client.execute_command("CLIENT", "UNBLOCK", self._number)

    def answer(self) -> Any:
        """Wait for what the script returns, and return it.

        Raises:
            RedisError: the script's own, or the server is away: then nobody knows whether it ran.
        """
        read, first, self._expected = self._connection.read_response, self._expected == 2, 0  # noqa: PLR2004 - see ask
        try:
            if first:
                # If it is an error, the script will have met the same.
                with suppress(ResponseError):
                    read()
            try:
                return read()
            except NoScriptError:
                # A server that was restarted has forgotten it.
                self._connection.send_command("EVAL", self._source, *self._arguments)
                return read()
        except ResponseError:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connection; `ask` makes another."""
        connection, self._connection, self._expected = self._connection, None, 0
        if connection is not None:
            connection.disconnect()
            self._client.connection_pool.release(connection)
