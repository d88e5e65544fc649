"""The keeper of the horse, with real model processes and no Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from rq_models.horse import Item
from rq_models.settings import ModelSettings
from rq_models.stable import Stable


@pytest.fixture
def stable(tmp_path: Path):
    (tmp_path / "echoing.py").write_text("class Model:\n    def predict(self, data): return data\n")
    settings = ModelSettings(class_path="echoing:Model")
    stable = Stable(
        "echo",
        settings,
        tmp_path,
        log=lambda *_: None,
        warmed=lambda *_: None,
        lost=lambda: None,
        broken=lambda _: None,
    )
    yield stable
    stable.drop()


def beat() -> None:
    pass


def test_answers_that_nobody_took_are_never_taken_for_another_jobs(stable: Stable) -> None:
    abandoned = stable.predict([Item(str(n), f"old {n}", 5) for n in range(5)], beat)
    next(abandoned)
    abandoned.close()

    ((item, came),) = [pair for some in stable.predict([Item("new", "new", 5)], beat) for pair in some]

    assert (item.id, came) == ("new", {"value": "new"})


def test_a_stop_that_came_too_late_for_its_job_is_not_charged_to_the_next(stable: Stable) -> None:
    stable.warm(beat)
    for came in stable.predict([Item("old", "old", 5)], beat):
        # Its answer is on its way, and it counts as being at work.
        assert came
        assert stable.horse is not None
        stable.horse.running = ("old",)
        stable.stop("old")

    ((item, came),) = [pair for some in stable.predict([Item("new", "new", 5)], beat) for pair in some]

    assert (item.id, came) == ("new", {"value": "new"})
