"""The core of a replica, put together around the fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from adapter import media, window
from adapter.bindings.registry import Bindings, is_anew
from adapter.contexts import Contexts, Peer
from adapter.errors import LeaseLost
from adapter.events import Events
from adapter.ilink.translate import read_message
from adapter.inbound.cursors import raw_bots
from adapter.inbound.download import Downloading
from adapter.inbound.fetching import Downloads, Fetching
from adapter.inbound.recall import Recall
from adapter.inbound.sessions import Incoming, Waiting
from adapter.metrics import Metrics
from adapter.names import Names, peer_key, shard_of, token_of
from adapter.outbound.commands import Command, Limits
from adapter.outbound.former_bots import FormerBots
from adapter.outbound.receipts import Receipts
from adapter.outbound.sending import Send, Sending
from adapter.outbound.settling import Outgoing
from adapter.outbound.shard import Shard
from adapter.outbound.typing_indicator import Showing
from adapter.outbound.uploads import Uploads
from adapter.ports import Account, Stored
from adapter.records import Binding, Context, Cursor
from adapter.seal import Sealer
from adapter.timing import Beat, Pace, Turns
from tests.fakes.bus import FakeBucket, FakeBus, FakeCoreBus, FakeDelivery, Kept
from tests.fakes.clock import FakeClock
from tests.fakes.ilink import FakeChat
from tests.fakes.media import FakeCdn, FakeObjects
from tests.fakes.replicas import FakeLeases
from tests.fakes.texts import FakeTexts

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
        self.claims_bucket: FakeBucket = world.claims_bucket if world else FakeBucket("claim", self.bus.writes)
        self.texts = FakeTexts()
        self.uploads = Uploads(self.cdn, self.objects, self.clock, max_bytes=MEDIA_BYTES)
        self.opened: dict[int, Downloads] = {}
        """By shard: what waits for media. A shard that has none counts as not this replica's."""
        self.core = FakeCoreBus()
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
        self.former_bots = FormerBots(self.bus, self.names, self.clock)
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
            texts=self.texts,
            claims=self.claims_bucket,
            bus=self.bus,
            history=self.bus,
            bindings=self.bindings,
            former=self.former_bots,
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
            taking=asyncio.Semaphore(4),
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
