"""The configuration: ``config/`` and the environment become one frozen `Settings`; nothing else reads either.

For the address, the command line's option wins over ``REDIS_URL``, that over ``config/<RQ_MODELS_ENV>.toml``, and that
over ``config/base.toml``. ``RQ_MODELS_CONFIG`` names another folder than ``./config``; there is no upward search.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from rq_models.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_URL = "redis://127.0.0.1:6379/0"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SCHEMES = ("redis", "rediss", "unix")
# What pydantic calls the problem, in words that tell a person what to write instead.
_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "list_type": "a list in square brackets",
    "tuple_type": "a list in square brackets",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}

Seconds = Annotated[int, Field(gt=0)]
TTL = Annotated[int, Field(ge=-1)]
"""Seconds; -1 keeps for ever."""


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d{1,9}) ?([KMGT])B", value)
    if not found:
        raise ValueError('expected a size such as "2GB", or a whole number of bytes')
    return int(found[1]) << 10 * (1 + "KMGT".index(found[2]))


Size = Annotated[int, Field(gt=0), BeforeValidator(_size)]
"""Bytes, or a text such as ``"512MB"``; each unit is 1024 of the one below."""


class ModelSettings(BaseModel):
    """One table ``[models.<name>]``: what to serve, where, and within which limits. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    class_path: str = Field(alias="class")
    """``package.module:Class``, imported in the model's own process only."""
    python: str = sys.executable
    """Interpreter that runs the model; a relative path starts at the project's root."""
    env: dict[str, str] = Field(default={}, repr=False)
    """Environment variables for the model's process, added to the worker's."""
    max_batch_size: int = Field(default=64, ge=1, le=1000)
    max_batch_bytes: int = Field(default=8 << 20, ge=1)
    max_wait_ms: int = Field(default=0, ge=0)
    max_queued: int | None = Field(default=None, ge=1)
    """Jobs that may wait; None is any number. Jobs that are run again come on top."""
    max_input_bytes: int = Field(default=16 << 20, ge=1, le=64 << 20)
    """Of JSON. At most what is decompressed of any job, see `rq_models.results.MAX_DATA`."""
    max_output_bytes: int = Field(default=16 << 20, ge=1, le=128 << 20)
    """Of JSON. At most half of a frame, see `rq_models.host.frames.MAX_FRAME`."""
    workers: int = Field(default=1, ge=1)
    job_timeout: Seconds = 60
    load_timeout: Seconds = 300
    load_retries: int = Field(default=3, ge=0)
    """Further attempts to load, after growing pauses, before the jobs at hand fail with why it does not."""
    lease: Annotated[float, Field(ge=1, le=3600)] = 10
    """Seconds after which a worker that says nothing counts as dead, and its jobs are run again."""
    preload: bool = False
    max_jobs: int | None = Field(default=None, ge=1)
    """Predictions after which the model's process is replaced by a fresh one; the batch in hand is finished first."""
    max_memory: Size | None = None
    """Memory of the model's process and its children above which it is replaced, likewise."""
    swap: Literal["restart", "overlap"] = "restart"
    """Whether the fresh one loads after the worn one has left, or beside it, which takes memory for two."""
    retries: int = Field(default=3, ge=0)
    """How often a job is run again after a fault of the system."""
    retry_on: tuple[str, ...] = ()
    """Names of the model's exception types that may be retried too; ``ModelTimeout`` and ``ModelCrashed`` count."""
    result_ttl: TTL = 3600
    failure_ttl: TTL = 604800
    allowed_callbacks: tuple[str, ...] = ()
    """Callback paths and webhook addresses that jobs of this model may name."""
    nan: Literal["error", "null"] = "error"
    """What becomes of NaN and infinities in a result, which JSON does not know."""

    @field_validator("retry_on", "allowed_callbacks", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("class_path")
    @classmethod
    def _importable(cls, value: str) -> str:
        if not _CLASS.fullmatch(value):
            raise ValueError('expected "package.module:Class"')
        return value


class Settings(BaseModel):
    """Everything that was configured; `files` says where it was read from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    redis_url: str = Field(default=DEFAULT_URL, repr=False)
    models: dict[str, ModelSettings] = {}
    root: Path = Path()
    files: tuple[Path, ...] = ()

    @property
    def masked_url(self) -> str:
        """The address without its password, for logs and pages."""
        return mask_url(self.redis_url)

    @classmethod
    def load(
        cls,
        config: Path | str | None = None,
        *,
        redis_url: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Settings:
        """Read the configuration folder.

        Args:
            config: the folder; default ``RQ_MODELS_CONFIG``, else ``config`` in the working directory.
            redis_url: the command line's address, which wins over all others.
            environ: where REDIS_URL, RQ_MODELS_CONFIG and RQ_MODELS_ENV are looked up.

        Raises:
            ConfigurationError: one line that names the file, the key and what would be right.
        """
        folder = Path(config or environ.get("RQ_MODELS_CONFIG") or "config").absolute()
        overlay = environ.get("RQ_MODELS_ENV")
        layers = list(_layers(folder, overlay))
        merged: dict[str, Any] = {}
        for _, tables in layers:
            merged = _merge(merged, tables)
        for name in ("root", "files"):
            if name in merged:
                raise ConfigurationError(f"{_source(layers, (name,))}: unknown key '{name}'; remove it")
        for path, url in (("--url", redis_url), ("REDIS_URL", environ.get("REDIS_URL"))):
            if url:
                check_url(url, path)
                merged["redis_url"] = url
                break
        root = folder.parent
        try:
            settings = cls(**merged, root=root, files=tuple(path for path, _ in layers))
        except ValidationError as error:
            raise ConfigurationError(_explain(error, layers)) from None
        check_url(settings.redis_url, f"{_source(layers, ('redis_url',))}: redis_url")
        models = {}
        for name, model in settings.models.items():
            _check_name(name, _source(layers, ("models", name)))
            models[name] = model.model_copy(update={"python": _interpreter(model.python, root)})
        return settings.model_copy(update={"models": models})

    def again(self) -> Settings:
        """Read the same folder again; the address stays, because connections do.

        Raises:
            ConfigurationError: see `load`.
        """
        folder = self.files[0].parent if self.files else self.root / "config"
        return Settings.load(folder, redis_url=self.redis_url)

    def model(self, name: str) -> ModelSettings:
        """Return the settings of one model, or raise ConfigurationError that names the configured ones."""
        try:
            return self.models[name]
        except KeyError:
            known = ", ".join(sorted(self.models)) or "none"
            where = self.files[0] if self.files else self.root / "config" / "base.toml"
            raise ConfigurationError(
                f"model '{name}' is not configured; {where} has: {known}. Add a table [models.{name}]"
            ) from None

    def where(self, name: str, key: str) -> str:
        """Return ``file: models.<name>.<key>`` for a message about a value that proves wrong later."""
        layers = [(path, tomllib.loads(path.read_text("utf-8"))) for path in self.files]
        return f"{_source(layers, ('models', name, key))}: models.{name}.{key}"


def mask_url(url: str) -> str:
    """Return the address with ``***`` for its password."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        credentials, _, host = parts.netloc.rpartition("@")
        user = credentials.partition(":")[0]
        parts = parts._replace(netloc=f"{user}:***@{host}")
    # redis-py reads any connection argument from the query, the password too.
    query = re.sub(r"(?i)((?:password|username)=)[^&]*", r"\1***", parts.query)
    return urlunsplit(parts._replace(query=query))


def check_url(url: str, where: str) -> None:
    """Raise ConfigurationError unless this is an address that redis-py can open; the address itself is never shown."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in _SCHEMES and (parts.port is None or parts.port > 0)
        # Else half of it would be taken for a host or a database, and shown.
        rest = parts.path + parts.fragment + ("" if "=" in parts.query else parts.query)
        unescaped = "@" in rest and parts.scheme != "unix"
    except ValueError:
        valid = unescaped = False
    if unescaped:
        raise ConfigurationError(f"{where} has a password with /, ? or # in it; write them as %2F, %3F and %23")
    if not valid:
        raise ConfigurationError(f'{where} is no Redis address; expected e.g. "{DEFAULT_URL}" (rediss:// for TLS)')


def _layers(folder: Path, overlay: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    names = ["base.toml", f"{overlay}.toml"] if overlay else ["base.toml"]
    for name in names:
        path = folder / name
        try:
            yield path, tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            if name == "base.toml":
                remedy = "run 'rq-models init NAME' for a new project, or set RQ_MODELS_CONFIG to the folder"
            else:
                remedy = f"RQ_MODELS_ENV is '{overlay}': create it, or unset RQ_MODELS_ENV"
            raise ConfigurationError(f"{path}: no such file; {remedy}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{path}: not TOML: {error}") from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _source(layers: list[tuple[Path, dict[str, Any]]], path: tuple[Any, ...]) -> Path:
    """Return the file whose value counts: the last one that holds the key."""
    for file, tables in layers[::-1]:
        at: object = tables
        for key in path:
            at = at.get(key) if isinstance(at, dict) else None
        if at is not None:
            return file
    return layers[0][0]


def _explain(error: ValidationError, layers: list[tuple[Path, dict[str, Any]]]) -> str:
    """Return one line for the first problem: file, key, what is wrong and what would be right."""
    problem = error.errors(include_url=False, include_input=True)[0]
    loc = tuple(problem["loc"])
    loc = tuple("class" if part == "class_path" else part for part in loc)
    key = ".".join(str(part) for part in loc)
    in_model = len(loc) > 2 and loc[0] == "models"  # noqa: PLR2004 - models, name, key
    if problem["type"] == "missing":
        return (
            f"{_source(layers, loc[:-1])}: {'.'.join(map(str, loc[:-1]))} has no '{loc[-1]}'; "
            f'add {loc[-1]} = "package.module:Class"'
        )
    where = f"{_source(layers, loc)}: {key}"
    if problem["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in (ModelSettings if in_model else Settings).model_fields.items()]
        known = [name for name in known if in_model or name not in ("root", "files")]
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {remedy}"
    expected = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    expected = expected.removeprefix("should be ").removeprefix("expected ")
    got = "" if "env" in loc or "redis_url" in loc else f", got {problem['input']!r:.80}"
    return f"{where}: expected {expected}{got}"


def _check_name(name: str, file: Path) -> None:
    from rq_models import jobs  # noqa: PLC0415 - jobs reads settings when a stock worker asks it for a model

    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{file}: models.{name!r}: the name is the queue's, too: use letters, digits, '_' and '-' only"
        )
    if name in vars(jobs):
        raise ConfigurationError(f"{file}: models.{name}: the name is taken by rq_models.jobs; choose another")


def _interpreter(python: str, root: Path) -> str:
    """Return an absolute path; links stay, because a venv's python is one, and following it would leave the venv."""
    return str((root / Path(python).expanduser()).absolute()) if os.sep in python else python
