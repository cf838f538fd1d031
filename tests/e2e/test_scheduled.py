"""Commands with a time, and what takes one back, on real parts and through the death of their owner."""

from __future__ import annotations

import time
from pathlib import Path

from tests.e2e.test_waits import is_empty, put, started
from tests.e2e.world import eventually, until


async def test_a_command_is_sent_at_its_time_although_its_owner_dies(tmp_path: Path) -> None:
    async with started(tmp_path) as (made, nc, log):
        bot = made.bots["s1"] = made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        made.say("s1", "hello")
        due_ms = int(time.time() * 1000) + 12_000
        await put(nc, "later", send_at_ms=due_ms)
        await put(nc, "never", send_at_ms=due_ms)
        await put(nc, "now")
        assert [receipt.outcome for receipt in await log.end("now")] == ["accepted"]
        await until(lambda: {"later", "never"} <= log.received.keys(), "both are told of")
        assert {(one.outcome, one.reason) for one in (*log.received["later"], *log.received["never"])} == {
            ("parked", "scheduled")
        }
        await made.adapters[0].kill()
        await put(nc, "x", text=None, cancel="never")
        await made.add_adapter()
        never, cancel, later = await log.end("never", "x", "later")
        assert (never.outcome, never.reason, cancel.outcome) == ("refused", "cancelled", "applied")
        assert (later.outcome, later.at_ms >= due_ms) == ("accepted", True)
        assert made.phone_texts("s1") == ["answer now", "answer later"]
        assert len(log.received["later"]) == 2
        await eventually(lambda: is_empty(nc), "all are acknowledged")
        await nc.close()
