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
from adapter.inbound.bot_poller import BotPoller, InboundDeps, check_owned, notify
from adapter.inbound.dispatcher import Dispatcher
from adapter.inbound.journal import Written
from adapter.kit.timing import backoff, wait_any

log = structlog.get_logger()

QUERY_EVERY = 12
"""Attempts to take a bot after which all replicas are asked for its poller. They last some 30 s, in which most polls
of bots that are handed over end, so that few of thousands ask."""
DISPATCH_DRAIN_S = 1.0
"""Time to finish dispatching when a bot is released. The next owner finds the rest in the journal. An unbound bot has
no next owner, so its media get their full time."""
STORE_WAIT_S = 10.0
"""Time for the conversations of an unbound bot to store the dispatched sequence; otherwise its journal stays."""


async def take_bot(poller: BotPoller, deps: InboundDeps) -> BotJournal | None:
    """Writes this replica's name into the bot's journal, once no other replica can poll; None: the poller must stop.

    Raises Temporary, LeaseLost, Refused.
    """
    attempts = 0
    while not poller.stopping:
        binding = deps.bindings.serving(poller.bot)
        if binding is None:
            return None
        check_owned(deps, binding)
        poller.bot_released.clear()
        async with deps.pacing.takeovers:
            journal = await _try_take(poller, binding, deps)
        if journal is not None:
            _begin_dispatch(poller, journal, deps)
            return journal
        _mark_caught_up(poller, deps)  # the living owner has dispatched everything
        attempts += 1
        if attempts % QUERY_EVERY == 0 and await _clear_idle_owner(poller.bot, deps):
            continue
        wait_s = backoff(attempts, first_s=0.1, longest_s=4.0)
        await wait_any(
            poller.poll_cancel.wait(), poller.bot_released.wait(), timeout_s=wait_s + deps.clock.jitter(wait_s / 2)
        )
        poller.poll_cancel.clear()  # the loop checks the reason again
    return None


async def _try_take(poller: BotPoller, binding: Binding, deps: InboundDeps) -> BotJournal | None:
    """None: the poller of another replica has not stopped, or the journal changed meanwhile.

    Raises Temporary, Refused("token_key"). A replica that cannot open the bot's token does not change the journal.
    """
    last = await deps.journal.last(binding.bot)
    me = deps.leases.incarnation
    if last is not None and last.owner not in ("", me) and not await deps.leases.revoke_if_expired(last.owner):
        return None
    poller.account(binding, deps.sealer)
    journal = BotJournal(
        binding.bot, deps.journal, deps.leases, last, deps.gate.record_bytes, partial(_on_written, poller, deps)
    )
    journal.apply_start_cursor(binding, deps.sealer)
    poller.applied_start_cursor = binding.start_cursor
    if last is not None and last.owner == me and journal.is_cursor_stored:
        return journal
    try:
        await journal.note()
    except LeaseLost:
        return None
    return journal


def _begin_dispatch(poller: BotPoller, journal: BotJournal, deps: InboundDeps) -> None:
    poller.journal, poller.dispatcher, poller.may_have_late_record = journal, None, False
    if journal.stored.last_heard > journal.done_to:
        poller.is_catching_up = True
        _open_dispatcher(poller, journal, deps).catch_up()
    else:
        _on_caught_up(poller, deps)


def _open_dispatcher(poller: BotPoller, journal: BotJournal, deps: InboundDeps) -> Dispatcher:
    """The bot's dispatcher, made with the first message, since most bots are silent for long after a takeover."""
    if poller.dispatcher is None:
        poller.dispatcher = Dispatcher(journal, deps.dispatching, partial(_on_caught_up, poller, deps))
        journal.progress = poller.dispatcher
    return poller.dispatcher


def _on_written(poller: BotPoller, deps: InboundDeps, written: Written) -> None:
    if poller.is_handed_over:
        poller.has_undispatched = True
    elif poller.journal is not None:
        _open_dispatcher(poller, poller.journal, deps).offer(written)


def _on_caught_up(poller: BotPoller, deps: InboundDeps) -> None:
    _mark_caught_up(poller, deps)
    if binding := deps.bindings.get(poller.bot):
        deps.conversations.wake_soon(binding)


def _mark_caught_up(poller: BotPoller, deps: InboundDeps) -> None:
    if poller.is_catching_up:
        poller.is_catching_up = False
        if binding := deps.bindings.get(poller.bot):
            deps.on_session_changed(binding)


async def _clear_idle_owner(bot: str, deps: InboundDeps) -> bool:
    """Removes the owner's name from the journal if no replica polls the bot. Returns whether it did.

    The name may be outdated after a restore or the loss of the last writes; then nobody would ever release the bot. A
    replica that starts to poll meanwhile writes its name again when its next write fails. Raises Temporary.
    """
    last = await deps.journal.last(bot)
    if last is None or not last.owner or not await deps.others.is_idle(last.owner, bot):
        return False
    log.error("journal.outdated", bot=bot, owner=last.owner, detail="The owner is alive and does not poll the bot.")
    try:
        await deps.journal.append(bot, last.record.next_record(last.sequence), "", last.sequence)
    except Conflict:
        return False
    return True


async def _wait_dispatched(poller: BotPoller, dispatcher: Dispatcher, deps: InboundDeps) -> None:
    """Waits for the media of an unbound bot, until it is bound again or the service stops; the journal has the
    rest."""

    def is_over() -> bool:
        return dispatcher.is_done or poller.draining_after_handover or deps.bindings.serving(poller.bot) is not None

    await wait_any(
        dispatcher.changed.wait_until(is_over),
        deps.bindings.changed.wait_until(is_over),
        poller.stop_requested.wait_until(is_over),
        timeout_s=deps.dispatching.media_wait_s,
    )


async def release(poller: BotPoller, journal: BotJournal, deps: InboundDeps) -> None:
    """Removes this replica's name from the journal, so that the next owner need not wait for the lease to expire.

    Retries until it succeeds, since no other replica can take the bot while this replica lives.
    """
    poller.state = "draining"
    unbound = deps.bindings.serving(poller.bot) is None
    dispatcher = poller.dispatcher or (_open_dispatcher(poller, journal, deps) if unbound else None)
    if dispatcher is not None:
        if unbound:
            await _wait_dispatched(poller, dispatcher, deps)
        await dispatcher.drain(DISPATCH_DRAIN_S)
        if unbound and deps.bindings.serving(poller.bot) is None:
            await dispatcher.wait_stored(STORE_WAIT_S)
    failures = 0
    while True:
        ends = unbound and deps.bindings.serving(poller.bot) is None and journal.is_dispatched
        try:
            await journal.release(ttl_s=deps.waits.keep_s if ends else 0)
            if ends:
                await journal.delete_older()  # otherwise an older record becomes the newest when this one expires
            break
        except LeaseLost:
            return
        except (Temporary, BusRefused) as exc:  # the bus is down, or a follower lagged behind the leader
            failures += 1
            log.warning("bot.unreleased", bot=poller.bot, reason=exc.reason, failures=failures)
            await deps.clock.sleep(backoff(failures, first_s=0.1, longest_s=2.0))
    await deps.others.publish_released(poller.bot)
    if unbound or (poller.draining_after_handover and deps.leases.is_alone):
        await notify(poller, deps, start=False)  # otherwise the next owner has already told iLink that it polls
