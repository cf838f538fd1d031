"""Receipts on their commands' subjects: one final for each, whoever tells it, and found again after a takeover."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from adapter.bridge import receipts
from adapter.bridge.receipts import Address
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult, unread
from adapter.contract.messages import Receipt
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_REASON, H_SANDBOX
from adapter.errors import BusRefused, StaleRead, Temporary
from adapter.ports import BusMessage
from tests.fakes import Bench, FakeDelivery
from tests.outbound.partitions import ready

VIRTUAL_TIME = True

TO = Address("s1", "b1@im.bot", "u1@im.wechat")


def ref(number: int, ident: str = "") -> CommandRef:
    return CommandRef(sequence=number, stored_ms=1000 + number, id=ident or f"c{number}")


async def store(bench: Bench, which: CommandRef, outcome: str = "accepted", *, expected: int = 0) -> int:
    result = CommandResult(outcome)  # type: ignore[arg-type]
    return await told(bench, which, result, expected=expected)


async def told(bench: Bench, which: CommandRef, result: CommandResult, to: Address = TO, *, expected: int = 0) -> int:
    """Tells a receipt of a command. `expected`: the sequence of the one before it, as far as is known."""
    command = unread(
        FakeDelivery("wechat.out.s1", b"", seq=which.sequence, time_ms=which.stored_ms), which, to.sandbox
    )
    command.receipt = expected
    await bench.receipts.tell(command, result, to, lambda: None)
    return command.receipt


def stored(bench: Bench) -> list[tuple[int, str]]:
    return [(receipt.sequence, receipt.outcome) for receipt in bench.bus.receipts()]


async def test_a_receipt_has_a_subject_of_its_own(bench: Bench) -> None:
    await store(bench, ref(1, "a/b c"))
    (stored,) = bench.bus.found("EVENT")
    assert stored.subject == "wechat.event.s1.receipt.a=2Fb=20c.1"
    assert H_MSG_ID in stored.headers, "without it readers take it for a stranger's"


async def test_an_id_that_is_a_wildcard_is_a_name(bench: Bench) -> None:
    await store(bench, ref(1, "other"))
    await store(bench, ref(2, "*"))
    assert bench.bus.found("EVENT")[-1].subject == "wechat.event.s1.receipt.=2A.2"
    assert await bench.receipts.last("s1", ">", None) is None


async def test_a_long_id_is_a_digest_in_the_subject(bench: Bench) -> None:
    """The server keeps all subjects in memory; this one has 1,536 bytes when it is escaped."""
    for number, ident in enumerate(("😀" * 128, "😀" * 127 + "😁"), 1):
        await store(bench, ref(number, ident))
        last = await bench.receipts.last("s1", ident, None)
        assert last is not None
        assert last.sequence == number
    subjects = {stored.subject for stored in bench.bus.found("EVENT")}
    assert "wechat.event.s1.receipt.==fe398dab7db39ba250a21ff3e7f80991.1" in subjects
    assert {len(subject) for subject in subjects} == {len("wechat.event.s1.receipt.==.1") + 32}


async def test_two_owners_cannot_store_two_final_receipts(bench: Bench) -> None:
    await store(bench, ref(1), "accepted")
    await store(bench, ref(1), "uncertain")
    with pytest.raises(StaleRead):
        await store(bench, ref(1), "parked")  # late, behind the final one
    assert stored(bench) == [(1, "accepted")]


async def test_a_final_follows_parked_also_where_its_sequence_is_not_known_any_more(bench: Bench) -> None:
    parked = await store(bench, ref(1), "parked")
    await store(bench, ref(2), "parked")
    await store(bench, ref(1), "accepted", expected=parked)
    await store(bench, ref(2), "accepted")
    assert stored(bench) == [(1, "parked"), (2, "parked"), (1, "accepted"), (2, "accepted")]


async def test_two_commands_with_one_id_have_one_final_receipt_each(bench: Bench) -> None:
    """Another owner tells of the first one late."""
    for number in (1, 2):
        await store(bench, ref(number, "same"), "parked")
    for number in (1, 2):
        await store(bench, ref(number, "same"), "accepted")
    await store(bench, ref(1, "same"), "uncertain")
    await store(bench, ref(1, "same"), "parked")
    assert stored(bench) == [(1, "parked"), (2, "parked"), (1, "accepted"), (2, "accepted")]
    found = await bench.receipts.find("s1", [ref(number, "same") for number in (1, 2)])
    assert {stored.receipt.outcome for stored in found.values()} == {"accepted"}


async def test_a_final_receipt_is_no_repeat_of_a_parked_one_that_nobody_knew_of(bench: Bench) -> None:
    """The owner before stored it late, with the same expectation: a server would take the second for the first."""
    await store(bench, ref(1), "parked")
    await store(bench, ref(1), "accepted")
    assert stored(bench) == [(1, "parked"), (1, "accepted")]


async def test_the_last_receipt_of_each_is_found_and_nothing_else(bench: Bench) -> None:
    await store(bench, ref(1), "accepted")
    await store(bench, ref(2), "parked")
    await bench.bus.store(BusMessage("event", bench.names.receipt("s1", "c3", 3), b"\xff", {}))
    found = await bench.receipts.find("s1", [ref(number) for number in range(1, 5)])
    assert {ref.sequence: stored.receipt.outcome for ref, stored in found.items()} == {1: "accepted", 2: "parked"}


async def test_the_last_receipt_of_a_command_can_be_asked_for(bench: Bench) -> None:
    assert await bench.receipts.last("s1", "same", None) is None
    await store(bench, ref(1, "same"), "parked")
    await store(bench, ref(1, "same"), "accepted")
    await store(bench, ref(2, "same"), "refused")
    for sequence, wanted in ((None, (2, "refused")), (1, (1, "accepted")), (2, (2, "refused")), (3, None)):
        last = await bench.receipts.last("s1", "same", sequence)
        assert (last and (last.sequence, last.outcome)) == wanted


async def test_a_command_of_a_stream_made_anew_is_not_the_one_with_its_sequence(bench: Bench) -> None:
    before, now = ref(1, "same"), CommandRef(sequence=1, stored_ms=99_000, id="same")
    await store(bench, before, "refused")
    assert await bench.receipts.find("s1", [now]) == {}
    await store(bench, now, "accepted")
    assert stored(bench) == [(1, "refused"), (1, "accepted")]


async def test_the_receipts_of_many_commands_with_one_id_cost_no_read(bench: Bench) -> None:
    """Each read all before it: a sandbox with 300 such commands kept the others from their receipts for minutes."""
    for number in range(100):
        await store(bench, ref(number, "same"), "refused")
    assert (len(stored(bench)), bench.bus.read_back) == (100, 0)


# what the stream refuses --------------------------------------------------------------------------------

TOO_LARGE = BusRefused(10054, "message size exceeds maximum allowed")


def refusing(bench: Bench, *streams: str, above: int = 0) -> None:
    def refuse(message: BusMessage) -> BusRefused | None:
        return TOO_LARGE if message.stream in streams and len(message.payload) > above else None

    bench.bus.refuse = refuse


async def test_a_receipt_that_is_too_large_loses_its_words(bench: Bench) -> None:
    refusing(bench, "event", above=800)
    result = CommandResult("refused", "rejected", "why " * 100, ("m1",), 1, -9, None, "words " * 100)
    await told(bench, ref(1), result)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.ret, receipt.message_ids) == ("refused", "rejected", -9, ["m1"])
    assert (receipt.detail, receipt.errmsg) == ("", "")


async def test_a_receipt_that_is_refused_again_is_a_dead_letter(bench: Bench) -> None:
    refusing(bench, "event")
    await store(bench, ref(1))
    assert bench.bus.receipts() == []
    (letter,) = bench.bus.found("DEAD")
    assert msgspec.json.decode(letter.data, type=Receipt).outcome == "accepted"
    assert letter.subject == "wechat.dead.WECHAT_EVENT"
    assert (letter.headers[H_REASON], letter.headers[H_SANDBOX]) == ("receipt_refused", "s1")
    assert letter.headers[H_COMMAND] == "c1"


async def test_a_command_whose_receipt_can_be_stored_nowhere_is_not_acknowledged() -> None:
    bench, partition = await ready()
    refusing(bench, "event", "dead")
    delivery = bench.command("hi", id="c1")
    partition.on_delivery(delivery)
    await asyncio.sleep(30)
    assert (bench.chat.texts, delivery.acks) == (["hi"], 0)
    refusing(bench)
    await asyncio.sleep(30)
    assert (bench.chat.texts, delivery.acks) == (["hi"], 1)
    assert [receipt.outcome for receipt in bench.bus.receipts()] == ["accepted"]


async def test_a_command_has_its_receipt_although_its_dead_letter_makes_the_code_raise() -> None:
    """It was left without receipt, dead letter and acknowledgement, and blocked each erasure of anybody."""
    bench, partition = await ready()

    async def fail(message: BusMessage) -> None:
        if message.stream == "dead":
            raise ZeroDivisionError

    bench.bus.on_publish = fail
    delivery = bench.command(data=b'{"text":1}', id="c1")
    partition.on_delivery(delivery)
    await asyncio.sleep(30)
    assert [(receipt.sequence, receipt.outcome) for receipt in bench.bus.receipts()] == [(1, "dead_lettered")]
    assert delivery.acks == 1


async def test_a_sandboxs_receipts_are_bounded_and_anothers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "RECEIPTS_KEPT", 5)
    monkeypatch.setattr(receipts, "PURGE_EVERY", 1)
    bench = Bench()
    await told(bench, ref(99), CommandResult("accepted"), Address("s2"))
    for number in range(9):
        await store(bench, ref(number))
    assert [sequence for sequence, _ in stored(bench)] == [99, *range(4, 9)]


async def test_a_purge_that_fails_keeps_no_receipt_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "PURGE_EVERY", 1)
    bench = Bench()

    async def purge(*_: object, **__: object) -> None:
        raise Temporary("bus_down")

    monkeypatch.setattr(bench.bus, "purge", purge)
    assert await store(bench, ref(1)) == 1
    assert stored(bench) == [(1, "accepted")]
