# ruff: noqa: ARG002, ARG005
# The models in here take what every model is given, and need not use it.

from __future__ import annotations

import datetime as dt
import json
import logging
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pydantic
import pytest
import schema

from rq_models.host import cache, contract
from rq_models.host.contract import LoadError, Model, TimeLimit, construct, load_class

MODELS = Path(__file__).parent.parent / "models"
INVALID = {"kind": "InvalidInput", "retryable": False}


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path):
    """Both folders are importable, and what a test imports from its own is forgotten."""
    monkeypatch.syspath_prepend(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def host(name: str) -> Model:
    return Model("petals", construct(load_class(f"kinds:{name}")))


def hosted(instance: Any, **options: Any) -> Model:
    return Model("some_model", instance, **options)


def error(outcome: dict[str, Any]) -> dict[str, Any]:
    assert set(outcome) == {"error", "traceback"}
    assert set(outcome["error"]) == {"kind", "type", "message", "retryable"}
    return outcome["error"]


# What each kind of model takes and gives back.


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        ("Pydantic", {"petal_width": 2}, {"width": "wide"}),
        ("OldAttributes", {"petal_width": 2}, {"wide": True}),
        ("OldProperties", {"petal_width": 0, "kind": None}, {"wide": False}),
        ("Untyped", {"anything": [1, "x"]}, {"anything": [1, "x"]}),
        ("WithDataclass", {"width": 2}, {"wide": True}),
        ("WithTypedDict", {"width": 2}, {"wide": True}),
        ("WithPydanticHints", {"petal_width": 2}, {"width": "wide"}),
        ("Batched", {"width": 2}, True),
    ],
)
def test_every_kind_predicts_and_has_a_card_that_is_json(kind, data, value):
    model = host(kind)

    assert model.predict(data) == {"value": value}
    assert json.loads(json.dumps(model.card, allow_nan=False)) == model.card
    assert (model.card["input_schema"] is None) == (kind == "Untyped")


@pytest.mark.parametrize(
    ("kind", "data", "message", "exception"),
    [
        (
            "Pydantic",
            {"petal_width": "asdfg"},
            "petal_width: Input should be a valid number, unable to parse string as a number, got 'asdfg'",
            "ValidationError",
        ),
        ("Pydantic", {"petal_width": -1}, "petal_width must not be negative", "MLModelSchemaValidationException"),
        (
            "OldAttributes",
            {"petal_width": "asdfg"},
            "petal_width: 'asdfg' should be instance of 'float'",
            "SchemaError",
        ),
        ("WithDataclass", {"width": "asdfg"}, "width: Input should be a valid number, got 'asdfg'", None),
        ("WithTypedDict", {}, "width: Field required", None),
        ("WithPydanticHints", {}, "petal_width: Field required", "ValidationError"),
    ],
)
def test_bad_input_is_the_callers_fault_and_names_the_field(kind, data, message, exception):
    assert error(host(kind).predict(data)) == {**INVALID, "type": exception, "message": message}


def test_an_older_models_own_refusal_is_said_by_field_and_holds_no_input():
    instance = construct(load_class("kinds:OldAttributes"))
    model = hosted(instance)
    # The model refuses something that its published schema took.
    type(instance).input_schema = schema.Schema({"petal_width": int})
    try:
        outcome = model.predict({"petal_width": 2.5, "names": ["secret"]})
    finally:
        type(instance).input_schema = schema.Schema({"petal_width": float, schema.Optional("names"): [str]})

    expected = {"type": "MLModelSchemaValidationException", "message": "petal_width: 2.5 should be instance of 'int'"}
    assert error(outcome) == {**INVALID, **expected}
    assert "ml_model_abc.py" in outcome["traceback"]
    assert "secret" not in str(outcome)


def test_a_plain_class_may_refuse_by_an_exception_of_that_name():
    class InvalidInput(ValueError):
        pass

    class Plain:
        def predict(self, data):
            raise InvalidInput("x" * 10_000)

    found = error(hosted(Plain()).predict({}))
    assert found["kind"] == "InvalidInput"
    assert found["type"] == "InvalidInput"
    assert len(found["message"]) == 300


def test_an_older_model_is_given_dicts_with_floats_as_they_came():
    model = construct(load_class("kinds:OldAttributes"))

    hosted(model).predict({"petal_width": 5})

    assert repr(model.seen) == "[{'petal_width': 5.0}]"


# The card.


def test_the_card_of_an_mlmodel():
    card = host("Pydantic").card

    assert {
        key: card[key] for key in ("name", "display_name", "qualified_name", "version", "description", "batch")
    } == {
        "name": "petals",
        "display_name": "Petals",
        "qualified_name": "petals",
        "version": "1.2.3",
        "description": "Says whether a petal is wide.",
        "batch": False,
    }
    assert card["input_schema"]["required"] == ["petal_width"]
    assert card["output_schema"]["properties"]["width"] == {"$ref": "#/$defs/Width"}
    assert card["example"] == {"petal_width": 0.2}


def test_the_card_of_a_plain_class_falls_back():
    assert host("Untyped").card == {
        "name": "petals",
        "display_name": "petals",
        "qualified_name": "petals",
        "version": "",
        "description": "",
        "input_schema": None,
        "output_schema": None,
        "example": None,
        "batch": False,
    }
    assert host("WithDataclass").card["version"] == "3"
    assert host("WithDataclass").card["example"] == {"width": 0.5, "colours": {}, "note": None}
    assert host("OldProperties").card["version"] == "0.4"
    assert host("Batched").card["batch"] is True


def test_metadata_may_be_attributes_of_the_instance_and_methods_are_none():
    class Plain:
        def __init__(self):
            self.display_name = "Mine"
            self.version = 2

        def description(self):
            return "a method"

        def example(self):
            return {}

        def predict(self, data):
            return data

    card = hosted(Plain()).card

    assert (card["display_name"], card["version"], card["description"], card["example"]) == ("Mine", "2", "", None)


@pytest.mark.parametrize("name", ["display_name", "version", "input_schema", "example"])
@pytest.mark.parametrize("raised", [AttributeError("self._x"), ValueError("v"), SystemExit(1)], ids=repr)
def test_a_property_that_raises_is_a_load_error(name, raised):
    def broken(self):
        raise raised

    cls = type("Plain", (), {name: property(broken), "predict": lambda self, data: data})

    with pytest.raises(LoadError, match=f"^its {name} raised {type(raised).__name__}") as caught:
        hosted(cls())
    assert caught.value.stage == "init"


def test_attributes_may_come_from_getattr():
    class Decorator:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    model = hosted(Decorator(construct(load_class("kinds:Pydantic"))))

    assert model.card["version"] == "1.2.3"
    assert model.predict({"petal_width": 2}) == {"value": {"width": "wide"}}


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "example"),
    [
        ({**OBJECT, "examples": [{"x": 1}, {"x": 2}]}, {"x": 1}),
        ({**OBJECT, "examples": []}, None),
        ({**OBJECT, "properties": {"x": {"default": 3}}}, None),
        (OBJECT, None),
    ],
)
def test_an_example_is_taken_from_the_schema(schema, example):
    cls = type("Plain", (), {"input_schema": schema, "predict": lambda self, data: data})

    assert hosted(cls()).card["example"] == example


def test_an_example_that_is_no_json_is_a_load_error():
    cls = type("Plain", (), {"example": {"x": {1}}, "predict": lambda self, data: data})

    with pytest.raises(LoadError, match=r"^example\.x: set is not JSON") as caught:
        hosted(cls())
    assert caught.value.stage == "example"


# What predict may do.


def test_an_exception_is_the_models_fault_with_its_own_traceback():
    class Plain:
        def predict(self, data):
            return {}["missing"]

    outcome = hosted(Plain()).predict({})

    assert error(outcome) == {"kind": "ModelError", "type": "KeyError", "message": "'missing'", "retryable": False}
    assert 'return {}["missing"]' in outcome["traceback"]
    assert "host" not in outcome["traceback"].split("test_host_contract")[0]


@pytest.mark.parametrize(
    "raised", [SystemExit("enough"), GeneratorExit(), BaseException("base"), MemoryError()], ids=repr
)
def test_whatever_the_model_raises_is_an_outcome(raised):
    class Plain:
        def predict(self, data):
            raise raised

    found = error(hosted(Plain()).predict({}))
    assert found["kind"] == "ModelError"
    assert found["type"] == type(raised).__name__
    assert found["message"] == (str(raised) or type(raised).__name__)


@pytest.mark.parametrize("raised", [TimeLimit, KeyboardInterrupt])
def test_what_the_caller_of_the_model_raises_passes_through(raised):
    class Plain:
        def predict(self, data):
            raise raised

        def predict_batch(self, items):
            raise raised

    with pytest.raises(raised):
        hosted(Plain()).predict({})
    with pytest.raises(raised):
        hosted(Plain()).predict_together([{}, {}])


def test_rqs_own_time_limit_is_a_model_timeout():
    class JobTimeoutException(Exception):
        pass

    class Plain:
        def predict(self, data):
            raise JobTimeoutException("Task exceeded maximum timeout value (1 seconds)")

    assert error(hosted(Plain()).predict({}))["kind"] == "ModelTimeout"


def test_an_exception_that_cannot_be_printed_is_no_problem():
    class UnprintableError(Exception):
        def __str__(self):
            raise RuntimeError

    class Plain:
        def predict(self, data):
            raise UnprintableError

    assert error(hosted(Plain()).predict({}))["message"] == "UnprintableError that can't be printed"


def test_messages_and_tracebacks_are_limited():
    class Plain:
        def predict(self, data):
            raise ValueError("x" * 1_000_000)

    outcome = hosted(Plain()).predict({})

    assert len(error(outcome)["message"]) == 2000
    assert len(outcome["traceback"]) < 17_000
    assert outcome["traceback"].startswith("Traceback")


def test_output_that_is_no_json_names_the_place():
    class Plain:
        def predict(self, data):
            return {"scores": [1, float("nan")]}

    found = error(hosted(Plain()).predict({}))
    assert found["kind"] == "InvalidOutput"
    assert found["type"] is None
    assert found["message"].startswith("output.scores[1]: nan is not JSON")
    assert hosted(Plain(), nan="null").predict({}) == {"value": {"scores": [1, None]}}


def test_a_validator_that_breaks_is_the_models_fault():
    class Plain:
        input_schema = type("Validator", (), {"validate": lambda self, data: 1 / 0, "schema": {}})()

        def predict(self, data):
            return data

    assert error(hosted(Plain()).predict({}))["type"] == "ZeroDivisionError"


def test_hints_for_type_checkers_only_are_no_schema():
    class Plain:
        def predict(self, data: ThereForTypeCheckersOnly):  # noqa: F821 - that is the point
            return data

    model = hosted(Plain())
    assert model.card["input_schema"] is None
    assert model.predict({"x": 1}) == {"value": {"x": 1}}


# Batches.


def test_a_batch_is_one_call_in_the_same_order():
    instance = construct(load_class("kinds:Batched"))

    outcomes = hosted(instance).predict_together([{"width": 0}, {"width": 2}, {"width": "asdfg"}, {"width": 0.5}])

    assert [outcome.get("value") for outcome in outcomes] == [False, True, None, False]
    assert error(outcomes[2])["message"] == "width: Input should be a valid number, got 'asdfg'"
    assert instance.sizes == [3]


def test_a_batch_that_raises_leaves_open_whose_fault_it_was():
    assert host("Batched").predict_together([{"width": 0}, {"width": -1}, {"width": 2}]) is None


def test_a_batch_of_invalid_inputs_does_not_reach_the_model():
    instance = construct(load_class("kinds:Batched"))

    assert [set(one) for one in hosted(instance).predict_together([{}, {}])] == [{"error", "traceback"}] * 2
    assert instance.sizes == []


@pytest.mark.parametrize(
    ("returned", "got"), [([1], "1 outputs"), ((1, 2, 3), "3 outputs"), ("ab", "one str"), (None, "one NoneType")]
)
def test_a_batch_of_another_length_fails_whole(returned, got):
    class Plain:
        def predict(self, data):
            return data

        def predict_batch(self, items):
            return returned

    outcomes = hosted(Plain()).predict_together([1, 2])

    message = f"predict_batch was given 2 inputs and returned {got}"
    assert [error(one)["message"] for one in outcomes] == [message] * 2
    assert [error(one)["kind"] for one in outcomes] == ["ModelError"] * 2


def test_in_a_batch_each_output_is_converted_alone():
    class Plain:
        def predict(self, data):
            return data

        def predict_batch(self, items):
            return [1, {2}]

    outcomes = hosted(Plain()).predict_together([1, 2])

    assert outcomes[0] == {"value": 1}
    assert error(outcomes[1])["kind"] == "InvalidOutput"


# Loading.


def refused(path: str) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load_class(path)
    return caught.value


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_module:Model", r"no module named 'nowhere_module', neither in .* nor installed"),
        ("nowhere_package.module:Model", r"no module named 'nowhere_package'"),
        ("unruly.inner:Model", r"no module named 'unruly.inner'"),
        ("unruly:Modle", r"module 'unruly' has no class 'Modle'; it has Unruly"),
        ("unruly:os", r"module 'unruly' has no class 'os'"),
        ("unruly", r"'unruly' is no class; write package.module:Class"),
        ("kinds:Petal", r"class 'Petal' has no method predict\(data\)"),
    ],
)
def test_what_is_missing_is_told(path, message):
    found = refused(path)

    assert found.stage == "missing"
    assert re.match(message, found.message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nimport not_installed_anywhere\n", "broken_module.py:2: ModuleNotFoundError: No module named"),
        ("\n\nx = 1 / 0\n", "broken_module.py:3: ZeroDivisionError: division by zero"),
        ("class Model:\n  def predict(:\n", "broken_module.py:2: SyntaxError: "),
        ("import sys\nsys.exit(3)\n", "broken_module.py:2: SystemExit: 3"),
        ("import json\njson.loads('{')\n", "decoder.py"),
    ],
)
def test_a_module_that_is_broken_inside_is_told_apart(source, message, tmp_path):
    (tmp_path / "broken_module.py").write_text(source)

    found = refused("broken_module:Model")

    assert found.stage == "broken"
    assert message in found.message
    assert "broken_module.py" in found.traceback
    assert "\n" not in found.message


def test_a_module_that_was_mended_loads(tmp_path):
    assert refused("late_module:Model").stage == "missing"
    (tmp_path / "late_module.py").write_text("class Model:\n  def predict(self, data): return 1\n")

    assert load_class("late_module:Model").__name__ == "Model"


def test_a_constructor_that_raises_is_told():
    class Plain:
        def __init__(self):
            raise OSError("no artifact")

    with pytest.raises(LoadError, match=r"^Plain\(\) raised OSError: no artifact$") as caught:
        construct(Plain)
    assert (caught.value.stage, caught.value.type) == ("init", "OSError")
    assert "no artifact" in caught.value.traceback


def test_the_cache_loads_once_however_many_threads_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MODELS", {})
    monkeypatch.setattr(cache, "LOADS", {})
    (tmp_path / "slow_module.py").write_text(
        "import threading\n"
        "class Model:\n"
        "  def __init__(self): threading.Event().wait(0.05)\n"
        "  def predict(self, data): return data\n"
    )
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.get("slow", "slow_module:Model"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert cache.LOADS == {"slow": 1}


def test_a_load_that_failed_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MODELS", {})
    monkeypatch.setattr(cache, "LOADS", {})
    (tmp_path / "moody_module.py").write_text(
        "import pathlib\n"
        "class Model:\n"
        f"  def __init__(self): pathlib.Path({str(tmp_path)!r}, 'artifact').read_text()\n"
        "  def predict(self, data): return data\n"
    )

    with pytest.raises(LoadError, match="FileNotFoundError"):
        cache.get("moody", "moody_module:Model")
    (tmp_path / "artifact").touch()
    assert cache.get("moody", "moody_module:Model").predict(1) == {"value": 1}
    assert cache.LOADS == {"moody": 1}


def test_nothing_is_logged_by_a_model_that_is_fine(caplog):
    with caplog.at_level(logging.WARNING):
        host("WithDataclass")
    assert caplog.text == ""
    assert contract.LoadError.__mro__[1] is Exception


# Many rows at once.


OUTPUTS = [{"name": "y", "kind": "f8"}, {"name": "day", "kind": "str"}]


class _Day(pydantic.BaseModel):
    x: float
    day: dt.date = dt.date(2024, 2, 29)


class _StrictDay(_Day, strict=True):
    pass


class _Doubled(_Day):
    @classmethod
    def model_validate(cls, obj, **options):
        return super().model_validate({**obj, "x": obj["x"] * 2}, **options)


@pytest.mark.parametrize(("declared", "factor"), [(_Day, 1), (_StrictDay, 1), (_Doubled, 2)])
def test_rows_are_validated_as_single_inputs_are(declared, factor):
    class Batched:
        input_schema = declared

        def predict(self, data):
            return self.predict_batch([data])[0]

        def predict_batch(self, items):
            return [{"y": item.x, "day": item.day.isoformat()} for item in items]

    model = hosted(Batched())
    rows = [{"x": 1.0}, {"x": 2.0, "day": "2024-03-01"}, {"x": 3.0, "day": 4.5}]

    right, nobody = model.score_together(rows[:2], OUTPUTS)
    mixed, failed = model.score_together(rows, OUTPUTS)
    none, all_failed = model.score_together(rows[2:], OUTPUTS)

    assert list(map(list, right)) == [[1.0 * factor, 2.0 * factor], ["2024-02-29", "2024-03-01"]]
    assert mixed == [[1.0 * factor, 2.0 * factor, None], ["2024-02-29", "2024-03-01", None]]
    assert none == [[None], [None]]
    assert nobody == {}
    assert failed == {2: model.predict(rows[2])}
    assert all_failed == {0: model.predict(rows[2])}
    assert model.score_alone(rows[1], OUTPUTS) == {"value": [2.0 * factor, "2024-03-01"]}


@pytest.mark.parametrize("returned", [None, [], [{"y": 1.0}], "ab"])
def test_rows_are_not_decided_by_a_batch_of_another_length(returned):
    class Batched:
        def predict(self, data):
            return data

        def predict_batch(self, items):
            return returned

    assert hosted(Batched()).score_together([1, 2], OUTPUTS) is None
