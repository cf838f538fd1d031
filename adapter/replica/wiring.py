"""The composition root: builds the parts of a replica on its edges. No other module knows both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from adapter import __version__
from adapter.bridge.bindings import Bindings
from adapter.bridge.commands import Limits
from adapter.bridge.erasure import Erasure
from adapter.bridge.leases import Tenure
from adapter.bridge.media import MediaFetcher, Uploads
from adapter.bridge.partitions import Partitions
from adapter.bridge.parts import Bodies, Parts
from adapter.bridge.persons import Persons
from adapter.bridge.poller import BotPoller
from adapter.bridge.presence import PollerStatus, Replicas, ReplicaStatus
from adapter.bridge.receipts import Receipts
from adapter.bridge.refused_token import LOGIN_POLLS_S, STALE_RETRY_S
from adapter.bridge.router import Router
from adapter.bridge.sending import SendPolicy
from adapter.bridge.sessions import BotSessions
from adapter.bridge.window import WindowPolicy
from adapter.console.auth import ConsoleAuth
from adapter.console.server import Console
from adapter.console.service import ConsoleService
from adapter.contract.names import Names
from adapter.contract.records import UNBOUND_S
from adapter.ilink.cdn import TRANSFERS
from adapter.ilink.translate import read_message
from adapter.jetstream.inspector import Inspector
from adapter.jetstream.microservice import (
    MAX_UPLOADS_PER_SANDBOX,
    UPLOADS,
    Handler,
    SandboxHandler,
    Services,
)
from adapter.logins.flow import REFRESH_S
from adapter.logins.records import LoginRecords
from adapter.logins.service import LoginService
from adapter.replica.edges import Edges
from adapter.replica.health import Health
from adapter.services.health import BotHealth
from adapter.services.media import MediaService
from adapter.services.next import Next, Readers
from adapter.services.queries import Queries, of_sandbox
from adapter.services.send import SendService
from adapter.settings import Settings
from adapter.tools import media_types
from adapter.tools.concurrency import FairSlots
from adapter.tools.events import Events
from adapter.tools.seal import Sealer
from adapter.tools.timing import RateLimiter, WakeupBatcher

MAX_CONCURRENT_TAKEOVERS = 512
"""Bots that are taken over at the same time; what is read for them goes together."""
SENDS = 256
"""Most requests to sendmessage in flight at a base URL. They bound sockets and memory while iLink is slow. With
answers in a quarter of a second they allow a thousand sends a second."""
SENDS_PER_SANDBOX, TRANSFERS_PER_SANDBOX = SENDS // 8, TRANSFERS // 4
"""Share of one sandbox, so that slow answers to its bots do not delay others."""
BODY_BYTES = 64 * 1024 * 1024
"""Bytes of commands' bodies that a replica holds in memory."""
STARTS_PER_S = 3000
"""Most first polls in a second, at a start and after an outage, and whenever these polls end together. A dead
replica's bots must be polled within six seconds, most of which pass before another replica may take them."""
WAKEUP_S = 0.1
"""Longest time between an empty answer and the bot's next poll; polls of that time start together."""


class Replica:
    """All parts of one replica. `app` runs it; tests give it shorter waits and other edges."""

    def __init__(
        self,
        settings: Settings,
        *,
        stale_retry_s: Sequence[float] = STALE_RETRY_S,
        login_polls_s: Sequence[float] = LOGIN_POLLS_S,
        login_refresh_s: float = REFRESH_S,
        unbound_s: int = UNBOUND_S,
        edges: Edges | None = None,
    ) -> None:
        self.settings = settings
        self.instance = socket.gethostname()
        self.names = names = Names(settings.prefix, settings.partitions)
        self.edges = edges = edges or Edges(settings, names, self.instance)
        self.clock, self.metrics, self.leases = clock, metrics, leases = edges.clock, edges.metrics, edges.leases
        self.sealer = sealer = Sealer(settings.token_key)
        metrics.bindings_capacity.set(settings.capacity)

        # what is stored
        self.events = events = Events(edges.bus, names, clock, metrics)
        self.receipts = Receipts(events, edges.history, names, clock, metrics)
        self.bindings = bindings = Bindings(
            edges.bucket(names.bindings), names, sealer.is_same_secret, unbound_s=unbound_s
        )
        self.readers = Readers(edges.readers, clock)
        persons_bucket = edges.bucket(names.persons)
        self.persons = Persons(edges.bus, edges.history, persons_bucket, names, sealer, gone_s=unbound_s)

        # what runs, and how it is
        self.replicas = Replicas(edges.core, names, edges.presence)
        at_least = {names.bindings: lambda: len(bindings) + 1}  # and the layout key
        inspector = Inspector(names, settings, at_least=at_least)
        self.health = Health(edges, names, inspector, settings.nats_inbox_prefix)

        # the bridge
        transfers = FairSlots(TRANSFERS, share=TRANSFERS_PER_SANDBOX)
        self.media = MediaFetcher(
            edges.cdn,
            edges.objects,
            edges.bulk_history,
            names,
            sealer,
            lambda silk: asyncio.to_thread(media_types.silk_to_wav, silk),
            self.may_store,
            transfers,
            clock,
            metrics,
        )
        self.parts = Parts(
            chat=edges.chat,
            read_message=read_message,
            sessions=BotSessions(bindings, edges.chat, sealer, clock, default_base_url=settings.ilink_base_url),
            successes=edges.successes,
            media=self.media,
            uploads=Uploads(edges.cdn, edges.objects, transfers, max_bytes=settings.media_max_bytes),
            bus=edges.bus,
            core=edges.core,
            history=edges.history,
            events=events,
            receipts=self.receipts,
            persons=self.persons,
            bindings=bindings,
            erasure=Erasure(
                edges.bulk_history,  # it reads all streams: commands do not wait for it
                edges.bus,
                self.receipts,
                names,
                bindings,
                {f"KV_{name}": edges.bucket(name) for name in (names.persons, names.logins)},
                clock,
            ),
            names=names,
            sealer=sealer,
            presence=edges.presence,
            policy=SendPolicy(
                window=WindowPolicy(sends=settings.sends_per_window, hours=settings.window_hours),
                gap_ms=settings.send_gap_ms,
                merge_chars=min(settings.merge_chars, settings.part_chars, settings.part_bytes // 4),
            ),
            limits=Limits(
                park_ms=int(settings.park_hours * 3_600_000),
                part_chars=settings.part_chars,
                part_bytes=settings.part_bytes,
            ),
            stale_retry_s=stale_retry_s,
            login_polls_s=login_polls_s,
            max_payload=lambda: edges.connection.max_payload,
            is_writable=self.health.is_writable,
            wait_writable=self.health.wait_writable,
            wait_bindings=partial(self.health.wait_complete, [f"KV_{names.bindings}"]),
            bodies=Bodies(BODY_BYTES),
            slots=defaultdict(lambda: FairSlots(SENDS, share=SENDS_PER_SANDBOX)),
            takeovers=asyncio.Semaphore(MAX_CONCURRENT_TAKEOVERS),
            starts=RateLimiter(STARTS_PER_S),
            wakeups=WakeupBatcher(WAKEUP_S),
            ticks=edges.ticks,
            clock=clock,
            metrics=metrics,
        )
        self.partitions = Partitions(
            self.parts,
            leases,
            capacity=settings.capacity,
            on_failed=self.health.report_failed_loop,
            status=self._status,
        )

        # what is asked
        self.login_records = LoginRecords(edges.bucket(names.logins), events, clock, metrics)
        self.logins = LoginService(
            self.login_records,
            edges.chat,
            bindings,
            leases,
            edges.presence,
            edges.bus,
            self.receipts,
            names,
            sealer,
            clock,
            metrics,
            refresh_s=login_refresh_s,
        )
        # any server may answer: these data change little, and a flood of requests must not delay commands
        bulk = edges.bulk_bucket(names.persons)
        persons = Persons(edges.media_bus, edges.bulk_history, bulk, names, sealer)
        self.bot_health = BotHealth(self.replicas, persons, self.parts.policy.window, clock)
        self.handlers = self._serve()
        edges.connection.on_connect(self._count_connect)

    # what starts with a partition ------------------------------------------------------------------------

    def new_router(self, tenure: Tenure) -> Router:
        return Router(self.parts, tenure)

    # for others ---------------------------------------------------------------------------------------

    def _serve(self) -> dict[str, Handler]:
        """Registers `wechat.svc.*`. Returns the handlers for requests without a sandbox."""
        settings, edges, names, metrics = self.settings, self.edges, self.names, self.metrics
        receipts = Receipts(self.events, edges.bulk_history, names, self.clock, metrics)
        queries = Queries(self.bindings, self.bot_health, receipts, edges.bulk_history, names, metrics)
        store = MediaService(edges.objects, self.media.ensure, metrics, max_bytes=settings.media_max_bytes)
        following = Next(
            self.readers,
            edges.inboxes,
            names,
            self.clock,
            metrics,
            page_bytes=lambda: edges.service_connection.max_payload // 2,
            kept_ms=int(settings.in_max_age_h * 3_600_000),
        )
        handlers: dict[str, Handler] = {
            "bindings.list": queries.list_bindings,
            "bindings.get": queries.get_bindings,
            "receipt": queries.receipt,
            "window": queries.window,
            "replay": queries.replay,
            "login.start": self.logins.start,
            "login.status": self.logins.status,
            "login.verify": self.logins.verify,
            "login.cancel": self.logins.cancel,
        }
        own: dict[str, SandboxHandler] = {
            "media.get": store.get,
            "next": following.answer,
            "receipt": of_sandbox(queries.receipt),
            "replay": of_sandbox(queries.replay),
            "send": SendService(edges.bus, names, self.parts.limits, metrics).store,
            "window": of_sandbox(queries.window),
        }
        serve = partial(
            Services,
            names=names,
            metrics=metrics,
            version=__version__,
            instance=self.instance,
            metadata={"ilink_version": self.settings.ilink_version, "capacity": str(self.settings.capacity)},
        )
        serve(edges.service_connection, handlers=handlers, of_sandbox=own)
        serve(
            edges.upload_connection,
            handlers={},
            of_sandbox={"media.put": store.put},
            service=UPLOADS,
            of_one=MAX_UPLOADS_PER_SANDBOX,
        )
        return handlers

    def console(self) -> contextlib.AbstractContextManager[object]:
        """Serves operators while it is entered, if the settings enable it."""
        settings = self.settings
        if not settings.console_addr:
            return contextlib.nullcontext()
        auth = ConsoleAuth(settings.console_token)
        service = ConsoleService(
            auth,
            self.bindings,
            self.replicas,
            self.bot_health,
            self.edges.bus,
            self.edges.history,
            self.names,
            self.login_records,
            self.handlers,
        )
        return Console(settings.console_addr, auth, service, self.clock)

    def _status(self, bots: Sequence[str]) -> ReplicaStatus:
        pollers, now = self.partitions.pollers, self.clock.monotonic()
        return ReplicaStatus(
            instance=self.instance,
            version=__version__,
            partitions={number: int((now - each.since) * 1000) for number, each in self.leases.owned.items()},
            bots=len(pollers),
            capacity=self.settings.capacity,
            draining=self.health.draining,
            polls={bot: _poller_status(pollers[bot], now) for bot in bots if bot in pollers},
        )

    def may_store(self, sandbox: str, bot: str, user: str) -> bool:
        """Whether a bot, or another one of its user, serves a sandbox: an erasure begins with the end of the binding,
        and media must not follow it."""
        bindings, serves = self.bindings, self.bindings.get(bot)
        is_served = serves is not None and serves.sandbox == sandbox
        return is_served or not bindings.is_loaded or bool(bindings.serving_user(sandbox, user))

    async def _count_connect(self, _: object) -> None:
        if self.edges.connection.epoch:
            self.metrics.nats_reconnects.inc()


def _poller_status(poller: BotPoller, now: float) -> PollerStatus:
    return PollerStatus(
        state=poller.state.value,
        since_ms=int((now - poller.shown.since) * 1000),
        why=poller.shown.why,
        ago_ms=int((now - poller.unanswered_since) * 1000) if poller.unanswered_since else None,
    )
