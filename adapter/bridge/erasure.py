"""Finds, counts and erases the data of one person on the bus.

A person is a WeChat user. Each bot serves one person, so data that name a bot of the person are also theirs. Messages
are deleted by sequence and overwritten on the server's disk. Keys of buckets get a delete marker; their value leaves
the disk when the server rewrites its file.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import structlog

from adapter.bridge.bindings import Bindings
from adapter.bridge.entries import clear_of
from adapter.bridge.receipts import Receipts
from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CommandResult
from adapter.contract import messages as contract
from adapter.contract.messages import Erase
from adapter.contract.names import (
    H_MSG_ID,
    H_ORIGINAL,
    H_SANDBOX,
    H_SCHEMA,
    H_USER,
    UNROUTED,
    Names,
    is_sandbox,
    media_prefix,
    person_token,
)
from adapter.contract.repeats import bot_of
from adapter.errors import UNDECODABLE, Conflict
from adapter.ports import Bucket, Bus, BusMessage, History, StoredMessage
from adapter.tools.timing import Clock, backoff

log = structlog.get_logger()

StoredKind: TypeAlias = Literal[
    "binding", "person", "login", "message", "event", "receipt", "command", "dead_letter", "media"
]
"""message: an entry of the inbox, with all messages of one answer."""
MARK_S = 3600
"""Time to live of the delete marker of a record."""
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
    shows_bots: bool = False
    """It names the person, and so the bots in it are theirs."""


class _About(msgspec.Struct):
    """The fields of a message or record that name a person or bot."""

    user: str | None = None
    former_user: str = ""
    bot: str | None = None
    sandbox: str | None = None
    reply_to: str | None = None
    bots: list[str] = []


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
        """Everything about the person. Raises Temporary."""
        # what names their bots comes first; once their bindings are gone, only the events of these do
        async for stored in self._history.read(
            self._names.stream_event, self._names.event(self._sandbox or "*", "binding")
        ):
            self._match("event", self._names.stream_event, stored)
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
            or (not about.user and {about.bot, bot_of(about.reply_to or ""), *about.bots} & self._bots)
            or (not about.user and kind == "person" and self._is_of_their_bot(sandbox, tokens[-1]))
        ):
            return None
        if ".receipt." in stored.subject:
            kind = "receipt"
        return Found(kind, stream, stored, sandbox, about.bot or "", about.user == self._user)

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
    if kind == "command" or (kind == "event" and tokens[3] == "receipt"):
        return set()
    messages = about.messages if isinstance(about, _AboutEntry) else []
    return {each.bot or "" for each in (about, *messages)} - {""}


class Erasure:
    """Erases what is stored of one person, whose bots are unbound. A later run finds what an interrupted one left."""

    def __init__(
        self,
        history: History,
        bus: Bus,
        receipts: Receipts,
        names: Names,
        bindings: Bindings,
        buckets: Mapping[str, Bucket],
        clock: Clock,
    ) -> None:
        """`buckets`: those of persons and logins, by stream name."""
        self._history = history
        self._bus = bus
        self._receipts = receipts
        self._names = names
        self._bindings = bindings
        self._buckets = buckets
        self._clock = clock

    async def count(self, user: str, sandbox: str) -> CommandResult:
        """What there is of a person in a sandbox, or in all. Raises Temporary."""
        wanted = None if sandbox == UNROUTED else sandbox
        counts = Counter[str]([found.kind async for found in self._search(user, wanted)])
        return CommandResult("applied", counts=counts, unlearned=self._unlearned(wanted))

    async def erase(self, user: str, sandbox: str, number: int, check: Callable[[], None]) -> CommandResult:
        """Erases what is stored of a person in a sandbox. `number`: sequence of the erase; what belongs to a time
        that began behind it stays. `check` is called before each deletion. Raises Temporary, BusRefused, and what
        `check` raises."""
        messages = await self._find(user, sandbox, number)
        newest: Counter[str] = Counter()
        for found in messages:
            newest[found.stream] = max(newest[found.stream], found.stored.seq)
        await self._delete(messages, check)
        left = Counter[str](
            [
                found.kind
                for found in await self._find(user, sandbox, number)
                # a sandbox may name the person in new commands for ever
                if found.kind not in WRITTEN_BY_SANDBOXES or found.stored.seq <= newest[found.stream]
            ]
        )
        return self._result(user, sandbox, Counter[str]([found.kind for found in messages]), left)

    async def erase_everywhere(self, erase: Erase, ref: CommandRef, check: Callable[[], None]) -> CommandResult:
        """Has a person erased in each sandbox that has something of theirs, and erases what no sandbox has. `ref`:
        of the erase for all sandboxes. Raises as `erase`."""
        found = [each async for each in self._search(erase.user, None)]
        sandboxes = {each.sandbox for each in found if is_sandbox(each.sandbox)}
        homeless = [each for each in found if each.sandbox not in sandboxes]
        await self._delete(homeless, check)
        asked, looks = False, 0
        while True:
            ended = {receipt.sandbox: receipt for receipt in await self._receipts.of_erase(ref)}
            if sandboxes <= ended.keys():
                break
            if not asked:
                await self._ask(erase.user, sorted(sandboxes - ended.keys()), ref, check)
                asked = True
            looks += 1
            await self._clock.sleep(backoff(looks, first_s=0.1, longest_s=2.0))
        counts, left = Counter[str]([each.kind for each in homeless]), Counter[str]()
        for receipt in ended.values():
            counts.update(receipt.counts)
            left.update(receipt.left)
        return self._result(erase.user, UNROUTED, counts, left)

    async def _ask(self, user: str, sandboxes: Sequence[str], ref: CommandRef, check: Callable[[], None]) -> None:
        """Stores an erase for each of these sandboxes. One that is stored twice has one receipt."""
        for sandbox in sandboxes:
            headers = {
                H_SCHEMA: contract.SCHEMA_VERSION,
                H_MSG_ID: f"erase-{uuid.uuid4().hex}",  # a sandbox that guessed it could have it dropped
                H_ORIGINAL: f"{ref.sequence}.{ref.stored_ms}",
            }
            payload = msgspec.json.encode(Erase(user=user, id=ref.id))
            await self._bus.store(BusMessage("out", self._names.said("erase", sandbox), payload, headers, check))

    def _search(self, user: str, sandbox: str | None) -> AsyncIterator[Found]:
        return PersonSearch(self._history, self._names, user, sandbox).find()

    async def _find(self, user: str, sandbox: str, number: int) -> list[Found]:
        """What is to be erased, without its bytes: not what was said behind the erase, nor what belongs to a time of
        the person that began behind it."""
        messages, beginnings = list[Found](), dict[str, StoredMessage]()
        async for found in self._search(user, sandbox):
            stored = found.stored
            is_later = found.kind == "command" and stored.seq > number
            if is_later or (found.kind in OF_PERSON and clear_of(stored.data).since > number):
                continue
            before, is_beginning, since = stored.headers.get(H_MSG_ID, "").rpartition(":bound:")
            if is_beginning and before.startswith("binding:"):
                beginnings.setdefault(since, stored)
            if found.kind != "binding":  # the others are unbound
                messages.append(found._replace(stored=stored._replace(data=b"", headers={})))
        # looked up behind the reads: a binding is there before what belongs to its time
        later = [f"{each.since}" for each in self._bindings.serving_user(sandbox, user) if each.since > number]
        if not (began := [beginnings[since] for since in later if since in beginnings]):
            return messages
        first = min(began, key=lambda stored: stored.seq)
        return [
            found
            for found in messages
            if found.kind in OF_PERSON  # it names its time itself
            or (
                found.stored.seq < first.seq
                if found.stream == self._names.stream_event
                else found.stored.time_ms < first.time_ms
            )
        ]

    async def _delete(self, messages: Sequence[Found], check: Callable[[], None]) -> None:
        """What shows the person's bots is deleted last, since an interrupted run would otherwise leave data unfound.
        Raises Temporary, LeaseLost."""
        for found in sorted(messages, key=lambda found: found.shows_bots):
            check()
            if (bucket := self._buckets.get(found.stream)) is None:
                await self._history.delete(found.stream, found.stored.seq, erase=True)
                continue
            try:
                ttl_s = MARK_S if found.kind == "person" else 0
                await bucket.delete(found.stored.subject.split(".", 2)[2], found.stored.seq, ttl_s=ttl_s)
            except Conflict:
                log.info("person.written_meanwhile", kind=found.kind, sandbox=found.sandbox)

    def _unlearned(self, sandbox: str | None) -> int:
        return sum(not binding.user and sandbox in (None, binding.sandbox) for binding in self._bindings)

    def _result(self, user: str, sandbox: str, counts: Mapping[str, int], left: Mapping[str, int]) -> CommandResult:
        person = hashlib.sha256(user.encode()).hexdigest()
        log.info("person.erased", person=person, sandbox=sandbox, counts=dict(counts), left=dict(left))
        advice = "Some data were written during the erasure: erase again." if left else ""
        unlearned = self._unlearned(None if sandbox == UNROUTED else sandbox)
        return CommandResult("applied", detail=advice, counts=counts, left=left, unlearned=unlearned)
