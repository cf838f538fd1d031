"""Commands whose reading takes its time, or ends whoever reads them: the others neither wait nor share their fate."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest

from adapter.contract.names import H_MSG_ID, shard_of
from adapter.contract.records import Reading
from adapter.errors import BusRefused, Refused, Temporary
from adapter.outbound.processor import ShardCommandProcessor
from adapter.outbound.trials import OWNERS
from tests.fakes import Bench, Failing, FakeDelivery, settle
from tests.outbound.shards import USER, finals, outcomes, parked, ready
from tests.outbound.test_backlog import OTHER, two_users

VIRTUAL_TIME = True

SLOW = "**slow**" + "\n" * 7000
"""Read elsewhere."""


class Gate:
    """Holds up what reads, until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.waiting: list[str] = []

    async def __call__(self, text: str) -> None:
        self.waiting.append(text)
        await self.opened.wait()


# reading elsewhere ----------------------------------------------------------------------------------------


async def test_a_text_that_takes_its_time_holds_up_its_own_sandbox_alone() -> None:
    bench, shard = await two_users()
    bench.texts.on_render = gate = Gate()
    shard.intake.on_delivery(bench.command(SLOW, format="plain", id="c1"))
    shard.intake.on_delivery(bench.command("behind it", id="c2"))
    shard.intake.on_delivery(bench.command("hi", sandbox=OTHER, id="c3"))
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]
    assert shard.commands.depth() == (2, bench.bus.kept[0].time_ms)

    gate.opened.set()
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi", "slow", "behind it"]
    assert [receipt.command for receipt in finals(bench)] == ["c3", "c1", "c2"]
    assert shard.commands.depth() == (0, None)


async def test_a_flood_of_such_texts_is_sent_in_order() -> None:
    bench, shard = await two_users()
    for number in range(100):
        shard.intake.on_delivery(
            bench.command(f"{number}" + "\n" * 7000, format="plain" if number % 3 else "markdown")
        )
    await asyncio.sleep(60)
    assert bench.chat.texts == [str(number) for number in range(10)]
    assert len(bench.bus.receipts()) == 100
    assert len(parked(bench)) == 90


async def test_captions_are_read_elsewhere_too() -> None:
    bench, shard = await ready()
    picture = {"kind": "image", "data": "iVBORw0KGgo=", "caption": SLOW}
    shard.intake.on_delivery(bench.command(items=[{"kind": "text", "text": "*a*"}, picture], format="plain"))
    await asyncio.sleep(30)
    assert bench.texts.rendered == ["*a*", SLOW]
    assert bench.chat.texts == ["a", "slow", ""]


async def test_what_nobody_can_read_in_time_is_refused() -> None:
    bench, shard = await ready()
    bench.texts.on_render = Failing(1, Refused("too_long", "It does not end."))
    shard.intake.on_delivery(bench.command(SLOW, format="plain", id="c1"))
    shard.intake.on_delivery(bench.command("behind it", id="c2"))
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "refused", "too_long"), ("c2", "accepted", "")]


async def test_where_nothing_can_be_read_now_it_is_read_later() -> None:
    bench, shard = await ready()
    bench.texts.on_render = Failing(3, Temporary("text_worker"))
    shard.intake.on_delivery(bench.command(SLOW, format="plain"))
    await asyncio.sleep(5)
    assert bench.chat.texts == ["slow"]


async def test_what_comes_again_while_it_is_read_is_sent_once() -> None:
    """The consumer was reset."""
    bench, shard = await ready()
    bench.texts.on_render = gate = Gate()
    deliveries = [bench.command(SLOW, format="plain"), bench.command("behind it")]
    for delivery in deliveries:
        shard.intake.on_delivery(delivery)
    await settle()
    again = [delivery.again() for delivery in deliveries]
    for delivery in again:
        shard.intake.on_delivery(delivery)
    gate.opened.set()
    await asyncio.sleep(5)
    assert bench.chat.texts == ["slow", "behind it"]
    assert [delivery.acks for delivery in again] == [1, 1]


async def test_who_stops_leaves_what_is_being_read_to_the_next_owner() -> None:
    bench, shard = await ready()
    bench.texts.on_render = gate = Gate()
    delivery = bench.command(SLOW, format="plain")
    shard.intake.on_delivery(delivery)
    shard.intake.on_delivery(bench.command("behind it"))
    await settle()
    draining = asyncio.create_task(shard.drain(5.0))
    await settle()
    gate.opened.set()
    await draining
    assert (bench.chat.texts, delivery.acks) == ([], 0)


# what ends its readers ------------------------------------------------------------------------------------


async def taken_over(
    bench: Bench, deaths: int, deliveries: list[FakeDelivery]
) -> tuple[Bench, ShardCommandProcessor]:
    """The owner after so many deaths, and what is delivered to it."""
    owner = Bench(bench, incarnation=f"owner-{deaths}")
    owner.leases.inherited = {shard_of("s1")} if deaths else set()
    shard = owner.processor()
    for delivery in deliveries:
        shard.intake.on_delivery(delivery.again() if deaths else delivery)
    return owner, shard


async def killed_while_reading(bench: Bench, deaths: int, deliveries: list[FakeDelivery]) -> None:
    """Another owner takes over, and is killed as it reads the first text."""
    owner, shard = await taken_over(bench, deaths, [])
    owner.texts.on_render = gate = Gate()
    for delivery in deliveries:
        shard.intake.on_delivery(delivery.again() if deaths else delivery)
    await asyncio.sleep(5)
    assert gate.waiting == [SLOW]
    owner.leases.owned.clear()
    shard.stop()


def noted(bench: Bench) -> Reading:
    """What the bus knows of what is being read."""
    entry = bench.claims_bucket.entries.get(f"reading.{shard_of('s1')}")
    return msgspec.json.decode(entry.value, type=Reading) if entry and entry.value else Reading()


@pytest.mark.parametrize("fields", [{"id": "c1"}, {"headers": {H_MSG_ID: "c1"}}], ids=["its-own-id", "a-header"])
async def test_a_command_that_ends_whoever_reads_it_is_read_by_four(fields: dict[str, Any]) -> None:
    """Those behind it are sent, and what it was is kept for a person."""
    bench, _ = await ready()
    killer = bench.command(SLOW, format="plain", **fields)
    deliveries = [killer, bench.command("behind it", id="c2")]
    for deaths in range(OWNERS + 1):
        await killed_while_reading(bench, deaths, deliveries)
        assert bench.chat.texts == []
    heir, _ = await taken_over(bench, OWNERS + 1, deliveries)
    await asyncio.sleep(30)
    assert heir.texts.rendered == []
    assert outcomes(bench) == [("c1", "dead_lettered", "crashed"), ("c2", "accepted", "")]
    (letter,) = bench.bus.found("DEAD")
    assert letter.data == killer.data
    assert noted(bench) == Reading()


async def test_a_command_during_which_others_died_is_sent() -> None:
    """Three owners died while it was read, and a fourth one of something else once it was."""
    bench, _ = await ready()
    deliveries = [bench.command(SLOW, format="plain", id="c1")]
    for deaths in range(OWNERS):
        await killed_while_reading(bench, deaths, deliveries)
    bench.chat.hold_sends[USER] = asyncio.Event()
    owner, shard = await taken_over(bench, OWNERS, deliveries)
    await asyncio.sleep(5)
    assert noted(bench) == Reading()
    owner.leases.owned.clear()
    shard.stop()
    bench.chat.hold_sends.clear()
    await taken_over(bench, OWNERS + 1, deliveries)
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "accepted", "")]


async def test_after_a_death_what_was_delivered_is_read_under_one_note() -> None:
    """A take-over of thousands of parked commands costs two writes; only who finds the note writes one for each."""
    bench, _ = await ready()
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    _, shard = await taken_over(bench, 1, deliveries)
    shard.intake.on_delivery(bench.command("new", id="c3"))
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1", "t2", "new"]
    assert (Counter(bench.bus.writes)["claim"], noted(bench)) == (2, Reading())


async def test_an_owner_that_finds_the_note_reads_one_command_at_a_time() -> None:
    bench, _ = await ready()
    bench.claims_bucket.put(f"reading.{shard_of('s1')}", msgspec.json.encode(Reading(owners=1)))
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(3)]
    bench.bus.writes.clear()
    await taken_over(bench, 1, deliveries)
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "t1", "t2"]
    assert (Counter(bench.bus.writes)["claim"], noted(bench)) == (4, Reading())


async def test_a_shard_that_was_given_back_costs_nothing() -> None:
    bench, shard = await ready()
    shard.intake.on_delivery(bench.command("hi", redelivered=True))
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]
    assert (bench.claims_bucket.reads, "claim" in bench.bus.writes) == (0, False)


async def test_others_of_the_shard_are_tried_between_those_of_one_sandbox() -> None:
    bench, _ = await two_users()
    bench.claims_bucket.put(f"reading.{shard_of('s1')}", msgspec.json.encode(Reading(owners=1)))
    flood = [bench.command(f"t{number}") for number in range(10)]
    await taken_over(bench, 1, [*flood, bench.command("hi", sandbox=OTHER)])
    await settle()
    await asyncio.sleep(1)
    assert bench.chat.texts[:2] == ["t0", "hi"]


@pytest.mark.parametrize("value", [b"", b"nonsense", b'{"seq":-1}', b'{"seq":"x"}'])
async def test_a_note_by_another_hand_is_none(value: bytes) -> None:
    bench, _ = await ready()
    bench.claims_bucket.put(f"reading.{shard_of('s1')}", value)
    await taken_over(bench, 1, [bench.command("hi", id="c1")])
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "accepted", "")]


async def test_a_command_of_a_stream_that_was_made_anew_is_another_one() -> None:
    """Its sequence is that of one that ended three owners."""
    bench, _ = await ready()
    delivery = bench.command("hi", id="c1")
    note = Reading(seq=delivery.seq, time_ms=delivery.time_ms - 1, owners=OWNERS)
    bench.claims_bucket.put(f"reading.{shard_of('s1')}", msgspec.json.encode(note))
    await taken_over(bench, 1, [delivery])
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "accepted", "")]


@pytest.mark.parametrize("problem", [Temporary("bucket_full"), BusRefused(10059, "stream not found")])
async def test_a_note_that_cannot_be_written_is_waited_for(problem: Exception) -> None:
    bench, _ = await ready()
    bench.claims_bucket.on_write = Failing(2, problem)
    bench.claims_bucket.answers_lost = 1
    await taken_over(bench, 1, [bench.command("hi", id="c1"), bench.command("you", id="c2")])
    await asyncio.sleep(30)
    assert bench.chat.texts == ["hi", "you"]
    assert noted(bench) == Reading()


async def test_an_owner_that_was_frozen_notes_nothing_once_another_one_owns_the_shard() -> None:
    bench, _ = await ready()
    deliveries = [bench.command(SLOW, format="plain", id="c1"), bench.command("behind it", id="c2")]
    frozen, shard = await taken_over(bench, 1, [])
    frozen.texts.on_render = gate = Gate()
    for delivery in deliveries:
        shard.intake.on_delivery(delivery.again())
    await settle()
    frozen.leases.has_lease = False
    await taken_over(bench, 2, deliveries)
    await settle()
    gate.opened.set()
    await asyncio.sleep(60)
    assert bench.chat.texts == ["slow", "behind it"]
    assert noted(bench) == Reading()
    shard.stop()
