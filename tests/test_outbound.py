"""The lanes: per user in order and one at a time, nobody waits for anybody else, one final receipt per command."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.commands import read_command
from adapter.contract import FINAL_OUTCOMES, Outbound, Receipt
from adapter.errors import BusRefused, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.names import H_COMMAND, H_MSG_ID, H_SANDBOX, H_TIME_MS, UNROUTED, peer_key, shard_of
from adapter.outbound import Shard
from adapter.ports import Accepted, Message, Stored
from adapter.receipts import Name, Receipts
from adapter.records import Hand
from adapter.settling import GONE_S, SETTLED_KEPT
from adapter.timing import Turns
from tests.fakes import GAP_S, LIMITS, RULES, Bench, Failing, FakeBus, FakeDelivery, Rounds, settle

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"
THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")
TIMEOUT = Uncertain("timeout", "no answer")


async def ready(*, is_open: bool = True, **changes: Any) -> tuple[Bench, Shard]:
    """One bound user; by default with an open window."""
    bench = Bench()
    await bench.bind()
    if is_open:
        bench.hears()
    return bench, bench.shard(**changes)


async def user_writes(bench: Bench, shard: Shard, *, bot: str = BOT, user: str = USER, sandbox: str = "s1") -> None:
    """What a poller does with a message: a new window, then the news for the lanes."""
    await bench.wrote(bot, user, f"in:{bench.clock.now_ms()}")
    shard.heard(sandbox, bot, user)


def finals(bench: Bench) -> list[Receipt]:
    return [receipt for receipt in bench.bus.receipts() if receipt.outcome in FINAL_OUTCOMES]


def outcomes(bench: Bench) -> list[tuple[str, str, str]]:
    return [(receipt.command, receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()]


def parked(bench: Bench) -> list[str]:
    return [stored.headers[H_COMMAND] for stored in bench.bus.found("PARKED")]


# order and pace ------------------------------------------------------------------------------------------


async def test_commands_of_one_user_go_in_order_one_at_a_time() -> None:
    bench, shard = await ready()
    bench.chat.took_s = 3.0
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(5)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(60)

    assert bench.chat.texts == ["t0", "t1", "t2", "t3", "t4"]
    assert bench.chat.overlaps == 0
    assert outcomes(bench) == [(f"c{number}", "accepted", "") for number in range(5)]
    assert [delivery.acks for delivery in deliveries] == [1] * 5


async def test_two_sends_to_one_user_keep_their_distance() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command(items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]))
    shard.on_delivery(bench.command("c"))
    await asyncio.sleep(60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [later - earlier for earlier, later in pairwise(at)] == [GAP_S, GAP_S]


async def test_the_distance_is_kept_also_where_nobody_answers() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, Temporary("http_5xx")])
    shard.on_delivery(bench.command("a"))
    await asyncio.sleep(60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert len(at) == 3
    assert all(later - earlier >= GAP_S for earlier, later in pairwise(at))


async def test_no_lane_waits_for_another() -> None:
    """One user gets no answer, one is throttled, one has a closed window; the fourth notices nothing."""
    bench = Bench()
    for number in range(1, 5):
        await bench.bind(bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        if number != 3:
            bench.hears(f"b{number}@im.bot", f"u{number}@im.wechat")
    shard = bench.shard()
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    bench.chat.sends_to["u2@im.wechat"] = deque([THROTTLED])
    for text in ("one", "two"):
        for number in range(1, 5):
            shard.on_delivery(bench.command(text, bot=f"b{number}@im.bot", id=f"{text}-{number}"))
    await asyncio.sleep(5)

    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [
        ("u1@im.wechat", "one"),
        ("u2@im.wechat", "one"),
        ("u4@im.wechat", "one"),
        ("u4@im.wechat", "two"),
    ]
    assert sorted(parked(bench)) == ["one-2", "one-3", "two-2", "two-3"]
    shard.stop()


@pytest.mark.parametrize("users", [300, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_a_user_whose_request_hangs_holds_up_none_of_many_others(users: int) -> None:
    """Over all shards, the hanging one first: the commands of all others are sent, and theirs once it is answered."""
    bench = Bench()
    for number in range(users):
        await bench.bind(sandbox=f"s{number}", bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        bench.hears(f"b{number}@im.bot", f"u{number}@im.wechat")
    names = {shard_of(f"s{number}"): f"s{number}" for number in range(users)}
    shards = {number: bench.shard(sandbox) for number, sandbox in names.items()}
    bench.chat.hold_sends["u0@im.wechat"] = asyncio.Event()
    for number in range(users):
        for text in ("one", "two"):
            shards[shard_of(f"s{number}")].on_delivery(
                bench.command(text, sandbox=f"s{number}", id=f"{text}-{number}")
            )
    await asyncio.sleep(60)
    assert Counter(sent.user for sent in bench.chat.sent) == {
        f"u{number}@im.wechat": 2 if number else 1 for number in range(users)
    }
    assert bench.chat.overlaps == 0
    bench.chat.hold_sends["u0@im.wechat"].set()
    await asyncio.sleep(10)
    assert [sent.text for sent in bench.chat.sent if sent.user == "u0@im.wechat"] == ["one", "two"]
    assert len(finals(bench)) == 2 * users


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


# one final receipt each ----------------------------------------------------------------------------------


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


# parking -------------------------------------------------------------------------------------------------


async def test_what_must_wait_is_parked_and_flushed_in_order() -> None:
    bench, shard = await ready(is_open=False)
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(5)
    assert parked(bench) == ["c0", "c1", "c2"]
    assert [delivery.acks for delivery in deliveries] == [1, 1, 1]
    assert [outcome for _, outcome, _ in outcomes(bench)] == ["parked"] * 3

    await user_writes(bench, shard)
    shard.on_delivery(bench.command("t3", id="c3"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "t2", "t3"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2", "c3"]
    assert parked(bench) == []


async def test_what_is_parked_and_not_shown_for_a_moment_is_not_overtaken() -> None:
    """By a cluster that is losing its leaders. What an operator removed is not waited for for ever."""
    bench, shard = await ready(is_open=False)
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(5)
    hidden = [kept for kept in bench.bus.kept if kept.stored in bench.bus.found("PARKED")][:2]
    bench.bus.kept = [kept for kept in bench.bus.kept if kept not in hidden]
    await user_writes(bench, shard)
    await asyncio.sleep(GONE_S / 2)
    assert bench.chat.texts == []
    bench.bus.kept.insert(0, hidden[0])
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t2"]


async def test_many_that_are_gone_hold_up_what_is_behind_them_once() -> None:
    """An operator has purged what is parked."""
    bench, shard = await ready(is_open=False)
    for number in range(30):
        shard.on_delivery(bench.command(f"t{number}"))
    await asyncio.sleep(5)
    bench.bus.kept = [kept for kept in bench.bus.kept if kept.stored not in bench.bus.found("PARKED")]
    await user_writes(bench, shard)
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(2 * GONE_S)
    assert bench.chat.texts == ["hi"]


async def test_the_time_that_a_command_is_parked_is_not_counted_as_ours() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(3600)
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert [receipt.outcome for receipt in finals(bench)] == ["accepted"]
    assert bench.metrics.value("outbound_duration_seconds_count", outcome="settled") == 1
    assert bench.metrics.value("outbound_duration_seconds_sum", outcome="settled") < 10


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


async def test_a_parked_receipt_says_why() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason) == ("parked", "window_closed")
    assert receipt.detail


async def test_minus_2_parks_this_and_everything_after_it() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(THROTTLED)
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0"]
    assert [(command, outcome) for command, outcome, _ in outcomes(bench)] == [
        ("c0", "parked"),
        ("c1", "parked"),
        ("c2", "parked"),
    ]

    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t0", "t1", "t2"]
    assert bench.chat.sent[0].client_id == bench.chat.sent[1].client_id
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]


async def test_minus_2_costs_one_attempt() -> None:
    """F11: no retry storm, also with more commands to come."""
    bench, shard = await ready()
    bench.chat.sends.extend([THROTTLED] * 50)
    for number in range(20):
        shard.on_delivery(bench.command(f"t{number}"))
        await asyncio.sleep(60)
    assert len(bench.chat.sent) == 1
    assert bench.bus.receipts()[0].errmsg == THROTTLED.errmsg


async def test_after_the_cool_down_one_probe_goes_out() -> None:
    """F12: what fails then waits a whole cool-down more."""
    bench, shard = await ready()
    bench.chat.sends.extend([THROTTLED] * 3)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(2 * RULES.cooldown_s + 60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 3600, 7200]
    await asyncio.sleep(RULES.cooldown_s)
    assert [outcome for _, outcome, _ in outcomes(bench)] == ["parked", "accepted"]


async def test_minus_2_in_a_second_window_refuses_the_command_and_the_others_go() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([THROTTLED, THROTTLED])
    shard.on_delivery(bench.command("poison", id="c0"))
    shard.on_delivery(bench.command("fine", id="c1"))
    await asyncio.sleep(10)
    await user_writes(bench, shard)
    await asyncio.sleep(10)
    assert outcomes(bench)[-1] == ("c0", "refused", "throttled")
    assert bench.chat.texts == ["poison", "poison"]
    await user_writes(bench, shard)
    await asyncio.sleep(10)
    assert bench.chat.texts == ["poison", "poison", "fine"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]


async def test_ten_sends_per_window_and_the_rest_at_the_next_message() -> None:
    bench, shard = await ready()
    for number in range(25):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(120)
    assert len(bench.chat.sent) == 10
    assert [reason for _, outcome, reason in outcomes(bench) if outcome == "parked"] == ["quota"] + ["quota"] * 14
    await user_writes(bench, shard)
    await asyncio.sleep(120)
    assert len(bench.chat.sent) == 20
    await user_writes(bench, shard)
    await asyncio.sleep(120)
    assert bench.chat.texts == [f"t{number}" for number in range(25)]
    assert len(finals(bench)) == 25


async def test_what_does_not_want_to_wait_is_refused_at_once() -> None:
    bench, shard = await ready(is_open=False)
    delivery = bench.command("hi", id="c1", when_closed="refuse")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "window_closed")]
    assert delivery.acks == 1
    assert bench.chat.sent == []


async def test_what_does_not_want_to_wait_is_refused_behind_others_that_do() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("hi", id="c1"))
    shard.on_delivery(bench.command("hi", id="c2", when_closed="refuse"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "parked", "window_closed"), ("c2", "refused", "window_closed")]


async def test_what_does_not_want_to_wait_is_refused_at_minus_2_with_what_ilink_said() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(THROTTLED)
    shard.on_delivery(bench.command("hi", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.ret, receipt.attempts) == ("refused", "throttled", -2, 1)


async def test_too_many_parked_commands_are_refused() -> None:
    bench, shard = await ready(is_open=False, parked_per_user=2)
    for number in range(3):
        shard.on_delivery(bench.command("hi", id=f"c{number}"))
    await asyncio.sleep(5)
    assert outcomes(bench)[-1] == ("c2", "refused", "backlog")
    assert parked(bench) == ["c0", "c1"]


async def test_what_the_bus_will_not_park_is_refused() -> None:
    bench, shard = await ready(is_open=False)
    bench.bus.refuse = lambda message: BusRefused(10047, "no space") if message.stream == "parked" else None
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "backlog")]


async def test_what_waits_too_long_expires_where_it_waits() -> None:
    bench, shard = await ready(is_open=False)
    shard.on_delivery(bench.command("hi", id="c1", expires_in_s=600))
    shard.on_delivery(bench.command("hi", id="c2"))
    await asyncio.sleep(599)
    assert finals(bench) == []
    await asyncio.sleep(10)
    assert [(receipt.command, receipt.reason) for receipt in finals(bench)] == [("c1", "expired")]
    assert parked(bench) == ["c2"]
    await asyncio.sleep(LIMITS.park_ms / 1000)
    assert [(receipt.command, receipt.reason) for receipt in finals(bench)] == [("c1", "expired"), ("c2", "expired")]


async def test_what_expires_in_the_queue_is_not_sent() -> None:
    bench, shard = await ready()
    bench.chat.took_s = 20.0
    shard.on_delivery(bench.command("slow", id="c1"))
    shard.on_delivery(bench.command("late", id="c2", expires_in_s=5))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["slow"]
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "refused", "expired")]


# nobody to send to, or not yet ---------------------------------------------------------------------------


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


# the last word -------------------------------------------------------------------------------------------


async def kept_back(reserve: int = 2, *, used: int = 0, **changes: Any) -> tuple[Bench, Shard]:
    """A user with a window of which sends are kept back."""
    bench = Bench()
    await bench.bind()
    bench.hears(used=used)
    return bench, bench.shard(sending=bench.sending(rules=RULES._replace(reserve=reserve)), **changes)


def reports(bench: Bench, shard: Shard, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))


@pytest.mark.parametrize(("when_closed", "outcome"), [("park", "parked"), ("refuse", "refused")])
async def test_a_command_that_needs_more_sends_than_are_left_is_told_so(when_closed: str, outcome: str) -> None:
    """It was told that they are used up, beside a window that has some."""
    bench, shard = await kept_back(0, used=8)
    shard.on_delivery(bench.command("a" * 9000, id="c1", when_closed=when_closed))
    await asyncio.sleep(30)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.window.remaining) == (outcome, "quota", 2)
    assert receipt.detail == "It needs more sends than are left after the user's last message; they must write again."


@pytest.mark.parametrize("when_closed", ["park", "refuse"])
async def test_a_final_command_goes_ahead_of_those_that_wait_for_sends(when_closed: str) -> None:
    bench, shard = await kept_back(used=6)
    reports(bench, shard, 4)
    shard.on_delivery(bench.command("done", id="last", final=True, when_closed=when_closed))
    reports(bench, shard, 1, first=4)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "done"]
    assert parked(bench) == ["c2", "c3", "c4"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "last"]

    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "done", "t2", "t3", "t4"]
    assert {receipt.outcome for receipt in finals(bench)} == {"accepted"}


async def test_two_final_commands_keep_their_order_and_a_third_waits() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 2)
    for number in range(3):
        shard.on_delivery(bench.command(f"done {number}", id=f"last{number}", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["done 0", "done 1"]
    assert parked(bench) == ["c0", "c1", "last2"]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts[2:] == ["t0", "t1", "done 2"]


async def test_a_final_command_that_does_not_fit_waits_in_its_place() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 1)
    items = [{"kind": "text", "text": text} for text in "abc"]
    shard.on_delivery(bench.command(id="last", items=items, final=True))
    shard.on_delivery(bench.command("short", id="short", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    assert parked(bench) == ["c0", "last", "short"]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "a", "b", "c", "short"]


async def test_where_nothing_is_kept_back_a_final_command_keeps_its_place() -> None:
    bench, shard = await kept_back(0, used=9)
    three = [{"kind": "text", "text": text} for text in "abc"]
    shard.on_delivery(bench.command(id="c0", items=three))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    assert parked(bench) == ["c0", "last"]


async def test_a_final_command_does_not_split_another_in_two() -> None:
    """One longer than a window is half sent: what is known of it is kept in the place of what is in hand."""
    bench, shard = await kept_back(used=0)
    shard.on_delivery(bench.command(id="long", items=[{"kind": "text", "text": f"t{n}"} for n in range(9)]))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == [f"t{n}" for n in range(8)]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == [*(f"t{n}" for n in range(9)), "done"]


async def test_a_final_command_that_is_half_sent_comes_first_also_for_the_next_owner() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 2)
    bench.chat.sends.extend([Accepted("1", 0, None, ""), THROTTLED])
    shard.on_delivery(bench.command(id="last", items=[{"kind": "text", "text": text} for text in "ab"], final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b"]
    shard.stop()

    after = Bench(bench, incarnation="me-2")
    shard = after.shard(sending=after.sending(rules=RULES._replace(reserve=2)))
    await shard.load()
    await user_writes(after, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b", "b", "t0", "t1"]
    assert [receipt.command for receipt in finals(after)] == ["last", "c0", "c1"]


async def test_a_final_command_is_not_merged_with_those_it_went_ahead_of() -> None:
    bench, shard = await kept_back(used=8, merge_chars=20)
    for number in range(2):
        shard.on_delivery(bench.command(f"t{number}" + "x" * 8, id=f"c{number}"))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["done"]
    assert parked(bench) == ["c0", "c1"]


# -14 -----------------------------------------------------------------------------------------------------


async def test_minus_14_on_sends_alone_is_tried_a_few_times_and_then_needs_a_login() -> None:
    """F9, F10: polling may be fine. Four calls in all, spaced, and none after that."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    for number in range(5):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(3600)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 5, 35, 335]
    assert bench.lost_logins == [BOT]
    assert finals(bench) == []
    assert {reason for *_, reason in outcomes(bench)} == {"needs_login"}


async def test_minus_14_on_sends_needs_a_login_within_a_minute() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(34)
    assert bench.lost_logins == []
    await asyncio.sleep(20)
    assert bench.lost_logins == [BOT]
    shard.stop()


async def test_a_send_that_goes_through_after_needs_login_makes_the_binding_active_again() -> None:
    """The last try of the schedule: what is parked flows from then on, in order."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 3)
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(300)
    assert (bench.lost_logins, bench.regained_logins) == ([BOT], [])
    await asyncio.sleep(100)
    assert bench.regained_logins == [BOT]
    assert bench.chat.texts == ["t0"] * 4 + ["t1", "t2"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]


async def test_a_token_bound_anew_wins_over_the_last_tries_of_a_send() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 3)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(100)
    await bench.bind(token="new")
    await asyncio.sleep(5)
    assert len(bench.chat.sent) == 4
    assert [receipt.command for receipt in finals(bench)] == ["c1"]
    assert bench.regained_logins == []


async def test_a_login_that_the_poller_lost_is_not_tried_by_sends() -> None:
    """F9: a send that was out when the token died is the last one."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    bench.stale.add(BOT)
    await asyncio.sleep(34)
    await bench.bind(state="needs_login")
    await asyncio.sleep(300)
    bench.stale.clear()
    shard.heard("s1", BOT, USER)
    await asyncio.sleep(3600)
    assert len(bench.chat.sent) == 1


async def test_a_user_who_writes_does_not_make_minus_14_a_storm() -> None:
    """Nor does what else happens: the tries are those of the schedule."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    shard.on_delivery(bench.command("hi"))
    for number in range(20):
        await asyncio.sleep(1)
        await user_writes(bench, shard)
        shard.on_delivery(bench.command("more", when_closed="refuse" if number % 2 else "park"))
    await asyncio.sleep(3600)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 5, 35, 335]


async def test_who_refuses_to_wait_is_told_of_a_lost_login_too() -> None:
    """Nothing is parked that could be tried: the next command is the next try, and four are all."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    for number in range(20):
        shard.on_delivery(bench.command("hi", when_closed="refuse"))
        await asyncio.sleep(60)
        assert bench.lost_logins == [BOT] * (number > 0)
    assert len(bench.chat.sent) == 4
    assert {(outcome, reason) for _, outcome, reason in outcomes(bench)} == {("refused", "needs_login")}


async def test_minus_14_that_heals_by_itself_loses_nothing() -> None:
    """F8."""
    bench, shard = await ready()
    bench.chat.sends.append(STALE)
    shard.on_delivery(bench.command("t0", id="c0"))
    shard.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t0", "t1"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]
    assert bench.lost_logins == []


async def test_nothing_is_sent_while_the_poller_tries_a_stale_token() -> None:
    bench, shard = await ready()
    bench.stale.add(BOT)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert bench.chat.sent == []
    assert outcomes(bench) == [("c1", "parked", "needs_login")]
    bench.stale.clear()
    shard.heard("s1", BOT, USER)
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]


async def test_what_waits_for_a_login_goes_to_the_bot_that_is_bound_then() -> None:
    bench, shard = await ready()
    await bench.bind(state="needs_login")
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "parked", "needs_login")]

    await bench.bind(bot="b9@im.bot")
    await bench.bindings.remove(BOT)
    await user_writes(bench, shard, bot="b9@im.bot")
    await asyncio.sleep(5)
    assert [sent.bot for sent in bench.chat.sent] == ["b9@im.bot"]


async def test_a_refusal_for_want_of_a_login_tells_of_the_parts_that_were_sent() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Accepted("1", 0, None, ""), STALE])
    shard.on_delivery(
        bench.command(
            id="c1", when_closed="refuse", items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]
        )
    )
    await asyncio.sleep(10)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "needs_login", ["1"])


# crashes and other owners --------------------------------------------------------------------------------


def in_hand(bench: Bench, delivery: FakeDelivery, **fields: Any) -> Hand:
    """The record as an owner leaves it who dies with this command in hand."""
    body = msgspec.json.decode(delivery.data, type=Outbound)
    command = read_command(body, sandbox="s1", ident=body.id or "", stored_ms=delivery.time_ms, limits=LIMITS)
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


async def test_lanes_that_wait_for_the_lease_hardly_look_at_it() -> None:
    """Thousands that look several times a second keep a process so busy that it does not get the lease back."""
    bench, shard = await ready()
    bench.leases.is_valid, looks = False, 0
    check = bench.leases.check

    def counted(shard: int) -> None:
        nonlocal looks
        looks += 1
        check(shard)

    bench.leases.check = counted  # type: ignore[method-assign]
    shard.on_delivery(bench.command("t0"))
    await asyncio.sleep(60)
    assert 0 < looks < 15
    bench.leases.is_valid = True  # a notification that got lost does not matter
    await asyncio.sleep(6)
    assert bench.chat.texts == ["t0"]


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


# the bus in trouble --------------------------------------------------------------------------------------


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


async def test_a_bug_in_one_lane_is_logged_and_tried_again() -> None:
    bench, shard = await ready()
    bench.chat.on_send = Failing(2, RuntimeError("a bug"))
    with capture_logs() as logs:
        shard.on_delivery(bench.command("hi", id="c1"))
        await asyncio.sleep(60)
    assert [line["event"] for line in logs].count("lane.crashed") >= 1
    assert len(finals(bench)) == 1


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
