"""Who is here, who is silent, and how replicas share partitions by what they tell each other."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.bridge.presence import DEAF_S, GIVEN_S, HEARD_S, KEPT_S, LEFT_S, Here, Presence, share
from adapter.contract.names import Names
from adapter.errors import Temporary
from tests.fakes import FakeClock, settle
from tests.fakes.bus import FakeCoreBus

VIRTUAL_TIME = True

HERE = Names().here()


# sharing -------------------------------------------------------------------------------------------------

replicas = st.lists(st.integers(0, 12), min_size=1, max_size=6)
"""How many partitions each has at first."""


@given(replicas, st.integers(0, 12), st.randoms(use_true_random=False))
def test_replicas_end_with_a_fair_share_and_move_no_more_than_the_surplus(
    counts: list[int], free: int, random: Any
) -> None:
    """In any order of their looks, each of which sees what the one before has done."""
    partitions = sum(counts) + free
    numbers = list(range(partitions))
    random.shuffle(numbers)
    names = [f"r{number}" for number in range(len(counts))]
    by_name = dict(zip(names, counts, strict=True))
    owned = {name: {numbers.pop() for _ in range(count)} for name, count in by_name.items()}
    ages = dict.fromkeys(numbers, 0.0)
    given_away: dict[str, dict[int, float]] = {name: {} for name in names}
    fair = math.ceil(partitions / len(names))
    surplus = sum(max(0, count - fair) for count in counts)
    moved: list[int] = []
    for _ in range(40):
        for name in random.sample(names, len(names)):
            others = {other: len(owned[other]) for other in names if other != name}
            step = share(
                partitions=partitions,
                owned=[*owned[name]],
                free=ages,
                given=given_away[name],
                others=others,
                replica=name,
            )
            assert step.fair == fair
            assert {*step.take} <= {*ages}
            if not step.take and step.give is not None:
                owned[name].remove(step.give)
                moved.append(step.give)
                ages[step.give] = given_away[name][step.give] = 0.0
            for number in step.take:
                del ages[number]
                owned[name].add(number)
        ages = {number: age + 0.5 for number, age in ages.items()}
        given_away = {name: {number: age + 0.5 for number, age in ago.items()} for name, ago in given_away.items()}
    assert not ages
    assert max(map(len, owned.values())) <= fair
    assert len(moved) == len({*moved}) <= surplus


ages = st.dictionaries(st.integers(0, 31), st.sampled_from([0.0, 0.5, LEFT_S, 5.0, GIVEN_S, 60.0]))


@given(ages, ages, st.sets(st.integers(32, 63)), st.dictionaries(st.text("ab", max_size=3), st.integers(0, 40)))
def test_nobody_takes_more_than_is_fair_before_the_others_had_their_time(
    free: dict[int, float], given_away: dict[int, float], owned: set[int], others: dict[str, int]
) -> None:
    step = share(partitions=64, owned=[*owned], free=free, given=given_away, others=others, replica="me")
    early = [number for number in step.take if free[number] < LEFT_S]
    assert not early or len(owned) + len(early) <= step.fair
    assert len(step.take) == len({*step.take})
    its_own = {number for number in given_away if max(given_away[number], free.get(number, 0.0)) < GIVEN_S}
    assert not others or not its_own & {*step.take}
    assert step.give is None or (not step.take and len(owned) > step.fair and step.give in owned)
    if step.give is not None:
        assert min(others.values()) < step.fair, "somebody has room for it"
    late = {number for number in free if free[number] >= LEFT_S and not (others and number in its_own)}
    assert late <= {*step.take}, "what is free for a while is taken"


def test_each_begins_with_others() -> None:
    """Else all would want the same, of which one gets it."""
    free = dict.fromkeys(range(32), 0.0)

    def wanted(replica: str) -> set[int]:
        others = {"x": 0, "y": 0}
        return {*share(partitions=32, owned=(), free=free, given={}, others=others, replica=replica).take}

    assert len(wanted("a") | wanted("b") | wanted("c")) > 16


# what is heard -------------------------------------------------------------------------------------------


class World:
    """Replicas that hear each other."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.core: FakeCoreBus | None = None
        self.running: list[asyncio.Task[None]] = []

    def presence(self, name: str) -> tuple[Presence, FakeCoreBus]:
        """One that does not say anything yet."""
        core = FakeCoreBus(self.core)
        self.core = self.core or core
        return Presence(core, Names(), self.clock, name), core

    def start(
        self, name: str, about: Callable[[], tuple[int, bool]] = lambda: (3, True)
    ) -> tuple[Presence, FakeCoreBus]:
        made, core = self.presence(name)
        self.running.append(asyncio.create_task(made.run(about)))
        return made, core


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    for task in made.running:
        task.cancel()


async def test_one_who_starts_hears_of_all_others_at_once(world: World) -> None:
    first, _ = world.start("r0")
    second, _ = world.start("r1", lambda: (0, False))
    await asyncio.sleep(10.5)
    third, _ = world.start("r2")
    await settle()
    assert third.counting() == {first.replica: 3}
    assert third.others() == [first.replica, second.replica]
    assert first.counting() == {third.replica: 3}


async def test_what_was_heard_is_good_for_a_while(world: World) -> None:
    first, _ = world.start("r0")
    second, core = world.start("r1")
    await asyncio.sleep(10.5)
    core.is_cut = True
    await asyncio.sleep(HEARD_S - 0.6)
    assert first.counting() == {second.replica: 3}
    await asyncio.sleep(0.7)
    assert (first.counting(), first.others()) == ({}, [])
    core.is_cut = False
    await asyncio.sleep(1.0)
    assert first.others() == [second.replica]


async def test_the_last_word_counts(world: World) -> None:
    told = 5, True
    first, _ = world.start("r0")
    second, _ = world.start("r1", lambda: told)
    await asyncio.sleep(1.5)
    assert first.counting() == {second.replica: 5}
    told = 4, False
    await asyncio.sleep(1.0)
    assert (first.counting(), first.others()) == ({}, [second.replica])


async def test_a_release_is_told_to_the_others_alone(world: World) -> None:
    first, _ = world.start("r0")
    second, _ = world.start("r1")
    await settle()
    heard: list[str] = []
    first.on_released, second.on_released = lambda: heard.append("r0"), lambda: heard.append("r1")
    await first.tell_released()
    await settle()
    assert heard == ["r1"]


GOOD: dict[str, Any] = {"replica": "r1-abc", "owned": 3, "counts": True, "is_first": True, "has_released": True}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"[]",
        b'{"replica":"\xff"}',
        *(
            msgspec.json.encode(fields)
            for fields in (
                {},
                {name: value for name, value in GOOD.items() if name != "replica"},
                GOOD | {"owned": "3"},
                GOOD | {"counts": 1},
                GOOD | {"replica": None},
                GOOD | {"more": 1},
            )
        ),
    ],
    ids=str,
)
async def test_what_does_not_decode_strictly_is_ignored(world: World, data: bytes) -> None:
    """It may be another platform's, or of a version that means something else by it."""
    first, core = world.start("r0")
    await asyncio.sleep(0.5)
    heard: list[bool] = []
    first.on_released = lambda: heard.append(True)
    said = len(core.published)
    first.on_here(data)
    await asyncio.sleep(0.3)
    assert (first.counting(), first.others(), heard, len(core.published)) == ({}, [], [], said)
    first.on_here(msgspec.json.encode(GOOD))
    await settle()
    assert (first.counting(), heard, len(core.published)) == ({"r1-abc": 3}, [True], said + 1)


async def test_who_cannot_publish_goes_on(world: World) -> None:
    made, core = world.presence("r0")

    async def refuse(*_: object) -> None:
        raise Temporary("bus_down")

    publish, core.publish = core.publish, refuse  # type: ignore[method-assign,assignment]
    world.running.append(asyncio.create_task(made.run(lambda: (0, True))))
    await asyncio.sleep(5)
    assert made.deaf_s == math.inf
    core.publish = publish  # type: ignore[method-assign]
    await asyncio.sleep(1.5)
    assert made.deaf_s < 1.0


async def test_names_are_tokens_and_like_no_other(world: World) -> None:
    names = [world.presence(name)[0].replica for name in ("r0", "r0", "a.b *>")]
    assert len({*names}) == 3
    assert not any(set(name) & set(". *>") for name in names)


async def test_a_replica_that_is_silent_for_long_is_forgotten(world: World) -> None:
    first, _ = world.start("r0")
    _, core = world.start("r1")
    await asyncio.sleep(2)
    core.is_cut = True
    await asyncio.sleep(KEPT_S - 5)
    assert len(first._heard) == 1
    await asyncio.sleep(10)
    assert first._heard == {}


# silence -------------------------------------------------------------------------------------------------


async def test_silence_is_time_in_which_the_own_words_were_heard(world: World) -> None:
    first, own = world.start("r0")
    second, theirs = world.start("r1")
    since = world.clock.monotonic()
    await asyncio.sleep(10.1)
    assert first.silent_s(second.replica, since) < 1.0
    theirs.is_cut = True
    await asyncio.sleep(3.0)
    assert first.silent_s(second.replica, since) == pytest.approx(3.1)
    own.is_cut = True
    await asyncio.sleep(DEAF_S)
    assert first.silent_s(second.replica, since) == 0.0, "it would hear nobody"
    await asyncio.sleep(10.0)
    assert first.silent_s(second.replica, since) == 0.0
    own.is_cut = False
    await asyncio.sleep(2.0)
    assert first.silent_s(second.replica, since) <= 2.0, "it counts anew"
    await asyncio.sleep(2.0)
    assert 3.0 <= first.silent_s(second.replica, since) <= 4.0


async def test_silence_counts_from_when_it_matters(world: World) -> None:
    first, _ = world.start("r0")
    await asyncio.sleep(20)
    since = world.clock.monotonic()
    await asyncio.sleep(1.5)
    assert first.silent_s("never-heard-of", since) == pytest.approx(1.5)


async def test_nobody_is_silent_to_itself(world: World) -> None:
    first, _ = world.start("r0")
    await asyncio.sleep(20)
    assert first.silent_s(first.replica, 0.0) == 0.0


async def test_a_lost_word_of_its_own_begins_the_count_anew(world: World) -> None:
    """Another's may have been lost with it."""
    first, own = world.start("r0")
    since = world.clock.monotonic()
    await asyncio.sleep(5.5)
    own.is_cut = True
    await asyncio.sleep(1.0)
    own.is_cut = False
    await asyncio.sleep(1.0)
    assert first.silent_s("gone", since) == pytest.approx(0.5)


async def test_a_replica_knows_how_long_it_has_not_heard_itself(world: World) -> None:
    first, own = world.start("r0")
    await settle()
    await asyncio.sleep(5.5)
    assert first.deaf_s == pytest.approx(0.5)
    own.is_cut = True
    await asyncio.sleep(3.0)
    assert first.deaf_s == pytest.approx(3.5)
    own.is_cut = False
    await asyncio.sleep(1.0)
    assert first.deaf_s <= 1.0


async def test_the_own_word_is_no_other_s(world: World) -> None:
    first, core = world.start("r0")
    await asyncio.sleep(3)
    words = [msgspec.json.decode(data, type=Here) for subject, data, _ in core.published if subject == HERE]
    assert {word.replica for word in words} == {first.replica}
    assert [word.is_first for word in words] == [True, *[False] * (len(words) - 1)]
    assert first.others() == []
