"""Polls iLink for one bot and stores each answer in the bot's journal. Knows neither HTTP nor NATS.

The supervisor runs `tend` for each bot of the replica's shards. A poller goes through these steps:

1. It takes the bot (`taking.take`): once no other replica polls it, its journal gets this replica's name.
2. It announces itself to iLink (notifystart), and polls in a loop (`poll_forever`).
3. An answer with messages is stored in the journal before the next poll, which acknowledges it to iLink. The
   dispatcher does the rest beside that poll. The poller pauses while the dispatcher has a backlog, while the bus does
   not accept writes, and while the lease is not valid.
4. When iLink refuses the token (-14), `recover` retries a few times and then marks the binding `needs_login`. The
   poller then waits for another binding.
5. When it has to leave, or the binding or the shard is gone, it gives the bot back (`taking.give_back`).

A poll that waits is cut only for a reason that cannot wait, since iLink may count an answer as delivered that nobody
reads. An answer that arrived is always stored, even if the service stops or the bot is lost: a new owner dispatches
it then (`BotJournal.store_late`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import structlog

from adapter.bindings.stale_token import mark_active, mark_needs_login, publish_login_event, should_report_needs_login
from adapter.contract.records import Binding
from adapter.errors import AdapterError, BusRefused, LeaseLost, SessionExpired, Temporary
from adapter.inbound.bot_journal import Answer, BotJournal
from adapter.inbound.inbox import retry
from adapter.inbound.sessions import InboundDeps, Session, check_owned, notify, rebound, wait_until
from adapter.inbound.taking import give_back, take
from adapter.kit.timing import backoff, shield_with_grace, wait_event
from adapter.ports import Polled

log = structlog.get_logger()

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
STALE_RETRY_S = (5.0, 30.0, 300.0)
"""Pauses between retries of a token that iLink has refused. They are few, since most such tokens stay dead. The last
retry comes after the event `needs_login`."""
NOTIFY_S = 1.5
"""Longest wait for iLink's answer to notifystart, which is best effort (docs/reference/ilink-protocol.md, "Online
state")."""
AFTER_CUT_S = 0.2
"""Pause between a poll that was cut and the bot's next poll."""
NOTED_WITHIN_S = 60.0
"""Time after the last message until the journal gets a cursor that came without messages, and the dispatched
sequence."""
DEAD_PATH_AFTER = 3
"""Consecutive client timeouts without any answer after which the connection counts as dead
(docs/reference/ilink-protocol.md, "getupdates")."""


async def tend(session: Session, deps: InboundDeps) -> None:
    """Serves one bot until it is told to leave, or its binding or shard is gone. One unit of work: never raises.

    It is ended by `Session.leave`. Cancellation would drop a batch that iLink may count as delivered.
    """
    try:
        await _tend(session, deps)
    finally:
        if session.journal is not None:
            await shield_with_grace(give_back(session, session.journal, deps), deps.waits.grace_s)


async def _tend(session: Session, deps: InboundDeps) -> None:
    failures = 0
    while not session.leaving:
        try:
            await _serve(session, deps)
            failures = 0
        except LeaseLost as exc:
            log.info("poller.fenced", bot=session.bot, reason=exc.reason)
            if session.dispatcher is not None:
                session.dispatcher.stop()  # another replica may dispatch by now
            return
        except AdapterError as exc:
            failures += 1
            session.state = "error"
            log.warning("poller.failed", bot=session.bot, reason=exc.reason, detail=exc.detail, failures=failures)
        except Exception:
            failures += 1
            session.state = "error"
            log.exception("poller.crashed", bot=session.bot, failures=failures)
            if session.dispatcher is not None:  # the cached journal state may be at fault: it is read again
                session.dispatcher.stop()
            session.journal = None
        if deps.bindings.get(session.bot) is None:
            return
        if failures:
            await wait_event(session.cut, backoff(failures, first_s=0.5) + deps.clock.jitter(0.5))
            session.cut.clear()


async def _serve(session: Session, deps: InboundDeps) -> None:
    journal = session.journal or await take(session, deps)
    if journal is None:
        return
    await wait_event(session.cut, deps.pacing.starts.reserve_delay_s())
    if not session.leaving:
        await _announce(session, deps)
    await poll_forever(session, journal, deps)


async def _announce(session: Session, deps: InboundDeps) -> None:
    """Tells iLink that polling begins."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(NOTIFY_S):
            await notify(session, deps, start=True)


class _Lately(msgspec.Struct):
    """State of the polling loop."""

    failures: int = 0
    timeouts: int = 0
    """Consecutive polls without any answer."""
    hold_ms: int = 0
    """Longest hold of the server that client timeouts suggest; 0: the server's hint is right."""
    unannounced: int = 0
    """Answered polls since notifystart was tried in vain."""
    instants: int = 0
    """Consecutive polls answered at once without news."""
    note_at: float = 0.0
    """Monotonic time since which the journal lacks a newer cursor or dispatched sequence; 0: it is up to date."""
    overlong: int = 0
    """Length of the last answered cursor, if it was too long to keep; else 0."""


async def poll_forever(session: Session, journal: BotJournal, deps: InboundDeps) -> None:
    """Polls until the poller must leave or the binding is gone. Raises LeaseLost, Refused, Temporary."""
    lately, hold_ms = _Lately(), HOLD_MS
    session.answered = session.answered or deps.clock.monotonic()
    while (binding := await _wait_for_turn(session, deps)) is not None:
        if session.has_late:
            session.has_late = False
            await retry(journal.adopt_late, deps.clock)
        if session.begun_at != binding.start_cursor:
            session.begun_at = binding.start_cursor
            journal.begin_at(binding, deps.sealer)
        unheard = lately.failures or lately.overlong or lately.timeouts >= DEAD_PATH_AFTER
        session.state, began = "error" if unheard else "polling", deps.clock.monotonic()
        waits_ms = max(hold_ms, lately.hold_ms)
        try:
            polled = await _poll_once(session, binding, journal.cursor, waits_ms, deps)
        except SessionExpired as exc:
            deps.metrics.polls.labels(outcome="stale_token").inc()
            polled = await recover(session, exc, journal.cursor, waits_ms, deps)
            if polled is None:
                continue
        except Temporary as exc:
            await _failed(session, exc, lately, deps)
            continue
        if polled is None:
            await _unanswered(session, lately, waits_ms, deps)
            continue
        _record_answer(session, polled, lately, deps)
        if not polled.messages and (session.answered - began) * 1000 <= hold_ms + ON_TIME_MS:
            lately.hold_ms = 0
        hold_ms = polled.hold_ms
        is_new = polled.cursor not in (None, journal.cursor)
        if polled.messages:
            await deps.pacing.turns.wait_turn()
            serves = deps.bindings.get(session.bot)
            sandbox = serves.sandbox if serves is not None else ""
            await _store(session, Answer(polled, sandbox, deps.clock.now_ms()), journal, deps)
        else:
            if polled.cursor is not None and is_new:
                journal.cursor, lately.note_at = polled.cursor, lately.note_at or began
            await deps.pacing.wakeups.wait_for_batch()
        if polled.share is not None:
            polled.share.release()
        if lately.note_at or not journal.is_noted:
            await _note(journal, lately, deps)
        is_instant = session.answered - began < INSTANT_S and not (polled.messages and is_new)
        lately.instants = lately.instants + 1 if is_instant else 0
        if lately.instants > 1:
            await wait_event(session.cut, 0.25 + deps.clock.jitter(0.25))
        if not session.announced and not session.leaving:
            # one client had its sends refused until iLink knew of the bot, others never notify: retry ever more
            # rarely
            lately.unannounced += 1
            if lately.unannounced.bit_count() == 1:
                await _announce(session, deps)
        del polled  # frees a large answer during the next poll
        if session.dispatcher is not None and not session.dispatcher.has_room():
            await wait_until(session, session.dispatcher.changed, session.dispatcher.has_room)


async def _store(session: Session, answer: Answer, journal: BotJournal, deps: InboundDeps) -> None:
    """Stores an answer in the journal, after the end of a pause of the lease if there is one. If the bot was lost,
    the answer is stored under the new owner's name, since iLink may not deliver it again. Raises LeaseLost."""
    lost: LeaseLost | None = None
    for record in journal.records_of(answer):
        while lost is None:
            try:
                await retry(partial(journal.store, record), deps.clock)
                break
            except LeaseLost as exc:
                await deps.leases.changed.wait_until(lambda: deps.leases.is_valid)
                if exc.reason != "lease_lost" or deps.leases.incarnation != journal.owner:
                    log.warning("inbound.fenced", bot=session.bot, reason=exc.reason)
                    lost = exc
        if lost is not None:
            await retry(partial(journal.store_late, record), deps.clock)
    if lost is not None:
        await deps.others.publish_released(session.bot)
        raise lost


async def _note(journal: BotJournal, lately: _Lately, deps: InboundDeps) -> None:
    """Stores a cursor that came without messages, and the dispatched sequence, after NOTED_WITHIN_S. Raises
    LeaseLost, Temporary."""
    now = deps.clock.monotonic()
    if journal.is_noted:
        lately.note_at = 0.0
    elif now - (lately.note_at or now) > NOTED_WITHIN_S:
        await retry(journal.note, deps.clock)
        try:
            await journal.delete_needless()
        except Temporary as exc:  # the next note tries again
            log.warning("journal.not_trimmed", bot=journal.bot, reason=exc.reason)
    else:
        lately.note_at = lately.note_at or now


async def _failed(session: Session, exc: Temporary, lately: _Lately, deps: InboundDeps) -> None:
    """Waits after a failed poll."""
    await deps.pacing.turns.wait_turn()  # iLink may have closed all connections at once
    lately.failures += 1
    deps.metrics.polls.labels(outcome="error").inc()
    wait_s = exc.retry_after_s or backoff(lately.failures, first_s=0.5, longest_s=30.0)
    if lately.failures.bit_count() == 1:  # at 1, 2, 4 …: thousands of polls fail together while iLink is down
        log.warning("poll.failed", bot=session.bot, reason=exc.reason, detail=exc.detail, failures=lately.failures)
    await wait_event(session.cut, wait_s + deps.clock.jitter(wait_s / 2))
    await deps.pacing.turns.wait_turn()


async def _unanswered(session: Session, lately: _Lately, waited_ms: int, deps: InboundDeps) -> None:
    """Handles a poll that was cut, or got no answer within `waited_ms` and the client's margin."""
    if session.cut.is_set():
        session.cut.clear()
        # iLink may see the new poll before the old connection ends, and report two pollers
        await wait_event(session.cut, AFTER_CUT_S)
        await deps.pacing.turns.wait_turn()
        return
    lately.timeouts += 1
    lately.hold_ms = min(LONGEST_HOLD_MS, 2 * waited_ms)
    deps.metrics.polls.labels(outcome="client_timeout").inc()
    if lately.timeouts >= DEAD_PATH_AFTER:
        log.warning("poll.dead_path", bot=session.bot, timeouts=lately.timeouts)
        await deps.chat.recycle(session.bot)


def _record_answer(session: Session, polled: Polled, lately: _Lately, deps: InboundDeps) -> None:
    """Records that iLink answered."""
    lately.failures = lately.timeouts = 0
    session.answered = session.polled_at = deps.clock.monotonic()
    (deps.metrics.polls_full if polled.messages else deps.metrics.polls_empty).inc()
    if polled.overlong and not lately.overlong:  # iLink may repeat the same messages for ever
        log.error("poll.cursor_too_long", bot=session.bot, characters=polled.overlong)
    if polled.overlong or polled.cursor:
        lately.overlong = polled.overlong


async def _wait_for_turn(session: Session, deps: InboundDeps) -> Binding | None:
    """The binding to poll with, once the bus accepts writes, the lease is valid and no login is needed.

    None: the poller must leave, or the bot is no longer bound. Raises Temporary.
    """
    while not session.leaving:
        session.state = "paused"  # visible only while something is awaited
        await deps.gate.wait_writable()
        if not deps.leases.is_valid:
            await wait_until(session, deps.leases.changed, lambda: deps.leases.is_valid)
            await wait_event(session.cut, deps.clock.jitter(deps.pacing.spread_s()))
            await deps.pacing.turns.wait_turn()
            session.answered = deps.clock.monotonic()
            continue
        binding = deps.bindings.get(session.bot)
        if binding is None or session.must_leave():
            break
        if binding.event_pending:
            binding = await publish_login_event(deps.bindings, deps.events, binding)
        if binding.state != "needs_login":
            return binding
        session.state, session.stale, session.served = "needs_login", False, binding
        await wait_until(session, deps.bindings.changed, rebound(binding, deps))
        session.answered = deps.clock.monotonic()
    return None


async def _poll_once(
    session: Session, binding: Binding, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost, Refused."""
    check_owned(deps, binding)
    session.served = binding
    account = session.account(binding, deps.sealer)
    if session.cut.is_set():
        return None
    session.polling = task = asyncio.current_task()
    try:
        polled = await deps.chat.poll(account, cursor, hold_ms)
        # otherwise the answer came just before the cut
        if task is not None and task.cancelling() and not session.was_cut():
            raise asyncio.CancelledError
        return polled
    except asyncio.CancelledError:
        if not session.was_cut():
            raise
        return None
    finally:
        session.polling = None


async def recover(
    session: Session, exc: SessionExpired, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """Handles -14: the bot neither polls nor sends except for a few spaced retries, and then needs a login.

    docs/reference/ilink-protocol.md, "Stale token", has what is known of -14. Retries after `needs_login` raise no
    event unless one succeeds, which makes the binding active again. Returns the answer of a successful poll; None:
    the binding changed or still needs a login. Raises LeaseLost, Refused.
    """
    binding = deps.bindings.get(session.bot)
    if binding is None or binding.state == "needs_login":
        return None
    session.stale, session.state = True, "error"
    deps.on_session_changed(binding)
    log.warning("session.stale", bot=session.bot, sandbox=binding.sandbox, detail=exc.detail)
    advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
    since = deps.clock.monotonic()
    await deps.events.publish_binding_event(binding.event("stale", reason=exc.detail, detail=advice))
    try:
        refusals = failures = 0
        while True:
            pause_s = deps.waits.stale_retry_s[refusals] if refusals < len(deps.waits.stale_retry_s) else None
            late = not failures and should_report_needs_login(pause_s, deps.clock.monotonic() - since)
            if late and binding.state == "active":
                lost = await _lose(session, binding, exc.detail, deps)
                if lost is None:
                    return None
                binding = lost
            if pause_s is None:
                return None
            with contextlib.suppress(TimeoutError):
                pause_s = max(pause_s, backoff(failures) if failures else 0.0)
                await wait_until(session, deps.bindings.changed, rebound(binding, deps), pause_s)
            if session.leaving or deps.bindings.get(session.bot) != binding:
                return None
            try:
                polled = await _try_again(session, binding, cursor, hold_ms, deps)
            except SessionExpired:
                refusals, failures = refusals + 1, 0
                continue
            if polled is None:  # no answer tells nothing about the token
                failures += 1
                hold_ms = min(LONGEST_HOLD_MS, 2 * hold_ms)  # or the server may hold longer
                session.cut.clear()
                continue
            await _regain(session, binding, deps)
            return polled  # even after a new bind: iLink may not deliver this answer again
    finally:
        session.stale = False
        if now := deps.bindings.get(session.bot):
            deps.on_session_changed(now)


async def _lose(session: Session, binding: Binding, detail: str, deps: InboundDeps) -> Binding | None:
    """The binding, marked `needs_login` with its event published; None: the binding changed, or the poller must
    leave.

    Raises LeaseLost.
    """
    lost = await _retry_here(session, partial(_lose_owned, binding, deps), deps)
    if lost is None:
        return None
    told = await _retry_here(session, partial(publish_login_event, deps.bindings, deps.events, lost, detail), deps)
    if told is not None:
        session.served, session.state = told, "needs_login"
    return told


async def _regain(session: Session, binding: Binding, deps: InboundDeps) -> None:
    """iLink accepts the token again: marks the binding active unless it was replaced. Raises LeaseLost."""
    log.info("session.recovered", bot=session.bot)
    session.stale = False
    if binding.state == "needs_login":
        # the next poll publishes the event
        await retry(partial(mark_active, deps.bindings, deps.clock, binding), deps.clock)
    else:
        await retry(partial(deps.events.publish_binding_event, binding.event("recovered")), deps.clock)


async def _try_again(
    session: Session, binding: Binding, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """notifystart, then one poll; None: no answer. Raises SessionExpired, LeaseLost, Refused."""
    await deps.gate.wait_writable()
    await notify(session, deps, start=True, even_stale=True)
    try:
        return await _poll_once(session, binding, cursor, hold_ms, deps)
    except Temporary as problem:
        log.info("session.unreachable", bot=session.bot, reason=problem.reason)
        return None


async def _retry_here(
    session: Session, work: Callable[[], Awaitable[Binding | None]], deps: InboundDeps
) -> Binding | None:
    """As `retry`, for work that the next owner can also do; None: the poller must leave."""

    async def attempt() -> Binding | None:
        try:
            return await work()
        except (Temporary, BusRefused):
            if session.leaving:
                return None
            raise

    return await retry(attempt, deps.clock)


async def _lose_owned(binding: Binding, deps: InboundDeps) -> Binding | None:
    """`mark_needs_login`, unless another replica may poll by now. Raises Temporary, LeaseLost."""
    check_owned(deps, binding)
    return await mark_needs_login(deps.bindings, deps.clock, binding)
