"""Records of users whom nobody serves go in time, and those of a later version are left alone."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from adapter.contract.names import conversation_key
from adapter.contract.records import UNBOUND_S
from adapter.outbound.record import SentText
from tests.fakes import Bench
from tests.newer import made_newer
from tests.outbound.shards import BOT, USER, outcomes, ready, user_writes

VIRTUAL_TIME = True

KEY = conversation_key("s1", USER)
AGAIN = "b2@im.bot"


def ends_in(bench: Bench) -> int:
    """Seconds after which the record goes; 0: it stays."""
    assert bench.record().token == "AARz"
    return bench.conversation_bucket.ttls.get(KEY, 0)


async def evict(bench: Bench) -> None:
    """Nothing of any conversation is in memory."""
    (shard,) = bench.shards.values()
    for _ in range(2):
        shard.evict_idle()
        await asyncio.sleep(1)
    assert list(shard) == []


async def test_a_conversation_without_work_leaves_memory_while_its_window_is_open() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    await evict(bench)
    assert bench.record().window.opened_ms
    shard.on_delivery(bench.command("again", id="c2"))
    await asyncio.sleep(10)
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "accepted", "")]


@pytest.mark.parametrize("in_memory", [True, False])
async def test_the_record_of_an_unbound_user_goes_in_time_unless_a_bot_serves_them_again(*, in_memory: bool) -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(25 * 3600)  # the window has closed, and the next one opens unseen
    bench.hears(sends_used=3)
    if in_memory:
        await shard.conversation("s1", USER)
    else:
        await evict(bench)
    await bench.close()
    await bench.bindings.remove(BOT)
    assert ends_in(bench) == UNBOUND_S
    assert bench.record().unserved
    if not in_memory:
        await evict(bench)
    await bench.bind(bot=AGAIN)
    await user_writes(bench, bot=AGAIN)
    await asyncio.sleep(1)
    assert ends_in(bench) == 0
    assert not bench.record().unserved


async def test_a_bot_that_moves_leaves_a_record_that_goes_in_time() -> None:
    bench, _ = await ready()
    await bench.close()
    await bench.bind(sandbox="s2")
    assert ends_in(bench) == UNBOUND_S


@pytest.mark.parametrize("change", ["replaced", "token", "lost", "unknown"])
async def test_the_record_of_a_user_who_is_served_stays(change: str) -> None:
    bench, shard = await ready()
    match change:
        case "replaced":
            await bench.bind(bot=AGAIN)
            await bench.bindings.remove(BOT)
        case "token":
            await bench.bind(token="another")
        case "lost":
            await bench.bind(state="needs_login")
        case _:
            await bench.bind(bot=AGAIN, user="")
            await bench.bindings.remove(AGAIN)
    await asyncio.sleep(1)
    assert ends_in(bench) == 0
    await user_writes(bench, bot=bench.bindings.of_sandbox("s1")[0].bot)
    assert ends_in(bench) == 0
    assert len(bench.conversation_bucket.entries) == 1
    shard.stop()


async def test_what_is_stored_of_an_unbound_user_later_goes_in_time_too() -> None:
    """The answer to what was out as they were unbound."""
    bench, shard = await ready()
    bench.chat.took_s = 20.0
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    await bench.bindings.remove(BOT)
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "accepted", "")]
    await evict(bench)
    assert [ref.id for ref in bench.record().recent] == ["c1"]
    assert ends_in(bench) == UNBOUND_S


async def test_a_binding_is_closed_once_nothing_of_its_user_is_in_flight() -> None:
    """Or an erasure would leave the receipt and the record that come later."""
    bench, shard = await ready()
    bench.chat.took_s = 20.0
    for ident in ("c1", "c2"):
        shard.on_delivery(bench.command("hi", id=ident))
    await asyncio.sleep(5)
    began = bench.clock.monotonic()
    await bench.close()
    assert 14 < bench.clock.monotonic() - began < 18
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "refused", "not_bound")]
    assert [ref.id for ref in bench.record().recent] == ["c1"]
    shard.on_delivery(bench.command("hi", id="c3"))
    await asyncio.sleep(1)
    assert outcomes(bench)[2:] == [("c3", "refused", "not_bound")]


async def test_a_record_that_was_erased_is_not_written_again_from_memory() -> None:
    bench, shard = await ready()
    key = conversation_key("s1", USER)
    await shard.conversation("s1", USER)
    await bench.close()
    bench.conversation_bucket.put(key, None)
    await bench.bindings.remove(BOT)
    await evict(bench)
    assert bench.conversation_bucket.entries[key].value is None


async def test_what_was_erased_does_not_come_back_with_the_persons_next_message() -> None:
    """Their last message was cut as it was told: the conversation stayed in memory."""
    bench, shard = await ready()
    bench.hears(sent=[SentText(id="1", kind="text", text="your secret")])
    await shard.conversation("s1", USER)
    await bench.wrote("in:2")
    await bench.close()
    bench.conversation_bucket.put(KEY, None)
    await bench.bindings.remove(BOT)
    await evict(bench)
    await bench.bind()
    await bench.wrote("in:3")
    await asyncio.sleep(5)
    assert bench.record().window.id == "in:3"
    assert bench.record().sent == []


@pytest.mark.parametrize("fields", [{}, {"window": "of another form"}], ids=["with more in it", "of another form"])
async def test_a_record_of_a_newer_version_holds_its_own_user_only(fields: dict[str, object]) -> None:
    """In the middle of an upgrade: a newer replica has handed its shard to this one."""
    bench, shard = await ready()
    (entry,) = bench.conversation_bucket.entries.values()
    text = made_newer(entry.value or b"", **fields)
    bench.conversation_bucket.put(KEY, text)
    await bench.bind(bot=AGAIN, user="u2@im.wechat")
    bench.hears(user="u2@im.wechat", bot=AGAIN)
    with capture_logs() as logs:
        shard.on_delivery(bench.command("waits", id="c1", user=USER))
        shard.on_delivery(bench.command("waits behind it", id="c2", bot=BOT))
        shard.on_delivery(bench.command("goes on", id="c3", user="u2@im.wechat"))
        writing = asyncio.create_task(user_writes(bench))
        await bench.bind(token="another")
        await asyncio.sleep(60)
    assert bench.chat.texts == ["goes on"]
    assert bench.conversation_bucket.entries[KEY].value == text
    said = [(line["event"], line["sandbox"]) for line in logs if line["log_level"] in ("warning", "error")]
    assert said == [("record.too_new", "s1")]
    assert type(writing.exception()).__name__ == "RecordTooNew"  # its poller tries again

    bench.hears()  # as if the newer replica had gone back
    await asyncio.sleep(60)
    assert bench.chat.texts == ["goes on", "waits", "waits behind it"]


async def test_a_record_whose_key_is_gone_costs_the_window_and_not_the_message() -> None:
    """An operator took the old key away too early."""
    bench, _ = await ready()
    successor = Bench(bench, incarnation="me-2", token_key=(bytes(range(32)),))
    await successor.bind()
    with capture_logs() as logs:
        successor.shard().on_delivery(successor.command("hi", id="c1"))
        await asyncio.sleep(60)
        assert outcomes(successor) == [("c1", "parked", "window_closed")]
        await user_writes(successor)
        await asyncio.sleep(60)
    assert outcomes(successor) == [("c1", "parked", "window_closed"), ("c1", "accepted", "")]
    assert successor.record().window.opened_ms, "sealed with the key that is there"
    assert [line["event"] for line in logs].count("conversation.unopenable") == 1
