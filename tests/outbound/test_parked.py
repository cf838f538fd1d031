"""What must wait for the user: parked, told, and sent in order when they write; or refused, or expired."""

from __future__ import annotations

import asyncio

import pytest

from adapter.bridge.inflight import MISSING_CONFIRM_S
from tests.fakes import LIMITS, WINDOW
from tests.outbound.partitions import THROTTLED, finals, outcomes, parked, ready, user_writes

VIRTUAL_TIME = True


async def test_what_must_wait_is_parked_and_flushed_in_order() -> None:
    bench, partition = await ready(is_open=False)
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    for delivery in deliveries:
        partition.on_delivery(delivery)
    await asyncio.sleep(5)
    assert parked(bench) == ["c0", "c1", "c2"]
    assert [delivery.acks for delivery in deliveries] == [0, 0, 0]  # they wait where they are
    assert [outcome for _, outcome, _ in outcomes(bench)] == ["parked"] * 3

    await user_writes(bench)
    partition.on_delivery(bench.command("t3", id="c3"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "t2", "t3"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2", "c3"]
    assert parked(bench) == []


async def test_what_is_parked_and_not_shown_for_a_moment_is_not_overtaken() -> None:
    """By a cluster that is losing its leaders. What an operator removed is not waited for for ever."""
    bench, partition = await ready(is_open=False)
    for number in range(3):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(5)
    hidden = [kept for kept in bench.bus.kept if kept.stored in bench.bus.found("OUT")][:2]
    bench.bus.kept = [kept for kept in bench.bus.kept if kept not in hidden]
    await user_writes(bench)
    await asyncio.sleep(MISSING_CONFIRM_S / 2)
    assert bench.chat.texts == []
    bench.bus.kept.insert(0, hidden[0])
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t2"]


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (b'{"id":"c0","text":"t0","when_closed":"gone"}', ("c0", "dead_lettered", "unreadable")),
        (b'{"id":"c0","sandbox":"s2","text":"t0"}', ("c0", "refused", "invalid")),
    ],
    ids=["unreadable", "refused"],
)
async def test_what_another_version_parked_and_this_one_does_not_accept_ends(
    body: bytes, end: tuple[str, str, str]
) -> None:
    bench, partition = await ready(is_open=False)
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(2)]
    for delivery in deliveries:
        partition.on_delivery(delivery)
    await asyncio.sleep(5)
    (first,) = [kept for kept in bench.bus.kept if kept.stored == bench.bus.found("OUT")[0]]
    place = bench.bus.kept.index(first)
    bench.bus.kept[place] = first._replace(stored=first.stored._replace(data=body))
    await user_writes(bench)
    await asyncio.sleep(30)
    assert outcomes(bench)[2:] == [end, ("c1", "accepted", "")]
    assert bench.chat.texts == ["t1"]
    assert [delivery.acks for delivery in deliveries] == [1, 1]
    assert [letter.data for letter in bench.bus.found("DEAD")] == ([body] if end[1] == "dead_lettered" else [])


async def test_many_that_are_gone_delay_what_is_behind_them_once() -> None:
    """An operator has purged what is parked."""
    bench, partition = await ready(is_open=False)
    for number in range(30):
        partition.on_delivery(bench.command(f"t{number}"))
    await asyncio.sleep(5)
    bench.bus.kept = [kept for kept in bench.bus.kept if kept.stored not in bench.bus.found("OUT")]
    await user_writes(bench)
    partition.on_delivery(bench.command("hi"))
    await asyncio.sleep(2 * MISSING_CONFIRM_S)
    assert bench.chat.texts == ["hi"]


async def test_the_time_of_a_command_that_was_parked_is_not_counted_as_ours() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(3600)
    await user_writes(bench)
    await asyncio.sleep(60)
    partition.on_delivery(bench.command("at once", id="c2"))
    await asyncio.sleep(60)
    assert [receipt.outcome for receipt in finals(bench)] == ["accepted", "accepted"]
    assert bench.metrics.value("outbound_duration_seconds_count", outcome="settled") == 1
    assert bench.metrics.value("outbound_duration_seconds_sum", outcome="settled") < 10


async def test_minus_2_costs_one_attempt() -> None:
    """No retry storm, also with more commands to come."""
    bench, partition = await ready()
    bench.chat.sends.extend([THROTTLED] * 50)
    for number in range(20):
        partition.on_delivery(bench.command(f"t{number}"))
        await asyncio.sleep(60)
    assert len(bench.chat.sent) == 1
    assert bench.bus.receipts()[0].errmsg == THROTTLED.errmsg


async def test_ilinks_answer_is_in_the_receipt_of_the_command_that_it_answered_alone() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("first", id="c0"))
    await asyncio.sleep(1)
    bench.chat.sends.append(THROTTLED)
    await user_writes(bench)
    await asyncio.sleep(10)
    assert bench.chat.texts == ["first"]
    partition.on_delivery(bench.command("never posted", id="c1"))
    await asyncio.sleep(10)
    told = bench.bus.receipts()[-1]
    assert (told.command, told.outcome, told.reason) == ("c1", "parked", "throttled")
    assert (told.ret, told.errmsg, told.attempts) == (None, "", 0)


async def test_after_the_cool_down_one_probe_goes_out() -> None:
    """What fails then waits a whole cool-down more."""
    bench, partition = await ready()
    bench.chat.sends.extend([THROTTLED] * 3)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(2 * WINDOW.cooldown_s + 60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 3600, 7200]
    await asyncio.sleep(WINDOW.cooldown_s)
    assert [outcome for _, outcome, _ in outcomes(bench)] == ["parked", "accepted"]


async def test_minus_2_in_a_second_window_refuses_the_command_and_the_others_go() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([THROTTLED, THROTTLED])
    partition.on_delivery(bench.command("poison", id="c0"))
    partition.on_delivery(bench.command("fine", id="c1"))
    await asyncio.sleep(10)
    await user_writes(bench)
    await asyncio.sleep(10)
    assert outcomes(bench)[-1] == ("c0", "refused", "throttled")
    assert bench.chat.texts == ["poison", "poison"]
    await user_writes(bench)
    await asyncio.sleep(10)
    assert bench.chat.texts == ["poison", "poison", "fine"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]


async def test_what_does_not_want_to_wait_is_refused_between_others_that_are_parked() -> None:
    """It comes after them, with a lower sequence."""
    bench, partition = await ready(is_open=False)
    first, between, last = (
        bench.command("a", id="a"),
        bench.command("b", id="b", when_closed="refuse"),
        bench.command("c", id="c"),
    )
    partition.on_delivery(first)
    partition.on_delivery(last)
    await asyncio.sleep(5)
    partition.on_delivery(between)
    await asyncio.sleep(5)
    assert outcomes(bench)[2:] == [("b", "refused", "window_closed")]
    assert parked(bench) == ["a", "c"]


async def test_what_answers_another_person_is_refused_and_not_parked() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("a", id="a"))
    partition.on_delivery(bench.command("b", id="b", reply_to="in:b9@im.bot:1"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("a", "parked", "window_closed"), ("b", "refused", "other_user")]


async def test_what_waits_too_long_expires_where_it_waits() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=600))
    partition.on_delivery(bench.command("hi", id="c2"))
    await asyncio.sleep(599)
    assert finals(bench) == []
    await asyncio.sleep(10)
    assert [(receipt.command, receipt.reason) for receipt in finals(bench)] == [("c1", "expired")]
    assert parked(bench) == ["c2"]
    await asyncio.sleep(LIMITS.park_ms / 1000)
    assert [(receipt.command, receipt.reason) for receipt in finals(bench)] == [("c1", "expired"), ("c2", "expired")]


async def test_a_parked_command_that_comes_again_is_not_read_again() -> None:
    """Each reset of the consumer brings all of them once more: their bodies cost nothing."""
    bench, partition = await ready(is_open=False)
    commands = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    for delivery in commands:
        partition.on_delivery(delivery)
    await asyncio.sleep(20)
    again = [delivery.again() for delivery in commands]
    for delivery in again:
        delivery.data = b"not to be read"
        partition.on_delivery(delivery)
    await asyncio.sleep(20)
    assert [(each.command, each.outcome) for each in bench.bus.receipts()] == [(f"c{n}", "parked") for n in range(3)]
    await user_writes(bench)
    await asyncio.sleep(20)
    assert [sent.text for sent in bench.chat.sent] == ["t0", "t1", "t2"]
    assert [(old.acks, new.acks) for old, new in zip(commands, again, strict=True)] == [(0, 1)] * 3
