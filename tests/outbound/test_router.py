"""Plain wechat.out: copied once to the sandbox it names, in order, or ended with a receipt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from adapter.bridge import router as module
from adapter.bridge.commands import identity_of
from adapter.bridge.leases import Tenure
from adapter.bridge.record import CommandRef
from adapter.bridge.router import Router
from adapter.contract.messages import Outbound
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_ORIGINAL, MAX_SEQ, UNROUTED
from adapter.errors import BusRefused
from adapter.ports import BusMessage, StoredMessage
from tests.capture import ALWAYS, Bugs
from tests.fakes import Bench, FakeDelivery, settle

VIRTUAL_TIME = True

FULL = BusRefused(10077, "maximum messages per subject exceeded")


def router(bench: Bench, tenure: Tenure | None = None) -> Router:
    return Router(bench.replica.parts, tenure or bench.leases.tenure_of(0))


async def route(routing: Router, *deliveries: FakeDelivery) -> None:
    """Delivers commands and waits until they are settled."""
    acked = [delivery.acks for delivery in deliveries]
    for delivery in deliveries:
        routing.on_delivery(delivery)
    async with asyncio.timeout(120):
        while any(now.acks == before for now, before in zip(deliveries, acked, strict=True)):
            await asyncio.sleep(0.01)


def identity(copy: StoredMessage) -> CommandRef:
    return identity_of(copy.headers, MAX_SEQ, copy.time_ms)


def as_delivered(bench: Bench) -> FakeDelivery:
    """The newest copy, as the partition's consumer delivers it."""
    subject = bench.bus.stored_subject("wechat.out.s1")
    copy = [kept for kept in bench.bus.kept if kept.stored.subject == subject][-1]
    bench.bus.kept.remove(copy)
    return bench.command(data=copy.stored.data, headers=copy.stored.headers)


def receipts_of_sandbox(sandbox: str) -> Callable[[BusMessage], bool]:
    return lambda message: message.subject.startswith(f"wechat.event.{sandbox}.receipt.")


class Unacked(FakeDelivery):
    """The replica ends before it acknowledges it."""

    async def ack(self) -> None:
        await asyncio.Event().wait()


def copied(bench: Bench, sandbox: str) -> list[str]:
    """The texts that were copied to a sandbox, as they are stored."""
    found = [copy for copy in bench.bus.found("OUT") if copy.subject.endswith(f".{sandbox}")]
    return [msgspec.json.decode(copy.data)["text"] for copy in found]


def plain(
    bench: Bench, data: bytes = b"", *, headers: dict[str, str] | None = None, redelivered: bool = False, **body: Any
) -> FakeDelivery:
    return FakeDelivery(
        "wechat.out",
        data or msgspec.json.encode(body),
        seq=bench.bus.next_sequence("OUT"),
        time_ms=bench.clock.now_ms(),
        headers=headers,
        redelivered=redelivered,
    )


async def test_a_command_is_copied_to_its_sandbox_under_an_id_of_the_copy(bench: Bench) -> None:
    """Ids are unique in the stream: with its own it would be dropped as a repeat of itself. What its author says of
    an original counts for nothing."""
    headers = {H_MSG_ID: "h1", "traceparent": "00-1", H_ORIGINAL: "1.1", H_COMMAND: "another"}
    delivery = plain(bench, sandbox="s1", text="hi", headers=headers)
    await route(router(bench), delivery)
    (copy,) = bench.bus.found("OUT")
    assert copy.subject == bench.bus.stored_subject("wechat.out.s1")
    assert copy.data == delivery.data
    assert copy.headers[H_MSG_ID] not in ("", "h1")
    assert (copy.headers[H_COMMAND], copy.headers["traceparent"]) == ("h1", "00-1")
    assert identity(copy) == CommandRef(sequence=delivery.seq, stored_ms=delivery.time_ms, id="h1")
    assert delivery.acks == 1


@pytest.mark.parametrize(("is_here", "copies"), [(True, 1), (False, 2)], ids=["here", "by the next owner"])
async def test_what_was_copied_and_comes_again_is_the_same_command(is_here: bool, copies: int, bench: Bench) -> None:
    """The stream drops the second copy, or its partition does."""
    original = plain(bench, sandbox="s1", text="hi")
    died = router(bench)
    died.on_delivery(Unacked(original.subject, original.data, seq=original.seq, time_ms=original.time_ms))
    await asyncio.sleep(1)
    died.stop()
    await settle()
    assert len(asyncio.all_tasks()) == 1
    again = original.again()
    await route(died if is_here else router(bench), again)
    same = CommandRef(sequence=original.seq, stored_ms=original.time_ms, id=str(original.seq))
    assert [identity(copy) for copy in bench.bus.found("OUT")] == [same] * copies
    assert again.acks == 1


async def test_the_id_of_a_copy_cannot_be_foretold(bench: Bench) -> None:
    """Whoever publishes under it first has the copy dropped as a repeat: a sandbox may know all of the command."""
    known = plain(bench, sandbox="s1", text="hi")
    for _ in range(2):
        await route(router(bench), known)
    ids = [copy.headers[H_MSG_ID] for copy in bench.bus.found("OUT")]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("with_heir", [False, True], ids=["here", "by the next owner"])
async def test_a_copy_that_comes_late_expires_as_if_it_had_not(with_heir: bool, bench: Bench) -> None:
    """While no adapter ran it waited on plain wechat.out, and its time began anew with the copy."""
    await bench.bind()
    bench.hears()
    late = plain(bench, sandbox="s1", id="c1", text="now or never", expires_in_s=60)
    await asyncio.sleep(50)
    await route(router(bench), late)
    (copy,) = bench.bus.found("OUT")
    assert identity(copy).stored_ms == late.time_ms
    bench.stale.add("b1@im.bot")
    partition = bench.partition()
    partition.on_delivery(bench.command(data=copy.data, headers=copy.headers))
    await asyncio.sleep(9)
    assert [receipt.outcome for receipt in bench.bus.receipts()] == ["parked"]
    if with_heir:
        partition.stop()
        successor = Bench(bench, instance="next-1")
        successor.stale.add("b1@im.bot")
        again = bench.command(data=copy.data, headers=copy.headers, redelivered=True)
        successor.partition().on_delivery(again)
    await asyncio.sleep(2)
    assert [receipt.reason for receipt in bench.bus.receipts()] == ["needs_login", "expired"]
    assert {receipt.received_at_ms for receipt in bench.bus.receipts()} == {late.time_ms}


@pytest.mark.parametrize(
    ("body", "outcome"),
    [({"text": "hi"}, "accepted"), ({"text": "hi", "typing": "on"}, "refused")],
    ids=["sent", "invalid"],
)
async def test_a_receipt_has_the_time_of_the_command_and_not_of_its_copy(
    body: Any, outcome: str, bench: Bench
) -> None:
    await bench.bind()
    bench.hears()
    late = plain(bench, sandbox="s1", id="c1", **body)
    await asyncio.sleep(50)
    await route(router(bench), late)
    (copy,) = bench.bus.found("OUT")
    delivery = bench.command(data=copy.data, headers=copy.headers)
    again = delivery.again()
    bench.partition().on_delivery(delivery)
    await asyncio.sleep(2)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.received_at_ms) == (outcome, late.time_ms)
    Bench(bench, instance="next-1").partition().on_delivery(again)
    await asyncio.sleep(2)
    assert bench.bus.receipts() == [receipt], "it is found by it"


@pytest.mark.parametrize("seconds", [1, 60])
async def test_a_pause_of_the_lease_lets_nothing_overtake(seconds: int, bench: Bench) -> None:
    bench.leases.owned.add(0)
    routing = router(bench)
    deliveries = [plain(bench, sandbox="s1", text=text) for text in ("first", "second")]
    bench.leases.has_lease = False
    routing.on_delivery(deliveries[0])
    await asyncio.sleep(seconds)
    assert copied(bench, "s1") == []
    bench.leases.has_lease = True
    await route(routing, *deliveries)
    assert copied(bench, "s1") == ["first", "second"]
    assert [delivery.acks for delivery in deliveries] == [1, 1]


async def test_a_copy_waits_until_the_one_before_it_is_stored(bench: Bench) -> None:
    """Out at once they could change places where the stream's leader goes; those of other sandboxes go on."""
    routed, leader = router(bench), asyncio.Event()

    async def lose_first(message: BusMessage) -> None:
        if b"first" in message.payload:
            await leader.wait()

    bench.bus.on_publish = lose_first
    commands = [plain(bench, sandbox="s1", text=text) for text in ("first", "second")]
    for command in commands:
        routed.on_delivery(command)
    await route(routed, plain(bench, sandbox="s2", text="other"))
    leader.set()
    async with asyncio.timeout(10):
        while not commands[1].acks:
            await asyncio.sleep(0.1)
    texts = [msgspec.json.decode(copy.data)["text"] for copy in bench.bus.found("OUT")]
    assert texts == ["other", "first", "second"]


async def test_what_waits_for_its_turn_is_copied_in_order(bench: Bench) -> None:
    commands = [plain(bench, sandbox="s1", text=f"{number}") for number in range(99)]
    await route(router(bench), *commands)
    assert copied(bench, "s1") == [f"{number}" for number in range(99)]
    assert [command.acks for command in commands] == [1] * 99


async def test_of_a_piece_only_what_is_refused_ends(bench: Bench) -> None:
    routed = router(bench)
    bench.bus.refuse = lambda message: FULL if message.payload.endswith(b'3"}') else None
    await route(routed, *(plain(bench, sandbox="s1", id=f"c{n}", text=f"{n}") for n in range(6)))
    assert [receipt.command for receipt in bench.bus.receipts()] == ["c3"]
    assert copied(bench, "s1") == ["0", "1", "2", "4", "5"]


ENDED: list[tuple[str, bytes, str, str, str]] = [
    ("no-json", b"hello", "dead_lettered", "unreadable", "h1"),
    ("too-large", b'{"text":"' + b"a" * 262_144 + b'"}', "dead_lettered", "too_large", "h1"),
    ("no-sandbox", b'{"text":"hi","id":"c1"}', "refused", "invalid", "c1"),
    ("bad-sandbox", b'{"text":"hi","sandbox":"a.b","id":"c1"}', "refused", "invalid", "c1"),
    ("bad-sandbox-and-more", b'{"text":5,"sandbox":"a.b","id":"c1"}', "dead_lettered", "unreadable", "c1"),
    ("sandbox-and-a-line-end", b'{"text":5,"sandbox":"s1\\n","id":"c1"}', "dead_lettered", "unreadable", "c1"),
]


@pytest.mark.parametrize(
    ("data", "outcome", "reason", "ident"), [row[1:] for row in ENDED], ids=[row[0] for row in ENDED]
)
async def test_what_goes_nowhere_has_a_receipt(
    data: bytes, outcome: str, reason: str, ident: str, bench: Bench
) -> None:
    delivery = plain(bench, data, headers={H_MSG_ID: "h1"})
    await route(router(bench), delivery)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.command, receipt.outcome, receipt.reason) == (UNROUTED, ident, outcome, reason)
    assert delivery.acks == 1
    assert bench.bus.found("OUT") == []
    assert len(bench.bus.found("DEAD")) == (outcome == "dead_lettered")
    assert bench.metrics.value("schema_violations_total", kind="out") == 1


async def test_what_was_refused_is_not_sent_when_it_comes_again_and_there_is_room(bench: Bench) -> None:
    """The acknowledgement, or the replica, was lost behind the receipt: the command has ended all the same."""
    await bench.bind()
    bench.hears()
    bench.bus.refuse = lambda message: FULL if message.stream == "out" else None
    delivery = plain(bench, sandbox="s1", text="hi", id="c1")
    await route(router(bench), delivery)
    bench.bus.refuse = lambda _: None
    await route(router(Bench(bench)), delivery.again())
    second = as_delivered(bench)
    bench.partition().on_delivery(second)
    await asyncio.sleep(5)
    assert [(receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()] == [("refused", "quota")]
    assert (bench.chat.sent, second.acks) == ([], 1)


@pytest.mark.parametrize("is_named", [False, True])
async def test_what_was_stored_before_a_bind_is_not_for_whom_it_bound(is_named: bool, bench: Bench) -> None:
    """It waited on plain wechat.out, and its copy is younger than the bind."""
    await bench.bind()
    before = plain(bench, sandbox="s1", id="c1", text="for the first", user="u1@im.wechat" if is_named else None)
    await bench.bindings.remove("b1@im.bot")
    await bench.bind(bot="b2@im.bot", user="u2@im.wechat", since=before.seq)
    bench.hears("s1", "u2@im.wechat", bot="b2@im.bot", since=before.seq)
    after, partition = plain(bench, sandbox="s1", id="c2", text="for the second"), bench.partition()
    for original in (before, after):
        await route(router(bench), original)
        partition.on_delivery(as_delivered(bench))
    await asyncio.sleep(30)
    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [("u2@im.wechat", "for the second")]
    ends = [(receipt.command, receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()]
    assert sorted(ends) == [("c1", "refused", "not_bound"), ("c2", "accepted", "")]


async def test_one_that_was_cut_off_makes_no_second_copy(bench: Bench) -> None:
    """The next owner has made one, and the stream may not know its id any more."""

    async def cut_off(_: BusMessage) -> None:
        bench.leases.has_lease = False

    bench.bus.on_publish = cut_off
    tenure = bench.leases.tenure_of(0)
    delivery = plain(bench, sandbox="s1", text="hi")
    router(bench, tenure).on_delivery(delivery)
    await asyncio.sleep(60)
    tenure.end()  # it hears of its end
    bench.leases.has_lease, bench.bus.on_publish = True, None
    await asyncio.sleep(60)
    assert delivery.acks == len(copied(bench, "s1")) == 0


# while something does not go on --------------------------------------------------------------------------


async def test_deliveries_that_come_again_while_they_wait_are_not_taken_again(bench: Bench) -> None:
    """While receipts cannot be stored the consumer is reset again and again: tasks and memory grew without end."""
    back = asyncio.Event()

    async def away(message: BusMessage) -> None:
        if message.stream == "event":
            await back.wait()

    bench.bus.on_publish = away
    routed, tasks = router(bench), []
    commands = [plain(bench, b'{"text":"hi","sandbox":"NOT VALID"}') for _ in range(480)]
    resets = [commands] + [[command.again() for command in commands] for _ in range(20)]
    for deliveries in resets:
        for delivery in deliveries:
            routed.on_delivery(delivery)
        await settle()
        tasks.append(len(asyncio.all_tasks()))
    assert tasks[1:] == tasks[:1] * 20
    assert tasks[0] <= 40, "one for the sandbox, and the endings of one batch"
    back.set()
    async with asyncio.timeout(60):
        while not all(delivery.acks for delivery in resets[-1]):
            await asyncio.sleep(0.1)
    assert len(bench.bus.receipts()) == 480
    assert {delivery.acks for deliveries in resets[:-1] for delivery in deliveries} == {0}, "no server knows these"
    assert {delivery.acks for delivery in resets[-1]} == {1}
    assert bench.metrics.value("schema_violations_total", kind="out") == 480
    await settle()
    assert len(asyncio.all_tasks()) == 1


async def test_a_full_queue_delays_no_other_sandbox(bench: Bench) -> None:
    back, is_of_full = asyncio.Event(), receipts_of_sandbox("full")

    async def away(message: BusMessage) -> None:
        if is_of_full(message):
            await back.wait()

    bench.bus.on_publish = away
    bench.bus.refuse = lambda message: FULL if message.subject == "wechat.out.full" else None
    routed = router(bench)
    refused = [plain(bench, sandbox="full", text="hi") for _ in range(100)]
    for command in refused:
        routed.on_delivery(command)
    await route(routed, *(plain(bench, sandbox="s1", text=f"{number}") for number in range(100)))
    assert copied(bench, "s1") == [str(number) for number in range(100)]
    assert not any(command.acks for command in refused)
    back.set()
    async with asyncio.timeout(60):
        while not all(command.acks for command in refused):
            await asyncio.sleep(0.1)
    assert [receipt.reason for receipt in bench.bus.receipts()] == ["quota"] * 100


# bugs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "ends"), [(2, []), (ALWAYS, [("bad", "dead_lettered", "crashed")])], ids=["twice", "in every attempt"]
)
async def test_a_command_whose_copy_raises_ends_and_the_others_are_copied_in_order(
    times: int, ends: list[tuple[str, str, str]], bench: Bench
) -> None:
    bugs = Bugs(times)

    async def fails(message: BusMessage) -> None:
        if message.stream == "out" and b'"bad"' in message.payload:
            bugs.strike()

    bench.bus.on_publish = fails
    commands = [plain(bench, sandbox="s1", id=ident, text=ident) for ident in ("a", "bad", "b", "c")]
    await route(router(bench), *commands)
    assert [(end.command, end.outcome, end.reason) for end in bench.bus.receipts()] == ends
    assert copied(bench, "s1") == (["a", "b", "c"] if ends else ["a", "bad", "b", "c"])
    assert [letter.data for letter in bench.bus.found("DEAD")] == [commands[1].data] * len(ends)
    assert [command.acks for command in commands] == [1] * 4


async def test_a_command_on_which_the_reader_raises_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Outbound:
        raise RuntimeError

    monkeypatch.setattr(module, "decode_command", fails)
    delivery = plain(bench, sandbox="s1", id="c1", text="hi", headers={H_MSG_ID: "h1"})
    await route(router(bench), delivery)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.command) == (UNROUTED, "h1")
    assert (receipt.outcome, receipt.reason) == ("dead_lettered", "crashed")
    assert len(bench.bus.found("DEAD")) == delivery.acks == 1


async def test_a_command_whose_end_raises_stays_until_it_is_delivered_again(bench: Bench) -> None:
    bugs = Bugs(ALWAYS)

    async def fails(message: BusMessage) -> None:
        if message.stream == "event":
            bugs.strike()

    bench.bus.on_publish = fails
    broken, routed = plain(bench, b"{"), router(bench)
    routed.on_delivery(broken)
    await route(routed, plain(bench, sandbox="s1", text="hi"))
    await asyncio.sleep(60)
    assert (broken.acks, bench.bus.receipts()) == (0, [])
    bugs.left = 0
    again = broken.again()
    await route(routed, again)
    assert (again.acks, len(bench.bus.receipts()), len(bench.bus.found("DEAD"))) == (1, 1, 1)
