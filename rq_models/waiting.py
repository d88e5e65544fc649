"""Waiting for jobs to end: one connection reads for all who wait on one client.

It blocks in an XREAD of their result streams and of a wake-up stream of the client's own, to which whoever joins writes
when a read is going on without him. Of several waiting threads one reads, in its own thread, for all; when its own wait
is over, the next one takes over. A look at the statuses, once a second, finds what never writes a result.

Not every entry of a stream ends a wait. A failure counts only while the job's status agrees: after a requeue the entry
of the earlier run is still there. Entries that say "to be run again" never count.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from redis import BlockingConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry
from rq.connections import get_connection_kwargs
from rq.job import Job

from rq_models.errors import RqModelsError
from rq_models.health import FATAL, UNREACHABLE
from rq_models.line import Line, exchange
from rq_models.registry import PREFIX
from rq_models.results import RESULTS, RETRIED, SUCCESS, Ended, judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rq_models.client import ClientJob

WINDOW = 256
"""Jobs in one read or look; what a read costs the server grows with them."""
LOOK_EVERY = 1.0
"""Seconds between looks at the statuses, and so the longest that a read blocks."""
STALL = 5.0
"""Seconds over that before a silent connection counts as lost."""
WAKE_TTL = 60
LONGEST_SLEEP = 3600.0
"""Seconds; no timer takes an infinite number of them."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between attempts to reach a server that is away."""

HURRY = 2.0
"""Seconds that the server may take to answer when the caller's own time is over."""


class Wait:
    """One caller's wait for some jobs: a context manager, to be left by whoever entered it.

    Args:
        waiter: who reads.
        jobs: to wait for.
        timeout: seconds; None is for ever.
        queued: whether they are in Redis already; if not, say so by `Waiter.queued`.
        woken: the event that whoever waits clears and waits for, made when it is needed; any thread may set it.
        since: when the timeout has begun, by the monotonic clock; by default now.
    """

    def __init__(  # noqa: PLR0913 - who waits for what, until when
        self,
        waiter: Waiter,
        jobs: Iterable[ClientJob],
        timeout: float | None,
        *,
        queued: bool = True,
        woken: Any = None,
        since: float | None = None,
    ) -> None:
        self.timeout = timeout
        self.deadline = math.inf if timeout is None else (since or time.monotonic()) + timeout
        self.order = list(jobs)
        self.jobs = {job.id: job for job in self.order}
        self.pending = set(self.jobs)
        self.found = {job.id: job.ended for job in self.order if job.ended}
        self.error: Exception | None = None
        self.woken: Any = woken
        self._outcomes: dict[str, Any] = {}
        self._waiter = waiter
        waiter.join(self, queued=queued)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiter.leave(self, self.pending)

    def wake(self) -> None:
        """Have whoever waits look again."""
        if self.woken is not None:
            self.woken.set()

    def settle(self, jobs: Iterable[ClientJob], *, return_exceptions: bool) -> None:
        """Take the outcomes of jobs that have ended; raise the first error unless they are to be returned."""
        for job in jobs:
            try:
                self._outcomes[job.id] = job.outcome()
            except RqModelsError as error:
                if not return_exceptions:
                    raise
                self._outcomes[job.id] = error

    def outcomes(self, late: TimeoutError | None = None) -> list[Any]:
        """Return the outcomes in the order of the jobs, and `late` for those that have not ended."""
        return [self._outcomes.get(job.id, late) for job in self.order]


@dataclass
class _Watch:
    """One job that is waited for."""

    since: str | bytes | None
    queued: bool
    waits: list[Wait] = field(default_factory=list)


class Waiter:
    """All that one client waits for, and the connection that reads for it. Safe to share between threads."""

    def __init__(self, connection: Redis) -> None:
        self.watches: dict[str, _Watch] = {}
        self.reading = False
        self.pause = FIRST_PAUSE
        self.silent_until = 0.0
        """Until when nobody whose time is over need ask again: another has just got no answer."""
        # Re-entrant: an abandoned as_completed() may be cleared away by the garbage collector, at any moment.
        self._lock = threading.RLock()
        self._calling = threading.Lock()
        self._closed = False
        kwargs = get_connection_kwargs(connection)
        # Blocking reads outlive the pool's timeout; and they are repeated here, as long as anybody waits.
        kwargs.update(socket_timeout=LOOK_EVERY + STALL, max_connections=2, retry=Retry(NoBackoff(), 0))
        kwargs.update(retry_on_error=[], retry_on_timeout=False, protocol=2)
        self._reader = Redis.from_pool(ConnectionPool(connection.connection_pool.connection_class, **kwargs))
        self._line = Line(self._reader)
        kwargs.update(socket_timeout=HURRY, socket_connect_timeout=HURRY, max_connections=8, timeout=HURRY)
        self.hasty = Redis.from_pool(
            BlockingConnectionPool(connection_class=connection.connection_pool.connection_class, **kwargs)
        )
        """For what is asked when the time is over already."""
        self._leader: object = None
        self._followers: dict[Wait, None] = {}
        self.unheard = False
        """Whether somebody has joined since the present read began, and it has not been ended for him."""
        self._wake_key = f"{PREFIX}wake:{uuid.uuid4().hex}"
        self._woken: str | bytes = "0-0"
        self._urgent: dict[str, None] = {}
        """Jobs of which a look must come before a read."""
        self._next_look = 0.0

    def join(self, wait: Wait, *, queued: bool) -> None:
        """Write down what the wait is for."""
        with self._lock:
            if not self.watches:
                self._next_look = time.monotonic() + LOOK_EVERY
            for job_id, job in wait.jobs.items():
                if job_id in wait.found:
                    continue
                watch = self.watches.setdefault(job_id, _Watch(job.since, queued))
                watch.waits.append(wait)
                if watch.since is None:
                    self._urgent[job_id] = None
            self.unheard = self.reading

    def queued(self, wait: Wait) -> None:
        """Write down that the wait's jobs are in Redis now."""
        with self._lock:
            for job_id in wait.pending & self.watches.keys():
                self.watches[job_id].queued = True

    def leave(self, wait: Wait, job_ids: Iterable[str]) -> None:
        """Strike out that the wait is for these jobs."""
        with self._lock:
            for job_id in job_ids:
                watch = self.watches.get(job_id)
                if watch is not None and wait in watch.waits:
                    watch.waits.remove(wait)
                    if not watch.waits:
                        self._forget(job_id)

    def close(self) -> None:
        """Let go of the connection; whoever still waits gets a RuntimeError."""
        with self._lock:
            self._closed = True
            self.unheard = self.reading
            if self._leader is None:
                self._hang_up()
        self.call()

    def enqueue(self, wait: Wait, command: list[Any]) -> bool:
        """If nobody reads, send what enqueues the wait's jobs together with a read of theirs, and return whether.

        Raises:
            RedisError: the server refuses it.
        """
        with self._lock:
            if self._leader is not None or self._urgent or self._closed:
                return False
            self._leader = wait
        try:
            self._turn(wait.deadline - time.monotonic(), wait, command)
        except UNREACHABLE:
            # Whether they are queued nobody knows; to enqueue them again does no harm.
            return False
        else:
            return True
        finally:
            self._step_down(wait)

    def next(self, wait: Wait) -> list[ClientJob]:
        """Block until some of the wait's jobs have ended, and return them; or none, if its time is over."""
        try:
            while True:
                with self._lock:
                    if wait.woken is not None:
                        wait.woken.clear()
                    if ended := self.take(wait):
                        return ended
                    leads = self._leader in (None, wait)
                    if leads:
                        self._leader = wait
                        self._followers.pop(wait, None)
                    else:
                        wait.woken = wait.woken or threading.Event()
                        self._followers[wait] = None
                left = wait.deadline - time.monotonic()
                if left <= 0:
                    return []
                if leads:
                    self._turn(left)
                else:
                    self.call()
                    wait.woken.wait(min(left, LONGEST_SLEEP))
        finally:
            self._step_down(wait)

    def take(self, wait: Wait) -> list[ClientJob]:
        """Return the wait's jobs that have ended since it was last asked; it waits for them no more.

        Raises:
            RuntimeError: the client was closed.
            RedisError: the server is not to be read from.
        """
        with self._lock:
            found, wait.found = wait.found, {}
            self.leave(wait, found)
            if not found and wait.error is not None:
                raise wait.error
            if not found and self._closed:
                raise RuntimeError("the client was closed while this job was waited for")
            wait.pending -= found.keys()
        for job_id, ended in found.items():
            job = wait.jobs[job_id]
            job.ended = ended
            job.model_version = ended.entry.get(b"model_version", b"").decode() or None
            # It may be run again: then what is there already does not count.
            job.since = None
        return [wait.jobs[job_id] for job_id in found]

    def claim(self) -> bool:
        """Say whether nobody reads; whoever asked must then call `read_for_all`."""
        with self._lock:
            free = self._leader is None
            if free:
                self._leader = self
            return free

    def read_for_all(self) -> None:
        """Read as long as anybody waits: for an event loop, whose tasks can't do it themselves."""
        error: Exception | None = None
        while True:
            with self._lock:
                if error or self._closed or not self.watches:
                    for wait in [wait for watch in self.watches.values() for wait in watch.waits]:
                        wait.error = error
                        wait.wake()
                    self._step_down(self)
                    return
            try:
                self._turn(LOOK_EVERY)
            except Exception as raised:  # noqa: BLE001 - whatever it is, it is raised in those who wait
                error = raised

    def knock(self) -> Sequence[tuple[Any, ...]]:
        """Return the commands that end a read which goes on without somebody, if there is one."""
        with self._lock:
            if not self.unheard:
                return ()
            # Whoever joins from now on is heard by the next read.
            self.unheard = self.reading = False
        return ("XADD", self._wake_key, "MAXLEN", 1, "*", "joined", 1), ("EXPIRE", self._wake_key, WAKE_TTL)

    def call(self) -> None:
        """End such a read at once; if that fails, it ends within a second by itself."""
        # One thread at a time, and so one connection, however many join at once; and whoever closes it comes last.
        with suppress(redis_errors.RedisError), self._calling:
            if knock := self.knock():
                exchange(self.hasty, *knock)

    def _step_down(self, leader: object) -> None:
        with self._lock:
            self._followers.pop(leader, None)  # type: ignore[call-overload]
            if self._leader is leader:
                self._leader = None
            if self._leader is None:
                for follower in itertools.islice(self._followers, 1):
                    follower.woken.set()
                if self._closed:
                    self._hang_up()

    def _hang_up(self) -> None:
        self._line.close()
        self._reader.close()
        self.hasty.close()

    def _turn(self, limit: float, wait: Wait | None = None, command: Sequence[Any] = ()) -> None:
        """Look or read once, and deliver what was found; a server that is away costs a pause.

        A command, which enqueues a wait's jobs, goes ahead of the read in the same round trip; its error is raised.
        """
        try:
            with self._lock:
                job_ids = [] if command else self._due()
                self.reading, self.unheard = not job_ids, False
                streams: dict[Any, Any] = {self._wake_key: self._woken}
                for job_id, watch in itertools.islice(self.watches.items(), WINDOW):
                    if watch.since is not None:
                        streams[RESULTS + job_id] = watch.since
                seconds = min(self._next_look - time.monotonic(), LOOK_EVERY, limit)
            if job_ids:
                seen = look(self._reader if limit > LOOK_EVERY + STALL else self.hasty, job_ids)
                with self._lock:
                    self._looked(seen)
            else:
                self._read(streams, limit, seconds, wait, command)
            self.pause, self.silent_until = FIRST_PAUSE, 0.0
        except UNREACHABLE as error:
            if command or isinstance(error, FATAL):
                raise
            time.sleep(min(self.pause, limit))
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        finally:
            self.reading = False

    def _answer(self, patience: float | None) -> Any:
        if patience is not None and not self._line.answers(patience):
            self._line.close()
            raise redis_errors.TimeoutError("no answer")
        return self._line.answer()

    def _read(
        self, streams: dict[Any, Any], limit: float, seconds: float, wait: Wait | None, command: Sequence[Any]
    ) -> None:
        # In whole milliseconds, of which 0 would be for ever.
        read = ("XREAD", "BLOCK", max(1, int(1000 * seconds)), "STREAMS", *streams, *streams.values())
        self._line.ask(*([tuple(command), read] if command else [read]))
        # A silent connection must not hold up a caller whose time is over: he has his last look. Who has more time than
        # the connection takes to notice by itself is spared the four system calls of asking whether there is an answer.
        patience = max(seconds, 0) + HURRY if limit <= LOOK_EVERY + STALL else None
        if wait is not None:
            try:
                self._answer(patience)
            except BaseException:
                # The read goes on, for nobody.
                self._line.close()
                raise
            self.queued(wait)
        reply = self._answer(patience)
        with self._lock:
            self._found(reply)

    def _due(self) -> list[str]:
        """Return the jobs to look at now, if any."""
        if self._urgent:
            return list(itertools.islice(self._urgent, WINDOW))
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + LOOK_EVERY
        return [job_id for job_id in itertools.islice(self.watches, WINDOW) if self.watches[job_id].queued]

    def _looked(self, seen: list[tuple[str, Any, Any]]) -> None:
        for job_id, status, entries in seen:
            self._urgent.pop(job_id, None)
            watch = self.watches.get(job_id)
            if watch is None:
                continue
            ended, latest = judge(status, entries)
            if ended is not None:
                self._end(job_id, ended)
                continue
            watch.since = latest if watch.since is None else watch.since
            if len(self.watches) > WINDOW:
                # To the back, so that what does not end leaves the window to what may have ended long ago.
                self.watches[job_id] = self.watches.pop(job_id)

    def _found(self, reply: Any) -> None:
        for key, entries in reply or ():
            name, latest = key.decode(), entries[-1][0]
            if name == self._wake_key:
                self._woken = latest
                continue
            job_id = name.removeprefix(RESULTS)
            watch = self.watches.get(job_id)
            if watch is None:
                continue
            watch.since = latest
            final = [entry for entry in map(_fields, entries) if entry.get(b"type") != RETRIED]
            if final and final[-1].get(b"type") == SUCCESS:
                self._end(job_id, Ended("result", final[-1]))
            elif final:
                self._urgent[job_id] = None

    def _end(self, job_id: str, ended: Ended) -> None:
        for wait in self._forget(job_id).waits:
            wait.found[job_id] = ended
            wait.wake()

    def _forget(self, job_id: str) -> _Watch:
        self._urgent.pop(job_id, None)
        return self.watches.pop(job_id)


def _fields(entry: Any) -> dict[bytes, bytes]:
    _, flat = entry
    return dict(zip(flat[::2], flat[1::2], strict=True))


def look(connection: Redis, job_ids: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Return for each job its id, its status and its latest entry, both of one moment; see `judge`."""
    ids = list(job_ids)
    with connection.pipeline() as pipe:
        for job_id in ids:
            pipe.hget(Job.key_for(job_id), "status")
            pipe.xrevrange(RESULTS + job_id, count=1)
        replies = pipe.execute()
    return list(zip(ids, replies[::2], replies[1::2], strict=True))
