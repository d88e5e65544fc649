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
from typing import Any, Callable, Dict, List, Optional, Tuple

from .output import OutputError, clip, to_json
from .refusal import InputError, explain
from .schemas import Shape, hints, shape

Outcome = Dict[str, Any]

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
        inputs, outputs = _shapes(instance)
        self._convert = inputs.convert
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
        outcomes = [_attempt(self._convert, item) for item in items]
        joined = [index for index, outcome in enumerate(outcomes) if "value" in outcome]
        if not joined:
            return outcomes
        try:
            results = self._instance.predict_batch([outcomes[index]["value"] for index in joined])
            results = results.tolist() if hasattr(results, "tolist") else results
        except _PASSING:
            raise
        except BaseException:  # noqa: BLE001 - as in _attempt
            return None
        got = f"{len(results)} outputs" if isinstance(results, (list, tuple)) else f"one {type(results).__name__}"
        if got != f"{len(joined)} outputs":
            message = f"predict_batch was given {len(joined)} inputs and returned {got}"
            wrong = error_outcome("ModelError", None, message)
            return [wrong if "value" in outcome else outcome for outcome in outcomes]
        for index, result in zip(joined, results):  # noqa: B905 - Python 3.8
            outcomes[index] = _attempt(self._publish, result)
        return outcomes

    def _publish(self, result: Any) -> Any:
        return to_json(result, self._nan)


def _attempt(step: Callable[[Any], Any], data: Any) -> Outcome:
    try:
        return {"value": step(data)}
    except _PASSING:
        raise
    except BaseException as error:  # noqa: BLE001 - SystemExit and the like must not end the host
        return failure(error, data)


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


def _shapes(instance: Any) -> Tuple[Shape, Shape]:
    """Return the shapes of input and output: as its attributes declare them, else as `predict` is hinted."""
    hinted: Dict[str, Any] = {}
    parameter = ""
    try:
        parameter = next(iter(inspect.signature(instance.predict).parameters))
        hinted = hints(instance.predict)
    except Exception:  # noqa: BLE001, S110 - hints may name what is there for type checkers only
        pass
    inputs, outputs = _attribute(instance, "input_schema"), _attribute(instance, "output_schema")
    return (
        shape(hinted.get(parameter) if inputs is None else inputs),
        shape(hinted.get("return") if outputs is None else outputs, output=True),
    )


def _example(instance: Any, schema: Any) -> Any:
    example = _attribute(instance, "example")
    if example is None or callable(example):
        examples = (schema or {}).get("examples")
        return examples[0] if examples and isinstance(examples, list) else None
    try:
        return to_json(example)
    except OutputError as error:
        raise LoadError("example", str(error).replace("output", "example", 1), error) from error
