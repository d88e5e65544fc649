"""``rq-models check``: a doctor who looks at everything and says what to fix."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from rq_models import health
from rq_models.cli.outcome import explain, one_line
from rq_models.errors import ModelBroken, ModelFault, RqModelsError
from rq_models.horse import Horse
from rq_models.registry import PREFIX
from rq_models.server import ServerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rq_models.cli.app import App

_TRIAL = f"{PREFIX}check"
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_REMEDIES = {
    "missing": "correct the name, or that class",
    "broken": "correct that code",
    "init": "correct the constructor",
    "example": "correct the example, or predict",
}


@click.command()
@click.pass_obj
def check(app: App) -> None:
    """Look for what is wrong, and say what to fix.

    The configuration, Redis, and each model: imported, loaded and run on its example, in its own interpreter.
    """
    counts: Counter[str] = Counter()
    status = 0

    def examine(findings: Iterator[tuple[str, str]], subject: str = "") -> None:
        """Print what an examination yields as it is found, and the error that ends it."""
        nonlocal status
        try:
            for verdict, text in findings:
                tell(verdict, text)
        except Exception as error:  # noqa: BLE001 - whatever is wrong there, the rest can still be examined
            code, text = explain(error, app.masked_url)
            tell("fail", subject + text)
            status = status or code

    def tell(verdict: str, text: str) -> None:
        counts[verdict] += 1
        click.echo(f"{click.style(f'{verdict:<4}', fg=_COLOURS[verdict])}  {one_line(text)}")

    examine(_configuration(app), "configuration: ")
    if not status:
        examine(_redis(app), "redis: ")
        for name in sorted(app.settings.models) if app.has_configuration else ():
            examine(_model(app, name))
        click.echo(", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS if counts[verdict]))
    raise click.exceptions.Exit(status)


def _configuration(app: App) -> Iterator[tuple[str, str]]:
    if not app.has_configuration:
        yield "ok", "configuration: none here, and none is needed where only clients are: the address is given"
        return
    files = app.settings.files
    yield "ok", f"configuration: {', '.join(str(path) for path in files)}"
    if not app.settings.models:
        yield "warn", f"configuration: {files[0]} names no model; add a table [models.<name>]"


def _redis(app: App) -> Iterator[tuple[str, str]]:
    info: dict[str, Any] = app.connection.info()
    where = app.masked_url or ""
    if wrong := health.too_old(info, where) or health.replica(info, where):
        raise ServerUnavailable(wrong)
    # Whatever keeps it from being written to: it is full, say.
    app.connection.set(_TRIAL, "", px=1000)
    app.connection.delete(_TRIAL)
    yield "ok", f"redis: {health.name_of(info)} at {where}"
    if info.get("aof_enabled"):
        yield "ok", "persistence: append-only file"
    else:
        lost = "a crash or a restart loses all jobs since the last snapshot, if there are any"
        yield "warn", f"persistence: no append-only file, so {lost}; set appendonly yes"
    drops = health.eviction(info)
    if drops and info.get("maxmemory"):
        raise ServerUnavailable(drops)
    yield ("warn", drops) if drops else ("ok", "eviction: noeviction")


def _remedy(error: ModelBroken, python: str) -> str:
    if error.type == "ModuleNotFoundError":
        return f"correct the name, or install the package: {python} -m pip install ..."
    return _REMEDIES[error.stage]


def _model(app: App, name: str) -> Iterator[tuple[str, str]]:
    model = app.settings.model(name)
    began = time.monotonic()
    printed = [""]
    key = "python"
    try:
        with Horse(name, model, app.settings.root, printed.append) as horse:
            key = "class"
            card = horse.load()
    except ModelBroken as error:
        remedy = "" if key == "python" else f"; {_remedy(error, model.python)}"
        raise ModelBroken(f"{app.settings.where(name, key)}: {error}{remedy}") from None
    except RqModelsError as error:
        raise ModelFault(f"model {name}: {error}; the last line it printed: {printed[-1] or 'none'}") from None
    tried = "its example predicted" if card.get("example") is not None else "no example to predict"
    yield "ok", f"model {name}: {card.get('version') or 'no version'}, {tried}, {time.monotonic() - began:.1f} s"
    own = card.get("qualified_name")
    if own and own != name:
        remedy = f"if that is not meant, rename the table to [models.{own}]"
        yield "warn", f"model {name}: the class calls itself '{own}', and clients must ask for '{name}'; {remedy}"
