"""One of several replicas of a world of fakes: it reaches the world as long as it lives."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from adapter.errors import Temporary
from tests.fakes import Bench, FakeBus, FakeDelivery, Life

BUCKETS = ("person", "bindings", "readers", "logins")
REACHED = ["bus", "chat", "cdn", "objects", *(f"{name}_bucket" for name in BUCKETS)]
"""The parts of a bench that a replica reaches."""


class Reached:
    """A part of the world as one replica reaches it: nothing begins, and no answer is heard, unless it lives.

    What has begun is done whatever becomes of the replica.
    """

    def __init__(self, part: object, life: Life) -> None:
        self.part = part
        self.life = life

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.part, name)
        if inspect.isasyncgenfunction(found):
            return partial(self._read, found)
        return partial(self._ask, found) if inspect.iscoroutinefunction(found) else found

    async def _ask(self, call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        name = getattr(call, "__name__", "")
        await self.life.passes(name, is_done=False)
        try:
            return await call(*args, **kwargs)
        finally:
            await self.life.passes(name, is_done=True)

    async def _read(self, call: Callable[..., AsyncIterator[Any]], *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        name = getattr(call, "__name__", "")
        await self.life.passes(name, is_done=False)
        async for found in call(*args, **kwargs):
            yield found
        await self.life.passes(name, is_done=True)


class Command(FakeDelivery):
    """A delivery whose ack removes the command from the stream, whoever gives it."""

    def __init__(self, bus: FakeBus, of: FakeDelivery, *, redelivered: bool, life: Life) -> None:
        super().__init__(
            of.subject, of.data, seq=of.seq, time_ms=of.time_ms, headers=of.headers, redelivered=redelivered
        )
        self._bus: Any = Reached(bus, life)

    async def ack(self) -> None:
        with contextlib.suppress(Temporary):  # then it comes again
            await self._bus.delete("WECHAT_OUT", self.seq)


def mortal(world: Bench, number: int, life: Life) -> Bench:
    """One of several replicas of a world, which reaches it as long as it lives."""
    own = {name: getattr(world, name) for name in ("clock", "binds", "deliveries", "core", "keys")}
    reached: Any = SimpleNamespace(**own, **{name: Reached(getattr(world, name), life) for name in REACHED})
    return Bench(reached, instance=f"r{number}", metrics=world.metrics)
