"""The shares of sandboxes in what is asked of the services, in virtual time."""

from __future__ import annotations

import asyncio

from adapter.jetstream.microservice import (
    MAX_IN_FLIGHT_BYTES,
    PER_S,
    RequestQuota,
)

VIRTUAL_TIME = True


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
