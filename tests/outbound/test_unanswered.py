"""A request without an answer: repeated once, with the same client_id, and not before iLink may take it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest

from adapter.outbound.shard import Shard
from tests.fakes import Bench
from tests.outbound.shards import FIRST, TIMEOUT, USER, finals, ready, user_writes
from tests.outbound.test_sequences import next_owner

VIRTUAL_TIME = True

OTHER_BOT, OTHER = "b2@im.bot", "u2@im.wechat"


async def silent(*, base_url: str = "", **fields: Any) -> tuple[Bench, Shard]:
    """A user whose request has had no answer right now, and another one. `base_url`: of the other's bot."""
    bench, shard = await ready()
    await bench.bind(bot=OTHER_BOT, user=OTHER, base_url=base_url)
    bench.hears(user=OTHER, bot=OTHER_BOT)
    bench.chat.sends_to[USER] = deque([TIMEOUT])
    shard.on_delivery(bench.command("hi", id="c1", user=USER, **fields))
    await asyncio.sleep(1)
    return bench, shard


async def another_is_sent(bench: Bench, shard: Shard) -> None:
    shard.on_delivery(bench.command("for another", user=OTHER))
    await asyncio.sleep(1)


def posted_at(bench: Bench) -> list[int]:
    """Seconds of the requests of the first user, from the first one."""
    at = [sent.at_s for sent in bench.chat.sent if sent.user == USER]
    return [round(each - at[0]) for each in at]


async def test_it_is_repeated_after_five_minutes_under_the_same_client_id() -> None:
    bench, _ = await silent()
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]
    assert len({sent.client_id for sent in bench.chat.sent}) == 1
    assert [(one.command, one.outcome, one.attempts) for one in finals(bench)] == [("c1", "accepted", 2)]


@pytest.mark.parametrize(("after_s", "repeated_s"), [(10, 60), (100, 101)], ids=["soon", "later than a minute"])
async def test_it_is_repeated_once_ilink_has_accepted_anybodys_but_not_within_a_minute(
    after_s: int, repeated_s: int
) -> None:
    bench, shard = await silent()
    await asyncio.sleep(after_s)
    await another_is_sent(bench, shard)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, repeated_s]


async def test_what_was_accepted_before_says_nothing_of_ilink_now() -> None:
    bench, shard = await silent()
    await asyncio.sleep(400)
    bench.chat.sends_to[USER] = deque([TIMEOUT])
    await another_is_sent(bench, shard)
    shard.on_delivery(bench.command("again", user=USER))
    await asyncio.sleep(400)
    assert posted_at(bench)[2:] == [402, 702]


async def test_what_another_ilink_accepts_says_nothing_of_this_one() -> None:
    bench, shard = await silent(base_url="https://other.weixin.qq.com")
    await another_is_sent(bench, shard)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]


async def test_a_message_of_the_user_does_not_hasten_it() -> None:
    bench, _ = await silent()
    await asyncio.sleep(10)
    await user_writes(bench)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]
    assert bench.record().window.sends_used == 1, "it may be the first request that this window counts"


async def test_the_next_owner_repeats_at_once_what_was_out_as_the_former_one_died() -> None:
    """Nothing says that iLink is away."""
    bench, shard = await ready()
    hold = bench.chat.hold_sends[USER] = asyncio.Event()
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(1)
    hold.set()
    bench.chat.hold_sends.clear()
    bench.chat.sends.append(FIRST)
    next_owner(bench, shard)
    await asyncio.sleep(5)
    assert posted_at(bench) == [0, 1]
    assert [(one.outcome, one.attempts) for one in finals(bench)] == [("accepted", 2)]


async def test_the_next_owner_waits_where_ilink_gave_the_former_one_no_answer() -> None:
    bench, shard = await silent()
    await asyncio.sleep(99)
    next_owner(bench, shard)
    await asyncio.sleep(400)
    assert posted_at(bench) == [0, 300]
