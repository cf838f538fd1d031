"""Downloads the media of one item from iLink's CDN to the object store, detects their type, converts voice to WAV."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import structlog

from adapter.content import media
from adapter.content.quotes import kind_of
from adapter.contract import messages as contract
from adapter.contract.messages import InboundItem
from adapter.contract.names import digest, media_prefix
from adapter.errors import BusRefused, Refused, Temporary
from adapter.inbound.inbox import AddressedMessage
from adapter.kit.slots import FairSlots
from adapter.kit.timing import Clock, backoff
from adapter.ports import Cdn, MediaRef, Objects, Pieces, StoredObject

log = structlog.get_logger()

ATTEMPTS = 3


class DownloadDeps(NamedTuple):
    """Dependencies of a download."""

    cdn: Cdn
    objects: Objects
    to_wav: Callable[[bytes], Awaitable[bytes | None]]
    """Converts a SILK recording to WAV in a thread; None: it cannot be converted."""
    clock: Clock
    transfers: FairSlots
    """Limits concurrent downloads and uploads."""


class MediaUnavailable(Exception):
    """The media cannot be downloaded now. `reason` is one of contract.MediaReason."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        """Another attempt may succeed."""


class DownloadResult(NamedTuple):
    """The media of one item, or the reason why they are missing."""

    media: contract.Media | None = None
    wav: contract.Media | None = None
    reason: str = ""


async def download(message: AddressedMessage, fetch: MediaRef, deps: DownloadDeps) -> DownloadResult:
    """Downloads the media of one item in a few attempts. Raises MediaUnavailable."""
    failures = 0
    while True:
        try:
            return await _download_once(message, fetch, deps)
        except MediaUnavailable as exc:
            failures += 1
            if not exc.again or failures == ATTEMPTS:
                raise
        except Exception as exc:
            failures += 1
            log.exception("media.crashed", bot=message.bot)
            if failures == ATTEMPTS:
                raise MediaUnavailable("unavailable", again=False) from exc
        await deps.clock.sleep(backoff(failures, first_s=0.5))


async def _download_once(message: AddressedMessage, fetch: MediaRef, deps: DownloadDeps) -> DownloadResult:
    """Raises MediaUnavailable."""
    item = message.inbound.items[fetch.item]
    name = f"{media_prefix(message.sandbox, message.inbound.user)}{digest(message.id.encode())}-{fetch.item}"
    recording = _Copy(media.SILK_MAX_BYTES) if isinstance(item, contract.VoiceItem) else None
    async with contextlib.aclosing(_pieces(message.sandbox, fetch, deps)) as pieces:
        head = await _head(pieces)
        kind = media.identify(head, fetch.name)
        title = fetch.name or media.file_name(kind_of(item), kind.suffix)
        whole = _joined(head, pieces)
        try:
            stored = await deps.objects.put(
                name, recording.of(whole) if recording else whole, mime=kind.mime, title=title
            )
        except Temporary as exc:
            raise MediaUnavailable("store", again=True) from exc
        except BusRefused as exc:
            log.error("media.refused", code=exc.code, detail=exc.detail)
            raise MediaUnavailable("store", again=False) from exc
    got = DownloadResult(media_from_object(stored, kind, title, _duration_of(item)))
    if recording is None or not media.is_silk(recording.data):
        return got
    return await _with_wav(f"{name}.wav", recording.data, got, deps)


async def _with_wav(name: str, silk: bytes, got: DownloadResult, deps: DownloadDeps) -> DownloadResult:
    """Adds the recording as WAV if it can be converted and stored."""
    assert got.media is not None
    length_ms = got.media.duration_ms or media.silk_duration_ms(silk)
    got = got._replace(media=msgspec.structs.replace(got.media, duration_ms=length_ms))
    wav = await deps.to_wav(silk)
    if wav is None:
        return got
    kind = media.identify(wav)
    title = media.file_name("voice", ".wav")
    try:
        stored = await deps.objects.put(name, _once(wav), mime=kind.mime, title=title)
    except (Temporary, BusRefused) as exc:
        log.warning("media.wav_store_failed", reason=exc.reason)
        return got
    return got._replace(wav=media_from_object(stored, kind, title, media.wav_duration_ms(wav)))


class _Copy:
    """Copies the bytes of a stream; empty if they exceed `limit`."""

    def __init__(self, limit: int) -> None:
        self.data = b""
        """Set at the end of the stream."""
        self._limit = limit

    async def of(self, pieces: Pieces) -> Pieces:
        kept, size = bytearray(), 0
        async for piece in pieces:
            size += len(piece)
            if size <= self._limit:
                kept += piece
            yield piece
        self.data = bytes(kept) if size <= self._limit else b""


async def _pieces(sandbox: str, fetch: MediaRef, deps: DownloadDeps) -> Pieces:
    """The decrypted bytes, read in a transfer slot.

    Raises MediaUnavailable for every error of the CDN, so that other errors are those of the object store.
    """
    try:
        async with deps.transfers.slot(sandbox), contextlib.aclosing(deps.cdn.download(fetch)) as plain:
            async for piece in plain:
                yield piece
    except Refused as exc:
        raise MediaUnavailable(exc.reason, again=exc.reason == "unavailable") from exc
    except Temporary as exc:
        raise MediaUnavailable("unavailable", again=True) from exc


async def _head(pieces: Pieces) -> bytes:
    head = bytearray()
    async for piece in pieces:
        head += piece
        if len(head) >= media.HEAD:
            break
    return bytes(head)


async def _joined(head: bytes, rest: Pieces) -> Pieces:
    if head:
        yield head
    async for piece in rest:
        yield piece


async def _once(data: bytes) -> Pieces:
    yield data


def _duration_of(item: InboundItem) -> int | None:
    return item.duration_ms if isinstance(item, contract.VoiceItem | contract.VideoItem) else None


def media_from_object(stored: StoredObject, kind: media.Kind, name: str, duration_ms: int | None) -> contract.Media:
    """A stored object in the form of the contract."""
    return contract.Media(
        object=stored.name,
        name=name,
        mime=kind.mime,
        size=stored.size,
        sha256=stored.sha256,
        width=kind.width,
        height=kind.height,
        duration_ms=duration_ms,
    )


def with_media(item: InboundItem, got: DownloadResult) -> InboundItem:
    """The item with the result of its download."""
    if isinstance(item, contract.VoiceItem):
        length_ms = item.duration_ms if item.duration_ms or got.media is None else got.media.duration_ms
        return msgspec.structs.replace(item, media=got.media, wav=got.wav, reason=got.reason, duration_ms=length_ms)
    return msgspec.structs.replace(item, media=got.media, reason=got.reason)
