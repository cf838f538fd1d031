"""The exhaustive walk: an owner is killed at each call of bus, bucket, iLink and CDN, before and after its effect.

Or that call fails, and the owner goes on. Whatever the point, each command ends once, as it was told, in order, and
nothing is sent twice as two messages.
`WALK=all` kills the second owner at each of its points, too; otherwise at some of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

from adapter.errors import Refused, Temporary
from tests.outbound.partitions import BOT, STALE, THROTTLED, TIMEOUT, USER
from tests.outbound.walking import (
    ERASED,
    Point,
    Story,
    Walked,
    again,
    answers,
    bind,
    command,
    copy_again,
    erase,
    media,
    pause,
    plain,
    session,
    slow,
    slow_store,
    together,
    unbind,
    walk_to,
    writes,
)

STRIDE = 1 if os.environ.get("WALK") == "all" else 7
NEW_BOT, OTHER = "b2@im.bot", "u2@im.wechat"
REJECTED = Refused("rejected", "iLink answered -3", ret=-3)
ALL = {"a": "accepted", "b": "accepted", "c": "accepted"}
UNCERTAIN = {"a": "uncertain", "b": "uncertain", "c": "uncertain"}

STORIES = {
    "one command": Story([writes(), command("a")], {"a": "accepted"}),
    "three commands": Story([writes(), command("a"), command("b"), command("c")], ALL),
    "two parts": Story([writes(), command("a", parts=2), command("b")], {"a": "accepted", "b": "accepted"}),
    "media": Story([writes(), media("a"), command("b")], {"a": "accepted", "b": "accepted"}),
    "parked": Story([command("a"), command("b"), pause(20), writes()], {"a": "accepted", "b": "accepted"}),
    "merged": Story(
        [command("a"), command("b"), command("c"), pause(20), writes()],
        ALL,
        killed=UNCERTAIN,
        settings={"merge_chars": 3000},
    ),
    "merged, then one part by itself": Story(
        [command("a"), command("b"), media("c"), pause(20), writes()],
        ALL,
        killed=UNCERTAIN,
        settings={"merge_chars": 3000},
    ),
    "merged, -2, then another message": Story(
        [answers("a", THROTTLED), command("a"), command("b"), pause(20), writes(), pause(20), writes()],
        {"a": "accepted", "b": "accepted"},
        killed=UNCERTAIN,
        settings={"merge_chars": 3000},
    ),
    "refused when closed": Story(
        [command("a", when_closed="refuse"), pause(10), writes(), pause(10), command("b", when_closed="refuse")],
        {"a": "refused/window_closed", "b": "accepted"},
        killed={"a": "accepted"},
    ),
    "quota": Story(
        [writes(), command("a"), command("b"), command("c"), pause(20), writes(), pause(400), writes()],
        ALL,
        settings={"sends": 2},
    ),
    "-2, then another message": Story(
        [writes(), answers("a", THROTTLED), command("a"), command("b"), pause(30), writes()],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
    ),
    "-2, then refused": Story(
        [writes(), answers("a", THROTTLED), command("a", when_closed="refuse"), command("b"), pause(30), writes()],
        {"a": "refused/throttled", "b": "accepted"},
        killed={"a": "accepted refused/window_closed uncertain"},
    ),
    "-2, then the probe": Story(
        [writes(), answers("a", THROTTLED), command("a"), command("b")],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
    ),
    "-3": Story(
        [writes(), answers("a", REJECTED), command("a"), command("b")],
        {"a": "refused/rejected", "b": "accepted"},
        killed={"a": "accepted uncertain"},
    ),
    "-14 of a session that lives": Story(
        [writes(), answers("a", STALE), command("a"), command("b")], {"a": "accepted", "b": "accepted"}
    ),
    "-14 twice of a session that lives": Story(
        [writes(), answers("a", STALE, STALE), command("a"), command("b")],
        {"a": "refused/rejected", "b": "accepted"},
        killed={"a": "accepted uncertain"},
        given={"a": "accepted"},
    ),
    "-14 of a session that is dead": Story(
        [
            writes(),
            answers("a", STALE),
            session(STALE),
            command("a"),
            command("b"),
            pause(60),
            bind(),
            pause(10),
            writes(),
        ],
        {"a": "accepted", "b": "accepted"},
    ),
    "no answer once": Story(
        [writes(), answers("a", TIMEOUT), command("a"), command("b")],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
    ),
    "no answer twice": Story(
        [writes(), answers("a", TIMEOUT, TIMEOUT), command("a"), command("b")],
        {"a": "uncertain", "b": "accepted"},
    ),
    "no answer to the second part": Story(
        [writes(), command("a", parts=2), answers("a", TIMEOUT, part=1), command("b")],
        {"a": "accepted", "b": "accepted"},
        killed=UNCERTAIN,
    ),
    "no answer to a merged message": Story(
        [answers("a", TIMEOUT), command("a"), command("b"), pause(20), writes()],
        {"a": "accepted", "b": "accepted"},
        killed=UNCERTAIN,
        settings={"merge_chars": 3000},
        given=UNCERTAIN,
    ),
    "no answer until it expires": Story(
        [writes(), answers("a", *[TIMEOUT] * 9), command("a", expires_in_s=20), command("b")],
        {"a": "uncertain", "b": "accepted"},
    ),
    "no answer until another one has one": Story(
        [
            bind(NEW_BOT, OTHER),
            writes(),
            writes(bot=NEW_BOT, user=OTHER),
            answers("a", TIMEOUT),
            command("a", user=USER),
            pause(70),
            command("b", to=OTHER, user=OTHER),
            command("c", user=USER),
        ],
        ALL,
        killed={"a": "uncertain"},
    ),
    "no answer, then unbound": Story(
        [writes(), answers("a", TIMEOUT, TIMEOUT), command("a"), command("b"), pause(0.5), unbind()],
        {"a": "uncertain", "b": "refused/not_bound"},
        killed={"a": "refused/not_bound"},
        bound=[],
    ),
    "no answer, then another bot": Story(
        [writes(), answers("a", TIMEOUT), command("a"), command("b"), pause(0.5), bind(NEW_BOT), writes(bot=NEW_BOT)],
        {"a": "uncertain", "b": "accepted"},
        killed={"a": "accepted"},
        bound=[NEW_BOT],
    ),
    "-2 to the second part": Story(
        [writes(), command("a", parts=2), answers("a", THROTTLED, part=1), command("b"), pause(30), writes()],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
    ),
    "-2 to the second part, until it expires": Story(
        [
            writes(),
            command("a", parts=2, expires_in_s=20),
            answers("a", THROTTLED, part=1),
            command("b"),
            pause(30),
            writes(),
        ],
        {"a": "refused/expired", "b": "accepted"},
        killed={"a": "accepted uncertain"},
    ),
    "two parts that fill the window": Story(
        [writes(), command("a", parts=2)], {"a": "accepted"}, settings={"sends": 2}
    ),
    "no answer, and the window is full": Story(
        [writes(), answers("a", TIMEOUT), command("a")],
        {"a": "accepted"},
        killed={"a": "uncertain"},
        settings={"sends": 1},
    ),
    "unreachable for a while": Story(
        [writes(), answers("a", Temporary("network"), Temporary("network")), command("a"), command("b")],
        {"a": "accepted", "b": "accepted"},
    ),
    "unreachable until it expires": Story(
        [writes(), answers("a", *[Temporary("network")] * 50), command("a", expires_in_s=20), pause(30), writes()],
        {"a": "refused/expired"},
        killed={"a": "uncertain"},
    ),
    "merged, and unreachable until one expires": Story(
        [
            answers("a", *[Temporary("network")] * 50),
            command("a", expires_in_s=30),
            command("b"),
            pause(2),
            writes(),
        ],
        {"a": "refused/expired", "b": "accepted"},
        killed=UNCERTAIN,
        settings={"merge_chars": 3000},
    ),
    "expired while parked": Story(
        [command("a", expires_in_s=30), command("b"), pause(60), writes()],
        {"a": "refused/expired", "b": "accepted"},
    ),
    "another bot of the same user": Story(
        [command("a"), command("b", user=USER), pause(20), bind(NEW_BOT), pause(5), writes(bot=NEW_BOT)],
        {"a": "accepted", "b": "accepted"},
        bound=[NEW_BOT],
    ),
    "another bot while a send is out": Story(
        [writes(), slow(3), command("a"), command("b"), pause(1), bind(NEW_BOT), pause(20), writes(bot=NEW_BOT)],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
        bound=[NEW_BOT],
    ),
    "another bot while a send of the former one is out": Story(
        [
            writes(),
            slow(3),
            command("a", bot=BOT),
            pause(1),
            bind(NEW_BOT),
            writes(bot=NEW_BOT),
            command("b"),
        ],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain refused/not_bound"},
        unreadable=1,
        bound=[NEW_BOT],
    ),
    "unbound while a send is out": Story(
        [writes(), slow(3), command("a"), command("b"), pause(1), unbind()],
        {"a": "accepted", "b": "refused/not_bound"},
        killed={"a": "uncertain refused/not_bound"},
        bound=[],
    ),
    "unbound while a send is stored": Story(
        [writes(), pause(5), slow_store(3), command("a"), command("b"), pause(1), unbind()],
        {"a": "refused/not_bound", "b": "refused/not_bound"},
        killed={"a": "uncertain"},
        bound=[],
    ),
    "another bot while a send is stored": Story(
        [
            writes(),
            pause(5),
            slow_store(3),
            command("a"),
            pause(1),
            bind(NEW_BOT),
            command("b"),
            pause(60),
            writes(bot=NEW_BOT),
        ],
        {"a": "accepted", "b": "accepted"},
        killed={"a": "uncertain"},
        given={"a": "uncertain"},
        bound=[NEW_BOT],
    ),
    "closed while a send is out": Story(
        [writes(), slow(3), command("a"), command("b"), pause(1), unbind()],
        {"a": "accepted", "b": "refused/not_bound"},
        killed={"a": "uncertain refused/not_bound"},
        bound=[],
    ),
    "unbound, and another person bound at once": Story(
        [
            writes(),
            command("a"),
            pause(5),
            together(command("b"), unbind(), bind(NEW_BOT, OTHER), command("c", to=OTHER)),
            pause(10),
            writes(bot=NEW_BOT, user=OTHER),
        ],
        {"a": "accepted", "b": "refused/not_bound", "c": "accepted"},
        killed={"a": "uncertain refused/not_bound", "b": "uncertain"},
        bound=[NEW_BOT],
    ),
    "unbound, and bound again at once": Story(
        [writes(), together(command("a"), unbind(), bind()), pause(5), writes(), command("b")],
        {"a": "refused/not_bound", "b": "accepted"},
        killed={"a": "uncertain"},
        bound=[BOT],
    ),
    "bound, unbound and bound at once": Story(
        [
            together(unbind(), bind(NEW_BOT, OTHER), unbind(NEW_BOT), bind(), bind(NEW_BOT), unbind(NEW_BOT)),
            together(unbind(NEW_BOT), bind(NEW_BOT, OTHER)),
            pause(5),
            writes(bot=NEW_BOT, user=OTHER),
            command("a", to=OTHER),
        ],
        {"a": "accepted"},
        bound=[NEW_BOT],
    ),
    "erased, and bound again at once": Story(
        [writes(), pause(1), together(erase(), bind()), pause(5), writes(), command("a")],
        {"a": "accepted"},
        bound=[BOT],
    ),
    "erased while a send is out": Story(
        [bind(NEW_BOT, OTHER), slow(3), writes(), together(command("a", user=USER), erase()), pause(20)],
        {"a": ERASED},
        bound=[NEW_BOT],
        is_erased=True,
    ),
    "a new person while bare commands wait": Story(
        [
            command("a"),
            command("b"),
            pause(10),
            unbind(),
            bind(NEW_BOT, OTHER),
            writes(bot=NEW_BOT, user=OTHER),
            pause(1),
            command("c", to=OTHER),
        ],
        {"a": "refused/not_bound", "b": "refused/not_bound", "c": "accepted"},
    ),
    "two persons": Story(
        [
            bind(NEW_BOT, OTHER),
            writes(),
            command("a", user=USER),
            command("b", to=OTHER, user=OTHER),
            pause(10),
            writes(bot=NEW_BOT, user=OTHER),
            command("c", user=USER),
        ],
        ALL,
    ),
    "a user who gets known": Story(
        [unbind(), bind(user=""), command("a", bot=BOT), command("b"), pause(10), writes()],
        {"a": "accepted", "b": "accepted"},
    ),
    "a repeated id": Story(
        [writes(), command("a"), pause(5), command("b", id="a"), pause(5), command("c")],
        ALL,
    ),
    "-3, then its id again": Story(
        [writes(), answers("a", REJECTED), command("a"), pause(5), command("b", id="a")],
        {"a": "refused/rejected", "b": "accepted"},
        killed={"a": "accepted uncertain", "b": "uncertain"},
    ),
    "delivered again": Story(
        [writes(), slow(3), command("a"), command("b"), pause(1), again(), pause(3), again()],
        {"a": "accepted", "b": "accepted"},
    ),
    "on plain wechat.out": Story([writes(), plain("a"), plain("b")], {"a": "accepted", "b": "accepted"}),
    "on plain wechat.out before another person is bound": Story(
        [
            writes(),
            together(plain("a"), unbind(), bind(NEW_BOT, OTHER), command("b", to=OTHER)),
            pause(10),
            writes(bot=NEW_BOT, user=OTHER),
        ],
        {"a": "refused/not_bound", "b": "accepted"},
        bound=[NEW_BOT],
    ),
    "copied twice": Story(
        [plain("a"), plain("b"), pause(3), copy_again(), pause(20), writes()],
        {"a": "accepted", "b": "accepted"},
    ),
    "copied twice, and sent at once": Story(
        [writes(), slow(3), plain("a"), plain("b"), pause(1), copy_again(), pause(20)],
        {"a": "accepted", "b": "accepted"},
    ),
    "typing": Story(
        [writes(), command("a", typing="on"), pause(2), command("b"), command("c", typing="off")],
        ALL,
        killed={"a": "refused", "c": "refused"},
    ),
    "typing while the window is closed": Story(
        [command("a", typing="on"), command("b"), command("c", typing="off"), pause(20), writes()],
        {"a": "accepted", "b": "accepted", "c": "refused/window_closed"},
    ),
    "three commands, two messages, a bind": Story(
        [
            writes(),
            command("a"),
            command("b"),
            command("c", user=USER),
            pause(15),
            bind(NEW_BOT),
            pause(5),
            writes(bot=NEW_BOT),
        ],
        ALL,
        killed={"a": "uncertain", "b": "uncertain"},
        settings={"sends": 2},
        bound=[NEW_BOT],
    ),
}


@functools.cache
def undisturbed(name: str) -> Walked:
    """The story where nobody ends."""
    return walk_to(STORIES[name], Point())


def walked(name: str, point: Point) -> tuple[list[int], list[str]]:
    passed, found, changes = walk_to(STORIES[name], point)
    wanted = undisturbed(name).changes
    if changes != wanted:
        found.append(f"bindings have the events {changes}, not {wanted}")
    return passed, [f"{name}, {point}: {fault}" for fault in found]


def points(name: str) -> Iterator[int]:
    """Each point of the first owner."""
    (passed,), found, _ = undisturbed(name)
    assert found == []
    yield from range(1, passed + 1)


@pytest.mark.parametrize("name", STORIES)
def test_an_owner_killed_at_each_point_costs_nothing(name: str) -> None:
    assert [fault for at in points(name) for fault in walked(name, Point((at,)))[1]] == []


@pytest.mark.parametrize("name", STORIES)
def test_a_partition_given_away_at_each_point_costs_nothing(name: str) -> None:
    assert [fault for at in points(name) for fault in walked(name, Point((at,), is_giving=True))[1]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_a_second_owner_killed_as_well_costs_nothing(name: str) -> None:
    """The second one at some of its points, other ones for each of the first's."""
    found = []
    for at in points(name):
        passed, _ = walked(name, Point((at,)))
        if len(passed) > 1:
            for second in range(1 + at % STRIDE, passed[1] + 1, STRIDE):
                found += walked(name, Point((at, second)))[1]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_an_owner_stopped_at_each_point_does_no_harm_when_it_goes_on(name: str) -> None:
    assert [fault for at in points(name) for fault in walked(name, Point((at,), is_frozen=True))[1]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_each_call_may_fail_once_or_its_answer_get_lost(name: str) -> None:
    assert [fault for at in points(name) for fault in walked(name, Point((at,), is_failing=True))[1]] == []
