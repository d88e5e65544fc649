from __future__ import annotations

import os
import socket
import threading

import pytest

from rq_models.host import frames


def test_an_object_survives_however_its_bytes_are_cut():
    objects = [{"a": [1, 2.5, None, "ü\ud800"]}, {}, {"b": "x" * 1000}]
    data = b"".join(map(frames.encode, objects))

    for size in (1, 3, 7, len(data)):
        decoder = frames.Decoder()
        found = [obj for at in range(0, len(data), size) for obj in decoder.feed(data[at : at + size])]
        assert found == objects


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, object(), pytest.param(10**5000, id="digits")])
def test_what_is_no_json_makes_no_frame(bad):
    with pytest.raises(frames.FrameError):
        frames.encode({"value": bad})


def test_an_endless_object_makes_no_frame():
    endless: list = []
    endless.append(endless)

    with pytest.raises(frames.FrameError):
        frames.encode(endless)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 200_000, b"1" * 5000], ids=lambda body: body[:4]
)
def test_bytes_that_are_no_json_are_refused(body):
    frame = len(body).to_bytes(4, "big") + body

    with pytest.raises(frames.FrameError):
        frames.Decoder().feed(frame)


def test_a_frame_that_is_too_long_is_refused_by_its_head():
    with pytest.raises(frames.FrameError, match="longer"):
        frames.Decoder().feed((frames.MAX_FRAME + 1).to_bytes(4, "big"))


def test_a_frame_that_is_too_long_is_not_sent(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME", 10)

    with pytest.raises(frames.FrameError, match="11 bytes"):
        frames.encode("123456789")


def test_large_frames_cross_a_socket_whose_writes_are_short():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    obj = {"text": "y" * 3_000_000}

    with ours, theirs:
        writer = threading.Thread(target=frames.write, args=(ours.fileno(), obj))
        writer.start()
        found = frames.read(theirs.fileno())
        writer.join()

    assert found == obj


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", b"\x00\x00\x00\x09{"])
def test_the_end_of_the_other_side_is_none_wherever_it_comes(sent):
    reading, writing = os.pipe()
    os.write(writing, sent)
    os.close(writing)

    assert frames.read(reading) is None
    os.close(reading)


def test_a_peer_that_died_with_unread_bytes_is_gone_as_well():
    ours, theirs = socket.socketpair()
    with ours:
        ours.send(b"never read")
        theirs.close()

        assert frames.read(ours.fileno()) is None
