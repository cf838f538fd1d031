"""Finds, counts and erases the data of one person on the bus.

A person is a WeChat user. Each bot serves one person, so data that name a bot of the person are also theirs. Messages
are deleted by sequence and overwritten on the server's disk. Keys of buckets get a delete marker; their value leaves
the disk when the server rewrites its file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.content.dedup import bot_of
from adapter.contract.messages import ControlAnswer, Erase, ErasedEvent
from adapter.contract.names import H_MSG_ID, H_SANDBOX, H_USER, Names, media_prefix, person_token
from adapter.errors import UNDECODABLE, Conflict
from adapter.observability.events import Events
from adapter.ports import Bucket, History, StoredMessage

log = structlog.get_logger()

StoredKind: TypeAlias = Literal[
    "binding", "person", "login", "message", "event", "receipt", "command", "dead_letter", "media"
]
"""message: an entry of the inbox, with all messages of one answer."""
MARK_S = 60
"""Time to live of the delete marker of a person's record."""
OF_PERSON = ("person", "message")
"""Their subjects end with sandbox and token of the person."""
WRITTEN_BY_SANDBOXES = ("command", "receipt", "dead_letter")


class Found(NamedTuple):
    """A stored message about the person."""

    kind: StoredKind
    stream: str
    stored: StoredMessage
    sandbox: str = ""
    bot: str = ""


class _About(msgspec.Struct):
    """The fields of a message or record that name a person or bot."""

    user: str | None = None
    former_user: str = ""
    bot: str | None = None
    sandbox: str | None = None
    reply_to: str | None = None


class _AboutEntry(_About):
    """Those of an entry. Each of its messages names the bot that brought it."""

    ended: bool = False
    messages: list[_About] = []


class _Object(msgspec.Struct):
    """The description of an object in the object store."""

    name: str = ""
    nuid: str = ""


class PersonSearch:
    """Searches streams and buckets for one person, in all sandboxes or in one."""

    def __init__(self, history: History, names: Names, user: str, sandbox: str | None) -> None:
        self._history = history
        self._names = names
        self._user = user
        self._sandbox = sandbox
        self._bots: set[str] = set()

    async def find(self) -> AsyncIterator[Found]:
        """Everything about the person. Records that name their bots come first. Raises Temporary."""
        for kind, stream, subject in self._places():
            async for stored in self._history.read(stream, subject):
                if found := self._match(kind, stream, stored):
                    yield found
        async for stored in self._history.read(self._names.stream_dead, self._names.dead_letters("*")):
            if self._is_their_dead_letter(stored):
                yield Found("dead_letter", self._names.stream_dead, stored, stored.headers.get(H_SANDBOX, ""))
        async for found in self._find_media():
            yield found

    def _places(self) -> list[tuple[StoredKind, str, str]]:
        names, sandbox = self._names, self._sandbox or "*"
        return [
            ("binding", f"KV_{names.bindings}", f"$KV.{names.bindings}.>"),
            ("person", f"KV_{names.persons}", f"$KV.{names.persons}.{sandbox}.*"),
            ("login", f"KV_{names.logins}", f"$KV.{names.logins}.>"),
            ("message", names.stream_in, names.inbox(sandbox)),
            ("event", names.stream_event, names.event(sandbox, ">")),
            ("command", names.stream_out, names.out_of_sandbox(sandbox)),
            ("command", names.stream_out, names.out_plain),
        ]

    def _match(self, kind: StoredKind, stream: str, stored: StoredMessage) -> Found | None:
        about: _About
        try:
            about = msgspec.json.decode(stored.data, type=_AboutEntry if kind == "message" else _About)
        except UNDECODABLE:  # a delete marker, or unreadable
            return None
        tokens = stored.subject.split(".")
        sandbox = about.sandbox or (tokens[2] if kind in OF_PERSON else tokens[-1] if kind == "command" else "")
        is_elsewhere = self._sandbox not in (None, sandbox)
        if is_elsewhere or (isinstance(about, _AboutEntry) and about.ended):  # the end keeps later writes out
            return None
        if self._user == about.user:
            self._bots |= _bots_of_user(kind, tokens, about)
        elif not (
            about.former_user == self._user
            or (not about.user and {about.bot, bot_of(about.reply_to or "")} & self._bots)
            or (not about.user and kind == "person" and self._is_of_their_bot(sandbox, tokens[-1]))
        ):
            return None
        if ".receipt." in stored.subject:
            kind = "receipt"
        return Found(kind, stream, stored, sandbox, about.bot or "")

    def _is_of_their_bot(self, sandbox: str, person: str) -> bool:
        """Whether a person has the name of a bot of theirs, which was bound without a user."""
        return person in {person_token(sandbox, bot) for bot in self._bots}

    def _is_their_dead_letter(self, stored: StoredMessage) -> bool:
        """A dead letter names its person where that was known."""
        headers = stored.headers
        if self._sandbox not in (None, headers.get(H_SANDBOX)):
            return False
        return (
            headers.get(H_USER) == self._user
            or headers.get(H_MSG_ID, "").startswith(tuple(f"dead:{bot}:" for bot in self._bots))
            or any(f'"{name}"'.encode() in stored.data for name in (self._user, *self._bots))
        )

    async def _find_media(self) -> AsyncIterator[Found]:
        """The media that the person sent. Each description precedes its pieces."""
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


def _bots_of_user(kind: StoredKind, tokens: Sequence[str], about: _About) -> set[str]:
    """The bots that a message or record shows to be its user's. A sandbox chooses user and bot of its commands, and
    so also those of their receipts."""
    if kind == "command" or (kind == "event" and tokens[3] not in ("binding", "login")):
        return set()
    messages = about.messages if isinstance(about, _AboutEntry) else []
    return {each.bot or "" for each in (about, *messages)} - {""}


class Erasure:
    """Erases one person. A later run finds what an interrupted run left."""

    def __init__(
        self,
        history: History,
        events: Events,
        names: Names,
        bindings: Bindings,
        buckets: Mapping[str, Bucket],
    ) -> None:
        """`buckets`: those of persons and logins, by stream name."""
        self._history = history
        self._events = events
        self._names = names
        self._bindings = bindings
        self._buckets = buckets

    async def run(self, command: Erase) -> ControlAnswer:
        """Erases a person whom no bot serves any more; with `dry_run` only counts. Raises Temporary, BusRefused."""
        counts: dict[str, Counter[str]] = {}
        """By sandbox, or "" for data without a sandbox."""
        messages = []
        newest: Counter[str] = Counter()
        """By stream: the newest sequence that was found."""
        async for found in self._search(command):
            if found.kind == "binding" and not command.dry_run:
                continue  # it is closing, and deleted last
            counts.setdefault(found.sandbox, Counter())[found.kind] += 1
            newest[found.stream] = max(newest[found.stream], found.stored.seq)
            messages.append(found._replace(stored=found.stored._replace(data=b"", headers={})))
        total = sum(counts.values(), Counter[str]())
        unlearned = sum(
            not (binding.user or binding.closing) and command.sandbox in (None, binding.sandbox)
            for binding in self._bindings
        )
        if command.dry_run:
            return ControlAnswer(ok=True, id=command.id or "", counts=dict(total), unlearned=unlearned)
        # records that name the bots are deleted last, since an interrupted run would otherwise leave data unfound
        for found in reversed(messages):
            await self._delete(found)
        left = Counter[str](
            [
                found.kind
                async for found in self._search(command)
                # a sandbox may name the person in new commands for ever
                if found.kind != "binding"
                and (found.kind not in WRITTEN_BY_SANDBOXES or found.stored.seq <= newest[found.stream])
            ]
        )
        await self._report(command, counts, left)
        advice = "Some data were written during the erasure: erase again." if left else ""
        told = ControlAnswer(ok=not left, id=command.id or "", unlearned=unlearned, error=advice)
        return msgspec.structs.replace(told, counts=dict(total), left=dict(left))

    def _search(self, command: Erase) -> AsyncIterator[Found]:
        return PersonSearch(self._history, self._names, command.user, command.sandbox).find()

    async def _delete(self, found: Found) -> None:
        """Raises Temporary."""
        history, stored = self._history, found.stored
        if bucket := self._buckets.get(found.stream):
            key = stored.subject.split(".", 2)[2]
            ttl_s = MARK_S if found.kind == "person" else 0
            try:
                await bucket.delete(key, stored.seq, ttl_s=ttl_s)
            except Conflict:
                log.info("person.written_meanwhile", kind=found.kind, sandbox=found.sandbox)
            return
        await history.delete(found.stream, stored.seq, erase=True)

    async def _report(self, command: Erase, counts: Mapping[str, Counter[str]], left: Mapping[str, int]) -> None:
        person = hashlib.sha256(command.user.encode()).hexdigest()
        for sandbox, of_sandbox in counts.items():
            log.info("person.erased", person=person, sandbox=sandbox, counts=dict(of_sandbox), left=dict(left))
            if sandbox:
                event = ErasedEvent(sandbox=sandbox, person=person, counts=dict(of_sandbox), request=command.id or "")
                await self._events.publish_erased_event(event)
