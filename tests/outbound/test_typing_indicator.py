"""Typing: shown at once and every 5 s, always hidden in the end, and never in the way of a message."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.messages import Options
from adapter.contract.records import Binding
from adapter.errors import Refused, SessionExpired, Temporary, Throttled
from adapter.outbound.processor import ShardCommandProcessor
from adapter.outbound.typing_indicator import DOUBT_S, HIDES, RENEW_S
from adapter.outbound.typing_tickets import TICKET_S
from tests.fakes import Bench, FakeDelivery, settle
from tests.outbound.shards import BOT, USER, outcomes, parked, user_writes

VIRTUAL_TIME = True

NO_TICKET = Refused("typing", "iLink answered -4", ret=-4, errmsg="GetTypingTicket rpc failed")
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14)


async def ready(*, auto: bool = False, **showing: Any) -> tuple[Bench, ShardCommandProcessor]:
    """One bound user with an open window."""
    bench = Bench()
    await bench.bind(options=Options(auto_typing=auto))
    bench.hears()
    return bench, bench.processor(typing=bench.typing(**showing))


def shown(bench: Bench) -> list[bool]:
    return [call.on for call in bench.chat.typing]


async def showing() -> tuple[Bench, ShardCommandProcessor]:
    """One bound user who is shown typing."""
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    return bench, shard


# commands ------------------------------------------------------------------------------------------------


async def test_on_is_shown_at_once_and_every_five_seconds_until_off() -> None:
    bench, shard = await ready()
    on, off = bench.command(typing="on", id="on"), bench.command(typing="off", id="off")
    shard.intake.on_delivery(on)
    await asyncio.sleep(17)
    shard.intake.on_delivery(off)
    await asyncio.sleep(100)
    assert shown(bench) == [True, True, True, True, False]
    at = [call.at_s for call in bench.chat.typing[:4]]
    assert [later - earlier for earlier, later in pairwise(at)] == [RENEW_S] * 3
    assert outcomes(bench) == [("on", "accepted", ""), ("off", "accepted", "")]
    assert (on.acks, off.acks) == (1, 1)


async def test_a_typing_command_costs_nothing_of_the_window() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(1)
    (receipt,) = bench.bus.receipts()
    assert (receipt.window.remaining, receipt.attempts, receipt.bot, receipt.user) == (10, 0, BOT, USER)
    assert bench.record().window.sends_used == 0
    shard.stop()


async def test_on_comes_after_the_texts_before_it_and_the_text_after_it_ends_it() -> None:
    bench, shard = await ready()
    seen: list[tuple[str, list[bool]]] = []

    async def look(sent: Any) -> None:
        seen.append((sent.text, shown(bench)))

    bench.chat.on_send = look
    bench.chat.took_s = 4.0
    for command in (bench.command("a"), bench.command(typing="on"), bench.command("b")):
        shard.intake.on_delivery(command)
    await asyncio.sleep(60)
    assert seen == [("a", []), ("b", [True])]
    assert shown(bench)[-1] is False
    assert len(bench.chat.sent) == 2


async def test_on_after_an_answer_stays() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command("wait a moment"))
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(12)
    assert shown(bench) == [True, True, True]
    shard.stop()


async def test_the_message_is_sent_before_typing_ends_and_while_more_waits_it_stays() -> None:
    bench, shard = await ready()
    bench.chat.took_s = 1.0
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(0.5)
    shard.intake.on_delivery(bench.command("a"))
    shard.intake.on_delivery(bench.command("b"))
    await asyncio.sleep(60)
    off = bench.chat.typing[-1]
    assert not off.on
    assert shown(bench).count(False) == 1
    assert off.at_s >= bench.chat.sent[-1].at_s + 1.0


async def test_off_is_sent_also_where_nothing_is_known_to_be_shown() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="off", id="off"))
    await asyncio.sleep(5)
    assert shown(bench) == [False]
    assert outcomes(bench) == [("off", "accepted", "")]


async def test_on_again_extends_it_without_another_call() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="on", id="1"))
    await asyncio.sleep(2)
    shard.intake.on_delivery(bench.command(typing="on", id="2"))
    await asyncio.sleep(1)
    assert shown(bench) == [True]
    assert outcomes(bench) == [("1", "accepted", ""), ("2", "accepted", "")]
    await asyncio.sleep(299)  # the first one's time is up
    assert False not in shown(bench)
    await asyncio.sleep(10)
    assert shown(bench)[-1] is False


async def test_it_ends_by_itself_after_the_longest_time() -> None:
    bench, shard = await ready(longest_s=12.0)
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(60)
    assert shown(bench) == [True, True, True, False]
    on, off = bench.chat.typing[0], bench.chat.typing[-1]
    assert 11.9 < off.at_s - on.at_s < 12.1


async def test_what_was_switched_quickly_is_not_shown_again_at_once() -> None:
    """Flicker, and a suspicion of throttling."""
    bench, shard = await ready()
    for number in range(20):
        shard.intake.on_delivery(bench.command(typing="off" if number % 2 else "on", id=str(number)))
        await asyncio.sleep(0.1)
    await asyncio.sleep(20)
    assert shown(bench) == [True, False, True, False]  # in two seconds
    assert len(outcomes(bench)) == 20
    assert shown(bench)[-1] is False


async def test_an_on_that_is_too_old_is_not_shown() -> None:
    bench, shard = await ready()
    late = bench.command(typing="on", id="on")
    off = bench.command(typing="off", id="off")
    await asyncio.sleep(301)
    shard.intake.on_delivery(late)
    shard.intake.on_delivery(off)
    await asyncio.sleep(10)
    assert shown(bench) == [False]
    assert outcomes(bench) == [("on", "refused", "expired"), ("off", "accepted", "")]


async def test_a_command_that_comes_again_after_its_receipt_shows_nothing() -> None:
    bench, shard = await ready()
    first = bench.command(typing="on", id="on")
    shard.intake.on_delivery(first)
    await asyncio.sleep(1)
    shard.stop()
    await settle()
    calls = len(bench.chat.typing)
    again = FakeDelivery(first.subject, first.data, seq=first.seq, time_ms=first.time_ms, redelivered=True)
    other = Bench(bench).processor()
    other.intake.on_delivery(again)
    await asyncio.sleep(5)
    assert len(bench.chat.typing) == calls
    assert again.acks == 1
    assert len(outcomes(bench)) == 1


async def test_a_command_that_comes_again_without_a_receipt_is_carried_out() -> None:
    """Whoever had it in hand died before that."""
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="on", id="on", redelivered=True))
    await asyncio.sleep(1)
    assert shown(bench) == [True]
    assert outcomes(bench) == [("on", "accepted", "")]
    shard.stop()


# what refuses it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [NO_TICKET, Throttled("typing", "-2"), Temporary("timeout")], ids=str)
async def test_without_a_ticket_it_is_refused_and_messages_go_on(problem: Exception) -> None:
    bench, shard = await ready()
    bench.chat.tickets.append(problem)
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    shard.intake.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    assert sorted(outcomes(bench)) == [("c1", "accepted", ""), ("on", "refused", "typing")]
    assert bench.chat.typing == []


async def test_the_receipt_says_what_ilink_said() -> None:
    bench, shard = await ready()
    bench.chat.tickets.append(NO_TICKET)
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(1)
    (receipt,) = bench.bus.receipts()
    assert (receipt.ret, receipt.errmsg) == (-4, "GetTypingTicket rpc failed")


async def test_a_typing_command_is_never_parked() -> None:
    bench, shard = await ready()
    bench.hears(sends_used=10)
    shard.intake.on_delivery(bench.command("later", id="c1"))
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(5)
    assert parked(bench) == ["c1"]
    assert outcomes(bench) == [("c1", "parked", "quota"), ("on", "refused", "quota")]
    assert bench.chat.typing == []
    shard.stop()


async def test_a_bot_that_needs_a_login_is_not_called() -> None:
    bench, shard = await ready()
    await bench.bind(state="needs_login")
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("on", "refused", "needs_login")]
    assert bench.chat.tickets_asked == []


async def test_nobody_bound_is_not_bound(bench: Bench) -> None:
    shard = bench.processor()
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("on", "refused", "not_bound")]


# failures cost nothing but the indicator ---------------------------------------------------------------------


async def test_a_ticket_that_never_comes_delays_no_message() -> None:
    bench, shard = await ready()
    bench.chat.ticket_took_s = 1000.0
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    shard.intake.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(0.1)
    assert outcomes(bench) == [("c1", "accepted", "")]
    await asyncio.sleep(1001)
    assert outcomes(bench)[1:] == [("on", "refused", "typing")]
    assert bench.chat.typing == []


async def test_getconfig_is_asked_less_and_less_while_it_fails() -> None:
    bench, shard = await ready()
    bench.chat.tickets.extend([NO_TICKET] * 1000)
    for _ in range(900):
        shard.intake.on_delivery(bench.command(typing="on"))
        await asyncio.sleep(1)
    at = [at_s for _, at_s in bench.chat.tickets_asked]
    assert [round(later - earlier) for earlier, later in pairwise(at)][:5] == [2, 4, 8, 16, 32]
    assert len(at) < 12


async def test_where_ilink_had_no_ticket_it_is_asked_again_when_the_user_writes() -> None:
    bench, shard = await ready()
    bench.chat.tickets.append(NO_TICKET)
    shard.intake.on_delivery(bench.command(typing="on", id="1"))
    await asyncio.sleep(0.1)
    await user_writes(bench)
    shard.intake.on_delivery(bench.command(typing="on", id="2"))
    await asyncio.sleep(1)
    assert [(outcome, reason) for _, outcome, reason in outcomes(bench)] == [("refused", "typing"), ("accepted", "")]
    shard.stop()


async def test_a_renewal_that_fails_is_tried_again_and_hidden_in_the_end() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, Temporary("network"), Temporary("network"), True])
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(17)
    shard.intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(5)
    assert shown(bench) == [True, True, True, True, False]


async def test_a_first_call_without_an_answer_is_hidden_since_it_may_be_shown() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.append(Temporary("timeout"))
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(30)
    assert shown(bench) == [True, False]
    assert outcomes(bench) == [("on", "refused", "typing")]


async def test_hiding_is_tried_again_and_then_left_to_the_next_owner() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, *[Temporary("network")] * HIDES])
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    shard.intake.on_delivery(bench.command("hi"))
    with capture_logs() as logs:
        await asyncio.sleep(600)
    assert shown(bench) == [True, *[False] * HIDES]
    assert [entry["event"] for entry in logs][-1] == "typing.stuck"


async def test_a_lively_talk_does_not_use_up_the_tries_to_hide() -> None:
    bench, shard = await ready()
    binding = bench.bindings.get(BOT)
    assert binding is not None
    bench.chat.typing_answers.extend([True, *[Temporary("network")] * (HIDES - 1)])
    for _ in range(2 * HIDES):
        shard.typing.begin(binding, USER, "AARz")
        await asyncio.sleep(0.05)
        shard.typing.hide_if_visible(binding, USER, "AARz", shown_before=False)
        await asyncio.sleep(0.05)
    assert shown(bench) == [True, False]
    await asyncio.sleep(60)
    assert shown(bench) == [True, *[False] * HIDES]


async def test_an_old_ticket_is_replaced_also_for_hiding() -> None:
    bench, shard = await ready(longest_s=10_000.0)
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(TICKET_S - 2)
    assert {call.ticket for call in bench.chat.typing} == {"ticket-1"}
    shard.intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    assert bench.chat.typing[-1].ticket == "ticket-1"
    await asyncio.sleep(TICKET_S)
    shard.intake.on_delivery(bench.command(typing="off"))
    await asyncio.sleep(1)
    assert bench.chat.typing[-1].ticket == "ticket-2"
    assert [token for token, _ in bench.chat.tickets_asked] == ["AARz", "AARz"]


async def test_a_ticket_that_ilink_does_not_like_is_replaced_at_once() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, False, True])
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(RENEW_S + 1)
    assert [(call.on, call.ticket) for call in bench.chat.typing] == [
        (True, "ticket-1"),
        (True, "ticket-1"),
        (True, "ticket-2"),
    ]
    shard.stop()


@pytest.mark.parametrize("switch", ["on", "off"])
async def test_what_ilink_refuses_with_a_fresh_ticket_too_is_refused(switch: str) -> None:
    """It was told as accepted. Nothing is shown then, so that nothing has to be hidden."""
    bench, shard = await ready()
    bench.chat.typing_answers.extend([False] * 2)
    shard.intake.on_delivery(bench.command(typing=switch, id="c"))
    await asyncio.sleep(60)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.ret) == ("refused", "typing", -2)
    assert receipt.detail == "iLink answered -2"
    assert shown(bench) == [switch == "on"] * 2


async def test_a_renewal_that_ilink_refuses_is_tried_again_and_hidden_in_the_end() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, False, False])
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(2 * RENEW_S + 1)
    shard.intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(5)
    assert shown(bench) == [True, True, True, True, False]
    assert outcomes(bench)[0] == ("on", "accepted", "")


@pytest.mark.parametrize("dead", [True, False])
async def test_a_stale_token_ends_typing_quietly_and_hides_it_where_only_typing_met_it(dead: bool) -> None:
    """By then the bot's poll has ended, too."""
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, STALE])
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(RENEW_S + DOUBT_S - 1)
    assert shown(bench) == [True, True]
    if dead:
        bench.stale.add(BOT)
    await asyncio.sleep(300)
    assert shown(bench) == ([True, True] if dead else [True, True, False])
    shard.stop()


async def test_a_stale_token_is_told_at_once_to_whoever_hides_it() -> None:
    bench, shard = await ready()
    bench.chat.typing_answers.extend([True, STALE])
    shard.intake.on_delivery(bench.command(typing="on", id="on"))
    await asyncio.sleep(2)
    shard.intake.on_delivery(bench.command(typing="off", id="off"))
    await asyncio.sleep(1)
    assert outcomes(bench) == [("on", "accepted", ""), ("off", "refused", "needs_login")]
    await asyncio.sleep(DOUBT_S)
    assert shown(bench) == [True, False, False]


async def test_an_off_that_could_not_be_done_before_the_user_wrote_again_is_refused() -> None:
    """Each message shows it anew, and so its receipt came only once nobody wrote any more."""
    bench, shard = await ready(auto=True)
    bench.chat.typing_answers.extend([True, STALE])
    await user_writes(bench)
    await asyncio.sleep(RENEW_S + 1)
    shard.intake.on_delivery(bench.command(typing="off", id="off"))
    for _ in range(20):
        await asyncio.sleep(DOUBT_S / 9)
        await user_writes(bench)
    assert outcomes(bench) == [("off", "refused", "typing")]
    shard.stop()


async def test_nothing_is_called_while_the_token_is_tried_again_and_it_is_hidden_after() -> None:
    bench, shard = await showing()
    bench.stale.add(BOT)
    await asyncio.sleep(60)
    assert shown(bench) == [True]
    shard.intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    bench.stale.clear()
    await asyncio.sleep(5)
    assert shown(bench)[-1] is False


async def test_a_lost_login_calls_nothing_and_typing_is_hidden_once_the_bot_lives_again() -> None:
    bench, _ = await showing()
    await bench.bind(state="needs_login")
    await asyncio.sleep(3000)
    assert shown(bench) == [True]
    await bench.bind(state="active")
    await asyncio.sleep(1)
    assert shown(bench) == [True, False]


async def test_a_drain_does_not_wait_for_a_login() -> None:
    bench, shard = await showing()
    await bench.bind(state="needs_login")
    before = bench.clock.monotonic()
    await shard.drain(44.0)
    assert bench.clock.monotonic() - before < 1


async def test_an_unbound_bot_hides_it_with_its_last_token() -> None:
    bench, _ = await showing()
    await bench.bindings.remove(BOT)
    await asyncio.sleep(1)
    assert shown(bench) == [True, False]


async def test_nothing_is_called_without_the_lease() -> None:
    bench, shard = await showing()
    bench.leases.has_lease = False
    await asyncio.sleep(60)
    assert shown(bench) == [True]
    bench.leases.has_lease = True
    await asyncio.sleep(2)
    assert shown(bench) == [True, True]
    shard.stop()


async def test_no_ticket_is_asked_for_without_the_lease() -> None:
    bench, shard = await ready()
    bench.leases.has_lease = False
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(60)
    assert bench.chat.tickets_asked == []
    shard.stop()


# while the user waits ------------------------------------------------------------------------------------


async def test_each_message_shows_typing_until_the_answer_where_the_binding_says_so() -> None:
    bench, shard = await ready(auto=True)
    await user_writes(bench)
    await asyncio.sleep(12)
    assert shown(bench) == [True, True, True]
    shard.intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(60)
    assert shown(bench) == [True, True, True, False]


async def test_without_the_option_nothing_is_shown() -> None:
    bench, _shard = await ready()
    await user_writes(bench)
    await asyncio.sleep(12)
    assert bench.chat.tickets_asked == []


async def test_an_answer_that_must_wait_for_the_user_ends_typing() -> None:
    bench, shard = await ready()
    bench.hears(sends_used=9)
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    shard.intake.on_delivery(bench.command(items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]))
    await asyncio.sleep(5)
    assert parked(bench)
    assert shown(bench) == [True, False]
    shard.stop()


async def test_typing_stays_until_the_last_of_what_was_parked_is_sent() -> None:
    bench, shard = await ready(auto=True)
    bench.hears(sends_used=10)
    for text in ("a" * 2000, "b" * 2000, "c" * 2000):
        shard.intake.on_delivery(bench.command(text))
    await asyncio.sleep(5)
    bench.chat.took_s = 2.0
    await user_writes(bench)
    await asyncio.sleep(60)
    assert len(bench.chat.sent) == 3
    assert shown(bench).count(False) == 1
    assert bench.chat.typing[-1].at_s >= bench.chat.sent[-1].at_s + 2.0


async def test_a_message_during_the_answer_to_another_keeps_typing() -> None:
    bench, shard = await ready(auto=True)
    bench.chat.took_s = 3.0
    await user_writes(bench)
    shard.intake.on_delivery(bench.command("to the first"))
    await asyncio.sleep(1)
    await user_writes(bench)
    await asyncio.sleep(6)
    assert False not in shown(bench)
    shard.intake.on_delivery(bench.command("to the second"))
    await asyncio.sleep(10)
    assert shown(bench)[-1] is False


# the end and the next owner ------------------------------------------------------------------------------


async def test_a_drain_hides_everything() -> None:
    bench, shard = await showing()
    await shard.drain(10.0)
    assert shown(bench) == [True, False]


async def test_a_drain_does_not_wait_long_for_an_ilink_that_hangs() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(TICKET_S)
    bench.chat.ticket_took_s = 1000.0
    shard.intake.on_delivery(bench.command(typing="on"))
    await asyncio.sleep(1)
    before = bench.clock.monotonic()
    await shard.drain(44.0)
    assert bench.clock.monotonic() - before < 15


async def test_the_next_owner_hides_what_was_left_shown() -> None:
    bench, shard = await showing()
    shard.stop()  # as dead: nothing is hidden
    await settle()
    assert shown(bench) == [True]
    heir = Bench(bench, incarnation="me-2")
    heir.processor().intake.on_delivery(bench.command("hi"))
    await asyncio.sleep(5)
    assert shown(bench) == [True, False]


async def test_one_bots_calls_never_run_at_once(bench: Bench) -> None:
    """A bot has four connections; hanging ones must leave some to its messages."""
    await bench.bind()
    shard = bench.processor()
    bench.chat.ticket_took_s = 10.0
    for number in range(6):
        bench.hears(user=f"u{number}@im.wechat")
        shard.intake.on_delivery(bench.command(typing="on", user=f"u{number}@im.wechat"))
    await asyncio.sleep(15)
    assert len(bench.chat.tickets_asked) == 2
    shard.stop()


async def test_a_bot_that_moved_to_another_sandbox_is_hidden() -> None:
    bench, _ = await showing()

    def moved(now: Binding) -> Binding:
        return msgspec.structs.replace(now, sandbox="s2")

    await bench.bindings.update(BOT, moved)
    await asyncio.sleep(1)
    assert shown(bench) == [True, False]
