"""``rq-models score`` and ``runs``: files scored by a model's workers, followed, listed and cancelled."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from redis.exceptions import RedisError

from rq_models.cli.app import App, print_table, say
from rq_models.cli.outcome import one_line

if TYPE_CHECKING:
    from rq_models.client import Client


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT")
@click.argument("output")
@click.option("--keep", default="all", show_default=True, metavar="all|none|a,b", help="Columns to carry through.")
@click.option("--no-header", is_flag=True, help="The CSV has no line of names; its columns are the model's, in order.")
@click.option("--max-errors", type=click.IntRange(min=0), help="Give up after more failed rows; else never.")
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that exists.")
@click.option("--restart", is_flag=True, help="Start over, whatever was done before.")
@click.option("--slice-rows", type=click.IntRange(min=1), help="Rows given to the model at a time; else found out.")
@click.option("--detach", is_flag=True, help="Print the run's id and leave.")
@click.pass_obj
def score(app: App, /, model: str, source: str, output: str, **options: Any) -> None:
    """Predict each row of a file.

    INPUT and OUTPUT are CSV, JSON Lines (.jsonl), both also with .gz, or Parquet: paths that the workers have, too, or
    addresses like s3://bucket/rows.parquet. The same command again goes on where a run has stopped.

    OUTPUT appears when all is done. Rows that fail are in OUTPUT.errors.jsonl; they don't change the exit code.
    """
    # 0.2 s, and rich's, that the other commands need not wait.
    from rq_models import Client  # noqa: PLC0415 - as said above
    from rq_models.cli.bar import follow  # noqa: PLC0415 - likewise
    from rq_models.scoring.runs import errors_address, shown  # noqa: PLC0415 - likewise

    detach = options.pop("detach")
    options.update(keep=_columns(options["keep"]), header=not options.pop("no_header"))
    # A wrong address is said at once; later, an outage is waited for.
    app.connection.ping()
    with Client(app.redis_url) as client:
        run = client.score(model, source, output, **options)
        record = run.record
        before = f"; {record.progress.rows:,} rows are done already" if record.progress.rows else ""
        asked = record.asked
        say(f"run {run.id}: {model} scores {shown(asked.input)} into {shown(asked.output)}{before}")
        if detach:
            click.echo(run.id)
            return
        try:
            follow(run, model, lambda: _obstacle(client, model))
        except (KeyboardInterrupt, RedisError):
            say(f"run {run.id} goes on; to look at it or to end it: rq-models runs show|cancel {run.id}")
            raise
        progress = run.progress()
        if progress.state != "finished" and progress.rows:
            say(f"{progress.rows:,} rows are done and kept")
        click.echo(run.wait())
        if progress.failed:
            say(f"the failed rows are in {shown(errors_address(asked.output))}")


def _columns(keep: str) -> list[str] | None:
    """Return the columns to keep, None for all; one whose name has a comma, or is ``all``, is written in quotes."""
    return {"all": None, "none": []}[keep] if keep in ("all", "none") else next(csv.reader([keep]), [])


def _obstacle(client: Client, model: str) -> str:
    """Return why no worker scores now, or ""."""
    status = next((one for one in client.models() if one.name == model), None)
    if status is None or not status.serving:
        return f"nobody serves {model} now; start a worker: rq-models worker {model}"
    if status.state == "broken":
        return f"{model} does not load: {one_line(str(status.serving[0].error))}"
    return ""


@click.group(invoke_without_command=True)
@click.pass_context
def runs(context: click.Context) -> None:
    """List, show or cancel runs of score.

    Alone it lists those of the last 30 days, the latest first.
    """
    if context.invoked_subcommand is None:
        _list(context.obj)


def _list(app: App) -> None:
    from rq_models.cli.bar import percent, speed  # noqa: PLC0415 - rich, that the other commands need not wait for
    from rq_models.scoring.runs import read_all, shown  # noqa: PLC0415 - likewise RQ

    headers = ("id", "model", "state", "done", "rows", "failed", "rows/s", "began (UTC)", "input", "output")
    rows = []
    for one in read_all(app.connection):
        at, asked = one.progress, one.asked
        done = percent(at)
        places = shown(asked.input), shown(asked.output)
        rows.append(
            (
                *(one.id, asked.model, at.state, done, f"{at.rows:,}", f"{at.failed:,}", speed(at)),
                *(_moment(one.began_at), *places),
            )
        )
    print_table(*headers, rows=rows)


def _moment(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%M:%S}"


@runs.command()
@click.argument("run_id", metavar="ID")
@click.pass_obj
def show(app: App, run_id: str) -> None:
    """Show a run: what was asked for, and how far it has come."""
    from rq_models.cli.bar import ahead, clock, figures  # noqa: PLC0415 - rich, as above
    from rq_models.scoring.runs import errors_address, read, shown  # noqa: PLC0415 - likewise RQ

    record = read(app.connection, run_id)
    at, asked = record.progress, record.asked
    lines = {
        "id": record.id,
        "model": asked.model,
        "state": at.state,
        "input": shown(asked.input),
        "output": shown(asked.output),
        "keep": "all" if asked.keep is None else ", ".join(asked.keep) or "none",
        "rows": figures(at),
        "errors": shown(errors_address(asked.output)) if at.failed and at.state == "finished" else None,
        "chunks": f"{at.chunks_done:,} of {at.chunks:,}" if at.chunks else None,
        "ahead": ahead(at),
        "began": f"{_moment(record.began_at)} UTC",
        "took" if at.is_over else "so far": clock(at.seconds),
        "attempt": record.attempt,
        "error": at.error,
    }
    for name, value in lines.items():
        if value:
            click.echo(f"{name:<10}{one_line(str(value))}")


@runs.command()
@click.argument("run_id", metavar="ID")
@click.pass_obj
def cancel(app: App, run_id: str) -> None:
    """Stop a run within a slice. What is done is kept: the same score command goes on from there."""
    from rq_models.scoring.runs import cancel as cancel_run  # noqa: PLC0415 - RQ, that other commands need not wait for
    from rq_models.scoring.runs import read  # noqa: PLC0415 - likewise

    cancelled = cancel_run(app.connection, run_id)
    at = read(app.connection, run_id).progress
    said = "cancelled" if cancelled else f"{at.state} already"
    click.echo(f"{run_id}: {said}; {at.rows:,} rows are done and kept")
