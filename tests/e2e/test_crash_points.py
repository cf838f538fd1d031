"""An adapter that is killed at each point of a message's way, and the one after it: nothing is lost that iLink or the
journal has, and nothing is told twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.e2e.lossy import Lossy
from tests.e2e.waiting import until
from tests.e2e.world import NAMES, stream, world

STORED = b"MSG"
POINTS = {
    "before-the-record": ((b"HPUB wechat.journal.",), 1),  # the first one takes the bot
    "record-stored": ((STORED, b'{"stream":"WECHAT_JOURNAL"'), 1),
    "part-of-the-inbox": ((b"HPUB wechat.inbox.",), 1),
    "all-of-the-inbox": ((STORED, b'{"stream":"WECHAT_IN"'), 2),
    "conversation-saved": ((STORED, b'{"stream":"KV_wechat_conversations"'), 0),
}
"""What is the last thing that passes, or just does not, and of how many of its kind."""
TEXTS = ["one", "two", "three"]


@pytest.mark.parametrize("mode", ["cursor_replay", "ack_on_delivery"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_each_point_loses_and_doubles_nothing(tmp_path: Path, point: str, mode: str) -> None:
    async with world(tmp_path, cursor_mode=mode) as made, Lossy(made.url) as lossy:
        adapter = await made.add_adapter(NATS_URL=lossy.url)
        nc, bot = await made.nc(), made.sim.add_bot()
        parts, skip = POINTS[point]
        loss = lossy.lose(*parts, skip=skip, is_last=True)
        made.bots["s1"] = bot
        for text in TEXTS:  # one answer
            made.say("s1", text)
        binding = asyncio.create_task(made.bind(nc, "s1", bot))  # its answer may get lost
        await until(lambda: loss.has_happened, "it is there")
        await adapter.kill()

        await made.add_adapter()
        await binding
        made.say("s1", "four")
        is_lost = point == "before-the-record" and mode == "ack_on_delivery"  # nobody has it
        await made.settle(nc, lossy=is_lost)
        told = [json.loads(body)["text"] for _, body in await stream(nc, NAMES.stream_in, NAMES.inbox("s1"))]
        assert told == [*([] if is_lost else TEXTS), "four"]
