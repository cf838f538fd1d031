"""Whose a bot is, and what its record knows to have been seen: across crashes, purges and other owners."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from adapter.errors import BusRefused, LeaseLost, Refused, Temporary
from adapter.inbound.batches import store
from adapter.inbound.cursors import NEWEST, acquire, apart_key, give_back, put_back, raw_bots, write_cursor
from adapter.inbound.poller import poll_forever, tend
from adapter.inbound.sessions import Session
from adapter.names import conversation_key, token_of
from adapter.ports import Entry, Message
from adapter.records import Cursor
from adapter.seal import Sealer, cursor_context
from tests.fakes import Bench, EndOfScript, Failing, FakeBus, FakeLeases, batch, ready, settle
from tests.inbound.pollers import BOT, KEY, USER, Poller, polls, raw, tended, texts

VIRTUAL_TIME = True


NOTHING: dict[str, Any] = {"message_id": None, "client_id": None, "seq": None, "create_time_ms": None}


@pytest.mark.parametrize(
    ("first", "again"),
    [({}, {"message_id": 99, "client_id": "wx-99", "seq": 99}), (NOTHING, NOTHING)],
    ids=["other ids", "no ids and no time"],
)
async def test_a_replay_after_a_crash_before_the_cursor_is_told_once(
    first: dict[str, Any], again: dict[str, Any]
) -> None:
    """F18, and F16 at its worst: stored, not remembered, and repeated with other ids to the next owner."""
    bench = await ready(batch(raw("ok", **first)))

    async def dies(key: str) -> None:
        if bench.bus.found("IN"):
            raise EndOfScript

    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.on_write = dies
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    assert bench.cursor().cursor == ""
    bench.cursors.on_write = None

    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    bench.bus.forget_ids()
    bench.chat.polls.append(batch(raw("ok", **again)))
    await polls(heir)
    assert texts(bench) == ["ok"]
    assert bench.cursor().owner == "heir-1"


async def test_a_replay_after_a_crash_gives_no_sends_back() -> None:
    bench = await ready(batch(raw("ok")))
    await polls(bench)
    record = bench.record()
    bench.conversation_bucket.put(
        conversation_key("s1", USER),
        msgspec.json.encode(replace(record, window=replace(record.window, sends_used=7))),
    )
    bench.cursors.put(KEY, msgspec.json.encode(Cursor()))

    heir = Bench(bench, incarnation="heir-1")
    bench.chat.polls.append(batch(raw("ok")))
    await polls(heir)
    assert heir.record().window.sends_used == 7


async def test_a_new_owner_waits_until_the_old_one_has_stopped(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(30)
    assert bench.chat.asked == []
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="c")))
    session.freed.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["c"]


async def test_a_new_owner_that_is_not_told_finds_out(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    poller(bench)
    await asyncio.sleep(30)
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="c")))
    await asyncio.sleep(7)
    assert bench.chat.asked == ["c"]


async def test_who_wrote_to_the_owner_before_may_be_answered_by_the_new_one(poller: Poller) -> None:
    """The conversation here read the record before the other replica stored the last words that it waited for."""
    bench = await ready()
    actor = await bench.processor().conversation(bench.bindings.of_sandbox("s1")[0], USER)
    bench.hears(token="t", id="in:2")
    poller(bench)
    await asyncio.sleep(1)
    assert (actor.state.record.token, actor.state.record.window.id) == ("t", "in:2")


async def test_a_new_owner_takes_over_from_one_that_is_proven_dead(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(5)
    bench.leases.proven_dead.add("other-1")
    session.freed.set()
    await asyncio.sleep(1)
    assert bench.chat.asked == ["b"]
    assert bench.cursor().owner == "me-1"


async def test_a_bot_that_is_bound_anew_while_another_has_it_is_not_asked_for_without_a_pause(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    session = poller(bench)
    await asyncio.sleep(5)
    asked = bench.leases.asked_dead
    session.cut_off()
    await asyncio.sleep(60)
    assert 5 < bench.leases.asked_dead - asked < 60


async def test_a_new_owner_takes_a_bot_whose_record_names_one_that_has_no_poller_of_it(poller: Poller) -> None:
    """As after a bucket was restored: it lives, and would never give back what it does not have."""
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    poller(bench)
    await asyncio.sleep(60)
    assert bench.chat.asked == []
    bench.idle.add(("other-1", BOT))
    await asyncio.sleep(60)
    assert bench.chat.asked == ["b"]
    assert bench.cursor().owner == "me-1"


async def test_an_owner_that_begins_to_poll_as_it_is_asked_keeps_its_bot(poller: Poller) -> None:
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))

    async def is_idle(owner: str, bot: str) -> bool:
        bench.cursors.put(token_of(bot), msgspec.json.encode(Cursor(cursor="b", owner=owner)))
        return True

    poller(bench, is_idle=is_idle)
    await asyncio.sleep(120)
    assert bench.chat.asked == []
    assert bench.cursor().owner == "other-1"


async def test_a_record_that_was_set_back_names_its_owner_again_with_the_next_poll() -> None:
    """Else whom the shard is handed to takes the bot from one that is dead, while this one's last poll waits."""
    bench = await ready(None)
    _, task = tended(bench)
    await asyncio.sleep(1)
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="old", owner="dead-1")))
    bench.leases.proven_dead.add("dead-1")
    bench.purges += 1
    await task  # the supervisor begins another one, as long as the shard is its own
    session, task = tended(bench)
    await asyncio.sleep(1)
    assert (bench.cursor().owner, bench.chat.asked) == ("me-1", ["", "old"])
    session.leave(now=True)
    await task


async def test_who_waits_for_an_owner_holds_up_no_other_bot() -> None:
    """Starts are bounded; one that waits for a replica elsewhere must not use up the bound."""
    bench = await ready()
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(owner="other-1")))
    await bench.bind(sandbox="s2", bot="b2@im.bot", user="u2@im.wechat")
    needs = bench.incoming(taking=asyncio.Semaphore(1))
    sessions = [Session(BOT), Session("b2@im.bot")]
    tasks = [asyncio.get_running_loop().create_task(tend(session, needs)) for session in sessions]
    await asyncio.sleep(5)
    assert len(bench.chat.asked) == 1
    for session in sessions:
        session.leave(now=True)
    await asyncio.gather(*tasks)


async def test_a_poller_that_waits_for_the_lease_hardly_looks_at_it_and_leaves_at_once() -> None:
    """Thousands that look each second take an eighth of a core, where there may be no more than that."""
    bench, looks = await ready(), 0

    class Counted(FakeLeases):
        @property
        def valid(self) -> bool:
            nonlocal looks
            looks += 1
            return self.is_valid

    bench.leases = Counted()
    session = Session(BOT)
    task = asyncio.create_task(tend(session, bench.incoming()))
    await asyncio.sleep(1)
    bench.leases.is_valid = False
    session.cut_off()
    await asyncio.sleep(1)
    assert session.state == "paused"
    looks = 0
    await asyncio.sleep(60)
    assert looks < 15
    session.leave(now=False)
    before = bench.clock.monotonic()
    await asyncio.wait([task])
    assert bench.clock.monotonic() - before < 0.1


async def test_a_cursor_that_another_replica_took_ends_the_poller() -> None:
    """A zombie's batch may be on the bus (the stream drops repeats), but never its cursor."""
    bench = await ready(batch(raw(), cursor="zombie"))
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.put(KEY, msgspec.json.encode(Cursor(cursor="b", owner="other-1")))
    with pytest.raises(LeaseLost):
        await poll_forever(session, place, needs)
    assert bench.cursor() == Cursor(cursor="b", owner="other-1")


MANY = 3 * NEWEST + 5


EVERYTHING = [batch(raw(f"word {number}", number), cursor=f"c{number}") for number in range(MANY)]
"""More than a cursor's record holds."""


async def again(bench: Bench) -> list[str]:
    """Another replica takes the bot, and iLink says everything again, with what the server's window forgot."""
    bench.bus.forget_ids()
    bench.cursors.entries[KEY] = without_owner(bench.cursors.entries[KEY])
    bench.chat.polls.extend([batch(*(message for one in EVERYTHING for message in one.messages), cursor="z")])
    await polls(bench)
    return texts(bench)


def without_owner(entry: Entry) -> Entry:
    assert entry.value is not None
    record = msgspec.json.decode(entry.value, type=Cursor)
    return entry._replace(value=msgspec.json.encode(replace(record, owner="")))


async def test_a_message_costs_a_short_record_and_its_successor_remembers_them_all() -> None:
    bench = await ready(*EVERYTHING)
    sizes: list[int] = []

    async def measure(key: str) -> None:
        if key == KEY and KEY in bench.cursors.entries:
            sizes.append(len(bench.cursors.entries[KEY].value or b""))

    bench.cursors.on_write = measure
    await polls(bench)
    assert max(sizes) < 100 * NEWEST
    assert bench.bus.writes.count("cursor") == MANY + MANY // (NEWEST + 1)
    assert len(bench.cursor().seen) <= NEWEST
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


async def test_a_crash_between_what_stands_apart_and_the_cursor_forgets_nothing() -> None:
    bench = await ready(*EVERYTHING)

    async def dies(key: str) -> None:
        if key == KEY and len(texts(bench)) == NEWEST + 1:
            raise RuntimeError("killed")

    bench.cursors.on_write = dies
    with pytest.raises(RuntimeError):
        await polls(bench)
    bench.cursors.on_write = None
    assert (bench.cursor().apart, len(bench.cursors.entries)) == (0, 2)
    bench.chat.polls.clear()
    assert await again(bench) == [
        *(f"word {number}" for number in range(NEWEST + 1)),
        *(f"word {number}" for number in range(NEWEST + 1, MANY)),
    ]


@pytest.mark.parametrize("loss", ["purged", "written by another hand", "answer lost"])
async def test_what_stands_apart_may_vanish_or_change_and_nothing_is_forgotten(loss: str) -> None:
    bench = await ready(*EVERYTHING)

    async def look(message: Message) -> None:
        if len(texts(bench)) == 2 * NEWEST:  # shortly before the next write apart
            bench.bus.on_publish = None
            match loss:
                case "purged":
                    del bench.cursors.entries[apart_key(BOT)]
                case "written by another hand":
                    bench.cursors.put(apart_key(BOT), b"[]")
                case _:
                    bench.cursors.on_write = lose

    async def lose(key: str) -> None:
        bench.cursors.answers_lost = int(key == apart_key(BOT))

    bench.bus.on_publish = look
    await polls(bench)
    bench.cursors.on_write = None
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


@pytest.mark.parametrize("value", [b"\xff\xfe", b"garbage", b"[" * 5000], ids=["no text", "no JSON", "too deep"])
@pytest.mark.parametrize("when", ["before", "while it polls", "with an answer in hand"])
@pytest.mark.parametrize("what", ["cursor", "seen apart", "conversation"])
async def test_what_nobody_can_read_in_a_bot_s_records_is_written_over(what: str, when: str, value: bytes) -> None:
    """By another hand. It held the bot up for ever, and what had just come for it was dropped."""
    bench = await ready(*EVERYTHING)
    await give_back(await polls(bench), bench.incoming())
    bucket, key = {
        "cursor": (bench.cursors, KEY),
        "seen apart": (bench.cursors, apart_key(BOT)),
        "conversation": (bench.conversation_bucket, conversation_key("s1", USER)),
    }[what]

    async def spoil(message: Message) -> None:
        bench.bus.on_publish = None
        bucket.put(key, value)

    async def serve() -> None:
        """As the supervisor does."""
        while True:
            await tend(Session(BOT), bench.incoming())
            await asyncio.sleep(0.2)

    bench.chat.script_ends = False
    news = [batch(raw(f"word {number}", number), cursor=f"c{number}") for number in (MANY, MANY + 1)]
    bench.chat.polls.extend([None, news[0], None, news[1], None, *news])
    with capture_logs() as logs:
        if when == "before":
            bucket.put(key, value)
        task = asyncio.get_running_loop().create_task(serve())
        await asyncio.sleep(2)
        if when == "while it polls":
            bucket.put(key, value)
        if when == "with an answer in hand":
            bench.bus.on_publish = spoil
        await asyncio.sleep(300)
        task.cancel()
    assert texts(bench) == [f"word {number}" for number in range(MANY + 2)]
    assert [line["event"] for line in logs if "crashed" in line["event"]] == []
    assert what == "seen apart" or bucket.entries[key].value != value
    if when == "before" or what == "cursor":
        assert {line["event"] for line in logs} & {"cursor.unreadable", "conversation.unreadable"}


async def test_after_a_purge_everything_seen_is_in_the_record() -> None:
    bench = await ready(*EVERYTHING)
    session = Session(BOT)
    needs = bench.incoming()
    bench.chat.script_ends = True
    place = await acquire(session, needs)
    assert place is not None
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    assert session.apart
    place = await acquire(session, needs)
    assert place is not None
    bench.cursors.entries.clear()
    place = await put_back(session, place, needs)
    assert not session.apart
    assert len(bench.cursor().seen) == MANY
    assert await again(bench) == [f"word {number}" for number in range(MANY)]


async def test_who_was_stopped_before_it_wrote_what_it_had_seen_apart_does_not_write_it() -> None:
    bench = await ready(*EVERYTHING[:NEWEST])
    session = Session(BOT)
    needs = bench.incoming()
    place = await acquire(session, needs)
    assert place is not None
    bench.chat.script_ends = True
    for one in EVERYTHING[:NEWEST]:
        place = await store(session, one, place, needs)

    def lose(_: Message) -> None:  # as the last message is stored
        bench.leases.incarnation = "me-2"

    bench.bus.refuse = lose
    with pytest.raises(LeaseLost):
        await store(session, EVERYTHING[NEWEST], place, needs)
    assert list(bench.cursors.entries) == [KEY]


async def test_a_cursor_is_given_back_also_where_the_bus_refuses_it_at_first() -> None:
    """This replica lives on, so that nobody else could ever take the bot."""
    bench = await ready()
    session, task = tended(bench)
    await settle()
    bench.cursors.on_write = refuses = Failing(3, BusRefused(10054, "too large"))
    session.leave(now=True)
    await task
    assert refuses.left == 0
    assert bench.cursor().owner == ""


@pytest.mark.parametrize("given", [None, "given"], ids=["polled", "bound"])
async def test_a_cursor_is_sealed_where_it_is_stored_since_the_token_stands_in_it(given: str | None) -> None:
    sealer = Sealer((bytes(32),))
    start = sealer.seal(cursor_context(BOT), given) if given else None
    bench = await ready(batch(cursor="b"), start_cursor=start)
    bench.sealer = sealer
    with capture_logs() as logs:
        await polls(bench)
        heir = Bench(bench, incarnation="heir-1")
        heir.sealer = Sealer((b"\1" * 32, bytes(32)))
        heir.leases.proven_dead.add("me-1")
        before = bench.cursor().cursor
        await polls(heir)
    assert bench.chat.asked == [given or "", "b", "b"]
    assert sealer.how(before) == "sealed"
    assert sealer.open(cursor_context(BOT), before) == "b"
    assert heir.sealer.how(bench.cursor().cursor) == "sealed", "it follows the first key"
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_a_cursor_of_which_the_key_is_gone_is_told_and_begun_anew() -> None:
    bench = await ready(batch(raw("one", 1), cursor="b"))
    bench.sealer = Sealer((bytes(32),))
    await polls(bench)
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    heir.sealer = Sealer((b"\1" * 32,))
    bench.chat.polls.append(batch(raw("one", 1), cursor="b"))
    with capture_logs() as logs:
        await polls(heir)
    assert bench.chat.asked == ["", "b", "", "b"]
    assert texts(bench) == ["one"], "what was seen is still known"
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


async def test_who_cannot_open_the_token_leaves_the_cursor_as_it_is() -> None:
    bench = await ready()
    bench.sealer = Sealer((bytes(32),))
    await bench.bind(token=bench.sealer.seal(BOT, "secret"))
    await polls(bench)
    before = bench.cursor()
    stranger = Bench(bench, incarnation="other-1")
    stranger.leases.proven_dead.add("me-1")
    stranger.sealer = Sealer((b"\1" * 32,))
    with pytest.raises(Refused):
        await acquire(Session(BOT), stranger.incoming())
    assert bench.cursor() == before


async def test_a_cursor_that_was_written_without_a_word_is_known_again_whatever_its_seal() -> None:
    """The answer was lost: the repeat meets the first, which is sealed in another way, and is no other replica's."""
    bench = await ready()
    bench.sealer = Sealer((bytes(32),))
    needs = bench.incoming()
    place = await acquire(Session(BOT), needs)
    assert place is not None
    record = msgspec.structs.replace(place.record, cursor="b")
    first = await write_cursor(BOT, record, place.revision, needs)
    assert await write_cursor(BOT, record, place.revision, needs) == first
    with pytest.raises(LeaseLost):
        await write_cursor(BOT, msgspec.structs.replace(record, cursor="c"), place.revision, needs)


async def test_a_start_cursor_is_used_once() -> None:
    bench = await ready(batch(cursor="b"), start_cursor="given")
    await polls(bench)
    assert bench.chat.asked == ["given", "b"]
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    await polls(heir)
    assert bench.chat.asked == ["given", "b", "b"]


async def test_a_start_cursor_counts_once_however_often_it_is_sealed() -> None:
    """A bot that is bound anew with it, perhaps to another sandbox, told everything since to that one."""
    sealer = Sealer((bytes(32),))
    bench = await ready(batch(cursor="b"), start_cursor=sealer.seal(cursor_context(BOT), "given"))
    bench.sealer = sealer
    await polls(bench)
    await bench.bindings.remove(BOT)
    await bench.bind("s2", start_cursor=sealer.seal(cursor_context(BOT), "given"))
    await polls(bench)
    assert bench.chat.asked == ["given", "b", "b"]
    await bench.bind("s2", start_cursor=sealer.seal(cursor_context(BOT), "another"))
    await polls(bench)
    assert bench.chat.asked[3:] == ["another"]


async def test_a_start_cursor_of_which_the_key_is_gone_leaves_the_bot_where_it_is() -> None:
    bench = await ready(batch(cursor="b"))
    await polls(bench)
    await bench.bind(start_cursor=Sealer((b"\1" * 32,)).seal(cursor_context(BOT), "given"))
    with capture_logs() as logs:
        await polls(bench)
    assert bench.chat.asked == ["", "b", "b"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["cursor.unopenable"]


async def test_a_start_cursor_that_is_bound_while_the_bot_is_polled_is_used_once_and_at_once() -> None:
    bench = await ready(batch(raw("one"), cursor="b"))
    session, task = tended(bench)
    await asyncio.sleep(5)
    await bench.bind(start_cursor="given")
    bench.chat.polls.append(batch(raw("two", 2), cursor="c"))
    session.cut_off()
    await asyncio.sleep(5)
    session.leave(now=True)
    await task
    assert bench.chat.asked == ["", "b", "given", "c"]
    heir, task = tended(bench)
    await asyncio.sleep(5)
    heir.leave(now=True)
    await task
    assert bench.chat.asked[4:] == ["c"]


class Lossy(FakeBus):
    """What is asked of it gets lost."""

    asked = 0

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_question_that_gets_lost_holds_up_those_who_share_it_for_a_moment_only() -> None:
    bench = Bench()
    bus = Lossy(bench.names, bench.clock)
    shared = raw_bots(bus, bench.names)
    answers = await asyncio.gather(*(shared.answer() for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Temporary] * 3
    assert bus.asked == 1
