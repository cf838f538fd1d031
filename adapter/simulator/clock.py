"""A clock that tests control: it follows real time by default, and `advance` moves it forward."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Timer:
    """An action that is due once. `due_s` counts advanced time, and also real time unless the timer `stands`."""

    due_s: float
    action: Callable[[], None]
    stands: bool
    handle: asyncio.TimerHandle | None = None


class VirtualClock:
    """Business time in Unix milliseconds, and timers that fire in real time or by `advance`."""

    def __init__(self, frozen_at_ms: int | None = None) -> None:
        self._frozen_at_ms = frozen_at_ms
        self._started_s = time.monotonic()
        self._started_ms = time.time() * 1000
        self._advanced_s = 0.0
        self._timers: set[Timer] = set()

    def exact_ms(self) -> float:
        """Business time with fractions. It never runs backwards, so records show what came first."""
        if self._frozen_at_ms is not None:
            return self._frozen_at_ms + round(self._advanced_s * 1000, 3)
        return self._started_ms + (time.monotonic() - self._started_s + self._advanced_s) * 1000

    def now_ms(self) -> int:
        return int(self.exact_ms())

    def elapsed_s(self) -> float:
        """Seconds since the start, with the advanced ones. They go on while business time is frozen."""
        return time.monotonic() - self._started_s + self._advanced_s

    def schedule(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Runs `action` in the event loop after `delay_s`, or within the `advance` that makes it due. While business
        time is frozen, only `advance` makes it due."""
        return self._start(delay_s, action, stands=self._frozen_at_ms is not None)

    def cancel(self, timer: Timer) -> None:
        self._timers.discard(timer)
        if timer.handle is not None:
            timer.handle.cancel()

    async def wait(self, woken: asyncio.Future[None], timeout_s: float) -> None:
        """Returns when `woken` is done or `timeout_s` is over, whichever is first."""

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
        """Moves time forward, and runs each timer that becomes due at its own time."""
        if seconds < 0:
            raise ValueError("time runs forward only")
        end_s = round(self._advanced_s + seconds, 6)  # 600 steps of 0.1 s add up to a minute
        while due := self._due(end_s):
            for at_s, timer in due:
                self._advanced_s = max(self._advanced_s, at_s)
                self._fire(timer)
        self._advanced_s = end_s

    def close(self) -> None:
        """Discards every timer; none fires afterwards."""
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
        """The timers that are due once `end_s` are advanced, earliest first, each with the advance that it needs."""
        real_s = time.monotonic() - self._started_s
        at_s = ((timer.due_s - (0.0 if timer.stands else real_s), timer) for timer in self._timers)
        return sorted((due for due in at_s if due[0] <= end_s), key=lambda due: due[0])

    def _fire(self, timer: Timer) -> None:
        if timer in self._timers:
            self.cancel(timer)
            timer.action()
