"""One bot's journal as the replica writes it that polls the bot: taken, gone on with, given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, Protocol

import msgspec
import structlog

from adapter.contract.names import digest
from adapter.contract.records import Binding
from adapter.errors import Conflict, LeaseLost, Refused, Temporary
from adapter.inbound.journal import Journal, JournalRecord, Written, parts_of
from adapter.ownership.leases import Leases
from adapter.ports import Polled
from adapter.security.seal import Sealer, cursor_context

log = structlog.get_logger()

SNAPSHOT_AFTER_NEW = 33
"""So many messages that are new since the journal has all that were seen lately, and it is written to it again."""

SNAPSHOT_AFTER_RECORDS = 64
"""After so many records it is written again in any case."""


RECORDS_KEPT = 2 * SNAPSHOT_AFTER_RECORDS
"""Records of one bot that the stream keeps."""


class Progress(Protocol):
    """How far what the journal has was dispatched."""

    def done_to(self) -> int:
        """Sequence up to which inboxes and conversations have everything; 0: not known."""

    async def load_dedup_window(self) -> None:
        """Reads back what was seen lately where it is not known yet. Raises Temporary."""

    def dedup_snapshot(self, *, new: int) -> list[str] | None:
        """All messages seen lately up to `done_to`; None where fewer than `new` are new since they were written, or
        they are not known."""


class Answer(NamedTuple):
    """What iLink answered to a poll, and what is known of it."""

    polled: Polled
    sandbox: str
    """Which the bot served then."""
    received_ms: int


class BotJournal:
    """The records of one bot, whose owner this replica is."""

    def __init__(
        self,
        bot: str,
        journal: Journal,
        leases: Leases,
        last: Written | None,
        part_bytes: Callable[[], int],
        on_written: Callable[[Written], None],
    ) -> None:
        """`last`: its newest record. `part_bytes`: the most that a record may hold. `on_written` is told of each
        record with messages, in order."""
        self.bot = bot
        self.owner = leases.incarnation
        self._journal = journal
        self._leases = leases
        self._part_bytes = part_bytes
        self._on_written = on_written
        self.progress: Progress | None = None
        """Set once something was dispatched."""
        record = last.record if last else JournalRecord()
        self.cursor = record.cursor
        """iLink's, for the next poll; it may be newer than the one that is stored."""
        self.start = record.start
        self.sequence = last.sequence if last else 0
        """Of the newest record."""
        self._stored_cursor = record.cursor
        self.done_to = self._stored_done_to = record.done_to
        """Sequence up to which inboxes and conversations are known to have everything."""
        self.seen_at = record.seen_at
        """Sequence of the newest record that has what was seen lately; 0: there is none."""
        self.seen_to = record.seen_to
        """Up to where in the journal that one knows it."""
        self.last_heard = record.last_heard
        self._since_seen = 0
        """Records since that one, by this owner."""
        self._older: list[int] = []
        """Sequences of the newest records but one, as far as this owner knows them, oldest first."""
        self._inherited = self.last_heard
        """The newest record with messages that an earlier owner may have left; 0: none."""
        if last is not None:
            self._point_at(last)

    @property
    def is_cursor_stored(self) -> bool:
        return self.cursor == self._stored_cursor

    @property
    def is_noted(self) -> bool:
        """Whether the newest record says all that is known: a next owner has nothing to look for."""
        return self.is_cursor_stored and not (self._stored_done_to < self.last_heard and self.is_dispatched)

    @property
    def is_dispatched(self) -> bool:
        """Whether inboxes and conversations are known to have everything."""
        if self.progress is not None:
            self.done_to = max(self.done_to, self.progress.done_to())
        return self.last_heard <= self.done_to

    def apply_start_cursor(self, binding: Binding, sealer: Sealer) -> None:
        """Goes to the cursor that a bind request names, once; it is stored with the next record."""
        if binding.start_cursor is None:
            return
        try:
            start = sealer.open(cursor_context(self.bot), binding.start_cursor)
        except Refused as exc:
            log.error("cursor.unopenable", bot=self.bot, detail=exc.detail)
            return
        mark = digest(start.encode()) if start else ""
        if self.start != mark:
            self.cursor, self.start = start, mark

    def ensure_owner(self) -> None:
        """Raises LeaseLost where this replica may not write for the bot at this moment.

        The owner that the journal names may write as long as it lives, also for a shard that it has handed over:
        nobody takes the bot before.
        """
        if not self._leases.is_valid or self._leases.incarnation != self.owner:
            raise LeaseLost("lease_lost", self.bot)

    # writing ----------------------------------------------------------------------------------------

    async def note(self) -> None:
        """Stores who polls, and from where, without messages. Raises Temporary, LeaseLost."""
        await self._append(self._record(new=1))

    async def release(self, *, ttl_s: int = 0) -> None:
        """Takes this replica's name out, also while its lease is not valid: it lives, so that nobody else would.
        `ttl_s`: the bot is bound no more, and its record goes after so long. Raises Temporary, LeaseLost."""
        if ttl_s and self.progress is not None:
            await self.progress.load_dedup_window()  # no older record stays
        await self._append(self._record(new=0 if ttl_s else 1), owner="", ttl_s=ttl_s)

    async def store(self, record: JournalRecord) -> None:
        """Stores one of `records_of`. Raises Temporary, LeaseLost, BusRefused."""
        pointed = self._record()
        await self._append(
            msgspec.structs.replace(
                record,
                start=pointed.start,
                seen=pointed.seen,
                seen_at=pointed.seen_at,
                seen_to=pointed.seen_to,
                done_to=pointed.done_to,
                last_heard=pointed.last_heard,
            )
        )
        self.cursor = record.cursor

    def records_of(self, answer: Answer) -> Iterator[JournalRecord]:
        """An answer as records, a page of it at a time; the last one moves the cursor."""
        polled, first = answer.polled, 0
        place = digest(polled.cursor.encode()) if polled.cursor else ""
        pages: Iterable[list[bytes]] = polled.pages or ()
        before: JournalRecord | None = None
        is_rest = False
        for page in chain([polled.messages], pages):
            for part, is_continued in parts_of(page, self._part_bytes()):
                if before is not None:
                    yield before
                before = JournalRecord(
                    cursor=self.cursor,
                    sandbox=answer.sandbox,
                    received_ms=answer.received_ms,
                    messages=part,
                    is_continued=is_continued,
                    is_rest=is_rest,
                    place=place,
                    first=first,
                )
                first += len(part) - is_continued
                is_rest = is_continued
        if before is not None:
            yield msgspec.structs.replace(before, cursor=polled.cursor or self.cursor)

    async def store_late(self, record: JournalRecord) -> None:
        """Stores what iLink handed over to this replica after another one has taken the bot: iLink may give it to
        nobody else. The owner of now finds it as its own. Raises Temporary."""
        while True:
            last = await self._journal.last(self.bot)
            owner, sequence, base = (last.owner, last.sequence, last.record) if last else ("", 0, JournalRecord())
            late = msgspec.structs.replace(
                record,
                cursor=base.cursor,
                start=base.start,
                seen=None,
                seen_at=sequence if base.seen is not None else base.seen_at,
                seen_to=base.done_to if base.seen is not None else base.seen_to,
                done_to=base.done_to,
                last_heard=sequence if base.messages else base.last_heard,
            )
            try:
                await self._journal.append(self.bot, late, owner, sequence)
            except Conflict:
                continue
            return

    async def adopt_late(self) -> list[Written]:
        """Goes on behind what another replica has stored late under this one's name, and returns it; or what this one
        has stored without an answer. Raises LeaseLost where it is somebody else's by now, Temporary."""
        found = [written async for written in self._journal.after(self.bot, self.sequence)]
        if any(written.owner != self.owner for written in found):
            raise LeaseLost("bot_taken", self.bot)
        for written in found:
            self._point_at(written)
            self._notify(written)
        if found:
            return found
        last = await self._journal.last(self.bot)
        if last is None:
            raise Temporary("journal_lost", f"The journal of {self.bot} is gone: restore it from the backup.")
        if last.sequence < self.sequence:
            raise LeaseLost("journal_set_back", self.bot)
        return []

    async def delete_needless(self) -> None:
        """Deletes the records that no later owner reads: all before the newest one, once everything is dispatched and
        what was seen lately is stored. What people wrote stays no longer than that. Raises Temporary."""
        if self._stored_done_to < self.last_heard or self.seen_to < self.last_heard:
            return
        while self._inherited and (found := await self._journal.get(self.bot, self._inherited)) is not None:
            self._older.insert(0, self._inherited)
            self._inherited = found.record.last_heard
        self._inherited = 0
        needed = [sequence for sequence in self._older if sequence == self.seen_at]
        while self._older:
            if self._older[-1] not in needed:
                await self._journal.delete(self._older[-1])
            self._older.pop()
        self._older = needed

    async def delete_older(self) -> None:
        """Deletes all records but the newest. Raises Temporary."""
        async for written in self._journal.after(self.bot, 0):
            if written.sequence < self.sequence:
                await self._journal.delete(written.sequence)

    def _record(self, *, new: int = SNAPSHOT_AFTER_NEW) -> JournalRecord:
        if self.progress is not None:
            self.done_to = max(self.done_to, self.progress.done_to())
        if self._since_seen >= SNAPSHOT_AFTER_RECORDS:
            new = 0
        return JournalRecord(
            cursor=self.cursor,
            start=self.start,
            seen=self.progress.dedup_snapshot(new=new) if self.progress else None,
            seen_at=self.seen_at,
            seen_to=self.seen_to,
            done_to=self.done_to,
            last_heard=self.last_heard,
        )

    async def _append(self, record: JournalRecord, *, owner: str | None = None, ttl_s: int = 0) -> None:
        while True:
            try:
                sequence = await self._journal.append(
                    self.bot,
                    record,
                    self.owner if owner is None else owner,
                    self.sequence,
                    ensure_owner=self.ensure_owner if owner is None else None,
                    ttl_s=ttl_s,
                )
            except Conflict:
                if any(_is_same(found.record, record) for found in await self.adopt_late()):
                    self._stored_cursor = record.cursor
                    return
                record = msgspec.structs.replace(
                    record, seen_at=self.seen_at, seen_to=self.seen_to, last_heard=self.last_heard
                )
                continue
            written = Written(sequence, self.owner, record)
            self._point_at(written)
            self._stored_cursor, self._stored_done_to = record.cursor, record.done_to
            self._notify(written)
            return

    def _point_at(self, written: Written) -> None:
        if self.sequence and self.sequence != written.sequence:
            self._older = [*self._older[1 - RECORDS_KEPT :], self.sequence]
        self.sequence = written.sequence
        self._since_seen += 1
        if written.record.seen is not None:
            self.seen_at, self.seen_to = written.sequence, written.record.done_to
            self._since_seen = 0
        if written.record.messages:
            self.last_heard = written.sequence

    def _notify(self, written: Written) -> None:
        if written.record.messages:
            self._on_written(written)


def _is_same(one: JournalRecord, other: JournalRecord) -> bool:
    """Whether both are the same part of the same answer."""

    def part(record: JournalRecord) -> tuple[str, int, int, list[bytes]]:
        return record.place, record.first, record.received_ms, record.messages

    return bool(one.messages) and part(one) == part(other)
