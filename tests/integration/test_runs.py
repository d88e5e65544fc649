"""The records of scoring runs on a real server: who may begin, enter and end what."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis
from rq.job import JobStatus

from rq_models import RunConflict, UnknownRun
from rq_models.jobs import ModelJob
from rq_models.registry import CARD_TTL
from rq_models.scoring import runs
from rq_models.scoring.runs import Asked, Record

QUEUE = "rq:queue:iris.bulk"
WIP = "rq:wip:iris.bulk"
PLAN = {"pieces": [[0, 10], [10, 20], [20, 30]], "rows": 30}


def asked(**options: Any) -> Asked:
    return Asked(**{"model": "iris", "input": "/in.csv", "output": "/out.csv", **options})


def begun(connection: Redis, *, restart: bool = False, **options: Any) -> Record:
    return runs.read(connection, runs.begin(connection, asked(**options), restart=restart))


def running(connection: Redis, **options: Any) -> Record:
    """Return a run that is planned."""
    record = begun(connection, **options)
    assert keep(connection, record)
    return runs.read(connection, record.id)


def by(job_id: str, run: str = "x") -> Any:
    """Return an execution, as far as it counts here."""
    return SimpleNamespace(id=job_id, run=run)


def keep(connection: Redis, record: Record, plan: dict[str, Any] | None = PLAN, *, holds: bool = True) -> bool:
    """Write the plan down as the execution that holds the planning step, or as one that was given up."""
    job_id = runs.step_id(record.id, record.attempt, runs.PLAN)
    if holds:
        connection.zadd(WIP, {f"{job_id}:x": 2e9})
    return runs.keep_plan(connection, by(job_id, "x" if holds else "y"), record, plan)


def commit(
    connection: Redis, record: Record, number: int, rows: int = 10, failed: int = 0, *, holds: bool = True
) -> int | None:
    """Enter a chunk as the execution that holds it, or as one that was given up."""
    job_id = runs.step_id(record.id, record.attempt, number)
    if holds:
        connection.zadd(WIP, {f"{job_id}:x": 2e9})
    part = {"part": f"/parts/{number}", "rows": rows, "failed": failed}
    return runs.commit(connection, by(job_id), record, number, part)


def waiting(connection: Redis) -> list[str]:
    return [raw.decode() for raw in connection.lrange(QUEUE, 0, -1)]


def test_a_run_begins_with_the_job_that_plans_it(connection: Redis):
    record = begun(connection)

    assert (record.attempt, record.plan, record.merged) == (1, None, False)
    assert (record.progress.state, record.progress.rows, record.progress.total) == ("planning", 0, None)
    (job_id,) = waiting(connection)
    assert job_id == f"{record.id}-1-plan"
    job = ModelJob.fetch(job_id, connection=connection)
    assert (job.func_name, job.args) == (runs.STEP, [record.id, 1, "plan"])
    assert (job.origin, job.get_status(), job.retries_left) == ("iris.bulk", JobStatus.QUEUED, 5)
    assert job.model is None  # no prediction: a worker of rows would refuse it


def test_to_ask_again_is_to_see_the_same_run(connection: Redis):
    first = begun(connection)
    again = begun(connection, overwrite=True)

    assert (again.id, again.attempt, again.began_at) == (first.id, 1, first.began_at)
    assert len(waiting(connection)) == 1


def test_a_run_whose_beginner_died_before_it_enqueued_gets_its_job(connection: Redis):
    begun(connection)
    connection.flushdb()
    record = begun(connection)
    connection.delete(QUEUE, f"rq:job:{record.id}-1-plan")

    begun(connection)

    assert waiting(connection) == [f"{record.id}-1-plan"]


def test_what_was_mistyped_is_asked_again_without_ado(connection: Redis):
    record = begun(connection)
    runs.end(connection, record, "failed", "there is no such file")

    again = begun(connection, input="/right.csv")

    assert (again.id, again.attempt, again.asked.input, again.progress.state) == (
        record.id,
        2,
        "/right.csv",
        "planning",
    )


def test_more_failed_rows_may_be_allowed_later(connection: Redis):
    record = begun(connection, max_errors=1)
    keep(connection, record)
    runs.end(connection, record, "failed", "2 rows failed")

    again = begun(connection, max_errors=100)

    assert (again.attempt, again.asked.max_errors, again.plan) == (2, 100, PLAN)


def test_a_finished_run_is_not_forgotten_by_asking_again(connection: Redis):
    record = begun(connection)
    keep(connection, record)
    runs.end(connection, record, "finished")

    with pytest.raises(RunConflict, match=r"has made /out\.csv already; --overwrite"):
        begun(connection)

    assert runs.read(connection, record.id).progress.state == "finished"
    assert begun(connection, overwrite=True).attempt == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input": "/other.csv"}, "input was /in.csv and is /other.csv"),
        ({"model": "rose"}, "model was iris and is rose"),
        ({"keep": ("a",)}, "keep was not given and is a"),
        ({"header": False}, "header was True and is False"),
        ({"slice_rows": 7}, "slice_rows was not given and is 7"),
    ],
)
@pytest.mark.parametrize("state", ["planning", "running", "failed", "cancelled"])
def test_the_output_of_another_run_is_refused(connection: Redis, state: str, changed: dict[str, Any], said: str):
    record = begun(connection)
    if state != "planning":
        keep(connection, record)
        runs.end(connection, record, state)

    with pytest.raises(RunConflict) as refused:
        begun(connection, **changed)

    assert said in str(refused.value)
    assert "--restart" in str(refused.value)
    assert runs.read(connection, record.id).progress.state == state
    assert len(waiting(connection)) == 1


def test_only_what_differs_is_said(connection: Redis):
    begun(connection, keep=("a", "b"))

    with pytest.raises(RunConflict) as refused:
        begun(connection, keep=("a", "b"), header=False)

    assert "keep" not in str(refused.value)
    with pytest.raises(RunConflict, match=r"keep was a,b and is a;"):
        begun(connection, keep=("a",))


def test_restart_starts_over(connection: Redis):
    record = running(connection)
    assert commit(connection, record, 0) == 2

    fresh = begun(connection, restart=True, input="/other.csv")

    assert (fresh.id, fresh.attempt, fresh.asked.input) == (record.id, 2, "/other.csv")
    assert (fresh.plan, fresh.progress.rows, fresh.progress.rows_before) == (None, 0, 0)
    assert runs.parts(connection, record.id) == {}
    # Whoever still works for the old attempt enters nothing and ends nothing.
    assert commit(connection, record, 1) is None
    assert not runs.end(connection, record, "finished")
    assert not keep(connection, record)
    assert runs.read(connection, record.id).progress.state == "planning"
    assert keep(connection, fresh)
    assert commit(connection, record, 1) is None
    assert runs.read(connection, record.id).progress.rows == 0


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_run_that_ended_early_goes_on(connection: Redis, state: str):
    record = running(connection)
    commit(connection, record, 0, rows=10, failed=4)
    runs.end(connection, record, state, error="why")
    assert runs.read(connection, record.id).progress.error == "why"

    again = begun(connection)

    assert (again.attempt, again.plan) == (2, record.plan)
    at = again.progress
    assert (at.state, at.rows, at.failed, at.rows_before, at.chunks_done, at.error) == ("planning", 10, 4, 10, 1, None)
    assert list(runs.parts(connection, record.id)) == [0]
    assert f"{record.id}-2-plan" in waiting(connection)


def test_a_run_that_is_finished_begins_anew(connection: Redis):
    record = running(connection)
    commit(connection, record, 0)
    runs.end(connection, record, "finished")

    again = begun(connection, overwrite=True, input="/other.csv")

    assert (again.attempt, again.plan, again.progress.rows, again.progress.rows_before) == (2, None, 0, 0)
    assert runs.parts(connection, record.id) == {}


def test_chunks_are_entered_until_none_is_left(connection: Redis):
    record = running(connection)
    at = record.progress
    assert (at.state, at.chunks, at.chunks_done, at.total) == ("running", 3, 0, 30)

    assert commit(connection, record, 2, rows=14, failed=1) == 2
    at = runs.read(connection, record.id).progress
    assert (at.rows, at.failed, at.predicted, at.chunks_done, at.total) == (14, 1, 13, 1, 42)

    assert commit(connection, record, 0, rows=10) == 1
    assert commit(connection, record, 1, rows=10) == 0
    at = runs.read(connection, record.id).progress
    assert (at.rows, at.failed, at.chunks_done, at.total, at.state) == (34, 1, 3, 34, "running")
    assert runs.parts(connection, record.id)[2] == {"part": "/parts/2", "rows": 14, "failed": 1}


def test_an_execution_that_was_given_up_enters_nothing(connection: Redis):
    record = running(connection)

    assert commit(connection, record, 0, holds=False) is None

    assert runs.parts(connection, record.id) == {}
    assert runs.read(connection, record.id).progress.rows == 0


def test_a_chunk_counts_once(connection: Redis):
    record = running(connection)

    assert [commit(connection, record, 0), commit(connection, record, 0)] == [2, 2]

    at = runs.read(connection, record.id).progress
    assert (at.rows, at.chunks_done) == (10, 1)


def test_too_many_failed_rows_end_the_run_and_what_is_done_is_kept(connection: Redis):
    record = running(connection, max_errors=3)

    assert commit(connection, record, 0, failed=3) == 2
    commit(connection, record, 1, failed=1)

    at = runs.read(connection, record.id).progress
    assert (at.state, at.failed, at.error) == ("failed", 4, "4 rows failed, more than max_errors (3)")
    assert sorted(runs.parts(connection, record.id)) == [0, 1]
    assert commit(connection, record, 2) is None


def test_no_failed_row_at_all_may_be_asked_for(connection: Redis):
    record = running(connection, max_errors=0)

    assert commit(connection, record, 0) == 2
    commit(connection, record, 1, failed=1)

    assert runs.read(connection, record.id).progress.state == "failed"


def test_who_was_given_up_plans_nothing(connection: Redis):
    record = begun(connection)

    assert not keep(connection, record, holds=False)

    assert runs.read(connection, record.id).progress.state == "planning"


def test_a_plan_is_made_once(connection: Redis):
    record = running(connection)

    assert keep(connection, record), "again, because the first answer was lost"
    assert not keep(connection, record, {"pieces": [[0, 30]], "rows": 30})
    assert keep(connection, record, None), "by the one that is there"

    assert runs.read(connection, record.id).plan == PLAN
    runs.end(connection, record, "merging")
    assert not keep(connection, record)
    assert runs.read(connection, record.id).progress.state == "merging"


def test_without_a_plan_nothing_runs(connection: Redis):
    assert not keep(connection, begun(connection), None)


@pytest.mark.parametrize("state", ["merging", "finished", "failed", "cancelled"])
def test_who_was_given_up_ends_nothing(connection: Redis, state: str):
    record = running(connection)
    mine = by(f"{record.id}-1-0")

    assert not runs.end(connection, record, state, by=mine)
    assert runs.read(connection, record.id).progress.state == "running"

    connection.zadd(WIP, {f"{mine.id}:x": 2e9})
    assert runs.end(connection, record, state, by=mine)


def test_asking_again_puts_back_the_steps_that_are_gone(connection: Redis):
    record = running(connection)
    runs.enqueue(connection, "iris", record.id, 1, [0, 1, 2])
    commit(connection, record, 0)
    # Deleted by one, cancelled by another, and one is at work.
    connection.delete(QUEUE, f"rq:job:{record.id}-1-1")
    connection.hset(f"rq:job:{record.id}-1-2", "status", "canceled")

    assert begun(connection).attempt == 1

    assert waiting(connection) == [f"{record.id}-1-1", f"{record.id}-1-2"]
    connection.delete(QUEUE)
    connection.hset(f"rq:job:{record.id}-1-1", "status", "started")
    begun(connection)
    assert waiting(connection) == []
    for number in (1, 2):
        commit(connection, record, number)
    begun(connection)
    assert waiting(connection) == [f"{record.id}-1-merge"]


def test_starting_over_takes_back_the_steps_of_before(connection: Redis):
    record = running(connection)
    runs.enqueue(connection, "iris", record.id, 1, [0, 1, 2])

    fresh = begun(connection, restart=True)

    assert waiting(connection) == [f"{fresh.id}-2-plan"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/a?b.csv", "/data/a?b.csv"),
        ("https://u:secret@host/a.csv?X-Amz-Signature=secret", "https://host/a.csv"),
        (
            "403, message='Forbidden', url='https://host/a.csv?sig=secret'",
            "403, message='Forbidden', url='https://host/a.csv'",
        ),
    ],
)
def test_what_signs_an_address_is_not_shown(text: str, shown: str):
    assert runs.shown(text) == shown


def test_the_first_end_counts(connection: Redis):
    record = running(connection)

    assert runs.end(connection, record, "merging")
    assert commit(connection, record, 0) is None
    assert runs.end(connection, record, "finished")
    assert not runs.end(connection, record, "failed", error="late")
    assert not runs.cancel(connection, record.id)

    at = runs.read(connection, record.id).progress
    assert (at.state, at.error) == ("finished", None)


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled"])
def test_the_clock_of_a_run_stands_still_when_it_is_over(connection: Redis, state: str):
    record = running(connection)
    assert not connection.hexists(runs.run_key(record.id), "ended_at")

    runs.end(connection, record, state)

    ended = float(connection.hget(runs.run_key(record.id), "ended_at"))
    assert runs.read(connection, record.id).progress.seconds == ended - record.began_at


def test_cancelling_takes_back_what_waits(connection: Redis):
    record = running(connection)
    other = begun(connection, output="/else.csv")
    runs.enqueue(connection, "iris", record.id, 1, [0, 1, 2])
    commit(connection, record, 0)

    assert runs.cancel(connection, record.id)
    assert not runs.cancel(connection, record.id)

    assert waiting(connection) == [f"{other.id}-1-plan"]
    assert runs.read(connection, record.id).progress.state == "cancelled"
    assert list(runs.parts(connection, record.id)) == [0]
    assert commit(connection, record, 1) is None


def test_steps_are_enqueued_once(connection: Redis):
    record = running(connection)
    connection.delete(QUEUE)
    for _ in range(2):
        runs.enqueue(connection, "iris", record.id, 1, range(2500))
        runs.enqueue(connection, "iris", record.id, 1, ["merge"])

    assert waiting(connection) == [f"{record.id}-1-{n}" for n in (*range(2500), "merge")]


def test_the_job_that_planned_it_shows_how_far_it_is(connection: Redis):
    record = running(connection)
    plan = f"rq:job:{record.id}-1-plan"

    commit(connection, record, 0, failed=2)
    assert json.loads(connection.hget(plan, "meta")) == {"rows": 10, "failed": 2, "chunks_done": 1, "chunks": 3}

    runs.end(connection, record, "cancelled")
    assert json.loads(connection.hget(plan, "meta"))["state"] == "cancelled"


def test_the_job_that_planned_it_is_not_made_again_when_it_has_expired(connection: Redis):
    record = running(connection)
    plan = f"rq:job:{record.id}-1-plan"
    connection.delete(plan)

    assert commit(connection, record, 0) == 2
    assert runs.end(connection, record, "cancelled")

    assert not connection.exists(plan)


def test_every_key_of_a_run_expires(connection: Redis):
    record = running(connection)

    def lasting() -> set[str]:
        return {key.decode() for key in connection.scan_iter("rq-models:run*") if connection.ttl(key) < CARD_TTL - 60}

    assert lasting() == set()
    begun(connection, output="/new.csv")
    assert lasting() == set()
    commit(connection, record, 0)
    assert connection.exists(runs.done_key(record.id))
    assert lasting() == set()
    for key in connection.scan_iter(f"{runs.run_key(record.id)}*"):
        connection.persist(key)
    runs.end(connection, record, "failed", error="why")
    assert lasting() == set()


def test_cancelled_steps_expire(connection: Redis):
    record = running(connection)
    runs.enqueue(connection, "iris", record.id, 1, [0, 1])

    runs.cancel(connection, record.id)

    assert [key for key in connection.scan_iter("rq:job:*") if connection.ttl(key) == -1] == []


def test_runs_are_listed_the_latest_first_and_forgotten_when_they_expire(connection: Redis):
    first, second, third = (begun(connection, output=f"/{name}.csv") for name in "abc")
    connection.delete(runs.run_key(second.id))

    assert [one.id for one in runs.read_all(connection)] == [third.id, first.id]
    assert connection.zcard(runs.RUNS_KEY) == 2


def test_an_unknown_run(connection: Redis):
    with pytest.raises(UnknownRun, match="there is no run 'nosuch'"):
        runs.read(connection, "nosuch")
    with pytest.raises(UnknownRun):
        runs.cancel(connection, "nosuch")
