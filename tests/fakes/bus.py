"""The bus in memory: streams, buckets, what a consumer delivers, and what is told without storage."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec

from adapter.bridge.entries import messages_of
from adapter.contract.messages import BindingEvent, Inbound, Receipt
from adapter.contract.names import H_EXPECTED, H_MSG_ID, Names, stream_of
from adapter.errors import STORE_FAILED, BusRefused, Conflict, Temporary
from adapter.ports import BucketEntry, BusMessage, Heads, PubAck, StoredMessage
from tests.fakes.clock import FakeClock

MAX_PAYLOAD, HEADER_BYTES = 1024 * 1024, 64 * 1024
"""Of a server as it is by default."""


class Kept(NamedTuple):
    """A message in a stream of FakeBus."""

    stream: str
    stored: StoredMessage
    time_ms: int


class FakeBus:
    """Implements Bus and History: streams in memory, with the server's rules about ids and order."""

    def __init__(self, names: Names, clock: FakeClock) -> None:
        self.kept: list[Kept] = []
        self.writes: list[str] = []
        """What was stored, in order: labels of streams and buckets."""
        self.refuse: Callable[[BusMessage], BusRefused | None] = lambda message: None
        self.most_of_subject: dict[str, int] = {}
        """By stream: messages of a subject above which a new one is refused."""
        self.on_publish: Callable[[BusMessage], Awaitable[None]] | None = None
        """Awaited before a message is stored: to let something happen meanwhile, or to fail."""
        self.on_delete: Callable[[], Awaitable[None]] | None = None
        """Awaited before a message is deleted, unless it is one of OUT."""
        self.erased: list[tuple[str, int]] = []
        """Stream and sequence of what was deleted so that the disk does not hold it."""
        self.unreadable = 0
        """So many more reads fail."""
        self.read_back = 0
        """Messages read since the start."""
        self._subjects: set[str] = set()
        """All that were ever stored to: most receipts are the first of theirs, and nothing is looked for."""
        self._names = names
        self._clock = clock
        self._ids: dict[tuple[str, str], int] = {}
        self._seqs: dict[str, int] = {}

    # Bus

    async def store(self, message: BusMessage) -> PubAck:
        await asyncio.sleep(0)
        if self.on_publish is not None:
            await self.on_publish(message)
        if message.ensure_owner is not None:
            message.ensure_owner()
        stream = stream_of(message.subject)
        if problem := (self.refuse(message) or self._too_large(message)):
            raise problem
        if (repeated := self._repeat(message)) is not None:
            return repeated
        if problem := (self._conflict(message) or self._full(message)):
            raise problem
        return PubAck(stream=stream, seq=self.put(message.subject, message.payload, message.headers, message.stream))

    def _too_large(self, message: BusMessage) -> BusRefused | None:
        """The publisher sends nothing above the server's max_payload, and a stream no headers above 64 KiB."""
        headers = sum(len(f"{name}: {value}\r\n".encode()) for name, value in message.headers.items())
        if len(message.payload) + headers > MAX_PAYLOAD:
            return BusRefused(0, "exceeds the server's max_payload")
        return BusRefused(10097, "header size exceeds maximum allowed of 64k") if headers > HEADER_BYTES else None

    def _full(self, message: BusMessage) -> BusRefused | None:
        stream = stream_of(message.subject)
        most = self.most_of_subject.get(stream)
        if most is None or most > sum(
            kept.stored.subject == self.stored_subject(message.subject) for kept in self.kept if kept.stream == stream
        ):
            return None
        return BusRefused(STORE_FAILED, "maximum messages per subject exceeded")

    def _repeat(self, message: BusMessage) -> PubAck | None:
        """A cluster looks at the id first, then at what is expected; one server the other way round."""
        stream = stream_of(message.subject)
        known = self._ids.get((stream, message.headers.get(H_MSG_ID, "")))
        return PubAck(stream=stream, seq=known, duplicate=True) if known else None

    def _conflict(self, message: BusMessage) -> Conflict | None:
        if (expected := message.headers.get(H_EXPECTED)) is None:
            return None
        of_subject = reversed(self.kept) if message.subject in self._subjects else ()
        last = next((kept.stored.seq for kept in of_subject if kept.stored.subject == message.subject), 0)
        return None if int(expected) == last else Conflict(10071, "wrong last sequence")

    def stored_subject(self, subject: str) -> str:
        """Where the server's transform stores what is published to a subject."""
        prefix, _, said = subject.partition(".")
        verb, _, sandbox = said.partition(".")
        if verb not in ("out", "bind", "unbind", "erase") or not sandbox:
            return subject
        return f"{prefix}.part.{self._names.partition_of(sandbox)}.{verb}.{sandbox}"

    def put(self, subject: str, payload: bytes, headers: dict[str, str], label: str = "") -> int:
        """Stores a message as the server would; its sequence."""
        subject, stream = self.stored_subject(subject), stream_of(subject)
        seq = self._seqs[stream] = self._seqs.get(stream, 0) + 1
        if ident := headers.get(H_MSG_ID, ""):
            self._ids[stream, ident] = seq
        now_ms = self._clock.now_ms()
        self.kept.append(Kept(stream, StoredMessage(subject, seq, headers, payload, now_ms), now_ms))
        self._subjects.add(subject)
        self.writes.append(label)
        return seq

    # History

    async def read(
        self,
        stream: str,
        subject: str,
        *,
        after: int = 0,
        since_ms: int | None = None,
        limit: int | None = None,
        page: int = 200,
    ) -> AsyncIterator[StoredMessage]:
        await asyncio.sleep(0)
        left = len(self.kept) if limit is None else limit
        if self.unreadable:
            self.unreadable -= 1
            raise Temporary("bus_down")
        is_one = "*" not in subject and ">" not in subject  # thousands ask so of thousands
        for kept in [kept for kept in self.kept if not is_one or kept.stored.subject == subject]:
            found = kept.stored
            late = kept.time_ms >= since_ms if since_ms is not None else found.seq > after
            if left and kept.stream == stream and late and matches(subject, found.subject):
                left -= 1
                self.read_back += 1
                yield found

    async def read_last(self, stream: str, subject: str) -> StoredMessage | None:
        found = [stored async for stored in self.read(stream, subject)]
        return found[-1] if found else None

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        found = [await self.read_last(stream, subject) for subject in subjects]
        return [stored for stored in found if stored is not None]

    async def read_heads(self, stream: str, subject: str, *, start: int) -> Heads | None:
        newest = {stored.subject: stored async for stored in self.read(stream, subject)}
        found = sorted((each for each in newest.values() if each.seq >= start), key=lambda each: each.seq)
        return Heads(found, await self.last_sequence(stream) if newest else 0, is_cut=False)

    async def read_newest(
        self, stream: str, subject: str, *, count: int, before: int | None = None
    ) -> list[StoredMessage]:
        found = [stored async for stored in self.read(stream, subject) if before is None or stored.seq < before]
        return found[::-1][:count]

    async def get(self, stream: str, seq: int) -> StoredMessage | None:
        await asyncio.sleep(0)
        if self.unreadable:
            self.unreadable -= 1
            raise Temporary("bus_down")
        return next((k.stored for k in self.kept if (k.stream, k.stored.seq) == (stream, seq)), None)

    async def last_sequence(self, stream: str) -> int:
        await asyncio.sleep(0)
        return max([kept.stored.seq for kept in self.kept if kept.stream == stream] + [self._seqs.get(stream, 0)])

    async def first_and_last(self, stream: str) -> tuple[int, int]:
        last = await self.last_sequence(stream)
        return min([kept.stored.seq for kept in self.kept if kept.stream == stream], default=last + 1), last

    async def count(self, stream: str) -> int:
        return sum(kept.stream == stream for kept in self.kept)

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        await asyncio.sleep(0)
        if erase:
            self.erased.append((stream, seq))
        if self.on_delete is not None and not stream.endswith("_OUT"):
            await self.on_delete()
        at = (at for at, kept in enumerate(self.kept) if (kept.stream, kept.stored.seq) == (stream, seq))
        if (found := next(at, None)) is not None:
            del self.kept[found]

    async def purge(self, stream: str, subject: str, *, keep: int = 0, up_to: int = 0) -> None:
        await asyncio.sleep(0)
        found = [kept for kept in self.kept if kept.stream == stream and matches(subject, kept.stored.subject)]
        gone = [kept for kept in found if kept.stored.seq <= up_to] if up_to else found[: max(0, len(found) - keep)]
        self.kept = [kept for kept in self.kept if kept not in gone]

    # for tests

    def next_sequence(self, kind: str) -> int:
        """A sequence of a stream that no other message gets."""
        stream = f"{self._names.prefix.upper()}_{kind}"
        self._seqs[stream] = self._seqs.get(stream, 0) + 1
        return self._seqs[stream]

    def forget_ids(self) -> None:
        """The window against duplicates has passed."""
        self._ids.clear()

    def found(self, kind: str) -> list[StoredMessage]:
        """What a stream holds: IN, EVENT, DEAD, OUT."""
        stream = f"{self._names.prefix.upper()}_{kind}"
        return [kept.stored for kept in self.kept if kept.stream == stream]

    def inbound(self) -> list[Inbound]:
        """The messages of all entries."""
        raws = [raw for stored in self.found("IN") for raw in messages_of(stored.data)]
        return [msgspec.json.decode(raw, type=Inbound) for raw in raws]

    def receipts(self, verb: str = "receipt") -> list[Receipt]:
        """Those of commands, or of binds, unbinds or erases."""
        return [
            msgspec.json.decode(stored.data, type=Receipt)
            for stored in self.found("EVENT")
            if f".{verb}." in stored.subject
        ]

    def events(self) -> list[BindingEvent]:
        return [
            msgspec.json.decode(stored.data, type=BindingEvent)
            for stored in self.found("EVENT")
            if stored.subject.endswith(".binding")
        ]


def matches(pattern: str, subject: str) -> bool:
    wanted, found = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted, found = wanted[:-1], found[: len(wanted) - 1] if len(found) >= len(wanted) else []
    return len(wanted) == len(found) and all(a in ("*", b) for a, b in zip(wanted, found, strict=True))


class FakeBucket:
    """Implements Bucket, and get and write of LeaderBucket. `label` is what it writes into the bus's journal."""

    def __init__(self, label: str = "", journal: list[str] | None = None) -> None:
        self.entries: dict[str, BucketEntry] = {}
        self.label = label
        self.journal = [] if journal is None else journal
        self.reads = 0
        """Keys read since the start."""
        self.unreadable = 0
        """So many more reads fail."""
        self.answers_lost = 0
        """So many more writes are stored and then refused as if somebody else had written: the answer got lost,
        and the repeat of the publisher met the first one. The bucket knows its own updates again."""
        self.on_write: Callable[[str], Awaitable[None]] | None = None
        """Awaited before a write."""
        self.ttls: dict[str, int] = {}
        """In seconds, of keys and marks of deletions that were written to be gone in time. Nothing goes here."""
        self._revision = 0
        self.followers: list[Callable[[BucketEntry], None]] = []

    async def get(self, key: str) -> BucketEntry | None:
        self.reads += 1
        await asyncio.sleep(0)
        if self.unreadable:
            self.unreadable -= 1
            raise Temporary("bus_down")
        return self.entries.get(key)

    async def get_all(self, keys: Sequence[str]) -> list[BucketEntry]:
        return [entry for key in keys if (entry := await self.get(key)) is not None]

    async def read_since(self, revision: int) -> list[BucketEntry]:
        await asyncio.sleep(0)
        found = [entry for entry in self.entries.values() if entry.revision > revision]
        return sorted(found, key=lambda entry: entry.revision)

    async def update(
        self, key: str, value: bytes, revision: int, *, ensure_owner: Callable[[], None] | None = None
    ) -> int:
        try:
            return await self._write(key, value, revision, 0, ensure_owner)
        except Conflict:
            entry = await self.get(key)
            if entry is not None and entry.value == value:
                return entry.revision
            raise

    async def write(self, key: str, value: bytes | None, revision: int) -> int:
        return await self._write(key, value, revision, 0)

    async def delete(self, key: str, revision: int | None = None, *, ttl_s: int = 0) -> int:
        return await self._write(key, None, revision, ttl_s)

    async def _write(
        self,
        key: str,
        value: bytes | None,
        revision: int | None,
        ttl_s: int,
        ensure_owner: Callable[[], None] | None = None,
    ) -> int:
        await asyncio.sleep(0)
        if self.on_write is not None:
            await self.on_write(key)
        if ensure_owner is not None:
            ensure_owner()
        known = self.entries.get(key)
        if revision is not None and revision != (known.revision if known else 0):
            raise Conflict(10071, "wrong last sequence")
        written = self.put(key, value)
        if ttl_s:
            self.ttls[key] = ttl_s
        if self.answers_lost:
            self.answers_lost -= 1
            raise Conflict(10071, "wrong last sequence")
        return written

    def put(self, key: str, value: bytes | None) -> int:
        """Writes as somebody else would; the revision."""
        self._revision += 1
        self.ttls.pop(key, None)
        entry = self.entries[key] = BucketEntry(key, value, self._revision)
        self.journal.append(self.label)
        for follower in self.followers:
            follower(entry)
        return self._revision

    def expire(self, key: str) -> None:
        """The time to live of a key, or of the marker of its deletion, is over."""
        del self.entries[key]

    async def watch(
        self,
        on_entry: Callable[[BucketEntry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
    ) -> None:
        self.followers.append(on_entry)
        for entry in list(self.entries.values()):
            on_entry(entry)
        if on_loaded is not None:
            on_loaded()
        await asyncio.Event().wait()


class FakeDelivery:
    """Implements Delivery."""

    def __init__(
        self,
        subject: str,
        data: bytes,
        *,
        seq: int,
        time_ms: int,
        headers: dict[str, str] | None = None,
        redelivered: bool = False,
    ) -> None:
        self.subject = subject
        self.data = data
        self.headers = headers or {}
        self.seq = seq
        self.time_ms = time_ms
        self.redelivered = redelivered
        self.acks = 0

    @property
    def is_old(self) -> bool:
        return self.redelivered

    async def ack(self) -> None:
        await asyncio.sleep(0)
        self.acks += 1

    def again(self) -> FakeDelivery:
        """The same, once more: its ack got lost, or its consumer was reset."""
        return FakeDelivery(
            self.subject, self.data, seq=self.seq, time_ms=self.time_ms, headers=self.headers, redelivered=True
        )


class FakeCoreBus:
    """Implements CoreBus. One of the same world hears what the others publish, a moment later."""

    def __init__(self, world: FakeCoreBus | None = None) -> None:
        self.published: list[tuple[str, bytes, dict[str, str]]] = []
        """By this one."""
        self.is_cut = False
        """Nothing gets through."""
        self.all: list[FakeCoreBus] = world.all if world is not None else []
        self.all.append(self)
        self._heard: dict[str, list[Callable[[bytes], None]]] = defaultdict(list)
        self._answers: dict[str, Callable[[bytes], bytes | None]] = {}

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        self.published.append((subject, payload, headers))
        if not self.is_cut:
            asyncio.get_running_loop().call_soon(self._deliver, subject, payload)

    def _deliver(self, subject: str, payload: bytes) -> None:
        for bus in self.all:
            for on_message in () if bus.is_cut else bus._heard[subject]:
                on_message(payload)

    async def ask(self, subject: str, payload: bytes, *, within_s: float) -> bytes | None:
        await asyncio.sleep(0)
        made = [bus._answers[subject](payload) for bus in self.all if subject in bus._answers and not bus.is_cut]
        await asyncio.sleep(0)
        return made[0] if made and not self.is_cut else None

    def subscribe(self, subject: str, on_message: Callable[[bytes], None]) -> None:
        self._heard[subject].append(on_message)

    def respond(self, subject: str, make: Callable[[bytes], bytes | None]) -> None:
        self._answers[subject] = make


class Failing:
    """Raises `problem` so many times, and does nothing from then on: for the `on_…` of a fake."""

    def __init__(self, times: int, problem: Exception) -> None:
        self.left = times
        self._problem = problem

    async def __call__(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise self._problem
