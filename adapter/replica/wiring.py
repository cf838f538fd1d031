"""The composition root: builds the loops of a replica on its connections. No other module knows both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import structlog

from adapter import __version__
from adapter.bindings.binder import ControlDeps
from adapter.bindings.control import Control
from adapter.bindings.readers import Readers
from adapter.bindings.registry import Bindings, account_of
from adapter.console.server import Console
from adapter.console.service import ConsoleDeps
from adapter.content import media
from adapter.contract.names import Names
from adapter.contract.records import UNBOUND_S, Binding
from adapter.ilink.cdn import TRANSFERS
from adapter.ilink.translate import read_message
from adapter.inbound import poller
from adapter.inbound.checkpoint import Checkpoints
from adapter.inbound.media import FetchDeps, MediaFetcher
from adapter.inbound.poller import BotPoller, Pacing, PollDeps
from adapter.inbound.receive import ReceiveDeps
from adapter.jetstream.buckets import LeaderKvBucket
from adapter.jetstream.inspector import Inspector
from adapter.jetstream.layout import expects
from adapter.jetstream.microservice import MAX_UPLOADS_PER_SANDBOX, UPLOADS, Handler, Services
from adapter.kit.slots import FairSlots
from adapter.kit.timing import Clock, PerTickLimiter, RateLimiter, SystemClock, WakeupBatcher
from adapter.logins.flow import REFRESH_S, LoginDeps
from adapter.logins.registry import LoginRegistry
from adapter.logins.runner import LoginRunner
from adapter.observability.events import BusAccess, Events
from adapter.observability.metrics import Metrics
from adapter.outbound.commands import Limits
from adapter.outbound.inbox import InboxReader
from adapter.outbound.receipts import Receipts
from adapter.outbound.router import Router
from adapter.outbound.sending import SendPolicy
from adapter.outbound.sessions import AcceptedSends, BotSessions, Pollers
from adapter.outbound.shard import OutboundDeps, Shard
from adapter.outbound.store import ConversationStore
from adapter.outbound.uploads import Uploads
from adapter.outbound.window import WindowPolicy
from adapter.ownership import replica_status
from adapter.ownership.leases import Leases
from adapter.ownership.replica_status import OtherReplicas, ReplicaStatus
from adapter.ownership.tenure import Tenure
from adapter.replica.closings import Closings
from adapter.replica.connections import Connections
from adapter.replica.health_monitor import HealthMonitor
from adapter.replica.probes import Health
from adapter.replica.shard_runtime import ShardRuntime
from adapter.replica.supervisor import Supervisor
from adapter.security.seal import Sealer
from adapter.services.health import HealthDeps
from adapter.services.logins import LoginService
from adapter.services.media import MediaService
from adapter.services.next import Next, NextDeps
from adapter.services.persons import Erasure
from adapter.services.queries import Queries
from adapter.settings import Settings

log = structlog.get_logger()

RELEASE_S = 5.0
"""Part of the drain time that is reserved for releasing the shards."""
MAX_CONCURRENT_TAKEOVERS = 512
"""Bots that are taken over at the same time; what is read for them goes together."""
SENDS = 256
"""Most requests to sendmessage in flight at a base URL. They bound sockets and memory while iLink is slow. With
answers in a quarter of a second they allow a thousand sends a second."""
SENDS_PER_SANDBOX, TRANSFERS_PER_SANDBOX = SENDS // 8, TRANSFERS // 4
"""Share of one sandbox, so that slow answers to its bots do not delay others."""
PER_TICK = 64
"""Steps in one turn of the event loop: answers with messages, commands and the steps of their conversations, polls
after a pause or a failure. Without a limit, five thousand answers in a process with a quarter of a core made a turn
longer than the lease, which was lost again and again."""
STARTS_PER_S = 3000
"""Most first polls in a second, at a start and whenever these polls end together. A dead replica's bots must be
polled within six seconds, most of which pass before another replica may take them."""
POLLS_PER_S = 1000
"""Approximate rate of polls after an outage."""
WAKEUP_S = 0.1
"""Longest time between an empty answer and the bot's next poll; polls of that time start together."""


class Edges(NamedTuple):
    """External dependencies of a replica; tests replace them with fakes."""

    clock: Clock
    metrics: Metrics
    connections: Connections
    leases: Leases


class Replica:
    """All parts of one replica. `app` runs it; tests give it shorter waits and fake edges."""

    def __init__(
        self,
        settings: Settings,
        *,
        stale_retry_s: Sequence[float] = poller.STALE_RETRY_S,
        login_polls_s: Sequence[float] = poller.LOGIN_POLLS_S,
        login_refresh_s: float = REFRESH_S,
        unbound_s: int = UNBOUND_S,
        edges: Edges | None = None,
    ) -> None:
        self.settings = settings
        self.instance = socket.gethostname()
        self.names = names = Names(settings.prefix)
        self.health = Health()
        self.turns = PerTickLimiter(PER_TICK)
        edges = edges or _real_edges(settings, names, self.instance)
        self.clock, self.metrics, self.connections, self.leases = edges
        clock, metrics, connections = self.clock, self.metrics, self.connections

        self.policy = _send_policy(settings)
        self.limits = Limits(park_ms=int(settings.park_hours * 3_600_000))
        self.sealer = Sealer(settings.token_key)
        self.access = BusAccess(
            connections.bus, connections.history, Events(connections.bus, names, clock, metrics), names
        )
        self.receipts = Receipts(self.access.events, connections.history, names)
        self.bindings = Bindings(connections.bucket(names.bindings), self.sealer.is_same_secret, unbound_s=unbound_s)
        self.readers = Readers(connections.readers, clock)
        self.others = OtherReplicas(connections.core, names, self.leases)

        self.conversation_store = ConversationStore(
            connections.bucket(names.conversations), self.sealer, unserved_s=unbound_s
        )
        self.transfers = FairSlots(TRANSFERS, share=TRANSFERS_PER_SANDBOX)
        self.fetching = self._fetch_deps()
        self.media = MediaFetcher(self.fetching)
        self.checkpoints = Checkpoints(connections.bucket(names.checkpoints), self.sealer)
        self.inboxes = InboxReader(connections.history, names, self.sealer, clock)
        self.inbound = PollDeps(
            chat=connections.chat,
            receiving=self._receive_deps(),
            pacing=Pacing(
                takeovers=asyncio.Semaphore(MAX_CONCURRENT_TAKEOVERS),
                starts=RateLimiter(STARTS_PER_S),
                wakeups=WakeupBatcher(WAKEUP_S),
                spread_s=lambda: len(self.supervisor.pollers) / POLLS_PER_S,
                stale_retry_s=stale_retry_s,
                login_polls_s=login_polls_s,
                keep_s=unbound_s,
            ),
            gate=_PollGate(self),
            others=self.others,
            on_session_changed=self._on_session_changed,
        )
        self.outbound = self._outbound_deps()
        self.control = self._new_control()
        self.closings = Closings(
            self.bindings, self._open_shard, self._is_released, lambda: self.leases.incarnation, clock
        )
        self.supervisor = Supervisor(
            bindings=self.bindings,
            leases=self.leases,
            new_poller=lambda bot: BotPoller(bot, self.inbound),
            work=ShardRuntime(
                connections.connection,
                self.outbound,
                self._new_router,
                self.control,
                self.health.report_failed_loop,
            ),
            publish_released=self.others.publish_released,
            is_connecting=connections.chat.is_connecting,
            capacity=settings.capacity,
            follow_closing=self.closings.follow,
        )
        self.health_monitor = HealthMonitor(
            connections=connections,
            inspector=Inspector(names, settings, at_least={names.bindings: lambda: len(self.bindings)}),
            set_back=lambda: self.inboxes.set_back,
            supervisor=self.supervisor,
            names=names,
            health=self.health,
            clock=clock,
            metrics=metrics,
        )
        self.logins = LoginDeps(
            logins=connections.chat,
            registry=LoginRegistry(connections.bucket(names.logins), self.access.events, clock, metrics),
            bindings=self.bindings,
            leases=self.leases,
            access=self.access,
            sealer=self.sealer,
            clock=clock,
            metrics=metrics,
            refresh_s=login_refresh_s,
        )
        self.login_runner = LoginRunner(self.logins)
        self.handlers = self._register_services()

        metrics.bindings_capacity.set(settings.capacity)
        connections.connection.on_connect(self._count_connect)
        connections.core.respond(names.replica_status(), lambda data: replica_status.status_reply(data, self._status))
        connections.core.subscribe(
            names.bot_released(), lambda data: self._on_released(data.decode("utf-8", "replace"))
        )

    async def _count_connect(self, _: object) -> None:
        if self.connections.connection.epoch:
            self.metrics.nats_reconnects.inc()

    # parts -------------------------------------------------------------------------------------

    def _receive_deps(self) -> ReceiveDeps:
        connections = self.connections
        return ReceiveDeps(
            read_message=read_message,
            bus=connections.bus,
            history=connections.history,
            inboxes=self.inboxes,
            events=self.access.events,
            names=self.names,
            sealer=self.sealer,
            bindings=self.bindings,
            checkpoints=self.checkpoints,
            open_shard=self._open_shard,
            policy=self.policy.window,
            media=self.media,
            leases=self.leases,
            publish_released=self.others.publish_released,
            max_payload=lambda: connections.connection.max_payload,
            turns=self.turns,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _fetch_deps(self) -> FetchDeps:
        connections = self.connections
        return FetchDeps(
            cdn=connections.cdn,
            objects=connections.objects,
            history=connections.bulk_history,
            names=self.names,
            sealer=self.sealer,
            to_wav=lambda silk: asyncio.to_thread(media.silk_to_wav, silk),
            may_store=self._may_store,
            transfers=self.transfers,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _outbound_deps(self) -> OutboundDeps:
        connections, clock = self.connections, self.clock
        account = partial(account_of, sealer=self.sealer)
        uploads = Uploads(
            connections.cdn, connections.objects, self.transfers, max_bytes=self.settings.media_max_bytes
        )
        return OutboundDeps(
            events=self.access.events,
            history=connections.history,
            names=self.names,
            store=self.conversation_store,
            chat=connections.chat,
            uploads=uploads,
            slots=defaultdict(lambda: FairSlots(SENDS, share=SENDS_PER_SANDBOX)),
            policy=self.policy,
            limits=self.limits,
            sealer=self.sealer,
            receipts=self.receipts,
            bindings=self.bindings,
            leases=self.leases,
            sessions=BotSessions(self.bindings, connections.chat, account, self._pollers, clock),
            accepted=AcceptedSends(clock),
            account=account,
            inboxes=self.inboxes,
            turns=self.turns,
            clock=clock,
            metrics=self.metrics,
        )

    def _new_router(self, tenure: Tenure) -> Router:
        return Router(self.access, self.receipts, self.limits, self.sealer, tenure, self.clock, self.metrics)

    def _new_control(self) -> Control:
        return Control(
            ControlDeps(
                access=self.access,
                bindings=self.bindings,
                chat=self.connections.chat,
                sealer=self.sealer,
                core=self.connections.core,
                readers=self.readers,
                ensure_owner=lambda: self.leases.ensure_owned(0),
                wait_complete=lambda: self.health_monitor.wait_complete([f"KV_{self.names.bindings}"]),
                eraser=self._new_erasure(),
                clock=self.clock,
                metrics=self.metrics,
            )
        )

    def _new_erasure(self) -> Erasure:
        buckets = (self.names.checkpoints, self.names.conversations, self.names.logins)
        # it reads all streams: commands do not wait for it
        access = self.access._replace(history=self.connections.bulk_history)
        return Erasure(
            access,
            self.bindings,
            {f"KV_{name}": self.connections.bucket(name) for name in buckets},
            lambda bot: self._is_released(bot, ask=True),
            self.clock,
        )

    def _next_deps(self) -> NextDeps:
        settings, connections = self.settings, self.connections
        return NextDeps(
            readers=self.readers,
            history=connections.inboxes,
            names=self.names,
            clock=self.clock,
            metrics=self.metrics,
            page_bytes=lambda: connections.service_connection.max_payload // 2,
            kept=settings.in_max_per_sandbox,
            kept_ms=int(settings.in_max_age_h * 3_600_000),
        )

    def _register_services(self) -> dict[str, Handler]:
        """Registers `wechat.svc.*`. Returns the handlers for requests without a sandbox."""
        settings, connections, names, metrics = self.settings, self.connections, self.names, self.metrics
        login = LoginService(self.logins, self.login_runner)
        # any server may answer: these data change little, and a flood of requests must not delay commands
        conversations = ConversationStore(
            connections.bulk_bucket(names.conversations), self.sealer, decoder=self.conversation_store.decoder
        )
        self.health_deps = HealthDeps(
            replicas=connections.core,
            subject=names.replica_status(),
            living_count=lambda: self.leases.living_count,
            conversations=conversations,
            policy=self.policy.window,
            clock=self.clock,
        )
        queries = Queries(
            self.bindings,
            self.health_deps,
            Receipts(self.access.events, connections.bulk_history, names),
            connections.bulk_history,
            names,
            metrics,
        )
        store = MediaService(connections.objects, self.media, metrics, max_bytes=settings.media_max_bytes)
        handlers: dict[str, Handler] = {
            "bindings.list": queries.list_bindings,
            "bindings.get": queries.get_bindings,
            "receipt": queries.query_receipt,
            "window": queries.query_window,
            "replay": queries.query_replay,
            "login.start": login.start,
            "login.status": login.status,
            "login.verify": login.verify,
            "login.cancel": login.cancel,
        }
        of_sandbox = {
            "media.get": store.get,
            "next": Next(self._next_deps()).answer,
            "receipt": queries.query_receipt_of_sandbox,
            "replay": queries.query_replay_of_sandbox,
            "window": queries.query_window_of_sandbox,
        }
        serve = partial(
            Services,
            names=names,
            metrics=metrics,
            version=__version__,
            instance=self.instance,
            metadata=expects(settings),
        )
        serve(connections.service_connection, handlers=handlers, of_sandbox=of_sandbox)
        uploads = {"media.put": store.put}
        serve(
            connections.upload_connection,
            handlers={},
            of_sandbox=uploads,
            service=UPLOADS,
            of_one=MAX_UPLOADS_PER_SANDBOX,
        )
        return handlers

    # calls between the parts --------------------------------------------------------------------------

    async def _open_shard(self, sandbox: str) -> Shard | None:
        return await self.supervisor.open_shard(sandbox)

    def _on_session_changed(self, binding: Binding) -> None:
        self.supervisor.shards.on_session_changed(binding)

    def _pollers(self) -> Pollers:
        return self.supervisor.pollers

    def _may_store(self, sandbox: str, bot: str, user: str) -> bool:
        """Whether a bot, or another one of its user, serves a sandbox: an erasure begins with the end of the binding,
        and media must not follow it."""
        bindings, serves = self.bindings, self.bindings.serving(bot)
        is_served = serves is not None and serves.sandbox == sandbox
        return is_served or not bindings.is_loaded or bool(bindings.serving_user(sandbox, user))

    def _on_released(self, bot: str) -> None:
        """Another replica has released a bot, or, without a bot, a shard."""
        if bot:
            self.supervisor.pollers.on_released(bot)
        else:
            self.leases.claim_now()

    async def _is_released(self, bot: str, ask: bool) -> bool:
        """Whether no living replica polls a bot. `ask`: also ask the one whose name the bot's checkpoint has, which
        it may not know any more. Raises Temporary."""
        if bot in self.supervisor.pollers:
            return False
        owner = (await self.checkpoints.read(bot)).owner
        if owner in ("", self.leases.incarnation):
            return True
        return await self.leases.revoke_if_expired(owner) or (ask and await self.others.is_idle(owner, bot))

    # for operators ----------------------------------------------------------------------------------

    def console(self) -> contextlib.AbstractContextManager[object]:
        """Serves operators while it is entered, if the settings enable it."""
        settings = self.settings
        if not settings.console_addr:
            return contextlib.nullcontext()
        deps = ConsoleDeps(
            bindings=self.bindings,
            health=self.health_deps,
            access=self.access,
            registry=self.logins.registry,
            services=self.handlers,
            clock=self.clock,
        )
        return Console(settings.console_addr, settings.console_token, deps)

    def _status(self, bots: Sequence[str]) -> ReplicaStatus:
        return ReplicaStatus(
            instance=self.instance,
            incarnation=self.leases.incarnation,
            version=__version__,
            shards=len(self.leases.owned),
            bots=len(self.supervisor.pollers),
            capacity=self.settings.capacity,
            draining=self.health.draining,
            polls=self.supervisor.pollers.states(bots, self.clock.monotonic()),
        )


def _send_policy(settings: Settings) -> SendPolicy:
    return SendPolicy(
        window=WindowPolicy(
            sends=settings.sends_per_window, hours=settings.window_hours, reserve=settings.reserve_sends
        ),
        gap_ms=settings.send_gap_ms,
        merge_chars=settings.merge_chars,
    )


class _PollGate:
    """Implements inbound.poller.PollGate."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        names = replica.names
        buckets = (names.bindings, names.checkpoints, names.conversations)
        self._streams = [names.stream_in, *(f"KV_{bucket}" for bucket in buckets)]

    def is_open(self) -> bool:
        replica = self._replica
        return (
            replica.connections.connection.is_connected
            and replica.connections.bus.is_writable(self._streams)
            and replica.health_monitor.is_complete(self._streams)
        )

    async def wait_writable(self) -> None:
        replica = self._replica
        await replica.connections.connection.wait_connected()
        await replica.connections.bus.wait_writable(self._streams)
        await replica.health_monitor.wait_complete(self._streams)


def _real_edges(settings: Settings, names: Names, instance: str) -> Edges:
    clock, metrics = SystemClock(), Metrics()
    connections = Connections(settings, names, instance, clock, metrics)
    leases = Leases(
        LeaderKvBucket(connections.lease_connection, names.members, ttl_s=max(60, int(settings.lease_s * 15))),
        LeaderKvBucket(connections.lease_connection, names.claims),
        clock,
        metrics,
        instance=instance,
        lease_s=settings.lease_s,
    )
    return Edges(clock, metrics, connections, leases)
