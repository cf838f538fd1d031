"""Media for sandboxes, in pieces: `wechat.svc.media.get.<sandbox>` and `wechat.svc.media.put.<sandbox>`.

A client that may publish on a sandbox's subject may access its objects: those whose names start with `<sandbox>/`.
Requests do not depend on each other, so any replica answers any piece.
"""

from __future__ import annotations

from urllib.parse import unquote

import msgspec

from adapter.content import media
from adapter.contract.messages import Media, MediaPiece, MediaQuery
from adapter.contract.names import H_NEXT, H_SHA256, H_SIZE, MAX_SEQ, check_sandbox
from adapter.errors import BusRefused, Refused, Unreadable
from adapter.inbound.download import media_from_object
from adapter.kit.slots import FairSlots
from adapter.observability.metrics import Metrics
from adapter.ports import PartialObjects, SandboxRequest, SandboxResponse
from adapter.services.requests import invalid_request, read_request

PIECE_MIN, PIECE_MAX = 16 * 1024, 512 * 1024
"""Sizes of an upload's pieces; the last may be shorter. They stay well below a message's usual limit of 1 MiB."""
COMPLETING = 4
"""Uploads whose digest is computed at the same time; those of one sandbox one by one."""
NAME_MAX = 255


class MediaService:
    """The handlers of media.get and media.put."""

    def __init__(self, objects: PartialObjects, metrics: Metrics, *, max_bytes: int) -> None:
        self._objects = objects
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._completing = FairSlots(COMPLETING, share=1)

    async def get(self, request: SandboxRequest) -> SandboxResponse:
        """media.get: a piece of an object. Raises Refused (invalid, not_found), Temporary."""
        sandbox = check_sandbox(request.sandbox)
        query = read_request(request.data, MediaQuery, self._metrics)
        if query.after > MAX_SEQ:
            raise invalid_request(
                ValueError("`after` is the header Wechat-Next of the answer before."), self._metrics
            )
        if not query.object.startswith(f"{sandbox}/"):
            raise _not_found()
        stored = await self._objects.get_info(query.object)
        if stored is None:
            raise _not_found()
        try:
            piece, after = await self._objects.read_piece(stored, query.after)
        except Unreadable as exc:
            raise _not_found() from exc
        headers = {H_SIZE: str(stored.size), H_SHA256: stored.sha256}
        if after:
            headers[H_NEXT] = str(after)
        return SandboxResponse(piece, headers)

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
                name, size, sha256=piece.sha256, title=title, mime_of=lambda head: media.identify(head, title).mime
            )
        kind = media.identify(head, stored.title)
        name = stored.title or media.file_name(kind.mime.partition("/")[0], kind.suffix)
        return media_from_object(stored, kind, name, media.wav_duration_ms(head))


def _file_name(encoded: str) -> str:
    """A file name from a header, without folders and unprintable characters; "" for an invalid one."""
    name = unquote(encoded).replace("\\", "/").rpartition("/")[2]
    name = "".join(c for c in name if c.isprintable())[:NAME_MAX]
    return "" if name in media.NO_NAMES else name


def _encode_answer(answer: Media) -> SandboxResponse:
    return SandboxResponse(msgspec.json.encode(answer), {})


def _not_found() -> Refused:
    """The same error for missing objects and those of other sandboxes."""
    return Refused("not_found", "There is no such object of this sandbox.")
