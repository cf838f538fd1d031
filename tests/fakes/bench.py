"""The core of a replica, put together around the fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from adapter.bridge.commands import Limits
from adapter.bridge.handover import read_polled
from adapter.bridge.leases import Tenure
from adapter.bridge.pace import Successes
from adapter.bridge.partition import Partition
from adapter.bridge.parts import Parts
from adapter.bridge.person import AnswerState, Person
from adapter.bridge.persons import open_state, seal_state
from adapter.bridge.poller import BotPoller
from adapter.bridge.presence import Presence
from adapter.bridge.record import PersonState, SendWindow
from adapter.bridge.sending import SendPolicy
from adapter.bridge.sessions import BotSession
from adapter.bridge.window import InboundReceived, WindowPolicy
from adapter.contract.names import Names, person_token, stream_of
from adapter.contract.records import Binding, PersonKey
from adapter.ports import StoredMessage
from adapter.replica.edges import PER_TICK, Edges
from adapter.replica.wiring import Replica
from adapter.settings import Settings
from adapter.tools.concurrency import FairSlots
from adapter.tools.metrics import Metrics
from adapter.tools.seal import MARK, cursor_context
from adapter.tools.timing import PerTickLimiter
from tests.fakes.bus import FakeBucket, FakeBus, FakeCoreBus, FakeDelivery, Kept
from tests.fakes.clock import FakeClock
from tests.fakes.ilink import ChatOfReplica, FakeChat
from tests.fakes.media import FakeCdn, FakeObjects
from tests.fakes.replicas import FakeLeases
from tests.newer import made_newer

LIMITS = Limits(park_ms=72 * 3_600_000, part_chars=1800, part_bytes=16_384)
WINDOW = WindowPolicy(sends=10, hours=23.0)
GAP_S = 1.5
POLICY = SendPolicy(window=WINDOW, gap_ms=int(GAP_S * 1000), merge_chars=0)
MEDIA_BYTES = 100_000


P = TypeVar("P", bound=BotPoller)


class FakeConnection:
    """A connection to NATS that is never there: what needs it is not run."""

    epoch, max_payload = 0, 1024 * 1024

    def on_connect(self, action: object) -> None: ...


class FakeEdges(Edges):
    """What a replica reaches, in memory."""

    def __init__(self, bench: Bench) -> None:
        self.clock, self.metrics, self.leases = bench.clock, bench.metrics, bench.leases
        self.presence, self.ticks = bench.presence, PerTickLimiter(PER_TICK)
        connection: Any = FakeConnection()
        self.connection = self.lease_connection = self.media_connection = connection
        self.service_connection = self.upload_connection = connection
        bus: Any = bench.bus
        self.bus = self.media_bus = self.history = self.bulk_history = self.inboxes = bus
        self.successes = Successes(bench.clock)
        chat = ChatOfReplica(bench.chat, bench.clock, self.successes.note)
        ports: Any = (chat, bench.cdn, bench.objects, bench.core)
        self.chat, self.cdn, self.objects, self.core = ports
        names = bench.names
        self.readers: Any = bench.readers_bucket
        self._buckets: dict[str, Any] = {
            names.bindings: bench.bindings_bucket,
            names.persons: bench.person_bucket,
            names.logins: bench.logins_bucket,
        }

    def bucket(self, name: str) -> Any:
        return self._buckets[name]

    def bulk_bucket(self, name: str) -> Any:
        return self._buckets[name]


class FakeSessions(dict[str, BotSession]):
    """What pollers tell of their bots, as the test says it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench
        self._told: dict[str, BotSession] = {}

    def get(self, bot: str, default: Any = None) -> Any:
        if (polling := super().get(bot)) is not None:  # a poller runs
            return polling
        bench = self._bench
        session = self._told.setdefault(bot, BotSession())
        session.poll_now = partial(bench.poll_now, bot)
        session.is_stale, session.is_taken = bot in bench.stale, bot not in bench.elsewhere
        session.polled_at = bench.polled_at.get(bot, 0.0)
        return session


class Bench:
    """One replica's core between fakes. A second one on the same `world` is the replica that takes over."""

    def __init__(
        self,
        world: Bench | None = None,
        *,
        instance: str = "me",
        limits: Limits = LIMITS,
        metrics: Metrics | None = None,
        token_key: tuple[bytes, ...] = (bytes(32),),
    ) -> None:
        self.clock: FakeClock = world.clock if world else FakeClock()
        self.names = Names()
        self.bus: FakeBus = world.bus if world else FakeBus(self.names, self.clock)
        self.chat: FakeChat = world.chat if world else FakeChat(self.clock)
        self.person_bucket: FakeBucket = world.person_bucket if world else FakeBucket("person", self.bus.writes)
        self.bindings_bucket: FakeBucket = world.bindings_bucket if world else FakeBucket("binding", self.bus.writes)
        self.cdn: FakeCdn = world.cdn if world else FakeCdn()
        self.objects: FakeObjects = world.objects if world else FakeObjects(self.bus.writes)
        self.readers_bucket: FakeBucket = world.readers_bucket if world else FakeBucket("reader", self.bus.writes)
        self.logins_bucket: FakeBucket = world.logins_bucket if world else FakeBucket("login", self.bus.writes)
        self.core: FakeCoreBus = FakeCoreBus(world.core if world else None)
        self.presence: Presence = Presence(self.core, self.names, self.clock, instance)
        self.partitions: dict[int, Partition] = {}
        """By number: the partitions that work here."""
        self.keys: dict[int, Tenure] = world.keys if world else {}
        self.leases: FakeLeases = FakeLeases(self.presence, self.clock, self.keys, range(self.names.partitions))
        self.metrics: Metrics = metrics or Metrics()
        settings = Settings(token_key=token_key, merge_chars=0, media_max_bytes=MEDIA_BYTES)
        self.replica = Replica(settings, edges=FakeEdges(self))
        self.replica.partitions.working = self.partitions
        self.replica.parts.sessions.polled = FakeSessions(self)
        self.bindings = self.replica.bindings
        for entry in self.bindings_bucket.entries.values():
            self.bindings._apply_entry(entry)
        self.bindings_bucket.followers.append(self.bindings._apply_entry)
        self.bindings.is_loaded = True
        self.limits = limits
        self.slots = FairSlots(8, share=8)
        """For requests."""
        self.receipts = self.replica.receipts
        self.events, self.sealer = self.replica.events, self.replica.sealer
        self.persons = self.replica.persons
        self.uploads = self.replica.parts.uploads
        self.bus_up = asyncio.Event()
        self.bus_up.set()
        self.changed_sessions: list[str] = []
        """Sandboxes whose bot's token was tried again, or not any more."""
        self.polled_now: list[str] = []
        """Bots whose long poll was to end."""
        self.elsewhere: set[str] = set()
        """Bots that another replica may still poll."""
        self.stale: set[str] = set()
        """Bots whose tokens are being tried again."""
        self.polled_at: dict[str, float] = {}
        """When a poll of a bot was last answered."""
        self.failed: list[str] = []
        """What said that only a restart helps."""
        self._speaking: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self.binds: Iterator[int] = world.binds if world else itertools.count(-1_000_000)
        """Sequences of binds before all that is stored here."""
        self.deliveries: list[FakeDelivery] = world.deliveries if world else []

    async def bind(
        self, sandbox: str = "s1", bot: str = "b1@im.bot", user: str = "u1@im.wechat", **fields: Any
    ) -> Binding:
        """A binding, as control writes it: what is in clear here is sealed there."""
        token, cursor = fields.pop("token", f"{bot}:t"), fields.pop("start_cursor", None)
        if not token.startswith(MARK):
            token = self.sealer.seal(bot, token)
        if cursor and not cursor.startswith(MARK):
            cursor = self.sealer.seal(cursor_context(bot), cursor)
        person = person_token(sandbox, user or bot)
        given = {
            "token": token,
            "person": person,
            "bound": next(self.binds),
            "start_cursor": cursor,
            "since_ms": self.clock.now_ms(),
            **fields,
        }
        binding = Binding(sandbox=sandbox, bot=bot, user=user, **given)
        self.stale.discard(bot)
        await self.bindings.change(bot, lambda _: binding)
        return binding

    async def unbind(self, bot: str = "b1@im.bot") -> None:
        """Has a bot unbound by the owner of its sandbox."""
        binding = self.bindings.get(bot)
        assert binding is not None
        delivery = self.command(verb="unbind", sandbox=binding.sandbox, bot=bot)
        partition = self.open_partition(binding.sandbox)
        assert partition is not None
        partition.on_delivery(delivery)
        while not delivery.acks:
            await asyncio.sleep(0.1)

    def hears(
        self, sandbox: str = "s1", user: str = "u1@im.wechat", *, since: int = 0, newer: bool = False, **fields: Any
    ) -> None:
        """The user has just written: their window is open. `fields`: of the window, or of the record. `newer`: a
        newer version has written the record."""
        opened: dict[str, Any] = {"id": "in:1", "opened_ms": self.clock.now_ms()}
        opened |= {name: fields.pop(name) for name in list(fields) if name in SendWindow.__struct_fields__}
        fields.setdefault("bot", "b1@im.bot")
        state = PersonState(**{"token": "AARz", "window": SendWindow(**opened), **fields})
        key = PersonKey(sandbox, person_token(sandbox, user), since)
        value = seal_state(key, user, state, self.sealer)
        self.person_bucket.put(key.key, made_newer(value) if newer else value)

    def record(self, sandbox: str = "s1", user: str = "u1@im.wechat") -> PersonState:
        """The record as the bucket has it."""
        return self.records()[f"{sandbox}.{person_token(sandbox, user)}"]

    def records(self) -> dict[str, PersonState]:
        """The records that the bucket has, by key."""
        entries = self.person_bucket.entries.items()
        return {key: open_state(key, entry.value, self.sealer)[1] for key, entry in entries if entry.value}

    async def person(self, bot: str = "b1@im.bot") -> Person:
        """The person of a bot, as this replica has them in memory."""
        binding = self.bindings.get(bot)
        assert binding is not None
        partition = self.open_partition(binding.sandbox)
        assert partition is not None
        person = partition.person(binding)
        await person.open()
        return person

    async def wrote(self, ident: str, *, bot: str = "b1@im.bot", user: str = "u1@im.wechat") -> None:
        """What a poller tells the person of their message that is in the inbox: another window."""
        binding, person = self.bindings.get(bot), await self.person(bot)
        assert binding is not None
        person.learn(user)
        opened = InboundReceived(ident, "AARz", written_ms=0)
        person.on_stored(person.position, AnswerState(person.state.bot, (), 1, person.state.cursor, "AARz", opened))
        if binding.options.auto_typing:
            person.show_typing()

    @property
    def freed(self) -> list[str]:
        """The bots that other replicas were told of."""
        polled = [read_polled(data) for subject, data, _ in self.core.published if subject == self.names.polled()]
        return [each.bot for each in polled if each is not None]

    def command(
        self,
        text: str | None = None,
        *,
        sandbox: str = "s1",
        verb: str = "out",
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        redelivered: bool = False,
        **body: Any,
    ) -> FakeDelivery:
        """A command, or with another `verb` a bind, unbind or erase, as the consumer of its partition delivers it:
        the next in the stream."""
        if text is not None:
            body["text"] = text
        subject = self.bus.stored_subject(self.names.said(verb, sandbox))
        payload = msgspec.json.encode(body) if data is None else data
        seq, now_ms = self.bus.next_sequence("OUT"), self.clock.now_ms()
        stream = stream_of(subject)
        self.bus.kept.append(Kept(stream, StoredMessage(subject, seq, headers or {}, payload, now_ms), now_ms))
        delivery = FakeDelivery(subject, payload, seq=seq, time_ms=now_ms, headers=headers, redelivered=redelivered)
        self.deliveries.append(delivery)
        return delivery

    def deliver(self, delivery: FakeDelivery) -> None:
        """What the consumer of one of this replica's partitions does with a command."""
        self.partitions[int(delivery.subject.split(".")[2])].on_delivery(delivery)

    def redeliver(self, partition: Partition) -> None:
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
            partition.on_delivery(again)

    def parts(self, **changes: Any) -> Parts:
        """`changes`: of the parts, of the send policy, or of the window's."""
        of_window, of_policy = WindowPolicy.__struct_fields__, SendPolicy.__struct_fields__
        window = replace(WINDOW, **{k: changes.pop(k) for k in list(changes) if k in of_window})
        policy = replace(POLICY, window=window)
        policy = replace(policy, **{k: changes.pop(k) for k in list(changes) if k in of_policy})
        usual: dict[str, Any] = {
            "policy": policy,
            "slots": defaultdict(lambda: self.slots),
            "limits": self.limits,
            "is_writable": self.bus_up.is_set,
            "wait_writable": self.bus_up.wait,
        }
        return replace(self.replica.parts, **usual | changes)

    def partition(self, sandbox: str = "s1", left: Iterable[str] = (), **changes: Any) -> Partition:
        """The partition of a sandbox, told of changed bindings. `left`: who may still poll and send there."""
        number = self.names.partition_of(sandbox)
        tenure = self.leases.owned[number] = self.leases.tenure_of(number, left)
        partition = self.partitions[number] = Partition(tenure, self.parts(**changes))

        def on_change(bot: str, before: Binding | None, after: Binding | None) -> None:
            here = [
                each if each is not None and self.names.partition_of(each.sandbox) == number else None
                for each in (before, after)
            ]
            if any(here):
                partition.on_binding(*here)

        self.bindings.add_listener(on_change)
        return partition

    async def run(
        self, consume: Callable[[Partition], Coroutine[Any, Any, None]], *, capacity: int = 1000, **changes: Any
    ) -> None:
        """Runs as the service does, with the partitions that it is told to take. `changes`: of the parts."""
        self.leases.owned.clear()
        partitions = self.replica.partitions
        partitions._parts, partitions._capacity = self.parts(**changes), capacity
        partitions._on_failed = lambda name, detail: self.failed.append(f"{name}: {detail}")
        if capacity:
            self.replica.parts.sessions.polled = {}
        self._work = consume
        await self.wake()

    async def wake(self) -> None:
        """Runs again, behind `rest`."""
        await self.speak()
        self._running = asyncio.create_task(self.replica.partitions.run(self._work))

    def rest(self) -> None:
        """Says nothing more, and follows no tenure or binding."""
        for task in filter(None, (self._running, self._speaking)):
            task.cancel()
        self._running = self._speaking = None

    def kill(self) -> None:
        """As kill -9 does: it says nothing more, and its connections end."""
        self.core.is_cut = True
        self.leases.lose()
        partitions = self.replica.partitions
        partitions._tasks.cancel_all()
        self.rest()
        for task in (*partitions._polling, *(owned.work for owned in partitions._owned.values())):
            task.cancel()
        for partition in [*self.partitions.values(), *partitions._leaving]:
            partition.stop()

    async def speak(self) -> None:
        """Says from now on that this replica is here, and hears it."""
        if self._speaking is None:
            speaking = self.presence.run(lambda: (len(self.leases.owned), not self.leases.draining))
            self._speaking = asyncio.create_task(speaking)
            await asyncio.sleep(0.1)

    async def give(self, *pollers: BotPoller, sandbox: str = "s1") -> None:
        """Gives the partition of a sandbox away, with these pollers of its bots."""
        partitions = self.replica.partitions
        await self.speak()
        for poller in pollers:
            partitions.pollers[poller.bot] = poller
        await partitions.give(self.names.partition_of(sandbox))

    async def drain(self, seconds: float) -> None:
        """Gives everything away as the replica stops."""
        await self.speak()
        if self._running is not None:
            self._running.cancel()
        await self.replica.partitions.drain(seconds)

    def open_partition(self, sandbox: str) -> Partition | None:
        """The partition of a sandbox, begun now unless it has; None: it is another replica's."""
        number = self.names.partition_of(sandbox)
        if number not in self.partitions and self.leases.has_lease and number in self.leases.owned:
            self.partition(sandbox)
        return self.partitions.get(number)

    def poll_now(self, bot: str) -> None:
        self.polled_now.append(bot)
        if self.chat.poll_is_stale:
            self.stale.add(bot)

    def new_poller(self, bot: str = "b1@im.bot", **changes: Any) -> BotPoller:
        """`changes`: of the parts."""
        return self.poller_of(BotPoller, bot, **changes)

    def poller_of(self, kind: type[P], bot: str, **changes: Any) -> P:
        """As `new_poller`, of a kind of its own."""

        def person_of(binding: Binding) -> Person | None:
            partition = self.open_partition(binding.sandbox)
            return None if partition is None else partition.person(binding)

        def on_session_changed(binding: Binding) -> None:
            self.changed_sessions.append(binding.sandbox)

        told = changes.pop("on_session_changed", on_session_changed)
        return kind(bot, self.parts(**changes), person_of, told)


async def ready(*script: Any, token_key: tuple[bytes, ...] = (bytes(32),), **binding: Any) -> Bench:
    """A bound bot, whose polls will bring the script."""
    bench = Bench(token_key=token_key)
    await bench.bind(**binding)
    bench.bus.writes.clear()
    bench.chat.polls.extend(script)
    return bench
