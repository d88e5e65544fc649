"""How much memory a group of processes holds."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# Fields of /proc/<pid>/stat, counted from the one behind the name, which may hold blanks and brackets.
_GROUP, _PAGES = 2, 21


def resident(group: int) -> int:
    """Return the bytes that the processes of this group keep in memory; pages that they share count for each."""
    if (_PROC / "self" / "stat").exists():
        pages = sum(_pages(entry, group) for entry in _PROC.iterdir() if entry.name.isdecimal())
        return pages * os.sysconf("SC_PAGE_SIZE")
    # macOS has no /proc, and its ps stands always in the same place.
    table = subprocess.run(["/bin/ps", "-A", "-o", "pgid=,rss="], capture_output=True, text=True, check=False).stdout
    rows = (line.split() for line in table.splitlines())
    return sum(int(kilobytes) for of, kilobytes in rows if int(of) == group) << 10


def _pages(process: Path, group: int) -> int:
    # It may end while it is looked at.
    with suppress(OSError):
        fields = (process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        if int(fields[_GROUP]) == group:
            return int(fields[_PAGES])
    return 0
