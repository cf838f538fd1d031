"""What a replica reaches: the clock, NATS, iLink, and the clients that need only these."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any

from adapter import __version__
from adapter.bridge.leases import Leases
from adapter.bridge.pace import Successes
from adapter.bridge.presence import Presence
from adapter.contract.names import Names
from adapter.ilink.cdn import CdnClient
from adapter.ilink.client import ILink
from adapter.ilink.protocol import AGENT, Declared
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.client import BusClient
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import CoreNats, ManagedConnection
from adapter.jetstream.objects import ObjectStore
from adapter.jetstream.publisher import Publisher
from adapter.settings import Settings
from adapter.tools.metrics import Metrics
from adapter.tools.timing import Clock, PerTickLimiter, SystemClock

PER_TICK = 64
"""Steps in one turn of the event loop: answers with messages, the steps of persons, polls after a pause or a
failure; deliveries have a limit of their own (consumer.PER_TURN). Without a limit, five thousand answers in a process
with a quarter of a core made a turn longer than the lease, which was lost again and again."""
READER_LIVES = 2
"""How long the position of a sandbox that does not ask is kept, in lives of a message: when it is forgotten, nothing
up to it is left to be handed out again."""


class Edges:
    """Tests replace it. Nothing is connected until the `loops` run."""

    def __init__(self, settings: Settings, names: Names, instance: str) -> None:
        client = f"wechat-nats/{__version__} {instance}"
        self.clock: Clock = SystemClock()
        self.metrics = Metrics()
        self.connection = ManagedConnection(settings, client)
        # leases have a connection of their own, so that a renewal never waits behind bulk data
        self.lease_connection = ManagedConnection(settings, f"{client} leases")
        # so have media and replays, so that no message waits behind their megabytes
        self.media_connection = ManagedConnection(settings, f"{client} media")
        self.media_connection.on_connect(_enable_read_pauses)
        # sandboxes' requests use others, so that a flood never ends JetStream's connection
        self.service_connection = ManagedConnection(settings, f"{client} services")
        self.upload_connection = ManagedConnection(settings, f"{client} uploads")
        self.bus = Publisher(self.connection, self.clock, self.metrics)
        self.media_bus = Publisher(self.media_connection, self.clock, self.metrics)
        self._replicated = settings.replicas > 1
        # what others say of their polls comes over the same connection as what they are asked
        self.core = CoreNats(self.connection)
        self.presence = Presence(CoreNats(self.lease_connection), names, self.clock, instance)
        self.ticks = PerTickLimiter(PER_TICK)
        self.leases = Leases(
            KvBucket(self.lease_connection, names.leases, replicated=self._replicated),
            self.presence,
            self.clock,
            self.metrics,
            self.ticks.wait_tick,
            partitions=names.partitions,
            lease_s=settings.lease_s,
        )
        self.history = StreamHistory(self.connection, replicated=self._replicated)
        self.bulk_history = StreamHistory(self.media_connection, replicated=self._replicated)
        # a page of messages is small, and a message that has just come is in it
        self.inboxes = StreamHistory(self.service_connection, replicated=self._replicated)
        self.readers = KvBucket(
            self.service_connection, names.readers, ttl_s=int(READER_LIVES * settings.in_max_age_h * 3600)
        )
        self.objects = ObjectStore(self.media_connection, self.media_bus, names.media)
        self.successes = Successes(self.clock)
        self.chat = ILink(
            self.metrics,
            default_base_url=settings.ilink_base_url,
            allowed_hosts=settings.allowed_hosts,
            send_timeout_s=settings.send_timeout_s,
            on_success=self.successes.note,
            declared=Declared(settings.ilink_version, settings.ilink_agent or AGENT, settings.ilink_route_tag),
        )
        self.cdn = CdnClient(
            self.chat,
            self.metrics,
            base_url=settings.cdn_base_url,
            allowed_hosts=settings.allowed_hosts,
            max_bytes=settings.media_max_bytes,
        )

    def bucket(self, name: str) -> KvBucket:
        return KvBucket(self.connection, name, self.bus, replicated=self._replicated)

    def bulk_bucket(self, name: str) -> KvBucket:
        """A bucket over the connection of media."""
        return KvBucket(self.media_connection, name, self.media_bus, replicated=self._replicated)

    async def wait_connected(self) -> None:
        """Returns when JetStream's connection and those of the services are connected."""
        for connection in (self.service_connection, self.upload_connection, self.connection):
            await connection.wait_connected()

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The loops that maintain the connections to NATS and write to them, by name."""
        yield "connection", self.connection.run()
        yield "lease_connection", self.lease_connection.run()
        yield "media_connection", self.media_connection.run()
        yield "service_connection", self.service_connection.run()
        yield "upload_connection", self.upload_connection.run()
        yield "publisher", self.bus.run()
        yield "media_publisher", self.media_bus.run()

    async def close(self) -> None:
        """Closes the connections to iLink."""
        self.successes.close()
        await self.chat.close()
        await self.cdn.close()


async def _enable_read_pauses(nc: BusClient) -> None:
    nc.pauses = True
