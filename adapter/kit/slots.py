"""Bounds concurrent work, with fair shares for sandboxes: sends, media transfers, requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class FairSlots:
    """A number of slots. Waiting sandboxes take turns."""

    def __init__(self, slots: int, *, share: int) -> None:
        """`share`: most slots of one sandbox."""
        self._free = slots
        self._share = share
        self._used: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def try_acquire(self, sandbox: str) -> bool:
        """Takes a slot if one is free and no other caller waits for it."""
        used = self._used.get(sandbox, 0)
        if not self._free or used >= self._share or sandbox in self._waiting:
            return False
        self._free -= 1
        self._used[sandbox] = used + 1
        return True

    async def acquire(self, sandbox: str) -> None:
        """Waits for a slot."""
        if self.try_acquire(sandbox):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(sandbox, deque()).append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release(sandbox)
            raise

    def release(self, sandbox: str) -> None:
        """Releases a slot."""
        self._free += 1
        if (used := self._used.pop(sandbox) - 1) > 0:
            self._used[sandbox] = used
        if self._waiting:
            self._grant_free_slots()

    @contextlib.asynccontextmanager
    async def slot(self, sandbox: str) -> AsyncIterator[None]:
        """Waits for a slot, and holds it while entered."""
        await self.acquire(sandbox)
        try:
            yield
        finally:
            self.release(sandbox)

    def _grant_free_slots(self) -> None:
        """Gives free slots to waiting sandboxes in turn."""
        for _ in range(len(self._waiting)):
            if not self._free:
                return
            sandbox, waiters = next(iter(self._waiting.items()))
            while waiters and waiters[0].done():
                waiters.popleft()
            if waiters and (used := self._used.get(sandbox, 0)) < self._share:
                self._free -= 1
                self._used[sandbox] = used + 1
                waiters.popleft().set_result(None)
            if waiters:
                self._waiting.move_to_end(sandbox)
            else:
                del self._waiting[sandbox]
