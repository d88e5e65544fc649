"""Two models whose interpreters have different scikit-learn versions answer side by side."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rq_models import Client

OLD = "1.5.2"
ROW = {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}

IRIS = """
    import sklearn
    from iris_model.iris_predict import IrisModel

    class Model(IrisModel):
        version = sklearn.__version__
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with an older scikit-learn of its own, and everything else from ours."""
    home = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", f"scikit-learn=={OLD}"], check=True, timeout=300
    )
    (own,) = home.glob("lib/python*/site-packages")
    # The environment's own packages come first on sys.path, so its scikit-learn wins.
    shared = sysconfig.get_path("purelib")
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    return python


@pytest.mark.timeout(600)
def test_two_scikit_learn_versions_answer_side_by_side(old_python, project, start_worker, redis_url):
    project.add("iris_new", IRIS)
    project.add("iris_old", IRIS, python=str(old_python))
    start_worker(project, "iris_new")
    start_worker(project, "iris_old")
    with Client(redis_url) as client:
        jobs = [client.enqueue(model, ROW) for model in ("iris_new", "iris_old", "iris_new", "iris_old")]
        assert client.wait_all(jobs, timeout=120) == [{"species": "setosa"}] * 4
        versions = {status.name: status.card.version for status in client.models()}
    assert versions["iris_old"] == OLD
    assert versions["iris_new"] != OLD
