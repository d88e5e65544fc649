"""What a model is to the host: a class with ``predict(data)`` and a constructor that loads.

`load_class`, `construct` and `Model` are the only code of rq_models that runs a model's code. Whatever it raises comes
out as a `LoadError` or as an outcome: ``{"value": JSON}``, or ``{"error": record, "traceback": text}``, where the
record has the fields of `rq_models.errors.ErrorRecord`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from . import columns
from .output import OutputError, clip, to_json
from .refusal import InputError, explain
from .schemas import hints, shape

Outcome = Dict[str, Any]
Scored = Tuple[List[columns.Values], Dict[int, Outcome]]
"""Columns of values, and by their index the outcomes of the rows that failed: those are None in all columns."""

_HERE = os.path.dirname(__file__)  # noqa: PTH120 - compared with the file names of frames
_LONGEST_TRACEBACK = 16_000
_RAISED = (Exception, SystemExit)  # what a model may raise while it loads
# By class name: the host can import neither. The last is RQ's, raised into the model when a SimpleWorker runs it.
_KINDS = {
    "MLModelSchemaValidationException": "InvalidInput",
    "InvalidInput": "InvalidInput",
    "JobTimeoutException": "ModelTimeout",
}


class TimeLimit(BaseException):
    """Raised into a prediction that took too long; no Exception, so that the model's own handlers let it through."""


_PASSING = (TimeLimit, KeyboardInterrupt)
"""Raised by whoever runs the model, not by the model."""


class LoadError(Exception):
    """The model can't be loaded.

    Attributes:
        stage: "missing" (no such module or class), "broken" (the module is there, and importing it failed), "init" (its
            constructor or one of its properties raised) or "example" (it can't predict its own example).
        type: class name of the exception behind it, if there is one.
        message: one line for a person.
        traceback: the model's, as text.
    """

    def __init__(self, stage: str, message: str, error: Optional[BaseException] = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.type = None if error is None else type(error).__name__
        self.message = message
        self.traceback = message if error is None else trace(error)


def load_class(path: str) -> Any:
    """Import the class that ``package.module:Class`` names.

    Raises:
        LoadError: its stage is "missing" or "broken".
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise LoadError("missing", f"{path!r} is no class; write package.module:Class")
    importlib.invalidate_caches()  # the file may have been written since this process looked last
    try:
        module = importlib.import_module(module_name)
    except _RAISED as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            where = f"neither in {sys.path[0]} nor installed"
            raise LoadError("missing", f"no module named {error.name!r}, {where}", error) from error
        raise LoadError("broken", f"{_place(error) or module_name}: {_describe(error)}", error) from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        models = [name for name, thing in vars(module).items() if isinstance(thing, type) and hasattr(thing, "predict")]
        has = f"it has {', '.join(models)}" if models else "it has no class with a predict method"
        raise LoadError("missing", f"module {module_name!r} has no class {class_name!r}; {has}")
    if not callable(getattr(cls, "predict", None)):
        raise LoadError("missing", f"class {class_name!r} has no method predict(data)")
    return cls


def _place(error: BaseException) -> str:
    """Return where an import failed: the last line of the model's own, or else of a library that it uses."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and not frame.filename.startswith(_HERE)
    ]
    own = [place for place in places if "site-packages" not in place]
    return (["", *places, *own])[-1]


def construct(cls: Any) -> Any:
    """Return an instance of a model's class.

    Raises:
        LoadError: the constructor raised; its stage is "init".
    """
    try:
        return cls()
    except _RAISED as error:
        raise LoadError("init", f"{cls.__name__}() raised {_describe(error)}", error) from error


class Model:
    """A loaded model.

    Args:
        name: the configured name.
        instance: an object with `predict`.
        nan: see `output.to_json`.

    Attributes:
        card: what is published of it, JSON-able: name, display_name, qualified_name, version, description,
            input_schema, output_schema, example, batch.

    Raises:
        LoadError: one of its properties raised, or its example is no JSON.
    """

    def __init__(self, name: str, instance: Any, nan: str = "error") -> None:
        self._instance = instance
        self._nan = nan
        declared, outcome = _declared(instance)
        inputs, outputs = shape(declared), shape(outcome, output=True)
        self._convert = inputs.convert
        # What does the same, or raises something, which `_convert` then says in our words.
        self._convert_fast = (inputs.json and _validator(declared)) or inputs.convert
        self.card: Dict[str, Any] = {
            "name": name,
            "display_name": _text(instance, "display_name") or name,
            "qualified_name": _text(instance, "qualified_name") or name,
            "version": _version(instance),
            "description": _text(instance, "description"),
            "input_schema": inputs.json,
            "output_schema": outputs.json,
            "example": _example(instance, inputs.json),
            "batch": callable(getattr(instance, "predict_batch", None)),
        }

    def predict(self, data: Any) -> Outcome:
        """Predict one input and return its outcome."""
        return _attempt(lambda one: self._publish(self._instance.predict(self._convert(one))), data)

    def predict_together(self, items: List[Any]) -> Optional[List[Outcome]]:
        """Predict several inputs in one call of the model's `predict_batch`, and return their outcomes in this order.

        An input that does not validate fails alone, and is not given to the model. None means that the call raised: it
        takes each input alone to see whose fault that was.
        """
        inputs, failed = self._convert_all(items)
        raised, results = self._call_together(inputs)
        if raised:
            return None
        got = f"{len(results)} outputs" if isinstance(results, (list, tuple)) else f"one {type(results).__name__}"
        if got != f"{len(inputs)} outputs":
            message = f"predict_batch was given {len(inputs)} inputs and returned {got}"
            decided = iter([error_outcome("ModelError", None, message)] * len(inputs))
        else:
            decided = (_attempt(self._publish, result) for result in results)
        return _in_order(len(items), failed, decided)

    def score_together(self, rows: List[Any], outputs: Sequence[columns.Json]) -> Optional[Scored]:
        """Predict many rows as `predict_together` does, and return what they give for the columns of `outputs`.

        None means that the call raised, or returned something else than one output for each.
        """
        inputs, failed = self._convert_all(rows)
        _, results = self._call_together(inputs)
        if not isinstance(results, (list, tuple)) or len(results) != len(inputs):
            return None
        taken = columns.take(results, outputs)
        if taken is not None and not failed:
            return taken, failed
        if taken is not None:
            decided: Iterator[Outcome] = ({"value": values} for values in zip(*taken))  # noqa: B905 - Python 3.8
        else:
            decided = (_attempt(lambda one: columns.entries(one, outputs, self._nan), result) for result in results)
        return table(_in_order(len(rows), failed, decided), len(outputs))

    def score_alone(self, row: Any, outputs: Sequence[columns.Json]) -> Outcome:
        """Predict one row; the value of its outcome is a list of what it gives for each column of `outputs`."""
        predict = self._instance.predict
        return _attempt(lambda one: columns.entries(predict(self._convert(one)), outputs, self._nan), row)

    def _convert_all(self, items: List[Any]) -> Tuple[List[Any], Dict[int, Outcome]]:
        """Return the inputs of those items that validate, and by their index the outcomes of those that do not."""
        try:
            return list(map(self._convert_fast, items)), {}
        except _PASSING:
            raise
        except BaseException:  # noqa: BLE001, S110 - as in _attempt; below it turns out whose fault it was
            pass
        outcomes = [_attempt(self._convert, item) for item in items]
        failed = {index: outcome for index, outcome in enumerate(outcomes) if "error" in outcome}
        return [outcome["value"] for outcome in outcomes if "value" in outcome], failed

    def _call_together(self, inputs: List[Any]) -> Tuple[bool, Any]:
        """Return whether `predict_batch` raises on these inputs, and what it returns, which may be anything."""
        if not inputs:
            return False, []
        try:
            results = self._instance.predict_batch(inputs)
            return False, results.tolist() if hasattr(results, "tolist") else results
        except _PASSING:
            raise
        except BaseException:  # noqa: BLE001 - as in _attempt
            return True, None

    def _publish(self, result: Any) -> Any:
        return to_json(result, self._nan)


def _attempt(step: Callable[[Any], Any], data: Any) -> Outcome:
    try:
        return {"value": step(data)}
    except _PASSING:
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit and the like must not end the host
        return failure(error, data)


def _in_order(count: int, failed: Dict[int, Outcome], decided: Iterator[Outcome]) -> List[Outcome]:
    """Return the outcomes of so many items: of those that failed before the call, and of the others by turns."""
    return [failed[index] if index in failed else next(decided) for index in range(count)]


def table(outcomes: Sequence[Outcome], width: int) -> Scored:
    """Return the columns of outcomes whose values are the `width` entries of a row."""
    failed = {index: outcome for index, outcome in enumerate(outcomes) if "error" in outcome}
    found = [outcome.get("value") or [None] * width for outcome in outcomes]
    return [[entries[column] for entries in found] for column in range(width)], failed


def error_outcome(kind: str, type: Optional[str], message: str, trace: str = "") -> Outcome:  # noqa: A002 - as in the error record
    """Return the outcome of a prediction that failed for good."""
    record = {"kind": kind, "type": type, "message": message, "retryable": False}
    return {"error": record, "traceback": trace or f"{type or kind}: {message}\n"}


def failure(error: BaseException, data: Any) -> Outcome:
    """Return the outcome of a prediction on `data` that raised."""
    name = type(error).__name__
    if isinstance(error, InputError):
        return error_outcome("InvalidInput", error.type, str(error))
    if isinstance(error, OutputError):
        return error_outcome("InvalidOutput", None, str(error))
    kind = next((_KINDS[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _KINDS), "ModelError")
    if kind != "InvalidInput":
        return error_outcome(kind, name, _message(error) or name, trace(error))
    # The message may hold the whole input. If the model wrapped a library's error, that one says it by field.
    refusal = explain(error.__cause__, data) or explain(error.__context__, data)
    message = str(refusal) if refusal else clip(_message(error), 300) or name
    return error_outcome(kind, name, message, "".join(traceback.format_tb(_own(error))) + f"{name}: {message}\n")


def trace(error: BaseException) -> str:
    """Return the traceback as text, without the host's own frames above the model's."""
    text = "".join(traceback.format_exception(type(error), error, _own(error) or error.__traceback__))
    half = _LONGEST_TRACEBACK // 2
    return text if len(text) <= _LONGEST_TRACEBACK else f"{text[:half]}\n...\n{text[-half:]}"


def _own(error: BaseException) -> Any:
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename.startswith(_HERE):
        found = found.tb_next
    return found


def _message(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:  # noqa: BLE001 - an exception class of the model's, whose __str__ fails
        return f"{type(error).__name__} that can't be printed"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {clip(_message(error), 300)}".rstrip(": ")


def _attribute(instance: Any, name: str) -> Any:
    """Return a class attribute, instance attribute or property, or None if the model has none of this name."""
    try:
        return getattr(instance, name)
    except _RAISED as error:
        if isinstance(error, AttributeError) and inspect.getattr_static(instance, name, None) is None:
            return None
        raise LoadError("init", f"its {name} raised {_describe(error)}", error) from error


def _text(instance: Any, name: str) -> str:
    value = _attribute(instance, name)
    return "" if value is None or callable(value) else str(value)


def _version(instance: Any) -> str:
    """Return `version`, or the older MLModel's two halves of it."""
    halves = [_text(instance, "major_version"), _text(instance, "minor_version")]
    return _text(instance, "version") or ".".join(half for half in halves if half)


def _declared(instance: Any) -> Tuple[Any, Any]:
    """Return what declares input and output: its attributes, else the hints of `predict`."""
    hinted: Dict[str, Any] = {}
    parameter = ""
    try:
        parameter = next(iter(inspect.signature(instance.predict).parameters))
        hinted = hints(instance.predict)
    except Exception:  # noqa: BLE001, S110 - hints may name what is there for type checkers only
        pass
    inputs, outputs = _attribute(instance, "input_schema"), _attribute(instance, "output_schema")
    return (
        hinted.get(parameter) if inputs is None else inputs,
        hinted.get("return") if outputs is None else outputs,
    )


def _validator(declared: Any) -> Optional[Callable[[Any], Any]]:
    """Return the validation of a class of pydantic 2, without what stands around it; None if that does more."""
    validate = getattr(declared, "model_validate", None)
    if not isinstance(declared, type) or getattr(validate, "__module__", None) != "pydantic.main":
        return None
    try:
        # A strict one would refuse whatever JSON writes as a string; see `schemas`.
        return None if declared.model_config.get("strict") else declared.__pydantic_validator__.validate_python  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - pydantic's own: a class that is not complete yet
        return None


def _example(instance: Any, schema: Any) -> Any:
    example = _attribute(instance, "example")
    if example is None or callable(example):
        examples = (schema or {}).get("examples")
        return examples[0] if examples and isinstance(examples, list) else None
    try:
        return to_json(example)
    except OutputError as error:
        raise LoadError("example", str(error).replace("output", "example", 1), error) from error
