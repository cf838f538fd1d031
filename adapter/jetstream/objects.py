"""The object store on its stream, in the layout of every NATS client (ADR-20): the chunks of an object on one
subject, its name, size and digest on another.

nats-py's own store is not used: it publishes one awaited chunk at a time, and a read hangs for ever if chunks are
gone. `nats object get` and similar tools read these objects, and the adapter reads theirs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from adapter.content.media import HEAD
from adapter.contract.names import H_EXPECTED, H_MSG_ID, H_OFFSET
from adapter.errors import (
    UNDECODABLE,
    AdapterError,
    BusRefused,
    Conflict,
    LeaseLost,
    Refused,
    Temporary,
    Unreadable,
)
from adapter.jetstream.history import StreamHistory, direct_get_one, get_from_leader, has_more
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import Publisher
from adapter.kit.timing import shield_with_grace
from adapter.ports import BusMessage, Pieces, StoredObject

log = structlog.get_logger()

CHUNK = 128 * 1024
"""Size of a chunk, as in other clients."""
BATCH = 8
"""Chunks that are stored or read at once, which is all of an object that is in memory."""
BATCHES = 2
"""Batches of all objects that are stored at once: a slow bus acknowledges as much before the publisher sends it
again."""
SETTLE_S, PURGE_S = 2.0, 5.0
"""How long a failed upload waits for its chunks in flight, and for their deletion."""
DIGEST = "SHA-256="
APPEND_S = 5.0
APPEND_ATTEMPTS = 5


class _Meta(msgspec.Struct):
    """Content of the meta subject, with the names of ADR-20. Zeros are written, too, since nats-py hangs without
    them."""

    name: str
    bucket: str = ""
    nuid: str = ""
    size: int = 0
    mtime: str = ""
    chunks: int = 0
    digest: str = ""
    description: str = ""
    deleted: bool = False
    headers: dict[str, list[str]] | None = None
    options: dict[str, Any] | None = None


class ObjectStore:
    """Implements ports.Objects."""

    def __init__(self, connection: ManagedConnection, publisher: Publisher, bucket: str) -> None:
        self._connection = connection
        self._history = StreamHistory(connection, replicated=True)
        self._publisher = publisher
        self._bucket = bucket
        self._stream = f"OBJ_{bucket}"
        self._chunks, self._metas = f"$O.{bucket}.C.", f"$O.{bucket}.M."
        """Start of the subjects of chunks and of descriptions."""
        self._batch_slots = asyncio.Semaphore(BATCHES)

    async def get_info(self, name: str) -> StoredObject | None:
        return _described(name, (await self._read_meta(name))[0])

    async def read(self, stored: StoredObject) -> Pieces:
        digest = hashlib.sha256()
        async with contextlib.aclosing(self._read_chunks(stored.name, stored.ident, stored.size)) as pieces:
            async for piece in pieces:
                digest.update(piece)
                yield piece
        if digest.hexdigest() != stored.sha256:
            raise Unreadable("object", f"{stored.name}: the bytes are not those of the digest")

    async def read_piece(self, stored: StoredObject, after: int) -> tuple[bytes, int]:
        if not stored.size:
            return b"", 0
        async for piece in self._history.read(self._stream, self._chunks + stored.ident, after=after, limit=1):
            # a lagging server may not have the next one
            more = has_more(piece) or await self._leader_has(stored.ident, piece.seq)
            return piece.data, piece.seq if more else 0
        raise Unreadable("object", f"{stored.name}: no piece after {after}")

    async def _leader_has(self, ident: str, after: int) -> bool:
        query = {"seq": after + 1, "next_by_subj": self._chunks + ident}
        return await get_from_leader(self._connection, self._stream, query) is not None

    async def put(
        self,
        name: str,
        pieces: Pieces,
        *,
        describe: Callable[[bytes], tuple[str, str]] = lambda head: ("", ""),
        ensure_owner: Callable[[], None] | None = None,
    ) -> StoredObject:
        ident = secrets.token_hex(11)
        try:
            async with contextlib.aclosing(pieces):
                size, chunks, digest, head = await self._store_chunks(ident, pieces)
        except BaseException:
            await self._delete_chunks(ident)
            raise
        mime, title = describe(head)
        meta = self._new_meta(name, ident, size, chunks, digest, mime=mime, title=title)
        try:
            stored = await self._store_meta(meta, ensure_owner)
        except (BusRefused, LeaseLost):  # after a cancellation the meta may be stored, so the chunks must stay
            await self._delete_chunks(ident)
            raise
        if stored.ident != ident:
            await self._delete_chunks(ident)
        return stored

    # uploads in pieces ------------------------------------------------------------------------------

    async def append(self, name: str, offset: int, piece: bytes) -> int:
        """Stores a piece by compare-and-set on the one before, so that any replica can take it, even concurrently."""
        end = offset + len(piece)
        done = await self.get_info(name)
        if done is not None and end > done.size:
            raise Refused("invalid", "The upload is already complete: use another id.")
        subject = self._chunks + _upload_ident(name)
        for attempt in range(APPEND_ATTEMPTS):
            before = await direct_get_one(self._connection, self._stream, {"last_by_subj": subject})
            size = int(before.headers.get(H_OFFSET, "0")) + len(before.data) if before else 0
            if end <= size:
                return size
            if offset == size:
                headers = {H_OFFSET: str(offset), H_EXPECTED: str(before.seq if before else 0)}
                try:
                    async with asyncio.timeout(APPEND_S):
                        await self._publisher.publish(BusMessage("media", subject, piece, headers))
                except TimeoutError as exc:
                    raise Temporary("bus_timeout", "The piece is not stored yet: send it again.") from exc
                except Conflict:
                    pass  # another piece was stored meanwhile, or the read was outdated
                else:
                    return end
            await asyncio.sleep(0.05 * attempt)  # there is a gap, or a lagging server answered
        raise Refused("invalid", f"Bytes {offset} to {end} do not follow: go on at {size}.")

    async def complete_upload(
        self, name: str, size: int, *, sha256: str, title: str, mime_of: Callable[[bytes], str]
    ) -> tuple[StoredObject, bytes]:
        ident = _upload_ident(name)
        done = await self.get_info(name)
        if done is not None and (done.ident, done.size) == (ident, size):
            if sha256 not in ("", done.sha256):
                raise Refused("invalid", "The upload is complete already, with other bytes: take another id.")
            return done, (await self._read_upload(name, ident, size, head_only=True))[2]
        digest, chunks, head = await self._read_upload(name, ident, size)
        if sha256 not in ("", digest.hexdigest()):
            await self._delete_chunks(ident)
            raise Refused("invalid", "The bytes are not those of your SHA-256: begin again at 0.")
        meta = self._new_meta(name, ident, size, chunks, digest.digest(), mime=mime_of(head), title=title)
        stored = await self._store_meta(meta)
        if stored.ident != ident:
            raise Refused("invalid", "There is an object of this name already: take another id.")
        return stored, head

    async def _read_upload(
        self, name: str, ident: str, size: int, *, head_only: bool = False
    ) -> tuple[hashlib._Hash, int, bytes]:
        """Digest and number of the uploaded pieces, and their first bytes. Raises Temporary."""
        digest, chunks, head = hashlib.sha256(), 0, b""
        try:
            async with contextlib.aclosing(self._read_chunks(name, ident, size)) as pieces:
                async for piece in pieces:
                    digest.update(piece)
                    chunks += 1
                    head += piece[: HEAD - len(head)]
                    if head_only and len(head) == HEAD:
                        break
        except Unreadable as exc:
            raise Temporary("object", "Pieces are missing: send them again.") from exc
        return digest, chunks, head

    # writing ----------------------------------------------------------------------------------------

    async def _store_chunks(self, ident: str, pieces: Pieces) -> tuple[int, int, bytes, bytes]:
        """Stores the chunks. Returns size, number of chunks, digest, and the first chunk."""
        digest, size, chunks, head = hashlib.sha256(), 0, 0, b""
        batch: list[BusMessage] = []
        async for chunk in _rechunk(pieces):
            head = head or chunk
            digest.update(chunk)
            size += len(chunk)
            chunks += 1
            # the id drops a duplicate that is sent again after a break
            batch.append(BusMessage("media", self._chunks + ident, chunk, {H_MSG_ID: f"{ident}.{chunks}"}))
            if len(batch) == BATCH:
                await self._store_batch(batch)
                batch = []
        await self._store_batch(batch)
        return size, chunks, digest.digest(), head

    async def _store_batch(self, batch: list[BusMessage]) -> None:
        async with self._batch_slots:
            # after a cancellation, too, since a chunk in flight might be stored after the purge
            outcomes = await shield_with_grace(self._publisher.publish_all(batch), SETTLE_S)
        for outcome in outcomes:
            if isinstance(outcome, BusRefused):
                raise outcome

    def _new_meta(
        self, name: str, ident: str, size: int, chunks: int, digest: bytes, *, mime: str, title: str
    ) -> _Meta:
        return _Meta(
            name=name,
            bucket=self._bucket,
            nuid=ident,
            size=size,
            mtime="0001-01-01T00:00:00Z",  # readers take the time of the message
            chunks=chunks,
            digest=DIGEST + base64.urlsafe_b64encode(digest).decode(),
            description=title,
            headers={"Content-Type": [mime]} if mime else None,
            options={"max_chunk_size": CHUNK},
        )

    async def _store_meta(self, meta: _Meta, ensure_owner: Callable[[], None] | None = None) -> StoredObject:
        """Makes the chunks of `meta` its object, unless that exists already. Returns the one that exists then."""
        subject, data = self._metas + _encode_name(meta.name), msgspec.json.encode(meta)
        while True:
            before, revision = await self._read_meta_with_retry(meta.name)
            if (stored := _described(meta.name, before)) is not None:
                return stored
            headers = {"Nats-Rollup": "sub", H_EXPECTED: str(revision)}
            try:
                await self._publisher.publish(BusMessage("media", subject, data, headers, ensure_owner))
                return _known(meta.name, meta)
            except Conflict:  # stored meanwhile, perhaps by an attempt whose answer was lost; or a server lagged
                await asyncio.sleep(0.05)

    async def _delete_chunks(self, ident: str) -> None:
        """Deletes chunks. Those that cannot be deleted now expire with the store's age limit."""
        try:
            body = {"filter": self._chunks + ident}
            await self._connection.api_request(f"STREAM.PURGE.{self._stream}", body, PURGE_S)
        except AdapterError as exc:
            log.warning("media.abandoned", reason=exc.reason)

    # reading ----------------------------------------------------------------------------------------

    async def _read_chunks(self, name: str, ident: str, size: int) -> Pieces:
        """The first `size` bytes of the chunks of `ident`. Raises Temporary, Unreadable."""
        remaining = size
        if size:
            chunks = self._history.read(self._stream, self._chunks + ident, page=BATCH)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    remaining -= len(chunk.data)
                    if remaining >= 0:
                        yield chunk.data
                    if remaining <= 0:
                        break
        if remaining:
            raise Unreadable("object", f"{name}: pieces are gone or too many")

    async def _read_meta(self, name: str) -> tuple[_Meta | None, int]:
        """The description of an object, None if there is no readable one, and its sequence. Raises Temporary."""
        query = {"last_by_subj": self._metas + _encode_name(name)}
        stored = await direct_get_one(self._connection, self._stream, query)
        if stored is None:  # a lagging server may have answered
            stored = await get_from_leader(self._connection, self._stream, query)
        if stored is None:
            return None, 0
        try:
            return msgspec.json.decode(stored.data, type=_Meta), stored.seq
        except UNDECODABLE:
            log.warning("media.unreadable", detail="The description of an object cannot be read.")
            return None, stored.seq

    async def _read_meta_with_retry(self, name: str) -> tuple[_Meta | None, int]:
        while True:
            try:
                return await self._read_meta(name)
            except Temporary:
                await self._connection.wait_connected()
                await asyncio.sleep(0.1)


def _described(name: str, meta: _Meta | None) -> StoredObject | None:
    """The object that a description stands for; None: it was deleted, or is a link to another."""
    return None if meta is None or meta.deleted or (meta.options or {}).get("link") else _known(name, meta)


def _known(name: str, meta: _Meta) -> StoredObject:
    return StoredObject(name, meta.nuid, meta.size, _digest_hex(meta.digest), meta.description)


def _encode_name(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _upload_ident(name: str) -> str:
    """Id of the chunks of an upload, which every replica derives from the name."""
    return hashlib.blake2b(name.encode(), digest_size=11).hexdigest()


async def _rechunk(pieces: Pieces) -> Pieces:
    """The same bytes in chunks of CHUNK; the last one is shorter."""
    rest = bytearray()
    async for piece in pieces:
        rest += piece
        while len(rest) >= CHUNK:
            yield bytes(rest[:CHUNK])
            del rest[:CHUNK]
    if rest:
        yield bytes(rest)


def _digest_hex(digest: str) -> str:
    """SHA-256 as lower-case hex; "" if the object has none."""
    kind, _, text = digest.partition("=")
    try:
        return base64.urlsafe_b64decode(text).hex() if kind.upper() == "SHA-256" else ""
    except (binascii.Error, ValueError):
        return ""
