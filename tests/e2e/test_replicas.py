"""Replicas that come and go share the bots: one poller each, no gap, order kept, nothing lost."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from pathlib import Path

from nats.aio.client import Client

from tests.e2e.world import World, audit, load, until, world

BOTS = 20


async def with_bots(made: World, nc: Client) -> None:
    for number in range(BOTS):
        await made.bind(nc, f"s{number}", made.sim.add_bot())
    await until(lambda: made.sim.stats().parked == BOTS, "all are polled")


async def test_a_replica_that_comes_later_gets_its_share_at_poll_boundaries(tmp_path: Path) -> None:
    async with world(tmp_path, hold_ms=1500) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        await with_bots(made, nc)
        loading = asyncio.create_task(load(made, nc, rounds=10, pause_s=0.3, rng=random.Random(1)))
        second = await made.add_adapter()
        await until(lambda: "partitions.taken" in second.log.read_text(), "the second replica has its share")
        await loading
        await made.settle(nc)
        found = await audit(made, nc)
        assert found.faults() == []
        assert made.sim.violations(kind="concurrent_polls") == []
        assert "polls.cancelled" not in first.log.read_text()
        outcomes = Counter(record.outcome for bot in made.bots.values() for record in made.sim.polls(bot.bot).records)
        cut = outcomes.pop("disconnected", 0)
        assert outcomes.keys() <= {"messages", "empty", ""}
        assert cut <= BOTS // 4, "only of a bot whose answer came in the middle of the handing over"

        for adapter in (first, second):  # a rolling restart
            loading = asyncio.create_task(
                load(made, nc, rounds=4, pause_s=0.3, rng=random.Random(2), first=len(made.said["s0"]))
            )
            adapter.signal(signal.SIGTERM)
            assert await adapter.ended() == 0
            await loading
            await made.settle(nc)
            before = adapter.log.read_text().count("partitions.taken")
            await adapter.start()
            await until(
                lambda adapter=adapter, before=before: adapter.log.read_text().count("partitions.taken") > before,  # type: ignore[misc]
                "it has its share again",
            )
        found = await audit(made, nc)
        assert found.faults() == []
        assert made.sim.stats().duplicates_suppressed == 0, "no command was sent by both"
        assert "polls.cancelled" not in first.log.read_text() + second.log.read_text()
