"""The journal of one bot, as its owner writes it.

A replica owns a bot while the newest record of its journal has the replica's incarnation. `BotJournal` continues from
the newest record (`last`), and writes each record by compare-and-set on the sequence that it knows:

- `note` stores owner, cursor and the dispatched sequence, without messages. It takes the bot.
- `records_of` splits an answer into records, and `store` stores one of them.
- `release` stores a record without an owner.

If a write conflicts, `adopt_late` reads the records after the known one. Records under this replica's own name are
late answers of a replica that lost the bot (`store_late`), or an own write whose answer was lost; the journal
continues after them. A record under another name means that the bot is lost: LeaseLost.

The poller and `taking` are the callers. The journal never reads messages; `Progress`, which is the dispatcher, says
how far they are dispatched, and which dedup window to store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

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
"""New messages since the last stored dedup window after which it is stored again."""

SNAPSHOT_AFTER_RECORDS = 64
"""Records since the last stored dedup window after which it is stored again."""

RECORDS_KEPT = 2 * SNAPSHOT_AFTER_RECORDS
"""Most records of one bot that the stream keeps."""


class Progress(Protocol):
    """Progress of dispatching the journal's records."""

    def done_to(self) -> int:
        """Sequence up to which inboxes and conversations have all messages; 0: unknown."""

    async def load_dedup_window(self) -> None:
        """Loads the dedup window if it is not loaded. Raises Temporary."""

    def dedup_snapshot(self, *, new: int) -> list[str] | None:
        """The dedup window up to `done_to`; None: fewer than `new` messages are new since it was stored, or it is not
        loaded."""


class Answer(msgspec.Struct, frozen=True):
    """An answer of iLink to a poll."""

    polled: Polled
    sandbox: str
    """The sandbox that the bot served then."""
    received_ms: int


class BotJournal:
    """The journal of one bot that this replica owns."""

    def __init__(
        self,
        bot: str,
        journal: Journal,
        leases: Leases,
        last: Written | None,
        part_bytes: Callable[[], int],
        on_written: Callable[[Written], None],
    ) -> None:
        """`last`: the newest record. `part_bytes`: the largest record. `on_written`: called with each stored record
        that has messages, in order."""
        self.bot = bot
        self.owner = leases.incarnation
        self._journal = journal
        self._leases = leases
        self._part_bytes = part_bytes
        self._on_written = on_written
        self.progress: Progress | None = None
        """Set with the first dispatched message."""
        record = last.record if last else JournalRecord()
        self.sequence = last.sequence if last else 0
        """Sequence of the newest record."""
        self.stored = record.next_record(self.sequence)
        """The next record without messages, derived from the newest one."""
        self.cursor = record.cursor
        """iLink's cursor for the next poll. It may be newer than the stored one."""
        self.start = record.start
        self.done_to = record.done_to
        """Sequence up to which inboxes and conversations have all messages."""
        self._since_seen = 0
        """Own records since the newest one with a dedup window."""
        self._older: list[int] = []
        """Known sequences of the records before the newest one, oldest first."""
        self._inherited = record.last_heard
        """Sequence of the newest record with messages that an earlier owner may have left, before `last`; 0: none."""

    @property
    def is_cursor_stored(self) -> bool:
        return self.cursor == self.stored.cursor

    @property
    def is_noted(self) -> bool:
        """Whether the newest record has the cursor and the dispatched sequence, so that a new owner need not
        search."""
        return self.is_cursor_stored and not (self.stored.done_to < self.stored.last_heard and self.is_dispatched)

    @property
    def is_dispatched(self) -> bool:
        """Whether inboxes and conversations have all messages."""
        if self.progress is not None:
            self.done_to = max(self.done_to, self.progress.done_to())
        return self.stored.last_heard <= self.done_to

    def apply_start_cursor(self, binding: Binding, sealer: Sealer) -> None:
        """Applies the cursor of a bind request, once. The next record stores it."""
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
        """Raises LeaseLost unless this replica may write for the bot now.

        The owner in the journal may write while it is alive, even if it has handed the shard over, since no other
        replica takes the bot before its release.
        """
        if not self._leases.is_valid or self._leases.incarnation != self.owner:
            raise LeaseLost("lease_lost", self.bot)

    # writing ----------------------------------------------------------------------------------------

    async def note(self) -> None:
        """Stores owner and cursor without messages. Raises Temporary, LeaseLost."""
        has_all = self.stored.seen_to >= self.stored.last_heard
        await self._append(self._record(new=1 if has_all else 0))

    async def release(self, *, ttl_s: int = 0) -> None:
        """Removes the owner, even while the lease is not valid, since no other replica takes the bot of a living one.
        `ttl_s`: time to live of the record of an unbound bot. Raises Temporary, LeaseLost."""
        if ttl_s and self.progress is not None:
            await self.progress.load_dedup_window()  # the older records are deleted
        await self._append(self._record(new=0 if ttl_s else 1), owner="", ttl_s=ttl_s)

    async def store(self, record: JournalRecord) -> None:
        """Stores a record of `records_of`. Raises Temporary, LeaseLost, BusRefused."""
        await self._append(record.placed_behind(self._record()))
        self.cursor = record.cursor

    def records_of(self, answer: Answer) -> Iterator[JournalRecord]:
        """Splits an answer into records. The last record moves the cursor."""
        polled, first = answer.polled, 0
        place = digest(polled.cursor.encode()) if polled.cursor else ""
        before: JournalRecord | None = None
        is_rest = False
        for part, is_continued in parts_of(polled.messages, self._part_bytes()):
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
        """Stores a record of a bot that another replica has taken, under that owner's name, since iLink may not
        deliver the messages again. Raises Temporary."""
        while True:
            last = await self._journal.last(self.bot)
            owner, sequence, newest = (last.owner, last.sequence, last.record) if last else ("", 0, JournalRecord())
            late = msgspec.structs.replace(record.placed_behind(newest.next_record(sequence)), cursor=newest.cursor)
            try:
                await self._journal.append(self.bot, late, owner, sequence)
            except Conflict:
                continue
            return

    async def adopt_late(self) -> list[Written]:
        """Continues after records that were stored under this replica's name without its knowledge, and returns
        them. Raises LeaseLost if another replica owns the bot, Temporary."""
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
        """Deletes all records before the newest one, once every message is dispatched and the dedup window is stored.
        No later owner reads them. Raises Temporary."""
        if min(self.stored.done_to, self.stored.seen_to) < self.stored.last_heard:
            return
        del self._older[:-RECORDS_KEPT]
        while self._inherited and (found := await self._journal.get(self.bot, self._inherited)) is not None:
            self._older.insert(0, self._inherited)
            self._inherited = found.record.last_heard
        self._inherited = 0
        needed = self.stored.seen_at
        for sequence in [sequence for sequence in self._older if sequence != needed]:
            await self._journal.delete(sequence)
            self._older.remove(sequence)

    async def delete_older(self) -> None:
        """Deletes all records except the newest. Raises Temporary."""
        async for written in self._journal.after(self.bot, 0):
            if written.sequence < self.sequence:
                await self._journal.delete(written.sequence)

    def _record(self, *, new: int = SNAPSHOT_AFTER_NEW) -> JournalRecord:
        if self.progress is not None:
            self.done_to = max(self.done_to, self.progress.done_to())
        if self._since_seen >= SNAPSHOT_AFTER_RECORDS:
            new = 0
        return msgspec.structs.replace(
            self.stored,
            cursor=self.cursor,
            start=self.start,
            seen=self.progress.dedup_snapshot(new=new) if self.progress else None,
            done_to=self.done_to,
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
                    return
                base = msgspec.structs.replace(
                    self.stored, start=record.start, seen=record.seen, done_to=record.done_to
                )
                record = record.placed_behind(base)
                continue
            written = Written(sequence, self.owner, record)
            self._point_at(written)
            self._notify(written)
            return

    def _point_at(self, written: Written) -> None:
        if self.sequence and self.sequence != written.sequence:
            self._older.append(self.sequence)
            if len(self._older) > 2 * RECORDS_KEPT:
                del self._older[:RECORDS_KEPT]
        self.sequence = written.sequence
        self.stored = written.record.next_record(written.sequence)
        self._since_seen = 0 if written.record.seen is not None else self._since_seen + 1

    def _notify(self, written: Written) -> None:
        if written.record.messages:
            self._on_written(written)


def _is_same(one: JournalRecord, other: JournalRecord) -> bool:
    """Whether both records are the same part of the same answer."""

    def part(record: JournalRecord) -> tuple[str, int, int, list[bytes]]:
        return record.place, record.first, record.received_ms, record.messages

    return bool(one.messages) and part(one) == part(other)
