"""An adapter that is killed at each point of a message's way, and those after it: nothing is lost that iLink or the
inbox has, nothing is told twice, and the order stays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
from nats.aio.client import Client

from tests.e2e.lossy import Loss, Lossy
from tests.e2e.reading import inbox
from tests.e2e.waiting import eventually, until
from tests.e2e.world import World, audit, world

PUBLISH = (b"HPUB wechat.inbox.",)
PUBLISHED = (b"MSG", b'{"stream":"WECHAT_IN"')
RING = (b"HPUB wechat.in.",)
LEASE = (b"HPUB $KV.wechat_leases.", b'"owner"')
RECORD = (b"HPUB $KV.wechat_persons.",)
READ = (b"PUB $JS.API.DIRECT.GET.WECHAT_IN ",)
READ_RECORDS = (b"PUB $JS.API.DIRECT.GET.KV_wechat_persons ",)
FOUND = (b"HMSG", b"Nats-Subject: wechat.inbox.")
MODES = ["cursor_replay", "ack_on_delivery"]
FEWER = ["cursor_replay", pytest.param("ack_on_delivery", marks=pytest.mark.slow)]
"""Where the mode decides little: an inbox has it all."""


class Point(NamedTuple):
    """The first message of the NATS protocol that gets lost, with all behind it, before the adapter is killed."""

    parts: tuple[bytes, ...]
    skip: int
    """So many of its kind pass."""
    said: int = 3
    """Messages of the one answer."""
    stored: int = 3
    """How many of them the inbox has by then."""


POINTS = {
    "before-the-entry": Point(PUBLISH, 0, stored=0),
    "before-its-ack": Point(PUBLISHED, 0),
    "before-the-first-ring": Point(RING, 0),
    "before-the-last-ring": Point(RING, 2),
    "between-two-entries": Point(PUBLISH, 1, said=140, stored=100),
    "before-the-second-ack": Point(PUBLISHED, 1, said=140, stored=140),
}

TAKES = {
    "before-a-partition-is-taken": Point(LEASE, 0),
    "between-partitions-that-are-taken": Point(LEASE, 16),
    "before-the-entries-are-read": Point(READ, 0),
    "within-what-is-read": Point(FOUND, 1),
    "before-the-records-are-read": Point(READ_RECORDS, 0),
    "before-a-record-is-written": Point(RECORD, 0),
    "after-one-record-is-written": Point(RECORD, 1),
}


def lose(lossy: Lossy, point: Point) -> Loss:
    return lossy.lose(*point.parts, skip=point.skip, is_last=True)


async def inbox_texts(nc: Client, sandbox: str) -> list[str]:
    return [message.text for message in await inbox(nc, sandbox)]


async def faultless(made: World, nc: Client, *, accepted: int) -> None:
    """Each message once and in order, and each answer sent once."""
    await made.settle(nc)
    found = await audit(made, nc)
    assert found.faults() == []
    assert found.outcomes == {"accepted": accepted}


@pytest.mark.parametrize("mode", MODES)
async def test_a_crash_before_the_answer_costs_nothing(tmp_path: Path, mode: str) -> None:
    async with world(tmp_path, cursor_mode=mode) as made:
        nc, _ = await made.begun()
        await until(lambda: made.sim.stats().parked == 1, "the poll is out")
        await made.adapters[0].kill()
        for text in ("one", "two"):
            made.say("s1", text)
        await made.adapters[0].start()
        await made.command(nc, "s1", "c1")
        await faultless(made, nc, accepted=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_at_each_point_loses_and_doubles_nothing(tmp_path: Path, point: str, mode: str) -> None:
    """Where iLink gives nothing again, what is not in the inbox by then is lost; what is there opens the window."""
    where = POINTS[point]
    texts = [f"text {number}" for number in range(where.said)]
    async with world(tmp_path, cursor_mode=mode) as made, Lossy(made.url) as lossy:
        adapter = await made.add_adapter(NATS_URL=lossy.url)
        nc, bot = await made.nc(), made.sim.add_bot()
        loss = lose(lossy, where)
        made.bots["s1"] = bot
        for text in texts:  # one answer
            made.say("s1", text)
        binding = asyncio.create_task(made.bind(nc, "s1", bot))  # its answer may get lost
        await until(lambda: loss.has_happened, "it is there")
        await adapter.kill()

        if mode == "ack_on_delivery":
            texts = texts[: where.stored]  # nobody has the others
            made.said["s1"] = [*texts]
        await made.add_adapter()
        await binding

        async def are_stored() -> bool:
            return len(await inbox_texts(nc, "s1")) >= len(made.said["s1"])

        # a command that comes first may be parked, and the user writes on
        await eventually(are_stored, "what can be had is in the inbox")
        if texts:
            await made.command(nc, "s1", "before another message")
            await made.settle(nc)
            assert await inbox_texts(nc, "s1") == texts
        made.say("s1", "the last one")
        await eventually(are_stored, "it is in the inbox")
        await made.command(nc, "s1", "at the end")
        await faultless(made, nc, accepted=len(made.sent["s1"]))
        assert await inbox_texts(nc, "s1") == [*texts, "the last one"]


@pytest.mark.parametrize("mode", FEWER)
@pytest.mark.parametrize("point", TAKES)
async def test_a_crash_at_each_point_of_a_take_over_loses_and_doubles_nothing(
    tmp_path: Path, point: str, mode: str
) -> None:
    """The second adapter is killed as it takes the persons of the first one, and as it sends for them."""
    async with world(tmp_path, cursor_mode=mode) as made, Lossy(made.url) as lossy:
        first = await made.add_adapter()
        nc = await made.nc()
        for sandbox in ("s1", "s2"):
            await made.bind(nc, sandbox, made.sim.add_bot())
        for number in range(3):
            for sandbox in ("s1", "s2"):
                made.say(sandbox, f"text {number}")
        await made.settle(nc)
        await first.kill()

        for sandbox in ("s1", "s2"):
            await made.command(nc, sandbox, f"{sandbox}.c1")
        loss = lose(lossy, TAKES[point])
        second = await made.add_adapter(NATS_URL=lossy.url)
        await until(lambda: loss.has_happened, "it is there")
        await second.kill()

        await made.add_adapter()
        await made.settle(nc)
        assert [await inbox_texts(nc, sandbox) for sandbox in ("s1", "s2")] == [["text 0", "text 1", "text 2"]] * 2
        for sandbox in ("s1", "s2"):
            made.say(sandbox, "the last one")
        await faultless(made, nc, accepted=2)
