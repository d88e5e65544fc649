"""Whatever comes from outside, nothing crashes or hangs: frames, settings, jobs, and the inputs that clients check."""

from __future__ import annotations

import json
import math
import operator
import zlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from fakeredis import FakeRedis
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jsonschema import SchemaError
from rq.utils import now

from rq_models import ledger
from rq_models.errors import ConfigurationError, RqModelsError
from rq_models.host import frames
from rq_models.inputs import InputCheck, _fits
from rq_models.jobs import parse_data
from rq_models.ledger import _HANGING, _READ, Taken
from rq_models.settings import ModelSettings, Settings
from rq_models.worker import ModelWorker

# How long a single example takes depends on the machine.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

finite = st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(st.characters())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(any_text, json_values, max_size=4)


class TestFrames:
    @unhurried
    @given(st.lists(objects, max_size=5), st.data())
    def test_any_objects_survive_any_cutting(self, sent: list[Any], data: st.DataObject):
        stream = b"".join(map(frames.encode, sent))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))

        decoder = frames.Decoder()
        ends = zip([0, *cuts], [*cuts, len(stream)], strict=True)
        found = [one for start, end in ends for one in decoder.feed(stream[start:end])]

        assert found == sent

    @unhurried
    @given(st.lists(st.binary() | st.binary().map(lambda body: len(body).to_bytes(4, "big") + body)))
    def test_any_bytes_are_refused_by_one_error_only(self, chunks: list[bytes]):
        decoder = frames.Decoder()
        with suppress(frames.FrameError):
            for chunk in chunks:
                decoder.feed(chunk)

    @unhurried
    @given(st.recursive(json_values | st.floats() | st.binary(), st.lists))
    def test_any_value_makes_a_frame_or_is_refused(self, value: Any):
        try:
            frame = frames.encode({"value": value})
        except frames.FrameError:
            return
        assert frames.Decoder().feed(frame) == [{"value": value}]


toml_scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["module:Model", "redis://127.0.0.1:6379/0", "error", "overlap", "ModelTimeout"])
    | st.dates()
    | st.times()
    | st.datetimes()
)
toml_keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
toml_values = st.recursive(
    toml_scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(toml_keys, inner, max_size=3),
    max_leaves=8,
)
MODEL_KEYS = [field.alias or name for name, field in ModelSettings.model_fields.items()]
model_tables = st.dictionaries(st.sampled_from(MODEL_KEYS) | toml_keys, toml_values, max_size=5).flatmap(
    lambda table: st.sampled_from([table, {**table, "class": "module:Model"}])
)
tables = st.fixed_dictionaries(
    {},
    optional={
        "redis_url": toml_values,
        "models": toml_values | st.dictionaries(st.just("churn") | toml_keys, model_tables | toml_values, max_size=3),
        "root": toml_values,
        "files": toml_values,
    },
)


def toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(one)}" for key, one in value.items()) + "}"
        case float() if math.isnan(value) or math.isinf(value):
            return str(value)
        case float():
            return f"{value:.17e}"
        case int():
            return str(value)
    return str(value.isoformat())


def document(tables: dict[str, Any]) -> bytes:
    return "".join(f"{toml(key)} = {toml(value)}\n" for key, value in tables.items()).encode()


class TestSettings:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config").mkdir()
        return tmp_path / "config"

    @unhurried
    @given(base=tables.map(document) | st.binary(), above=st.none() | tables.map(document))
    def test_any_files_are_settings_or_a_configuration_error(self, folder, base: bytes, above: bytes | None):
        environ = {} if above is None else {"RQ_MODELS_ENV": "above"}
        (folder / "base.toml").write_bytes(base)
        (folder / "above.toml").write_bytes(above or b"")
        try:
            found = Settings.load(folder, environ=environ)
        except ConfigurationError:
            return
        for name in found.models:
            assert found.model(name).class_path
        assert found.masked_url

    @unhurried
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.sampled_from([1, 2]))
    def test_any_environment_is_settings_or_a_configuration_error(self, folder, text: str, which: int):
        (folder / "base.toml").write_text("")
        with suppress(ConfigurationError):
            Settings.load(folder, environ={["", "REDIS_URL", "RQ_MODELS_ENV"][which]: text})


WANTED = "rq_models.jobs.churn"
job_lists = st.lists(json_values, max_size=6) | st.tuples(
    st.just(WANTED) | json_values, st.none() | json_values, st.lists(json_values, max_size=2), objects
)
job_data = job_lists.map(lambda data: json.dumps(data).encode())
job_data |= job_data.map(zlib.compress) | st.binary() | st.binary().map(zlib.compress)
numbers = (st.integers() | st.floats()).map(lambda number: str(number).encode()) | st.sampled_from([b"1h", b"180", b""])


@st.composite
def fields(draw: st.DrawFn) -> dict[bytes, bytes | None]:
    """The fields of a job's hash, with anything in them."""
    names = {*_READ, *_HANGING, b"data", b"created_at", b"status", b"meta", b"retry_intervals", b"deadline"}
    found: dict[bytes, bytes | None] = dict.fromkeys(_READ)
    found |= draw(st.dictionaries(st.sampled_from(sorted(names)), numbers | st.binary() | job_data, max_size=8))
    found[b"data"] = draw(st.none() | job_data)
    return found


class TestJobs:
    @pytest.fixture
    def worker(self):
        model = ModelSettings.model_validate({"class": "module:Model"})
        with FakeRedis() as connection:
            yield ModelWorker(["churn"], connection=connection, settings=Settings(models={"churn": model}))

    @unhurried
    @given(job_data)
    def test_any_data_is_a_list_of_four_or_refused(self, data: bytes):
        with suppress(ValueError, RqModelsError):
            assert len(parse_data(data, "churn", 100)) == 4

    @unhurried
    @given(fields(), st.booleans())
    @example({b"deadline": b"1", b"retries_left": b"many"}, True)
    def test_any_fields_are_an_item_or_end_the_job(self, worker: ModelWorker, fields: dict[bytes, Any], plain: bool):
        if not plain:
            fields = {name: value for name, value in fields.items() if value is not None}
        taken = Taken("job", "lease-1", fields, now(), "worker", "churn", worker.connection, is_plain=plain)
        try:
            item = worker.verdicts.item(taken)
        except RqModelsError as error:
            ending = worker.verdicts.failure(taken, error)
            assert ending.status == "failed"
            # What the server is told of it can be said.
            assert ledger._form(ending)
            assert ledger._run(ending)
        else:
            assert (item.id, item.timeout is None or item.timeout > 0) == ("job", True)
            frames.encode(item.input if isinstance(item.input, dict) else {"input": item.input})


bounds = st.dictionaries(
    st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
    st.integers(1, 9) | st.floats(0.5, 9),
    max_size=2,
)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from("abc")
    return (
        st.fixed_dictionaries({"type": st.just("array")}, optional={"items": inner, "minItems": st.integers(0, 3)})
        | st.fixed_dictionaries(
            {"type": st.just("object")},
            optional={
                "properties": st.dictionaries(names, inner, max_size=3),
                "required": st.lists(names, max_size=3, unique=True),
                "additionalProperties": st.booleans() | inner,
            },
        )
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)})
        | st.builds(operator.or_, inner, st.sampled_from([{"enum": [1, "a", None]}, {"minLength": 2}]))
    )


schemas = st.recursive(
    st.tuples(st.sampled_from(["number", "integer", "string", "boolean", "null"]), bounds).map(
        lambda pair: {"type": pair[0], **pair[1]}
    )
    | st.just({}),
    _schemas,
    max_leaves=6,
)


def fitting(schema: Any) -> st.SearchStrategy[Any]:
    """Inputs that a schema may find plain."""
    match schema.get("type"):
        case "number":
            return st.integers(-1, 10) | st.floats(-1, 10)
        case "integer":
            return st.integers(-1, 10)
        case "string":
            return st.text(max_size=3)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            return st.lists(fitting(schema.get("items", {})), max_size=3)
        case "object":
            properties = schema.get("properties", {})
            return st.fixed_dictionaries({name: fitting(one) for name, one in properties.items()})
    return json_values


class TestPlainInputs:
    @unhurried
    @given(schemas, st.data())
    def test_what_is_plain_passes_the_whole_check(self, schema: dict[str, Any], data: st.DataObject):
        value = data.draw(st.one_of(fitting(schema), json_values))
        assume(_fits(schema, value))
        try:
            errors: Iterable[Any] = list(InputCheck(schema)._validator.iter_errors(value))
        except SchemaError:
            return  # a schema that is none is not checked at all
        assert errors == []
