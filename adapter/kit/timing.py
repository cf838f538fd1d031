"""Clock, backoff, timeouts, and what tasks wait for. A test replaces the clock. Imports nothing of ours."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, TypeVar

import structlog

T = TypeVar("T")

DELAYED_TIMER_S = 0.1
"""A timer that is later than this was held up: by a stop of the process, or by much work."""
DELAYED_GRACE_S = 1.0
"""Longest time that reading what is in the sockets then takes, even of thousands."""
READ_GRACE_S = 0.1
"""The same where it was called in time: the process may have been stopped until just now all the same."""
LEASE_RETRY_S = 0.2
"""Pause before work that was interrupted by a lost lease is tried again."""

log = structlog.get_logger()


class Clock(Protocol):
    """Time and chance, so that a test owns both."""

    def now_ms(self) -> int:
        """Wall clock, Unix milliseconds: for time stamps and the user's window, never for leases."""

    def monotonic(self) -> float:
        """Seconds that only go forward, also while the process is stopped."""

    async def sleep(self, seconds: float) -> None: ...

    def jitter(self, seconds: float) -> float:
        """A random part of `seconds`, so that many do not act at once."""


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    monotonic = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def jitter(self, seconds: float) -> float:
        return random.random() * seconds


def backoff(failures: int, *, first_s: float = 1.0, longest_s: float = 60.0) -> float:
    """Seconds to wait after so many failures in a row: doubling from `first_s` up to `longest_s`."""
    return min(longest_s, first_s * 2.0 ** min(max(failures, 1) - 1, 30))


async def run_with_restarts(
    run: Callable[[], Coroutine[Any, Any, None]], name: str, clock: Clock, *, restarts: int, steady_s: float
) -> Exception:
    """Runs an endless loop, again when it crashes; the last crash after more than `restarts` in a row.

    A run of `steady_s` seconds or more begins a new count.
    """
    crashes = 0
    while True:
        began = clock.monotonic()
        try:
            await run()
            raise RuntimeError(f"{name} ended")
        except Exception as exc:
            crashes = 1 if clock.monotonic() - began >= steady_s else crashes + 1
            log.exception("loop.crashed", loop=name, crashes=crashes)
            if crashes > restarts:
                return exc
        await clock.sleep(backoff(crashes))


def is_cancelled() -> bool:
    """Whether this task was cancelled, even if what it awaited swallowed the CancelledError, as nats-py does while it
    connects and flushes."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled() -> None:
    """Raises CancelledError if this task was cancelled; see `is_cancelled`."""
    if is_cancelled():
        raise asyncio.CancelledError


async def shield_with_grace(work: Coroutine[Any, Any, T], grace_s: float) -> T:
    """Awaits `work`. Cancelled meanwhile, or before (in a `finally`), gives it `grace_s` more seconds, then re-raises
    the cancellation."""
    loop = asyncio.get_running_loop()
    task, done = loop.create_task(work), loop.create_future()
    # asyncio.shield costs as much again as the task: what is in hand is finished with every message
    task.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    try:
        if is_cancelled():  # nobody cancels a task again that is ending
            raise asyncio.CancelledError
        await done
    except asyncio.CancelledError:
        if not task.done():
            _, unfinished = await asyncio.wait([task], timeout=grace_s)
            for straggler in unfinished:
                straggler.cancel()
        if task.done() and not task.cancelled():
            task.exception()  # seen here: the cancellation is what the caller learns
        raise
    return task.result()


async def complete_with_grace(work: Coroutine[Any, Any, T], grace_s: float) -> T:
    """Awaits `work`. Cancelled meanwhile, gives it `grace_s` more seconds: what it returns by then counts for more
    than the cancellation, which the caller finds by `is_cancelled`."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait([task], timeout=grace_s)
            if task.done():
                return task.result()
            raise
        finally:
            task.cancel()


class Deadline:
    """Calls `over` a moment after `seconds` have passed. A process that was stopped finds its time over and the
    answer in the socket at once, and uvloop looks at the time first: the answer would be dropped."""

    __slots__ = ("_due", "_loop", "_on_expired", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, over: Callable[[], None]) -> None:
        self._loop = loop
        self._on_expired = over
        self._due = loop.time() + seconds
        self._timer = loop.call_at(self._due, self._on_due)

    def cancel(self) -> None:
        """It is not called any more."""
        self._timer.cancel()

    def _on_due(self) -> None:
        is_late = self._loop.time() - self._due > DELAYED_TIMER_S
        self._timer = self._loop.call_later(DELAYED_GRACE_S if is_late else READ_GRACE_S, self._on_expired)


class TolerantTimeout:
    """asyncio.timeout that lets an answer be read that has arrived, see Deadline. For one `async with`."""

    __slots__ = ("_deadline", "_limit", "_loop", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._deadline = Deadline(self._loop, self._seconds, self._expire_now)

    def _expire_now(self) -> None:
        self._limit.reschedule(self._loop.time())

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline.cancel()
        await self._limit.__aexit__(kind, exc, trace)


async def wait_event(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Waits until `event` is set or `timeout_s` seconds have passed; tells whether it is set."""
    if event.is_set():
        return True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


async def wait_any(*waits: Coroutine[Any, Any, object], timeout_s: float) -> None:
    """Waits until one of them has ended or `timeout_s` seconds have passed; then all are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class WakeupBatcher:
    """Batches waiters into common wake-ups: thousands of small steps cost less in a row than one by one, where each
    wakes the process with cold caches."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._waiters: list[asyncio.Future[None]] = []

    async def wait_for_batch(self) -> None:
        """Waits for the next wake-up, a period away at most."""
        loop = asyncio.get_running_loop()
        if not self._waiters:
            loop.call_later(self._period_s, self._wake_batch)
        waiter = loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake_batch(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class RateLimiter:
    """A rate limit without bursts: at most `per_s` a second, evenly spread."""

    def __init__(self, per_s: float) -> None:
        self._step_s = 1 / per_s
        self._free_at = 0.0

    def reserve_delay_s(self) -> float:
        """How long the next one is to wait; 0 where few have come lately."""
        now = asyncio.get_running_loop().time()
        at = max(now, self._free_at)
        self._free_at = at + self._step_s
        return at - now


class PerTickLimiter:
    """Lets at most `per_round` tasks go on in each iteration of the event loop, first come, first served: what
    thousands do in one iteration holds up all others, and with them the lease."""

    def __init__(self, per_round: int) -> None:
        self._per_tick = per_round
        self._remaining = per_round
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def wait_turn(self) -> None:
        """Waits for the caller's turn, which is now where few have come in this round."""
        if self._waiters or not self._remaining:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
            return
        if self._remaining == self._per_tick:
            asyncio.get_running_loop().call_soon(self._begin_tick)
        self._remaining -= 1

    def _begin_tick(self) -> None:
        """The next iteration of the loop."""
        self._remaining = self._per_tick
        while self._remaining and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._remaining -= 1
        if self._remaining < self._per_tick:
            asyncio.get_running_loop().call_soon(self._begin_tick)


class ChangeSignal:
    """A condition variable; one event loop needs no lock for it. `notify_all` wakes all that wait in `wait_until`."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify_all(self) -> None:
        """Wakes everybody who waits now."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_until(
        self, holds: Callable[[], bool], timeout_s: float | None = None, *, also: ChangeSignal | None = None
    ) -> bool:
        """Waits until `holds()` is true at a change, here or at `also`; False after `timeout_s` seconds."""
        if holds():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    waiter = asyncio.get_running_loop().create_future()
                    conditions = (self,) if also is None else (self, also)
                    for condition in conditions:
                        condition._waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        for condition in conditions:
                            condition._waiters.discard(waiter)
        except TimeoutError:
            return holds()
        return True
