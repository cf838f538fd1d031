"""Which bots have served a sandbox, and whom, by its binding events."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from adapter.events import told_of_bindings
from adapter.names import Names
from adapter.ports import History
from adapter.timing import Clock

KNOWN_SANDBOXES = 64
"""Whose bots are kept in memory once they were read: thousands of a sandbox's lanes may ask in a row."""
KNOWN_S = 60.0
"""Seconds for which they are kept after the last question."""


class _Known:
    """The bots of a sandbox, as far as its events were read."""

    def __init__(self) -> None:
        self.asked = 0.0
        """Monotonic time of the last question."""
        self.seq = 0
        """The newest sequence in WECHAT_EVENT that was read."""
        self.bots: dict[tuple[str, str], None] = {}
        self.reading = asyncio.Lock()


class FormerBots:
    """Reads the events of a sandbox once, and from then on those that are new."""

    def __init__(self, history: History, names: Names, clock: Clock) -> None:
        self._history = history
        self._names = names
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def of(self, sandbox: str) -> list[tuple[str, str]]:
        """Bots and their users ("": not known then), the oldest first, those of now among them. Raises Temporary."""
        known = self._known.setdefault(sandbox, _Known())
        known.asked = self._clock.monotonic()
        self._known.move_to_end(sandbox)
        if len(self._known) > KNOWN_SANDBOXES:
            self._known.popitem(last=False)
        async with known.reading:
            async for seq, event in told_of_bindings(self._history, self._names, sandbox, after=known.seq):
                known.seq = seq
                known.bots[event.bot, event.user] = None
        return list(known.bots)

    def tidy(self) -> None:
        """Forgets what nobody has asked for lately."""
        horizon = self._clock.monotonic() - KNOWN_S
        while self._known and (oldest := next(iter(self._known.items())))[1].asked <= horizon:
            del self._known[oldest[0]]
