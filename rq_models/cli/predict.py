"""``rq-models predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rq_models.cli.app import App, to_json
from rq_models.errors import InvalidInput


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
    with Client(app.redis_url) as client:
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
