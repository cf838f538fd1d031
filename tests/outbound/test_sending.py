"""How a user's queue is worked off: in order, one at a time, paced; nobody waits for another; at -14 it rests."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from itertools import pairwise

import pytest

from adapter.errors import Temporary
from adapter.ports import Accepted
from tests.fakes import GAP_S, Bench, FakeTenure
from tests.outbound.partitions import (
    BOT,
    STALE,
    THROTTLED,
    TIMEOUT,
    finals,
    outcomes,
    parked,
    ready,
    user_writes,
)

VIRTUAL_TIME = True


async def test_two_sends_to_one_user_keep_their_distance() -> None:
    bench, partition = await ready()
    partition.on_delivery(bench.command(items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]))
    partition.on_delivery(bench.command("c"))
    await asyncio.sleep(60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [later - earlier for earlier, later in pairwise(at)] == [GAP_S, GAP_S]


async def test_the_distance_is_kept_also_where_nobody_answers() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([TIMEOUT, Temporary("http_5xx")])
    partition.on_delivery(bench.command("a"))
    await asyncio.sleep(400)
    at = [sent.at_s for sent in bench.chat.sent]
    assert len(at) == 3
    assert all(later - earlier >= GAP_S for earlier, later in pairwise(at))


async def test_no_lane_waits_for_another(bench: Bench) -> None:
    """One user gets no answer, one is throttled, one has a closed window; the fourth notices nothing."""
    for number in range(1, 5):
        await bench.bind(bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        if number != 3:
            bench.hears("s1", f"u{number}@im.wechat", bot=f"b{number}@im.bot")
    partition = bench.partition()
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    bench.chat.sends_to["u2@im.wechat"] = deque([THROTTLED])
    for text in ("one", "two"):
        for number in range(1, 5):
            partition.on_delivery(bench.command(text, bot=f"b{number}@im.bot", id=f"{text}-{number}"))
    await asyncio.sleep(5)

    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [
        ("u1@im.wechat", "one"),
        ("u2@im.wechat", "one"),
        ("u4@im.wechat", "one"),
        ("u4@im.wechat", "two"),
    ]
    assert sorted(parked(bench)) == ["one-2", "one-3", "two-2", "two-3"]
    partition.stop()


@pytest.mark.parametrize("users", [300, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_a_user_whose_request_hangs_holds_up_none_of_many_others(users: int, bench: Bench) -> None:
    """The hanging one comes first: the commands of all others are sent, and theirs once it is answered."""
    for number in range(users):
        await bench.bind(sandbox=f"s{number}", bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        bench.hears(f"s{number}", f"u{number}@im.wechat", bot=f"b{number}@im.bot")
    names = {bench.names.partition_of(f"s{number}"): f"s{number}" for number in range(users)}
    partitions = {number: bench.partition(sandbox) for number, sandbox in names.items()}
    bench.chat.hold_sends["u0@im.wechat"] = asyncio.Event()
    for number in range(users):
        for text in ("one", "two"):
            partitions[bench.names.partition_of(f"s{number}")].on_delivery(
                bench.command(text, sandbox=f"s{number}", id=f"{text}-{number}")
            )
    await asyncio.sleep(60)
    assert Counter(sent.user for sent in bench.chat.sent) == {
        f"u{number}@im.wechat": 2 if number else 1 for number in range(users)
    }
    assert bench.chat.overlaps == 0
    bench.chat.hold_sends["u0@im.wechat"].set()
    await asyncio.sleep(10)
    assert [sent.text for sent in bench.chat.sent if sent.user == "u0@im.wechat"] == ["one", "two"]
    assert len(finals(bench)) == 2 * users


@pytest.mark.parametrize(("when_closed", "outcome"), [("park", "parked"), ("refuse", "refused")])
async def test_a_command_that_needs_more_sends_than_are_left_is_told_so(when_closed: str, outcome: str) -> None:
    """It was told that they are used up, beside a window that has some."""
    bench, partition = await ready()
    bench.hears(sends_used=8)
    partition.on_delivery(bench.command("a" * 4000, id="c1", when_closed=when_closed))
    await asyncio.sleep(30)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.window.remaining) == (outcome, "quota", 2)
    assert receipt.detail.startswith("The command needs more sends than are left")


async def test_minus_14_on_one_send_is_tried_once_more_while_the_session_lives() -> None:
    """A malformed body is answered so, too. The bot and what comes behind are none the worse for it."""
    bench, partition = await ready()
    bench.chat.sends.extend([STALE] * 2)
    for number in range(2):
        partition.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t0", "t1"]
    assert outcomes(bench) == [("c0", "refused", "rejected"), ("c1", "accepted", "")]
    assert (bench.bus.receipts()[0].errcode, bench.bus.receipts()[0].errmsg) == (-14, "session timeout")
    assert bench.polled_now == []


async def test_minus_14_on_a_send_and_on_notifystart_waits_for_the_login() -> None:
    bench, partition = await ready()
    bench.chat.sends.append(STALE)
    bench.chat.notify_fails = STALE
    partition.on_delivery(bench.command("hi", id="c1"))
    partition.on_delivery(bench.command("now", id="c2", when_closed="refuse"))
    await asyncio.sleep(5)
    assert outcomes(bench) == []
    assert bench.polled_now == [BOT]  # the poller has the say
    bench.stale.add(BOT)
    bench.replica.parts.sessions.changed.notify_all()
    await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", "parked", "needs_login"), ("c2", "refused", "needs_login")]
    assert bench.bus.receipts()[0].errcode == -14
    await asyncio.sleep(300)
    assert bench.chat.texts == ["hi"]
    bench.stale.clear()
    partition.on_binding(None, bench.bindings.get(BOT))
    await asyncio.sleep(5)
    assert (bench.chat.texts, outcomes(bench)[-1]) == (["hi", "hi"], ("c1", "accepted", ""))


@pytest.mark.parametrize(
    ("is_dead", "outcome"), [(False, ("refused", "rejected")), (True, ("parked", "needs_login"))]
)
async def test_where_notifystart_brings_no_answer_the_next_poll_decides(
    is_dead: bool, outcome: tuple[str, str], bench: Bench
) -> None:
    bench.chat.notify_fails = Temporary("timeout")
    await bench.bind()
    bench.hears()
    partition = bench.partition()
    bench.chat.sends.extend([STALE] * 2)
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(5)
    assert (outcomes(bench), bench.polled_now) == ([], [BOT])
    for _ in range(2):  # it is asked at each -14
        if is_dead:
            bench.stale.add(BOT)
        else:
            bench.polled_at[BOT] = bench.clock.monotonic()
        bench.replica.parts.sessions.changed.notify_all()
        await asyncio.sleep(5)
    assert outcomes(bench) == [("c1", *outcome)]
    assert set(bench.chat.notified) == {True}


async def test_what_waits_for_a_login_goes_to_the_bot_that_is_bound_then() -> None:
    bench, partition = await ready()
    await bench.bind(state="needs_login")
    partition.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "parked", "needs_login")]

    await bench.bind(bot="b9@im.bot")
    await bench.bindings.remove(BOT)
    await user_writes(bench, bot="b9@im.bot")
    await asyncio.sleep(5)
    assert [sent.bot for sent in bench.chat.sent] == ["b9@im.bot"]


async def test_a_refusal_for_want_of_a_login_tells_of_the_parts_that_were_sent() -> None:
    bench, partition = await ready()
    bench.chat.sends.extend([Accepted("1", 0, None, ""), STALE])
    bench.chat.notify_fails = STALE
    partition.on_delivery(
        bench.command(
            id="c1", when_closed="refuse", items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]
        )
    )
    await asyncio.sleep(10)
    bench.stale.add(BOT)
    bench.replica.parts.sessions.changed.notify_all()
    await asyncio.sleep(10)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "needs_login", ["1"])


async def test_lanes_that_wait_for_the_lease_hardly_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands that look several times a second keep a process so busy that it does not get the lease back."""
    bench, partition = await ready()
    bench.leases.has_lease, looks = False, 0
    check = FakeTenure.check

    def counted(tenure: FakeTenure) -> None:
        nonlocal looks
        looks += 1
        check(tenure)

    monkeypatch.setattr(FakeTenure, "check", counted)
    partition.on_delivery(bench.command("t0"))
    await asyncio.sleep(60)
    assert 0 < looks < 15
    bench.leases.has_lease = True
    await asyncio.sleep(1)
    assert bench.chat.texts == ["t0"]
