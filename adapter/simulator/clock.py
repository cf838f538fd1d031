"""Time that a test owns: real by default, moved forward by `advance`."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Timer:
    """An action that is due once; `due_s` counts real seconds plus everything advanced."""

    due_s: float
    action: Callable[[], None]
    handle: asyncio.TimerHandle | None = None


class Clock:
    """Business time in Unix milliseconds, and timers that real time or `advance` sets off."""

    def __init__(self, frozen_at_ms: int | None = None) -> None:
        self._frozen_at_ms = frozen_at_ms
        self._started_s = time.monotonic()
        self._started_ms = time.time() * 1000
        self._advanced_s = 0.0
        self._timers: set[Timer] = set()

    def exact_ms(self) -> float:
        """Never runs backwards, so that records can prove what came first."""
        if self._frozen_at_ms is not None:
            return self._frozen_at_ms + self._advanced_s * 1000
        return self._started_ms + (time.monotonic() - self._started_s + self._advanced_s) * 1000

    def now_ms(self) -> int:
        return int(self.exact_ms())

    def elapsed_s(self) -> float:
        """Seconds since the start, advanced ones included; runs on while business time is frozen."""
        return time.monotonic() - self._started_s + self._advanced_s

    def schedule(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Runs `action` in the event loop after `delay_s`, or within the `advance` that makes it due."""
        timer = Timer(self.elapsed_s() + delay_s, action)
        timer.handle = asyncio.get_running_loop().call_later(max(delay_s, 0), self._fire, timer)
        self._timers.add(timer)
        return timer

    def cancel(self, timer: Timer) -> None:
        self._timers.discard(timer)
        if timer.handle is not None:
            timer.handle.cancel()

    async def wait(self, woken: asyncio.Future[None], timeout_s: float) -> None:
        """Returns when `woken` is done or the time is up, whichever is first."""

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self.schedule(timeout_s, wake)
        try:
            await woken
        finally:
            self.cancel(timer)

    async def sleep(self, delay_s: float) -> None:
        await self.wait(asyncio.get_running_loop().create_future(), delay_s)

    def advance(self, seconds: float) -> None:
        """Moves time forward and runs what has become due, earliest first."""
        if seconds < 0:
            raise ValueError("time runs forward only")
        self._advanced_s += seconds
        while due := self._due():
            for timer in due:
                self._fire(timer)

    def close(self) -> None:
        """Forgets every timer; nothing fires afterwards."""
        for timer in list(self._timers):
            self.cancel(timer)

    def _due(self) -> list[Timer]:
        elapsed_s = self.elapsed_s()
        due = [timer for timer in self._timers if timer.due_s <= elapsed_s]
        return sorted(due, key=lambda timer: timer.due_s)

    def _fire(self, timer: Timer) -> None:
        if timer in self._timers:
            self.cancel(timer)
            timer.action()
