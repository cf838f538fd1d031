"""A sandbox for Python programs: the messages of its users, and the answers to them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from adapter.agent.connection import MEDIA_WAIT_S, Connection
from adapter.agent.media import File, MediaFile, get_media, put_media, read, save
from adapter.agent.reader import Reader, retry
from adapter.agent.texts import TEXTS
from adapter.contract.messages import (
    COMMAND_BYTES,
    SCHEMA_VERSION,
    Inbound,
    InboundItem,
    Media,
    Outbound,
    OutFile,
    OutImage,
    OutItem,
    OutText,
    OutVideo,
    Receipt,
    TextItem,
    VoiceItem,
    Window,
)
from adapter.contract.names import (
    H_SCHEMA,
    check_sandbox,
)
from adapter.contract.quotes import kind_of
from adapter.errors import UNDECODABLE, BusRefused, Refused, Temporary, Unreadable
from adapter.settings import Settings, read_settings
from adapter.tools.media_types import file_name, identify
from adapter.tools.timing import raise_if_cancelled, wait_event

log = structlog.get_logger()

STORE_S = 3600.0
"""Time after which the file of a reply is given up."""
KINDS: dict[str, type[OutImage | OutVideo | OutFile]] = {"image": OutImage, "video": OutVideo}
"""By the first half of the MIME type. Other types are sent as files."""
FULL_S = 60.0
"""Pause between two attempts to store a command if the stream is full."""

LONGEST_WAIT_S = 60.0
"""Longest wait between two looks at the clock, which may be set, or stop with the machine."""

Handler = Callable[["Message"], Awaitable[None]]


class SendWindows:
    """Each person's window. The adapter's times are compared with this machine's clock."""

    def __init__(self) -> None:
        self.by_user: dict[str, Window] = {}
        """That of the newest message or receipt is the last one."""
        self._seen_ms: dict[str, int] = {}
        """When the message or receipt with that window was made."""
        self._told: dict[tuple[str, float], int | None] = {}
        """By person and `before_s`: the end of the last window of which `closing` has told."""
        self._changed = asyncio.Event()

    def note(self, user: str, window: Window, at_ms: int) -> None:
        """Takes over a window, unless a newer one is known. The receipt of a refused command may have none."""
        if user and window != Window() and at_ms >= self._seen_ms.get(user, 0):
            self.by_user.pop(user, None)
            self.by_user[user], self._seen_ms[user] = window, at_ms
            self._changed.set()

    async def closing(self, before_s: float) -> str:
        while True:
            self._changed.clear()
            now_ms, wait_s = time.time() * 1000, LONGEST_WAIT_S
            for user, window in self.by_user.items():
                closes_ms, key = window.closes_at_ms or 0, (user, before_s)
                if closes_ms <= now_ms or window.remaining == 0 or self._told.get(key) == closes_ms:
                    continue
                if (due_s := (closes_ms - now_ms) / 1000 - before_s) <= 0:
                    self._told[key] = closes_ms
                    return user
                wait_s = min(wait_s, due_s)
            await wait_event(self._changed, wait_s)


class Message:
    """A message of a user, and the replies to it."""

    def __init__(self, sandbox: Sandbox, position: str, inbound: Inbound) -> None:
        self.inbound = inbound
        """The message as on the bus, with items, quote and window."""
        self.position = position
        """Its place in the inbox."""
        self.sandbox = sandbox
        self._replies = 0
        self._parts: Sequence[Message] = ()
        """The messages that this one joins."""

    @classmethod
    def joined(cls, parts: Sequence[Message]) -> Message:
        """Messages of one person as one: the first one's id and position, the last one's text, and all items."""
        first, last = parts[0], parts[-1].inbound
        items = [item for part in parts for item in part.inbound.items]
        whole = msgspec.structs.replace(
            first.inbound, text=last.text, items=items, quote=last.quote, window=last.window
        )
        joined = cls(first.sandbox, first.position, whole)
        joined._parts = parts
        return joined

    @property
    def id(self) -> str:
        return self.inbound.id

    @property
    def user(self) -> str:
        return self.inbound.user

    @property
    def text(self) -> str:
        """The text and transcripts of the message; "" for a picture alone."""
        return self.inbound.text

    async def read_media(self, item: InboundItem) -> bytes:
        """The bytes of an item; of a recording those of its WAV, if there is one. Waits about a minute for what the
        adapter has to fetch from WeChat. Raises Refused, whose `detail` says why there are none, Temporary,
        Unreadable."""
        media: Media | None = getattr(item, "media", None)
        if media is None:
            raise Refused(getattr(item, "reason", "") or "no_media", "The item has no media.")
        position = next((part.position for part in self._parts if item in part.inbound.items), self.position)
        if isinstance(item, VoiceItem) and item.wav is not None:
            with contextlib.suppress(Refused):  # it could not be converted: as it was recorded, then
                return await self.sandbox.read_media(item.wav.object, position)
        return await self.sandbox.read_media(media.object, position)

    async def media(self, room: float = math.inf) -> AsyncIterator[MediaFile]:
        """All items but texts, with their bytes, of at most `room` bytes together. Bytes that cannot be had are left
        out, which the log says."""
        for item in self.inbound.items:
            if isinstance(item, TextItem):
                continue
            media, data = getattr(item, "media", None), b""
            if media is not None and media.size <= room:
                try:
                    data = await self.read_media(item)
                except (Refused, Temporary, Unreadable) as exc:
                    log.warning("agent.no_media", reason=exc.reason, detail=exc.detail, message=self.id)
            if len(data) > room:  # before they were fetched, the size was WeChat's word, if any
                data = b""
            room -= len(data)
            kind, name = kind_of(item), media.name if media else ""
            yield MediaFile(kind, name or file_name(kind, identify(data).suffix), data)

    async def save_media(self, folder: Path | str) -> list[Path]:
        """Writes the media of the message into a folder, under their senders' names as far as these are safe and
        free, and returns the files. Media that cannot be had are left out, which the log says. Raises OSError."""
        return [await asyncio.to_thread(save, Path(folder), file) async for file in self.media() if file.data]

    async def reply(
        self,
        text: str = "",
        items: Sequence[OutItem] = (),
        *,
        files: Sequence[File] = (),
        key: str = "",
    ) -> str:
        """Stores a reply and returns the command's id, which derives from the message's id and the reply's number.

        A message that comes again after a crash has the same ids, so that each reply is sent once. Waits while the
        bus is away. `files` follow text and items, as `Sandbox.item_of` makes them. `key` replaces the number in
        the id, for a reply that differs after a crash.
        Raises Refused("too_large") above 256 KiB, Refused("forbidden"), and what `Sandbox.item_of` raises.
        """
        self._replies += not key
        number = f"-{key}" if key else "" if self._replies == 1 else f"-{self._replies}"
        items = [*items, *[await self.sandbox.item_of(file) for file in files]]
        parts = [*([OutText(text=text)] if text else []), *items] if items else None
        command = Outbound(
            id=f"agent-{self.id}{number}",
            user=self.user,
            reply_to=self.id,
            text=None if items else text,
            items=parts,
        )
        await self.sandbox.send(command)
        return command.id or ""

    async def typing(self, state: Literal["on", "off"] = "on") -> None:
        """Shows or hides typing, for a minute or until a reply is sent. Published at most once."""
        await self.sandbox.publish(Outbound(user=self.user, reply_to=self.id, typing=state))


class Sandbox:
    """The connection of one sandbox, under its own permissions. `async with` opens and closes it.

    The default `settings` are those of the environment (NATS_URL, NATS_CREDS, NATS_NKEY, …). The client reconnects
    after each break. Errors are raised where messages are awaited: Refused("replaced") once another agent has opened
    the sandbox, Refused("forbidden"), and NatsError after a server has refused the connection.
    """

    def __init__(self, name: str, settings: Settings | None = None, *, connection: Connection | None = None) -> None:
        """`connection`: one that is open, and that others use, too. Raises Refused("invalid"), SettingsError."""
        self.name = check_sandbox(name)
        self._connection = connection or Connection(settings or read_settings(os.environ), name)
        self._is_shared = connection is not None
        self._settings, self._names, self._nc = self._connection.settings, self._connection.names, self._connection.nc
        self.texts = TEXTS[self._settings.language]
        self._reader = Reader(self._nc, self._names, name, self._connection.ready)
        self._windows = SendWindows()
        self.on_receipt: Callable[[Receipt], Awaitable[None]] | None = None
        """Called with each receipt of the sandbox's commands."""
        self._heard: Subscription | None = None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises Temporary("bus_down")."""
        if not self._is_shared:
            await self._connection.__aenter__()
        self._heard = await self._nc.subscribe(self._names.receipts(self.name), cb=self._on_receipt)
        self._reading = asyncio.create_task(self._reader.run())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        await self._reader.close()
        if not self._is_shared:
            await self._connection.__aexit__()
        elif self._heard is not None:
            with contextlib.suppress(NatsError):
                await self._heard.unsubscribe()

    async def __aiter__(self) -> AsyncIterator[Message]:
        """Yields the messages one after the other. A message is finished when the next one is requested. If the loop
        is left before, the next loop gets the message again."""
        self._reader.rewind()
        while True:
            message = await self._next()
            yield message
            self._reader.finish(message.position)

    async def run(self, handler: Handler, *, lane: Callable[[Message], Hashable] = lambda m: m.user) -> None:
        """Handles messages until cancelled: those of one lane (default: one user) one after the other, and lanes in
        parallel. A message is finished when its handler has returned. One whose handler raises is finished, too: the
        log has the traceback, and the person an apology."""
        lanes: dict[Hashable, deque[Message]] = {}
        self._reader.rewind()

        async def work(key: Hashable) -> None:
            while lanes[key]:
                message = lanes[key][0]
                try:
                    await handler(message)
                except (Exception, asyncio.CancelledError):  # the latter may also be that of a task of the handler
                    raise_if_cancelled()
                    await message.reply(self.texts.sorry, key="sorry")  # which raises what ends this agent
                    log.exception("agent.crashed", message=message.id)
                self._reader.finish(lanes[key].popleft().position)
            del lanes[key]

        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    message = await self._next()
                    key = lane(message)
                    if key in lanes:
                        lanes[key].append(message)
                    else:
                        lanes[key] = deque([message])
                        group.create_task(work(key))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _next(self) -> Message:
        assert self._reading is not None, "Open the sandbox by `async with`."
        waiting = asyncio.create_task(self._reader.next_message())
        try:
            await asyncio.wait({waiting, self._reading}, return_when=asyncio.FIRST_COMPLETED)
            if self._reading.done():
                self._reading.result()
            message = Message(self, *await waiting)
            self._windows.note(message.user, message.inbound.window, message.inbound.received_at_ms)
            return message
        finally:
            waiting.cancel()

    @property
    def window(self) -> Window | None:
        """What may still be sent to the person of the newest message or receipt; None: there was none since the
        sandbox was opened. `windows` has it for each person."""
        return next(reversed(self.windows.values()), None)

    @property
    def windows(self) -> dict[str, Window]:
        """The newest window of each person, by user, since the sandbox was opened."""
        return self._windows.by_user

    async def closing(self, before_s: float) -> str:
        """Returns the user whose window closes within `before_s` seconds, once that is so, if something may still be
        said to them. A window is told of once for each `before_s`; the person's next message opens another."""
        return await self._windows.closing(before_s)

    async def _on_receipt(self, msg: Msg) -> None:
        with contextlib.suppress(*UNDECODABLE):  # of a later version: no window
            receipt = msgspec.json.decode(msg.data, type=Receipt)
            self._windows.note(receipt.user, receipt.window, receipt.at_ms)
            if self.on_receipt is not None:
                await self.on_receipt(receipt)

    async def send(self, command: Outbound) -> None:
        """Stores a command. Repeats until the bus has confirmed it, so the command needs an id. Raises Refused
        (too_large, forbidden), BusRefused, NatsError."""
        payload = msgspec.json.encode(command)
        if len(payload) > COMMAND_BYTES:
            raise Refused("too_large", f"The command has {len(payload)} bytes; {COMMAND_BYTES} fit.")

        async def store() -> None:
            await self._connection.ready()
            try:
                await self._connection.store_command(self.name, payload, {H_SCHEMA: SCHEMA_VERSION})
            except BusRefused as exc:
                if not exc.is_full:
                    raise
                raise Temporary("full", exc.detail, retry_after_s=FULL_S) from exc

        await retry(store)

    async def publish(self, command: Outbound) -> None:
        """Sends a command at most once, without confirmation. Raises NatsError."""
        payload, subject = msgspec.json.encode(command), self._names.out(self.name)
        if self._connection.may_publish(subject):
            await self._nc.publish(subject, payload)
        else:
            await self._nc.publish(self._names.svc(f"send.{self.name}"), payload, reply=self._nc.new_inbox())

    async def read_media(self, name: str, position: str) -> bytes:
        """The bytes of an object that the message at this position names; see `Message.read_media`."""
        return await get_media(self._connection.request, self.name, name, position=position, wait_s=MEDIA_WAIT_S)

    async def put_media(self, data: bytes, name: str = "") -> Media:
        """Stores bytes for an item that `item_of` does not make, such as one with a caption. Waits up to an hour for
        an adapter. Raises Refused, Temporary."""
        return await retry(lambda: put_media(self._connection.request, self.name, data, name), give_up_s=STORE_S)

    async def item_of(self, file: File, name: str = "") -> OutItem:
        """A file as an item of a reply: a picture, a video or a file, by its content. `name`: what the person sees,
        by default that of the path. Raises OSError, and what `put_media` raises."""
        data = await asyncio.to_thread(read, file, self._settings.media_max_bytes)
        name = name or ("" if isinstance(file, bytes) else Path(file).name)
        kind = KINDS.get(identify(data).mime.partition("/")[0], OutFile)
        return kind(media=await self.put_media(data, name))
