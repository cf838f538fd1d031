"""Commands whose reading takes its time: the others do not wait."""

from __future__ import annotations

import asyncio

from adapter.errors import Refused, Temporary
from tests.fakes import Failing, settle
from tests.outbound.shards import finals, outcomes, parked, ready
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
