"""``rq-models reload`` and ``drain``: workers are told to change to the configuration as it is now, or to leave."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

import click

from rq_models import orders
from rq_models.cli.app import App, say
from rq_models.cli.outcome import FAILURE, explain, one_line
from rq_models.errors import NoWorker, UnknownModel, from_record
from rq_models.registry import count_queued, read_model

if TYPE_CHECKING:
    from redis import Redis

    from rq_models.registry import Serving

_POLL = 0.1
_TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True, help="Seconds to wait."
)


@click.command("reload")
@click.argument("model")
@_TIMEOUT
@click.pass_obj
def reload_model(app: App, model: str, timeout: float) -> None:
    """Let the workers of MODEL change to its new version.

    Each reads its configuration again and loads the model in another process, beside the one that goes on with the
    jobs; when that has predicted its example, it takes over. If it fails, the old one stays.
    """
    waiting = [one.worker for one in _serving(app.connection, model)]
    if not waiting:
        raise NoWorker(f"nobody serves model '{model}'; a worker that starts now reads the configuration as it is")
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    for worker in waiting:
        orders.give(app.connection, worker, orders.RELOAD, token)
    status, gone = 0, set[str]()
    while waiting:
        said = orders.next_answer(app.connection, token, 1)
        if said is not None:
            waiting.remove(said.worker)
            status = _tell(said) or status
            continue
        # Missed twice, because its answer may have come between the two looks.
        missed, gone = gone, set(waiting) - {one.worker for one in _serving(app.connection, model)}
        for worker in gone & missed:
            waiting.remove(worker)
            click.echo(f"{worker}: left before it had reloaded")
            status = status or FAILURE
        if time.monotonic() > deadline:
            raise TimeoutError(f"not reloaded after {timeout:g} s: {', '.join(waiting)}")
    raise click.exceptions.Exit(status)


def _tell(said: orders.Answer) -> int:
    """Print what became of one worker; return the exit code of its failure, or 0."""
    if said.error is None:
        click.echo(f"{said.worker}: serves version {said.version or '(none)'}")
        return 0
    code, text = explain(from_record(said.error), None)
    click.echo(f"{said.worker}: stays with version {said.version or '(none)'}: {text}")
    return code


@click.command()
@click.argument("model")
@_TIMEOUT
@click.pass_obj
def drain(app: App, model: str, timeout: float) -> None:
    """Let the workers of MODEL leave.

    Each finishes what it has in hand, takes nothing more and ends with exit status 0, so nothing starts it again. The
    command waits until nobody serves the model; what is queued stays queued.
    """
    deadline = time.monotonic() + timeout
    before: dict[str, str] = {}
    while serving := _serving(app.connection, model):
        now = {one.lease: one.worker for one in serving}
        _farewell(before, now)
        # Again and again, because others may come meanwhile: one that died is started again by its pool.
        for lease in now.keys() - before.keys():
            orders.give(app.connection, now[lease], orders.DRAIN)
        before = now
        if time.monotonic() > deadline:
            raise TimeoutError(f"not left after {timeout:g} s: {', '.join(sorted(now.values()))}")
        time.sleep(_POLL)
    _farewell(before, {})
    (queued,) = count_queued(app.connection, model)
    say(f"nobody serves {model}; {queued} jobs wait in its queue")


def _farewell(before: dict[str, str], now: dict[str, str]) -> None:
    for lease in before.keys() - now.keys():
        click.echo(f"{before[lease]}: left")


def _serving(connection: Redis, model: str) -> tuple[Serving, ...]:
    status = read_model(connection, model)
    if status is None:
        raise UnknownModel(f"no worker ever served '{one_line(model)}'; 'rq-models models' lists what there is")
    return status.serving
