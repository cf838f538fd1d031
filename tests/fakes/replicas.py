"""Replicas: what one is told to own, and whether it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from adapter.contract.names import Names
from adapter.errors import LeaseLost
from adapter.kit.timing import ChangeSignal
from adapter.ownership.leases import Leases


class FakeLeases(Leases):
    """A replica that owns what it is told to own."""

    def __init__(self, incarnation: str = "me-1", owned: Iterable[int] = range(Names().partitions)) -> None:
        self.owned = set(owned)
        self.changed = ChangeSignal()
        self.incarnation = incarnation
        self.has_lease = True
        self.has_no_peers = True
        self.surplus = set()
        self.orphans = set()
        self.membership_epoch = 0
        self.draining = False
        self.proven_dead: set[str] = set()
        self.asked_dead = 0
        """How often somebody asked whether an incarnation is dead."""

    @property
    def is_valid(self) -> bool:
        return self.has_lease

    @property
    def is_alone(self) -> bool:
        return self.has_no_peers

    def ensure_owned(self, shard: int) -> None:
        if shard not in self.owned or not self.is_valid:
            raise LeaseLost("lease_lost", f"shard {shard}")

    async def drain(self) -> None:
        self.draining = True

    async def revoke_if_expired(self, incarnation: str) -> bool:
        await asyncio.sleep(0)
        self.asked_dead += 1
        return incarnation in self.proven_dead


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
