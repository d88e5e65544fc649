"""``rq-models job`` and ``rq-models replay``: one job, looked at or run again here."""

from __future__ import annotations

import click

from rq_models.cli.app import App, say, to_json
from rq_models.cli.outcome import printable
from rq_models.cli.record import JobRecord, read_record
from rq_models.errors import InvalidJob, RqModelsError, from_record
from rq_models.horse import Horse, Item


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--no-input", is_flag=True, help="Leave the input out: it may be long, or nobody's business.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def job(app: App, job_id: str, no_input: bool, as_json: bool) -> None:
    """Show a job, its input and what came of it.

    Status, model and version, worker, attempts, times, input, output or error.
    """
    record = read_record(app.connection, job_id)
    if as_json:
        fields = record.as_dict()
        if no_input:
            del fields["input"]
        click.echo(to_json(fields))
        return
    lines = {
        "id": record.id,
        "model": record.model or "none: this is no prediction",
        "status": record.status,
        "version": record.version,
        "worker": record.worker,
        "attempts": str(record.attempts),
        **{name.removesuffix("_at"): f"{time[:19]}Z" for name, time in record.times.items()},
        "input": to_json(record.input) if record.model and not no_input else None,
        "output": to_json(record.output) if record.has_output else None,
        "error": _in_words(record.error) if record.error else None,
    }
    for name, value in lines.items():
        if value is not None:
            click.echo(f"{name:<10}{printable(value)}")
    if record.error and record.error.traceback:
        click.echo(f"\n{printable(record.error.traceback.rstrip())}")


@click.command()
@click.argument("job_id", metavar="ID")
@click.pass_obj
def replay(app: App, job_id: str) -> None:
    """Run a job's input again, here.

    In a fresh process of its model; nothing in Redis changes. What the model prints and its traceback go to stderr.
    """
    record = read_record(app.connection, job_id)
    if record.model is None:
        raise InvalidJob(f"job {job_id} is no prediction", job_id=job_id)
    click.echo(to_json(predict_here(app, record)))


def predict_here(app: App, record: JobRecord) -> object:
    """Return what the model makes of the record's input, or raise what it raised."""
    name = record.model or ""
    model = app.settings.model(name)
    try:
        with Horse(name, model, app.settings.root, lambda line: click.echo(printable(line), err=True)) as horse:
            card = horse.load()
            say(f"{name} {card.get('version') or ''} loaded; running the input of job {record.id}")
            run = horse.predict([Item(record.id, record.input, record.timeout or model.job_timeout)])
            if run.fault is not None:
                raise run.fault
            outcome = run.outcomes[0]
            if "error" in outcome:
                raise from_record(outcome["error"], job_id=record.id, traceback=outcome["traceback"])
    except RqModelsError as error:
        if error.traceback:
            click.echo(printable(error.traceback.rstrip()), err=True)
        raise
    return outcome["value"]


def _in_words(error: RqModelsError) -> str:
    """Return an error in one line, by its kind and by the model's own type."""
    kind = type(error).__name__
    return f"{kind}{f' ({error.type})' if error.type else ''}: {' '.join(error.message.split())}"
