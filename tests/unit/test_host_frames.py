from __future__ import annotations

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


def test_a_blob_goes_with_its_object_however_the_bytes_are_cut():
    data = b"".join(
        [frames.encode({"a": 1}, b"\x00\xff" * 50), frames.encode({"b": 2}), frames.encode({}, memoryview(b"x"))]
    )

    for size in (1, 3, 7, len(data)):
        decoder = frames.Decoder()
        found = [obj for at in range(0, len(data), size) for obj in decoder.feed(data[at : at + size])]
        assert found == [{"a": 1, "blob": b"\x00\xff" * 50}, {"b": 2}, {"blob": b"x"}]


def test_a_blob_is_sent_as_it_is():
    blob = memoryview(bytes(1000))

    head, sent = frames.pieces({}, blob)

    assert sent is blob
    assert head + bytes(sent) == frames.encode({}, blob)


def test_the_frame_after_a_blob_without_an_object_is_read():
    decoder = frames.Decoder()

    with pytest.raises(frames.FrameError):
        decoder.feed(frames.encode([1], b"blob"))
    assert decoder.feed(frames.encode({"a": 1})) == [{"a": 1}]


def test_a_blob_that_is_too_long_is_refused_by_both_sides(monkeypatch):
    frame = frames.encode({}, bytes(11))
    monkeypatch.setattr(frames, "MAX_FRAME", 10)

    with pytest.raises(frames.FrameError, match="11 bytes"):
        frames.encode({}, bytes(11))
    with pytest.raises(frames.FrameError, match="longer"):
        frames.Decoder().feed(frame[:-5])


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, object(), pytest.param(10**5000, id="digits")])
def test_what_is_no_json_makes_no_frame(bad):
    with pytest.raises(frames.FrameError):
        frames.encode({"value": bad})


def test_an_endless_object_makes_no_frame():
    endless: list = []
    endless.append(endless)

    with pytest.raises(frames.FrameError):
        frames.encode(endless)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 200_000, b"1" * 5000], ids=lambda body: body[:4])
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
    obj, blob = {"text": "y" * 3_000_000}, b"z" * 3_000_000
    decoder = frames.Decoder()
    found: list = []

    with ours, theirs:
        writer = threading.Thread(target=frames.write, args=(ours.fileno(), frames.encode(obj, blob)))
        writer.start()
        while not found:
            found = decoder.feed(theirs.recv(1 << 20))
        writer.join()

    assert found == [{**obj, "blob": blob}]
