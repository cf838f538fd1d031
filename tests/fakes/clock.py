"""Time that passes at once: everything waits as it would, and no test waits.

`VirtualLoop` jumps to the next timer whenever nothing else can happen, so that an hour of backoff takes no time and
every order is the same in every run. If nothing will ever happen again it says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter, defaultdict

EPOCH_MS = 1_789_000_000_000
"""Wall clock when a test begins."""


class _Jump(selectors.DefaultSelector):
    """Never waits: the loop's clock is set forward by the time that it would have waited."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self.loop.passed += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which time passes at once."""

    def __init__(self) -> None:
        self.passed = 0.0
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return 1000.0 + self.passed


class FakeClock:
    """The loop's time; no chance in it."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.set_back_ms = 0

    def now_ms(self) -> int:
        return EPOCH_MS + round((self.monotonic() - 1000.0) * 1000) - self.set_back_ms

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(seconds)

    def jitter(self, seconds: float) -> float:
        return 0.0


class Rounds:
    """What happened in each round of the event loop, or in two of them: counted by name."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[int]] = defaultdict(Counter)
        self._round = 0

    def note(self, what: str) -> None:
        if not self.seen[what][self._round]:
            asyncio.get_running_loop().call_soon(self._begin)
        self.seen[what][self._round] += 1

    def _begin(self) -> None:
        self._round += 1


async def settle() -> None:
    """Lets everything happen that needs no time."""
    for _ in range(200):
        await asyncio.sleep(0)
