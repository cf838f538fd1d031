"""Uploads the media of a command to the CDN, from the object store or from the command itself."""

from __future__ import annotations

import contextlib
import hashlib
from functools import partial

from adapter.bridge.commands import MediaPart
from adapter.content.media import HEAD, file_name, identify
from adapter.errors import Refused, Temporary, Unreadable
from adapter.kit.slots import FairSlots
from adapter.ports import Account, Cdn, Objects, Pieces, Read, Uploaded

PIECE = 64 * 1024


class StoreAway(Temporary):
    """The object store is not readable now; the CDN is not at fault."""


class Uploads:
    """Uploads media of parts. The sender keeps the result for a repeat of its request."""

    def __init__(self, cdn: Cdn, objects: Objects, transfers: FairSlots, *, max_bytes: int) -> None:
        self._cdn = cdn
        self._objects = objects
        self._transfers = transfers
        self._max_bytes = max_bytes

    async def upload_media(self, part: MediaPart, account: Account, sandbox: str, user: str) -> Uploaded:
        """Uploads the part's media and returns the reference for a message.

        Raises Refused("media"), SessionExpired, StoreAway, Temporary (iLink is unreachable).
        """
        read = partial(_reading, await self._open_source(part))
        size, md5, head = await self._measure_content(read)
        found = identify(head, part.name)
        async with self._transfers.slot(sandbox):
            return await self._cdn.upload(
                account,
                user=user,
                kind=part.kind if found.mime.startswith(f"{part.kind}/") else "file",  # no such picture or video
                name=part.name or file_name(found.mime.partition("/")[0], found.suffix),
                size=size,
                md5=md5,
                read=read,
            )

    async def _open_source(self, part: MediaPart) -> Read:
        """Raises Refused("media"), StoreAway."""
        if not part.object:
            return lambda: _single_piece(part.data)
        try:
            stored = await self._objects.get_info(part.object)
        except Temporary as exc:
            raise StoreAway(exc.reason, exc.detail) from exc
        if stored is None:
            raise Refused("media", "There is no such object: it was never stored, or is too old.")
        self._check_size(stored.size)
        return partial(self._objects.read, stored)

    async def _measure_content(self, read: Read) -> tuple[int, str, bytes]:
        """Reads the content once. Returns its size, its MD5 and its beginning. Raises Refused("media"), StoreAway."""
        digest, size, head = hashlib.md5(usedforsecurity=False), 0, b""
        async with contextlib.aclosing(read()) as pieces:
            async for piece in pieces:
                digest.update(piece)
                size += len(piece)
                self._check_size(size)
                if len(head) < HEAD:
                    head += piece[: HEAD - len(head)]
        return size, digest.hexdigest(), head

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise Refused("media", f"too_large: more than {self._max_bytes} bytes are not sent.")


async def _reading(read: Read) -> Pieces:
    """The pieces of a source, closed together with their reader. Raises StoreAway, Refused("media")."""
    try:
        async with contextlib.aclosing(read()) as pieces:
            async for piece in pieces:
                yield piece
    except Temporary as exc:
        raise StoreAway(exc.reason, exc.detail) from exc
    except Unreadable as exc:
        raise Refused("media", "The object changed or got damaged while it was read.") from exc


async def _single_piece(data: bytes) -> Pieces:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
