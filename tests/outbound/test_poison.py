"""A command that makes the code raise: it has one final receipt and a dead letter, and the others go on in order."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import structlog

from adapter import logs
from adapter.contract import Outbound
from adapter.names import H_REASON, H_SUBJECT, UNROUTED
from adapter.outbound.commands import read_command
from adapter.outbound.router import Router
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Account, Content, Message, Stored
from adapter.records import Binding, Hand
from tests.fakes import LIMITS, Bench, FakeDelivery
from tests.fakes.bus import matches
from tests.outbound.shards import BOT, USER, finals, parked, ready, user_writes

VIRTUAL_TIME = True

WORDS = "poison-words"
"""The text of the command at fault. What is raised says it, and no log may."""
ALWAYS = 10**6
OTHER_BOT, OTHER = "b2@im.bot", "u2@im.wechat"


class Bugs:
    """Raises so many times, in the words of the command at fault."""

    def __init__(self, times: int) -> None:
        self.left = times

    def strike(self) -> None:
        if self.left > 0:
            self.left -= 1
            raise RuntimeError(f"a bug over {WORDS}")


class Headers(dict[str, str]):
    """Those of a delivery that raise when they are read."""

    bugs: Bugs

    def get(self, key: str, default: Any = None) -> Any:
        self.bugs.strike()
        return super().get(key, default)


Fault = Callable[[Bench, Bugs], dict[str, Any]]
"""Makes a port raise for the command at fault, and returns changes of `Bench.outgoing`."""


def is_bad(payload: bytes) -> bool:
    return WORDS.encode() in payload


def before_it_leaves(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    send = bench.chat.send

    async def fails(account: Account, *, content: Content, **fields: Any) -> Accepted:
        if isinstance(content, str) and WORDS in content:
            bugs.strike()
        return await send(account, content=content, **fields)

    bench.chat.send = fails  # type: ignore[method-assign]
    return {}


def once_it_has_left(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    async def fails(sent: Any) -> None:
        if WORDS in sent.text:
            bugs.strike()

    bench.chat.on_send = fails
    return {}


def uploading(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    async def fails() -> None:
        bugs.strike()

    bench.cdn.on_upload = fails
    return {}


def finding_the_object(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    info = bench.objects.info

    async def fails(name: str) -> Any:
        bugs.strike()
        return await info(name)

    bench.objects.info = fails  # type: ignore[method-assign]
    return {}


def saving_the_record(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    async def fails(key: str) -> None:
        if "u1" in key:
            bugs.strike()

    bench.contexts_bucket.on_write = fails
    return {}


def looking_up_its_receipt(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    return reading(bench, bugs, ".receipt")


def reading(bench: Bench, bugs: Bugs, ending: str) -> dict[str, Any]:
    """What the bus has on subjects with this ending."""
    read = bench.bus.read

    async def fails(stream: str, subject: str, **fields: Any) -> AsyncIterator[Stored]:
        if subject.endswith(ending):
            bugs.strike()
        async for stored in read(stream, subject, **fields):
            yield stored

    bench.bus.read = fails  # type: ignore[method-assign]
    return {}


def opening_the_account(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    def account(binding: Binding) -> Account:
        if binding.bot == BOT:
            bugs.strike()
        return Account(binding.bot, binding.token, "")

    return {"account": account}


def telling_the_windows(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    def look(peer: Any) -> None:
        if peer.user == USER:
            bugs.strike()

    return {"sending": bench.sending(look=look)}


def asking_for_a_ticket(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    ticket = bench.chat.typing_ticket

    async def fails(account: Account, user: str, context_token: str) -> str:
        bugs.strike()
        return await ticket(account, user, context_token)

    bench.chat.typing_ticket = fails  # type: ignore[method-assign]
    return {}


def showing(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    show = bench.chat.show_typing

    async def fails(account: Account, user: str, ticket: str, *, on: bool) -> bool:
        bugs.strike()
        return await show(account, user, ticket, on=on)

    bench.chat.show_typing = fails  # type: ignore[method-assign]
    return {}


def telling_of_its_end(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    async def fails(message: Message) -> None:
        if message.stream == "event" and message.subject.endswith("receipt") and b'"bad"' in message.payload:
            bugs.strike()

    bench.bus.on_publish = fails
    return {}


def parking(bench: Bench, bugs: Bugs) -> dict[str, Any]:
    async def fails(message: Message) -> None:
        if message.stream == "parked" and is_bad(message.payload):
            bugs.strike()

    bench.bus.on_publish = fails
    return {}


TEXT: dict[str, Any] = {"text": WORDS}
PICTURE: dict[str, Any] = {"items": [{"kind": "file", "name": "a.txt", "data": "aGVsbG8="}]}
OBJECT: dict[str, Any] = {"items": [{"kind": "file", "media": {"object": "s1/x"}}]}
TYPING: dict[str, Any] = {"typing": "on"}
DEAD = ("dead_lettered", "crashed")
SENT = ("accepted", "")


class Step(NamedTuple):
    """A step of a command at which the code raises."""

    name: str
    fault: Fault
    body: dict[str, Any]
    times: int
    """How often the port raises: ALWAYS, or as often as it is called in the command's tries."""
    ending: tuple[str, str] = DEAD
    tries: int = 3
    """Tracebacks in the log."""
    suspect: bool = False
    """It was delivered before."""


STEPS = [
    Step("account", opening_the_account, TEXT, 3),
    Step("record", saving_the_record, TEXT, 3),
    Step("receipt-looked-up", looking_up_its_receipt, TEXT, 3, suspect=True),
    Step("upload", uploading, PICTURE, ALWAYS),
    Step("object", finding_the_object, OBJECT, ALWAYS),
    Step("before-it-leaves", before_it_leaves, TEXT, ALWAYS),
    Step("once-it-has-left", once_it_has_left, TEXT, ALWAYS, ("uncertain", ""), tries=2),
    Step("ticket", asking_for_a_ticket, TYPING, ALWAYS),
    Step("typing", showing, TYPING, ALWAYS),
    Step("receipt", telling_of_its_end, TEXT, 3, SENT),
    Step("windows", telling_the_windows, TEXT, 1, SENT, tries=1),
]


@pytest.fixture
def captured() -> Iterator[io.BytesIO]:
    """Everything that is logged, as it is written."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out = io.BytesIO()
    logs.configure("debug", out)
    yield out
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def crashes(captured: io.BytesIO) -> list[str]:
    lines = [json.loads(line) for line in captured.getvalue().splitlines()]
    return [line["exception"] for line in lines if "exception" in line]


def dead(bench: Bench) -> list[tuple[str, str, bytes]]:
    return [(stored.headers[H_REASON], stored.headers[H_SUBJECT], stored.data) for stored in bench.bus.found("DEAD")]


def ended(bench: Bench) -> list[tuple[str, str, str]]:
    return [(receipt.command, receipt.outcome, receipt.reason) for receipt in finals(bench)]


async def two_users(fault: Fault, bugs: Bugs, **changes: Any) -> tuple[Bench, Shard]:
    bench = Bench()
    await bench.bind()
    await bench.bind(bot=OTHER_BOT, user=OTHER)
    bench.hears()
    bench.hears(OTHER_BOT, OTHER)
    bench.objects.stored["s1/x"] = b"hello"
    return bench, bench.shard(gap_s=0.0, **{**fault(bench, bugs), **changes})


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_the_command_at_fault_ends_and_the_others_go_on(step: Step, captured: io.BytesIO) -> None:
    bugs = Bugs(0)
    bench, shard = await two_users(step.fault, bugs)
    if step.name != "account":  # it is opened once
        shard.on_delivery(bench.command("before", id="before", user=USER))
        await asyncio.sleep(1)
    bugs.left = step.times
    bad = bench.command(id="bad", user=USER, suspect=step.suspect, **step.body)
    shard.on_delivery(bad)
    shard.on_delivery(bench.command("for another", id="other", user=OTHER))
    if step.body == TYPING:  # what is sent ends it
        await asyncio.sleep(5)
    after = bench.command("after", id="after", user=USER)
    shard.on_delivery(after)
    await asyncio.sleep(0.5)
    assert "for another" in bench.chat.texts  # at once
    await asyncio.sleep(30)
    bugs.left = 0
    own = [one for one in ended(bench) if one[0] in ("before", "bad", "after")]
    assert ("bad", *step.ending) in own
    assert [one for one in own if one[0] != "bad"][-1] == ("after", *SENT)
    assert len(own) == len({one[0] for one in own})
    assert (bad.acks, after.acks) == (1, 1)
    assert [text for text in bench.chat.texts if text in ("before", "after")][-1] == "after"
    expected = [("crashed", "wechat.out.s1", bad.data)] if step.ending == DEAD else []
    assert dead(bench) == expected
    assert bench.metrics.value("receipts_total", outcome=step.ending[0]) >= 1
    assert len(crashes(captured)) == step.tries
    assert WORDS.encode() not in captured.getvalue()
    assert shard.census(Counter()) == (0, None)
    assert not shard._backlog._count
    sent = [one.client_id for one in bench.chat.sent if one.text == WORDS]
    assert len(set(sent)) <= 1


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_a_command_that_goes_through_at_the_second_try_is_sent(step: Step) -> None:
    bugs = Bugs(1)
    bench, shard = await two_users(step.fault, bugs)
    bad = bench.command(id="bad", user=USER, suspect=step.suspect, **step.body)
    after = bench.command("after", id="after", user=USER)
    shard.on_delivery(bad)
    if step.body == TYPING:
        await asyncio.sleep(5)
    shard.on_delivery(after)
    await asyncio.sleep(30)
    assert sorted(ended(bench)) == [("after", *SENT), ("bad", *SENT)]
    assert dead(bench) == []
    assert (bad.acks, after.acks) == (1, 1)
    if step.body == TEXT:
        assert [sent.text for sent in bench.chat.taken.values()] == [WORDS, "after"]


# as it arrives -------------------------------------------------------------------------------------------


async def test_a_command_that_cannot_be_taken_in_ends_in_its_place() -> None:
    bench, shard = await ready(gap_s=0.0)
    shard.on_delivery(bench.command("before", id="before"))
    bad = bench.command(WORDS, id="bad")
    bad.headers = Headers(bad.headers)
    bad.headers.bugs = Bugs(ALWAYS)
    shard.on_delivery(bad)
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["before", "after"]
    assert sorted(ended(bench)) == [("after", *SENT), ("bad", *DEAD), ("before", *SENT)]
    assert dead(bench) == [("crashed", "wechat.out.s1", bad.data)]
    assert bad.acks == 1
    shard.on_delivery(bad.again())
    await asyncio.sleep(5)
    assert len(ended(bench)) == 3


async def test_a_command_that_is_read_at_the_second_try_keeps_its_place() -> None:
    bench, shard = await ready(gap_s=0.0)
    bad = bench.command(WORDS, id="bad")
    bad.headers = Headers(bad.headers)
    bad.headers.bugs = Bugs(1)
    shard.on_delivery(bad)
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert bench.chat.texts == [WORDS, "after"]


async def test_what_had_to_wait_on_the_bus_is_given_back_once() -> None:
    """Beyond the share of a sandbox: read back, one of them at fault, and none left behind."""
    bench, shard = await ready(gap_s=0.0)
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(40)]
    bad = deliveries[30]
    headers = Headers(bad.headers)
    headers.bugs = Bugs(ALWAYS)
    bench.bus.kept = [
        kept._replace(stored=kept.stored._replace(headers=headers)) if kept.stored.seq == bad.seq else kept
        for kept in bench.bus.kept
    ]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(60)
    assert bench.chat.texts == [f"t{number}" for number in range(10) if number != 30]  # the window's ten sends
    assert ("c30", *DEAD) in ended(bench)
    assert len(parked(bench)) == 29
    assert not shard._backlog._count
    assert not shard._backlog._held


async def test_reading_back_that_crashes_is_tried_again() -> None:
    bench, shard = await ready(gap_s=0.0)
    bugs = Bugs(5)
    reading(bench, bugs, ".s1")
    for number in range(20):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(200)
    assert bugs.left == 0
    assert len(bench.chat.texts) + len(parked(bench)) == 20


async def test_a_command_whose_binding_cannot_be_looked_for_holds_up_nobody() -> None:
    """The question whether a bind is on its way."""
    bench, shard = await ready(gap_s=0.0)
    bugs = Bugs(ALWAYS)

    async def bound_yet() -> None:
        bugs.strike()

    bench.bound_yet = bound_yet
    shard.on_delivery(bench.command(WORDS, id="bad", bot="b9@im.bot"))
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["after"]
    assert sorted(ended(bench)) == [("after", *SENT), ("bad", "refused", "not_bound")]
    shard.on_delivery(bench.command("later", id="later"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["after", "later"]


async def test_one_that_was_delivered_before_and_whose_hand_cannot_be_read_may_have_been_sent() -> None:
    bench, shard = await ready(gap_s=0.0)
    bugs = Bugs(ALWAYS)
    reading(bench, bugs, ".binding")
    await bench.bindings.remove(BOT)
    bugs.left = 3
    shard.on_delivery(bench.command(WORDS, id="bad", suspect=True))
    await asyncio.sleep(30)
    assert ended(bench) == [("bad", "uncertain", "")]
    assert bench.chat.texts == []


# what may have left ----------------------------------------------------------------------------------------


async def test_what_the_owner_before_may_have_sent_is_never_called_unsent() -> None:
    bench, _ = await ready()
    bad = bench.command(WORDS, id="bad", suspect=True)
    bugs = Bugs(ALWAYS)
    before_it_leaves(bench, bugs)
    heir = Bench(bench, incarnation="heir-1")
    shard = heir.shard(gap_s=0.0)
    body = msgspec.json.decode(bad.data, type=Outbound)
    client = read_command(body, sandbox="s1", ident="bad", time_ms=bad.time_ms, limits=LIMITS).client
    bench.hears(used=1, hand=Hand(command="bad", client=client, sandbox="s1", attempts=1, tried=1, counted_in="in:1"))
    shard.on_delivery(bad)
    shard.on_delivery(heir.command("after", id="after"))
    await asyncio.sleep(30)
    assert ended(bench) == [("bad", "uncertain", ""), ("after", *SENT)]
    assert dead(bench) == []


async def test_a_receipt_tells_of_the_parts_that_were_sent_before() -> None:
    bench, shard = await ready(gap_s=0.0)
    before_it_leaves(bench, Bugs(ALWAYS))
    items = [{"kind": "text", "text": "first"}, {"kind": "text", "text": WORDS}]
    shard.on_delivery(bench.command(id="bad", items=items))
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["first", "after"]
    assert ended(bench) == [("bad", *DEAD), ("after", *SENT)]
    assert finals(bench)[0].message_ids == ["m1"]


async def test_sends_that_did_not_leave_do_not_count() -> None:
    bench, shard = await ready(gap_s=0.0)
    before_it_leaves(bench, Bugs(ALWAYS))
    shard.on_delivery(bench.command(WORDS, id="bad"))
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(30)
    assert finals(bench)[-1].window.remaining == 9


async def test_a_receipt_that_cannot_be_written_at_all_holds_up_nobody() -> None:
    """It comes once the command is delivered again."""
    bugs = Bugs(ALWAYS)
    bench, shard = await two_users(telling_of_its_end, bugs)
    bad = bench.command(WORDS, id="bad", user=USER)
    shard.on_delivery(bad)
    shard.on_delivery(bench.command("after", id="after", user=USER))
    await asyncio.sleep(60)
    assert ended(bench) == [("after", *SENT)]
    assert bad.acks == 0
    assert not shard._backlog._count
    bugs.left = 0
    again = bad.again()
    shard.on_delivery(again)
    await asyncio.sleep(30)
    assert ended(bench) == [("after", *SENT), ("bad", *SENT)]
    assert [sent.text for sent in bench.chat.taken.values()] == [WORDS, "after"]
    assert again.acks == 1


# what is parked ----------------------------------------------------------------------------------------------


async def test_a_command_that_cannot_be_parked_ends_and_the_others_wait() -> None:
    bench, shard = await ready(is_open=False, gap_s=0.0)
    parking(bench, Bugs(ALWAYS))
    for text in ("before", WORDS, "after"):
        shard.on_delivery(bench.command(text, id="bad" if text == WORDS else text))
    await asyncio.sleep(30)
    assert parked(bench) == ["before", "after"]
    assert ended(bench) == [("bad", *DEAD)]
    await user_writes(bench, shard)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["before", "after"]


async def test_what_cannot_be_read_back_where_it_was_parked_ends_when_its_turn_comes() -> None:
    bench = await parked_with_junk()
    heir = Bench(bench, incarnation="heir-1")
    after = heir.shard(gap_s=0.0)
    await after.load()
    await user_writes(heir, after)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["before", "after"]
    assert sorted(ended(bench)) == [("after", *SENT), ("bad", *DEAD), ("before", *SENT)]
    assert [(reason, WORDS.encode() in data) for reason, _, data in dead(bench)] == [("crashed", True)]
    assert parked(bench) == []


async def test_what_was_parked_half_sent_and_cannot_be_read_back_may_be_on_the_phone() -> None:
    bench = await parked_with_junk()
    heir = Bench(bench, incarnation="heir-1")
    (junk,) = [stored for stored in bench.bus.found("PARKED") if is_bad(stored.data)]
    client = junk.headers["Nats-Msg-Id"].removeprefix("parked:")
    hand = Hand(command="bad", client=client, sandbox="s1", part=1, attempts=1, message_ids=["m0"])
    bench.hears(used=1, hand=hand)
    after = heir.shard(gap_s=0.0)
    await after.load()
    await user_writes(heir, after)
    await asyncio.sleep(60)
    assert ("bad", "uncertain", "") in ended(bench)
    assert bench.chat.texts == ["before", "after"]


async def parked_with_junk() -> Bench:
    """Three parked commands; the second has a header that makes reading it raise."""
    bench, shard = await ready(is_open=False, gap_s=0.0)
    for text in ("before", WORDS, "after"):
        shard.on_delivery(bench.command(text, id="bad" if text == WORDS else text))
    await asyncio.sleep(5)
    bench.bus.kept = [
        kept._replace(stored=kept.stored._replace(headers={**kept.stored.headers, "Wechat-Time-Ms": "junk"}))
        if is_bad(kept.stored.data) and kept.stream.endswith("PARKED")
        else kept
        for kept in bench.bus.kept
    ]
    return bench


async def test_of_merged_texts_the_one_at_fault_ends_alone() -> None:
    bench, shard = await ready(is_open=False, merge_chars=3000, gap_s=0.0)
    for text in ("before", WORDS, "after"):
        shard.on_delivery(bench.command(text, id="bad" if text == WORDS else text))
    await asyncio.sleep(5)
    before_it_leaves(bench, Bugs(ALWAYS))
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert [text for sent in bench.chat.texts for text in sent.split("\n\n")] == ["before", "after"]
    assert sorted(ended(bench)) == [("after", *SENT), ("bad", *DEAD), ("before", *SENT)]
    assert parked(bench) == []


async def test_merged_texts_that_may_have_left_are_all_uncertain() -> None:
    bench, shard = await ready(is_open=False, merge_chars=3000, gap_s=0.0)
    for text in ("before", WORDS):
        shard.on_delivery(bench.command(text, id="bad" if text == WORDS else text))
    await asyncio.sleep(5)
    once_it_has_left(bench, Bugs(ALWAYS))
    await user_writes(bench, shard)
    shard.on_delivery(bench.command("after", id="after"))
    await asyncio.sleep(60)
    assert ended(bench) == [("before", "uncertain", ""), ("bad", "uncertain", ""), ("after", *SENT)]
    assert len({sent.client_id for sent in bench.chat.sent if WORDS in sent.text}) == 1


# commands on plain wechat.out --------------------------------------------------------------------------------


def copying(bench: Bench, bugs: Bugs) -> None:
    async def fails(message: Message) -> None:
        if message.stream == "out" and is_bad(message.payload):
            bugs.strike()

    bench.bus.on_publish = fails


def plain(bench: Bench, text: str, **fields: Any) -> FakeDelivery:
    body = {"sandbox": "s1", "text": text, "id": "bad" if text == WORDS else text}
    seq = next(bench.numbers)
    return FakeDelivery("wechat.out", msgspec.json.encode(body), seq=seq, time_ms=bench.clock.now_ms(), **fields)


async def routed(bench: Bench, *deliveries: FakeDelivery) -> None:
    router = Router(bench.bus, bench.receipts, bench.names, LIMITS, lambda: None, bench.clock, bench.metrics)
    await asyncio.gather(*(router.route(delivery) for delivery in deliveries))


def copies(bench: Bench) -> list[str]:
    return [
        msgspec.json.decode(stored.data)["text"]
        for stored in bench.bus.found("OUT")
        if matches("wechat.out.*", stored.subject)
    ]


async def test_a_command_that_cannot_be_copied_ends_and_the_others_are_copied() -> None:
    bench = Bench()
    copying(bench, Bugs(ALWAYS))
    deliveries = [plain(bench, text) for text in ("before", WORDS, "after")]
    await routed(bench, *deliveries)
    assert copies(bench) == ["before", "after"]
    assert ended(bench) == [("bad", *DEAD)]
    assert dead(bench) == [("crashed", "wechat.out", deliveries[1].data)]
    assert [delivery.acks for delivery in deliveries] == [1, 1, 1]


async def test_a_command_that_is_copied_at_the_second_try_keeps_its_place() -> None:
    bench = Bench()
    copying(bench, Bugs(1))
    deliveries = [plain(bench, text) for text in ("before", WORDS, "after")]
    await routed(bench, *deliveries)
    assert copies(bench) == ["before", WORDS, "after"]
    assert ended(bench) == []
    assert [delivery.acks for delivery in deliveries] == [1, 1, 1]


async def test_a_command_whose_address_cannot_be_read_ends_with_nobody() -> None:
    bench = Bench()
    headers = Headers()
    headers.bugs = Bugs(ALWAYS)
    deliveries = [plain(bench, "before"), plain(bench, WORDS), plain(bench, "after")]
    deliveries[1].headers = headers
    await routed(bench, *deliveries)
    assert copies(bench) == ["before", "after"]
    assert ended(bench) == [("bad", *DEAD)]
    assert {receipt.sandbox for receipt in finals(bench)} <= {"s1", UNROUTED}
    assert [delivery.acks for delivery in deliveries] == [1, 1, 1]


@pytest.mark.parametrize(("times", "endings", "acks"), [(2, [("bad", *DEAD)], 1), (ALWAYS, [], 0)])
async def test_an_end_that_cannot_be_told_at_first_holds_up_no_copy(
    times: int, endings: list[tuple[str, str, str]], acks: int
) -> None:
    """Of one that is no command."""
    bench = Bench()
    bad = plain(bench, WORDS)
    bad.data = msgspec.json.encode({"id": "bad", "sandbox": "s1", "text": 7})
    telling_of_its_end(bench, Bugs(times))
    deliveries = [plain(bench, "before"), bad, plain(bench, "after")]
    await routed(bench, *deliveries)
    assert copies(bench) == ["before", "after"]
    assert [(command, outcome) for command, outcome, _ in ended(bench)] == [one[:2] for one in endings]
    assert [delivery.acks for delivery in deliveries] == [1, acks, 1]
