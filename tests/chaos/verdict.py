"""What must hold when all is over, for every job and every key."""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from chaos.clients import ChaosClient, Record
from chaos.system import MODEL
from redis import Redis

LASTING = (b"rq:queues", b"rq:workers", b"rq-models:models")
LASTING_PREFIXES = (b"rq:finished:", b"rq:failed:", b"rq:workers:")
"""Indexes, which live as long as the server; all other keys expire."""
_CHUNK = 1000
_RESULT = b"1"


@dataclass
class Verdict:
    """What was found.

    Attributes:
        violations: each of them a sentence.
        counts: by name.
        recovery: seconds from a fault to the beginning of the run that came of it, the longest, and of which job.
        answer: seconds from acknowledgement to result, the longest, and of which job.
        ends: when each job ended.
    """

    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    recovery: tuple[float, str] = (0.0, "none")
    answer: tuple[float, str] = (0.0, "none")
    ends: dict[str, float] = field(default_factory=dict)


def judge(redis: Redis, clients: Iterable[ChaosClient], deaths: Iterable[float]) -> Verdict:
    """Look at everything.

    Args:
        redis: the server, without a proxy.
        clients: with their records.
        deaths: the times of the faults by which workers lose what they hold.
    """
    verdict = Verdict()
    acknowledged = {record.id: record for client in clients for record in client.records}
    given_up = set().union(*(client.given_up for client in clients))
    for client in clients:
        verdict.violations += client.errors
    stored = {key.decode().removeprefix("rq:job:") for key in redis.scan_iter("rq:job:*", count=_CHUNK)}
    for missing in acknowledged.keys() - stored:
        verdict.violations.append(f"lost: job {missing} was acknowledged and is not there")
    ids = sorted(stored)
    finished = {member.decode() for member in redis.zrange(f"rq:finished:{MODEL}", 0, -1)}
    failed = {member.decode() for member in redis.zrange(f"rq:failed:{MODEL}", 0, -1)}
    died = sorted(deaths)
    for start in range(0, len(ids), _CHUNK):
        with redis.pipeline(transaction=False) as pipe:
            for job_id in ids[start : start + _CHUNK]:
                pipe.hgetall(f"rq:job:{job_id}")
                pipe.xrange(f"rq:results:{job_id}")
            replies = pipe.execute()
        for job_id, fields, entries in zip(ids[start : start + _CHUNK], replies[::2], replies[1::2], strict=True):
            if fields.get(b"status") == b"canceled" and job_id in given_up:
                verdict.counts["taken back"] += 1
                continue
            for problem in _problems(fields, entries):
                verdict.violations.append(f"job {job_id}: {problem}")
            if job_id not in finished or job_id in failed:
                verdict.violations.append(f"job {job_id} is not in the registry of its end, or in another one")
            verdict.counts["run once" if fields.get(b"attempts") == b"1" else "run again"] += 1
            verdict.ends[job_id] = _instant(fields, b"ended_at")
            _time_recovery(verdict, job_id, fields, died)
    for record in acknowledged.values():
        _judge_client(verdict, record)
    verdict.counts["acknowledged"] = len(acknowledged)
    verdict.counts["ended"] = len(ids)
    verdict.violations += leftovers(redis)
    return verdict


def _problems(fields: dict[bytes, bytes], entries: list[Any]) -> Iterable[str]:
    status = fields.get(b"status", b"none").decode()
    if status != "finished":
        said = ""
        for _, entry in entries:
            with suppress(Exception):
                said = zlib.decompress(base64.b64decode(entry[b"exc_string"])).decode()[-300:]
        yield f"its status is {status} {said}"
    if len(entries) != 1:
        yield f"it has {len(entries)} results"
    for _, entry in entries:
        value = json.loads(base64.b64decode(entry.get(b"return_value", b"bnVsbA==")))
        if entry.get(b"type") != _RESULT or value != _right(_number(fields)):
            yield f"its result is wrong: {value!r:.200}"


def _number(fields: dict[bytes, bytes]) -> int:
    raw = fields[b"data"]
    data = json.loads(raw if raw.startswith(b"[") else zlib.decompress(raw))
    return int(data[2][0]["n"])


def _right(n: int) -> dict[str, int]:
    return {"n": n, "square": n**2}


def _time_recovery(verdict: Verdict, job_id: str, fields: dict[bytes, bytes], died: list[float]) -> None:
    if b"deaths" not in fields:
        return
    verdict.counts["recovered"] += 1
    # The last time that it was put back, and the last death before that.
    back, began = _instant(fields, b"enqueued_at"), _instant(fields, b"started_at")
    before = [at for at in died if at <= back]
    if before and began - before[-1] > verdict.recovery[0]:
        at = time.strftime("%H:%M:%S", time.localtime(before[-1]))
        verdict.recovery = began - before[-1], f"job {job_id}, after the fault at {at}"


def _instant(fields: dict[bytes, bytes], name: bytes) -> float:
    return datetime.fromisoformat(fields.get(name, b"").decode() or "1970-01-01").timestamp()


def _judge_client(verdict: Verdict, record: Record) -> None:
    if record.took is None:
        verdict.violations.append(f"stuck: the client of job {record.id} got nothing")
    elif record.outcome != _right(record.n):
        verdict.violations.append(f"the client of job {record.id} got {record.outcome!r:.300}")
    elif record.took > verdict.answer[0]:
        ended = verdict.ends.get(record.id, record.at) - record.at
        at = time.strftime("%H:%M:%S", time.localtime(record.at))
        verdict.answer = record.took, f"job {record.id}, acknowledged at {at}, ended after {ended:.1f} s"


def leftovers(redis: Redis) -> Iterable[str]:
    """Yield what is left on the server of work that is over."""
    for key in redis.scan_iter(count=_CHUNK):
        kind = redis.type(key)
        if kind == b"list":
            yield f"left: list {key.decode()} holds {redis.llen(key)}"
        elif key.startswith((b"rq:wip:", b"rq:execution:", b"rq:executions:")):
            yield f"left: {key.decode()}"
        elif key.endswith(b":executions") and redis.scard(key):
            yield f"left: {key.decode()} holds {redis.scard(key)}"
        elif redis.ttl(key) == -1 and key not in LASTING and not key.startswith(LASTING_PREFIXES):
            yield f"no TTL: {key.decode()}"
