"""A server that can be killed, and our edge to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.names import H_MSG_ID, Names
from adapter.errors import BusRefused, LeaseLost
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import Publisher
from adapter.ports import BusMessage, PubAck
from adapter.settings import Settings
from adapter.tools.metrics import Metrics
from adapter.tools.timing import SystemClock

NAMES = Names()
PATIENCE_S = 30.0


class Bus:
    """A server on a folder, which can be killed and started again on the same port, and our edge to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self.server = EmbeddedNats(folder)
        self.names = NAMES

    async def start(self) -> None:
        self.server = EmbeddedNats(self._folder, port=self._port)
        await self.server.start()
        self._port = int(self.server.url.rpartition(":")[2])
        self.settings = Settings(nats_url=(self.server.url,), in_max_bytes=1 << 30, media_store_bytes=1 << 30)

    def kill(self) -> None:
        self.server.kill()

    async def connected(self, group: asyncio.TaskGroup, name: str = "test") -> ManagedConnection:
        """A connection that lives as long as the group."""
        connection = ManagedConnection(self.settings, name)
        group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        return connection

    async def client(self) -> Client:
        return await nats.connect(self.server.url)


class Rig:
    """A connection with its publisher and history."""

    def __init__(self, bus: Bus, connection: ManagedConnection, group: asyncio.TaskGroup) -> None:
        self.bus = bus
        self.connection = connection
        self.metrics = Metrics()
        self.publisher = Publisher(connection, SystemClock(), self.metrics)
        self.history = StreamHistory(connection)
        self._group = group
        self._tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that runs until the rig is taken down."""
        task = self._group.create_task(work)
        self._tasks.append(task)
        return task

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def bucket(self, name: str = NAMES.persons) -> KvBucket:
        return KvBucket(self.connection, name, self.publisher)

    async def first(self, stream: str) -> int:
        """The first sequence of a stream."""
        state: dict[str, int] = (await self.connection.api_request(f"STREAM.INFO.{stream}"))["state"]
        return state["first_seq"]

    async def read(self, stream: str, subject: str, **where: Any) -> list[bytes]:
        return [stored.data async for stored in self.history.read(stream, subject, **where)]


@contextlib.asynccontextmanager
async def rig_on(bus: Bus, *, streams: bool = True) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as group:
        connection = ManagedConnection(bus.settings, "test")
        rig = Rig(bus, connection, group)
        rig.spawn(connection.run())
        rig.spawn(rig.publisher.run())
        await connection.wait_connected(PATIENCE_S)
        if streams:
            await asyncio.gather(
                *(
                    topology.create_stream(connection, wanted)
                    for wanted in topology.wanted_streams(NAMES, bus.settings)
                )
            )
        yield rig
        rig.stop()


def event(number: int, sandbox: str = "s1") -> BusMessage:
    return BusMessage("event", NAMES.event(sandbox, "receipt"), str(number).encode(), {H_MSG_ID: f"e{number}"})


class Fence:
    """What the leases say: from the `lost_from`th question on, no."""

    def __init__(self, lost_from: float) -> None:
        self.lost_from = lost_from
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if self.asked >= self.lost_from:
            raise LeaseLost("lease_lost")


STATUS = [
    {"Status": "404"},
    {"Status": "503", "Description": "no"},
    {"Status": "100", "Nats-Last-Consumer": "99"},
    {"Status": "408", "Nats-Pending-Messages": "many"},
    {"Nats-Sequence": "77", "Nats-Subject": "elsewhere"},
]
"""Headers of a message that look like the server's own words."""


async def control(rig: Rig, *texts: str) -> None:
    """Stores such texts as commands on the plain subject."""
    for text in texts:
        await rig.publisher.store(BusMessage("out", NAMES.out_plain, text.encode(), {}))


async def store_all(publisher: Publisher, messages: Iterable[BusMessage]) -> list[PubAck | BusRefused]:
    """Stores messages, all at once; a refusal takes the place of an acknowledgement."""

    async def store(message: BusMessage) -> PubAck | BusRefused:
        try:
            return await publisher.store(message)
        except BusRefused as exc:
            return exc

    return await asyncio.gather(*map(store, messages))
