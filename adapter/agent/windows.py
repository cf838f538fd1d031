"""The send windows of a sandbox's persons, as the newest message or receipt of each shows them."""

from __future__ import annotations

import asyncio
import time

from adapter.contract.messages import Window
from adapter.kit.timing import wait_event

LONGEST_WAIT_S = 60.0
"""Longest wait between two looks at the clock, which may be set, or stop with the machine."""


class SendWindows:
    """Each person's window. The adapter's times are compared with this machine's clock."""

    def __init__(self) -> None:
        self.by_user: dict[str, Window] = {}
        """That of the newest message or receipt is the last one."""
        self._seen_ms: dict[str, int] = {}
        """When the message or receipt with that window was made."""
        self._told: dict[tuple[str, float], int | None] = {}
        """By person and `before_s`: the end of the last window of which `closing` has told."""
        self._changed = asyncio.Event()

    def note(self, user: str, window: Window, at_ms: int) -> None:
        """Takes over a window, unless a newer one is known. The receipt of a refused command may have none."""
        if user and window != Window() and at_ms >= self._seen_ms.get(user, 0):
            self.by_user.pop(user, None)
            self.by_user[user], self._seen_ms[user] = window, at_ms
            self._changed.set()

    async def closing(self, before_s: float) -> str:
        while True:
            self._changed.clear()
            now_ms, wait_s = time.time() * 1000, LONGEST_WAIT_S
            for user, window in self.by_user.items():
                closes_ms, key = window.closes_at_ms or 0, (user, before_s)
                if closes_ms <= now_ms or window.remaining == 0 or self._told.get(key) == closes_ms:
                    continue
                if (due_s := (closes_ms - now_ms) / 1000 - before_s) <= 0:
                    self._told[key] = closes_ms
                    return user
                wait_s = min(wait_s, due_s)
            await wait_event(self._changed, wait_s)
