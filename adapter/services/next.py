"""wechat.svc.next.<sandbox>: hands a sandbox its messages until it has handled them.

How far each sandbox has, and who reads it, is in the bucket `readers`. One request finds the persons with entries
behind the sandbox's position. Only they are read, and merged by sequence. What the stream stores meanwhile is left to
the next request: nothing is given that has something unknown before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import NamedTuple, cast

import msgspec
import structlog
from msgspec import structs

from adapter.bridge.entries import clear_of
from adapter.contract.messages import Handed, NextPage, NextQuery
from adapter.contract.names import H_EXPECTED, MAX_SEQ, Names, check_sandbox, position, read_position
from adapter.contract.records import ALL, ReaderRecord
from adapter.errors import UNDECODABLE, Conflict, Refused, Temporary
from adapter.ports import History, LeaderBucket, SandboxRequest, SandboxResponse, StoredMessage
from adapter.tools.decoding import decode_record, read_request
from adapter.tools.metrics import Metrics
from adapter.tools.timing import Clock

log = structlog.get_logger()

BOUNDS_S = 60.0
"""Seconds for which the first and last sequence of the stream are taken for known."""
HEADS_BYTES = 4 * 1024 * 1024
"""Most bytes of newest entries that a request keeps in memory. Others are read again."""
REPLACED = "Another agent reads this sandbox now. Start only one, or ask without `reader` to take its place."
SET_BACK = "The sandbox has handled more than is stored, as after a restore: run `wechat-nats doctor --fix`."


class Readers:
    """The records of the bucket, whose `reader` is filled in: 0 only where there is no record. All methods raise
    Temporary."""

    def __init__(self, bucket: LeaderBucket, clock: Clock) -> None:
        self._bucket = bucket
        self._clock = clock

    async def load(self, sandbox: str) -> ReaderRecord:
        return (await self._load(sandbox))[0]

    async def change(self, sandbox: str, change: Callable[[ReaderRecord], ReaderRecord | None]) -> ReaderRecord:
        """The record after `change`, which is called again after a write of somebody else. None: it is not
        written."""
        while True:
            before, revision = await self._load(sandbox)
            if (changed := change(before)) is None:
                return before
            after = structs.replace(changed, written_ms=self._clock.now_ms())
            try:
                written = await self._bucket.write(sandbox, msgspec.json.encode(after), revision)
            except Conflict:
                continue
            return _numbered(after, written)

    async def _load(self, sandbox: str) -> tuple[ReaderRecord, int]:
        entry = await self._bucket.get(sandbox)
        if entry is None or entry.value is None:
            return ReaderRecord(), entry.revision if entry else 0
        try:
            record = decode_record(entry.value, ReaderRecord, sandbox=sandbox)
        except UNDECODABLE as exc:  # not written by the adapter: it is overwritten
            log.error("reader.unreadable", sandbox=sandbox, detail=type(exc).__name__)
            record = ReaderRecord()
        return _numbered(record, entry.revision), entry.revision


def _numbered(record: ReaderRecord, revision: int) -> ReaderRecord:
    return record if record.reader else structs.replace(record, reader=revision)


class _Found(NamedTuple):
    """A message, and whose it is."""

    place: tuple[int, int]
    message: msgspec.Raw
    subject: str
    since: int
    has_gap: bool
    """Entries of the person right before it are gone."""


class _Head(NamedTuple):
    """The newest entry of a person."""

    subject: str
    sequence: int
    before: int
    """Sequence of the subject's entry before it, when it was stored."""
    since: int
    """0: it cannot be read."""
    ended: bool
    stored: StoredMessage | None
    """None: there are too many to have them all."""


class _Page:
    """The messages of an answer, oldest first, and what is known of the entries that they are in."""

    def __init__(self, after: tuple[int, int], most: int, most_bytes: int, up_to: int) -> None:
        """`up_to`: sequence above which nothing is given. It falls once the page is full."""
        self.found: list[_Found] = []
        self.up_to = up_to
        self._after = after
        self._most = most
        self._most_bytes = most_bytes
        self._last: dict[str, int] = {}
        """By subject: the last entry that was read."""
        self._gaps: set[str] = set()
        """Subjects whose next message has a gap before it."""

    def messages_in(self, stored: StoredMessage) -> list[_Found]:
        """Those of an entry that are behind the position. The entries of a subject are to be given in order."""
        subject, entry, found = stored.subject, clear_of(stored.data), []
        before = _before(stored)
        if not entry.ended and before is not None and before > self._after[0] and before != self._last.get(subject):
            self._gaps.add(subject)
        self._last[subject] = stored.seq
        for number, message in enumerate(entry.messages):
            if (place := (stored.seq, number)) > self._after:
                found.append(_Found(place, message, subject, entry.since, subject in self._gaps))
                self._gaps.discard(subject)
        return found

    def is_full(self, found: Sequence[_Found]) -> bool:
        """Whether an answer has no room for more than these."""
        return len(found) >= self._most or sum(len(memoryview(each.message)) for each in found) > self._most_bytes

    def add(self, found: Sequence[_Found]) -> None:
        """Merges what is found of a person, and drops what is too much."""
        merged = sorted([*self.found, *found], key=lambda each: each.place)
        self.found, size = [], 0
        for each in merged:
            size += len(memoryview(each.message))
            if each.place[0] > self.up_to or (self.found and size > self._most_bytes):
                break
            self.found.append(each)
            if len(self.found) == self._most:
                break
        if self.found and self.is_full(merged):
            self.up_to = self.found[-1].place[0]


def _current(found: Sequence[_Found], newest: Iterable[_Head]) -> list[_Found]:
    """Without messages of persons whose time has ended, by newest entries of persons, as far as they are known."""
    heads = {head.subject: head for head in newest}
    return [each for each in found if (head := heads.get(each.subject)) is None or _is_current(each, head)]


def _is_current(found: _Found, head: _Head) -> bool:
    return not head.ended and head.since in (0, found.since)


def _before(stored: StoredMessage) -> int | None:
    """Sequence of the subject's entry before this one, when it was stored; None: unknown."""
    text = stored.headers.get(H_EXPECTED, "")
    return int(text) if text.isdecimal() else None


def _head_of(stored: StoredMessage, *, keep: bool = False) -> _Head:
    entry, before = clear_of(stored.data), _before(stored)
    return _Head(
        stored.subject,
        stored.seq,
        stored.seq if before is None else before,
        entry.since,
        entry.ended,
        stored if keep else None,
    )


class Next:
    """Any replica answers any request: position and reader are in the bucket `readers`."""

    def __init__(
        self,
        readers: Readers,
        history: History,
        names: Names,
        clock: Clock,
        metrics: Metrics,
        *,
        page_bytes: Callable[[], int],
        kept_ms: int,
    ) -> None:
        """`page_bytes`: most bytes of the messages in an answer; a larger message is an answer of its own.
        `kept_ms`: for how long the stream keeps entries."""
        self._readers = readers
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._page_bytes = page_bytes
        self._kept_ms = kept_ms
        self._bounds = 0, 0
        """The first sequence of WECHAT_IN when it was looked up, and the newest one that is known."""
        self._looked_at = -math.inf

    async def answer(self, request: SandboxRequest) -> SandboxResponse:
        """Raises Refused ("replaced": another agent reads), Temporary."""
        sandbox = check_sandbox(request.sandbox)
        query = read_request(request.data, NextQuery, self._metrics)
        reader = await self._confirm(sandbox, query)
        if not await self._is_reached(reader.handled):
            raise Temporary("inbox_set_back", SET_BACK)
        found = await self._read(sandbox, reader, query.max)
        lacks = bool(found) and await self._is_left_behind(reader)
        first = next((each.place for each in found if lacks or each.has_gap), None)
        page = NextPage(
            reader=reader.reader,
            messages=[Handed(position=position(*each.place), message=each.message) for each in found],
            first=position(*first) if first else "",
        )
        return SandboxResponse(msgspec.json.encode(page), {})

    async def _confirm(self, sandbox: str, query: NextQuery) -> ReaderRecord:
        """Makes a new reader, or moves the position. Returns the record after it. Raises Refused, Temporary."""
        asking = query.reader
        if asking is None:
            if query.after is not None:
                raise Refused("invalid", "`after` confirms messages of the reader that the request does not name.")
            return await self._readers.change(sandbox, lambda now: structs.replace(now, reader=0))
        handled, number = read_position(query.after) if query.after is not None else (0, 0)
        if not await self._is_reached(handled):
            raise Refused("invalid", "`after` is above the position of every message.")

        def confirm(now: ReaderRecord) -> ReaderRecord | None:
            _ensure_reads(now, asking)
            if now.reader and now.place >= (handled, number):
                return None
            return structs.replace(now, reader=asking, handled=handled, number=number)

        return await self._readers.change(sandbox, confirm)

    # the stream's first and last sequence -----------------------------------------------------------

    async def _is_reached(self, sequence: int) -> bool:
        """Whether the stream has given this sequence. Raises Temporary."""
        if sequence > self._bounds[1]:
            await self._look()
        return sequence <= self._bounds[1]

    async def _is_left_behind(self, reader: ReaderRecord) -> bool:
        """Whether entries behind the position may be gone unread, with all that the stream had of their persons.
        Raises Temporary."""
        if not await self._is_old(reader):
            return False
        await self._look()
        return reader.handled + 1 < self._bounds[0]

    async def _is_old(self, reader: ReaderRecord) -> bool:
        """Whether the position is in the older half of the stream, or before it: from the other half nothing is gone
        within BOUNDS_S. Raises Temporary."""
        if not reader.handled:
            return False
        if self._clock.monotonic() - self._looked_at > BOUNDS_S:
            await self._look()
        first, last = self._bounds
        return reader.handled - first < last - reader.handled

    async def _look(self) -> None:
        self._bounds = await self._history.first_and_last(self._names.stream_in)
        self._looked_at = self._clock.monotonic()

    # reading ----------------------------------------------------------------------------------------

    async def _read(self, sandbox: str, reader: ReaderRecord, most: int) -> list[_Found]:
        """The messages behind the reader's position. Raises Refused ("replaced"), Temporary."""
        start = max(1, reader.handled + (reader.number == ALL))
        while True:
            heads = await self._heads(sandbox, start)
            if heads is None:
                found, up_to = await self._read_all(sandbox, reader, start, most), 0
            else:
                newest, up_to = heads
                found = await self._read_persons(newest, reader, start, most, up_to)
            self._bounds = self._bounds[0], max(self._bounds[1], up_to)
            if not found:
                await self._keep(sandbox, reader, up_to)
                return []
            # what was read may have been another person's until now, or another agent's
            now = await self._readers.load(sandbox)
            _ensure_reads(now, reader.reader)
            changed = await self._heads(sandbox, up_to + 1) if up_to else None
            if found := _current(found, changed[0] if changed else await self._heads_of(found)):
                return [each for each in found if each.place > now.place]

    async def _heads(self, sandbox: str, start: int) -> tuple[list[_Head], int] | None:
        """The newest entries of persons, of those from a sequence on, and the sequence up to which there are no
        others. None: the sandbox has too many persons. Raises Temporary."""
        found: dict[str, _Head] = {}
        room = HEADS_BYTES
        while True:
            read = await self._history.read_heads(self._names.stream_in, self._names.inbox(sandbox), start=start)
            if read is None:
                return None
            for stored in read.messages:
                room -= len(stored.data)
                found[stored.subject] = _head_of(stored, keep=room >= 0)
            if not read.is_cut:
                return [*found.values()], read.up_to
            start = read.messages[-1].seq + 1

    async def _heads_of(self, found: Sequence[_Found]) -> list[_Head]:
        """The newest entries of these persons. Raises Temporary."""
        subjects = [*dict.fromkeys(each.subject for each in found)]
        newest = await self._history.read_last_of_each(self._names.stream_in, subjects)
        return [_head_of(stored) for stored in newest]

    async def _read_persons(
        self, heads: Sequence[_Head], reader: ReaderRecord, start: int, most: int, up_to: int
    ) -> list[_Found]:
        """Reads the subjects of these entries, and no others. Raises Temporary."""
        page = _Page(reader.place, most, self._page_bytes(), up_to)
        for head in heads:
            if head.ended:
                continue
            if head.before < start and head.stored is not None:  # nothing else of the subject is unread
                page.add(page.messages_in(head.stored))
                continue
            found: list[_Found] = []
            async with self._entries(head.subject, start, most) as entries:
                async for stored in entries:
                    if stored.seq > page.up_to:
                        break
                    found += [each for each in page.messages_in(stored) if _is_current(each, head)]
                    if stored.seq >= head.sequence or page.is_full(found):
                        break
            page.add(found)
        return page.found

    async def _read_all(self, sandbox: str, reader: ReaderRecord, start: int, most: int) -> list[_Found]:
        """Reads the subjects of all persons at once, which costs the server more. Raises Temporary."""
        page = _Page(reader.place, most, self._page_bytes(), MAX_SEQ)
        found: list[_Found] = []
        async with self._entries(self._names.inbox(sandbox), start, most) as entries:
            async for stored in entries:
                found += page.messages_in(stored)
                if page.is_full(found) and page.is_full(found := _current(found, await self._heads_of(found))):
                    break
            else:
                found = _current(found, await self._heads_of(found))
        page.add(found)
        return page.found

    def _entries(
        self, subject: str, start: int, most: int
    ) -> contextlib.aclosing[AsyncGenerator[StoredMessage, None]]:
        """The entries from a sequence on."""
        read = self._history.read(self._names.stream_in, subject, after=start - 1, page=most)
        return contextlib.aclosing(cast("AsyncGenerator[StoredMessage]", read))

    async def _keep(self, sandbox: str, reader: ReaderRecord, up_to: int) -> None:
        """Writes the record of a sandbox without unread messages where the bucket would forget it, or where the
        stream is about to leave its position behind, as if messages were gone. Raises Temporary."""
        if up_to > reader.handled and await self._is_old(reader) and reader.handled + 1 >= self._bounds[0]:
            await self._readers.change(
                sandbox,
                lambda now: structs.replace(now, handled=up_to, number=ALL) if now.place < (up_to, ALL) else None,
            )
        elif self._clock.now_ms() - reader.written_ms > self._kept_ms // 2:
            await self._readers.change(sandbox, lambda now: now)


def _ensure_reads(now: ReaderRecord, asking: int) -> None:
    """Raises Refused where another agent reads. Where nobody does, since the record is gone, whoever asks goes on."""
    if now.reader not in (0, asking):
        raise Refused("replaced", REPLACED)
