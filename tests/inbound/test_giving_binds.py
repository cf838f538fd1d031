"""Binds and unbinds while a partition changes hands, or a former owner's poll is open."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from adapter.contract.names import to_subject_token
from adapter.errors import SessionExpired, Temporary
from adapter.ports import BusMessage
from tests.inbound.pollers import raw
from tests.inbound.sharing import World
from tests.inbound.test_giving import B1, B2, MOVES, SANDBOX, U1, U2, polling, said, taken, texts
from tests.newer import made_newer

VIRTUAL_TIME = True
GIVER = 1
"""Its place among the followers of the bindings."""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.close()


def unbound(world: World) -> list[tuple[str, Sequence[str]]]:
    return [(receipt.outcome, receipt.bots) for receipt in world.bench.bus.receipts("unbind")]


# what a giver polls --------------------------------------------------------------------------------------


async def test_a_list_is_not_emptied_while_a_poll_of_a_second_giving_is_out(world: World) -> None:
    """The first giving has ended with its last poll."""
    first = await polling(world, B1)
    second = await taken(world, "r1")
    second.kill()
    await world.until(lambda: MOVES in first.consuming, within_s=10)
    assert first.polls(B1)
    await world.bench.bind(SANDBOX, B2, U2)
    await world.until(lambda: first.polls(B2))
    draining = asyncio.create_task(first.drain())
    await asyncio.sleep(1)
    world.phone.answer(B1)
    await asyncio.sleep(1)
    assert (first.polls(B2), world.lease(MOVES).former) == (True, (first.leases.replica,))
    third = world.start("r2")
    await world.until(lambda: MOVES in third.consuming, within_s=10)
    await asyncio.sleep(3)
    assert world.phone.polled_twice == []
    world.phone.answer(B2)
    await draining


@pytest.mark.parametrize("bots", [0, 600])
async def test_what_a_giver_stores_while_a_partition_begins_elsewhere_is_taken(world: World, bots: int) -> None:
    """The persons were read before it, and the partition does not work yet."""
    await world.bench.bind(SANDBOX, B1, U1)
    for number in range(bots):
        await world.bench.bind(SANDBOX, f"a{number:04}@im.bot", f"x{number}@im.wechat")
    world.start("r0")
    await world.until(lambda: B1 in world.phone.open)
    await asyncio.sleep(5)
    second = world.start("r1")
    load, is_read = second.bench.persons.load_all, asyncio.Event()

    async def slow(keys: Sequence[Any]) -> Any:
        found = await load(keys)
        is_read.set()
        await asyncio.sleep(0.3)
        return found

    second.bench.persons.load_all = slow  # type: ignore[method-assign]
    await world.until(lambda: MOVES in second.owned)
    await is_read.wait()
    await asyncio.sleep(0.05)
    assert MOVES not in second.partitions.working
    world.phone.answer(B1, raw("question"), cursor="newer")
    await world.until(lambda: MOVES in second.consuming and second.polls(B1))
    second.deliver("answer", id="c1", sandbox=SANDBOX, user=U1)
    await world.until(lambda: world.phone.texts == ["answer"], within_s=5)
    assert [each.cursor for each in world.phone.begun if each.bot == B1][-1] == "newer"


# unbinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comes_back", [False, True])
async def test_what_a_poll_brings_as_it_is_cut_for_an_unbind_is_a_dead_letter(world: World, comes_back: bool) -> None:
    """Also a poll that was kept while the partition was another replica's."""
    first = await polling(world, B1)
    if comes_back:
        second = await taken(world, "r1")
        second.kill()
        await world.until(lambda: MOVES in first.consuming, within_s=10)
    assert first.polls(B1)
    unbind = said(world, first, "unbind", bot=B1)
    await asyncio.sleep(0.05)
    world.phone.answer(B1, raw("in the grace"), cursor="newer")
    await world.until(lambda: unbind.acks == 1)
    assert (texts(world), len(world.bench.bus.found("DEAD"))) == ([], 1)


async def test_a_replica_that_stops_does_not_wait_for_an_unbind_that_waits(world: World) -> None:
    """The giver has not heard of the unbind, and its poll goes on."""
    await polling(world, B1)
    second = await taken(world, "r1")
    world.bench.bindings_bucket.followers.pop(GIVER)
    unbind = said(world, second, "unbind", bot=B1)
    await asyncio.sleep(2)
    assert unbind.acks == 0
    began = world.now()
    await second.drain()
    assert world.now() - began < 2


async def test_the_next_owner_of_an_unbind_waits_for_the_first_giver_s_poll_too(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    world.bench.bindings_bucket.followers.pop(GIVER)
    unbind = said(world, second, "unbind", bot=B1)
    await asyncio.sleep(1)
    assert unbind.acks == 0
    third = world.start("r2")
    first.leases.draining = True
    await asyncio.sleep(1.5)
    second.leases.draining = True
    await second.partitions.give(MOVES)
    await world.until(lambda: MOVES in third.consuming, within_s=15)
    await asyncio.sleep(1)
    assert (first.polls(B1), unbound(world)) == (True, [])
    world.phone.answer(B1)
    await world.until(lambda: unbound(world) != [], within_s=10)


async def test_ilink_hears_last_that_a_bot_is_polled_that_was_bound_again(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    heard: list[bool] = []
    for replica, late_s in ((first, 0.15), (second, 0.0)):
        chat = replica.bench.replica.edges.chat

        def noted(notify: Callable[..., Awaitable[None]], late_s: float) -> Callable[..., Awaitable[None]]:
            async def note(account: Any, *, start: bool) -> None:
                await asyncio.sleep(late_s)
                heard.append(start)
                await notify(account, start=start)

            return note

        chat.notify = noted(chat.notify, late_s)  # type: ignore[method-assign, assignment]
    said(world, second, "unbind", bot=B1)
    bind = said(world, second, "bind", bot=B1, bot_token=f"{B1}:t", user=U1)
    await world.until(lambda: bind.acks == 1 and second.polls(B1))
    await asyncio.sleep(3)
    assert heard[-1] is True


async def test_the_receipt_of_an_unbind_that_failed_in_between_names_all_its_bots(world: World) -> None:
    first = await polling(world, B1, B2)
    writes = 0

    async def fail(key: str) -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise Temporary("bus_down")

    world.bench.bindings_bucket.on_write = fail
    unbind = said(world, first, "unbind", all=True)
    await world.until(lambda: unbind.acks == 1)
    assert unbound(world) == [("applied", [B1, B2])]


async def test_an_unbind_waits_for_no_verdict_on_its_bot_s_token(world: World) -> None:
    """-14 to a send, and notifystart has no answer: a poll is to tell, and there are none any more."""
    first = await polling(world, B1, B2)
    world.phone.sends_to[U1] = deque([SessionExpired("needs_login", "x", errcode=-14)])
    world.phone.notify_fails = Temporary("network")
    first.deliver("one", id="c1", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(1)
    unbind = said(world, first, "unbind", bot=B1)
    assert await world.until(lambda: unbind.acks == 1) < 5


# binds ---------------------------------------------------------------------------------------------------


async def test_an_answer_in_hand_as_another_bot_takes_the_place_of_its_own_is_stored(world: World) -> None:
    """The person goes on."""
    first = await polling(world, B1)
    is_bound = asyncio.Event()

    async def fail(message: BusMessage) -> None:
        if message.stream == "in" and not is_bound.is_set():
            raise Temporary("bus_down")

    world.bench.bus.on_publish = fail
    world.phone.answer(B1, raw("in hand"), cursor="c")
    await asyncio.sleep(0.5)
    bind = said(world, first, "bind", bot=B2, bot_token=f"{B2}:t", user=U1)
    await world.until(lambda: bind.acks == 1)
    is_bound.set()
    await world.until(lambda: texts(world) == ["in hand"], within_s=20)
    assert world.bench.bus.found("DEAD") == []


async def test_a_bind_leaves_a_bot_of_its_person_whose_binding_a_newer_version_wrote(world: World) -> None:
    first = await polling(world, B1)
    bucket, key = world.bench.bindings_bucket, to_subject_token(B1)
    entry = await bucket.get(key)
    assert entry is not None
    assert entry.value is not None
    newer = made_newer(entry.value, token={"of": "another form"})
    await bucket.update(key, newer, entry.revision)
    await asyncio.sleep(1)
    bind = said(world, first, "bind", bot=B2, bot_token=f"{B2}:t", user=U1)
    await world.until(lambda: bind.acks == 1)
    left = await bucket.get(key)
    assert left is not None
    assert left.value == newer


async def test_one_at_whose_answer_the_code_raises_holds_its_sandbox_no_longer(world: World) -> None:
    first = await polling(world, B1)
    publish = first.core.publish

    async def crash(subject: str, payload: bytes, headers: dict[str, str]) -> None:
        if subject.startswith("_INBOX"):
            raise ValueError("a bug")
        await publish(subject, payload, headers)

    first.core.publish = crash  # type: ignore[method-assign]
    headers = {"Reply-To": "_INBOX.a.b"}
    unbind = world.bench.command(verb="unbind", sandbox=SANDBOX, headers=headers, bot="nobody@im.bot")
    first.partitions.working[MOVES].on_delivery(unbind)
    first.deliver("two", id="c2", sandbox=SANDBOX, bot=B1)
    await world.until(lambda: world.phone.texts == ["two"], within_s=10)
