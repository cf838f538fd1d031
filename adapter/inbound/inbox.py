"""Messages of users into the inboxes of sandboxes: what a message says on the bus, and what is done when it refuses.

Whatever was heard, something of it is on the bus in the end: the message, a stub of it, or a dead letter.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.messages import Inbound
from adapter.contract.names import H_JOURNAL, H_MSG_ID, H_SCHEMA, digest
from adapter.conversation.conversations import Conversations
from adapter.errors import BusRefused, Temporary
from adapter.inbound.recall import QuoteResolver, ids_header
from adapter.kit.timing import Clock, backoff
from adapter.observability.events import BusAccess
from adapter.observability.metrics import Metrics
from adapter.ownership.leases import Leases
from adapter.ports import InboundMessage, Message, PubAck

log = structlog.get_logger()

T = TypeVar("T")

QUOTES_S = 2.0
"""How long the quotes of messages that are stored together are looked up; then they are told without their words."""
LARGE = 64 * 1024
"""Bytes of a message as iLink sent it: no text of a phone has so many, and no bus refuses fewer."""


class AddressedMessage(msgspec.Struct, frozen=True, gc=False):
    """A message of a user for the sandbox that it was said to."""

    said: InboundMessage
    sandbox: str
    bot: str
    received_ms: int
    id: str
    """Its id on the bus."""
    place: str
    """Which record of the journal it is of, and where it stands in there."""


class PublishDeps(NamedTuple):
    """What publishing messages needs."""

    access: BusAccess
    bindings: Bindings
    conversations: Conversations
    recall: QuoteResolver
    leases: Leases
    clock: Clock
    metrics: Metrics
    ensure_owner: Callable[[], None] | None = None
    """Asked before each write. Raises LeaseLost."""


def without_media(said: InboundMessage, reason: str) -> InboundMessage:
    """The message as it is told when nobody fetches its media; `reason` is one of contract.MediaReason."""
    items = list(said.items)
    for fetch in said.fetches:
        items[fetch.item] = msgspec.structs.replace(items[fetch.item], reason=reason)
    return msgspec.structs.replace(said, items=items, fetches=())


async def publish(heard: Sequence[AddressedMessage], deps: PublishDeps) -> None:
    """Stores messages in this order, pipelined. Raises LeaseLost.

    A large one by itself: the bus may refuse it for its size, and its stub is to have its place.
    """
    heard, until = list(heard), asyncio.get_running_loop().time() + QUOTES_S
    for number, one in enumerate(heard):
        if one.said.reference is not None:  # looked up only now: a quote is rare
            heard[number] = await _with_quote(one, heard[:number], until, deps)
    start = 0
    for number, one in enumerate(heard):
        if len(one.said.raw) > LARGE:
            for part in (heard[start:number], [one]):
                await _publish_part(part, deps)
            start = number + 1
    await _publish_part(heard[start:], deps)


async def _publish_part(heard: Sequence[AddressedMessage], deps: PublishDeps) -> None:
    """Messages that the bus is asked to store at once; those that it refuses come last, as stubs."""
    if not heard:
        return
    shown: dict[tuple[str, str, str], contract.Window] = {}
    messages = []
    for one in heard:
        to = one.sandbox, one.bot, one.said.user
        if to not in shown:
            shown[to] = await _window(*to, deps)
        messages.append(_message(one, shown[to], deps))
    acks = await _publish_all(messages, deps)
    now_ms = deps.clock.now_ms()
    stored: Counter[tuple[str, bool]] = Counter()
    refused: list[tuple[AddressedMessage, Message, BusRefused]] = []
    for one, message, ack in zip(heard, messages, acks, strict=True):
        if isinstance(ack, BusRefused):
            refused.append((one, message, ack))
            continue
        stored[one.said.kind, ack.duplicate] += 1
        if one.said.sent_at_ms:
            deps.metrics.inbound_age.observe(max(0, now_ms - one.said.sent_at_ms) / 1000)
    for (kind, duplicate), times in stored.items():
        deps.metrics.inbound_messages.child(kind, "duplicate" if duplicate else "published").inc(times)
    for one, message, refusal in refused:
        count(deps, one.said.kind, "publish_failed")
        log.error("inbound.refused", bot=one.bot, code=refusal.code, detail=refusal.detail)
        await _publish_stub(one, message, deps)


async def _publish_all(messages: Sequence[Message], deps: PublishDeps) -> list[PubAck | BusRefused]:
    """Stores them, and waits where the stream is full, which it is only if somebody changed what it discards."""
    acks = await deps.access.bus.publish_all(messages)
    failures = 0
    while full := [number for number, ack in enumerate(acks) if isinstance(ack, BusRefused) and ack.is_full]:
        failures += 1
        log.error("inbound.full", waiting=len(full), failures=failures)
        await deps.clock.sleep(backoff(failures, first_s=0.5, longest_s=10.0))
        again = await deps.access.bus.publish_all([messages[number] for number in full])
        for number, ack in zip(full, again, strict=True):
            acks[number] = ack
    return acks


async def _with_quote(
    one: AddressedMessage, before: Sequence[AddressedMessage], until: float, deps: PublishDeps
) -> AddressedMessage:
    """`before`: what came in the same answer, and is on no bus yet. `until`: the time of the loop."""
    earlier = [other.said for other in before if other.sandbox == one.sandbox]
    try:
        async with asyncio.timeout_at(until):
            said = await retry(lambda: deps.recall.resolve(one.sandbox, one.bot, one.said, earlier), deps.clock)
    except TimeoutError:
        log.info("quote.not_found", bot=one.bot)
        said = deps.recall.leave(one.said)
    return msgspec.structs.replace(one, said=said)


def _message(one: AddressedMessage, shown: contract.Window, deps: PublishDeps) -> Message:
    inbound = Inbound(
        id=one.id,
        sandbox=one.sandbox,
        bot=one.bot,
        user=one.said.user,
        sent_at_ms=one.said.sent_at_ms,
        received_at_ms=one.received_ms,
        text=one.said.text,
        items=one.said.items,
        quote=one.said.quote,
        window=shown,
    )
    headers = {
        H_MSG_ID: inbound.id,
        H_SCHEMA: contract.SCHEMA_VERSION,
        H_JOURNAL: one.place,
        **ids_header(one.said),
    }
    subject = deps.access.names.inbox(one.sandbox)
    return Message("in", subject, msgspec.json.encode(inbound), headers, deps.ensure_owner)


async def _window(sandbox: str, bot: str, user: str, deps: PublishDeps) -> contract.Window:
    """What the sandbox may still send to the user: nothing once the bot serves it no longer."""
    binding = deps.bindings.get(bot)
    if binding is None or binding.sandbox != sandbox:
        return contract.Window(remaining=0)
    return await retry(lambda: deps.conversations.shown_window(sandbox, bot, user), deps.clock)


async def _publish_stub(one: AddressedMessage, message: Message, deps: PublishDeps) -> None:
    """The bus refuses this message for its size: the reader learns of it, the bytes go to the dead letters."""
    await dead_letter(one.bot, one.sandbox, one.said.raw, "The bus refuses a message of this size.", deps)
    whole = msgspec.json.decode(message.payload, type=Inbound)
    stub = msgspec.structs.replace(
        whole, text="", quote=None, items=[contract.UnsupportedItem(type=0, reason="too_large")]
    )
    try:
        await deps.access.bus.publish(msgspec.structs.replace(message, payload=msgspec.json.encode(stub)))
    except BusRefused as exc:
        log.error("inbound.lost_to_dead_letters", bot=one.bot, detail=exc.detail)


async def dead_letter(
    bot: str, sandbox: str, raw: bytes, why: str, deps: PublishDeps, *, reason: str = "unreadable"
) -> None:
    """Keeps what iLink sent as a dead letter. `sandbox` "": the bot is bound to none."""
    await deps.access.events.publish_dead_letter(
        "IN",
        raw,
        subject=deps.access.names.inbox(sandbox) if sandbox else "",
        headers={},
        reason=reason if sandbox else "not_bound",
        detail=why,
        msg_id=f"dead:{bot}:{digest(raw)}",
        sandbox=sandbox,
    )


async def retry(work: Callable[[], Awaitable[T]], clock: Clock) -> T:
    """What is in hand is tried until it is done, also where the bus refuses it: iLink may count it as delivered, and
    whoever had the bucket refuse what is written can have it take that again. Raises LeaseLost.
    """
    failures = 0
    while True:
        try:
            return await work()
        except (Temporary, BusRefused) as exc:
            failures += 1
            log.warning("inbound.retrying", reason=exc.reason, detail=exc.detail, failures=failures)
            longest_s = 1.0 if isinstance(exc, Temporary) else 10.0
            await clock.sleep(backoff(failures, first_s=0.05, longest_s=longest_s))


def count(deps: PublishDeps, kind: str, outcome: str) -> None:
    deps.metrics.inbound_messages.child(kind, outcome).inc()
