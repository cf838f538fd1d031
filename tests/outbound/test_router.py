"""Plain wechat.out: copied once to the sandbox it names, in order, or ended with a receipt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from adapter.contract.messages import Receipt
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, UNROUTED
from adapter.errors import BusRefused, LeaseLost
from adapter.outbound.router import Router
from adapter.ports import Message, PubAck
from tests.fakes import LIMITS, Bench, FakeBus, FakeDelivery

VIRTUAL_TIME = True


def router(bench: Bench) -> Router:
    return Router(
        bench.bus,
        bench.receipts,
        bench.events,
        bench.names,
        LIMITS,
        lambda: bench.leases.ensure_owned(0),
        lambda: 0 in bench.leases.owned,
        bench.clock,
        bench.metrics,
    )


class InPieces(FakeBus):
    """Notes how many copies are stored at once."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.names, bench.clock)
        self.pieces: list[int] = []

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        if messages:
            self.pieces.append(len(messages))
        return await super().publish_all(messages)


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
        seq=next(bench.numbers),
        time_ms=bench.clock.now_ms(),
        headers=headers,
        redelivered=redelivered,
    )


async def test_a_command_is_copied_to_its_sandbox_under_a_derived_id(bench: Bench) -> None:
    """Ids are unique in the stream: with its own it would be dropped as a repeat of itself."""
    delivery = plain(bench, sandbox="s1", text="hi", headers={H_MSG_ID: "h1", "traceparent": "00-1"})
    await router(bench).route(delivery)
    (copy,) = bench.bus.found("OUT")
    assert copy.subject == "wechat.out.s1"
    assert copy.data == delivery.data
    assert copy.headers[H_MSG_ID] not in ("", "h1")
    assert (copy.headers[H_COMMAND], copy.headers["traceparent"]) == ("h1", "00-1")
    assert copy.headers[H_SEQUENCE] == str(delivery.seq)
    assert delivery.acks == 1


@pytest.mark.parametrize(
    ("body", "headers", "ident"),
    [({"id": "c1"}, {H_MSG_ID: "h1"}, "c1"), ({}, {H_MSG_ID: "h1"}, "h1"), ({}, {}, "1")],
    ids=["body", "header", "sequence"],
)
async def test_the_copy_keeps_the_commands_id(
    body: dict[str, Any], headers: dict[str, str], ident: str, bench: Bench
) -> None:
    await router(bench).route(plain(bench, sandbox="s1", text="hi", headers=headers, **body))
    assert bench.bus.found("OUT")[0].headers[H_COMMAND] == ident


async def test_a_copy_after_a_crash_is_the_same_copy(bench: Bench) -> None:
    delivery = plain(bench, sandbox="s1", text="hi")
    await router(bench).route(delivery)
    delivery.redelivered = True
    await router(bench).route(delivery)
    assert len(bench.bus.found("OUT")) == 1
    assert delivery.acks == 2


async def test_the_id_of_a_copy_cannot_be_foretold_without_its_words() -> None:
    """Whoever publishes under it first has the copy dropped as a repeat: a sandbox may know all but the words."""
    ids = set()
    for text in ("hi", "hi!"):
        bench = Bench()
        delivery = plain(bench, sandbox="s1", text=text, headers={H_MSG_ID: "known"})
        assert (delivery.seq, delivery.time_ms) == (1, bench.clock.now_ms())
        await router(bench).route(delivery)
        ids.add(bench.bus.found("OUT")[0].headers[H_MSG_ID])
    assert len(ids) == 2


@pytest.mark.parametrize("with_heir", [False, True], ids=["here", "by the next owner"])
async def test_a_copy_that_comes_late_expires_as_if_it_had_not(with_heir: bool, bench: Bench) -> None:
    """While no adapter ran it waited on plain wechat.out, and its time began anew with the copy."""
    await bench.bind()
    bench.hears()
    late = plain(bench, sandbox="s1", id="c1", text="now or never", expires_in_s=60)
    await asyncio.sleep(50)
    await router(bench).route(late)
    (copy,) = bench.bus.found("OUT")
    assert copy.headers[H_SINCE_MS] == str(late.time_ms)
    bench.stale.add("b1@im.bot")
    shard = bench.processor()
    shard.intake.on_delivery(bench.command(data=copy.data, headers=copy.headers))
    await asyncio.sleep(9)
    assert [receipt.outcome for receipt in bench.bus.receipts()] == ["parked"]
    if with_heir:
        shard.stop()
        heir = Bench(bench, incarnation="heir-1")
        heir.stale.add("b1@im.bot")
        again = bench.command(data=copy.data, headers=copy.headers, redelivered=True)
        heir.processor().intake.on_delivery(again)
    await asyncio.sleep(2)
    assert [receipt.reason for receipt in bench.bus.receipts()] == ["needs_login", "expired"]
    assert {receipt.received_at_ms for receipt in bench.bus.receipts()} == {late.time_ms}


@pytest.mark.parametrize(
    ("body", "outcome"),
    [({"text": "hi"}, "accepted"), ({"text": "hi", "typing": "on"}, "refused")],
    ids=["sent", "invalid"],
)
async def test_a_receipt_tells_when_the_command_was_stored_and_not_its_copy(
    body: Any, outcome: str, bench: Bench
) -> None:
    await bench.bind()
    bench.hears()
    late = plain(bench, sandbox="s1", id="c1", **body)
    await asyncio.sleep(50)
    await router(bench).route(late)
    (copy,) = bench.bus.found("OUT")
    delivery = bench.command(data=copy.data, headers=copy.headers)
    bench.processor().intake.on_delivery(delivery)
    await asyncio.sleep(2)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.received_at_ms) == (outcome, late.time_ms)
    delivery.redelivered = True
    Bench(bench, incarnation="heir-1").processor().intake.on_delivery(delivery)
    await asyncio.sleep(2)
    assert bench.bus.receipts() == [receipt], "it is found by it"


async def test_two_commands_with_the_same_words_are_two(bench: Bench) -> None:
    for _ in range(2):
        await router(bench).route(plain(bench, sandbox="s1", text="hi"))
    assert len(bench.bus.found("OUT")) == 2


async def test_commands_keep_their_order(bench: Bench) -> None:
    routed = router(bench)
    await asyncio.gather(
        *(routed.route(plain(bench, sandbox=f"s{number % 2}", text=f"t{number}")) for number in range(20))
    )
    for number in range(2):
        assert copied(bench, f"s{number}") == [f"t{text}" for text in range(number, 20, 2)]


@pytest.mark.parametrize("seconds", [1, 60])
async def test_a_pause_of_the_lease_lets_nothing_overtake(seconds: int, bench: Bench) -> None:
    bench.leases.owned.add(0)
    routing = router(bench)
    deliveries = [plain(bench, sandbox="s1", text=text) for text in ("first", "second")]
    bench.leases.has_lease = False
    first = asyncio.ensure_future(routing.route(deliveries[0]))
    await asyncio.sleep(seconds)
    bench.leases.has_lease = True
    await asyncio.gather(first, routing.route(deliveries[1]))
    assert copied(bench, "s1") == ["first", "second"]
    assert [delivery.acks for delivery in deliveries] == [1, 1]


async def test_a_copy_waits_until_the_one_before_it_is_stored(bench: Bench) -> None:
    """Out at once they could change places where the stream's leader goes; those of other sandboxes go on."""
    routed, leader = router(bench), asyncio.Event()

    async def lose_first(message: Message) -> None:
        if b"first" in message.payload:
            await leader.wait()

    bench.bus.on_publish = lose_first
    async with asyncio.TaskGroup() as group:
        for text in ("first", "second"):
            group.create_task(routed.route(plain(bench, sandbox="s1", text=text)))
        await group.create_task(routed.route(plain(bench, sandbox="s2", text="other")))
        leader.set()
    texts = [msgspec.json.decode(copy.data)["text"] for copy in bench.bus.found("OUT")]
    assert texts == ["other", "first", "second"]


@pytest.mark.parametrize(("size", "pieces"), [(1, [1, 32, 32, 32, 2]), (12_000, [1, *[2] * 49])])
async def test_what_waits_for_its_turn_is_copied_in_pieces(size: int, pieces: list[int], bench: Bench) -> None:
    """One by one a flood for one sandbox would take a round trip each, and hold up what is behind it for others."""
    bench.bus = bus = InPieces(bench)
    routed = router(bench)
    commands = [plain(bench, sandbox="s1", text=f"{number:0{size}}") for number in range(99)]
    await asyncio.gather(*map(routed.route, commands))
    assert bus.pieces == pieces
    assert copied(bench, "s1") == [f"{number:0{size}}" for number in range(99)]
    assert [command.acks for command in commands] == [1] * 99


async def test_of_a_piece_only_what_is_refused_ends(bench: Bench) -> None:
    routed = router(bench)
    bench.bus.refuse = lambda message: BusRefused(10077, "") if message.payload.endswith(b'3"}') else None
    await asyncio.gather(*(routed.route(plain(bench, sandbox="s1", id=f"c{n}", text=f"{n}")) for n in range(6)))
    assert [receipt.command for receipt in bench.bus.receipts()] == ["c3"]
    assert copied(bench, "s1") == ["0", "1", "2", "4", "5"]


ENDED: list[tuple[str, bytes, str, str, str]] = [
    ("no-json", b"hello", "dead_lettered", "unreadable", "h1"),
    ("too-large", b'{"text":"' + b"a" * 262_144 + b'"}', "dead_lettered", "too_large", "h1"),
    ("no-sandbox", b'{"text":"hi","id":"c1"}', "refused", "invalid", "c1"),
    ("bad-sandbox", b'{"text":"hi","sandbox":"a.b","id":"c1"}', "refused", "invalid", "c1"),
    ("wildcard", b'{"text":"hi","sandbox":">"}', "refused", "invalid", "h1"),
    ("empty-sandbox", b'{"text":"hi","sandbox":""}', "refused", "invalid", "h1"),
    ("no-name-at-all", b'{"text":"hi","sandbox":5}', "dead_lettered", "unreadable", "h1"),
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
    await router(bench).route(delivery)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.command, receipt.outcome, receipt.reason) == (UNROUTED, ident, outcome, reason)
    assert delivery.acks == 1
    assert bench.bus.found("OUT") == []
    assert len(bench.bus.found("DEAD")) == (outcome == "dead_lettered")
    assert bench.metrics.value("schema_violations_total", kind="out") == 1


async def test_what_cannot_be_read_is_told_to_the_sandbox_that_it_names(bench: Bench) -> None:
    await router(bench).route(plain(bench, b'{"text":5,"sandbox":"s1","id":"c1"}', headers={H_MSG_ID: "h1"}))
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.command, receipt.outcome) == ("s1", "c1", "dead_lettered")


async def test_a_queue_that_is_full_refuses_the_command(bench: Bench) -> None:
    bench.bus.refuse = lambda message: BusRefused(10077, "maximum messages") if message.stream == "out" else None
    delivery = plain(bench, sandbox="s1", text="hi", id="c1")
    await router(bench).route(delivery)
    (receipt,) = bench.bus.receipts()
    assert (receipt.sandbox, receipt.command, receipt.outcome, receipt.reason) == ("s1", "c1", "refused", "backlog")
    assert delivery.acks == 1


async def test_what_was_refused_is_not_copied_when_it_comes_again_and_there_is_room(bench: Bench) -> None:
    """The acknowledgement, or the replica, was lost behind the receipt: the command has ended all the same."""
    bench.bus.refuse = lambda message: BusRefused(10077, "maximum messages") if message.stream == "out" else None
    delivery = plain(bench, sandbox="s1", text="hi", id="c1")
    await router(bench).route(delivery)
    bench.bus.refuse = lambda _: None
    delivery.redelivered = True
    await router(Bench(bench)).route(delivery)
    assert [receipt.outcome for receipt in bench.bus.receipts()] == ["refused"]
    assert bench.bus.found("OUT") == []
    assert delivery.acks == 2


async def test_what_had_its_receipt_is_only_acked(bench: Bench) -> None:
    delivery = plain(bench, b"hello")
    await router(bench).route(delivery)
    delivery.redelivered = True
    bench.bus.forget_ids()
    bench.bus.unreadable = 2
    await router(bench).route(delivery)
    receipts: list[Receipt] = bench.bus.receipts()
    assert len(receipts) == 1
    assert delivery.acks == 2


async def test_what_ends_here_is_counted_as_taken_and_what_is_copied_is_not(bench: Bench) -> None:
    """The copy is counted by the shard that takes it: else the sum of outcomes would not be what was taken."""
    routed = router(bench)
    await routed.route(plain(bench, sandbox="s1", text="hi"))
    assert bench.metrics.value("outbound_received_total") == 0
    broken = plain(bench, b"{")
    await routed.route(broken)
    broken.redelivered = True
    await routed.route(broken)
    dead = {"kind": "unreadable", "outcome": "dead_lettered", "reason": "unreadable"}
    assert bench.metrics.value("outbound_messages_total", **dead) == 1
    assert bench.metrics.value("outbound_received_total") == 1


async def test_one_that_was_cut_off_makes_no_second_copy(bench: Bench) -> None:
    """The next owner has made one, and the stream may not know its id any more."""

    async def cut_off(_: Message) -> None:
        bench.leases.has_lease = False

    bench.bus.on_publish = cut_off
    delivery = plain(bench, sandbox="s1", text="hi")
    routing = asyncio.ensure_future(router(bench).route(delivery))
    await asyncio.sleep(60)
    bench.leases.owned.clear()  # it hears of its end
    with pytest.raises(LeaseLost):
        await routing
    assert delivery.acks == len(copied(bench, "s1")) == 0
