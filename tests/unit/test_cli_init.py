"""``rq-models init``: what it writes, and the names it refuses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rq_models.cli import main
from rq_models.settings import Settings


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(name: str) -> Result:
    return CliRunner().invoke(main, ["init", name])


@pytest.mark.parametrize(
    ("name", "module", "cls"), [("churn", "churn", "Churn"), ("churn-2", "churn_2", "Churn2"), ("A_b", "a_b", "AB")]
)
def test_what_it_writes_is_valid(name: str, module: str, cls: str) -> None:
    result = init(name)

    assert result.exit_code == 0, result.stderr
    root = Path(name)
    assert Settings.load(root / "config", environ={}).model(name).class_path == f"models.{module}:{cls}"
    for path in [root / "models" / f"{module}.py", root / "tests" / f"test_{module}.py", root / "conftest.py"]:
        ast.parse(path.read_text())
    assert (root / f"requirements-{name}.txt").is_file()
    assert f"rq-models predict {name} " in (root / "README.md").read_text()
    assert not [path for path in root.rglob("*") if path.is_file() and "$" in path.read_text().replace("$\n", "")]


@pytest.mark.parametrize("name", ["2churn", "-", "_", "a b", "a/b", "é", "class", "ModelJob", ""])
def test_a_name_that_can_be_no_model_is_refused(name: str) -> None:
    result = CliRunner().invoke(main, ["init", "--", name])

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "churn" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")

    result = init("churn")

    assert result.exit_code == 2
    assert "not an empty folder" in result.stderr
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


def test_an_empty_folder_is_used() -> None:
    Path("churn").mkdir()

    assert init("churn").exit_code == 0
