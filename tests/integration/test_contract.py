"""What our worker leaves in Redis against what RQ's own SimpleWorker leaves for the same jobs.

A new RQ that changes its records fails here, and not at a user's. The differences that are meant are listed in
``MEANT``; everything else must be the same: keys, types, field names, lifetimes, and the values that are not a time,
a worker or a run.
"""

from __future__ import annotations

import base64
import json
import math
import subprocess
import zlib

import pytest
from conftest import RQ, Project
from redis import Redis
from rq import Queue, Repeat, Retry
from rq.group import Group
from rq.job import Dependency
from rq.rate_limit import RateLimit
from rq.serializers import JSONSerializer

MODEL = """
    class Model:
        version = "7"
        def predict(self, data):
            if data == "raise":
                raise ValueError("refused")
            return data
"""

MEANT = {
    # How often a job was taken, for `rq-models job`.
    "rq:job:": {"attempts"},
    # Which version made the result.
    "rq:results:": {"model_version"},
}
# Times, and what names a worker or a run: only their presence is compared.
VARYING = {
    "created_at",
    "enqueued_at",
    "started_at",
    "ended_at",
    "last_heartbeat",
    "worker_name",
    "execution_id",
    "execution_started_at",
    "execution_ended_at",
}
PATIENCE = 300
"""Seconds by which two lifetimes may differ because one worker ran later than the other."""


def scenario(queue: Queue, name: str) -> None:
    """Enqueue the jobs of one comparison, under the same ids in both databases."""

    def enqueue(job_id: str, data: object = "x", **options: object) -> None:
        queue.enqueue_call(
            "rq_models.jobs.echo", args=(data,), job_id=job_id, description="echo", failure_ttl=4000, **options
        )

    match name:
        case "success":
            enqueue("one", {"a": [1, 2.5, None, "é"]}, result_ttl=900)
        case "none":
            enqueue("one", None, result_ttl=900)
        case "result_ttl 0":
            enqueue("one", result_ttl=0)
        case "result_ttl -1":
            enqueue("one", result_ttl=-1)
        case "meta":
            enqueue("one", result_ttl=900, meta={"who": "me"})
        case "failure":
            enqueue("one", "raise")
        case "failure_ttl -1":
            queue.enqueue_call("rq_models.jobs.echo", args=("raise",), job_id="one", description="echo", failure_ttl=-1)
        case "retries used up":
            enqueue("one", "raise", retry=Retry(max=2))
        case "at_front":
            enqueue("one", result_ttl=900)
            enqueue("two", result_ttl=900, at_front=True)
        case "dependents":
            enqueue("one", result_ttl=900)
            enqueue("two", result_ttl=900, depends_on="one")
        case "dependents of a failure":
            enqueue("one", "raise")
            enqueue("two", result_ttl=900, depends_on="one")
            enqueue("three", result_ttl=900, depends_on=Dependency(["one"], allow_failure=True))
        case "repeat":
            enqueue("one", result_ttl=900, repeat=Repeat(times=1))
        case "retry that waits":
            enqueue("one", "raise", retry=Retry(max=1, interval=1000))
        case "group":
            datas = [
                Queue.prepare_data(
                    "rq_models.jobs.echo",
                    args=[data],
                    job_id=data,
                    description="echo",
                    result_ttl=900,
                    failure_ttl=4000,
                )
                for data in ("one", "raise")
            ]
            Group(queue.connection, "together").enqueue_many(queue, datas)
        case "rate limit":
            for job_id in ("one", "two", "three"):
                enqueue(job_id, result_ttl=900, rate_limit=RateLimit("slow", 1))
        case "a batch of all kinds":
            enqueue("one", {"a": 1}, result_ttl=900)
            enqueue("two", "raise")
            enqueue("three", result_ttl=-1, meta={"who": "me"})
            enqueue("four", "raise", retry=Retry(max=1))
            enqueue("five", None, result_ttl=0)
            enqueue("six", "raise", retry=Retry(max=2, enqueue_at_front=True))
            enqueue("seven", result_ttl=900)
            enqueue("eight", result_ttl=900, depends_on="seven")


SCENARIOS = [
    "success",
    "none",
    "result_ttl 0",
    "result_ttl -1",
    "meta",
    "failure",
    "failure_ttl -1",
    "retries used up",
    "at_front",
    "dependents",
    "dependents of a failure",
    "repeat",
    "retry that waits",
    "group",
    "rate limit",
    "a batch of all kinds",
]


def snapshot(connection: Redis) -> dict[str, object]:
    """Everything that RQ's part of the database holds, with what varies replaced."""
    found: dict[str, object] = {}
    for raw in sorted(connection.scan_iter("rq:*")):
        key = raw.decode()
        if key.startswith(("rq:worker", "rq:clean_registries", "rq:clean_groups")):
            continue
        meant = next((fields for prefix, fields in MEANT.items() if key.startswith(prefix)), set())
        match connection.type(raw):
            case b"hash":
                value = normal(connection.hgetall(raw), meant)
            case b"stream":
                value = [normal(fields, meant) for _, fields in connection.xrange(raw)]
            case b"zset":
                members = connection.zrange(raw, 0, -1, withscores=True)
                value = {member: Approximately(score) for member, score in members}
            case b"list":
                value = connection.lrange(raw, 0, -1)
            case b"set":
                value = connection.smembers(raw)
            case b"string":
                value = "a lock or a counter"
        found[key] = (value, Approximately(connection.ttl(raw)))
    return found


def normal(fields: dict[bytes, bytes], meant: set[str]) -> dict[str, object]:
    result: dict[str, object] = {}
    for raw, value in fields.items():
        name = raw.decode()
        if name in meant:
            continue
        if name in VARYING:
            result[name] = "present" if value else "empty"
        elif name == "data":
            result[name] = json.loads(zlib.decompress(value))
        elif name == "exc_string":
            result[name] = "a traceback" if zlib.decompress(base64.b64decode(value)) else "empty"
        elif name == "exc_info":
            result[name] = "present"
        elif name == "return_value":
            decoded = json.loads(base64.b64decode(value))
            if b"exc_string" in fields:
                # A failed job's error record is ours alone.
                assert set(decoded) == {"kind", "type", "message", "retryable"}
                continue
            result[name] = decoded
        else:
            result[name] = value.decode()
    return result


class Approximately:
    """A time or a lifetime, equal to one that lies near; -1, -2 and infinity are equal to themselves only."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Approximately)
        special = {-1, -2, math.inf}
        if self.value in special or other.value in special:
            return self.value == other.value
        return abs(self.value - other.value) < PATIENCE

    def __repr__(self) -> str:
        return f"~{self.value}"

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def other_url(redis_server, _database_numbers) -> str:
    return f"redis://127.0.0.1:{redis_server.port}/{next(_database_numbers)}"


@pytest.mark.parametrize("name", SCENARIOS)
def test_our_worker_leaves_what_a_stock_worker_leaves(name: str, project: Project, redis_url: str, other_url: str):
    project.add("echo", MODEL)
    ours, stock = Redis.from_url(redis_url), Redis.from_url(other_url)
    for connection in (ours, stock):
        scenario(Queue("echo", connection=connection, serializer=JSONSerializer), name)
    environ = {**project.environ, "PYTHONPATH": str(project.root)}
    burst = [RQ, "worker", "--burst", "--quiet"]
    for command, url in [
        ([*burst, "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker", "echo"], redis_url),
        ([*burst, "-u", other_url, "-w", "rq.worker.SimpleWorker", "-S", "json", "echo"], other_url),
    ]:
        subprocess.run(
            command, cwd=project.root, env={**environ, "REDIS_URL": url}, timeout=90, check=True, capture_output=True
        )
    try:
        assert snapshot(ours) == snapshot(stock)
    finally:
        ours.close()
        stock.close()


def test_every_key_of_a_finished_job_has_a_ttl(project: Project, connection: Redis, no_leaked_keys: None):
    project.add("echo", MODEL)
    queue = Queue("echo", connection=connection, serializer=JSONSerializer)
    for data in ("x", "raise"):
        queue.enqueue_call("rq_models.jobs.echo", args=(data,), job_id=data)
    command = [RQ, "worker", "--burst", "-c", "rq_models.rq_settings", "-w", "rq_models.ModelWorker", "echo"]
    subprocess.run(command, cwd=project.root, env=project.environ, timeout=90, check=True, capture_output=True)
    for job_id in ("x", "raise"):
        keys = [key for key in connection.scan_iter("rq:*") if job_id.encode() in key.split(b":")]
        assert len(keys) >= 2
        assert all(connection.ttl(key) > 0 for key in keys)
