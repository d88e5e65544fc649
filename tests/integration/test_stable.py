"""The keeper of the horse, with real model processes and no Redis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rq_models.errors import ModelCrashed
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


def outcomes(stable: Stable, items: list[Item], beat: Callable[[], None]) -> list[tuple[str, Any]]:
    return [(item.id, came) for some in stable.predict(items, beat) for item, came in some]


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "larger than the channel's buffer"])
def test_what_is_taken_back_is_never_answered_and_confuses_no_later_question(stable: Stable, size: int) -> None:
    taken_back: list[Item] = []
    for turn in range(50 if size == 1 else 5):
        text = f"{turn} " + "x" * size
        items = [Item(f"{turn}-{n}", f"{n} {text}", 60) for n in range(5)]
        taken_back.clear()

        # In the very first beat, when the horse may have begun nothing, or something, or not have it all.
        found = outcomes(stable, items, lambda: taken_back.extend(stable.take_back()))

        left = items[: len(items) - len(taken_back)]
        assert taken_back == items[len(left) :]
        assert found == [(item.id, {"value": item.input}) for item in left]
        # The next one has tickets, too.
        again = [Item(f"{turn}+{n}", f"{n} again", 60) for n in range(3)]
        assert outcomes(stable, again, beat) == [(item.id, {"value": item.input}) for item in again]


MORTAL = """
import os, pathlib, time

class Model:
    def predict(self, go):
        if go:
            pathlib.Path(go + ".begun").touch()
            while not os.path.exists(go):
                time.sleep(0.01)
            os._exit(3)
"""


def test_a_death_is_not_charged_to_what_was_taken_back_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL)
    told: dict[str, Any] = {"warmed": lambda *_: None, "lost": lambda: None, "broken": lambda _: None}
    stable = Stable("mortal", ModelSettings(class_path="mortal:Model"), tmp_path, log=lambda *_: None, **told)
    go = tmp_path / "go"
    taken_back: list[Item] = []

    def take_back() -> None:
        if go.with_name("go.begun").exists():
            taken_back.extend(stable.take_back())
            go.touch()

    first, *rest = [Item("0", str(go), 60), Item("1", "", 60), Item("2", "", 60)]
    try:
        ((name, came),) = outcomes(stable, [first, *rest], take_back)
    finally:
        stable.drop()

    assert taken_back == rest
    assert name == first.id
    assert isinstance(came, ModelCrashed)


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
