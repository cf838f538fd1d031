"""A replica's connections to NATS and iLink, and the clients that need nothing but these."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any

from adapter import __version__
from adapter.ilink.cdn import CdnClient
from adapter.ilink.client import ILink
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.client import BusClient
from adapter.jetstream.core import CoreNats
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.link import Link
from adapter.jetstream.objects import ObjectStore
from adapter.jetstream.publisher import Publisher
from adapter.metrics import Metrics
from adapter.names import Names
from adapter.settings import Settings
from adapter.timing import Clock


class Connections:
    """Nothing is connected before the `loops` run."""

    def __init__(self, settings: Settings, names: Names, instance: str, clock: Clock, metrics: Metrics) -> None:
        client = f"wechat-nats/{__version__} {instance}"
        self.link = Link(settings, client)
        # Leases have a connection of their own: a renewal never waits behind bulk data.
        self.lease_link = Link(settings, f"{client} leases")
        # Media and what sandboxes read again have one too: no message waits behind their megabytes.
        self.media_link = Link(settings, f"{client} media")
        self.media_link.on_up(_pause)
        # What sandboxes ask comes over others: whatever they send, and however much, JetStream's are not cut for it.
        self.service_link = Link(settings, f"{client} services")
        self.upload_link = Link(settings, f"{client} uploads")
        self.bus = Publisher(self.link, clock, metrics)
        self.media_bus = Publisher(self.media_link, clock, metrics)
        self._replicated = settings.replicas > 1
        self.history = StreamHistory(self.link, replicated=self._replicated)
        self.bulk_history = StreamHistory(self.media_link, replicated=self._replicated)
        self.core = CoreNats(self.link, names)
        self.objects = ObjectStore(self.media_link, self.media_bus, names.media)
        self.chat = ILink(
            metrics,
            default_base_url=settings.ilink_base_url,
            allowed_hosts=settings.allowed_hosts,
            send_timeout_s=settings.send_timeout_s,
        )
        self.cdn = CdnClient(
            self.chat,
            metrics,
            base_url=settings.cdn_base_url,
            allowed_hosts=settings.allowed_hosts,
            max_bytes=settings.media_max_bytes,
        )

    def bucket(self, name: str) -> KvBucket:
        return KvBucket(self.link, self.bus, name, replicated=self._replicated)

    def bulk_bucket(self, name: str) -> KvBucket:
        """The same, over the connection of media."""
        return KvBucket(self.media_link, self.media_bus, name, replicated=self._replicated)

    async def up(self) -> None:
        """Returns once JetStream's connection is there, and those over which sandboxes ask."""
        for link in (self.service_link, self.upload_link, self.link):
            await link.wait_up()

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What keeps the connections to NATS, and what is written over them, by name."""
        yield "link", self.link.run()
        yield "lease_link", self.lease_link.run()
        yield "media_link", self.media_link.run()
        yield "service_link", self.service_link.run()
        yield "upload_link", self.upload_link.run()
        yield "publisher", self.bus.run()
        yield "media_publisher", self.media_bus.run()

    async def close(self) -> None:
        """Closes the connections to iLink."""
        await self.chat.close()
        await self.cdn.close()


async def _pause(nc: BusClient) -> None:
    nc.pauses = True
