"""The user's window: what may be sent, when it opens, what a crash may and may not undo (protocol 5.2, 6, 10.1)."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from adapter import window
from adapter.contract import Window
from adapter.records import Context, Hand
from adapter.window import Rules, verdict

NOW = 1_789_000_000_000
HOUR = 3_600_000
RULES = Rules(sends=10, hours=23.0, cooldown_s=3600.0, low=3)
RESERVED = RULES._replace(reserve=2)
OPEN = Context(token="AARz", inbound_ms=NOW, inbound_id="m1")


def context(**fields: Any) -> Context:
    return replace(OPEN, **fields)


VERDICTS = [
    ("never-wrote", Context(), NOW, 1, "window_closed"),
    ("wrote-without-a-token", context(token=""), NOW, 1, "window_closed"),
    ("just-wrote", OPEN, NOW, 1, ""),
    ("last-moment", OPEN, NOW + 23 * HOUR - 1, 1, ""),
    ("too-late", OPEN, NOW + 23 * HOUR, 1, "window_closed"),
    ("last-send", context(used=9), NOW, 1, ""),
    ("used-up", context(used=10), NOW, 1, "quota"),
    ("three-parts-for-two-sends", context(used=8), NOW, 3, "quota"),
    ("two-parts-for-two-sends", context(used=8), NOW, 2, ""),
    ("more-than-a-budget-fits-a-fresh-window", OPEN, NOW, 25, ""),
    ("more-than-a-budget-needs-a-fresh-one", context(used=1), NOW, 25, "quota"),
    ("a-repeat-needs-nothing", context(used=10), NOW, 0, ""),
    ("throttled", context(blocked_ms=NOW), NOW + HOUR - 1, 1, "throttled"),
    ("a-probe-after-the-cool-down", context(blocked_ms=NOW), NOW + HOUR, 1, ""),
    ("no-probe-in-a-closed-window", context(blocked_ms=NOW), NOW + 24 * HOUR, 1, "window_closed"),
    ("a-repeat-while-throttled", context(blocked_ms=NOW), NOW + 1, 0, "throttled"),
]


@pytest.mark.parametrize(
    ("state", "now_ms", "needed", "expected"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS]
)
def test_a_verdict_names_what_hinders(state: Context, now_ms: int, needed: int, expected: str) -> None:
    assert verdict(state, now_ms, RULES, needed=needed) == expected


def test_a_window_without_a_token_is_open_where_the_setting_says_so() -> None:
    rules = RULES._replace(tokenless=True)
    assert verdict(context(token=""), NOW, rules) == ""
    assert verdict(context(token=""), NOW + 23 * HOUR, rules) == "window_closed"
    assert verdict(Context(), NOW, rules) == "window_closed"


def test_a_budget_of_0_is_not_counted() -> None:
    assert verdict(context(used=1000), NOW, RULES._replace(sends=0)) == ""
    assert window.shown(context(used=1000), NOW, RULES._replace(sends=0)) == Window(closes_at_ms=NOW + 23 * HOUR)


def test_a_cool_down_of_0_never_probes() -> None:
    rules = RULES._replace(cooldown_s=0)
    assert verdict(context(blocked_ms=NOW), NOW + 20 * HOUR, rules) == "throttled"
    assert window.opens_at_ms(context(blocked_ms=NOW), rules) is None


def test_only_a_throttled_window_opens_by_time_alone() -> None:
    assert window.opens_at_ms(OPEN, RULES) is None
    assert window.opens_at_ms(context(blocked_ms=NOW), RULES) == NOW + HOUR


def heard(state: Context, message: str, token: str = "new", in_flight: int = 0) -> Context:
    return window.heard(state, message=message, token=token, now_ms=NOW + HOUR, in_flight=in_flight)


def test_a_message_opens_a_new_window() -> None:
    state = heard(context(used=10, blocked_ms=NOW), "m2")
    assert (state.used, state.blocked_ms, state.token, state.inbound_ms) == (0, 0, "new", NOW + HOUR)


def test_a_replay_of_the_opening_message_opens_nothing() -> None:
    """After a crash iLink may say it again: the sends since then were real."""
    state = heard(context(used=10, blocked_ms=NOW), "m1", token="newer")
    assert (state.used, state.blocked_ms, state.inbound_ms, state.token) == (10, NOW, NOW, "newer")


def test_a_message_without_a_token_keeps_the_one_before() -> None:
    assert heard(OPEN, "m2", token="").token == "AARz"


def test_a_send_that_is_out_counts_against_the_new_window_too() -> None:
    """iLink may see it after the message."""
    assert heard(context(used=5), "m2", in_flight=1).used == 1


HAND = Hand(command="c", client="x", sandbox="s1")


def test_what_was_sent_since_the_user_wrote_counts_against_their_new_window() -> None:
    """The server's window opened when they wrote, not when we read it."""
    state = OPEN
    for sent_ms in (NOW, NOW + 10, NOW + 20):
        state = window.leaving(state, replace(HAND, client=f"x{sent_ms}", tried=1), sent_ms)
    late = window.heard(state, message="m2", token="t", now_ms=NOW + 60, in_flight=0, written_ms=NOW + 5)
    assert (late.used, late.sent_ms) == (2, [NOW + 10, NOW + 20])
    unknown = window.heard(state, message="m2", token="t", now_ms=NOW + 60, in_flight=1, written_ms=0)
    assert (unknown.used, unknown.sent_ms) == (1, [])


@pytest.mark.parametrize("written_ms", [NOW - HOUR, NOW // 1000, 1], ids=["an-hour-behind", "seconds", "long-ago"])
def test_a_clock_that_is_behind_does_not_keep_a_window_closed(written_ms: int) -> None:
    state = context(used=10, blocked_ms=NOW + 20, sent_ms=[NOW, NOW + 10, NOW + 20])
    opened = window.heard(state, message="m2", token="t", now_ms=NOW + 60, in_flight=1, written_ms=written_ms)
    assert (opened.used, opened.sent_ms, opened.blocked_ms) == (1, [], 0)


def test_a_clock_that_was_an_hour_ahead_and_is_set_right_does_not_keep_a_window_closed() -> None:
    """Each message would have opened it only to find its sends used up, for an hour."""
    ahead = NOW + HOUR
    state = context(used=10, blocked_ms=ahead + 20, sent_ms=[ahead, ahead + 10, ahead + 20])
    opened = window.heard(state, message="m2", token="t", now_ms=NOW + 60, in_flight=1, written_ms=NOW + 30)
    assert (opened.used, opened.sent_ms, opened.blocked_ms) == (1, [], 0)


@pytest.mark.parametrize(
    ("written_ms", "blocked"),
    [(NOW + 399, True), (NOW + 401, False), (NOW, False), (NOW - 1000, True)],
    ids=["before-it-left", "before-its-answer-came", "in-the-same-second", "a-second-before"],
)
def test_a_refusal_blocks_the_window_that_the_request_left_into(written_ms: int, blocked: bool) -> None:
    """The user's message is read after the refusal; which of both iLink saw first is told by when they were sent."""
    out = window.leaving(OPEN, replace(HAND, tried=1), NOW + 400)
    assert out.hand is not None
    refused = window.throttled(out, replace(out.hand, tried=0), NOW + 460)
    opened = window.heard(refused, message="m2", token="t", now_ms=NOW + 480, in_flight=0, written_ms=written_ms)
    assert bool(opened.blocked_ms) is blocked


def test_what_is_taken_up_again_is_left_no_more() -> None:
    begun, other = replace(HAND, tried=1), replace(HAND, client="x2")
    displaced = window.leaving(window.leaving(OPEN, begun, NOW), other, NOW)
    assert displaced.left == replace(begun, counted_in="m1")
    assert window.leaving(window.returned(displaced, other), begun, NOW).left is None


def test_a_send_counts_before_it_leaves_and_not_again_when_repeated() -> None:
    first = window.leaving(OPEN, replace(HAND, tried=1), NOW)
    assert first.used == 1
    assert first.hand == replace(HAND, tried=1, counted_in="m1")
    again = window.leaving(first, replace(first.hand, tried=2), NOW)
    assert again.used == 1


def test_a_repeat_in_the_next_window_counts_there() -> None:
    """The first one may have got lost on its way: then it is the repeat that iLink counts."""
    first = window.leaving(OPEN, replace(HAND, tried=1), NOW)
    assert first.hand is not None
    again = window.leaving(heard(first, "m2"), replace(first.hand, tried=2), NOW)
    assert again.used == 1


def test_a_refused_repeat_leaves_the_first_request_counted() -> None:
    """It got no answer, so it may have been taken."""
    first = window.leaving(OPEN, replace(HAND, tried=1), NOW)
    assert first.hand is not None
    again = window.leaving(first, replace(first.hand, tried=2), NOW)
    assert again.hand is not None
    assert window.returned(again, replace(again.hand, tried=1)).used == 1
    assert window.returned(first, replace(first.hand, tried=0)).used == 0


def test_a_repeat_counts_where_the_owner_before_has_heard_that_nothing_was_taken() -> None:
    """It wrote that after the repeat's hand was read."""
    first = window.leaving(OPEN, replace(HAND, tried=1), NOW)
    assert first.hand is not None
    heard_late = window.throttled(first, replace(first.hand, tried=0), NOW)
    again = window.leaving(heard_late, replace(first.hand, tried=2), NOW + 1)
    assert (again.used, again.sent_ms) == (1, [NOW + 1])
    assert again.hand is not None
    assert again.hand.tried == 2


def test_a_request_of_which_the_owner_before_wrote_last_is_a_repeat() -> None:
    """It may have been taken, so that a refusal of this one is none of the command."""
    first = window.leaving(OPEN, replace(HAND, tried=1), NOW)
    unaware = window.leaving(first, replace(HAND, tried=1), NOW + 1)
    assert (unaware.used, unaware.sent_ms) == (1, [NOW + 1])
    assert unaware.hand is not None
    assert unaware.hand.tried == 2
    another = window.leaving(first, replace(HAND, client="another", tried=1), NOW + 1)
    assert another.hand is not None
    assert (another.used, another.hand.tried) == (2, 1)


def test_a_send_that_goes_through_ends_the_block() -> None:
    assert window.taken(context(blocked_ms=NOW), HAND, NOW + 1).blocked_ms == 0


def test_a_settled_command_leaves_the_hand() -> None:
    state = window.settled(context(hand=HAND), HAND.client, sent=True)
    assert (state.hand, state.done) == (None, ["s1/c"])
    assert window.settled(context(hand=HAND), "other", sent=True).hand == HAND


def test_an_id_of_which_nothing_was_sent_may_be_used_again() -> None:
    state = window.settled(context(hand=HAND), HAND.client, sent=False)
    assert (state.hand, state.done) == (None, [])


def test_the_settled_commands_remembered_are_bounded() -> None:
    state = OPEN
    for number in range(100):
        state = window.settled(replace(state, hand=replace(HAND, command=str(number))), HAND.client, sent=True)
    assert state.done == [f"s1/{number}" for number in range(100 - window.DONE_IDS, 100)]


KEPT_BACK = [
    ("the-last-but-the-reserve", 7, 1, False, ""),
    ("into-the-reserve", 8, 1, False, "quota"),
    ("into-the-reserve-by-parts", 7, 2, False, "quota"),
    ("a-final-one-may", 8, 1, True, ""),
    ("a-final-one-in-parts", 8, 2, True, ""),
    ("a-final-one-too-many", 9, 2, True, "quota"),
    ("nothing-is-left", 10, 1, True, "quota"),
    ("more-than-a-budget-fits-a-fresh-window", 0, 10, False, ""),
    ("more-than-a-budget-needs-a-fresh-one", 1, 10, False, "quota"),
    ("a-repeat-needs-nothing", 10, 0, False, ""),
]


@pytest.mark.parametrize(
    ("used", "needed", "final", "expected"), [row[1:] for row in KEPT_BACK], ids=[row[0] for row in KEPT_BACK]
)
def test_some_sends_are_kept_back_for_the_last_word(used: int, needed: int, final: bool, expected: str) -> None:
    assert verdict(context(used=used), NOW, RESERVED, needed=needed, final=final) == expected


PHASES = [
    ("never-wrote", Context(), NOW, RULES, ("closed", "window_closed")),
    ("just-wrote", OPEN, NOW, RULES, ("open", "")),
    ("four-left", context(used=6), NOW, RULES, ("open", "")),
    ("three-left", context(used=7), NOW, RULES, ("low", "")),
    ("one-left", context(used=9), NOW, RULES, ("low", "")),
    ("none-left", context(used=10), NOW, RULES, ("closed", "quota")),
    ("too-late", context(used=7), NOW + 23 * HOUR, RULES, ("closed", "window_closed")),
    ("throttled", context(blocked_ms=NOW), NOW, RULES, ("closed", "throttled")),
    ("throttled-and-a-probe-may-go", context(blocked_ms=NOW), NOW + 2 * HOUR, RULES, ("closed", "throttled")),
    ("not-counted", context(used=100), NOW, RULES._replace(sends=0), ("open", "")),
    ("never-low", context(used=9), NOW, RULES._replace(low=0), ("open", "")),
    ("low-from-the-start", context(used=1), NOW, RULES._replace(low=10), ("open", "")),
    ("five-left-of-which-two-are-kept-back", context(used=5), NOW, RESERVED, ("low", "")),
    ("only-the-reserve-is-left", context(used=8), NOW, RESERVED, ("closed", "quota")),
]


@pytest.mark.parametrize(
    ("state", "now_ms", "rules", "expected"), [row[1:] for row in PHASES], ids=[row[0] for row in PHASES]
)
def test_a_window_has_a_phase(state: Context, now_ms: int, rules: Rules, expected: tuple[str, str]) -> None:
    assert window.phase(state, now_ms, rules) == expected


CHANGES = [
    ("", "closed", ""),
    ("", "open", "opened"),
    ("closed", "open", "opened"),
    ("closed", "low", "opened"),
    ("closed", "closed", ""),
    ("open", "low", "low"),
    ("open", "closed", "closed"),
    ("low", "closed", "closed"),
    ("low", "open", ""),
    ("open", "open", ""),
    ("low", "low", ""),
]


@pytest.mark.parametrize(("told", "found", "expected"), CHANGES)
def test_only_news_are_told(told: window.Name, found: window.Name, expected: str) -> None:
    assert window.change(told, found) == expected


def test_the_last_send_is_known_before_it_leaves() -> None:
    assert [used for used in range(12) if window.takes_last(context(used=used), RULES)] == [9, 10, 11]
    assert not window.takes_last(context(used=9), RULES._replace(sends=0))


SHOWN = [
    ("never-wrote", Context(), Window(remaining=0)),
    ("open", context(used=3), Window(remaining=7, closes_at_ms=NOW + 23 * HOUR)),
    ("overdrawn", context(used=12), Window(remaining=0, closes_at_ms=NOW + 23 * HOUR)),
    ("throttled", context(used=3, blocked_ms=NOW), Window(remaining=0, closes_at_ms=NOW + 23 * HOUR)),
    ("no-token", context(token=""), Window(remaining=0)),
]


@pytest.mark.parametrize(("state", "expected"), [row[1:] for row in SHOWN], ids=[row[0] for row in SHOWN])
def test_the_bus_sees_what_is_left(state: Context, expected: Window) -> None:
    assert window.shown(state, NOW, RULES) == expected


@pytest.mark.parametrize("rules", [RULES, RULES._replace(sends=0)], ids=["counted", "not-counted"])
def test_the_bus_sees_when_time_is_over(rules: Rules) -> None:
    assert window.shown(OPEN, NOW + 23 * HOUR - 1, rules).closes_at_ms == NOW + 23 * HOUR
    assert window.shown(OPEN, NOW + 23 * HOUR, rules) == Window(remaining=0)


@pytest.mark.parametrize(
    ("used", "remaining", "reserved"), [(0, 8, 2), (7, 1, 2), (8, 0, 2), (9, 0, 1), (10, 0, 0), (12, 0, 0)]
)
def test_the_bus_sees_what_is_kept_back_apart(used: int, remaining: int, reserved: int) -> None:
    shown = window.shown(context(used=used), NOW, RESERVED)
    assert (shown.remaining, shown.reserved) == (remaining, reserved)


class WindowMachine(RuleBasedStateMachine):
    """A sender that follows the rules, with crashes, against an iLink that counts what it really took."""

    limits = Rules(sends=5, hours=1.0, cooldown_s=600.0, reserve=1, low=2)

    def __init__(self) -> None:
        super().__init__()
        self.plain: set[int] = set()
        """The sends of commands without `final` that iLink took in this window."""
        self.final = False
        self.told: window.Name = ""
        self.events: list[str] = []
        self.lows = 0
        """Told of in this window."""
        self.state = Context()
        self.now = NOW
        self.messages = 0
        self.unheard_ms = 0
        """When a message was written that has not arrived yet; 0: all have."""
        self.taken: set[int] = set()
        """The sends that iLink took in this window."""
        self.sends = 0
        self.out: Hand | None = None
        self.number = 0
        self.throttled_at: int | None = None

    # the user

    @rule()
    def the_user_writes(self) -> None:
        self.messages += 1
        self.now += 1
        self.unheard_ms = self.now
        self.taken, self.plain = set(), set()
        self.throttled_at = None

    @precondition(lambda self: self.unheard_ms > 0)
    @rule(late_ms=st.integers(0, 100_000))
    def the_message_arrives(self, late_ms: int) -> None:
        """Perhaps late: until then it is answered as if nobody had written."""
        self.now += late_ms
        self.state = window.heard(
            self.state,
            message=f"m{self.messages}",
            token="t",
            now_ms=self.now,
            in_flight=0,
            written_ms=self.unheard_ms,
        )
        self.unheard_ms = 0
        self.lows = 0

    @precondition(lambda self: self.messages > 0 and not self.unheard_ms)
    @rule()
    def the_message_is_replayed(self) -> None:
        before = self.state
        self.state = window.heard(
            self.state, message=f"m{self.messages}", token="t", now_ms=self.now + 5, in_flight=0
        )
        assert self.state == before

    @rule(minutes=st.integers(1, 20))
    def time_passes(self, minutes: int) -> None:
        """No message comes later than the rules believe."""
        latest = self.unheard_ms + window.LATE_MS - 110_000 if self.unheard_ms else math.inf
        self.now = max(self.now, int(min(self.now + minutes * 60_000, latest)))

    # the sender

    def leave(self, hand: Hand) -> bool:
        """A request leaves, if the rules let it."""
        needed = 0 if hand.tried else 1
        if verdict(self.state, self.now, self.limits, needed=needed, final=self.final):
            return False
        if self.throttled_at is not None:
            assert self.now - self.throttled_at >= 600_000, "sent into the penalty"
        if not hand.tried:
            self.number += 1
        self.now += 1
        self.state = window.leaving(self.state, replace(hand, tried=hand.tried + 1), self.now)
        self.out = self.state.hand
        return True

    @precondition(lambda self: self.out is None)
    @rule(
        answer=st.sampled_from(["taken", "taken-unheard", "lost", "temporary", "throttled", "crash"]),
        final=st.booleans(),
    )
    def it_sends(self, answer: str, final: bool) -> None:
        self.final = final
        if self.leave(replace(HAND, client=f"x{self.number + 1}")):
            self.answered(answer)

    @precondition(lambda self: self.out is not None)
    @rule(answer=st.sampled_from(["taken", "temporary", "throttled", "taken-unheard", "lost"]))
    def it_repeats(self, answer: str) -> None:
        assert self.out is not None
        if self.leave(self.out):
            self.answered(answer)

    def answered(self, answer: str) -> None:
        hand = self.out
        assert hand is not None
        if answer in ("taken", "taken-unheard", "crash") and self.number not in self.taken:
            self.plain |= set() if self.final else {self.number}
        match answer:
            case "taken":
                self.taken.add(self.number)
                self.state = replace(window.taken(self.state, hand, self.now), hand=None)
                self.out, self.throttled_at = None, None
            case "taken-unheard" | "crash":
                self.taken.add(self.number)
                self.out = hand if hand.tried < 2 else None
            case "lost":
                self.out = hand if hand.tried < 2 else None
            case "temporary":
                before = replace(hand, tried=hand.tried - 1)
                self.state = window.returned(self.state, before)
                self.out = before if before.tried else None
            case _:
                before = replace(hand, tried=hand.tried - 1)
                self.state = window.throttled(self.state, before, self.now)
                self.out = before if before.tried else None
                self.throttled_at = self.now

    # what is told

    @precondition(lambda self: self.out is None)
    @rule()
    def it_looks(self) -> None:
        """At any time when nothing is out; what was missed meanwhile is missed."""
        found = window.phase(self.state, self.now, self.limits)
        if change := window.change(self.told, found.name):
            self.events.append(change)
            self.lows += change == "low"
            assert (change == "closed") == (window.shown(self.state, self.now, self.limits).remaining == 0)
        if change or self.told:
            self.told = found.name

    @invariant()
    def what_opens_closes_and_the_other_way_round(self) -> None:
        ends = [event for event in self.events if event != "low"]
        assert all(event == ("closed" if number % 2 else "opened") for number, event in enumerate(ends))

    @invariant()
    def low_is_told_once_per_window(self) -> None:
        assert self.lows <= 1

    # what must hold

    @invariant()
    def what_is_kept_back_is_kept_back(self) -> None:
        assert len(self.plain) <= self.limits.sends - self.limits.reserve

    @invariant()
    def ilink_never_took_more_than_the_budget(self) -> None:
        assert len(self.taken) <= self.limits.sends

    @invariant()
    def the_count_never_falls_behind(self) -> None:
        assert self.state.used >= len(self.taken)

    @invariant()
    def throttled_until_heard_or_probed(self) -> None:
        if self.throttled_at is not None and self.now - self.throttled_at < 600_000:
            assert verdict(self.state, self.now, self.limits) in ("throttled", "window_closed")


TestWindow = WindowMachine.TestCase
