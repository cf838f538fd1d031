"""Typing: shown at once and every 5 s, hidden with the answer, and never in the way of a message."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from adapter.bridge.partition import Partition
from adapter.bridge.typing_indicator import RENEW_S
from adapter.contract.messages import Options
from adapter.errors import Refused, SessionExpired, Temporary
from tests.fakes import Bench
from tests.outbound.partitions import BOT, outcomes, parked, user_writes

VIRTUAL_TIME = True

NO_TICKET = Refused("typing", "iLink answered -4", ret=-4, errmsg="GetTypingTicket rpc failed")
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14)


async def ready(*, auto: bool = False) -> tuple[Bench, Partition]:
    """One bound user with an open window."""
    bench = Bench()
    await bench.bind(options=Options(auto_typing=auto))
    bench.hears()
    return bench, bench.partition()


def shown(bench: Bench) -> list[bool]:
    return [call.on for call in bench.chat.typing]


async def showing() -> tuple[Bench, Partition]:
    """One bound user who is shown typing."""
    bench, partition = await ready()
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    return bench, partition


# commands ------------------------------------------------------------------------------------------------


async def test_on_is_shown_at_once_and_every_five_seconds_until_off() -> None:
    bench, partition = await ready()
    on, off = bench.command(typing="on", id="on"), bench.command(typing="off", id="off")
    partition.on_delivery(on)
    await asyncio.sleep(17)
    partition.on_delivery(off)
    await asyncio.sleep(100)
    assert shown(bench) == [True, True, True, True, False]
    at = [call.at_s for call in bench.chat.typing[:4]]
    assert [later - earlier for earlier, later in pairwise(at)] == [RENEW_S] * 3
    assert outcomes(bench) == [("on", "accepted", ""), ("off", "accepted", "")]
    assert (on.acks, off.acks) == (1, 1)


async def test_on_comes_after_the_texts_before_it_and_the_text_after_it_ends_it() -> None:
    bench, partition = await ready()
    seen: list[tuple[str, list[bool]]] = []

    async def look(sent: Any) -> None:
        seen.append((sent.text, shown(bench)))

    bench.chat.on_send = look
    bench.chat.took_s = 4.0
    for command in (bench.command("a"), bench.command(typing="on"), bench.command("b")):
        partition.on_delivery(command)
    await asyncio.sleep(60)
    assert seen == [("a", []), ("b", [True])]
    assert shown(bench)[-1] is False
    assert len(bench.chat.sent) == 2


async def test_the_message_is_sent_before_typing_ends_and_while_more_waits_it_stays() -> None:
    bench, partition = await ready()
    bench.chat.took_s = 1.0
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(0.5)
    partition.on_delivery(bench.command("a"))
    partition.on_delivery(bench.command("b"))
    await asyncio.sleep(60)
    off = bench.chat.typing[-1]
    assert not off.on
    assert shown(bench).count(False) == 1
    assert off.at_s >= bench.chat.sent[-1].at_s + 1.0


async def test_on_again_extends_it_without_another_call_and_it_ends_after_a_minute() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command(typing="on", id="1"))
    await asyncio.sleep(2)
    partition.on_delivery(bench.command(typing="on", id="2"))
    await asyncio.sleep(1)
    assert shown(bench) == [True]
    assert outcomes(bench) == [("1", "accepted", ""), ("2", "accepted", "")]
    await asyncio.sleep(300)
    on, off = bench.chat.typing[0], bench.chat.typing[-1]
    assert shown(bench).count(False) == 1
    assert (off.on, round(off.at_s - on.at_s)) == (False, 62)
    partition.on_delivery(bench.command(typing="on", id="3"))
    await asyncio.sleep(1)
    assert (shown(bench)[-1], len(bench.chat.tickets_asked)) == (True, 1)
    partition.stop()


async def test_what_was_switched_quickly_makes_few_calls() -> None:
    """Flicker, and a suspicion of throttling."""
    bench, partition = await ready()
    for number in range(20):
        partition.on_delivery(bench.command(typing="off" if number % 2 else "on", id=str(number)))
        await asyncio.sleep(0.1)
    await asyncio.sleep(20)
    assert len(shown(bench)) <= 5  # in two seconds
    assert outcomes(bench) == [(str(number), "accepted", "") for number in range(20)]
    assert shown(bench)[-1] is False


async def test_an_on_that_is_too_old_is_not_shown() -> None:
    bench, partition = await ready()
    late = bench.command(typing="on", id="on")
    await asyncio.sleep(61)
    partition.on_delivery(late)
    await asyncio.sleep(10)
    assert (shown(bench), outcomes(bench)) == ([], [("on", "refused", "expired")])


# failures cost nothing but the indicator ---------------------------------------------------------------------


async def test_a_renewal_that_fails_is_tried_again_and_hidden_in_the_end() -> None:
    bench, partition = await ready()
    bench.chat.typing_answers.extend([True, Temporary("network"), Temporary("network"), True])
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(17)
    partition.on_delivery(bench.command("hi"))
    await asyncio.sleep(5)
    assert shown(bench) == [True, True, True, True, False]


@pytest.mark.parametrize("problem", [NO_TICKET, Temporary("timeout")], ids=str)
async def test_without_a_ticket_nothing_is_shown_and_messages_go_on(problem: Exception) -> None:
    bench, partition = await ready()
    bench.chat.tickets.append(problem)
    partition.on_delivery(bench.command(typing="on", id="on"))
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    assert outcomes(bench) == [("on", "accepted", ""), ("c1", "accepted", "")]
    assert bench.chat.typing == []


async def test_a_ticket_that_never_comes_delays_no_message_and_no_receipt() -> None:
    bench, partition = await ready()
    bench.chat.ticket_took_s = 1000.0
    partition.on_delivery(bench.command(typing="on", id="on"))
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(0.1)
    assert outcomes(bench) == [("on", "accepted", ""), ("c1", "accepted", "")]
    partition.stop()


@pytest.mark.parametrize("refusal", [False, STALE], ids=["-2", "-14"])
async def test_a_call_that_ilink_refuses_ends_it_and_the_next_has_another_ticket(refusal: Any) -> None:
    bench, partition = await ready()
    bench.chat.typing_answers.extend([True, refusal])
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(60)
    assert shown(bench) == [True, True]
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    assert [call.ticket for call in bench.chat.typing] == ["ticket-1", "ticket-1", "ticket-2"]
    partition.stop()


async def test_an_unbound_bot_hides_it() -> None:
    bench, _ = await showing()
    await bench.bindings.remove(BOT)
    await asyncio.sleep(1)
    assert shown(bench) == [True, False]


async def test_nothing_is_called_without_the_lease() -> None:
    bench, partition = await showing()
    bench.leases.has_lease = False
    await asyncio.sleep(60)
    assert shown(bench) == [True]
    partition.stop()


# while the user waits ------------------------------------------------------------------------------------


async def test_each_message_shows_typing_until_the_answer_where_the_binding_says_so() -> None:
    bench, partition = await ready(auto=True)
    await user_writes(bench)
    await asyncio.sleep(12)
    assert shown(bench) == [True, True, True]
    partition.on_delivery(bench.command("hi"))
    await asyncio.sleep(60)
    assert shown(bench) == [True, True, True, False]


async def test_an_answer_that_must_wait_for_the_user_ends_typing() -> None:
    bench, partition = await ready()
    bench.hears(sends_used=9)
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    partition.on_delivery(bench.command(items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]))
    await asyncio.sleep(5)
    assert parked(bench)
    assert shown(bench) == [True, False]
    partition.stop()


# the end and the next owner ------------------------------------------------------------------------------


async def test_a_drain_hides_everything() -> None:
    bench, _ = await showing()
    await bench.drain(10.0)
    assert shown(bench) == [True, False]


async def test_a_drain_does_not_wait_long_for_an_ilink_that_hangs() -> None:
    bench, partition = await ready()
    bench.chat.ticket_took_s = 1000.0
    partition.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    before = bench.clock.monotonic()
    await bench.drain(44.0)
    assert bench.clock.monotonic() - before < 10
