"""A bridge on a cluster with everybody talking, for tests that take something away from it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path

from nats.aio.client import Client

from tests.e2e.cluster import NatsCluster
from tests.e2e.world import World, audit, free_port, load, until, world

BOTS = 12


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    bus: NatsCluster | None = None,
    *,
    adapters: int = 2,
    environ: dict[str, str] | None = None,
    mode: str = "cursor_replay",
) -> AsyncIterator[tuple[World, Client]]:
    """A cluster with bots bound, served by adapters."""
    async with world(folder, cursor_mode=mode, clustered=True, bus=bus, environ=environ) as made:
        for _ in range(adapters):
            await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        nc = await made.nc()
        records = [made.sim.add_bot() for _ in range(BOTS)]
        await asyncio.gather(*(made.bind(nc, f"s{number}", record) for number, record in enumerate(records)))
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        yield made, nc


async def faultless(made: World, nc: Client) -> None:
    await made.settle(nc)
    faults = (await audit(made, nc)).faults()
    assert not faults, faults


@contextlib.asynccontextmanager
async def talking(made: World, nc: Client, *, first: int = 0, pause_s: float = 0.5) -> AsyncIterator[None]:
    """Everybody talks, round by round, as long as the block lasts; the last round is ended."""
    over = asyncio.Event()

    async def talk() -> None:
        rng = random.Random(first)
        for number in itertools.count(first):
            await load(made, nc, rounds=1, pause_s=pause_s, rng=rng, first=number)
            if over.is_set():
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(talk())
        yield
        over.set()


async def polled_anew(made: World) -> None:
    """Every bot is polled, or was, since now."""
    now_ms = made.sim.now_ms
    for record in made.bots.values():

        def polled(bot: str = record.bot) -> bool:
            view = made.sim.polls(bot)
            return bool(view.records and view.records[-1].start_ms > now_ms)

        await until(polled, f"{record.bot} is polled")
