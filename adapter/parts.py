"""The composition root: builds the loops of a replica on its connections. Nothing below knows both."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from functools import partial

import structlog

from adapter import __version__, media, window
from adapter.bindings import stale_token
from adapter.bindings.control import Control
from adapter.bindings.registry import Bindings, account_of
from adapter.bindings.tidying import Tidying
from adapter.connections import Connections
from adapter.console.desk import Needs
from adapter.console.server import Console
from adapter.contexts import Contexts
from adapter.errors import LeaseLost, Temporary
from adapter.events import Events
from adapter.ilink.translate import read_message
from adapter.inbound import poller
from adapter.inbound.cursors import raw_bots
from adapter.inbound.download import Downloading
from adapter.inbound.fetching import Fetching
from adapter.inbound.recall import Recall
from adapter.inbound.sessions import Incoming, Waiting
from adapter.jetstream import topology
from adapter.jetstream.buckets import KvBucket, LeaderKvBucket
from adapter.jetstream.consumer import all_settled
from adapter.jetstream.inspector import Inspector
from adapter.jetstream.microservice import Handler, Services
from adapter.logins.flow import LoginNeeds
from adapter.logins.registry import LoginRegistry
from adapter.logins.runner import LoginRunner
from adapter.metrics import Metrics
from adapter.names import Names, shard_of
from adapter.outbound.commands import Limits
from adapter.outbound.former_bots import FormerBots
from adapter.outbound.receipts import Receipts
from adapter.outbound.router import Router
from adapter.outbound.sending import Sending
from adapter.outbound.settling import Outgoing
from adapter.outbound.text_worker import TextWorker
from adapter.outbound.typing_indicator import Showing
from adapter.outbound.uploads import Uploads
from adapter.outbound.window_events import WindowEvents
from adapter.probes import Health
from adapter.records import Binding
from adapter.replicas import rollcall
from adapter.replicas.leases import Leases
from adapter.replicas.rollcall import Polling, Present
from adapter.seal import Sealer
from adapter.services.logins import LoginService
from adapter.services.media import MediaService
from adapter.services.queries import Queries
from adapter.settings import Settings
from adapter.shardwork import ShardLoops
from adapter.supervisor import Supervisor
from adapter.tasks import Tasks
from adapter.timing import Beat, Pace, SystemClock, Turns
from adapter.watch import Watch

log = structlog.get_logger()

RELEASE_S = 5.0
"""The part of the drain time that is kept for giving the shards back."""
TAKING = 32
"""Bots that are taken over at the same time."""
LOADING = 8
"""Shards that read at once what is parked. With 500 commands parked in each of 128, a tenth of a core took more than
the five seconds that an answer may take for a page of each, and they all began anew, for minutes."""
PER_ROUND = 64
"""What goes on in one round of the event loop: answers that bring something, commands as they come and at each step
of a lane, polls after a pause or a failure. Where five thousand answers came at once to a process with a quarter of a
core, a round took longer than the lease, which was lost again and again."""
STARTS_PER_S = 3000
"""First polls per second, at most: what iLink sees of a start, and again whenever these polls end together. A dead
replica's bots must be polled within six seconds, most of which pass before another replica may take them."""
POLLS_PER_S = 1000
"""About how many polls start per second after an outage."""
BEAT_S = 0.1
"""Longest time between an empty answer and the bot's next poll: the polls of that time go out together."""


class Parts:
    """All of one replica, put together. `app` runs it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.instance = settings.instance or socket.gethostname()
        self.names = names = Names(settings.prefix)
        self.clock = clock = SystemClock()
        self.metrics = metrics = Metrics()
        self.health = Health()
        self.grace_s = max(1.0, settings.drain_s - RELEASE_S)
        self.turns = Turns(PER_ROUND)
        self.routing = Tasks(_crashed)
        """Commands on plain `wechat.out` in hand; what is cut at the end comes to the next owner."""
        self.connections = connections = Connections(settings, names, self.instance, clock, metrics)
        self.inspector = Inspector(
            names,
            settings,
            metrics,
            at_least={names.bindings: lambda: len(self.bindings), names.cursors: lambda: self.supervisor.cursor_keys},
        )
        self.rules = _rules(settings)
        self.limits = _limits(settings)
        self.sealer = Sealer(settings.token_key)
        self.texts = TextWorker()
        self.uploads = Uploads(connections.cdn, connections.objects, clock, max_bytes=settings.media_max_bytes)
        self.binding_bucket = connections.bucket(names.bindings)
        self.bindings = Bindings(self.binding_bucket, self._owns, self.sealer.same)
        self.context_bucket = connections.bucket(names.context)
        self.leases = Leases(
            LeaderKvBucket(connections.lease_link, names.members, ttl_s=max(60, int(settings.lease_s * 15))),
            LeaderKvBucket(connections.lease_link, names.claims),
            clock,
            metrics,
            instance=self.instance,
            lease_s=settings.lease_s,
        )
        self.contexts = Contexts(self.context_bucket, self._fence)
        self.events = Events(connections.bus, names, clock, metrics)
        self.window_events = self._window_events()
        self.receipts = Receipts(self.events, connections.history, names, clock, metrics)
        self.former_bots = FormerBots(connections.history, names, clock)
        self.router = Router(
            connections.bus, self.receipts, names, self.limits, lambda: self.leases.check(0), clock, metrics
        )
        self.control = self._control()
        # any server may answer: a quote may be missing
        quotes = KvBucket(connections.link, connections.bus, names.quotes)
        self.recall = Recall(quotes, connections.history, names, metrics)
        self.incoming = self._incoming()
        downloading = Downloading(
            connections.cdn, connections.objects, lambda silk: asyncio.to_thread(media.silk_to_wav, silk), clock
        )
        self.fetching = Fetching(self.incoming, downloading, settings.media_wait_s)
        self.outgoing = self._outgoing()
        self.supervisor = Supervisor(
            bindings=self.bindings,
            leases=self.leases,
            tend=lambda session: poller.tend(session, self.incoming),
            work=self._shard_loops(),
            throttled=self.window_events.throttled,
            forget=self.contexts.forget,
            tell_freed=self.tell_freed,
            clock=clock,
            metrics=metrics,
            capacity=settings.capacity,
        )
        self.watch = self._watch()
        self.logins = LoginRegistry(connections.bucket(names.logins), self.sealer, clock, metrics)
        self.login_runner = LoginRunner(self._login_needs())
        self.handlers = self._serve()
        metrics.bindings_capacity.set(settings.capacity)
        connections.link.on_up(self._count_connect)
        connections.core.respond(self.names.roll(), lambda data: rollcall.answer(data, self._present))
        connections.core.subscribe(
            self.names.freed(), lambda data: self.supervisor.released(data.decode("utf-8", "replace"))
        )

    def _owns(self, binding: Binding) -> bool:
        return self.leases.valid and shard_of(binding.sandbox) in self.leases.owned

    async def _count_connect(self, _: object) -> None:
        if self.connections.link.epoch:
            self.metrics.nats_reconnects.inc()

    async def tell_freed(self, bot: str = "") -> None:
        """Tells every replica, at most once."""
        try:
            await self.connections.core.publish(self.names.freed(), bot.encode(), {})
        except Temporary as exc:
            log.info("bot.freed_untold", bot=bot, reason=exc.reason)

    async def _is_idle(self, incarnation: str, bot: str) -> bool:
        """Raises Temporary."""
        there = await rollcall.roll(self.connections.core, self.names.roll(), [bot], self.leases.living)
        return rollcall.is_idle(there, incarnation, bot, self.leases.others)

    # what has many parts ----------------------------------------------------------------------------

    def _incoming(self) -> Incoming:
        settings = self.settings

        async def writable() -> None:
            await self.connections.link.wait_up()
            await self.connections.bus.writable()
            await self.watch.complete()

        return Incoming(
            chat=self.connections.chat,
            read_message=read_message,
            bus=self.connections.bus,
            history=self.connections.history,
            cursors=self.connections.bucket(self.names.cursors),
            contexts=self.contexts,
            bindings=self.bindings,
            leases=self.leases,
            events=self.events,
            sealer=self.sealer,
            clock=self.clock,
            metrics=self.metrics,
            names=self.names,
            rules=self.rules,
            recall=self.recall,
            look=self.window_events.look,
            adopt=self.window_events.adopt,
            heard=lambda sandbox, bot, user: self.supervisor.heard(sandbox, bot, user, wrote=True),
            revived=lambda sandbox, bot, user: self.supervisor.heard(sandbox, bot, user, wrote=False),
            waiting=self._waiting,
            raw_bots=raw_bots(self.connections.history, self.names),
            writable=writable,
            purges=lambda: self.inspector.purges(self.names.cursors),
            taking=asyncio.Semaphore(TAKING),
            turns=self.turns,
            starts=Pace(STARTS_PER_S),
            beat=Beat(BEAT_S),
            spread_s=lambda: len(self.supervisor.sessions) / POLLS_PER_S,
            stale_retry_s=settings.stale_retry_s,
            skew_ms=settings.duplicate_skew_ms,
            groups_as_direct=settings.groups_as_direct,
            notify=settings.notify,
            is_idle=self._is_idle,
            tell_freed=self.tell_freed,
            grace_s=self.grace_s,
        )

    def _outgoing(self) -> Outgoing:
        settings, account = self.settings, partial(account_of, sealer=self.sealer)

        async def stale_on_send(binding: Binding, detail: str) -> None:
            if lost := await stale_token.lose_login(self.bindings, self.clock, binding):
                await stale_token.tell_login(self.bindings, self.events, lost, detail)

        async def alive_on_send(binding: Binding) -> None:
            if alive := await stale_token.regain_login(self.bindings, self.clock, binding):
                await stale_token.tell_login(self.bindings, self.events, alive)

        return Outgoing(
            sending=Sending(
                chat=self.connections.chat,
                contexts=self.contexts,
                clock=self.clock,
                metrics=self.metrics,
                rules=self.rules,
                slots=asyncio.Semaphore(settings.max_sends),
                attempts=settings.send_attempts,
                empty_is_success=settings.empty_send_is_success,
                answer_s=settings.send_timeout_s,
                continue_text=settings.continue_text,
                text_chars=settings.text_max_chars,
                look=self.window_events.look,
                note=self.recall.note,
            ),
            uploads=self.uploads,
            texts=self.texts,
            claims=self.connections.bucket(self.names.claims),
            bus=self.connections.bus,
            history=self.connections.history,
            bindings=self.bindings,
            former=self.former_bots,
            leases=self.leases,
            receipts=self.receipts,
            names=self.names,
            limits=self.limits,
            account=account,
            stale=self._is_stale,
            stale_on_send=stale_on_send,
            alive_on_send=alive_on_send,
            bound_yet=self._bound_yet,
            gap_s=settings.send_gap_ms / 1000,
            parked_per_user=settings.parked_per_user,
            parked_per_sandbox=settings.parked_per_sandbox,
            merge_chars=settings.merge_chars,
            stale_retry_s=settings.stale_retry_s,
            grace_s=self.grace_s,
            turns=self.turns,
            loading=asyncio.Semaphore(LOADING),
            showing=Showing(
                chat=self.connections.chat,
                contexts=self.contexts,
                bindings=self.bindings,
                bucket=self.connections.bucket(self.names.typing),
                clock=self.clock,
                account=account,
                stale=self._is_stale,
                check=self.leases.check,
                longest_s=settings.typing_max_s,
            ),
        )

    def _window_events(self) -> WindowEvents:
        return WindowEvents(
            contexts=self.contexts,
            bindings=self.bindings,
            leases=self.leases,
            events=self.events,
            history=self.connections.history,
            names=self.names,
            clock=self.clock,
            rules=self.rules,
        )

    def _control(self) -> Control:
        return Control(
            bindings=self.bindings,
            events=self.events,
            chat=self.connections.chat,
            sealer=self.sealer,
            core=self.connections.core,
            history=self.connections.history,
            names=self.names,
            check=lambda: self.leases.check(0),
            clock=self.clock,
            metrics=self.metrics,
        )

    def _watch(self) -> Watch:
        return Watch(
            link=self.connections.link,
            bus=self.connections.bus,
            media_bus=self.connections.media_bus,
            inspector=self.inspector,
            bindings=self.binding_bucket,
            leases=self.leases,
            supervisor=self.supervisor,
            tidy=self._tidy,
            names=self.names,
            health=self.health,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _shard_loops(self) -> ShardLoops:
        return ShardLoops(
            link=self.connections.link,
            outgoing=self.outgoing,
            fetching=self.fetching,
            router=self.router,
            control=self.control,
            tidying=self._tidying,
            spawn=self.routing.spawn,
            leases=self.leases,
            names=self.names,
            health=self.health,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _serve(self) -> dict[str, Handler]:
        """Answers `wechat.svc.*`; the handlers of what is asked of no single sandbox."""
        settings, connections, names, metrics = self.settings, self.connections, self.names, self.metrics
        login = LoginService(
            connections.chat, self.logins, self.bindings, self.sealer, metrics, login_s=settings.login_s
        )
        queries = Queries(
            self.bindings, self.context_bucket, connections.history, names, self.rules, self.clock, metrics
        )
        store = MediaService(connections.objects, metrics, max_bytes=settings.media_max_bytes)
        handlers: dict[str, Handler] = {
            "bindings.list": queries.bindings_list,
            "bindings.get": queries.bindings_get,
            "window": queries.window,
            "replay": queries.replay,
            "login.start": login.start,
            "login.status": login.status,
            "login.verify": login.verify,
            "login.cancel": login.cancel,
        }
        of_sandbox = {
            "media.get": store.get,
            "media.put": store.put,
            "replay": queries.replay_of,
            "window": queries.window_of,
        }
        Services(
            connections.link, names, handlers, version=__version__, instance=self.instance, of_sandbox=of_sandbox
        )
        return handlers

    def _login_needs(self) -> LoginNeeds:
        return LoginNeeds(
            logins=self.connections.chat,
            registry=self.logins,
            bindings=self.bindings,
            leases=self.leases,
            bus=self.connections.bus,
            history=self.connections.history,
            events=self.events,
            sealer=self.sealer,
            clock=self.clock,
            metrics=self.metrics,
            names=self.names,
            refresh_s=self.settings.login_refresh_s,
            codes=self.settings.login_codes,
        )

    def _tidying(self, shard: int) -> Tidying:
        return Tidying(
            bindings=self.bindings,
            bound=self.binding_bucket,
            known=(self.connections.bucket(self.names.cursors), self.context_bucket),
            check=lambda: self.leases.check(shard),
            clock=self.clock,
            keep_s=self.settings.unbound_hours * 3600,
        )

    def _is_stale(self, bot: str) -> bool:
        return self.supervisor.stale(bot)

    async def _waiting(self, sandbox: str) -> Waiting | None:
        return await self.supervisor.waiting(sandbox)

    def _tidy(self) -> None:
        self.supervisor.tidy()
        self.contexts.tidy(self.supervisor.is_served)
        self.receipts.tidy()
        self.former_bots.tidy()

    def _fence(self, bot: str) -> None:
        binding = self.bindings.get(bot)
        if binding is None:
            raise LeaseLost("not_bound", bot)
        if not (self.supervisor.lingers(bot) and self.leases.valid):
            self.leases.check(shard_of(binding.sandbox))

    async def _bound_yet(self) -> None:
        """Returns once the control commands stored so far have taken effect. Raises Temporary: it takes too long."""
        await all_settled(self.connections.link, self.names.stream_ctl, topology.CONTROL, self.clock)
        await self.clock.sleep(0.05)  # the news of the last one are on their way

    # for people -------------------------------------------------------------------------------------

    def console(self) -> contextlib.AbstractContextManager[object]:
        """Serves operators while entered; nothing where the settings do not ask for it."""
        settings = self.settings
        if not settings.console_addr:
            return contextlib.nullcontext()
        needs = Needs(
            bindings=self.bindings,
            contexts=self.context_bucket,
            history=self.connections.history,
            bus=self.connections.bus,
            replicas=self.connections.core,
            registry=self.logins,
            services=self.handlers,
            names=self.names,
            rules=self.rules,
            clock=self.clock,
            living=lambda: self.leases.living,
        )
        return Console(settings.console_addr, settings.console_token, needs)

    def _present(self, bots: Sequence[str]) -> Present:
        polls = {
            bot: Polling(state=state, ago_ms=None if ago_s is None else int(ago_s * 1000))
            for bot, (state, ago_s) in self.supervisor.polls(bots).items()
        }
        return Present(
            instance=self.instance,
            incarnation=self.leases.incarnation,
            version=__version__,
            shards=len(self.leases.owned),
            bots=len(self.supervisor.sessions),
            draining=self.health.draining,
            polls=polls,
        )


def _crashed(exc: BaseException) -> None:
    log.error("task.crashed", task="routing", exc_info=exc)


def _rules(settings: Settings) -> window.Rules:
    return window.Rules(
        sends=settings.sends_per_window,
        hours=settings.window_hours,
        cooldown_s=settings.cooldown_s,
        reserve=settings.reserve_sends,
        low=settings.window_low,
        tokenless=settings.send_without_token,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.max_command_bytes,
        settings.text_max_chars,
        settings.max_parts,
        int(settings.park_hours * 3_600_000),
        int(settings.typing_max_s * 1000),
    )
