"""``rq-models models``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rq.defaults import RQ_KEY_PREFIX

from rq_models.cli.app import App, print_table, say, to_json
from rq_models.cli.outcome import one_line
from rq_models.errors import ConfigurationError
from rq_models.registry import ModelStatus, read_models

if TYPE_CHECKING:
    from redis import Redis


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, with cards and workers.")
@click.pass_obj
def models(app: App, as_json: bool) -> None:
    """List the models, their state and their jobs."""
    found = {status.name: status for status in read_models(app.connection)}
    # Published models are known without any configuration; what is configured and never ran should show, too.
    with suppress(ConfigurationError):
        for name in app.settings.models:
            found.setdefault(name, ModelStatus(name, None, ()))
    statuses = [found[name] for name in sorted(found)]
    counts = _counts(app.connection, list(found))
    if as_json:
        click.echo(
            to_json(
                [
                    {
                        "name": one.name,
                        "version": _version(one),
                        "workers": len(one.serving),
                        "state": one.state,
                        "queued": counts[one.name][0],
                        "failed": counts[one.name][1],
                        "card": asdict(one.card) if one.card else None,
                        "serving": [asdict(worker) for worker in one.serving],
                    }
                    for one in statuses
                ]
            )
        )
        return
    rows = [
        [one.name, _version(one) or "-", str(len(one.serving)), one.state, *(str(n) for n in counts[one.name])]
        for one in statuses
    ]
    print_table(["name", "version", "workers", "state", "queued", "failed"], rows)
    for one in statuses:
        for worker in one.serving:
            if worker.error:
                say(f"{worker.worker}: {one_line(str(worker.error))}")


def _version(status: ModelStatus) -> str | None:
    # During a roll-out two versions may be served.
    served = sorted({str(worker.version) for worker in status.serving if worker.version})
    published = status.card.version if status.card else None
    return ", ".join(served) or (str(published) if published else None)


def _counts(connection: Redis, names: list[str]) -> dict[str, tuple[int, int]]:
    """Return the numbers of queued and failed jobs of each model.

    Read directly: the `count` of RQ's registries runs their cleanup, which fails other people's jobs.
    """
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(f"{RQ_KEY_PREFIX}:queue:{name}")
            pipe.zcard(f"{RQ_KEY_PREFIX}:failed:{name}")
        numbers = pipe.execute()
    return dict(zip(names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
