"""The record of a bot and a user: one copy here, and another hand that may write it, too."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from adapter import window
from adapter.names import peer_key
from adapter.records import Context, Hand
from tests.fakes import Bench

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
KEY = peer_key(BOT, USER)
HAND = Hand(command="c", client="out-1", sandbox="s1", tried=1)


def writes(bench: Bench, context: Context) -> None:
    """What another replica stores."""
    bench.contexts_bucket.put(KEY, msgspec.json.encode(context))


async def test_what_has_ended_here_does_not_come_back_with_what_another_writes() -> None:
    bench = Bench()
    await bench.bind()
    peer = await bench.contexts.peer(BOT, USER)
    await bench.contexts.save(peer, lambda context: replace(context, hand=HAND))
    writes(bench, replace(peer.context, inbound_id="in:2"))
    peer.context = window.settled(peer.context, HAND.client, sent=True)
    await bench.contexts.save(peer, lambda context: replace(context, used=5))
    assert peer.context == bench.context() == Context(inbound_id="in:2", used=5, done=["s1/c"])


async def test_what_is_in_use_when_another_takes_the_bot_is_read_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    peer = await bench.contexts.peer(BOT, USER)
    async with peer.sending:
        bench.contexts.forget(BOT)
    writes(bench, Context(inbound_id="in:2"))
    reads, get = 0, bench.contexts_bucket.get

    async def counted(key: str) -> Any:
        nonlocal reads
        reads += 1
        return await get(key)

    monkeypatch.setattr(bench.contexts_bucket, "get", counted)
    for _ in range(3):
        assert await bench.contexts.peer(BOT, USER) is peer
    assert (peer.context.inbound_id, reads) == ("in:2", 1)


async def test_what_is_not_in_use_when_another_takes_the_bot_is_forgotten() -> None:
    bench = Bench()
    await bench.contexts.peer(BOT, USER)
    bench.contexts.forget(BOT)
    assert bench.contexts.loaded(BOT, USER) is None
