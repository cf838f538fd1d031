"""Owning a bot's cursor: taking it, writing it by compare-and-set, giving it back.

The owner's name in the record is the epoch of the fence: whoever writes it raises the revision, and every write of
the owner before is refused.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from adapter.dedup import Seen
from adapter.errors import UNDECODABLE, BusRefused, Conflict, LeaseLost, Refused, Temporary
from adapter.inbound.inbox import retry, seen_of
from adapter.inbound.sessions import Incoming, Place, Session, Waiting, check_owned, notify
from adapter.names import H_SANDBOX, Names, digest, token_of
from adapter.ports import Entry, History
from adapter.records import Binding, Cursor
from adapter.seal import Sealer, cursor_context
from adapter.tasks import Shared
from adapter.timing import any_of, backoff

log = structlog.get_logger()

NEWEST = 32
ANSWERS = 4
"""With each cursor go the newest 32 records of messages seen, or those of four answers like the last one; when there
are more, all are written apart. So the record of a single message is short, and few batches wait for that write."""

ASKED_EVERY = 12
"""Looks at a bot that another replica holds, after which all are asked: some 30 s, in which most polls of bots that
are handed over end, so that few of thousands ask."""

RAW_S = 2.0
"""How long all who start wait for whose messages wait for media, before they ask again: a question may get lost."""


async def acquire(session: Session, needs: Incoming) -> Place | None:
    """Writes this replica's name into the bot's cursor, once nobody else can be polling; None if told to leave.

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
            place = await _acquire_once(session, binding, needs)
        if place is not None:
            needs.conversations.wake_soon(binding)
            return place
        looks += 1
        if looks % ASKED_EVERY == 0 and await _is_outdated(session.bot, needs):
            continue
        wait_s = backoff(looks, first_s=0.1, longest_s=4.0)
        await any_of(session.cut.wait(), session.freed.wait(), timeout_s=wait_s + needs.clock.jitter(wait_s / 2))
        session.cut.clear()  # what it was set for is looked at again
    return None


async def _is_outdated(bot: str, needs: Incoming) -> bool:
    """Asks whether anybody polls the bot at all, and takes the owner's name out of the record where nobody does.

    The name may be old: the bucket was restored, or lost its last writes with a disk. Nobody would give the bot back.
    An owner that begins to poll as it is asked has written its name anew. Raises Temporary.
    """
    entry = await needs.cursors.get(token_of(bot))
    record = cursor_in(entry, bot)
    if entry is None or record is None or not record.owner or not await needs.is_idle(record.owner, bot):
        return False
    log.error("cursor.outdated", bot=bot, owner=record.owner, detail="It lives and does not poll the bot.")
    try:
        await _disown(bot, record, entry.revision, needs)
    except Conflict:
        return False
    return True


async def _acquire_once(session: Session, binding: Binding, needs: Incoming) -> Place | None:
    """None: the poller of another replica has not stopped yet, or the record changed meanwhile.

    Raises Temporary, Refused("token_key"): who cannot open the bot's token leaves its cursor as it is.
    """
    entry = await needs.cursors.get(token_of(binding.bot))
    record = cursor_in(entry, binding.bot)
    me = needs.leases.incarnation
    if record is None:
        last = await needs.history.last(needs.names.stream_in, needs.names.inbox(binding.sandbox))
        record = Cursor(last_seq=last.seq if last else 0)
    elif record.owner and record.owner != me and not await needs.leases.is_dead(record.owner):
        return None
    session.account(binding, needs.sealer)
    record = msgspec.structs.replace(record, cursor=_opened(binding.bot, record.cursor, needs.sealer) or "")
    record = begun_at(binding, record, needs.sealer)
    session.begun_at = binding.start_cursor
    record, seen = await recollect(binding.bot, record, needs)
    record = await catch_up(binding, record, seen, needs, await needs.waiting(binding.sandbox))
    record = msgspec.structs.replace(record, owner=me, seen=seen.newest())
    try:
        revision = await write_cursor(binding.bot, record, entry.revision if entry else 0, needs)
    except LeaseLost:
        return None
    session.apart = bool(record.apart)
    return Place(msgspec.structs.replace(record, seen=[]), revision, seen)


def cursor_in(entry: Entry | None, bot: str) -> Cursor | None:
    """A bot's record; None also where another hand wrote what cannot be read: it counts as purged, and is written
    anew."""
    try:
        return msgspec.json.decode(entry.value, type=Cursor) if entry and entry.value else None
    except UNDECODABLE as exc:
        log.error("cursor.unreadable", bot=bot, detail=type(exc).__name__)
        return None


def begun_at(binding: Binding, record: Cursor, sealer: Sealer) -> Cursor:
    """The record at the cursor that a bind request names, once; it is stored with the next write."""
    if binding.start_cursor is None or (start := _opened(binding.bot, binding.start_cursor, sealer)) is None:
        return record
    mark = digest(start.encode()) if start else ""
    if record.start == mark:
        return record
    return msgspec.structs.replace(record, cursor=start, start=mark)


def _opened(bot: str, cursor: str, sealer: Sealer) -> str | None:
    """As iLink knows it; None if the key with which it was sealed is gone."""
    try:
        return sealer.open(cursor_context(bot), cursor)
    except Refused as exc:
        log.error("cursor.unopenable", bot=bot, detail=exc.detail)
        return None


def apart_key(bot: str) -> str:
    return f"{token_of(bot)}/seen"


async def recollect(bot: str, record: Cursor, needs: Incoming) -> tuple[Cursor, Seen]:
    """All that a bot's record says to have been seen, also what is stored apart. Raises Temporary."""
    entry = await needs.cursors.get(apart_key(bot)) if record.apart else None
    try:
        kept = msgspec.json.decode(entry.value, type=list[str]) if entry and entry.value else []
    except UNDECODABLE as exc:
        log.error("cursor.unreadable", bot=bot, detail=f"What was seen: {type(exc).__name__}")
        kept = []
    seen = Seen(kept, record.seen, skew_ms=needs.skew_ms)
    return msgspec.structs.replace(record, apart=entry.revision if entry else 0), seen


async def keep_seen(bot: str, record: Cursor, seen: Seen, needs: Incoming) -> Cursor:
    """The record once everything that was seen stands in its key apart, as when much has been since the last time.

    More may stand there than the record knows of, after a crash or by the hand of an owner before us: messages that
    are on the bus. It is never less than the record relies on. Raises Temporary, and what the fence raises.
    """
    needs.check_fence()
    key, everything = apart_key(bot), seen.records()
    try:
        revision = await needs.cursors.update(key, msgspec.json.encode(everything), record.apart)
    except Conflict:
        entry = await needs.cursors.get(key)
        return msgspec.structs.replace(record, seen=everything, apart=entry.revision if entry else 0)
    seen.keep()
    return msgspec.structs.replace(record, seen=[], apart=revision)


def raw_bots(history: History, names: Names) -> Shared[set[str]]:
    """As `Incoming` has it. Of thousands of bots that are taken over hardly one waits for media: a read for each
    was a fourth of what they ask of the bus, of a replicated one a third. `answer` raises Temporary, BusRefused."""

    async def ask() -> set[str]:
        try:
            async with asyncio.timeout(RAW_S):
                subjects = await history.counts(names.stream_raw, names.raw("*", "*"))
        except TimeoutError:
            raise Temporary("bus_timeout", f"{names.stream_raw} does not answer") from None
        return {subject.rpartition(".")[2] for subject in subjects}

    return Shared(ask)


async def catch_up(
    binding: Binding, record: Cursor, seen: Seen, needs: Incoming, waiting: Waiting | None = None
) -> Cursor:
    """Adds what was stored on the bus after the cursor's last write: a crash came between the two. Raises Temporary,
    BusRefused.

    What waits for media first (and is given to `waiting`): it is in the inbox before it is gone from there.
    """
    if token_of(binding.bot) in await needs.raw_bots.answer():
        async for stored in needs.history.read(needs.names.stream_raw, needs.names.raw("*", binding.bot)):
            if keys := seen_of(stored.headers, binding.bot):
                seen.add_record(keys, needs.clock.now_ms())
            if waiting is not None and stored.headers.get(H_SANDBOX) == binding.sandbox:
                waiting.add(stored, suspect=True)
    last = record.last_seq
    inbox = needs.names.inbox(binding.sandbox)
    async for stored in needs.history.read(needs.names.stream_in, inbox, after=record.last_seq):
        last = stored.seq
        if keys := seen_of(stored.headers, binding.bot):
            seen.add_record(keys, needs.clock.now_ms())
            log.info("inbound.recovered", bot=binding.bot, sequence=stored.seq)
    return msgspec.structs.replace(record, last_seq=last)


async def write_cursor(bot: str, record: Cursor, revision: int, needs: Incoming) -> int:
    """Raises LeaseLost when another replica wrote since, Temporary. What is written is sealed.

    A record that an operator purged, deleted or made unreadable is put back: another owner would have left its own.
    """
    sealed = needs.sealer.seal(cursor_context(bot), record.cursor) if record.cursor else ""
    key, value = token_of(bot), msgspec.json.encode(msgspec.structs.replace(record, cursor=sealed))
    while True:
        try:
            return await needs.cursors.update(key, value, revision)
        except Conflict:
            entry = await needs.cursors.get(key)
        found, stored = entry.revision if entry is not None else 0, cursor_in(entry, bot)
        if found > revision and stored is not None and _is_sealed_copy(stored, record, bot, needs.sealer):
            return found  # ours, of which nothing was heard
        if found == revision or stored is not None:
            raise LeaseLost("cursor_taken", bot)
        log.error("cursor.restored", bot=bot, detail="Its key was purged, deleted or overwritten.")
        revision = found


def _is_sealed_copy(stored: Cursor, record: Cursor, bot: str, sealer: Sealer) -> bool:
    """Whether they differ in the seal alone, which is another each time."""
    bare = msgspec.structs.replace(stored, cursor=record.cursor) == record
    return bare and sealer.same(cursor_context(bot), stored.cursor, record.cursor)


async def put_back(session: Session, place: Place, needs: Incoming) -> Place:
    """Writes the record again, since cursors were purged, and what was seen with it. Raises LeaseLost."""
    place.seen.keep_none()
    session.apart = False
    record = msgspec.structs.replace(place.record, seen=place.seen.records(), apart=0)
    revision = await retry(lambda: write_cursor(session.bot, record, place.revision, needs), needs)
    return Place(msgspec.structs.replace(record, seen=[]), revision, place.seen)


async def give_back(session: Session, needs: Incoming) -> None:
    """Takes this replica's name out of the cursor, so that the next owner need not wait for a lease to run out.

    As long as this replica lives nobody else may take it: it tries until it is done.
    """
    session.state = "draining"
    failures = 0
    while True:
        try:
            freed = await _give_back_once(session, needs)
            break
        except (Temporary, BusRefused) as exc:  # the bus is away, or a follower knew less than the leader
            failures += 1
            log.warning("cursor.unreleased", bot=session.bot, reason=exc.reason, failures=failures)
            await needs.clock.sleep(backoff(failures, first_s=0.1, longest_s=2.0))
    if freed:
        await needs.tell_freed(session.bot)
    if needs.bindings.get(session.bot) is None or (session.lingering and needs.leases.alone):
        await notify(session, needs, start=False)  # else the next owner has told iLink already that it polls


async def _give_back_once(session: Session, needs: Incoming) -> bool:
    """Whether it was ours to give back. Raises Temporary, Conflict."""
    key = token_of(session.bot)
    entry = await needs.cursors.get(key)
    record = cursor_in(entry, session.bot)
    if entry is None or record is None or not record.owner or record.owner != needs.leases.incarnation:
        return False
    await _disown(session.bot, record, entry.revision, needs)
    return True


async def _disown(bot: str, record: Cursor, revision: int, needs: Incoming) -> None:
    """Raises Temporary, Conflict."""
    disowned = msgspec.structs.replace(record, owner="")
    await needs.cursors.update(token_of(bot), msgspec.json.encode(disowned), revision)
