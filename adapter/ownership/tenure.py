"""This replica's ownership of one shard, from its claim until it is lost or given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from adapter.errors import LeaseLost
from adapter.ownership.leases import Leases

LOOK_S = 5.0
"""Longest wait before it is looked whether the tenure is over."""


class Tenure:
    """Says whether the replica may act for a shard. Implements kit.persist.Owner.

    The lease may pause and come back. The tenure is over once the shard is another's, or was given up by `end`.
    """

    def __init__(self, shard: int, leases: Leases, wait_tick: Callable[[], Awaitable[None]] | None = None) -> None:
        """`wait_tick`: awaited after a pause, so that thousands do not go on at the same time."""
        self.shard = shard
        self._leases = leases
        self._wait_tick = wait_tick
        self._is_over = False

    def check(self) -> None:
        """Raises LeaseLost unless this replica owns the shard now."""
        if self._is_over:
            raise LeaseLost("lease_lost", f"shard {self.shard}")
        self._leases.ensure_owned(self.shard)

    async def valid(self) -> None:
        """Waits out a pause of the lease. Raises LeaseLost once the tenure is over."""
        while not self._is_over:
            await self._leases.wait_owned(self.shard, LOOK_S)
            if self._wait_tick is not None:
                await self._wait_tick()
            with contextlib.suppress(LeaseLost):
                return self.check()
            await asyncio.sleep(0)  # whoever is told first may find it paused again
        raise LeaseLost("lease_lost", f"shard {self.shard}")

    def end(self) -> None:
        """Makes every later check fail."""
        self._is_over = True
