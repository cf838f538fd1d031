"""iLink's window as a pure state machine: may something be sent to this user now (ilink-protocol 5.2, 6, 10.1)?

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

Name: TypeAlias = Literal["", "open", "low", "closed"]
"""What a sandbox knows of a window; "": it was never told of one."""

DONE_IDS = 32
SENT_KEPT = 32
"""Times of sends kept per window: more than the budget."""
NEWS_MS = 1000
"""The news that a bot has moved reach its owner within this time, however much later they come where the bus is away:
nothing can be counted as about to leave then."""
LATE_MS = 300_000
"""A message that seems older than this when it comes tells of a wrong clock: polls that hang bring it sooner. Else a
clock that is behind would count the sends of all windows against each new one, for ever. A send that seems to leave
so much later than now tells of one that was ahead.
"""


class Rules(NamedTuple):
    """The settings that the window follows."""

    sends: int
    """Budget after an inbound message; 0: not counted."""
    hours: float
    cooldown_s: float
    """After -2: one probe after so long; 0: never."""
    reserve: int = 0
    """How many of `sends` are kept back for commands with `final`."""
    low: int = 0
    """Few are left when so many are, for commands without `final`; 0: never."""
    tokenless: bool = False
    """Whether a window is open although iLink gave no context token with what the user wrote."""

    def budget(self, *, final: bool = False) -> int:
        """Sends of a window for commands with or without `final`."""
        return self.sends if final else max(0, self.sends - self.reserve)


class Phase(NamedTuple):
    """How a window stands for commands without `final`."""

    name: Name
    reason: Closed = ""


def verdict(context: Context, now_ms: int, rules: Rules, *, needed: int = 1, final: bool = False) -> Closed:
    """Why `needed` sends do not fit now; "" if they do. What needs more than the whole budget fits a fresh window."""
    if not _in_time(context, now_ms, rules):
        return "window_closed"
    if context.blocked_ms and not _may_probe(context, now_ms, rules):
        return "throttled"
    budget = rules.budget(final=final)
    if rules.sends and needed and context.used + max(1, min(needed, budget)) > budget:
        return "quota"
    return ""


def phase(context: Context, now_ms: int, rules: Rules) -> Phase:
    """How the window stands for the sandbox. A probe that -2 allows (`verdict`) does not make it open."""
    if not _in_time(context, now_ms, rules):
        return Phase("closed", "window_closed")
    if context.blocked_ms:
        return Phase("closed", "throttled")
    if not rules.sends:
        return Phase("open")
    budget = rules.budget()
    left = budget - context.used
    if left <= 0:
        return Phase("closed", "quota")
    return Phase("low" if left <= rules.low < budget else "open")  # a budget that is low from the start is no news


def change(told: Name, found: Name) -> Literal["", "opened", "low", "closed"]:
    """What to tell a sandbox that knows `told`, now that it is `found`; "": nothing."""
    match told, found:
        case "open" | "low", "closed":
            return "closed"
        case "" | "closed", "open" | "low":
            return "opened"
        case "open", "low":
            return "low"
        case _:  # of a new window after a low one, the message that opened it tells
            return ""


def told_by(what: Literal["opened", "low", "closed"]) -> Name:
    """What a sandbox knows after an event."""
    return "open" if what == "opened" else what


def takes_last(context: Context, rules: Rules) -> bool:
    """Whether the send that leaves next is the last one of its window."""
    return bool(rules.sends) and context.used + 1 >= rules.sends


def closes_at_ms(context: Context, rules: Rules) -> int:
    """When the window closes by time, if it is open."""
    return context.inbound_ms + int(rules.hours * 3_600_000)


def _in_time(context: Context, now_ms: int, rules: Rules) -> bool:
    begun = bool(context.inbound_ms and (context.token or rules.tokenless))
    return begun and now_ms < closes_at_ms(context, rules)


def _may_probe(context: Context, now_ms: int, rules: Rules) -> bool:
    return rules.cooldown_s > 0 and now_ms >= context.blocked_ms + rules.cooldown_s * 1000


def opens_at_ms(context: Context, rules: Rules) -> int | None:
    """When time alone lets the next send through (the probe after -2); None: only the user can."""
    if context.blocked_ms and rules.cooldown_s > 0:
        return int(context.blocked_ms + rules.cooldown_s * 1000)
    return None


def heard(context: Context, *, message: str, token: str, now_ms: int, in_flight: int, written_ms: int = 0) -> Context:
    """The user wrote: a new window, unless it is the message that opened this one already (a replay after a crash).

    A message without a token keeps the one before (6). The server's window opened when the user wrote (`written_ms`,
    WeChat's clock; 0: not known), so what was sent since counts against it, and so do sends in flight, since the
    server may see them after the message. A -2 to what was sent after that speaks of the new window already; a time
    in whole seconds may be any moment of its second.
    """
    if now_ms - written_ms > LATE_MS:
        written_ms = 0
    until_ms = now_ms + LATE_MS  # what is later was noted before the clock was set right
    token = token or context.token
    if message == context.inbound_id:
        return msgspec.structs.replace(context, token=token)
    since = [sent_ms for sent_ms in context.sent_ms if 0 < written_ms <= sent_ms <= until_ms]
    latest_ms = written_ms + 999 if written_ms % 1000 == 0 else written_ms
    return msgspec.structs.replace(
        context,
        token=token,
        inbound_ms=now_ms,
        inbound_id=message,
        used=max(in_flight, len(since)),
        sent_ms=since,
        blocked_ms=context.blocked_ms if written_ms and latest_ms <= context.blocked_ms <= until_ms else 0,
    )


def leaving(context: Context, hand: Hand, now_ms: int) -> Context:
    """A request is about to leave: counted first, so that a crash errs on the safe side.

    A repeat was counted, unless the user wrote since: if the first one got lost, it is this one that counts. So it is
    the time of the repeat that is kept: whether the user wrote since may not be known yet.

    Whether it is one is what the record says: the owner before may have heard an answer, or sent it once more, after
    `hand` was read.
    """
    known = context.hand
    if context.left is not None and context.left.client == hand.client:
        context = msgspec.structs.replace(context, left=None)
    if known is not None and known.client != hand.client:
        if known.sandbox == hand.sandbox:  # an owner before us may have told how it ended, and could not note it
            context = settled(context, known.client, sent=known.is_begun)
        if known.is_begun:  # or it may still have to end
            context = msgspec.structs.replace(context, left=known)
    out = 0 if known is None or (known.client, known.part) != (hand.client, hand.part) else known.tried
    counts = known is None or not out or known.counted_in != context.inbound_id
    hand = msgspec.structs.replace(hand, counted_in=context.inbound_id, tried=max(hand.tried, out + 1))
    earlier = context.sent_ms if counts else context.sent_ms[:-1]
    sent_ms = [*earlier, now_ms][-SENT_KEPT:]
    return msgspec.structs.replace(context, used=context.used + counts, sent_ms=sent_ms, hand=hand)


def returned(context: Context, hand: Hand) -> Context:
    """iLink took nothing: the send does not count, unless a request before it got no answer. `hand`: without it."""
    if hand.tried:
        return msgspec.structs.replace(context, hand=hand)
    return msgspec.structs.replace(context, used=max(0, context.used - 1), sent_ms=context.sent_ms[:-1], hand=hand)


def throttled(context: Context, hand: Hand, now_ms: int) -> Context:
    """iLink said -2 to what left last. If the user wrote since, which may be heard later (`heard`), it speaks of the
    window before, and blocks nothing."""
    left_ms = context.sent_ms[-1] if context.sent_ms else now_ms
    blocked_ms = left_ms if hand.counted_in == context.inbound_id else context.blocked_ms
    return msgspec.structs.replace(returned(context, hand), blocked_ms=blocked_ms)


def unanswered(context: Context, hand: Hand, now_ms: int) -> Context:
    """The request that left last got no answer: iLink may have counted it at any moment up to now."""
    return msgspec.structs.replace(context, sent_ms=[*context.sent_ms[:-1], now_ms], hand=hand)


def taken(context: Context, hand: Hand, now_ms: int) -> Context:
    """iLink took what left last: whatever -2 meant, it is over."""
    return msgspec.structs.replace(context, sent_ms=[*context.sent_ms[:-1], now_ms], blocked_ms=0, hand=hand)


def settled(context: Context, client: str, *, sent: bool) -> Context:
    """A command, and what was merged into it, has its final outcome; it may be the one in hand.

    Not `sent`: none of it can be on the phone, or its sender was told that it was refused. With the same id it may be
    tried again.
    """
    hand, left = context.hand, context.left
    if hand is not None and hand.client == client:
        over, hand = hand, None
    elif left is not None and left.client == client:
        over, left = left, None
    else:
        return context
    names = [named(over.sandbox, one.command) for one in over.all] if sent else []
    return msgspec.structs.replace(context, hand=hand, left=left, done=[*context.done, *names][-DONE_IDS:])


def known_also(stored: Context, known: Context, base: Context) -> Context:
    """A record that somebody else wrote, with what was learned here of commands since it was as in `base`."""
    done = [*stored.done, *(one for one in known.done if one not in stored.done)][-DONE_IDS:]
    hand, ours = stored.hand, known.hand
    as_before = hand == base.hand  # who wrote it wrote of something else
    if as_before or (hand and ours and hand.client == ours.client and ours.part > hand.part):
        hand = ours
    left = known.left if stored.left == base.left else stored.left
    return msgspec.structs.replace(stored, done=done, hand=hand, left=left)


def moved(context: Context, hand: Hand | None, done: list[str], waiting: set[str]) -> Context:
    """The record of a user and their bot, with what was sent to them over others. `waiting`: what may still have to
    end, by client."""
    done = [*done, *(one for one in context.done if one not in done)][-DONE_IDS:]
    own = context.hand
    if own and hand and own.sandbox == hand.sandbox:  # the own one knows better: it went on here
        is_over = not own.is_any(waiting) and (hand.is_begun or not own.is_begun)  # what was begun may come again yet
        hand = hand if is_over and hand.is_any(waiting) else own
    return msgspec.structs.replace(context, done=done, hand=hand or own)


def is_out(context: Context, sandbox: str, now_ms: int, answer_s: float) -> bool:
    """Whether a request of another sandbox may be out, which the bot served until just now: its owner may be another
    replica. Of one whose clock is far off nothing can be said."""
    hand = context.hand
    if hand is None or hand.sandbox == sandbox or not hand.tried:
        return False
    left_ms = context.sent_ms[-1] if context.sent_ms else context.inbound_ms  # at the latest: the user wrote since
    return abs(now_ms - left_ms) < answer_s * 1000 + NEWS_MS


def is_repeat(context: Context, sandbox: str, command: str, client: str) -> bool:
    """Whether a command is the second publish of one that was sent, or may have been: by another message."""
    if named(sandbox, command) in context.done:
        return True
    hand = context.hand
    if hand is None or not hand.is_begun or hand.sandbox != sandbox:
        return False
    return any(one.command == command and one.client != client for one in hand.all)


def named(sandbox: str, command: str) -> str:
    """A command's id together with its sandbox: a bot may serve several in its time."""
    return f"{sandbox}/{command}"


def shown(context: Context, now_ms: int, rules: Rules) -> Window:
    """The window as the bus sees it now."""
    if not _in_time(context, now_ms, rules):
        return Window(remaining=0)
    closes_ms = closes_at_ms(context, rules)
    if context.blocked_ms:
        return Window(remaining=0, closes_at_ms=closes_ms)
    if not rules.sends:
        return Window(closes_at_ms=closes_ms)
    remaining = max(0, rules.budget() - context.used)
    reserved = max(0, rules.sends - context.used) - remaining
    return Window(remaining=remaining, reserved=reserved, closes_at_ms=closes_ms)
