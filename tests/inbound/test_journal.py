"""What iLink hands over, as the journal has it: whole, sealed, and known again where an acknowledgement got lost."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.names import H_EXPECTED
from adapter.errors import STORE_FAILED, BusRefused, Conflict, Temporary
from adapter.inbound.journal import MESSAGE_BYTES, JournalRecord, parts_of
from adapter.ports import Message, PubAck
from adapter.security.seal import Sealer, cursor_context
from tests.fakes import Bench, batch, ready
from tests.inbound.downloads import NOTHING, heir_to, run
from tests.inbound.pollers import BOT, Poller, polls, raw, tended, texts

VIRTUAL_TIME = True


# records -------------------------------------------------------------------------------------------------


async def test_an_answer_is_stored_as_one_record_before_the_next_poll() -> None:
    bench = await ready(batch(raw("one", 1), raw("two", 2), cursor="b"), batch(raw("three", 3), cursor="c"))
    stored: list[tuple[int, list[str]]] = []

    async def look(message: Message) -> None:
        if message.stream in ("journal", "in"):
            stored.append((len(bench.chat.asked), [message.stream]))

    bench.bus.on_publish = look
    await polls(bench)
    assert [asked for asked, (stream,) in stored if stream == "journal"] == [0, 1, 2]
    assert bench.chat.asked == ["", "b", "c"]
    taken, one, two = await bench.written()
    assert (taken.record.messages, taken.owner) == ([], "me-1")
    assert one.record.messages == [raw("one", 1), raw("two", 2)]
    assert (two.record.cursor, two.record.sandbox, two.owner) == ("c", "s1", "me-1")
    assert texts(bench) == ["one", "two", "three"]


async def test_nothing_of_an_answer_is_told_before_its_record_is_stored() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    refused = 20

    async def away(message: Message) -> None:
        nonlocal refused
        if message.stream == "journal" and bench.chat.asked and refused:
            assert (texts(bench), list(bench.conversation_bucket.entries)) == ([], [])
            refused -= 1
            raise Temporary("bus_down") if refused % 2 else BusRefused(10054, "too large")

    bench.bus.on_publish = away
    await polls(bench)
    assert (refused, texts(bench), bench.chat.asked) == (0, ["hello"], ["", "b"])


async def test_each_record_expects_the_one_before() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    await polls(bench)
    expected = [int(stored.headers[H_EXPECTED]) for stored in bench.bus.found("JOURNAL")]
    assert expected == [0, *(stored.seq for stored in bench.bus.found("JOURNAL")[:-1])]
    with pytest.raises(Conflict):
        await bench.journal.append(BOT, JournalRecord(), "other-1", 0)


async def test_a_stream_without_room_is_waited_for() -> None:
    bench = await ready(batch(raw(), cursor="b"))
    refusals = [BusRefused(STORE_FAILED, "no space")] * 3
    bench.bus.refuse = lambda _: refusals.pop() if refusals and bench.chat.asked else None
    await polls(bench)
    assert texts(bench) == ["hello"]


@pytest.mark.parametrize("is_crashed", [False, True], ids=["the same owner", "a crash before the quiet"])
async def test_a_quiet_bots_messages_leave_the_journal_and_repeats_are_known_all_the_same(
    *, is_crashed: bool
) -> None:
    words = [batch(raw(f"word {n}", n), cursor=f"c{n}") for n in range(40)]
    quiet = [batch(cursor=None), None] * 4  # iLink ends a poll without messages, and one is lost
    bench = await ready(*words, *([] if is_crashed else quiet))
    session, task = tended(bench)
    await asyncio.sleep(30)
    assert sum(bool(written.record.messages) for written in await bench.written()) == 40
    if is_crashed:
        task.cancel()
        await asyncio.wait([task])
        bench = heir_to(bench)
        bench.chat.polls = deque([batch(raw("word 40", 40), cursor="c40"), *quiet])
        session, task = tended(bench)
    told = 41 if is_crashed else 40
    await asyncio.sleep(200)
    last = await bench.last_record()
    assert (last.messages, last.cursor, len(last.seen or ())) == ([], f"c{told - 1}", told)
    assert not any(written.record.messages for written in await bench.written())
    bench.bus.forget_ids()
    session.stop(immediately=True)
    await task
    bench = heir_to(bench)
    bench.chat.polls = deque([batch(raw("word 3", 3), raw("new", 50), cursor="z")])
    session, task = tended(bench)
    await asyncio.sleep(60)
    assert texts(bench) == [*(f"word {n}" for n in range(told)), "new"]
    session.stop(immediately=True)
    await task


async def test_no_record_is_overwritten_on_the_disk() -> None:
    """For each, the whole stream stands still for milliseconds."""
    quiet = [batch(cursor=None), None] * 4
    bench = await ready(batch(raw("word", 1), cursor="c1"), *quiet)
    poller, task = tended(bench)
    await asyncio.sleep(200)
    assert not any(written.record.messages for written in await bench.written())
    assert bench.bus.erased == []
    poller.stop(immediately=True)
    await task


async def test_a_repeat_that_comes_last_leaves_the_journal_too() -> None:
    quiet = [batch(cursor=None), None] * 4
    word = raw("word 1", 1)
    bench = await ready(batch(word, cursor="c1"), *quiet, batch(word, cursor="c2"), *quiet)
    poller, task = tended(bench)
    await asyncio.sleep(1200)
    assert not any(written.record.messages for written in await bench.written())
    poller.stop(immediately=True)
    await task


async def test_records_that_a_crash_kept_from_being_deleted_go_with_the_next_ones() -> None:
    quiet = [batch(cursor=None), None] * 8
    bench = await ready(*(batch(raw(f"word {n}", n), cursor=f"c{n}") for n in range(5)), *quiet)
    deletions = 0

    async def die_at_the_third() -> None:
        nonlocal deletions
        deletions += 1
        if deletions > 2:
            await asyncio.Event().wait()

    bench.bus.on_delete = die_at_the_third
    _, task = tended(bench)
    await asyncio.sleep(120)
    assert deletions == 3
    bench.bus.on_delete = None
    task.cancel()
    await asyncio.wait([task])
    heir = heir_to(bench)
    heir.chat.polls = deque([batch(raw("word 40", 40), cursor="c40"), *quiet])
    poller, task = tended(heir)
    await asyncio.sleep(300)
    assert not any(written.record.messages for written in await heir.written())
    poller.stop(immediately=True)
    await task


# sealing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "given"], ids=["polled", "bound"])
async def test_a_record_is_sealed_and_the_next_owner_opens_it_with_an_older_key(given: str | None) -> None:
    """A cursor holds the bot's token, and a message somebody's words."""
    sealer = Sealer((bytes(32),))
    start = sealer.seal(cursor_context(BOT), given) if given else None
    bench = await ready(batch(raw("secret"), cursor="b"), start_cursor=start)
    heir = heir_to(bench)
    heir = Bench(bench, incarnation="heir-1", token_key=(b"\1" * 32, bytes(32)))
    heir.leases.proven_dead.add("me-1")
    with capture_logs() as logs:
        await polls(bench)
        await polls(heir)
    assert bench.chat.asked == [given or "", "b", "b"]
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    stored = b"".join(stored.data for stored in bench.bus.found("JOURNAL"))
    assert b"secret" not in stored
    assert (b"given" in stored, b"me-1" in stored) == (False, True)


async def test_a_record_that_was_moved_to_another_bot_or_owner_is_not_taken_for_its_own() -> None:
    bench = await ready()
    await bench.journal.append(BOT, JournalRecord(cursor="mine"), "me-1", 0)
    (stored,) = bench.bus.found("JOURNAL")
    version, _, sealed = msgspec.msgpack.decode(stored.data)
    bench.bus.put(bench.names.journal("b2@im.bot"), stored.data, {})
    bench.bus.put(bench.names.journal("b3@im.bot"), msgspec.msgpack.encode((version, "other-1", sealed)), {})
    for bot, owner in (("b2@im.bot", "me-1"), ("b3@im.bot", "other-1")):
        assert [(one.owner, one.record) for one in await bench.written(bot)] == [(owner, JournalRecord())]


# records that cannot be read -----------------------------------------------------------------------------


async def test_a_bot_whose_last_record_is_of_a_later_version_is_left_alone(poller: Poller) -> None:
    bench = await ready()
    bench.bus.put(bench.names.journal(BOT), msgspec.msgpack.encode((2, "", b"what only they know")), {})
    with pytest.raises(Temporary, match="record_too_new"):
        await bench.journal.last(BOT)
    session = poller(bench)
    await asyncio.sleep(120)
    assert (bench.chat.asked, session.state, len(bench.bus.found("JOURNAL"))) == ([], "error", 1)


@pytest.mark.parametrize("value", [b"\xff\xfe", b"garbage", msgspec.msgpack.encode((1, "", b"\xc1"))])
@pytest.mark.parametrize("when", ["before it is taken", "while it is polled"])
async def test_what_nobody_can_read_in_a_journal_is_told_and_written_over(value: bytes, when: str) -> None:
    """By another hand. Nothing is lost but the cursor, and nothing is told twice."""
    bench = await ready(batch(raw("one", 1), cursor="b"))
    session, task = tended(bench)
    await asyncio.sleep(5)
    again = batch(raw("one", 1), raw("two", 2), cursor="c")
    with capture_logs() as logs:
        if when == "before it is taken":
            session.stop(immediately=True)
            await task
        bench.bus.put(bench.names.journal(BOT), value, {})
        bench.chat.polls += [again, batch(raw("three", 3), cursor="d")]
        session.cancel_poll()
        await asyncio.sleep(5)
        session, task = tended(bench)
        await asyncio.sleep(30)
    assert texts(bench) == ["one", "two", "three"]
    assert "journal.unreadable" in [entry["event"] for entry in logs]
    session.stop(immediately=True)
    await task


# lost acknowledgements -----------------------------------------------------------------------------------


def lose_answer(bench: Bench, times: int = 1) -> None:
    """The next records with messages are stored, and nobody hears of it: the lease has paused by then."""
    store, left = bench.bus.store, times

    def lossy(message: Message) -> PubAck:
        nonlocal left
        ack = store(message)
        if message.stream == "journal" and bench.chat.asked and left:
            left -= 1
            raise Temporary("no_answer")
        return ack

    bench.bus.store = lossy  # type: ignore[method-assign]


async def test_a_record_that_was_stored_without_an_answer_is_stored_and_told_once() -> None:
    """Whatever its seal, and also where nothing in a message tells it from the same words once more."""
    script = batch(raw("ok", **NOTHING), cursor=None), batch(raw("two", 2), cursor="c")
    bench = await ready(*script)
    lose_answer(bench, 2)
    await polls(bench)
    assert texts(bench) == ["ok", "two"]
    assert [one.record.messages for one in await bench.written()] == [[], [raw("ok", **NOTHING)], [raw("two", 2)]]
    assert bench.chat.asked == ["", "", "c"]


async def test_a_repeat_of_a_write_meets_the_first_one() -> None:
    """The publisher repeats what was not acknowledged, byte for byte."""
    bench = await ready()
    store, others = bench.bus.store, [1]

    def lossy(message: Message) -> PubAck:
        ack = store(message)
        if others:
            others.pop()
            bench.bus.put(bench.names.journal("b2@im.bot"), b"", {})
            raise Conflict(10071, "wrong last sequence")
        return ack

    bench.bus.store = lossy  # type: ignore[method-assign]
    assert await bench.journal.append(BOT, JournalRecord(cursor="b"), "me-1", 0) == 1
    assert len(await bench.written()) == 1


# sizes ---------------------------------------------------------------------------------------------------


async def test_a_large_answer_takes_several_records_and_its_cursor_is_in_the_last() -> None:
    words = [raw("one", 1), raw("two", 2), raw("three", 3), raw("four", 4)]
    bench = await ready(batch(*words, cursor="b"), batch(raw("five", 5), cursor="c"))
    await polls(bench, record_bytes=2 * MESSAGE_BYTES + len(words[0]) + len(words[1]))
    assert texts(bench) == ["one", "two", "three", "four", "five"]
    records = [one.record for one in await bench.written() if one.record.messages]
    assert [one.messages for one in records] == [words[:2], [words[2]], [words[3]], [raw("five", 5)]]
    assert [one.cursor for one in records] == ["", "", "b", "c"]
    assert [one.first for one in records] == [0, 2, 3, 0]


async def test_many_small_messages_take_several_records() -> None:
    """A record is read in one turn."""
    count = 3000
    bench = await ready(batch(*[raw("hi", number) for number in range(count)]))
    await polls(bench)
    sizes = [len(one.record.messages) for one in await bench.written() if one.record.messages]
    assert sum(sizes) == count
    assert max(sizes) < 1024


async def test_a_message_larger_than_a_record_is_told_whole_and_in_its_place() -> None:
    words = [raw("one", 1), raw("a" * 5000, 2), raw("three", 3)]
    bench = await ready(batch(*words, raw("b" * 3000, 4)), batch(raw("a" * 5000, 2), raw("five", 5), cursor="c"))
    await polls(bench, record_bytes=1000)
    assert texts(bench) == ["one", "a" * 5000, "three", "b" * 3000, "five"]
    assert all(sum(map(len, one.record.messages)) <= 1000 for one in await bench.written())


@pytest.mark.parametrize("records", range(1, 7))
async def test_a_message_in_several_records_is_told_whole_by_the_next_owner(records: int) -> None:
    """Whichever was the last that was stored; iLink gives the answer again if it was not the last."""
    answer = batch(raw("one", 1), raw("a" * 3000, 2), raw("three", 3))
    bench = await ready(answer)

    async def dies(message: Message) -> None:
        if bench.chat.asked and len(bench.bus.found("JOURNAL")) > records:
            await asyncio.Event().wait()

    bench.bus.on_publish = dies
    replica = run(bench, record_bytes=1000)
    await asyncio.sleep(5)
    await replica.die()
    bench.bus.on_publish = None
    heir = heir_to(bench)
    heir.chat.polls.append(answer)
    await polls(heir, record_bytes=1000)
    assert texts(bench) == ["one", "a" * 3000, "three"]


async def test_what_is_known_to_be_done_ends_with_no_beginning_of_a_message() -> None:
    """The next owner could not read the rest, nor know it again."""
    bench = await ready(batch(raw("a" * 3000, 1)), batch(raw("two", 2), cursor="c"))

    async def away(_: str) -> None:
        await asyncio.Event().wait()

    bench.conversation_bucket.on_write = away
    replica = run(bench, record_bytes=1000)
    await asyncio.sleep(5)
    await replica.die()
    bench.conversation_bucket.on_write = None
    heir = heir_to(bench)
    await polls(heir)
    assert (texts(bench), bench.bus.found("DEAD")) == (["a" * 3000, "two"], [])
    continued = {one.sequence for one in await bench.written() if one.record.is_continued}
    assert continued.isdisjoint(one.record.done_to for one in await bench.written())


async def test_what_another_replica_stores_late_may_come_between_two_parts_of_a_message() -> None:
    bench = await ready(batch(raw("two", 2), cursor="c"))
    large = raw("a" * 500, 1)
    halves = [JournalRecord(messages=[large[:300]], is_continued=True, place="p")]
    halves.append(JournalRecord(messages=[large[300:], raw("three", 3)], is_rest=True, place="p"))
    await bench.journal.append(BOT, halves[0], "", 0)
    session, task = tended(bench)
    await asyncio.sleep(5)
    assert texts(bench) == ["two"]
    await bench.journal.append(BOT, halves[1], "me-1", (await bench.written())[-1].sequence)
    bench.chat.polls.append(batch(raw("four", 4), cursor="d"))
    session.may_have_late_record = True
    session.cancel_poll()
    await asyncio.sleep(5)
    assert texts(bench) == ["two", "a" * 500, "three", "four"]
    session.stop(immediately=True)
    await task


@pytest.mark.parametrize("limit", [MESSAGE_BYTES + size for size in (36, 99, 100, 101, 936)])
def test_parts_of_an_answer_hold_all_of_it_and_are_no_larger_than_a_record(limit: int) -> None:
    messages = [b"a" * 10, b"b" * 100, b"c" * 350, b"d", b"e" * 99, b"f" * 101, b""]
    whole, piece = [], b""
    for part, goes_on in parts_of(messages, limit):
        assert sum(len(one) + MESSAGE_BYTES for one in part) <= limit
        part[0] = piece + part[0]
        piece = part.pop() if goes_on else b""
        whole += part
    assert (whole, piece) == (messages, b"")
