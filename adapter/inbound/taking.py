"""Takes a bot from the replica that polled it before, and releases it.

The owner's name in the journal is the epoch of the fence: once a new name is written, every write of the previous
owner fails.
"""

from __future__ import annotations

from functools import partial

import structlog

from adapter.contract.records import Binding
from adapter.errors import BusRefused, Conflict, LeaseLost, Temporary
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.dispatcher import Dispatcher
from adapter.inbound.journal import JournalRecord, Written
from adapter.inbound.sessions import InboundDeps, Session, check_owned, notify
from adapter.kit.timing import backoff, wait_any

log = structlog.get_logger()

ASKED_EVERY = 12
"""Attempts to take a bot after which all replicas are asked for its poller. They last some 30 s, in which most polls
of bots that are handed over end, so that few of thousands ask."""
DISPATCH_S = 1.0
"""Time for what is nearly dispatched when a bot is released. The next owner finds the rest in the journal. An unbound
bot has no next owner, so its media get their full time."""
STORED_S = 10.0
"""Time for the conversations of an unbound bot to store what was dispatched; otherwise its journal stays."""


async def take(session: Session, deps: InboundDeps) -> BotJournal | None:
    """Writes this replica's name into the bot's journal, once no other replica can be polling; None: it must leave.

    Raises Temporary, LeaseLost, Refused.
    """
    looks = 0
    while not session.leaving:
        binding = deps.bindings.get(session.bot)
        if binding is None:
            return None
        check_owned(deps, binding)
        session.freed.clear()
        async with deps.pacing.takeovers:
            journal = await _take_once(session, binding, deps)
        if journal is not None:
            _begin_dispatch(session, journal, deps)
            return journal
        _caught_up(session, deps)  # the living owner has dispatched what there was
        looks += 1
        if looks % ASKED_EVERY == 0 and await _is_outdated(session.bot, deps):
            continue
        wait_s = backoff(looks, first_s=0.1, longest_s=4.0)
        await wait_any(session.cut.wait(), session.freed.wait(), timeout_s=wait_s + deps.clock.jitter(wait_s / 2))
        session.cut.clear()  # the loop checks the reason again
    return None


async def _take_once(session: Session, binding: Binding, deps: InboundDeps) -> BotJournal | None:
    """None: the poller of another replica has not stopped, or the journal changed meanwhile.

    Raises Temporary, Refused("token_key"). A replica that cannot open the bot's token does not change the journal.
    """
    last = await deps.journal.last(binding.bot)
    me = deps.leases.incarnation
    if last is not None and last.owner not in ("", me) and not await deps.leases.revoke_if_expired(last.owner):
        return None
    session.account(binding, deps.sealer)
    journal = BotJournal(
        binding.bot, deps.journal, deps.leases, last, deps.gate.record_bytes, partial(_on_written, session, deps)
    )
    journal.begin_at(binding, deps.sealer)
    session.begun_at = binding.start_cursor
    if last is not None and last.owner == me and journal.is_cursor_stored:
        return journal
    try:
        await journal.note()
    except LeaseLost:
        return None
    return journal


def _begin_dispatch(session: Session, journal: BotJournal, deps: InboundDeps) -> None:
    session.journal, session.dispatcher, session.has_late = journal, None, False
    if journal.last_heard > journal.done_to:
        session.is_catching_up = True
        _dispatcher(session, journal, deps).catch_up()
    else:
        _on_caught_up(session, deps)


def _dispatcher(session: Session, journal: BotJournal, deps: InboundDeps) -> Dispatcher:
    """The bot's dispatcher, made with the first message, since most bots are silent for long after a take-over."""
    if session.dispatcher is None:
        session.dispatcher = Dispatcher(journal, deps.dispatching, partial(_on_caught_up, session, deps))
        journal.progress = session.dispatcher
    return session.dispatcher


def _on_written(session: Session, deps: InboundDeps, written: Written) -> None:
    if session.is_handed_over:
        session.has_undispatched = True
    elif session.journal is not None:
        _dispatcher(session, session.journal, deps).offer(written)


def _on_caught_up(session: Session, deps: InboundDeps) -> None:
    _caught_up(session, deps)
    if binding := deps.bindings.get(session.bot):
        deps.conversations.wake_soon(binding)


def _caught_up(session: Session, deps: InboundDeps) -> None:
    if session.is_catching_up:
        session.is_catching_up = False
        if binding := deps.bindings.get(session.bot):
            deps.on_session_changed(binding)


async def _is_outdated(bot: str, deps: InboundDeps) -> bool:
    """Removes the owner's name from the journal if no replica polls the bot. Returns whether it did.

    The name may be outdated after a restore or the loss of the last writes; then nobody would ever release the bot. A
    replica that starts to poll meanwhile writes its name again when its next write fails. Raises Temporary.
    """
    last = await deps.journal.last(bot)
    if last is None or not last.owner or not await deps.others.is_idle(last.owner, bot):
        return False
    log.error("journal.outdated", bot=bot, owner=last.owner, detail="The owner is alive and does not poll the bot.")
    record, sequence = last.record, last.sequence
    disowned = JournalRecord(
        cursor=record.cursor,
        start=record.start,
        seen_at=record.seen_at if record.seen is None else sequence,
        seen_to=record.seen_to if record.seen is None else record.done_to,
        done_to=record.done_to,
        last_heard=sequence if record.messages else record.last_heard,
    )
    try:
        await deps.journal.append(bot, disowned, "", sequence)
    except Conflict:
        return False
    return True


async def _dispatched(session: Session, dispatcher: Dispatcher, deps: InboundDeps) -> None:
    """Waits for the media of an unbound bot, until it is bound again or the service stops; the journal has the
    rest."""

    def is_over() -> bool:
        return dispatcher.is_done or session.lingering or deps.bindings.get(session.bot) is not None

    await wait_any(
        dispatcher.changed.wait_until(is_over),
        deps.bindings.changed.wait_until(is_over),
        session.told.wait_until(is_over),
        timeout_s=deps.dispatching.media_wait_s,
    )


async def give_back(session: Session, journal: BotJournal, deps: InboundDeps) -> None:
    """Removes this replica's name from the journal, so that the next owner need not wait for the lease to expire.

    Retries until it succeeds, since no other replica can take the bot while this replica lives.
    """
    session.state = "draining"
    unbound = deps.bindings.get(session.bot) is None
    dispatcher = session.dispatcher or (_dispatcher(session, journal, deps) if unbound else None)
    if dispatcher is not None:
        if unbound:
            await _dispatched(session, dispatcher, deps)
        await dispatcher.drain(DISPATCH_S)
        if unbound and deps.bindings.get(session.bot) is None:
            await dispatcher.stored(STORED_S)
    failures = 0
    while True:
        ends = unbound and deps.bindings.get(session.bot) is None and journal.is_dispatched
        try:
            await journal.give_back(ttl_s=deps.waits.keep_s if ends else 0)
            if ends:
                await journal.delete_older()  # otherwise an older one is last when it expires
            break
        except LeaseLost:
            return
        except (Temporary, BusRefused) as exc:  # the bus is down, or a follower lagged behind the leader
            failures += 1
            log.warning("bot.unreleased", bot=session.bot, reason=exc.reason, failures=failures)
            await deps.clock.sleep(backoff(failures, first_s=0.1, longest_s=2.0))
    await deps.others.publish_released(session.bot)
    if unbound or (session.lingering and deps.leases.is_alone):
        await notify(session, deps, start=False)  # otherwise the next owner has already told iLink that it polls
