"""Reads inboxes behind what a shard's bots and conversations know.

A message in an inbox says all that its bot's owner and its user's conversation need: its fingerprint, the context
token, and the window that it opened. Whoever takes a bot or opens a conversation reads what is behind its position,
once for all of a sandbox, and only if something is there.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from adapter.content.dedup import KEEP, KEEP_MS, SIZE
from adapter.contract.names import H_BOT, H_MSG_ID, H_SEALED, H_SEEN, Names
from adapter.errors import UNDECODABLE, Refused, Temporary
from adapter.kit.batches import Batches
from adapter.kit.timing import Clock
from adapter.outbound.window import InboundReceived
from adapter.ports import History, MediaRef, StoredMessage
from adapter.security.seal import Sealer, inbox_context

log = structlog.get_logger()

SET_BACK_S = 120.0
"""Time for which a position above the stream counts after it was met; pollers try again once a minute."""
READS = 32
"""Inboxes that are read at the same time, so that thousands do not delay polls."""


class Sealed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The sealed part of a message."""

    token: str = ""
    """The context token; "" if iLink gave none."""
    media: tuple[MediaRef, ...] = ()
    """Media of the items on iLink's CDN."""

    def __repr__(self) -> str:
        return "Sealed()"  # keeps tokens and keys out of logs and tracebacks


_NOTHING = Sealed()
_decoder = msgspec.json.Decoder(Sealed)
_encoder = msgspec.json.Encoder()


def seal(sealer: Sealer, message: str, bot: str, sandbox: str, part: Sealed) -> str:
    """The value of the header. `message`: the id on the bus."""
    return sealer.seal(inbox_context(message, bot, sandbox), _encoder.encode(part).decode())


def unseal(sealer: Sealer, stored: StoredMessage, sandbox: str) -> Sealed:
    """The sealed part of a stored message of the sandbox's inbox; empty where there is none. Raises
    Refused("token_key") if no known key opens it, or it was changed."""
    headers = stored.headers
    if not (sealed := headers.get(H_SEALED, "")):
        return _NOTHING
    context = inbox_context(headers.get(H_MSG_ID, ""), headers.get(H_BOT, ""), sandbox)
    try:
        return _decoder.decode(sealer.open(context, sealed))
    except UNDECODABLE as exc:
        raise Refused("token_key", "The sealed part of the message cannot be read.") from exc


class _Head(msgspec.Struct):
    """What a fold needs of an inbound message."""

    id: str
    user: str
    sent_at_ms: int = 0
    received_at_ms: int = 0


_decode = msgspec.json.Decoder(_Head).decode


class FoldedInbox(msgspec.Struct):
    """What was read of the inbox of one sandbox."""

    low: int
    high: int
    """Read are the messages after `low` up to `high`."""
    newest: dict[str, InboundReceived] = {}
    """By user: the newest message, with the newest token."""
    seen: dict[str, list[tuple[int, bytes]]] = {}
    """By bot: sequences and fingerprints of messages of the last hour."""


class InboxReader:
    """Reads the inboxes of a replica's sandboxes, many in one request."""

    def __init__(self, history: History, names: Names, sealer: Sealer, clock: Clock) -> None:
        self.names = names
        self.clock = clock
        self._history = history
        self._sealer = sealer
        self._newest = Batches(self._read_newest)
        self._slots = asyncio.Semaphore(READS)
        self.reached = 0
        """A sequence that the stream has reached."""
        self._set_back = 0.0, ""
        """Until when it counts, and what is said of it."""
        self._lasts = Batches(self._read_last)

    async def newest(self, sandbox: str) -> int:
        """The newest sequence of an inbox at the leader; 0: it is empty. Raises Temporary."""
        return await self._newest.get(self.names.inbox(sandbox)) or 0

    async def _read_newest(self, subjects: Sequence[str]) -> Mapping[str, int]:
        found = await self._history.read_last_of_each(self.names.stream_in, subjects)
        self.reached = max(self.reached, *(stored.seq for stored in found), 0)
        return {stored.subject: stored.seq for stored in found}

    async def check(self, position: int) -> None:
        """Raises Temporary for a position that the stream has never reached, as after a restore of an old backup: its
        messages would be taken for known."""
        if position > self.reached:
            self.reached = await self._lasts.get(self.names.stream_in) or 0
        if position > self.reached:
            said = f"A position ({position}) is above the last sequence of {self.names.stream_in} ({self.reached})"
            said = f"{said}: `wechat-nats doctor --fix` lowers the positions"
            self._set_back = self.clock.monotonic() + SET_BACK_S, said
            raise Temporary("inbox_set_back", said)

    @property
    def set_back(self) -> str:
        """What is wrong where a position was above the stream lately, for operators; "": nothing."""
        until, said = self._set_back
        return said if self.clock.monotonic() < until else ""

    async def _read_last(self, streams: Sequence[str]) -> Mapping[str, int]:
        return {stream: await self._history.last_sequence(stream) for stream in streams}

    async def read(self, sandbox: str, after: int, up_to: int, known: FoldedInbox) -> dict[str, InboundReceived]:
        """Adds the messages after a sequence up to another one to what is known, as the newest if they are. Returns
        the newest of them by user. Raises Temporary."""
        found: dict[str, InboundReceived] = {}
        prints: dict[str, deque[tuple[int, bytes]]] = {}
        forgotten_ms = self.clock.now_ms() - KEEP_MS
        async with self._slots:
            async for stored in self._history.read(self.names.stream_in, self.names.inbox(sandbox), after=after):
                if stored.seq > up_to:
                    break
                try:
                    head = _decode(stored.data)
                except UNDECODABLE as exc:
                    log.error("inbox.unreadable", sandbox=sandbox, sequence=stored.seq, detail=type(exc).__name__)
                    continue
                bot = stored.headers.get(H_BOT, "")
                if head.received_at_ms >= forgotten_ms and (line := _print_of(stored)):
                    prints.setdefault(bot, deque(maxlen=KEEP)).append((stored.seq, line))
                before = found.get(head.user)
                known_token = before.token if before is not None and before.bot == bot else ""
                found[head.user] = InboundReceived(
                    message=head.id,
                    token=self._token_of(stored, sandbox) or known_token,
                    bot=bot,
                    written_ms=head.sent_at_ms,
                    sequence=stored.seq,
                    received_ms=head.received_at_ms,
                )
        for user, received in found.items():
            of_user = known.newest.get(user)
            if of_user is None or of_user.sequence < received.sequence:
                known.newest[user] = received
        for bot, lines in prints.items():
            known.seen[bot] = sorted({*known.seen.get(bot, ()), *lines})[-KEEP:]
        return found

    def _token_of(self, stored: StoredMessage, sandbox: str) -> str:
        try:
            return unseal(self._sealer, stored, sandbox).token
        except Refused as exc:
            log.error("inbox.unopenable", sandbox=sandbox, sequence=stored.seq, detail=exc.detail)
            return ""


def _print_of(stored: StoredMessage) -> bytes:
    try:
        line = base64.b64decode(stored.headers.get(H_SEEN, ""), validate=True)
    except (binascii.Error, ValueError):
        return b""
    return line if len(line) == SIZE else b""


class Folds:
    """The inboxes of one shard, from when this replica took it.

    Messages that this replica publishes itself need not be read: `receive` gives them to their conversations.
    """

    def __init__(self, reader: InboxReader, on_read: Callable[[str, str, InboundReceived], None]) -> None:
        """`on_read(sandbox, user, message)`: called with the newest message of each user in what was read, for the
        conversations that are open."""
        self._reader = reader
        self._on_read = on_read
        self._known: dict[str, FoldedInbox] = {}
        self._wanted: dict[str, int] = {}
        """The lowest sequence that somebody who waits for a read of the sandbox knows."""
        self._reads: dict[str, Batches[str, FoldedInbox]] = {}
        """By sandbox, while it is read: a slow or broken inbox holds up no other."""

    def stop(self) -> None:
        """Tells nobody any more; breaks a reference cycle."""
        self._on_read = lambda *_: None

    def forget(self, sandbox: str) -> None:
        """Drops what the inbox had, since a bot serves the sandbox no more; who needs the rest reads it again."""
        self._known.pop(sandbox, None)

    async def read(self, sandbox: str, after: int, *, again: bool = True) -> FoldedInbox:
        """What the inbox has after a sequence. `again`: also what came since the last read; another replica may have
        published it. Raises Temporary."""
        await self._reader.check(after)
        known = self._known.get(sandbox)
        if known is not None and known.low <= after and not again:
            return known
        self._wanted[sandbox] = min(after, self._wanted.get(sandbox, after))
        reads = self._reads.setdefault(sandbox, Batches(self._read_one))
        try:
            await reads.get(sandbox)
        finally:
            if reads.is_idle:
                self._reads.pop(sandbox, None)
        return self._known.get(sandbox) or FoldedInbox(after, after)

    async def _read_one(self, sandboxes: Sequence[str]) -> Mapping[str, FoldedInbox]:
        (sandbox,) = sandboxes
        began = self._reader.clock.monotonic()
        if users := await self._read(sandbox, self._wanted.pop(sandbox)):
            took_ms = int((self._reader.clock.monotonic() - began) * 1000)
            log.debug("inbox.folded", sandbox=sandbox, users=users, took_ms=took_ms)
        return self._known

    async def _read(self, sandbox: str, after: int) -> int:
        """Returns the number of users with new messages."""
        newest = await self._reader.newest(sandbox)
        known, found = self._known.get(sandbox) or FoldedInbox(after, after), dict[str, InboundReceived]()
        if after < known.low:
            await self._reader.read(sandbox, after, known.low, known)
            known.low = after
        if newest > known.high:
            found = await self._reader.read(sandbox, known.high, newest, known)
            known.high = newest
            for user, received in found.items():
                self._on_read(sandbox, user, received)
        self._known[sandbox] = known  # not before all is read: a conversation may ask meanwhile
        return len(found)

    async def prints_of(self, sandbox: str, bot: str, after: int) -> tuple[list[bytes], int]:
        """The fingerprints of a bot's messages after a sequence of the inbox as it is now, and perhaps of some
        before, and the sequence up to which it was read. Open conversations have got what is new. Raises
        Temporary."""
        known = await self.read(sandbox, after)
        return [line for _, line in known.seen.get(bot, ())], known.high

    async def newest_of(self, sandbox: str, user: str, after: int, *, again: bool = False) -> InboundReceived | None:
        """The user's newest message after a sequence of the inbox, with the newest token, as far as it was published
        before this replica took the shard. `again`: or since then. Raises Temporary."""
        newest = (await self.read(sandbox, after, again=again)).newest
        found = newest.get(user)
        if found is None or found.sequence <= after:
            return None
        del newest[user]  # once: a record that is erased later begins with nothing
        return found
