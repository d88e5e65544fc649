"""``rq-models models`` and ``rq-models predict``."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rq.defaults import RQ_KEY_PREFIX

from rq_models.cli.app import App, print_table, say, to_json
from rq_models.cli.outcome import one_line
from rq_models.errors import ConfigurationError, InvalidInput
from rq_models.registry import ModelStatus, count_queued, read_models


@click.command()
@click.pass_obj
def models(app: App) -> None:
    """List the models, their state and their jobs."""
    found = {status.name: status for status in read_models(app.connection)}
    # Published models are known without any configuration; what is configured and never ran should show, too.
    with suppress(ConfigurationError):
        for name in app.settings.models:
            found.setdefault(name, ModelStatus(name, None, ()))
    statuses = [found[name] for name in sorted(found)]
    queued = count_queued(app.connection, *(one.name for one in statuses))
    # Read directly: the `count` of RQ's registries runs their cleanup, which fails other people's jobs.
    with app.connection.pipeline(transaction=False) as pipe:
        for one in statuses:
            pipe.zcard(f"{RQ_KEY_PREFIX}:failed:{one.name}")
        failed = pipe.execute()
    print_table(
        *("name", "version", "workers", "state", "queued", "failed"),
        rows=[
            (one.name, _version(one), len(one.serving), one.state, waiting, ended)
            for one, waiting, ended in zip(statuses, queued, failed, strict=True)
        ],
    )
    for worker in (worker for one in statuses for worker in one.serving if worker.error):
        say(f"{worker.worker}: {one_line(str(worker.error))}")


def _version(status: ModelStatus) -> str:
    # During a roll-out two versions may be served.
    served = sorted({str(worker.version) for worker in status.serving if worker.version})
    return ", ".join(served) or str((status.card and status.card.version) or "-")


@click.command()
@click.argument("model")
@click.argument("text", metavar="JSON|@FILE|-")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True, help="Seconds.")
@click.pass_obj
def predict(app: App, model: str, text: str, timeout: float) -> None:
    """Let a running worker of MODEL predict.

    Prints its output as JSON. The input is JSON text, @FILE, or - for standard input.
    """
    from rq_models import Client  # noqa: PLC0415 - 0.2 s that the other commands need not wait

    data = _read(text)
    with Client(app.redis_url, patience=0) as client:
        click.echo(to_json(client.predict(model, data, timeout=timeout)))


def _read(text: str) -> Any:
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the input can't be read: {error}") from None
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the input is not JSON: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
