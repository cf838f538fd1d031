"""Media for sandboxes, in pieces: `wechat.svc.media.get.<sandbox>` and `wechat.svc.media.put.<sandbox>`.

A client that may publish on a sandbox's subject may access its objects: those whose names start with `<sandbox>/`.
Requests do not depend on each other, so any replica answers any piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from urllib.parse import quote, unquote

import msgspec

from adapter.contract.messages import Media, MediaPiece, MediaQuery
from adapter.contract.names import (
    H_DURATION_MS,
    H_HEIGHT,
    H_MIME,
    H_NAME,
    H_NEXT,
    H_SHA256,
    H_SIZE,
    H_WIDTH,
    MAX_SEQ,
    check_sandbox,
    read_position,
)
from adapter.errors import BusRefused, Refused, Temporary, Unreadable
from adapter.ports import Objects, SandboxRequest, SandboxResponse, StoredObject
from adapter.tools import media_types
from adapter.tools.concurrency import FairSlots
from adapter.tools.decoding import invalid_request, read_request
from adapter.tools.metrics import Metrics

PIECE_MIN, PIECE_MAX = 16 * 1024, 512 * 1024
"""Sizes of an upload's pieces; the last may be shorter. They stay well below a message's usual limit of 1 MiB."""
COMPLETING = 4
"""Uploads whose digest is computed at the same time; those of one sandbox one by one."""
NAME_MAX = 255
MAX_READS = 64
"""Pieces that are read for answers at the same time."""
MAX_WAITS, MAX_WAITS_PER_SANDBOX = 1024, 8
"""Requests that wait for media which are being fetched, of all sandboxes and of one. They hold none of MAX_READS, and
a quarter of the requests that a sandbox may have open."""
Fetch: TypeAlias = Callable[[str, str, str], Awaitable[None]]
"""Returns when an object of the sandbox's message at this position is in the store. Raises Refused, whose detail
says why it cannot be had, or Temporary."""


class MediaService:
    """The handlers of media.get and media.put."""

    def __init__(self, objects: Objects, fetch: Fetch, metrics: Metrics, *, max_bytes: int) -> None:
        self._objects = objects
        self._fetch = fetch
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._reads = FairSlots(MAX_READS, share=MAX_READS)
        self._waits = FairSlots(MAX_WAITS, share=MAX_WAITS_PER_SANDBOX)
        self._completing = FairSlots(COMPLETING, share=1)

    async def get(self, request: SandboxRequest) -> SandboxResponse:
        """media.get: a piece of an object, which is fetched if the request names its message and waits for it.

        Takes its slots itself. Raises Refused (invalid, not_found), Temporary.
        """
        sandbox = check_sandbox(request.sandbox)
        query = read_request(request.data, MediaQuery, self._metrics)
        if query.after > MAX_SEQ:
            said = "`after` is the header Wechat-Next of the answer before."
            raise invalid_request(ValueError(said), self._metrics)
        if query.position:
            read_position(query.position)
        if not query.object.startswith(f"{sandbox}/"):
            raise _not_found()
        answer = await self._read(sandbox, query)
        if answer is None and query.position and query.wait_s and not query.after:
            await self._wait(sandbox, query)
            answer = await self._read(sandbox, query)
        if answer is None:
            raise _not_found()
        return answer

    async def _read(self, sandbox: str, query: MediaQuery) -> SandboxResponse | None:
        """The piece; None: it is not in the store. Raises Temporary."""
        async with self._reads.slot(sandbox):
            stored = await self._objects.get_info(query.object)
            if stored is None:
                return None
            try:
                piece, after = await self._objects.read_piece(stored, query.after)
            except Unreadable:
                return None
        headers = {H_SIZE: str(stored.size), H_SHA256: stored.sha256}
        if after:
            headers[H_NEXT] = str(after)
        if not query.after:
            shown = _describe(stored, piece)
            about = {H_WIDTH: shown.width, H_HEIGHT: shown.height, H_DURATION_MS: shown.duration_ms}
            headers |= {H_NAME: quote(shown.name, safe=""), H_MIME: shown.mime}
            headers |= {header: str(value) for header, value in about.items() if value is not None}
        return SandboxResponse(piece, headers)

    async def _wait(self, sandbox: str, query: MediaQuery) -> None:
        """Returns when the media are in the store. Raises Refused("not_found"), Temporary."""
        if not self._waits.try_acquire(sandbox):
            raise Temporary("busy", "Too many requests wait for media: ask again after their answers.")
        try:
            async with asyncio.timeout(query.wait_s):
                await self._fetch(sandbox, query.position, query.object)
        except TimeoutError:
            raise Temporary("fetching", "The media are still being fetched: ask again.") from None
        except Refused as exc:
            raise Refused("not_found", exc.detail) from exc
        finally:
            self._waits.release(sandbox)

    async def put(self, request: SandboxRequest) -> SandboxResponse:
        """media.put: stores a piece. Raises Refused("invalid"), Temporary, BusRefused (the store is full)."""
        sandbox = check_sandbox(request.sandbox)
        try:
            piece = msgspec.convert(request.headers, MediaPiece, strict=False)
        except msgspec.ValidationError as exc:
            raise invalid_request(exc, self._metrics) from exc
        name = f"{sandbox}/out/{piece.upload}"
        end = piece.offset + len(request.data)
        if end > self._max_bytes:
            raise Refused("invalid", f"The media exceed {self._max_bytes} bytes.")
        if len(request.data) > PIECE_MAX or (len(request.data) < PIECE_MIN and not piece.last):
            raise Refused("invalid", f"A piece has {PIECE_MIN} to {PIECE_MAX} bytes, the last one may have less.")
        try:
            size = await self._objects.append(name, piece.offset, request.data)
            if not piece.last:
                return _encode_answer(Media(object=name, size=size))
            if size != end:
                raise Refused("invalid", "More bytes are there under this id: take another one.")
            return _encode_answer(await self._complete(sandbox, name, size, piece))
        except BusRefused as exc:
            raise BusRefused(exc.code, f"The media are not stored: {exc.detail}") from exc

    async def _complete(self, sandbox: str, name: str, size: int, piece: MediaPiece) -> Media:
        title = _file_name(piece.name)
        async with self._completing.slot(sandbox):
            stored, head = await self._objects.complete_upload(
                name,
                size,
                sha256=piece.sha256,
                title=title,
                mime_of=lambda head: media_types.identify(head, title).mime,
            )
        return _describe(stored, head)


def _describe(stored: StoredObject, head: bytes) -> Media:
    """An object, and what its first bytes show."""
    kind = media_types.identify(head, stored.title)
    is_whole = len(head) == stored.size
    return Media(
        object=stored.name,
        name=stored.title or media_types.file_name(kind.mime.partition("/")[0], kind.suffix),
        mime=kind.mime,
        size=stored.size,
        sha256=stored.sha256,
        width=kind.width,
        height=kind.height,
        duration_ms=media_types.wav_duration_ms(head) or (media_types.silk_duration_ms(head) if is_whole else None),
    )


def _file_name(encoded: str) -> str:
    """A file name from a header, without folders and unprintable characters; "" for an invalid one."""
    name = unquote(encoded).replace("\\", "/").rpartition("/")[2]
    name = "".join(c for c in name if c.isprintable())[:NAME_MAX]
    return "" if name in media_types.NO_NAMES else name


def _encode_answer(answer: Media) -> SandboxResponse:
    return SandboxResponse(msgspec.json.encode(answer), {})


def _not_found() -> Refused:
    """The same error for missing objects and those of other sandboxes."""
    return Refused("not_found", "There is no such object of this sandbox.")
