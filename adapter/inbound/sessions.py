"""A poller's dependencies (`InboundDeps`), and its state as others see it (`Session`)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import structlog

from adapter.bindings.registry import Bindings, account_of
from adapter.contract.names import shard_of
from adapter.contract.records import Binding
from adapter.conversation.conversations import Conversations
from adapter.errors import AdapterError
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.dispatcher import DispatchDeps, Dispatcher
from adapter.inbound.journal import Journal
from adapter.kit.timing import ChangeSignal, Clock, PerTickLimiter, RateLimiter, WakeupBatcher
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import Account, Chat
from adapter.security.seal import Sealer

log = structlog.get_logger()

HERE_S = 0.2
"""A poll that is cut gets so long to bring what has arrived already: after a pause of the whole process it may lie in
the socket, and iLink may count it as delivered."""
LOOK_S = 30.0
"""How long a poller waits for a change; it looks again then all the same. Thousands that looked each second took an
eighth of a core while NATS was away."""
TURN_S = 0.01
"""Until the loop has looked at its sockets again. Not 0, which uvloop takes for "before that"."""

State: TypeAlias = Literal["starting", "polling", "paused", "needs_login", "error", "draining"]


class Pacing(NamedTuple):
    """What keeps thousands of bots from doing the same at once, which would hold up the event loop and the lease."""

    takeovers: asyncio.Semaphore
    """Bounds how many bots are taken at once."""
    turns: PerTickLimiter
    """Spreads what many bots do once they may go on, or have answers."""
    starts: RateLimiter
    """Spreads the first polls. Those that began together end together, and would begin together for ever."""
    wakeups: WakeupBatcher
    """Bots for which nothing has come poll again together."""
    spread_s: Callable[[], float]
    """Over how long polls are spread that could all start again at the same moment."""


class PollerWaits(NamedTuple):
    """How long a poller waits for what."""

    stale_retry_s: Sequence[float]
    """Pauses between the tries of a token that iLink has refused (-14)."""
    keep_s: int
    """How long an unbound bot's journal is kept."""
    grace_s: float
    """How long what is in hand may take to be stored once the service stops."""


class PollGate(Protocol):
    """Whether the bus takes what a poll may bring."""

    async def wait_writable(self) -> None:
        """Returns when it does; no poll starts before."""

    def record_bytes(self) -> int:
        """The most that one journal record may hold."""


class OtherReplicas(Protocol):
    """What a poller asks of the other replicas, and tells them."""

    async def is_idle(self, incarnation: str, bot: str) -> bool:
        """Whether a replica, by incarnation, and all others that live say that they have no poller of a bot; no
        answer is a no. Raises Temporary."""

    async def publish_released(self, bot: str) -> None:
        """Says that a bot was given back, or has a late record; one that misses it finds out by itself. Never
        raises."""


class InboundDeps(NamedTuple):
    """What a poller needs, beside what its dispatcher does."""

    chat: Chat
    sealer: Sealer
    dispatching: DispatchDeps
    pacing: Pacing
    waits: PollerWaits
    gate: PollGate
    others: OtherReplicas
    on_session_changed: Callable[[Binding], None]
    """Called once a bot may send again, or not any more (Session.is_stale, is_catching_up)."""

    @property
    def journal(self) -> Journal:
        return self.dispatching.journal

    @property
    def bindings(self) -> Bindings:
        return self.dispatching.bindings

    @property
    def conversations(self) -> Conversations:
        return self.dispatching.publishing.conversations

    @property
    def leases(self) -> Leases:
        return self.dispatching.publishing.leases

    @property
    def events(self) -> Events:
        return self.dispatching.publishing.access.events

    @property
    def clock(self) -> Clock:
        return self.dispatching.publishing.clock

    @property
    def metrics(self) -> Metrics:
        return self.dispatching.publishing.metrics


class Session:
    """The state of one bot's poller, shared with the supervisor, the sender and the metrics."""

    def __init__(self, bot: str) -> None:
        self.bot = bot
        self.state: State = "starting"
        self.stale = False
        """iLink said -14 and the recovery runs: nothing may be sent."""
        self.is_catching_up = True
        """What an owner before has stored may not be known to the conversations yet."""
        self.journal: BotJournal | None = None
        """Once the bot is taken."""
        self.dispatcher: Dispatcher | None = None
        """Since the first message."""
        self.is_handed_over = False
        """What is stored from now on is the next owner's to dispatch."""
        self.has_undispatched = False
        """Something was stored since: no long poll may keep the next owner waiting."""
        self.answered = 0.0
        """Monotonic time since which iLink owes an answer to a poll: that of the last one, or of what ended a
        pause."""
        self.polled_at = 0.0
        """Monotonic time of the last answer of iLink to a poll."""
        self.announced = False
        """iLink has answered that it knows that the bot is polled."""
        self.leaving = False
        """Ends at the next poll boundary."""
        self.told = ChangeSignal()
        """Notified once it is to leave."""
        self.served: Binding | None = None
        """What was last served: an unbound bot's end is told to iLink with it, unless its token was dead."""
        self.begun_at: str | None = None
        """The start cursor, as the binding has it, that was looked at last."""
        self.lingering = False
        """The shard was handed over while a poll waits: what it brings is stored here, then the bot is given back."""
        self.freed = asyncio.Event()
        """The replica that had the bot says that it has given it back."""
        self.has_late = False
        """Another replica may have stored something for the bot under this one's name (BotJournal.store_late)."""
        self.cut = asyncio.Event()
        """Set by `cut_off`."""
        self.polling: asyncio.Task[Any] | None = None
        """The poller, while its poll waits."""
        self._cutting = False
        self._for_lease = False
        """It is cut since the lease was lost, and for nothing else."""
        self._account: tuple[Binding, Account] | None = None

    def account(self, binding: Binding, sealer: Sealer) -> Account:
        """As account_of, and a token is opened once, not for each poll. Raises Refused("token_key")."""
        if self._account is None or self._account[0] is not binding:
            self._account = binding, account_of(binding, sealer)
        return self._account[1]

    def must_leave(self) -> bool:
        """`leaving`, for a look after an await: a type checker holds the attribute to be what it was before."""
        return self.leaving

    def leave(self, *, now: bool) -> None:
        """Asks the poller to end: at the next boundary, which a pause is, or `now`, cutting a poll that waits."""
        self.leaving = True
        self.told.notify_all()
        if now or self.polling is None:
            self.cut_off()

    def cut_off(self, *, for_lease: bool = False) -> None:
        """Ends a pause that waits, and a poll, which gets a moment (`DELAYED_GRACE_S`)."""
        self._for_lease = for_lease and (self._for_lease or not self.cut.is_set())
        self.cut.set()
        if self.polling is not None:
            loop = asyncio.get_running_loop()
            # behind whatever is due by then: an answer that was read but has not woken the poller would be dropped,
            # and one that came while the loop was held up: uvloop calls its timers before it reads
            end = functools.partial(loop.call_soon, self._end_poll)
            loop.call_later(HERE_S, lambda: loop.call_later(TURN_S, end))

    def spare(self) -> None:
        """The lease is valid again, and was nobody else's: a poll that was to be cut for it alone, and was not yet,
        goes on."""
        if self._for_lease and not self._cutting:
            self.cut.clear()

    def _end_poll(self) -> None:
        """Ends the poll that waits by now, also one that began after the cut: while `cut` is set, it is meant."""
        if self.polling is not None and self.cut.is_set() and not self._cutting:
            self._cutting = True
            self.polling.cancel()

    def was_cut(self) -> bool:
        """Whether the poller was cancelled by `cut_off` alone, for its poll; it goes on then."""
        if not self._cutting or self.polling is None:
            return False
        self._cutting = False
        return self.polling.uncancel() == 0


def check_owned(deps: InboundDeps, binding: Binding) -> None:
    """Raises LeaseLost unless this replica owns the shard of the bot's sandbox."""
    deps.leases.ensure_owned(shard_of(binding.sandbox))


async def notify(session: Session, deps: InboundDeps, *, start: bool, even_stale: bool = False) -> None:
    """Best effort: iLink tracks who is online. Not for a token that is known to be dead."""
    binding = deps.bindings.get(session.bot) or session.served
    if binding is None or not (even_stale or binding.state == "active"):
        return
    try:
        await deps.chat.notify(session.account(binding, deps.sealer), start=start)
        session.announced = start
    except AdapterError as exc:
        log.info("notify.failed", bot=session.bot, start=start, reason=exc.reason)


def rebound(binding: Binding, deps: InboundDeps) -> Callable[[], bool]:
    """Whether the bot's binding is another than `binding` by now."""
    return lambda: deps.bindings.get(binding.bot) != binding


async def wait_until(
    session: Session, condition: ChangeSignal, holds: Callable[[], bool], timeout_s: float | None = None
) -> None:
    """Waits until `holds()`, the session must leave, or `timeout_s` seconds have passed."""
    async with asyncio.timeout(timeout_s):
        while not (session.must_leave() or holds()):
            await condition.wait_until(lambda: session.must_leave() or holds(), LOOK_S, also=session.told)
