"""``rq-models failed``: what failed, and putting it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from rq_models.cli.app import App, print_table, say
from rq_models.cli.outcome import ExitCode, one_line
from rq_models.cli.record import read_records
from rq_models.errors import JobNotFound
from rq_models.jobs import ModelJob
from rq_models.registry import read_models

if TYPE_CHECKING:
    from redis import Redis

_LONGEST_MESSAGE = 100


class _DefaultsToList(click.Group):
    """Takes a first word that is no command for an argument of ``list``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultsToList)
def failed() -> None:
    """List failed jobs, or put them back.

    'failed [MODEL]' lists them; 'failed requeue ID...' or 'failed requeue --all [MODEL]...' puts them back.
    """


@failed.command("list")
@click.argument("model", required=False)
@click.option("-n", "limit", default=50, show_default=True, type=click.IntRange(min=1), help="Newest of each model.")
@click.pass_obj
def list_failed(app: App, model: str | None, limit: int) -> None:
    """List failed jobs, newest first."""
    rows = []
    for name in _models(app.connection, model):
        key = FailedJobRegistry(name, connection=app.connection).key
        ids = [raw.decode(errors="replace") for raw in cast("list[bytes]", app.connection.zrevrange(key, 0, limit - 1))]
        for record in read_records(app.connection, ids):
            error = record.error
            what = [type(error).__name__, _short(one_line(error.message))] if error else ["-", ""]
            rows.append([record.id, name, record.times.get("ended_at", "-")[:19], *what])
    print_table(["id", "model", "when (UTC)", "kind", "message"], sorted(rows, key=lambda row: row[2], reverse=True))


@failed.command()
@click.argument("names", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All failed jobs, or all of the models named instead of ids.")
@click.pass_obj
def requeue(app: App, names: tuple[str, ...], everything: bool) -> None:
    """Put failed jobs back into their queues."""
    if not names and not everything:
        raise click.UsageError("name the jobs, or pass --all")
    ids = list(names)
    if everything:
        ids = []
        for model in names or _models(app.connection, None):
            key = FailedJobRegistry(model, connection=app.connection).key
            ids += [raw.decode(errors="replace") for raw in cast("list[bytes]", app.connection.zrange(key, 0, -1))]
    done, problems = 0, []
    for job_id in ids:
        try:
            _requeue(app.connection, job_id)
            done += 1
        except JobNotFound as error:
            # With --all, jobs that expire or are requeued meanwhile are nobody's concern.
            if not everything:
                problems.append(error.message)
    click.echo(f"requeued {done} of {len(ids)}")
    for problem in problems:
        say(problem)
    if problems:
        raise click.exceptions.Exit(ExitCode.NOT_FOUND)


def _requeue(connection: Redis, job_id: str) -> None:
    record = next(iter(read_records(connection, [job_id])), None)
    if record is None or record.model is None:
        raise JobNotFound(f"there is no prediction {job_id}; it may have expired", job_id=job_id)
    try:
        job = ModelJob.fetch(job_id, connection=connection)
        registry = FailedJobRegistry(job.origin, connection=connection, job_class=ModelJob, serializer=JSONSerializer)
        registry.requeue(job)
    except (NoSuchJobError, InvalidJobOperation):
        raise JobNotFound(f"job {job_id} is not among the failed ones; it is {record.status}", job_id=job_id) from None


def _models(connection: Redis, model: str | None) -> list[str]:
    return [model] if model is not None else [status.name for status in read_models(connection)]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 1]}…"
