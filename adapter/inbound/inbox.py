"""Publishes users' messages to the inboxes of sandboxes.

Each message ends on the bus: as itself, as a stub if the bus refuses its size, or as a dead letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.content.quotes import resolve_quote
from adapter.contract import messages as contract
from adapter.contract.headers import derive_traceparent
from adapter.contract.messages import Inbound
from adapter.contract.names import H_JOURNAL, H_MSG_ID, H_SCHEMA, H_TRACEPARENT, digest
from adapter.conversation.conversations import Conversations
from adapter.errors import BusRefused, Temporary
from adapter.kit.timing import Clock, backoff
from adapter.observability.events import BusAccess
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import InboundMessage, Message, PubAck

log = structlog.get_logger()

T = TypeVar("T")

LARGE = 64 * 1024
"""Size above which a message is published alone. No text from a phone is larger, and every bus accepts this much."""


class AddressedMessage(msgspec.Struct, frozen=True, gc=False):
    """A user's message with the sandbox that gets it."""

    inbound: InboundMessage
    sandbox: str
    bot: str
    received_ms: int
    id: str
    """Message id on the bus."""
    place: str
    """Journal record and index of the message in it."""


class PublishDeps(NamedTuple):
    """Dependencies of publishing messages."""

    access: BusAccess
    bindings: Bindings
    conversations: Conversations
    leases: Leases
    clock: Clock
    metrics: Metrics
    ensure_owner: Callable[[], None] | None = None
    """Called before each write. Raises LeaseLost."""


def without_media(inbound: InboundMessage, reason: str) -> InboundMessage:
    """The message without a download of its media; `reason` is one of contract.MediaReason."""
    items = list(inbound.items)
    for fetch in inbound.fetches:
        items[fetch.item] = msgspec.structs.replace(items[fetch.item], reason=reason)
    return msgspec.structs.replace(inbound, items=items, fetches=())


async def publish(addressed: Sequence[AddressedMessage], deps: PublishDeps) -> None:
    """Publishes messages of one user for one sandbox in this order, pipelined. Raises LeaseLost.

    A large message is published alone: if the bus refuses its size, its stub keeps its place in the order.
    """
    if any(message.inbound.reference is not None for message in addressed):
        addressed = [await _with_quote(message, deps) for message in addressed]
    start = 0
    for number, message in enumerate(addressed):
        if len(message.inbound.raw) > LARGE:
            for part in (addressed[start:number], [message]):
                await _publish_part(part, deps)
            start = number + 1
    await _publish_part(addressed[start:], deps)


async def _publish_part(addressed: Sequence[AddressedMessage], deps: PublishDeps) -> None:
    """Publishes messages together. Stubs of those that the bus refuses follow at the end."""
    if not addressed:
        return
    window = await _window(addressed[0], deps)
    messages = [_message(item, window, deps) for item in addressed]
    acks = await _publish_all(messages, addressed[0].bot, deps)
    now_ms = deps.clock.now_ms()
    stored: Counter[tuple[str, bool]] = Counter()
    refused: list[tuple[AddressedMessage, Message, BusRefused]] = []
    for item, message, ack in zip(addressed, messages, acks, strict=True):
        if isinstance(ack, BusRefused):
            refused.append((item, message, ack))
            continue
        stored[item.inbound.kind, ack.duplicate] += 1
        log.info("inbound.published", sandbox=item.sandbox, message=item.id, place=item.place, sequence=ack.seq)
        if item.inbound.sent_at_ms:
            deps.metrics.inbound_age.observe(max(0, now_ms - item.inbound.sent_at_ms) / 1000)
    for (kind, duplicate), times in stored.items():
        deps.metrics.inbound_messages.child(kind, "duplicate" if duplicate else "published").inc(times)
    for item, message, refusal in refused:
        count(deps, item.inbound.kind, "publish_failed")
        log.error("inbound.refused", sandbox=item.sandbox, message=item.id, code=refusal.code, detail=refusal.detail)
        await _publish_stub(item, message, deps)


async def _publish_all(messages: Sequence[Message], bot: str, deps: PublishDeps) -> list[PubAck | BusRefused]:
    """Publishes messages, and retries while the stream is full, which happens only if its discard policy was
    changed."""
    acks = await deps.access.bus.publish_all(messages)
    failures = 0
    while full := [number for number, ack in enumerate(acks) if isinstance(ack, BusRefused) and ack.is_full]:
        failures += 1
        log.error("inbound.full", bot=bot, waiting=len(full), failures=failures)
        await deps.clock.sleep(backoff(failures, first_s=0.5, longest_s=10.0))
        again = await deps.access.bus.publish_all([messages[number] for number in full])
        for number, ack in zip(full, again, strict=True):
            acks[number] = ack
    return acks


async def _with_quote(message: AddressedMessage, deps: PublishDeps) -> AddressedMessage:
    """The message with the words that it quotes, if the bot has sent them lately."""
    inbound = message.inbound
    if inbound.quote is None or inbound.reference is None or not (ids := inbound.reference.ids):
        return message
    sent = await retry(
        lambda: deps.conversations.find_sent(message.sandbox, inbound.user, ids), deps.clock, message.bot
    )
    if sent is None:
        return message
    quote = resolve_quote(inbound.quote, inbound.reference, sent=sent.text, kind=sent.kind)
    return msgspec.structs.replace(message, inbound=msgspec.structs.replace(inbound, quote=quote))


def _message(addressed: AddressedMessage, window: contract.Window, deps: PublishDeps) -> Message:
    inbound = Inbound(
        id=addressed.id,
        sandbox=addressed.sandbox,
        bot=addressed.bot,
        user=addressed.inbound.user,
        sent_at_ms=addressed.inbound.sent_at_ms,
        received_at_ms=addressed.received_ms,
        text=addressed.inbound.text,
        items=addressed.inbound.items,
        quote=addressed.inbound.quote,
        window=window,
    )
    headers = {
        H_MSG_ID: inbound.id,
        H_SCHEMA: contract.SCHEMA_VERSION,
        H_JOURNAL: addressed.place,
        H_TRACEPARENT: derive_traceparent(inbound.id),
    }
    subject = deps.access.names.inbox(addressed.sandbox)
    return Message("in", subject, msgspec.json.encode(inbound), headers, deps.ensure_owner)


async def _window(message: AddressedMessage, deps: PublishDeps) -> contract.Window:
    """The window of the user; empty once the bot serves another sandbox."""
    sandbox, bot = message.sandbox, message.bot
    binding = deps.bindings.get(bot)
    if binding is None or binding.sandbox != sandbox:
        return contract.Window(remaining=0)
    return await retry(lambda: deps.conversations.shown_window(sandbox, message.inbound.user), deps.clock, bot)


async def _publish_stub(addressed: AddressedMessage, message: Message, deps: PublishDeps) -> None:
    """Handles a message whose size the bus refuses: a dead letter keeps the bytes, and the inbox gets a stub."""
    why = "The bus refuses a message of this size."
    await dead_letter(addressed.bot, addressed.sandbox, addressed.inbound.raw, why, deps, message=addressed.id)
    whole = msgspec.json.decode(message.payload, type=Inbound)
    stub = msgspec.structs.replace(
        whole, text="", quote=None, items=[contract.UnsupportedItem(type=0, reason="too_large")]
    )
    try:
        await deps.access.bus.publish(msgspec.structs.replace(message, payload=msgspec.json.encode(stub)))
    except BusRefused as exc:
        log.error("inbound.lost_to_dead_letters", sandbox=addressed.sandbox, message=addressed.id, detail=exc.detail)


async def dead_letter(
    bot: str,
    sandbox: str,
    raw: bytes,
    why: str,
    deps: PublishDeps,
    *,
    reason: str = "unreadable",
    message: str = "",
) -> None:
    """Keeps a message as a dead letter. `sandbox` "": the bot has no sandbox. `message`: its id on the bus, if it has
    one."""
    await deps.access.events.publish_dead_letter(
        "IN",
        raw,
        subject=deps.access.names.inbox(sandbox) if sandbox else "",
        headers={H_TRACEPARENT: derive_traceparent(message), H_MSG_ID: message} if message else {},
        reason=reason if sandbox else "not_bound",
        detail=why,
        msg_id=f"dead:{bot}:{digest(raw)}",
        sandbox=sandbox,
    )


async def retry(work: Callable[[], Awaitable[T]], clock: Clock, bot: str) -> T:
    """Retries until the work succeeds, even if the bus refuses the write: iLink may not deliver the messages again,
    and an operator can lift a limit. Raises LeaseLost.
    """
    failures = 0
    while True:
        try:
            return await work()
        except (Temporary, BusRefused) as exc:
            failures += 1
            log.warning("inbound.retrying", bot=bot, reason=exc.reason, detail=exc.detail, failures=failures)
            longest_s = 1.0 if isinstance(exc, Temporary) else 10.0
            await clock.sleep(backoff(failures, first_s=0.05, longest_s=longest_s))


def count(deps: PublishDeps, kind: str, outcome: str) -> None:
    deps.metrics.inbound_messages.child(kind, outcome).inc()
