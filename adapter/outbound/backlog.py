"""Fair shares: which of a shard's commands are taken into memory, and which stay on the bus for now.

All are delivered, so that none waits behind a sandbox that has sent thousands. Of those for which there
is no room only the sequence is kept; they are read back in order as those before them are settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from adapter.ports import Delivery

SHARE, SHARE_BYTES = 16, 128 * 1024
"""What a sandbox may have in memory although others fill the room: commands, and bytes of them (one is taken, however
large it is)."""
ROOM, ROOM_BYTES = 512, 8 * 1024 * 1024
"""As long as a shard has less in memory than this, a sandbox may have more than its share."""
PAGE = 32
"""Commands read back at once."""


class _Held(NamedTuple):
    subject: str
    size: int


class Backlog:
    """What waits and what is in hand for one shard. Sandboxes are keyed by the subject of their stored commands."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        """In hand, by sequence."""
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._total_bytes = 0
        self._left: dict[str, dict[int, Delivery]] = {}
        """Delivered, not in hand and without their data: by subject and sequence, in order."""

    @property
    def waiting(self) -> int:
        """Commands that are delivered and not in hand."""
        return sum(len(left) for left in self._left.values())

    def oldest_ms(self) -> int | None:
        """When the oldest of them was stored."""
        return min((next(iter(left.values())).time_ms for left in self._left.values()), default=None)

    def came_again(self, delivery: Delivery) -> bool:
        """Whether the command waits already; then its newest delivery is the one that counts."""
        left = self._left.get(delivery.subject, {})
        if delivery.seq not in left:
            return False
        left[delivery.seq] = _without_data(delivery)
        return True

    def takes(self, delivery: Delivery) -> bool:
        """Takes a new command in hand; False: it waits on the bus, behind others of its sandbox."""
        subject = delivery.subject
        if subject in self._left or not self._has_room(subject):
            self._left.setdefault(subject, {})[delivery.seq] = _without_data(delivery)
            return False
        self._hold(delivery)
        return True

    def next(self, subject: str) -> int | None:
        """The sequence of the first command that waits, if there is room for it."""
        left = self._left.get(subject)
        return next(iter(left)) if left and self._has_room(subject) else None

    def last(self, subject: str) -> int:
        """The sequence of the last one that waits; 0: none does."""
        return next(reversed(self._left.get(subject, {})), 0)

    def take_back(self, subject: str, seq: int, data: bytes, headers: dict[str, str]) -> Delivery | None:
        """Takes a waiting command in hand; None if it does not wait any more."""
        delivery = self._drop(subject, seq)
        if delivery is not None:
            delivery.data, delivery.headers = data, headers
            self._hold(delivery)
        return delivery

    def missing(self, subject: str, found: set[int], up_to: int) -> list[int]:
        """Those that wait up to a sequence, and that are not among what the stream had."""
        return [seq for seq in self._left.get(subject, {}) if seq <= up_to and seq not in found]

    def forget(self, subject: str, gone: Iterable[int]) -> None:
        """These do not wait any more."""
        for seq in gone:
            self._drop(subject, seq)

    def settle(self, seq: int) -> str:
        """Counts one less in hand; the subject of which more should be read back now, or ""."""
        held = self._held.pop(seq, None)
        if held is None:
            return ""
        self._count[held.subject] -= 1
        self._bytes[held.subject] -= held.size
        self._total_bytes -= held.size
        if not self._count[held.subject]:
            del self._count[held.subject], self._bytes[held.subject]
        if (subject := held.subject) not in self._left:
            return ""
        # for every single one it would be read too often
        half_share = self._count[subject] <= SHARE // 2 and self._bytes[subject] <= SHARE_BYTES // 2
        half_room = len(self._held) <= ROOM // 2 and self._total_bytes <= ROOM_BYTES // 2
        return subject if half_share or half_room else ""

    def _in_share(self, subject: str) -> bool:
        return self._count[subject] < SHARE and self._bytes[subject] < SHARE_BYTES

    def _has_room(self, subject: str) -> bool:
        return self._in_share(subject) or (len(self._held) < ROOM and self._total_bytes < ROOM_BYTES)

    def _hold(self, delivery: Delivery) -> None:
        size = len(delivery.data)
        self._held[delivery.seq] = _Held(delivery.subject, size)
        self._count[delivery.subject] += 1
        self._bytes[delivery.subject] += size
        self._total_bytes += size

    def _drop(self, subject: str, seq: int) -> Delivery | None:
        left = self._left.get(subject, {})
        delivery = left.pop(seq, None)
        if not left:
            self._left.pop(subject, None)
        return delivery


def _without_data(delivery: Delivery) -> Delivery:
    delivery.data, delivery.headers = b"", {}
    return delivery
