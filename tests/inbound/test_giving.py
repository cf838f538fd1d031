"""Partitions that move while polls and sends are out: nobody waits for a deploy, and no two poll a bot at once.

Each test fails if a bot was polled twice at the same time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import msgspec
import pytest

from adapter.bridge.handover import (
    ASK_EVERY_S,
    CUT_DEAF_S,
    LONGEST_S,
    SILENT_S,
    Asked,
    PollEnded,
    StillOpen,
    answer,
    read_polled,
)
from adapter.bridge.partitions import CUT_S
from adapter.bridge.poller import State
from adapter.bridge.presence import ReplicaStatus
from adapter.contract.names import Names
from adapter.contract.records import Lease
from adapter.ports import BucketEntry
from tests.fakes import FakeDelivery
from tests.inbound.pollers import raw
from tests.inbound.sharing import HOLD_S, Sharing, World, sandbox_of

VIRTUAL_TIME = True

MOVES, STAYS = 31, 0
"""Partitions of whoever is alone: the first that it gives to who joins, and one that it keeps."""
B1, B2, U1, U2 = "b1@im.bot", "b2@im.bot", "u1@im.wechat", "u2@im.wechat"
SANDBOX = sandbox_of(MOVES)
POLLED = Names().polled()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.close()


async def polling(world: World, *bots: str, **changes: int) -> Sharing:
    """A replica that is alone, and polls. All users have just written."""
    world.bench.hears(SANDBOX, U1, bot=B1)
    world.bench.hears(SANDBOX, U2, bot=B2)
    await world.bench.bind(SANDBOX, B1, U1)
    if B2 in bots:
        await world.bench.bind(SANDBOX, B2, U2)
    first = world.start("r0", **changes)
    await world.until(lambda: len(world.phone.open) == len(bots))
    await asyncio.sleep(5)
    return first


async def taken(world: World, name: str, **changes: int) -> Sharing:
    """A replica that joins, and has begun to work for the partition."""
    joined = world.start(name, **changes)
    await world.until(lambda: MOVES in joined.consuming)
    return joined


def drop_polled(replica: Sharing) -> None:
    """What it says of ended polls is lost."""
    publish = replica.core.publish

    async def lossy(subject: str, payload: bytes, headers: dict[str, str]) -> None:
        if subject != POLLED:
            await publish(subject, payload, headers)

    replica.core.publish = lossy  # type: ignore[method-assign]


def texts(world: World) -> list[str]:
    return [inbound.text for inbound in world.bench.bus.inbound()]


# who is polled, and when ---------------------------------------------------------------------------------


async def test_who_is_not_polled_any_more_is_polled_at_once_and_nobody_s_poll_is_cut(world: World) -> None:
    """The giver had no room for the second bot."""
    first = await polling(world, B1, capacity=1)
    await world.bench.bind(SANDBOX, B2, U2)
    await asyncio.sleep(1)
    assert [*world.phone.open] == [B1]
    second = await taken(world, "r1")
    assert await world.until(lambda: second.polls(B2)) < 0.3
    await asyncio.sleep(10)
    assert first.polls(B1)
    assert second.partitions.pollers[B1].state is State.WAITING
    assert world.phone.cut == []


async def test_who_is_polled_still_is_polled_when_that_ends_and_its_answer_is_known(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await asyncio.sleep(3)
    world.phone.answer(B1, raw("late"), cursor="newer")
    assert await world.until(lambda: second.polls(B1)) < 0.2
    assert world.phone.begun[-1].cursor == "newer"
    assert (texts(world), B1 in first.partitions.pollers) == (["late"], False)
    world.phone.answer(B1, raw("late"), raw("next", 2), cursor="newest")
    await asyncio.sleep(1)
    assert texts(world) == ["late", "next"], "what the giver stored is known"
    assert world.lease(MOVES).former == ()


async def test_a_poll_that_ends_without_an_answer_of_note_is_told_too(world: World) -> None:
    await polling(world, B1)
    second = await taken(world, "r1")
    world.phone.answer(B1)
    assert await world.until(lambda: second.polls(B1)) < 0.2


async def test_polls_end_with_their_hold_and_nothing_is_lost_by_a_move(world: World) -> None:
    await polling(world, B1, B2)
    second = await taken(world, "r1")
    await world.until(lambda: second.polls(B1) and second.polls(B2), within_s=HOLD_S)
    assert world.phone.cut == []


async def test_a_lost_word_costs_five_seconds_and_the_answer_of_its_poll_is_read_first(world: World) -> None:
    first = await polling(world, B1, B2)
    drop_polled(first)
    second = await taken(world, "r1")
    await asyncio.sleep(1)
    world.phone.answer(B1, raw("late"), cursor="newer")
    assert 0.5 < await world.until(lambda: second.polls(B1)) < ASK_EVERY_S + 0.5
    assert world.phone.begun[-1].cursor == "newer"
    assert first.polls(B2)


async def test_a_word_that_comes_twice_or_of_nobody_in_question_changes_nothing(world: World) -> None:
    first = await polling(world, B1, B2)
    second = await taken(world, "r1")
    names = {"replica": first.leases.replica, "partition": MOVES}
    for words in (
        b"x",
        b"{}",
        *(
            msgspec.json.encode(word)
            for word in (
                names | {"bot": B1, "more": 1},
                names | {"bot": 1},
                names | {"bot": "b9@im.bot"},
                names | {"partition": STAYS, "bot": B1},
                names | {"partition": 77, "bot": B1},
                names | {"replica": "r9-abc", "bot": B1},
                names | {"replica": second.leases.replica, "bot": B1},
            )
        ),
    ):
        await first.core.publish(POLLED, words, {})
        await asyncio.sleep(0.1)
    assert first.polls(B1)
    assert second.partitions.pollers[B1].state is State.WAITING
    world.phone.answer(B1)
    await world.until(lambda: second.polls(B1))
    await first.core.publish(POLLED, msgspec.json.encode(names | {"bot": B1}), {})
    await asyncio.sleep(1)
    assert second.polls(B1)
    assert first.polls(B2)


# givers in trouble ---------------------------------------------------------------------------------------


async def test_a_giver_that_dies_leaves_its_polls_to_the_taker_after_four_silent_seconds(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await asyncio.sleep(1)
    first.kill()
    assert SILENT_S - 1.0 < await world.until(lambda: second.polls(B1)) < SILENT_S + 1.0
    await asyncio.sleep(2)
    assert world.lease(MOVES).former == ()


async def test_a_giver_that_is_dead_already_costs_four_seconds(world: World) -> None:
    first = await polling(world, B1)
    await first.partitions.give(MOVES)
    first.kill()
    second = await taken(world, "r1")
    assert await world.until(lambda: second.polls(B1)) == pytest.approx(SILENT_S, abs=0.6)


async def test_a_giver_that_hears_nobody_cuts_its_polls_before_anybody_else_polls(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await asyncio.sleep(0.5)
    first.core.is_cut = True
    assert CUT_DEAF_S - 1.0 < await world.until(lambda: world.phone.cut == [B1]) < CUT_DEAF_S + 0.5
    assert await world.until(lambda: second.polls(B1)) < 1.6


async def test_a_send_that_hangs_keeps_no_poll_of_a_giver_that_hears_nobody(world: World) -> None:
    first = await polling(world, B1)
    world.phone.hold_sends[U1] = asyncio.Event()
    first.deliver("hangs", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(1)
    assert world.phone.texts == ["hangs"]
    second = await taken(world, "r1")
    await asyncio.sleep(0.5)
    first.core.is_cut = True
    await world.until(lambda: second.polls(B1), within_s=SILENT_S + 2)


async def test_a_taker_that_hears_nobody_waits(world: World) -> None:
    """It cannot tell whether the giver is silent."""
    first = await polling(world, B1)
    second = await taken(world, "r1")
    second.core.is_cut = True
    await asyncio.sleep(20)
    assert first.polls(B1)
    second.core.is_cut = False
    await asyncio.sleep(2)
    world.phone.answer(B1)
    assert await world.until(lambda: second.polls(B1)) < 0.5


async def test_a_giver_whose_release_never_arrives_polls_no_longer_than_its_lease(world: World) -> None:
    """Who takes the partition then does not know of the poll."""
    first = await polling(world, B1)
    first.line.writes_fail = True
    second = world.start("r1")
    await asyncio.sleep(1)
    assert MOVES not in first.owned
    await world.until(lambda: second.polls(B1), within_s=10)


async def test_a_replica_that_stops_as_its_lease_ends_polls_no_longer(world: World) -> None:
    """NATS does not answer, so that consumers and records take their time, and the release never arrives."""
    world.bench.hears(sandbox_of(STAYS), U2, bot=B2)
    first = await polling(world, B1)
    await world.bench.bind(sandbox_of(STAYS), B2, U2)
    await world.until(lambda: first.polls(B2))
    first.deliver("sent", sandbox=sandbox_of(STAYS))
    second = await taken(world, "r1")
    await world.until(lambda: len(second.consuming) == 16)

    async def hang(_: str) -> None:
        if first.line.down:
            await asyncio.Event().wait()

    world.bench.person_bucket.on_write, first.ends_s = hang, CUT_S
    first.line.down = True
    until = first.leases.owned[STAYS].until
    await world.until(lambda: world.now() > until - 0.2)
    stopping = asyncio.create_task(first.drain())
    assert await world.until(lambda: B2 in world.phone.cut) < 1.0
    await world.until(lambda: second.polls(B2), within_s=10)
    await stopping


async def test_a_giver_that_is_stopped_and_goes_on_does_not_poll_beside_the_taker(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    world.phone.answer(B1)
    await world.until(lambda: second.polls(B1))
    first.life.stop()
    first.core.is_cut = True
    await asyncio.sleep(20)
    first.life.go_on()
    first.core.is_cut = False
    await asyncio.sleep(20)
    assert len(world.phone.open) == 1


class Ghost:
    """A former owner that says and answers what the test wants."""

    def __init__(self, world: World, *, speaks: bool = True, told: bytes | None = None) -> None:
        self.presence = world.bench.presence
        self.asked: list[float] = []
        self.told = told
        names, core = Names(), world.bench.core

        def tell(data: bytes) -> bytes | None:
            self.asked.append(world.now())
            return self.told if msgspec.json.decode(data, type=Asked) == Asked(partition=MOVES) else b"wrong"

        core.respond(names.polls_of(self.presence.replica), tell)
        world.keys.store.write(str(MOVES), msgspec.json.encode(Lease(former=(self.presence.replica,))), 0)
        self.speaking = asyncio.create_task(self.presence.run(lambda: (0, False))) if speaks else None


async def haunted(world: World, ghost: Ghost) -> Sharing:
    await world.bench.bind(SANDBOX, B1, U1)
    await world.bench.bind(SANDBOX, B2, U2)
    taker = world.start("r0")
    await world.until(lambda: MOVES in taker.consuming)
    return taker


async def test_seventy_seconds_are_longer_than_any_poll(world: World) -> None:
    """A giver that names a bot for longer is wrong about it."""
    ghost = Ghost(world, told=msgspec.json.encode(StillOpen(bots={B1}, persons=set())))
    taker = await haunted(world, ghost)
    assert await world.until(lambda: taker.polls(B2)) < 0.5
    assert await world.until(lambda: taker.polls(B1)) == pytest.approx(LONGEST_S, abs=1.0)
    pauses = [after - before for before, after in itertools.pairwise(ghost.asked)]
    assert all(pause == pytest.approx(ASK_EVERY_S, abs=0.6) for pause in pauses)
    assert ghost.speaking is not None
    ghost.speaking.cancel()


@pytest.mark.parametrize("told", [None, b"x", b'{"bots":["b1@im.bot"]}', b'{"bots":1,"persons":[]}'], ids=str)
async def test_an_answer_that_is_none_names_everybody(world: World, told: bytes | None) -> None:
    world.bench.hears(SANDBOX, U1, bot=B1)
    ghost = Ghost(world, told=told)
    taker = await haunted(world, ghost)
    taker.deliver("waits", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(20)
    assert (world.phone.open, world.phone.texts) == ({}, [])
    ghost.told = msgspec.json.encode(StillOpen(bots=set(), persons=set()))
    assert await world.until(lambda: taker.polls(B1) and taker.polls(B2)) < ASK_EVERY_S + 0.6
    assert world.phone.texts == ["waits"]
    assert ghost.speaking is not None
    ghost.speaking.cancel()


async def test_who_is_silent_from_the_start_is_waited_for_four_seconds_from_the_taking(world: World) -> None:
    taker = await haunted(world, Ghost(world, speaks=False))
    assert await world.until(lambda: taker.polls(B1)) == pytest.approx(SILENT_S, abs=0.6)


# several moves -------------------------------------------------------------------------------------------


async def test_a_third_taker_asks_both_who_still_poll(world: World) -> None:
    first = await polling(world, B1, capacity=1)
    await world.bench.bind(SANDBOX, B2, U2)
    second = await taken(world, "r1")
    await world.until(lambda: second.polls(B2))
    third = world.start("r2")
    await second.partitions.give(MOVES)
    await world.until(lambda: MOVES in third.consuming)
    assert world.lease(MOVES).former == (first.leases.replica, second.leases.replica)
    await asyncio.sleep(5)
    assert first.polls(B1)
    assert second.polls(B2)
    world.phone.answer(B2)
    assert await world.until(lambda: third.polls(B2)) < 0.3
    world.phone.answer(B1)
    assert await world.until(lambda: third.polls(B1)) < 0.3
    await asyncio.sleep(2)
    assert world.lease(MOVES).former == ()
    assert world.phone.cut == []


async def test_a_taker_that_dies_leaves_the_giver_s_poll_to_a_third(world: World) -> None:
    """Which knows of it by the key, and begins no poll beside it."""
    first = await polling(world, B1)
    second, third = await taken(world, "r1"), world.start("r2")
    first.leases.draining = True  # so that the third gets it
    await asyncio.sleep(2)
    second.kill()
    await world.until(lambda: MOVES in third.consuming, within_s=10)
    assert first.polls(B1)
    await asyncio.sleep(3)
    world.phone.answer(B1, raw("late"), cursor="newer")
    assert await world.until(lambda: third.polls(B1)) < 0.3
    assert (world.phone.begun[-1].cursor, texts(world)) == ("newer", ["late"])


@pytest.mark.parametrize("who", ["the giver", "a third"])
async def test_a_taker_that_dies_leaves_those_whom_it_polled_for_ten_seconds(world: World, who: str) -> None:
    """The poll that the giver still holds stays its own."""
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await world.bench.bind(SANDBOX, B2, U2)
    await world.until(lambda: second.polls(B2))
    next_ = first
    if who == "a third":
        next_ = world.start("r2")
        first.leases.draining = True
        await asyncio.sleep(2)
    second.kill()
    assert await world.until(lambda: next_.polls(B2)) < 10
    assert MOVES in next_.owned
    assert (first.polls(B1), B1 in world.phone.cut) == (True, False)
    world.phone.answer(B1)
    assert await world.until(lambda: next_.polls(B1)) < 0.5


async def test_a_partition_that_comes_back_keeps_its_poll(world: World) -> None:
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await asyncio.sleep(1)
    second.kill()
    await world.until(lambda: MOVES in first.consuming, within_s=10)
    begun = len(world.phone.begun)
    await asyncio.sleep(5)
    assert (first.polls(B1), len(world.phone.begun), world.phone.cut) == (True, begun, [])
    world.phone.answer(B1, raw("late"), cursor="newer")
    assert await world.until(lambda: len(world.phone.begun) > begun) < 0.5
    assert (first.polls(B1), world.phone.begun[-1].cursor) == (True, "newer")
    world.phone.answer(B1, raw("late"), raw("next", 2), cursor="newest")
    await asyncio.sleep(1)
    assert texts(world) == ["late", "next"]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_bot_that_waited_as_its_partition_went_is_polled_when_it_comes_back(
    world: World, is_lost: bool
) -> None:
    """Its poller has never had a person."""
    first = await polling(world, B1)
    second = await taken(world, "r1")
    await asyncio.sleep(1)
    assert second.partitions.pollers[B1].state is State.WAITING
    first.leases.draining = True
    third = world.start("r2")
    if is_lost:
        second.line.down = True
    else:
        await asyncio.sleep(0.5)
        await second.partitions.give(MOVES)
    await world.until(lambda: MOVES in third.consuming, within_s=15)
    second.line.down = False
    third.leases.draining = True
    await asyncio.sleep(2)
    assert B1 not in second.partitions.pollers
    await third.partitions.give(MOVES)
    await world.until(lambda: MOVES in second.consuming, within_s=15)
    await world.until(lambda: second.polls(B1), within_s=HOLD_S + 2)


async def test_a_list_is_emptied_where_nobody_takes_the_partition(world: World) -> None:
    first = await polling(world, B1)
    first.leases.draining = True
    await first.partitions.give(MOVES)
    assert world.lease(MOVES) == Lease(former=(first.leases.replica,))
    await asyncio.sleep(3)
    assert first.polls(B1)
    world.phone.answer(B1, raw("late"))
    await asyncio.sleep(1)
    assert (world.lease(MOVES), texts(world)) == (Lease(), ["late"])


async def test_a_poll_that_is_left_is_cut_when_its_binding_is_gone(world: World) -> None:
    first = await polling(world, B1)
    await taken(world, "r1")
    await world.bench.bindings.remove(B1)
    await asyncio.sleep(1)
    assert (world.phone.open, world.phone.cut) == ({}, [B1])
    assert B1 not in first.partitions.pollers


async def test_a_replica_that_stops_waits_for_its_polls_and_delays_nobody(world: World) -> None:
    first = await polling(world, B1)
    await world.bench.bind(sandbox_of(STAYS), B2, U2)
    await world.until(lambda: first.polls(B2))
    second = await taken(world, "r1")
    stopping = asyncio.create_task(first.drain())
    await world.until(lambda: len(second.consuming) == 32, within_s=1.5)
    await asyncio.sleep(5)
    assert (first.polls(B1), stopping.done(), world.phone.cut) == (True, False, [])
    world.phone.answer(B1, raw("late"))
    world.phone.answer(B2)
    assert await world.until(lambda: second.polls(B1) and second.polls(B2)) < 0.3
    await asyncio.sleep(0.5)
    assert (stopping.done(), texts(world)) == (True, ["late"])


async def test_a_rolling_restart_of_all_replicas_cuts_no_poll(world: World) -> None:
    replicas = [await polling(world, B1)]
    for round_ in range(1, 5):
        replicas.append(await taken(world, f"r{round_}") if round_ == 1 else world.start(f"r{round_}"))
        await asyncio.sleep(15)
        await replicas[round_ - 1].drain()
        await asyncio.sleep(5)
    await asyncio.sleep(HOLD_S)
    assert world.phone.cut == []
    assert replicas[-1].polls(B1)
    begun = [each.at_s for each in world.phone.begun if each.bot == B1]
    assert max(after - before for before, after in itertools.pairwise(begun)) < HOLD_S + 1


# binds ---------------------------------------------------------------------------------------------------


def said(world: World, owner: Sharing, verb: str, **fields: object) -> FakeDelivery:
    """A bind, unbind or erase, as the consumer of its owner delivers it."""
    delivery = world.bench.command(verb=verb, sandbox=SANDBOX, **fields)  # type: ignore[arg-type]
    owner.partitions.working[MOVES].on_delivery(delivery)
    return delivery


@pytest.mark.parametrize("is_late", [False, True], ids=["in-its-grace", "long-behind"])
async def test_an_erase_while_the_giver_s_poll_is_open_leaves_nothing(world: World, is_late: bool) -> None:
    """The poll brings a message of who was erased: in the grace of its cut, or where the giver has not heard."""
    first = await polling(world, B1)
    second = await taken(world, "r1")
    assert first.polls(B1)
    bucket = world.bench.bindings_bucket
    hears = [bucket.followers.pop(1)] if is_late else []  # the giver's
    erase = said(world, second, "erase", user=U1)
    await world.until(lambda: B1 not in {binding.bot for binding in second.bench.bindings})
    if is_late:
        await asyncio.sleep(3)
        assert (first.polls(B1), erase.acks) == (True, 0), "the erase waits for the poll"
    world.phone.answer(B1, raw("of who was erased"), cursor="newer")
    await world.until(lambda: world.phone.ended[-1:] == [B1])
    await world.until(lambda: erase.acks == 1)
    await asyncio.sleep(10)
    bus = world.bench.bus
    assert ([stored.subject for stored in bus.found("DEAD")], texts(world)) == ([], [])
    assert [kept for kept in bus.kept if kept.stream != "WECHAT_OUT" and U1.encode() in kept.stored.data] == []
    for hear, entry in itertools.product(hears, bucket.entries.values()):
        hear(entry)
    await world.until(lambda: B1 not in first.partitions.pollers)


async def test_nobody_s_words_go_to_the_next_person_where_a_taker_hears_late_of_binds(world: World) -> None:
    """The partition is released right behind an unbind and the bind of another person, and taken at once; what the
    taker hears of the bindings is a second behind."""
    first = await polling(world, B1)
    second = world.start("r1")
    second.leases.draining = True
    await asyncio.sleep(2)
    followers, loop = world.bench.bindings_bucket.followers, asyncio.get_running_loop()
    hear = followers.pop()  # the taker's

    def hear_late(entry: BucketEntry) -> None:
        loop.call_later(1.0, hear, entry)

    followers.append(hear_late)
    world.phone.answer(B1)
    await asyncio.sleep(0.1)
    said(world, first, "unbind", all=True)
    bind = said(world, first, "bind", bot=B2, bot_token=f"{B2}:t", user=U2)
    await world.until(lambda: bind.acks == 1)
    world.bench.hears(SANDBOX, U2, bot=B2, since=bind.seq)
    words = world.bench.command("for the second one", id="c1", sandbox=SANDBOX)
    second.leases.draining, first.leases.draining = False, True
    await first.partitions.give(MOVES)
    released = world.now()
    await world.until(lambda: MOVES in second.owned)
    assert world.now() - released < 0.1
    assert world.lease(MOVES).owner == second.leases.replica
    await world.until(lambda: MOVES in second.consuming)
    assert {binding.bot for binding in second.bench.bindings} == {B2}, "it works with what is bound"
    await world.until(lambda: words.acks == 1 or bool(world.phone.sent))
    world.phone.answer(B2)
    await world.until(lambda: second.polls(B2))
    await asyncio.sleep(10)
    assert [(sent.user, sent.text) for sent in world.phone.sent] == [(U2, "for the second one")]
    assert {each.bot for each in world.phone.begun if each.replica == "r1"} == {B2}


# sends ---------------------------------------------------------------------------------------------------


async def sending(world: World) -> Sharing:
    """A replica with a request to the first person that hangs."""
    first = await polling(world, B1, B2)
    world.phone.hold_sends[U1] = asyncio.Event()
    first.deliver("one", id="c1", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(1)
    assert world.phone.texts == ["one"]
    return first


def outcomes(world: World) -> list[tuple[str, str]]:
    return [(each.command, each.outcome) for each in world.bench.bus.receipts()]


async def test_a_send_that_is_out_holds_its_person_alone_and_is_not_repeated(world: World) -> None:
    await sending(world)
    second = await taken(world, "r1")
    second.deliver("two", id="c2", sandbox=SANDBOX, bot=B1)
    second.deliver("three", id="c3", sandbox=SANDBOX, bot=B2)
    await asyncio.sleep(0.5)
    assert (world.phone.texts, outcomes(world)) == (["one", "three"], [("c3", "accepted")])
    await asyncio.sleep(12)
    assert world.phone.texts == ["one", "three"]
    world.phone.hold_sends[U1].set()
    assert await world.until(lambda: len(world.phone.sent) == 3) < 0.5
    await asyncio.sleep(3)
    assert world.phone.texts == ["one", "three", "two"]
    assert outcomes(world) == [("c3", "accepted"), ("c1", "accepted"), ("c2", "accepted")]
    assert (world.phone.overlaps, [each.acks for each in world.bench.deliveries]) == (0, [1, 1, 1])
    await asyncio.sleep(HOLD_S)
    assert world.lease(MOVES).former == ()


async def test_a_send_that_is_out_holds_its_person_where_the_partition_comes_back(world: World) -> None:
    """The giver is never silent to itself."""
    first = await sending(world)
    second = await taken(world, "r1")
    second.kill()
    await world.until(lambda: MOVES in first.consuming, within_s=10)
    first.deliver("two", id="c2", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(12)
    assert world.phone.texts == ["one"]
    world.phone.hold_sends[U1].set()
    await world.until(lambda: len(world.phone.sent) == 2)
    assert (world.phone.texts, world.phone.overlaps) == (["one", "two"], 0)


async def test_a_lost_word_about_a_send_costs_five_seconds(world: World) -> None:
    first = await sending(world)
    drop_polled(first)
    second = await taken(world, "r1")
    second.deliver("two", id="c2", sandbox=SANDBOX, bot=B1)
    await asyncio.sleep(1)
    world.phone.hold_sends[U1].set()
    assert 0.5 < await world.until(lambda: len(world.phone.sent) == 2) < ASK_EVERY_S + 1.0
    assert (world.phone.texts, world.phone.overlaps) == (["one", "two"], 0)


async def test_a_giver_that_dies_while_it_sends_leaves_the_send_to_the_taker(world: World) -> None:
    """It may have been shown: the taker repeats it with the same number, once iLink answers."""
    first = await sending(world)
    second = await taken(world, "r1")
    first.kill()
    await asyncio.sleep(1)
    world.phone.hold_sends[U1].set()
    second.deliver("three", id="c3", sandbox=SANDBOX, bot=B2)
    await world.until(lambda: ("c1", "accepted") in outcomes(world), within_s=60)
    ones = {sent.client_id for sent in world.phone.sent if sent.text == "one"}
    assert (len(ones), world.phone.overlaps) == (1, 0)


# what is said --------------------------------------------------------------------------------------------


def test_a_question_that_does_not_decode_strictly_gets_no_answer() -> None:
    def still_open(number: int) -> StillOpen:
        return StillOpen(bots={str(number)}, persons=set())

    def status(bots: object) -> ReplicaStatus:
        return ReplicaStatus(instance="me", version="1", bots=len(list(bots)))  # type: ignore[call-overload]

    told = answer(msgspec.json.encode(Asked(partition=7)), still_open, status)
    assert told is not None
    assert msgspec.json.decode(told, type=StillOpen) == StillOpen(bots={"7"}, persons=set())
    asked = answer(b'{"ask":"status","bots":["a","b"]}', still_open, status)
    assert asked is not None
    assert msgspec.json.decode(asked, type=ReplicaStatus).bots == 2
    for wrong in (b"", b"x", b"{}", b'{"ask":"open"}', b'{"ask":"open","partition":7,"more":1}', b'{"ask":"else"}'):
        assert answer(wrong, still_open, status) is None


def test_a_word_is_read_strictly() -> None:
    word = PollEnded(replica="r0-abc", partition=7, person="s1.p")
    assert read_polled(msgspec.json.encode(word)) == word
    assert read_polled(b'{"replica":"r0-abc","partition":7,"more":1}') is None
    assert read_polled(b'{"replica":"r0-abc"}') is None
