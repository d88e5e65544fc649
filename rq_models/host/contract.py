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
from typing import Any, Dict, List, NoReturn, Optional, Tuple

from .output import OutputError, clip, to_json
from .refusal import InputError, explain
from .schemas import UNKNOWN, Shape, hints, shape

Outcome = Dict[str, Any]

_HERE = os.path.dirname(__file__)  # noqa: PTH120 - compared with the file names of frames
_NOTHING: Any = object()
_LONGEST_MESSAGE = 2000
_LONGEST_TRACEBACK = 16_000
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
    except _PASSING:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            where = f"neither in {sys.path[0]} nor installed"
            raise LoadError("missing", f"no module named {error.name!r}, {where}", error) from error
        _broken(module_name, error)
    cls: Any = module
    for name in class_name.split("."):
        cls = getattr(cls, name, None)
    if not isinstance(cls, type):
        models = [name for name, thing in vars(module).items() if isinstance(thing, type) and hasattr(thing, "predict")]
        has = f"it has {', '.join(models)}" if models else "it has no class with a predict method"
        raise LoadError("missing", f"module {module_name!r} has no class {class_name!r}; {has}")
    if not callable(getattr(cls, "predict", None)):
        raise LoadError("missing", f"class {class_name!r} has no method predict(data)")
    return cls


def _broken(module: str, error: BaseException) -> NoReturn:
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        frames = [one for one in traceback.extract_tb(error.__traceback__) if "importlib" not in one.filename]
        frames = [one for one in frames if not one.filename.startswith(_HERE)]
        # The last line of the model's own, if it isn't installed like the libraries that it uses.
        own = [one for one in frames if "site-packages" not in one.filename] or frames
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else module
    raise LoadError("broken", f"{place}: {_describe(error)}", error) from error


def construct(cls: Any) -> Any:
    """Return an instance of a model's class.

    Raises:
        LoadError: the constructor raised; its stage is "init".
    """
    try:
        return cls()
    except _PASSING:
        raise
    except BaseException as error:
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
        self._nan = nan
        self._predict = _synchronous(instance.predict)
        batch = getattr(instance, "predict_batch", None)
        self._predict_batch: Any = _synchronous(batch) if callable(batch) else None
        given, returned = _shapes(instance)
        self._convert = given.convert
        self.card: Dict[str, Any] = {
            "name": name,
            "display_name": _text(instance, "display_name") or name,
            "qualified_name": _text(instance, "qualified_name") or name,
            "version": _version(instance),
            "description": _text(instance, "description"),
            "input_schema": given.json,
            "output_schema": returned.json,
            "example": _example(instance, given.json),
            "batch": self._predict_batch is not None,
        }

    def predict(self, data: Any) -> Outcome:
        """Predict one input and return its outcome."""
        try:
            value = data if self._convert is None else self._convert(data)
            return {"value": to_json(self._predict(value), self._nan)}
        except _PASSING:
            raise
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like must not end the host
            return failure(error, data)

    def predict_together(self, items: List[Any]) -> Optional[List[Outcome]]:
        """Predict several inputs in one call of the model's `predict_batch`, and return their outcomes in this order.

        An input that does not validate fails alone, and is not given to the model. None means that the call raised: it
        takes each input alone to see whose fault that was.
        """
        outcomes: Dict[int, Outcome] = {}
        values: Dict[int, Any] = {}
        for index, item in enumerate(items):
            try:
                values[index] = item if self._convert is None else self._convert(item)
            except _PASSING:
                raise
            except BaseException as error:  # noqa: BLE001 - as in predict
                outcomes[index] = failure(error, item)
        if values:
            try:
                results = self._predict_batch(list(values.values()))
                results = results.tolist() if callable(getattr(results, "tolist", None)) else results
            except _PASSING:
                raise
            except BaseException:  # noqa: BLE001 - as in predict
                return None
            outcomes.update(self._share_out(results, list(values)))
        return [outcomes[index] for index in range(len(items))]

    def _share_out(self, results: Any, indexes: List[int]) -> Dict[int, Outcome]:
        is_list = isinstance(results, (list, tuple))
        if not is_list or len(results) != len(indexes):
            got = f"{len(results)} outputs" if is_list else f"one {type(results).__name__}"
            wrong = f"predict_batch was given {len(indexes)} inputs and returned {got}"
            return dict.fromkeys(indexes, error_outcome("ModelError", None, wrong))
        return {index: self._outcome(result) for index, result in zip(indexes, results)}  # noqa: B905 - Python 3.8

    def _outcome(self, result: Any) -> Outcome:
        try:
            return {"value": to_json(result, self._nan)}
        except _PASSING:
            raise
        except BaseException as error:  # noqa: BLE001 - as in predict
            return failure(error, None)


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
    lines = traceback.format_exception(type(error), error, _own(error) or error.__traceback__)
    text = "".join(lines)
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n...\n{text[-half:]}"
    return text


def _own(error: BaseException) -> Any:
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename.startswith(_HERE):
        found = found.tb_next
    return found


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_MESSAGE]
    except Exception:  # noqa: BLE001 - an exception class of the model's, whose __str__ fails
        return f"{type(error).__name__} that can't be printed"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {clip(_message(error), 300)}".rstrip(": ")


def _synchronous(method: Any) -> Any:
    if not inspect.iscoroutinefunction(method):
        return method
    import asyncio  # noqa: PLC0415 - few models need it

    return lambda data: asyncio.run(method(data))


def _attribute(instance: Any, name: str) -> Any:
    """Return a class attribute, instance attribute or property, or None if the model has none of this name."""
    try:
        return getattr(instance, name)
    except _PASSING:
        raise
    except BaseException as error:
        if isinstance(error, AttributeError) and inspect.getattr_static(instance, name, None) is None:
            return None
        raise LoadError("init", f"its {name} raised {_describe(error)}", error) from error


def _text(instance: Any, name: str) -> str:
    value = _attribute(instance, name)
    return "" if value is None or callable(value) else str(value)


def _version(instance: Any) -> str:
    """Return `version`; or the older MLModel's two halves of it; or that of the module."""
    halves = [_text(instance, "major_version"), _text(instance, "minor_version")]
    module = sys.modules.get(type(instance).__module__.split(".")[0])
    of_module = getattr(module, "__version__", "")
    return _text(instance, "version") or (".".join(halves) if all(halves) else str(of_module))


def _shapes(instance: Any) -> Tuple[Shape, Shape]:
    """Return the shapes of input and output: as its attributes declare them, else as `predict` is hinted."""
    checks_itself = any(cls.__name__ == "MLModel" for cls in type(instance).__mro__)
    declared = _attribute(instance, "input_schema"), _attribute(instance, "output_schema")
    hinted: Dict[str, Any] = {}
    parameter = ""
    if None in declared:
        try:
            parameter = next(iter(inspect.signature(instance.predict).parameters))
            hinted = hints(instance.predict)
        except Exception:  # noqa: BLE001, S110 - hints may name what is there for type checkers only
            pass
    inputs = hinted.get(parameter) if declared[0] is None else declared[0]
    outputs = hinted.get("return") if declared[1] is None else declared[1]
    return (
        UNKNOWN if inputs is None else shape(inputs, checks_itself=checks_itself),
        UNKNOWN if outputs is None else shape(outputs, output=True),
    )


def _example(instance: Any, schema: Any) -> Any:
    example = _attribute(instance, "example")
    if example is None or callable(example):
        found = _given(schema, schema, ())
        return None if found is _NOTHING else found
    try:
        return to_json(example)
    except OutputError as error:
        raise LoadError("example", str(error).replace("output", "example", 1), error) from error


def _given(schema: Any, whole: Any, within: Tuple[str, ...]) -> Any:
    """Return the example that a JSON Schema gives, or that its properties give together, or _NOTHING."""
    if not isinstance(schema, dict):
        return _NOTHING
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        return examples[0]
    for key in ("example", "default"):
        if schema.get(key) is not None:
            return schema[key]
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name and name not in within:
        defs = {**whole.get("definitions", {}), **whole.get("$defs", {})}
        return _given(defs.get(name), whole, (*within, name))
    parts = {key: _given(one, whole, within) for key, one in schema.get("properties", {}).items()}
    parts = {key: part for key, part in parts.items() if part is not _NOTHING}
    return parts if parts and set(schema.get("required", ())) <= set(parts) else _NOTHING
