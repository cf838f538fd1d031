"""A cluster of three whose network is cut, or whose disk is slow, under load: every promise holds, and all goes on by
itself."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import nats
import pytest
from nats.errors import Error as NatsError

from tests.e2e.busy import faultless, polled_anew, running, talking
from tests.e2e.cluster import NatsCluster, Node
from tests.e2e.disk import SlowDisk
from tests.e2e.partition import CABLES, Cable, PartitionedCluster, why_not
from tests.e2e.world import NAMES, World, eventually, stream, until


async def heard(made: World, other: Node, sandbox: str, text: str) -> None:
    """The sandbox's user writes, and it is on the bus, as another server has it than the one in trouble."""
    made.say(sandbox, text)
    nc = await nats.connect(other.url)

    async def told() -> bool:
        with contextlib.suppress(NatsError, TimeoutError):  # without a leader nobody answers
            return any(text.encode() in data for _, data in await stream(nc, NAMES.stream_in, NAMES.inbox(sandbox)))
        return False

    try:
        await eventually(told, f"{text} is on the bus", patience_s=180)
    finally:
        await nc.close()


def lost(made: World) -> int:
    """How often an adapter has lost, or left, a server."""
    return sum(adapter.said("bus.lost") for adapter in made.adapters)


async def survives(made: World, bus: PartitionedCluster, node: Node, cable: Cable) -> None:
    """A cable of a server is cut, and everybody is served all the same; then it is mended."""
    await bus.cut(node, cable)
    await polled_anew(made)
    other = bus.nodes[bus.nodes.index(node) - 1]
    await heard(made, other, "s1", f"{node.name} is cut off from {cable}")
    await bus.mend(node, cable)
    await bus.healthy()


@pytest.mark.slow
async def test_a_server_that_is_cut_off_is_left(tmp_path: Path) -> None:
    """From the others, with the connections of its clients intact; or from its clients, silently."""
    if reason := await why_not():
        pytest.skip(reason)
    bus = PartitionedCluster(tmp_path / "nats")
    async with running(tmp_path, bus) as (made, nc):
        async with talking(made, nc):
            for cable, _ in CABLES:
                before = lost(made)
                for node in itertools.cycle(bus.nodes):
                    await survives(made, bus, node, cable)
                    if lost(made) > before:  # else no adapter was connected to this one
                        break
        assert any("does not answer through this server" in adapter.log.read_text() for adapter in made.adapters)
        await faultless(made, nc)
        for adapter in made.adapters:
            await eventually(adapter.is_ready, "it is ready")


@pytest.mark.slow
async def test_a_slow_disk_delays_and_costs_nothing_else(tmp_path: Path) -> None:
    """The servers may write 60 times a second in all, and want thousands for this load."""
    disk = SlowDisk(tmp_path)
    if reason := await disk.why_not():
        pytest.skip(reason)
    small = {"WECHAT_NATS_IN_MAX_BYTES": "-1", "WECHAT_NATS_MEDIA_STORE_BYTES": "-1"}
    async with disk, running(tmp_path, NatsCluster(disk.path / "nats"), adapters=1, environ=small) as (made, nc):
        (adapter,) = made.adapters
        disk.slow(made.cluster.nodes, 60)
        async with talking(made, nc, pause_s=1.0):
            await until(lambda: adapter.said("publish.retrying") + adapter.said("lease.paused") > 0, "it is too slow")
            disk.fast()
        await faultless(made, nc)
