"""The journal: for each bot, a sequence of records with iLink's messages and the replica that polls.

Stream WECHAT_JOURNAL, subject `wechat.journal.<bot>`. Each record is written by compare-and-set on the last sequence
of its subject. It is a checkpoint, since it has iLink's cursor, and a fence, since it has the owner's name: a write
by another replica makes the next write of the previous owner fail. An answer is published only after its record is
stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import msgspec
import structlog

from adapter.contract.names import H_EXPECTED, Names
from adapter.errors import UNDECODABLE, BusRefused, Conflict, Refused, Temporary
from adapter.ports import Bus, History, Message, Stored
from adapter.security.seal import Sealer, journal_context

log = structlog.get_logger()

VERSION = 1
"""Version of a record's form. A replica leaves a bot alone whose last record has a higher version."""
MESSAGE_BYTES = 512
"""What a message counts in a record beside its bytes. It bounds the messages of a record, which are read in one turn
of the event loop."""


class JournalRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer of iLink with messages, a part of one, or a change of the owner. Stored sealed, since iLink's cursor
    contains the bot's token."""

    cursor: str = ""
    """iLink's cursor for the next poll."""
    start: str | None = None
    """Digest of the start cursor that was applied last, from a bind request; "": none."""
    sandbox: str = ""
    """The sandbox that the bot served when iLink answered, which gets the messages; "": none."""
    received_ms: int = 0
    messages: list[bytes] = []
    """The messages as iLink sent them."""
    is_continued: bool = False
    """The last message continues in the next record, since it is too large for one."""
    is_rest: bool = False
    """The first message continues a message of an earlier record."""
    place: str = ""
    """Identity of the answer, a digest of its cursor; "": it had none."""
    first: int = 0
    """Index of the first message in the answer."""
    seen: list[str] | None = None
    """The dedup window (lines of `content.dedup`) up to `done_to`; None: an older record has it."""
    seen_at: int = 0
    """Sequence of the newest record before this one with `seen`; 0: none."""
    seen_to: int = 0
    """Sequence up to which that record's `seen` is complete."""
    done_to: int = 0
    """Sequence up to which inboxes and conversations have all messages."""
    last_heard: int = 0
    """Sequence of the newest record before this one with messages; 0: none."""

    def next_record(self, sequence: int) -> JournalRecord:
        """The record without messages that follows this one. `sequence`: of this record."""
        has_window = self.seen is not None
        return JournalRecord(
            cursor=self.cursor,
            start=self.start,
            seen_at=sequence if has_window else self.seen_at,
            seen_to=self.done_to if has_window else self.seen_to,
            done_to=self.done_to,
            last_heard=sequence if self.messages else self.last_heard,
        )

    def placed_behind(self, base: JournalRecord) -> JournalRecord:
        """This record with the references of `base` to earlier records."""
        return msgspec.structs.replace(
            self,
            start=base.start,
            seen=base.seen,
            seen_at=base.seen_at,
            seen_to=base.seen_to,
            done_to=base.done_to,
            last_heard=base.last_heard,
        )

    def __repr__(self) -> str:
        return f"JournalRecord(messages={len(self.messages)})"  # keeps texts and tokens out of logs


class Written(msgspec.Struct, frozen=True):
    """A stored record."""

    sequence: int
    owner: str
    """Incarnation of the replica that polls the bot; "": none."""
    record: JournalRecord
    time_ms: int = 0
    """When the stream stored it, by the server's clock; 0: unknown."""


class Journal:
    """Reads and writes the records of all bots."""

    def __init__(self, bus: Bus, history: History, names: Names, sealer: Sealer) -> None:
        self._bus = bus
        self._history = history
        self._names = names
        self._sealer = sealer

    async def last(self, bot: str) -> Written | None:
        """A bot's newest record, read from the stream's leader. Raises Temporary."""
        stored = await self._history.read_last(self._names.stream_journal, self._names.journal(bot))
        return None if stored is None else self._read(bot, stored)

    async def get(self, bot: str, sequence: int) -> Written | None:
        """A bot's record; None: it is gone. Raises Temporary."""
        stored = await self._history.get(self._names.stream_journal, sequence)
        is_of_bot = stored is not None and stored.subject == self._names.journal(bot)
        return self._read(bot, stored) if stored is not None and is_of_bot else None

    async def after(self, bot: str, sequence: int) -> AsyncIterator[Written]:
        """The records after a sequence, oldest first. The server scans the records of all bots, so use it for few
        bots. Raises Temporary."""
        subject = self._names.journal(bot)
        async for stored in self._history.read(self._names.stream_journal, subject, after=sequence):
            yield self._read(bot, stored)

    async def append(
        self,
        bot: str,
        record: JournalRecord,
        owner: str,
        expected: int,
        *,
        ensure_owner: Callable[[], None] | None = None,
        ttl_s: int = 0,
    ) -> int:
        """Stores a record if the bot's newest record has the sequence `expected` (0: none). Returns its sequence.

        A write whose answer was lost is recognised on its retry by its bytes, which are unique at their place.
        `ttl_s`: time to live; 0: no limit. Raises Conflict, Temporary, BusRefused (the record is too large), and what
        `ensure_owner` raises.
        """
        body = msgspec.msgpack.encode(record)
        sealed = self._sealer.seal_bytes(journal_context(bot, VERSION, owner), body)
        payload = msgspec.msgpack.encode((VERSION, owner, sealed))
        headers = {H_EXPECTED: str(expected)}
        if ttl_s:
            headers["Nats-TTL"] = f"{ttl_s}s"
        message = Message("journal", self._names.journal(bot), payload, headers, ensure_owner)
        try:
            return (await self._bus.publish(message)).seq
        except Conflict:
            read = self._history.read(self._names.stream_journal, message.subject, after=expected, limit=1)
            async for stored in read:
                if stored.data == payload:
                    return stored.seq
            raise
        except BusRefused as exc:
            if exc.is_full:
                raise Temporary("journal_full", exc.detail) from exc  # an operator has to make room
            raise

    async def delete(self, sequence: int) -> None:
        """Deletes a record. Raises Temporary."""
        await self._history.delete(self._names.stream_journal, sequence)

    def _read(self, bot: str, stored: Stored) -> Written:
        """A record that cannot be opened or decoded counts as an empty one of its owner. Raises Temporary for a
        record of a later version."""
        owner = ""
        try:
            version, owner, sealed = msgspec.msgpack.decode(stored.data, type=tuple[int, str, bytes])
            if version > VERSION:
                raise Temporary("record_too_new", f"A record has version {version}, this replica knows {VERSION}.")
            body = self._sealer.open_bytes(journal_context(bot, version, owner), sealed)
            record = msgspec.msgpack.decode(body, type=JournalRecord)
        except (*UNDECODABLE, Refused) as exc:
            log.error("journal.unreadable", bot=bot, sequence=stored.seq, detail=type(exc).__name__)
            record = JournalRecord()
        return Written(stored.seq, owner, record, stored.time_ms)


def parts_of(messages: Sequence[bytes], limit: int) -> Iterator[tuple[list[bytes], bool]]:
    """Splits the messages of an answer into parts of at most `limit` bytes. Yields each part, and whether its last
    message continues in the next part."""
    part: list[bytes] = []
    size = 0
    for message in messages:
        rest = message
        while len(rest) + MESSAGE_BYTES > limit:
            if part:
                yield part, False
                part, size = [], 0
            yield [rest[: limit - MESSAGE_BYTES]], True
            rest = rest[limit - MESSAGE_BYTES :]
        if part and size + len(rest) + MESSAGE_BYTES > limit:
            yield part, False
            part, size = [], 0
        part.append(rest)
        size += len(rest) + MESSAGE_BYTES
    yield part, False
