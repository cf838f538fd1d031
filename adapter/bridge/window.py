"""iLink's send window as pure functions: may something be sent to this user now?

Each inbound message opens the window for a number of sends and hours. After -2 the window is throttled until the next
inbound message, or until a probe after a long cool-down succeeds. docs/reference/ilink-protocol.md has what is known
of the window ("Refused sends", "Context tokens").
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from adapter.bridge.record import PersonState, SendProgress, SendWindow
from adapter.contract.messages import Window

Closed: TypeAlias = Literal["", "window_closed", "quota", "throttled"]
"""Why nothing may be sent; "" if it may."""

SENT_KEPT = 32
"""Send times kept for a window: as many as the largest budget (settings.py, `sends_per_window`)."""
COOLDOWN_S = 3600.0
"""iLink's throttle ends after about an hour without attempts; each attempt extends it."""
CLOCK_ERROR_MS = 300_000
"""Largest plausible age of a message on arrival, and largest plausible lead of a send time. Beyond it one of the
clocks is wrong. With a slow clock here, the sends of all windows would count against each new window for ever."""


class WindowPolicy(msgspec.Struct, frozen=True):
    """Settings of the window."""

    sends: int
    """Budget after an inbound message; 0: no limit."""
    hours: float
    cooldown_s: float = COOLDOWN_S
    """Time after -2 until a probe may be sent."""


def send_blocker(record: PersonState, now_ms: int, policy: WindowPolicy, *, needed: int = 1) -> Closed:
    """Why `needed` sends do not fit now; "" if they do. A command that exceeds the whole budget fits a fresh
    window."""
    window = record.window
    if now_ms >= closes_at_ms(record, policy):
        return "window_closed"
    if window.throttled_at_ms and now_ms < probes_at_ms(window, policy):
        return "throttled"
    if not policy.sends or not needed:
        return ""
    return "" if window.sends_used + max(1, min(needed, policy.sends)) <= policy.sends else "quota"


def visible_window(record: PersonState, now_ms: int, policy: WindowPolicy) -> Window:
    """The window as the bus sees it now."""
    closes_ms = closes_at_ms(record, policy)
    if now_ms >= closes_ms:
        return Window(remaining=0)
    if record.window.throttled_at_ms:
        return Window(remaining=0, closes_at_ms=closes_ms)
    if not policy.sends:
        return Window(closes_at_ms=closes_ms)
    return Window(remaining=max(0, policy.sends - record.window.sends_used), closes_at_ms=closes_ms)


def closes_at_ms(record: PersonState, policy: WindowPolicy) -> int:
    """When the window closes by time; 0: none is open."""
    opened_ms = record.window.opened_ms
    return opened_ms + int(policy.hours * 3_600_000) if opened_ms and record.token else 0


def probes_at_ms(window: SendWindow, policy: WindowPolicy) -> float:
    """When the probe after -2 may be sent."""
    return window.throttled_at_ms + policy.cooldown_s * 1000


# transitions ------------------------------------------------------------------------------------------


class InboundReceived(msgspec.Struct, frozen=True):
    """The user wrote."""

    message: str
    """Message id on the bus."""
    token: str
    """Context token; "" if iLink gave none."""
    written_ms: int
    """WeChat's clock; 0: unknown."""
    received_ms: int | None = None
    """When iLink delivered the message, possibly long ago; None: now."""


def open_window(record: PersonState, inbound: InboundReceived, now_ms: int, in_flight: int) -> PersonState:
    """The record after a message of the user, which opens a new window, unless it did so before.

    A message without a token leaves the known token. iLink's window opened when the user wrote. Sends since that time
    count against it, and so do requests in flight (`in_flight`), which iLink may process after the message. A -2 to a
    send since that time belongs to the new window. A time in whole seconds may be any moment of its second.
    """
    window, written_ms = record.window, inbound.written_ms
    received_ms = now_ms if inbound.received_ms is None else min(now_ms, inbound.received_ms)
    if inbound.message != window.id:
        if received_ms - written_ms > CLOCK_ERROR_MS:
            written_ms = 0
        until_ms = now_ms + CLOCK_ERROR_MS
        since = [sent_ms for sent_ms in window.sent_at_ms if 0 < written_ms <= sent_ms <= until_ms]
        latest_ms = written_ms + 999 if written_ms % 1000 == 0 else written_ms
        is_throttled = bool(written_ms) and latest_ms <= window.throttled_at_ms <= until_ms
        window = SendWindow(
            id=inbound.message,
            written_ms=inbound.written_ms,
            opened_ms=received_ms,
            sends_used=max(in_flight, len(since)),
            sent_at_ms=since,
            throttled_at_ms=window.throttled_at_ms if is_throttled else 0,
        )
    return msgspec.structs.replace(record, token=inbound.token or record.token, window=window)


def newer_window(record: PersonState, inbound: InboundReceived, now_ms: int, in_flight: int) -> PersonState:
    """The record after a message that was read from the inbox, which may be older than the record's window."""
    if inbound.message != record.window.id and (inbound.received_ms or 0) < record.window.opened_ms:
        return record
    return open_window(record, inbound, now_ms, in_flight)


def record_attempt(record: PersonState, progress: SendProgress, now_ms: int) -> PersonState:
    """Counts a request before it is sent, so that a crash never leads to an uncounted send.

    A repeat was counted before, unless the user has written since; then the repeat may be the request that iLink
    counts in the new window. The time of the repeat is kept, since a message of the user may still be on its way.
    """
    window = record.window
    is_new = not progress.unanswered_attempts or progress.counted_in_window != window.id
    earlier = window.sent_at_ms if is_new else window.sent_at_ms[:-1]
    progress = msgspec.structs.replace(
        progress,
        attempts=progress.attempts + 1,
        unanswered_attempts=progress.unanswered_attempts + 1,
        counted_in_window=window.id,
        was_reset=progress.was_reset and bool(progress.unanswered_attempts),
    )
    window = msgspec.structs.replace(
        window, sends_used=window.sends_used + is_new, sent_at_ms=[*earlier, now_ms][-SENT_KEPT:]
    )
    return msgspec.structs.replace(record, window=window, progress=progress)


def undo_attempt(record: PersonState, progress: SendProgress) -> PersonState:
    """Takes the last request back, since iLink took nothing. It stays counted if a request before it got no answer.

    `progress` is that of the record, possibly with details of the answer.
    """
    progress = msgspec.structs.replace(progress, unanswered_attempts=progress.unanswered_attempts - 1)
    if progress.unanswered_attempts:
        return msgspec.structs.replace(record, progress=progress)
    window = msgspec.structs.replace(
        record.window,
        sends_used=max(0, record.window.sends_used - 1),
        sent_at_ms=record.window.sent_at_ms[:-1],
    )
    return msgspec.structs.replace(record, window=window, progress=progress)


def record_throttled(record: PersonState, progress: SendProgress, now_ms: int) -> PersonState:
    """Records a -2 to the last request. If the user has written since, the -2 belongs to the former window."""
    sent_at_ms = record.window.sent_at_ms
    left_ms = sent_at_ms[-1] if sent_at_ms else now_ms
    is_present = progress.counted_in_window == record.window.id
    record = undo_attempt(record, msgspec.structs.replace(progress, throttled_in_window=progress.counted_in_window))
    if not is_present:
        return record
    return msgspec.structs.replace(record, window=msgspec.structs.replace(record.window, throttled_at_ms=left_ms))


def record_unanswered(
    record: PersonState, progress: SendProgress, now_ms: int, *, was_reset: bool = False
) -> PersonState:
    """Records that the last request had no answer: iLink may have counted it at any moment until its end."""
    window = msgspec.structs.replace(record.window, sent_at_ms=[*record.window.sent_at_ms[:-1], now_ms])
    head = msgspec.structs.replace(progress, was_reset=was_reset)
    return msgspec.structs.replace(record, window=window, progress=head)


def accepted(window: SendWindow, now_ms: int) -> SendWindow:
    """The window after iLink accepted the last request, which ends a throttle."""
    return msgspec.structs.replace(window, sent_at_ms=[*window.sent_at_ms[:-1], now_ms], throttled_at_ms=0)
