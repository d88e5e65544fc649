"""What the commands share: the settings, the connection, and how data is printed."""

from __future__ import annotations

import json
import os
import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
from redis import Redis

from rq_models.cli.outcome import printable
from rq_models.settings import Settings, check_url, mask_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

_PATIENCE = 10.0
"""Seconds that Redis may take to answer a person."""


class App:
    """The global options and what follows from them, read on first use: no command reads more than it needs."""

    url: str | None = None
    config: str | None = None

    @cached_property
    def settings(self) -> Settings:
        """The whole configuration.

        Raises:
            ConfigurationError: one line.
        """
        return Settings.load(self.config, redis_url=self.url)

    @cached_property
    def redis_url(self) -> str:
        """The address; with --url or REDIS_URL there need be no configuration."""
        for url, source in ((self.url, "--url"), (os.environ.get("REDIS_URL"), "REDIS_URL")):
            if url:
                check_url(url, source)
                return url
        return self.settings.redis_url

    @property
    def masked_url(self) -> str | None:
        """The address without its password, if it was asked for yet."""
        url = self.__dict__.get("redis_url")
        if url is None and "settings" in self.__dict__:
            url = self.settings.redis_url
        return None if url is None else mask_url(url)

    @cached_property
    def connection(self) -> Redis:
        """A connection that says at once when nothing answers."""
        return Redis.from_url(self.redis_url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE)

    def close(self) -> None:
        """Close the connection, if one was opened."""
        if "connection" in self.__dict__:
            self.connection.close()

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


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, aligned by spaces in a pipe."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - 30 ms that only a terminal needs
        from rich.table import Table  # noqa: PLC0415 - likewise

        table = Table(*headers)
        for row in clean:
            table.add_row(*(_cell(cell) for cell in row))
        Console().print(table)
        return
    lines = [list(headers), *clean]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for row in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


_COLOURS = {"warm": "green", "cold": "yellow", "broken": "red", "unserved": "red"}


def _cell(text: str) -> Text:
    from rich.text import Text  # noqa: PLC0415 - see print_table

    # Not as a string: rich would take [brackets] in it for markup.
    return Text(text, style=_COLOURS.get(text, ""))
