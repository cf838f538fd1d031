"""One batch of a poll onto the bus: sorted, told to the window, stored, and only then the cursor."""

from __future__ import annotations

from functools import partial
from itertools import chain

import msgspec
import structlog

from adapter import window
from adapter.dedup import Batch, Seen
from adapter.errors import BusRefused, LeaseLost, Unreadable
from adapter.inbound.cursors import ANSWERS, NEWEST, catch_up, cursor_in, keep_seen, recollect, write_cursor
from adapter.inbound.inbox import Heard, bury, count, publish, raw_message, retry, without_media
from adapter.inbound.sessions import Incoming, Place, Session
from adapter.names import shard_of, token_of
from adapter.ports import Polled, Said, Stored
from adapter.records import Binding, Context, Cursor

log = structlog.get_logger()

ATTEMPTS = 5
"""At a batch whose lease pauses again and again."""
PIPELINE = 256
"""Messages stored at once; bounds the memory of a huge batch."""
TURN = 64
"""Messages, or KiB, that are read in one turn."""
LATE_S = 10.0
"""What is told late waits so long for what came before it and waits for media, which is another owner's to tell."""


async def store_pages(session: Session, polled: Polled, place: Place, needs: Incoming) -> Place:
    """Puts a batch of several pages on the bus, one after the other; the cursor with the last. Raises LeaseLost."""
    page, pages = polled.messages, polled.pages or iter(())
    while (later := next(pages, None)) is not None:
        part = polled._replace(messages=page, cursor=None, pages=chain([later], pages))
        place = await store(session, part, place, needs)
        page = later
    return await store(session, polled._replace(messages=page, pages=None), place, needs)


async def store(session: Session, polled: Polled, place: Place, needs: Incoming) -> Place:
    """Puts a batch, or its first page, on the bus. Raises LeaseLost.

    A lease that is only paused is waited for. Where the bot was lost, what nobody else has is told all the same, if
    late: iLink may count it as delivered, and give it to nobody else.
    """
    fenced = session.fenced(needs, place.record.owner)
    failures = 0
    while True:
        try:
            return await _store(session, polled, place, fenced)
        except LeaseLost as exc:
            failures += 1
            await needs.leases.changed.until(lambda: needs.leases.valid)
            ours = await _still_ours(session, place, fenced)
            if failures == ATTEMPTS or ours is None:
                log.warning("inbound.fenced", bot=session.bot, reason=exc.reason, messages=len(polled.messages))
                await _tell_late(session, polled.messages, needs)
                for page in polled.pages or ():
                    await _tell_late(session, page, needs)
                raise
        _, seen = await retry(partial(recollect, session.bot, ours, needs), needs)
        place = place._replace(seen=seen)


async def _still_ours(session: Session, place: Place, needs: Incoming) -> Cursor | None:
    """The bot's record; None where somebody has written it since, or may. `needs`: fenced."""
    entry = await retry(lambda: needs.cursors.get(token_of(session.bot)), needs)
    if entry is None or entry.value is None or entry.revision != place.revision:
        return None
    try:
        needs.check_fence()
    except LeaseLost:
        return None
    return cursor_in(entry, session.bot)


async def _tell_late(session: Session, messages: list[bytes], needs: Incoming) -> None:
    """What another owner of the bot has neither stored nor seen. Its window and its media are not for us to touch."""
    await _pass_media(session, needs)
    binding = await _binding(session, needs)
    entry = await retry(lambda: needs.cursors.get(token_of(session.bot)), needs)
    record = cursor_in(entry, session.bot) or Cursor()
    record, seen = await retry(lambda: recollect(session.bot, record, needs), needs)
    if binding is not None:
        await retry(lambda: catch_up(binding, record, seen, needs), needs)
    fresh = [without_media(said, "store") for said in await _sort(session, binding, messages, seen, needs)]
    if binding is not None and fresh:
        await publish(_heard(binding, fresh, seen, needs), needs)


async def _binding(session: Session, needs: Incoming) -> Binding | None:
    """The bot's binding; None only where the bus has none: the news of a new one may be on their way."""
    if needs.bindings.get(session.bot) is None:
        await retry(lambda: needs.bindings.refresh(session.bot), needs)
    return needs.bindings.get(session.bot)


async def _pass_media(session: Session, needs: Incoming) -> None:
    binding = await _binding(session, needs)
    until = needs.clock.monotonic() + LATE_S
    while binding is not None and needs.clock.monotonic() < until:
        subject = needs.names.raw(shard_of(binding.sandbox), binding.bot)
        if await retry(partial(needs.history.last, needs.names.stream_raw, subject), needs) is None:
            return
        await needs.clock.sleep(0.2)
        binding = await _binding(session, needs)


async def _store(session: Session, polled: Polled, place: Place, needs: Incoming) -> Place:
    """Raises LeaseLost."""
    binding = await _binding(session, needs)
    fresh = await _sort(session, binding, polled.messages, place.seen, needs)
    last_seq = place.record.last_seq
    if binding is not None and fresh:
        await _remember(session, binding, fresh, needs)
        for user in dict.fromkeys(said.user for said in fresh):  # also of what waits for media: their window is open
            needs.heard(binding.sandbox, binding.bot, user)
        last_seq = await _tell(binding, fresh, place, needs)
        took_s = needs.clock.monotonic() - session.answered
        # the objective is about messages, not about batches
        needs.metrics.inbound_publish_duration.observe(took_s, len(fresh))
    record = msgspec.structs.replace(
        place.record, cursor=polled.cursor or place.record.cursor, last_seq=last_seq, seen=place.seen.newest()
    )
    if place.seen.unkept > max(NEWEST, ANSWERS * len(fresh)):
        record = await retry(lambda: keep_seen(session.bot, record, place.seen, needs), needs)
    revision = await retry(lambda: write_cursor(session.bot, record, place.revision, needs), needs)
    session.apart = bool(record.apart)
    return Place(msgspec.structs.replace(record, seen=[]), revision, place.seen)


async def _sort(
    session: Session, binding: Binding | None, messages: list[bytes], seen: Seen, needs: Incoming
) -> list[Said]:
    """The messages that are new and the user's own, in order; the others are counted, or kept as dead letters."""
    fresh: list[Said] = []
    batch = Batch(skew_ms=needs.skew_ms)
    work = 0
    for raw in messages:
        work += 1 + len(raw) // 1024
        while work > TURN:
            work -= TURN
            await needs.turns.next()
        try:
            said = needs.read_message(raw)
        except Unreadable as exc:
            count(needs, "unsupported", "dead_lettered")
            await bury(session.bot, binding.sandbox if binding else "", raw, exc.detail, needs)
            continue
        if said.echo or said.user == session.bot:  # some echoes name no type (4.1)
            count(needs, said.kind, "rejected")
        elif seen.has(said.keys) or batch.has(said.keys):
            count(needs, said.kind, "duplicate")
            log.info("inbound.duplicate", bot=session.bot)
        elif binding is None:
            count(needs, said.kind, "unbound")
            await bury(session.bot, "", raw, f"The bot {session.bot} was not bound as it came.", needs)
            seen.add_all([said.keys], needs.clock.now_ms())  # a repeat is for none of its next sandboxes
        elif said.group and not needs.groups_as_direct:
            # an answer might go to the group, or to one of it who is not the bot's user
            count(needs, said.kind, "dead_lettered")
            await bury(session.bot, binding.sandbox, raw, "It was written in a group.", needs, reason="group")
            seen.add_all([said.keys], needs.clock.now_ms())
        else:
            if said.broken:
                await bury(session.bot, binding.sandbox, raw, said.broken, needs)
            batch.add(said.keys)
            fresh.append(said)
    return fresh


async def _tell(binding: Binding, fresh: list[Said], place: Place, needs: Incoming) -> int:
    """Stores messages in their order: in the inbox, or raw from the first one on that has to wait for media.

    Returns the sequence in WECHAT_IN up to which place.seen knows everything.
    """
    if not binding.options.media:
        fresh = [without_media(said, "off") if said.fetches else said for said in fresh]
    first = next((number for number, said in enumerate(fresh) if said.fetches), len(fresh))
    if await _waits(binding, needs):
        first = 0
    last_seq = place.record.last_seq
    for start in range(0, first, PIPELINE):
        heard = _heard(binding, fresh[start : min(first, start + PIPELINE)], place.seen, needs)
        last_seq = max(last_seq, await publish(heard, needs))
    for start in range(first, len(fresh), PIPELINE):
        heard = _heard(binding, fresh[start : start + PIPELINE], place.seen, needs)
        last_seq = max(last_seq, await _store_raw(heard, last_seq, needs))
    return last_seq


async def _waits(binding: Binding, needs: Incoming) -> bool:
    """Whether a message of this bot waits for media; what comes now has to wait behind it."""
    waiting = await needs.waiting(binding.sandbox)
    if waiting is not None:
        return waiting.holds(binding.sandbox, binding.bot)
    subject = needs.names.raw(shard_of(binding.sandbox), binding.bot)
    left = await retry(lambda: needs.history.last(needs.names.stream_raw, subject), needs)
    return left is not None  # it is another replica's to tell, or the next owner's


def _heard(binding: Binding, fresh: list[Said], seen: Seen, needs: Incoming) -> list[Heard]:
    """From now on these messages are seen."""
    now_ms = needs.clock.now_ms()
    records = seen.add_all([said.keys for said in fresh], now_ms)
    return [
        Heard(said, binding.sandbox, binding.bot, now_ms, record) for said, record in zip(fresh, records, strict=True)
    ]


async def _store_raw(heard: list[Heard], last_seq: int, needs: Incoming) -> int:
    """Stores messages as iLink sent them, so that the next poll need not wait for a slow CDN.

    `last_seq`: none of these is in the inbox up to here. Returns the new one.
    """
    messages = [raw_message(one, last_seq, needs) for one in heard]
    acks = await needs.bus.publish_all(messages)
    waiting = await needs.waiting(heard[0].sandbox)
    for one, message, ack in zip(heard, messages, acks, strict=True):
        if not isinstance(ack, BusRefused):
            if waiting is not None:
                stored = Stored(message.subject, ack.seq, message.headers, message.payload)
                waiting.add(stored, suspect=ack.duplicate)
            continue
        log.error("inbound.raw_refused", bot=one.bot, code=ack.code, detail=ack.detail)
        if waiting is not None:
            await waiting.passed(one.sandbox, one.bot)
        needs.heard(one.sandbox, one.bot, one.said.user)
        last_seq = max(
            last_seq, await publish([msgspec.structs.replace(one, said=without_media(one.said, "store"))], needs)
        )
    return last_seq


async def _remember(session: Session, binding: Binding, fresh: list[Said], needs: Incoming) -> None:
    """Context token and window of each user in the batch, so that a fast answer finds them."""
    for user in dict.fromkeys(said.user for said in fresh):
        if not binding.user:
            await _learn_user(binding, user, needs)
        await _remember_user(session, binding, [said for said in fresh if said.user == user], needs)


async def _remember_user(session: Session, binding: Binding, said: list[Said], needs: Incoming) -> None:
    """`said`: by this one user."""
    peer = await retry(lambda: needs.contexts.peer(binding.bot, said[-1].user), needs)
    token = next((one.context_token for one in reversed(said) if one.context_token), "")
    now_ms = needs.clock.now_ms()

    def heard(context: Context) -> Context:
        return window.heard(
            context,
            message=said[-1].keys.id_for(binding.bot),
            token=token,
            now_ms=now_ms,
            written_ms=said[-1].sent_at_ms,
            # the shard's new owner may have one request out, of which only its trace in the record is known
            in_flight=int(context.hand is not None) if session.lingering else peer.in_flight,
        )

    await retry(lambda: needs.contexts.save(peer, heard), needs)
    needs.look(peer)


async def _learn_user(binding: Binding, user: str, needs: Incoming) -> None:
    """The binding named no user: this is who they are. An older bot of theirs in the sandbox is replaced."""

    def with_user(now: Binding) -> Binding | None:
        return None if now.user else msgspec.structs.replace(now, user=user)

    await retry(lambda: needs.bindings.change(binding.bot, with_user), needs)
    for other in needs.bindings.of_sandbox(binding.sandbox):
        if other.user == user and other.bot != binding.bot:  # WeChat has killed it: one user has one bot (1.3)
            await needs.events.binding(other.event("replaced", detail="The user is served by another bot now."))
            await retry(partial(needs.bindings.remove, other.bot), needs)
