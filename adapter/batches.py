"""One batch of a poll onto the bus: sorted, told to the window, stored, and only then the cursor.

Whatever is in the batch, something of it is on the bus in the end: the message, a stub of it, or a dead letter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from adapter import contract, window
from adapter.contract import Inbound
from adapter.cursors import write_cursor
from adapter.dedup import Seen, digest
from adapter.errors import BusRefused, Temporary, Unreadable
from adapter.ports import Message, Polled, Said
from adapter.records import Binding
from adapter.sessions import Incoming, Place, Session, binding_event
from adapter.timing import backoff

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
            last_seq = max(last_seq, await _publish(binding, fresh[start : start + PIPELINE], place.seen, needs))
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
            await needs.events.binding(binding_event(other, "replaced", "", "The user is served by another bot now."))
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
