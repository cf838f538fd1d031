"""Key-value buckets with direct get, and compare-and-set on the last sequence of a key.

nats-py's own bucket is not used: its watch misses changes for 15 s after a server restart, and it cannot write with a
revision through the publisher. Other KV clients can read and write the same data.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

import structlog
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from adapter.contract.names import H_EXPECTED
from adapter.errors import BusRefused, Conflict, Temporary
from adapter.jetstream.history import StreamHistory, get_from_leader
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import SingleWrites
from adapter.ports import BucketEntry, Bus, BusMessage, StoredMessage

log = structlog.get_logger()

OPERATION = "KV-Operation"
TTL = "Nats-TTL"
MARKER = "Nats-Marker-Reason"
PAGE = 500


def updates_subject_of(bucket: str) -> str:
    """Subject to which the server republishes the entries of a bucket; it starts with the prefix of the name."""
    return f"{bucket.rpartition('_')[0]}.kv.{bucket}"


class KvBucket:
    """Implements ports.Bucket and ports.LeaderBucket. `names.to_subject_token` and `names.person_token` make the
    tokens of keys. One key is read from the leader, since what it says may decide about ownership."""

    def __init__(
        self,
        connection: ManagedConnection,
        name: str,
        bus: Bus | None = None,
        *,
        ttl_s: int = 0,
        replicated: bool = False,
    ) -> None:
        """`bus`: what waits for the bucket; None: a write is one attempt of a second at most. `ttl_s`: time to live
        of the keys, which removes those that nobody writes any more. `replicated`: the bucket has several servers."""
        self.name = name
        self.stream = f"KV_{name}"
        self.updates_subject = updates_subject_of(name)
        self._connection = connection
        self._bus = bus or SingleWrites(connection)
        self._history = StreamHistory(connection, replicated=replicated)
        self._ttl_s = ttl_s

    def subject(self, key: str) -> str:
        return f"$KV.{self.name}.{key}"

    async def get(self, key: str) -> BucketEntry | None:
        query = {"last_by_subj": self.subject(key)}
        stored = await get_from_leader(self._connection, self.stream, query, timeout_s=2)
        return None if stored is None else self._entry(stored)

    async def get_all(self, keys: Sequence[str]) -> list[BucketEntry]:
        found = await self._history.read_last_of_each(self.stream, [self.subject(key) for key in keys])
        return [self._entry(stored) for stored in found]

    async def read_since(self, revision: int) -> list[BucketEntry]:
        read = self._history.read(self.stream, self.subject(">"), after=revision, page=PAGE)
        return [self._entry(stored) async for stored in read]

    async def read_entries(self) -> AsyncIterator[BucketEntry]:
        """All, with deleted ones. A key that is written meanwhile may come twice."""
        async for stored in self._history.read(self.stream, self.subject(">"), page=PAGE):
            yield self._entry(stored)

    def _entry(self, stored: StoredMessage) -> BucketEntry:
        return self.entry_of(stored.subject, stored.headers, stored.data, stored.seq)

    def entry_of(self, subject: str, headers: Mapping[str, str], data: bytes, revision: int) -> BucketEntry:
        is_deleted = OPERATION in headers or MARKER in headers
        return BucketEntry(subject.removeprefix(self.subject("")), None if is_deleted else data, revision)

    async def update(
        self, key: str, value: bytes, revision: int, *, ensure_owner: Callable[[], None] | None = None
    ) -> int:
        try:
            return await self.write(key, value, revision, ensure_owner=ensure_owner)
        except Conflict:
            entry = await self.get(key)
            if entry is not None and entry.value == value:
                return entry.revision
            raise

    async def delete(self, key: str, revision: int | None = None, *, ttl_s: int = 0) -> int:
        return await self.write(key, None, revision, ttl_s=ttl_s)

    async def write(
        self,
        key: str,
        value: bytes | None,
        revision: int | None,
        *,
        ttl_s: int = 0,
        ensure_owner: Callable[[], None] | None = None,
    ) -> int:
        """Writes the value, or deletes for None, if the key has this revision; None: in any case. Raises as
        `update`, and Temporary for a single attempt without an answer."""
        headers = {} if revision is None else {H_EXPECTED: str(revision)}
        if ttl_s := ttl_s or self._ttl_s:
            headers[TTL] = f"{ttl_s}s"
        if value is None:
            headers[OPERATION] = "DEL"
        try:
            return (
                await self._bus.store(BusMessage("kv", self.subject(key), value or b"", headers, ensure_owner))
            ).seq
        except BusRefused as exc:
            if not exc.is_full:
                raise
            raise Temporary("bucket_full", f"{self.name}: {exc.detail}") from exc  # until an operator makes room

    async def stream_state(self) -> tuple[int, int]:
        """Number of keys, including deleted ones, and the newest sequence. Raises Temporary."""
        state = await self._history.read_state(self.stream)
        return int(state["messages"]), int(state["last_seq"])

    async def watch(
        self,
        on_entry: Callable[[BucketEntry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
        reload_s: float = 30.0,
    ) -> None:
        """Updates arrive on the subject to which the server republishes stored values; the plain subject would also
        have refused writes. The bucket is read completely after each connect, and when a check every `reload_s`
        seconds finds a missed update. An entry may come twice, but never after a newer one.
        """
        watch, epoch = _Watcher(self, on_entry), -1
        while True:
            try:
                nc = await self._connection.wait_connected()
                if epoch != (now := self._connection.epoch):
                    watch.is_complete = False
                    await nc.subscribe(self.updates_subject + ".>", cb=watch.on_update)
                    epoch = now  # a subscription takes time, and the client may be another one by now
                if await watch.reload_if_stale() and on_loaded is not None:
                    on_loaded()
            except (Temporary, NatsError) as exc:
                watch.is_complete = False
                log.warning("bucket.unread", bucket=self.name, reason=getattr(exc, "reason", type(exc).__name__))
                await asyncio.sleep(0.2)
            else:
                changed = self._connection.changed
                await changed.wait_until(partial(self._is_other_client, epoch), reload_s)

    def _is_other_client(self, epoch: int) -> bool:
        return self._connection.epoch != epoch


class _Watcher:
    """What one watcher of a bucket has seen."""

    def __init__(self, bucket: KvBucket, on_entry: Callable[[BucketEntry], None]) -> None:
        self.is_complete = False
        """No update up to `_top` was missed."""
        self._bucket = bucket
        self._on_entry = on_entry
        self._revisions: dict[str, int] = {}
        """Revision of every key, including deleted ones."""
        self._top = 0
        """Newest sequence seen."""

    async def on_update(self, msg: Msg) -> None:
        headers = msg.headers or {}
        revision = int(headers["Nats-Sequence"])
        if revision > self._top:
            self.is_complete, self._top = self.is_complete and revision == self._top + 1, revision
        self._apply_entry(self._bucket.entry_of(headers["Nats-Subject"], headers, msg.data, revision))

    def _apply_entry(self, entry: BucketEntry) -> None:
        if entry.revision > self._revisions.get(entry.key, 0):
            self._revisions[entry.key] = entry.revision
            self._on_entry(entry)

    async def reload_if_stale(self) -> bool:
        """Reads the bucket if an update was missed or a key has expired. Returns whether it did.

        Raises Temporary.
        """
        keys, newest = await self._bucket.stream_state()
        if self.is_complete and (keys, newest) == (len(self._revisions), self._top):
            return False
        self._top, self.is_complete = max(self._top, newest), True
        present = set()
        async for entry in self._bucket.read_entries():
            present.add(entry.key)
            self._apply_entry(entry)
        # a key that was neither read nor written meanwhile has expired
        self._revisions = {
            key: revision for key, revision in self._revisions.items() if key in present or revision > newest
        }
        return True
