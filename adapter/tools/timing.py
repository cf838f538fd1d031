"""Clock, backoff, timeouts and signals. Tests replace the clock. Imports no other module of the adapter."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_WITH_SUSPENSION = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""time.monotonic stands still while a machine is suspended, and a lease must not. Linux alone has the other clock."""


class Clock(Protocol):
    """Time and randomness, which tests control."""

    def now_ms(self) -> int:
        """Wall clock in Unix milliseconds: for time stamps and windows, never for leases."""

    def monotonic(self) -> float:
        """Monotonic seconds, which also advance while the process is stopped or the machine is suspended."""

    async def sleep(self, seconds: float) -> None: ...

    def jitter(self, seconds: float) -> float:
        """A random part of `seconds`, so that many callers do not act together."""


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    monotonic = staticmethod(partial(time.clock_gettime, _WITH_SUSPENSION))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def jitter(self, seconds: float) -> float:
        return random.random() * seconds


def backoff(failures: int, *, first_s: float = 1.0, longest_s: float = 60.0) -> float:
    """Pause after `failures` in a row: it doubles from `first_s` up to `longest_s`."""
    return min(longest_s, first_s * 2.0 ** min(max(failures, 1) - 1, 30))


def is_cancelled() -> bool:
    """Whether this task was cancelled, even if an awaited call swallowed the CancelledError, as nats-py does while it
    connects and flushes."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled() -> None:
    """Raises CancelledError if this task was cancelled, see `is_cancelled`."""
    if is_cancelled():
        raise asyncio.CancelledError


async def shield_with_grace(work: Coroutine[Any, Any, T], grace_s: float) -> T:
    """Awaits `work`. After a cancellation, even an earlier one (in a `finally`), gives it `grace_s` more seconds, and
    re-raises the cancellation."""
    loop = asyncio.get_running_loop()
    task, done = loop.create_task(work), loop.create_future()
    # not asyncio.shield, which doubles the cost, and this runs for every message
    task.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    try:
        if is_cancelled():  # the ending task is not cancelled again
            raise asyncio.CancelledError
        await done
    except asyncio.CancelledError:
        if not task.done():
            _, unfinished = await asyncio.wait([task], timeout=grace_s)
            for straggler in unfinished:
                straggler.cancel()
        if task.done() and not task.cancelled():
            task.exception()  # marks it as seen: the caller gets the cancellation
        raise
    return task.result()


async def wait_event(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Waits until `event` is set or `timeout_s` seconds have passed. Returns whether it is set."""
    if event.is_set():
        return True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


async def wait_any(*waits: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Waits until one of them has ended or `timeout_s` seconds have passed, then cancels all."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class WakeupBatcher:
    """Groups waiters into common wake-ups. Thousands of small steps in a row cost less than one by one, where each
    finds cold caches."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._waiters: list[asyncio.Future[None]] = []

    async def wait_for_batch(self) -> None:
        """Waits for the next wake-up, at most a period."""
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
        """Delay of the next one; 0 if the rate is below the limit."""
        now = asyncio.get_running_loop().time()
        at = max(now, self._free_at)
        self._free_at = at + self._step_s
        return at - now


class PerTickLimiter:
    """Lets at most `per_tick` tasks continue in each turn of the event loop, first come, first served. Thousands in
    one turn would delay all others, and the lease."""

    def __init__(self, per_tick: int) -> None:
        self._per_tick = per_tick
        self._remaining = per_tick
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def wait_tick(self) -> None:
        """Waits for the caller's tick, which is this one while the limit is not reached."""
        if self._waiters or not self._remaining:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
            return
        if self._remaining == self._per_tick:
            asyncio.get_running_loop().call_soon(self._begin_tick)
        self._remaining -= 1

    def _begin_tick(self) -> None:
        """Starts the next turn of the event loop."""
        self._remaining = self._per_tick
        while self._remaining and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._remaining -= 1
        if self._remaining < self._per_tick:
            asyncio.get_running_loop().call_soon(self._begin_tick)


class ChangeSignal:
    """A condition variable for one event loop, without a lock. `notify_all` wakes all callers of `wait_until`."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}
        """In the order of their calls; an empty set would be three times as large."""

    def notify_all(self) -> None:
        """Wakes all current waiters."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_until(
        self, holds: Callable[[], bool], timeout_s: float | None = None, *, also: ChangeSignal | None = None
    ) -> bool:
        """Waits for a notification, here or at `also`, after which `holds()` is true; False after `timeout_s`
        seconds."""
        if holds():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    waiter = asyncio.get_running_loop().create_future()
                    conditions = (self,) if also is None else (self, also)
                    for condition in conditions:
                        condition._waiters[waiter] = None
                    try:
                        await waiter
                    finally:
                        for condition in conditions:
                            condition._waiters.pop(waiter, None)
        except TimeoutError:
            return holds()
        return True
