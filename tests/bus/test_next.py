"""The next messages of a sandbox, on a real server: each until it is confirmed, in order, for one reader, and nobody
else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from adapter.contract.messages import NextPage, NextQuery
from adapter.errors import Refused, Temporary
from adapter.jetstream.buckets import TTL, LeaderKvBucket
from adapter.kit.timing import SystemClock
from adapter.ports import BusMessage, SandboxRequest, StoredMessage
from adapter.services.next import Next, Readers
from tests.bus.rig import NAMES, Rig
from tests.newer import made_newer

KEPT, KEPT_S, PAGE_BYTES = 50, 72 * 3600, 10_000


class Now(SystemClock):
    """The time, and what has passed beside it."""

    passed_s = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.passed_s * 1000


class Held:
    """A history whose reads wait at their end, if they are told to: what they bring is old by then."""

    def __init__(self, rig: Rig) -> None:
        self._history = rig.history
        self.meanwhile: Callable[[], Any] | None = None
        self.last_sequences = 0

    async def read(self, stream: str, subject: str, **where: Any) -> AsyncIterator[StoredMessage]:
        found = [stored async for stored in self._history.read(stream, subject, **where)]
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        for stored in found:
            yield stored

    async def last_sequence(self, stream: str) -> int:
        self.last_sequences += 1
        return await self._history.last_sequence(stream)


class Place:
    """The service of a replica; `other` is that of another one."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.clock, self.history = rig, Now(), Held(rig)
        self.bucket = LeaderKvBucket(rig.connection, NAMES.readers, ttl_s=2 * KEPT_S)
        self.readers = Readers(self.bucket, self.clock)
        history: Any = self.history
        limits = {"page_bytes": lambda: PAGE_BYTES, "kept": KEPT, "kept_ms": KEPT_S * 1000}
        self._service = Next(self.readers, history, NAMES, self.clock, rig.metrics, **limits)  # type: ignore[arg-type]

    async def say(self, *texts: str, sandbox: str = "s1") -> list[int]:
        """Their sequences."""
        messages = [BusMessage("in", NAMES.inbox(sandbox), msgspec.json.encode({"text": text}), {}) for text in texts]
        acks = await self.rig.publisher.publish_all(messages)
        return [getattr(ack, "seq", 0) for ack in acks]

    async def ask(self, sandbox: str = "s1", **query: Any) -> NextPage:
        asked = msgspec.json.encode(NextQuery(**query))
        answer = await self._service.answer(SandboxRequest(sandbox, {}, asked))
        return msgspec.json.decode(answer.data, type=NextPage)

    async def refused(self, **query: Any) -> str:
        with pytest.raises(Refused) as caught:
            await self.ask(**query)
        return caught.value.reason

    async def handled(self) -> int:
        return (await self.readers.load("s1")).handled


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
    assert [handed.sequence for handed in page.messages] == [first, second, third]
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
    assert await place.refused(reader=reader, after=sequence + 1) == "invalid", "nothing has this sequence yet"
    assert (await place.handled(), (await place.readers.load("s1")).reader) == (0, reader)
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
    page = await place.ask("s2", reader=page.reader, after=page.messages[-1].sequence)
    assert [text[0] for text in texts(page)] == ["y"]
    page = await place.ask("s2", reader=page.reader, after=page.messages[-1].sequence)
    assert [text[0] for text in texts(page)] == ["z"], "larger than a page"


async def test_what_a_former_person_wrote_is_in_no_answer_that_is_made_meanwhile(place: Place) -> None:
    (before,) = await place.say("of the first one")
    reader = (await place.ask()).reader

    async def changes() -> None:
        await place.readers.skip("s1", before)
        await place.rig.history.purge(NAMES.stream_in, NAMES.inbox("s1"), up_to=before)

    place.history.meanwhile = changes
    assert texts(await place.ask(reader=reader)) == []
    (after,) = await place.say("of the second one")
    assert texts(await place.ask(reader=reader, after=before)) == ["of the second one"]
    assert await place.handled() == before < after


async def test_an_answer_that_is_made_while_another_reader_begins_is_not_given(place: Place) -> None:
    await place.say("one")
    reader = (await place.ask()).reader
    place.history.meanwhile = Place(place.rig).ask
    assert await place.refused(reader=reader) == "replaced"


async def test_a_position_is_moved_even_where_nobody_has_read(place: Place) -> None:
    """A server that lags behind the purge may still have what the former person wrote."""
    (sequence,) = await place.say("of the former person")
    await place.readers.skip("s1", sequence)
    page = await place.ask()
    assert (texts(page), page.first) == ([], 0)


async def test_first_names_the_oldest_message_left_when_unread_ones_are_gone(place: Place) -> None:
    sequences = await place.say(*map(str, range(KEPT - 1)))
    page = await place.ask()
    assert page.first == 0
    reader = page.reader
    sequences += await place.say("one more", "and one")  # the stream would evict the first
    await place.rig.history.delete(NAMES.stream_in, sequences[0])
    page = await place.ask(reader=reader)
    assert (page.first, texts(page)[0]) == (sequences[1], "1")
    page = await place.ask(reader=reader, after=sequences[1])
    assert page.first == 0
    sequences += await place.say("full", "again")

    async def changes() -> None:
        await place.readers.skip("s1", sequences[-1])

    place.history.meanwhile = changes
    page = await place.ask(reader=reader)
    assert (page.first, page.messages) == (0, []), "what is gone was another person's"


async def test_a_reader_away_for_longer_than_messages_are_kept_gets_first(place: Place) -> None:
    (sequence,) = await place.say("one")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=sequence)
    place.clock.passed_s = KEPT_S + 60
    (left,) = await place.say("much later")
    page = await place.ask()
    assert (page.first, texts(page)) == (left, ["much later"])
    assert (await place.ask(reader=page.reader)).first == 0


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
    assert (page.first, texts(page)) == (0, ["much later"])


async def test_the_bucket_forgets_who_does_not_ask_and_who_asks_then_goes_on(place: Place) -> None:
    first, _ = await place.say("one", "two")
    reader = (await place.ask()).reader
    await place.ask(reader=reader, after=first)
    stored = await place.rig.history.read_last(f"KV_{NAMES.readers}", f"$KV.{NAMES.readers}.s1")
    assert stored is not None
    assert stored.headers[TTL] == f"{2 * KEPT_S}s"
    brief = LeaderKvBucket(place.rig.connection, NAMES.readers, ttl_s=1)
    await brief.write("s1", stored.data, stored.seq)

    async def is_gone() -> None:
        while await place.bucket.get("s1") is not None:
            await asyncio.sleep(0.05)

    async with asyncio.timeout(30):
        await is_gone()
    assert texts(await place.ask(reader=reader, after=first)) == ["two"]
    assert await place.refused(reader=reader + 1) == "replaced"


async def test_a_record_that_cannot_be_read_is_overwritten(place: Place) -> None:
    """The adapter did not write it. It must keep nobody from reading, and no bot from being unbound."""
    first, _ = await place.say("one", "two")
    revision = await place.bucket.write("s1", b'{"v":1,"handled":"x"}', 0)
    page = await place.ask()
    assert texts(page) == ["one", "two"]
    assert page.reader > revision, "nobody who began before goes on"
    entry = await place.bucket.get("s1")
    assert entry is not None
    await place.bucket.write("s1", b"no record", entry.revision)
    await place.readers.skip("s1", first)
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
