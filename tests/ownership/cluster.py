"""Replicas on one bucket in memory, and everything that may go wrong between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from adapter.bridge.leases import Leases, Tenure
from adapter.bridge.presence import Presence
from adapter.contract.names import Names
from adapter.errors import Conflict, Temporary
from adapter.ports import BucketEntry
from adapter.tools.metrics import Metrics
from tests.fakes import FakeClock, Life

LEASE_S = 4.0
PARTITIONS = 32


class Store:
    """A bucket as its leader has it."""

    def __init__(self) -> None:
        self.entries: dict[str, BucketEntry] = {}
        self.revision = 0
        self.writes = 0

    def write(self, key: str, value: bytes | None, revision: int | None) -> int:
        known = self.entries.get(key)
        if revision is not None and revision != (known.revision if known else 0):
            raise Conflict(10071, "wrong last sequence")
        self.revision += 1
        self.writes += 1
        self.entries[key] = BucketEntry(key, value, self.revision)
        return self.revision


class Line:
    """Implements LeaderBucket and CoreBus: one replica's connections, which may be cut in every way."""

    def __init__(self, cluster: Cluster, life: Life) -> None:
        self.store = cluster.store
        self.life = life
        self.down = False
        """Nothing gets through, in either direction; a request fails after a second."""
        self.deaf = False
        """Writes get through, answers do not."""
        self.reads_fail = False
        self.writes_fail = False
        """As of a stream without a leader, of which any server may still answer what it has."""
        self.unsteady = False
        """Every other write of a key fails."""
        self.mute = False
        """Nobody hears its words, and it hears none."""
        self.late_s = 0.0
        """How long a write takes to the store."""
        self.on_get: Callable[[], object] = lambda: None
        """Called as a key has been read."""
        self.on_write: Callable[[], object] = lambda: None
        """Called as a key has been written, before the answer is heard."""
        self._cluster = cluster
        self._writes: Counter[str] = Counter()
        self._on_message: list[Callable[[bytes], None]] = []

    async def get(self, key: str) -> BucketEntry | None:
        await self._through()
        found = self.store.entries.get(key)
        await self.life.goes_on()
        self.on_get()
        return found

    async def get_all(self, keys: Sequence[str]) -> list[BucketEntry]:
        await self._through()
        found = [self.store.entries[key] for key in keys if key in self.store.entries]
        await self.life.goes_on()
        return found

    async def write(self, key: str, value: bytes | None, revision: int | None, *, ttl_s: int = 0) -> int:
        await self.life.goes_on()
        self._writes[key] += 1
        if self.down or self.writes_fail or (self.unsteady and self._writes[key] % 2):
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

    def _land(self, key: str, value: bytes | None, revision: int | None) -> None:
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

    # the words of replicas

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        if not (self.down or self.mute):
            asyncio.get_running_loop().call_later(0.01, self._cluster.say, payload)

    def subscribe(self, subject: str, on_message: Callable[[bytes], None]) -> None:
        self._on_message.append(on_message)

    def respond(self, subject: str, make: object) -> None: ...

    async def ask(self, subject: str, payload: bytes, *, within_s: float) -> bytes | None:
        return None

    def hear(self, payload: bytes) -> None:
        if self.life.is_going and not (self.down or self.mute):
            for on_message in self._on_message:
                on_message(payload)


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
        self.line = Line(cluster, self.life)
        self.clock = OwnClock(self.life, rate, ahead_s)
        self.metrics = Metrics()
        self.presence = Presence(self.line, Names(), self.clock, name)
        self.leases = Leases(
            self.line, self.presence, self.clock, self.metrics, self._tick, partitions=PARTITIONS, lease_s=LEASE_S
        )
        self.taken: list[int] = []
        """Partitions in the order of their takings."""
        self._known: dict[int, Tenure] = {}
        self.task = asyncio.get_running_loop().create_task(self.leases.run(self.leases.release))

    async def _tick(self) -> None:
        await self.life.goes_on()

    def look(self) -> None:
        """Notes what was taken since the last look."""
        self.taken += [number for number, each in self.leases.owned.items() if self._known.get(number) is not each]
        self._known = dict(self.leases.owned)

    @property
    def owned(self) -> set[int]:
        return {*self.leases.owned}

    @property
    def working(self) -> set[int]:
        """The partitions that it polls and sends for at this moment: none while it is stopped, whatever it
        believes."""
        if not self.life.is_going:
            return set()
        return {number for number, tenure in self.leases.owned.items() if tenure.is_valid}

    def cut(self, down: bool = True) -> None:
        self.line.down = down

    async def kill(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        for tenure in self.leases.owned.values():
            tenure.end()
        self.leases.owned.clear()

    async def leave(self) -> None:
        """As the service does on SIGTERM."""
        self.leases.draining = True
        await self._release_all()
        async with self.leases.taking:
            await self._release_all()
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _release_all(self) -> None:
        await asyncio.gather(*(self.leases.release(number) for number in list(self.leases.owned)))


class Cluster:
    """Replicas, watched all the time: two that work for one partition end the test."""

    def __init__(self) -> None:
        self.store = Store()
        self.replicas: list[Replica] = []

    def say(self, payload: bytes) -> None:
        for replica in self.replicas:
            replica.line.hear(payload)

    def start(self, name: str = "", *, rate: float = 1.0, ahead_s: float = 0.0) -> Replica:
        replica = Replica(self, name or f"r{len(self.replicas)}", rate=rate, ahead_s=ahead_s)
        self.replicas.append(replica)
        return replica

    async def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.02)):
            await asyncio.sleep(0.02)
            working: set[int] = set()
            for replica in self.replicas:
                replica.look()
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
