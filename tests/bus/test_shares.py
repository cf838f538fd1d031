"""The shares of sandboxes in what is asked of the services, in virtual time."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from adapter.jetstream.shares import HELD_BYTES, NAMED, PER_S, REFUSALS_PER_S, SAID_EVERY_S, Refusals, Shares

VIRTUAL_TIME = True


async def test_so_many_of_a_sandbox_are_in_hand_and_no_more() -> None:
    shares = Shares(2)
    assert [shares.take("bad", 1) for _ in range(3)] == ["taken", "taken", "busy"]
    assert shares.take("good", 1) == "taken"
    shares.give_back("bad", 1)
    assert [shares.take("bad", 1) for _ in range(2)] == ["taken", "busy"]


async def test_so_many_bytes_of_all_are_in_hand_and_no_more() -> None:
    shares = Shares(2)
    assert shares.take("s1", HELD_BYTES) == "taken"
    assert shares.take("s2", 1) == "full"
    shares.give_back("s1", HELD_BYTES)
    assert shares.take("s2", 1) == "taken"


async def test_a_sandbox_that_asks_faster_than_its_share_waits_for_the_next_second_and_others_do_not() -> None:
    shares, loop = Shares(32), asyncio.get_running_loop()
    began = loop.time()
    for _ in range(PER_S):
        await shares.turn("bad")
    assert loop.time() == began
    later = asyncio.create_task(shares.turn("bad"))
    await shares.turn("good")
    assert loop.time() == began
    await later
    assert loop.time() == began + 1


async def test_refusals_are_told_so_many_times_a_second() -> None:
    shares = Shares(1)
    with capture_logs() as logs:
        for _ in range(2):
            assert [shares.may_refuse("bad") for _ in range(REFUSALS_PER_S + 1)] == [True] * REFUSALS_PER_S + [False]
            assert shares.may_refuse("good")
            await asyncio.sleep(1)
    assert [(one["event"], one["sandbox"], one["refused"]) for one in logs] == [
        ("service.flooded", "bad", REFUSALS_PER_S + 1)
    ]


async def test_what_is_refused_is_said_once_a_minute_with_its_count() -> None:
    refusals = Refusals()
    with capture_logs() as logs:
        for _ in range(3):
            for _ in range(100):
                refusals.add("bad")
            refusals.add("odd")
            await asyncio.sleep(SAID_EVERY_S)
    told = [(one["event"], one["sandbox"], one["refused"]) for one in logs]
    assert [one for one in told if one[1] == "bad"] == [("service.reply_refused", "bad", n) for n in (1, 100, 100)]
    assert len(told) == 6


async def test_sandboxes_without_number_are_said_together() -> None:
    refusals = Refusals()
    with capture_logs() as logs:
        for number in range(2 * NAMED):
            refusals.add(f"s{number}")
    assert len(logs) == NAMED + 1
    assert logs[-1]["sandbox"] == ""
