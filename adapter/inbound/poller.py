"""Polls iLink for one bot and stores each answer in the bot's journal. Knows neither HTTP nor NATS.

The supervisor runs `run_poller` for each bot of the replica's shards. A poller goes through these steps:

1. It takes the bot (`taking.take_bot`): once no other replica polls it, its journal gets this replica's name.
2. It announces itself to iLink (notifystart), and polls in a loop (`poll_forever`).
3. An answer with messages is stored in the journal before the next poll, which acknowledges it to iLink. The
   dispatcher does the rest beside that poll. The poller pauses while the dispatcher has a backlog, while the bus does
   not accept writes, and while the lease is not valid.
4. When iLink refuses the token (-14), `recover` retries a few times and then marks the binding `needs_login`. The
   poller then waits for another binding, and polls ever more rarely; a poll that succeeds makes the binding active.
5. When it has to stop, or the binding or the shard is gone, it releases the bot (`taking.release`).

A poll that waits is cut only for a reason that cannot wait, since iLink may count an answer as delivered that nobody
reads. An answer that arrived is always stored, even if the service stops or the bot is lost: a new owner dispatches
it then (`BotJournal.store_late`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
import structlog

from adapter.bindings.stale_token import mark_active, mark_needs_login, publish_login_event
from adapter.contract.records import Binding
from adapter.errors import AdapterError, BusRefused, LeaseLost, SessionExpired, Temporary
from adapter.inbound.bot_journal import Answer, BotJournal
from adapter.inbound.bot_poller import BotPoller, InboundDeps, check_owned, notify, rebound, wait_until
from adapter.inbound.inbox import retry
from adapter.inbound.taking import release, take_bot
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
NOTED_WITHIN_S = 60.0
"""Time after the last message until the journal gets a cursor that came without messages, and the dispatched
sequence."""
DEAD_PATH_AFTER = 3
"""Consecutive client timeouts without any answer after which the connection counts as dead
(docs/reference/ilink-protocol.md, "getupdates")."""


async def run_poller(poller: BotPoller, deps: InboundDeps) -> None:
    """Serves one bot until it must stop, or its binding or shard is gone. One unit of work: never raises.

    It is ended by `BotPoller.stop`. Cancellation would drop a batch that iLink may count as delivered.
    """
    try:
        await _poll_until_stopped(poller, deps)
    finally:
        poller.has_answer = False
        if poller.journal is not None:
            await shield_with_grace(release(poller, poller.journal, deps), RELEASE_GRACE_S)


async def _poll_until_stopped(poller: BotPoller, deps: InboundDeps) -> None:
    failures = 0
    while not poller.stopping:
        try:
            await _own_and_poll(poller, deps)
            failures = 0
        except LeaseLost as exc:
            log.info("poller.fenced", bot=poller.bot, reason=exc.reason)
            if poller.dispatcher is not None:
                poller.dispatcher.stop()  # another replica may dispatch by now
            return
        except AdapterError as exc:
            failures += 1
            poller.state, poller.problem = "error", _problem(exc)
            log.warning("poller.failed", bot=poller.bot, reason=exc.reason, detail=exc.detail, failures=failures)
        except Exception:
            failures += 1
            poller.state = "error"
            log.exception("poller.crashed", bot=poller.bot, failures=failures)
            if poller.dispatcher is not None:  # the cached journal state may be at fault: it is read again
                poller.dispatcher.stop()
            poller.journal = None
        if deps.bindings.serving(poller.bot) is None:
            return
        if failures:
            await wait_event(poller.poll_cancel, backoff(failures, first_s=0.5) + deps.clock.jitter(0.5))
            poller.poll_cancel.clear()


async def _own_and_poll(poller: BotPoller, deps: InboundDeps) -> None:
    journal = poller.journal or await take_bot(poller, deps)
    if journal is None:
        return
    await wait_event(poller.poll_cancel, deps.pacing.starts.reserve_delay_s())
    if not poller.stopping:
        await notify(poller, deps, start=True)
    await poll_forever(poller, journal, deps)


class _PollStats(msgspec.Struct):
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


async def poll_forever(poller: BotPoller, journal: BotJournal, deps: InboundDeps) -> None:
    """Polls until the poller must stop or the binding is gone. Raises LeaseLost, Refused, Temporary."""
    stats, hold_ms = _PollStats(), HOLD_MS
    poller.unanswered_since = poller.unanswered_since or deps.clock.monotonic()
    while (binding := await _wait_for_turn(poller, deps)) is not None:
        if poller.may_have_late_record:
            poller.may_have_late_record = False
            await retry(journal.adopt_late, deps.clock, poller.bot)
        if poller.applied_start_cursor != binding.start_cursor:
            poller.applied_start_cursor = binding.start_cursor
            journal.apply_start_cursor(binding, deps.sealer)
        is_failing = stats.failures or stats.overlong or stats.timeouts >= DEAD_PATH_AFTER
        poller.state, began = "error" if is_failing else "polling", deps.clock.monotonic()
        if binding.state == "needs_login":
            poller.state = "needs_login"
        expected_hold_ms = max(hold_ms, stats.hold_ms)
        try:
            polled = await _poll_once(poller, binding, journal.cursor, expected_hold_ms, deps)
        except SessionExpired as exc:
            deps.metrics.polls.labels(outcome="stale_token").inc()
            polled = await recover(poller, exc, journal.cursor, expected_hold_ms, deps)
            if polled is None:
                continue
        except Temporary as exc:
            await _wait_after_failure(poller, exc, stats, deps)
            continue
        if polled is None:
            await _on_no_answer(poller, stats, expected_hold_ms, deps)
            continue
        _record_answer(poller, polled, stats, deps)
        if not polled.messages and (poller.unanswered_since - began) * 1000 <= hold_ms + ON_TIME_MS:
            stats.hold_ms = 0
        hold_ms = polled.hold_ms
        is_new = polled.cursor not in (None, journal.cursor)
        if polled.messages:
            await deps.pacing.turns.wait_turn()
            serves = deps.bindings.get(poller.bot)
            sandbox = serves.sandbox if serves is not None else ""
            await _store(poller, Answer(polled, sandbox, deps.clock.now_ms()), journal, deps)
            poller.has_answer = False
            if poller.unanswered_since - began >= INSTANT_S:
                await asyncio.sleep(0)  # the dispatcher goes first: a person waits for it
        else:
            if polled.cursor is not None and is_new:
                journal.cursor, stats.note_at = polled.cursor, stats.note_at or began
            await deps.pacing.wakeups.wait_for_batch()
        if binding.state == "needs_login":  # the verdict was wrong, or is not true any more
            log.info("session.recovered", bot=poller.bot)
            await retry(partial(mark_active, deps.bindings, deps.clock, binding), deps.clock, poller.bot)
        if stats.note_at or not journal.is_noted:
            await _store_cursor_if_due(journal, stats, deps)
        is_instant = poller.unanswered_since - began < INSTANT_S and not (polled.messages and is_new)
        stats.instants = stats.instants + 1 if is_instant else 0
        if stats.instants > 1:
            await wait_event(poller.poll_cancel, 0.25 + deps.clock.jitter(0.25))
        if not poller.is_announced and not poller.stopping:
            # one client had its sends refused until iLink knew of the bot, others never notify: retry ever more
            # rarely
            stats.unannounced += 1
            if stats.unannounced.bit_count() == 1:
                await notify(poller, deps, start=True)
        del polled  # frees a large answer during the next poll
        if poller.dispatcher is not None and not poller.dispatcher.has_room():
            await wait_until(poller, poller.dispatcher.changed, poller.dispatcher.has_room)


async def _store(poller: BotPoller, answer: Answer, journal: BotJournal, deps: InboundDeps) -> None:
    """Stores an answer in the journal, after the end of a pause of the lease if there is one. If the bot was lost,
    the answer is stored under the new owner's name, since iLink may not deliver it again. Raises LeaseLost."""
    loss = ""
    for record in journal.records_of(answer):
        while not loss:
            try:
                await retry(partial(journal.store, record), deps.clock, poller.bot)
                break
            except LeaseLost as exc:
                await deps.leases.changed.wait_until(lambda: deps.leases.is_valid)
                if exc.reason != "lease_lost" or deps.leases.incarnation != journal.owner:
                    log.warning("inbound.fenced", bot=poller.bot, reason=exc.reason)
                    loss = exc.reason
        if loss:
            await retry(partial(journal.store_late, record), deps.clock, poller.bot)
    if loss:
        await deps.others.publish_released(poller.bot)
        raise LeaseLost(loss, poller.bot)


async def _store_cursor_if_due(journal: BotJournal, stats: _PollStats, deps: InboundDeps) -> None:
    """Stores a cursor that came without messages, and the dispatched sequence, after NOTED_WITHIN_S. Raises
    LeaseLost, Temporary."""
    now = deps.clock.monotonic()
    if journal.is_noted:
        stats.note_at = 0.0
    elif now - (stats.note_at or now) > NOTED_WITHIN_S:
        await retry(journal.note, deps.clock, journal.bot)
        try:
            await journal.delete_needless()
        except Temporary as exc:  # the next note tries again
            log.warning("journal.not_trimmed", bot=journal.bot, reason=exc.reason)
    else:
        stats.note_at = stats.note_at or now


async def _wait_after_failure(poller: BotPoller, exc: Temporary, stats: _PollStats, deps: InboundDeps) -> None:
    """Waits after a failed poll."""
    await deps.pacing.turns.wait_turn()  # iLink may have closed all connections at once
    stats.failures += 1
    poller.problem = _problem(exc)
    deps.metrics.polls.labels(outcome="error").inc()
    wait_s = exc.retry_after_s or backoff(stats.failures, first_s=0.5, longest_s=30.0)
    if stats.failures.bit_count() == 1:  # at 1, 2, 4 …: thousands of polls fail together while iLink is down
        log.warning("poll.failed", bot=poller.bot, reason=exc.reason, detail=exc.detail, failures=stats.failures)
    if not poller.stopping:
        await wait_event(poller.poll_cancel, wait_s + deps.clock.jitter(wait_s / 2))
    await deps.pacing.turns.wait_turn()


def _problem(exc: AdapterError) -> str:
    """As it is shown with the bot."""
    return f"{exc.reason}: {exc.detail}" if exc.detail else exc.reason


async def _on_no_answer(poller: BotPoller, stats: _PollStats, waited_ms: int, deps: InboundDeps) -> None:
    """Handles a poll that was cut, or got no answer within `waited_ms` and the client's margin."""
    if poller.poll_cancel.is_set():
        poller.poll_cancel.clear()
        # iLink may see the new poll before the old connection ends, and report two pollers
        await wait_event(poller.poll_cancel, AFTER_CANCEL_S)
        await deps.pacing.turns.wait_turn()
        return
    stats.timeouts += 1
    stats.hold_ms = min(LONGEST_HOLD_MS, 2 * waited_ms)
    deps.metrics.polls.labels(outcome="client_timeout").inc()
    if stats.timeouts >= DEAD_PATH_AFTER:
        log.warning("poll.dead_path", bot=poller.bot, timeouts=stats.timeouts)
        await deps.chat.recycle(poller.bot)


def _record_answer(poller: BotPoller, polled: Polled, stats: _PollStats, deps: InboundDeps) -> None:
    """Records that iLink answered."""
    stats.failures = stats.timeouts = 0
    poller.problem = ""
    poller.unanswered_since = poller.polled_at = deps.clock.monotonic()
    (deps.metrics.polls_full if polled.messages else deps.metrics.polls_empty).inc()
    if polled.overlong and not stats.overlong:  # iLink may repeat the same messages for ever
        log.error("poll.cursor_too_long", bot=poller.bot, characters=polled.overlong)
    if polled.overlong or polled.cursor:
        stats.overlong = polled.overlong


async def _wait_for_turn(poller: BotPoller, deps: InboundDeps) -> Binding | None:
    """The binding to poll with, once the bus accepts writes and the lease is valid. One that needs a login is polled
    by LOGIN_POLLS_S, with a notifystart before.

    None: the poller must stop, or the bot is no longer bound. Raises Temporary.
    """
    is_due = False
    while not poller.stopping:
        poller.state = "paused"  # visible only while something is awaited
        await deps.gate.wait_writable()
        if not deps.leases.is_valid:
            await wait_until(poller, deps.leases.changed, lambda: deps.leases.is_valid)
            await wait_event(poller.poll_cancel, deps.clock.jitter(deps.pacing.spread_s()))
            await deps.pacing.turns.wait_turn()
            poller.unanswered_since = deps.clock.monotonic()
            continue
        binding = deps.bindings.serving(poller.bot)
        if binding is None or poller.must_stop():
            break
        if binding.event_pending:
            binding = await publish_login_event(deps.bindings, deps.events, binding)
        if binding.state != "needs_login":
            return binding
        if is_due:
            await notify(poller, deps, start=True, even_stale=True)
            return binding
        poller.state, poller.last_binding = "needs_login", binding
        passed_s = max(0, deps.clock.now_ms() - binding.since_ms) / 1000
        try:
            pause_s = login_poll_in_s(passed_s, deps.waits.login_polls_s)
            await wait_until(poller, deps.bindings.changed, rebound(binding, deps), pause_s)
        except TimeoutError:
            is_due = True
        poller.unanswered_since = deps.clock.monotonic()
    return None


def login_poll_in_s(passed_s: float, polls_s: Sequence[float]) -> float:
    """Seconds until the next poll of a binding that has needed a login for `passed_s` seconds. Its time depends on
    nothing else, so that no takeover makes it earlier or later."""
    first_s, often_s, rarely_s = polls_s
    if passed_s < first_s:
        return first_s - passed_s
    every_s = often_s if passed_s < LOGIN_POLLED_OFTEN_S else rarely_s
    return every_s - passed_s % every_s


async def _poll_once(
    poller: BotPoller, binding: Binding, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost, Refused."""
    check_owned(deps, binding)
    poller.last_binding = binding
    account = poller.account(binding, deps.sealer)
    if poller.poll_cancel.is_set():
        return None
    poller.poll_task = task = asyncio.current_task()
    try:
        polled = await deps.chat.poll(account, cursor, hold_ms)
        poller.has_answer = bool(polled and polled.messages)
        # otherwise the answer came just before the cut
        if task is not None and task.cancelling() and not poller.was_poll_cancelled():
            raise asyncio.CancelledError
        return polled
    except asyncio.CancelledError:
        if not poller.was_poll_cancelled():
            raise
        return None
    finally:
        poller.poll_task = None


async def recover(
    poller: BotPoller, exc: SessionExpired, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """Handles -14: the bot neither polls nor sends except for a few spaced retries, and then needs a login.

    docs/reference/ilink-protocol.md, "Stale token", has what is known of -14. Returns the answer of a successful
    poll; None: the binding changed or needs a login, and `_wait_for_turn` says when it is polled again. Raises
    LeaseLost, Refused.
    """
    binding = deps.bindings.get(poller.bot)
    if binding is None or binding.state == "needs_login":
        return None
    poller.stale, poller.state = True, "error"
    deps.on_session_changed(binding)
    log.warning("session.stale", bot=poller.bot, sandbox=binding.sandbox, detail=exc.detail)
    advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
    await deps.events.publish_binding_event(binding.event("stale", reason=exc.detail, detail=advice))
    try:
        refusals = failures = 0
        while refusals < len(deps.waits.stale_retry_s):
            pause_s = max(deps.waits.stale_retry_s[refusals], backoff(failures) if failures else 0.0)
            with contextlib.suppress(TimeoutError):
                await wait_until(poller, deps.bindings.changed, rebound(binding, deps), pause_s)
            if poller.stopping or deps.bindings.get(poller.bot) != binding:
                return None
            try:
                polled = await _retry_token(poller, binding, cursor, hold_ms, deps)
            except SessionExpired:
                refusals, failures = refusals + 1, 0
                continue
            if polled is None:  # no answer tells nothing about the token
                failures += 1
                hold_ms = min(LONGEST_HOLD_MS, 2 * hold_ms)  # or the server may hold longer
                poller.poll_cancel.clear()
                continue
            log.info("session.recovered", bot=poller.bot)
            poller.stale = False
            await retry(
                partial(deps.events.publish_binding_event, binding.event("recovered")), deps.clock, poller.bot
            )
            return polled  # even after a new bind: iLink may not deliver this answer again
        lost = await _retry_unless_stopping(poller, partial(_mark_needs_login_if_owned, binding, deps), deps)
        if lost is not None:
            tell = partial(publish_login_event, deps.bindings, deps.events, lost, exc.detail)
            await _retry_unless_stopping(poller, tell, deps)
        return None
    finally:
        poller.stale = False
        if now := deps.bindings.get(poller.bot):
            deps.on_session_changed(now)


async def _retry_token(
    poller: BotPoller, binding: Binding, cursor: str, hold_ms: int, deps: InboundDeps
) -> Polled | None:
    """notifystart, then one poll; None: no answer. Raises SessionExpired, LeaseLost, Refused."""
    await deps.gate.wait_writable()
    await notify(poller, deps, start=True, even_stale=True)
    try:
        return await _poll_once(poller, binding, cursor, hold_ms, deps)
    except Temporary as problem:
        log.info("session.unreachable", bot=poller.bot, reason=problem.reason)
        return None


async def _retry_unless_stopping(
    poller: BotPoller, work: Callable[[], Awaitable[Binding | None]], deps: InboundDeps
) -> Binding | None:
    """As `retry`, for work that the next owner can also do; None: the poller must stop."""

    async def attempt() -> Binding | None:
        try:
            return await work()
        except (Temporary, BusRefused):
            if poller.stopping:
                return None
            raise

    return await retry(attempt, deps.clock, poller.bot)


async def _mark_needs_login_if_owned(binding: Binding, deps: InboundDeps) -> Binding | None:
    """`mark_needs_login`, unless another replica may poll by now. Raises Temporary, LeaseLost."""
    check_owned(deps, binding)
    return await mark_needs_login(deps.bindings, deps.clock, binding)
