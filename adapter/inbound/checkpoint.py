"""The checkpoint of a bot: who polls it, and how far. Bucket `wechat_checkpoints`, key: the bot.

A checkpoint is lazy. iLink repeats what lies behind an old cursor, the fingerprints drop it, and what was published
after the last write is found in the inbox behind `inbox_seq` (`outbound.inbox`). It is also the fence: each write is
a compare-and-set by the owner, so that a replica that lost the bot cannot write any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from adapter.content.dedup import DedupWindow
from adapter.contract.names import digest, to_subject_token
from adapter.contract.records import Binding, CheckpointRecord
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, Refused
from adapter.kit.batches import Batches
from adapter.kit.timing import Clock
from adapter.observability.decoding import decode_record
from adapter.outbound.inbox import FoldedInbox, InboxReader
from adapter.ownership.leases import Leases
from adapter.ports import Bucket, Entry
from adapter.security.seal import Sealer, checkpoint_context, cursor_context

log = structlog.get_logger()

SAVE_AFTER_NEW = 32
"""New messages after which a checkpoint is written."""
SAVE_AFTER_S = 60.0
"""Seconds after which a checkpoint is written that lacks something."""


class _Position(msgspec.Struct, omit_defaults=True):
    """The sealed part of a checkpoint."""

    sandbox: str = ""
    cursor: str = ""
    start: str | None = None
    prints: bytes = b""
    inbox_seq: int = 0


class StoredCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint as the bucket has it."""

    bot: str
    owner: str = ""
    revision: int = 0
    position: _Position = msgspec.field(default_factory=_Position)
    is_unreadable: bool = False


def _open(record: CheckpointRecord, bot: str, sealer: Sealer) -> _Position:
    """Raises Refused, UNDECODABLE."""
    body = sealer.open_bytes(checkpoint_context(bot, record.owner), record.sealed)
    return msgspec.msgpack.decode(body, type=_Position)


def _encode(owner: str, bot: str, position: _Position, sealer: Sealer) -> bytes:
    sealed = sealer.seal_bytes(checkpoint_context(bot, owner), msgspec.msgpack.encode(position))
    return msgspec.json.encode(CheckpointRecord(owner=owner, sealed=sealed))


def lowered_checkpoint(bot: str, value: bytes, last: int, sealer: Sealer) -> bytes | None:
    """A stored checkpoint with `inbox_seq` lowered to `last`; None: it is not above. Raises Refused (no key opens
    it), UNDECODABLE."""
    record = msgspec.json.decode(value, type=CheckpointRecord)
    position = _open(record, bot, sealer)
    if position.inbox_seq <= last:
        return None
    position.inbox_seq = last
    return _encode(record.owner, bot, position, sealer)


class Checkpoints:
    """Reads and writes the checkpoints of all bots."""

    def __init__(self, bucket: Bucket, sealer: Sealer) -> None:
        self._bucket = bucket
        self._sealer = sealer
        self._reads = Batches(self._read_all)

    async def read(self, bot: str) -> StoredCheckpoint:
        """A bot's checkpoint, an empty one of revision 0 if there is none. Raises RecordTooNew, Temporary."""
        entry = await self._reads.get(to_subject_token(bot))
        if entry is None or entry.value is None:
            return StoredCheckpoint(bot, revision=entry.revision if entry else 0)
        owner, position, is_unreadable = "", _Position(), False
        try:
            record = decode_record(entry.value, CheckpointRecord, bot=bot)
            owner = record.owner  # in clear: who polls is known without the key
            position = _open(record, bot, self._sealer)
        except (*UNDECODABLE, Refused) as exc:  # the bot starts anew, and the inbox tells repeats
            log.error("checkpoint.unreadable", bot=bot, detail=type(exc).__name__)
            is_unreadable = True
        return StoredCheckpoint(bot, owner, entry.revision, position, is_unreadable)

    async def exists(self, bot: str) -> bool:
        """Whether the bot has a checkpoint; it has none after its person was erased. Raises Temporary."""
        entry = await self._reads.get(to_subject_token(bot))
        return entry is not None and entry.value is not None

    async def _read_all(self, keys: Sequence[str]) -> Mapping[str, Entry]:
        return {entry.key: entry for entry in await self._bucket.get_all(keys)}

    async def write(
        self,
        stored: StoredCheckpoint,
        *,
        ensure_owner: Callable[[], None] | None = None,
        ttl_s: int = 0,
    ) -> int:
        """Writes a checkpoint if its revision is that of `stored`. Returns the new one. Raises Conflict, Temporary,
        and what `ensure_owner` raises."""
        value, key = _encode(stored.owner, stored.bot, stored.position, self._sealer), to_subject_token(stored.bot)
        return await self._bucket.update(key, value, stored.revision, ttl_s=ttl_s, ensure_owner=ensure_owner)

    async def clear_owner(self, stored: StoredCheckpoint) -> bool:
        """Removes the owner's name; False: the checkpoint was written meanwhile. Raises Temporary."""
        try:
            await self.write(msgspec.structs.replace(stored, owner=""))
        except Conflict:
            return False
        return True


class Checkpoint:
    """The checkpoint of one bot that this replica polls. Only the bot's poller changes it. Implements
    kit.persist.Owner: whoever may write it may publish what the bot got."""

    def __init__(self, stored: StoredCheckpoint, store: Checkpoints, leases: Leases, clock: Clock) -> None:
        self.bot = stored.bot
        self.owner = leases.incarnation
        self._store = store
        self._leases = leases
        self._clock = clock
        position = stored.position
        self.sandbox = position.sandbox
        """The sandbox in whose inbox `inbox_seq` is a sequence."""
        self.cursor = position.cursor
        """iLink's cursor for the next poll."""
        self.inbox_seq = position.inbox_seq
        """Sequence of the sandbox's inbox up to which this bot is covered, whoever wrote there."""
        self.seen = DedupWindow(position.prints)
        self._start = position.start
        """Digest of the start cursor that was applied last, from a bind request; "": none."""
        self.applied: str | None = None
        """The start cursor of the binding that was looked at last."""
        self.is_unreadable = stored.is_unreadable
        """What was stored could not be read; the inbox tells what iLink repeats."""
        self._revision = stored.revision
        self._is_lost = False
        """Another replica has taken the bot."""
        self._new = 0
        """Messages since the last write."""
        self._stale_at: float | None = None
        """Monotonic time since which the stored checkpoint lacks something; None: it lacks nothing."""

    def check(self) -> None:
        """Raises LeaseLost unless this replica may write for the bot now. It may while it is alive, even if it has
        handed the shard over, since no other replica takes the bot before its release."""
        if self._is_lost or not self._leases.is_valid or self._leases.incarnation != self.owner:
            raise LeaseLost("lease_lost", self.bot)

    async def valid(self) -> None:
        """Waits out a pause of the lease. Raises LeaseLost once the bot may be another replica's."""
        await self._leases.changed.wait_until(lambda: self._is_lost or self._leases.is_valid)
        self.check()

    def apply_start_cursor(self, binding: Binding, sealer: Sealer) -> None:
        """Applies the cursor of a bind request, once. An empty one is none."""
        self.applied = binding.start_cursor
        if not binding.start_cursor:
            return
        try:
            start = sealer.open(cursor_context(self.bot), binding.start_cursor)
        except Refused as exc:
            log.error("cursor.unopenable", bot=self.bot, detail=exc.detail)
            return
        mark = digest(start.encode()) if start else ""
        if self._start != mark:
            self.cursor, self._start = start, mark
            self.note()

    async def move(self, sandbox: str, inboxes: InboxReader) -> None:
        """Makes it one of another sandbox, whose inbox has nothing of the bot yet. It must be saved before something
        is published there. Raises Temporary."""
        if (former := self.sandbox) == sandbox:
            return
        newest = await inboxes.newest(sandbox)
        if former and (last := await inboxes.newest(former)) > self.inbox_seq:  # its owner may have died
            known = FoldedInbox(self.inbox_seq, last)
            await inboxes.read(former, self.inbox_seq, last, known)
            self.seen.add(line for _, line in known.seen.get(self.bot, ()))
        self.inbox_seq = 0 if self.is_unreadable and not former else newest
        self.sandbox = sandbox
        self.note()

    def note(self, messages: int = 0) -> None:
        """Notes that the stored checkpoint lacks something: so many messages, or only the cursor."""
        self._new += messages
        if self._stale_at is None:
            self._stale_at = self._clock.monotonic()

    @property
    def is_stale(self) -> bool:
        """Whether the stored checkpoint lacks something."""
        return self._stale_at is not None

    def stale_s(self) -> float:
        """How long the stored checkpoint has lacked something."""
        return 0.0 if self._stale_at is None else self._clock.monotonic() - self._stale_at

    def is_due(self) -> bool:
        return self._new >= SAVE_AFTER_NEW or self.stale_s() > SAVE_AFTER_S

    async def save(self) -> None:
        """Writes the checkpoint. Raises LeaseLost, Temporary, BusRefused."""
        await self._write(self.owner, self.check)

    async def release(self, *, ttl_s: int = 0) -> None:
        """Writes the checkpoint without an owner, even while the lease is not valid, since no other replica takes the
        bot of a living one. `ttl_s`: its time to live; 0: no limit. Raises LeaseLost, Temporary, BusRefused."""
        await self._write("", None, ttl_s=ttl_s)

    async def _write(self, owner: str, ensure_owner: Callable[[], None] | None, *, ttl_s: int = 0) -> None:
        new, stale_at = self._new, self._stale_at
        self._new, self._stale_at = 0, None
        try:
            while True:
                prints = self.seen.kept(self._clock.now_ms())
                position = _Position(self.sandbox, self.cursor, self._start, prints, self.inbox_seq)
                stored = StoredCheckpoint(self.bot, owner, self._revision, position)
                try:
                    self._revision = await self._store.write(stored, ensure_owner=ensure_owner, ttl_s=ttl_s)
                except Conflict as exc:
                    now = await self._store.read(self.bot)
                    if now.owner != self.owner:
                        self._is_lost = True
                        raise LeaseLost("bot_taken", self.bot) from exc
                    self._revision = now.revision  # of another write here, perhaps one that was cancelled
                else:
                    return
        except BaseException:
            self._new += new
            self._stale_at = stale_at if stale_at is not None else self._stale_at
            raise
