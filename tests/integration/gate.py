"""A gate between clients and a server: it stops what passes at a chosen step, so that a test can cut there."""

from __future__ import annotations

import hashlib
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

from rq_models.ledger import _script

# What an idle worker waits with, in one packet with its take: the steps of scoring runs are taken by the same script.
TAKE = b"BLMOVE"
FINISH = hashlib.sha1(_script("finish.lua").encode(), usedforsecurity=False).hexdigest().encode()
ENQUEUE = b"-- Enqueue jobs"
RENEW = b'{"lease": "'
_CHUNK = 1 << 16


class Step:
    """A command, known by some of its bytes, at which one connection is stopped.

    Attributes:
        reached: is set when the command has come; before the server has it, or before the client has its answer.
    """

    def __init__(self, words: bytes, *, asked: bool) -> None:
        self.words = words
        self.asked = asked
        self.reached = threading.Event()


class Gate:
    """Forwards connections to a port of this machine, each by a thread; a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._steps: list[Step] = []
        self._open = True
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    @property
    def passing(self) -> int:
        """How many connections there are."""
        return len(self._pairs)

    def stop_before(self, words: bytes) -> Step:
        """Let the next command with these bytes in it not reach the server."""
        return self._stop(Step(words, asked=False))

    def stop_after(self, words: bytes) -> Step:
        """Let the next command with these bytes in it reach the server, and nothing come back on that connection."""
        return self._stop(Step(words, asked=True))

    def _stop(self, step: Step) -> Step:
        with self._lock:
            self._steps.append(step)
        return step

    def shut(self) -> None:
        """Cut all connections, and whatever comes from now on."""
        with self._lock:
            self._open = False
        self.cut()

    def open(self) -> None:
        """Let connections through again."""
        self._open = True

    def cut(self) -> None:
        """End all connections at both sides, and forget the steps."""
        with self._lock:
            pairs, self._pairs, self._steps = self._pairs, set(), []
        for pair in pairs:
            self._end(*pair)

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                # No farewell: what is not read yet is lost.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._reach() if self._open else None
            if server is None:
                self._end(client)
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                # It may have been shut while this one was being made.
                if self._open:
                    self._pairs.add((client, server))
                else:
                    self._end(client, server)
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _reach(self) -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            return None

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        step: Step | None = None
        before = b""
        ends = [client, server]
        try:
            while True:
                for end in select.select(ends, [], [])[0]:
                    data = end.recv(_CHUNK)
                    if not data:
                        return
                    if end is client:
                        step = step or self._reached(before + data)
                        before = data[-100:]
                        if step is None or step.asked:
                            server.sendall(data)
                        if step is not None:
                            step.reached.set()
                    elif step is None:
                        client.sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._pairs.discard((client, server))
            self._end(client, server)
            client.close()
            server.close()

    def _reached(self, data: bytes) -> Step | None:
        with self._lock:
            for step in self._steps:
                if step.words in data:
                    self._steps.remove(step)
                    return step
        return None
