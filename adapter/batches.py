"""One batch of a poll onto the bus: sorted, told to the window, stored, and only then the cursor."""

from __future__ import annotations

import msgspec
import structlog

from adapter import window
from adapter.cursors import write_cursor
from adapter.dedup import Seen
from adapter.errors import Unreadable
from adapter.inbox import Heard, bury, count, publish, retry
from adapter.ports import Polled, Said
from adapter.records import Binding
from adapter.sessions import Incoming, Place, Session, binding_event

log = structlog.get_logger()

PIPELINE = 256
"""Messages stored at once; bounds the memory of a huge batch."""


async def store(session: Session, polled: Polled, place: Place, needs: Incoming) -> Place:
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
            heard = _heard(binding, fresh[start : start + PIPELINE], place.seen, needs)
            last_seq = max(last_seq, await publish(heard, needs))
        needs.metrics.inbound_publish_duration.observe(needs.clock.monotonic() - arrived)
    record = msgspec.structs.replace(
        place.record,
        cursor=polled.cursor or place.record.cursor,
        seen=place.seen.records(),
        last_seq=last_seq,
    )
    revision = await write_cursor(session.bot, record, place.revision, needs)
    if binding is not None:
        for user in dict.fromkeys(said.user for said in fresh):
            needs.heard(binding.sandbox, binding.bot, user)
    return Place(record, revision, place.seen)


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
            count(needs, "unsupported", "dead_lettered")
            await bury(session.bot, binding.sandbox if binding else "", raw, exc.detail, needs)
            continue
        if said.echo:
            count(needs, said.kind, "rejected")
        elif seen.has(said.keys) or batch.has(said.keys):
            count(needs, said.kind, "duplicate")
            log.info("inbound.duplicate", bot=session.bot)
        elif binding is None:
            count(needs, said.kind, "unbound")
            await bury(session.bot, "", raw, "The bot is not bound any more.", needs)
        else:
            if said.broken:
                await bury(session.bot, binding.sandbox, raw, said.broken, needs)
            batch.add(said.keys, needs.clock.now_ms())
            fresh.append(said)
    return fresh


def _heard(binding: Binding, fresh: list[Said], seen: Seen, needs: Incoming) -> list[Heard]:
    """From now on these messages are seen."""
    now_ms = needs.clock.now_ms()
    return [Heard(said, binding.sandbox, binding.bot, now_ms, seen.add(said.keys, now_ms)) for said in fresh]


async def _remember(binding: Binding, fresh: list[Said], needs: Incoming) -> None:
    """Context token and window of each user in the batch, so that a fast answer finds them."""
    for user in dict.fromkeys(said.user for said in fresh):
        if not binding.user:
            await _learn_user(binding, user, needs)
        newest = [said for said in fresh if said.user == user][-1]
        tokens = [said.context_token for said in fresh if said.user == user and said.context_token]
        peer = await retry(lambda user=user: needs.contexts.peer(binding.bot, user), needs)  # type: ignore[misc]
        ident, token, now_ms = newest.keys.id_for(binding.bot), (tokens or [""])[-1], needs.clock.now_ms()
        await retry(
            lambda peer=peer, ident=ident, token=token, now_ms=now_ms: needs.contexts.save(  # type: ignore[misc]
                peer,
                lambda context: window.heard(
                    context, message=ident, token=token, now_ms=now_ms, in_flight=peer.in_flight
                ),
            ),
            needs,
        )
        needs.look(peer)


async def _learn_user(binding: Binding, user: str, needs: Incoming) -> None:
    """The binding named no user: this is who they are. An older bot of theirs in the sandbox is replaced."""

    def with_user(now: Binding) -> Binding | None:
        return None if now.user else msgspec.structs.replace(now, user=user)

    await retry(lambda: needs.bindings.change(binding.bot, with_user), needs)
    for other in needs.bindings.of_sandbox(binding.sandbox):
        if other.user == user and other.bot != binding.bot:  # WeChat has killed it: one user has one bot (1.3)
            await needs.events.binding(binding_event(other, "replaced", "", "The user is served by another bot now."))
            await retry(lambda other=other: needs.bindings.remove(other.bot), needs)  # type: ignore[misc]
