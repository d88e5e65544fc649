"""Frames: a length in 4 big-endian bytes, then that many bytes of JSON. Each frame is one JSON object."""

from __future__ import annotations

import json
import os
from typing import Any, List, NoReturn, Optional, Union

MAX_FRAME = 256 * 1024 * 1024
"""Bytes of JSON in one frame at most; a longer one is refused on both sides."""

_HEAD = 4
_CHUNK = 1 << 20


class FrameError(ValueError):
    """These bytes are no frame, or this object makes none."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def encode(obj: Any) -> bytes:
    """Return the frame of a JSON-able object.

    Raises:
        FrameError: it holds what JSON does not, is nested too deep, or makes more than `MAX_FRAME` bytes.
    """
    try:
        body = _ENCODER.encode(obj).encode("ascii")
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from error
    if len(body) > MAX_FRAME:
        raise FrameError(f"{len(body)} bytes of JSON are more than the {MAX_FRAME} that a frame may hold")
    return len(body).to_bytes(_HEAD, "big") + body


def _length(head: Union[bytes, bytearray]) -> int:
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME:
        raise FrameError(f"a frame of {length} bytes is longer than {MAX_FRAME}")
    return length


def _decode(body: bytes) -> Any:
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from error


class Decoder:
    """Takes bytes as they come, and gives back the objects that they complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> List[Any]:
        """Return the objects completed by these bytes, in order.

        Raises:
            FrameError: the bytes are no frames; nothing after them can be read.
        """
        buffer = self._buffer
        buffer += data
        found = []
        while len(buffer) >= _HEAD:
            end = _HEAD + _length(buffer[:_HEAD])
            if len(buffer) < end:
                break
            body = bytes(buffer[_HEAD:end])
            del buffer[:end]
            found.append(_decode(body))
        return found


def read(fd: int) -> Optional[Any]:
    """Wait for the next frame and return its object, or None when the other side is gone.

    Raises:
        FrameError: what came is no frame; `FrameError.args` say why.
    """
    head = _exactly(fd, _HEAD)
    body = None if head is None else _exactly(fd, _length(head))
    return None if body is None else _decode(body)


def _exactly(fd: int, size: int) -> Optional[bytes]:
    parts = []
    while size:
        try:
            part = os.read(fd, min(size, _CHUNK))
        except ConnectionResetError:
            # The other side died with bytes of ours unread.
            return None
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write(fd: int, obj: Any) -> None:
    """Send one object, however many writes it takes.

    Raises:
        FrameError: the object makes no frame; nothing was written.
        OSError: the other side is gone.
    """
    write_bytes(fd, encode(obj))


def write_bytes(fd: int, frame: bytes) -> None:
    """Send a frame that `encode` made."""
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(fd, rest) :]
