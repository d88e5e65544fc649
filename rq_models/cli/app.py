"""What the commands share: the settings, the connection, and how data is printed."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from redis import Redis

from rq_models.cli.outcome import printable
from rq_models.settings import Settings, check_url, mask_url

if TYPE_CHECKING:
    from collections.abc import Iterable

_PATIENCE = 10.0
"""Seconds that Redis may take to answer a person."""
_COLOURS = {"warm": "green", "cold": "yellow", "broken": "red", "unserved": "red"}


class App:
    """The global options and what follows from them, read on first use: no command reads more than it needs."""

    url: str | None = None
    config: str | None = None
    masked_url: str | None = None
    """The address without its password, once it was asked for."""

    @cached_property
    def settings(self) -> Settings:
        """The whole configuration.

        Raises:
            ConfigurationError: one line.
        """
        settings = Settings.load(self.config, redis_url=self.url)
        self.masked_url = settings.masked_url
        return settings

    @property
    def has_configuration(self) -> bool:
        """Whether there is a configuration to read; an application's server may have an address only."""
        address_given = bool(self.url or os.environ.get("REDIS_URL"))
        folder = Path(self.config or os.environ.get("RQ_MODELS_CONFIG") or "config")
        return (folder / "base.toml").exists() or not address_given

    @cached_property
    def redis_url(self) -> str:
        """The address; with --url or REDIS_URL there need be no configuration."""
        url = self.url or os.environ.get("REDIS_URL")
        if not url:
            return self.settings.redis_url
        check_url(url, "--url" if self.url else "REDIS_URL")
        self.masked_url = mask_url(url)
        return url

    @cached_property
    def connection(self) -> Redis:
        """A connection that says at once when nothing answers."""
        return Redis.from_url(self.redis_url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE, retry=None)

    def announce(self) -> None:
        """Say which files were read and which Redis is meant."""
        read = ", ".join(str(path) for path in self.settings.files)
        say(f"read {read}; Redis at {self.settings.masked_url}")


def say(message: str) -> None:
    """Print a message for a person; stdout is for data."""
    click.echo(f"rq-models: {printable(message)}", err=True)


def to_json(value: Any) -> str:
    """Return the value as one line of JSON that no terminal and no encoding stumbles over."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def print_table(*headers: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a table: drawn on a terminal, aligned by spaces and never cut in a pipe."""
    from rich.console import Console  # noqa: PLC0415 - 30 ms that only a table needs
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    console = Console()
    table = Table()
    for number, header in enumerate(headers):
        # The first names the row, and must be there whole to be copied.
        table.add_column(header, no_wrap=number == 0, overflow="fold")
    if not console.is_terminal:
        console.width = 10_000
        table.box, table.pad_edge = None, False
    for row in rows:
        cells = [printable(str(cell)) for cell in row]
        # Not as strings: rich would take [brackets] in them for markup.
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in cells))
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        click.echo(line.rstrip())
