"""A shard's commands: taken, told to a user, each ended once, also across crashes and other owners."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract import Outbound, Receipt
from adapter.errors import BusRefused, Refused, Temporary
from adapter.names import H_COMMAND, H_MSG_ID, H_SANDBOX, H_TIME_MS, UNROUTED, peer_key, shard_of
from adapter.outbound.commands import read_command
from adapter.outbound.receipts import Name, Receipts
from adapter.outbound.settling import SETTLED_KEPT
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Message, Stored
from adapter.records import Hand
from adapter.timing import Turns
from tests.fakes import GAP_S, LIMITS, Bench, Failing, FakeBus, FakeDelivery, Rounds, settle
from tests.outbound.shards import BOT, THROTTLED, TIMEOUT, USER, finals, outcomes, parked, ready, user_writes

VIRTUAL_TIME = True


async def test_a_command_that_comes_again_while_in_hand_is_sent_once() -> None:
    """After each connect the consumer delivers again what is not settled; the ack goes to the newest delivery."""
    bench, shard = await ready()
    bench.chat.took_s = 5.0
    first = bench.command("hi", id="c1")
    shard.on_delivery(first)
    await asyncio.sleep(1)
    again = FakeDelivery(first.subject, first.data, seq=first.seq, time_ms=first.time_ms, suspect=True)
    shard.on_delivery(again)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["hi"]
    assert (first.acks, again.acks) == (0, 1)
    assert outcomes(bench) == [("c1", "accepted", "")]


async def test_a_command_whose_ack_got_lost_is_only_acked_again() -> None:
    bench, shard = await ready()
    first = bench.command("hi")
    shard.on_delivery(first)
    await asyncio.sleep(5)
    again = FakeDelivery(first.subject, first.data, seq=first.seq, time_ms=first.time_ms, suspect=True)
    shard.on_delivery(again)
    await settle()
    assert again.acks == 1
    assert bench.chat.texts == ["hi"]
    assert len(finals(bench)) == 1


async def test_what_was_settled_long_ago_is_looked_up_and_not_remembered() -> None:
    """A list of all of them would be as long as the shard has had commands."""
    bench, shard = await ready(gap_s=0.0)
    deliveries = [bench.command(typing="off", id=f"c{number}") for number in range(SETTLED_KEPT)]
    first = bench.command("hi", id="first")
    for delivery in (first, *deliveries):
        shard.on_delivery(delivery)
        await asyncio.sleep(2)
    assert len(shard._settled) == SETTLED_KEPT
    for delivery in (first, *deliveries):
        shard.on_delivery(delivery.again())
    await asyncio.sleep(60)
    assert bench.chat.texts == ["hi"]
    assert len(finals(bench)) == 1 + SETTLED_KEPT


async def test_a_stream_that_was_made_anew_begins_again() -> None:
    """An operator's hand: its sequences are those of commands that were settled, and it is none of them."""
    bench, shard = await ready()
    first = bench.command("a", id="a")
    later = bench.command("b", id="b")
    shard.on_delivery(first)
    shard.on_delivery(later)
    await asyncio.sleep(60)
    for old, text in ((first, "c"), (later, "d")):
        data = msgspec.json.encode({"text": text})
        shard.on_delivery(FakeDelivery(old.subject, data, seq=old.seq, time_ms=bench.clock.now_ms()))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b", "c", "d"]


ENDINGS: list[tuple[str, list[Any], str, str]] = [
    ("accepted", [Accepted("1", 0, None, "")], "accepted", ""),
    ("unconfirmed", [Accepted("", 0, None, "")], "accepted_unconfirmed", ""),
    ("refused", [Refused("invalid", "no such user", ret=-3)], "refused", "invalid"),
    ("uncertain", [TIMEOUT, TIMEOUT], "uncertain", ""),
    ("unreachable", [Temporary("http_5xx")] * 3, "dead_lettered", "unreachable"),
]


@pytest.mark.parametrize(
    ("script", "outcome", "reason"), [row[1:] for row in ENDINGS], ids=[row[0] for row in ENDINGS]
)
async def test_each_ending_is_told_once_and_settles_the_command(script: list[Any], outcome: str, reason: str) -> None:
    bench, shard = await ready()
    bench.chat.sends.extend(script)
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(120)
    assert outcomes(bench) == [("c1", outcome, reason)]
    assert delivery.acks == 1
    assert bench.bus.receipts()[0].received_at_ms == delivery.time_ms


async def test_a_receipt_says_what_ilink_said_and_what_is_left() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(Refused("rejected", "iLink answered -7", ret=-7, errcode=1, errmsg="nope"))
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.ret, receipt.errcode, receipt.errmsg) == (-7, 1, "nope")
    assert (receipt.bot, receipt.user, receipt.attempts) == (BOT, USER, 1)
    assert receipt.window.remaining == 10


async def test_each_receipt_goes_on_with_the_trace_of_its_command() -> None:
    bench, shard = await ready(is_open=False, merge_chars=100)
    shard.on_delivery(bench.command("a", headers={"traceparent": "00-a", "b3": "1"}))
    shard.on_delivery(bench.command("b"))
    shard.on_delivery(bench.command("c", headers={"traceparent": "00-c"}))
    shard.on_delivery(bench.command("d", headers={"traceparent": "x" * 1025}))
    await asyncio.sleep(30)
    await user_writes(bench, shard)
    await asyncio.sleep(30)
    told = [stored.headers.get("traceparent") for stored in bench.bus.found("EVENT") if "receipt" in stored.subject]
    assert bench.chat.texts == ["a\n\nb\n\nc\n\nd"]
    assert told == ["00-a", None, "00-c", None] * 2
    assert not any("b3" in stored.headers for stored in bench.bus.found("EVENT"))


async def test_a_dead_letter_holds_the_original_before_its_receipt() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Temporary("http_5xx")] * 3)
    shard.on_delivery(bench.command("hi", id="c1", headers={"traceparent": "00-1"}))
    await asyncio.sleep(60)
    (dead,) = bench.bus.found("DEAD")
    assert msgspec.json.decode(dead.data) == {"text": "hi", "id": "c1"}
    assert dead.headers["traceparent"] == "00-1"
    assert bench.bus.writes.index("dead") < bench.bus.writes.index("event")


async def test_a_dead_letter_that_its_stream_refuses_costs_nobody_a_receipt() -> None:
    bench, shard = await ready()
    bench.bus.refuse = lambda message: BusRefused(10077, "full") if message.stream == "dead" else None
    delivery = bench.command(data=b"hello", headers={H_MSG_ID: "h1"})
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", "dead_lettered", "unreadable")]
    assert delivery.acks == 1


async def test_a_receipt_of_what_was_never_sent_says_whose_it_is() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("a", when_closed="refuse"))
    shard.on_delivery(bench.command("b", expires_in_s=10))
    shard.on_delivery(bench.command("c"))
    await asyncio.sleep(60)
    await bench.bindings.remove(BOT)
    await asyncio.sleep(5)
    assert [receipt.reason for receipt in finals(bench)] == ["window_closed", "expired", "not_bound"]
    assert {(receipt.bot, receipt.user) for receipt in finals(bench)} == {(BOT, USER)}


BROKEN: list[tuple[str, bytes, str, str]] = [
    ("no-json", b"hello", "dead_lettered", "unreadable"),
    ("too-large", b'{"text":"' + b"a" * 262_144 + b'"}', "dead_lettered", "too_large"),
    ("no-text", b"{}", "refused", "invalid"),
    ("other-sandbox", b'{"sandbox":"s2","text":"hi"}', "refused", "invalid"),
    ("no-sandbox-at-all", b'{"sandbox":"S 1","text":"hi"}', "refused", "invalid"),
    ("empty-sandbox", b'{"sandbox":"","text":"hi"}', "refused", "invalid"),
    ("too-long", msgspec.json.encode({"text": "a" * 200_000}), "refused", "too_long"),
]


@pytest.mark.parametrize(("data", "outcome", "reason"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
async def test_what_is_no_command_is_told_under_the_id_of_its_header(data: bytes, outcome: str, reason: str) -> None:
    bench, shard = await ready()
    delivery = bench.command(data=data, headers={H_MSG_ID: "h1"})
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", outcome, reason)]
    assert delivery.acks == 1
    assert len(bench.bus.found("DEAD")) == (outcome == "dead_lettered")


@pytest.mark.parametrize(
    ("data", "outcome", "reason"),
    [
        (b'{"text":" ","id":"c1"}', "refused", "invalid"),
        (b'{"text":5,"id":"c1"}', "dead_lettered", "unreadable"),
        (b'{"text":"hi","when_closed":"later","id":"c1","sandbox":"S 1"}', "dead_lettered", "unreadable"),
        (b'{"text":"cut \\ud83d","format":"html","id":"c1"}', "dead_lettered", "unreadable"),
    ],
    ids=["blank", "a-number", "unknown-word", "half-an-emoji"],
)
async def test_what_is_wrong_in_its_content_is_told_under_its_own_id(data: bytes, outcome: str, reason: str) -> None:
    """The sandbox waits for a receipt with the id that it gave."""
    bench, shard = await ready()
    shard.on_delivery(bench.command(data=data, headers={H_MSG_ID: "h1"}))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", outcome, reason)]


@pytest.mark.parametrize(
    "ident", [b'""', b"5", b"null", b'"' + b"x" * 129 + b'"'], ids=["empty", "number", "null", "long"]
)
async def test_an_id_that_is_none_leaves_the_headers(ident: bytes) -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command(data=b'{"text":5,"id":' + ident + b"}", headers={H_MSG_ID: "h1"}))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", "dead_lettered", "unreadable")]


@pytest.mark.parametrize(
    ("name", "told_as"), [("Upper", "Upper"), ("x" * 3000, UNROUTED)], ids=["capitals", "endless"]
)
async def test_a_name_that_no_sandbox_can_have_is_refused(name: str, told_as: str) -> None:
    """Where its receipt would need a subject longer than a server takes, it is told as one of nobody."""
    bench, shard = await ready()
    delivery = bench.command("hi", sandbox=name, id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.outcome, receipt.reason) == (told_as, "refused", "invalid")
    assert delivery.acks == 1


async def test_a_repeated_id_sends_nothing_and_says_nothing() -> None:
    bench, shard = await ready()
    for text in ("hi", "hi again", "and again"):
        delivery = bench.command(text, id="c1")
        shard.on_delivery(delivery)
        await asyncio.sleep(5)
        assert delivery.acks == 1
    assert bench.chat.texts == ["hi"]
    assert outcomes(bench) == [("c1", "accepted", "")]


async def test_a_repeated_id_in_the_same_queue_sends_nothing() -> None:
    bench, shard = await ready()
    for text in ("hi", "hi again", "bye"):
        shard.on_delivery(bench.command(text, id="c2" if text == "bye" else "c1"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["hi", "bye"]
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "accepted", "")]


async def test_a_repeated_id_of_a_parked_command_is_dropped() -> None:
    bench, shard = await ready(is_open=False)
    for _ in range(2):
        delivery = bench.command("hi", id="c1")
        shard.on_delivery(delivery)
        await asyncio.sleep(5)
        assert delivery.acks == 1
    await user_writes(bench, shard)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["hi"]
    assert outcomes(bench) == [("c1", "parked", "window_closed"), ("c1", "accepted", "")]


async def test_outcomes_are_counted_by_what_was_sent() -> None:
    bench, shard = await ready()
    for delivery in (
        bench.command("hi", id="c1"),
        bench.command("hi", id="c1"),
        bench.command(id="c2", typing="on"),
        bench.command(id="c3", items=[]),
    ):
        shard.on_delivery(delivery)
    await asyncio.sleep(60)
    for kind, outcome, reason in (
        ("text", "accepted", "none"),
        ("text", "duplicate", "none"),
        ("typing", "accepted", "none"),
        ("unreadable", "dead_lettered", "unreadable"),
    ):
        assert bench.metrics.value("outbound_messages_total", kind=kind, outcome=outcome, reason=reason) == 1


async def test_a_receipt_that_the_stream_refuses_is_not_counted_as_given() -> None:
    bench, shard = await ready()
    bench.bus.refuse = lambda message: BusRefused(10054, "too large") if message.stream == "event" else None
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert bench.metrics.value("outbound_messages_total", kind="text", outcome="accepted", reason="none") == 1
    assert bench.metrics.value("receipts_total", outcome="accepted") == 0


async def test_a_receipt_waits_for_room_and_its_command_with_it() -> None:
    bench, shard = await ready()
    full = BusRefused(10077, "maximum bytes exceeded")
    bench.bus.refuse = lambda message: full if message.stream == "event" else None
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(60)
    assert (len(bench.chat.sent), delivery.acks, outcomes(bench)) == (1, 0, [])
    bench.bus.refuse = lambda message: None
    await asyncio.sleep(60)
    assert (len(bench.chat.sent), delivery.acks, outcomes(bench)) == (1, 1, [("c1", "accepted", "")])


async def test_a_sandbox_without_a_bot_is_told_so() -> None:
    bench = Bench()
    shard = bench.shard()
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "not_bound")]
    assert bench.asked_bound == 1


async def test_a_bind_that_was_stored_before_takes_effect_first() -> None:
    """Bind, then send, without waiting for an answer: in that order they count. What follows waits its turn."""
    bench = Bench()
    shard = bench.shard()
    bench.hears()

    async def bound() -> None:
        await asyncio.sleep(1)
        await bench.bind()

    bench.bound_yet = bound
    shard.on_delivery(bench.command("one", id="c1"))
    await asyncio.sleep(0.5)
    shard.on_delivery(bench.command("two", id="c2"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["one", "two"]


async def test_a_bus_that_is_away_meanwhile_does_not_strand_the_sandbox() -> None:
    bench = Bench()
    shard = bench.shard()
    bench.bound_yet = Failing(3, Temporary("bus_down"))
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(10)
    shard.on_delivery(bench.command("hi", id="c2"))
    await asyncio.sleep(10)
    assert outcomes(bench) == [("c1", "refused", "not_bound"), ("c2", "refused", "not_bound")]


async def test_several_bots_need_a_name() -> None:
    bench, shard = await ready()
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    bench.hears("b2@im.bot", "u2@im.wechat")
    shard.on_delivery(bench.command("hi", id="c1"))
    shard.on_delivery(bench.command("by bot", id="c2", bot="b2@im.bot"))
    shard.on_delivery(bench.command("by user", id="c3", user=USER))
    await asyncio.sleep(10)
    assert sorted(outcomes(bench)) == [
        ("c1", "refused", "ambiguous_bot"),
        ("c2", "accepted", ""),
        ("c3", "accepted", ""),
    ]
    assert {(sent.bot, sent.text) for sent in bench.chat.sent} == {("b2@im.bot", "by bot"), (BOT, "by user")}


async def test_what_was_being_sent_to_one_user_goes_to_no_other_after_a_crash() -> None:
    """It names nobody, and the sandbox serves another user by now, who would read what was meant for the first."""
    bench, shard = await ready()
    command = bench.command(id="c1", items=[{"kind": "text", "text": text} for text in ("one", "two")])
    shard.on_delivery(command)
    await asyncio.sleep(GAP_S / 2)
    assert bench.chat.texts == ["one"]
    shard.stop()
    binding = bench.bindings.get(BOT)
    assert binding is not None
    await bench.events.binding(binding.event("unbound"))
    await bench.bindings.remove(BOT)

    heir = Bench(bench, incarnation="me-2")
    await heir.bind(bot="b2@im.bot", user="u2@im.wechat")
    heir.hears("b2@im.bot", "u2@im.wechat")
    second = heir.shard()
    command.suspect = True
    second.on_delivery(command)
    after = heir.command("to the new one", id="c2")
    second.on_delivery(after)
    await asyncio.sleep(30)
    assert [(sent.bot, sent.text) for sent in bench.chat.sent] == [(BOT, "one"), ("b2@im.bot", "to the new one")]
    assert outcomes(heir) == [("c1", "refused", "not_bound"), ("c2", "accepted", "")]


async def test_what_comes_again_waits_for_no_control_command_where_its_bot_is_bound() -> None:
    """Others may be bound for minutes, or control be paused."""
    bench = Bench()
    await bench.bind()
    bench.hears()
    shard = bench.shard()
    bench.bound_yet = Failing(1000, Temporary("control_busy"))
    shard.on_delivery(bench.command("one", id="c1", suspect=True))
    shard.on_delivery(bench.command("two", id="c2"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["one", "two"]


async def test_an_unbind_refuses_what_waits() -> None:
    bench, shard = await ready(is_open=False)
    for number in range(2):
        shard.on_delivery(bench.command("hi", id=f"c{number}"))
    await asyncio.sleep(5)
    await bench.bindings.remove(BOT)
    await asyncio.sleep(5)
    assert outcomes(bench)[2:] == [("c0", "refused", "not_bound"), ("c1", "refused", "not_bound")]
    assert parked(bench) == []


async def test_a_new_bot_of_the_same_user_gets_what_was_parked() -> None:
    bench, shard = await ready(is_open=False)
    for number in range(2):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(5)
    await bench.bind(bot="b9@im.bot")
    await bench.bindings.remove(BOT)
    await asyncio.sleep(5)
    assert finals(bench) == []

    await user_writes(bench, shard, bot="b9@im.bot")
    await asyncio.sleep(30)
    assert [(sent.bot, sent.text) for sent in bench.chat.sent] == [("b9@im.bot", "t0"), ("b9@im.bot", "t1")]
    assert [receipt.bot for receipt in finals(bench)] == ["b9@im.bot", "b9@im.bot"]


async def test_the_lane_of_a_user_who_is_learned_later_keeps_its_order() -> None:
    """Before a bot's first message nobody knows whom it serves."""
    bench = Bench()
    await bench.bind(user="")
    shard = bench.shard()
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(5)
    assert [reason for *_, reason in outcomes(bench)] == ["window_closed"] * 3

    await bench.bind()
    shard.on_delivery(bench.command("t3", id="c3"))
    await user_writes(bench, shard)
    shard.on_delivery(bench.command("t4", id="c4"))
    await asyncio.sleep(60)
    assert bench.chat.texts == [f"t{number}" for number in range(5)]
    assert [receipt.command for receipt in finals(bench)] == [f"c{number}" for number in range(5)]


async def test_a_user_who_is_learned_while_a_command_is_being_parked() -> None:
    bench = Bench()
    await bench.bind(user="")
    shard = bench.shard()
    learned = False

    async def learn(message: Message) -> None:
        nonlocal learned
        if message.stream == "parked" and not learned:
            learned = True
            await bench.bind()
            await user_writes(bench, shard)
            await asyncio.sleep(0.5)

    bench.bus.on_publish = learn
    with capture_logs() as logs:
        for number in range(3):
            shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
        await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "t2"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]
    assert "lane.crashed" not in [line["event"] for line in logs]


def in_hand(bench: Bench, delivery: FakeDelivery, **fields: Any) -> Hand:
    """The record as an owner leaves it who dies with this command in hand."""
    body = msgspec.json.decode(delivery.data, type=Outbound)
    command = read_command(body, sandbox="s1", ident=body.id or "", time_ms=delivery.time_ms, limits=LIMITS)
    known = {"command": command.id, "client": command.client, "sandbox": command.sandbox}
    return Hand(**{**known, "attempts": 1, "tried": 1, **fields})


async def test_the_next_owner_resumes_what_the_dead_one_had_in_hand() -> None:
    bench, shard = await ready()
    parts = [{"kind": "text", "text": text} for text in ("a", "b", "c")]
    delivery = bench.command(id="c1", items=parts)
    bench.chat.hold_sends[USER] = asyncio.Event()
    shard.on_delivery(delivery)
    await asyncio.sleep(1)
    (lost,) = bench.chat.sent
    bench.leases.owned.clear()
    shard.stop()

    heir = Bench(bench, incarnation="heir-1")
    bench.chat.hold_sends.clear()
    second = heir.shard()
    await second.load()
    redelivered = delivery.again()
    second.on_delivery(redelivered)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["a", "a", "b", "c"]
    assert bench.chat.sent[1].client_id == lost.client_id
    assert outcomes(bench) == [("c1", "accepted", "")]
    assert redelivered.acks == 1


@pytest.mark.parametrize("is_bound", [True, False], ids=["bound", "unbound"])
async def test_the_next_owner_ends_late_what_a_newer_bot_had_begun_to_send(is_bound: bool) -> None:
    """It lies parked under the bot before, whose record still names the command that it sent last."""
    bench = Bench()
    await bench.bind()
    bench.hears(used=10, hand=Hand(command="c0", client="c0", sandbox="s1", attempts=1, tried=1))
    shard = bench.shard()
    parts = [{"kind": "text", "text": text} for text in ("a", "b")]
    shard.on_delivery(bench.command(id="c1", items=parts, expires_in_s=60))
    await asyncio.sleep(5)
    assert parked(bench) == ["c1"]
    await bench.bind(bot="b9@im.bot")
    await bench.bindings.remove(BOT)
    bench.chat.sends.extend([Accepted("m1", 0, None, ""), TIMEOUT])
    await user_writes(bench, shard, bot="b9@im.bot")
    await asyncio.sleep(GAP_S + 0.5)
    assert bench.chat.texts == ["a", "b"]
    bench.leases.owned.clear()
    shard.stop()

    heir = Bench(bench, incarnation="heir-1")
    if not is_bound:
        await heir.events.binding((await heir.bind(bot="b9@im.bot")).event("bound"))
        await heir.bindings.remove("b9@im.bot")
    await asyncio.sleep(60)
    second = heir.shard()
    await second.load()
    await asyncio.sleep(30)
    (receipt,) = finals(bench)
    assert (receipt.outcome, receipt.message_ids, receipt.attempts) == ("uncertain", ["m1"], 2)


async def test_a_command_that_had_its_final_receipt_is_only_acked() -> None:
    """The owner died between the receipt and the ack."""
    bench, shard = await ready()
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    shard.stop()

    second = Bench(bench, incarnation="heir-1").shard()
    redelivered = delivery.again()
    second.on_delivery(redelivered)
    await asyncio.sleep(5)
    assert redelivered.acks == 1
    assert bench.chat.texts == ["hi"]
    assert outcomes(bench) == [("c1", "accepted", "")]


@pytest.mark.parametrize("data", [b"hello", b"{}"], ids=["unreadable", "refused"])
async def test_a_broken_command_that_had_its_final_receipt_is_only_acked(data: bytes) -> None:
    bench, shard = await ready()
    delivery = bench.command(data=data)
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    second = Bench(bench, incarnation="heir-1").shard()
    redelivered = delivery.again()
    second.on_delivery(redelivered)
    await asyncio.sleep(5)
    assert redelivered.acks == 1
    assert len(bench.bus.receipts()) == 1


async def test_the_next_owner_finds_what_is_parked_in_order_and_before_anything_new() -> None:
    bench, shard = await ready(is_open=False)
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(5)
    shard.stop()

    heir = Bench(bench, incarnation="heir-1")
    second = heir.shard()
    await second.load()
    second.on_delivery(heir.command("t3", id="c3"))
    await asyncio.sleep(5)
    await user_writes(heir, second)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1", "t2", "t3"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2", "c3"]


async def test_the_next_owner_finds_what_was_parked_before_its_user_was_known() -> None:
    """Learned, and then the owner died before it could send: nothing new may overtake."""
    bench = Bench()
    await bench.bind(user="")
    shard = bench.shard()
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(5)
    shard.stop()
    await bench.bind()
    bench.hears()

    heir = Bench(bench, incarnation="heir-1")
    second = heir.shard()
    await second.load()
    second.on_delivery(heir.command("t1", id="c1"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]


async def test_a_parked_command_that_had_its_final_receipt_is_only_removed() -> None:
    """The owner died between the receipt and the removal."""
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("t0", id="c0"))
    shard.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(5)
    left = list(bench.bus.kept)
    await user_writes(bench, shard)
    await asyncio.sleep(GAP_S / 2)
    assert bench.chat.texts == ["t0"]
    shard.stop()
    bench.bus.kept += [kept for kept in left if kept.stream.endswith("PARKED") and kept not in bench.bus.kept]
    bench.bus.kept.sort(key=lambda kept: kept.stored.seq)

    second = Bench(bench, incarnation="heir-1").shard()
    await second.load()
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]
    assert parked(bench) == []


async def test_a_parked_command_without_its_ack_is_not_parked_twice() -> None:
    bench, shard = await ready(is_open=False)
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    shard.stop()
    heir = Bench(bench, incarnation="heir-1")
    second = heir.shard()
    await second.load()
    redelivered = delivery.again()
    second.on_delivery(redelivered)
    await asyncio.sleep(5)
    assert redelivered.acks == 1
    await user_writes(heir, second)
    await asyncio.sleep(10)
    assert bench.chat.texts == ["hi"]
    assert outcomes(bench) == [("c1", "parked", "window_closed"), ("c1", "accepted", "")]


async def test_who_loses_the_lease_stops_at_once_and_settles_nothing() -> None:
    bench, shard = await ready()
    deliveries = [bench.command(f"t{number}") for number in range(3)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(0.5)
    bench.leases.is_valid = False
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0"]
    assert [delivery.acks for delivery in deliveries] == [1, 0, 0]


async def test_commands_that_come_at_once_are_worked_on_a_few_in_each_round_of_the_event_loop() -> None:
    """Also those behind the first of their lanes: all steps of a round together hold up the renewal of the lease."""
    bench, bots, each = Bench(), [f"b{number}@im.bot" for number in range(10)], 5
    for number, bot in enumerate(bots):
        await bench.bind("s1", bot, f"u{number}@im.wechat")
    rounds, stored = Rounds(), asyncio.Event()

    def stale(_: str) -> bool:
        """Asked once for each step of a lane: a login is needed, so that each command is parked by itself."""
        rounds.note("step")
        return True

    async def store(_: Message) -> None:
        await stored.wait()

    bench.bus.on_publish = store
    shard = bench.shard(stale=stale, turns=Turns(3))
    for bot in bots:
        for number in range(each):
            shard.on_delivery(bench.command(f"t{number}", bot=bot))
    await asyncio.sleep(5)
    stored.set()  # all first ones at the same moment, as after a pause of the bus
    await asyncio.sleep(30)
    assert [outcome for _, outcome, _ in outcomes(bench)] == ["parked"] * len(bots) * each
    assert rounds.seen["step"].total() >= len(bots) * each
    assert max(rounds.seen["step"].values()) <= 6  # two of those rounds may fall into one of these


async def test_a_lease_that_was_only_paused_goes_on_without_another_command() -> None:
    """Nothing else would wake the lane: what is in hand is not delivered again before the next break."""
    bench, shard = await ready()
    bench.leases.is_valid = False
    delivery = bench.command("t0", id="c0")
    shard.on_delivery(delivery)
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    bench.leases.is_valid = True
    bench.leases.changed.notify()
    await asyncio.sleep(1)
    assert bench.chat.texts == ["t0"]
    assert (delivery.acks, outcomes(bench)) == (1, [("c0", "accepted", "")])


@pytest.mark.parametrize("again_ours", [False, True], ids=["another has the shard", "it is ours again"])
async def test_a_send_that_was_held_up_until_the_shard_was_lost_does_not_leave(again_ours: bool) -> None:
    """Also where this replica took the shard a second time: the lanes of that time have the command in hand."""
    bench, shard = await ready()
    going_on = asyncio.Event()

    async def hold(_: str) -> None:
        await going_on.wait()

    bench.contexts_bucket.on_write = hold
    delivery = bench.command("t0", id="c0")
    shard.on_delivery(delivery)
    await asyncio.sleep(0.5)
    bench.leases.owned.discard(shard.number)
    shard.stop()
    if again_ours:
        bench.leases.owned.add(shard.number)
    going_on.set()
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    assert delivery.acks == 0


async def test_who_lost_the_shard_parks_nothing_and_tells_no_failure() -> None:
    """The next owner may have more luck, and does not look for what is parked once it has begun."""
    bench, shard = await ready()
    bench.chat.hold_sends[USER] = asyncio.Event()
    bench.chat.sends.append(THROTTLED)
    delivery = bench.command("t0", id="c0", when_closed="park")
    shard.on_delivery(delivery)
    await asyncio.sleep(1)
    bench.leases.owned.discard(shard.number)
    shard.stop()
    bench.chat.hold_sends[USER].set()
    await asyncio.sleep(60)
    assert len(bench.chat.sent) == 1
    assert (parked(bench), outcomes(bench), delivery.acks) == ([], [], 0)


async def late_copy(bench: Bench, delivery: FakeDelivery, ident: str) -> None:
    """What a replica stores that is about to lose the shard, and may have settled."""
    headers = {H_MSG_ID: f"late:{ident}", H_SANDBOX: "s1", H_COMMAND: ident, H_TIME_MS: str(delivery.time_ms)}
    subject = bench.names.parked(shard_of("s1"), peer_key(BOT, USER))
    await bench.bus.publish(Message("parked", subject, delivery.data, headers))


async def test_a_few_shards_at_a_time_read_what_is_parked() -> None:
    """All do after a reconnect, and where each answer waits behind all others' none may come in time."""
    bench = Bench()
    reading = most = 0

    class Slow(FakeBus):
        async def read(self, stream: str, subject: str, **where: Any) -> AsyncIterator[Stored]:
            nonlocal reading, most
            reading += 1
            most = max(most, reading)
            await asyncio.sleep(1)
            reading -= 1
            async for stored in super().read(stream, subject, **where):
                yield stored

    needs = bench.outgoing(history=Slow(bench.names, bench.clock), loading=asyncio.Semaphore(2))
    shards = [Shard(number, needs) for number in range(5)]
    await asyncio.gather(*(shard.load() for shard in shards))
    assert most == 2


async def test_what_the_owner_before_parked_late_is_found_at_the_next_reset_and_keeps_its_place() -> None:
    bench = Bench()
    await bench.bind()
    heir = bench.shard()
    await heir.load()
    late = bench.command("t0", id="c0")
    await late_copy(bench, late, "c0")  # and settled it: it is not delivered any more
    await heir.load()
    heir.on_delivery(bench.command("t1", id="c1"))
    await user_writes(bench, heir)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]
    assert parked(bench) == []


async def test_what_was_found_before_a_read_broke_off_keeps_its_place() -> None:
    """The next read finds it known, and put nothing in order."""
    bench = Bench()
    await bench.bind()
    heir = bench.shard()
    await heir.load()
    await late_copy(bench, bench.command("t0", id="c0"), "c0")
    heir.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(30)
    read = bench.bus.read

    async def breaks_off(*where: Any, **how: Any) -> AsyncIterator[Stored]:
        async for stored in read(*where, **how):
            yield stored
        raise Temporary("bus_down")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench.bus, "read", breaks_off)
        with pytest.raises(Temporary):
            await heir.load()
    await heir.load()
    await user_writes(bench, heir)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]


class Interrupted:
    """Receipts during whose first look the consumer is reset."""

    def __init__(self, receipts: Receipts, reset: Callable[[], Awaitable[None]]) -> None:
        self._receipts = receipts
        self._resets = [reset]

    async def find_finals(self, sandbox: str, wanted: Collection[Name]) -> dict[Name, Receipt]:
        found = await self._receipts.find_finals(sandbox, wanted)
        if self._resets:
            await self._resets.pop()()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._receipts, name)


async def test_what_a_reset_finds_while_receipts_are_looked_up_is_looked_up_too() -> None:
    """It stands before what was looked up, and was told to be refused."""
    bench, former = await ready()
    bench.chat.sends.append(Refused("rejected", "no"))
    told, waits = bench.command("t0", id="c0"), bench.command("t1", id="c1")
    former.on_delivery(told)
    await asyncio.sleep(30)
    await late_copy(bench, told, "c0")
    hidden = bench.bus.kept.pop()  # by a server that lags
    await late_copy(bench, waits, "c1")

    async def reset() -> None:
        bench.bus.kept.insert(0, hidden)
        await heir.load()

    heir = bench.shard(receipts=Interrupted(bench.receipts, reset))
    await heir.load()
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert [(receipt.command, receipt.outcome) for receipt in finals(bench)] == [
        ("c0", "refused"),
        ("c1", "accepted"),
    ]
    assert parked(bench) == []


async def test_a_late_copy_of_what_is_in_hand_is_not_sent_a_second_time() -> None:
    bench, shard = await ready()
    await shard.load()
    bench.chat.took_s = 3.0
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(2)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(1)
    await late_copy(bench, deliveries[1], "c1")
    await shard.load()
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert parked(bench) == ["c1"]
    bench.bus.forget_ids()
    await shard.load()  # it was sent meanwhile
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]
    assert parked(bench) == []


async def test_a_late_copy_of_what_was_told_is_not_merged_with_what_waits() -> None:
    """It lies behind a command that was not told: the first one says nothing about it."""
    bench, shard = await ready()
    told = bench.command("t0", id="c0")
    shard.on_delivery(told)
    await asyncio.sleep(5)
    bench.hears(inbound_ms=0)
    shard.stop()
    closed = Bench(bench, incarnation="me-2")
    second = closed.shard()
    second.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(5)
    await late_copy(bench, told, "c0")
    second.stop()
    bench.bus.forget_ids()

    heir = Bench(bench, incarnation="heir-1")
    third = heir.shard(merge_chars=100)
    await third.load()
    third.on_delivery(bench.command("t2", id="c2"))
    await user_writes(heir, third)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "t2"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]
    assert parked(bench) == []


async def test_a_shard_that_comes_back_begins_with_what_the_bus_knows() -> None:
    """Another replica sent for it meanwhile: what was kept in memory of before is not true any more."""
    bench, shard = await ready()
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(5)
    shard.stop()
    other = Bench(bench, incarnation="other-1")
    there = other.shard()
    await there.load()
    there.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(5)
    there.stop()
    back = bench.shard()
    await back.load()
    used = (await bench.contexts.peer(BOT, USER)).context.used
    assert used == 2


async def test_draining_ends_what_is_out_and_starts_nothing() -> None:
    bench, shard = await ready()
    bench.chat.took_s = 2.0
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(1)
    await shard.drain(10.0)
    assert bench.chat.texts == ["t0"]
    assert outcomes(bench) == [("c0", "accepted", "")]
    assert [delivery.acks for delivery in deliveries] == [1, 0, 0]


async def test_draining_waits_no_longer_than_it_may() -> None:
    bench, shard = await ready()
    bench.chat.hold_sends[USER] = asyncio.Event()
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    began = bench.clock.monotonic()
    await shard.drain(10.0)
    assert bench.clock.monotonic() - began <= 12.0


async def test_a_bus_that_is_away_delays_and_loses_nothing() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(5)
    shard.stop()
    heir = Bench(bench, incarnation="heir-1")
    second = heir.shard()
    bench.bus.unreadable = 5
    with pytest.raises(Temporary):
        await second.load()
    delivery = heir.command("t1", id="c1", suspect=True)
    second.on_delivery(delivery)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1"]
    assert delivery.acks == 1


async def test_a_message_in_the_parked_stream_that_nobody_can_read_stops_nothing() -> None:
    bench, shard = await ready(is_open=False)
    subject = bench.names.parked(shard.number, peer_key(BOT, USER))
    bench.bus.put(subject, b"hello", {H_COMMAND: "x", H_TIME_MS: "1"})
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    second = Bench(bench, incarnation="heir-1").shard()
    await second.load()
    await user_writes(bench, second)
    await asyncio.sleep(10)
    assert bench.chat.texts == ["hi"]


async def test_the_census_counts_what_is_in_hand_and_what_waits() -> None:
    bench, shard = await ready()
    bench.chat.hold_sends[USER] = asyncio.Event()
    first = bench.command("t0")
    shard.on_delivery(first)
    shard.on_delivery(bench.command("t1"))
    await asyncio.sleep(1)
    found: Counter[str] = Counter()
    assert shard.census(found) == (2, first.time_ms)
    assert not found
    shard.stop()
