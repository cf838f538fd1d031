"""The runbook's how-tos, done as written: a bus that moves to another NATS, and keys that are rotated."""

from __future__ import annotations

import base64
import secrets
import signal
from pathlib import Path

import pytest

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import Options
from tests import snapshots
from tests.e2e.waiting import eventually, free_port, until
from tests.e2e.world import audit, world

pytestmark = pytest.mark.slow


async def test_a_bus_moves_to_another_nats_with_all_that_waits(tmp_path: Path) -> None:
    """What was parked goes out after the move, what was written meanwhile arrives, and nothing is told twice."""
    async with world(tmp_path, quota=2, hold_ms=500) as made:
        adapter = await made.add_adapter(WECHAT_NATS_SENDS_PER_WINDOW="2")
        nc = await made.nc()
        for number in range(3):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
            made.say(f"s{number}", "before")
        await made.settle(nc)
        for number in range(5):
            await made.command(nc, "s0", f"c{number}")

        async def parked() -> bool:
            return [receipt.outcome for receipt in await made.receipts(nc)].count("parked") == 3

        await eventually(parked, "three wait for the user")
        adapter.signal(signal.SIGTERM)
        assert await adapter.ended() == 0
        await nc.close()

        saved = await snapshots.backup(made.url, tmp_path / "saved")
        assert "WECHAT_OUT" in saved
        made.say("s1", "meanwhile")
        async with EmbeddedNats(tmp_path / "other", free_port()) as other:
            await snapshots.restore(other.url, [tmp_path / "saved" / name for name in saved])
            made.server.kill()
            made.url = other.url
            await made.add_adapter(NATS_URL=other.url, WECHAT_NATS_SENDS_PER_WINDOW="2")
            nc = await made.nc()
            await until(lambda: made.sim.stats().parked == 3, "all are polled again")
            made.say("s0", "go on")
            await made.settle(nc)
            found = await audit(made, nc)
            assert found.faults() == []
            assert found.outcomes == {"accepted": 5}


async def test_keys_are_rotated_without_losing_a_bot(tmp_path: Path) -> None:
    """The old key first, then the new one first; the old one goes when every bot was bound anew."""
    old, new = (base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(2))
    async with world(tmp_path) as made:
        nc = await made.nc()
        bots = {name: made.sim.add_bot() for name in ("s1", "s2")}
        for turn, keys in enumerate((old, f"{old},{new}", f"{new},{old}", new)):
            adapter = await made.add_adapter(WECHAT_NATS_TOKEN_KEY=keys)
            if turn == 0:
                await made.bind(nc, "s1", bots["s1"])
            if turn == 2:  # the new key seals from now on, and s1 is bound anew
                await made.bind(nc, "s2", bots["s2"])
                await made.bind(nc, "s1", bots["s1"], options=Options(auto_typing=True))
            for sandbox in made.bots:
                made.say(sandbox, f"turn {turn}")
                await made.command(nc, sandbox, f"{sandbox}.{turn}")
            await made.settle(nc)
            adapter.signal(signal.SIGTERM)
            assert await adapter.ended() == 0
        found = await audit(made, nc)
        assert found.faults() == []
        assert found.outcomes == {"accepted": 6}
