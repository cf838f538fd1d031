"""Parked texts in few messages: in order, each once, each with its own receipt, whoever dies when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.bridge.inflight import MISSING_CONFIRM_S
from adapter.bridge.partition import Partition
from adapter.bridge.record import CommandRef
from adapter.errors import Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ports import Accepted
from tests.fakes import GAP_S, Bench
from tests.outbound.partitions import BOT, USER, finals, outcomes, parked, ready, user_writes

VIRTUAL_TIME = True

CHARS = 3000
THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")
TIMEOUT = Uncertain("timeout", "no answer")


async def waiting(*texts: str, **changes: Any) -> tuple[Bench, Partition]:
    """A user whose window is closed, and texts parked for them, as c0, c1, …"""
    bench, partition = await ready(is_open=False, **{"merge_chars": CHARS, **changes})
    for number, text in enumerate(texts):
        partition.on_delivery(bench.command(text, id=f"c{number}"))
    await asyncio.sleep(5)
    assert len(parked(bench)) == len(texts)
    return bench, partition


def final_receipts(bench: Bench) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(receipt.command, receipt.outcome, tuple(receipt.message_ids)) for receipt in finals(bench)]


def shown(bench: Bench) -> list[str]:
    """What the phone shows, or may show."""
    messages = [sent.media.name if sent.media else sent.text for sent in bench.chat.taken.values()]
    return [text for message in messages for text in message.split("\n\n")]


async def test_what_was_parked_arrives_in_one_message_and_each_has_its_receipt() -> None:
    bench, _shard = await waiting(*(f"t{number}" for number in range(15)))
    await user_writes(bench)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["\n\n".join(f"t{number}" for number in range(15))]
    assert final_receipts(bench) == [(f"c{number}", "accepted", ("m1",)) for number in range(15)]
    assert {receipt.attempts for receipt in finals(bench)} == {1}
    assert {receipt.window.remaining for receipt in finals(bench)} == {9}
    assert parked(bench) == []
    assert bench.record().window.sends_used == 1


@pytest.mark.parametrize("place", [0, 1], ids=["first", "in-between"])
async def test_one_that_was_sent_and_is_published_again_takes_no_other_with_it(place: int) -> None:
    """That it was sent, over another bot, was not known when it was parked."""
    bench, partition = await ready(is_open=False, merge_chars=CHARS)
    idents = ["a", "b"]
    idents.insert(place, "c")
    for ident in idents:
        partition.on_delivery(bench.command(ident, id=ident))
    await asyncio.sleep(5)
    assert parked(bench) == idents
    partition.stop()
    bench.hears(recent=[CommandRef(sequence=77, stored_ms=1, id="c", is_named=True)], opened_ms=0)
    successor = Bench(bench, instance="next-1")
    bench.redeliver(successor.partition(merge_chars=CHARS))
    await user_writes(successor)
    await asyncio.sleep(30)
    assert shown(bench) == ["a", "b"]
    assert [receipt.command for receipt in finals(bench)] == idents
    assert [(one.outcome, one.repeat_of) for one in finals(bench) if one.command == "c"] == [("uncertain", 77)]


def hide(bench: Bench, number: int) -> Callable[[], None]:
    """One that is parked is not shown, as by a cluster that is losing its leaders, until the answer is called."""
    stored = bench.bus.found("OUT")[number]
    (hidden,) = [kept for kept in bench.bus.kept if kept.stored == stored]
    place = bench.bus.kept.index(hidden)
    bench.bus.kept.remove(hidden)
    return lambda: bench.bus.kept.insert(place, hidden)


async def test_a_repeat_holds_also_what_the_bus_does_not_show_for_a_moment() -> None:
    bench, _shard = await waiting("a", "b", "c")
    bench.chat.sends.extend([TIMEOUT, SessionExpired("needs_login", "iLink answered -14", errcode=-14)])
    await user_writes(bench)
    await asyncio.sleep(3)
    show = hide(bench, 1)
    await asyncio.sleep(MISSING_CONFIRM_S / 2)
    show()
    await asyncio.sleep(400)
    assert set(bench.chat.texts) == {"a\n\nb\n\nc"}
    assert [outcome for _, outcome, _ in final_receipts(bench)] == ["accepted"] * 3


async def test_texts_that_are_read_twice_take_their_room_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is not shown at first; afterwards the replica has as much room as before."""
    bench, partition = await waiting(*("x" * 200 for _ in range(10)))
    asked, get = list[int](), bench.bus.get

    async def noted(stream: str, seq: int) -> Any:
        asked.append(seq)
        return await get(stream, seq)

    monkeypatch.setattr(bench.bus, "get", noted)
    partition.parts.bodies.most = 1000
    show = hide(bench, 5)
    await user_writes(bench)
    await asyncio.sleep(8)
    show()
    await asyncio.sleep(60)
    assert len(finals(bench)) == 10
    asked.clear()
    partition.on_delivery(bench.command("y" * 900, id="next"))
    await asyncio.sleep(5)
    assert bench.chat.texts[-1] == "y" * 900
    assert asked == []


async def test_what_is_more_than_one_text_goes_alone_and_in_its_place() -> None:
    bench, partition = await ready(is_open=False, merge_chars=CHARS)
    two = [{"kind": "text", "text": "c"}, {"kind": "text", "text": "d"}]
    file = [{"kind": "file", "data": "aGVsbG8=", "name": "f"}]
    for delivery in (
        bench.command("a"),
        bench.command("b", reply_to="m1", expires_in_s=900),
        bench.command(items=two),
        bench.command("e"),
        bench.command(items=file),
        bench.command("g"),
        bench.command("h < i"),
    ):
        partition.on_delivery(delivery)
    await asyncio.sleep(5)
    await user_writes(bench)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a\n\nb", "c", "d", "e", "", "g\n\nh ＜ i"]
    assert shown(bench) == ["a", "b", "c", "d", "e", "f", "g", "h ＜ i"]
    assert len(finals(bench)) == 7


async def test_a_repeated_id_in_a_flush_is_sent_once() -> None:
    bench, partition = await ready(is_open=False, merge_chars=CHARS)
    for text, ident in (("a", "c1"), ("b", "c2"), ("a again", "c1"), ("d", "c4")):
        partition.on_delivery(bench.command(text, id=ident))
    await asyncio.sleep(5)
    await user_writes(bench)
    await asyncio.sleep(30)
    assert shown(bench) == ["a", "b", "d"]
    assert [(one.command, one.repeat_of) for one in finals(bench)] == [("c1", 0), ("c2", 0), ("c1", 1), ("c4", 0)]


SHARED: list[tuple[str, list[Exception | Accepted], str, str]] = [
    ("unconfirmed", [Accepted(None, 0, None, "")], "accepted_unconfirmed", ""),
    ("uncertain", [TIMEOUT, TIMEOUT], "uncertain", ""),
    ("not-taken", [Temporary("unavailable")] * 3, "accepted", ""),
    ("refused-after-silence", [TIMEOUT, Refused("rejected", "no")], "uncertain", ""),
]


@pytest.mark.parametrize(("script", "outcome", "reason"), [row[1:] for row in SHARED], ids=[row[0] for row in SHARED])
async def test_what_shares_a_message_shares_its_fate(
    script: list[Exception | Accepted], outcome: str, reason: str
) -> None:
    bench, _shard = await waiting("a", "b", "c")
    bench.chat.sends.extend(script)
    await user_writes(bench)
    await asyncio.sleep(400)
    assert outcomes(bench)[3:] == [(f"c{number}", outcome, reason) for number in range(3)]
    assert set(bench.chat.texts) == {"a\n\nb\n\nc"}
    assert parked(bench) == []


async def test_a_refused_message_goes_apart_and_only_what_is_at_fault_is_refused() -> None:
    bench, _shard = await waiting("a", "b", "c", "d")
    bench.chat.sends.extend([Refused("rejected", "no"), Accepted("1", 0, None, ""), Refused("rejected", "no")])
    await user_writes(bench)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a\n\nb\n\nc\n\nd", "a", "b", "c", "d"]
    assert [(receipt.command, receipt.outcome) for receipt in finals(bench)] == [
        ("c0", "accepted"),
        ("c1", "refused"),
        ("c2", "accepted"),
        ("c3", "accepted"),
    ]


async def test_minus_2_leaves_all_parked_and_the_first_goes_alone_the_next_time() -> None:
    """It may be quota, and then one send more is all that it costs; or the first one's own fault."""
    bench, _shard = await waiting("a", "b", "c")
    bench.chat.sends.append(THROTTLED)
    await user_writes(bench)
    await asyncio.sleep(30)
    assert (len(parked(bench)), finals(bench)) == (3, [])
    await user_writes(bench)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["a\n\nb\n\nc", "a", "b\n\nc"]
    assert [command for command, *_ in final_receipts(bench)] == ["c0", "c1", "c2"]


# expiry --------------------------------------------------------------------------------------------------


async def impatient(bench: Bench, partition: Partition, *seconds: float) -> None:
    """Parks t0, t1, … that live so long."""
    for number, expires_in_s in enumerate(seconds):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}", expires_in_s=expires_in_s))
    await asyncio.sleep(2)


@pytest.mark.parametrize("expires_in_s", [(60.0, 900.0), (900.0, 60.0)], ids=["first", "second"])
async def test_one_that_expires_while_nothing_is_taken_leaves_the_others(expires_in_s: tuple[float, ...]) -> None:
    bench, partition = await ready(is_open=False, merge_chars=CHARS)
    await impatient(bench, partition, *expires_in_s)
    bench.chat.sends.extend([Temporary("network")] * 12)
    await user_writes(bench)
    await asyncio.sleep(800)
    late = expires_in_s.index(60.0)
    assert outcomes(bench)[2:] == [(f"c{late}", "refused", "expired"), (f"c{1 - late}", "accepted", "")]
    assert bench.chat.texts[-1] == f"t{1 - late}"


async def test_those_of_a_message_that_may_be_on_the_phone_expire_together() -> None:
    """To refuse one as unsent could be a lie, and without it the repeat would be another message."""
    bench, partition = await ready(is_open=False, merge_chars=CHARS)
    await impatient(bench, partition, 900, 60)
    bench.chat.sends.append(TIMEOUT)
    bench.chat.notify_fails = Temporary("network")
    await user_writes(bench)
    await asyncio.sleep(55)
    assert finals(bench) == []
    await asyncio.sleep(10)
    assert final_receipts(bench) == [("c0", "uncertain", ()), ("c1", "uncertain", ())]
    for ident in ("c0", "c1"):
        partition.on_delivery(bench.command("again", id=ident))
    await user_writes(bench)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0\n\nt1"]
    assert [(one.outcome, one.repeat_of) for one in finals(bench)[2:]] == [("uncertain", 1), ("uncertain", 2)]


async def test_a_drain_does_not_wait_for_an_upload() -> None:
    bench, partition = await ready()
    bench.cdn.hold[USER] = asyncio.Event()
    delivery = bench.command(items=[{"kind": "file", "data": "aGVsbG8="}], id="c1")
    partition.on_delivery(delivery)
    await asyncio.sleep(1)
    began = bench.clock.monotonic()
    await bench.drain(100.0)
    assert bench.clock.monotonic() - began < 1.0
    assert (delivery.acks, bench.chat.sent) == (0, [])
    bench.cdn.hold.clear()
    successor = Bench(bench, instance="next-1")
    second = successor.partition()
    successor.redeliver(second)
    await asyncio.sleep(5)
    assert (len(bench.chat.sent), [one.acks for one in bench.deliveries]) == (1, [1])


async def test_a_slow_upload_delays_nobody_else() -> None:
    bench, partition = await ready()
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    bench.hears("s1", "u2@im.wechat", bot="b2@im.bot")
    bench.cdn.hold[USER] = asyncio.Event()
    file = [{"kind": "file", "data": "aGVsbG8="}]
    for number in range(20):
        partition.on_delivery(bench.command(items=file, bot=BOT, id=f"slow{number}"))
    for number in range(3):
        partition.on_delivery(bench.command(items=file, bot="b2@im.bot", id=f"c{number}"))
    await asyncio.sleep(3 * GAP_S)
    assert [command for command, *_ in final_receipts(bench)] == ["c0", "c1", "c2"]
    partition.stop()


async def test_parked_media_are_brought_when_they_may_go() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command(items=[{"kind": "file", "media": {"object": "s1/x"}}], id="c1"))
    await asyncio.sleep(5)
    assert bench.cdn.asked == 0
    bench.objects.stored["s1/x"] = b"hello"
    await user_writes(bench)
    await asyncio.sleep(5)
    assert final_receipts(bench) == [("c1", "accepted", ("m1",))]
    assert bench.cdn.uploads[0].data == b"hello"
