"""What waits for a user: its order, what expires of it, and that nothing is looked at in vain."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import pytest

from adapter.outbound.commands import Command
from adapter.outbound.lane import Item, Lane, Lanes, Parked
from adapter.ports import Account
from adapter.records import Binding

SANDBOX, BOT, USER = "s1", "b1@im.bot", "u1@im.wechat"


def item(name: str, *, expires_ms: int) -> Item:
    command = Command(
        id=name,
        client=name,
        sandbox=SANDBOX,
        bot=BOT,
        user=USER,
        parts=["hi"],
        when_closed="park",
        stored_ms=0,
        expires_ms=expires_ms,
    )
    return Item(command, b"{}", {}, suspect=False)


def parked(seq: int, *, expires_ms: int) -> Parked:
    return Parked(seq, "wechat.parked.1.x", f"p{seq}", f"p{seq}", expires_ms, 0)


def names(items: list[Item]) -> list[str]:
    return [one.command.id for one in items]


class Unread(deque[Item]):
    """A queue that nobody looks through."""

    def __iter__(self) -> Iterator[Item]:
        raise AssertionError("all of it was looked at")


def test_what_expires_is_found_when_it_does_and_not_looked_for_before() -> None:
    lane = Lane(SANDBOX, BOT, USER)
    for name, expires_ms in (("a", 5000), ("b", 1000), ("c", 3000)):
        lane.add(item(name, expires_ms=expires_ms))
    queue, lane.queue = lane.queue, Unread(lane.queue)
    assert lane.late(999) == ([], False)
    lane.queue = queue
    late, late_parked = lane.late(1000)
    assert (names(late), late_parked) == (["b"], False)
    for one in late:
        lane.queue.remove(one)
    assert lane.late(1000) == ([], False)
    lane.queue = Unread(queue)
    assert lane.late(2999) == ([], False), "the next one is known by now"
    lane.queue = queue
    assert names(lane.late(3000)[0]) == ["c"]


def test_what_comes_later_and_expires_earlier_is_found() -> None:
    lane = Lane(SANDBOX, BOT, USER)
    lane.add(item("a", expires_ms=5000))
    assert lane.late(100) == ([], False)
    lane.park(parked(1, expires_ms=2000))
    assert lane.late(2000) == ([], True)
    lane.drop([1])
    assert lane.late(2001) == ([], False)
    lane.add(item("b", expires_ms=2500))
    assert names(lane.late(2500)[0]) == ["b"]


def test_an_empty_lane_has_nothing_that_expires() -> None:
    lane = Lane(SANDBOX, BOT, USER)
    lane.add(item("a", expires_ms=5))
    lane.queue.clear()
    assert lane.late(10) == ([], False)
    assert lane.earliest_ms == math.inf


def test_a_lane_takes_everything_over() -> None:
    lanes = Lanes()
    known, unknown = lanes.at(SANDBOX, BOT, USER), lanes.at(SANDBOX, BOT, "")
    known.park(parked(3, expires_ms=9000))
    unknown.park(parked(2, expires_ms=4000))
    unknown.add(item("a", expires_ms=3000))
    known.take_over(unknown)
    assert (unknown.current(), unknown.queue, unknown.parked) == (known, deque(), deque())
    assert unknown.wake.is_set()
    assert [one.seq for one in known.parked] == [2, 3]
    assert names(known.late(3000)[0]) == ["a"]
    assert known.late(4000)[1]


def test_what_may_have_gone_out_in_one_message_expires_with_its_last() -> None:
    lane = Lane(SANDBOX, BOT, USER)
    for seq, expires_ms in ((1, 1000), (2, 1000), (3, 5000)):
        lane.park(parked(seq, expires_ms=expires_ms))
    assert [one.seq for one in lane.late_together({"p1", "p3"}, 1000)] == [2]
    assert [one.seq for one in lane.late_together({"p1", "p3"}, 5000)] == [1, 2, 3]


def test_a_token_is_opened_once_for_each_binding() -> None:
    lane = Lane(SANDBOX, BOT, USER)
    opened: list[str] = []

    def open_account(binding: Binding) -> Account:
        opened.append(binding.token)
        return Account(binding.bot, binding.token, "")

    first = Binding(sandbox=SANDBOX, bot=BOT, token="t1", user=USER)
    again = Binding(sandbox=SANDBOX, bot=BOT, token="t2", user=USER)
    accounts = [lane.account(binding, open_account) for binding in (first, first, again, again)]
    assert opened == ["t1", "t2"]
    assert accounts[0] is accounts[1] is not accounts[2] is accounts[3]


@pytest.mark.parametrize("user", [USER, ""])
def test_lanes_are_found_by_their_sandbox_and_gone_once_dropped(user: str) -> None:
    lanes = Lanes()
    lane = lanes.at(SANDBOX, BOT, user)
    assert lanes.at(SANDBOX, BOT, user) is lane
    assert (lanes.at(SANDBOX, "b2@im.bot", user) is lane) == bool(user), "a user has one lane"
    assert (lanes.unknown(SANDBOX, BOT) is lane) == (not user)
    lanes.drop(lane)
    assert lane not in lanes.of(SANDBOX)
