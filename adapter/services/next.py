"""wechat.svc.next.<sandbox>: hands a sandbox its messages until it has handled them.

How far each sandbox has, and who reads it, is in the bucket `readers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import cast

import msgspec
import structlog
from msgspec import structs

from adapter.contract.messages import Handed, NextPage, NextQuery
from adapter.contract.names import Names, check_sandbox
from adapter.contract.records import ReaderRecord
from adapter.errors import UNDECODABLE, Conflict, Refused, Temporary
from adapter.kit.timing import Clock
from adapter.observability.decoding import decode_record, read_request
from adapter.observability.metrics import Metrics
from adapter.ports import History, LeaderBucket, SandboxRequest, SandboxResponse, StoredMessage

log = structlog.get_logger()

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

    async def change(
        self, sandbox: str, change: Callable[[ReaderRecord], ReaderRecord | None]
    ) -> tuple[ReaderRecord, ReaderRecord]:
        """The record before and after `change`, which is called again after a write of somebody else. None: it is not
        written."""
        while True:
            before, revision = await self._load(sandbox)
            if (changed := change(before)) is None:
                return before, before
            after = structs.replace(changed, written_ms=self._clock.now_ms())
            try:
                written = await self._bucket.write(sandbox, msgspec.json.encode(after), revision)
            except Conflict:
                continue
            return before, _numbered(after, written)

    async def skip(self, sandbox: str, sequence: int) -> None:
        """Moves the position to `sequence` at least, even if nobody has read yet: nothing up to it is handed out any
        more."""
        await self.change(
            sandbox, lambda now: structs.replace(now, handled=sequence) if now.handled < sequence else None
        )

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
        kept: int,
        kept_ms: int,
    ) -> None:
        """`page_bytes`: most bytes of the messages in an answer; a larger message is an answer of its own. `kept`:
        most messages that a sandbox's inbox keeps, and `kept_ms`: for how long."""
        self._readers = readers
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._page_bytes = page_bytes
        self._kept = kept
        self._kept_ms = kept_ms
        self._last = 0
        """Newest sequence of WECHAT_IN that is known here; later ones are looked up."""

    async def answer(self, request: SandboxRequest) -> SandboxResponse:
        """Raises Refused ("replaced": another agent reads), Temporary."""
        sandbox = check_sandbox(request.sandbox)
        query = read_request(request.data, NextQuery, self._metrics)
        before, reader = await self._confirm(sandbox, query)
        if not await self._is_reached(reader.handled):
            raise Temporary("inbox_set_back", SET_BACK)
        found, lacks = await self._read(sandbox, reader.handled, query.max, before)
        if found:
            # what was read may have been another person's until now, or another agent's
            now = await self._readers.load(sandbox)
            _ensure_reads(now, reader.reader)
            found = [each for each in found if each.sequence > now.handled]
        elif self._age_ms(reader) > self._kept_ms // 2:  # the bucket forgets who does not ask
            await self._readers.change(sandbox, lambda now: now)
        return SandboxResponse(
            msgspec.json.encode(
                NextPage(reader=reader.reader, messages=found, first=found[0].sequence if found and lacks else 0)
            ),
            {},
        )

    async def _confirm(self, sandbox: str, query: NextQuery) -> tuple[ReaderRecord, ReaderRecord]:
        """Makes a new reader, or moves the position. Returns the record before and after it. Raises Refused,
        Temporary."""
        asking, handled = query.reader, query.after or 0
        if asking is None:
            if query.after is not None:
                raise Refused("invalid", "`after` confirms messages of the reader that the request does not name.")
            return await self._readers.change(sandbox, lambda now: structs.replace(now, reader=0))
        if not await self._is_reached(handled):
            raise Refused("invalid", "`after` is above the sequence of every message.")

        def confirm(now: ReaderRecord) -> ReaderRecord | None:
            _ensure_reads(now, asking)
            if now.reader and now.handled >= handled:
                return None
            return structs.replace(now, reader=asking, handled=handled)

        return await self._readers.change(sandbox, confirm)

    async def _is_reached(self, sequence: int) -> bool:
        """Whether the stream has given this sequence. Raises Temporary."""
        if sequence > self._last:
            self._last = await self._history.last_sequence(self._names.stream_in)
        return sequence <= self._last

    async def _read(self, sandbox: str, after: int, most: int, before: ReaderRecord) -> tuple[list[Handed], bool]:
        """The messages behind a position, and whether others before them may be gone unread. Raises Temporary."""
        names, size, lacks = self._names, 0, False
        found: list[Handed] = []
        stored_ones = self._history.read(names.stream_in, names.inbox(sandbox), after=after, limit=most)
        async with contextlib.aclosing(cast("AsyncGenerator[StoredMessage]", stored_ones)) as messages:
            async for stored in messages:
                size += len(stored.data)
                if found and size > self._page_bytes():
                    break
                lacks = lacks if found else self._may_lack(before, stored)
                found.append(Handed(sequence=stored.seq, message=msgspec.Raw(stored.data)))
        if found:
            self._last = max(self._last, found[-1].sequence)
        return found, lacks

    def _may_lack(self, before: ReaderRecord, first: StoredMessage) -> bool:
        """Whether messages between the position and the oldest one that is left may be gone: the sandbox has not
        asked for as long as they are kept, or the inbox is full of unread ones."""
        unread = int(first.headers.get("Nats-Num-Pending", "0")) + 1
        return unread >= self._kept or (before.reader > 0 and self._age_ms(before) > self._kept_ms)

    def _age_ms(self, reader: ReaderRecord) -> int:
        return self._clock.now_ms() - reader.written_ms


def _ensure_reads(now: ReaderRecord, asking: int) -> None:
    """Raises Refused where another agent reads. Where nobody does, since the record is gone, whoever asks goes on."""
    if now.reader not in (0, asking):
        raise Refused("replaced", REPLACED)
