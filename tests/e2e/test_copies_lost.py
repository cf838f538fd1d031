"""One server of three is lost, or its disk is full: all goes on, and metric, log and `doctor` name it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from adapter.jetstream.topology import wanted_streams
from adapter.settings import Settings
from tests.e2e.cluster import NatsCluster, Node
from tests.e2e.waiting import call, eventually, free_port
from tests.e2e.world import NAMES, AdapterProcess, World, world
from tests.forks import fork

STREAMS = len(wanted_streams(NAMES, Settings()))
DISK_BYTES = 64 << 20


@pytest.fixture
async def full_soon(tmp_path: Path) -> AsyncIterator[tuple[NatsCluster, Node]]:
    """A cluster, and its server that has a small disk of its own."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("A small disk is a mounted tmpfs, which takes root.")
    cluster = NatsCluster(tmp_path / "nats")
    node = cluster.nodes[0]
    disk = node.folder / "disk"
    disk.mkdir()
    assert not await call("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk))
    store = f'store_dir: "{disk}", max_file_store: 100Gi'  # more than streams reserve
    node.config.write_text(node.config.read_text().replace(f'store_dir: "{node.folder}"', store))
    yield cluster, node
    assert not await call("umount", "--lazy", str(disk))


async def copies(made: World) -> tuple[int, list[str]]:
    """Exit code of `doctor`, and what it says of copies."""
    process = await fork("adapter", "doctor", "--json", env=os.environ | {"NATS_URL": made.url}, stdout=PIPE)
    said, _ = await process.communicate()
    rows = map(msgspec.json.decode, said.splitlines())
    return await process.wait(), [f"{row['state']}: {row['say']}" for row in rows if row["check"] == "copies"]


async def degraded(adapter: AdapterProcess, streams: int) -> None:
    async def so() -> bool:
        return await adapter.metric("nats_streams_degraded") == streams

    await eventually(so, f"{streams} streams are degraded")


async def caught_up(made: World) -> None:
    """Every copy has all, also what was erased meanwhile."""
    nc = await made.nc()

    async def is_current() -> bool:
        infos = [await nc.jetstream().stream_info(wanted.name) for wanted in wanted_streams(NAMES, Settings())]
        peers = [peer for info in infos if info.cluster for peer in info.cluster.replicas or []]
        return all(peer.current and not peer.lag for peer in peers)

    await eventually(is_current, "all copies are current")
    await nc.close()


async def served(made: World, sandbox: str) -> None:
    nc = await made.nc()
    assert (await made.bind(nc, sandbox, made.sim.add_bot())).outcome == "applied"
    made.say(sandbox, "hello")
    await made.settle(nc)
    await nc.close()


async def test_a_lost_server_of_three_is_named_and_all_goes_on(tmp_path: Path) -> None:
    async with world(tmp_path, clustered=True) as made:
        adapter = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        await served(made, "s1")
        await degraded(adapter, 0)
        assert await copies(made) == (0, ["ok: 3 of each stream, none is behind"])
        lost = await made.cluster.leader(NAMES.stream_in)
        lost.kill()
        await degraded(adapter, STREAMS)
        assert await adapter.is_ready()
        code, (said,) = await copies(made)
        assert code == 0
        assert said.startswith(f"warn: server {lost.name} ")
        assert f"in {STREAMS} of {STREAMS} streams" in said
        await served(made, "s2")
        lost.start()
        await degraded(adapter, 0)
        await caught_up(made)
        assert (adapter.said("copies.degraded"), adapter.said("copies.restored")) == (1, 1)


@pytest.mark.slow
async def test_a_server_with_a_full_disk_is_named_and_all_goes_on(
    tmp_path: Path, full_soon: tuple[NatsCluster, Node]
) -> None:
    cluster, node = full_soon
    async with world(tmp_path, bus=cluster) as made:
        adapter = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        await served(made, "s1")
        filler = node.folder / "disk" / "filler"
        with (
            contextlib.suppress(OSError),
            filler.open("wb", buffering=0) as file,
        ):  # the server may take the last bytes
            while left := shutil.disk_usage(filler).free:
                file.write(bytes(left))
        await served(made, "s2")
        await degraded(adapter, STREAMS)
        assert await adapter.is_ready()
        _, (said,) = await copies(made)
        assert said.startswith(f"warn: server {node.name} ")
        filler.unlink()
        node.kill()
        node.start()
        await degraded(adapter, 0)
