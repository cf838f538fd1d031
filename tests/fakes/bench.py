"""The core of a replica, put together around the fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from adapter.bindings.registry import Bindings
from adapter.content import media
from adapter.contract.names import Names, conversation_key, shard_of
from adapter.contract.records import UNBOUND_S, Binding
from adapter.conversation.commands import Limits
from adapter.conversation.conversations import Conversations
from adapter.conversation.record import ConversationRecord, SendWindow
from adapter.conversation.rules import SendPolicy
from adapter.conversation.shard import ConversationDeps
from adapter.conversation.store import ConversationStore
from adapter.conversation.uploads import Uploads
from adapter.conversation.window import WindowPolicy
from adapter.ilink.translate import read_message
from adapter.inbound.dispatcher import DispatchDeps
from adapter.inbound.download import DownloadDeps
from adapter.inbound.inbox import PublishDeps
from adapter.inbound.journal import Journal, JournalRecord, Written
from adapter.inbound.poller import STALE_RETRY_S
from adapter.inbound.recall import QuoteResolver
from adapter.inbound.sessions import InboundDeps
from adapter.inbound.triage import Triage
from adapter.kit.slots import FairSlots
from adapter.kit.timing import PerTickLimiter, RateLimiter, WakeupBatcher
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.outbound.processor import OutboundDeps, ShardCommandProcessor
from adapter.outbound.receipts import Receipts
from adapter.outbound.sessions import BotSessions
from adapter.outbound.typing_indicator import TypingDeps
from adapter.ports import Account, Stored
from adapter.security.seal import Sealer
from tests.fakes.bus import FakeBucket, FakeBus, FakeCoreBus, FakeDelivery, Kept
from tests.fakes.clock import FakeClock
from tests.fakes.ilink import FakeChat
from tests.fakes.media import FakeCdn, FakeObjects
from tests.fakes.replicas import FakeLeases
from tests.fakes.texts import FakeTexts

LIMITS = Limits(park_ms=72 * 3_600_000)
WINDOW = WindowPolicy(sends=10, hours=23.0, low=0)
GAP_S = 1.5
POLICY = SendPolicy(window=WINDOW, gap_ms=int(GAP_S * 1000), attempts=3, merge_chars=0)
MEDIA_BYTES = 100_000


DISPATCH = {*DispatchDeps._fields, *Triage._fields, *PublishDeps._fields} - set(InboundDeps._fields)
"""What `inbound_deps` passes on to `dispatch_deps`."""


class Bench:
    """One replica's core between fakes. A second one on the same `world` is the replica that takes over."""

    def __init__(
        self,
        world: Bench | None = None,
        *,
        incarnation: str = "me-1",
        limits: Limits = LIMITS,
        metrics: Metrics | None = None,
        sealer: Sealer | None = None,
    ) -> None:
        self.clock: FakeClock = world.clock if world else FakeClock()
        self.names = Names()
        self.bus: FakeBus = world.bus if world else FakeBus(self.names, self.clock)
        self.chat: FakeChat = world.chat if world else FakeChat(self.clock)
        self.conversation_bucket: FakeBucket = (
            world.conversation_bucket if world else FakeBucket("conversation", self.bus.writes)
        )
        self.bindings_bucket: FakeBucket = world.bindings_bucket if world else FakeBucket("binding", self.bus.writes)
        self.cdn: FakeCdn = world.cdn if world else FakeCdn()
        self.objects: FakeObjects = world.objects if world else FakeObjects(self.bus.writes)
        self.claims_bucket: FakeBucket = world.claims_bucket if world else FakeBucket("claim", self.bus.writes)
        self.texts = FakeTexts()
        self.transfers = FairSlots(16, share=16)
        self.uploads = Uploads(self.cdn, self.objects, self.clock, self.transfers, max_bytes=MEDIA_BYTES)
        self.core = FakeCoreBus()
        self.metrics = metrics or Metrics()
        self.leases = FakeLeases(incarnation)
        self.bindings = Bindings(self.bindings_bucket, unbound_s=UNBOUND_S)
        for entry in self.bindings_bucket.entries.values():
            self.bindings._apply_entry(entry)
        self.bindings_bucket._followers.append(self.bindings._apply_entry)
        self.bindings.is_loaded = True
        self.store = ConversationStore(self.conversation_bucket, unserved_s=UNBOUND_S)
        self.processors: dict[int, ShardCommandProcessor] = {}
        """By shard: those that work here."""
        self.conversations = Conversations(self.store, self.open_shard, self.clock, POLICY)
        self.recall = QuoteResolver(self.conversations, self.bus, self.names, self.clock, self.metrics)
        self.events = Events(self.bus, self.names, self.clock, self.metrics)
        self.receipts = Receipts(self.events, self.bus, self.names)
        self.sealer: Sealer = sealer or (world.sealer if world else Sealer(()))
        self.journal = Journal(self.bus, self.bus, self.names, self.sealer)
        self.limits = limits
        self.bus_up = asyncio.Event()
        self.bus_up.set()
        self.changed_sessions: list[str] = []
        """Sandboxes whose bot's token was tried again, or not any more."""
        self.polled_now: list[str] = []
        """Bots whose long poll was to end."""
        self.freed: list[str] = []
        """The bots that other replicas were told of."""
        self.idle: set[tuple[str, str]] = set()
        """Replicas that say that they have no poller of a bot: incarnation and bot."""
        self.behind: set[str] = set()
        """Bots of which an owner before may have stored something that the conversations have not heard."""
        self.stale: set[str] = set()
        """Bots whose tokens are being tried again."""
        self.polled_at: dict[str, float] = {}
        """When a poll of a bot was last answered."""
        self.asked_bound = 0
        self.wait_for_pending_binds: Callable[[], Awaitable[None]] | None = None
        self.numbers: Iterator[int] = world.numbers if world else itertools.count(1)
        self.deliveries: list[FakeDelivery] = world.deliveries if world else []

    async def bind(
        self, sandbox: str = "s1", bot: str = "b1@im.bot", user: str = "u1@im.wechat", **fields: Any
    ) -> Binding:
        """A binding, as control writes it."""
        binding = Binding(
            sandbox=sandbox, bot=bot, user=user, **{"token": f"{bot}:t", "since_ms": self.clock.now_ms(), **fields}
        )
        self.stale.discard(bot)
        await self.bindings.put(binding)
        return binding

    def hears(self, sandbox: str = "s1", user: str = "u1@im.wechat", **fields: Any) -> None:
        """The user has just written: their window is open. `fields`: of the window, or of the record."""
        opened: dict[str, Any] = {"id": "in:1", "opened_ms": self.clock.now_ms()}
        opened |= {name: fields.pop(name) for name in list(fields) if name in SendWindow.__struct_fields__}
        record = ConversationRecord(**{"token": "AARz", "bot": "b1@im.bot", "window": SendWindow(**opened), **fields})
        self.conversation_bucket.put(conversation_key(sandbox, user), msgspec.json.encode(record))

    def record(self, sandbox: str = "s1", user: str = "u1@im.wechat") -> ConversationRecord:
        """The record as the bucket has it."""
        entry = self.conversation_bucket.entries[conversation_key(sandbox, user)]
        assert entry.value is not None
        return msgspec.json.decode(entry.value, type=ConversationRecord)

    async def wrote(self, ident: str, *, bot: str = "b1@im.bot", user: str = "u1@im.wechat") -> None:
        """What the dispatcher tells the conversation of a user's message before it is on the bus: another window."""
        binding = self.bindings.get(bot)
        assert binding is not None
        sequence = self.bus.put(self.names.journal(bot), b"", {})
        await self.conversations.on_inbound(
            binding, user, message=ident, token="AARz", written_ms=0, sequence=sequence
        )

    async def written(self, bot: str = "b1@im.bot") -> list[Written]:
        """The journal of a bot, oldest first."""
        return [written async for written in self.journal.after(bot, 0)]

    async def last_record(self, bot: str = "b1@im.bot") -> JournalRecord:
        return (await self.written(bot))[-1].record

    def command(
        self,
        text: str | None = None,
        *,
        sandbox: str = "s1",
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        redelivered: bool = False,
        **body: Any,
    ) -> FakeDelivery:
        """A command as the consumer of its shard delivers it; the next in the stream."""
        if text is not None:
            body["text"] = text
        subject = f"{self.names.prefix}.out.{shard_of(sandbox)}.{sandbox}"
        payload = msgspec.json.encode(body) if data is None else data
        seq, now_ms = next(self.numbers), self.clock.now_ms()
        stream = self.bus.stream_of(subject)
        self.bus.kept.append(Kept(stream, Stored(subject, seq, headers or {}, payload, now_ms), now_ms))
        delivery = FakeDelivery(subject, payload, seq=seq, time_ms=now_ms, headers=headers, redelivered=redelivered)
        self.deliveries.append(delivery)
        return delivery

    def redeliver(self, processor: ShardCommandProcessor) -> None:
        """What was not acknowledged comes again, to the next owner, as the bus has it."""
        for delivery in [one for one in self.deliveries if not one.acks]:
            stored = next(one for one in self.bus.found("OUT") if one.seq == delivery.seq)
            again = FakeDelivery(
                stored.subject,
                stored.data,
                seq=stored.seq,
                time_ms=delivery.time_ms,
                headers=dict(stored.headers),
                redelivered=True,
            )
            self.deliveries.append(again)
            self.deliveries.remove(delivery)
            processor.intake.on_delivery(again)

    def outbound(self, **changes: Any) -> OutboundDeps:
        """`changes`: of the dependencies, of the send policy, or of the window's."""

        async def wait_for_pending_binds() -> None:
            self.asked_bound += 1
            if self.wait_for_pending_binds is not None:
                await self.wait_for_pending_binds()

        window = WINDOW._replace(**{k: changes.pop(k) for k in list(changes) if k in WindowPolicy._fields})
        policy = POLICY._replace(window=window)
        policy = policy._replace(**{k: changes.pop(k) for k in list(changes) if k in SendPolicy._fields})
        deps = OutboundDeps(
            conversation=ConversationDeps(
                store=self.store,
                chat=self.chat,
                uploads=self.uploads,
                slots=FairSlots(8, share=8),
                policy=policy,
                clock=self.clock,
                metrics=self.metrics,
                turns=PerTickLimiter(4),
            ),
            bindings=self.bindings,
            leases=self.leases,
            receipts=self.receipts,
            events=self.events,
            history=self.bus,
            texts=self.texts,
            claims=self.claims_bucket,
            sessions=BotSessions(self.bindings, self.chat, self._account, lambda: self, self.clock),
            typing=self.typing(),
            names=self.names,
            limits=self.limits,
            account=self._account,
            wait_for_pending_binds=wait_for_pending_binds,
        )
        return deps._replace(**changes)

    def typing(self, **changes: Any) -> TypingDeps:
        deps = TypingDeps(
            chat=self.chat,
            bindings=self.bindings,
            clock=self.clock,
            account=self._account,
            stale=self.is_stale,
            check=self.leases.ensure_owned,
            longest_s=300.0,
        )
        return deps._replace(**changes)

    @staticmethod
    def _account(binding: Binding) -> Account:
        return Account(binding.bot, binding.token, binding.base_url)

    def is_stale(self, bot: str) -> bool:
        return bot in self.stale

    def is_catching_up(self, bot: str) -> bool:
        return bot in self.behind

    def poll_now(self, bot: str) -> None:
        self.polled_now.append(bot)
        if self.chat.poll_is_stale:
            self.stale.add(bot)

    def has_polled_since(self, bot: str, since: float) -> bool:
        return self.polled_at.get(bot, 0.0) > since

    def processor(self, sandbox: str = "s1", **changes: Any) -> ShardCommandProcessor:
        """The processor of a sandbox's shard, told of changed bindings as the supervisor tells it."""
        number = shard_of(sandbox)
        processor = self.processors[number] = ShardCommandProcessor(number, self.outbound(**changes))

        def on_change(bot: str, before: Binding | None, after: Binding | None) -> None:
            sides = [binding for binding in (before, after) if binding is not None]
            for name in {binding.sandbox for binding in sides}:
                if shard_of(name) == number:
                    processor.on_binding(name, bot, {binding.user for binding in sides})
            is_left = before is not None and (after is None or after.sandbox != before.sandbox)
            if before is not None and is_left and shard_of(before.sandbox) == number:
                processor.on_unbound(before)

        self.bindings.add_listener(on_change)
        return processor

    async def open_shard(self, sandbox: str) -> ShardCommandProcessor | None:
        number = shard_of(sandbox)
        if number not in self.processors and self.leases.is_valid and number in self.leases.owned:
            self.processor(sandbox)
        return self.processors.get(number)

    def inbound_deps(self, **changes: Any) -> InboundDeps:
        async def tell_freed(bot: str) -> None:
            self.freed.append(bot)

        async def is_idle(owner: str, bot: str) -> bool:
            return (owner, bot) in self.idle

        async def writable() -> None:
            await self.bus_up.wait()

        incoming = InboundDeps(
            chat=self.chat,
            journal=self.journal,
            dispatching=self.dispatch_deps(**{name: changes.pop(name) for name in list(changes) if name in DISPATCH}),
            conversations=self.conversations,
            bindings=self.bindings,
            leases=self.leases,
            events=self.events,
            sealer=self.sealer,
            clock=self.clock,
            metrics=self.metrics,
            session_changed=lambda binding: self.changed_sessions.append(binding.sandbox),
            writable=writable,
            part_bytes=lambda: 512 * 1024,
            taking=asyncio.Semaphore(4),
            turns=PerTickLimiter(4),
            starts=RateLimiter(2000),
            beat=WakeupBatcher(0.1),
            spread_s=lambda: 0.0,
            stale_retry_s=STALE_RETRY_S,
            keep_s=3600,
            is_idle=is_idle,
            tell_freed=tell_freed,
            grace_s=10.0,
        )
        return incoming._replace(**changes)

    def dispatch_deps(self, **changes: Any) -> DispatchDeps:
        """`changes`: of the dependencies, of the triage, or of the publishing."""

        async def to_wav(silk: bytes) -> bytes | None:
            return media.silk_to_wav(silk)  # no thread: time must not jump meanwhile

        async def media_writable() -> None:
            await self.bus_up.wait()

        def changed(kind: type[Any], made: Any) -> Any:
            return made._replace(**{name: changes.pop(name) for name in list(changes) if name in kind._fields})

        triage = Triage(read_message, PerTickLimiter(4).wait_turn)
        publishing = PublishDeps(
            bus=self.bus,
            history=self.bus,
            bindings=self.bindings,
            conversations=self.conversations,
            recall=self.recall,
            events=self.events,
            leases=self.leases,
            clock=self.clock,
            metrics=self.metrics,
            names=self.names,
        )
        return DispatchDeps(
            journal=self.journal,
            triage=changed(Triage, triage),
            publishing=changed(PublishDeps, publishing),
            bindings=self.bindings,
            downloading=DownloadDeps(self.cdn, self.objects, to_wav, self.clock, self.transfers),
            media_wait_s=60.0,
            media_writable=media_writable,
        )._replace(**changes)


async def ready(*script: Any, sealer: Sealer | None = None, **binding: Any) -> Bench:
    """A bound bot, whose polls will bring the script."""
    bench = Bench(sealer=sealer)
    await bench.bind(**binding)
    bench.bus.writes.clear()
    bench.chat.polls.extend(script)
    return bench
