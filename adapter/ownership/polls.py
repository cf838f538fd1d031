"""Who polls which bot: bucket `polls`, key: the bot. A shard is given away at once while its polls leave last, so the
next owner of the shard waits for the name of the former one to leave the key, by `Polls.take`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
import structlog

from adapter.contract.names import to_subject_token
from adapter.contract.records import PollRecord
from adapter.errors import UNDECODABLE, Conflict, LeaseLost
from adapter.kit.batches import Batches
from adapter.observability.decoding import decode_record
from adapter.ownership.leases import Leases
from adapter.ports import Bucket, Entry

log = structlog.get_logger()


class PollClaim:
    """This replica's right to poll one bot. Implements kit.persist.Owner."""

    def __init__(self, bot: str, record: PollRecord, revision: int, bucket: Bucket, leases: Leases) -> None:
        self.bot = bot
        self.sealed = record.sealed
        """The cursor of before the bot was bound; empty: none is known."""
        self.owner = leases.incarnation
        self._revision = revision
        self._bucket = bucket
        self._leases = leases
        self._is_taken = False
        """Somebody else has written the key."""

    def check(self) -> None:
        """Raises LeaseLost unless this replica may poll the bot now. It may while it is alive, even if it has handed
        the shard over, since no other replica takes the bot before its release."""
        if self._is_taken or not self._leases.is_valid or self._leases.incarnation != self.owner:
            raise LeaseLost("lease_lost", self.bot)

    async def valid(self) -> None:
        """Waits out a pause of the lease. Raises LeaseLost once the bot may be another replica's."""
        leases = self._leases
        await leases.changed.wait_until(lambda: leases.is_valid or leases.incarnation != self.owner)
        self.check()

    async def release(self, *, sealed: bytes = b"", ttl_s: int = 0) -> None:
        """Takes this replica's name from the key. `sealed`: the cursor of a bot that is not bound any more. `ttl_s`:
        the key's time to live; 0: no limit. Raises LeaseLost if another replica has taken the bot, Temporary."""
        value = msgspec.json.encode(PollRecord(sealed=sealed))
        try:
            await self._bucket.update(to_subject_token(self.bot), value, self._revision, ttl_s=ttl_s)
        except Conflict as exc:
            self._is_taken = True
            raise LeaseLost("bot_taken", self.bot) from exc


class Polls:
    """Reads and writes the bucket."""

    def __init__(self, bucket: Bucket, leases: Leases) -> None:
        self._bucket = bucket
        self._leases = leases
        self._reads = Batches(self._read_all)

    async def owner(self, bot: str) -> str:
        """The incarnation that polls a bot; "": none. Raises Temporary, RecordTooNew."""
        return (await self._read(bot))[0].owner

    async def take(self, bot: str) -> PollClaim | str:
        """The right to poll a bot, or the incarnation that has not released it. Raises Temporary, RecordTooNew."""
        record, revision = await self._read(bot)
        mine = self._leases.incarnation
        if record.owner not in ("", mine) and not await self._leases.revoke_if_expired(record.owner):
            return record.owner
        if record.owner != mine:
            value = msgspec.json.encode(PollRecord(owner=mine, sealed=record.sealed))
            try:
                revision = await self._bucket.update(to_subject_token(bot), value, revision)
            except Conflict:
                return "another replica"
        return PollClaim(bot, record, revision, self._bucket, self._leases)

    async def clear_idle(self, bot: str, is_idle: Callable[[str, str], Awaitable[bool]]) -> bool:
        """Removes the name of a replica that does not poll the bot. Returns whether it did.

        The name may be outdated after a restore or the loss of the last writes; then nobody would ever release the
        bot. Raises Temporary.
        """
        record, revision = await self._read(bot)  # not later: one that begins to poll meanwhile writes the key
        if not record.owner or not await is_idle(record.owner, bot):
            return False
        log.error("poll.outdated", bot=bot, owner=record.owner, detail="The owner does not poll the bot.")
        value = msgspec.json.encode(PollRecord(sealed=record.sealed))
        try:
            await self._bucket.update(to_subject_token(bot), value, revision)
        except Conflict:
            return False
        return True

    async def _read(self, bot: str) -> tuple[PollRecord, int]:
        """The record and its revision."""
        entry = await self._reads.get(to_subject_token(bot))
        if entry is None or entry.value is None:
            return PollRecord(), entry.revision if entry else 0
        try:
            return decode_record(entry.value, PollRecord, bot=bot), entry.revision
        except UNDECODABLE as exc:
            log.error("poll.unreadable", bot=bot, detail=type(exc).__name__)
            return PollRecord(), entry.revision

    async def _read_all(self, keys: Sequence[str]) -> Mapping[str, Entry]:
        return {entry.key: entry for entry in await self._bucket.get_all(keys)}
