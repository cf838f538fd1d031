"""Reads the records of a bot's journal that earlier owners left undispatched, and the dedup window.

A record may be partly dispatched: the inbox shows which of its messages are published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adapter.content.dedup import DedupWindow
from adapter.contract.names import H_JOURNAL, H_MSG_ID
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.dispatch_state import DispatchDeps, OpenRecord, PendingMessage
from adapter.inbound.journal import JournalRecord, Written

CLOCK_SKEW_MS = 60_000
"""Largest difference between the clocks of two servers."""


class LeftOver:
    """Reads the left-over records of one bot."""

    def __init__(self, journal: BotJournal, deps: DispatchDeps) -> None:
        self._journal = journal
        self._deps = deps
        self._pieces: dict[tuple[str, int], bytes] = {}
        """Beginnings of messages that continue in a later record, by answer and index. A late record of another
        replica may lie between the two records."""

    async def read_back(self, newest: int, done_to: int) -> tuple[DedupWindow, list[OpenRecord]]:
        """The dedup window, and the left-over records, oldest first. `newest`: sequence of the newest record with
        messages of earlier owners. `done_to`: sequence up to which everything is dispatched. Raises Temporary."""
        stored, triage = self._journal.stored, self._deps.triage
        known = await self._get(stored.seen_at) if stored.seen_at else None
        seen, records = DedupWindow(known.record.seen or () if known else ()), []
        for written in await self._earlier_records(newest, stored.seen_to):
            record = written.record
            if written.sequence > done_to:
                records.append(OpenRecord(written, is_left_over=True))
                continue
            whole = self.complete_messages(record)
            await triage.classify(self._journal.bot, whole, record.place, record.first, seen, record.received_ms)
        return seen, records

    async def _earlier_records(self, sequence: int, known_to: int) -> list[Written]:
        """The records with messages that earlier owners stored after `known_to`, oldest first. Follows `last_heard`
        backwards, since a search by subject would scan the records of all bots. Raises Temporary."""
        found: list[Written] = []
        while sequence > known_to and (written := await self._get(sequence)) is not None:
            found.append(written)
            sequence = written.record.last_heard
        return found[::-1]

    async def _get(self, sequence: int) -> Written | None:
        """Raises Temporary."""
        return await self._deps.journal.get(self._journal.bot, sequence)

    def complete_messages(self, record: JournalRecord) -> list[bytes]:
        """The messages of a record, each with its pieces from earlier records. An unfinished last message is kept."""
        begun = self._pieces.pop((record.place, record.first), b"")
        messages = list(record.messages)
        if record.is_rest:  # otherwise iLink repeated the answer
            messages[0] = begun + messages[0]
        if record.is_continued:
            last = messages.pop()
            self._pieces[record.place, record.first + len(messages)] = last
        return messages

    async def find_published(self, suspects: Sequence[PendingMessage]) -> tuple[set[str], set[str]]:
        """Journal positions and ids of the messages in the inboxes since the first suspect was stored. Raises
        Temporary."""
        names, history = self._deps.publishing.access.names, self._deps.publishing.access.history
        first = suspects[0].record.written
        if not first.time_ms:
            first = await self._get(first.sequence) or first
        since_ms = first.time_ms - CLOCK_SKEW_MS
        places, ids = set(), set()
        for sandbox, count in Counter(pending.message.sandbox for pending in suspects).items():
            subject = names.inbox(sandbox)
            # usually one message is pending and is the newest of its inbox; a longer read scans all inboxes
            newest = await history.read_last_of_each(names.stream_in, [subject]) if count == 1 else []
            found = {stored.headers.get(H_JOURNAL, "") for stored in newest}
            if any(pending.message.place in found for pending in suspects if pending.message.sandbox == sandbox):
                places |= found
                continue
            async for stored in history.read(names.stream_in, subject, since_ms=since_ms):
                places.add(stored.headers.get(H_JOURNAL, ""))
                ids.add(stored.headers.get(H_MSG_ID, ""))
        return places, ids
