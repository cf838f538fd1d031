"""The journal: what iLink handed over for each bot, and who polls it, one record after the other.

Stream WECHAT_JOURNAL, subject `wechat.journal.<bot>`. Each record is written by compare-and-set on its subject's last
sequence. So a record is checkpoint and fence at once: it has iLink's cursor and the owner's name, and whoever has
written since makes the next write of the owner before fail. Nothing of an answer is told before its record is stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import structlog

from adapter.contract.names import H_EXPECTED, Names
from adapter.errors import UNDECODABLE, BusRefused, Conflict, Refused, Temporary
from adapter.ports import Bus, History, Message, Stored
from adapter.security.seal import Sealer, journal_context

log = structlog.get_logger()

VERSION = 1
"""Of a record's form. A replica leaves a bot alone whose last record has a higher one."""
MESSAGE_BYTES = 64
"""What a message takes in a record beside its own bytes, at most."""


class JournalRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer of iLink that has messages, a part of one, or a change of who polls the bot. Sealed where it is
    stored: iLink's cursor holds the bot's token."""

    cursor: str = ""
    """iLink's, for the next poll."""
    start: str | None = None
    """Digest of the start cursor that a bind request named and that was applied; "" is the start of all."""
    sandbox: str = ""
    """Which the bot served as iLink answered, and which is told; "": none."""
    received_ms: int = 0
    messages: list[bytes] = []
    """As iLink sent them."""
    is_continued: bool = False
    """The last message goes on in the next record: it is larger than one."""
    is_rest: bool = False
    """The first message is the rest of one that began in an earlier record."""
    place: str = ""
    """Names the answer, by a digest of its cursor; "": it had none."""
    first: int = 0
    """Which message of the answer the first one is."""
    seen: list[str] | None = None
    """What was seen lately (lines of `content.dedup`), up to `done_to`; None: an older record has it."""
    seen_at: int = 0
    """Sequence of the newest record before this one that has `seen`; 0: there is none."""
    seen_to: int = 0
    """Up to where in the journal that one knows what was seen."""
    done_to: int = 0
    """Sequence up to which inboxes and conversations are known to have everything."""
    last_heard: int = 0
    """Sequence of the newest record before this one that has messages; 0: there is none."""

    def __repr__(self) -> str:
        return f"JournalRecord(messages={len(self.messages)})"  # neither texts nor tokens get into a log


class Written(NamedTuple):
    """A record where it is stored."""

    sequence: int
    owner: str
    """Incarnation of the replica that polls the bot; "": nobody does."""
    record: JournalRecord
    time_ms: int = 0
    """When the stream stored it, by the server's clock; 0: not known."""


class Journal:
    """Reads and writes the records of all bots."""

    def __init__(self, bus: Bus, history: History, names: Names, sealer: Sealer) -> None:
        self._bus = bus
        self._history = history
        self._names = names
        self._sealer = sealer

    async def last(self, bot: str) -> Written | None:
        """A bot's newest record, as the stream's leader has it. Raises Temporary."""
        stored = await self._history.read_last(self._names.stream_journal, self._names.journal(bot))
        return None if stored is None else self._read(bot, stored)

    async def get(self, bot: str, sequence: int) -> Written | None:
        """A bot's record; None where it is gone. Raises Temporary."""
        stored = await self._history.get(self._names.stream_journal, sequence)
        return None if stored is None else self._read(bot, stored)

    async def after(self, bot: str, sequence: int) -> AsyncIterator[Written]:
        """The records behind a sequence, oldest first: for few bots, since the server passes over those of all
        others. Raises Temporary."""
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
        """Stores a record if the bot's newest one still has the sequence `expected` (0: there is none); its own.

        A write whose answer got lost is known again where its own repeat meets it: no two have the same bytes in the
        same place. `ttl_s`: the server removes it after so long; 0: never. Raises Conflict, Temporary, BusRefused
        (the record is too large), and what `ensure_owner` raises.
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
        """Raises Temporary."""
        await self._history.delete(self._names.stream_journal, sequence)

    def _read(self, bot: str, stored: Stored) -> Written:
        """A record that cannot be opened or read counts as an empty one of its owner. Raises Temporary for one of a
        later version: the replica that wrote it knows better."""
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
    """The messages of an answer in parts of at most `limit` bytes; whether a part's last one goes on in the next."""
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
