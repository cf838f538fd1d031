"""A sandbox that gets another person, and shall have nothing of the one before: purged, or started afresh."""

from __future__ import annotations

from pathlib import Path

from adapter.contract.messages import Options
from tests.e2e.test_persons import begun, delivered, outcome, replayed, says, unbind
from tests.e2e.world import NAMES, eventually, stream, world

FRESH = Options(durable=True, fresh=True)


async def test_an_unbind_that_purges_leaves_no_message_and_no_command(tmp_path: Path) -> None:
    async with world(tmp_path, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "1"}) as made:
        nc, _ = await begun(made)
        await says(made, nc, "of the first one")
        assert (await outcome(made, nc, "sent")).outcome == "accepted"
        assert (await outcome(made, nc, "waits")).outcome == "parked"
        await unbind(made, nc, purge=True)
        made.said.clear()  # nobody is to wait for it
        assert await stream(nc, NAMES.stream_in, NAMES.inbox("*")) == []
        assert await replayed(nc, former=True) == []

        async def no_command_waits() -> bool:
            return await stream(nc, NAMES.stream_out, f"{NAMES.out_plain}.>") == []

        await eventually(no_command_waits, "what waited has ended")
        assert [(one.outcome, one.reason) for one in await made.receipts(nc)][-1] == ("refused", "not_bound")
        assert (await made.bind(nc, "s1", made.sim.add_bot(), options=Options(durable=True))).ok
        await says(made, nc, "of the second one")
        assert await replayed(nc, former=True) == await delivered(nc) == ["of the second one"]


async def test_a_fresh_sandbox_has_nothing_of_the_person_before(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, _ = await begun(made)
        await says(made, nc, "of the first one")
        await unbind(made, nc)
        assert await replayed(nc, former=True) == ["of the first one"]
        assert (await made.bind(nc, "s1", made.sim.add_bot(), options=FRESH)).ok
        assert await stream(nc, NAMES.stream_in, NAMES.inbox("*")) == []
        made.said.clear()
        await says(made, nc, "of the second one")
        assert await replayed(nc, former=True) == await delivered(nc) == ["of the second one"]
