"""A poller's dependencies (`InboundDeps`), and the state that it shares with others (`BotPoller`)."""

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
from adapter.inbound.dispatch_state import DispatchDeps
from adapter.inbound.dispatcher import Dispatcher
from adapter.inbound.journal import Journal
from adapter.kit.timing import ChangeSignal, Clock, Flag, PerTickLimiter, RateLimiter, WakeupBatcher
from adapter.observability.events import Events
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import Account, Chat
from adapter.security.seal import Sealer

log = structlog.get_logger()

ANSWER_GRACE_S = 0.2
"""Time for a poll that is cut to bring an answer that has arrived. After a pause of the process the answer may lie in
the socket, and iLink may count it as delivered."""
CHECK_S = 30.0
"""Longest wait for a change notification; then the condition is checked again. A second instead took an eighth of a
core for thousands of bots while NATS was down."""
NOTIFY_S = 1.5
"""Longest wait for iLink's answer to a notification, which is best effort (docs/reference/ilink-protocol.md, "Online
state")."""
TURN_S = 0.01
"""Time for the loop to read its sockets. uvloop runs a timer of 0 before that."""

State: TypeAlias = Literal["starting", "polling", "paused", "needs_login", "error", "draining"]


class Pacing(NamedTuple):
    """Spreads the work of thousands of bots, which would otherwise delay the event loop and the lease."""

    takeovers: asyncio.Semaphore
    """Bounds how many bots are taken at once."""
    turns: PerTickLimiter
    """Spreads the next steps of many bots that get answers or may continue at the same time."""
    starts: RateLimiter
    """Spreads the first polls. Polls that begin together end together, and would begin together for ever."""
    wakeups: WakeupBatcher
    """Groups the next polls of bots that got no message."""
    spread_s: Callable[[], float]
    """Time over which polls that could all start at the same moment are spread."""


class PollerWaits(NamedTuple):
    """Times that a poller waits."""

    stale_retry_s: Sequence[float]
    """Pauses between retries of a token that iLink has refused (-14)."""
    login_polls_s: Sequence[float]
    """When a binding that needs a login is polled all the same (`poller.LOGIN_POLLS_S`)."""
    keep_s: int
    """Seconds for which the journal of an unbound bot is kept."""


class PollGate(Protocol):
    """Whether the bus accepts what a poll may bring."""

    async def wait_writable(self) -> None:
        """Returns when the bus accepts writes; no poll starts before."""

    def record_bytes(self) -> int:
        """Largest journal record."""


class OtherReplicas(Protocol):
    """A poller's calls to the other replicas."""

    async def is_idle(self, incarnation: str, bot: str) -> bool:
        """Whether the replica with this incarnation and all other living ones report that they have no poller for the
        bot. A missing answer counts as no. Raises Temporary."""

    async def publish_released(self, bot: str) -> None:
        """Announces that a bot was released or has a late record. A replica that misses it finds out later. Never
        raises."""


class InboundDeps(NamedTuple):
    """Dependencies of a poller, beside those of its dispatcher."""

    chat: Chat
    sealer: Sealer
    dispatching: DispatchDeps
    pacing: Pacing
    waits: PollerWaits
    gate: PollGate
    others: OtherReplicas
    on_session_changed: Callable[[Binding], None]
    """Called when a bot may or may no longer send (BotPoller.is_stale, is_catching_up)."""

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


class BotPoller:
    """The state of one bot's poller, shared with supervisor, sender and metrics."""

    def __init__(self, bot: str) -> None:
        self.bot = bot
        self.state: State = "starting"
        self.stale = False
        """iLink answered -14 and the recovery runs; nothing may be sent."""
        self.is_catching_up = True
        """The conversations may not know yet what the previous owner stored."""
        self.journal: BotJournal | None = None
        """Set once the bot is taken."""
        self.dispatcher: Dispatcher | None = None
        """Set with the first message."""
        self.is_handed_over = False
        """The shard was handed over; records stored from now on are dispatched by the next owner."""
        self.has_undispatched = False
        """A record was stored since; no long poll may keep the next owner waiting."""
        self.unanswered_since = 0.0
        """Monotonic time since which iLink owes an answer to a poll: the time of the last answer, or of the end of a
        pause."""
        self.polled_at = 0.0
        """Monotonic time of iLink's last answer to a poll."""
        self.problem = ""
        """Why the last poll failed; "": it did not."""
        self.is_announced = False
        """iLink has confirmed that the bot is polled."""
        self.has_answer = False
        """An answer of iLink is not stored yet."""
        self.stopping = False
        """The poller ends at the next poll boundary."""
        self.stop_requested = ChangeSignal()
        """Notified when the poller has to stop."""
        self.last_binding: Binding | None = None
        """The last binding. The end of an unbound bot is announced to iLink with it, unless its token was dead."""
        self.applied_start_cursor: str | None = None
        """The start cursor of the binding that was applied last."""
        self.draining_after_handover = False
        """The shard was handed over while a poll waits. Its answer is stored, then the bot is released."""
        self.bot_released = Flag()
        """Set when the replica that had the bot reports its release."""
        self.may_have_late_record = False
        """Another replica may have stored a record under this replica's name (BotJournal.store_late)."""
        self.poll_cancel = Flag()
        """Set by `cancel_poll`."""
        self.poll_task: asyncio.Task[Any] | None = None
        """The poller's task while its poll waits."""
        self._is_cancelling_poll = False
        self._is_cancelled_for_lease = False
        """The lost lease is the only reason for the cancellation."""
        self._account: tuple[Binding, Account] | None = None

    def account(self, binding: Binding, sealer: Sealer) -> Account:
        """`account_of`, which opens a token once instead of for each poll. Raises Refused("token_key")."""
        if self._account is None or self._account[0] is not binding:
            self._account = binding, account_of(binding, sealer)
        return self._account[1]

    def must_stop(self) -> bool:
        """`stopping`, read after an await, where a type checker would assume the earlier value."""
        return self.stopping

    def stop(self, *, immediately: bool) -> None:
        """Asks the poller to end at the next boundary or pause; with `immediately` also cancels a poll that waits."""
        self.stopping = True
        self.stop_requested.notify_all()
        if immediately or self.poll_task is None:
            self.cancel_poll()

    def cancel_poll(self, *, for_lease: bool = False) -> None:
        """Ends a pause at once, and a poll after ANSWER_GRACE_S."""
        self._is_cancelled_for_lease = for_lease and (self._is_cancelled_for_lease or not self.poll_cancel.is_set())
        self.poll_cancel.set()
        if self.poll_task is not None:
            loop = asyncio.get_running_loop()
            # After everything that is due by then. Otherwise an answer would be dropped that was read but has not
            # woken the poller, or that arrived while the loop was busy: uvloop runs timers before it reads sockets.
            end = functools.partial(loop.call_soon, self._end_poll)
            loop.call_later(ANSWER_GRACE_S, lambda: loop.call_later(TURN_S, end))

    def withdraw_cancel(self) -> None:
        """Withdraws a cancellation for the lease, which is valid again and never belonged to another replica."""
        if self._is_cancelled_for_lease and not self._is_cancelling_poll:
            self.poll_cancel.clear()

    def _end_poll(self) -> None:
        """Ends the waiting poll, even one that began after `cancel_poll`, since `poll_cancel` is still set."""
        if self.poll_task is not None and self.poll_cancel.is_set() and not self._is_cancelling_poll:
            self._is_cancelling_poll = True
            self.poll_task.cancel()

    def was_poll_cancelled(self) -> bool:
        """Whether only `cancel_poll` cancelled the poller, which then continues."""
        if not self._is_cancelling_poll or self.poll_task is None:
            return False
        self._is_cancelling_poll = False
        return self.poll_task.uncancel() == 0


def check_owned(deps: InboundDeps, binding: Binding) -> None:
    """Raises LeaseLost unless this replica owns the shard of the bot's sandbox."""
    deps.leases.ensure_owned(shard_of(binding.sandbox))


async def notify(poller: BotPoller, deps: InboundDeps, *, start: bool, even_stale: bool = False) -> None:
    """Tells iLink that polling starts or stops. Best effort, and not for a token that is known to be dead."""
    binding = deps.bindings.get(poller.bot) or poller.last_binding
    if binding is None or not (even_stale or binding.state == "active"):
        return
    try:
        async with asyncio.timeout(NOTIFY_S):
            await deps.chat.notify(poller.account(binding, deps.sealer), start=start)
        poller.is_announced = start
    except (AdapterError, TimeoutError) as exc:
        reason = exc.reason if isinstance(exc, AdapterError) else "timeout"
        log.info("notify.failed", bot=poller.bot, start=start, reason=reason)


def rebound(binding: Binding, deps: InboundDeps) -> Callable[[], bool]:
    """A condition: the bot's binding differs from `binding`."""
    return lambda: deps.bindings.get(binding.bot) != binding


async def wait_until(
    poller: BotPoller, condition: ChangeSignal, holds: Callable[[], bool], timeout_s: float | None = None
) -> None:
    """Waits until `holds()`, the poller must stop, or `timeout_s` seconds have passed."""
    async with asyncio.timeout(timeout_s):
        while not (poller.must_stop() or holds()):
            await condition.wait_until(lambda: poller.must_stop() or holds(), CHECK_S, also=poller.stop_requested)
