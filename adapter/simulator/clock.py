"""Time that a test owns: real by default, moved forward by `advance`."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Timer:
    """An action that is due once; `due_s` counts everything advanced, and the real seconds unless it `stands`."""

    due_s: float
    action: Callable[[], None]
    stands: bool
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
            return self._frozen_at_ms + round(self._advanced_s * 1000, 3)
        return self._started_ms + (time.monotonic() - self._started_s + self._advanced_s) * 1000

    def now_ms(self) -> int:
        return int(self.exact_ms())

    def elapsed_s(self) -> float:
        """Seconds since the start, advanced ones included; runs on while business time is frozen."""
        return time.monotonic() - self._started_s + self._advanced_s

    def schedule(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Runs `action` in the event loop after `delay_s`, or within the `advance` that makes it due; nothing but
        that does while business time is frozen."""
        return self._start(delay_s, action, stands=self._frozen_at_ms is not None)

    def cancel(self, timer: Timer) -> None:
        self._timers.discard(timer)
        if timer.handle is not None:
            timer.handle.cancel()

    async def wait(self, woken: asyncio.Future[None], timeout_s: float) -> None:
        """Returns when `woken` is done or the time is up, whichever is first."""

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self._start(timeout_s, wake, stands=False)
        try:
            await woken
        finally:
            self.cancel(timer)

    async def sleep(self, delay_s: float) -> None:
        await self.wait(asyncio.get_running_loop().create_future(), delay_s)

    def advance(self, seconds: float) -> None:
        """Moves time forward and runs what becomes due on the way, each at its own time."""
        if seconds < 0:
            raise ValueError("time runs forward only")
        end_s = round(self._advanced_s + seconds, 6)  # a minute in tenths of a second is a minute
        while due := self._due(end_s):
            for at_s, timer in due:
                self._advanced_s = max(self._advanced_s, at_s)
                self._fire(timer)
        self._advanced_s = end_s

    def close(self) -> None:
        """Forgets every timer; nothing fires afterwards."""
        for timer in list(self._timers):
            self.cancel(timer)

    def _start(self, delay_s: float, action: Callable[[], None], *, stands: bool) -> Timer:
        due_s = round((self._advanced_s if stands else self.elapsed_s()) + delay_s, 6)
        timer = Timer(due_s, action, stands)
        if not stands:
            timer.handle = asyncio.get_running_loop().call_later(max(delay_s, 0), self._fire, timer)
        self._timers.add(timer)
        return timer

    def _due(self, end_s: float) -> list[tuple[float, Timer]]:
        """What is due once `end_s` have been advanced, with how many of them it takes; earliest first."""
        real_s = time.monotonic() - self._started_s
        at_s = ((timer.due_s - (0.0 if timer.stands else real_s), timer) for timer in self._timers)
        return sorted((due for due in at_s if due[0] <= end_s), key=lambda due: due[0])

    def _fire(self, timer: Timer) -> None:
        if timer in self._timers:
            self.cancel(timer)
            timer.action()
