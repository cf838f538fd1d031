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
from adapter.jetstream.history import StreamHistory, get_from_leader, has_more
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.publisher import Publisher
from adapter.ports import BusMessage, Pieces, StoredObject
from adapter.tools.media_types import HEAD

log = structlog.get_logger()

CHUNK = 128 * 1024
"""Size of a chunk, as in other clients."""
CHUNKS_AT_ONCE = 16
"""Chunks of all objects that are stored at once: a slow bus acknowledges as much before the publisher sends it
again."""
PURGE_S = 5.0
"""How long a failed upload waits for the deletion of its chunks."""
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


class _Contents:
    """What the description of an object says of its bytes."""

    def __init__(self) -> None:
        self.size = self.chunks = 0
        self.digest = hashlib.sha256()
        self.head = b""
        """The first bytes, at most HEAD."""

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.chunks += 1
        self.digest.update(chunk)
        self.head += chunk[: HEAD - len(self.head)]


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
        self._chunk_slots = asyncio.Semaphore(CHUNKS_AT_ONCE)

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
        ident, contents = secrets.token_hex(11), _Contents()
        try:
            async with contextlib.aclosing(pieces):
                async for chunk in _rechunk(pieces):
                    contents.add(chunk)
                    # the id drops a duplicate that is sent again after a break
                    headers = {H_MSG_ID: f"{ident}.{contents.chunks}"}
                    async with self._chunk_slots:
                        await self._publisher.store(BusMessage("media", self._chunks + ident, chunk, headers))
        except BaseException:
            await self._delete_chunks(ident)
            raise
        mime, title = describe(contents.head)
        try:
            stored = await self._store_meta(name, ident, contents, mime, title, ensure_owner)
        except (BusRefused, LeaseLost):  # otherwise the meta may be stored, so the chunks must stay
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
        for _ in range(APPEND_ATTEMPTS):
            before = await self._history.read_last(self._stream, subject)
            size = int(before.headers.get(H_OFFSET, "0")) + len(before.data) if before else 0
            if end <= size:
                return size
            if offset != size:
                break
            headers = {H_OFFSET: str(offset), H_EXPECTED: str(before.seq if before else 0)}
            try:
                async with asyncio.timeout(APPEND_S):
                    await self._publisher.store(BusMessage("media", subject, piece, headers))
            except TimeoutError as exc:
                raise Temporary("bus_timeout", "The piece is not stored yet: send it again.") from exc
            except Conflict:
                continue  # another piece was stored meanwhile
            return end
        raise Refused("invalid", f"Bytes {offset} to {end} do not follow: go on at {size}.")

    async def complete_upload(
        self, name: str, size: int, *, sha256: str, title: str, mime_of: Callable[[bytes], str]
    ) -> tuple[StoredObject, bytes]:
        ident, contents = _upload_ident(name), _Contents()
        done = await self.get_info(name)
        if done is not None and (done.ident, done.size) == (ident, size):
            if sha256 not in ("", done.sha256):
                raise Refused("invalid", "The upload is complete already, with other bytes: take another id.")
            await self._read_upload(name, size, contents, stop_at=HEAD)
            return done, contents.head
        await self._read_upload(name, size, contents, stop_at=size)
        if sha256 not in ("", contents.digest.hexdigest()):
            await self._delete_chunks(ident)
            raise Refused("invalid", "The bytes are not those of your SHA-256: begin again at 0.")
        stored = await self._store_meta(name, ident, contents, mime_of(contents.head), title)
        if stored.ident != ident:
            raise Refused("invalid", "There is an object of this name already: take another id.")
        return stored, contents.head

    async def _read_upload(self, name: str, size: int, contents: _Contents, *, stop_at: int) -> None:
        """Reads the uploaded pieces up to `stop_at` bytes at least. Raises Temporary."""
        try:
            async with contextlib.aclosing(self._read_chunks(name, _upload_ident(name), size)) as pieces:
                async for piece in pieces:
                    contents.add(piece)
                    if contents.size >= stop_at:
                        break
        except Unreadable as exc:
            raise Temporary("object", "Pieces are missing: send them again.") from exc

    # writing ----------------------------------------------------------------------------------------

    async def _store_meta(
        self,
        name: str,
        ident: str,
        contents: _Contents,
        mime: str,
        title: str,
        ensure_owner: Callable[[], None] | None = None,
    ) -> StoredObject:
        """Makes the chunks of `ident` the object, unless there is one already. Returns the one that is there then.
        Raises Temporary, BusRefused, LeaseLost."""
        meta = _Meta(
            name=name,
            bucket=self._bucket,
            nuid=ident,
            size=contents.size,
            mtime="0001-01-01T00:00:00Z",  # readers take the time of the message
            chunks=contents.chunks,
            digest=DIGEST + base64.urlsafe_b64encode(contents.digest.digest()).decode(),
            description=title,
            headers={"Content-Type": [mime]} if mime else None,
            options={"max_chunk_size": CHUNK},
        )
        subject, data = self._metas + _encode_name(name), msgspec.json.encode(meta)
        while True:
            before, revision = await self._read_meta(name)
            if (stored := _described(name, before)) is not None:
                return stored
            headers = {"Nats-Rollup": "sub", H_EXPECTED: str(revision)}
            try:
                await self._publisher.store(BusMessage("media", subject, data, headers, ensure_owner))
                return _known(name, meta)
            except Conflict:  # stored meanwhile, perhaps by an attempt whose answer was lost
                continue

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
            chunks = self._history.read(self._stream, self._chunks + ident)
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
        stored = await self._history.read_last(self._stream, self._metas + _encode_name(name))
        if stored is None:
            return None, 0
        try:
            return msgspec.json.decode(stored.data, type=_Meta), stored.seq
        except UNDECODABLE:
            log.warning("media.unreadable", detail="The description of an object cannot be read.")
            return None, stored.seq


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
