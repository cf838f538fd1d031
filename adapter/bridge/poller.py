"""Polls iLink for one bot. Knows neither HTTP nor NATS.

    take → poll → receive → poll → …

A poller waits until no former owner of the partition can have a poll of the bot. An answer is stored before the next
poll, which lets iLink forget it. A poll that waits is cut only for a reason that cannot wait, since iLink may count
an answer as delivered that nobody reads.

`Partitions` runs one `BotPoller` for each bot of the replica's partitions, and ends it by `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import structlog

from adapter.bridge.bindings import mark_login, publish_login_event
from adapter.bridge.handover import say_polled
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.receive import Receiver
from adapter.bridge.record import Gone
from adapter.bridge.refused_token import RefusedToken
from adapter.bridge.sessions import BotSession
from adapter.contract.records import Binding
from adapter.errors import AdapterError, LeaseLost, Refused, SessionExpired, Temporary
from adapter.ports import HOLD_MS, Polled
from adapter.tools.decoding import log_once
from adapter.tools.seal import cursor_context
from adapter.tools.timing import ChangeSignal, backoff, shield_with_grace, wait_any

log = structlog.get_logger()


class State(enum.StrEnum):
    """What a poller does, as `bindings`, `doctor` and the console show it."""

    WAITING = "waiting"
    """A former owner of the partition may still poll the bot."""
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
    ENDED = "ended"
    """The poller is over."""


LONGEST_HOLD_MS = 60_000
"""Longest hold that is assumed after client timeouts. A poll that timed out gets twice the time, whatever the server
hints: a poll that is cut again and again may lose the answer that is just being written
(docs/reference/ilink-protocol.md, "Rules for a client")."""
ON_TIME_MS = 5_000
"""An idle poll answered at most this long after the hinted hold confirms the hint."""
INSTANT_S = 0.5
"""An answer without news within this time was no long poll. The poller then slows down."""
AFTER_CANCEL_S = 0.2
"""Pause between a poll that was cut and the bot's next poll."""
END_GRACE_S = 1.0
"""Time of a poller that was cancelled to tell others of its end."""
DEAD_PATH_AFTER = 3
"""Consecutive client timeouts without any answer after which the connection counts as dead
(docs/reference/ilink-protocol.md, "getupdates")."""
ANSWER_GRACE_S = 0.2
"""Time for a poll that is cut to bring an answer that has arrived. After a pause of the process the answer may lie in
the socket, and iLink may count it as delivered."""
NOTIFY_S = 1.5
"""Longest wait for iLink's answer to a notification, which is best effort (docs/reference/ilink-protocol.md, "Online
state")."""
TURN_S = 0.01
"""Time for the loop to read its sockets. uvloop runs a timer of 0 before that."""


class Wish(enum.IntEnum):
    """What others want of a poller. A later one includes the earlier ones."""

    NONE = 0
    CUT = 1
    """A pause or poll ends, since what it was made for has changed."""
    STOP = 2
    """The poller ends at the next poll boundary."""
    STOP_NOW = 3
    """It ends, and a poll that waits is cut."""


class _Shown(msgspec.Struct):
    """What a poller does, for operators."""

    state: State
    since: float
    """Monotonic time since which it is in this state."""
    why: str = ""
    """Why it is in this state, if that is not the usual one."""


class _Pace(msgspec.Struct):
    """What the last polls tell about the next one."""

    failures: int = 0
    """Failed steps in a row."""
    has_failed: bool = False
    """The last poll, or what its answer asked for, has failed."""
    timeouts: int = 0
    """Consecutive polls without any answer."""
    hold_ms: int = HOLD_MS
    instants: int = 0
    """Consecutive polls answered at once without news."""


class BotPoller:
    """Polls one bot, from when its partition begins until it is another replica's, and a poll that is out has
    ended."""

    def __init__(
        self,
        bot: str,
        parts: Parts,
        person_of: Callable[[Binding], Person | None],
        on_session_changed: Callable[[Binding], None],
    ) -> None:
        """`person_of`: the person of a binding once their partition has begun; None: another replica owns it.
        `on_session_changed`: called when a bot may or may no longer send, as its token is refused or taken again."""
        self.bot = bot
        self.person: Person | None = None
        """Set once the bot is taken."""
        self.session = BotSession()
        self.shown = _Shown(State.WAITING, parts.clock.monotonic())
        self.unanswered_since = 0.0
        """Monotonic time since which iLink owes an answer to a poll: the time of the last answer, or of the end of a
        pause."""
        self.is_out = False
        """A poll is out, or its answer is not stored yet."""
        self.unstored = 0
        """Messages of an answer that is not stored yet."""
        self._parts = parts
        self._person_of = person_of
        self._wish = Wish.NONE
        self._wake = ChangeSignal()
        """A pause is to end: `_wish` has changed."""
        self._waiting: asyncio.Task[Any] | None = None
        """This poller's task while a poll is out that `_end_poll` may cut."""
        self._binding: Binding | None = None
        """The last one; an unbind deletes it before the poller ends."""
        self._is_announced = False
        """iLink has confirmed that the bot is polled."""
        self._pace = _Pace()
        self._refused = RefusedToken(bot, parts, self.session, on_session_changed)

    # for others -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.shown.state

    def stopping(self) -> bool:
        """The poller ends at the next poll boundary."""
        return self._wish >= Wish.STOP

    @property
    def partition(self) -> int:
        """The partition of the person; -1: it has not begun."""
        return self.person.tenure.number if self.person is not None else -1

    @property
    def is_given_away(self) -> bool:
        """The partition in which it polls is another replica's, or nobody's."""
        return self.person is not None and self.person.tenure.is_over

    @property
    def has_answer(self) -> bool:
        """An answer of iLink is not stored yet, or not even read."""
        return self.state is State.STORING or self._parts.chat.has_answer(self.bot)

    def stop(self, *, immediately: bool) -> None:
        """Asks the poller to end at the next boundary or pause; with `immediately` also cuts a poll that waits."""
        is_cut = immediately or self._waiting is None
        self._wish = max(self._wish, Wish.STOP_NOW if is_cut else Wish.STOP)
        if is_cut:
            self.cancel_poll()

    def cancel_poll(self, *, for_lease: bool = False) -> None:
        """Ends a pause at once, and a poll after ANSWER_GRACE_S; not `for_lease` if that is valid again by then."""
        if not self.stopping():
            self._wish = Wish.CUT
        elif self._wish is Wish.STOP:
            self._wish = Wish.STOP_NOW
        self._wake.notify_all()
        if self._waiting is not None:
            loop = asyncio.get_running_loop()
            # After everything that is due by then. Otherwise an answer would be dropped that was read but has not
            # woken the poller, or that arrived while the loop was busy: uvloop runs timers before it reads sockets.
            end = partial(loop.call_soon, self._end_poll, for_lease)
            loop.call_later(ANSWER_GRACE_S, lambda: loop.call_later(TURN_S, end))

    def _leave(self, gone: Gone) -> None:
        if self.person is not None:
            self.person.leave(gone)

    # the life of a poller ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the bot until it must stop, or its binding or partition is gone. One unit of work: never raises.

        It is ended by `stop`. Cancellation would drop an answer that iLink may count as delivered.
        """
        sessions = self._parts.sessions
        sessions.polled[self.bot] = self.session
        self.session.poll_now, self.session.leave = self.cancel_poll, self._leave
        try:
            await self._serve()
        finally:
            self._refused.end()
            self.session.is_taken = False
            self.session.poll_now = self.session.leave = None  # breaks a reference cycle
            await shield_with_grace(self._announce_end(), END_GRACE_S)
            sessions.forget(self.bot, self.session)
            self._enter(State.ENDED)

    async def _serve(self) -> None:
        """One poll after the other. The one place where they fail."""
        parts, pace = self._parts, self._pace
        while not self.stopping() and parts.bindings.get(self.bot) is not None:
            retry_after_s = None
            try:
                while (binding := await self._prepare()) is not None and self.person is not None:
                    with self._turn():
                        await self._poll_once(binding, self.person)
                return
            except LeaseLost as exc:
                log.info("poller.fenced", bot=self.bot, reason=exc.reason)
                return
            except AdapterError as exc:
                await parts.ticks.wait_tick()  # iLink may have closed all connections at once
                problem, retry_after_s = str(exc), getattr(exc, "retry_after_s", None)
                failure = {"reason": exc.reason, "detail": exc.detail}
            except Exception as exc:
                problem = f"crashed: {type(exc).__name__}"
                failure = {"reason": "crashed", "detail": type(exc).__name__}
                log.exception("poller.crashed", bot=self.bot)
                self.person, self.session.is_taken = None, False  # it is read anew
            pace.failures += 1
            self._enter(State.RETRYING, problem)
            log.warning("poll.failed", bot=self.bot, host=self._host(), **failure, failures=pace.failures)
            wait_s = retry_after_s or backoff(pace.failures, first_s=0.5, longest_s=30.0)
            if not self.stopping():
                await self._pause(wait_s + parts.clock.jitter(wait_s / 2))
            self._end_cut()
            await parts.ticks.wait_tick()

    async def _prepare(self) -> Binding | None:
        """Does all that comes before a poll, and returns the binding to poll with; None: the poller must stop, or the
        bot is not bound. Raises LeaseLost, Refused, Temporary."""
        parts = self._parts
        serving = parts.bindings.get(self.bot)
        person = self.person
        if person is None or person.tenure.is_over or (serving is not None and serving.key != person.key):
            if (person := await self._take_bot()) is None:
                return None
            self.person = person
            await self._pause(parts.starts.reserve_delay_s())
            if not self.stopping():
                await self._notify(start=True)
        self.unanswered_since = self.unanswered_since or parts.clock.monotonic()
        assert self.person is not None
        binding = await self._wait_until_pollable(self.person)
        if binding is not None and self.person.user and not binding.user:
            binding = await self._learn_user(binding, self.person.user)
        return binding

    async def _learn_user(self, binding: Binding, user: str) -> Binding:
        """Adds the user whom the first message has told. Raises LeaseLost, Temporary."""
        self._check()
        learned = await self._parts.bindings.update(
            self.bot,
            lambda now: None if now.user or now.key != binding.key else msgspec.structs.replace(now, user=user),
        )
        return learned or binding

    def _enter(self, state: State, why: str = "") -> None:
        if state is not self.state:
            self.shown = _Shown(state, self._parts.clock.monotonic())
        self.shown.why = why

    def _check(self) -> None:
        """Raises LeaseLost unless this replica owns the person's partition now."""
        assert self.person is not None
        self.person.tenure.check()

    # taking -----------------------------------------------------------------------------------------

    async def _take_bot(self) -> Person | None:
        """The bot's person, once no former owner can have a poll of the bot; None: the poller must stop. Raises
        Temporary, LeaseLost, Refused."""
        parts = self._parts
        if not self.stopping():  # else `_announce_end` does
            await self._publish_polled()  # a poll of before may have been out
        while not self.stopping() and (binding := parts.bindings.get(self.bot)) is not None:
            parts.sessions.account(binding)  # who cannot open the bot's token does not poll
            self._enter(State.WAITING, self.shown.why)
            if (person := self._person_of(binding)) is None:
                raise LeaseLost("partition_lost", self.bot)
            handover, tenure = person.handover, person.tenure
            if tenure.is_over:
                raise LeaseLost("partition_lost", self.bot)
            was_given = not handover.may_poll(self.bot)
            if was_given:
                self._enter(State.WAITING, "A former owner of its partition may still poll it.")
                await self._wait_until(handover.changed, partial(self._may_begin, person))
            if tenure.is_over:
                raise LeaseLost("partition_lost", self.bot)
            if self.stopping() or not handover.may_poll(self.bot):
                continue
            async with parts.takeovers:
                await person.open()
                if was_given:
                    await person.read_newest()  # the former owner's poll may have brought something
            self.session.is_taken = True
            self._end_cut()
            return person
        return None

    def _may_begin(self, person: Person) -> bool:
        """Whether nobody else polls the bot, or the partition is lost."""
        return person.handover.may_poll(self.bot) or person.tenure.is_over

    # polling ----------------------------------------------------------------------------------------

    async def _wait_until_pollable(self, person: Person) -> Binding | None:
        """The binding to poll with, once the bus accepts writes and the lease is valid. A token that iLink has
        refused is polled after a pause and a notifystart (`refused_token`).

        None: the poller must stop, or the bot is no longer bound. Raises Temporary.
        """
        parts, bindings, clock, is_due = self._parts, self._parts.bindings, self._parts.clock, False
        while not self.stopping():
            if not parts.is_writable():
                self._enter(State.PAUSED, "NATS accepts no writes.")
                await wait_any(parts.wait_writable(), self._wake.wait_until(self.stopping))
                continue
            tenure = person.tenure
            if tenure.is_over:
                raise LeaseLost("lease_lost", self.bot)
            if not tenure.is_valid:
                self._enter(State.PAUSED, "The lease of its partition is not valid.")
                await self._wait_until(tenure.changed, tenure.is_settled)
                await self._pause(parts.starts.reserve_delay_s())
                await parts.ticks.wait_tick()
                self.unanswered_since = clock.monotonic()
                continue
            binding, refused = bindings.get(self.bot), self._refused
            if binding is None or binding.key != person.key:
                return binding
            self._binding = binding
            if person.gone:  # until the unbind is applied, or given up
                self._enter(State.PAUSED, "The person is being unbound.")
                await self._wait_until(bindings.changed, self._is_back(person, binding))
                self._end_cut()
                continue
            if binding.event_pending:
                binding = await publish_login_event(bindings, parts.events, binding, refused.words)
            refused.check_binding(binding)
            if refused.is_verdict_due:
                self._check()  # another replica may poll by now
                await mark_login(bindings, clock, binding, "needs_login")
                continue  # its event has the words of the refusal
            if is_due:
                await self._notify(start=True, even_stale=True)
            if is_due or (binding.state != "needs_login" and not refused):
                return binding
            if refused:
                self._enter(State.STALE, refused.words)
            else:
                self._enter(State.NEEDS_LOGIN, binding.reason)
            pause_s = refused.pause_s(binding)
            is_due = not await self._wait_until(bindings.changed, self._is_rebound(binding), pause_s)
            self._end_cut()  # the loop checks the reason again
            self.unanswered_since = clock.monotonic()
        return None

    async def _poll_once(self, binding: Binding, person: Person) -> None:
        """One long poll, and what its answer asks for. Raises LeaseLost, Refused, Temporary."""
        pace, began = self._pace, self._parts.clock.monotonic()
        if binding.key != person.key or person.gone:
            return  # the bot serves another person, whom `_prepare` takes, or nobody
        if not pace.has_failed:  # only what comes before a poll
            pace.failures = 0
        pace.has_failed = True  # until all of it is done
        if binding.state == "needs_login":
            self._enter(State.NEEDS_LOGIN, binding.reason)
        elif self._refused:
            self._enter(State.STALE, self._refused.words)
        elif pace.failures or pace.timeouts >= DEAD_PATH_AFTER:
            self._enter(State.RETRYING, self.shown.why)
        else:
            self._enter(State.POLLING)
        try:
            await self._poll_and_store(binding, person, began)
        finally:
            self.is_out, self.unstored = False, 0

    async def _poll_and_store(self, binding: Binding, person: Person, began: float) -> None:
        """As `_poll_once`."""
        parts, pace, started = self._parts, self._pace, person.position
        try:
            polled = await self._poll(binding, self._cursor_of(person, binding))
        except SessionExpired as exc:
            parts.metrics.polls.labels(outcome="stale_token").inc()
            await self._refused.refused(exc)
            return
        except Temporary:
            parts.metrics.polls.labels(outcome="error").inc()
            raise
        if polled is None:
            await self._on_no_answer()
            return
        pace.timeouts = 0
        self.unanswered_since = self.session.polled_at = now = parts.clock.monotonic()
        parts.sessions.changed.notify_all()
        is_new, has_news = polled.cursor not in (None, person.state.cursor), True
        if polled.messages:
            parts.metrics.polls.labels(outcome="messages").inc()
            pace.hold_ms = max(pace.hold_ms, polled.hold_ms)
            self.unstored = len(polled.messages)
            self._enter(State.STORING)
            await parts.ticks.wait_tick()
            has_news = await Receiver(self.bot, person, parts, polled, binding, started).receive()
            self._enter(State.POLLING)
        else:
            parts.metrics.polls.labels(outcome="empty").inc()
            is_on_time = (now - began) * 1000 <= polled.hold_ms + ON_TIME_MS
            pace.hold_ms = polled.hold_ms if is_on_time else max(pace.hold_ms, polled.hold_ms)
            await parts.wakeups.wait_for_batch()
            if polled.cursor is not None and person.position <= started:  # else another owner's is newer
                person.on_cursor(self.bot, polled.cursor)
        await self._refused.accepted(binding, person.tenure)
        if polled.overlong:  # iLink may repeat the same messages for ever
            raise Temporary("cursor_too_long", f"The cursor has {polled.overlong} characters and cannot be kept.")
        if not has_news:
            raise Temporary("repeated", "iLink has only repeated what is known, with the same cursor.")
        pace.failures, pace.has_failed = 0, False
        is_instant = now - began < INSTANT_S and not (polled.messages and is_new)
        pace.instants = pace.instants + 1 if is_instant else 0
        if pace.instants > 1:
            await self._pause(0.25 + parts.clock.jitter(0.25))
        if not (self._is_announced or polled.messages or self.stopping()):
            await self._notify(start=True)  # one client had its sends refused until iLink knew of the bot

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """From before a poll until what it has brought is stored and published: an unbind waits for its end."""
        self.session.is_polling = True
        try:
            yield
        finally:
            self.session.is_polling = False
            self._parts.sessions.changed.notify_all()

    def _cursor_of(self, person: Person, binding: Binding) -> str:
        """iLink's newest cursor; that of the bind as long as neither entry nor record has one."""
        parts, context = self._parts, cursor_context(self.bot)
        if person.state.bot == self.bot and person.state.cursor is not None:
            return person.state.cursor
        try:
            if binding.start_cursor:
                return parts.sealer.open(context, binding.start_cursor)
        except Refused as exc:
            log_once("cursor.unopenable", bot=self.bot, detail=exc.detail)
        return ""

    async def _poll(self, binding: Binding, cursor: str) -> Polled | None:
        """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost,
        Refused."""
        account = self._parts.sessions.account(binding)
        self._check()
        if self._is_cut:
            return None
        self.is_out = True
        task = self._waiting = asyncio.current_task()
        assert task is not None
        try:
            polled = await self._parts.chat.poll(account, cursor, self._pace.hold_ms)
        except asyncio.CancelledError:
            polled = None
        finally:
            if self._waiting is None:  # it was cut, and may have ended with an answer all the same
                task.uncancel()
            self._waiting = None
        if task.cancelling():  # the poller is to end
            raise asyncio.CancelledError
        return polled

    def _end_poll(self, for_lease: bool) -> None:
        """Ends the waiting poll, even one that began after `cancel_poll`, since the reason still holds; not one that
        has its answer."""
        if for_lease and self.person is not None and self.person.tenure.is_valid:
            return  # it never belonged to another replica
        if self._waiting is not None and self._is_cut and not self.has_answer:
            waiting, self._waiting = self._waiting, None
            waiting.cancel()

    async def _on_no_answer(self) -> None:
        """Handles a poll that was cut, or got no answer within its hold and the client's margin."""
        parts, pace = self._parts, self._pace
        if self._is_cut:
            self._end_cut()
            # iLink may see the new poll before the old connection ends, and report two pollers
            await self._pause(AFTER_CANCEL_S)
            await parts.ticks.wait_tick()
            return
        pace.timeouts += 1
        pace.hold_ms = min(LONGEST_HOLD_MS, 2 * pace.hold_ms)
        parts.metrics.polls.labels(outcome="client_timeout").inc()
        if pace.timeouts >= DEAD_PATH_AFTER:
            log.warning("poll.dead_path", bot=self.bot, host=self._host(), timeouts=pace.timeouts)
            self.shown.why = f"iLink has not answered {pace.timeouts} polls in a row."

    # the end ----------------------------------------------------------------------------------------

    async def _announce_end(self) -> None:
        """Tells other replicas, and iLink if nobody polls the bot from now on."""
        parts, person = self._parts, self.person
        is_gone = person is not None and parts.bindings.get(self.bot) is None
        if is_gone:  # before a later bind may poll elsewhere
            await self._notify(start=False)
        await self._publish_polled()
        is_last = person is not None and person.tenure.is_over and not parts.presence.counting()
        if is_last and not is_gone:
            await self._notify(start=False)  # otherwise the next owner has already told iLink that it polls

    async def _publish_polled(self) -> None:
        """Tells the next owner of the partition that no poll of the bot is out here any more."""
        if (person := self.person) is not None and person.tenure.is_over:
            await say_polled(self._parts, person.tenure.number, bot=self.bot)

    # small things -----------------------------------------------------------------------------------

    async def _notify(self, *, start: bool, even_stale: bool = False) -> None:
        """Tells iLink that polling starts or stops. Best effort, and not for a token that is known to be dead."""
        parts, binding = self._parts, self._parts.bindings.get(self.bot) or self._binding
        if binding is None or not (even_stale or binding.state == "active"):
            return
        try:
            async with asyncio.timeout(NOTIFY_S):
                await parts.chat.notify(parts.sessions.account(binding), start=start)
            self._is_announced = start
        except (AdapterError, TimeoutError) as exc:
            reason = exc.reason if isinstance(exc, AdapterError) else "timeout"
            log.info("notify.failed", bot=self.bot, host=self._host(), start=start, reason=reason)

    def _host(self) -> str:
        """Where iLink is for the bot, for the log."""
        binding = self._parts.bindings.get(self.bot)
        return self._parts.chat.host_of(binding.base_url) if binding is not None else ""

    @property
    def _is_cut(self) -> bool:
        return self._wish in (Wish.CUT, Wish.STOP_NOW)

    def _end_cut(self) -> None:
        """What was cut is over; a wish to stop stays."""
        if self._wish is Wish.CUT:
            self._wish = Wish.NONE

    def _is_rebound(self, binding: Binding) -> Callable[[], bool]:
        """A condition: the bot's binding differs from `binding`."""
        return lambda: self._parts.bindings.get(binding.bot) != binding

    def _is_back(self, person: Person, binding: Binding) -> Callable[[], bool]:
        """A condition: the person goes on, or the bot's binding differs."""
        is_rebound = self._is_rebound(binding)
        return lambda: not person.gone or is_rebound()

    async def _pause(self, seconds: float) -> None:
        """Waits, unless `cancel_poll` was called."""
        await self._wake.wait_until(lambda: self._is_cut, seconds)

    async def _wait_until(
        self, change: ChangeSignal, holds: Callable[[], bool], timeout_s: float | None = None
    ) -> bool:
        """Waits until `holds()` or the poller must stop; False after `timeout_s` seconds."""
        return await change.wait_until(lambda: self.stopping() or holds(), timeout_s, also=self._wake)
