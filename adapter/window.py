"""May something be sent to this user now? The window of iLink as a pure state machine (ilink-protocol 5.2, 6, 10.1).

`open` for so many sends and hours after each inbound message; after -2 `throttled` until the next one, or until one
probe after a long cool-down.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from adapter.contract import Window
from adapter.records import Context, Hand

Closed: TypeAlias = Literal["", "window_closed", "quota", "throttled"]
"""Why nothing may be sent; "" when it may."""

DONE_IDS = 32


class Rules(NamedTuple):
    """The settings that the window follows."""

    sends: int
    """Budget after an inbound message; 0: not counted."""
    hours: float
    cooldown_s: float
    """After -2: one probe after so long; 0: never."""

    @property
    def length_ms(self) -> int:
        return int(self.hours * 3_600_000)


def verdict(context: Context, now_ms: int, rules: Rules, *, needed: int = 1) -> Closed:
    """Whether `needed` sends fit now. More than the whole budget needs only a fresh window."""
    if not context.inbound_ms or not context.token or now_ms >= context.inbound_ms + rules.length_ms:
        return "window_closed"
    if context.blocked_ms and not _may_probe(context, now_ms, rules):
        return "throttled"
    if rules.sends and context.used + min(needed, rules.sends) > rules.sends:
        return "quota"
    return ""


def _may_probe(context: Context, now_ms: int, rules: Rules) -> bool:
    return rules.cooldown_s > 0 and now_ms >= context.blocked_ms + rules.cooldown_s * 1000


def opens_at_ms(context: Context, rules: Rules) -> int | None:
    """When time alone lets the next send through (the probe after -2); None: only the user can."""
    if context.blocked_ms and rules.cooldown_s > 0:
        return int(context.blocked_ms + rules.cooldown_s * 1000)
    return None


def heard(context: Context, *, message: str, token: str, now_ms: int, in_flight: int) -> Context:
    """The user wrote: a new window, unless it is the message that opened this one already (a replay after a crash).

    A message without a token keeps the one before (6). Sends in flight count against the new window, since the
    server may see them after the message.
    """
    token = token or context.token
    if message == context.inbound_id:
        return msgspec.structs.replace(context, token=token)
    return msgspec.structs.replace(
        context, token=token, inbound_ms=now_ms, inbound_id=message, used=in_flight, blocked_ms=0
    )


def leaving(context: Context, hand: Hand) -> Context:
    """A request is about to leave: counted first, so that a crash errs on the safe side.

    A repeat was counted, unless the user wrote since: if the first one got lost, it is this one that counts.
    """
    counts = hand.tried <= 1 or hand.counted_in != context.inbound_id
    hand = msgspec.structs.replace(hand, counted_in=context.inbound_id)
    return msgspec.structs.replace(context, used=context.used + counts, hand=hand)


def returned(context: Context, hand: Hand) -> Context:
    """iLink took nothing: the send does not count, unless a request before it got no answer. `hand`: without it."""
    return context if hand.tried else msgspec.structs.replace(context, used=max(0, context.used - 1))


def throttled(context: Context, hand: Hand, now_ms: int) -> Context:
    """iLink said -2. If the user wrote meanwhile, it speaks of the window before, and blocks nothing."""
    blocked_ms = now_ms if hand.counted_in == context.inbound_id else context.blocked_ms
    return msgspec.structs.replace(returned(context, hand), blocked_ms=blocked_ms, hand=hand)


def unblocked(context: Context) -> Context:
    """A send went through: whatever -2 meant, it is over."""
    return msgspec.structs.replace(context, blocked_ms=0) if context.blocked_ms else context


def settled(context: Context, command: str) -> Context:
    """A command has its final outcome; it may be the one in hand."""
    if context.hand is None or context.hand.command != command:
        return context
    return msgspec.structs.replace(context, hand=None, done=[*context.done, command][-DONE_IDS:])


def shown(context: Context, rules: Rules) -> Window:
    """The window as the bus sees it."""
    closes = context.inbound_ms + rules.length_ms if context.inbound_ms else None
    if not rules.sends:
        return Window(closes_at_ms=closes)
    remaining = max(0, rules.sends - context.used) if context.inbound_ms and not context.blocked_ms else 0
    return Window(remaining=remaining, closes_at_ms=closes)
