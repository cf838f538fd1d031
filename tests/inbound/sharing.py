"""Replicas of one world that share its partitions by real leases: what one gives away, another takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from adapter.bridge.leases import Leases
from adapter.bridge.partition import Partition
from adapter.bridge.partitions import Partitions
from adapter.bridge.presence import PollerStatus, ReplicaStatus
from adapter.contract.names import Names
from adapter.contract.records import Lease
from adapter.ports import Account, Polled
from tests.fakes import Bench, FakeChat, FakeDelivery, Life, batch
from tests.ownership.cluster import LEASE_S, Cluster, Line

HOLD_S = 35.0
"""After which iLink answers a poll without news."""


def sandbox_of(number: int, skip: int = 0) -> str:
    """The name of a sandbox in a partition."""
    names = (name for name in (f"s{each}" for each in range(10_000)) if Names().partition_of(name) == number)
    return [next(names) for _ in range(skip + 1)][-1]


def _number(delivery: FakeDelivery) -> int:
    return int(delivery.subject.split(".")[2])


class Begun(NamedTuple):
    """A poll."""

    replica: str
    bot: str
    cursor: str
    at_s: float


class Phone(FakeChat):
    """iLink, which holds one poll of each bot until the test, or HOLD_S, ends it."""

    def __init__(self, world: Bench) -> None:
        super().__init__(world.clock)
        self.begun: list[Begun] = []
        self.ended: list[str] = []
        """Bots whose polls were answered."""
        self.cut: list[str] = []
        """Bots whose polls were cut."""
        self.polled_twice: list[str] = []
        """Bots that were polled while a poll of theirs was out: must stay empty."""
        self.open: dict[str, asyncio.Future[Polled]] = {}

    def answer(self, bot: str, *messages: bytes, cursor: str = "b") -> None:
        """Ends the poll of a bot that is out."""
        self.open[bot].set_result(batch(*messages, cursor=cursor) if messages else Polled([], None, 35_000))

    async def held(self, replica: str, account: Account, cursor: str) -> Polled:
        bot, loop = account.bot, asyncio.get_running_loop()
        if bot in self.open:
            self.polled_twice.append(bot)
        self.begun.append(Begun(replica, bot, cursor, loop.time()))
        held: asyncio.Future[Polled] = loop.create_future()
        self.open[bot] = held
        ending = loop.call_later(HOLD_S, self._end, held)
        try:
            answer = await held
            self.ended.append(bot)
            return answer
        except asyncio.CancelledError:
            self.cut.append(bot)
            raise
        finally:
            ending.cancel()
            if self.open[bot] is held:
                del self.open[bot]

    def _end(self, held: asyncio.Future[Polled]) -> None:
        if not held.done():
            held.set_result(Polled([], None, 35_000))


class World:
    """What the replicas share."""

    def __init__(self) -> None:
        self.bench = Bench(instance="world")
        self.bench.chat = self.phone = Phone(self.bench)
        self.keys = Cluster()
        self.replicas: list[Sharing] = []
        self.failed: list[str] = []
        """What said that only a restart helps."""

    def start(self, name: str, *, capacity: int = 1000) -> Sharing:
        self.replicas.append(Sharing(self, name, capacity))
        return self.replicas[-1]

    def lease(self, number: int) -> Lease:
        value = self.keys.store.entries[str(number)].value
        assert value is not None
        return msgspec.json.decode(value, type=Lease)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def until(self, holds: Callable[[], bool], within_s: float = 200.0) -> float:
        """Seconds until it holds."""
        began = self.now()
        while not holds():
            await asyncio.sleep(0.01)
            assert self.now() - began < within_s
        return self.now() - began

    async def close(self) -> None:
        for replica in self.replicas:
            replica.kill()
        await asyncio.sleep(1)
        assert (self.failed, self.phone.polled_twice) == ([], [])


class Sharing:
    """One replica, as the service runs it."""

    def __init__(self, world: World, name: str, capacity: int) -> None:
        self.name = name
        self.world = world
        self.bench = bench = Bench(world.bench, instance=name)
        self.core = bench.core
        edges, phone = bench.replica.edges, world.phone

        async def poll(account: Account, cursor: str, hold_ms: int) -> Polled:
            return await phone.held(name, account, cursor)

        edges.chat.poll = poll  # type: ignore[method-assign]
        bench.replica.parts.sessions.polled = {}
        self.life = Life()
        self.line = Line(world.keys, self.life)
        self.leases = Leases(
            self.line,
            bench.presence,
            bench.clock,
            bench.metrics,
            bench.replica.edges.ticks.wait_tick,
            partitions=bench.names.partitions,
            lease_s=LEASE_S,
        )
        self.partitions = Partitions(
            bench.parts(),
            self.leases,
            capacity=capacity,
            on_failed=lambda task, detail: world.failed.append(f"{task}: {detail}"),
            status=self._status,
        )
        self.began: dict[int, float] = {}
        """When it began to work for a partition last."""
        self.consuming: set[int] = set()
        self.ends_s = 0.0
        """How long a consumer takes to end."""
        loop = asyncio.get_running_loop()
        self.leasing = loop.create_task(self.leases.run(self.partitions.give))
        self.working = loop.create_task(self.partitions.run(self.consume))

    def _status(self, bots: Sequence[str]) -> ReplicaStatus:
        pollers = self.partitions.pollers
        return ReplicaStatus(
            instance=self.name,
            version="1",
            partitions=dict.fromkeys(self.leases.owned, 0),
            bots=len(pollers),
            polls={bot: PollerStatus(state=pollers[bot].state.value) for bot in bots if bot in pollers},
        )

    async def consume(self, partition: Partition) -> None:
        self.began[partition.number] = self.world.now()
        self.consuming.add(partition.number)
        self._redeliver(partition)
        try:
            await asyncio.Event().wait()
        finally:
            self.consuming.discard(partition.number)
            await asyncio.sleep(self.ends_s)

    def _redeliver(self, partition: Partition) -> None:
        """As the server does for a consumer that was reset: what is not acknowledged comes again."""
        bench = self.bench
        for old in [one for one in bench.deliveries if not one.acks and _number(one) == partition.number]:
            stored = next(one for one in bench.bus.found("OUT") if one.seq == old.seq)
            again = FakeDelivery(
                stored.subject,
                stored.data,
                seq=stored.seq,
                time_ms=old.time_ms,
                headers=dict(stored.headers),
                redelivered=True,
            )
            bench.deliveries[bench.deliveries.index(old)] = again
            partition.on_delivery(again)

    @property
    def owned(self) -> set[int]:
        return {*self.leases.owned}

    def polls(self, bot: str) -> bool:
        """Whether the poll of a bot that is out is this one's."""
        begun = [each for each in self.world.phone.begun if each.bot == bot]
        return bot in self.world.phone.open and begun[-1].replica == self.name

    def deliver(self, text: str, **fields: object) -> None:
        """A command, as the consumer of this replica delivers it."""
        delivery = self.bench.command(text, **fields)  # type: ignore[arg-type]
        self.partitions.working[_number(delivery)].on_delivery(delivery)

    async def drain(self, seconds: float = 60.0) -> None:
        """As the service does on SIGTERM."""
        self.working.cancel()
        await self.partitions.drain(seconds)
        self.kill()

    def kill(self) -> None:
        """As kill -9 does: it says nothing more, and its connections end."""
        self.core.is_cut = self.line.down = True
        self.life.stop()
        work = [owned.work for owned in self.partitions._owned.values()]
        for task in (self.leasing, self.working, *self.partitions._polling, *work):
            task.cancel()
        for tenure in self.leases.owned.values():
            tenure.end()
        for partition in [*self.partitions.working.values(), *self.partitions._leaving]:
            partition.stop()
        self.partitions._tasks.cancel_all()
