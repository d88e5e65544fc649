"""A TCP proxy on loopback, for one server: it cuts, stalls and half-closes what goes through it when it is told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

_CHUNK = 1 << 16


@dataclass(eq=False)
class _Link:
    """A connection: the client's end, the server's, and when the latter may be closed at the earliest."""

    client: socket.socket
    server: socket.socket
    keep_until: float = 0.0

    def hang_up(self) -> None:
        ends = [self.client] if self.keep_until else [self.client, self.server]
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Forwards connections, by two threads for each; a context manager.

    Args:
        target: the server's port on loopback.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._flows, self._closing = threading.Event(), threading.Event()
        self._flows.set()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True, name="proxy")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.flow()
        with suppress(OSError):
            # On macOS, of what only listens, this is an error, and the closing is enough.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join()

    def cut(self, choose: Callable[[], bool] = lambda: True, *, half_open: float = 0) -> None:
        """End connections at the client's side, in the middle of whatever they are at.

        Args:
            choose: asked for each, whether to cut it.
            half_open: seconds for which the server does not learn of it, and goes on with what it was asked.
        """
        with self._lock:
            links = [link for link in self._links if choose()]
        for link in links:
            link.keep_until = time.monotonic() + half_open if half_open else 0.0
            link.hang_up()

    def stall(self) -> None:
        """Forward nothing until `flow`; nobody is told."""
        self._flows.clear()

    def flow(self) -> None:
        """Go on."""
        self._flows.set()

    def _listen(self) -> None:
        served = []
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            served.append(threading.Thread(target=self._serve, args=(_Link(client, server),), daemon=True))
            served[-1].start()
        # One that was accepted while all others were cut.
        self.cut()
        for thread in served:
            thread.join()

    def _serve(self, link: _Link) -> None:
        with self._lock:
            self._links.append(link)
        back = threading.Thread(target=self._pump, args=(link, link.server, link.client), daemon=True)
        back.start()
        self._pump(link, link.client, link.server)
        self._closing.wait(max(0.0, link.keep_until - time.monotonic()))
        link.keep_until = 0.0
        link.hang_up()
        back.join()
        with self._lock:
            self._links.remove(link)
        link.client.close()
        link.server.close()

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                self._flows.wait()
                sink.sendall(data)
        link.hang_up()
