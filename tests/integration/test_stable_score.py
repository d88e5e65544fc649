"""Rows in columns through the stable and its horse: real model processes, and no Redis."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from rq_models.errors import InvalidInput, ModelBroken
from rq_models.horse import Horse, Interrupted, Item
from rq_models.host import columns
from rq_models.settings import ModelSettings
from rq_models.stable import GaveUp, Stable

# It does what a row says, and notes in the file "calls" how many rows it was given at a time.
ORDERED = """
    import os, pathlib, signal, sys, time
    from dataclasses import dataclass
    from typing import Optional

    HERE = pathlib.Path(__file__).parent

    @dataclass
    class Row:
        x: Optional[float] = -1.0
        do: str = "answer"

    def note(text):
        with (HERE / "calls").open("a") as calls:
            calls.write(text + "\\n")

    class Model:
        def __init__(self):
            if (HERE / "broken").exists():
                raise ValueError("no load today")

        def predict(self, row: Row):
            note("1")
            return answer(row)

        def predict_batch(self, rows):
            note(str(len(rows)))
            if any(row.do == "short" for row in rows):
                return []
            return [answer(row) for row in rows]

    def answer(row):
        if row.do == "raise":
            raise ValueError("not this one")
        if row.do == "crash":
            os._exit(3)
        if row.do == "oom":
            os.kill(os.getpid(), 9)
        if row.do == "hang":
            while True:
                time.sleep(0.01)
        if row.do == "freeze":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(600)
        if row.do == "hold" and not (HERE / "go").exists():
            (HERE / "holds").touch()
            while True:
                time.sleep(0.01)
        if row.do == "once" and not (HERE / "done").exists():
            (HERE / "done").touch()
            os._exit(3)
        if row.do == "misfit":
            return {"y": "many"}
        if row.do == "long":
            sys.modules["_rq_models_host.frames"].MAX_FRAME = 5000
            return {"y": 1.0, "row": "x" * 5000}
        return {"y": None if row.x is None else row.x * 2, "row": [row.do]}
"""
ALONE = ORDERED.replace("def predict_batch", "def _predict_batch")
OUTPUTS = [{"name": "y", "kind": "f8"}, {"name": "row", "kind": "json"}]


def beat() -> None:
    pass


def asked(
    orders: list[str], xs: list[Any] | None = None, outputs: Any = OUTPUTS, timeout: float | None = None
) -> tuple[dict[str, Any], bytes]:
    xs = [float(index) for index in range(len(orders))] if xs is None else xs
    shapes = [{"name": "x", "kind": "f8"}, {"name": "do", "kind": "str", "omit": True}]
    heads, blob = columns.encode(shapes, [xs, orders])
    question = {"rows": len(orders), "columns": heads, "whole": False, "outputs": outputs, "timeout": timeout}
    return question, blob


def values(answer: dict[str, Any]) -> list[list[Any]]:
    return [list(column) for column in columns.decode(answer["columns"], answer["blob"], answer["rows"])]


def kinds(answer: dict[str, Any]) -> dict[int, str]:
    return {index: record["kind"] for index, record in answer["failed"]}


class Yard:
    """A project's folder with the model in it, and the stable that keeps it."""

    def __init__(self, root: Path, source: str) -> None:
        self.root = root
        (root / "ordered.py").write_text(textwrap.dedent(source))
        self.settings = ModelSettings(class_path="ordered:Model", load_retries=0)
        told = {"warmed": lambda *_: None, "lost": lambda: None, "broken": lambda _: None}
        self.stable = Stable("ordered", self.settings, root, log=lambda *_: None, **told)

    def score(self, *orders: str, **options: Any) -> dict[str, Any]:
        question, blob = asked(list(orders), **options)
        return self.stable.score(question, blob, "job", beat)

    @property
    def calls(self) -> list[int]:
        return [int(line) for line in (self.root / "calls").read_text().split()]


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(tmp_path, ORDERED)
    yield yard
    yard.stable.drop()


@pytest.fixture
def slow_yard(tmp_path: Path) -> Iterator[Yard]:
    """Its model predicts one at a time only."""
    yard = Yard(tmp_path, ALONE)
    yield yard
    yard.stable.drop()


@pytest.fixture
def horse(tmp_path: Path) -> Iterator[Horse]:
    yard = Yard(tmp_path, ORDERED)
    with yard.stable.new_horse(yard.settings) as horse:
        horse.load()
        yield horse


# What goes well.


def test_rows_go_in_and_come_out_as_columns(yard):
    answer = yard.score("answer", "answer", "answer", xs=[1.5, None, -2.0])

    assert values(answer) == [[3.0, None, -4.0], [["answer"]] * 3]
    assert set(answer) == {"op", "rows", "failed", "columns", "seconds", "blob"}
    assert (answer["op"], answer["rows"], answer["failed"]) == ("scored", 3, [])
    assert [(head["name"], head["kind"]) for head in answer["columns"]] == [("y", "f8"), ("row", "json")]
    assert answer["seconds"] > 0
    assert yard.calls == [3]
    assert yard.stable.horse.predicted == 3
    assert yard.stable.running == ()


def test_a_null_may_be_left_out_so_that_the_default_counts(yard):
    heads, blob = columns.encode([{"name": "x", "kind": "f8", "omit": True}], [[None, 4.0]])
    question = {"rows": 2, "columns": heads, "whole": False, "outputs": OUTPUTS[:1], "timeout": None}

    assert values(yard.stable.score(question, blob, "job", beat)) == [[-2.0, 8.0]]


def test_the_whole_output_is_one_column_of_json(yard):
    answer = yard.score("answer", "misfit", outputs=None)

    assert values(answer) == [[{"y": 0.0, "row": ["answer"]}, {"y": "many"}]]
    assert [(head["name"], head["kind"]) for head in answer["columns"]] == [("", "json")]


def test_more_rows_than_the_channel_holds_at_once(yard):
    count = 100_000

    answer = yard.score(*["answer"] * count, outputs=OUTPUTS[:1])

    assert values(answer) == [[index * 2.0 for index in range(count)]]


def test_rows_and_single_predictions_share_a_horse(yard):
    yard.score("answer")
    ((_, came),) = next(iter(yard.stable.predict([Item("other", {"x": 2}, 5)], beat)))
    yard.score("answer")

    assert came == {"value": {"y": 4.0, "row": ["answer"]}}
    assert yard.stable.loads == 1


# Rows that fail.


def test_an_invalid_row_and_an_output_that_does_not_fit_fail_alone(yard):
    heads, blob = columns.encode([{"name": "x", "kind": "json"}], [[1, "a", 2]])
    question = {"rows": 3, "columns": heads, "whole": False, "outputs": OUTPUTS[:1], "timeout": None}

    invalid = yard.stable.score(question, blob, "job", beat)
    misfit = yard.score("answer", "misfit", "answer")

    assert values(invalid) == [[2.0, None, 4.0]]
    assert kinds(invalid) == {1: "InvalidInput"}
    assert invalid["failed"][0][1]["message"] == "x: Input should be a valid number or null, got 'a'"
    assert values(misfit) == [[0.0, None, 4.0], [["answer"], None, ["answer"]]]
    assert misfit["failed"] == [
        [
            1,
            {
                "kind": "InvalidOutput",
                "type": None,
                "message": "output.y: should be a number, got 'many'",
                "retryable": False,
            },
        ]
    ]
    assert yard.calls == [2, 3]


@pytest.mark.parametrize("order", ["raise", "short"])
def test_when_the_batch_fails_only_the_guilty_row_does(yard, order):
    answer = yard.score("answer", order, "answer")

    assert values(answer)[0] == [0.0, 2.0 if order == "short" else None, 4.0]
    assert kinds(answer) == ({} if order == "short" else {1: "ModelError"})
    assert yard.calls == [3, 1, 1, 1]
    assert yard.stable.loads == 1


def test_a_model_without_batches_predicts_one_by_one(slow_yard):
    answer = slow_yard.score("answer", "raise", "answer")

    assert values(answer)[0] == [0.0, None, 4.0]
    assert kinds(answer) == {1: "ModelError"}
    assert slow_yard.calls == [1, 1, 1]


def test_a_row_that_hangs_is_ended_by_the_limit_and_fails_alone(yard):
    answer = yard.score("answer", "hang", "answer", timeout=0.2)

    assert values(answer)[0] == [0.0, None, 4.0]
    assert kinds(answer) == {1: "ModelTimeout"}
    assert yard.calls == [3, 1, 1, 1]
    assert yard.stable.loads == 1


def test_rows_one_by_one_may_take_longer_than_the_parent_would_wait_for_one(yard):
    # Eight rows of half a second each, and a parent that gives up 2.5 s after it last heard of its horse.
    answer = yard.score(*["hang"] * 8, "answer", timeout=0.5)

    assert kinds(answer) == dict.fromkeys(range(8), "ModelTimeout")
    assert values(answer)[0][8] == 16.0
    assert yard.stable.loads == 1


def test_a_row_that_never_comes_back_is_killed_and_fails_alone(yard):
    answer = yard.score("answer", "freeze", "answer", timeout=0.2)

    assert values(answer)[0] == [0.0, None, 4.0]
    assert kinds(answer) == {1: "ModelTimeout"}
    # Together, and alone; a hang is nobody else's doing, so it is not tried twice.
    assert yard.calls == [3, 1, 1, 1]


@pytest.mark.parametrize(("order", "calls"), [("crash", [3, 3, 1, 1, 1]), ("oom", [3, 3, 1, 1, 1, 1])])
def test_a_row_that_kills_the_horse_fails_alone(yard, order, calls):
    between = []
    question, blob = asked(["answer", order, "answer"])

    answer = yard.stable.score(question, blob, "job", beat, lambda: between.append(yard.stable.running))

    assert values(answer) == [[0.0, None, 4.0], [["answer"], None, ["answer"]]]
    assert kinds(answer) == {1: "ModelCrashed"}
    assert yard.calls == calls
    assert between == [(), ()]


def test_a_single_row_that_kills_the_horse_is_not_tried_a_third_time(yard):
    assert kinds(yard.score("crash")) == {0: "ModelCrashed"}
    assert yard.calls == [1, 1]


def test_a_death_that_does_not_come_again_leaves_no_trace(yard):
    answer = yard.score("answer", "once", "answer")

    assert answer["failed"] == []
    assert values(answer)[0] == [0.0, 2.0, 4.0]
    assert yard.calls == [3, 3]


def test_an_answer_that_no_frame_holds_fails_its_rows(yard):
    answer = yard.score("long", "answer")

    assert values(answer) == [[None, None], [None, None]]
    assert kinds(answer) == {0: "InvalidOutput", 1: "InvalidOutput"}
    assert "are more than the 5000 that a frame may hold" in answer["failed"][0][1]["message"]
    assert values(yard.score("answer")) == [[0.0], [["answer"]]]


# Whoever else acts meanwhile.


def test_a_kill_from_outside_changes_nothing_of_the_answer(yard):
    undisturbed = yard.score("answer", "misfit", "answer")
    pids = []

    def kill_once() -> None:
        wait_until((yard.root / "holds").exists, "the model holds")
        (yard.root / "go").touch()
        pids.append(yard.stable.horse.pid)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_once)
    killer.start()
    disturbed = yard.score("hold", "misfit", "answer", outputs=OUTPUTS[:1])
    killer.join()

    assert values(disturbed)[0] == values(undisturbed)[0]
    assert disturbed["failed"] == undisturbed["failed"]
    assert yard.calls == [3, 3, 3]
    assert yard.stable.horse.pid != pids[0]


def test_others_are_served_between_rows_by_the_same_stable(yard):
    question, blob = asked(["answer", "crash", "answer"])
    served = []

    def serve() -> None:
        for some in yard.stable.predict([Item("other", {"x": 21}, 5)], beat):
            served.extend(came["value"]["y"] for _, came in some)

    answer = yard.stable.score(question, blob, "job", beat, serve)

    assert served == [42.0, 42.0]
    assert values(answer)[0] == [0.0, None, 4.0]


@pytest.mark.parametrize("how", ["stop", "abandon"])
def test_a_stop_makes_it_give_up(yard, how):
    yard.stable.warm(beat)

    def stop() -> None:
        wait_until((yard.root / "holds").exists, "the model holds")
        yard.stable.stop("job") if how == "stop" else yard.stable.abandon()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(GaveUp):
        yard.score("hold", "answer")
    stopper.join()

    assert yard.calls == [2]


def test_a_stop_of_another_job_leaves_it_alone(yard):
    yard.stable.warm(beat)
    pid = yard.stable.horse.pid

    def stop() -> None:
        wait_until((yard.root / "holds").exists, "the model holds")
        # The model may be faster than this process.
        wait_until(lambda: yard.stable.running == ("job",), "it is known what it holds for")
        (yard.root / "go").touch()
        yard.stable.stop("another")
        assert yard.stable.running == ("job",)
        # A stop that came a moment too late for its own job.
        yard.stable._killed_for = "another"
        yard.stable.kill()

    stopper = threading.Thread(target=stop)
    stopper.start()
    answer = yard.score("hold", "once")
    stopper.join()

    # The kill did not count: so the death of the second try was the first, and was tried again.
    assert answer["failed"] == []
    assert yard.calls == [2, 2, 2]
    assert yard.stable.horse.pid != pid


def test_a_model_that_does_not_load_is_said_to_be_broken(yard):
    (yard.root / "broken").touch()

    with pytest.raises(ModelBroken):
        yard.score("answer")
    yard.stable.stopping = True
    with pytest.raises(GaveUp):
        yard.score("answer")


def test_what_the_horse_cannot_read_is_refused_and_it_lives(yard):
    question, blob = asked(["answer", "answer"])

    with pytest.raises(InvalidInput, match="column 'x'"):
        yard.stable.score({**question, "rows": 3}, blob, "job", beat)
    pid = yard.stable.horse.pid

    assert yard.score("answer")["failed"] == []
    assert yard.stable.horse.pid == pid


# The horse itself.


def test_the_horse_is_interrupted_by_its_death(horse):
    question, blob = asked(["answer", "crash"])

    with pytest.raises(Interrupted) as caught:
        horse.score(question, blob, ("job",), None)

    assert (caught.value.fault.record()["kind"], caught.value.suspects) == ("ModelCrashed", 2)
    assert not horse.alive
    assert horse.running == ()


def test_a_question_that_no_frame_holds_leaves_the_horse_alone(horse):
    question, blob = asked(["answer"])

    with pytest.raises(Interrupted) as caught:
        horse.score({**question, "columns": [object()]}, blob, ("job",), None)

    assert isinstance(caught.value.fault, InvalidInput)
    assert values(horse.score(question, memoryview(blob), ("job",), None)) == [[0.0], [["answer"]]]


def test_the_horse_is_killed_when_its_asker_goes_away(horse):
    question, blob = asked(["hold", "answer"])
    seen = []

    def leave() -> None:
        if (Path(horse._root) / "holds").exists():
            seen.append(horse.running)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        horse.score(question, blob, ("job",), None, leave)

    assert seen == [("job",)]
    assert not horse.alive
