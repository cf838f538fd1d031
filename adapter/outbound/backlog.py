"""Decides which delivered commands of a shard are held in memory, by fair shares of the sandboxes.

All commands are delivered, so that none waits behind a sandbox that has sent thousands. Of a command without room
only the sequence is kept. Its data are read from the bus in order, as earlier commands end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from adapter.ports import Delivery

SHARE, SHARE_BYTES = 16, 128 * 1024
"""Share of a sandbox even if the room is full: commands, and bytes of them. One command is always held, however
large."""
MAX_HELD, MAX_HELD_BYTES = 512, 8 * 1024 * 1024
"""While a shard holds less than this, a sandbox may exceed its share."""
PAGE = 32
"""Most commands read from the bus at once."""


class _Held(NamedTuple):
    subject: str
    size: int


class Backlog:
    """Held and waiting commands of one shard, by the subject of the stored commands."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        """Commands in memory, by sequence."""
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._total_bytes = 0
        self._waiting: dict[str, dict[int, Delivery]] = {}
        """Waiting deliveries without their data, by subject and sequence, in order."""

    @property
    def waiting(self) -> int:
        """Number of waiting commands."""
        return sum(len(waiting) for waiting in self._waiting.values())

    def oldest_ms(self) -> int | None:
        """When the oldest waiting command was stored."""
        return min((next(iter(waiting.values())).time_ms for waiting in self._waiting.values()), default=None)

    def renew(self, delivery: Delivery) -> bool:
        """Replaces the delivery of a waiting command by its redelivery. Returns whether the command waits."""
        waiting = self._waiting.get(delivery.subject, {})
        if delivery.seq not in waiting:
            return False
        waiting[delivery.seq] = _without_data(delivery)
        return True

    def admit(self, delivery: Delivery) -> bool:
        """Holds a new command if there is room. False: it waits behind others of its sandbox."""
        subject = delivery.subject
        if subject in self._waiting or not self._has_room(subject):
            self._waiting.setdefault(subject, {})[delivery.seq] = _without_data(delivery)
            return False
        self._hold(delivery)
        return True

    def next(self, subject: str) -> int | None:
        """Sequence of the subject's first waiting command, if there is room for it."""
        waiting = self._waiting.get(subject)
        return next(iter(waiting)) if waiting and self._has_room(subject) else None

    def last(self, subject: str) -> int:
        """Sequence of the subject's last waiting command; 0: none."""
        return next(reversed(self._waiting.get(subject, {})), 0)

    def reload(self, subject: str, seq: int, data: bytes, headers: dict[str, str]) -> Delivery | None:
        """Holds a waiting command with its data; None: it does not wait any more."""
        delivery = self._drop(subject, seq)
        if delivery is not None:
            delivery.data, delivery.headers = data, headers
            self._hold(delivery)
        return delivery

    def missing(self, subject: str, found: set[int], up_to: int) -> list[int]:
        """Waiting commands up to a sequence that the stream did not have."""
        return [seq for seq in self._waiting.get(subject, {}) if seq <= up_to and seq not in found]

    def forget(self, subject: str, gone: Iterable[int]) -> None:
        """Drops waiting commands."""
        for seq in gone:
            self._drop(subject, seq)

    def settle(self, seq: int) -> str:
        """Releases a held command. Returns the subject to read from the bus now, or ""."""
        held = self._held.pop(seq, None)
        if held is None:
            return ""
        self._count[held.subject] -= 1
        self._bytes[held.subject] -= held.size
        self._total_bytes -= held.size
        if not self._count[held.subject]:
            del self._count[held.subject], self._bytes[held.subject]
        if (subject := held.subject) not in self._waiting:
            return ""
        # reading for each single command would read too often
        is_half_of_share = self._count[subject] <= SHARE // 2 and self._bytes[subject] <= SHARE_BYTES // 2
        is_half_empty = len(self._held) <= MAX_HELD // 2 and self._total_bytes <= MAX_HELD_BYTES // 2
        return subject if is_half_of_share or is_half_empty else ""

    def _in_share(self, subject: str) -> bool:
        return self._count[subject] < SHARE and self._bytes[subject] < SHARE_BYTES

    def _has_room(self, subject: str) -> bool:
        return self._in_share(subject) or (len(self._held) < MAX_HELD and self._total_bytes < MAX_HELD_BYTES)

    def _hold(self, delivery: Delivery) -> None:
        size = len(delivery.data)
        self._held[delivery.seq] = _Held(delivery.subject, size)
        self._count[delivery.subject] += 1
        self._bytes[delivery.subject] += size
        self._total_bytes += size

    def _drop(self, subject: str, seq: int) -> Delivery | None:
        waiting = self._waiting.get(subject, {})
        delivery = waiting.pop(seq, None)
        if not waiting:
            self._waiting.pop(subject, None)
        return delivery


def _without_data(delivery: Delivery) -> Delivery:
    delivery.data, delivery.headers = b"", {}
    return delivery
