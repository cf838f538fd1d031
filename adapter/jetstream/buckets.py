"""Key-value buckets with direct get, and compare-and-set on the last sequence of a key.

nats-py's own bucket is not used: its watch misses changes for 15 s after a server restart, and it cannot write with a
revision through the publisher. Other KV clients can read and write the same data.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from adapter.contract.names import H_EXPECTED
from adapter.errors import BusRefused, Conflict, Temporary
from adapter.jetstream.api_replies import ApiReply, decode_reply, write_error_of
from adapter.jetstream.history import StreamHistory, get_from_leader
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import Publisher
from adapter.ports import BusMessage, Entry, StoredMessage

log = structlog.get_logger()

OPERATION = "KV-Operation"
TTL = "Nats-TTL"
MARKER = "Nats-Marker-Reason"
PAGE = 500
RELOAD_S = 5.0
"""Shortest interval between two complete reads of a lease bucket without a new entry; they only find expired keys."""
RELOAD_WATCH_S = 300.0
"""Shortest interval between two complete reads of a watched bucket without a missed update."""
NEVER = -math.inf


def updates_subject_of(bucket: str) -> str:
    """Subject to which the server republishes the entries of a bucket; it starts with the prefix of the name."""
    return f"{bucket.rpartition('_')[0]}.kv.{bucket}"


class LeaderKvBucket:
    """Implements ports.LeaderBucket."""

    def __init__(self, connection: ManagedConnection, name: str, *, ttl_s: int | None = None) -> None:
        self._connection = connection
        self._history = StreamHistory(connection)
        self._name = name
        self._stream = f"KV_{name}"
        self._ttl_s = ttl_s
        """Time to live of keys; it only removes keys of replicas that ended long ago."""
        self._known: list[Entry] = []
        self._known_to = 0
        """Newest sequence at the last complete read."""
        self._read_at = NEVER

    async def get(self, key: str) -> Entry | None:
        query = {"last_by_subj": f"$KV.{self._name}.{key}"}
        stored = await get_from_leader(self._connection, self._stream, query, timeout_s=2)
        return None if stored is None else _entry(self._name, stored)

    async def write(self, key: str, value: bytes | None, revision: int) -> int:
        headers = {H_EXPECTED: str(revision)}
        if self._ttl_s:
            headers[TTL] = f"{self._ttl_s}s"
        if value is None:
            headers[OPERATION] = "DEL"
        msg = await self._connection.request(f"$KV.{self._name}.{key}", value or b"", timeout_s=1, headers=headers)
        ack = decode_reply(msg.data, _Ack, f"a write to {self._name}")
        if ack.error is not None:
            problem = write_error_of(ack.error)
            raise problem if isinstance(problem, Temporary | Conflict) else Temporary("bus_refused", problem.detail)
        return ack.seq

    async def list_entries(self) -> list[Entry]:
        every = f"$KV.{self._name}.>"
        now = asyncio.get_running_loop().time()
        newest = await self._history.read_last(self._stream, every)
        if newest is not None and newest.seq == self._known_to and now - self._read_at < RELOAD_S:
            return self._known
        found = self._history.read(self._stream, every, page=PAGE)
        self._known = list({stored.subject: _entry(self._name, stored) async for stored in found}.values())
        self._known_to = max((entry.revision for entry in self._known), default=0)
        self._read_at = now
        return self._known


class KvBucket:
    """Implements ports.Bucket. `names.to_subject_token` and `names.conversation_key` make the keys.

    `replicated`: the bucket has several servers, any of which may answer a direct get, even a lagging one. Reads that
    decide about ownership then go to the leader.
    """

    def __init__(
        self, connection: ManagedConnection, publisher: Publisher, name: str, *, replicated: bool = False
    ) -> None:
        self.name = name
        self.updates_subject = updates_subject_of(name)
        self.stream = f"KV_{name}"
        self.connection = connection
        self.history = StreamHistory(connection, replicated=replicated)
        self._publisher = publisher

    def subject(self, key: str) -> str:
        return f"$KV.{self.name}.{key}"

    async def get(self, key: str) -> Entry | None:
        stored = await self.history.read_last(self.stream, self.subject(key))
        return None if stored is None else _entry(self.name, stored)

    async def get_all(self, keys: Sequence[str]) -> list[Entry]:
        found = await self.history.read_last_of_each(self.stream, [self.subject(key) for key in keys])
        return [_entry(self.name, stored) for stored in found]

    async def update(
        self, key: str, value: bytes, revision: int, *, ttl_s: int = 0, ensure_owner: Callable[[], None] | None = None
    ) -> int:
        try:
            return await self._put_value(key, value, {H_EXPECTED: str(revision)}, ttl_s, ensure_owner)
        except Conflict:
            entry = await self.get(key)
            if entry is not None and entry.value == value:
                return entry.revision
            raise

    async def delete(self, key: str, revision: int | None = None, *, ttl_s: int = 0) -> int:
        headers = {OPERATION: "DEL"}
        if revision is not None:
            headers[H_EXPECTED] = str(revision)
        return await self._put_value(key, b"", headers, ttl_s)

    async def _put_value(
        self,
        key: str,
        value: bytes,
        headers: dict[str, str],
        ttl_s: int,
        ensure_owner: Callable[[], None] | None = None,
    ) -> int:
        if ttl_s:
            headers[TTL] = f"{ttl_s}s"
        try:
            return (
                await self._publisher.publish(BusMessage("kv", self.subject(key), value, headers, ensure_owner))
            ).seq
        except BusRefused as exc:
            if not exc.is_full:
                raise
            raise Temporary("bucket_full", f"{self.name}: {exc.detail}") from exc  # until an operator makes room

    async def list_prefix(self, first: str = "") -> list[Entry]:
        found = self.history.read(self.stream, self.subject(f"{first}.>" if first else ">"), page=PAGE)
        entries = [_entry(self.name, stored) async for stored in found]
        return [entry for entry in entries if entry.value is not None]

    async def watch(
        self,
        on_entry: Callable[[Entry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
        reload_s: float = 30.0,
    ) -> None:
        """Updates arrive on the subject to which the server republishes stored values; the plain subject would also
        have refused writes. The bucket is read completely after each connect, and when a check every `reload_s`
        seconds finds a missed update. An entry may come twice, but never after a newer one.
        """
        watcher = _Watcher(self, on_entry)
        while True:
            try:
                nc = await self.connection.wait_connected()
                epoch = self.connection.epoch
                is_new = watcher.epoch != epoch
                if is_new:
                    await watcher.subscribe(nc, epoch)
                read = await watcher.reload_if_stale(force=is_new)
            except (Temporary, NatsError) as exc:
                reason = exc.reason if isinstance(exc, Temporary) else type(exc).__name__
                log.warning("bucket.unread", bucket=self.name, reason=reason)
                await asyncio.sleep(0.2)
                continue
            if read and on_loaded is not None:
                on_loaded()
            await self.connection.changed.wait_until(lambda: self.connection.epoch != watcher.epoch, reload_s)

    async def stream_state(self) -> tuple[int, int]:
        """Number of keys, including deleted ones, and the newest sequence. Raises Temporary."""
        try:
            info = await self.connection.api_request(f"STREAM.INFO.{self.stream}")
        except BusRefused as exc:
            raise Temporary("bus_refused", exc.detail) from exc
        return int(info["state"]["messages"]), int(info["state"]["last_seq"])


class _Watcher:
    """The state of one watcher of a bucket."""

    def __init__(self, bucket: KvBucket, on_entry: Callable[[Entry], None]) -> None:
        self.epoch = -1
        """The client with the subscription."""
        self._bucket = bucket
        self._on_entry = on_entry
        self._revisions: dict[str, int] = {}
        """Revision of every key, including deleted ones."""
        self._top = 0
        """Newest sequence seen."""
        self._is_complete = False
        """No update up to `_top` was missed."""
        self._read_at = NEVER
        """Time of the last complete read."""

    async def subscribe(self, nc: Client, epoch: int) -> None:
        """Subscribes to the updates on a new client, before the bucket is read."""
        await nc.subscribe(self._bucket.updates_subject + ".>", cb=self._on_update)
        self.epoch = epoch

    async def _on_update(self, msg: Msg) -> None:
        headers = msg.headers or {}
        key = headers["Nats-Subject"].removeprefix(self._bucket.subject(""))
        revision = int(headers["Nats-Sequence"])
        if revision > self._top:
            self._is_complete, self._top = self._is_complete and revision == self._top + 1, revision
        self._apply_entry(Entry(key, None if OPERATION in headers else msg.data, revision))

    def _apply_entry(self, entry: Entry) -> None:
        if entry.revision > self._revisions.get(entry.key, 0):
            self._revisions[entry.key] = entry.revision
            self._on_entry(entry)

    async def reload_if_stale(self, *, force: bool) -> bool:
        """Reads the bucket if `force`, if it was not read for long, or if an update was missed. Returns whether it
        did.

        Raises Temporary.
        """
        bucket, now = self._bucket, asyncio.get_running_loop().time()
        keys, newest = await bucket.stream_state()
        known = self._is_complete and (keys, newest) == (len(self._revisions), self._top)
        if known and not force and now - self._read_at <= RELOAD_WATCH_S:
            return False
        self._top, self._is_complete, self._read_at = max(self._top, newest), True, NEVER
        present = set()
        async for stored in bucket.history.read(bucket.stream, bucket.subject(">"), page=PAGE):
            entry = _entry(bucket.name, stored)
            present.add(entry.key)
            self._apply_entry(entry)
        # a key that was neither read nor written meanwhile has expired
        self._revisions = {
            key: revision for key, revision in self._revisions.items() if key in present or revision > newest
        }
        self._read_at = now
        return True


class _Ack(ApiReply):
    seq: int = 0


def _entry(bucket: str, stored: StoredMessage) -> Entry:
    key = stored.subject.removeprefix(f"$KV.{bucket}.")
    is_deleted = OPERATION in stored.headers or MARKER in stored.headers
    return Entry(key, None if is_deleted else stored.data, stored.seq)
