"""Commands that travel together: one error spoils neither the answers behind it nor whoever has the connection next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis, ResponseError
from redis.exceptions import ConnectionError as Lost

from rq_models.line import exchange


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, max_connections=1) as client:
        yield client


def test_all_answers_come_in_order(client: Redis):
    assert exchange(client, ["SET", "a", 1], ("GET", "a"), ["GET", "b"]) == [b"OK", b"1", None]


def test_the_first_error_is_raised_and_the_connection_serves_on(client: Redis):
    number = exchange(client, ["CLIENT", "ID"])
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        exchange(client, ["SET", "a", 1], ["LLEN", "a"], ["NOSUCH"], ["SET", "a", 2])
    assert exchange(client, ["GET", "a"], ["CLIENT", "ID"]) == [b"2", *number]


def test_answers_that_nobody_has_read_are_nobodys(client: Redis, monkeypatch: pytest.MonkeyPatch):
    (number,) = exchange(client, ["CLIENT", "ID"])
    connection = client.connection_pool.get_connection()
    client.connection_pool.release(connection)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exchange(client, ["SET", "a", 1], ["GET", "a"])
    value, new = exchange(client, ["GET", "a"], ["CLIENT", "ID"])
    assert value == b"1"
    assert new != number


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_server_that_is_away_is_an_error_of_redis_and_costs_no_connection(client: Redis, connection: Redis):
    (number,) = exchange(client, ["CLIENT", "ID"])
    held = client.connection_pool.get_connection()
    client.connection_pool.release(held)
    connection.client_kill_filter(_id=number)
    held.can_read = lambda **_: False  # else the pool would notice
    with pytest.raises(Lost):
        exchange(client, ["PING"])
    del held.can_read
    assert exchange(client, ["PING"]) == [b"PONG"]
