"""Media both ways: fetched from iLink's CDN to the object store, and uploaded to it for a command.

Those of an inbound message are named in it at once, and fetched behind it.

Nothing waits for a fetch but who asks for the bytes, and no list of fetches is kept: whatever a crash, a failure or a
bound has left out, the message's sealed references bring when somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from adapter.bridge.commands import MediaPart
from adapter.bridge.entries import read_entry
from adapter.contract.messages import Inbound, InboundItem, Media, VoiceItem
from adapter.contract.names import Names, media_object, read_position
from adapter.contract.quotes import kind_of
from adapter.contract.repeats import bot_of
from adapter.errors import UNDECODABLE, BusRefused, LeaseLost, Refused, Temporary, Unreadable
from adapter.ports import Account, Cdn, History, MediaRef, Objects, Pieces, Read, StoredObject, Uploaded
from adapter.tools import media_types
from adapter.tools.concurrency import FairSlots
from adapter.tools.media_types import HEAD, file_name, identify
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import Clock, backoff

log = structlog.get_logger()

ATTEMPTS = 3
PIECE = 64 * 1024
"""Bytes in one piece of a media item that the command itself brings."""
FETCH_S = 60.0
"""Longest time of one attempt. Its slot is one of a few."""
MAX_FETCHES, MAX_FETCHES_PER_SANDBOX = 1024, 64
"""Most fetches that run or wait for a slot, of all sandboxes and of one. Each takes some kilobytes."""
OWNER_S, LOOK_S = 1.0, 0.25
"""How long a fetch on demand waits for that of the bot's owner, which mostly is another replica, and the time between
two looks into the store."""
WAV = ".wav"
"""What follows a voice item's object in the name of its WAV."""
WHY = {
    "reference": "iLink did not say where the media are, or named a place that is not allowed.",
    "unavailable": "WeChat's CDN does not give the media: ask again later.",
    "corrupt": "The media cannot be decrypted, or the recording cannot be converted.",
    "too_large": "The media are larger than the adapter takes.",
    "timeout": "WeChat's CDN is too slow: ask again later.",
    "store": "The object store takes nothing now: ask again later.",
    "unbound": "The person who sent the media is not bound to this sandbox any more.",
}
"""By the reason of a failed fetch: what is told to who asks."""


class MediaFetch(NamedTuple):
    """The media of one item of a message in an inbox."""

    sandbox: str
    bot: str
    user: str
    object: str
    item: InboundItem
    source: MediaRef


def name_media(
    sandbox: str, user: str, message: str, items: Sequence[InboundItem], fetches: Sequence[MediaRef]
) -> list[InboundItem]:
    """The items of a message with the names of their objects. One with a `reason` is not fetched, and gets none.

    `message`: its id on the bus.
    """
    named = list(items)
    for fetch in fetches:
        item = named[fetch.item]
        if getattr(item, "reason", ""):
            continue
        length_ms = getattr(item, "duration_ms", None)
        found = Media(
            object=media_object(sandbox, user, message, fetch.item),
            name=fetch.name,
            size=fetch.size,
            duration_ms=length_ms,
        )
        if isinstance(item, VoiceItem) and media_types.HAS_VOICE:
            wav = Media(object=f"{found.object}{WAV}", name="voice.wav", mime="audio/wav", duration_ms=length_ms)
            named[fetch.item] = msgspec.structs.replace(item, media=found, wav=wav)
        else:
            named[fetch.item] = msgspec.structs.replace(item, media=found)
    return named


class MediaFetcher:
    """All fetches of a replica."""

    def __init__(
        self,
        cdn: Cdn,
        objects: Objects,
        history: History,
        names: Names,
        sealer: Sealer,
        to_wav: Callable[[bytes], Awaitable[bytes | None]],
        may_store: Callable[[str, str, str], bool],
        transfers: FairSlots,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`to_wav` converts a SILK recording in a thread; None: it cannot be converted.

        `may_store(sandbox, bot, user)`: whether a sandbox is served by a bot, or for a user. It is asked right before
        an object comes into being, since an erasure finds only what is there. `transfers` limits concurrent downloads
        and uploads.
        """
        self._cdn = cdn
        self._objects = objects
        self._history = history
        self._names = names
        self._sealer = sealer
        self._to_wav = to_wav
        self._may_store = may_store
        self._transfers = transfers
        self._clock = clock
        self._metrics = metrics
        self._tasks = TaskSet("media")
        self._running: dict[str, asyncio.Task[str]] = {}
        """By object, which begins with its sandbox: fetches, which end with "", or with a reason."""

    def fetch_soon(
        self, sandbox: str, user: str, message: str, items: Sequence[InboundItem], fetches: Sequence[MediaRef]
    ) -> None:
        """Begins to fetch what the store lacks of a message. `items` as `name_media` returns them, `message` and
        `fetches` as given there."""
        for source in fetches:
            name = media_object(sandbox, user, message, source.item)
            if _names(items[source.item], name):
                self._begin(MediaFetch(sandbox, bot_of(message), user, name, items[source.item], source), wait_s=0.0)

    async def ensure(self, sandbox: str, position: str, name: str) -> None:
        """Returns when the object is in the store: fetched here, or by the owner of its bot. `position`: the
        message's place in the inbox.

        Raises Refused with one of the reasons in WHY, or "not_found" where the message is gone or has no such object.
        Raises Temporary.
        """
        base = name.removesuffix(WAV)
        if (task := self._running.get(base)) is None:
            task = self._begin(await self._find(sandbox, position, base), wait_s=OWNER_S)
        if task is None:
            raise Temporary("busy", "Too many media of this sandbox are being fetched: ask again.")
        reason = await asyncio.shield(task)
        if not reason and name != base and await self._objects.get_info(name) is None:
            reason = "corrupt"
        if reason:
            raise Refused(reason, WHY[reason])

    async def close(self) -> None:
        """Cancels all fetches; their media come on demand."""
        self._tasks.cancel_all()
        await self._tasks.wait_ended()

    async def _find(self, sandbox: str, position: str, name: str) -> MediaFetch:
        """The item with this object. Raises Refused, Temporary."""
        sequence, number = read_position(position)
        stored = await self._history.get(self._names.stream_in, sequence)
        if stored is not None and stored.subject.startswith(self._names.inbox(sandbox, "")):
            try:
                found = read_entry(stored, self._sealer)
                inbound = msgspec.json.decode(found.entry.messages[number], type=Inbound)
                sources = dict(found.secrets.media) if found.secrets is not None else {}
                for source in sources.get(number, ()):
                    item = inbound.items[source.item]
                    if _names(item, name):
                        return MediaFetch(sandbox, inbound.bot, inbound.user, name, item, source)
            except (*UNDECODABLE, IndexError, Unreadable) as exc:
                log.error("media.message_unreadable", sandbox=sandbox, sequence=sequence, reason=type(exc).__name__)
        raise Refused("not_found", "The inbox has no message with this object at this position.")

    def _begin(self, fetch: MediaFetch, *, wait_s: float) -> asyncio.Task[str] | None:
        """Begins a fetch, or joins the one that runs. None: there are too many. `wait_s`: how long another replica
        may be first."""
        if task := self._running.get(fetch.object):
            return task
        of_sandbox = sum(name.startswith(f"{fetch.sandbox}/") for name in self._running)
        if len(self._running) >= MAX_FETCHES or of_sandbox >= MAX_FETCHES_PER_SANDBOX:
            self._metrics.media_fetches.labels(outcome="dropped").inc()
            return None
        task = self._running[fetch.object] = self._tasks.spawn(self._run(fetch, wait_s))
        task.add_done_callback(lambda _: self._running.pop(fetch.object))
        return task

    async def _run(self, fetch: MediaFetch, wait_s: float) -> str:
        """Fetches in a few attempts. Returns "", or the reason of the failure."""
        until = self._clock.monotonic() + wait_s
        while self._clock.monotonic() < until:  # another replica may store it
            with contextlib.suppress(Temporary):
                if await self._objects.get_info(_last_object(fetch)) is not None:
                    return ""
            await self._clock.sleep(LOOK_S)
        for attempt in range(1, ATTEMPTS + 1):
            reason, is_final = await self._try(fetch)
            if is_final or attempt == ATTEMPTS:
                break
            await self._clock.sleep(backoff(attempt, first_s=0.5))
        self._metrics.media_fetches.labels(outcome=reason or "stored").inc()
        if reason:
            log.info("media.missing", sandbox=fetch.sandbox, object=fetch.object, reason=reason)
        return reason

    async def _try(self, fetch: MediaFetch) -> tuple[str, bool]:
        """One attempt. Returns "", or a reason, and whether another attempt would be in vain."""
        try:
            async with self._transfers.slot(fetch.sandbox), asyncio.timeout(FETCH_S):
                await self._fetch(fetch)
        except TimeoutError:
            return "timeout", True
        except (Refused, LeaseLost) as exc:  # of the CDN; nobody is bound
            return exc.reason, exc.reason != "unavailable"
        except (Temporary, Unreadable):
            return "store", False
        except BusRefused as exc:
            log.error("media.refused", code=exc.code, detail=exc.detail)
            return "store", True
        except Exception:
            log.exception("media.crashed", sandbox=fetch.sandbox)
            return "unavailable", False
        return "", True

    async def _fetch(self, fetch: MediaFetch) -> None:
        """Raises Refused (the CDN failed), Temporary, Unreadable, BusRefused (the store failed), LeaseLost, and
        anything where the code fails."""
        stored = await self._objects.get_info(fetch.object) or await self._put(fetch, self._plain(fetch.source))
        if _last_object(fetch) == fetch.object or stored.size > media_types.SILK_MAX_BYTES:
            return
        recording = b"".join([piece async for piece in self._objects.read(stored)])
        if media_types.is_silk(recording) and (wav := await self._to_wav(recording)) is not None:
            await self._put(fetch._replace(object=_last_object(fetch)), _once(wav))

    async def _put(self, fetch: MediaFetch, pieces: Pieces) -> StoredObject:
        def describe(head: bytes) -> tuple[str, str]:
            kind = media_types.identify(head, fetch.source.name)
            return kind.mime, fetch.source.name or media_types.file_name(kind_of(fetch.item), kind.suffix)

        def ensure_served() -> None:
            if not self._may_store(fetch.sandbox, fetch.bot, fetch.user):
                raise LeaseLost("unbound", WHY["unbound"])

        return await self._objects.put(fetch.object, pieces, describe=describe, ensure_owner=ensure_served)

    async def _plain(self, source: MediaRef) -> Pieces:
        """The bytes from the CDN. Raises Refused for all its errors, so that others are those of the object store."""
        try:
            async with contextlib.aclosing(self._cdn.download(source)) as pieces:
                async for piece in pieces:
                    yield piece
        except Temporary as exc:
            raise Refused("unavailable", exc.detail) from exc


async def _once(data: bytes) -> Pieces:
    yield data


def _names(item: InboundItem, name: str) -> bool:
    """Whether the item's media are this object."""
    found = getattr(item, "media", None)
    return isinstance(found, Media) and found.object == name


def _last_object(fetch: MediaFetch) -> str:
    """The object that is stored last: a voice item's WAV."""
    return f"{fetch.object}{WAV}" if isinstance(fetch.item, VoiceItem) and fetch.item.wav else fetch.object


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
