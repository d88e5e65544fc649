"""The horse as its parent sees it: a real process, started by boot.py, at the other end of a socket."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

import rq_models.host
from rq_models.host import columns, frames

BOOT = Path(rq_models.host.__file__).with_name("boot.py")
MODELS = Path(__file__).parent.parent / "models"
PATIENCE = 60
MAX_OUTPUT = 16 << 20


def oldest_python() -> str | None:
    candidates = [shutil.which("python3.8"), *map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python"))]
    for candidate in filter(None, candidates):
        # A shim may stand on the path for a version that is not active.
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


class Process:
    """One horse. What it prints goes to a file, so that nobody has to read it in time."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        self._log = folder / "output"
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(PATIENCE)
        lifeline, self.lifeline = os.pipe()
        tickets, self.ticket_office = os.pipe()
        os.set_blocking(tickets, False)
        inherited = (theirs.fileno(), lifeline, tickets)
        with theirs, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, str(BOOT), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                start_new_session=True,
                cwd=folder,
            )
        os.close(lifeline)
        os.close(tickets)
        self.pid = self.process.pid
        self._decoder = frames.Decoder()
        self._answers: deque[dict[str, Any]] = deque()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, question: Any) -> dict[str, Any]:
        self.ours.sendall(frames.encode(question))
        return self.answer()

    def answer(self) -> dict[str, Any]:
        while not self._answers:
            data = self.ours.recv(1 << 20)
            if not data:
                raise EOFError
            self._answers.extend(self._decoder.feed(data))
        return self._answers.popleft()

    def load(self, path: str = "unruly:Unruly", root: Path = MODELS) -> dict[str, Any]:
        limits = {"nan": "error", "max_output_bytes": MAX_OUTPUT}
        return self.ask({"op": "load", "name": "petals", "class": path, "root": str(root), **limits})

    def predict(self, *order: Any, timeout: float | None = None) -> dict[str, Any]:
        return self.predict_all([{"id": "1", "input": list(order), "timeout": timeout}])[0]

    def predict_all(self, items: list[dict[str, Any]], *, together: bool = False) -> list[dict[str, Any]]:
        answer = self.ask({"op": "predict", "items": items, "together": together})
        outcomes = []
        while True:
            assert set(answer) == {"op", "outcomes", "loads"}
            assert answer["op"] == "predicted"
            assert answer["loads"] == 1
            outcomes += answer["outcomes"]
            if len(outcomes) == len(items):
                return outcomes
            answer = self.answer()

    def close(self) -> None:
        self.ours.close()
        with suppress(OSError):
            os.close(self.lifeline)
        with suppress(OSError):
            os.close(self.ticket_office)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def question(order: Any) -> dict[str, Any]:
    return {"op": "predict", "together": False, "items": [{"id": "1", "input": order, "timeout": None}]}


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    listing = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


@pytest.fixture
def started(tmp_path):
    """A horse that has not loaded its model yet."""
    process = Process(tmp_path)
    yield process
    process.close()


@pytest.fixture
def horse(started):
    """A horse that has."""
    answer = started.load()
    assert answer["op"] == "loaded", answer
    return started


def error(outcome: dict[str, Any]) -> dict[str, Any]:
    assert set(outcome) == {"error", "traceback"}
    return outcome["error"]


# Loading and predicting.


def test_a_round_trip(started):
    answer = started.load()

    assert set(answer) == {"op", "card", "loads", "warmed"}
    assert answer["card"]["name"] == "petals"
    assert (answer["op"], answer["loads"], answer["warmed"]) == ("loaded", 1, False)
    assert started.predict("echo", {"ü": [1, 2.5, None]}) == {"value": {"ü": [1, 2.5, None]}}
    assert started.load()["loads"] == 1


def test_what_a_model_has_loaded_is_no_work_for_the_collector(started, tmp_path):
    (tmp_path / "large.py").write_text(
        "import gc\n"
        "class Model:\n"
        "    def __init__(self):\n"
        "        self.loaded = [[n] for n in range(10_000)]\n"
        "    def predict(self, data):\n"
        "        return sum(isinstance(one, list) for one in gc.get_objects())\n"
    )
    assert started.load("large:Model", tmp_path)["op"] == "loaded"

    assert started.predict(1)["value"] < 5_000


def test_a_round_trip_on_the_oldest_python(tmp_path):
    python = oldest_python()
    if python is None:
        pytest.skip("no Python 3.8 here")
    (tmp_path / "flowers.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Dict, List, Literal, Optional, TypedDict, Union\n"
        "class Colour(TypedDict, total=False):\n"
        "    name: Literal['red', 'blue']\n"
        "@dataclass\n"
        "class Flower:\n"
        "    widths: List[float]\n"
        "    colours: Dict[str, Colour]\n"
        "    note: Union[None, int, str] = None\n"
        "class Model:\n"
        "    example = {'widths': [1], 'colours': {}}\n"
        "    def predict(self, flower: Flower) -> Optional[float]:\n"
        "        return sum(flower.widths) if flower.colours else None\n"
    )
    process = Process(tmp_path, python)
    try:
        answer = process.load("flowers:Model", tmp_path)
        assert (answer["op"], answer["warmed"]) == ("loaded", True), answer
        assert answer["card"]["input_schema"]["required"] == ["widths", "colours"]
        items = [
            {"id": "1", "input": {"widths": [1, 2], "colours": {"a": {"name": "red"}}}, "timeout": 5},
            {"id": "2", "input": {"widths": [1, "asdfg"], "colours": {}}, "timeout": None},
            {"id": "3", "input": {"widths": [], "colours": {"a": {"name": "pink"}}}, "timeout": None},
        ]
        right, wrong, pink = process.predict_all(items)
        assert right == {"value": 3.0}
        assert error(wrong)["message"] == "widths[1]: Input should be a valid number, got 'asdfg'"
        assert error(pink)["message"] == "colours.a.name: Input should be 'red' or 'blue', got 'pink'"
    finally:
        process.close()


def test_rows_in_columns_on_the_oldest_python(tmp_path):
    python = oldest_python()
    if python is None:
        pytest.skip("no Python 3.8 here")
    (tmp_path / "flowers.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Flower:\n"
        "    width: float\n"
        "    name: str = 'rose'\n"
        "class Model:\n"
        "    def predict(self, flower: Flower) -> Flower:\n"
        "        return self.predict_batch([flower])[0]\n"
        "    def predict_batch(self, flowers):\n"
        "        return [Flower(100 / one.width, one.name.upper()) for one in flowers]\n"
    )
    shapes = [{"name": "width", "kind": "f8"}, {"name": "name", "kind": "str", "omit": True}]
    process = Process(tmp_path, python)
    try:
        process.load("flowers:Model", tmp_path)
        for width in (4.0, 0.0):
            heads, blob = columns.encode(shapes, [[2.0, width, None], ["mäh", None, "x"]])
            question = {"op": "score", "rows": 3, "columns": heads, "whole": False, "outputs": shapes, "timeout": 5}
            process.ours.sendall(frames.encode(question, blob))
            answer = process.answer()
            widths, names = columns.decode(answer["columns"], answer["blob"], 3)
            assert list(widths) == [50.0, 100 / width if width else None, None]
            assert names == ["MÄH", "ROSE" if width else None, None]
            assert [(index, record["kind"]) for index, record in sorted(answer["failed"])] == [
                *([] if width else [(1, "ModelError")]),
                (2, "InvalidInput"),
            ]
    finally:
        process.close()


def test_a_model_that_does_not_load_leaves_the_horse_to_be_asked_again(started, tmp_path):
    def loads(source: str) -> dict[str, Any]:
        path = tmp_path / "mended.py"
        path.write_text(source)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return started.load("mended:Model", tmp_path)

    missing = started.load("mended:Model", tmp_path)
    broken = loads("import nowhere_to_be_found\n")
    init = loads(
        "class Model:\n  def __init__(self): raise KeyboardInterrupt\n  def predict(self, data): return data\n"
    )

    assert [answer["stage"] for answer in (missing, broken, init)] == ["missing", "broken", "init"]
    assert broken["type"] == "ModuleNotFoundError"
    assert "mended.py:1: " in broken["message"]
    for answer in (missing, broken, init):
        assert set(answer) == {"op", "stage", "type", "message", "traceback", "loads"}
        assert answer["op"] == "broken"
        assert answer["loads"] == 0


def test_a_model_that_fails_on_its_own_example_is_broken(started, tmp_path):
    (tmp_path / "example.py").write_text(
        "import pathlib\n"
        "class Model:\n"
        "  example = {'x': 1}\n"
        "  def predict(self, data): return pathlib.Path('artifact').read_text()\n"
    )

    answer = started.load("example:Model", tmp_path)
    assert (answer["op"], answer["stage"], answer["type"]) == ("broken", "example", "FileNotFoundError")
    assert answer["message"].startswith("it fails on its own example: FileNotFoundError: ")
    assert error(started.ask(question(1))["outcomes"][0])["kind"] == ("ModelBroken")

    (tmp_path / "artifact").touch()
    answer = started.load("example:Model", tmp_path)
    assert (answer["op"], answer["warmed"], answer["loads"]) == ("loaded", True, 2)


def test_a_models_own_modules_are_its_own(started, tmp_path):
    names = ["cache", "frames", "contract", "loop", "output", "schemas", "library", "refusal"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"whose = 'the model\\'s {name}'\n")
    (tmp_path / "own.py").write_text(
        f"import {', '.join(names)}\n"
        "import __main__, sys\n"
        "class Model:\n"
        "  def predict(self, data):\n"
        f"    return [module.whose for module in ({', '.join(names)})], sys.path, sys.argv\n"
    )

    assert started.load("own:Model", tmp_path)["op"] == "loaded"
    whose, path, argv = started.predict()["value"]
    assert whose == [f"the model's {name}" for name in names]
    assert path[0] == str(tmp_path)
    assert str(BOOT.parent) not in path
    assert len(argv) == 1


def test_items_of_one_question_are_answered_in_order(horse):
    orders = [["echo", 1], ["raise", 3], ["echo", 2]]

    outcomes = horse.predict_all([{"id": str(n), "input": one, "timeout": 5} for n, one in enumerate(orders)])

    assert outcomes[0] == {"value": 1}
    assert error(outcomes[1]) == {"kind": "ModelError", "type": "ValueError", "message": "xxx", "retryable": False}
    assert outcomes[2] == {"value": 2}


def test_a_frame_that_cannot_be_read_is_refused_and_the_next_is_answered(horse):
    body = b'{"op": "predict", "items": [' + b"[" * 100_000
    horse.ours.sendall(len(body).to_bytes(4, "big") + body)

    assert horse.answer()["op"] == "refused"
    assert horse.predict("echo", 1) == {"value": 1}


def test_an_output_too_large_for_a_frame_fails_alone(horse):
    horse.predict("shrink_frames", 10_000)

    orders = [["repeat", times] for times in (10, 9990, 20)]
    outcomes = horse.predict_all([{"id": str(n), "input": order, "timeout": 5} for n, order in enumerate(orders)])

    assert outcomes[0] == {"value": "x" * 10}
    assert error(outcomes[1])["kind"] == "InvalidOutput"
    assert outcomes[2] == {"value": "x" * 20}
    assert error(horse.predict("repeat", 10_001))["message"].endswith("bytes of JSON, which is too large")


def test_outputs_of_a_batch_that_do_not_go_into_one_frame_go_into_several(started, tmp_path):
    (tmp_path / "repeat.py").write_text(
        "import sys\n"
        "class Model:\n"
        "  def __init__(self): sys.modules['_rq_models_host.frames'].MAX_FRAME = 10_000\n"
        "  def predict(self, times): raise RuntimeError('it is predicted together')\n"
        "  def predict_batch(self, many): return ['x' * times for times in many]\n"
    )
    started.load("repeat:Model", tmp_path)

    items = [{"id": "1", "input": times, "timeout": 5} for times in (6000, 11_000, 6001)]
    outcomes = started.predict_all(items, together=True)

    assert [outcomes[0], outcomes[2]] == [{"value": "x" * 6000}, {"value": "x" * 6001}]
    assert error(outcomes[1])["kind"] == "InvalidOutput"


# What the model prints.


def test_prints_reach_the_log_before_the_answer_reaches_the_parent(horse):
    horse.predict("print", "hëllo \udcff")

    assert sorted(horse.log.splitlines()) == sorted(
        ["hëllo \\udcff", "hëllo \\udcff to stderr", "hëllo \\udcff without newline"]
    )


def test_logging_is_heard_unless_the_model_has_a_format_of_its_own(started, tmp_path):
    for name, line in (("plain", ""), ("formatted", "logging.basicConfig(level='INFO', format='mine: %(message)s')\n")):
        (tmp_path / f"{name}.py").write_text(
            "import logging\n" + line + "class Model:\n"
            "  def __init__(self): logging.getLogger('petals').info('loading')\n"
            "  def predict(self, data): return data\n"
        )
    started.load("plain:Model", tmp_path)
    assert started.log == "INFO:petals:loading\n"

    other = Process(tmp_path)
    other.load("formatted:Model", tmp_path)
    other.close()
    assert other.log == "mine: loading\n"


def test_a_segfault_leaves_its_traceback_in_the_log(horse, tmp_path):
    (tmp_path / "segfault.py").write_text(
        "import ctypes\nclass Model:\n  def predict(self, data): return ctypes.string_at(0)\n"
    )
    other = Process(tmp_path)
    other.load("segfault:Model", tmp_path)
    with pytest.raises(EOFError):
        other.predict()

    assert other.process.wait(PATIENCE) == -signal.SIGSEGV
    assert "segfault.py" in other.log
    other.close()


# What the model does to the process.


@pytest.mark.parametrize(
    "order",
    [
        ["close_stdout"],
        ["steal_alarm"],
        ["exit"],
        ["interrupt"],
        ["raise_base"],
        ["raise", 10_000_000],
        ["threads"],
        ["chdir", "/"],
    ],
    ids=lambda order: order[0],
)
def test_after_whatever_a_model_does_the_next_prediction_succeeds(horse, order):
    horse.predict(*order)

    assert horse.predict("echo", 1, timeout=5) == {"value": 1}
    assert error(horse.predict("loop", timeout=0.05))["kind"] == "ModelTimeout"
    assert horse.predict("pid") == {"value": horse.pid}


def test_exits_are_the_models_error(horse):
    assert error(horse.predict("exit"))["type"] == "SystemExit"
    assert error(horse.predict("interrupt"))["type"] == "KeyboardInterrupt"
    assert error(horse.predict("raise_base"))["message"] == "nobody catches me"


def test_signals_to_the_whole_group_leave_the_horse_alone(horse):
    os.kill(horse.pid, signal.SIGTERM)
    os.kill(horse.pid, signal.SIGINT)

    assert horse.predict("pid") == {"value": horse.pid}


def test_a_fork_of_the_model_can_be_stopped(horse):
    assert horse.predict("fork") == {"value": signal.SIGTERM}


def test_a_fork_that_comes_back_from_predict_does_not_answer(horse):
    assert horse.predict("stray_fork") == {"value": 70}
    assert horse.predict("echo", 1) == {"value": 1}


def test_a_fork_of_a_fork_keeps_its_files(horse):
    assert horse.predict("fork_of_a_fork") == {"value": 0}


def test_the_model_sees_no_child_and_no_descriptor_of_ours(horse):
    assert horse.predict("wait_for_children") == {"value": "none"}
    assert horse.predict("descriptors") == {"value": []}


def test_a_crash_ends_the_process_with_what_it_printed(horse):
    with pytest.raises(EOFError):
        horse.predict("die", 7)

    assert horse.process.wait(PATIENCE) == 7


# Time limits.


@pytest.mark.parametrize("order", [["loop"], ["swallow", 3], ["own_alarm"]], ids=lambda order: order[0])
def test_a_time_limit_ends_a_model_that_swallows_exceptions(horse, order):
    outcome = horse.predict(*order, timeout=0.1)

    assert error(outcome) == {
        "kind": "ModelTimeout",
        "type": None,
        "message": "the prediction took longer than job_timeout (0.1 s)",
        "retryable": False,
    }
    assert horse.predict("echo", 1, timeout=5) == {"value": 1}


def test_the_traceback_of_a_time_limit_says_where_the_model_was(horse):
    outcome = horse.predict("loop", timeout=0.05)

    assert "unruly.py" in outcome["traceback"]
    assert "do_loop" in outcome["traceback"]


def test_what_has_no_ticket_is_not_begun(horse):
    items = [{"id": str(n), "input": ["echo", n], "timeout": None} for n in range(5)]
    os.write(horse.ticket_office, bytes(2))

    first = horse.ask({"op": "predict", "together": False, "tickets": True, "items": items})

    assert [first["outcomes"], *(horse.answer()["outcomes"] for _ in range(2))] == [[{"value": 0}], [{"value": 1}], []]
    assert horse.predict("echo", "next") == {"value": "next"}


def test_no_limit_strikes_between_predictions(horse):
    items = [{"id": str(n), "input": ["echo", n], "timeout": 0.0001} for n in range(2000)]

    for outcome in horse.predict_all(items):
        assert "value" in outcome or error(outcome)["kind"] == "ModelTimeout"
    assert horse.predict("echo", 1, timeout=5) == {"value": 1}


# Its end.


def test_it_leaves_when_its_channel_ends(horse):
    horse.predict("threads")
    horse.ours.close()

    assert horse.process.wait(PATIENCE) == 0


def test_it_leaves_when_its_channel_ends_before_it_loaded(started):
    started.ours.close()

    assert started.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("sent", [b"\x00\x00", b"\x00\x00\x00\x09{"])
def test_it_leaves_when_its_channel_ends_within_a_frame(horse, sent):
    horse.ours.sendall(sent)
    horse.ours.close()

    assert horse.process.wait(PATIENCE) == 0


def test_it_leaves_when_its_parent_died_with_unread_answers(horse):
    horse.ours.sendall(frames.encode(question(["echo"])))
    assert horse.ours.recv(1, socket.MSG_PEEK)
    horse.ours.close()

    assert horse.process.wait(PATIENCE) == 0


def test_the_end_of_its_parent_ends_its_whole_group_whatever_it_does(horse):
    grandchild = horse.predict("grandchild")["value"]
    assert {horse.pid, grandchild} < set(members(horse.pid))
    assert horse.predict("chdir", "/") == {"value": "/"}
    horse.ours.sendall(frames.encode(question(["swallow", 9])))

    os.close(horse.lifeline)

    assert horse.process.wait(PATIENCE) == -signal.SIGKILL
    wait_until(lambda: not members(horse.pid), "the group is gone")


def test_a_parent_killed_by_sigkill_leaves_no_process(tmp_path):
    (tmp_path / "parent.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_host_process import Process\n"
        f"horse = Process(Path({str(tmp_path)!r}))\n"
        "horse.load()\n"
        "print(horse.pid, horse.predict('grandchild')['value'], flush=True)\n"
        "horse.predict('swallow', 1000)\n"
    )
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        pid, grandchild = map(int, parent.stdout.readline().split())
        assert {pid, grandchild} < set(members(pid))
        parent.kill()

    wait_until(lambda: not members(pid), "the horse's group is gone")


def test_its_guardian_holds_none_of_its_descriptors(horse):
    (guardian,) = set(members(horse.pid)) - {horse.pid}
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")

    assert len(list(Path(f"/proc/{guardian}/fd").iterdir())) == 1
