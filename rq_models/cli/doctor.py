"""``rq-models check``: a doctor who looks at everything and says what to fix."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
from rq.version import VERSION

from rq_models.cli.outcome import ExitCode, explain, one_line
from rq_models.errors import ConfigurationError, ModelBroken, RqModelsError
from rq_models.horse import Horse

if TYPE_CHECKING:
    from redis import Redis

    from rq_models.cli.app import App
    from rq_models.settings import ModelSettings

OLDEST_REDIS = (6, 2)
PROVEN_RQ = "3.0"
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass
class _Report:
    """Prints each finding as it is made; `code` is that of the first failure."""

    code: ExitCode = ExitCode.OK
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COLOURS, 0))

    def ok(self, text: str) -> None:
        self._add("ok", text)

    def warn(self, text: str) -> None:
        self._add("warn", text)

    def fail(self, text: str, code: ExitCode) -> None:
        self.code = self.code or code
        self._add("fail", text)

    def _add(self, verdict: str, text: str) -> None:
        self.counts[verdict] += 1
        click.echo(f"{click.style(f'{verdict:<4}', fg=_COLOURS[verdict])}  {one_line(text)}")


@click.command()
@click.pass_obj
def check(app: App) -> None:
    """Look for what is wrong, and say what to fix.

    The configuration, Redis, RQ, and each model: imported, loaded and run on its example, in its own interpreter.
    """
    report = _Report()
    try:
        settings = app.settings
    except ConfigurationError as error:
        report.fail(f"configuration: {error.message}", ExitCode.CONFIGURATION)
        raise click.exceptions.Exit(report.code) from None
    report.ok(f"configuration: {', '.join(str(path) for path in settings.files)}")
    if not settings.models:
        report.warn(f"configuration: {settings.files[0]} names no model; add a table [models.<name>]")
    _check_rq(report)
    _check_redis(app, report)
    for name, model in sorted(settings.models.items()):
        _check_model(app, name, model, report)
    found = ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items() if count)
    click.echo(found)
    if report.code:
        raise click.exceptions.Exit(report.code)


def _check_rq(report: _Report) -> None:
    if VERSION.startswith(f"{PROVEN_RQ}."):
        report.ok(f"rq: {VERSION}")
    else:
        report.warn(f"rq: {VERSION} was not tested; run: pip install 'rq=={PROVEN_RQ}.*'")


def _check_redis(app: App, report: _Report) -> None:
    where = app.settings.masked_url
    try:
        info: dict[str, Any] = app.connection.info()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the models can still be checked
        report.fail(f"redis: {explain(error, where)[1]}", ExitCode.REDIS)
        return
    version = str(info.get("redis_version", "0"))
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST_REDIS:
        report.fail(f"redis: {name} at {where} is too old; 6.2 or newer is needed", ExitCode.REDIS)
    else:
        report.ok(f"redis: {name} at {where}")
    _check_persistence(app.connection, info, report)
    _check_memory(info, report)


def _check_persistence(connection: Redis, info: dict[str, Any], report: _Report) -> None:
    if info.get("aof_enabled"):
        report.ok("persistence: append-only file")
        return
    try:
        snapshots = bool(connection.config_get("save").get("save"))
    except Exception:  # noqa: BLE001 - a hosted Redis may refuse CONFIG; its own pages tell
        report.warn("persistence: no append-only file; whether snapshots are on, this server does not say")
        return
    kept = "snapshots only: a crash loses jobs since the last one" if snapshots else "none: a restart loses all jobs"
    report.warn(f"persistence: {kept}; set appendonly yes")


def _check_memory(info: dict[str, Any], report: _Report) -> None:
    policy, limit = str(info.get("maxmemory_policy", "unknown")), int(info.get("maxmemory", 0))
    if policy == "noeviction":
        report.ok(f"eviction: noeviction{f', maxmemory {limit >> 20} MiB' if limit else ', no maxmemory'}")
    elif limit:
        report.fail(
            f"eviction: {policy} with maxmemory {limit >> 20} MiB drops jobs when memory is full; "
            "set maxmemory-policy noeviction",
            ExitCode.REDIS,
        )
    else:
        report.warn(f"eviction: {policy} would drop jobs once maxmemory is set; set maxmemory-policy noeviction")


def _check_model(app: App, name: str, model: ModelSettings, report: _Report) -> None:
    began = time.monotonic()
    printed: list[str] = []
    horse = Horse(name, model, app.settings.root, printed.append)
    try:
        horse.start()
    except ModelBroken as error:
        report.fail(f"{app.settings.where(name, 'python')}: {error.message}", ExitCode.MODEL)
        return
    try:
        with horse:
            card = horse.load()
    except ModelBroken as error:
        report.fail(f"{app.settings.where(name, 'class')}: {error.message}; {_remedy(error, model)}", ExitCode.MODEL)
        return
    except RqModelsError as error:
        last = f"; its last line: {printed[-1]}" if printed else ""
        report.fail(f"model {name}: {error.message}{last}", ExitCode.MODEL)
        return
    tried = "its example predicted" if card.get("example") is not None else "no example to predict"
    report.ok(f"model {name}: {card.get('version') or 'no version'}, {tried}, {time.monotonic() - began:.1f} s")
    own = card.get("qualified_name")
    if own and own != name:
        report.warn(
            f"model {name}: the class calls itself '{own}'; clients must ask for '{name}'. "
            f"If that is not meant, rename the table to [models.{own}]"
        )


def _remedy(error: ModelBroken, model: ModelSettings) -> str:
    return {
        "missing": f"correct the name, or install what is missing: {model.python} -m pip install ...",
        "broken": "correct that code",
        "init": "correct the constructor",
        "example": "correct the example, or predict",
    }[error.stage]
