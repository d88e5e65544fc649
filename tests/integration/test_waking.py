"""How the server hands jobs to workers that wait: each job wakes one, and a worker that is cut off loses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files

import pytest
from conftest import wait_until
from redis import Redis, ResponseError
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from rq_models.jobs import ModelJob
from rq_models.lease import own_connection
from rq_models.ledger import Ledger, Taken
from rq_models.registry import count_queued, handed_key

QUEUE, HANDED = "rq:queue:held", handed_key("held")


@pytest.fixture
def make_ledger(connection: Redis) -> Iterator[Callable[[str], Ledger]]:
    """Make the ledger of a worker of that name."""
    made: list[Ledger] = []

    def make(name: str) -> Ledger:
        queue = Queue("held", connection=connection, serializer=JSONSerializer)
        made.append(Ledger(own_connection(connection, client_name=name), queue, name, f"{len(made):012}"))
        return made[-1]

    yield make
    for ledger in made:
        ledger.leave()


def put(connection: Redis, key: str, *job_ids: str) -> None:
    """Put jobs at the end of a list."""
    for job_id in job_ids:
        connection.hset(f"rq:job:{job_id}", mapping={"data": "[]", "status": "queued", "origin": "held"})
        connection.rpush(key, job_id)


def take_back() -> str:
    return files("rq_models").joinpath("take_back.lua").read_text("utf-8")


def ids(found: list[Taken | str] | None) -> list[str] | None:
    return None if found is None else [one.id for one in found if isinstance(one, Taken)]


def waiting(connection: Redis) -> list[str]:
    return sorted(one["name"] for one in connection.client_list() if "b" in one["flags"])


def test_each_job_wakes_one_of_the_workers_that_wait(connection: Redis, make_ledger: Callable[[str], Ledger]):
    ledgers = {name: make_ledger(name) for name in ("a", "b", "c")}
    for name, ledger in ledgers.items():
        ledger.ask_for_jobs(64, 1 << 20, 60, wait=60)
        wait_until(lambda name=name: name in waiting(connection), f"{name} waits")

    put(connection, QUEUE, "first")
    assert ids(ledgers["a"].jobs()) == ["first"], "who waits longest has the first turn"
    assert waiting(connection) == ["b", "c"]

    put(connection, QUEUE, "second")
    assert ids(ledgers["b"].jobs()) == ["second"]
    assert waiting(connection) == ["c"]
    assert connection.exists(QUEUE, HANDED) == 0


def test_jobs_that_come_together_are_taken_in_order(connection: Redis, make_ledger: Callable[[str], Ledger]):
    first, second = make_ledger("a"), make_ledger("b")
    for name, ledger, limit in (("a", first, 3), ("b", second, 64)):
        ledger.ask_for_jobs(limit, 1 << 20, 60, wait=60)
        wait_until(lambda name=name: name in waiting(connection), f"{name} waits")

    with connection.pipeline() as pipe:
        for job_id in ("1", "2", "3", "4", "5"):
            put(pipe, QUEUE, job_id)
        pipe.execute()

    assert ids(first.jobs()) == ["1", "2", "3"], "one of them was handed to the other, who came second"
    assert ids(second.jobs()) == ["4", "5"]
    assert connection.exists(QUEUE, HANDED) == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 64])
def test_a_take_begins_with_what_was_handed_to_a_worker_that_was_cut_off(
    connection: Redis, make_ledger: Callable[[str], Ledger], limit: int
):
    put(connection, HANDED, "1", "2")
    put(connection, QUEUE, "3", "4")
    ledger = make_ledger("a")
    found: list[str] = []
    for _ in range(-(-4 // limit)):
        ledger.ask_for_jobs(limit, 1 << 20, 60)
        found += ids(ledger.jobs()) or []

    assert found == ["1", "2", "3", "4"]
    assert connection.exists(QUEUE, HANDED) == 0


def test_what_was_handed_over_counts_as_queued(connection: Redis):
    put(connection, HANDED, "1", "2")
    put(connection, QUEUE, "3")
    assert count_queued(connection, "held", "nosuch") == [3, 0]
    assert count_queued(connection) == []


def test_while_rq_is_suspended_it_goes_back_to_the_queue(connection: Redis, make_ledger: Callable[[str], Ledger]):
    put(connection, HANDED, "1", "2")
    put(connection, QUEUE, "3")
    ledger = make_ledger("a")
    suspend(connection)
    ledger.ask_for_jobs(64, 1 << 20, 60)
    assert ids(ledger.jobs()) is None
    assert connection.lrange(QUEUE, 0, -1) == [b"1", b"2", b"3"]
    resume(connection)
    ledger.ask_for_jobs(64, 1 << 20, 60)
    assert ids(ledger.jobs()) == ["1", "2", "3"]


def test_a_recovery_puts_it_back_behind_what_a_dead_worker_held(
    connection: Redis, make_ledger: Callable[[str], Ledger]
):
    put(connection, QUEUE, "1", "2", "3", "4")
    dead = make_ledger("dead")
    dead.ask_for_jobs(2, 1 << 20, 60)
    assert ids(dead.jobs()) == ["1", "2"]
    connection.lmove(QUEUE, HANDED, "LEFT", "RIGHT")

    assert make_ledger("a").recover([], 60, dead=True) == (2, [])
    assert connection.lrange(QUEUE, 0, -1) == [b"1", b"2", b"3", b"4"]
    assert connection.exists(HANDED) == 0


def test_what_was_handed_over_can_be_taken_back(connection: Redis):
    put(connection, HANDED, "1", "2", "3")
    put(connection, QUEUE, "4")
    keys = [QUEUE, HANDED] * 3
    assert connection.eval(take_back(), len(keys), *keys, RQ_KEY_PREFIX, 60, "2", "nosuch", "4") == [1, 0, 1]
    assert connection.hget("rq:job:2", "status") == b"canceled"
    assert (connection.lrange(HANDED, 0, -1), connection.lrange(QUEUE, 0, -1)) == ([b"1", b"3"], [])


@pytest.mark.parametrize("way", ["at once", "by a recovery", "after a suspension"])
def test_what_rq_has_cancelled_meanwhile_is_not_run(connection: Redis, make_ledger: Callable[[str], Ledger], way: str):
    put(connection, HANDED, "1", "2")
    # RQ takes it out of the queue, and does not find it there.
    ModelJob.fetch("1", connection=connection).cancel()
    ledger = make_ledger("a")
    if way == "by a recovery":
        ledger.recover([], 60, dead=True)
    elif way == "after a suspension":
        suspend(connection)
        ledger.ask_for_jobs(64, 1 << 20, 60)
        assert ids(ledger.jobs()) is None
        resume(connection)
    ledger.ask_for_jobs(64, 1 << 20, 60)
    found = ledger.jobs()
    assert ids(found) == ["2"]
    assert found[0] == "1", "it is said that it was dropped"
    assert connection.hget("rq:job:1", "status") == b"canceled"
    assert connection.exists(QUEUE, HANDED) == 0


def test_something_else_in_its_place_is_named(connection: Redis, make_ledger: Callable[[str], Ledger]):
    connection.set(HANDED, "nonsense")
    ledger = make_ledger("a")
    ledger.ask_for_jobs(64, 1 << 20, 60)
    with pytest.raises(ResponseError, match=f"{HANDED} is no list; delete it"):
        ledger.jobs()
