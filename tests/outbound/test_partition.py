"""A partition's commands: taken, told to a user, each ended once, also across crashes and other owners."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest

from adapter.bridge.partition import Partition
from adapter.bridge.receipts import DEAD_LETTERS
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_ORIGINAL, H_USER, UNROUTED, derive_traceparent
from adapter.errors import AdapterError, BusRefused, Refused, Temporary, Throttled, Uncertain
from adapter.ports import BusMessage
from tests.fakes import GAP_S, Bench, Failing, FakeDelivery
from tests.outbound.partitions import BOT, THROTTLED, TIMEOUT, USER, finals, outcomes, ready, user_writes

VIRTUAL_TIME = True


async def test_a_stream_that_was_made_anew_begins_again() -> None:
    """An operator's hand: its sequences are those of commands that were settled, and it is none of them."""
    bench, partition = await ready()
    first = bench.command("a", id="a")
    later = bench.command("b", id="b")
    partition.on_delivery(first)
    partition.on_delivery(later)
    await asyncio.sleep(60)
    for old, text in ((first, "c"), (later, "d")):
        data = msgspec.json.encode({"text": text})
        partition.on_delivery(FakeDelivery(old.subject, data, seq=old.seq, time_ms=bench.clock.now_ms()))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("kind", "reason", "status", "ended"),
    [
        (Refused, "rejected", 413, ("refused", "rejected")),
        (Throttled, "throttled", 429, ("parked", "throttled")),
        (Temporary, "http_5xx", 503, ("refused", "expired")),
        (Uncertain, "http_5xx", 502, ("uncertain", "")),
    ],
    ids=["refused", "held", "until it expired", "never answered"],
)
async def test_a_receipt_has_the_http_status_of_what_ended_or_held_its_command(
    kind: type[AdapterError], reason: str, status: int, ended: tuple[str, str]
) -> None:
    answer = kind(reason)
    answer.http_status = status
    bench, partition = await ready()
    bench.chat.sends.extend([answer] * 9)
    partition.on_delivery(bench.command("hi", id="c1", expires_in_s=30 if kind is Temporary else 3600))
    await asyncio.sleep(2000)
    receipt = bench.bus.receipts()[0]
    assert (receipt.outcome, receipt.reason, receipt.http_status) == (*ended, status)


async def test_a_receipt_says_what_ilink_said_and_what_is_left() -> None:
    bench, partition = await ready()
    bench.chat.sends.append(Refused("rejected", "iLink answered -7", ret=-7, errcode=1, errmsg="nope"))
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.ret, receipt.errcode, receipt.errmsg, receipt.http_status) == (-7, 1, "nope", 0)
    assert (receipt.bot, receipt.user, receipt.attempts) == (BOT, USER, 1)
    assert receipt.window.remaining == 10


async def test_each_receipt_goes_on_with_the_trace_of_its_command() -> None:
    bench, partition = await ready(is_open=False, merge_chars=100)
    authors, message = f"00-{'a' * 32}-{'b' * 16}-00", f"in:{BOT}:m1"
    partition.on_delivery(bench.command("a", headers={"traceparent": authors, "b3": "1"}, reply_to=message))
    partition.on_delivery(bench.command("b", reply_to=message))
    partition.on_delivery(bench.command("c", headers={"traceparent": "00-c"}))
    partition.on_delivery(bench.command("d", headers={"traceparent": f"{authors}-more"}, reply_to="m" * 300))
    await asyncio.sleep(30)
    await user_writes(bench)
    await asyncio.sleep(30)
    traces = [stored.headers["traceparent"] for stored in bench.bus.found("EVENT") if "receipt" in stored.subject]
    assert bench.chat.texts == ["a\n\nb\n\nc\n\nd"]
    assert traces[:4] == traces[4:]  # those of `parked`, and the final ones
    assert (traces[0], traces[1][:36]) == (authors, derive_traceparent(message)[:36])
    assert len({trace[:36] for trace in traces}) == 4
    assert [receipt.reply_to for receipt in bench.bus.receipts()] == [message, message, "", ""] * 2
    assert not any("b3" in stored.headers for stored in bench.bus.found("EVENT"))


async def test_a_dead_letter_holds_the_original_before_its_receipt() -> None:
    bench, partition = await ready()
    bench.person_bucket.on_write = Failing(9, RuntimeError("a bug"))
    partition.on_delivery(bench.command("hi", id="c1", headers={"traceparent": "00-1", "b3": "1"}))
    await asyncio.sleep(60)
    (dead,) = bench.bus.found("DEAD")
    assert msgspec.json.decode(dead.data) == {"text": "hi", "id": "c1"}
    assert (dead.headers["b3"], dead.headers[H_USER]) == ("1", USER)
    traces = [stored.headers["traceparent"] for stored in bench.bus.found("EVENT") if "receipt" in stored.subject]
    assert {dead.headers["traceparent"]} == set(traces)
    assert bench.bus.writes[-2:] == ["dead", "event"]


async def test_bodies_that_are_no_commands_leave_memory_and_few_are_written_at_once() -> None:
    bench, partition = await ready()
    bodies = [b"{" + str(number).encode() * 1000 for number in range(20)]
    deliveries = [bench.command(data=body) for body in bodies]
    running = most = 0

    async def slow(message: BusMessage) -> None:
        nonlocal running, most
        if message.stream == "dead":
            running += 1
            most = max(most, running)
            await asyncio.sleep(1)
            running -= 1

    bench.bus.on_publish = slow
    for delivery in deliveries:
        partition.on_delivery(delivery)
    assert {delivery.data for delivery in deliveries} == {b""}
    await asyncio.sleep(30)
    assert most == DEAD_LETTERS
    assert sorted(letter.data for letter in bench.bus.found("DEAD")) == sorted(bodies)


@pytest.mark.parametrize(
    ("is_open", "expected"), [(True, [("c1", "accepted", "")]), (False, [])], ids=["sent", "parked"]
)
async def test_who_has_lost_the_shard_stores_no_receipt_but_that_of_a_send(
    is_open: bool, expected: list[tuple[str, str, str]]
) -> None:
    """The next owner may send what the former one was about to call parked."""
    bench, partition = await ready(is_open=is_open)

    async def lose(message: BusMessage) -> None:
        if ".receipt." in message.subject:
            bench.leases.owned.clear()

    bench.bus.on_publish = lose
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(30)
    partition.stop()
    assert not bench.leases.owned
    assert outcomes(bench) == expected


async def test_a_dead_letter_that_its_stream_refuses_costs_nobody_a_receipt() -> None:
    bench, partition = await ready()
    bench.bus.refuse = lambda message: BusRefused(10077, "full") if message.stream == "dead" else None
    delivery = bench.command(data=b"hello", headers={H_MSG_ID: "h1"})
    partition.on_delivery(delivery)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", "dead_lettered", "unreadable")]
    assert delivery.acks == 1


async def test_a_receipt_of_what_was_never_sent_says_whose_it_is() -> None:
    bench, partition = await ready(is_open=False)
    partition.on_delivery(bench.command("a", when_closed="refuse"))
    partition.on_delivery(bench.command("b", expires_in_s=10))
    partition.on_delivery(bench.command("c"))
    await asyncio.sleep(60)
    await bench.bindings.remove(BOT)
    await asyncio.sleep(5)
    assert [receipt.reason for receipt in finals(bench)] == ["window_closed", "expired", "not_bound"]
    assert {(receipt.bot, receipt.user) for receipt in finals(bench)} == {(BOT, USER)}


BROKEN: list[tuple[str, bytes, str, str]] = [
    ("no-json", b"hello", "dead_lettered", "unreadable"),
    ("too-large", b'{"text":"' + b"a" * 262_144 + b'"}', "dead_lettered", "too_large"),
    ("no-text", b"{}", "refused", "invalid"),
    ("too-long", msgspec.json.encode({"text": "a" * 200_000}), "refused", "too_long"),
]


@pytest.mark.parametrize(("data", "outcome", "reason"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
async def test_what_is_no_command_has_a_receipt_under_the_id_of_its_header(
    data: bytes, outcome: str, reason: str
) -> None:
    bench, partition = await ready()
    delivery = bench.command(data=data, headers={H_MSG_ID: "h1"})
    partition.on_delivery(delivery)
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", outcome, reason)]
    assert delivery.acks == 1
    assert len(bench.bus.found("DEAD")) == (outcome == "dead_lettered")


@pytest.mark.parametrize("ident", [b'""', b'"' + b"x" * 129 + b'"'], ids=["empty", "long"])
async def test_an_id_that_is_none_leaves_the_headers(ident: bytes) -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command(data=b'{"text":5,"id":' + ident + b"}", headers={H_MSG_ID: "h1"}))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("h1", "dead_lettered", "unreadable")]


@pytest.mark.parametrize(
    ("name", "told_as"), [("Upper", "Upper"), ("x" * 3000, UNROUTED)], ids=["capitals", "endless"]
)
async def test_a_name_that_no_sandbox_can_have_is_refused(name: str, told_as: str) -> None:
    """Where its receipt would need a subject longer than a server takes, it is told as one of nobody."""
    bench, partition = await ready()
    delivery = bench.command("hi", sandbox=name, id="c1")
    partition.on_delivery(delivery)
    await asyncio.sleep(5)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.outcome, receipt.reason) == (told_as, "refused", "invalid")
    assert delivery.acks == 1


def repeats(bench: Bench) -> list[tuple[str, int, str, int]]:
    """Final receipts: the id, the sequence, the outcome, and the sequence of the command that is repeated."""
    return [(one.command, one.sequence, one.outcome, one.repeat_of) for one in finals(bench)]


async def test_a_repeated_id_sends_nothing_and_gets_the_outcome_of_the_first() -> None:
    bench, partition = await ready()
    for text in ("hi", "hi again", "and again"):
        delivery = bench.command(text, id="c1")
        partition.on_delivery(delivery)
        await asyncio.sleep(5)
        assert delivery.acks == 1
    assert bench.chat.texts == ["hi"]
    first, *others = finals(bench)
    assert repeats(bench) == [("c1", 1, "accepted", 0), ("c1", 2, "accepted", 1), ("c1", 3, "accepted", 1)]
    assert {tuple(one.message_ids) for one in others} == {tuple(first.message_ids)}


@pytest.mark.parametrize("headers", [{H_MSG_ID: "c1"}, {}], ids=["of a header", "of a sequence"])
async def test_an_id_that_is_not_in_the_body_repeats_nothing(headers: dict[str, str]) -> None:
    """Others know, or can guess, what a header says."""
    bench, partition = await ready()
    for number in range(2):
        partition.on_delivery(bench.command(f"t{number}", headers=headers))
        await asyncio.sleep(5)
    assert bench.chat.texts == ["t0", "t1"]
    assert [(outcome, repeat_of) for _, _, outcome, repeat_of in repeats(bench)] == [("accepted", 0)] * 2


async def test_a_repeat_of_what_was_uncertain_is_not_sent_and_of_what_was_refused_is() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([TIMEOUT, TIMEOUT, Refused("rejected", "no", ret=-3)])
    for ident in ("c1", "c1", "c2", "c2"):
        partition.on_delivery(bench.command(ident, id=ident))
        await asyncio.sleep(400)
    assert bench.chat.texts == ["c1", "c1", "c2", "c2"]
    assert repeats(bench) == [
        ("c1", 1, "uncertain", 0),
        ("c1", 2, "uncertain", 1),
        ("c2", 3, "refused", 0),
        ("c2", 4, "accepted", 0),
    ]


async def test_a_repeat_of_what_has_no_receipt_any_more_is_uncertain() -> None:
    """It was sent, or may have been; receipts are kept for a limited time."""
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    bench.bus.kept = [kept for kept in bench.bus.kept if ".receipt." not in kept.stored.subject]
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]
    assert repeats(bench) == [("c1", 2, "uncertain", 1)]


@pytest.mark.parametrize("hindrance", ["window", "login", "expired"])
@pytest.mark.parametrize("when_closed", ["park", "refuse"])
async def test_a_repeated_id_gets_the_first_outcome_also_where_nothing_could_be_sent(
    hindrance: str, when_closed: str
) -> None:
    """Its sender was told that it is parked, or refused, although it was sent."""
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="a"))
    await asyncio.sleep(5)
    again = bench.command("hi", id="a", when_closed=when_closed, expires_in_s=60)
    if hindrance == "window":
        bench.chat.sends.append(THROTTLED)
        partition.on_delivery(bench.command("ho", id="b", when_closed="refuse"))
        await asyncio.sleep(5)
    elif hindrance == "login":
        await bench.bind(state="needs_login")
    else:
        await asyncio.sleep(60)
    partition.on_delivery(again)
    await asyncio.sleep(5)
    own = [(one.outcome, one.repeat_of) for one in bench.bus.receipts() if one.command == "a"]
    assert own == [("accepted", 0), ("accepted", 1)]
    assert again.acks == 1
    partition.stop()


async def test_outcomes_are_counted_by_what_was_sent() -> None:
    bench, partition = await ready()
    for delivery in (
        bench.command("hi", id="c1"),
        bench.command("hi", id="c1"),
        bench.command(id="c2", typing="on"),
        bench.command(id="c3", items=[]),
    ):
        partition.on_delivery(delivery)
    await asyncio.sleep(60)
    for kind, outcome, reason in (
        ("text", "accepted", "none"),
        ("text", "duplicate", "none"),
        ("typing", "accepted", "none"),
        ("unreadable", "dead_lettered", "unreadable"),
    ):
        assert bench.metrics.value("outbound_messages_total", kind=kind, outcome=outcome, reason=reason) == 1


async def test_several_bots_need_a_name() -> None:
    bench, partition = await ready()
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat")
    bench.hears("s1", "u2@im.wechat", bot="b2@im.bot")
    partition.on_delivery(bench.command("hi", id="c1"))
    partition.on_delivery(bench.command("by bot", id="c2", bot="b2@im.bot"))
    partition.on_delivery(bench.command("by user", id="c3", user=USER))
    await asyncio.sleep(10)
    assert sorted(outcomes(bench)) == [
        ("c1", "refused", "ambiguous_bot"),
        ("c2", "accepted", ""),
        ("c3", "accepted", ""),
    ]
    assert {(sent.bot, sent.text) for sent in bench.chat.sent} == {("b2@im.bot", "by bot"), (BOT, "by user")}


async def test_two_bots_of_one_user_need_no_name() -> None:
    """As while a new bot of the user takes the place of the one before."""
    bench, partition = await ready()
    await bench.bind(bot=B2)
    await bench.wrote("in:2", bot=B2)
    partition.on_delivery(bench.command("hi", id="c1"))
    partition.on_delivery(bench.command("hi", id="c2", user=USER))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "accepted", ""), ("c2", "accepted", "")]


async def test_what_was_being_sent_to_one_user_goes_to_no_other_after_a_crash() -> None:
    """It names nobody, and the sandbox serves another user by now, who would read what was meant for the first."""
    bench, partition = await ready()
    command = bench.command(id="c1", items=[{"kind": "text", "text": text} for text in ("one", "two")])
    partition.on_delivery(command)
    await asyncio.sleep(GAP_S / 2)
    assert bench.chat.texts == ["one"]
    partition.stop()
    binding = bench.bindings.get(BOT)
    assert binding is not None
    await bench.events.publish_binding_event(binding.event("unbound"))
    await bench.bindings.remove(BOT)

    successor = Bench(bench, instance="me-2")
    await successor.bind(bot="b2@im.bot", user="u2@im.wechat", since=command.seq)
    successor.hears("s1", "u2@im.wechat", bot="b2@im.bot", since=command.seq)
    second = successor.partition()
    successor.redeliver(second)
    after = successor.command("to the new one", id="c2")
    second.on_delivery(after)
    await asyncio.sleep(30)
    assert [(sent.bot, sent.text) for sent in bench.chat.sent] == [(BOT, "one"), ("b2@im.bot", "to the new one")]
    assert sorted(outcomes(successor)) == [("c1", "refused", "not_bound"), ("c2", "accepted", "")]


B2, USER2 = "b2@im.bot", "u2@im.wechat"


async def next_person(*, keeps_first: bool = False) -> tuple[Bench, Partition]:
    """The sandbox served USER by BOT, and by an older bot of theirs; now it serves USER2. Another one serves u9."""
    bench = Bench()
    for bot in ("b0@im.bot", BOT):
        binding = await bench.bind(bot=bot)
        await bench.events.publish_binding_event(binding.event("bound"))
    await bench.bindings.remove("b0@im.bot")
    if not keeps_first:
        await bench.events.publish_binding_event(binding.event("unbound"))
        await bench.bindings.remove(BOT)
    await bench.bind(bot=B2, user=USER2)
    await bench.bind(sandbox="s9", bot="b9@im.bot", user="u9@im.wechat")
    bench.hears()
    bench.hears(user=USER2, bot=B2)
    return bench, bench.partition()


ANSWERS: list[tuple[str, str, str, str]] = [
    ("to-the-one-of-now", f"in:{B2}:m1", "", ""),
    ("to-the-one-of-now-by-name", f"in:{B2}:m1", USER2, ""),
    ("to-the-one-before", f"in:{BOT}:m1", "", "other_user"),
    ("to-the-one-before-in-the-name-of-the-one-of-now", f"in:{BOT}:m1", USER2, "other_user"),
    ("to-somebody-of-another-sandbox", "in:b9@im.bot:c-1:2", "", "other_user"),
    ("to-the-one-of-now-in-the-name-of-a-stranger", f"in:{B2}:m1", "u3@im.wechat", "not_bound"),
    ("to-nobody-in-the-name-of-a-stranger", "", "u3@im.wechat", "not_bound"),
    ("to-a-bot-of-which-nothing-is-known", "in:b7@im.bot:m1", "", "other_user"),
    ("to-no-message-of-ours", "7497484083968569736", "", ""),
    ("to-something-else-with-colons", f"out:{BOT}:m1", "", ""),
    ("to-half-an-id", f"in:{BOT}", "", ""),
    ("to-nothing", "", "", ""),
]


@pytest.mark.parametrize(
    ("reply_to", "user", "reason"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS]
)
async def test_what_answers_another_person_is_refused(reply_to: str, user: str, reason: str) -> None:
    bench, partition = await next_person()
    partition.on_delivery(bench.command("hi", id="c1", reply_to=reply_to, user=user or None))
    partition.on_delivery(bench.command("behind it", id="c2"))
    await asyncio.sleep(30)
    refused = ("c1", "refused", reason)
    assert outcomes(bench) == [refused if reason else ("c1", "accepted", ""), ("c2", "accepted", "")]
    assert [(sent.user, sent.text) for sent in bench.chat.sent][-1] == (USER2, "behind it")
    assert len(bench.chat.sent) == (1 if reason else 2)


async def test_with_two_persons_an_answer_goes_to_the_one_whom_it_answers_or_to_none() -> None:
    bench, partition = await next_person(keeps_first=True)
    partition.on_delivery(bench.command("one", id="c1", reply_to=f"in:{BOT}:m1", user=USER))
    partition.on_delivery(bench.command("two", id="c2", reply_to=f"in:{BOT}:m1", user=USER2))
    partition.on_delivery(bench.command("three", id="c3", reply_to=f"in:{BOT}:m1", bot=B2))
    await asyncio.sleep(30)
    assert sorted(outcomes(bench)) == [
        ("c1", "accepted", ""),
        ("c2", "refused", "other_user"),
        ("c3", "refused", "other_user"),
    ]


async def test_a_bus_that_is_away_decides_nothing_about_an_answer() -> None:
    bench, partition = await next_person()
    bench.bus.unreadable = 3
    partition.on_delivery(bench.command("hi", id="c1", reply_to=f"in:{BOT}:m1"))
    partition.on_delivery(bench.command("hello", id="c2"))
    await asyncio.sleep(30)
    assert outcomes(bench) == [("c1", "refused", "other_user"), ("c2", "accepted", "")]


# who names another command -----------------------------------------------------------------------------


def naming(bench: Bench, text: str, ident: str, sequence: int, time_ms: int, *, sandbox: str = "s1") -> FakeDelivery:
    """A command whose header names another one, as the router writes it, and as a sandbox may."""
    headers = {H_ORIGINAL: f"{sequence}.{time_ms}", H_COMMAND: ident}
    return bench.command(text, id=ident, headers=headers, sandbox=sandbox)


@pytest.mark.parametrize("state", ["parked", "out", "unanswered", "ended", "of a former owner", "its ack lost"])
@pytest.mark.parametrize("is_its_time", [True, False], ids=["its-time", "another-time"])
@pytest.mark.parametrize("ident", ["c1", "f1"], ids=["its-id", "another-id"])
async def test_a_sandbox_that_names_a_command_of_its_own_stops_nothing(
    state: str, is_its_time: bool, ident: str
) -> None:
    bench, partition = await ready(is_open=state != "parked")
    if state == "unanswered":
        bench.chat.sends.append(TIMEOUT)
    true = bench.command(id="c1", items=[{"kind": "text", "text": text} for text in ("one", "two")])
    partition.on_delivery(true)
    await asyncio.sleep(60 if state in ("ended", "its ack lost") else 1)
    if state in ("of a former owner", "its ack lost"):
        partition.stop()
        true.acks = 0
        successor = Bench(bench, instance="me")
        partition = successor.partition()
        successor.redeliver(partition)
    fakes = [naming(bench, "fake", ident, true.seq, true.time_ms if is_its_time else 1) for _ in range(2)]
    behind = bench.command("behind", id="c2")
    for delivery in (*fakes, behind):
        partition.on_delivery(delivery)
    await asyncio.sleep(5)
    if state == "parked":
        await user_writes(bench)
    await asyncio.sleep(400)
    texts = [sent.text for sent in bench.chat.taken.values()]
    assert [text for text in texts if text != "fake"] == ["one", "two", "behind"]
    named = (ident, true.seq, true.time_ms if is_its_time else 1)
    ends = [((end.command, end.sequence, end.received_at_ms), end.outcome) for end in finals(bench)]
    once = {named, ("c1", true.seq, true.time_ms), ("c2", behind.seq, behind.time_ms)}
    assert Counter(command for command, _ in ends) == dict.fromkeys(once, 1)
    assert {outcome for command, outcome in ends if command != named or is_its_time} == {"accepted"}
    assert all(delivery.acks for delivery in bench.deliveries)
    assert not partition.commands.commands


async def test_who_names_a_lost_command_and_another_person_holds_up_nobody() -> None:
    """A former owner has ended it, and its record says that it is being sent. The other person's queue waits."""
    bench, partition = await ready()
    await bench.bind(bot=B2, user=USER2)
    bench.hears(user=USER2, bot=B2)
    true = bench.command("true", id="c1", user=USER)
    partition.on_delivery(true)
    await asyncio.sleep(30)
    partition.stop()
    successor = Bench(bench, instance="me")
    partition = successor.partition()
    bench.chat.hold_sends[USER2] = asyncio.Event()
    partition.on_delivery(bench.command("hangs", id="c2", user=USER2))
    await asyncio.sleep(5)
    fake = naming(bench, "fake", "c1", true.seq, true.time_ms)
    fake.data = msgspec.json.encode({"id": "c1", "text": "fake", "user": USER2})
    partition.on_delivery(fake)
    partition.on_delivery(bench.command("behind", id="c3", user=USER))
    await asyncio.sleep(10)
    assert [end.command for end in finals(bench)] == ["c1", "c3"]
    bench.chat.hold_sends.pop(USER2).set()
    await asyncio.sleep(30)
    assert [(end.command, end.outcome) for end in finals(bench)] == [
        *(("c1", "accepted"), ("c3", "accepted"), ("c2", "accepted")),
    ]
    assert fake.acks == 1


async def test_a_sandbox_names_no_command_of_another() -> None:
    """Of the same partition: its commands are found by their sequences."""
    bench, partition = await ready(is_open=False)
    other = next(name for number in range(9999) if bench.names.partition_of(name := f"t{number}") == partition.number)
    await bench.bind(sandbox=other, bot=B2, user=USER2)
    true = bench.command("true", id="c1")
    partition.on_delivery(true)
    fake = naming(bench, "fake", "c1", true.seq, true.time_ms, sandbox=other)
    partition.on_delivery(fake)
    await asyncio.sleep(5)
    await user_writes(bench, bot=B2, user=USER2)
    await asyncio.sleep(5)
    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [(USER2, "fake")]
    assert (true.acks, fake.acks) == (0, 1)
    await user_writes(bench)
    await asyncio.sleep(5)
    ends = [(end.sandbox, end.command, end.outcome) for end in finals(bench)]
    assert ends == [(other, "c1", "accepted"), ("s1", "c1", "accepted")]
    assert true.acks == 1


@pytest.mark.parametrize("idents", [("f1", "f2"), ("f1", "f1")], ids=["two-ids", "one-id"])
async def test_two_that_name_one_command_are_told_once_for_each_id(idents: tuple[str, str]) -> None:
    """It has gone, or was a bind."""
    bench, partition = await ready()
    for _ in range(5):
        bench.bus.next_sequence("OUT")
    for ident in idents:
        partition.on_delivery(naming(bench, f"of {ident}", ident, 3, bench.clock.now_ms()))
    await asyncio.sleep(30)
    assert bench.chat.texts == [f"of {ident}" for ident in sorted(set(idents))]
    assert [(end.command, end.outcome, end.sequence) for end in finals(bench)] == [
        (ident, "accepted", 3) for ident in sorted(set(idents))
    ]
    assert [delivery.acks for delivery in bench.deliveries] == [1, 1]


async def test_draining_ends_what_is_out_and_starts_nothing() -> None:
    bench, partition = await ready()
    bench.chat.took_s = 2.0
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    for delivery in deliveries:
        partition.on_delivery(delivery)
    await asyncio.sleep(1)
    await bench.drain(10.0)
    assert bench.chat.texts == ["t0"]
    assert outcomes(bench) == [("c0", "accepted", "")]
    assert [delivery.acks for delivery in deliveries] == [1, 0, 0]


async def test_what_was_sent_last_is_stored_as_the_partition_is_given_away() -> None:
    """The user may quote it to the next owner. Else it is stored before the next send."""
    bench, partition = await ready()
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert (outcomes(bench), bench.record().sent) == ([("c1", "accepted", "")], [])
    await bench.give()
    assert [sent.id for sent in bench.record().sent] == ["m1"]


async def test_draining_waits_no_longer_than_it_may() -> None:
    bench, partition = await ready()
    bench.chat.hold_sends[USER] = asyncio.Event()
    partition.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    began = bench.clock.monotonic()
    await bench.drain(10.0)
    assert bench.clock.monotonic() - began <= 12.0


async def test_a_receipt_that_waits_for_the_lease_outlives_that_the_user_becomes_known() -> None:
    bench, partition = await ready(is_open=False)
    await bench.bind(user="")
    bench.leases.has_lease = False
    partition.on_delivery(bench.command("hi", id="c1", when_closed="refuse"))
    await asyncio.sleep(5)
    await bench.bind()
    await asyncio.sleep(5)
    assert outcomes(bench) == []
    bench.leases.has_lease = True
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "window_closed")]
    assert partition.queue_depths(Counter()) == (0, None)
