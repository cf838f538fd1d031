"""The send window by itself: what fits, what counts, and against which message of the user."""

from __future__ import annotations

from typing import Any

import msgspec

from adapter.bridge import window
from adapter.bridge.record import PersonState, SendProgress, SendWindow
from adapter.bridge.window import CLOCK_ERROR_MS, SENT_KEPT, InboundReceived, WindowPolicy
from adapter.contract.messages import Window
from tests.outbound.partitions import rows

HOUR_MS = 3_600_000
POLICY = WindowPolicy(sends=3, hours=1.0, cooldown_s=60.0)
OPENED = 10_000_000


def record(used: int = 0, *, token: str = "t", progress: SendProgress | None = None, **fields: Any) -> PersonState:
    opened = SendWindow(**{"id": "in:1", "opened_ms": OPENED, "sends_used": used, **fields})
    return PersonState(token=token, bot="b1", window=opened, progress=progress)


def progress(**fields: Any) -> SendProgress:
    return SendProgress(**{"commands": [], "client_id_base": "k", "bot": "b1", **fields})


@rows(
    "known, now_ms, asked, blocker",
    {
        "no token, no window": (record(token=""), OPENED, {}, "window_closed"),
        "it opens with a message": (record(opened_ms=0), 1, {}, "window_closed"),
        "it is open for its hours": (record(), OPENED + HOUR_MS - 1, {}, ""),
        "and not longer": (record(), OPENED + HOUR_MS, {}, "window_closed"),
        "a -2 closes it for the cool-down": (record(throttled_at_ms=OPENED), OPENED + 59_999, {}, "throttled"),
        "after that a probe may go": (record(throttled_at_ms=OPENED), OPENED + 60_000, {}, ""),
        "the last send of the budget goes": (record(2), OPENED, {}, ""),
        "one more does not": (record(3), OPENED, {}, "quota"),
        "two that fit go": (record(1), OPENED, {"needed": 2}, ""),
        "two that do not fit wait": (record(2), OPENED, {"needed": 2}, "quota"),
        "what exceeds the whole budget fits a fresh window": (record(0), OPENED, {"needed": 9}, ""),
        "and no other": (record(1), OPENED, {"needed": 9}, "quota"),
        "what needs none always goes": (record(3), OPENED, {"needed": 0}, ""),
    },
)
def test_a_send_fits_or_is_blocked(known: PersonState, now_ms: int, asked: dict[str, Any], blocker: str) -> None:
    assert window.send_blocker(known, now_ms, POLICY, **asked) == blocker


def test_a_budget_of_none_is_not_counted() -> None:
    assert window.send_blocker(record(100), OPENED, msgspec.structs.replace(POLICY, sends=0)) == ""


@rows(
    "known, now_ms, policy, left",
    {
        "closed has no end": (record(), OPENED + HOUR_MS, POLICY, Window(remaining=0)),
        "throttled has nothing left": (record(throttled_at_ms=1), OPENED + HOUR_MS - 1, POLICY, 0),
        "without a budget nothing is counted": (record(9), OPENED, msgspec.structs.replace(POLICY, sends=0), None),
        "used up": (record(3), OPENED, POLICY, 0),
        "more than used up": (record(4), OPENED, POLICY, 0),
        "what is left": (record(1), OPENED, POLICY, 2),
    },
)
def test_a_window_is_shown_as_it_stands(
    known: PersonState, now_ms: int, policy: WindowPolicy, left: Window | int | None
) -> None:
    if left is None:
        left = Window(closes_at_ms=OPENED + HOUR_MS)
    elif isinstance(left, int):
        left = Window(remaining=left, closes_at_ms=OPENED + HOUR_MS)
    assert window.visible_window(known, now_ms, policy) == left


def receive(known: PersonState, *, message: str = "in:2", now_ms: int, **fields: Any) -> SendWindow:
    in_flight = fields.pop("in_flight", 0)
    given: dict[str, Any] = {"token": "new", "written_ms": 0, "received_ms": now_ms}
    inbound = InboundReceived(message, **given | fields)
    after = window.open_window(known, inbound, now_ms, in_flight)
    assert after.token == (inbound.token or "t")
    return after.window


def test_a_message_opens_a_window_and_its_repeat_does_not() -> None:
    assert receive(record(3), now_ms=OPENED + 5) == SendWindow(id="in:2", opened_ms=OPENED + 5)
    assert receive(record(3), message="in:1", now_ms=OPENED + 5, token="") == record(3).window
    assert receive(record(3), now_ms=OPENED + 5, in_flight=1).sends_used == 1
    assert receive(record(3), now_ms=OPENED + 5, received_ms=None).opened_ms == OPENED + 5
    assert receive(record(3), now_ms=OPENED + 5, received_ms=OPENED + 3).opened_ms == OPENED + 3
    assert receive(record(3), now_ms=OPENED + 5, received_ms=OPENED + 9).opened_ms == OPENED + 5


def test_a_newer_token_of_the_message_that_opened_the_window_opens_no_other() -> None:
    known = record(3, id="in:2")
    after = window.open_window(known, InboundReceived("in:2", "new", 0), OPENED + 5, 0)
    assert (after.window, after.token) == (known.window, "new")


def test_a_send_after_the_message_was_written_counts_against_it() -> None:
    at = [OPENED + 1000, OPENED + 2000, OPENED + 3000]
    known, now_ms = record(3, sent_at_ms=at), OPENED + 4000
    found = receive(known, now_ms=now_ms, written_ms=OPENED + 2000)
    assert (found.sends_used, found.sent_at_ms) == (2, at[1:])
    assert receive(known, now_ms=now_ms, written_ms=OPENED + 2001, in_flight=1).sends_used == 1
    assert receive(known, now_ms=now_ms).sends_used == 0


def test_a_clock_that_is_wrong_counts_nothing() -> None:
    known = record(1, sent_at_ms=[OPENED], throttled_at_ms=OPENED)
    edge = OPENED + CLOCK_ERROR_MS
    assert receive(known, now_ms=edge, written_ms=OPENED).sends_used == 1
    assert receive(known, now_ms=edge + 1, written_ms=OPENED) == SendWindow(
        id="in:2", written_ms=OPENED, opened_ms=edge + 1
    )
    before = OPENED - CLOCK_ERROR_MS
    assert receive(known, now_ms=before, written_ms=before).sends_used == 1
    assert receive(known, now_ms=before, written_ms=before).throttled_at_ms == OPENED
    assert receive(known, now_ms=before - 1, written_ms=before - 1) == SendWindow(
        id="in:2", written_ms=before - 1, opened_ms=before - 1
    )


@rows(
    "written_ms, throttled_ms, stays",
    {
        "at the time of the message": (OPENED + 5, OPENED + 5, True),
        "before the message": (OPENED + 6, OPENED + 5, False),
        "within the second of a message in whole seconds": (OPENED, OPENED + 998, False),
        "at the end of its second": (OPENED, OPENED + 999, True),
        "at an unknown time": (0, OPENED, False),
    },
)
def test_a_throttle_belongs_to_the_window_in_which_its_request_left(
    written_ms: int, throttled_ms: int, stays: bool
) -> None:
    known = record(throttled_at_ms=throttled_ms)
    found = receive(known, now_ms=OPENED + 2000, written_ms=written_ms)
    assert found.throttled_at_ms == (throttled_ms if stays else 0)
    assert receive(record(), now_ms=OPENED + 2000, written_ms=written_ms).throttled_at_ms == 0


def test_a_request_counts_once_in_each_window() -> None:
    first = window.record_attempt(record(), progress(), OPENED + 1)
    assert first.progress is not None
    assert (first.progress.attempts, first.progress.unanswered_attempts, first.progress.counted_in_window) == (
        1,
        1,
        "in:1",
    )
    assert (first.window.sends_used, first.window.sent_at_ms) == (1, [OPENED + 1])

    silent = window.record_unanswered(first, first.progress, OPENED + 1)
    assert silent.progress is not None
    again = window.record_attempt(silent, silent.progress, OPENED + 2)
    assert again.progress is not None
    assert (again.progress.attempts, again.progress.unanswered_attempts) == (2, 2)
    assert (again.window.sends_used, again.window.sent_at_ms) == (1, [OPENED + 2])

    opened = msgspec.structs.replace(again, window=SendWindow(id="in:2", opened_ms=OPENED + 3, sends_used=1))
    anew = window.record_attempt(opened, again.progress, OPENED + 4)
    assert (anew.window.sends_used, anew.window.sent_at_ms) == (2, [OPENED + 4])
    answered = progress(attempts=2, part=1, counted_in_window="in:1", was_reset=True)
    following = window.record_attempt(record(2, sent_at_ms=[OPENED]), answered, OPENED + 5)
    assert following.progress is not None
    assert (following.window.sends_used, following.window.sent_at_ms) == (3, [OPENED, OPENED + 5])
    assert not following.progress.was_reset
    full = record(sent_at_ms=list(range(SENT_KEPT)))
    assert window.record_attempt(full, progress(), 99).window.sent_at_ms == [*range(1, SENT_KEPT), 99]


def test_a_request_that_was_not_taken_counts_only_where_one_before_it_may_have_been() -> None:
    once = window.record_attempt(record(1, sent_at_ms=[OPENED]), progress(), OPENED + 1)
    assert once.progress is not None
    undone = window.undo_attempt(once, once.progress)
    assert (undone.window.sends_used, undone.window.sent_at_ms) == (1, [OPENED])
    assert undone.progress is not None
    assert undone.progress.unanswered_attempts == 0

    twice = window.record_attempt(once, once.progress, OPENED + 2)
    assert twice.progress is not None
    undone = window.undo_attempt(twice, twice.progress)
    assert (undone.window.sends_used, undone.window.sent_at_ms) == (2, [OPENED, OPENED + 2])
    assert undone.progress is not None
    assert undone.progress.unanswered_attempts == 1
    assert window.undo_attempt(record(0), once.progress).window.sends_used == 0


def test_a_throttle_speaks_of_the_window_that_its_request_left_in() -> None:
    once = window.record_attempt(record(), progress(), OPENED + 1)
    assert once.progress is not None
    found = window.record_throttled(once, once.progress, OPENED + 9)
    assert (found.window.throttled_at_ms, found.window.sends_used) == (OPENED + 1, 0)
    assert found.progress is not None
    assert found.progress.throttled_in_window == "in:1"
    unknown = window.record_throttled(record(), once.progress, OPENED + 9)
    assert unknown.window.throttled_at_ms == OPENED + 9

    opened = msgspec.structs.replace(once, window=SendWindow(id="in:2", opened_ms=OPENED + 3, sends_used=1))
    found = window.record_throttled(opened, once.progress, OPENED + 9)
    assert (found.window.throttled_at_ms, found.window.sends_used) == (0, 0)


def test_an_answer_bounds_when_its_request_may_have_been_counted() -> None:
    known = record(1, sent_at_ms=[OPENED, OPENED + 1], throttled_at_ms=OPENED)
    silent = window.record_unanswered(known, progress(unanswered_attempts=1), OPENED + 9)
    assert (silent.window.sent_at_ms, silent.window.throttled_at_ms) == ([OPENED, OPENED + 9], OPENED)
    assert silent.progress == progress(unanswered_attempts=1)
    taken = window.accepted(known.window, OPENED + 9)
    assert (taken.sent_at_ms, taken.throttled_at_ms) == ([OPENED, OPENED + 9], 0)
