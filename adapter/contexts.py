"""The context record of each bot and user: one copy in memory per replica, every change by compare-and-set.

Inbound (a new token, a new window) and outbound (a send counted) change the same record. A lock per peer serialises
them, and the revision refuses a write of a replica that lost the peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

import msgspec
import structlog

from adapter import window
from adapter.errors import UNDECODABLE, Conflict
from adapter.names import peer_key
from adapter.ports import Bucket, Entry
from adapter.records import Context

log = structlog.get_logger()


class Peer:
    """One bot and one user. `context` may be newer than the bucket until the next `save`."""

    __slots__ = (
        "bot",
        "context",
        "in_flight",
        "lock",
        "outdated",
        "revision",
        "sending",
        "stored",
        "telling",
        "told",
        "told_in",
        "told_sure",
        "user",
    )

    def __init__(self, bot: str, user: str) -> None:
        self.bot = bot
        self.user = user
        self.context = self.stored = Context()
        """As it is known here, and as the bucket last had it."""
        self.revision = 0
        self.in_flight = 0
        """Requests to sendmessage that have no answer yet."""
        self.outdated = False
        """Another replica may have written since it was read: to be read anew when it is asked for again."""
        self.lock = asyncio.Lock()
        self.sending = asyncio.Lock()
        """Held while a command is being sent: one at a time to one user (ilink-protocol 10.3)."""
        self.told: window.Name = ""
        """What the sandbox was told of the window; stored with the next `save`."""
        self.told_in = ""
        """Of which window: its inbound message."""
        self.telling: window.Name = ""
        """What it will have been told once the event that is on its way is on the bus."""
        self.told_sure = False
        """Nothing else can be on the bus: not so after a crash, which may have come before the record was written."""

    @property
    def in_use(self) -> bool:
        """Whether somebody works with it, so that it must stay the only copy."""
        return bool(self.in_flight or self.lock.locked() or self.sending.locked())


class Contexts:
    """The peers that this replica works for."""

    def __init__(self, bucket: Bucket, fence: Callable[[str], None]) -> None:
        self._bucket = bucket
        self._fence = fence
        """Raises LeaseLost where this replica may not work for the bot."""
        self._peers: dict[str, dict[str, Peer]] = {}
        """By bot and user."""
        self._loading: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """Held by those who load."""

    async def peer(self, bot: str, user: str) -> Peer:
        """The peer, read from the bucket the first time. Raises Temporary."""
        found = self._peers.get(bot, {}).get(user)
        if found is not None:
            if found.outdated:
                await self.reread(found)
            return found
        async with self._loading.setdefault((bot, user), asyncio.Lock()):
            found = self._peers.get(bot, {}).get(user)
            if found is None:
                found = Peer(bot, user)
                _read(found, await self._bucket.get(peer_key(bot, user)))
                found.told = found.telling = found.context.told
                found.told_in = found.context.told_in
                found.told_sure = not found.revision
                self._peers.setdefault(bot, {})[user] = found
            return found

    def loaded(self, bot: str, user: str) -> Peer | None:
        """The peer, where it was read from the bucket."""
        return self._peers.get(bot, {}).get(user)

    async def stored(self, bot: str, user: str) -> Context:
        """The record as the bucket has it, for who does not work for the peer. Raises Temporary."""
        return await stored_context(self._bucket, bot, user)

    def forget(self, bot: str) -> None:
        """Drops what is known of a bot's users: another replica may write now, or has written. What is in use stays,
        and is read anew before it is used again."""
        used = {user: peer for user, peer in self._peers.pop(bot, {}).items() if peer.in_use}
        if used:
            self._peers[bot] = used
        for peer in used.values():
            peer.outdated = True

    def tidy(self, is_ours: Callable[[str], bool]) -> None:
        """Drops the users of bots that are not `is_ours` any more, and those of whom nothing is known: a sandbox may
        name any user."""
        for bot, peers in list(self._peers.items()):
            ours = is_ours(bot)
            for user, peer in list(peers.items()):
                if not peer.in_use and not (peer.revision and ours):
                    del peers[user]
            if not peers:
                del self._peers[bot]

    async def refresh(self, bot: str) -> list[str]:
        """Reads the bot's users anew, since another replica may have written; who wrote to it. Raises Temporary."""
        wrote = []
        for peer in list(self._peers.get(bot, {}).values()):
            async with peer.lock:
                before = peer.context.inbound_id
                await self._merge(peer)
                if peer.context.inbound_id != before:
                    wrote.append(peer.user)
        return wrote

    async def reread(self, peer: Peer) -> None:
        """Reads the record anew, as the owner before may have written. Raises Temporary."""
        async with peer.lock:
            await self._merge(peer)

    async def save(
        self, peer: Peer, make: Callable[[Context], Context], *, fence: Callable[[], None] | None = None
    ) -> None:
        """Changes the record and stores it, with whatever was changed only in memory. `fence`: in place of that of
        the bot, which serves another sandbox by now; it raises LeaseLost.

        Raises Temporary, LeaseLost.
        """
        fence = fence or partial(self._fence, peer.bot)
        async with peer.lock:
            while True:
                before = peer.context
                after = msgspec.structs.replace(make(before), told=peer.told, told_in=peer.told_in)
                key, value = peer_key(peer.bot, peer.user), msgspec.json.encode(after)
                try:
                    peer.revision = await self._bucket.update(key, value, peer.revision)
                except Conflict:
                    fence()
                    await self._merge(peer)  # an operator's hand, or the owner before us: its word counts
                    fence()  # the answer may be late, and the word that of an owner after us
                    continue
                peer.stored = after
                # what iLink has answered meanwhile is known here alone
                peer.context = after if peer.context is before else window.known_also(after, peer.context, before)
                return

    async def _merge(self, peer: Peer) -> None:
        """Reads the record anew; what was learned here of commands since it was stored is newer. Raises Temporary."""
        entry = await self._bucket.get(peer_key(peer.bot, peer.user))
        known, base, revision = peer.context, peer.stored, peer.revision
        _read(peer, entry)
        peer.outdated = False
        peer.context = known if peer.revision == revision else window.known_also(peer.context, known, base)


def _read(peer: Peer, entry: Entry | None) -> None:
    """Takes over what the bucket has."""
    if entry is None:
        peer.revision = 0  # purged by an operator, if it ever was
        return
    peer.revision = entry.revision
    if entry.value is None:
        peer.context = peer.stored = Context()
    elif found := _context_in(entry, peer.bot):  # else what is known here is written over it
        peer.context = peer.stored = found


async def stored_context(bucket: Bucket, bot: str, user: str) -> Context:
    """A user's record as the bucket has it; an empty one where there is none. Raises Temporary."""
    return _context_in(await bucket.get(peer_key(bot, user)), bot) or Context()


def _context_in(entry: Entry | None, bot: str) -> Context | None:
    """None also where another hand wrote what cannot be read."""
    try:
        return msgspec.json.decode(entry.value, type=Context) if entry and entry.value else None
    except UNDECODABLE as exc:
        log.error("context.unreadable", bot=bot, detail=type(exc).__name__)
        return None
