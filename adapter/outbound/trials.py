"""Reads what the owner before may have died of, and notes it in the bus while it is read.

The server's count of deliveries does not survive a take-over, which resets the consumer. So an owner whose
predecessor died notes that it reads what was delivered to that one: thousands of commands, mostly. An owner that
finds this note reads one command at a time, and notes which; who comes after it finds that note. A command that was
found so by several owners, one after the other, is read by nobody any more.
"""

from __future__ import annotations

import msgspec

from adapter.contract.records import Reading
from adapter.errors import UNDECODABLE, BusRefused, Temporary
from adapter.ports import Bucket, Delivery

OWNERS = 3
"""Owners that a command may end once it is suspected, that one among them which noted no single command."""


class Trials:
    """The note of one shard, written by its owner alone. Nothing is read or written before the first trial."""

    def __init__(self, bucket: Bucket, shard: int) -> None:
        self._bucket = bucket
        self._key = f"reading.{shard}"
        self._found: Reading | None = None
        """What the owners before left."""
        self._revision: int | None = None
        self._is_noted = False

    @property
    def is_of_all(self) -> bool:
        """Whether the note that was written is one of all that was delivered to the owner before."""
        return self._is_noted and self._found == Reading()

    async def begin(self, delivery: Delivery) -> bool:
        """Notes that a command is read from now on; False: it has ended too many owners. Raises Temporary."""
        found = await self._look()
        if found == Reading():
            if not self._is_noted:
                await self._note(Reading(owners=1))
            return True
        is_known = (found.seq, found.time_ms) == (delivery.seq, delivery.time_ms)
        owners = found.owners if is_known else 1
        if owners >= OWNERS:
            return False
        await self._note(Reading(seq=delivery.seq, time_ms=delivery.time_ms, owners=owners + 1))
        return True

    async def end(self) -> None:
        """Nothing that is tried is read any more. Raises Temporary."""
        if self._is_noted:
            await self._write(Reading())
            self._is_noted, self._found = False, Reading()

    async def _note(self, reading: Reading) -> None:
        """Raises Temporary."""
        await self._write(reading)
        self._is_noted = True

    async def _look(self) -> Reading:
        """Raises Temporary."""
        if self._revision is None or self._found is None:
            entry = await self._bucket.get(self._key)
            self._revision = entry.revision if entry else 0
            self._found = self._found or _reading_in(entry.value if entry else None)
        return self._found

    async def _write(self, reading: Reading) -> None:
        """Raises Temporary."""
        try:
            self._revision = await self._bucket.update(self._key, msgspec.json.encode(reading), self._revision or 0)
        except BusRefused as exc:  # a conflict: another owner's, or one of ours whose answer got lost
            self._revision = None
            raise Temporary("reading_unnoted", exc.detail) from exc


def _reading_in(value: bytes | None) -> Reading:
    try:
        return msgspec.json.decode(value, type=Reading) if value else Reading()
    except UNDECODABLE:  # another hand's
        return Reading()
