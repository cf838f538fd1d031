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
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import structlog

from adapter.bindings.registry import mark_login, publish_login_event
from adapter.contract.names import shard_of
from adapter.contract.records import Binding
from adapter.errors import AdapterError, LeaseLost, SessionExpired, Temporary
from adapter.inbound.checkpoint import Checkpoint
from adapter.inbound.receive import InboundDeps, Receiver
from adapter.kit.persist import persist
from adapter.kit.timing import ChangeSignal, backoff, shield_with_grace
from adapter.outbound.sessions import BotSession
from adapter.ports import HOLD_MS, Polled

log = structlog.get_logger()


class State(enum.StrEnum):
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
    S.TAKING: {S.POLLING, S.PAUSED, S.RETRYING, S.STALE, S.NEEDS_LOGIN, S.RELEASING},
    S.POLLING: {S.STORING, S.PAUSED, S.RETRYING, S.STALE, S.NEEDS_LOGIN, S.RELEASING},
    S.STORING: {S.POLLING, S.RETRYING, S.RELEASING},
    S.PAUSED: {S.POLLING, S.RETRYING, S.STALE, S.NEEDS_LOGIN, S.RELEASING},
    S.RETRYING: {S.WAITING, S.POLLING, S.STORING, S.PAUSED, S.STALE, S.NEEDS_LOGIN, S.RELEASING, S.ENDED},
    S.STALE: {S.POLLING, S.STORING, S.PAUSED, S.RETRYING, S.NEEDS_LOGIN, S.RELEASING},
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
NOTIFY_S = 1.5
"""Longest wait for iLink's answer to a notification, which is best effort (docs/reference/ilink-protocol.md, "Online
state")."""
TURN_S = 0.01
"""Time for the loop to read its sockets. uvloop runs a timer of 0 before that."""


class BotPoller:
    """Polls one bot, from when its shard is taken until it is released."""

    def __init__(self, bot: str, deps: InboundDeps) -> None:
        self.bot = bot
        self._deps = deps
        self._clock = deps.clock
        self._bindings = deps.bindings
        self._leases = deps.leases
        self.state = State.WAITING
        self.since = self._clock.monotonic()
        """Monotonic time since which it is in this state."""
        self.why = ""
        """Why it is in this state, if that is not the usual one."""
        self.checkpoint: Checkpoint | None = None
        """Set once the bot is taken."""
        self.session = BotSession()
        self._receiver = Receiver(bot, deps)
        self.unanswered_since = 0.0
        """Monotonic time since which iLink owes an answer to a poll: the time of the last answer, or of the end of a
        pause."""
        self.stopping = False
        """The poller ends at the next poll boundary."""
        self.last_binding: Binding | None = None
        """The binding of the last poll. The end of an unbound bot is announced to iLink with it, unless its token was
        dead."""
        self.is_handed_over = False
        """The shard was handed over; the bot is released after the poll that waits."""
        self._wake = ChangeSignal()
        """A pause is to end, see `_is_cut` and `_is_released`."""
        self._is_cut = False
        """Set by `cancel_poll`."""
        self._is_released = False
        """The replica that had the bot reports its release, or a late message."""
        self._is_started = False
        """The first poll may start."""
        self._is_announced = False
        """iLink has confirmed that the bot is polled."""
        self._unfolded = 1
        """Reasons to read the inbox that came since the conversations and the checkpoint know what it has."""
        self._saving: asyncio.Task[None] | None = None
        self._folding: asyncio.Task[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        """The poller's own."""
        self._is_waiting = False
        """A poll is out that `_end_poll` may cut."""
        # what the last polls tell about the next one
        self._failures = 0
        """Failed steps in a row."""
        self._has_failed = False
        """The last poll, or what its answer asked for, has failed."""
        self._timeouts = 0
        """Consecutive polls without any answer."""
        self._hold_ms = HOLD_MS
        self._instants = 0
        """Consecutive polls answered at once without news."""
        self._refused: Binding | None = None
        """The binding whose token iLink has refused (-14), while that is tried again."""
        self._refusals = 0
        """Times that it was refused again."""
        self._refusal = ""
        """iLink's words."""

    # for others -------------------------------------------------------------------------------------

    @property
    def has_answer(self) -> bool:
        """An answer of iLink is not stored yet, or not even read."""
        return self.state is State.STORING or self._deps.chat.has_answer(self.bot)

    def stop(self, *, immediately: bool) -> None:
        """Asks the poller to end at the next boundary or pause; with `immediately` also cuts a poll that waits."""
        self.stopping = True
        if immediately or not self._is_waiting:
            self.cancel_poll()

    def cancel_poll(self, *, for_lease: bool = False) -> None:
        """Ends a pause at once, and a poll after ANSWER_GRACE_S; not `for_lease` if that is valid again by then."""
        self._is_cut = True
        self._wake.notify_all()
        if self._is_waiting:
            loop = asyncio.get_running_loop()
            # After everything that is due by then. Otherwise an answer would be dropped that was read but has not
            # woken the poller, or that arrived while the loop was busy: uvloop runs timers before it reads sockets.
            end = partial(loop.call_soon, self._end_poll, for_lease)
            loop.call_later(ANSWER_GRACE_S, lambda: loop.call_later(TURN_S, end))

    def on_released(self) -> None:
        """Another replica may have released the bot, or stored a late message of it."""
        self._is_released = True
        self._wake.notify_all()
        if self.checkpoint is not None:
            self._unfolded += 1
            self.session.is_taken = False
            # beside the poll that waits
            self._folding = asyncio.get_running_loop().create_task(self._fold(self.checkpoint))
            self._folding.add_done_callback(_retrieve_exception)

    # the life of a poller ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the bot until it must stop, or its binding or shard is gone. One unit of work: never raises.

        It is ended by `stop`. Cancellation would drop an answer that iLink may count as delivered.
        """
        self._task, sessions = asyncio.current_task(), self._deps.sessions
        sessions.polled[self.bot], self.session.poll_now = self.session, self.cancel_poll
        try:
            await self._serve()
        finally:
            self._end_refusal()
            self.session.is_taken, self.session.poll_now = False, None  # breaks a reference cycle
            if self.checkpoint is not None:
                await shield_with_grace(self._release(self.checkpoint), RELEASE_GRACE_S)
            sessions.forget(self.bot, self.session)
            self._enter(State.ENDED)

    async def _serve(self) -> None:
        """One poll after the other. The one place where they fail."""
        while not self.stopping and self._bindings.serving(self.bot) is not None:
            retry_after_s = None
            try:
                while (binding := await self._prepare()) is not None and self.checkpoint is not None:
                    await self._poll_once(binding, self.checkpoint)
                return
            except LeaseLost as exc:
                log.info("poller.fenced", bot=self.bot, reason=exc.reason)
                return
            except AdapterError as exc:
                await self._deps.ticks.wait_tick()  # iLink may have closed all connections at once
                problem, retry_after_s = _problem(exc), getattr(exc, "retry_after_s", None)
                failure = {"reason": exc.reason, "detail": exc.detail}
                if exc.reason == "inbox_set_back":  # an operator lowers what is stored
                    self._forget_checkpoint()
            except Exception as exc:
                problem = f"crashed: {type(exc).__name__}"
                failure = {"reason": "crashed", "detail": type(exc).__name__}
                log.exception("poller.crashed", bot=self.bot)
                self._forget_checkpoint()  # what is in memory may be at fault
            self._failures += 1
            self._enter(State.RETRYING, problem)
            log.warning("poll.failed", bot=self.bot, host=self._host(), **failure, failures=self._failures)
            wait_s = retry_after_s or backoff(self._failures, first_s=0.5, longest_s=30.0)
            if not self._must_stop():
                await self._pause(wait_s + self._clock.jitter(wait_s / 2))
            self._is_cut = False
            await self._deps.ticks.wait_tick()

    async def _prepare(self) -> Binding | None:
        """Does all that comes before a poll, and returns the binding to poll with; None: the poller must stop, or the
        bot is not bound. Raises LeaseLost, Refused, Temporary."""
        if (checkpoint := self.checkpoint) is None and (checkpoint := await self._take_bot()) is None:
            return None
        if not self._is_started:
            await self._fold(checkpoint)
            await self._pause(self._deps.starts.reserve_delay_s())
            if not self.stopping:
                await self._notify(start=True)
            self._is_started = True
        self.unanswered_since = self.unanswered_since or self._clock.monotonic()
        if (binding := await self._wait_until_pollable(checkpoint)) is None:
            return None
        if checkpoint.is_due():
            await self._save(checkpoint)
        if self._unfolded:
            await self._fold(checkpoint)
        if checkpoint.applied != binding.start_cursor:
            checkpoint.apply_start_cursor(binding, self._deps.sealer)
        return binding

    def _forget_checkpoint(self) -> None:
        self.checkpoint, self._is_started, self.session.is_taken = None, False, False

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
        while not self._must_stop() and (binding := self._bindings.serving(self.bot)) is not None:
            self._check_owned(binding)
            self._is_released = False
            self._enter(State.WAITING, self.why)
            async with self._deps.takeovers:
                self.checkpoint = await self._try_take(binding)
            if self.checkpoint is not None:
                self._enter(State.TAKING)
                self._unfolded += 1
                return self.checkpoint
            attempts += 1
            if attempts % QUERY_EVERY == 0 and await self._clear_idle_owner():
                continue
            wait_s = backoff(attempts, first_s=0.1, longest_s=4.0)
            wait_s += self._clock.jitter(wait_s / 2)
            await self._wake.wait_until(lambda: self._is_cut or self._is_released, wait_s)
            self._is_cut = False  # the loop checks the reason again
        return None

    async def _try_take(self, binding: Binding) -> Checkpoint | None:
        """None: the poller of another replica has not stopped, or the checkpoint changed meanwhile.

        Raises Temporary, Refused("token_key"). A replica that cannot open the bot's token does not take it.
        """
        deps = self._deps
        stored = await deps.checkpoints.read(self.bot)
        if stored.owner not in ("", self._leases.incarnation) and not await self._leases.revoke_if_expired(
            stored.owner
        ):
            self.why = f"{stored.owner} has not released it"
            return None
        deps.sessions.account(binding)
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
        checkpoints = self._deps.checkpoints
        stored = await checkpoints.read(self.bot)
        if not stored.owner or not await self._deps.others.is_idle(stored.owner, self.bot):
            return False
        log.error("checkpoint.outdated", bot=self.bot, owner=stored.owner, detail="The owner does not poll the bot.")
        return await checkpoints.clear_owner(stored)

    async def _fold(self, checkpoint: Checkpoint) -> None:
        """Learns what the inbox has behind the checkpoint, from former owners. Raises Temporary, LeaseLost."""
        while unfolded := self._unfolded:
            binding = self._bindings.serving(self.bot)
            if binding is None:
                return
            if (shard := await self._deps.open_shard(binding.sandbox)) is None:
                raise LeaseLost("shard_lost", self.bot)
            lines, high = await shard.folds.prints_of(checkpoint.sandbox, self.bot, checkpoint.inbox_seq)
            lines = [line for line in lines if line not in checkpoint.seen]
            if high > checkpoint.inbox_seq:
                checkpoint.inbox_seq = high
                checkpoint.note(len(lines))
            if lines:
                checkpoint.seen.add(lines)
                checkpoint.note()
                log.debug("bot.folded", bot=self.bot, sandbox=binding.sandbox, messages=len(lines))
                await self._save(checkpoint)
            if self._unfolded == unfolded:  # unless something came meanwhile
                self._unfolded = 0
                self.session.is_taken = True

    # polling ----------------------------------------------------------------------------------------

    async def _wait_until_pollable(self, checkpoint: Checkpoint) -> Binding | None:
        """The binding to poll with, once the bus accepts writes and the lease is valid. A token that iLink has
        refused is polled after a pause and a notifystart; a few times, then by LOGIN_POLLS_S.

        None: the poller must stop, or the bot is no longer bound. Raises Temporary.
        """
        deps, is_due = self._deps, False
        while not self.stopping:
            if not deps.is_writable():
                self._enter(State.PAUSED, "NATS accepts no writes.")
                await deps.wait_writable()
                continue
            if not self._leases.is_valid:
                self._enter(State.PAUSED, "The lease of this replica is not valid.")
                await self._wait_until(self._leases.changed, lambda: self._leases.is_valid)
                await self._pause(deps.starts.reserve_delay_s())
                await deps.ticks.wait_tick()
                self.unanswered_since = self._clock.monotonic()
                continue
            binding = self._bindings.serving(self.bot)
            if binding is None:
                break
            if binding.event_pending:
                binding = await publish_login_event(self._bindings, deps.events, binding, self._refusal)
            if self._refused not in (None, binding):
                self._end_refusal()
            if self._refused is not None and self._refusals >= len(deps.stale_retry_s):
                self._check_owned(binding)  # another replica may poll by now
                await mark_login(self._bindings, self._clock, binding, "needs_login")
                self._end_refusal()
                continue
            if is_due:
                await self._notify(start=True, even_stale=True)
            if is_due or (binding.state != "needs_login" and self._refused is None):
                return binding
            if self._refused is not None:
                self._enter(State.STALE, self._refusal)
                pause_s = deps.stale_retry_s[self._refusals]
            else:
                self._enter(State.NEEDS_LOGIN, binding.reason)
                passed_s = max(0, self._clock.now_ms() - binding.since_ms) / 1000
                pause_s = login_poll_in_s(passed_s, deps.login_polls_s)
                self.last_binding = binding
                if checkpoint.is_stale:
                    await self._save(checkpoint)
            is_due = not await self._wait_until(self._bindings.changed, self._is_rebound(binding), pause_s)
            self._is_cut = False  # the loop checks the reason again
            self.unanswered_since = self._clock.monotonic()
        return None

    async def _poll_once(self, binding: Binding, checkpoint: Checkpoint) -> None:
        """One long poll, and what its answer asks for. Raises LeaseLost, Refused, Temporary."""
        deps, began = self._deps, self._clock.monotonic()
        if not self._has_failed:  # only what comes before a poll
            self._failures = 0
        self._has_failed = True  # until all of it is done
        if binding.state == "needs_login":
            self._enter(State.NEEDS_LOGIN, binding.reason)
        elif self._refused is not None:
            self._enter(State.STALE, self._refusal)
        elif self._failures or self._timeouts >= DEAD_PATH_AFTER:
            self._enter(State.RETRYING, self.why)
        else:
            self._enter(State.POLLING)
        try:
            polled = await self._poll(binding, checkpoint.cursor)
        except SessionExpired as exc:
            deps.metrics.polls.labels(outcome="stale_token").inc()
            await self._on_refused(exc)
            return
        except Temporary:
            deps.metrics.polls.labels(outcome="error").inc()
            raise
        if polled is None:
            await self._on_no_answer()
            return
        self._timeouts = 0
        self.unanswered_since = self.session.polled_at = now = self._clock.monotonic()
        deps.sessions.changed.notify_all()
        is_new = polled.cursor not in (None, checkpoint.cursor)
        if polled.messages:
            deps.metrics.polls_full.inc()
            self._hold_ms = max(self._hold_ms, polled.hold_ms)
            self._enter(State.STORING)
            await deps.ticks.wait_tick()
            await self._receiver.receive(polled, checkpoint)
            self._enter(State.POLLING)
        else:
            deps.metrics.polls_empty.inc()
            is_on_time = (now - began) * 1000 <= polled.hold_ms + ON_TIME_MS
            self._hold_ms = polled.hold_ms if is_on_time else max(self._hold_ms, polled.hold_ms)
            await deps.wakeups.wait_for_batch()
        if is_new and polled.cursor is not None:
            checkpoint.cursor = polled.cursor
            checkpoint.note()
        if binding.state == "needs_login" or self._refused is not None:
            await self._on_accepted(binding, checkpoint)
        if polled.overlong:  # iLink may repeat the same messages for ever
            raise Temporary("cursor_too_long", f"The cursor has {polled.overlong} characters and cannot be kept.")
        self._failures, self._has_failed = 0, False
        is_instant = now - began < INSTANT_S and not (polled.messages and is_new)
        self._instants = self._instants + 1 if is_instant else 0
        if self._instants > 1:
            await self._pause(0.25 + self._clock.jitter(0.25))
        if not (self._is_announced or polled.messages or self.stopping):
            await self._notify(start=True)  # one client had its sends refused until iLink knew of the bot

    async def _poll(self, binding: Binding, cursor: str) -> Polled | None:
        """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost,
        Refused."""
        self._check_owned(binding)
        self.last_binding = binding
        account = self._deps.sessions.account(binding)
        if self._is_cut:
            return None
        assert self._task is not None
        self._is_waiting = True
        try:
            polled = await self._deps.chat.poll(account, cursor, self._hold_ms)
        except asyncio.CancelledError:
            polled = None
        finally:
            if not self._is_waiting:  # it was cut, and may have ended with an answer all the same
                self._task.uncancel()
            self._is_waiting = False
        if self._task.cancelling():  # the poller is to end
            raise asyncio.CancelledError
        return polled

    def _end_poll(self, for_lease: bool) -> None:
        """Ends the waiting poll, even one that began after `cancel_poll`, since the reason still holds; not one that
        has its answer."""
        if for_lease and self.checkpoint is not None:
            with contextlib.suppress(LeaseLost):
                return self.checkpoint.check()  # it never belonged to another replica
        if self._is_waiting and self._is_cut and self._task is not None and not self.has_answer:
            self._is_waiting = False
            self._task.cancel()

    async def _on_no_answer(self) -> None:
        """Handles a poll that was cut, or got no answer within its hold and the client's margin."""
        if self._is_cut:
            self._is_cut = False
            # iLink may see the new poll before the old connection ends, and report two pollers
            await self._pause(AFTER_CANCEL_S)
            await self._deps.ticks.wait_tick()
            return
        self._timeouts += 1
        self._hold_ms = min(LONGEST_HOLD_MS, 2 * self._hold_ms)
        self._deps.metrics.polls.labels(outcome="client_timeout").inc()
        if self._timeouts >= DEAD_PATH_AFTER:
            log.warning("poll.dead_path", bot=self.bot, host=self._host(), timeouts=self._timeouts)
            self.why = f"iLink has not answered {self._timeouts} polls in a row."

    async def _save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint beside the next poll. Waits for the write if it has failed for long."""
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._write(checkpoint))
            self._saving.add_done_callback(_retrieve_exception)
        if checkpoint.stale_s() > UNSAVED_S:
            self._enter(State.PAUSED, "The checkpoint cannot be written.")
            await asyncio.wait([self._saving])

    async def _write(self, checkpoint: Checkpoint) -> None:
        try:
            await persist(checkpoint.save, checkpoint, self._clock, "checkpoint", bot=self.bot)
        except LeaseLost as exc:
            log.warning("poller.fenced", bot=self.bot, reason=exc.reason)
            self.stop(immediately=True)

    # a token that iLink refuses ---------------------------------------------------------------------

    async def _on_refused(self, exc: SessionExpired) -> None:
        """Handles -14 to a poll: the bot neither polls nor sends except for a few spaced retries, and then needs a
        login (`_wait_until_pollable`). docs/reference/ilink-protocol.md, "Stale token", has what is known of -14.
        Raises Temporary."""
        binding = self._bindings.get(self.bot)
        if binding is None or binding.state == "needs_login":
            return
        if binding == self._refused:
            self._refusals += 1
            return
        self._enter(State.STALE, exc.detail)
        log.warning("session.stale", bot=self.bot, sandbox=binding.sandbox, detail=exc.detail)
        self._refused, self._refusals, self._refusal = binding, 0, exc.detail
        self.session.is_stale = True
        self._deps.sessions.changed.notify_all()
        self._deps.on_session_changed(binding)
        advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
        try:
            await self._deps.events.publish_binding_event(binding.event("stale", reason=exc.detail, detail=advice))
        except BaseException:  # the next refusal is told again
            self._end_refusal()
            raise

    async def _on_accepted(self, binding: Binding, checkpoint: Checkpoint) -> None:
        """The verdict on a refused token was wrong, or is not true any more. Raises LeaseLost."""
        if binding.state == "needs_login":
            tell: Callable[[], Awaitable[object]] = partial(
                mark_login, self._bindings, self._clock, binding, "active"
            )
        else:
            self._end_refusal()
            tell = partial(self._deps.events.publish_binding_event, binding.event("recovered"))
        await persist(tell, checkpoint, self._clock, "binding", bot=self.bot)
        log.info("session.recovered", bot=self.bot)

    def _end_refusal(self) -> None:
        if self._refused is not None:
            self._refused, self.session.is_stale = None, False
            if now := self._bindings.get(self.bot):
                self._deps.on_session_changed(now)

    # the end ----------------------------------------------------------------------------------------

    async def _release(self, checkpoint: Checkpoint) -> None:
        """Removes this replica's name from the checkpoint, so that the next owner need not wait for the lease to
        expire.

        Retries until it succeeds, since no other replica can take the bot while this replica lives.
        """
        self._enter(State.RELEASING)
        for task in (self._folding, self._saving):  # a fold saves what it finds
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

        async def release() -> bool:
            is_unbound = self._bindings.serving(self.bot) is None
            await checkpoint.release(ttl_s=self._deps.keep_s if is_unbound else 0)
            return is_unbound

        try:
            is_unbound = await persist(release, checkpoint, self._clock, "release", bot=self.bot)
        except LeaseLost:
            return
        await self._deps.others.publish_released(self.bot)
        if is_unbound or (self.is_handed_over and self._leases.is_alone):
            await self._notify(start=False)  # otherwise the next owner has already told iLink that it polls

    # small things -----------------------------------------------------------------------------------

    async def _notify(self, *, start: bool, even_stale: bool = False) -> None:
        """Tells iLink that polling starts or stops. Best effort, and not for a token that is known to be dead."""
        binding = self._bindings.get(self.bot) or self.last_binding
        if binding is None or not (even_stale or binding.state == "active"):
            return
        try:
            async with asyncio.timeout(NOTIFY_S):
                await self._deps.chat.notify(self._deps.sessions.account(binding), start=start)
            self._is_announced = start
        except (AdapterError, TimeoutError) as exc:
            reason = exc.reason if isinstance(exc, AdapterError) else "timeout"
            log.info("notify.failed", bot=self.bot, host=self._host(), start=start, reason=reason)

    def _host(self) -> str:
        """Where iLink is for the bot, for the log."""
        binding = self._bindings.get(self.bot) or self.last_binding
        return self._deps.chat.host_of(binding.base_url) if binding is not None else ""

    def _must_stop(self) -> bool:
        """`stopping`, read after an await, where a type checker would assume the earlier value."""
        return self.stopping

    def _is_rebound(self, binding: Binding) -> Callable[[], bool]:
        """A condition: the bot's binding differs from `binding`."""
        return lambda: self._bindings.get(binding.bot) != binding

    async def _pause(self, seconds: float) -> None:
        """Waits, unless `cancel_poll` was called."""
        await self._wake.wait_until(lambda: self._is_cut, seconds)

    async def _wait_until(
        self, change: ChangeSignal, holds: Callable[[], bool], timeout_s: float | None = None
    ) -> bool:
        """Waits until `holds()` or the poller must stop; False after `timeout_s` seconds."""
        return await change.wait_until(lambda: self.stopping or holds(), timeout_s, also=self._wake)


def login_poll_in_s(passed_s: float, polls_s: Sequence[float]) -> float:
    """Seconds until the next poll of a binding that has needed a login for `passed_s` seconds. Its time depends on
    nothing else, so that no takeover makes it earlier or later."""
    first_s, often_s, rarely_s = polls_s
    if passed_s < first_s:
        return first_s - passed_s
    every_s = often_s if passed_s < LOGIN_POLLED_OFTEN_S else rarely_s
    return every_s - passed_s % every_s


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """The next poll folds and saves again, and meets the exception."""
    if not task.cancelled():
        task.exception()


def _problem(exc: AdapterError) -> str:
    """As it is shown with the bot."""
    return f"{exc.reason}: {exc.detail}" if exc.detail else exc.reason
