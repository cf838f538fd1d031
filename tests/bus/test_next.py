"""The next messages of a sandbox, on a real server: each until it is confirmed, in order, for one reader, and nobody
else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest

from adapter.contract.messages import NextPage, NextQuery
from adapter.contract.names import H_EXPECTED, position
from adapter.contract.records import ALL
from adapter.errors import Refused, Temporary
from adapter.jetstream.buckets import TTL, KvBucket
from adapter.jetstream.history import StreamHistory, direct_get
from adapter.ports import BusMessage, Heads, SandboxRequest, StoredMessage
from adapter.services.next import BOUNDS_S, Next, Readers
from adapter.tools.timing import SystemClock
from tests.bus.inbox import Inbox
from tests.bus.rig import NAMES, Rig
from tests.newer import made_newer

KEPT_S, PAGE_BYTES = 72 * 3600, 10_000


class Now(SystemClock):
    """The time, and what has passed beside it."""

    passed_s = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.passed_s * 1000

    def monotonic(self) -> float:
        return super().monotonic() + self.passed_s


class Counted(StreamHistory):
    """Counts its requests, and lets something happen behind one of them."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.connection)
        self.asked: list[str] = []
        self.behind: dict[str, Callable[[], Any]] = {}
        """By the name of a request: what happens once behind it."""

    async def _happen(self, name: str) -> None:
        self.asked.append(name)
        if (meanwhile := self.behind.pop(name, None)) is not None:
            await meanwhile()

    async def read_heads(self, stream: str, subject: str, *, start: int) -> Heads | None:
        found = await super().read_heads(stream, subject, start=start)
        await self._happen("heads")
        return found

    async def read(self, stream: str, subject: str, **where: Any) -> AsyncIterator[StoredMessage]:  # type: ignore[override]
        found = [stored async for stored in super().read(stream, subject, **where)]
        await self._happen("all" if "*" in subject else "read")
        for stored in found:
            yield stored

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        found = await super().read_last_of_each(stream, subjects)
        await self._happen("last")
        return found

    async def first_and_last(self, stream: str) -> tuple[int, int]:
        found = await super().first_and_last(stream)
        await self._happen("bounds")
        return found


class Place:
    """The service of a replica; `other` is that of another one."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.clock, self.history, self.inbox = rig, Now(), Counted(rig), Inbox(rig)
        self.bucket = KvBucket(rig.connection, NAMES.readers, ttl_s=2 * KEPT_S)
        self.readers = Readers(self.bucket, self.clock)
        self._service = Next(
            self.readers,
            self.history,
            NAMES,
            self.clock,
            rig.metrics,
            page_bytes=lambda: PAGE_BYTES,
            kept_ms=KEPT_S * 1000,
        )

    async def say(self, *texts: str, user: str = "u1", sandbox: str = "s1") -> list[str]:
        """Each in an entry of its own; their positions."""
        return [position(await self.inbox.say(text, user=user, sandbox=sandbox), 0) for text in texts]

    async def ask(self, sandbox: str = "s1", **query: Any) -> NextPage:
        asked = msgspec.json.encode(NextQuery(**query))
        answer = await self._service.answer(SandboxRequest(sandbox, {}, asked))
        return msgspec.json.decode(answer.data, type=NextPage)

    async def refused(self, **query: Any) -> str:
        with pytest.raises(Refused) as caught:
            await self.ask(**query)
        return caught.value.reason

    async def handled(self) -> str:
        record = await self.readers.load("s1")
        return position(record.handled, record.number)


def texts(page: NextPage) -> list[str]:
    return [msgspec.json.decode(handed.message)["text"] for handed in page.messages]


@pytest.fixture
async def place(rig: Rig) -> Place:
    return Place(rig)


async def test_messages_come_in_order_and_again_until_they_are_confirmed(place: Place) -> None:
    first, second, third = await place.say("one", "two", "three")
    await place.say("not yours", sandbox="s2")
    page = await place.ask()
    assert texts(page) == ["one", "two", "three"]
    assert [handed.position for handed in page.messages] == [first, second, third]
    reader = page.reader
    for _ in range(2):
        assert texts(await place.ask(reader=reader)) == ["one", "two", "three"]
    assert texts(await place.ask(reader=reader, after=first)) == ["two", "three"]
    assert texts(await Place(place.rig).ask(reader=reader)) == ["two", "three"], "another replica knows it"
    assert texts(await place.ask(reader=reader, after=third)) == []
    await place.say("four")
    assert texts(await place.ask(reader=reader, after=third)) == ["four"]


async def test_a_position_never_goes_back(place: Place) -> None:
    first, second = await place.say("one", "two")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=second)
    assert texts(await place.ask(reader=reader, after=first)) == []
    assert await place.handled() == second


async def test_a_new_reader_takes_the_place_of_the_one_before(place: Place) -> None:
    (first, second) = await place.say("one", "two")
    before = (await place.ask()).reader
    await place.ask(reader=before, after=first)
    after = (await Place(place.rig).ask()).reader
    assert after != before
    assert [await place.refused(reader=before), await place.refused(reader=before, after=second)] == ["replaced"] * 2
    assert await place.refused(reader=after + 1) == "replaced"
    assert await place.handled() == first, "what the former one confirms counts no more"
    assert texts(await place.ask(reader=after)) == ["two"]


async def test_of_many_that_begin_at_once_one_goes_on(place: Place) -> None:
    """The others are told at once, or at their next request."""
    (sequence,) = await place.say("one")
    begun = await asyncio.gather(*(Place(place.rig).ask() for _ in range(10)), return_exceptions=True)
    readers = [page.reader for page in begun if isinstance(page, NextPage)]
    assert len(set(readers)) == len(readers) >= 1
    assert {getattr(exc, "reason", "") for exc in begun if isinstance(exc, BaseException)} <= {"replaced"}
    newest = (await place.readers.load("s1")).reader
    assert newest == max(readers)
    for reader in readers:
        if reader != newest:
            assert await place.refused(reader=reader, after=sequence) == "replaced"
    assert texts(await place.ask(reader=newest, after=sequence)) == []


async def test_concurrent_confirmations_of_one_reader_all_count(place: Place) -> None:
    sequences = await place.say(*map(str, range(10)))
    reader = (await place.ask()).reader
    pages = await asyncio.gather(*(Place(place.rig).ask(reader=reader, after=after) for after in sequences))
    assert all(page.reader == reader for page in pages)
    assert await place.handled() == sequences[-1]


async def test_what_cannot_be_confirmed_is_refused_and_changes_nothing(place: Place) -> None:
    (sequence,) = await place.say("one")
    reader = (await place.ask()).reader
    assert await place.refused(after=sequence) == "invalid", "of which reader?"
    assert await place.refused(reader=reader, after=position(int(sequence.partition(".")[0]) + 1, 0)) == "invalid", (
        "too high"
    )
    assert await place.refused(reader=reader, after="one") == "invalid"
    assert (await place.handled(), (await place.readers.load("s1")).reader) == (position(0, ALL), reader)
    assert texts(await place.ask(reader=reader)) == ["one"]
    for sandbox in ("S1", "s1\n", "*", "", "s" * 65):
        with pytest.raises(Refused, match="sandbox's name"):
            await place.ask(sandbox)


async def test_pages_are_bounded_by_number_and_by_bytes(place: Place) -> None:
    await place.say(*map(str, range(30)))
    assert texts(await place.ask(max=3)) == ["0", "1", "2"]
    assert len(texts(await place.ask())) == 10
    await place.say("x" * 6000, "y" * 6000, "z" * 20_000, sandbox="s2")
    page = await place.ask("s2")
    assert [text[0] for text in texts(page)] == ["x"]
    page = await place.ask("s2", reader=page.reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["y"]
    page = await place.ask("s2", reader=page.reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["z"], "larger than a page"


async def test_an_answer_that_is_made_while_another_reader_begins_is_not_given(place: Place) -> None:
    await place.say("one")
    reader = (await place.ask()).reader
    place.history.behind["heads"] = Place(place.rig).ask
    assert await place.refused(reader=reader) == "replaced"


async def test_who_asks_in_vain_for_long_misses_nothing(place: Place) -> None:
    (sequence,) = await place.say("one")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=sequence)
    written = 0
    for _ in range(5):
        revision = (await place.bucket.get("s1") or pytest.fail("no record")).revision
        place.clock.passed_s += KEPT_S // 3
        await place.ask(reader=reader, after=sequence)
        written += (await place.bucket.get("s1") or pytest.fail("no record")).revision != revision
    assert 1 <= written <= 3, "the record is kept, and not written at each request"
    await place.say("much later")
    page = await place.ask(reader=reader)
    assert (page.first, texts(page)) == ("", ["much later"])


async def test_the_bucket_forgets_who_does_not_ask_and_who_asks_then_goes_on(place: Place) -> None:
    first, _ = await place.say("one", "two")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=first)
    stored = await place.rig.history.read_last(f"KV_{NAMES.readers}", f"$KV.{NAMES.readers}.s1")
    assert stored is not None
    assert stored.headers[TTL] == f"{2 * KEPT_S}s"
    brief = KvBucket(place.rig.connection, NAMES.readers, ttl_s=1)
    await brief.write("s1", stored.data, stored.seq)

    async def is_gone() -> None:
        while await place.bucket.get("s1") is not None:
            await asyncio.sleep(0.05)

    async with asyncio.timeout(30):
        await is_gone()
    assert texts(await place.ask(reader=reader, after=first)) == ["two"]
    assert await place.refused(reader=reader + 1) == "replaced"


async def test_a_record_that_cannot_be_read_is_overwritten(place: Place) -> None:
    """The adapter did not write it. It must keep nobody from reading."""
    first, _ = await place.say("one", "two")
    revision = await place.bucket.write("s1", b'{"v":1,"handled":"x"}', 0)
    page = await place.ask()
    assert texts(page) == ["one", "two"]
    assert page.reader > revision, "nobody who began before goes on"
    entry = await place.bucket.get("s1")
    assert entry is not None
    await place.bucket.write("s1", b"no record", entry.revision)
    page = await place.ask()
    await place.ask(reader=page.reader, after=first)
    assert await place.handled() == first


async def test_a_record_of_a_newer_version_is_left_alone(place: Place) -> None:
    await place.say("one")
    reader = (await place.ask()).reader
    entry = await place.bucket.get("s1")
    assert entry is not None
    assert entry.value is not None
    revision = await place.bucket.write("s1", made_newer(entry.value), entry.revision)
    for asking in (None, reader):
        with pytest.raises(Temporary) as caught:
            await place.ask(reader=asking)
        assert caught.value.reason == "record_too_new"
    newest = await place.bucket.get("s1")
    assert newest is not None
    assert newest.revision == revision


# persons and entries ---------------------------------------------------------------------------------


async def test_entries_of_several_persons_are_merged_by_sequence(place: Place) -> None:
    say = place.inbox.say
    await say("a1", "a2", user="a")
    await say("b1", user="b")
    await say("a3", user="a")
    await say("c1", "c2", user="c")
    await say("b2", user="b")
    await say("not yours", user="a", sandbox="s2")
    assert texts(await place.ask()) == ["a1", "a2", "b1", "a3", "c1", "c2", "b2"]
    handed: list[str] = []
    page = await place.ask(max=3)
    while page.messages:
        handed += texts(page)
        page = await place.ask(reader=page.reader, after=page.messages[-1].position, max=3)
    assert handed == ["a1", "a2", "b1", "a3", "c1", "c2", "b2"]


async def test_a_page_ends_within_an_entry_and_the_next_goes_on_there(place: Place) -> None:
    sequence = await place.inbox.say("0", "1", "2", "3")
    page = await place.ask(max=3)
    assert [(each.position, text) for each, text in zip(page.messages, texts(page), strict=True)] == [
        (position(sequence, number), str(number)) for number in range(3)
    ]
    reader = page.reader
    assert texts(await place.ask(reader=reader, after=page.messages[0].position)) == ["1", "2", "3"]
    await place.inbox.say("4", user="u2")
    page = await place.ask(reader=reader, after=page.messages[2].position)
    assert texts(page) == ["3", "4"]
    assert await place.handled() == position(sequence, 2)
    await place.inbox.say("x" * 6000, "y" * 6000, "z" * 20_000)
    page = await place.ask(reader=reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["x"], "bytes count by message"
    page = await place.ask(reader=reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["y"]
    page = await place.ask(reader=reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["z"], "larger than a page"


async def test_a_page_that_is_full_of_bytes_gives_nothing_behind_what_it_leaves_out(place: Place) -> None:
    await place.say("a" * 6000, user="a")
    await place.say("b" * 6000, user="b")
    await place.say("c", user="c")
    page = await place.ask()
    assert [text[0] for text in texts(page)] == ["a"]
    page = await place.ask(reader=page.reader, after=page.messages[-1].position)
    assert [text[0] for text in texts(page)] == ["b", "c"]


async def test_what_another_request_confirms_meanwhile_is_not_given_again(place: Place) -> None:
    first, second = await place.say("one", "two")
    reader = (await place.ask()).reader
    place.history.behind["heads"] = lambda: Place(place.rig).ask(reader=reader, after=first)
    page = await place.ask(reader=reader)
    assert [each.position for each in page.messages] == [second]


async def test_an_entry_without_messages_is_passed(place: Place) -> None:
    for _ in range(5):
        await place.inbox.say()
    await place.inbox.say("one")
    await place.inbox.say()
    page = await place.ask(max=1)
    assert (texts(page), page.first) == (["one"], "")
    page = await place.ask(reader=page.reader, after=page.messages[0].position)
    assert (texts(page), page.first) == ([], "")


async def test_what_is_stored_between_the_two_reads_waits_for_the_next_request(place: Place) -> None:
    """The person who is read last has a message that is newer than one that nobody has read."""
    await place.say("a1", "a2", user="a")
    await place.say("b1", "b2", user="b")

    async def more() -> None:
        await place.say("c1", user="c")  # its person was not there
        await place.say("a3", user="a")  # its person is not read yet
        await place.say("b3", user="b")

    place.history.behind["heads"] = more
    page = await place.ask()
    assert texts(page) == ["a1", "a2", "b1", "b2"]
    page = await place.ask(reader=page.reader, after=page.messages[-1].position)
    assert texts(page) == ["c1", "a3", "b3"]


async def test_a_person_whose_time_ends_between_the_reads_and_the_answer_is_in_none(place: Place) -> None:
    for at in ("heads", "read"):
        await place.say("of one who goes", "and more", user="a")
        await place.say("of one who stays", user="b")

        async def ends() -> None:
            await place.inbox.end(user="a", purge=False)  # which follows

        place.history.behind[at] = ends
        page = await place.ask()
        assert texts(page) == ["of one who stays"], at
        page = await place.ask(reader=page.reader, after=page.messages[-1].position)
        assert texts(page) == []


async def test_a_new_time_begins_behind_the_end_of_the_former_one(place: Place) -> None:
    """Also where both come while an answer is made, and before the purge."""
    await place.say("the stream's first", sandbox="s2")
    await place.say("former", "too", user="a")

    async def binds_anew() -> None:
        await place.inbox.end(user="a", purge=False)
        await place.say("of the new time", user="a")

    place.history.behind["read"] = binds_anew
    page = await place.ask()
    assert texts(page) == ["of the new time"]
    assert page.first == "", "nothing of theirs is gone"
    await place.say("unread", user="a")
    await place.inbox.end(user="a")
    await place.say("of a third", user="a")
    page = await place.ask(reader=page.reader, after=page.messages[-1].position)
    assert (texts(page), page.first) == (["of a third"], ""), "a purge takes what was theirs"


async def test_a_person_whose_time_has_ended_is_not_read(place: Place) -> None:
    await place.say("one", "two", user="a")
    await place.inbox.end(user="a", purge=False)
    page = await place.ask()
    assert (texts(page), page.first) == ([], "")
    assert place.history.asked == ["heads"]


async def test_an_end_of_everybody_leaves_nothing(place: Place) -> None:
    await place.say("one", "two", user="a")
    reader = (await place.ask()).reader
    place.history.behind["heads"] = lambda: place.inbox.end(user="a")
    page = await place.ask(reader=reader)
    assert (texts(page), page.first) == ([], "")


async def test_of_more_than_1024_persons_all_are_read(place: Place) -> None:
    await asyncio.gather(*(place.say(f"{number}", user=f"u{number}") for number in range(1100)))
    await place.inbox.end(user="u7", purge=False)
    handed: list[str] = []
    page = await place.ask(max=100)
    while page.messages:
        assert page.first == ""
        assert [each.position for each in page.messages] == sorted(each.position for each in page.messages)
        handed += texts(page)
        page = await place.ask(reader=page.reader, after=page.messages[-1].position, max=100)
    assert sorted(map(int, handed)) == [number for number in range(1100) if number != 7]
    assert "all" in place.history.asked
    assert "read" not in place.history.asked


async def test_of_more_than_1024_persons_nobody_is_read_whose_time_has_ended(place: Place) -> None:
    """A page of them alone holds up nobody, and what comes meanwhile counts, too."""
    for number in range(12):
        await place.say(f"{number}", user=f"u{number}")
    await asyncio.gather(*(place.say(f"{number}", user=f"u{number}") for number in range(12, 1100)))
    for number in range(10):
        await place.inbox.end(user=f"u{number}", purge=False)
    place.history.behind["all"] = lambda: place.inbox.end(user="u10", purge=False)
    page = await place.ask(max=5)
    assert texts(page)[0] == "11"
    before = int(page.messages[0].position.partition(".")[0]) - 1
    place.history.behind["last"] = lambda: place.inbox.end(user="u11", purge=False)
    page = await place.ask(reader=page.reader, after=position(before, ALL), max=2)
    assert "11" not in texts(page)
    while page.messages:
        last = page.messages[-1].position
        page = await place.ask(reader=page.reader, after=last, max=100)
    await place.say("and goes", user="u50")
    await place.inbox.end(user="u50", purge=False)
    assert texts(await place.ask(reader=page.reader, after=last)) == []


async def test_newest_entries_that_are_many_bytes_are_read_in_parts(place: Place) -> None:
    await asyncio.gather(*(place.say(f"{number} " + "x" * 300_000, user=f"u{number}") for number in range(20)))
    page, handed = await place.ask(), []
    while page.messages:
        handed += [text.partition(" ")[0] for text in texts(page)]
        page = await place.ask(reader=page.reader, after=page.messages[-1].position)
    assert sorted(map(int, handed)) == [*range(20)]


async def test_what_the_adapter_has_not_written_is_no_message(place: Place) -> None:
    subject = place.inbox.subject("a")
    for payload in (b"", b"no json", b'{"messages":"x"}', b'{"v":1,"since":1}'):
        await place.rig.publisher.store(BusMessage("in", subject, payload, {}))
    await place.rig.publisher.store(
        BusMessage("in", subject, b'{"since":1,"messages":[{"text":"1"}]}', {H_EXPECTED: ""})
    )
    await place.say("two", user="b")
    page = await place.ask()
    assert texts(page)[-1] == "two"


# what it costs ---------------------------------------------------------------------------------------


async def test_an_idle_request_asks_the_stream_once(place: Place) -> None:
    for number in range(10):
        await place.say("one", user=f"u{number}")
    page = await place.ask()
    reader, last = page.reader, page.messages[-1].position
    await place.ask(reader=reader, after=last)
    place.history.asked.clear()
    for _ in range(3):
        assert texts(await place.ask(reader=reader, after=last)) == []
    assert place.history.asked == ["heads"] * 3


async def test_one_new_entry_needs_no_read_of_its_own(place: Place) -> None:
    await place.say(*map(str, range(20)), sandbox="s2")
    page = await place.ask()
    for number in range(3):
        await place.say("one", user=f"u{number}")
        place.history.asked.clear()
        page = await place.ask(reader=page.reader)
        assert texts(page) == ["one"]
        asked = [name for name in place.history.asked if name != "bounds"]
        assert asked == ["heads", "heads"], "the second for an end that came meanwhile"
        page = await place.ask(reader=page.reader, after=page.messages[-1].position)


# what is gone ----------------------------------------------------------------------------------------


async def evict(place: Place, up_to: str) -> None:
    """As the stream does by bytes or age: its oldest messages, of whomever they are."""
    sequence = int(up_to.partition(".")[0])
    await place.rig.history.purge(NAMES.stream_in, ">", up_to=sequence)
    last = place.inbox.last
    last |= dict.fromkeys((subject for subject in last if last[subject] <= sequence), 0)


async def test_eviction_by_bytes_is_told_by_first(rig: Rig) -> None:
    """On a stream with a limit of bytes, by the server itself."""
    place = Place(rig)
    config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_in}"))["config"]
    await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_in}", config | {"max_bytes": 100_000})
    (read,) = await place.say("read")
    reader = (await place.ask()).reader
    assert (await place.ask(reader=reader, after=read)).first == ""
    await place.say(*(f"{number:03} {'x' * 4000}" for number in range(100)))
    page = await place.ask(reader=reader)
    assert texts(page)[0] > "050"
    assert page.first == page.messages[0].position
    assert (await place.ask(reader=reader)).first == page.first, "until it is confirmed"
    assert (await place.ask(reader=reader, after=page.messages[0].position)).first == ""


async def test_first_is_told_where_others_have_evicted_a_person_who_is_silent_since(place: Place) -> None:
    (read,) = await place.say("read", user="a")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=read)
    *_, gone = await place.say("gone", "gone too", user="a")
    (left,) = await place.say("left", user="b")
    await evict(place, gone)
    page = await place.ask(reader=reader)
    assert (texts(page), page.first) == (["left"], left)
    assert (await place.ask(reader=reader, after=left)).first == ""


async def test_first_is_told_where_the_cap_of_a_person_has_evicted_theirs(place: Place) -> None:
    """The position is not before the stream's beginning, and the other person lacks nothing."""
    (other,) = await place.say("other", user="b")
    positions = await place.say("1", "2", "3", "4", user="a")
    await place.rig.history.purge(NAMES.stream_in, place.inbox.subject("a"), keep=2)
    page = await place.ask()
    assert (texts(page), page.first) == (["other", "3", "4"], positions[2])
    assert (await place.ask(reader=page.reader, after=other)).first == positions[2]
    assert (await place.ask(reader=page.reader, after=positions[2])).first == ""


async def test_nothing_is_gone_for_who_has_never_read_and_for_who_has_read_all(place: Place) -> None:
    positions = await place.say(*map(str, range(10)), sandbox="s2")
    await evict(place, positions[-2])
    (first,) = await place.say("first ever")
    page = await place.ask()
    assert (texts(page), page.first) == (["first ever"], "")
    reader = page.reader
    await place.ask(reader=reader, after=first)
    await place.say(*map(str, range(30)), sandbox="s2")
    place.clock.passed_s += int(BOUNDS_S) + 1
    assert (await place.ask(reader=reader)).messages == [], "the position follows the stream"
    assert await place.handled() > position(int(first.partition(".")[0]), ALL)
    (evicted,) = await place.say("evicts", sandbox="s2")
    await evict(place, evicted)
    await place.say("next")
    page = await place.ask(reader=reader)
    assert (texts(page), page.first) == (["next"], "")


async def test_who_comes_back_after_all_was_evicted_is_told(place: Place) -> None:
    (read,) = await place.say("read")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=read)
    *_, gone = await place.say("unread", "unread too")
    await place.inbox.say(user="b")
    await evict(place, gone)
    place.clock.passed_s += KEPT_S
    page = await place.ask(reader=reader)
    assert (page.messages, page.first) == ([], "")
    (left,) = await place.say("left", user="b")
    assert (await place.ask(reader=reader)).first == left


async def test_a_reader_above_its_stream_waits_for_the_doctor(place: Place) -> None:
    await place.say("one")
    page = await place.ask()
    await place.readers.change("s1", lambda now: msgspec.structs.replace(now, handled=2**50))
    with pytest.raises(Temporary) as caught:
        await Place(place.rig).ask(reader=page.reader)
    assert caught.value.reason == "inbox_set_back"


# three servers ---------------------------------------------------------------------------------------


async def test_a_server_that_lags_gives_what_the_leader_has(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the first entry only, at its first answers."""
    place = Place(rig)
    positions = await place.say("one", "two", "three")
    known = int(positions[0].partition(".")[0])
    lagging = 0

    async def behind(
        connection: Any, stream: str, body: dict[str, Any]
    ) -> tuple[list[StoredMessage], dict[str, str]]:
        nonlocal lagging
        found, end = await direct_get(connection, stream, body)
        if stream != NAMES.stream_in or lagging == 0:
            return found, end
        lagging -= 1
        old = [stored for stored in found if stored.seq <= known]
        if not old and "multi_last" in body:
            old = [stored async for stored in rig.history.read(stream, place.inbox.subject("u1"), limit=1)]
        return old, end | {"Nats-UpTo-Sequence": str(known)}

    monkeypatch.setattr("adapter.jetstream.history.direct_get", behind)
    place.history._replicated = True
    reader = (await place.ask()).reader
    for lagging in (1, 2, 3):
        assert texts(await place.ask(reader=reader)) == ["one", "two", "three"], lagging
