"""One client per bot, for as long as somebody uses it: a bot that is bound no more must not keep its sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, TypeVar

C = TypeVar("C")


class _Slot(Generic[C]):
    __slots__ = ("client", "users")

    def __init__(self, client: C) -> None:
        self.client = client
        self.users = 0


class Pool(Generic[C]):
    """Clients by name. One that nobody has used for `idle_s` seconds is closed; a call that waits is use.

    `close` must not raise.
    """

    def __init__(self, close: Callable[[C], Awaitable[None]], *, idle_s: float) -> None:
        self._close = close
        self._idle_s = idle_s
        self._slots: dict[str, _Slot[C]] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()
        """Since when, by the loop's clock; those idle for longest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._slots)

    @contextlib.contextmanager
    def use(self, name: str, make: Callable[[], C]) -> Iterator[C]:
        """The client of this name, made where there is none; it stays open as long as the block lasts."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = _Slot(make())
        slot.users += 1
        self._idle.pop(name, None)
        try:
            yield slot.client
        finally:
            slot.users -= 1
            if not slot.users and self._slots.get(name) is slot:
                self._rest(name)

    async def drop(self, name: str) -> None:
        """Closes the client of this name, also under those who use it; the next use makes another."""
        self._idle.pop(name, None)
        if slot := self._slots.pop(name, None):
            await self._close(slot.client)

    async def close(self) -> None:
        """Closes them all."""
        if self._timer is not None:
            self._timer.cancel()
        for name in list(self._slots):
            await self.drop(name)
        if self._closing:
            await asyncio.wait(set(self._closing))

    def _rest(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        self._idle[name] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._idle_s, self._end_idle)

    def _end_idle(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for name, since in list(self._idle.items()):
            if since + self._idle_s > loop.time():
                self._timer = loop.call_at(since + self._idle_s, self._end_idle)
                return
            closing = asyncio.ensure_future(self.drop(name))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
