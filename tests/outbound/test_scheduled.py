"""Commands with a time: they wait in their partition and nobody waits behind them; and what takes a command back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import LIMITS
from tests.outbound.partitions import FIRST, THREE, THROTTLED, finals, outcomes, parked, ready, user_writes

VIRTUAL_TIME = True
HOUR_MS = 3600_000


async def test_a_command_is_sent_at_its_time_and_nothing_waits_behind_it() -> None:
    bench, partition = await ready()
    now_ms = bench.clock.now_ms()
    later, soon = now_ms + 2 * HOUR_MS, now_ms + HOUR_MS
    for ident, at_ms in (("later", later), ("soon", soon), ("past", now_ms - HOUR_MS)):
        partition.on_delivery(bench.command(ident, id=ident, send_at_ms=at_ms))
    partition.on_delivery(bench.command("now", id="now"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["past", "now"]
    assert [one for one in outcomes(bench) if one[2]] == [
        ("later", "parked", "scheduled"),
        ("soon", "parked", "scheduled"),
    ]
    await asyncio.sleep(3600 - 61)
    assert bench.chat.texts == ["past", "now"]
    await asyncio.sleep(2)
    assert bench.chat.texts == ["past", "now", "soon"]
    await asyncio.sleep(3600)
    assert bench.chat.texts == ["past", "now", "soon", "later"]
    assert {receipt.outcome for receipt in finals(bench)} == {"accepted"}
    assert bench.metrics.value("outbound_duration_seconds_count", outcome="settled") == 4
    assert bench.metrics.value("outbound_duration_seconds_sum", outcome="settled") < 10


async def test_a_command_that_is_due_and_may_not_be_sent_is_told_why() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("hi", id="c1", send_at_ms=bench.clock.now_ms() + HOUR_MS))
    await asyncio.sleep(3700)
    assert outcomes(bench) == [("c1", "parked", "scheduled"), ("c1", "parked", "window_closed")]
    await user_writes(bench)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["hi"]


async def test_the_next_owner_goes_on_and_tells_nothing_twice() -> None:
    """A body that is parked is read again when its time comes."""
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1", send_at_ms=bench.clock.now_ms() + HOUR_MS))
    await asyncio.sleep(60)
    partition.stop()
    successor = bench.partition()
    bench.redeliver(successor)
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "parked", "scheduled")]
    await asyncio.sleep(3600)
    assert (bench.chat.texts, [one.outcome for one in finals(bench)]) == (["hi"], ["accepted"])
    assert [delivery.acks for delivery in bench.deliveries] == [1]


async def test_a_partition_that_is_given_away_waits_for_no_time() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", send_at_ms=bench.clock.now_ms() + HOUR_MS))
    await asyncio.sleep(60)
    began = bench.clock.monotonic()
    await partition.leave()
    await partition.wait_sent()
    assert bench.clock.monotonic() - began < 1
    await asyncio.sleep(2 * 3600)
    assert bench.chat.texts == []


async def test_an_unbind_ends_what_was_to_be_sent_later() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1", send_at_ms=bench.clock.now_ms() + HOUR_MS))
    await asyncio.sleep(60)
    await bench.unbind()
    assert outcomes(bench)[1:] == [("c1", "refused", "not_bound")]


@pytest.mark.parametrize(
    ("ahead_ms", "body"),
    [
        (LIMITS.park_ms - HOUR_MS + 10_000, {"text": "hi"}),
        (HOUR_MS, {"text": "hi", "expires_in_s": 3599}),
        (HOUR_MS, {"typing": "on"}),
        (HOUR_MS, {"cancel": "c0"}),
    ],
    ids=["too far ahead", "after it expires", "typing", "cancel"],
)
async def test_a_time_that_makes_no_sense_is_refused(ahead_ms: int, body: dict[str, Any]) -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command(id="c1", send_at_ms=bench.clock.now_ms() + ahead_ms, **body))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "refused", "invalid")]
    assert "at most 71 hours ahead" in finals(bench)[0].detail


async def test_what_waits_is_taken_back() -> None:
    """Scheduled or parked, and only what was said before, of this sandbox."""
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("one", id="c1", send_at_ms=bench.clock.now_ms() + HOUR_MS))
    for ident in ("c2", "c3"):
        partition.on_delivery(bench.command(ident, id=ident))
    await asyncio.sleep(60)
    assert parked(bench) == ["c1", "c2", "c3"]
    for ident in ("c1", "c3", "c9", "c1"):
        partition.on_delivery(bench.command(cancel=ident, id=f"x-{ident}"))
        await asyncio.sleep(60)
    partition.on_delivery(bench.command("c9", id="c9"))
    await user_writes(bench)
    await asyncio.sleep(2 * 3600)
    assert [one for one in outcomes(bench) if one[1] != "parked"] == [
        ("c1", "refused", "cancelled"),
        ("x-c1", "applied", ""),
        ("c3", "refused", "cancelled"),
        ("x-c3", "applied", ""),
        ("x-c9", "refused", "not_found"),
        ("x-c1", "applied", ""),
        ("c2", "accepted", ""),
        ("c9", "accepted", ""),
    ]
    assert bench.chat.texts == ["c2", "c9"]
    assert all(delivery.acks == 1 for delivery in bench.deliveries)


async def test_what_was_sent_is_not_taken_back() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1"))
    partition.on_delivery(bench.command(cancel="c1", id="early"))
    await asyncio.sleep(60)
    partition.on_delivery(bench.command(cancel="c1", id="late"))
    await asyncio.sleep(60)
    ends = {receipt.command: receipt.outcome for receipt in finals(bench)}
    assert ends in (
        {"c1": "accepted", "early": "refused", "late": "refused"},
        {"c1": "refused", "early": "applied", "late": "applied"},
    )
    assert bench.chat.texts == (["hi"] if ends["c1"] == "accepted" else [])


async def test_of_a_message_in_parts_those_that_are_sent_stay() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([FIRST, THROTTLED])
    partition.on_delivery(bench.command(THREE, id="c1"))
    await asyncio.sleep(60)
    assert parked(bench) == ["c1"]
    partition.on_delivery(bench.command(cancel="c1", id="x"))
    await asyncio.sleep(60)
    assert [one for one in outcomes(bench) if one[1] != "parked"] == [
        ("c1", "refused", "cancelled"),
        ("x", "applied", ""),
    ]
    assert len(finals(bench)[0].message_ids) == 1


async def test_a_cancel_that_comes_again_says_the_same() -> None:
    """Its owner died between the two receipts."""
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    partition.on_delivery(bench.command(cancel="c1", id="x"))
    while not finals(bench):
        await asyncio.sleep(0)
    partition.stop()
    successor = bench.partition()
    bench.redeliver(successor)
    await asyncio.sleep(60)
    assert [one for one in outcomes(bench) if one[1] != "parked"] == [
        ("c1", "refused", "cancelled"),
        ("x", "applied", ""),
    ]
