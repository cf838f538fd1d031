"""The whole bridge under load and faults: nothing lost, nothing twice, everything accounted for."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapter.simulator import FaultRule
from tests.e2e.world import World, audit, load, loaded, until, world

BOTS = 50
ROUNDS = 40


def set_faults(made: World) -> None:
    """Error pages, spoilt bodies, resets, repeats and replays, at 5 % each; of sends a few, since each that may have
    been taken costs its user a minute."""
    for rule in (
        FaultRule(fault="F1", endpoint="getupdates", probability=0.05),
        FaultRule(fault="F1", endpoint="sendmessage", probability=0.05, count=10),
        FaultRule(fault="F3", endpoint="getupdates", probability=0.05),
        FaultRule(fault="F3", endpoint="sendmessage", probability=0.05, count=10, params={"kind": "malformed"}),
        FaultRule(fault="F6", endpoint="getupdates", probability=0.025, params={"when": "before"}),
        FaultRule(fault="F6", endpoint="getupdates", probability=0.025, params={"when": "after"}),
        FaultRule(fault="F6", endpoint="sendmessage", probability=0.025, count=10, params={"when": "before"}),
        FaultRule(fault="F6", endpoint="sendmessage", probability=0.025, count=10, params={"when": "after"}),
        FaultRule(fault="F16", probability=0.05),
        FaultRule(fault="F18", probability=0.05, count=-1),
    ):
        made.sim.set_fault(rule)


async def start(made: World, bots: int = BOTS) -> None:
    """Bots bound and served by one adapter."""
    nc = await made.nc()
    await made.add_adapter()
    records = [made.sim.add_bot() for _ in range(bots)]
    await asyncio.gather(*(made.bind(nc, f"sb{n:02d}", record) for n, record in enumerate(records)))
    await until(lambda: all(made.sim.polls(r.bot).total for r in records), "every bot is polled")


@pytest.mark.slow
async def test_50_bots_with_faults_at_5_percent(tmp_path: Path) -> None:
    """2,000 messages in, 2,000 commands out: each inbound on its subject once and in order, each command exactly one
    final receipt, each accepted text on the phone once and in order."""
    async with world(tmp_path, cursor_mode="cursor_replay", seed=1) as made:
        await start(made)
        nc = await made.nc()
        set_faults(made)
        await load(made, nc, rounds=ROUNDS, pause_s=0.05, rng=random.Random(1))
        made.sim.clear_faults()
        await made.settle(nc, patience_s=400)
        result = await audit(made, nc)
        await nc.close()
    assert result.faults() == []
    assert sum(result.outcomes.values()) == BOTS * ROUNDS
    assert result.outcomes["accepted"] > BOTS * ROUNDS * 0.9


async def kill_adapter(made: World, rng: random.Random, times: int, pause_s: tuple[float, float]) -> None:
    """At random points of the load."""
    (adapter,) = made.adapters
    for _ in range(times):
        await asyncio.sleep(rng.uniform(*pause_s))
        await adapter.kill()
        await adapter.start()


async def kill_server(made: World, rng: random.Random, away_s: Sequence[float], pause_s: tuple[float, float]) -> None:
    """Likewise; each time it is away for so long."""
    for gone_s in away_s:
        await asyncio.sleep(rng.uniform(*pause_s))
        made.server.kill()
        await asyncio.sleep(gone_s)
        await made.server.start()


async def test_kill_9_of_the_adapter(tmp_path: Path) -> None:
    """The short form of the above, for every run of the tests."""
    rng = random.Random(3)
    async with world(tmp_path, cursor_mode="cursor_replay", seed=3) as made:
        await start(made, bots=20)
        set_faults(made)
        trouble = kill_adapter(made, rng, 3, (0.5, 2.5))
        result = await loaded(made, trouble, rounds=15, pause_s=0.5, rng=rng)
    assert result.faults() == []


async def test_nats_server_killed_and_restarted(tmp_path: Path) -> None:
    rng = random.Random(4)
    async with world(tmp_path, cursor_mode="cursor_replay", seed=4) as made:
        await start(made, bots=20)
        set_faults(made)
        trouble = kill_server(made, rng, (0.0, 1.0, 4.0), (0.5, 2.0))
        result = await loaded(made, trouble, rounds=20, pause_s=0.4, rng=rng)
    assert result.faults() == []


async def test_sigterm_under_load(tmp_path: Path) -> None:
    """SIGTERM drains: exit 0, nothing lost or sent twice, although iLink here never repeats a message, and the next
    adapter need not wait for a lease."""
    rng = random.Random(5)
    async with world(tmp_path, cursor_mode="ack_on_delivery", seed=5) as made:
        await start(made, bots=20)

        async def stop() -> None:
            for _ in range(3):
                await asyncio.sleep(rng.uniform(0.5, 1.5))
                adapter = made.adapters[-1]
                adapter.signal(signal.SIGTERM)
                assert await adapter.ended() == 0
                before = made.sim.stats().polls
                await adapter.start()
                await until(lambda seen=before: made.sim.stats().polls > seen, "it polls again")  # type: ignore[misc]

        result = await loaded(made, stop(), rounds=20, pause_s=0.3, rng=rng)
    assert result.faults() == []
    assert result.outcomes == {"accepted": 400}
