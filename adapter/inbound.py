"""One bot's messages from iLink to the bus. Knows neither HTTP nor NATS.

Per batch, in this order: context token and window stored, messages stored (pipelined), cursor stored; only then
the next poll. What arrived is stored even while the service stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import structlog

from adapter import contract, window
from adapter.bindings import Bindings
from adapter.contexts import Contexts
from adapter.contract import BindingEvent, Inbound, Names
from adapter.dedup import Seen, digest
from adapter.errors import AdapterError, BusRefused, Conflict, LeaseLost, SessionExpired, Temporary, Unreadable
from adapter.events import Events
from adapter.leases import Leases
from adapter.metrics import Metrics
from adapter.ports import Account, Bucket, Bus, Chat, History, Message, Polled, Said
from adapter.records import Binding, Cursor
from adapter.seal import Sealer
from adapter.timing import Clock, Latch, backoff, finish, first_of

log = structlog.get_logger()

HOLD_MS = 35_000
"""The client waits so long for a poll, plus a margin, until the server gives a hint."""
INSTANT_S = 0.02
"""An empty answer sooner than this was not a long poll."""
DEAD_PATH_AFTER = 3
"""Client timeouts in a row, without any answer, after which the connection counts as dead (ilink-protocol 3.3)."""
PIPELINE = 256
"""Messages stored at once; bounds the memory of a huge batch."""

State: TypeAlias = Literal["starting", "polling", "paused", "needs_login", "error", "draining"]


class Incoming(NamedTuple):
    """What a poller needs."""

    chat: Chat
    read_message: Callable[[bytes], Said]
    bus: Bus
    history: History
    cursors: Bucket
    contexts: Contexts
    bindings: Bindings
    leases: Leases
    events: Events
    sealer: Sealer
    clock: Clock
    metrics: Metrics
    names: Names
    rules: window.Rules
    heard: Callable[[str, str, str], None]
    """Called with sandbox, bot and user once a message of the user is on the bus."""
    writable: Callable[[], Awaitable[None]]
    """Returns when the bus is there; no poll starts before."""
    starting: asyncio.Semaphore
    """Bounds how many pollers start at once: thousands would hold up the event loop, and with it the lease."""
    spread_s: Callable[[], float]
    """Over how long polls are spread that could all start again at the same moment."""
    stale_retry_s: tuple[float, ...]
    skew_ms: int
    notify: bool
    grace_s: float


class Session:
    """The state of one bot's poller, for the supervisor, the sender and the metrics."""

    def __init__(self, bot: str) -> None:
        self.bot = bot
        self.state: State = "starting"
        self.stale = False
        """iLink said -14 and the recovery runs: nothing may be sent."""
        self.since = 0.0
        self.answered = 0.0
        """Monotonic time of the last answer of iLink to a poll."""
        self.leaving = False
        """Ends at the next poll boundary."""
        self.served: Binding | None = None
        """What was last polled with: an unbound bot's end is told to iLink with it."""
        self.cut = asyncio.Event()
        """Ends a poll that waits, now."""

    def must_leave(self) -> bool:
        """For conditions that are looked at again and again."""
        return self.leaving

    def leave(self, *, now: bool) -> None:
        """Asks the poller to end: at the next boundary, or `now`, cutting a poll that waits."""
        self.leaving = True
        if now:
            self.cut.set()


class _Place(NamedTuple):
    """Where a poller stands: what its cursor's record says, and the revision that fences it."""

    record: Cursor
    revision: int
    seen: Seen


async def tend(session: Session, needs: Incoming) -> None:
    """Serves one bot until it is told to leave, or its binding or shard is gone. One unit of work: never raises."""
    failures = 0
    while not session.leaving:
        try:
            await _serve(session, needs)
            failures = 0
        except LeaseLost as exc:
            log.info("poller.fenced", bot=session.bot, reason=exc.reason)
            return
        except AdapterError as exc:
            failures += 1
            session.state = "error"
            log.warning(
                "poller.failed", bot=session.bot, reason=exc.reason, detail=exc.detail[:200], failures=failures
            )
        except Exception:
            failures += 1
            session.state = "error"
            log.exception("poller.crashed", bot=session.bot, failures=failures)
        if needs.bindings.get(session.bot) is None:
            return
        if failures:
            await first_of(session.cut, backoff(failures, first_s=0.5) + needs.clock.jitter(0.5))


async def _serve(session: Session, needs: Incoming) -> None:
    place = await acquire(session, needs)
    if place is None:
        return
    try:
        async with needs.starting:
            await _notify(session, needs, start=True)
        place = await poll_forever(session, place, needs)
    finally:
        await finish(_give_back(session, needs), needs.grace_s)


# owning the cursor -------------------------------------------------------------------------------------


async def acquire(session: Session, needs: Incoming) -> _Place | None:
    """Writes this replica's name into the bot's cursor, once nobody else can be polling; None if told to leave.

    Raises Temporary, LeaseLost.
    """
    while not session.leaving:
        binding = needs.bindings.get(session.bot)
        if binding is None:
            return None
        _check(needs, binding)
        async with needs.starting:
            place = await _acquire_once(binding, needs)
        if place is not None:
            return place
        await first_of(session.cut, 0.1 + needs.clock.jitter(0.1))
    return None


async def _acquire_once(binding: Binding, needs: Incoming) -> _Place | None:
    """None: the poller of another replica has not stopped yet, or the record changed meanwhile. Raises Temporary."""
    entry = await needs.cursors.get(contract.token_of(binding.bot))
    record = msgspec.json.decode(entry.value, type=Cursor) if entry and entry.value else None
    me = needs.leases.incarnation
    if record is None:
        last = await needs.history.last(needs.names.stream_in, needs.names.inbox(binding.sandbox))
        record = Cursor(last_seq=last.seq if last else 0)
    elif record.owner and record.owner != me and not await needs.leases.is_dead(record.owner):
        return None
    if binding.start_cursor is not None and binding.start_cursor != record.start:
        record = msgspec.structs.replace(record, cursor=binding.start_cursor, start=binding.start_cursor)
    seen = Seen(record.seen, skew_ms=needs.skew_ms)
    record = await _catch_up(binding, record, seen, needs)
    record = msgspec.structs.replace(record, owner=me, seen=seen.records())
    try:
        revision = await _write_cursor(binding.bot, record, entry.revision if entry else 0, needs)
    except LeaseLost:
        return None
    return _Place(record, revision, seen)


async def _catch_up(binding: Binding, record: Cursor, seen: Seen, needs: Incoming) -> Cursor:
    """Adds what was stored on the bus after the cursor's last write: a crash came between the two."""
    last = record.last_seq
    inbox = needs.names.inbox(binding.sandbox)
    async for stored in needs.history.read(needs.names.stream_in, inbox, after=record.last_seq):
        last = stored.seq
        known = stored.headers.get(contract.H_SEEN, "")
        owner, _, keys = known.partition(" ")
        if owner == contract.token_of(binding.bot) and keys:
            seen.add_record(keys, needs.clock.now_ms())
            log.info("inbound.recovered", bot=binding.bot, sequence=stored.seq)
    return msgspec.structs.replace(record, last_seq=last)


async def _write_cursor(bot: str, record: Cursor, revision: int, needs: Incoming) -> int:
    """Raises LeaseLost when another replica wrote since."""
    key, value = contract.token_of(bot), msgspec.json.encode(record)
    try:
        return await needs.cursors.update(key, value, revision)
    except Conflict:
        entry = await needs.cursors.get(key)
        if entry is not None and entry.value == value:
            return entry.revision  # our own write, whose answer got lost
        raise LeaseLost("cursor_taken", bot) from None


async def _give_back(session: Session, needs: Incoming) -> None:
    """Takes this replica's name out of the cursor, so that the next owner need not wait for a lease to run out."""
    session.state = "draining"
    needs.contexts.forget(session.bot)
    key = contract.token_of(session.bot)
    try:
        entry = await needs.cursors.get(key)
        if entry is None or entry.value is None:
            return
        record = msgspec.json.decode(entry.value, type=Cursor)
        if record.owner == needs.leases.incarnation and needs.leases.incarnation:
            await needs.cursors.update(
                key, msgspec.json.encode(msgspec.structs.replace(record, owner="")), entry.revision
            )
        await _notify(session, needs, start=False)
    except (Temporary, Conflict) as exc:
        log.warning("cursor.unreleased", bot=session.bot, reason=exc.reason)


def _check(needs: Incoming, binding: Binding) -> None:
    needs.leases.check(contract.shard_of(binding.sandbox))


def account_of(binding: Binding, sealer: Sealer) -> Account:
    """How a bot is called. Raises Refused("token_key")."""
    return Account(binding.bot, sealer.open(binding.bot, binding.token), binding.base_url)


async def _notify(session: Session, needs: Incoming, *, start: bool) -> None:
    """Best effort: iLink tracks who is online (ilink-protocol 11.1)."""
    binding = needs.bindings.get(session.bot) or session.served
    if not needs.notify or binding is None or binding.state != "active":
        return
    try:
        await needs.chat.notify(account_of(binding, needs.sealer), start=start)
    except AdapterError as exc:
        log.info("notify.failed", bot=session.bot, start=start, reason=exc.reason)


# polling -----------------------------------------------------------------------------------------------


async def poll_forever(session: Session, place: _Place, needs: Incoming) -> _Place:
    """Polls until told to leave or the binding is gone; where it then stands. Raises LeaseLost, Refused."""
    failures = timeouts = 0
    hold_ms = HOLD_MS
    session.answered = needs.clock.monotonic()
    while not session.leaving:
        await needs.writable()
        if not needs.leases.valid:
            session.state = "paused"
            await _until(session, needs.leases.changed, lambda: needs.leases.valid)
            await first_of(session.cut, needs.clock.jitter(needs.spread_s()))
            session.answered = needs.clock.monotonic()
            continue
        binding = needs.bindings.get(session.bot)
        if binding is None or session.must_leave():
            break
        if binding.state == "needs_login":
            session.state, session.stale = "needs_login", False
            await _until(session, needs.bindings.changed, _rebound(binding, needs))
            continue
        session.state = "polling" if not failures else "error"
        try:
            polled = await _poll_once(session, binding, place, hold_ms, needs)
        except SessionExpired as exc:
            needs.metrics.polls.labels(outcome="stale_token").inc()
            polled = await recover(session, exc, place, needs)
            if polled is None:
                continue
        except Temporary as exc:
            failures += 1
            needs.metrics.polls.labels(outcome="error").inc()
            wait_s = exc.retry_after_s or backoff(failures, first_s=0.5, longest_s=30.0)
            log.warning("poll.failed", bot=session.bot, reason=exc.reason, detail=exc.detail[:200], failures=failures)
            await first_of(session.cut, wait_s + needs.clock.jitter(wait_s / 2))
            continue
        if session.cut.is_set() and polled is None:
            session.cut.clear()
            continue
        if polled is None:
            timeouts += 1
            needs.metrics.polls.labels(outcome="client_timeout").inc()
            if timeouts >= DEAD_PATH_AFTER:
                session.state = "error"
                log.warning("poll.dead_path", bot=session.bot, timeouts=timeouts)
                await needs.chat.recycle(session.bot)
            continue
        failures = timeouts = 0
        hold_ms = polled.hold_ms
        asked, session.answered = session.answered, needs.clock.monotonic()
        if not polled.messages and session.answered - asked < INSTANT_S:
            await first_of(
                session.cut, 0.25 + needs.clock.jitter(0.25)
            )  # a server that does not hold is not hammered
        needs.metrics.polls.labels(outcome="messages" if polled.messages else "empty").inc()
        place = await finish(store(session, polled, place, needs), needs.grace_s)
    return place


async def _poll_once(
    session: Session, binding: Binding, place: _Place, hold_ms: int, needs: Incoming
) -> Polled | None:
    """One long poll; None: no answer in time, or it was cut. Raises SessionExpired, Temporary, LeaseLost, Refused."""
    _check(needs, binding)
    session.served = binding
    account = account_of(binding, needs.sealer)
    poll = asyncio.ensure_future(needs.chat.poll(account, place.record.cursor, hold_ms))
    cut = asyncio.ensure_future(session.cut.wait())
    waiting: set[asyncio.Future[Any]] = {poll, cut}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        cut.cancel()
        if not poll.done():
            poll.cancel()
            await asyncio.wait([poll])
    return None if poll.cancelled() else poll.result()


async def store(session: Session, polled: Polled, place: _Place, needs: Incoming) -> _Place:
    """Puts a batch on the bus. Raises LeaseLost."""
    if not polled.messages and (polled.cursor is None or polled.cursor == place.record.cursor):
        return place
    arrived = needs.clock.monotonic()
    binding = needs.bindings.get(session.bot)
    fresh = await _sort(session, binding, polled.messages, place.seen, needs)
    last_seq = place.record.last_seq
    if binding is not None and fresh:
        await _remember(binding, fresh, needs)
        for start in range(0, len(fresh), PIPELINE):
            last_seq = max(last_seq, await _publish(binding, fresh[start : start + PIPELINE], place.seen, needs))
        needs.metrics.inbound_publish_duration.observe(needs.clock.monotonic() - arrived)
    record = msgspec.structs.replace(
        place.record,
        cursor=polled.cursor or place.record.cursor,
        seen=place.seen.records(),
        last_seq=last_seq,
    )
    revision = await _write_cursor(session.bot, record, place.revision, needs)
    if binding is not None:
        for user in dict.fromkeys(said.user for said in fresh):
            needs.heard(binding.sandbox, binding.bot, user)
    return _Place(record, revision, place.seen)


async def _sort(
    session: Session, binding: Binding | None, messages: list[bytes], seen: Seen, needs: Incoming
) -> list[Said]:
    """The messages that are new and the user's own, in order; the others are counted, or kept as dead letters."""
    fresh: list[Said] = []
    batch = Seen(skew_ms=needs.skew_ms, keep=len(messages))
    for raw in messages:
        try:
            said = needs.read_message(raw)
        except Unreadable as exc:
            _count(needs, "unsupported", "dead_lettered")
            await _bury(session.bot, binding, raw, exc.detail, needs)
            continue
        if said.echo:
            _count(needs, said.kind, "rejected")
        elif seen.has(said.keys) or batch.has(said.keys):
            _count(needs, said.kind, "duplicate")
            log.info("inbound.duplicate", bot=session.bot)
        elif binding is None:
            _count(needs, said.kind, "unbound")
            await _bury(session.bot, None, raw, "The bot is not bound any more.", needs)
        else:
            if said.broken:
                await _bury(session.bot, binding, raw, said.broken, needs)
            batch.add(said.keys, needs.clock.now_ms())
            fresh.append(said)
    return fresh


async def _remember(binding: Binding, fresh: list[Said], needs: Incoming) -> None:
    """Context token and window of each user in the batch, so that a fast answer finds them."""
    for user in dict.fromkeys(said.user for said in fresh):
        if not binding.user:
            await _learn_user(binding, user, needs)
        newest = [said for said in fresh if said.user == user][-1]
        tokens = [said.context_token for said in fresh if said.user == user and said.context_token]
        peer = await _retry(lambda user=user: needs.contexts.peer(binding.bot, user), needs)  # type: ignore[misc]
        ident, token, now_ms = newest.keys.id_for(binding.bot), (tokens or [""])[-1], needs.clock.now_ms()
        await _retry(
            lambda peer=peer, ident=ident, token=token, now_ms=now_ms: needs.contexts.save(  # type: ignore[misc]
                peer,
                lambda context: window.heard(
                    context, message=ident, token=token, now_ms=now_ms, in_flight=peer.in_flight
                ),
            ),
            needs,
        )


async def _learn_user(binding: Binding, user: str, needs: Incoming) -> None:
    """The binding named no user: this is who they are. An older bot of theirs in the sandbox is replaced."""

    def with_user(now: Binding) -> Binding | None:
        return None if now.user else msgspec.structs.replace(now, user=user)

    await _retry(lambda: needs.bindings.change(binding.bot, with_user), needs)
    for other in needs.bindings.of_sandbox(binding.sandbox):
        if other.user == user and other.bot != binding.bot:  # WeChat has killed it: one user has one bot (1.3)
            await needs.events.binding(_event(other, "replaced", "", "The user is served by another bot now."))
            await _retry(lambda other=other: needs.bindings.remove(other.bot), needs)  # type: ignore[misc]


async def _publish(binding: Binding, fresh: list[Said], seen: Seen, needs: Incoming) -> int:
    """Stores messages; the sequence of the newest."""
    now_ms = needs.clock.now_ms()
    shown = {}
    for user in {said.user for said in fresh}:
        peer = await _retry(lambda user=user: needs.contexts.peer(binding.bot, user), needs)  # type: ignore[misc]
        shown[user] = window.shown(peer.context, needs.rules)
    messages = []
    for said in fresh:
        record = seen.add(said.keys, now_ms)
        inbound = Inbound(
            id=said.keys.id_for(binding.bot),
            sandbox=binding.sandbox,
            bot=binding.bot,
            user=said.user,
            sent_at_ms=said.sent_at_ms,
            received_at_ms=now_ms,
            text=said.text,
            items=said.items,
            quote=said.quote,
            window=shown[said.user],
        )
        headers = {
            contract.H_MSG_ID: inbound.id,
            contract.H_SCHEMA: contract.SCHEMA_VERSION,
            contract.H_SEEN: f"{contract.token_of(binding.bot)} {record}",
        }
        messages.append(Message("in", needs.names.inbox(binding.sandbox), msgspec.json.encode(inbound), headers))
    last = 0
    for said, message, ack in zip(fresh, messages, await needs.bus.publish_all(messages), strict=True):
        if isinstance(ack, BusRefused):
            _count(needs, said.kind, "publish_failed")
            log.error("inbound.refused", bot=binding.bot, code=ack.code, detail=ack.detail[:200])
            last = max(last, await _publish_stub(binding, said, message, needs))
            continue
        last = max(last, ack.seq)
        _count(needs, said.kind, "duplicate" if ack.duplicate else "published")
        if said.sent_at_ms:
            needs.metrics.inbound_age.observe(max(0, needs.clock.now_ms() - said.sent_at_ms) / 1000)
    return last


async def _publish_stub(binding: Binding, said: Said, message: Message, needs: Incoming) -> int:
    """The bus refuses this message for its size: the reader learns of it, the bytes go to the dead letters."""
    await _bury(binding.bot, binding, said.raw, "The bus refuses a message of this size.", needs)
    whole = msgspec.json.decode(message.payload, type=Inbound)
    stub = msgspec.structs.replace(
        whole, text="", quote=None, items=[contract.UnsupportedItem(type=0, reason="too_large")]
    )
    try:
        return (await needs.bus.publish(message._replace(payload=msgspec.json.encode(stub)))).seq
    except BusRefused as exc:
        log.error("inbound.lost_to_dead_letters", bot=binding.bot, detail=exc.detail[:200])
        return 0


async def _bury(bot: str, binding: Binding | None, raw: bytes, why: str, needs: Incoming) -> None:
    await needs.events.dead_letter(
        "IN",
        raw,
        subject=needs.names.inbox(binding.sandbox) if binding else "",
        headers={},
        reason="unreadable" if binding else "not_bound",
        detail=why,
        seq=0,
        msg_id=f"dead:{bot}:{digest(raw)}",
        sandbox=binding.sandbox if binding else "",
    )


async def _retry(work: Callable[[], Awaitable[Any]], needs: Incoming) -> Any:
    """A batch in hand is retried until it is stored. Raises LeaseLost."""
    failures = 0
    while True:
        try:
            return await work()
        except Temporary as exc:
            failures += 1
            log.warning("inbound.waits", reason=exc.reason, failures=failures)
            await needs.clock.sleep(backoff(failures, first_s=0.05, longest_s=1.0))


def _count(needs: Incoming, kind: str, outcome: str) -> None:
    needs.metrics.inbound_messages.labels(kind=kind, outcome=outcome).inc()


# stale token -------------------------------------------------------------------------------------------


async def recover(session: Session, exc: SessionExpired, place: _Place, needs: Incoming) -> Polled | None:
    """-14: everything of this bot rests; a few spaced tries, then `needs_login` (ilink-protocol 5.4).

    The answer of the poll that went through; None when polling should go on from where it was, since the binding
    changed or now needs a login. Raises LeaseLost, Refused.
    """
    binding = needs.bindings.get(session.bot)
    if binding is None:
        return None
    session.stale, session.state = True, "error"
    log.warning("session.stale", bot=session.bot, sandbox=binding.sandbox, detail=exc.detail[:200])
    advice = "iLink refuses the bot's token; it is tried again shortly, then a login is needed."
    await needs.events.binding(_event(binding, "stale", exc.detail, advice))
    try:
        refusals = failures = 0
        while refusals < len(needs.stale_retry_s):
            pause_s = max(needs.stale_retry_s[refusals], backoff(failures) if failures else 0.0)
            with contextlib.suppress(TimeoutError):
                await _until(session, needs.bindings.changed, _rebound(binding, needs), pause_s)
            if session.leaving or needs.bindings.get(session.bot) != binding:
                return None
            try:
                polled = await _try_again(session, binding, place, needs)
            except SessionExpired:
                refusals, failures = refusals + 1, 0
                continue
            if polled is None:  # an outage says nothing about the token
                failures += 1
                session.cut.clear()
                continue
            log.info("session.recovered", bot=session.bot)
            session.stale = False
            await needs.events.binding(_event(binding, "recovered", "", ""))
            needs.heard(binding.sandbox, binding.bot, binding.user)
            return polled
        await lose_login(needs.bindings, needs.events, needs.clock, binding, exc.detail)
        return None
    finally:
        session.stale = False


async def _try_again(session: Session, binding: Binding, place: _Place, needs: Incoming) -> Polled | None:
    """notifystart, then one poll; None where nobody answers. Raises SessionExpired, LeaseLost, Refused."""
    await _notify(session, needs, start=True)
    try:
        return await _poll_once(session, binding, place, HOLD_MS, needs)
    except Temporary as problem:
        log.info("session.unreachable", bot=session.bot, reason=problem.reason)
        return None


async def lose_login(bindings: Bindings, events: Events, clock: Clock, binding: Binding, detail: str) -> None:
    """Marks a binding `needs_login`, on the bus and in the bucket, unless it was bound anew meanwhile."""

    def without_login(now: Binding) -> Binding | None:
        if now.token != binding.token or now.state == "needs_login":
            return None
        return msgspec.structs.replace(now, state="needs_login", reason="stale_token", since_ms=clock.now_ms())

    if await bindings.change(binding.bot, without_login) is not None:
        log.error("session.needs_login", bot=binding.bot, sandbox=binding.sandbox)
        await events.binding(
            _event(binding, "needs_login", detail, "Have the user scan a new QR code and bind the new bot.")
        )


def _event(binding: Binding, change: Any, reason: str, detail: str) -> BindingEvent:
    return BindingEvent(
        sandbox=binding.sandbox, bot=binding.bot, user=binding.user, change=change, reason=reason[:200], detail=detail
    )


def _rebound(binding: Binding, needs: Incoming) -> Callable[[], bool]:
    """Whether the bot's binding is another than `binding` by now."""
    return lambda: needs.bindings.get(binding.bot) != binding


async def _until(session: Session, latch: Latch, holds: Callable[[], bool], timeout_s: float | None = None) -> None:
    """Waits until `holds()`, the session must leave, or `timeout_s` seconds have passed."""
    async with asyncio.timeout(timeout_s):
        while not (session.must_leave() or holds()):
            await latch.until(lambda: session.must_leave() or holds(), 1.0)
