"""Courses of events that take several owners, or days: each was found to be hard by a reader of the design."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from adapter.bridge.partition import Partition
from adapter.errors import Refused, Temporary
from adapter.ports import Accepted, BucketEntry
from tests.fakes import Bench, FakeDelivery
from tests.outbound.partitions import (
    BOT,
    FIRST,
    THREE,
    THROTTLED,
    TIMEOUT,
    USER,
    finals,
    outcomes,
    parked,
    ready,
    user_writes,
)
from tests.outbound.test_router import as_delivered, plain, route, router

VIRTUAL_TIME = True

DAYS_4_S = 4 * 86_400


def next_owner(
    bench: Bench, partition: Partition, *, deliver: bool = True, **changes: Any
) -> tuple[Bench, Partition]:
    """Another replica owns the partition: what was not acknowledged comes again, if it is to `deliver` that."""
    bench.leases.owned.clear()
    partition.stop()
    bench.bus.forget_ids()
    successor = Bench(bench, instance="next-1")
    second = successor.partition(**changes)
    if deliver:
        bench.redeliver(second)
    return successor, second


async def test_an_id_is_free_again_once_enough_others_were_sent() -> None:
    bench, partition = await ready(sends=0)
    for number in (0, *range(40), 0):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
        await asyncio.sleep(5)
    assert bench.chat.texts == [f"t{number}" for number in (*range(40), 0)]
    repeated = [(one.sequence, one.repeat_of) for one in finals(bench) if one.command == "c0"]
    assert repeated == [(1, 0), (2, 1), (42, 0)]
    assert Counter(one.sequence for one in finals(bench)) == Counter(range(1, 43))


async def test_two_users_with_one_id_have_a_receipt_each_also_after_a_take_over() -> None:
    bench, partition = await ready(is_open=False)
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    for number in (1, 2):
        partition.on_delivery(bench.command(f"for {number}", id="same", user=f"u{number}@im.wechat"))
    await asyncio.sleep(5)
    successor, _second = next_owner(bench, partition)
    await asyncio.sleep(5)
    await user_writes(successor, bot="b2@im.bot", user="u2@im.wechat")
    await asyncio.sleep(5)
    await user_writes(successor)
    await asyncio.sleep(5)
    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [("u2@im.wechat", "for 2"), (USER, "for 1")]
    assert [(one.user, one.outcome) for one in finals(bench)] == [("u2@im.wechat", "accepted"), (USER, "accepted")]
    assert len(bench.bus.receipts()) == 4


async def test_a_parked_receipt_of_a_frozen_owner_keeps_no_final_one_away() -> None:
    """It was about to be stored when the owner was stopped, and is stored under the eyes of the next one."""
    bench, partition = await ready(is_open=False)
    frozen = asyncio.Event()

    async def freeze(*_: object) -> None:
        bench.bus.on_publish = None
        await frozen.wait()

    bench.bus.on_publish = freeze
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=60))
    await asyncio.sleep(5)
    successor = Bench(bench, instance="next-1")
    second = successor.partition()

    async def thaw(*_: object) -> None:
        bench.bus.on_publish = None
        frozen.set()
        await asyncio.sleep(0.01)

    bench.bus.on_publish = thaw
    await asyncio.sleep(60)
    bench.redeliver(second)
    await asyncio.sleep(30)
    bench.leases.owned.clear()
    partition.stop()
    assert outcomes(bench) == [("c1", "parked", "window_closed"), ("c1", "refused", "expired")]


async def test_a_shard_full_of_parked_commands_is_taken_over_without_new_receipts() -> None:
    bench, partition = await ready(is_open=False, merge_chars=3000)
    users = [USER, "u2@im.wechat"]
    await bench.bind(bot="b2@im.bot", user=users[1])
    for number in range(300):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}", user=users[number % 2]))
    await asyncio.sleep(60)
    assert len(parked(bench)) == 300
    successor, second = next_owner(bench, partition, merge_chars=3000)
    await asyncio.sleep(60)
    assert len(bench.bus.receipts()) == 300
    waiting: Counter[str] = Counter()
    assert second.queue_depths(waiting) == (0, None)
    assert +waiting == {"window_closed": 300}
    for _ in range(3):
        for bot, user in ((BOT, users[0]), ("b2@im.bot", users[1])):
            await user_writes(successor, bot=bot, user=user)
        await asyncio.sleep(60)
    for user, first in zip(users, (0, 1), strict=True):
        texts = [text for sent in bench.chat.sent if sent.user == user for text in sent.text.split("\n\n")]
        assert texts == [f"t{number}" for number in range(first, 300, 2)]
    assert len(finals(bench)) == 300


def forget_receipts(bench: Bench) -> None:
    """They have grown too old."""
    bench.bus.kept = [kept for kept in bench.bus.kept if ".receipt." not in kept.stored.subject]


async def test_a_command_whose_receipt_grew_too_old_is_not_sent_again() -> None:
    """Its acknowledgement was lost, and nobody ran for days."""
    bench, partition = await ready()
    delivery = bench.command("hi", id="c1")
    partition.on_delivery(delivery)
    await asyncio.sleep(5)
    delivery.acks = 0
    partition.stop()
    await asyncio.sleep(DAYS_4_S)
    forget_receipts(bench)
    next_owner(bench, partition)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["hi"]
    assert [one.outcome for one in finals(bench)] == ["uncertain"]
    assert [one.acks for one in bench.deliveries] == [1]


async def redeliver_apart(bench: Bench, partition: Partition) -> None:
    """As `Bench.redeliver`, with a pause after each command: those behind it are not in flight yet."""
    for delivery in [one for one in bench.deliveries if not one.acks]:
        bench.deliveries.remove(delivery)
        bench.deliveries.append(again := delivery.again())
        stored = next(one for one in bench.bus.found("OUT") if one.seq == delivery.seq)
        again.data, again.headers = stored.data, dict(stored.headers)
        partition.on_delivery(again)
        await asyncio.sleep(0.05)


async def test_an_older_command_that_comes_again_delays_nothing_that_was_begun() -> None:
    """Its ack got lost, and the message in progress is that of a later command."""
    bench, partition = await ready()
    bench.chat.sends.extend([FIRST, THROTTLED])
    first = bench.command("a", id="a")
    partition.on_delivery(first)
    await asyncio.sleep(5)
    partition.on_delivery(bench.command("b", id="b"))
    await asyncio.sleep(5)
    first.acks = 0
    successor, _second = next_owner(bench, partition)
    await asyncio.sleep(10)
    await user_writes(successor)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["a", "b", "b"]
    assert outcomes(bench) == [("a", "accepted", ""), ("b", "parked", "throttled"), ("b", "accepted", "")]
    await asyncio.wait_for(successor.unbind(), 600)


async def test_an_older_command_that_comes_again_first_makes_no_part_be_sent_twice() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([FIRST, Accepted("p1", 0, None, ""), TIMEOUT])
    first = bench.command("a", id="a")
    partition.on_delivery(first)
    await asyncio.sleep(5)
    partition.on_delivery(bench.command(THREE, id="b"))
    await asyncio.sleep(10)
    first.acks = 0
    await bench.drain(5)
    _heir, second = next_owner(bench, partition, deliver=False)
    await redeliver_apart(bench, second)
    await asyncio.sleep(1000)
    assert len(bench.chat.taken) == 4, "one message, and three parts"
    assert [(one.command, one.outcome, one.message_ids) for one in finals(bench)] == [
        ("a", "accepted", ["m1"]),
        ("b", "accepted", ["p1", "m4", "m5"]),
    ]


# copies of the router's ---------------------------------------------------------------------------------


async def copy_of(bench: Bench, original: FakeDelivery) -> FakeDelivery:
    """The router's copy, as the partition's consumer delivers it."""
    await route(router(bench), original)
    return as_delivered(bench)


@pytest.mark.parametrize("merge_chars", [0, 100])
@pytest.mark.parametrize(
    "answers",
    [[FIRST], [TIMEOUT, FIRST], [TIMEOUT, TIMEOUT], [Temporary("unavailable"), FIRST], [Refused("rejected", "no")]],
    ids=["taken", "unanswered", "twice unanswered", "not taken", "refused"],
)
async def test_a_second_copy_of_the_routers_is_the_same_command(merge_chars: int, answers: list[Any]) -> None:
    """The router died before its acknowledgement, or was without NATS longer than the stream remembers ids."""
    bench, partition = await ready(is_open=False, merge_chars=merge_chars)
    original = plain(bench, sandbox="s1", id="c1", text="hi")
    partition.on_delivery(await copy_of(bench, original))
    original.redelivered = True
    second = await copy_of(bench, original)
    partition.on_delivery(second)
    await asyncio.sleep(5)
    bench.chat.sends.extend(answers)
    await user_writes(bench)
    await asyncio.sleep(400)
    assert bench.chat.texts == ["hi"] * len(answers)
    assert len({sent.client_id for sent in bench.chat.sent}) == 1
    assert len(finals(bench)) == 1
    assert [delivery.acks for delivery in bench.deliveries] == [1, 1]


async def test_a_copy_of_what_was_refused_is_not_sent() -> None:
    """It was stored before the refusal and waited on the bus behind others."""
    bench, partition = await ready(is_open=False)
    original = plain(bench, sandbox="s1", id="c1", text="hi", when_closed="refuse")
    first = await copy_of(bench, original)
    original.redelivered = True
    second = await copy_of(bench, original)
    partition.on_delivery(first)
    await asyncio.sleep(5)
    await user_writes(bench)
    partition.on_delivery(second)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "window_closed")]
    assert (bench.chat.sent, second.acks) == ([], 1)


async def test_a_stale_read_of_the_record_has_nothing_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is cut off takes itself for the leader for a while, and answers."""
    bench, partition = await ready(gap_ms=1000)
    bucket, current = bench.person_bucket, bench.person_bucket.get
    before = dict(bucket.entries)
    partition.on_delivery(bench.command(THREE, id="c1"))
    await asyncio.sleep(1.5)
    assert len(bench.chat.sent) == 2
    stale_reads = 0

    async def stale(key: str) -> BucketEntry | None:
        nonlocal stale_reads
        monkeypatch.setattr(bucket, "get", current)
        stale_reads += 1
        return before.get(key)

    monkeypatch.setattr(bucket, "get", stale)
    successor, _ = next_owner(bench, partition, gap_ms=1000)
    await user_writes(successor)
    await asyncio.sleep(100)
    assert stale_reads == 1
    assert len(bench.chat.sent) == 3
    assert [(one.outcome, len(one.message_ids)) for one in finals(bench)] == [("accepted", 3)]
    assert successor.record().window.sends_used == 1, "the user wrote in between"


async def test_a_stale_read_of_the_receipts_parks_and_sends_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that had ended was parked, and sent once the user wrote."""
    bench, partition = await ready(sends=1)
    delivery = bench.command("hi")
    delivery.ack = lost  # type: ignore[method-assign]
    partition.on_delivery(delivery)
    await asyncio.sleep(5)
    receipts = bench.replica.parts.receipts
    find = receipts.find

    async def stale(*_: object) -> dict[int, Any]:
        monkeypatch.setattr(receipts, "find", find)
        return {}

    monkeypatch.setattr(receipts, "find", stale)
    bench.redeliver(partition)
    await asyncio.sleep(5)
    await user_writes(bench)
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]
    assert [one.outcome for one in bench.bus.receipts()] == ["accepted"]
    assert not partition.tasks


async def lost() -> None:
    """An acknowledgement that does not arrive."""
