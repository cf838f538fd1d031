"""Replicas on one bucket in memory, and everything that may go wrong between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapter.errors import Conflict, Temporary
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import Entry
from tests.fakes import FakeClock, Life

SHARDS = 32

LEASE_S = 4.0


class Store:
    """A bucket as its leader has it."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.writes = 0

    def write(self, key: str, value: bytes | None, revision: int) -> int:
        known = self.entries.get(key)
        if revision != (known.revision if known else 0):
            raise Conflict(10071, "wrong last sequence")
        self.revision += 1
        self.writes += 1
        self.entries[key] = Entry(key, value, self.revision)
        return self.revision


class Line:
    """Implements LeaderBucket: one replica's connection to a store, which may be cut in every way."""

    def __init__(self, store: Store, life: Life) -> None:
        self.store = store
        self.life = life
        self.down = False
        """Nothing gets through, in either direction; a request fails after a second."""
        self.deaf = False
        """Writes get through, answers do not."""
        self.reads_fail = False
        self.writes_fail = False
        """As of a stream without a leader, of which any server may still answer what it has."""
        self.unsteady = False
        """Every other renewal fails."""
        self.late_s = 0.0
        """How long a write takes to the store."""
        self.on_get: Callable[[], object] = lambda: None
        """Called as a key has been read."""
        self.on_write: Callable[[], object] = lambda: None
        """Called as a key has been written, before the answer is heard."""
        self._renewals = 0

    async def get(self, key: str) -> Entry | None:
        await self._through()
        found = self.store.entries.get(key)
        await self.life.goes_on()
        self.on_get()
        return found

    async def list_entries(self) -> list[Entry]:
        await self._through()
        found = list(self.store.entries.values())
        await self.life.goes_on()
        return found

    async def write(self, key: str, value: bytes | None, revision: int) -> int:
        await self.life.goes_on()
        self._renewals += value is not None
        if self.down or self.writes_fail or (self.unsteady and value is not None and self._renewals % 2):
            await self._fail()
        if self.late_s > 1.0:
            asyncio.get_running_loop().call_later(self.late_s, self._land, key, value, revision)
            await self._fail()
        await asyncio.sleep(0.01 + self.late_s)
        try:
            written = self.store.write(key, value, revision)
            self.on_write()
        finally:
            await self.life.goes_on()
        if self.deaf:
            await self._fail()
        return written

    def _land(self, key: str, value: bytes | None, revision: int) -> None:
        try:
            self.store.write(key, value, revision)
        except Conflict:
            return

    async def _through(self) -> None:
        await self.life.goes_on()
        if self.down or self.deaf or self.reads_fail:
            await self._fail()
        await asyncio.sleep(0.01)

    async def _fail(self) -> None:
        await asyncio.sleep(1.0)
        await self.life.goes_on()
        raise Temporary("bus_timeout")


class OwnClock(FakeClock):
    """A replica's clock: none is set like another, and each has a rate of its own."""

    def __init__(self, life: Life, rate: float, ahead_s: float) -> None:
        super().__init__()
        self._life = life
        self._rate = rate
        self.ahead_s = ahead_s

    def monotonic(self) -> float:
        return self.ahead_s + self._rate * super().monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._rate)
        await self._life.goes_on()


class Replica:
    def __init__(self, cluster: Cluster, name: str, *, rate: float = 1.0, ahead_s: float = 0.0) -> None:
        self.life = Life()
        self.members, self.claims = Line(cluster.members, self.life), Line(cluster.claims, self.life)
        self.clock = OwnClock(self.life, rate, ahead_s)
        self.metrics = Metrics()
        self.leases = Leases(
            self.members, self.claims, self.clock, self.metrics, instance=name, lease_s=LEASE_S, partitions=SHARDS
        )
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """With a service that needs a moment to hand a shard over."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.leases.run())
            group.create_task(self._hand_over())

    async def _hand_over(self) -> None:
        while True:
            await self.leases.changed.wait_until(lambda: bool(self.leases.surplus), 1.0)
            if self.leases.surplus:
                await asyncio.sleep(0.3)
                await asyncio.gather(*(self.leases.release(shard) for shard in sorted(self.leases.surplus)))

    @property
    def working(self) -> set[int]:
        """The shards that it polls and sends for at this moment: none while it is stopped, whatever it believes."""
        return self.leases.owned if self.leases.is_valid and self.life.is_going else set()

    def cut(self, down: bool = True) -> None:
        self.members.down = self.claims.down = down

    async def kill(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        self.leases.owned.clear()

    async def leave(self) -> None:
        """As the service does on SIGTERM."""
        await self.leases.drain()
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.leases.release_all()


class Cluster:
    """Replicas, watched all the time: two that work for one shard end the test."""

    def __init__(self) -> None:
        self.members, self.claims = Store(), Store()
        self.replicas: list[Replica] = []

    def start(self, name: str = "", *, rate: float = 1.0, ahead_s: float = 0.0) -> Replica:
        replica = Replica(self, name or f"r{len(self.replicas)}", rate=rate, ahead_s=ahead_s)
        self.replicas.append(replica)
        return replica

    async def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.02)):
            await asyncio.sleep(0.02)
            working: set[int] = set()
            for replica in self.replicas:
                assert not working & replica.working, "two owners at once"
                working |= replica.working
                if replica.task.done() and not replica.task.cancelled():
                    replica.task.result()

    @property
    def worked_for(self) -> int:
        return sum(len(replica.working) for replica in self.replicas)

    def stop(self) -> None:
        for replica in self.replicas:
            replica.task.cancel()
