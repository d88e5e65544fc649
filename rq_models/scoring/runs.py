"""A run: one file scored by one model. What Redis holds of it, and who may change what.

Keys, all under ``rq-models:`` and kept for 30 days after the last change:

    rq-models:runs              zset of the ids of all runs, by when they were begun
    rq-models:run:<id>          hash: what was asked for, the plan, the state, how far it has come
    rq-models:run:<id>:done     hash: number of a chunk -> JSON of its part: {"part", "rows", "failed"}

A run's id follows from its output, so the same command finds its run again. Its steps are RQ jobs on the queue
``<model>.bulk``: one that plans, one for each chunk, one that merges. An attempt, which begins with each `begin` of a
run that had come to an end, has job ids of its own. Every change of state is a script that looks at the state before.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from rq.command import send_stop_job_command
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from rq_models import orders
from rq_models.errors import RunConflict, UnknownRun
from rq_models.jobs import ModelJob
from rq_models.registry import CARD_TTL, PREFIX, handed_key, read_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from redis import Redis

    from rq_models.ledger import Taken

RUNS_KEY = f"{PREFIX}runs"
BULK = ".bulk"
STEP = "rq_models.scoring.step"
"""The function that a step's job names."""
PLAN, MERGE = "plan", "merge"
ACTIVE = ("planning", "running", "merging")
_HERE = files("rq_models.scoring")
_ENQUEUE, _TAKE_BACK = (
    files("rq_models").joinpath(f"{name}.lua").read_text("utf-8") for name in ("enqueue", "take_back")
)
_BEGIN, _PLAN, _COMMIT, _END = (
    _HERE.joinpath(f"{name}.lua").read_text("utf-8") for name in ("begin", "plan", "commit", "end")
)
_PER_SCRIPT = 1000
_RETRIES = 5
KEPT, KEPT_PLAN = 3600, 7 * 24 * 3600
"""Seconds that the job of a step is kept when it is done, and that of the one that planned."""
_PASSWORD = re.compile(r"(?<=://)[^/\s]*@")
_SIGNATURE = re.compile(r"(://[^\s?]*)\?[^\s'\")]*")


def run_id(output: str) -> str:
    """Return the id of the run that makes this output."""
    return hashlib.sha256(output.encode()).hexdigest()[:12]


def run_key(run: str) -> str:
    """Return the key of a run."""
    return f"{PREFIX}run:{run}"


def done_key(run: str) -> str:
    """Return the key of what is done of a run."""
    return f"{PREFIX}run:{run}:done"


def errors_address(output: str) -> str:
    """Return where the failed rows of an output go."""
    return f"{output}.errors.jsonl"


def bulk_name(model: str) -> str:
    """Return the name of the queue of a model's steps."""
    return f"{model}{BULK}"


def step_id(run: str, attempt: int, step: str | int) -> str:
    """Return the id of the job of one step."""
    return f"{run}-{attempt}-{step}"


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
        input, output: addresses.
        keep: columns of the input to be carried through; None for all.
        header: whether the first line of a CSV names its columns.
        overwrite: whether the output may exist.
        max_errors: failed rows after which the run is given up; None for any number.
        slice_rows: rows that the model is given at a time; None to find out.
    """

    model: str
    input: str
    output: str
    keep: tuple[str, ...] | None = None
    header: bool = True
    overwrite: bool = False
    max_errors: int | None = None
    slice_rows: int | None = None

    def text(self) -> str:
        """Return it as it is stored."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, sort_keys=True)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        state: ``planning``, ``running``, ``merging``, ``finished``, ``failed`` or ``cancelled``.
        rows: that are done, predicted and failed ones.
        failed: of these.
        chunks, chunks_done: pieces of the input; 0 of 0 before they are known.
        total: rows of the whole input as far as that is known: estimated until the last chunk is done.
        seconds: since this attempt began, until it ended.
        rows_before: that were done when this attempt began.
        error: why it failed.
    """

    run: str
    state: str
    rows: int
    failed: int
    chunks: int
    chunks_done: int
    total: int | None
    seconds: float
    rows_before: int
    error: str | None

    @property
    def predicted(self) -> int:
        """Rows that have a prediction."""
        return self.rows - self.failed

    @property
    def is_over(self) -> bool:
        """Whether nothing changes any more."""
        return self.state not in ACTIVE

    @property
    def rows_per_second(self) -> float:
        """Of this attempt."""
        return (self.rows - self.rows_before) / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """As it goes now; None if that can't be said yet."""
        speed = self.rows_per_second
        return (self.total - self.rows) / speed if self.total is not None and speed and not self.is_over else None

    def __str__(self) -> str:
        if self.state == "finished":
            return f"{self.rows:,} in = {self.predicted:,} out + {self.failed:,} failed"
        of = f" of about {self.total:,}" if self.total is not None else ""
        return f"{self.state}: {self.rows:,}{of} rows, {self.failed:,} failed"


@dataclass(frozen=True)
class Record:
    """A run as Redis holds it.

    Attributes:
        plan: what the planning step found out: see `rq_models.scoring.plan`; None before.
        merged: whether an attempt has begun to merge: then what stands at the output may be its own.
    """

    id: str
    attempt: int
    asked: Asked
    plan: dict[str, Any] | None
    progress: Progress
    began_at: float
    merged: bool


def _decode(raw: dict[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode(errors="replace") for key, value in raw.items()}


def _asked(text: str | bytes) -> Asked:
    """Return what `Asked.text` made a text of."""
    found = json.loads(text)
    return Asked(**{**found, "keep": None if found["keep"] is None else tuple(found["keep"])})


def read(connection: Redis, run: str) -> Record:
    """Return a run.

    Raises:
        UnknownRun: there is none of this id.
    """
    found = _decode(cast("dict[bytes, bytes]", connection.hgetall(run_key(run))))
    if "asked" not in found:
        raise UnknownRun(f"there is no run '{run}'; 'rq-models runs' lists those of the last 30 days")
    plan = json.loads(found["plan"]) if found.get("plan") else None
    number = {name: int(found.get(name) or 0) for name in ("rows", "failed", "done", "before")}
    chunks = len(plan["pieces"]) if plan else 0
    began, ended = float(found["began_at"]), float(found.get("ended_at") or 0)
    total = None
    if plan and number["done"] == chunks:
        total = number["rows"]
    elif plan:
        # As the rows of the chunks that are done, or of the sample.
        total = max(round(number["rows"] * chunks / number["done"]) if number["done"] else plan["rows"], number["rows"])
    progress = Progress(
        run=run,
        state=found["state"],
        rows=number["rows"],
        failed=number["failed"],
        chunks=chunks,
        chunks_done=number["done"],
        total=total,
        seconds=(ended or time.time()) - began,
        rows_before=number["before"],
        error=found.get("error") or None,
    )
    return Record(run, int(found["attempt"]), _asked(found["asked"]), plan, progress, began, found.get("merged") == "1")


def read_all(connection: Redis) -> Iterator[Record]:
    """Yield every run that is remembered, the latest first; forget those that have expired."""
    for raw in cast("list[bytes]", connection.zrevrange(RUNS_KEY, 0, -1)):
        try:
            yield read(connection, raw.decode())
        except UnknownRun:
            connection.zrem(RUNS_KEY, raw)


def begin(connection: Redis, asked: Asked, *, restart: bool) -> str:
    """Begin a run, or go on with the one of this output; return its id.

    One that is active is left as it is: whoever asks twice sees the same run. One that failed or was cancelled goes on
    from the chunks that are done. One that is finished is begun anew, if its output may be overwritten.

    Raises:
        RunConflict: this output belongs to a run of something else.
    """
    run, text = run_id(asked.output), asked.text()
    former = _found(connection, run) if restart else None
    begun = connection.register_script(_BEGIN)
    keys = (run_key(run), done_key(run), RUNS_KEY)
    state, _, before = begun(keys, (text, run, time.time(), int(restart), CARD_TTL))
    if state == b"conflict":
        raise RunConflict(_differences(_asked(before), asked, run))
    if state == b"finished":
        again = "--overwrite (overwrite=True) makes it again, also if it is gone"
        raise RunConflict(f"run {run} has made {shown(asked.output)} already; {again}")
    if former is not None and not former.progress.is_over:
        clear(connection, former)
    _complete(connection, read(connection, run))
    return run


def _found(connection: Redis, run: str) -> Record | None:
    try:
        return read(connection, run)
    except UnknownRun:
        return None


def _complete(connection: Redis, record: Record) -> None:
    """Enqueue those steps of an active run that are to come, and are not there.

    In the usual case they are there, but for the first. Whoever began the run may have died before it was enqueued, and
    a job may have been deleted or stopped since by somebody who did not mean the run.
    """
    if record.progress.state == "running":
        steps = left(connection, record) or [MERGE]
    else:
        steps = [MERGE if record.progress.state == "merging" else PLAN]
    keys = [f"{RQ_KEY_PREFIX}:job:{step_id(record.id, record.attempt, step)}" for step in steps]
    with connection.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.hget(key, "status")
        states = pipe.execute()
    alive = (None, b"queued", b"started")
    if dead := [key for key, state in zip(keys, states, strict=True) if state not in alive]:
        connection.delete(*dead)
    enqueue(connection, record.asked.model, record.id, record.attempt, steps)


def _differences(before: Asked, asked: Asked, run: str) -> str:
    names = [field.name for field in fields(Asked) if field.name != "overwrite"]
    pairs = [(name, getattr(before, name), getattr(asked, name)) for name in names]
    changes = [(name, was, now_) for name, was, now_ in pairs if was != now_]
    said = "; ".join(f"{name} was {_told(was)} and is {_told(now_)}" for name, was, now_ in changes)
    return f"run {run} of this output was begun otherwise: {said}; --restart (restart=True) starts over"


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return "not given" if value is None else shown(str(value))


def shown(text: str) -> str:
    """Return an address, or a text that holds one, for people: without the password or the signature it may hold."""
    return _SIGNATURE.sub(r"\1", _PASSWORD.sub("", text))


def enqueue(connection: Redis, model: str, run: str, attempt: int, steps: Iterable[str | int]) -> None:
    """Enqueue steps of an attempt; those that are there already are left as they are."""
    queue = bulk_name(model)
    todo = list(steps)
    for at in range(0, len(todo), _PER_SCRIPT):
        job = ModelJob(connection=connection)
        job.data = b""  # each has its own, below; RQ wants to see some
        job.created_at = job.enqueued_at = now()
        job.origin, job.result_ttl, job.retries_left, job.timeout = queue, KEPT, _RETRIES, -1
        job.failure_ttl, job.description = CARD_TTL, f"a step of scoring run {run}"
        job._status = JobStatus.QUEUED  # noqa: SLF001 - as RQ's own create does
        shared = {name: value for name, value in job.to_dict().items() if name != "data"}
        shared["enqueued_at"] = utcformat(job.enqueued_at)
        flat = [part for pair in shared.items() for part in pair]
        jobs: list[Any] = []
        for step in todo[at : at + _PER_SCRIPT]:
            jobs += step_id(run, attempt, step), json.dumps([STEP, None, [run, attempt, step], {}])
        keys = (Queue.redis_queue_namespace_prefix + queue, Queue.redis_queues_keys)
        connection.eval(_ENQUEUE, len(keys), *keys, RQ_KEY_PREFIX, "RPUSH", 0, "", len(flat), *flat, *jobs)
    # They look by themselves, too, but not at once.
    status = read_model(connection, model)
    for one in status.serving if status and todo else ():
        orders.give(connection, one.worker, orders.LOOK)


def keep_plan(connection: Redis, by: Taken, record: Record, plan: dict[str, Any] | None = None) -> bool:
    """Let a run be ``running``, by this plan or the one that it has.

    Returns:
        False if this attempt or this execution is given up, or another execution has planned otherwise.
    """
    keys = (_wip(record), run_key(record.id), done_key(record.id), _plan_job(record))
    text = "" if plan is None else json.dumps(plan)
    return bool(connection.register_script(_PLAN)(keys, (f"{by.id}:{by.run}", record.attempt, text, CARD_TTL)))


def commit(connection: Redis, by: Taken, record: Record, number: int, part: dict[str, Any]) -> int | None:
    """Enter a finished chunk, if this execution is still the one that owns it.

    Returns:
        how many chunks are left; None if this run is given up, or this execution was: then its part is nobody's.
    """
    most = "" if record.asked.max_errors is None else record.asked.max_errors
    left = connection.register_script(_COMMIT)(
        (_wip(record), run_key(record.id), done_key(record.id), _plan_job(record)),
        (
            f"{by.id}:{by.run}",
            record.attempt,
            number,
            json.dumps(part),
            part["rows"],
            part["failed"],
            most,
            len((record.plan or {})["pieces"]),
            CARD_TTL,
            time.time(),
        ),
    )
    return None if left is None else int(left)


def end(connection: Redis, record: Record, state: str, error: str = "", *, by: Taken | None = None) -> bool:
    """Let an attempt be merging, finished, failed or cancelled, if it is active; return whether it was.

    Args:
        connection: of the server.
        record: the attempt.
        state: the new one.
        error: why it failed.
        by: the execution that says so, whose word does not count once it is given up; None for people.
    """
    keys = (run_key(record.id), done_key(record.id), _plan_job(record), _wip(record))
    merged = ("merged", 1) if state == "merging" else ()
    holder = "" if by is None else f"{by.id}:{by.run}"
    arguments = (record.attempt, state, time.time(), CARD_TTL, holder, "error", error, *merged)
    return bool(connection.register_script(_END)(keys, arguments))


def _wip(record: Record) -> str:
    return f"{RQ_KEY_PREFIX}:wip:{bulk_name(record.asked.model)}"


def _plan_job(record: Record) -> str:
    return f"{RQ_KEY_PREFIX}:job:{step_id(record.id, record.attempt, PLAN)}"


def parts(connection: Redis, run: str) -> dict[int, dict[str, Any]]:
    """Return the parts that are committed, by the numbers of their chunks."""
    raw = cast("dict[bytes, bytes]", connection.hgetall(done_key(run)))
    return {int(number): json.loads(part) for number, part in raw.items()}


def is_done(connection: Redis, run: str, number: int) -> bool:
    """Return whether a chunk is committed."""
    return bool(connection.hexists(done_key(run), str(number)))


def left(connection: Redis, record: Record) -> list[str | int]:
    """Return the numbers of the chunks that are not committed."""
    done = parts(connection, record.id)
    return [number for number in range(len((record.plan or {})["pieces"])) if number not in done]


def cancel(connection: Redis, run: str) -> bool:
    """Stop a run within a slice, and keep what is done; return whether it was active."""
    record = read(connection, run)
    if not end(connection, record, "cancelled"):
        return False
    clear(connection, record)
    return True


def clear(connection: Redis, record: Record, but: str | None = None) -> None:
    """Take back the steps of an attempt that wait, and stop those at work, but this one; their run is over."""
    queue = Queue(bulk_name(record.asked.model), connection=connection, serializer=JSONSerializer, job_class=ModelJob)
    mine = f"{record.id}-{record.attempt}-"
    waiting = [job_id for job_id in queue.job_ids if job_id.startswith(mine)]
    for at in range(0, len(waiting), _PER_SCRIPT):
        some = waiting[at : at + _PER_SCRIPT]
        lists = [queue.key, handed_key(queue.name)] * len(some)
        connection.eval(_TAKE_BACK, len(lists), *lists, RQ_KEY_PREFIX, KEPT, *some)
    for job_id in queue.started_job_registry.get_job_ids(cleanup=False):
        if job_id.startswith(mine) and job_id != but:
            try:
                send_stop_job_command(connection, job_id, serializer=JSONSerializer)
            except (NoSuchJobError, InvalidJobOperation):
                continue
