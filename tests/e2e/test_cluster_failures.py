"""A cluster of three that loses leaders, nodes or its quorum, under load: every promise holds, and all goes on by
itself."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from pathlib import Path

import pytest
from nats.errors import Error as NatsError

from adapter.contract.messages import Unbind
from tests.e2e.busy import BOTS, faultless, polled_anew, running, talking
from tests.e2e.reading import inbox
from tests.e2e.world import NAMES, eventually, load, until, world

LEADERS = (
    NAMES.stream_in,
    NAMES.stream_out,
    NAMES.stream_event,
    f"KV_{NAMES.persons}",
    f"KV_{NAMES.readers}",
    f"KV_{NAMES.leases}",
    f"KV_{NAMES.bindings}",
)


@pytest.mark.slow
async def test_leaders_are_killed_and_nodes_are_restarted(tmp_path: Path) -> None:
    """The leader of every stream and bucket by SIGKILL; then all nodes one by one, by SIGTERM or as a lame duck."""
    async with running(tmp_path) as (made, nc):
        killed: set[str] = set()
        async with talking(made, nc):
            while left := [name for name in LEADERS if name not in killed]:
                node = await made.cluster.leader(left[0])
                killed.update([name for name in left if (await made.cluster.leader(name)) is node])
                node.kill()
                await polled_anew(made)
                node.start()
                await made.cluster.healthy()
            for node, number in zip(
                made.cluster.nodes, (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM), strict=True
            ):
                await node.leave(number)
                node.start()
                await made.cluster.healthy()
        await faultless(made, nc)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cursor_replay", "ack_on_delivery"])
async def test_without_a_leader_answers_stay_in_hand_and_then_everything_goes_on(tmp_path: Path, mode: str) -> None:
    """Two servers of three are stopped while the polls are out: what these bring can be stored nowhere."""
    async with running(tmp_path, mode=mode) as (made, nc):
        await load(made, nc, rounds=4, pause_s=0.2, rng=random.Random(1))
        await made.settle(nc)
        polls = made.sim.stats().polls
        await until(lambda: made.sim.stats().polls >= polls + BOTS, "all are polled")
        lost = made.cluster.nodes[:2]
        for node in lost:
            node.send(signal.SIGSTOP)
        for sandbox in made.bots:
            made.say(sandbox, "in hand while nothing can be stored")
        adapter = made.adapters[0]

        async def unready() -> bool:
            return await adapter.unready() != {}

        await eventually(unready, "it is not ready")
        await until(lambda: made.sim.stats().parked == 0, "nothing is polled")
        polls = made.sim.stats().polls
        for sandbox in made.bots:
            made.say(sandbox, "while nothing can be stored")
        await asyncio.sleep(1)  # two holds of a poll
        assert made.sim.stats().polls == polls, "no poll starts"
        for node in lost:
            node.send(signal.SIGCONT)
        await made.cluster.healthy()
        await eventually(adapter.is_ready, "it is ready again")
        await load(made, nc, rounds=3, pause_s=0.2, rng=random.Random(1), first=4)
        await faultless(made, nc)


@pytest.mark.slow
async def test_a_server_that_is_down_delays_no_bind(tmp_path: Path) -> None:
    async with world(tmp_path, clustered=True) as made:
        await made.add_adapter()
        nc = await made.nc()
        assert (await made.bind(nc, "s1", made.sim.add_bot())).outcome == "applied"
        made.say("s1", "hello")
        await made.settle(nc)
        (await made.cluster.leader(f"KV_{NAMES.readers}")).kill()
        made.said.clear()

        async def is_connected() -> bool:
            with contextlib.suppress(NatsError):
                await nc.flush(1)
                return True
            return False

        await eventually(is_connected, "the test has another server")
        assert (await made.control(nc, "s1", Unbind(all=True))).outcome == "applied"
        assert (await made.bind(nc, "s2", made.sim.add_bot())).outcome == "applied"
        assert (await made.bind(nc, "s1", made.sim.add_bot())).outcome == "applied"
        assert await inbox(nc, "s1") == []
