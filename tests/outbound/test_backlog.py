"""Shares of a shard: who is taken in hand, who waits on the bus, and in which order they come back."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from adapter.contract.names import H_MSG_ID, shard_of
from adapter.outbound.backlog import MAX_HELD, SHARE, SHARE_BYTES, Backlog
from adapter.outbound.processor import ShardCommandProcessor
from adapter.outbound.reading import MISSING_CONFIRM_S
from tests.fakes import Bench, FakeDelivery, settle

VIRTUAL_TIME = True

OTHER = next(name for name in (f"s{number}" for number in range(2, 10_000)) if shard_of(name) == shard_of("s1"))
"""Shares the shard of s1."""


def delivery(seq: int, *, sandbox: str = "s1", size: int = 10, **fields: Any) -> FakeDelivery:
    return FakeDelivery(f"wechat.out.1.{sandbox}", b"x" * size, seq=seq, time_ms=seq, **fields)


def full(backlog: Backlog, sandbox: str = "s1", *, first: int = 1) -> None:
    for seq in range(first, first + SHARE):
        assert backlog.admit(delivery(seq, sandbox=sandbox))


def crowded() -> Backlog:
    """Another sandbox has all the room that is no share of others."""
    backlog = Backlog()
    for seq in range(50_000, 50_000 + MAX_HELD):
        assert backlog.admit(delivery(seq, sandbox="crowd"))
    return backlog


def test_a_sandbox_gets_its_share_whatever_another_one_has_sent() -> None:
    backlog = crowded()
    assert not backlog.admit(delivery(60_000, sandbox="crowd"))
    full(backlog)
    assert not backlog.admit(delivery(100))
    full(backlog, "s2", first=200)
    assert not backlog.admit(delivery(300, sandbox="s2"))
    assert backlog.waiting == 3
    assert backlog.oldest_ms() == 100


def test_a_share_is_also_one_of_bytes_and_one_command_always_fits() -> None:
    backlog = crowded()
    assert backlog.admit(delivery(1, size=10 * SHARE_BYTES))
    assert not backlog.admit(delivery(2, size=1))
    assert backlog.settle(1) == "wechat.out.1.s1"
    assert backlog.next("wechat.out.1.s1") == 2


def test_what_came_behind_one_that_waits_waits_too() -> None:
    backlog = crowded()
    full(backlog)
    assert not backlog.admit(delivery(20))
    backlog.settle(1)
    assert not backlog.admit(delivery(21))
    assert backlog.next("wechat.out.1.s1") == 20


def test_what_waits_keeps_no_data_and_gets_it_back() -> None:
    backlog = crowded()
    full(backlog)
    left = delivery(20, headers={"a": "b"})
    backlog.admit(left)
    assert (left.data, left.headers) == (b"", {})
    taken = backlog.reload(left.subject, 20, b"data", {"a": "b"})
    assert taken is left
    assert (left.data, left.headers, backlog.waiting) == (b"data", {"a": "b"}, 0)
    assert backlog.reload(left.subject, 20, b"data", {}) is None


def test_one_that_waits_and_comes_again_is_acked_by_its_newest_delivery() -> None:
    backlog = crowded()
    full(backlog)
    backlog.admit(delivery(20))
    again = [delivery(seq, redelivered=True) for seq in (20, 21)]
    assert [backlog.renew(one) for one in again] == [True, False]
    assert backlog.reload(again[0].subject, 20, b"", {}) is again[0]


def test_reading_back_begins_when_half_the_room_is_free() -> None:
    backlog = Backlog()
    full(backlog, "s2", first=10_000)
    taken = [seq for seq in range(1, 1000) if backlog.admit(delivery(seq))]
    assert len(taken) == MAX_HELD - SHARE
    assert backlog.next("wechat.out.1.s1") is None
    full(backlog, "s3", first=20_000)  # whose share is there all the same
    wants = [seq for seq in taken if backlog.settle(seq)]
    assert wants[0] == MAX_HELD // 2 + SHARE  # single ones are not worth it
    assert backlog.next("wechat.out.1.s1") == taken[-1] + 1


def test_what_the_stream_has_no_more_is_forgotten() -> None:
    backlog = crowded()
    full(backlog)
    for seq in (20, 21, 22, 23):
        backlog.admit(delivery(seq))
    gone = backlog.missing("wechat.out.1.s1", {21}, 22)
    assert gone == [20, 22]
    backlog.forget("wechat.out.1.s1", gone)
    assert backlog.waiting == 2


# in a shard ----------------------------------------------------------------------------------------------


async def two_users(**changes: Any) -> tuple[Bench, ShardCommandProcessor]:
    bench = Bench()
    for number, sandbox in ((1, "s1"), (2, OTHER)):
        await bench.bind(bot=f"b{number}@im.bot", user=f"u{number}@im.wechat", sandbox=sandbox)
        bench.hears(sandbox, f"u{number}@im.wechat", bot=f"b{number}@im.bot")
    return bench, bench.processor(**changes)


async def test_a_user_whose_sends_hang_leaves_room_for_the_others() -> None:
    bench, shard = await two_users()
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    for number in range(2000):
        shard.intake.on_delivery(bench.command(f"t{number}"))
    shard.intake.on_delivery(bench.command("hi", sandbox=OTHER))
    await asyncio.sleep(5)
    assert "hi" in bench.chat.texts
    assert sum(bool(one.parts) for actor in shard for one in actor.state.queue) <= MAX_HELD + SHARE
    shard.stop()


@pytest.mark.parametrize("queued", [SHARE, MAX_HELD // 2 + 100])
async def test_a_user_whose_sends_hang_leaves_room_for_others_of_the_same_sandbox(queued: int) -> None:
    bench, shard = await two_users()
    await bench.bind(bot="b3@im.bot", user="u3@im.wechat")
    bench.hears("s1", "u3@im.wechat", bot="b3@im.bot")
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    for number in range(queued):
        shard.intake.on_delivery(bench.command(f"t{number}", user="u1@im.wechat"))
    await asyncio.sleep(5)
    shard.intake.on_delivery(bench.command("hi", user="u3@im.wechat"))
    await asyncio.sleep(5)
    assert "hi" in bench.chat.texts
    shard.stop()


async def test_all_of_a_flood_is_worked_off_in_order_also_while_the_bus_stumbles() -> None:
    bench, shard = await two_users()
    for number in range(1000):
        shard.intake.on_delivery(bench.command(f"t{number}", headers={H_MSG_ID: f"c{number}"}))
        if number % 300 == 0:
            bench.bus.unreadable = 2
    await asyncio.sleep(600)
    told = [receipt.command for receipt in bench.bus.receipts()]
    assert told == [f"c{number}" for number in range(1000)]  # ten accepted, the others parked
    assert bench.chat.texts == [f"t{number}" for number in range(10)]


async def test_commands_that_an_operator_purged_are_not_waited_for() -> None:
    bench, shard = await two_users()
    bench.chat.took_s = 1.0
    deliveries = [bench.command(f"t{number}") for number in range(MAX_HELD + 10)]
    for one in deliveries:
        shard.intake.on_delivery(one)
    purged = {one.seq for one in deliveries[MAX_HELD : MAX_HELD + 5]}
    bench.bus.kept = [kept for kept in bench.bus.kept if kept.stored.seq not in purged]
    await asyncio.sleep(600)
    assert len(bench.bus.receipts()) == MAX_HELD + 5
    assert shard.queue_depths(Counter()) == (0, None)


async def test_a_command_that_the_bus_does_not_show_for_a_moment_is_not_overtaken() -> None:
    """As a cluster may do that is losing its leaders."""
    bench, shard = await two_users()
    bench.chat.took_s = 0.1
    deliveries = [bench.command(f"t{number}", headers={H_MSG_ID: f"c{number}"}) for number in range(MAX_HELD + 10)]
    for one in deliveries:
        shard.intake.on_delivery(one)
    (late,) = [kept for kept in bench.bus.kept if kept.stored.seq == deliveries[MAX_HELD].seq]
    place = bench.bus.kept.index(late)
    bench.bus.kept.remove(late)
    await asyncio.sleep(MISSING_CONFIRM_S / 2)
    bench.bus.kept.insert(place, late)
    await asyncio.sleep(600)
    assert [receipt.command for receipt in bench.bus.receipts()] == [f"c{number}" for number in range(MAX_HELD + 10)]


async def test_commands_that_cannot_be_read_are_told_also_when_they_had_to_wait() -> None:
    bench, shard = await two_users()
    for number in range(200):
        shard.intake.on_delivery(bench.command(data=b"nonsense", headers={H_MSG_ID: f"c{number}"}))
    await asyncio.sleep(60)
    assert sorted(receipt.command for receipt in bench.bus.receipts()) == sorted(f"c{n}" for n in range(200))


async def test_stopping_leaves_what_waits_to_the_next_owner() -> None:
    bench, shard = await two_users()
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    for number in range(1000):
        shard.intake.on_delivery(bench.command(f"t{number}"))
    await settle()
    bench.chat.hold_sends["u1@im.wechat"].set()
    await shard.drain(5.0)
    assert len(bench.bus.receipts()) <= 1
    assert shard.tasks == 0
