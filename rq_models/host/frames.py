"""Frames: a length in 4 big-endian bytes, then that many bytes of JSON. Each frame is one JSON object.

The length's top bit is set if bytes that are no JSON go with the object: behind the JSON there is their number in 8
big-endian bytes, then they themselves. Whoever reads the frame finds them under the object's key ``blob``.
"""

from __future__ import annotations

import json
import os
from typing import Any, List, Optional, Tuple, Union

MAX_FRAME = 256 * 1024 * 1024
"""Bytes of JSON in one frame at most, and as many in its blob; a longer one is refused on both sides."""

_HEAD, _BLOB_HEAD = 4, 8
_HAS_BLOB = 1 << 31


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


def pieces(obj: Any, blob: Union[bytes, memoryview] = b"") -> List[Union[bytes, memoryview]]:
    """Return the frame of a JSON-able object and a blob, in pieces that are to be sent one after the other.

    Args:
        obj: a dict if there is a blob.
        blob: is one of the pieces as it is; nothing is said of an empty one.

    Raises:
        FrameError: the object holds what JSON does not, is nested too deep, or one of the two has more than `MAX_FRAME`
            bytes.
    """
    body = body_of(obj)
    size = memoryview(blob).nbytes
    for length, what in ((len(body), "bytes of JSON"), (size, "bytes of columns")):
        if length > MAX_FRAME:
            raise FrameError(f"{length} {what} are more than the {MAX_FRAME} that a frame may hold")
    if not size:
        return [len(body).to_bytes(_HEAD, "big") + body]
    return [(len(body) | _HAS_BLOB).to_bytes(_HEAD, "big") + body + size.to_bytes(_BLOB_HEAD, "big"), blob]


def encode(obj: Any, blob: Union[bytes, memoryview] = b"") -> bytes:
    """Return the frame of a JSON-able object and a blob; see `pieces`."""
    return b"".join(pieces(obj, blob))


class Decoder:
    """Takes bytes as they come, and gives back the objects that they complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> List[Any]:
        """Return the objects completed by these bytes, in order.

        Raises:
            FrameError: what came is no frame; whatever came with it is lost.
        """
        self._buffer += data
        found: List[Any] = []
        while True:
            frame = self._take()
            if frame is None:
                return found
            body, blob = frame
            try:
                obj = json.loads(body.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise FrameError(f"not JSON: {error}") from error
            if blob is not None:
                if not isinstance(obj, dict):
                    raise FrameError("a blob without an object")
                obj["blob"] = blob
            found.append(obj)

    def _take(self) -> Optional[Tuple[bytes, Optional[bytes]]]:
        """Return the next frame's JSON and blob, or None if it is not complete."""
        buffer = self._buffer
        if len(buffer) < _HEAD:
            return None
        head = int.from_bytes(buffer[:_HEAD], "big")
        end = _HEAD + _checked(head & ~_HAS_BLOB)
        start = end  # of the blob
        if head & _HAS_BLOB:
            start += _BLOB_HEAD
            if len(buffer) < start:
                return None
            end = start + _checked(int.from_bytes(buffer[start - _BLOB_HEAD : start], "big"))
        if len(buffer) < end:
            return None
        # A slice of the buffer itself would copy twice.
        with memoryview(buffer) as view:
            body = bytes(view[_HEAD : _HEAD + (head & ~_HAS_BLOB)])
            blob = bytes(view[start:end]) if head & _HAS_BLOB else None
        del buffer[:end]
        return body, blob


def _checked(length: int) -> int:
    if length > MAX_FRAME:
        raise FrameError(f"a frame of {length} bytes is longer than {MAX_FRAME}")
    return length


def write(fd: int, frame: Union[bytes, memoryview]) -> None:
    """Send a frame or a piece of one, however many writes it takes; raise OSError when the other side is gone."""
    rest = memoryview(frame).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]
