"""Many callers at once: bounds with fair shares for sandboxes, and one read for what many ask at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar


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


K = TypeVar("K")
V = TypeVar("V")


class Batches(Generic[K, V]):
    """Reads by key. All reads that are asked for while one is under way go together."""

    def __init__(self, read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]], *, most: int = 256) -> None:
        """`read` gives what there is of at most `most` keys."""
        self._read = read
        self._most = most
        self._waiting: dict[K, asyncio.Future[V | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """What a read that begins after this call finds. Raises what `read` raises."""
        loop = asyncio.get_running_loop()
        if (waiter := self._waiting.get(key)) is None:
            waiter = self._waiting[key] = loop.create_future()
            waiter.add_done_callback(_retrieve_exception)  # whoever asked may be gone
        if self._task is None:
            self._task = loop.create_task(self._run())
        return await asyncio.shield(waiter)

    async def _run(self) -> None:
        asked: dict[K, asyncio.Future[V | None]] = {}
        try:
            while self._waiting:
                asked = {key: self._waiting.pop(key) for key in [*islice(self._waiting, self._most)]}
                try:
                    found = await self._read([*asked])
                except Exception as exc:  # noqa: BLE001 - who asked gets it
                    for waiter in asked.values():
                        waiter.set_exception(exc)
                    continue
                for key, waiter in asked.items():
                    waiter.set_result(found.get(key))
        finally:
            self._task = None
            for waiter in (*asked.values(), *self._waiting.values()):  # only of a task that was cancelled
                waiter.cancel()
            self._waiting.clear()


def _retrieve_exception(waiter: asyncio.Future[V | None]) -> None:
    if not waiter.cancelled():
        waiter.exception()
