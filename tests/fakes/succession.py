"""Who owns which partition in a model of several replicas, and who gets what another one gives away or loses."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

TAKEN_OVER_S = 4.0
"""Time after which another replica has what is not renewed any more."""


class Owner(Protocol):
    """A replica of a model."""

    is_well: bool
    """It may be given partitions."""

    def take(self, number: int) -> None: ...


R = TypeVar("R", bound=Owner)


class Succession(Generic[R]):
    """The part of a model that moves partitions."""

    def __init__(self) -> None:
        self.replicas: list[R] = []
        """All, also those that have ended."""
        self.homes: dict[int, R] = {}
        """Whose each partition is, or is about to be."""
        self.heirs: dict[int, tuple[R, float]] = {}
        """Who gets a partition that is being released, and when."""
        self.waits: set[asyncio.Task[None]] = set()

    async def start(self) -> R:
        """A new replica that runs."""
        raise NotImplementedError

    async def heir(self, number: int, *others: R) -> R:
        """One of those who are well, or a new one."""
        well = [each for each in self.replicas if each.is_well and each not in others]
        return well[number] if number < len(well) else await self.start()

    def pass_on(self, number: int, heir: R, after_s: float = 0.0) -> None:
        self.homes[number] = heir
        self.later(after_s, partial(self._take, number, heir))

    async def _take(self, number: int, heir: R) -> None:
        if self.homes[number] is heir:
            if heir.is_well:
                heir.take(number)
            else:  # it has died before it could
                await self.inherit(heir, 0)

    def on_released(self, number: int) -> None:
        if number in self.heirs:
            self.pass_on(number, *self.heirs.pop(number))

    async def inherit(self, lost: R, heir: int) -> None:
        """What a replica owned that renews no more is another's in time."""
        for number, home in self.homes.items():
            if home is lost:
                self.heirs.pop(number, None)
        await asyncio.sleep(TAKEN_OVER_S)
        taker = await self.heir(heir, lost)
        for number, home in [*self.homes.items()]:
            if home is lost:
                self.pass_on(number, taker)

    def later(self, seconds: float, then: Callable[[], object]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            if inspect.isawaitable(under_way := then()):
                await under_way

        self.waits.add(asyncio.get_running_loop().create_task(wait()))
