"""The ports in memory, and time that passes at once: everything waits as it would, and no test waits.

`VirtualLoop` jumps to the next timer whenever nothing else can happen, so that an hour of backoff takes no time and
every order is the same in every run. If nothing will ever happen again it says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import selectors
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from adapter import media, window
from adapter.bindings.book import Bindings, is_anew
from adapter.contexts import Contexts, Peer
from adapter.contract import BindingEvent, Inbound, Receipt
from adapter.errors import BusRefused, Conflict, LeaseLost, Temporary, Uncertain
from adapter.events import Events
from adapter.ilink import urls
from adapter.ilink.translate import read_message
from adapter.inbound.cursors import raw_bots
from adapter.inbound.download import Downloading
from adapter.inbound.fetching import Downloads, Fetching
from adapter.inbound.recall import Recall
from adapter.inbound.sessions import Incoming, Waiting
from adapter.metrics import Metrics
from adapter.names import H_MSG_ID, SHARDS, Names, peer_key, shard_of, token_of
from adapter.outbound.commands import Command, Limits
from adapter.outbound.receipts import Receipts
from adapter.outbound.sending import Send, Sending
from adapter.outbound.settling import Outgoing
from adapter.outbound.shard import Shard
from adapter.outbound.typing_indicator import Showing
from adapter.outbound.uploads import Uploads
from adapter.ports import (
    Accepted,
    Account,
    Content,
    Entry,
    Fetch,
    MediaKind,
    Message,
    Polled,
    PubAck,
    QrCode,
    Scan,
    ScanStatus,
    Stored,
    StoredObject,
    Uploaded,
)
from adapter.records import Binding, Context, Cursor
from adapter.replicas.leases import Leases
from adapter.seal import Sealer
from adapter.timing import Beat, Latch, Pace, Turns

EPOCH_MS = 1_789_000_000_000
"""Wall clock when a test begins."""


def raw_message(number: int, *items: dict[str, Any], **fields: Any) -> bytes:
    """A message as iLink sends it, like no other number's; a field that is None is left out."""
    made = {
        "message_id": 7497484083968569000 + number,
        "client_id": f"wx-{number}",
        "seq": number,
        "from_user_id": "u1@im.wechat",
        "create_time_ms": EPOCH_MS + number,
        "message_type": 1,
        "context_token": f"token-{number}",
        "item_list": list(items),
    } | fields
    return msgspec.json.encode({key: value for key, value in made.items() if value is not None})


def batch(*messages: bytes, cursor: str | None = "b", hold_ms: int = 35_000) -> Polled:
    """An answer to a poll."""
    return Polled(list(messages), cursor, hold_ms)


class EndOfScript(Exception):
    """A fake was asked for more than its script holds: the end of a loop that has none."""


# time ----------------------------------------------------------------------------------------------------


class _Jump(selectors.DefaultSelector):
    """Never waits: the loop's clock is set forward by the time that it would have waited."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self.loop.passed += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which time passes at once."""

    def __init__(self) -> None:
        self.passed = 0.0
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return 1000.0 + self.passed


class FakeClock:
    """The loop's time; no chance in it."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.set_back_ms = 0

    def now_ms(self) -> int:
        return EPOCH_MS + round((self.monotonic() - 1000.0) * 1000) - self.set_back_ms

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(seconds)

    def jitter(self, seconds: float) -> float:
        return 0.0


class Life:
    """Whether a replica goes on: what it asks of the world gets through, and answers reach it, only then.

    Its clock goes on, too, as that of a process that is stopped.
    """

    def __init__(self) -> None:
        self._going = asyncio.Event()
        self._going.set()

    def stop(self) -> None:
        self._going.clear()

    def go_on(self) -> None:
        self._going.set()

    @property
    def is_going(self) -> bool:
        return self._going.is_set()

    async def goes_on(self) -> None:
        await self._going.wait()


class Rounds:
    """What happened in each round of the event loop, or in two of them: counted by name."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[int]] = defaultdict(Counter)
        self._round = 0

    def note(self, what: str) -> None:
        if not self.seen[what][self._round]:
            asyncio.get_running_loop().call_soon(self._begin)
        self.seen[what][self._round] += 1

    def _begin(self) -> None:
        self._round += 1


class Failing:
    """Raises `problem` so many times, and does nothing from then on: for the `on_…` of a fake."""

    def __init__(self, times: int, problem: Exception) -> None:
        self.left = times
        self._problem = problem

    async def __call__(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise self._problem


async def settle() -> None:
    """Lets everything happen that needs no time."""
    for _ in range(200):
        await asyncio.sleep(0)


# the bus -------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A message in a stream of FakeBus."""

    stream: str
    stored: Stored
    time_ms: int


class FakeBus:
    """Implements Bus and History: streams in memory, with the server's rules about ids and order."""

    def __init__(self, names: Names, clock: FakeClock) -> None:
        self.kept: list[Kept] = []
        self.writes: list[str] = []
        """What was stored, in order: labels of streams and buckets."""
        self.refuse: Callable[[Message], BusRefused | None] = lambda message: None
        self.on_publish: Callable[[Message], Awaitable[None]] | None = None
        """Awaited before a message is stored: to let something happen meanwhile, or to fail."""
        self.on_delete: Callable[[], Awaitable[None]] | None = None
        """Awaited before a message is deleted."""
        self.erased: list[tuple[str, int]] = []
        """Stream and sequence of what was deleted so that the disk does not hold it."""
        self.unreadable = 0
        """So many more reads fail."""
        self.read_back = 0
        """Messages read since the start."""
        self._names = names
        self._clock = clock
        self._ids: dict[tuple[str, str], int] = {}
        self._seqs: dict[str, int] = {}

    # Bus

    async def publish(self, message: Message) -> PubAck:
        (ack,) = await self.publish_all([message])
        if isinstance(ack, BusRefused):
            raise ack
        return ack

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        await asyncio.sleep(0)
        acks: list[PubAck | BusRefused] = []
        for message in messages:
            if self.on_publish is not None:
                await self.on_publish(message)
            if message.fence is not None:
                message.fence()
            acks.append(self.refuse(message) or self._store(message))
        return acks

    def _store(self, message: Message) -> PubAck:
        stream = self.stream_of(message.subject)
        ident = message.headers.get(H_MSG_ID, "")
        if ident and (known := self._ids.get((stream, ident))):
            return PubAck(stream=stream, seq=known, duplicate=True)
        return PubAck(stream=stream, seq=self.put(message.subject, message.payload, message.headers, message.stream))

    def put(self, subject: str, payload: bytes, headers: dict[str, str], label: str = "") -> int:
        """Stores a message as the server would; its sequence."""
        stream = self.stream_of(subject)
        seq = self._seqs[stream] = self._seqs.get(stream, 0) + 1
        if ident := headers.get(H_MSG_ID, ""):
            self._ids[stream, ident] = seq
        now_ms = self._clock.now_ms()
        self.kept.append(Kept(stream, Stored(subject, seq, headers, payload, now_ms), now_ms))
        self.writes.append(label)
        return seq

    def stream_of(self, subject: str) -> str:
        kind = subject.removeprefix(f"{self._names.prefix}.").partition(".")[0]
        return f"{self._names.prefix.upper()}_{'IN' if kind == 'inbox' else kind.upper()}"

    # History

    async def read(
        self, stream: str, subject: str, *, after: int = 0, since_ms: int | None = None, most: int | None = None
    ) -> AsyncIterator[Stored]:
        await asyncio.sleep(0)
        left = len(self.kept) if most is None else most
        if self.unreadable:
            self.unreadable -= 1
            raise Temporary("bus_down")
        for kept in list(self.kept):
            found = kept.stored
            late = kept.time_ms >= since_ms if since_ms is not None else found.seq > after
            if left and kept.stream == stream and late and matches(subject, found.subject):
                left -= 1
                self.read_back += 1
                yield found

    async def last(self, stream: str, subject: str) -> Stored | None:
        found = [stored async for stored in self.read(stream, subject)]
        return found[-1] if found else None

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        found: dict[str, int] = {}
        async for stored in self.read(stream, subject):
            found[stored.subject] = found.get(stored.subject, 0) + 1
        return found

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        await asyncio.sleep(0)
        if erase:
            self.erased.append((stream, seq))
        if self.on_delete is not None:
            await self.on_delete()
        self.kept = [kept for kept in self.kept if (kept.stream, kept.stored.seq) != (stream, seq)]

    # for tests

    def forget_ids(self) -> None:
        """The window against duplicates has passed."""
        self._ids.clear()

    def found(self, kind: str) -> list[Stored]:
        """What a stream holds: IN, EVENT, PARKED, DEAD, OUT."""
        stream = f"{self._names.prefix.upper()}_{kind}"
        return [kept.stored for kept in self.kept if kept.stream == stream]

    def inbound(self) -> list[Inbound]:
        return [msgspec.json.decode(stored.data, type=Inbound) for stored in self.found("IN")]

    def receipts(self) -> list[Receipt]:
        return [
            msgspec.json.decode(stored.data, type=Receipt)
            for stored in self.found("EVENT")
            if stored.subject.endswith(".receipt")
        ]

    def events(self) -> list[BindingEvent]:
        return [
            msgspec.json.decode(stored.data, type=BindingEvent)
            for stored in self.found("EVENT")
            if stored.subject.endswith(".binding")
        ]


def matches(pattern: str, subject: str) -> bool:
    wanted, found = pattern.split("."), subject.split(".")
    return len(wanted) == len(found) and all(a in ("*", b) for a, b in zip(wanted, found, strict=True))


class FakeBucket:
    """Implements Bucket. `label` is what it writes into the bus's journal."""

    def __init__(self, label: str = "", journal: list[str] | None = None) -> None:
        self.entries: dict[str, Entry] = {}
        self.label = label
        self.journal = [] if journal is None else journal
        self.answers_lost = 0
        """So many more writes are stored and then refused as if somebody else had written: the answer got lost,
        and the repeat of the publisher met the first one. The bucket knows its own updates again."""
        self.on_write: Callable[[str], Awaitable[None]] | None = None
        """Awaited before a write."""
        self._revision = 0
        self._followers: list[Callable[[Entry], None]] = []

    async def get(self, key: str) -> Entry | None:
        await asyncio.sleep(0)
        return self.entries.get(key)

    async def below(self, first: str) -> list[Entry]:
        await asyncio.sleep(0)
        found = [entry for key, entry in self.entries.items() if key.startswith(f"{first}.")]
        return [entry for entry in found if entry.value is not None]

    async def update(self, key: str, value: bytes, revision: int) -> int:
        try:
            return await self._write(key, value, revision)
        except Conflict:
            entry = await self.get(key)
            if entry is not None and entry.value == value:
                return entry.revision
            raise

    async def delete(self, key: str, revision: int | None = None) -> int:
        return await self._write(key, None, revision)

    async def _write(self, key: str, value: bytes | None, revision: int | None) -> int:
        await asyncio.sleep(0)
        if self.on_write is not None:
            await self.on_write(key)
        known = self.entries.get(key)
        if revision is not None and revision != (known.revision if known else 0):
            raise Conflict(10071, "wrong last sequence")
        written = self.put(key, value)
        if self.answers_lost:
            self.answers_lost -= 1
            raise Conflict(10071, "wrong last sequence")
        return written

    def put(self, key: str, value: bytes | None) -> int:
        """Writes as somebody else would; the revision."""
        self._revision += 1
        entry = self.entries[key] = Entry(key, value, self._revision)
        self.journal.append(self.label)
        for follower in self._followers:
            follower(entry)
        return self._revision

    async def follow(
        self,
        on_entry: Callable[[Entry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
        on_missing: Callable[[str, bool], Awaitable[bool]] | None = None,
    ) -> None:
        self._followers.append(on_entry)
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
        suspect: bool = False,
    ) -> None:
        self.subject = subject
        self.data = data
        self.headers = headers or {}
        self.seq = seq
        self.time_ms = time_ms
        self.suspect = suspect
        self.acks = 0

    async def ack(self) -> None:
        await asyncio.sleep(0)
        self.acks += 1

    def again(self) -> FakeDelivery:
        """The same, once more: its ack got lost, or its consumer was reset."""
        return FakeDelivery(
            self.subject, self.data, seq=self.seq, time_ms=self.time_ms, headers=self.headers, suspect=True
        )


class FakeTeller:
    """Implements Teller."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes, dict[str, str]]] = []
        self.durables: list[str] = []

    async def tell(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        self.told.append((subject, payload, headers))

    async def make_durable(self, sandbox: str) -> None:
        self.durables.append(sandbox)


class FakeLeases(Leases):
    """A replica that owns what it is told to own."""

    def __init__(self, incarnation: str = "me-1", owned: Iterable[int] = range(SHARDS)) -> None:
        self.owned = set(owned)
        self.changed = Latch()
        self.incarnation = incarnation
        self.is_valid = True
        self.is_alone = True
        self.surplus = set()
        self.orphans = set()
        self.departures = 0
        self.proven_dead: set[str] = set()
        self.asked_dead = 0
        """How often somebody asked whether an incarnation is dead."""

    @property
    def valid(self) -> bool:
        return self.is_valid

    @property
    def alone(self) -> bool:
        return self.is_alone

    def check(self, shard: int) -> None:
        if shard not in self.owned or not self.valid:
            raise LeaseLost("lease_lost", f"shard {shard}")

    async def is_dead(self, incarnation: str) -> bool:
        await asyncio.sleep(0)
        self.asked_dead += 1
        return incarnation in self.proven_dead


# WeChat --------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A request to sendmessage."""

    bot: str
    user: str
    text: str
    client_id: str
    context_token: str
    at_s: float
    media: Uploaded | None = None


class Shown(NamedTuple):
    """A request to sendtyping."""

    user: str
    on: bool
    ticket: str
    at_s: float


Step = Exception | Polled | Accepted | None


class FakeChat:
    """Implements Chat by scripts. Without one, polls wait for ever and sends are accepted."""

    def __init__(self, clock: FakeClock) -> None:
        self.polls: deque[Step | Callable[[], Step]] = deque()
        self.script_ends = False
        """A poll after the script's end raises EndOfScript."""
        self.sends: deque[Step] = deque()
        self.sends_to: dict[str, deque[Step]] = {}
        """Scripts of single users."""
        self.asked: list[str] = []
        """The cursors of the polls."""
        self.holds: list[int] = []
        self.tokens: list[str] = []
        """The token of each poll."""
        self.polled_at: list[float] = []
        self.sent: list[Sent] = []
        self.notified: list[bool] = []
        self.notify_fails: Exception | None = None
        self.notify_took_s = 0.0
        self.recycled = 0
        self.polling = 0
        """Polls that are out now."""
        self.took_s = 0.0
        """How long a send takes."""
        self.hold_sends: dict[str, asyncio.Event] = {}
        """Sends to these users get no answer before the event."""
        self.overlaps = 0
        """Sends to one user that were out at once: must stay 0."""
        self.taken: dict[str, Sent] = {}
        """What the phone shows, or may show where there was no answer: each client_id once."""
        self.on_send: Callable[[Sent], Awaitable[None]] | None = None
        self.tickets: deque[Exception | str] = deque()
        """Answers to getconfig; without one a new ticket each."""
        self.tickets_asked: list[tuple[str, float]] = []
        """The context token and the time of each getconfig."""
        self.ticket_took_s = 0.0
        self.typing: list[Shown] = []
        self.typing_answers: deque[Exception | bool] = deque()
        """Answers to sendtyping; without one it is done."""
        self._clock = clock
        self._out: set[str] = set()

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        assert not self.polling, "two polls at once"
        self.asked.append(cursor)
        self.holds.append(hold_ms)
        self.tokens.append(account.token)
        self.polled_at.append(self._clock.monotonic())
        self.polling += 1
        try:
            await asyncio.sleep(0.05)
            if not self.polls:
                if self.script_ends:
                    raise EndOfScript
                await asyncio.Event().wait()
            step = self.polls.popleft()
            answer = step() if callable(step) else step
            if isinstance(answer, Exception):
                raise answer
            if answer is None:
                await asyncio.sleep(hold_ms / 1000)
            assert not isinstance(answer, Accepted)
            return answer
        finally:
            self.polling -= 1

    async def send(
        self,
        account: Account,
        *,
        user: str,
        client_id: str,
        context_token: str,
        content: Content,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        if check is not None:
            check()
        text, media = (content, None) if isinstance(content, str) else ("", content)
        now = self._clock.monotonic()
        return await self._send(Sent(account.bot, user, text, client_id, context_token, now, media))

    async def _send(self, sent: Sent) -> Accepted:
        user = sent.user
        self.overlaps += user in self._out
        self._out.add(user)
        self.sent.append(sent)
        try:
            if self.on_send is not None:
                await self.on_send(sent)
            await asyncio.sleep(self.took_s)
            if hold := self.hold_sends.get(user):
                await hold.wait()
        except asyncio.CancelledError:
            self.taken.setdefault(sent.client_id, sent)
            raise
        finally:
            self._out.discard(user)
        script = self.sends_to.get(user) or self.sends
        answer = script.popleft() if script else Accepted(f"m{len(self.sent)}", 0, None, "")
        if not isinstance(answer, Exception) or isinstance(answer, Uncertain):
            self.taken.setdefault(sent.client_id, sent)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Accepted)
        return answer

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        self.tickets_asked.append((context_token, self._clock.monotonic()))
        await asyncio.sleep(self.ticket_took_s)
        answer = self.tickets.popleft() if self.tickets else f"ticket-{len(self.tickets_asked)}"
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> bool:
        self.typing.append(Shown(user, on, ticket, self._clock.monotonic()))
        await asyncio.sleep(0)
        answer = self.typing_answers.popleft() if self.typing_answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def notify(self, account: Account, *, start: bool) -> None:
        self.notified.append(start)
        await asyncio.sleep(self.notify_took_s)
        if self.notify_fails is not None:
            raise self.notify_fails

    async def recycle(self, bot: str) -> None:
        self.recycled += 1

    def check_base_url(self, url: str) -> str:
        return urls.check_url(url, ("127.0.0.1:8080",))

    @property
    def texts(self) -> list[str]:
        return [sent.text for sent in self.sent]


class Asked(NamedTuple):
    """A request about a QR code."""

    handle: str
    base_url: str
    digits: str
    at_s: float


class FakeLogins:
    """Implements Logins. What a phone does is put into `scans`, by the handle: q1, q2 …; each answer once."""

    def __init__(self, clock: FakeClock) -> None:
        self.codes: deque[Exception | QrCode] = deque()
        """Answers to the wish for a code; without one, there is always another."""
        self.scans: dict[str, deque[Scan | Exception | None]] = defaultdict(deque)
        self.asked: list[Asked] = []
        self.fetched_at: list[float] = []
        self.tokens: list[list[str]] = []
        """The list of tokens of each wish for a code."""
        self.out: set[str] = set()
        """Handles that are asked about now."""
        self.hold_s = 30.0
        self.fetch_s = 0.01
        self._clock = clock
        self._numbers = itertools.count(1)
        self._news = Latch()

    def happens(self, handle: str, *answers: Scan | ScanStatus | Exception | None) -> None:
        """The next answers about a code; None: nobody answers, at once."""
        self.scans[handle] += [Scan(answer) if isinstance(answer, str) else answer for answer in answers]
        self._news.notify()

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        self.tokens.append(list(tokens))
        self.fetched_at.append(self._clock.monotonic())
        await asyncio.sleep(self.fetch_s)
        answer = (
            self.codes.popleft() if self.codes else QrCode(handle := f"q{next(self._numbers)}", f"https://q/{handle}")
        )
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        assert handle not in self.out, "one code is asked about twice at once"
        self.asked.append(Asked(handle, base_url, verify_code, self._clock.monotonic()))
        self.out.add(handle)
        try:
            await asyncio.sleep(0.01)
            await self._news.until(lambda: bool(self.scans[handle]), self.hold_s)
            answer = self.scans[handle].popleft() if self.scans[handle] else Scan("wait")
        finally:
            self.out.discard(handle)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def redirected(self, host: str, base_url: str) -> str:
        return urls.redirect_url(host, base_url, ())

    def check_base_url(self, url: str) -> str:
        return urls.check_url(url, ())


# media ---------------------------------------------------------------------------------------------------


Piece: TypeAlias = bytes | Exception | asyncio.Event | None


class Carried(NamedTuple):
    """An upload that the CDN took."""

    bot: str
    user: str
    kind: MediaKind
    name: str
    data: bytes
    md5: str


class FakeCdn:
    """Implements Cdn by scripts. Uploads are taken without one; what can be downloaded has to be said."""

    def __init__(self) -> None:
        self.uploads: list[Carried] = []
        self.asked = 0
        self.script: deque[Exception | None] = deque()
        self.on_upload: Callable[[], Awaitable[None]] | None = None
        """Awaited before an upload."""
        self.took_s = 0.0
        self.hold: dict[str, asyncio.Event] = {}
        """Uploads for these users take until the event."""
        self.answers: dict[str, deque[Piece]] = {}
        """Downloads by reference, the last one of each stays: bytes; an error, or an event to wait for before the
        next one; None: silence for ever."""
        self.fetched: list[str] = []
        """The references of all downloads."""
        self.running = 0
        """Downloads at once, now and at most."""
        self.most = 0

    def has(self, reference: str, *answers: Piece) -> None:
        self.answers[reference] = deque(answers)

    async def download(self, fetch: Fetch) -> AsyncIterator[bytes]:
        self.fetched.append(fetch.reference)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            script = self.answers[fetch.reference]
            while True:
                answer = script.popleft() if len(script) > 1 else script[0]
                if answer is None:
                    await asyncio.Event().wait()
                elif isinstance(answer, asyncio.Event):
                    await answer.wait()
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    break
            for start in range(0, len(answer), 1000):
                await asyncio.sleep(0)
                yield answer[start : start + 1000]
        finally:
            self.running -= 1

    async def upload(
        self,
        account: Account,
        *,
        user: str,
        kind: MediaKind,
        name: str,
        size: int,
        md5: str,
        read: Callable[[], AsyncIterator[bytes]],
    ) -> Uploaded:
        self.asked += 1
        if self.on_upload is not None:
            await self.on_upload()
        await asyncio.sleep(self.took_s)
        if hold := self.hold.get(user):
            await hold.wait()
        answer = self.script.popleft() if self.script else None
        if answer is not None:
            raise answer
        data = b"".join([piece async for piece in read()])
        assert len(data) == size
        self.uploads.append(Carried(account.bot, user, kind, name, data, md5))
        return Uploaded(kind, name, size, size // 16 * 16 + 16, f"ref{len(self.uploads)}", b"k" * 16)


class FakeObjects:
    """Implements Objects. `journal` is told of what is stored."""

    def __init__(self, journal: list[str]) -> None:
        self.stored: dict[str, bytes] = {}
        self.unreadable: deque[Exception | None] = deque()
        """What the next reads fail with, half way."""
        self.away = 0
        """So many more questions fail."""
        self.reads = 0
        self.piece_bytes = 1000
        self.told: dict[str, tuple[str, str]] = {}
        """Type and title of what was put."""
        self.puts: list[str] = []
        self.on_put: Callable[[str], Awaitable[None]] | None = None
        """Awaited when all bytes are there: to fail, or to let something happen."""
        self._journal = journal

    async def info(self, name: str) -> StoredObject | None:
        await asyncio.sleep(0)
        if self.away:
            self.away -= 1
            raise Temporary("bus_down")
        data = self.stored.get(name)
        return None if data is None else StoredObject(name, "chunks", len(data), hashlib.sha256(data).hexdigest())

    async def read(self, stored: StoredObject) -> AsyncIterator[bytes]:
        self.reads += 1
        data = self.stored[stored.name]
        problem = self.unreadable.popleft() if self.unreadable else None
        for start in range(0, len(data), self.piece_bytes):
            await asyncio.sleep(0)
            if problem is not None and start >= len(data) // 2:
                raise problem
            yield data[start : start + self.piece_bytes]

    async def put(self, name: str, pieces: AsyncIterator[bytes], *, mime: str = "", title: str = "") -> StoredObject:
        data = b"".join([piece async for piece in pieces])
        self.puts.append(name)
        if self.on_put is not None:
            await self.on_put(name)
        self.stored[name], self.told[name] = data, (mime, title)
        self._journal.append("object")
        return StoredObject(name, "chunks", len(data), hashlib.sha256(data).hexdigest())

    async def piece(self, stored: StoredObject, after: int) -> tuple[bytes, int]:
        raise AssertionError("this half of the store is not there")


# the core around them ------------------------------------------------------------------------------------


LIMITS = Limits(command_bytes=262_144, text_chars=4000, parts=10, park_ms=72 * 3_600_000)
RULES = window.Rules(sends=10, hours=23.0, cooldown_s=3600.0)
GAP_S = 1.5
MEDIA_BYTES = 100_000


class Bench:
    """One replica's core between fakes. A second one on the same `world` is the replica that takes over."""

    def __init__(
        self,
        world: Bench | None = None,
        *,
        incarnation: str = "me-1",
        limits: Limits = LIMITS,
        metrics: Metrics | None = None,
    ) -> None:
        self.clock: FakeClock = world.clock if world else FakeClock()
        self.names = Names()
        self.bus: FakeBus = world.bus if world else FakeBus(self.names, self.clock)
        self.chat: FakeChat = world.chat if world else FakeChat(self.clock)
        self.cursors: FakeBucket = world.cursors if world else FakeBucket("cursor", self.bus.writes)
        self.contexts_bucket: FakeBucket = world.contexts_bucket if world else FakeBucket("token", self.bus.writes)
        self.bindings_bucket: FakeBucket = world.bindings_bucket if world else FakeBucket("binding", self.bus.writes)
        self.quotes: FakeBucket = world.quotes if world else FakeBucket("quote", self.bus.writes)
        self.typing: FakeBucket = world.typing if world else FakeBucket("typing", self.bus.writes)
        self.cdn: FakeCdn = world.cdn if world else FakeCdn()
        self.objects: FakeObjects = world.objects if world else FakeObjects(self.bus.writes)
        self.uploads = Uploads(self.cdn, self.objects, self.clock, max_bytes=MEDIA_BYTES)
        self.opened: dict[int, Downloads] = {}
        """By shard: what waits for media. A shard that has none counts as not this replica's."""
        self.teller = FakeTeller()
        self.metrics = metrics or Metrics()
        self.recall = Recall(self.quotes, self.bus, self.names, self.metrics)
        self.leases = FakeLeases(incarnation)
        self.bindings = Bindings(self.bindings_bucket)
        for entry in self.bindings_bucket.entries.values():
            self.bindings._see(entry)
        self.bindings_bucket._followers.append(self.bindings._see)
        self.bindings.loaded = True
        self.contexts = Contexts(self.contexts_bucket, self._fence)
        self.events = Events(self.bus, self.names, self.clock, self.metrics)
        self.receipts = Receipts(self.events, self.bus, self.names, self.clock, self.metrics)
        self.sealer = Sealer(())
        self.limits = limits
        self.bus_up = asyncio.Event()
        self.bus_up.set()
        self.heard: list[tuple[str, str, str]] = []
        """What the lanes were told."""
        self.look: Callable[[Peer], None] = lambda peer: None
        """What watches the windows."""
        self.adopted: list[str] = []
        self.freed: list[str] = []
        """The bots that other replicas were told of."""
        self.idle: set[tuple[str, str]] = set()
        """Replicas that say that they have no poller of a bot: incarnation and bot."""
        self.stale: set[str] = set()
        self.lost_logins: list[str] = []
        self.regained_logins: list[str] = []
        self.asked_bound = 0
        self.bound_yet: Callable[[], Awaitable[None]] | None = None
        self.numbers: Iterator[int] = world.numbers if world else itertools.count(1)

    def _fence(self, bot: str) -> None:
        binding = self.bindings.get(bot)
        if binding is None:
            raise LeaseLost("not_bound", bot)
        self.leases.check(shard_of(binding.sandbox))

    async def bind(
        self, sandbox: str = "s1", bot: str = "b1@im.bot", user: str = "u1@im.wechat", **fields: Any
    ) -> Binding:
        """A binding, as control writes it."""
        binding = Binding(
            sandbox=sandbox, bot=bot, user=user, **{"token": f"{bot}:t", "since_ms": self.clock.now_ms(), **fields}
        )
        await self.bindings.put(binding)
        return binding

    def hears(self, bot: str = "b1@im.bot", user: str = "u1@im.wechat", **fields: Any) -> None:
        """The user has just written: their window is open."""
        context = Context(**{"token": "AARz", "inbound_ms": self.clock.now_ms(), "inbound_id": "in:1", **fields})
        self.contexts_bucket.put(peer_key(bot, user), msgspec.json.encode(context))

    async def wrote(self, bot: str, user: str, ident: str) -> None:
        """What a poller stores of a user's message before it is on the bus: another window."""
        peer = await self.contexts.peer(bot, user)
        await self.contexts.save(
            peer,
            lambda context: window.heard(
                context, message=ident, token="AARz", now_ms=self.clock.now_ms(), in_flight=peer.in_flight
            ),
        )

    def context(self, bot: str = "b1@im.bot", user: str = "u1@im.wechat") -> Context:
        """The record as the bucket has it."""
        entry = self.contexts_bucket.entries[peer_key(bot, user)]
        assert entry.value is not None
        return msgspec.json.decode(entry.value, type=Context)

    def cursor(self, bot: str = "b1@im.bot") -> Cursor:
        entry = self.cursors.entries[token_of(bot)]
        assert entry.value is not None
        return msgspec.json.decode(entry.value, type=Cursor)

    def command(
        self,
        text: str | None = None,
        *,
        sandbox: str = "s1",
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        suspect: bool = False,
        **body: Any,
    ) -> FakeDelivery:
        """A command as the consumer of its shard delivers it; the next in the stream."""
        if text is not None:
            body["text"] = text
        subject = f"{self.names.prefix}.out.{shard_of(sandbox)}.{sandbox}"
        payload = msgspec.json.encode(body) if data is None else data
        seq, now_ms = next(self.numbers), self.clock.now_ms()
        stream = self.bus.stream_of(subject)
        self.bus.kept.append(Kept(stream, Stored(subject, seq, headers or {}, payload), now_ms))
        return FakeDelivery(subject, payload, seq=seq, time_ms=now_ms, headers=headers, suspect=suspect)

    def sending(self, **changes: Any) -> Sending:
        sending = Sending(
            chat=self.chat,
            contexts=self.contexts,
            clock=self.clock,
            metrics=self.metrics,
            rules=RULES,
            slots=asyncio.Semaphore(8),
            attempts=3,
            empty_is_success=False,
            answer_s=15.0,
            continue_text="",
            text_chars=LIMITS.text_chars,
            look=self.look,
            note=self.recall.note,
        )
        return sending._replace(**changes)

    def send(self, command: Command, peer: Peer, *, check: Callable[[], None] = lambda: None, **changes: Any) -> Send:
        """A send as a lane makes it, without its pauses between two; `changes` are those of `sending`."""

        async def pace() -> None:
            return None

        return Send(
            self.sending(**changes),
            command,
            peer,
            Account(peer.bot, "secret", ""),
            pause=asyncio.sleep,
            pace=pace,
            check=check,
            upload=self.uploads.bring,
        )

    def outgoing(self, **changes: Any) -> Outgoing:
        async def stale_on_send(binding: Binding, detail: str) -> None:
            self.lost_logins.append(binding.bot)

            def dead(now: Binding) -> Binding:
                return msgspec.structs.replace(now, state="needs_login")

            await self.bindings.change(binding.bot, dead)

        async def alive_on_send(binding: Binding) -> None:
            self.regained_logins.append(binding.bot)

            def alive(now: Binding) -> Binding:
                return msgspec.structs.replace(now, state="active")

            await self.bindings.change(binding.bot, alive)

        async def bound_yet() -> None:
            self.asked_bound += 1
            if self.bound_yet is not None:
                await self.bound_yet()

        outgoing = Outgoing(
            sending=self.sending(),
            uploads=self.uploads,
            bus=self.bus,
            history=self.bus,
            bindings=self.bindings,
            leases=self.leases,
            receipts=self.receipts,
            names=self.names,
            limits=self.limits,
            account=lambda binding: Account(binding.bot, binding.token, binding.base_url),
            stale=lambda bot: bot in self.stale,
            stale_on_send=stale_on_send,
            alive_on_send=alive_on_send,
            bound_yet=bound_yet,
            gap_s=GAP_S,
            parked_per_user=100,
            parked_per_sandbox=150,
            merge_chars=0,  # what is parked goes one by one, unless a test says otherwise
            stale_retry_s=(5.0, 30.0, 300.0),
            grace_s=1.0,
            turns=Turns(4),
            loading=asyncio.Semaphore(2),
            showing=self.showing(),
        )
        return outgoing._replace(**changes)

    def showing(self, **changes: Any) -> Showing:
        showing = Showing(
            chat=self.chat,
            contexts=self.contexts,
            bindings=self.bindings,
            bucket=self.typing,
            clock=self.clock,
            account=lambda binding: Account(binding.bot, binding.token, binding.base_url),
            stale=lambda bot: bot in self.stale,
            check=self.leases.check,
            longest_s=300.0,
        )
        return showing._replace(**changes)

    def shard(self, sandbox: str = "s1", **changes: Any) -> Shard:
        """The lanes of a sandbox's shard, told of changed bindings as the supervisor tells them."""
        number = shard_of(sandbox)
        shard = Shard(number, self.outgoing(**changes))

        def on_change(bot: str, before: Binding | None, after: Binding | None) -> None:
            for name in {binding.sandbox for binding in (before, after) if binding is not None}:
                if shard_of(name) == number:
                    shard.rebound(name, anew=is_anew(before, after))

        self.bindings.listen(on_change)
        return shard

    purges = 0
    """How often cursors were seen to have vanished."""

    def incoming(self, **changes: Any) -> Incoming:
        async def tell_freed(bot: str) -> None:
            self.freed.append(bot)

        async def is_idle(owner: str, bot: str) -> bool:
            return (owner, bot) in self.idle

        async def writable() -> None:
            await self.bus_up.wait()

        async def waiting(sandbox: str) -> Waiting | None:
            return self.opened.get(shard_of(sandbox))

        incoming = Incoming(
            chat=self.chat,
            read_message=read_message,
            bus=self.bus,
            history=self.bus,
            cursors=self.cursors,
            contexts=self.contexts,
            bindings=self.bindings,
            leases=self.leases,
            events=self.events,
            sealer=self.sealer,
            clock=self.clock,
            metrics=self.metrics,
            names=self.names,
            rules=RULES,
            recall=self.recall,
            look=self.look,
            adopt=self.adopted.append,
            heard=lambda sandbox, bot, user: self.heard.append((sandbox, bot, user)),
            revived=lambda sandbox, bot, user: self.heard.append((sandbox, bot, user)),
            waiting=waiting,
            raw_bots=raw_bots(self.bus, self.names),
            writable=writable,
            purges=lambda: self.purges,
            starting=asyncio.Semaphore(4),
            turns=Turns(4),
            starts=Pace(2000),
            beat=Beat(0.1),
            spread_s=lambda: 0.0,
            stale_retry_s=(5.0, 30.0, 300.0),
            skew_ms=0,
            groups_as_direct=False,
            notify=True,
            is_idle=is_idle,
            tell_freed=tell_freed,
            grace_s=10.0,
        )
        return incoming._replace(**changes)

    async def downloads(self, sandbox: str = "s1", *, wait_s: float = 60.0, **changes: Any) -> Downloads:
        """What waits for media of a sandbox's shard, loaded as the supervisor does it."""

        async def to_wav(silk: bytes) -> bytes | None:
            return media.silk_to_wav(silk)  # no thread: time must not jump meanwhile

        downloading = Downloading(self.cdn, self.objects, to_wav, self.clock)
        made = Downloads(shard_of(sandbox), Fetching(self.incoming(**changes), downloading, wait_s))
        await made.load()
        self.opened[shard_of(sandbox)] = made
        return made


async def ready(*script: Any, **binding: Any) -> Bench:
    """A bound bot, whose polls will bring the script."""
    bench = Bench()
    await bench.bind(**binding)
    bench.bus.writes.clear()
    bench.chat.polls.extend(script)
    return bench


class Wire(asyncio.Transport):
    """What asyncio gives a protocol to write to; takes everything."""

    closing = False

    def write(self, data: object) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True
