"""What has ended leaves memory at once: the garbage collector runs rarely."""

from __future__ import annotations

import asyncio
import gc

from adapter.bridge.partition import Partition
from adapter.bridge.poller import BotPoller
from adapter.ilink.connection import Connection
from tests.fakes import Bench, Wire
from tests.outbound.shards import BOT


async def test_what_has_ended_goes_without_the_garbage_collector() -> None:
    """Which looks at what is old once in hours: what refers to itself is in memory until then."""

    def there() -> int:
        return sum(isinstance(thing, (Partition, BotPoller, Connection)) for thing in gc.get_objects())

    bench = Bench()
    await bench.bind()
    bench.hears()
    gc.collect()
    gc.disable()
    try:
        before = there()
        shard, session = Partition(bench.leases.tenure_of(1), bench.parts()), bench.new_poller(BOT)
        connection = Connection()
        connection.connection_made(Wire())
        assert there() == before + 3
        shard.on_delivery(bench.command("hi"))
        await asyncio.sleep(1)
        assert bench.chat.texts == ["hi"]
        shard.stop()
        connection.connection_lost(None)
        await asyncio.sleep(1)
        del shard, session, connection
        assert there() == before
    finally:
        gc.enable()
