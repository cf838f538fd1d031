"""Detects duplicate inbound messages. Pure; the state is in the person's newest entry.

iLink repeats messages between 1 s and an hour later, with some or all ids changed and without a sign. A user who
writes "ok" twice must be heard twice (docs/reference/ilink-protocol.md, "Redelivery" and "Rules for a client").
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Any

import msgspec

KEEP = 64
"""Most messages of a person that are remembered, unless one answer has more."""
KEEP_MS = 3_600_000
"""Time for which they are remembered."""
HASH = 6
"""Bytes of a hash."""
_RECORD = struct.Struct(f">{HASH}s{HASH}s{HASH}s{HASH}sQQ")
"""A fingerprint: hashes of the three ids and of the content (zeros for what iLink did not give), and the milliseconds
at which it was sent and seen."""
SIZE = _RECORD.size
"""Bytes of a fingerprint."""
_ABSENT = bytes(HASH)
SAME_TIME_MS = 1000
"""Two messages without any id are the same if their times differ by less than this."""


class MessageKeys(msgspec.Struct, gc=False):
    """Identity of an inbound message; "" for what iLink did not give."""

    message: str
    client: str
    seq: str
    user: str
    sent_at_ms: int
    content: str
    hashed: tuple[bytes, bytes, bytes, bytes] = (_ABSENT, _ABSENT, _ABSENT, _ABSENT)
    """Ids and content with a bounded size, derived from the other fields."""

    def __post_init__(self) -> None:
        message, client, seq = self.message, self.client, self.seq
        self.hashed = (
            _hash_of(message) if message else _ABSENT,
            _hash_of(client) if client else _ABSENT,
            _hash_of(seq) if seq else _ABSENT,
            _hash_of(f"{self.user}|{self.content}"),
        )

    def id_for(self, bot: str) -> str:
        """The message's id on the bus, without the sandbox: the first known layer, never random.

        A `seq` need not be unique: another content with the same one is another message.
        """
        if value := self.message:
            letter = "m"
        elif value := self.client:
            letter = "c"
        elif value := self.seq:
            letter, value = "s", f"{value}-{self.hashed[3].hex()}"
        else:
            return f"in:{bot}:f{_hash_of(f'{self.user}|{self.sent_at_ms}|{self.content}').hex()}"
        # a NATS header collapses or strips other spaces than single inner ones
        is_plain = len(value) <= 64 and value.isascii() and value.isprintable() and " " not in value
        return f"in:{bot}:{letter}{value if is_plain else _hash_of(value).hex()}"

    def with_position(self, cursor: str, number: int) -> MessageKeys:
        """Adds the position in iLink's answer as an id, if the message has neither an id nor a time.

        `cursor`: that of the answer, which is the same when the page is repeated. `number`: index in the answer.
        """
        if self.message or self.client or self.seq or self.sent_at_ms:
            return self
        return msgspec.structs.replace(self, client=f"place-{_hash_of(f'{number}|{cursor}').hex()}")

    def fingerprint(self, seen_at_ms: int) -> bytes:
        """What is remembered of the message, SIZE bytes."""
        return _RECORD.pack(*self.hashed, self.sent_at_ms, seen_at_ms)


def bot_of(ident: str) -> str:
    """The bot that received an inbound message, from its id on the bus; "" for any other id."""
    kind, _, rest = ident.partition(":")
    bot, colon, _ = rest.partition(":")
    return bot if kind == "in" and colon else ""


class DedupWindow:
    """The recent messages of one person, as fingerprints in a row, as they are stored."""

    def __init__(self, prints: bytes = b"") -> None:
        """`prints`: what `kept` gave; anything else counts as nothing."""
        self._prints = prints if len(prints) % SIZE == 0 else b""

    def is_repeat(self, keys: MessageKeys) -> bool:
        """Whether this is a repeat of a remembered message."""
        message, _, _, content = keys.hashed
        if content not in self._prints and (message == _ABSENT or message not in self._prints):
            return False  # nearly all, found in a fraction of the time
        new = (*keys.hashed, keys.sent_at_ms, 0)
        return any(_is_same_message(new, old) for old in _RECORD.iter_unpack(self._prints))

    def __len__(self) -> int:
        return len(self._prints) // SIZE

    def __contains__(self, line: bytes) -> bool:
        """Whether a fingerprint is remembered."""
        return line in self._prints

    def add(self, prints: Iterable[bytes], most: int = KEEP) -> None:
        """Remembers new messages, oldest first, and at least the newest `most`."""
        self._prints = b"".join((self._prints, *prints))
        if len(self._prints) > 2 * most * SIZE:
            self._prints = self._prints[-most * SIZE :]

    def kept(self, now_ms: int, most: int = KEEP) -> bytes:
        """The state in its stored form, without what is too old or too much."""
        start = max(0, len(self._prints) - most * SIZE)
        while start < len(self._prints) and _RECORD.unpack_from(self._prints, start)[5] < now_ms - KEEP_MS:
            start += SIZE
        return self._prints[start:]


def lines_of(prints: bytes) -> list[bytes]:
    """Fingerprints one by one; none of what is no row of fingerprints."""
    return [prints[at : at + SIZE] for at in range(0, len(prints), SIZE)] if len(prints) % SIZE == 0 else []


def _is_same_message(new: tuple[Any, ...], old: tuple[Any, ...]) -> bool:
    """Whether it is the same message: iLink's id, or the same content with another id or time. Both are fingerprints
    as in `_RECORD`."""
    message, client, seq, content, sent_at_ms, _ = new
    old_message, old_client, old_seq, old_content, old_sent_at_ms, _ = old
    if message == old_message != _ABSENT:
        return True
    if content != old_content:
        return False
    if client != _ABSENT and client == old_client:
        return True
    if message == client == _ABSENT and seq != _ABSENT and seq == old_seq:
        return True
    if not sent_at_ms:
        return False
    apart_ms = abs(sent_at_ms - old_sent_at_ms)
    nameless = _ABSENT in (message, old_message) and _ABSENT in (client, old_client)
    return apart_ms == 0 or (apart_ms < SAME_TIME_MS and nameless)


def _hash_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH).digest()
