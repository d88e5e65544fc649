"""``rq-models job``, ``failed`` and ``replay``: jobs as Redis holds them, looked at, put back, or run again here."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import click
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry

from rq_models.cli.app import App, print_table, say, to_json
from rq_models.cli.outcome import one_line, printable
from rq_models.errors import InvalidJob, JobNotFound, RqModelsError, from_record
from rq_models.horse import Horse, Interrupted, Item
from rq_models.jobs import FUNCTION_PREFIX, ModelJob
from rq_models.registry import read_models
from rq_models.results import RESULTS, Ended, unpacked, value_of
from rq_models.scoring.runs import BULK, STEP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis import Redis

_LONGEST_MESSAGE = 100


@dataclass(frozen=True)
class _Record:
    """One job and its latest result: nothing is unpickled, and no record is too strange to be shown."""

    id: str
    fields: dict[str, str]
    last: dict[str, str]
    """The latest entry of its results."""
    model: str | None
    """None for a job that is no prediction: another application's, or one that can't be decoded."""
    input: Any
    output: str | None = None
    """As JSON; None if there is none."""
    error: RqModelsError | None = None
    step: str | None = None
    """What it is of a scoring run, if it is a step of one."""


def _read(connection: Redis, job_id: str) -> _Record:
    fields = cast("dict[bytes, bytes]", connection.hgetall(Job.key_for(job_id)))
    if not fields:
        raise JobNotFound(f"there is no job {job_id}; it may have expired", job_id=job_id)
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", connection.xrevrange(f"{RESULTS}{job_id}", count=1))
    entry = entries[0][1] if entries else {}
    output = error = None
    # After a requeue the last run's entry is still there, and says nothing of this one.
    if entry and fields.get(b"status") in (b"finished", b"failed", b"stopped"):
        try:
            output = to_json(value_of(job_id, Ended("result", entry)))
        except RqModelsError as raised:
            error = raised
    model, data = _call(fields.get(b"data", b""))
    return _Record(job_id, _text(fields), _text(entry), model, data, output, error, _step(fields.get(b"data", b"")))


def _text(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in fields.items()}


def _call(data: bytes) -> tuple[str | None, Any]:
    """Return the model and the input of a prediction, or twice None for any other job."""
    with suppress(ValueError):
        data = unpacked(data)
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        function, instance, args, _ = json.loads(data)
        if instance is None and function.startswith(FUNCTION_PREFIX) and len(args) == 1:
            return function.removeprefix(FUNCTION_PREFIX), args[0]
    return None, None


def _step(data: bytes) -> str | None:
    """Return what a job does for a scoring run, in words; None for any other job."""
    with suppress(ValueError, TypeError, RecursionError):
        function, instance, (run, attempt, step), _ = json.loads(data)
        if function == STEP and instance is None:
            what = f"chunk {step}" if isinstance(step, int) else step
            return f"{what} of scoring run {run}, attempt {attempt}; see 'rq-models runs show {run}'"
    return None


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--no-input", is_flag=True, help="Leave the input out: it may be long, or nobody's business.")
@click.pass_obj
def job(app: App, job_id: str, no_input: bool) -> None:
    """Show a job, its input and what came of it.

    Status, model and version, worker, attempts, times, input, output or error.
    """
    record = _read(app.connection, job_id)
    error = record.error
    lines = {
        "id": record.id,
        "model": _whose(record),
        "step": record.step,
        "status": record.fields.get("status"),
        "version": record.last.get("model_version"),
        "worker": record.last.get("worker_name") or record.fields.get("worker_name"),
        "attempts": record.fields.get("attempts", "0"),
        "enqueued": record.fields.get("enqueued_at"),
        "started": record.fields.get("started_at"),
        "ended": record.fields.get("ended_at"),
        "input": to_json(record.input) if record.model and not no_input else None,
        "output": record.output,
        "error": one_line(f"{type(error).__name__}{f' ({error.type})' * bool(error.type)}: {error}") if error else None,
    }
    for name, value in lines.items():
        if value:
            click.echo(f"{name:<10}{printable(value)}")
    if error and error.traceback:
        click.echo(f"\n{printable(error.traceback.rstrip())}")


def _whose(record: _Record) -> str:
    if record.step:
        return record.fields.get("origin", "").removesuffix(BULK)
    return record.model or "none: this is no prediction"


@click.command()
@click.argument("job_id", metavar="ID")
@click.pass_obj
def replay(app: App, job_id: str) -> None:
    """Run a job's input again, here.

    In a fresh process of its model; nothing in Redis changes. What the model prints and its traceback go to stderr.
    """
    record = _read(app.connection, job_id)
    if record.model is None:
        raise InvalidJob(f"job {job_id} is no prediction", job_id=job_id)
    model = app.settings.model(record.model)
    own = record.fields.get("timeout", "")
    item = Item(record.id, record.input, float(own) if own.isdecimal() else model.job_timeout)
    try:
        with Horse(record.model, model, app.settings.root, lambda line: click.echo(printable(line), err=True)) as horse:
            card = horse.load()
            say(f"{record.model} {card.get('version') or ''} loaded; running the input of job {record.id}")
            try:
                (outcome,) = next(horse.predict([item]))
            except Interrupted as interrupted:
                raise interrupted.fault from None
        if "error" in outcome:
            raise from_record(outcome["error"], job_id=record.id, traceback=outcome["traceback"])
    except RqModelsError as error:
        if error.traceback:
            click.echo(printable(error.traceback.rstrip()), err=True)
        raise
    click.echo(to_json(outcome["value"]))


@click.group(invoke_without_command=True)
@click.pass_context
def failed(context: click.Context) -> None:
    """List failed jobs, or put them back.

    'failed list [MODEL]' lists them, as 'failed' alone does; 'failed requeue ID...' puts them back.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_failed)


@failed.command("list")
@click.argument("model", required=False)
@click.option("-n", "limit", default=50, show_default=True, type=click.IntRange(min=1), help="Newest of each model.")
@click.pass_obj
def list_failed(app: App, model: str | None, limit: int) -> None:
    """List failed jobs, newest first."""
    rows = []
    for name, job_id in _failed_ids(app.connection, [model] if model else [], limit):
        with suppress(JobNotFound):
            record = _read(app.connection, job_id)
            kind = type(record.error).__name__ if record.error else "-"
            message = one_line(str(record.error or ""))[:_LONGEST_MESSAGE]
            rows.append((job_id, name, record.fields.get("ended_at", "-")[:19], kind, message))
    rows.sort(key=lambda row: row[2], reverse=True)
    print_table("id", "model", "when (UTC)", "kind", "message", rows=rows)


@failed.command()
@click.argument("names", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All failed jobs, or all of the models named instead of ids.")
@click.pass_obj
def requeue(app: App, names: tuple[str, ...], everything: bool) -> None:
    """Put failed jobs back into their queues."""
    if not names and not everything:
        raise click.UsageError("name the jobs, or pass --all")
    # The oldest first, as they were.
    ids = [job_id for _, job_id in _failed_ids(app.connection, names)[::-1]] if everything else list(names)
    missing = []
    for job_id in ids:
        try:
            _requeue(app.connection, job_id)
        except JobNotFound as error:
            missing.append(error)
    click.echo(f"requeued {len(ids) - len(missing)} of {len(ids)}")
    # With --all, jobs that expire or are requeued meanwhile are nobody's concern.
    if missing and not everything:
        for one in missing[1:]:
            say(one.message)
        raise missing[0]


def _requeue(connection: Redis, job_id: str) -> None:
    record = _read(connection, job_id)
    if record.model is None:
        raise JobNotFound(f"job {job_id} is no prediction", job_id=job_id)
    try:
        job = ModelJob.fetch(job_id, connection=connection)
        FailedJobRegistry(job.origin, connection=connection, job_class=ModelJob).requeue(job)
    except (NoSuchJobError, InvalidJobOperation):
        status = record.fields.get("status", "unknown")
        raise JobNotFound(f"job {job_id} is not among the failed ones; it is {status}", job_id=job_id) from None


def _failed_ids(connection: Redis, models: Iterable[str], limit: int = 0) -> list[tuple[str, str]]:
    """Return pairs of model and job id, the newest of each model first; `limit` 0 means all."""
    found = []
    for model in models or [status.name for status in read_models(connection)]:
        key = FailedJobRegistry(model, connection=connection).key
        ids = cast("list[bytes]", connection.zrevrange(key, 0, limit - 1))
        found += [(model, raw.decode(errors="replace")) for raw in ids]
    return found
