"""A connection on which to ask and to hear the answer are two steps, and a script in the server asked that way.

What lies between the two runs beside the server's work; and several questions can travel together.
"""

from __future__ import annotations

import hashlib
import select
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from socket import socket

    from redis import Redis


def exchange(client: Redis, *commands: Sequence[Any]) -> list[Any]:
    """Send commands together on one of the client's connections, and return their answers.

    As a pipeline of redis-py's does, which looks at each argument twice. Nothing is asked again by itself.

    Raises:
        RedisError: the first command's that has one, once all are answered; or the server is away.
    """
    pool = client.connection_pool
    connection = pool.get_connection()
    answers: list[Any] = []
    try:
        connection.send_packed_command([_packed(commands)], check_health=False)
        for _ in commands:
            try:
                answers.append(connection.read_response())
            except ResponseError as error:
                answers.append(error)
    except BaseException:
        # Whoever has it next must not take what is still to come for the answer to his own.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)
    for answer in answers:
        if isinstance(answer, ResponseError):
            raise answer
    return answers


class Line:
    """One connection of a client's pool, kept. Nothing is ever asked again by itself: what got no answer may be done.

    Args:
        client: of the server.
    """

    def __init__(self, client: Redis) -> None:
        self.client = client
        self._connection: Any = None
        self._number = 0
        self.expected = 0
        """Answers that are to come."""

    def ask(self, *commands: tuple[Any, ...]) -> None:
        """Send these commands; don't wait for their answers.

        Raises:
            RedisError: the server is away.
        """
        if self.expected or self._is_cut:
            # Whoever asked the last time did not stay for the answers; or the server has hung up since.
            self.close()
        packed = _packed(commands)
        try:
            if self._connection is None:
                self._connection = self.client.connection_pool.get_connection()
                self._connection.send_command("CLIENT", "ID")
                # A server that allows no such question lets nobody be unblocked either.
                with suppress(ResponseError):
                    self._number = self._connection.read_response()
            self.expected = len(commands)
            self._connection.send_packed_command([packed], check_health=False)
        except BaseException:
            self.close()
            raise

    @property
    def _is_cut(self) -> bool:
        """Whether the connection has ended while nothing was asked: then there is something to read, its end."""
        sock = self._connection and self._connection._sock  # noqa: SLF001 - as below
        return sock is not None and _is_readable(sock, 0)

    def wait(self, seconds: float) -> bool:
        """Return whether an answer has begun to come within that time; only this wait may be interrupted."""
        return _is_readable(self._connection._sock, seconds)  # noqa: SLF001 - it has no public name

    def answers(self, seconds: float) -> bool:
        """Return whether an answer has begun to come within that time, or has come with the one before.

        Raises:
            RedisError: the server is away, or has hung up.
        """
        try:
            return bool(self._connection.can_read(timeout=seconds))
        except BaseException:
            self.close()
            raise

    def unblock(self) -> None:
        """Let a command that blocks end at once; where the server does not allow that, it ends in its own time."""
        with suppress(ResponseError):
            self.client.execute_command("CLIENT", "UNBLOCK", self._number)

    def answer(self) -> Any:
        """Wait for the next answer and return it.

        Raises:
            RedisError: the command's own, or the server is away: then nobody knows whether it was carried out.
        """
        self.expected -= 1
        try:
            return self._connection.read_response()
        except ResponseError:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connection; `ask` makes another."""
        connection, self._connection, self.expected = self._connection, None, 0
        if connection is not None:
            connection.disconnect()
            self.client.connection_pool.release(connection)


def _packed(commands: Iterable[Sequence[Any]]) -> bytes:
    # redis-py's own way around this function takes longer than all the rest.
    return b"".join(pack_command(tuple(command)) for command in commands)


def _is_readable(sock: socket, seconds: float) -> bool:
    # Not `select`, which knows no descriptor above 1023: a web server may have that many connections.
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Script(Line):
    """A script in the server, on a connection of its own.

    Args:
        client: of the server.
        source: in Lua.
    """

    def __init__(self, client: Redis, source: str) -> None:
        super().__init__(client)
        self._source = source
        self._sha = hashlib.sha1(source.encode()).hexdigest()  # noqa: S324 - the server's own name for it
        self._arguments: tuple[Any, ...] = ()

    def command(self, keys: Sequence[str], args: Sequence[Any]) -> tuple[Any, ...]:
        """Return what runs the script; any line may send it, and `heard` is given that line's `answer`."""
        self._arguments = (len(keys), *keys, *args)
        return ("EVALSHA", self._sha, *self._arguments)

    def call(self, keys: Sequence[str], args: Sequence[Any], *, after: Sequence[tuple[Any, ...]] = ()) -> None:
        """Have the script run, once these other commands are through; see `result`."""
        self.ask(*after, self.command(keys, args))

    def result(self) -> Any:
        """Wait for what the script returns, and return it; raise what `answer` does."""
        while self.expected > 1:
            # If it is an error, the script will have met the same.
            with suppress(ResponseError):
                self.answer()
        return self.heard(self.answer)

    def heard(self, answer: Callable[[], Any]) -> Any:
        """Return what the script returns, by way of its answer."""
        try:
            return answer()
        except NoScriptError:
            # A server that was restarted has forgotten it.
            self.ask(("EVAL", self._source, *self._arguments))
            return self.answer()
