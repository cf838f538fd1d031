"""Agents that ask for their next messages while adapters and servers end: nothing is missing, nothing comes again
that was confirmed, and each sandbox has one reader."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from adapter.contract.messages import NextQuery
from adapter.contract.names import H_POSITION, position, read_position
from tests.e2e.asker import Asker, AskRefused
from tests.e2e.busy import faultless, running
from tests.e2e.world import NAMES, World, eventually, load, until, world


class Handling:
    """An agent that handles what it gets, and asks for more until it is stopped."""

    def __init__(self, nc: Client, sandbox: str) -> None:
        self.asker = Asker(nc, sandbox)
        self.texts: list[str] = []

    async def run(self) -> None:
        while True:
            self.texts += [message.text for message in await self.asker.take_patiently()]
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def handled(made: World) -> AsyncIterator[None]:
    """What people write is handled by an agent for each sandbox; at the end all of it has been, once and in order."""
    agents = [Handling(await made.nc(), sandbox) for sandbox in made.bots]
    tasks = [asyncio.create_task(agent.run()) for agent in agents]
    yield
    for agent in agents:
        said = made.said[agent.asker.sandbox]
        await until(lambda: len(agent.texts) >= len(said), f"{agent.asker.sandbox} has handled all")  # noqa: B023
        assert agent.texts == said
    for task in tasks:
        assert not task.done() or task.exception() is None
        task.cancel()


async def test_an_adapter_that_is_killed_takes_no_position_and_no_reader_with_it(tmp_path: Path) -> None:
    async with world(tmp_path, cursor_mode="cursor_replay") as made:
        for _ in range(2):
            await made.add_adapter()
        nc = await made.nc()
        for number in range(4):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
        async with handled(made):
            for number, adapter in enumerate([*made.adapters, *made.adapters]):
                rng = random.Random(number)
                loading = asyncio.create_task(load(made, nc, rounds=6, pause_s=0.3, rng=rng, first=6 * number))
                await asyncio.sleep(0.5)  # in the middle of the load
                await adapter.kill()
                await adapter.start()
                await loading
            await made.settle(nc)


async def test_of_two_agents_the_newer_one_goes_on_and_the_other_ends_with_the_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, _ = await made.begun()
        first, second = Asker(nc), Asker(await made.nc())
        assert [message.text for message in await first.take()] == ["hello"]
        assert [message.text for message in await second.take()] == ["hello"], "it was not confirmed"
        with pytest.raises(AskRefused, match="409 Another agent reads this sandbox now"):
            await first.take()
        assert await second.take() == []
        made.say("s1", "again")
        await made.settle(nc)
        assert [message.text for message in await second.take()] == ["again"]


async def test_a_ring_is_answered_by_its_message(tmp_path: Path) -> None:
    """On a cluster of three, by whichever replica: the request comes right behind the message, whose followers may
    not have it yet."""
    async with world(tmp_path, clustered=True) as made:
        for _ in range(2):
            await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        asker, bell = Asker(nc), await nc.subscribe(NAMES.live("s1"))
        await asker.take()
        for number in range(100):
            made.say("s1", str(number))
            rung = await bell.next_msg(timeout=60)
            found = await asker.take_patiently()
            assert [message.text for message in found] == [str(number)]
            assert asker.handled == (rung.headers or {})[H_POSITION]


@pytest.mark.slow
async def test_one_server_of_three_that_is_dead_or_comes_back_empty_costs_no_message(tmp_path: Path) -> None:
    async with running(tmp_path) as (made, nc):
        async with handled(made):
            for number, node in enumerate(made.cluster.nodes):
                rng = random.Random(number)
                loading = asyncio.create_task(load(made, nc, rounds=8, pause_s=0.5, rng=rng, first=8 * number))
                await asyncio.sleep(1)  # in the middle of the load
                node.kill()
                await loading
                if number:  # one has its disk when it comes back, the others do not
                    await asyncio.to_thread(_empty, node.folder)
                node.start()
                await made.cluster.healthy()
                await eventually(lambda: _is_whole(nc), "the server has all again")
        await faultless(made, nc)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder / "jetstream")


async def _is_whole(nc: Client) -> bool:
    """Whether all servers are up to date, so that the next one may be lost."""
    with contextlib.suppress(Exception):
        clusters = [each.cluster for each in await nc.jetstream(timeout=2).streams_info()]
        return all(
            cluster is not None
            and cluster.leader
            and all(peer.current and not peer.offline for peer in cluster.replicas or [])
            for cluster in clusters
        )
    return False


async def test_a_position_above_all_that_is_stored_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, _ = await made.begun()
        asker = Asker(nc)
        await asker.take()
        assert asker.handled is not None
        for query in (
            NextQuery(reader=asker.reader, after=position(read_position(asker.handled)[0] + 1, 0)),
            NextQuery(after=asker.handled),
        ):
            with pytest.raises(AskRefused) as caught:
                await asker.ask(query)
            assert caught.value.code == "400"
        again = Asker(nc)
        assert [message.text for message in await again.take()] == ["hello"]
