"""Detects duplicate inbound messages. Pure; the state is in the bot's journal.

iLink repeats messages between 1 s and an hour later, with some or all ids changed and without a sign. A user who
writes "ok" twice must be heard twice (docs/reference/ilink-protocol.md, "Redelivery" and "Rules for a client").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

KEEP_MS = 24 * 3600 * 1000
KEEP_LONG = 200
"""Messages of a bot that are remembered for KEEP_MS: about 15 kB in its journal."""
RECENT_MS = 75 * 60 * 1000
"""Time for which messages are remembered beyond KEEP_LONG: iLink repeats up to an hour later, a page at a time."""
KEEP_AT_MOST = 600
"""Most messages that are remembered of a busy user: about 50 kB."""
MERGED_AT_ONCE = 32
HASH = 6
"""Bytes of a hash in a record."""
_BLANK = hashlib.blake2b(digest_size=HASH)
_NAMELESS = "\0"
"""Entry of an index for a message without an id."""
SAME_TIME_MS = 1000
"""Two messages without any id are the same if their times differ by less than this."""


class MessageKeys(msgspec.Struct, frozen=True, gc=False):
    """Identity of an inbound message; "" for what iLink did not give."""

    message: str
    client: str
    seq: str
    user: str
    sent_at_ms: int
    content: str
    hashed: tuple[str, str, str, str] = ("", "", "", "")
    """Ids and content with a bounded size, derived from the other fields."""

    def __post_init__(self) -> None:
        message, client, seq = self.message, self.client, self.seq
        hashed = (
            _hash_of(message) if message else "",
            _hash_of(client) if client else "",
            _hash_of(seq) if seq else "",
            _hash_of(f"{self.user}|{self.content}"),
        )
        msgspec.structs.force_setattr(self, "hashed", hashed)

    def id_for(self, bot: str) -> str:
        """The message's id on the bus and its Nats-Msg-Id: the first known layer, never random.

        A `seq` need not be unique: another content with the same one is another message.
        """
        layers = (("m", self.message), ("c", self.client), ("s", self.seq and f"{self.seq}-{self.hashed[3]}"))
        for letter, value in layers:
            if value and len(value) <= 64 and _is_plain(value):
                return f"in:{bot}:{letter}{value}"
            if value:
                return f"in:{bot}:{letter}{_hash_of(value)}"
        return f"in:{bot}:f{_hash_of(f'{self.user}|{self.sent_at_ms}|{self.content}')}"

    def with_position(self, cursor: str, number: int) -> MessageKeys:
        """Adds the position in iLink's answer as an id, if the message has neither an id nor a time.

        `cursor`: that of the answer, which is the same when the page is repeated. `number`: index in the answer.
        """
        if self.message or self.client or self.seq or self.sent_at_ms:
            return self
        return msgspec.structs.replace(self, client=f"place-{_hash_of(f'{number}|{cursor}')}")

    def fingerprint(self, seen_at_ms: int) -> str:
        """One line of the state: times in base 10, ids hashed to bound the size."""
        message, client, seq, content = self.hashed
        return f"{message}|{client}|{seq}|{content}|{self.sent_at_ms}|{seen_at_ms}"


def bot_of(ident: str) -> str:
    """The bot that received an inbound message, from its id on the bus; "" for any other id."""
    kind, _, rest = ident.partition(":")
    bot, colon, _ = rest.partition(":")
    return bot if kind == "in" and colon else ""


class _ParsedFingerprint(NamedTuple):
    message: str
    client: str
    seq: str
    content: str
    sent_at_ms: int
    seen_at_ms: int


class _Records:
    """Records of messages, oldest first, as one text that is searched as such: each of thousands of bots has some,
    and objects would take ten times the memory."""

    __slots__ = ("_contents", "_lines", "_messages", "count")

    def __init__(self) -> None:
        self._lines = "\n"
        """All records, each between line ends."""
        self._messages = self._contents = ""
        """A character for each record's id and content, made of 16 bits of the hash. What is missing here need not be
        searched in the lines. A text finds a character 25 times as fast as bytes find a hash."""
        self.count = 0

    def lines(self) -> list[str]:
        return self._lines.split()

    def is_repeat(self, keys: MessageKeys) -> bool:
        """Whether this is a repeat of one of the messages."""
        message, _, _, content = keys.hashed
        if message and _character(message) in self._messages and f"\n{message}|" in self._lines:
            return True
        if _character(content) not in self._contents:
            return False
        probe = _ParsedFingerprint(*keys.hashed, keys.sent_at_ms, 0)
        return any(_is_same_message(probe, known) for known in self._known_with_content(probe.content))

    def _known_with_content(self, content: str) -> Iterator[_ParsedFingerprint]:
        """The records with this content, by its hash."""
        marker, at = f"|{content}|", -1
        while (at := self._lines.find(marker, at + 1)) >= 0:
            line = self._lines[self._lines.rindex("\n", 0, at) + 1 : self._lines.index("\n", at)]
            if (known := _parse_fingerprint(line)).content == content:
                yield known

    def append(self, records: list[tuple[str, tuple[str, str, str, str]]]) -> None:
        """Appends records with their hashes."""
        self._lines += "".join([f"{record}\n" for record, _ in records])
        self._messages += "".join([_character(hashes[0]) if hashes[0] else _NAMELESS for _, hashes in records])
        self._contents += "".join([_character(hashes[3]) for _, hashes in records])
        self.count += len(records)

    def extend(self, later: _Records) -> None:
        """Appends all records of `later`."""
        self._lines += later._lines[1:]
        self._messages += later._messages
        self._contents += later._contents
        self.count += later.count

    def forget_old(self, now_ms: int) -> None:
        """Drops records that are too old or too many."""
        count = max(0, self.count - KEEP_AT_MOST)
        end = 0
        for _ in range(count):
            end = self._lines.index("\n", end + 1)
        while count < self.count:
            after = self._lines.index("\n", end + 1)
            horizon_ms = now_ms - (RECENT_MS if self.count - count > KEEP_LONG else KEEP_MS)
            if _parse_fingerprint(self._lines[end + 1 : after]).seen_at_ms >= horizon_ms:
                break
            count, end = count + 1, after
        self._lines = self._lines[end:]
        self._messages, self._contents = self._messages[count:], self._contents[count:]
        self.count -= count


class DedupWindow:
    """The recent messages of one bot, oldest first. `kept`: the stored lines."""

    def __init__(self, kept: Iterable[str] = ()) -> None:
        self._records = _Records()
        self._newest = _Records()
        """The newest messages, fewer than MERGED_AT_ONCE: all records are copied with each addition."""
        self._records.append([(record, _hashes(record)) for record in kept])
        self.unsaved = 0
        """Number of records that are not stored."""
        self.added_count = 0
        """Number of messages added so far."""

    def fingerprints(self) -> list[str]:
        """The state in its stored form."""
        return self._records.lines() + self._newest.lines()

    def is_repeat(self, keys: MessageKeys) -> bool:
        """Whether this is a repeat of a remembered message."""
        return self._newest.is_repeat(keys) or self._records.is_repeat(keys)

    def add_all(self, many: Sequence[MessageKeys], now_ms: int) -> list[str]:
        """Remembers new messages. Returns their records. Old ones are forgotten after some additions."""
        records = [keys.fingerprint(now_ms) for keys in many]
        self._newest.append([(record, keys.hashed) for record, keys in zip(records, many, strict=True)])
        self.added_count += len(records)
        self.unsaved += len(records)
        if self._newest.count >= MERGED_AT_ONCE:
            self.forget_old(now_ms)
        return records

    def forget_old(self, now_ms: int) -> None:
        """Drops what is too old or too much."""
        self._records.extend(self._newest)
        self._newest = _Records()
        self._records.forget_old(now_ms)
        self.unsaved = min(self.unsaved, self._records.count)


class BatchDedup:
    """The messages of one answer of iLink, possibly thousands, for lookups among themselves."""

    def __init__(self) -> None:
        self._messages: set[str] = set()
        self._by_content: dict[str, list[MessageKeys]] = {}

    def is_repeat(self, keys: MessageKeys) -> bool:
        """As DedupWindow.is_repeat."""
        message, _, _, content = keys.hashed
        if message in self._messages:
            return True
        alike = self._by_content.get(content)
        if alike is None:
            return False
        probe = _ParsedFingerprint(*keys.hashed, keys.sent_at_ms, 0)
        return any(_is_same_message(probe, _ParsedFingerprint(*other.hashed, other.sent_at_ms, 0)) for other in alike)

    def add(self, keys: MessageKeys) -> None:
        message, _, _, content = keys.hashed
        if message:
            self._messages.add(message)
        self._by_content.setdefault(content, []).append(keys)


def _is_same_message(new: _ParsedFingerprint, old: _ParsedFingerprint) -> bool:
    """Whether `new`, with the content of `old`, is the same message: ids first, then the time of writing."""
    if new.client and new.client == old.client:
        return True
    if not new.message and not new.client and new.seq and new.seq == old.seq:
        return True
    if not new.sent_at_ms:
        return False
    apart_ms = abs(new.sent_at_ms - old.sent_at_ms)
    nameless = not (new.message and old.message) and not (new.client and old.client)
    return apart_ms == 0 or (nameless and apart_ms < SAME_TIME_MS)


def _parse_fingerprint(record: str) -> _ParsedFingerprint:
    message, client, seq, content, sent, seen = record.split("|")
    return _ParsedFingerprint(message, client, seq, content, int(sent), int(seen))


def _is_plain(ident: str) -> bool:
    """Whether a NATS header keeps the id as it is; it collapses or strips other spaces than single inner ones."""
    return ident.isascii() and ident.isprintable() and " " not in ident


def _hash_of(text: str) -> str:
    hashed = _BLANK.copy()  # cheaper than a new one
    hashed.update(text.encode())
    return hashed.hexdigest()


def _character(hashed: str) -> str:
    """The character of a hash in an index."""
    return chr(int(hashed[:4], 16))


def _hashes(record: str) -> tuple[str, str, str, str]:
    """The hashes in a record. Raises ValueError for an invalid record, before a later search meets it."""
    message, client, seq, content, _, _ = _parse_fingerprint(record)
    if len(bytes.fromhex(content)) != HASH or (message and len(bytes.fromhex(message)) != HASH):
        raise ValueError("not a hash")
    return message, client, seq, content
