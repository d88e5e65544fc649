"""Frames: a length in 4 big-endian bytes, then that many bytes of JSON. Each frame is one JSON object."""

from __future__ import annotations

import json
import os
from typing import Any, List

MAX_FRAME = 256 * 1024 * 1024
"""Bytes of JSON in one frame at most; a longer one is refused on both sides."""

_HEAD = 4


class FrameError(ValueError):
    """These bytes are no frame, or this object makes none."""


_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":"))


def body_of(obj: Any) -> bytes:
    """Return the JSON of an object, which no frame may be large enough for.

    Raises:
        FrameError: it holds what JSON does not, or is nested too deep.
    """
    try:
        return _ENCODER.encode(obj).encode("ascii")
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from error


def encode(obj: Any) -> bytes:
    """Return the frame of a JSON-able object.

    Raises:
        FrameError: it holds what JSON does not, is nested too deep, or makes more than `MAX_FRAME` bytes.
    """
    body = body_of(obj)
    if len(body) > MAX_FRAME:
        raise FrameError(f"{len(body)} bytes of JSON are more than the {MAX_FRAME} that a frame may hold")
    return len(body).to_bytes(_HEAD, "big") + body


class Decoder:
    """Takes bytes as they come, and gives back the objects that they complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> List[Any]:
        """Return the objects completed by these bytes, in order.

        Raises:
            FrameError: what came is no frame; whatever came with it is lost.
        """
        buffer = self._buffer
        buffer += data
        found = []
        while len(buffer) >= _HEAD:
            length = int.from_bytes(buffer[:_HEAD], "big")
            if length > MAX_FRAME:
                raise FrameError(f"a frame of {length} bytes is longer than {MAX_FRAME}")
            if len(buffer) < _HEAD + length:
                break
            body = bytes(buffer[_HEAD : _HEAD + length])
            del buffer[: _HEAD + length]
            try:
                found.append(json.loads(body.decode("utf-8")))
            except (ValueError, RecursionError) as error:
                raise FrameError(f"not JSON: {error}") from error
        return found


def write(fd: int, frame: bytes) -> None:
    """Send a frame, however many writes it takes; raise OSError when the other side is gone."""
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(fd, rest) :]
