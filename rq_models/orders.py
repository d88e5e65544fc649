"""Orders: what ``rq-models reload`` and ``drain`` tell workers, and what these answer.

They are told by RQ's own channel of commands, one for each worker. Answers come in a list that is named by the order's
token and expires: ``rq-models:answers:<token>``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from rq.command import send_command

from rq_models.registry import PREFIX

if TYPE_CHECKING:
    from redis import Redis

RELOAD, DRAIN, LOOK = "reload", "drain", "look"
_TTL = 600
_LONGEST_TOKEN = 64


@dataclass(frozen=True)
class Answer:
    """What became of an order: `version` is the model's now, `error` an error record, or None if all went well."""

    worker: str
    version: str | None
    error: Any


def give(connection: Redis, worker: str, order: str, token: str = "") -> None:
    """Tell a worker what to do: `RELOAD`, `DRAIN`, or `LOOK` for steps of scoring runs."""
    send_command(connection, worker, order, token=token)


def answer(connection: Redis, token: str, said: Answer) -> None:
    """Say what became of an order."""
    key = _key(token)
    with connection.pipeline() as pipe:
        pipe.rpush(key, json.dumps(asdict(said)))
        pipe.expire(key, _TTL)
        pipe.execute()


def next_answer(connection: Redis, token: str, seconds: int) -> Answer | None:
    """Wait for another worker's answer, for so many seconds at most; None if there was none."""
    found = cast("tuple[bytes, bytes] | None", connection.blpop([_key(token)], seconds))
    return Answer(**json.loads(found[1])) if found else None


def _key(token: str) -> str:
    # Anybody can publish a command, with anything in it.
    return f"{PREFIX}answers:{token:.{_LONGEST_TOKEN}}"
