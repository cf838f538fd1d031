"""Which inbound messages are repeats (ilink-protocol 7.3). Pure; the state lives beside the bot's cursor.

iLink repeats messages from 1 s to an hour later, with some or all ids changed, and never says so; a user who
says "ok" twice must be heard twice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

KEEP_MS = 24 * 3600 * 1000
KEEP_AT_MOST = 200
"""Messages remembered per bot: bounds the cursor's record to about 10 kB."""
NEAR_MS = 1000
"""Two messages without any id are one if their times are nearer than this."""


class Keys(NamedTuple):
    """What identifies an inbound message; "" where iLink gave none."""

    message: str
    client: str
    seq: str
    user: str
    sent_at_ms: int
    content: str

    def id_for(self, bot: str) -> str:
        """The message's id on the bus and its Nats-Msg-Id: the first layer that is known, never a random one."""
        layers = (("m", self.message), ("c", self.client), ("s", self.seq))
        for letter, value in layers:
            if value and len(value) <= 64:
                return f"in:{bot}:{letter}{value}"
            if value:
                return f"in:{bot}:{letter}{_short(value)}"
        return f"in:{bot}:f{_short(f'{self.user}|{self.sent_at_ms}|{self.content}')}"

    def record(self, seen_at_ms: int) -> str:
        """One line of the state: times in base 10, ids hashed to bound the size."""
        ids = (_short(value) if value else "" for value in (self.message, self.client, self.seq))
        return "|".join((*ids, _short(f"{self.user}|{self.content}"), str(self.sent_at_ms), str(seen_at_ms)))


class _Known(NamedTuple):
    message: str
    client: str
    seq: str
    said: str
    sent_at_ms: int
    seen_at_ms: int
    record: str


class Seen:
    """The messages of one bot that were taken lately, oldest first."""

    def __init__(self, records: Iterable[str] = (), *, skew_ms: int = 0, keep: int = KEEP_AT_MOST) -> None:
        self._keep = keep
        self._skew_ms = skew_ms
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._by_message: dict[str, _Known] = {}
        self._by_said: dict[str, list[_Known]] = {}
        for record in records:
            self._insert(record)

    def records(self) -> list[str]:
        """The state as it is stored."""
        return list(self._known)

    def has(self, keys: Keys) -> bool:
        """Tells whether this is a repeat of a message taken before."""
        probe = _parse(keys.record(0))
        if probe.message and probe.message in self._by_message:
            return True
        return any(self._same(probe, known) for known in self._by_said.get(probe.said, ()))

    def _same(self, new: _Known, old: _Known) -> bool:
        """Whether `new`, with the words of `old`, is `old` again: ids first, then the time of writing."""
        if new.client and new.client == old.client:
            return True
        if not new.message and not new.client and new.seq and new.seq == old.seq:
            return True
        apart_ms = abs(new.sent_at_ms - old.sent_at_ms)
        if new.sent_at_ms and apart_ms <= self._skew_ms:
            return True
        nameless = not (new.message and old.message) and not (new.client and old.client)
        return nameless and bool(new.sent_at_ms) and apart_ms < NEAR_MS

    def add(self, keys: Keys, now_ms: int) -> str:
        """Remembers a message; returns its record."""
        record = keys.record(now_ms)
        self.add_record(record, now_ms)
        return record

    def add_record(self, record: str, now_ms: int) -> None:
        """Remembers a message by its record, as found on the bus."""
        self._insert(record)
        while len(self._known) > self._keep:
            self._forget()
        while self._known and next(iter(self._known.values())).seen_at_ms < now_ms - KEEP_MS:
            self._forget()

    def _insert(self, record: str) -> None:
        known = _parse(record)
        if record in self._known:
            return
        self._known[record] = known
        if known.message:
            self._by_message[known.message] = known
        self._by_said.setdefault(known.said, []).append(known)

    def _forget(self) -> None:
        _, known = self._known.popitem(last=False)
        if known.message and self._by_message.get(known.message) is known:
            del self._by_message[known.message]
        alike = self._by_said[known.said]
        alike.remove(known)
        if not alike:
            del self._by_said[known.said]


def _parse(record: str) -> _Known:
    message, client, seq, said, sent, seen = record.split("|")
    return _Known(message, client, seq, said, int(sent), int(seen), record)


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def digest(data: bytes) -> str:
    """A short name for bytes, the same wherever they are seen."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()
