"""Taking a bot from the replica that polled it before, and giving it back.

The owner's name in the journal is the epoch of the fence: whoever writes it makes every write of the owner before
fail.
"""

from __future__ import annotations

from functools import partial

import structlog

from adapter.errors import BusRefused, Conflict, LeaseLost, Temporary
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.dispatcher import Dispatcher
from adapter.inbound.journal import JournalRecord, Written
from adapter.inbound.sessions import Incoming, Session, check_owned, notify
from adapter.records import Binding
from adapter.timing import any_of, backoff

log = structlog.get_logger()

ASKED_EVERY = 12
"""Looks at a bot that another replica holds, after which all are asked: some 30 s, in which most polls of bots that
are handed over end, so that few of thousands ask."""
DISPATCH_S = 1.0
"""For what is nearly dispatched when a bot is given back: who takes it next finds the rest in the journal. A bot that
is bound no more is taken by nobody: its media get their time."""
STORED_S = 10.0
"""For the conversations of an unbound bot to store what was dispatched; else its journal stays."""


async def take(session: Session, needs: Incoming) -> BotJournal | None:
    """Writes this replica's name into the bot's journal, once nobody else can be polling; None if told to leave.

    Raises Temporary, LeaseLost, Refused.
    """
    looks = 0
    while not session.leaving:
        binding = needs.bindings.get(session.bot)
        if binding is None:
            return None
        check_owned(needs, binding)
        session.freed.clear()
        async with needs.taking:
            journal = await _take_once(session, binding, needs)
        if journal is not None:
            _begin_dispatch(session, journal, needs)
            return journal
        _caught_up(session, needs)  # somebody else who lives has dispatched what there was
        looks += 1
        if looks % ASKED_EVERY == 0 and await _is_outdated(session.bot, needs):
            continue
        wait_s = backoff(looks, first_s=0.1, longest_s=4.0)
        await any_of(session.cut.wait(), session.freed.wait(), timeout_s=wait_s + needs.clock.jitter(wait_s / 2))
        session.cut.clear()  # what it was set for is looked at again
    return None


async def _take_once(session: Session, binding: Binding, needs: Incoming) -> BotJournal | None:
    """None: the poller of another replica has not stopped yet, or the journal changed meanwhile.

    Raises Temporary, Refused("token_key"): who cannot open the bot's token leaves its journal as it is.
    """
    last = await needs.journal.last(binding.bot)
    me = needs.leases.incarnation
    if last is not None and last.owner not in ("", me) and not await needs.leases.is_dead(last.owner):
        return None
    session.account(binding, needs.sealer)
    journal = BotJournal(
        binding.bot, needs.journal, needs.leases, last, needs.part_bytes, partial(_on_written, session, needs)
    )
    journal.begin_at(binding, needs.sealer)
    session.begun_at = binding.start_cursor
    if last is not None and last.owner == me and journal.is_cursor_stored:
        return journal
    try:
        await journal.note()
    except LeaseLost:
        return None
    return journal


def _begin_dispatch(session: Session, journal: BotJournal, needs: Incoming) -> None:
    session.journal, session.dispatcher, session.has_late = journal, None, False
    if journal.last_heard > journal.done_to:
        session.is_catching_up = True
        _dispatcher(session, journal, needs).catch_up()
    else:
        _on_caught_up(session, needs)


def _dispatcher(session: Session, journal: BotJournal, needs: Incoming) -> Dispatcher:
    """The bot's; made with its first message, since most bots that are taken over have none for long."""
    if session.dispatcher is None:
        session.dispatcher = Dispatcher(journal, needs.dispatching, partial(_on_caught_up, session, needs))
        journal.progress = session.dispatcher
    return session.dispatcher


def _on_written(session: Session, needs: Incoming, written: Written) -> None:
    if session.is_handed_over:
        session.has_undispatched = True
    elif session.journal is not None:
        _dispatcher(session, session.journal, needs).offer(written)


def _on_caught_up(session: Session, needs: Incoming) -> None:
    _caught_up(session, needs)
    if binding := needs.bindings.get(session.bot):
        needs.conversations.wake_soon(binding)


def _caught_up(session: Session, needs: Incoming) -> None:
    if session.is_catching_up:
        session.is_catching_up = False
        if binding := needs.bindings.get(session.bot):
            needs.session_changed(binding)


async def _is_outdated(bot: str, needs: Incoming) -> bool:
    """Asks whether anybody polls the bot at all, and takes the owner's name out of the journal where nobody does.

    The name may be old: the journal was restored, or lost its last writes with a disk. Nobody would give it back.
    One that begins to poll as it is asked writes its name anew once its next write fails. Raises Temporary.
    """
    last = await needs.journal.last(bot)
    if last is None or not last.owner or not await needs.is_idle(last.owner, bot):
        return False
    log.error("journal.outdated", bot=bot, owner=last.owner, detail="It lives and does not poll the bot.")
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
        await needs.journal.append(bot, disowned, "", sequence)
    except Conflict:
        return False
    return True


async def _dispatched(session: Session, dispatcher: Dispatcher, needs: Incoming) -> None:
    """An unbound bot's media get their time, unless it is bound again, or the service stops: the journal has them."""

    def is_over() -> bool:
        return dispatcher.is_done or session.lingering or needs.bindings.get(session.bot) is not None

    await any_of(
        dispatcher.changed.until(is_over),
        needs.bindings.changed.until(is_over),
        session.told.until(is_over),
        timeout_s=needs.dispatching.media_wait_s,
    )


async def give_back(session: Session, journal: BotJournal, needs: Incoming) -> None:
    """Takes this replica's name out of the journal, so that the next owner need not wait for a lease to run out.

    As long as this replica lives nobody else may take it: it tries until it is done.
    """
    session.state = "draining"
    unbound = needs.bindings.get(session.bot) is None
    dispatcher = session.dispatcher or (_dispatcher(session, journal, needs) if unbound else None)
    if dispatcher is not None:
        if unbound:
            await _dispatched(session, dispatcher, needs)
        await dispatcher.drain(DISPATCH_S)
        if unbound and needs.bindings.get(session.bot) is None:
            await dispatcher.stored(STORED_S)
    failures = 0
    while True:
        ends = unbound and needs.bindings.get(session.bot) is None and journal.is_dispatched
        try:
            await journal.give_back(ttl_s=needs.keep_s if ends else 0)
            if ends:
                await journal.delete_older()  # or the one before would be the last again once this one goes
            break
        except LeaseLost:
            return
        except (Temporary, BusRefused) as exc:  # the bus is away, or a follower knew less than the leader
            failures += 1
            log.warning("bot.unreleased", bot=session.bot, reason=exc.reason, failures=failures)
            await needs.clock.sleep(backoff(failures, first_s=0.1, longest_s=2.0))
    await needs.tell_freed(session.bot)
    if unbound or (session.lingering and needs.leases.alone):
        await notify(session, needs, start=False)  # else the next owner has told iLink already that it polls
