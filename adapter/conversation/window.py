"""iLink's send window as pure functions: may something be sent to this user now?

What is known of the window is in docs/reference/ilink-protocol.md, "Refused sends" and "Context tokens".

`open` for so many sends and hours after each inbound message; after -2 `throttled` until the next one, or until one
probe after a long cool-down.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from adapter.contract.messages import Window
from adapter.conversation.record import ConversationRecord, SendProgress, SendWindow, WindowPhase

Closed: TypeAlias = Literal["", "window_closed", "quota", "throttled", "reserved"]
"""Why nothing may be sent; "" when it may."""

SENT_KEPT = 32
"""Times of sends kept per window: more than the budget."""
COOLDOWN_S = 3600.0
"""A throttle by rate is over after about an hour without attempts; each attempt extends it."""
CLOCK_ERROR_MS = 300_000
"""A message that seems older than this when it comes tells of a wrong clock: polls that hang bring it sooner. Else a
clock that is behind would count the sends of all windows against each new one, for ever. A send that seems to leave
so much later than now tells of one that was ahead."""


class WindowPolicy(NamedTuple):
    """The settings that the window follows."""

    sends: int
    """Budget after an inbound message; 0: not counted."""
    hours: float
    cooldown_s: float = COOLDOWN_S
    """After -2: one probe after so long."""
    reserve: int = 0
    """How many of `sends` no command with `optional` may take."""
    low: int = 3
    """Few are left when so many are; 0: never."""

    def budget(self, *, optional: bool = False) -> int:
        """Sends of a window for a command."""
        return max(0, self.sends - self.reserve) if optional else self.sends


def send_blocker(
    record: ConversationRecord, now_ms: int, policy: WindowPolicy, *, needed: int = 1, optional: bool = False
) -> Closed:
    """Why `needed` sends do not fit now; "" if they do. What needs more than the whole budget fits a fresh window."""
    window = record.window
    if not _is_unexpired(record, now_ms, policy):
        return "window_closed"
    if window.throttled_at_ms and now_ms < probes_at_ms(window, policy):
        return "throttled"
    if not policy.sends or not needed:
        return ""
    budget = policy.budget(optional=optional)
    if window.sends_used + max(1, min(needed, budget)) <= budget:
        return ""
    return "reserved" if optional else "quota"


def phase(record: ConversationRecord, now_ms: int, policy: WindowPolicy) -> tuple[WindowPhase, Closed]:
    """How the window stands for the sandbox, and why it is closed. A probe that -2 allows does not make it open."""
    if not _is_unexpired(record, now_ms, policy):
        return "closed", "window_closed"
    if record.window.throttled_at_ms:
        return "closed", "throttled"
    if not policy.sends:
        return "open", ""
    left = policy.sends - record.window.sends_used
    if left <= 0:
        return "closed", "quota"
    return ("low" if left <= policy.low < policy.sends else "open"), ""  # low from the start is no news


def phase_change(announced: WindowPhase, current: WindowPhase) -> Literal["", "opened", "low", "closed"]:
    """The event that a sandbox needs which knows `announced`; "": none."""
    match announced, current:
        case "open" | "low", "closed":
            return "closed"
        case "" | "closed", "open" | "low":
            return "opened"
        case "open", "low":
            return "low"
        case _:  # a new window after a low one: the message that opened it tells
            return ""


def visible_window(record: ConversationRecord, now_ms: int, policy: WindowPolicy) -> Window:
    """The window as the bus sees it now."""
    if not _is_unexpired(record, now_ms, policy):
        return Window(remaining=0)
    closes_ms = closes_at_ms(record.window, policy)
    if record.window.throttled_at_ms:
        return Window(remaining=0, closes_at_ms=closes_ms)
    if not policy.sends:
        return Window(closes_at_ms=closes_ms)
    remaining = max(0, policy.sends - record.window.sends_used)
    return Window(remaining=remaining, reserved=min(policy.reserve, remaining), closes_at_ms=closes_ms)


def closes_at_ms(window: SendWindow, policy: WindowPolicy) -> int:
    """When an open window closes by time."""
    return window.opened_ms + int(policy.hours * 3_600_000)


def probes_at_ms(window: SendWindow, policy: WindowPolicy) -> float:
    """When time alone lets the next send through (the probe after -2)."""
    return window.throttled_at_ms + policy.cooldown_s * 1000


def _is_unexpired(record: ConversationRecord, now_ms: int, policy: WindowPolicy) -> bool:
    return bool(record.window.opened_ms and record.token) and now_ms < closes_at_ms(record.window, policy)


# transitions ------------------------------------------------------------------------------------------


def on_inbound(
    record: ConversationRecord,
    *,
    message: str,
    token: str,
    bot: str,
    now_ms: int,
    received_ms: int,
    written_ms: int,
    in_flight: int,
    sequence: int,
) -> ConversationRecord:
    """The user wrote: opens a new window, unless this message, or a later one, opened the present one already.

    A message without a token keeps the one before. The server's window opened when the user wrote (`written_ms`,
    WeChat's clock; 0: unknown), so what was sent since counts against it, and so do requests in flight, which the
    server may see after the message. A -2 to what left after that speaks of the new window already; a time in whole
    seconds may be any moment of its second.
    """
    window = record.window
    if sequence < window.sequence:
        return record
    record = msgspec.structs.replace(record, token=token or record.token, bot=bot)
    if message == window.id:
        return record
    if received_ms - written_ms > CLOCK_ERROR_MS:
        written_ms = 0
    until_ms = now_ms + CLOCK_ERROR_MS
    since = [sent_ms for sent_ms in window.sent_at_ms if 0 < written_ms <= sent_ms <= until_ms]
    latest_ms = written_ms + 999 if written_ms % 1000 == 0 else written_ms
    is_throttled = bool(written_ms) and latest_ms <= window.throttled_at_ms <= until_ms
    return msgspec.structs.replace(
        record,
        window=SendWindow(
            id=message,
            sequence=sequence,
            opened_ms=received_ms,
            sends_used=max(in_flight, len(since)),
            sent_at_ms=since,
            throttled_at_ms=window.throttled_at_ms if is_throttled else 0,
        ),
    )


def record_attempt(record: ConversationRecord, progress: SendProgress, now_ms: int) -> ConversationRecord:
    """A request is about to leave: counts it first, so that a crash errs on the safe side.

    A repeat was counted, unless the user wrote since: if the first one got lost, it is this one that counts. The time
    of the repeat is kept, since whether the user wrote since may not be known yet.
    """
    window = record.window
    is_new = not progress.unanswered_attempts or progress.counted_in_window != window.id
    earlier = window.sent_at_ms if is_new else window.sent_at_ms[:-1]
    progress = msgspec.structs.replace(
        progress,
        attempts=progress.attempts + 1,
        unanswered_attempts=progress.unanswered_attempts + 1,
        counted_in_window=window.id,
    )
    window = msgspec.structs.replace(
        window, sends_used=window.sends_used + is_new, sent_at_ms=[*earlier, now_ms][-SENT_KEPT:]
    )
    return msgspec.structs.replace(record, window=window, head=progress)


def undo_attempt(record: ConversationRecord, progress: SendProgress) -> ConversationRecord:
    """iLink took nothing: the send does not count, unless a request before it got no answer.

    `progress` is the record's, perhaps with what the answer said.
    """
    progress = msgspec.structs.replace(progress, unanswered_attempts=progress.unanswered_attempts - 1)
    if progress.unanswered_attempts:
        return msgspec.structs.replace(record, head=progress)
    window = msgspec.structs.replace(
        record.window,
        sends_used=max(0, record.window.sends_used - 1),
        sent_at_ms=record.window.sent_at_ms[:-1],
    )
    return msgspec.structs.replace(record, window=window, head=progress)


def record_throttled(record: ConversationRecord, progress: SendProgress, now_ms: int) -> ConversationRecord:
    """iLink said -2 to the last request. If the user wrote since, it speaks of the window before."""
    sent_at_ms = record.window.sent_at_ms
    left_ms = sent_at_ms[-1] if sent_at_ms else now_ms
    is_present = progress.counted_in_window == record.window.id
    record = undo_attempt(record, msgspec.structs.replace(progress, throttled_in_window=progress.counted_in_window))
    if not is_present:
        return record
    return msgspec.structs.replace(record, window=msgspec.structs.replace(record.window, throttled_at_ms=left_ms))


def record_answer_time(record: ConversationRecord, now_ms: int) -> ConversationRecord:
    """The last request has ended, in an answer or none: iLink may have counted it at any moment up to now."""
    window = msgspec.structs.replace(record.window, sent_at_ms=[*record.window.sent_at_ms[:-1], now_ms])
    return msgspec.structs.replace(record, window=window)


def record_accepted(record: ConversationRecord, progress: SendProgress, now_ms: int) -> ConversationRecord:
    """iLink took the last request: whatever -2 meant, it is over."""
    record = record_answer_time(record, now_ms)
    window = msgspec.structs.replace(record.window, throttled_at_ms=0)
    return msgspec.structs.replace(record, window=window, head=progress)
