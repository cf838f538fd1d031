"""Makes one request of what many ask for at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

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

    @property
    def is_idle(self) -> bool:
        """Nobody waits for a read."""
        return self._task is None

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
