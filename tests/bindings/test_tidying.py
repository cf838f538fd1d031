"""Behind a bot that is bound no more everything is cleared up in time, and nothing too early."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from adapter.bindings.tidying import RETRY_S, Tidying, tidy_forever, tidy_once
from adapter.errors import BusRefused, LeaseLost, Temporary
from adapter.inbound.cursors import apart_key
from adapter.names import token_of
from adapter.ports import Written
from tests.fakes import Bench, FakeBucket, FakeClock

VIRTUAL_TIME = True

HOUR = 3600.0
KEEP_S = 72 * HOUR
BOT, USER = "b1@im.bot", "u1@im.wechat"


class WatchedBucket:
    """Implements PurgeableBucket over a fake bucket, which it watches for the time of each write."""

    def __init__(self, bucket: FakeBucket, clock: FakeClock) -> None:
        self.bucket = bucket
        self.clock = clock
        self.times: dict[str, int] = {}
        self.asked = 0
        self.fails: list[Exception] = []
        bucket._followers.append(lambda entry: self.times.update({entry.key: clock.now_ms()}))

    async def keys(self) -> list[str]:
        if self.fails:
            raise self.fails.pop()
        return list(self.bucket.entries)

    async def written(self, key: str) -> Written | None:
        self.asked += 1
        entry = self.bucket.entries.get(key)
        return Written(entry.revision, self.times[key], entry.value is None) if entry else None

    async def purge(self, key: str, revision: int) -> None:
        entry = self.bucket.entries.get(key)
        if entry is not None and entry.revision <= revision:
            del self.bucket.entries[key]


class Room:
    """What is tidied."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.bindings, self.cursors, self.conversations = (
            WatchedBucket(bucket, self.bench.clock)
            for bucket in (self.bench.bindings_bucket, self.bench.cursors, self.bench.conversation_bucket)
        )
        self.lost = False

    def needs(self) -> Tidying:
        return Tidying(
            bindings=self.bench.bindings,
            bound=self.bindings,
            cursors=self.cursors,
            conversations=self.conversations,
            check=self.check,
            clock=self.bench.clock,
            keep_s=KEEP_S,
        )

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("lease_lost")

    async def bind(self, bot: str = BOT, user: str = USER) -> None:
        """A bot that is polled and spoken to."""
        await self.bench.bind(bot=bot, user=user)
        self.write(bot, user)

    def write(self, bot: str = BOT, user: str = USER) -> None:
        self.bench.cursors.put(token_of(bot), b"{}")
        self.bench.hears("s1", user)

    @property
    def keys(self) -> list[int]:
        """How many bindings (and marks of unbinding), cursors and records there are."""
        return [len(one.bucket.entries) for one in (self.bindings, self.cursors, self.conversations)]


async def test_of_an_unbound_bot_nothing_is_left_in_the_end() -> None:
    room = Room()
    await room.bind()
    await room.bind("kept@im.bot", "kept@im.wechat")
    await room.bench.bindings.remove(BOT)
    assert (await tidy_once(room.needs()), room.keys) == (0, [2, 2, 2])
    await asyncio.sleep(KEEP_S + 1)
    assert (await tidy_once(room.needs()), room.keys) == (3, [1, 1, 1])
    assert room.bench.bindings.get("kept@im.bot") is not None
    assert (await tidy_once(room.needs()), room.keys) == (0, [1, 1, 1])


async def test_what_a_bot_saw_goes_with_its_cursor() -> None:
    room = Room()
    await room.bind()
    room.bench.cursors.put(apart_key(BOT), b"[]")
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S + 1)
    assert (await tidy_once(room.needs()), room.keys) == (4, [0, 0, 0])


async def test_a_bot_that_was_silent_for_long_is_not_forgotten_as_soon_as_it_is_unbound() -> None:
    """Bound again in the next minute, it goes on where it was."""
    room = Room()
    await room.bind()
    await asyncio.sleep(10 * KEEP_S)
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S / 2)
    assert (await tidy_once(room.needs()), room.keys) == (1, [1, 1, 0])  # no window is open any more


async def test_a_bot_that_is_bound_is_never_forgotten() -> None:
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S / 2)
    await room.bench.bind()
    await asyncio.sleep(10 * KEEP_S)
    assert (await tidy_once(room.needs()), room.keys) == (0, [1, 1, 1])


async def test_what_was_written_after_the_unbinding_has_its_own_time() -> None:
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S - 1)
    room.write()  # a poller that ends late
    await asyncio.sleep(2)
    assert (await tidy_once(room.needs()), room.keys) == (1, [0, 1, 1])
    await asyncio.sleep(KEEP_S)
    assert (await tidy_once(room.needs()), room.keys) == (2, [0, 0, 0])


async def test_what_an_operator_purged_from_the_bindings_is_cleared_up_too() -> None:
    room = Room()
    room.write()
    await asyncio.sleep(KEEP_S + 1)
    assert (await tidy_once(room.needs()), room.keys) == (2, [0, 0, 0])


async def test_a_binding_that_this_replica_has_yet_to_hear_of_is_left_alone() -> None:
    room = Room()
    await room.bind()
    room.bench.bindings._by_bot.clear()
    await asyncio.sleep(KEEP_S + 1)
    assert (await tidy_once(room.needs()), room.keys) == (0, [1, 1, 1])


async def test_keys_that_the_adapter_never_made_are_left_alone() -> None:
    room = Room()
    for bucket in (room.bench.bindings_bucket, room.bench.cursors, room.bench.conversation_bucket):
        bucket.put("note=zz", b"an operator's")
    await asyncio.sleep(KEEP_S + 1)
    assert (await tidy_once(room.needs()), room.keys) == (0, [1, 1, 1])


async def test_what_is_written_while_it_is_looked_at_stays() -> None:
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S + 1)
    purge = room.cursors.purge

    async def late(key: str, revision: int) -> None:
        await room.bench.bind()
        room.write()
        await purge(key, revision)

    room.cursors.purge = late  # type: ignore[method-assign]
    await tidy_once(room.needs())
    assert room.keys == [1, 1, 1]
    assert room.bench.bindings.get(BOT) is not None


async def test_the_mark_of_the_unbinding_goes_last() -> None:
    """A crash in between leaves it, and with it the way to the rest."""
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S + 1)

    async def crash(key: str, revision: int) -> None:
        raise Temporary("bus_down")

    room.conversations.purge = crash  # type: ignore[method-assign]
    with pytest.raises(Temporary):
        await tidy_once(room.needs())
    assert room.keys == [1, 0, 1]


async def test_a_replica_that_is_not_sure_to_own_it_removes_nothing() -> None:
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    await asyncio.sleep(KEEP_S + 1)
    room.lost = True
    with pytest.raises(LeaseLost):
        await tidy_once(room.needs())
    assert room.keys == [1, 1, 1]


async def test_who_is_bound_costs_a_round_no_question() -> None:
    room = Room()
    for number in range(50):
        await room.bind(f"b{number}@im.bot", f"u{number}@im.wechat")
    await asyncio.sleep(10 * KEEP_S)
    assert await tidy_once(room.needs()) == 0
    assert [one.asked for one in (room.bindings, room.cursors, room.conversations)] == [0, 0, 0]


async def test_rounds_go_on_whatever_happens_to_the_bus() -> None:
    room = Room()
    await room.bind()
    await room.bench.bindings.remove(BOT)
    room.bindings.fails = [Temporary("bus_down"), BusRefused(10059, "stream not found"), LeaseLost("lease_lost")]
    with capture_logs() as logs:
        rounds = asyncio.get_running_loop().create_task(tidy_forever(room.needs()))
        await asyncio.sleep(3 * RETRY_S + 1)
        assert room.bindings.fails == []
        await asyncio.sleep(KEEP_S + 2 * HOUR)
        rounds.cancel()
    assert room.keys == [0, 0, 0]
    assert [line["event"] for line in logs if line["event"].startswith("tidying")] == ["tidying.waits"] * 3 + [
        "tidying.done"
    ]
