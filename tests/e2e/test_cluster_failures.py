"""A cluster of three that loses leaders, its quorum, its network or its disk's speed, under load: every promise
holds, and all goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from tests.e2e.cluster import NatsCluster, Node
from tests.e2e.disk import SlowDisk
from tests.e2e.partition import CABLES, PartitionedCluster, why_not
from tests.e2e.world import NAMES, World, audit, eventually, free_port, load, stream, until, world

BOTS = 12
LEADERS = (
    NAMES.stream_in,
    NAMES.stream_out,
    NAMES.stream_event,
    f"KV_{NAMES.cursors}",
    f"KV_{NAMES.context}",
    f"KV_{NAMES.members}",
    f"KV_{NAMES.claims}",
    f"KV_{NAMES.bindings}",
)


@contextlib.asynccontextmanager
async def running(
    folder: Path, bus: NatsCluster | None = None, *, adapters: int = 2, environ: dict[str, str] | None = None
) -> AsyncIterator[tuple[World, Client]]:
    """Bots bound, served by adapters."""
    async with world(folder, cursor_mode="cursor_replay", clustered=True, bus=bus, environ=environ) as made:
        for _ in range(adapters):
            await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        nc = await made.nc()
        records = [made.sim.add_bot() for _ in range(BOTS)]
        await asyncio.gather(*(made.bind(nc, f"s{number}", record) for number, record in enumerate(records)))
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        try:
            yield made, nc
        finally:
            await nc.close()


async def faultless(made: World, nc: Client) -> None:
    await made.settle(nc)
    assert (await audit(made, nc)).faults() == []


def loading(made: World, nc: Client, rounds: int, *, first: int = 0, pause_s: float = 0.5) -> asyncio.Task[None]:
    return asyncio.create_task(load(made, nc, rounds=rounds, pause_s=pause_s, rng=random.Random(first), first=first))


async def polled_anew(made: World) -> None:
    """Every bot is polled, or was, since now."""
    now_ms = made.sim.now_ms
    for record in made.bots.values():

        def polled(bot: str = record.bot) -> bool:
            view = made.sim.polls(bot)
            return bool(view.records and view.records[-1].start_ms > now_ms)

        await until(polled, f"{record.bot} is polled")


async def heard(made: World, other: Node, sandbox: str, text: str) -> None:
    """The sandbox's user writes, and it is on the bus, as another server has it than the one in trouble."""
    made.say(sandbox, text)
    nc = await nats.connect(other.url)

    async def told() -> bool:
        with contextlib.suppress(NatsError, TimeoutError):  # without a leader nobody answers
            return any(text.encode() in data for _, data in await stream(nc, NAMES.stream_in, NAMES.inbox(sandbox)))
        return False

    try:
        await eventually(told, f"{text} is on the bus")
    finally:
        await nc.close()


@pytest.mark.slow
async def test_the_leader_of_every_stream_and_bucket_is_killed(tmp_path: Path) -> None:
    async with running(tmp_path) as (made, nc):
        work = loading(made, nc, 40)
        killed: dict[str, str] = {}
        for name in LEADERS:
            if name in killed:
                continue
            node = await made.cluster.leader(name)
            for other in LEADERS:
                if (await made.cluster.leader(other)) is node:
                    killed[other] = node.name
            node.kill()
            await polled_anew(made)
            node.start()
            await made.cluster.healthy()
        assert set(killed) == set(LEADERS)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await faultless(made, nc)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=["sigterm", "lame_duck"])
async def test_a_rolling_restart_of_every_node(tmp_path: Path, number: int) -> None:
    async with running(tmp_path) as (made, nc):
        work = loading(made, nc, 200)
        for node in made.cluster.nodes:
            await node.leave(number)
            node.start()
            await made.cluster.healthy()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await faultless(made, nc)


@pytest.mark.slow
async def test_without_a_quorum_everything_waits_and_then_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as (made, nc):
        work = loading(made, nc, 6)
        await work
        lost = made.cluster.nodes[:2]
        for node in lost:
            node.kill()
        adapter = made.adapters[0]

        async def unready() -> bool:
            return bool(await adapter.unready())

        await eventually(unready, "it is not ready")
        assert await adapter.metric('bindings{state="polling"}') == 0
        polls = made.sim.stats().polls
        for sandbox in made.bots:
            made.say(sandbox, "while nothing can be stored")
        await asyncio.sleep(1)  # two holds of a poll
        assert made.sim.stats().polls == polls, "no poll starts"
        for node in lost:
            node.start()
        await made.cluster.healthy()
        await eventually(adapter.is_ready, "it is ready again")
        await loading(made, nc, 4, first=6)
        await faultless(made, nc)


@pytest.mark.skipif(bool(os.environ.get("CI")), reason="Namespaces left by a killed run make it fail")
@pytest.mark.slow
async def test_a_server_that_is_cut_off_from_the_others_is_left(tmp_path: Path) -> None:
    """Each in turn, with the adapters' connections to it intact; then each cut off from clients, silently."""
    if reason := await why_not():
        pytest.skip(reason)
    bus = PartitionedCluster(tmp_path / "nats")
    async with running(tmp_path, bus) as (made, nc):
        work = loading(made, nc, 400)
        for cable, _ in CABLES:
            for number, node in enumerate(bus.nodes):
                await bus.cut(node, cable)
                await polled_anew(made)
                await heard(made, bus.nodes[number - 1], "s1", f"without {cable} {number}")
                await bus.mend(node, cable)
                await bus.healthy()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await faultless(made, nc)
        for adapter in made.adapters:
            await eventually(adapter.is_ready, "it is ready")


@pytest.mark.slow
async def test_a_slow_disk_delays_and_costs_nothing_else(tmp_path: Path) -> None:
    """The servers may write 150 times a second in all, and want some thousands for this load."""
    disk = SlowDisk(tmp_path)
    if reason := await disk.why_not():
        pytest.skip(reason)
    async with disk:
        bus = NatsCluster(disk.path / "nats")
        small = {"WECHAT_NATS_IN_MAX_BYTES": "-1", "WECHAT_NATS_MEDIA_STORE_BYTES": "-1"}
        async with running(tmp_path, bus, adapters=1, environ=small) as (made, nc):
            disk.slow(bus.nodes, 150)
            await loading(made, nc, 3)
            disk.fast()
            await faultless(made, nc)
            assert "publish.waits" in made.adapters[0].log.read_text()
