"""A shard that changes hands: what the owner before had in hand, parked late, or settled without anybody knowing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import msgspec
import pytest

from adapter.contract import Outbound, Receipt
from adapter.errors import Refused, Temporary
from adapter.names import H_COMMAND, H_MSG_ID, H_SANDBOX, H_TIME_MS, peer_key, shard_of
from adapter.outbound.commands import read_command
from adapter.outbound.receipts import Name, Receipts
from adapter.outbound.shard import Shard
from adapter.ports import Accepted, Message, Stored
from adapter.records import Hand
from adapter.timing import Turns
from tests.fakes import GAP_S, LIMITS, Bench, FakeBus, FakeDelivery, Rounds
from tests.outbound.shards import BOT, THROTTLED, TIMEOUT, USER, finals, outcomes, parked, ready, user_writes

VIRTUAL_TIME = True


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


@pytest.mark.parametrize("state", ["active", "needs_login"])
async def test_a_command_that_had_its_final_receipt_is_only_acked(state: str) -> None:
    """The owner died between the receipt and the ack."""
    bench, shard = await ready()
    delivery = bench.command("hi", id="c1")
    shard.on_delivery(delivery)
    await asyncio.sleep(5)
    shard.stop()

    heir = Bench(bench, incarnation="heir-1")
    await heir.bind(state=state)
    second = heir.shard()
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
