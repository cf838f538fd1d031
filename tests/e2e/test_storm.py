"""Every fault of the protocol that can strike polls and sends, by chance and together, while adapters die."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from adapter.simulator import FaultRule
from tests.e2e.test_load import start
from tests.e2e.world import loaded, world

STORM = (
    FaultRule(fault="F1", probability=0.03),
    FaultRule(fault="F2", endpoint="getupdates", probability=0.02, params={"after_ms": 50}),
    FaultRule(fault="F3", endpoint="getupdates", probability=0.02),
    FaultRule(fault="F3", endpoint="sendmessage", probability=0.01, params={"kind": "truncated", "processed": True}),
    FaultRule(fault="F3", endpoint="sendmessage", probability=0.01, params={"kind": "html"}),
    FaultRule(fault="F4", probability=0.02, params={"chunk": 20, "pause_ms": 20}),
    FaultRule(fault="F5", endpoint="sendmessage", probability=0.005, params={"hang_ms": 1500}),
    FaultRule(fault="F6", probability=0.01, params={"when": "before"}),
    FaultRule(fault="F6", probability=0.01, params={"when": "after"}),
    FaultRule(fault="F8", probability=0.005, count=10),
    FaultRule(fault="F10", probability=0.005, count=5),
    FaultRule(fault="F11", probability=0.005, count=20, params={"errmsgs": ["prepare failed", "rate limited", None]}),
    FaultRule(fault="F13", probability=0.01, params={"shown": True}),
    FaultRule(fault="F16", probability=0.02),
    FaultRule(fault="F16", probability=0.02, params={"change": "message_id"}),
    FaultRule(fault="F16", probability=0.02, params={"change": "empty_message_id"}),
    FaultRule(fault="F16", probability=0.02, params={"change": "context_token"}),
    FaultRule(fault="F18", probability=0.03, count=-1, params={"last": 3}),
    FaultRule(fault="F19", probability=0.02, params={"cursor": "empty"}),
    FaultRule(fault="F19", probability=0.02, params={"cursor": "absent"}),
    FaultRule(fault="F21", probability=0.05, params={"hint": "soon"}),
    FaultRule(fault="F21", probability=0.05, params={"hint": -5}),
)

NEW_IDS = FaultRule(fault="F16", probability=0.02, params={"change": "ids", "delay_s": 0.5})
MIXED_TIMES = FaultRule(fault="F20", probability=0.05)
"""Not together: a copy with new ids and the time of another message is what a user who repeats himself looks like."""


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "last"), [(11, NEW_IDS), (12, MIXED_TIMES)], ids=["new_ids", "mixed_times"])
async def test_a_storm_of_faults_and_kills(tmp_path: Path, seed: int, last: FaultRule) -> None:
    """Nothing lost, nothing twice, each command one final receipt, each accepted text shown once and in order."""
    rng = random.Random(seed)
    faster = {"WECHAT_NATS_SEND_TIMEOUT_S": "1"}
    async with world(tmp_path, environ=faster, cursor_mode="cursor_replay", seed=seed) as made:
        await start(made, bots=30)
        await made.add_adapter()
        for rule in (*STORM, last):
            made.sim.set_fault(rule)

        async def kill() -> None:
            for _ in range(5):
                await asyncio.sleep(rng.uniform(2.0, 5.0))
                victim = rng.choice(made.adapters)
                await victim.kill()
                await victim.start()

        result = await loaded(made, kill(), rounds=30, pause_s=0.8, rng=rng)
    assert result.faults() == []
    assert sum(result.outcomes.values()) == 30 * 30
