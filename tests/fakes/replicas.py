"""Replicas: what one is told to own, and whether it goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

from adapter.bridge.leases import Leases, Tenure
from adapter.bridge.presence import Presence
from adapter.errors import LeaseLost
from adapter.tools.timing import ChangeSignal, Clock


class FakeTenure(Tenure):
    """One that holds as long as its replica is told to own the partition."""

    def __init__(self, number: int, leases: FakeLeases, clock: Clock, left: Iterable[str] = ()) -> None:
        self._leases = leases
        super().__init__(number, tuple(left), clock, _no_wait)
        self.changed = leases.changed
        self.until = math.inf

    @property
    def is_over(self) -> bool:
        return self._has_ended or self.number not in self._leases.owned

    @is_over.setter
    def is_over(self, ended: bool) -> None:
        self._has_ended = ended

    @property
    def is_valid(self) -> bool:
        return not self.is_over and self._leases.has_lease

    def check(self) -> None:
        if not self.is_valid:
            raise LeaseLost("lease_lost", f"partition {self.number}")


async def _no_wait() -> None:
    return


class Owned(dict[int, Tenure]):
    """The tenures of a replica, which is told what it owns."""

    def __init__(self, leases: FakeLeases) -> None:
        super().__init__()
        self._leases = leases

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.setdefault(number, self._leases.tenure_of(number))

    def discard(self, number: int) -> None:
        self.pop(number, None)
        self._leases.changed.notify_all()

    def clear(self) -> None:
        super().clear()
        self._leases.changed.notify_all()


class FakeLeases(Leases):
    """A replica that owns what it is told to own."""

    owned: Owned

    def __init__(self, presence: Presence, clock: Clock, keys: dict[int, Tenure], owned: Iterable[int]) -> None:
        """`keys`: the last tenure of each partition that was taken, of all replicas."""
        self.changed = ChangeSignal()
        self.ownerless = set()
        self._has_lease = True
        self.draining = False
        self.taking = asyncio.Lock()
        self.on_released: Callable[[int], None] = lambda number: None
        self._keys = keys
        self._presence = presence
        self._clock = clock
        self.owned = Owned(self)
        self.owned.add(*owned)

    @property
    def has_lease(self) -> bool:
        """None of its tenures pauses."""
        return self._has_lease

    @has_lease.setter
    def has_lease(self, has: bool) -> None:
        self._has_lease = has
        self.changed.notify_all()

    @property
    def is_working(self) -> bool:
        return self.has_lease

    def take(self, number: int) -> None:
        """With the replicas that may still poll or send there."""
        left = self._keys[number].former if number in self._keys else ()
        self.owned[number] = self._keys[number] = self.tenure_of(number, left)
        self.changed.notify_all()

    def lose(self) -> None:
        """All that it owns is another replica's."""
        for number in list(self.owned):
            self._end(self.owned[number])

    async def release(self, number: int) -> None:
        if (tenure := self.owned.get(number)) is None:
            return
        self._end(tenure)
        tenure.former = tuple(dict.fromkeys((*tenure.former, self.replica)))
        await asyncio.sleep(0)
        self.on_released(number)

    async def clear_former(self, number: int) -> None:
        await asyncio.sleep(0)
        if (tenure := self._keys.get(number)) is not None and tenure.is_over:
            tenure.former = tuple(name for name in tenure.former if name != self.replica)

    def _end(self, tenure: Tenure) -> None:
        tenure.end()
        self.owned.discard(tenure.number)

    def tenure_of(self, number: int, left: Iterable[str] = ()) -> FakeTenure:
        return FakeTenure(number, self, self._clock, left)


class Life:
    """Whether a replica goes on: what it asks of the world gets through, and answers reach it, only then.

    Its clock goes on, too, as that of a process that is stopped.
    """

    def __init__(self) -> None:
        self._going = asyncio.Event()
        self._going.set()

    def stop(self) -> None:
        self._going.clear()

    def go_on(self) -> None:
        self._going.set()

    @property
    def is_going(self) -> bool:
        return self._going.is_set()

    async def goes_on(self) -> None:
        await self._going.wait()

    async def passes(self, call: str, *, is_done: bool) -> None:
        """Awaited before a call of the world, and when it is done and its answer is on its way."""
        await self.goes_on()
