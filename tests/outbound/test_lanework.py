"""How a user's lane is worked off: in order, one at a time, paced; nobody waits for another; at -14 it rests."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.errors import Temporary
from adapter.names import shard_of
from adapter.outbound.shard import Shard
from adapter.ports import Accepted
from tests.fakes import GAP_S, RULES, Bench, Failing, Sent
from tests.outbound.shards import (
    BOT,
    FIRST,
    STALE,
    THREE,
    THROTTLED,
    TIMEOUT,
    USER,
    finals,
    outcomes,
    parked,
    ready,
    user_writes,
)

VIRTUAL_TIME = True


async def test_commands_of_one_user_go_in_order_one_at_a_time() -> None:
    bench, shard = await ready()
    bench.chat.took_s = 3.0
    deliveries = [bench.command(f"t{number}", id=f"c{number}") for number in range(5)]
    for delivery in deliveries:
        shard.on_delivery(delivery)
    await asyncio.sleep(60)

    assert bench.chat.texts == ["t0", "t1", "t2", "t3", "t4"]
    assert bench.chat.overlaps == 0
    assert outcomes(bench) == [(f"c{number}", "accepted", "") for number in range(5)]
    assert [delivery.acks for delivery in deliveries] == [1] * 5


async def test_two_sends_to_one_user_keep_their_distance() -> None:
    bench, shard = await ready()
    shard.on_delivery(bench.command(items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]))
    shard.on_delivery(bench.command("c"))
    await asyncio.sleep(60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [later - earlier for earlier, later in pairwise(at)] == [GAP_S, GAP_S]


async def test_the_distance_is_kept_also_where_nobody_answers() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, Temporary("http_5xx")])
    shard.on_delivery(bench.command("a"))
    await asyncio.sleep(60)
    at = [sent.at_s for sent in bench.chat.sent]
    assert len(at) == 3
    assert all(later - earlier >= GAP_S for earlier, later in pairwise(at))


async def test_no_lane_waits_for_another() -> None:
    """One user gets no answer, one is throttled, one has a closed window; the fourth notices nothing."""
    bench = Bench()
    for number in range(1, 5):
        await bench.bind(bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        if number != 3:
            bench.hears(f"b{number}@im.bot", f"u{number}@im.wechat")
    shard = bench.shard()
    bench.chat.hold_sends["u1@im.wechat"] = asyncio.Event()
    bench.chat.sends_to["u2@im.wechat"] = deque([THROTTLED])
    for text in ("one", "two"):
        for number in range(1, 5):
            shard.on_delivery(bench.command(text, bot=f"b{number}@im.bot", id=f"{text}-{number}"))
    await asyncio.sleep(5)

    assert [(sent.user, sent.text) for sent in bench.chat.sent] == [
        ("u1@im.wechat", "one"),
        ("u2@im.wechat", "one"),
        ("u4@im.wechat", "one"),
        ("u4@im.wechat", "two"),
    ]
    assert sorted(parked(bench)) == ["one-2", "one-3", "two-2", "two-3"]
    shard.stop()


@pytest.mark.parametrize("users", [300, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_a_user_whose_request_hangs_holds_up_none_of_many_others(users: int) -> None:
    """Over all shards, the hanging one first: the commands of all others are sent, and theirs once it is answered."""
    bench = Bench()
    for number in range(users):
        await bench.bind(sandbox=f"s{number}", bot=f"b{number}@im.bot", user=f"u{number}@im.wechat")
        bench.hears(f"b{number}@im.bot", f"u{number}@im.wechat")
    names = {shard_of(f"s{number}"): f"s{number}" for number in range(users)}
    shards = {number: bench.shard(sandbox) for number, sandbox in names.items()}
    bench.chat.hold_sends["u0@im.wechat"] = asyncio.Event()
    for number in range(users):
        for text in ("one", "two"):
            shards[shard_of(f"s{number}")].on_delivery(
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


async def kept_back(reserve: int = 2, *, used: int = 0, **changes: Any) -> tuple[Bench, Shard]:
    """A user with a window of which sends are kept back."""
    bench = Bench()
    await bench.bind()
    bench.hears(used=used)
    return bench, bench.shard(sending=bench.sending(rules=RULES._replace(reserve=reserve)), **changes)


def reports(bench: Bench, shard: Shard, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))


@pytest.mark.parametrize(("when_closed", "outcome"), [("park", "parked"), ("refuse", "refused")])
async def test_a_command_that_needs_more_sends_than_are_left_is_told_so(when_closed: str, outcome: str) -> None:
    """It was told that they are used up, beside a window that has some."""
    bench, shard = await kept_back(0, used=8)
    shard.on_delivery(bench.command("a" * 9000, id="c1", when_closed=when_closed))
    await asyncio.sleep(30)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.window.remaining) == (outcome, "quota", 2)
    assert receipt.detail == "It needs more sends than are left after the user's last message; they must write again."


@pytest.mark.parametrize("when_closed", ["park", "refuse"])
async def test_a_final_command_goes_ahead_of_those_that_wait_for_sends(when_closed: str) -> None:
    bench, shard = await kept_back(used=6)
    reports(bench, shard, 4)
    shard.on_delivery(bench.command("done", id="last", final=True, when_closed=when_closed))
    reports(bench, shard, 1, first=4)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "done"]
    assert parked(bench) == ["c2", "c3", "c4"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "last"]

    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t1", "done", "t2", "t3", "t4"]
    assert {receipt.outcome for receipt in finals(bench)} == {"accepted"}


async def test_two_final_commands_keep_their_order_and_a_third_waits() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 2)
    for number in range(3):
        shard.on_delivery(bench.command(f"done {number}", id=f"last{number}", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["done 0", "done 1"]
    assert parked(bench) == ["c0", "c1", "last2"]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts[2:] == ["t0", "t1", "done 2"]


async def test_a_final_command_that_does_not_fit_waits_in_its_place() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 1)
    items = [{"kind": "text", "text": text} for text in "abc"]
    shard.on_delivery(bench.command(id="last", items=items, final=True))
    shard.on_delivery(bench.command("short", id="short", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    assert parked(bench) == ["c0", "last", "short"]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "a", "b", "c", "short"]


async def test_where_nothing_is_kept_back_a_final_command_keeps_its_place() -> None:
    bench, shard = await kept_back(0, used=9)
    three = [{"kind": "text", "text": text} for text in "abc"]
    shard.on_delivery(bench.command(id="c0", items=three))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == []
    assert parked(bench) == ["c0", "last"]


async def test_a_final_command_does_not_split_another_in_two() -> None:
    """One longer than a window is half sent: what is known of it is kept in the place of what is in hand."""
    bench, shard = await kept_back(used=0)
    shard.on_delivery(bench.command(id="long", items=[{"kind": "text", "text": f"t{n}"} for n in range(9)]))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == [f"t{n}" for n in range(8)]
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == [*(f"t{n}" for n in range(9)), "done"]


async def test_a_final_command_that_is_half_sent_comes_first_also_for_the_next_owner() -> None:
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 2)
    bench.chat.sends.extend([Accepted("1", 0, None, ""), THROTTLED])
    shard.on_delivery(bench.command(id="last", items=[{"kind": "text", "text": text} for text in "ab"], final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b"]
    shard.stop()

    after = Bench(bench, incarnation="me-2")
    shard = after.shard(sending=after.sending(rules=RULES._replace(reserve=2)))
    await shard.load()
    await user_writes(after, shard)
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "b", "b", "t0", "t1"]
    assert [receipt.command for receipt in finals(after)] == ["last", "c0", "c1"]


async def test_a_half_sent_command_that_comes_again_only_after_another_was_sent_is_sent_to_its_end() -> None:
    """What is parked is found before it comes again, and the user has written: it took its place in the record."""
    bench, shard = await kept_back(used=8)
    reports(bench, shard, 1)
    texts = [{"kind": "text", "text": text} for text in "ab"]
    last = bench.command(id="last", items=texts, final=True, when_closed="refuse")
    shard.on_delivery(last)
    await asyncio.sleep(GAP_S / 2)
    assert bench.chat.texts == ["a"]
    bench.leases.owned.clear()
    shard.stop()

    after = Bench(bench, incarnation="me-2")
    await after.wrote(BOT, USER, "in:2")
    shard = after.shard(sending=after.sending(rules=RULES._replace(reserve=2)))
    await shard.load()
    await asyncio.sleep(GAP_S)
    assert bench.chat.texts == ["a", "t0"]
    shard.on_delivery(last.again())
    shard.on_delivery(bench.command(id="last", items=texts))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["a", "t0", "b"]
    assert [(receipt.command, receipt.outcome) for receipt in finals(after)] == [
        ("c0", "accepted"),
        ("last", "accepted"),
    ]


@pytest.mark.parametrize("hindrance", ["parked", "refused", "expired"])
async def test_a_half_sent_command_that_comes_again_after_another_is_told_of_also_where_it_cannot_go_on(
    hindrance: str,
) -> None:
    """What took its place in the record noted its id as that of one that may be sent; yet it is no repeat."""
    bench, shard = await ready()
    when_closed = "refuse" if hindrance == "refused" else "park"
    long = bench.command(THREE, id="long", when_closed=when_closed, expires_in_s=60)
    bench.chat.sends.append(FIRST)
    shard.on_delivery(long)
    await asyncio.sleep(GAP_S / 2)
    bench.leases.owned.clear()
    shard.stop()

    after = Bench(bench, incarnation="me-2")
    shard = after.shard()
    shard.on_delivery(after.command("hi", id="c1"))
    await asyncio.sleep(10)
    if hindrance == "expired":
        await asyncio.sleep(60)
    else:
        await after.bind(state="needs_login")
    shard.on_delivery(long.again())
    await asyncio.sleep(10)
    told = [receipt for receipt in after.bus.receipts() if receipt.command == "long"]
    assert [(receipt.outcome, receipt.reason, receipt.message_ids) for receipt in told] == {
        "parked": [("parked", "needs_login", [])],
        "refused": [("refused", "needs_login", ["m1"])],
        "expired": [("refused", "expired", ["m1"])],
    }[hindrance]
    if hindrance == "parked":
        await after.bind()
        shard.rebound("s1")
        await asyncio.sleep(20)
        assert [receipt.outcome for receipt in finals(after)] == ["accepted", "accepted"]
        assert len(after.chat.texts) == 4
    shard.stop()


@pytest.mark.parametrize("is_rebound", [False, True], ids=["same bot", "newer bot"])
async def test_a_final_command_that_was_half_sent_goes_on_where_another_had_been_refused(is_rebound: bool) -> None:
    """What waits was refused with -2, perhaps over the bot before, and is found before the other one comes again."""
    bench, shard = await kept_back()
    bench.chat.sends.extend([THROTTLED, Accepted("m1", 0, None, "")])
    reports(bench, shard, 1)
    await asyncio.sleep(10)
    bot = "b9@im.bot" if is_rebound else BOT
    if is_rebound:
        await bench.bind(bot=bot)
        await bench.bindings.remove(BOT)
        await asyncio.sleep(5)
    await bench.wrote(bot, USER, "in:2")
    peer = await bench.contexts.peer(bot, USER)
    await bench.contexts.save(peer, lambda context: msgspec.structs.replace(context, used=8))
    shard.heard("s1", bot, USER)
    await asyncio.sleep(5)
    last = bench.command(
        id="last", items=[{"kind": "text", "text": text} for text in "ab"], final=True, when_closed="refuse"
    )
    shard.on_delivery(last)
    await asyncio.sleep(0.5)
    assert (bench.chat.texts, parked(bench)) == (["t0", "a"], ["c0"])
    bench.leases.owned.clear()
    shard.stop()
    await asyncio.sleep(60)

    after = Bench(bench, incarnation="me-2")
    shard = after.shard(sending=after.sending(rules=RULES._replace(reserve=2)))
    await shard.load()
    await asyncio.sleep(0.5)
    shard.on_delivery(last.again())
    await asyncio.sleep(30)
    assert bench.chat.texts == ["t0", "a", "b"]
    assert [(receipt.command, receipt.outcome) for receipt in finals(after)] == [("last", "accepted")]


async def test_a_final_command_is_not_merged_with_those_it_went_ahead_of() -> None:
    bench, shard = await kept_back(used=8, merge_chars=20)
    for number in range(2):
        shard.on_delivery(bench.command(f"t{number}" + "x" * 8, id=f"c{number}"))
    shard.on_delivery(bench.command("done", id="last", final=True))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["done"]
    assert parked(bench) == ["c0", "c1"]


async def test_minus_14_on_sends_and_from_notifystart_is_tried_a_few_times_and_then_needs_a_login() -> None:
    """F9, F10: polling may be fine. Four calls in all, spaced, and none after that."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    for number in range(5):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(3600)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 5, 35, 335]
    assert bench.lost_logins == [BOT]
    assert finals(bench) == []
    assert {reason for *_, reason in outcomes(bench)} == {"needs_login"}
    assert bench.chat.notified == [True] * 3, "one that needs a login is not asked about"


async def test_minus_14_on_sends_needs_a_login_within_a_minute() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(34)
    assert bench.lost_logins == []
    await asyncio.sleep(20)
    assert bench.lost_logins == [BOT]
    shard.stop()


async def test_a_try_that_becomes_due_while_the_lane_looks_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hindered still at one look, the lane slept for an hour, as it had nothing to wait for at the next, and nobody
    heard of the lost login. uvloop's timers end up to some milliseconds early."""
    bench, shard = await ready()
    look, early_s = shard._blocked_by, 0.0

    def looking(*what: Any) -> str:
        nonlocal early_s
        early_s = 0.001
        reason = look(*what)
        early_s = 0.0
        return reason

    monkeypatch.setattr(shard, "_blocked_by", looking)
    monkeypatch.setattr(bench.clock, "monotonic", lambda: asyncio.get_running_loop().time() - early_s)
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(60)
    assert bench.lost_logins == [BOT]
    shard.stop()


async def test_a_send_that_goes_through_after_needs_login_makes_the_binding_active_again() -> None:
    """The last try of the schedule: what is parked flows from then on, in order."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 3)
    bench.chat.notify_fails = STALE
    for number in range(3):
        shard.on_delivery(bench.command(f"t{number}", id=f"c{number}"))
    await asyncio.sleep(300)
    assert (bench.lost_logins, bench.regained_logins) == ([BOT], [])
    await asyncio.sleep(100)
    assert bench.regained_logins == [BOT]
    assert bench.chat.texts == ["t0"] * 4 + ["t1", "t2"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1", "c2"]


async def test_a_token_bound_anew_wins_over_the_last_tries_of_a_send() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 3)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(100)
    await bench.bind(token="new")
    await asyncio.sleep(5)
    assert len(bench.chat.sent) == 4
    assert [receipt.command for receipt in finals(bench)] == ["c1"]
    assert bench.regained_logins == []


async def test_a_login_that_the_poller_lost_is_not_tried_by_sends() -> None:
    """F9: a send that was out when the token died is the last one."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi"))
    await asyncio.sleep(1)
    bench.stale.add(BOT)
    await asyncio.sleep(34)
    await bench.bind(state="needs_login")
    await asyncio.sleep(300)
    bench.stale.clear()
    shard.heard("s1", BOT, USER)
    await asyncio.sleep(3600)
    assert len(bench.chat.sent) == 1


async def test_a_user_who_writes_does_not_make_minus_14_a_storm() -> None:
    """Nor does what else happens: the tries are those of the schedule."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("hi"))
    for number in range(20):
        await asyncio.sleep(1)
        await user_writes(bench, shard)
        shard.on_delivery(bench.command("more", when_closed="refuse" if number % 2 else "park"))
    await asyncio.sleep(3600)
    at = [sent.at_s for sent in bench.chat.sent]
    assert [round(later - at[0]) for later in at] == [0, 5, 35, 335]


async def test_who_refuses_to_wait_is_told_of_a_lost_login_too() -> None:
    """Nothing is parked that could be tried: the next command is the next try, and four are all."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 100)
    bench.chat.notify_fails = STALE
    for number in range(20):
        shard.on_delivery(bench.command("hi", when_closed="refuse"))
        await asyncio.sleep(60)
        assert bench.lost_logins == [BOT] * (number > 0)
    assert len(bench.chat.sent) == 4
    assert {(outcome, reason) for _, outcome, reason in outcomes(bench)} == {("refused", "needs_login")}


async def test_minus_14_that_heals_by_itself_loses_nothing() -> None:
    """F8."""
    bench, shard = await ready()
    bench.chat.sends.append(STALE)
    bench.chat.notify_fails = STALE
    shard.on_delivery(bench.command("t0", id="c0"))
    shard.on_delivery(bench.command("t1", id="c1"))
    await asyncio.sleep(60)
    assert bench.chat.texts == ["t0", "t0", "t1"]
    assert [receipt.command for receipt in finals(bench)] == ["c0", "c1"]
    assert bench.lost_logins == []


async def test_minus_14_after_one_that_healed_by_itself_is_tried_as_the_first_one_was() -> None:
    bench, shard = await ready()
    for number in range(2):
        bench.chat.sends.append(STALE)
        shard.on_delivery(bench.command(f"t{number}"))
        await asyncio.sleep(100)
    assert bench.chat.texts == ["t0", "t0", "t1", "t1"]
    assert bench.lost_logins == []


@pytest.mark.parametrize("when_closed", ["park", "refuse"])
async def test_minus_14_while_the_session_lives_refuses_that_command_alone(when_closed: str) -> None:
    """ilink-protocol 15.3: -14 is also the answer to a message that iLink does not like."""
    bench, shard = await ready()
    bench.chat.sends.extend([STALE] * 2)
    shard.on_delivery(bench.command("bad", id="c0", when_closed=when_closed))
    shard.on_delivery(bench.command("good", id="c1"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c0", "refused", "rejected"), ("c1", "accepted", "")]
    refused = bench.bus.receipts()[0]
    assert (refused.ret, refused.errcode, refused.errmsg, refused.attempts) == (None, -14, "session timeout", 2)
    assert (bench.lost_logins, bench.context().used, bench.chat.notified) == ([], 1, [True] * 2)
    binding = bench.bindings.get(BOT)
    assert binding is not None
    assert binding.state == "active"


async def test_minus_14_once_while_the_session_lives_is_no_reason_to_wait() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(STALE)
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(GAP_S + 0.1)
    assert outcomes(bench) == [("c0", "accepted", "")]
    assert len({sent.client_id for sent in bench.chat.sent}) == 1


async def test_each_part_that_meets_minus_14_is_tried_once_more() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([STALE, FIRST, STALE, STALE])
    shard.on_delivery(bench.command(THREE, id="c0"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c0", "refused", "rejected")]
    assert bench.bus.receipts()[0].message_ids == ["m1"]
    assert len(bench.chat.sent) == 4


async def test_of_merged_texts_minus_14_refuses_only_the_one_at_fault() -> None:
    bench, shard = await ready(is_open=False, merge_chars=3000)
    for text in ("a", "bad", "c"):
        shard.on_delivery(bench.command(text, id=text))
    await asyncio.sleep(5)

    async def judge(sent: Sent) -> None:
        bench.chat.sends.extend([STALE] * ("bad" in sent.text))

    bench.chat.on_send = judge
    await user_writes(bench, shard)
    await asyncio.sleep(60)
    assert outcomes(bench)[3:] == [("a", "accepted", ""), ("bad", "refused", "rejected"), ("c", "accepted", "")]


async def test_minus_14_after_a_request_without_an_answer_leaves_the_command_uncertain() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([TIMEOUT, STALE, STALE])
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c0", "uncertain", "")]
    assert bench.lost_logins == []


@pytest.mark.parametrize("says", ["answered", "stale"])
async def test_where_notifystart_is_not_answered_the_poll_decides_what_minus_14_means(says: str) -> None:
    """Until then nothing is sent: neither a refusal nor a lost login would be true."""
    bench, shard = await ready()
    bench.chat.notify_fails = Temporary("timeout")
    bench.chat.sends.extend([STALE] * 2)
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(40)
    assert (len(bench.chat.sent), outcomes(bench)) == (1, [])
    if says == "stale":
        bench.stale.add(BOT)
    else:
        bench.polled[BOT] = bench.clock.monotonic()
    await asyncio.sleep(70)
    assert len(bench.chat.sent) == (1 if says == "stale" else 2)
    assert outcomes(bench) == ([("c0", "parked", "needs_login")] if says == "stale" else [])
    bench.polled[BOT] = bench.clock.monotonic()
    await asyncio.sleep(100)
    assert outcomes(bench)[-1][1:] == (("parked", "needs_login") if says == "stale" else ("refused", "rejected"))
    assert bench.lost_logins == []


async def test_a_token_that_the_poller_tries_again_is_not_asked_about() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(STALE)

    async def lose(_: Sent) -> None:
        bench.stale.add(BOT)

    bench.chat.on_send = lose
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(60)
    assert (outcomes(bench), bench.chat.notified) == ([("c0", "parked", "needs_login")], [])


async def test_minus_14_to_a_token_that_was_replaced_meanwhile_refuses_nothing() -> None:
    bench, shard = await ready()
    bench.chat.sends.append(STALE)

    async def replace(_: Sent) -> None:
        bench.chat.on_send = None
        await bench.bind(token="new")

    bench.chat.on_send = replace
    shard.on_delivery(bench.command("t0", id="c0"))
    await asyncio.sleep(60)
    assert [receipt.outcome for receipt in finals(bench)] == ["accepted"]
    assert bench.chat.notified == []


async def test_nothing_is_sent_while_the_poller_tries_a_stale_token() -> None:
    bench, shard = await ready()
    bench.stale.add(BOT)
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert bench.chat.sent == []
    assert outcomes(bench) == [("c1", "parked", "needs_login")]
    bench.stale.clear()
    shard.heard("s1", BOT, USER)
    await asyncio.sleep(5)
    assert bench.chat.texts == ["hi"]


async def test_what_waits_for_a_login_goes_to_the_bot_that_is_bound_then() -> None:
    bench, shard = await ready()
    await bench.bind(state="needs_login")
    shard.on_delivery(bench.command("hi", id="c1"))
    await asyncio.sleep(60)
    assert outcomes(bench) == [("c1", "parked", "needs_login")]

    await bench.bind(bot="b9@im.bot")
    await bench.bindings.remove(BOT)
    await user_writes(bench, shard, bot="b9@im.bot")
    await asyncio.sleep(5)
    assert [sent.bot for sent in bench.chat.sent] == ["b9@im.bot"]


async def test_a_refusal_for_want_of_a_login_tells_of_the_parts_that_were_sent() -> None:
    bench, shard = await ready()
    bench.chat.sends.extend([Accepted("1", 0, None, ""), STALE])
    bench.chat.notify_fails = STALE
    shard.on_delivery(
        bench.command(
            id="c1", when_closed="refuse", items=[{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}]
        )
    )
    await asyncio.sleep(10)
    (receipt,) = bench.bus.receipts()
    assert (receipt.outcome, receipt.reason, receipt.message_ids) == ("refused", "needs_login", ["1"])


async def test_lanes_that_wait_for_the_lease_hardly_look_at_it() -> None:
    """Thousands that look several times a second keep a process so busy that it does not get the lease back."""
    bench, shard = await ready()
    bench.leases.is_valid, looks = False, 0
    check = bench.leases.check

    def counted(shard: int) -> None:
        nonlocal looks
        looks += 1
        check(shard)

    bench.leases.check = counted  # type: ignore[method-assign]
    shard.on_delivery(bench.command("t0"))
    await asyncio.sleep(60)
    assert 0 < looks < 15
    bench.leases.is_valid = True  # a notification that got lost does not matter
    await asyncio.sleep(6)
    assert bench.chat.texts == ["t0"]


async def test_a_bug_in_one_lane_is_logged_and_tried_again() -> None:
    bench, shard = await ready()
    bench.chat.on_send = Failing(2, RuntimeError("a bug"))
    with capture_logs() as logs:
        shard.on_delivery(bench.command("hi", id="c1"))
        await asyncio.sleep(60)
    assert [line["event"] for line in logs].count("lane.crashed") >= 1
    assert len(finals(bench)) == 1
