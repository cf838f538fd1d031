"""Entries: what is stored of one answer of iLink in a person's subject, `wechat.inbox.<sandbox>.<person>`.

An entry has the messages of the answer as agents read them, and the state after it: which messages are known, the
window that the last of them opened, and, sealed, context token, cursor and references of media. The newest entry of
a subject is all that the next owner needs to know of what came in. An entry with `ended` is the end of a person's
time: nothing of that time is stored behind it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from adapter.bridge.window import InboundReceived
from adapter.contract.records import PrivateRecord
from adapter.errors import UNDECODABLE, Refused, Unreadable
from adapter.ports import MediaRef, StoredMessage
from adapter.tools.decoding import decode_record
from adapter.tools.seal import Sealer, entry_context

MESSAGES = 100
"""Most messages in one entry. A longer answer is stored as several, one after the other."""


class OpenedWindow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The message that opened the person's window last."""

    id: str = ""
    """Of the message, on the bus; "": none has."""
    written_ms: int = 0
    """By WeChat's clock; 0: unknown."""
    received_ms: int = 0


class Secrets(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """The sealed part of an entry."""

    token: str = ""
    """The newest context token of the person."""
    cursor: str = ""
    """iLink's cursor for the next poll."""
    bots: tuple[str, ...] = ()
    """Bots that brought messages of the person before `bot`, the latest last."""
    media: tuple[tuple[int, tuple[MediaRef, ...]], ...] = ()
    """By message of this entry: where its media are on iLink's CDN."""

    def __repr__(self) -> str:
        return "Secrets()"  # keeps tokens and keys out of logs and tracebacks


class Entry(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """The stored form."""

    since: int
    """Sequence of the bind that began the person's time."""
    ended: bool = False
    erased: bool = False
    """The time ended by an erasure: what comes later is dropped, and not kept as a dead letter."""
    nonce: str = ""
    """Tells the writer its own entry."""
    user: str = ""
    """Who wrote the messages; "" if nobody knows yet."""
    bot: str = ""
    """The bot of the state; each message names its own."""
    seen: bytes = b""
    """Fingerprints of the messages of the last hour (`contract.repeats`)."""
    window: OpenedWindow = OpenedWindow()
    sealed: bytes = b""
    messages: list[msgspec.Raw] = []  # noqa: RUF012 - msgspec copies it


class StoredEntry(NamedTuple):
    """An entry and its sequence. `secrets` is None if no known key opens them."""

    sequence: int
    entry: Entry
    secrets: Secrets | None

    def opened(self) -> InboundReceived | None:
        """What opened the window, for `window.open_window`; None: nothing did, or it cannot be opened."""
        window = self.entry.window
        if not window.id or self.secrets is None:
            return None
        return InboundReceived(
            message=window.id,
            token=self.secrets.token,
            written_ms=window.written_ms,
            received_ms=window.received_ms,
        )


_encode = msgspec.json.Encoder().encode
_encode_secrets = msgspec.msgpack.Encoder().encode
_decode_secrets = msgspec.msgpack.Decoder(Secrets).decode


def new_nonce() -> str:
    return os.urandom(8).hex()


def encode_entry(entry: Entry, state: Secrets, subject: str, sealer: Sealer) -> bytes:
    """The payload of an entry for `subject`."""
    sealed = sealer.seal_bytes(entry_context(subject, entry.since), _encode_secrets(state))
    return _encode(msgspec.structs.replace(entry, sealed=sealed))


def encode_end(since: int, *, erased: bool = False) -> bytes:
    """The payload of the entry that ends a person's time."""
    return _encode(Entry(since=since, ended=True, erased=erased, nonce=new_nonce()))


def read_entry(stored: StoredMessage, sealer: Sealer) -> StoredEntry:
    """Raises RecordTooNew; Unreadable for what the adapter did not write."""
    try:
        entry = decode_record(stored.data, Entry, subject=stored.subject)
    except UNDECODABLE as exc:
        raise Unreadable("entry", f"{stored.subject} {stored.seq}: {type(exc).__name__}") from exc
    if entry.ended:
        return StoredEntry(stored.seq, entry, Secrets())
    try:
        plain = sealer.open_bytes(entry_context(stored.subject, entry.since), entry.sealed)
        return StoredEntry(stored.seq, entry, _decode_secrets(plain))
    except (Refused, *UNDECODABLE):
        return StoredEntry(stored.seq, entry, None)


class Clear(msgspec.Struct):
    """What an entry has in clear, whatever its version, and whatever key sealed the rest; a record has `since`."""

    since: int = 0
    """0: it cannot be read."""
    ended: bool = False
    erased: bool = False
    messages: list[msgspec.Raw] = []


_decode_clear = msgspec.json.Decoder(Clear).decode


def clear_of(data: bytes) -> Clear:
    """Of what the adapter has not written: nothing."""
    try:
        return _decode_clear(data)
    except UNDECODABLE:
        return Clear()


def messages_of(data: bytes) -> Sequence[msgspec.Raw]:
    """The messages of an entry; none of one that cannot be read."""
    return clear_of(data).messages


def fitting(sizes: Sequence[int], most_bytes: int) -> int:
    """How many of these messages go into the next entry: the first one, and what fits behind it."""
    size = 0
    for number, added in enumerate(sizes[:MESSAGES]):
        size += added
        if number and size > most_bytes:
            return number
    return min(len(sizes), MESSAGES)
