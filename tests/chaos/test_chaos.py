"""Short games of scripts/chaos; what longer ones find is for whoever changes how jobs are moved."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos"


@pytest.mark.timeout(400)
def test_a_minute_of_chaos_loses_no_job():
    game = subprocess.run(
        [SCRIPT, "--minutes", "1", "--seed", "11"], capture_output=True, text=True, timeout=380, check=False
    )

    assert game.returncode == 0, game.stdout + game.stderr
    assert re.search(r"^violations: 0 ", game.stdout, re.MULTILINE)
    # Clients that enqueue nothing, or a monkey that breaks nothing, would prove nothing.
    acknowledged = re.search(r"^jobs: ([\d,]+) acknowledged; \1 ended", game.stdout, re.MULTILINE)
    assert acknowledged
    assert int(acknowledged[1].replace(",", "")) >= 2000
    faults = re.search(r"^faults: (\d+)", game.stdout, re.MULTILINE)
    assert faults
    assert int(faults[1]) >= 10


@pytest.mark.timeout(400)
def test_half_a_minute_of_chaos_changes_no_byte_of_a_file():
    game = subprocess.run(
        [SCRIPT, "--score", "--minutes", "0.5", "--seed", "11"],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )

    assert game.returncode == 0, game.stdout + game.stderr
    assert re.search(r"^violations: 0$", game.stdout, re.MULTILINE)
    # Without rows, failed ones among them, and without faults it would prove nothing.
    runs = re.findall(r"^25,000 in = ([\d,]+) out \+ (\d+) failed in ", game.stdout, re.MULTILINE)
    assert len(runs) == 2
    assert runs[0] == runs[1]
    assert int(runs[0][1]) >= 20
    kills = re.search(r"^faults: \d+, (\d+) of them kills", game.stdout, re.MULTILINE)
    assert kills
    assert int(kills[1]) >= 4
