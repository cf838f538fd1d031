"""The shares of sandboxes in what is asked of the services, in virtual time."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from adapter.jetstream.microservice import (
    MAX_IN_FLIGHT_BYTES,
    PER_S,
    REFUSALS_PER_S,
    RequestQuota,
)

VIRTUAL_TIME = True


async def test_so_many_of_a_sandbox_are_in_hand_and_no_more() -> None:
    shares = RequestQuota(2)
    assert [shares.try_admit("bad", 1) for _ in range(3)] == [None, None, "busy"]
    assert shares.try_admit("good", 1) is None
    shares.release("bad", 1)
    assert [shares.try_admit("bad", 1) for _ in range(2)] == [None, "busy"]


async def test_so_many_bytes_of_all_are_in_hand_and_no_more() -> None:
    shares = RequestQuota(2)
    assert shares.try_admit("s1", MAX_IN_FLIGHT_BYTES) is None
    assert shares.try_admit("s2", 1) == "full"
    shares.release("s1", MAX_IN_FLIGHT_BYTES)
    assert shares.try_admit("s2", 1) is None


async def test_a_sandbox_above_its_share_waits_for_the_next_second_and_others_do_not() -> None:
    shares, loop = RequestQuota(32), asyncio.get_running_loop()
    began = loop.time()
    for _ in range(PER_S):
        await shares.wait_turn("bad")
    assert loop.time() == began
    later = asyncio.create_task(shares.wait_turn("bad"))
    await shares.wait_turn("good")
    assert loop.time() == began
    await later
    assert loop.time() == began + 1


async def test_refusals_are_answered_a_bounded_number_of_times_a_second() -> None:
    shares = RequestQuota(1)
    with capture_logs() as logs:
        for _ in range(2):
            assert [shares.count_refusal("bad") for _ in range(REFUSALS_PER_S + 1)] == [True] * REFUSALS_PER_S + [
                False
            ]
            assert shares.count_refusal("good")
            await asyncio.sleep(1)
    assert [(one["event"], one["sandbox"], one["refused"]) for one in logs] == [
        ("service.flooded", "bad", REFUSALS_PER_S + 1)
    ]


async def test_one_request_without_an_inbox_is_logged_in_a_second() -> None:
    quota = RequestQuota(1)
    with capture_logs() as logs:
        for sandbox in ("bad", ""):
            for _ in range(100):
                quota.log_without_inbox(sandbox)
                quota.log_without_inbox("other")
            await asyncio.sleep(1)
    assert [(one["event"], one["sandbox"]) for one in logs] == [
        ("service.reply_refused", "bad"),
        ("service.reply_refused", ""),
    ]
