"""Records of a text: where they begin and end. A newline between quotes ends no record of a CSV."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING, cast

from rq_models.scoring.files import BadFile

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 1 << 26
"""Bytes of one record; a quote that is opened and never closed would else take the rest of the file into memory."""
_SCANNED = 1 << 16
_LARGEST = 1 << 20
"""Bytes that are looked through at a time."""
# As Arrow reads CSV: a quote means something at the beginning of a field only. No group may capture in these:
# Python's `re` loses count of those inside of possessive repeats.
_QUOTED = rb'(?<![^,\r\n])"[^"]*+(?:""[^"]*+)*+"'
_LITERAL = rb'(?<=[^,\r\n])"'
_OUTSIDE = re.compile(rb'(?:[^"]*+(?:' + _QUOTED + b"|" + _LITERAL + rb"))*+")
_TOKEN = re.compile(rb'[^"]+|' + _QUOTED + b"|" + _LITERAL + rb'|(?s:".*)')
_FIELDS = rb'(?:[^"\r\n]|' + _QUOTED + b"|" + _LITERAL + rb")++"
RECORD = re.compile(_FIELDS + rb'(?:\r\n|[\r\n]|\Z|(?s:".*))|(?s:".*)')
_WINDOW = 4096
"""Bytes at the end of a block in which its last whole record is looked for first."""


def blocks(  # noqa: PLR0913 - a file, a range and a size
    address: str, file: IO[bytes], start: int, end: int, size: int, *, quoted: bool
) -> Iterator[bytes]:
    """Read whole records, about `size` bytes at a time; only a record without end comes as a block of its own."""
    file.seek(start)
    rest = b""
    while start < end:
        # Twice as much each time, else a long record would be looked through again and again.
        data = file.read(min(max(size, len(rest)), end - start))
        if not data:
            raise BadFile(address, "it has become shorter while it was read")
        start += len(data)
        rest += data
        cut = boundary(rest) if quoted else rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
        elif len(rest) > _LONGEST:
            raise BadFile(address, f"a row that begins at byte {start - len(rest)} has no end within {len(rest)} bytes")
    if rest:
        yield rest


def boundary(data: bytes) -> int:
    """Return where the last whole record of a CSV's text ends, which begins with a record; 0 if there is none."""
    if b'"' not in data:
        return data.rfind(b"\n") + 1
    # At C speed to near the end, token by token from there.
    near = _outside(data, max(len(data) - _WINDOW, 0))
    # Between the two quotes of a doubled one it is not outside.
    for start in (near, 0) if data[near : near + 1] != b'"' or data[near - 1 : near] != b'"' else (0,):
        cut = 0
        for token in _TOKEN.finditer(data, start):
            if data[token.start()] != ord('"'):
                cut = data.rfind(b"\n", *token.span()) + 1 or cut
        if cut:
            return cut
    return 0


def record_ends(address: str, file: IO[bytes], start: int, size: int, wanted: int) -> Iterator[int]:
    """Return where pieces of a CSV end, each of about `wanted` bytes; all of it is read."""
    begun = start
    for block in blocks(address, file, start, size, min(max(wanted // 4, 1), _LARGEST), quoted=True):
        start += len(block)
        if start - begun >= wanted or start == size:
            begun = start
            yield start


def line_ends(address: str, file: IO[bytes], start: int, size: int, wanted: int) -> Iterator[int]:
    """Return where pieces of lines end, each of about `wanted` bytes; only their ends are read."""
    while start < size:
        at = min(start + wanted, size) - 1
        file.seek(at)
        # Not `readline`, which the files of a store have without a limit.
        while (found := (data := file.read(_SCANNED)).find(b"\n")) < 0 and data:
            at += len(data)
            if at - start - wanted > _LONGEST:
                raise BadFile(address, f"a line that begins after byte {start} has no end within {_LONGEST} bytes")
        start = at + found + 1 if data else size
        yield start


def repaired(block: bytes, width: int) -> tuple[bytes, dict[int, tuple[str, str]]]:
    """Replace records of a CSV that are no text, or have no end, by such as have a field too many.

    Args:
        block: whole records, or the last one without its end.
        width: how many fields a record has.

    Returns:
        the block; and of each replaced record, by its number, what is wrong with it and its text.
    """
    # Only the last record of a file can lack its end, and then a quote lacks its fellow.
    if is_text(block) and block.count(b'"') % 2 == 0:
        return block, {}
    records: list[bytes] = []
    damages: dict[int, tuple[str, str]] = {}
    for number, match in enumerate(RECORD.finditer(block)):
        record = match[0]
        message = "" if is_text(record) else "it is not UTF-8"
        if b'"' in record[_outside(record) :]:
            message = "a quote is opened and never closed"
        if message:
            damages[number] = message, record.decode(errors="backslashreplace")
        records.append(b"," * width + b"\n" if message else record)
    return b"".join(records), damages


def is_text(data: bytes) -> bool:
    """Return whether it is UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _outside(data: bytes, end: int | None = None) -> int:
    """Return up to where every quote is closed, looking no further than `end`."""
    return cast("re.Match[bytes]", _OUTSIDE.match(data, 0, len(data) if end is None else end)).end()
