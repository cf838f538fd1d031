"""What the bus has of one person: found, counted, erased.

A person is a WeChat user. Their bots talk to nobody else, so that what names one of these bots is theirs, too. What
is erased is deleted by sequence and overwritten on the server's disk, but for keys of buckets: these are replaced by
a mark, and go from the disk when the server rewrites its file.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.content.dedup import bot_of
from adapter.contract.messages import ControlAnswer, Erase, ErasedEvent
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_SANDBOX, Names, media_prefix, to_subject_token
from adapter.errors import UNDECODABLE, Conflict, Temporary
from adapter.kit.timing import Clock
from adapter.observability.events import BusAccess
from adapter.ports import Bucket, History, Stored

log = structlog.get_logger()

Kind: TypeAlias = Literal[
    "binding", "conversation", "login", "message", "event", "receipt", "command", "dead_letter", "media", "journal"
]
MARK_S = 60
"""How long the mark of a deleted conversation stays, whose key names the user."""
LOOK_S = 0.5
RELEASE_WAIT_S = 30.0
"""For the owners of a person's bots and conversations to end with them, beside what media may take."""


class Found(NamedTuple):
    """A message of a stream that is about the person."""

    kind: Kind
    stream: str
    stored: Stored
    sandbox: str = ""
    bot: str = ""


class _About(msgspec.Struct):
    """What a message or record says of whom it is about."""

    user: str | None = None
    former_user: str = ""
    bot: str | None = None
    sandbox: str | None = None
    reply_to: str | None = None
    command: str = ""
    dispatched_to: dict[str, int] = {}


class _Object(msgspec.Struct):
    """What the object store says of an object."""

    name: str = ""
    nuid: str = ""


class PersonSearch:
    """Reads streams and buckets for one person, of all sandboxes or of one."""

    def __init__(self, history: History, names: Names, user: str, sandbox: str | None) -> None:
        self._history = history
        self._names = names
        self._user = user
        self._sandbox = sandbox
        self._bots: set[str] = set()
        self._serving_elsewhere: set[str] = set()
        """Bots of the person's that serve another sandbox: their journals are in use."""
        self._commands: set[tuple[str, str]] = set()
        """Sandbox and id of each command that has a receipt."""

    async def find(self) -> AsyncIterator[Found]:
        """All there is, what names the person's bots first. Raises Temporary."""
        for kind, stream, subject in self._places():
            async for stored in self._history.read(stream, subject):
                if found := self._judge(kind, stream, stored):
                    yield found
        async for stored in self._history.read(self._names.stream_dead, self._names.dead_letters("*")):
            if self._is_their_dead_letter(stored):
                yield Found("dead_letter", self._names.stream_dead, stored, stored.headers.get(H_SANDBOX, ""))
        async for found in self._find_media():
            yield found
        for bot in sorted(self._bots - self._serving_elsewhere):
            async for stored in self._history.read(self._names.stream_journal, self._names.journal(bot)):
                yield Found("journal", self._names.stream_journal, stored, bot=bot)

    def _places(self) -> list[tuple[Kind, str, str]]:
        names, sandbox = self._names, self._sandbox or "*"
        conversation = f"$KV.{names.conversations}.{sandbox}.{to_subject_token(self._user)}"
        out = names.out_of_sandbox(self._sandbox) if self._sandbox else f"{names.out_plain}.>"
        return [
            ("binding", f"KV_{names.bindings}", f"$KV.{names.bindings}.>"),
            ("conversation", f"KV_{names.conversations}", conversation),
            ("login", f"KV_{names.logins}", f"$KV.{names.logins}.>"),
            ("message", names.stream_in, names.inbox(sandbox)),
            ("event", names.stream_event, names.event(sandbox, ">")),
            ("command", names.stream_out, out),
            ("command", names.stream_out, names.out_plain),
        ]

    def _judge(self, kind: Kind, stream: str, stored: Stored) -> Found | None:
        try:
            about = msgspec.json.decode(stored.data, type=_About)
        except UNDECODABLE:  # the mark of a deleted key, or what nobody can read
            return None
        tokens = stored.subject.split(".")
        sandbox = about.sandbox or (tokens[2] if kind == "conversation" else tokens[-1] if kind == "command" else "")
        if self._sandbox not in (None, sandbox):
            if kind == "binding":
                self._serving_elsewhere.add(about.bot or "")
            return None
        is_theirs = self._user == about.user or kind == "conversation"
        if is_theirs:
            self._bots |= {about.bot or "", *about.dispatched_to} - {""}
        elif not (
            about.former_user == self._user
            or (not about.user and {about.bot, bot_of(about.reply_to or "")} & self._bots)
        ):
            return None
        if ".receipt." in stored.subject:
            kind = "receipt"
            self._commands.add((sandbox, about.command))
        return Found(kind, stream, stored, sandbox, about.bot or "")

    def _is_their_dead_letter(self, stored: Stored) -> bool:
        headers = stored.headers
        if self._sandbox not in (None, headers.get(H_SANDBOX)):
            return False
        if (headers.get(H_SANDBOX, ""), headers.get(H_COMMAND, "")) in self._commands:
            return True
        if headers.get(H_MSG_ID, "").startswith(tuple(f"dead:{bot}:" for bot in self._bots)):
            return True
        return any(f'"{name}"'.encode() in stored.data for name in (self._user, *self._bots))

    async def _find_media(self) -> AsyncIterator[Found]:
        """Objects that hold what the person sent: of each the description, then its pieces."""
        names, stream = self._names, f"OBJ_{self._names.media}"
        async for stored in self._history.read(stream, f"$O.{names.media}.M.>"):
            try:
                described = msgspec.json.decode(stored.data, type=_Object)
            except UNDECODABLE:
                continue
            sandbox = described.name.partition("/")[0]
            if self._sandbox in (None, sandbox) and described.name.startswith(media_prefix(sandbox, self._user)):
                yield Found("media", stream, stored, sandbox)
                async for piece in self._history.read(stream, f"$O.{names.media}.C.{described.nuid}"):
                    yield Found("media", stream, piece, sandbox)


class Owners(Protocol):
    """What is known of the replicas that poll bots."""

    async def revoke_if_expired(self, incarnation: str) -> bool:
        """Whether it is proven that a replica does nothing any more."""


class Erasure:
    """Erases one person. What it leaves, as after a crash, the next run finds."""

    def __init__(
        self,
        access: BusAccess,
        bindings: Bindings,
        buckets: Mapping[str, Bucket],
        owners: Owners,
        clock: Clock,
        *,
        released_s: float,
    ) -> None:
        """`buckets`: those of conversations and logins, by their streams."""
        self._access = access
        self._bindings = bindings
        self._buckets = buckets
        self._owners = owners
        self._clock = clock
        self._released_s = released_s

    async def run(self, command: Erase, unbound: Collection[str], turn: asyncio.Lock) -> ControlAnswer:
        """Erases, or with `dry_run` counts. `unbound`: bots that served the person until now. `turn` is held while
        nobody may bind. Raises Temporary, BusRefused."""
        counts: dict[str, Counter[str]] = {}
        """By sandbox; "" for what is of none."""
        if not command.dry_run:
            await self.wait_released(unbound)
            await self._wait_until(lambda: self._is_unserved(command))
        theirs = []
        async for found in self._search(command):
            counts.setdefault(found.sandbox, Counter())[found.kind] += 1
            theirs.append(found._replace(stored=found.stored._replace(data=b"", headers={})))
        if not command.dry_run:
            # what names the bots goes last, or a run that is cut would leave what nobody finds any more
            theirs.sort(key=lambda found: found.kind != "journal")  # oldest first: the newest says who polls
            first = sum(found.kind == "journal" for found in theirs)
            for found in (*theirs[:first], *reversed(theirs[first:])):
                await self._delete(found, turn)
        total = sum(counts.values(), Counter[str]())
        if command.dry_run:
            return ControlAnswer(ok=True, id=command.id or "", counts=dict(total))
        left = Counter[str]([found.kind async for found in self._search(command)])
        await self._tell(command, counts, left)
        return ControlAnswer(
            ok=not left, id=command.id or "", counts=dict(total), left=dict(left), error=_advice(left)
        )

    def _search(self, command: Erase) -> AsyncIterator[Found]:
        return PersonSearch(self._access.history, self._access.names, command.user, command.sandbox).find()

    async def wait_released(self, bots: Collection[str]) -> None:
        """Returns once the owners of unbound bots have dispatched what they had and ended, or the time is over.
        Raises Temporary."""
        for bot in bots:
            await self._wait_until(partial(self._is_released, bot))

    async def _wait_until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        until = self._clock.monotonic() + self._released_s
        while not await holds() and self._clock.monotonic() < until:
            await self._clock.sleep(LOOK_S)

    async def _is_released(self, bot: str) -> bool:
        names = self._access.names
        last = await self._access.history.read_last(names.stream_journal, names.journal(bot))
        if last is None:
            return True
        try:
            _, owner, _ = msgspec.msgpack.decode(last.data, type=tuple[int, str, bytes])
        except UNDECODABLE:
            return True
        return not owner or await self._owners.revoke_if_expired(owner)

    async def _is_unserved(self, command: Erase) -> bool:
        """Whether the records say that nobody serves the person: their owners write them no more."""
        names = self._access.names
        subject = f"$KV.{names.conversations}.{command.sandbox or '*'}.{to_subject_token(command.user)}"
        records = self._access.history.read(f"KV_{names.conversations}", subject)
        return all([b'"unserved":true' in stored.data or not stored.data async for stored in records])

    async def _delete(self, found: Found, turn: asyncio.Lock) -> None:
        """Raises Temporary."""
        history, stored = self._access.history, found.stored
        if found.kind == "binding":
            return  # whoever is bound still was bound again meanwhile
        if bucket := self._buckets.get(found.stream):
            key = stored.subject.split(".", 2)[2]
            ttl_s = MARK_S if found.kind == "conversation" else 0
            try:
                await bucket.delete(key, stored.seq, ttl_s=ttl_s)
            except Conflict:
                log.info("person.written_meanwhile", kind=found.kind, sandbox=found.sandbox)
            return
        if found.kind != "journal":
            await history.delete(found.stream, stored.seq, erase=True)
            return
        async with turn:  # a poller whose newest record is gone would stop
            await self._bindings.refresh(found.bot)
            if self._bindings.get(found.bot) is not None or not await self._is_released(found.bot):
                raise Temporary("bot_in_use", f"{found.bot} is bound, or its owner has not ended.")
            await history.delete(found.stream, stored.seq, erase=True)

    async def _tell(self, command: Erase, counts: Mapping[str, Counter[str]], left: Mapping[str, int]) -> None:
        person = hashlib.sha256(command.user.encode()).hexdigest()
        for sandbox, of_sandbox in counts.items():
            log.info("person.erased", person=person, sandbox=sandbox, counts=dict(of_sandbox), left=dict(left))
            if sandbox:
                event = ErasedEvent(sandbox=sandbox, person=person, counts=dict(of_sandbox), request=command.id or "")
                await self._access.events.publish_erased_event(event)


def _advice(left: Mapping[str, int]) -> str:
    return "Something is left, since it was written meanwhile: erase again." if left else ""
