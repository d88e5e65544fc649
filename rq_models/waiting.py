"""Waiting for jobs to end: what a client asks Redis and how it shares the answers out, and the blocking side of it.

A client waits on the results themselves. All its waits are written in one `Book`, and one connection reads for all of
them: it blocks in an XREAD of their result streams and of a wake-up stream of the client's own, to which whoever joins
writes when a read is going on without him. Of several waiting threads one reads, in its own thread, for all; when its
own wait is over, the next one takes over. A look at the statuses, once a second, finds what never writes a result.

Not every entry of a stream ends a wait. A failure counts only while the job's status agrees: after a requeue the entry
of the earlier run is still there. Entries that say "to be run again" never count.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from redis import Redis
from redis import exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry
from rq.connections import get_connection_kwargs
from rq.job import Job

from rq_models.registry import PREFIX
from rq_models.results import BEGINNING, RESULTS, RETRIED, SUCCESS, Ended, judge

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

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

UNREACHABLE = (redis_errors.ConnectionError, redis_errors.TimeoutError)
FATAL = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
"""Among the unreachable, by redis-py's classes, yet no attempt will mend it."""


class Waitable(Protocol):
    """A job as a wait sees it."""

    id: Any
    since: str | None
    """Id of the entry after which its result comes, or None if only Redis knows."""


@dataclass
class _Watch:
    """One job that is waited for."""

    since: str | bytes | None
    waits: list[Wait] = field(default_factory=list)
    queued: bool = True
    """False until its enqueueing is done: that it is not in Redis yet says nothing."""


class Book:
    """All that one client waits for. Decides what to ask, and reads the answers; never asks by itself."""

    def __init__(self) -> None:
        self.watches: dict[str, _Watch] = {}
        self.reads = 0
        self.reading = False
        self.knocked = False
        """Whether somebody has ended the present read."""
        self.wake_key = f"{PREFIX}wake:{uuid.uuid4().hex}"
        self._woken: str | bytes = BEGINNING
        self._urgent: dict[str, None] = {}
        """Jobs of which a look must come before a read."""
        self._next_look = 0.0
        self._refused = False

    def join(self, job: Waitable, wait: Wait, *, queued: bool) -> None:
        """Write down that `wait` waits for this job."""
        if not self.watches:
            self._next_look = time.monotonic() + LOOK_EVERY
        watch = self.watches.setdefault(job.id, _Watch(job.since, queued=queued))
        watch.waits.append(wait)
        if queued:
            self.queued(job.id)

    def queued(self, job_id: str) -> bool:
        """Write down that the job is in Redis, and say whether no read has known it so far."""
        watch = self.watches.get(job_id)
        if watch is None:
            return False
        watch.queued = True
        if watch.since is None:
            self._urgent[job_id] = None
        return watch.since is None

    def leave(self, job_id: str, wait: Wait) -> None:
        """Strike out what `join` wrote."""
        watch = self.watches.get(job_id)
        if watch is not None and wait in watch.waits:
            watch.waits.remove(wait)
            if not watch.waits:
                self._forget(job_id)

    def due(self) -> list[str]:
        """Return the jobs to look at now, if any."""
        if self._urgent:
            return list(itertools.islice(self._urgent, WINDOW))
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + LOOK_EVERY
        return self._lookable()

    @staticmethod
    def ask(pipe: Any, job_ids: Iterable[str]) -> None:
        """Put a look into a MULTI: status and latest entry of one job must be of one moment."""
        for job_id in job_ids:
            pipe.hget(Job.key_for(job_id), "status")
            pipe.xrevrange(RESULTS + job_id, count=1)

    def looked(self, job_ids: list[str], replies: list[Any]) -> None:
        """Take the replies to `ask`."""
        for job_id, status, entries in zip(job_ids, replies[::2], replies[1::2], strict=True):
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

    def streams(self) -> dict[Any, Any]:
        """Begin a read, and return what to XREAD."""
        self.reads += 1
        self.reading, self.knocked = True, False
        known = ((RESULTS + job_id, self.watches[job_id].since) for job_id in self._window())
        return {self.wake_key: self._woken, **{key: since for key, since in known if since is not None}}

    def block(self, limit: float) -> int:
        """Return for how many milliseconds to XREAD, at most `limit` seconds; 0 would be for ever."""
        seconds = self._next_look - time.monotonic()
        return max(1, int(1000 * min(seconds, LOOK_EVERY, limit)))

    def read(self, reply: Any) -> None:
        """Take the reply to an XREAD."""
        self._refused = False
        # A list or a dict, as the protocol's version and redis-py's have it.
        for key, entries in reply.items() if isinstance(reply, dict) else reply or ():
            found = entries[0] if entries and isinstance(entries[0], list) else entries
            name = key.decode()
            if name == self.wake_key:
                self._woken = found[-1][0]
                continue
            job_id = name.removeprefix(RESULTS)
            watch = self.watches.get(job_id)
            if watch is None:
                continue
            watch.since = found[-1][0]
            final = [entry for _, entry in found if entry.get(b"type") != RETRIED]
            if final and final[-1].get(b"type") == SUCCESS:
                self._end(job_id, Ended("result", final[-1]))
            elif final:
                self._urgent[job_id] = None

    def refused(self) -> bool:
        """Say whether to go on after an XREAD that the server refused: one of the keys may be no stream."""
        if self._refused:
            return False
        self._refused = True
        self._urgent.update(dict.fromkeys(self._lookable()))
        return True

    def _window(self) -> list[str]:
        return list(itertools.islice(self.watches, WINDOW))

    def _lookable(self) -> list[str]:
        return [job_id for job_id in self._window() if self.watches[job_id].queued]

    def _forget(self, job_id: str) -> _Watch:
        self._urgent.pop(job_id, None)
        return self.watches.pop(job_id)

    def _end(self, job_id: str, ended: Ended) -> None:
        for wait in self._forget(job_id).waits:
            wait.deliver(job_id, ended)


class Wait:
    """One caller's wait for some jobs: a context manager, to be left by whoever entered it."""

    def __init__(
        self, book: Book, lock: AbstractContextManager[Any], jobs: Iterable[Waitable], *, queued: bool
    ) -> None:
        self._book, self._lock = book, lock
        self._done: deque[tuple[str, Ended]] = deque()
        by_id = {job.id: job for job in jobs}
        self.pending = set(by_id)
        with lock:
            self._joined = book.reads
            for job in by_id.values():
                book.join(job, self, queued=queued)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for job_id in self.pending:
                self._book.leave(job_id, self)

    def queued(self) -> None:
        """Say that the jobs are in Redis now."""
        with self._lock:
            if any([self._book.queued(job_id) for job_id in self.pending]):  # noqa: C419 - each must be called
                self._joined = self._book.reads

    def drop(self, job_id: str) -> None:
        """Stop waiting for one of the jobs."""
        with self._lock:
            self.pending.discard(job_id)
            self._book.leave(job_id, self)

    def deliver(self, job_id: str, ended: Ended) -> None:
        """Take what the book has found out; called with the lock held."""
        self._done.append((job_id, ended))
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits here; called with the lock held."""

    def pop(self) -> tuple[str, Ended] | None:
        """Return a job that has ended, if any has; called with the lock held."""
        while self._done:
            job_id, ended = self._done.popleft()
            if job_id in self.pending:
                self.pending.remove(job_id)
                return job_id, ended
        return None

    @property
    def unheard(self) -> bool:
        """Whether a read goes on that began without these jobs."""
        return self._book.reading and not self._book.knocked and self._book.reads == self._joined

    def knock(self, pipe: Any) -> None:
        """Put into a pipeline what ends such a read."""
        with self._lock:
            if not self.unheard:
                return
            self._book.knocked = True
        pipe.xadd(self._book.wake_key, {"joined": 1}, maxlen=1)
        pipe.expire(self._book.wake_key, WAKE_TTL)


def reading_arguments(connection: Any) -> dict[str, Any]:
    """Return what to make the reading connection of: the pool's own settings, but blocking reads outlive its timeout.

    It never repeats a command by itself: whoever reads does, as long as anybody waits.
    """
    kwargs = get_connection_kwargs(connection)
    kwargs.update(socket_timeout=LOOK_EVERY + STALL, max_connections=1, retry_on_error=[], retry_on_timeout=False)
    return {**kwargs, "connection_class": connection.connection_pool.connection_class}


class Waiter:
    """The blocking side: waits of many threads on one connection."""

    def __init__(self, connection: Redis) -> None:
        self.book = Book()
        # Re-entrant: an abandoned as_completed() may be cleared away by the garbage collector, at any moment.
        self.lock = threading.RLock()
        self.closed = False
        self._connection = connection
        retry = Retry(NoBackoff(), 0)
        self._reader = Redis.from_pool(ConnectionPool(**{**reading_arguments(connection), "retry": retry}))
        self._leader: ThreadWait | None = None
        self._followers: dict[ThreadWait, None] = {}
        self._pause = FIRST_PAUSE

    def watch(self, jobs: Iterable[Waitable], *, queued: bool = True) -> ThreadWait:
        """Return a wait for these jobs."""
        return ThreadWait(self, jobs, queued=queued)

    def close(self) -> None:
        """Let go of the connection; whoever still waits gets a RuntimeError within a second."""
        self.closed = True
        with self.lock:
            if self._leader is None:
                self._reader.close()

    def next(self, wait: ThreadWait, deadline: float) -> tuple[str, Ended] | None:
        """Return one of the wait's jobs that has ended, or None when the deadline (monotonic) has passed."""
        try:
            while True:
                with self.lock:
                    wait.woken.clear()
                    done = wait.pop()
                    if done is not None:
                        return done
                    if self.closed:
                        raise RuntimeError("the client was closed while this job was waited for")
                    leads = self._leader in (None, wait)
                    if leads:
                        self._leader = wait
                    self._followers.pop(wait, None)
                    if not leads:
                        self._followers[wait] = None
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                if leads:
                    self._turn(left)
                else:
                    self._announce(wait)
                    wait.woken.wait(min(left, LONGEST_SLEEP))
        finally:
            self._step_down(wait)

    def _step_down(self, wait: ThreadWait) -> None:
        with self.lock:
            self._followers.pop(wait, None)
            if self._leader is wait:
                self._leader = None
            if self._leader is None:
                for follower in itertools.islice(self._followers, 1):
                    follower.notify()
                if self.closed:
                    self._reader.close()

    def _announce(self, wait: ThreadWait) -> None:
        if wait.unheard:
            # If it fails: the read ends within a second by itself.
            with suppress(redis_errors.RedisError), self._connection.pipeline(transaction=False) as pipe:
                wait.knock(pipe)
                pipe.execute()

    def _turn(self, limit: float) -> None:
        """Look or read once, and deliver what was found; a server that is away costs a pause."""
        try:
            with self.lock:
                job_ids = self.book.due()
                streams = {} if job_ids else self.book.streams()
                block = self.book.block(limit)
            if job_ids:
                with self._reader.pipeline() as pipe:
                    self.book.ask(pipe, job_ids)
                    replies = pipe.execute(raise_on_error=False)
                with self.lock:
                    self.book.looked(job_ids, replies)
            else:
                reply = self._reader.xread(streams, block=block)
                with self.lock:
                    self.book.read(reply)
            self._pause = FIRST_PAUSE
        except FATAL:
            raise
        except UNREACHABLE:
            time.sleep(min(self._pause, limit))
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        except redis_errors.ResponseError:
            with self.lock:
                if not self.book.refused():
                    raise
        finally:
            self.book.reading = False


class ThreadWait(Wait):
    """A thread's wait."""

    def __init__(self, waiter: Waiter, jobs: Iterable[Waitable], *, queued: bool) -> None:
        self.woken = threading.Event()
        self._waiter = waiter
        super().__init__(waiter.book, waiter.lock, jobs, queued=queued)

    def notify(self) -> None:
        """Wake the thread."""
        self.woken.set()

    def next(self, deadline: float) -> tuple[str, Ended] | None:
        """See `Waiter.next`."""
        return self._waiter.next(self, deadline)
