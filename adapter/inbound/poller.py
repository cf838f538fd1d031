"""Polls iLink for one bot. Knows neither HTTP nor NATS.

    take → fold → poll → receive → poll → … → release

A poller takes its bot by writing its replica's name into the bot's checkpoint, once no other replica polls it. It
reads what the inbox has behind the checkpoint, then polls. An answer is stored before the next poll, which lets iLink
forget it. A poll that waits is cut only for a reason that cannot wait, since iLink may count an answer as delivered
that nobody reads.

The supervisor runs one `BotPoller` for each bot of the replica's shards, and ends it by `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import structlog

from adapter.bindings.registry import account_of, mark_login, publish_login_event
from adapter.contract.names import shard_of
from adapter.contract.records import Binding
from adapter.errors import AdapterError, BusRefused, LeaseLost, SessionExpired, Temporary
from adapter.inbound.checkpoint import SAVE_AFTER_S, Checkpoint
from adapter.inbound.receive import ReceiveDeps, Receiver, retry
from adapter.kit.timing import (
    ChangeSignal,
    Flag,
    RateLimiter,
    WakeupBatcher,
    backoff,
    shield_with_grace,
    wait_any,
    wait_event,
)
from adapter.ports import Account, Chat, Polled

log = structlog.get_logger()


class State(enum.Enum):
    """What a poller does, as `bindings`, `doctor` and the console show it."""

    WAITING = "waiting"
    """Another replica may still poll the bot."""
    TAKING = "taking"
    """The bot is taken, and the inbox is read behind its checkpoint."""
    POLLING = "polling"
    """A long poll is out."""
    STORING = "storing"
    """An answer with messages is being stored; no poll starts."""
    PAUSED = "paused"
    """No poll starts, since NATS accepts no writes or the lease is not valid."""
    RETRYING = "retrying"
    """The last poll or step failed; the next one waits or is out."""
    STALE = "stale"
    """iLink has refused the bot's token (-14), which is tried a few times more; nothing is sent."""
    NEEDS_LOGIN = "needs_login"
    """iLink refuses the token; polls are rare, and a login is needed."""
    RELEASING = "releasing"
    """The bot is given back, to another replica or because it serves nobody."""
    ENDED = "ended"
    """The poller is over."""


S = State
TRANSITIONS: dict[State, set[State]] = {
    S.WAITING: {S.TAKING, S.RETRYING, S.ENDED},
    S.TAKING: {S.POLLING, S.PAUSED, S.RETRYING, S.NEEDS_LOGIN, S.RELEASING},
    S.POLLING: {S.STORING, S.PAUSED, S.RETRYING, S.STALE, S.NEEDS_LOGIN, S.RELEASING},
    S.STORING: {S.POLLING, S.RETRYING, S.RELEASING},
    S.PAUSED: {S.POLLING, S.RETRYING, S.NEEDS_LOGIN, S.RELEASING},
    S.RETRYING: {S.WAITING, S.POLLING, S.STORING, S.PAUSED, S.STALE, S.NEEDS_LOGIN, S.RELEASING, S.ENDED},
    S.STALE: {S.POLLING, S.STORING, S.PAUSED, S.RETRYING, S.RELEASING},
    S.NEEDS_LOGIN: {S.POLLING, S.STORING, S.PAUSED, S.RETRYING, S.STALE, S.RELEASING},
    S.RELEASING: {S.ENDED},
    S.ENDED: set(),
}
"""The states that may follow each state, besides itself."""

LONGEST_HOLD_MS = 60_000
"""Longest hold that is assumed after client timeouts. A poll that timed out gets twice the time, whatever the server
hints: a poll that is cut again and again may lose the answer that is just being written
(docs/reference/ilink-protocol.md, "Rules for a client")."""
ON_TIME_MS = 5_000
"""An idle poll answered at most this long after the hinted hold confirms the hint."""
HOLD_MS = 35_000
"""Assumed hold of a poll until the server gives a hint. The client waits a margin longer."""
INSTANT_S = 0.5
"""An answer without news within this time was no long poll. The poller then slows down."""
STALE_RETRY_S = (5.0, 30.0)
"""Pauses between retries of a token that iLink has refused. They are few, since users wait for the word that a login
is needed, and most such tokens stay dead."""
LOGIN_POLLS_S = (300.0, 3600.0, 86_400.0)
"""A binding that needs a login is polled so long after the verdict, then at this interval, and after
LOGIN_POLLED_OFTEN_S at that one. A verdict may be wrong: iLink answers -14 for causes that pass."""
LOGIN_POLLED_OFTEN_S = 3 * 86_400.0
AFTER_CANCEL_S = 0.2
"""Pause between a poll that was cut and the bot's next poll."""
RELEASE_GRACE_S = 1.0
"""Time of a poller that was cancelled to release its bot."""
UNSAVED_S = 600.0
"""A checkpoint that could not be written for so long stops the polls."""
DEAD_PATH_AFTER = 3
"""Consecutive client timeouts without any answer after which the connection counts as dead
(docs/reference/ilink-protocol.md, "getupdates")."""
QUERY_EVERY = 12
"""Attempts to take a bot after which all replicas are asked for its poller. They last some 30 s, in which most polls
of bots that are handed over end, so that few of thousands ask."""
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


class Pacing(NamedTuple):
    """Spreads the work of thousands of bots, which would otherwise delay the event loop and the lease."""

    takeovers: asyncio.Semaphore
    """Bounds how many bots are taken at once."""
    starts: RateLimiter
    """Spreads the first polls, and those after an outage. Polls that begin together end together, and would begin
    together for ever."""
    wakeups: WakeupBatcher
    """Groups the next polls of bots that got no message."""
    stale_retry_s: Sequence[float]
    """Pauses between retries of a token that iLink has refused (-14)."""
    login_polls_s: Sequence[float]
    """When a binding that needs a login is polled all the same (LOGIN_POLLS_S)."""
    keep_s: int
    """Seconds for which the checkpoint of an unbound bot is kept."""


class PollGate(Protocol):
    """Whether the bus accepts what a poll may bring."""

    def is_open(self) -> bool:
        """Whether `wait_writable` would return at once."""

    async def wait_writable(self) -> None:
        """Returns when the bus accepts writes; no poll starts before."""


class OtherReplicas(Protocol):
    """A poller's calls to the other replicas."""

    async def is_idle(self, incarnation: str, bot: str) -> bool:
        """Whether the replica with this incarnation and all other living ones report that they have no poller for the
        bot. A missing answer counts as no. Raises Temporary."""

    async def publish_released(self, bot: str) -> None:
        """Announces that a bot was released or has a late message. A replica that misses it finds out later. Never
        raises."""


class PollDeps(NamedTuple):
    """Dependencies of a poller."""

    chat: Chat
    receiving: ReceiveDeps
    pacing: Pacing
    gate: PollGate
    others: OtherReplicas
    on_session_changed: Callable[[Binding], None]
    """Called when a bot may or may no longer send, as its token is refused or taken again."""


class _Polls:
    """What the last polls tell about the next one."""

    __slots__ = ("failures", "hold_ms", "instants", "least_hold_ms", "overlong", "timeouts", "unannounced")

    def __init__(self) -> None:
        self.failures = 0
        self.timeouts = 0
        """Consecutive polls without any answer."""
        self.hold_ms = HOLD_MS
        """The server's hint."""
        self.least_hold_ms = 0
        """Longest hold of the server that client timeouts suggest; 0: the server's hint is right."""
        self.unannounced = 0
        """Answered polls since notifystart was tried in vain."""
        self.instants = 0
        """Consecutive polls answered at once without news."""
        self.overlong = 0
        """Length of the last answered cursor, if it was too long to keep; else 0."""


class BotPoller:
    """Polls one bot, from when its shard is taken until it is released."""

    def __init__(self, bot: str, deps: PollDeps) -> None:
        self.bot = bot
        self._deps = deps
        self._clock = deps.receiving.clock
        self._bindings = deps.receiving.bindings
        self._leases = deps.receiving.leases
        self.state = State.WAITING
        self.since = self._clock.monotonic()
        """Monotonic time since which it is in this state."""
        self.why = ""
        """Why it is in this state, if that is not the usual one."""
        self.checkpoint: Checkpoint | None = None
        """Set once the bot is taken."""
        self._is_folded = self._is_folding = False
        """The conversations and the checkpoint know what the inbox has behind the stored checkpoint."""
        self._folded_to: int | None = None
        """Sequence of the inbox up to which it was read, not published, here; None: it was not read."""
        self._receiver = Receiver(bot, deps.receiving)
        self.unanswered_since = 0.0
        """Monotonic time since which iLink owes an answer to a poll: the time of the last answer, or of the end of a
        pause."""
        self.polled_at = 0.0
        """Monotonic time of iLink's last answer to a poll."""
        self.stopping = False
        """The poller ends at the next poll boundary."""
        self._stop_requested = ChangeSignal()
        self.last_binding: Binding | None = None
        """The binding of the last poll. The end of an unbound bot is announced to iLink with it, unless its token was
        dead."""
        self.is_handed_over = False
        """The shard was handed over; the bot is released after the poll that waits."""
        self._released = Flag()
        """Set when the replica that had the bot reports its release, or a late message."""
        self._is_announced = False
        """iLink has confirmed that the bot is polled."""
        self._saving: asyncio.Task[None] | None = None
        self._folding: asyncio.Task[None] | None = None
        self._cut = Flag()
        """Set by `cancel_poll`."""
        self._poll_task: asyncio.Task[Any] | None = None
        """The poller's task while its poll waits."""
        self._is_cutting = False
        self._is_cut_for_lease = False
        """The lost lease is the only reason for the cut."""
        self._account: tuple[Binding, Account] | None = None

    # for others -------------------------------------------------------------------------------------

    @property
    def is_stale(self) -> bool:
        """Nothing may be sent: the token was refused and is tried again."""
        return self.state is State.STALE

    @property
    def is_taken(self) -> bool:
        """No other replica publishes messages of the bot, and those of former owners are known."""
        return self.checkpoint is not None and self._is_folded and not self._is_folding

    @property
    def has_answer(self) -> bool:
        """An answer of iLink is not stored yet."""
        return self.state is State.STORING

    def stop(self, *, immediately: bool) -> None:
        """Asks the poller to end at the next boundary or pause; with `immediately` also cuts a poll that waits."""
        self.stopping = True
        self._stop_requested.notify_all()
        if immediately or self._poll_task is None:
            self.cancel_poll()

    def cancel_poll(self, *, for_lease: bool = False) -> None:
        """Ends a pause at once, and a poll after ANSWER_GRACE_S."""
        self._is_cut_for_lease = for_lease and (self._is_cut_for_lease or not self._cut.is_set())
        self._cut.set()
        if self._poll_task is not None:
            loop = asyncio.get_running_loop()
            # After everything that is due by then. Otherwise an answer would be dropped that was read but has not
            # woken the poller, or that arrived while the loop was busy: uvloop runs timers before it reads sockets.
            end = functools.partial(loop.call_soon, self._end_poll)
            loop.call_later(ANSWER_GRACE_S, lambda: loop.call_later(TURN_S, end))

    def withdraw_cancel(self) -> None:
        """Withdraws a cut for the lease, which is valid again and never belonged to another replica."""
        if self._is_cut_for_lease and not self._is_cutting:
            self._cut.clear()

    def on_released(self) -> None:
        """Another replica may have released the bot, or stored a late message of it."""
        self._released.set()
        if self.checkpoint is not None:
            self._is_folded = False
            # beside the poll that waits
            self._folding = asyncio.get_running_loop().create_task(self._fold(self.checkpoint))
            self._folding.add_done_callback(_retrieve_exception)

    # the life of a poller ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the bot until it must stop, or its binding or shard is gone. One unit of work: never raises.

        It is ended by `stop`. Cancellation would drop an answer that iLink may count as delivered.
        """
        try:
            await self._serve()
        finally:
            if self.checkpoint is not None:
                await shield_with_grace(self._release(self.checkpoint), RELEASE_GRACE_S)
            self._enter(State.ENDED)

    async def _serve(self) -> None:
        failures = 0
        while not self.stopping:
            try:
                checkpoint = self.checkpoint or await self._take_bot()
                if checkpoint is None:
                    return
                await self._fold(checkpoint)
                await wait_event(self._cut, self._deps.pacing.starts.reserve_delay_s())
                if not self.stopping:
                    await self._notify(start=True)
                await self._poll_forever(checkpoint)
                failures = 0
            except LeaseLost as exc:
                log.info("poller.fenced", bot=self.bot, reason=exc.reason)
                return
            except AdapterError as exc:
                failures += 1
                self._enter(State.RETRYING, _problem(exc))
                log.warning("poller.failed", bot=self.bot, reason=exc.reason, detail=exc.detail, failures=failures)
                if exc.reason == "inbox_set_back":  # an operator lowers what is stored
                    self.checkpoint = None
            except Exception as exc:
                failures += 1
                self._enter(State.RETRYING, f"crashed: {type(exc).__name__}")
                log.exception("poller.crashed", bot=self.bot, failures=failures)
                self.checkpoint, self._is_folded = None, False  # what is in memory may be at fault
            if self._bindings.serving(self.bot) is None:
                return
            if failures:
                await wait_event(self._cut, backoff(failures, first_s=0.5) + self._clock.jitter(0.5))
                self._cut.clear()

    def _enter(self, state: State, why: str = "") -> None:
        """Changes the state. Raises RuntimeError for a transition that is not in the table, which is a bug."""
        if state is not self.state:
            if state not in TRANSITIONS[self.state]:
                raise RuntimeError(f"{self.state.name} to {state.name}")
            self.state, self.since = state, self._clock.monotonic()
        self.why = why

    def _check_owned(self, binding: Binding) -> None:
        """Raises LeaseLost unless this replica owns the shard of the bot's sandbox."""
        self._leases.ensure_owned(shard_of(binding.sandbox))

    # taking -----------------------------------------------------------------------------------------

    async def _take_bot(self) -> Checkpoint | None:
        """Takes the bot once no other replica can poll it; None: the poller must stop. Raises Temporary, LeaseLost,
        Refused."""
        attempts = 0
        while not self.stopping:
            binding = self._bindings.serving(self.bot)
            if binding is None:
                return None
            self._check_owned(binding)
            self._released.clear()
            self._enter(State.WAITING, self.why)
            async with self._deps.pacing.takeovers:
                self.checkpoint = await self._try_take(binding)
            if self.checkpoint is not None:
                self._enter(State.TAKING)
                self._is_folded, self._folded_to = False, None
                return self.checkpoint
            attempts += 1
            if attempts % QUERY_EVERY == 0 and await self._clear_idle_owner():
                continue
            wait_s = backoff(attempts, first_s=0.1, longest_s=4.0)
            await wait_any(self._cut.wait(), self._released.wait(), timeout_s=wait_s + self._clock.jitter(wait_s / 2))
            self._cut.clear()  # the loop checks the reason again
        return None

    async def _try_take(self, binding: Binding) -> Checkpoint | None:
        """None: the poller of another replica has not stopped, or the checkpoint changed meanwhile.

        Raises Temporary, Refused("token_key"). A replica that cannot open the bot's token does not take it.
        """
        deps = self._deps.receiving
        stored = await deps.checkpoints.read(self.bot)
        if stored.owner not in ("", self._leases.incarnation) and not await self._leases.revoke_if_expired(
            stored.owner
        ):
            self.why = f"{stored.owner} has not released it"
            return None
        self._open_account(binding)
        checkpoint = Checkpoint(stored, deps.checkpoints, self._leases, self._clock)
        checkpoint.apply_start_cursor(binding, deps.sealer)
        await checkpoint.move(binding.sandbox, deps.inboxes)
        if stored.owner != checkpoint.owner or checkpoint.is_stale:
            try:
                await checkpoint.save()
            except LeaseLost as exc:
                if exc.reason == "lease_lost":
                    raise
                return None
        return checkpoint

    async def _clear_idle_owner(self) -> bool:
        """Removes the owner's name from the checkpoint if no replica polls the bot. Returns whether it did.

        The name may be outdated after a restore or the loss of the last writes; then nobody would ever release the
        bot. A replica that starts to poll meanwhile finds out when its next write fails. Raises Temporary.
        """
        checkpoints = self._deps.receiving.checkpoints
        stored = await checkpoints.read(self.bot)
        if not stored.owner or not await self._deps.others.is_idle(stored.owner, self.bot):
            return False
        log.error("checkpoint.outdated", bot=self.bot, owner=stored.owner, detail="The owner does not poll the bot.")
        return await checkpoints.clear_owner(stored)

    async def _fold(self, checkpoint: Checkpoint) -> None:
        """Learns what the inbox has behind the checkpoint, from former owners. Raises Temporary, LeaseLost."""
        deps = self._deps.receiving
        while not self._is_folded:
            binding = self._bindings.serving(self.bot)
            if binding is None:
                return
            self._is_folded = self._is_folding = True  # unless something arrives meanwhile
            try:
                if (shard := await deps.open_shard(binding.sandbox)) is None:
                    raise LeaseLost("shard_lost", self.bot)
                # a late message may be behind what was published here meanwhile
                after = checkpoint.inbox_seq if self._folded_to is None else self._folded_to
                lines, high = await shard.folds.prints_of(checkpoint.sandbox, self.bot, after)
            except BaseException:
                self._is_folded = False
                raise
            finally:
                self._is_folding = False
            self._folded_to = high
            lines = [line for line in lines if line not in checkpoint.seen]
            if high > checkpoint.inbox_seq:
                checkpoint.inbox_seq = high
                checkpoint.note(len(lines))
            if lines:
                checkpoint.seen.add(lines)
                checkpoint.note()
                log.debug("bot.folded", bot=self.bot, sandbox=binding.sandbox, messages=len(lines))
                await self._save(checkpoint)

    # polling ----------------------------------------------------------------------------------------

    async def _poll_forever(self, checkpoint: Checkpoint) -> None:
        """Polls until the poller must stop or the binding is gone. Raises LeaseLost, Refused, Temporary."""
        deps, polls = self._deps, _Polls()
        turns = deps.receiving.turns
        self.unanswered_since = self.unanswered_since or self._clock.monotonic()
        while (binding := await self._next_binding()) is not None:
            if checkpoint.is_due():
                await self._save(checkpoint)
            await self._fold(checkpoint)
            if checkpoint.applied != binding.start_cursor:
                checkpoint.apply_start_cursor(binding, deps.receiving.sealer)
            began = self._clock.monotonic()
            if binding.state == "needs_login":
                self._enter(State.NEEDS_LOGIN, binding.reason)
            elif polls.failures or polls.overlong or polls.timeouts >= DEAD_PATH_AFTER:
                self._enter(State.RETRYING, self.why)
            else:
                self._enter(State.POLLING)
            hold_ms = max(polls.hold_ms, polls.least_hold_ms)
            try:
                polled = await self._poll(binding, checkpoint.cursor, hold_ms)
            except SessionExpired as exc:
                deps.receiving.metrics.polls.labels(outcome="stale_token").inc()
                polled = await self._recover(exc, checkpoint.cursor, hold_ms)
                if polled is None:
                    continue
            except Temporary as exc:
                await self._wait_after_failure(exc, polls)
                continue
            if polled is None:
                await self._on_no_answer(polls, hold_ms)
                continue
            self._note_answer(polled, polls)
            if not polled.messages and (self.unanswered_since - began) * 1000 <= polls.hold_ms + ON_TIME_MS:
                polls.least_hold_ms = 0
            polls.hold_ms = polled.hold_ms
            is_new = polled.cursor not in (None, checkpoint.cursor)
            if polled.messages:
                self._enter(State.STORING)
                await turns.wait_turn()
                await self._receiver.receive(polled, checkpoint)
                self._enter(State.POLLING)
            else:
                await deps.pacing.wakeups.wait_for_batch()
            if is_new and polled.cursor is not None:
                checkpoint.cursor = polled.cursor
                checkpoint.note()
            if binding.state == "needs_login":  # the verdict was wrong, or is not true any more
                log.info("session.recovered", bot=self.bot)
                await retry(
                    partial(mark_login, self._bindings, self._clock, binding, "active"), self._clock, self.bot
                )
            is_instant = self.unanswered_since - began < INSTANT_S and not (polled.messages and is_new)
            polls.instants = polls.instants + 1 if is_instant else 0
            if polls.instants > 1:
                await wait_event(self._cut, 0.25 + self._clock.jitter(0.25))
            if not self._is_announced and not self.stopping:
                # one client had its sends refused until iLink knew of the bot, others never notify: retry ever more
                # rarely
                polls.unannounced += 1
                if polls.unannounced.bit_count() == 1:
                    await self._notify(start=True)
            del polled  # frees a large answer during the next poll

    async def _save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint beside the next poll. Waits for the write if it has failed for long."""
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._write(checkpoint))
        if checkpoint.stale_s() > UNSAVED_S:
            self._enter(State.PAUSED, "The checkpoint cannot be written.")
            await asyncio.wait([self._saving])

    async def _write(self, checkpoint: Checkpoint) -> None:
        while checkpoint.is_stale and not self.stopping:
            try:
                await checkpoint.save()
            except LeaseLost as exc:  # after a pause of the lease the next poll is due
                if exc.reason == "bot_taken":
                    log.warning("poller.fenced", bot=self.bot, reason=exc.reason)
                    self.stop(immediately=True)
                return
            except (Temporary, BusRefused) as exc:
                log.warning("checkpoint.unsaved", bot=self.bot, reason=exc.reason)
                await self._clock.sleep(min(SAVE_AFTER_S, 5.0))
            else:
                return

    async def _next_binding(self) -> Binding | None:
        """The binding to poll with, once the bus accepts writes and the lease is valid. One that needs a login is
        polled by LOGIN_POLLS_S, with a notifystart before.

        None: the poller must stop, or the bot is no longer bound. Raises Temporary.
        """
        deps, is_due = self._deps, False
        while not self.stopping:
            if not deps.gate.is_open():
                self._enter(State.PAUSED, "NATS accepts no writes.")
                await deps.gate.wait_writable()
            if not self._leases.is_valid:
                self._enter(State.PAUSED, "The lease of this replica is not valid.")
                await self._wait_until(self._leases.changed, lambda: self._leases.is_valid)
                await wait_event(self._cut, deps.pacing.starts.reserve_delay_s())
                await deps.receiving.turns.wait_turn()
                self.unanswered_since = self._clock.monotonic()
                continue
            binding = self._bindings.serving(self.bot)
            if binding is None or self._must_stop():
                break
            if binding.event_pending:
                binding = await publish_login_event(self._bindings, deps.receiving.events, binding)
            if binding.state != "needs_login":
                return binding
            if is_due:
                await self._notify(start=True, even_stale=True)
                return binding
            self._enter(State.NEEDS_LOGIN, binding.reason)
            self.last_binding = binding
            if self.checkpoint is not None and self.checkpoint.is_stale:
                await self._save(self.checkpoint)
            passed_s = max(0, self._clock.now_ms() - binding.since_ms) / 1000
            try:
                pause_s = login_poll_in_s(passed_s, deps.pacing.login_polls_s)
                await self._wait_until(self._bindings.changed, self._is_rebound(binding), pause_s)
            except TimeoutError:
                is_due = True
            self.unanswered_since = self._clock.monotonic()
        return None

    async def _poll(self, binding: Binding, cursor: str, hold_ms: int) -> Polled | None:
        """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost,
        Refused."""
        self._check_owned(binding)
        self.last_binding = binding
        account = self._open_account(binding)
        if self._cut.is_set():
            return None
        self._poll_task = task = asyncio.current_task()
        try:
            polled = await self._deps.chat.poll(account, cursor, hold_ms)
            # otherwise the answer came just before the cut
            if task is not None and task.cancelling() and not self._was_cut():
                raise asyncio.CancelledError
            return polled
        except asyncio.CancelledError:
            if not self._was_cut():
                raise
            return None
        finally:
            self._poll_task = None

    def _end_poll(self) -> None:
        """Ends the waiting poll, even one that began after `cancel_poll`, since `_cut` is still set."""
        if self._poll_task is not None and self._cut.is_set() and not self._is_cutting:
            self._is_cutting = True
            self._poll_task.cancel()

    def _was_cut(self) -> bool:
        """Whether only `cancel_poll` cancelled the poller, which then continues."""
        if not self._is_cutting or self._poll_task is None:
            return False
        self._is_cutting = False
        return self._poll_task.uncancel() == 0

    def _note_answer(self, polled: Polled, polls: _Polls) -> None:
        polls.failures = polls.timeouts = 0
        self.unanswered_since = self.polled_at = self._clock.monotonic()
        metrics = self._deps.receiving.metrics
        (metrics.polls_full if polled.messages else metrics.polls_empty).inc()
        if polled.overlong and not polls.overlong:  # iLink may repeat the same messages for ever
            log.error("poll.cursor_too_long", bot=self.bot, characters=polled.overlong)
            self.why = f"The cursor has {polled.overlong} characters and cannot be kept."
        if polled.overlong or polled.cursor:
            polls.overlong = polled.overlong

    async def _wait_after_failure(self, exc: Temporary, polls: _Polls) -> None:
        turns = self._deps.receiving.turns
        await turns.wait_turn()  # iLink may have closed all connections at once
        polls.failures += 1
        self._enter(State.RETRYING, _problem(exc))
        self._deps.receiving.metrics.polls.labels(outcome="error").inc()
        wait_s = exc.retry_after_s or backoff(polls.failures, first_s=0.5, longest_s=30.0)
        if polls.failures.bit_count() == 1:  # at 1, 2, 4 …: thousands of polls fail together while iLink is down
            log.warning("poll.failed", bot=self.bot, reason=exc.reason, detail=exc.detail, failures=polls.failures)
        if not self.stopping:
            await wait_event(self._cut, wait_s + self._clock.jitter(wait_s / 2))
        await turns.wait_turn()

    async def _on_no_answer(self, polls: _Polls, waited_ms: int) -> None:
        """Handles a poll that was cut, or got no answer within `waited_ms` and the client's margin."""
        if self._cut.is_set():
            self._cut.clear()
            # iLink may see the new poll before the old connection ends, and report two pollers
            await wait_event(self._cut, AFTER_CANCEL_S)
            await self._deps.receiving.turns.wait_turn()
            return
        polls.timeouts += 1
        polls.least_hold_ms = min(LONGEST_HOLD_MS, 2 * waited_ms)
        self._deps.receiving.metrics.polls.labels(outcome="client_timeout").inc()
        if polls.timeouts >= DEAD_PATH_AFTER:
            log.warning("poll.dead_path", bot=self.bot, timeouts=polls.timeouts)
            self.why = f"iLink has not answered {polls.timeouts} polls in a row."

    # a token that iLink refuses ---------------------------------------------------------------------

    async def _recover(self, exc: SessionExpired, cursor: str, hold_ms: int) -> Polled | None:
        """Handles -14: the bot neither polls nor sends except for a few spaced retries, and then needs a login.

        docs/reference/ilink-protocol.md, "Stale token", has what is known of -14. Returns the answer of a successful
        poll; None: the binding changed or needs a login, and `_next_binding` says when it is polled again. Raises
        LeaseLost, Refused.
        """
        deps = self._deps
        binding = self._bindings.get(self.bot)
        if binding is None or binding.state == "needs_login":
            return None
        self._enter(State.STALE, exc.detail)
        deps.on_session_changed(binding)
        log.warning("session.stale", bot=self.bot, sandbox=binding.sandbox, detail=exc.detail)
        advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
        events = deps.receiving.events
        try:
            await events.publish_binding_event(binding.event("stale", reason=exc.detail, detail=advice))
            if (polled := await self._retry_token(binding, cursor, hold_ms)) is not None:
                log.info("session.recovered", bot=self.bot)
                self._enter(State.STORING if polled.messages else State.POLLING)
                await retry(partial(events.publish_binding_event, binding.event("recovered")), self._clock, self.bot)
                return polled  # even after a new bind: iLink may not deliver this answer again
            if self.stopping or self._bindings.get(self.bot) != binding:
                return None
            lost = await self._retry_unless_stopping(partial(self._mark_needs_login, binding))
            if lost is not None:
                await self._retry_unless_stopping(
                    partial(publish_login_event, self._bindings, events, lost, exc.detail)
                )
            return None
        finally:
            if self.state is State.STALE:
                self._enter(State.PAUSED)
            if now := self._bindings.get(self.bot):
                deps.on_session_changed(now)

    async def _retry_token(self, binding: Binding, cursor: str, hold_ms: int) -> Polled | None:
        """A few polls, each after a pause and a notifystart; None: iLink refuses the token in all, the binding
        changed, or the poller must stop. No answer tells nothing about the token. Raises LeaseLost, Refused."""
        deps, refusals, failures = self._deps, 0, 0
        while refusals < len(deps.pacing.stale_retry_s):
            pause_s = max(deps.pacing.stale_retry_s[refusals], backoff(failures) if failures else 0.0)
            with contextlib.suppress(TimeoutError):
                await self._wait_until(self._bindings.changed, self._is_rebound(binding), pause_s)
            if self.stopping or self._bindings.get(self.bot) != binding:
                return None
            await deps.gate.wait_writable()
            await self._notify(start=True, even_stale=True)
            polled = None
            try:
                polled = await self._poll(binding, cursor, hold_ms)
            except SessionExpired:
                refusals, failures = refusals + 1, 0
                continue
            except Temporary as problem:
                log.info("session.unreachable", bot=self.bot, reason=problem.reason)
            if polled is not None:
                return polled
            failures += 1
            hold_ms = min(LONGEST_HOLD_MS, 2 * hold_ms)  # or the server may hold longer
            self._cut.clear()
        return None

    async def _retry_unless_stopping(self, work: Callable[[], Awaitable[Binding | None]]) -> Binding | None:
        """As `retry`, for work that the next owner can also do; None: the poller must stop."""

        async def attempt() -> Binding | None:
            try:
                return await work()
            except (Temporary, BusRefused):
                if self.stopping:
                    return None
                raise

        return await retry(attempt, self._clock, self.bot)

    async def _mark_needs_login(self, binding: Binding) -> Binding | None:
        """`mark_login`, unless another replica may poll by now. Raises Temporary, LeaseLost."""
        self._check_owned(binding)
        return await mark_login(self._bindings, self._clock, binding, "needs_login")

    # the end ----------------------------------------------------------------------------------------

    async def _release(self, checkpoint: Checkpoint) -> None:
        """Removes this replica's name from the checkpoint, so that the next owner need not wait for the lease to
        expire.

        Retries until it succeeds, since no other replica can take the bot while this replica lives.
        """
        self._enter(State.RELEASING)
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait([self._saving])
        failures = 0
        while True:
            is_unbound = self._bindings.serving(self.bot) is None
            try:
                await checkpoint.release(ttl_s=self._deps.pacing.keep_s if is_unbound else 0)
                break
            except LeaseLost:
                return
            except (Temporary, BusRefused) as exc:  # the bus is down, or a follower lagged behind the leader
                failures += 1
                self.why = _problem(exc)
                log.warning("bot.unreleased", bot=self.bot, reason=exc.reason, failures=failures)
                await self._clock.sleep(backoff(failures, first_s=0.1, longest_s=2.0))
        await self._deps.others.publish_released(self.bot)
        if is_unbound or (self.is_handed_over and self._leases.is_alone):
            await self._notify(start=False)  # otherwise the next owner has already told iLink that it polls

    # small things -----------------------------------------------------------------------------------

    def _open_account(self, binding: Binding) -> Account:
        """`account_of`, which opens a token once instead of for each poll. Raises Refused("token_key")."""
        if self._account is None or self._account[0] is not binding:
            self._account = binding, account_of(binding, self._deps.receiving.sealer)
        return self._account[1]

    async def _notify(self, *, start: bool, even_stale: bool = False) -> None:
        """Tells iLink that polling starts or stops. Best effort, and not for a token that is known to be dead."""
        binding = self._bindings.get(self.bot) or self.last_binding
        if binding is None or not (even_stale or binding.state == "active"):
            return
        try:
            async with asyncio.timeout(NOTIFY_S):
                await self._deps.chat.notify(self._open_account(binding), start=start)
            self._is_announced = start
        except (AdapterError, TimeoutError) as exc:
            reason = exc.reason if isinstance(exc, AdapterError) else "timeout"
            log.info("notify.failed", bot=self.bot, start=start, reason=reason)

    def _must_stop(self) -> bool:
        """`stopping`, read after an await, where a type checker would assume the earlier value."""
        return self.stopping

    def _is_rebound(self, binding: Binding) -> Callable[[], bool]:
        """A condition: the bot's binding differs from `binding`."""
        return lambda: self._bindings.get(binding.bot) != binding

    async def _wait_until(
        self, condition: ChangeSignal, holds: Callable[[], bool], timeout_s: float | None = None
    ) -> None:
        """Waits until `holds()`, the poller must stop, or `timeout_s` seconds have passed."""
        async with asyncio.timeout(timeout_s):
            while not (self._must_stop() or holds()):
                await condition.wait_until(lambda: self._must_stop() or holds(), CHECK_S, also=self._stop_requested)


def login_poll_in_s(passed_s: float, polls_s: Sequence[float]) -> float:
    """Seconds until the next poll of a binding that has needed a login for `passed_s` seconds. Its time depends on
    nothing else, so that no takeover makes it earlier or later."""
    first_s, often_s, rarely_s = polls_s
    if passed_s < first_s:
        return first_s - passed_s
    every_s = often_s if passed_s < LOGIN_POLLED_OFTEN_S else rarely_s
    return every_s - passed_s % every_s


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """The next poll folds again, and meets the exception."""
    if not task.cancelled():
        task.exception()


def _problem(exc: AdapterError) -> str:
    """As it is shown with the bot."""
    return f"{exc.reason}: {exc.detail}" if exc.detail else exc.reason
