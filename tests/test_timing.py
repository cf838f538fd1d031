"""Grace after a cancellation, signals, and pacers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from adapter.tools.timing import (
    PerTickLimiter,
    raise_if_cancelled,
    shield_with_grace,
)

VIRTUAL_TIME = True


async def test_a_cancellation_that_was_swallowed_takes_effect_all_the_same() -> None:
    async def swallow() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise_if_cancelled()
        return "went on"

    task = asyncio.get_running_loop().create_task(swallow())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    raise_if_cancelled()  # of a task that nobody cancelled it takes no notice


@pytest.mark.parametrize(("needs_s", "ended"), [(3.0, True), (30.0, False)], ids=["in time", "too slow"])
async def test_what_is_in_hand_is_finished_although_its_caller_is_cancelled(needs_s: float, ended: bool) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(needs_s)
            seen.append("ended")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    caller = asyncio.create_task(shield_with_grace(work(), 5))
    await asyncio.sleep(1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.sleep(0)
    assert seen == ["ended" if ended else "cancelled"]


@pytest.mark.parametrize(("needs_s", "ended"), [(3, True), (30, False)])
async def test_what_is_finished_at_the_end_of_a_cancelled_task_gets_its_grace_too(
    needs_s: float, ended: bool
) -> None:
    """Nobody cancels the task once more: what cannot end would keep the whole process."""
    did: list[str] = []

    async def work() -> None:
        await asyncio.sleep(needs_s)
        did.append("ended")

    async def ends() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await shield_with_grace(work(), 5)

    caller = asyncio.create_task(ends())
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller], timeout=10)
    assert caller.cancelled()
    assert did == ["ended"] * ended


async def rounds_of(turns: PerTickLimiter, count: int, *, cancelled: int | None = None) -> list[int]:
    """In which round of the event loop each of so many had its turn."""
    loop, now, had = asyncio.get_running_loop(), 0, dict[int, int]()

    def tick() -> None:
        nonlocal now
        now += 1
        if len(had) + (cancelled is not None) < count:
            loop.call_soon(tick)

    async def take(number: int) -> None:
        await turns.wait_tick()
        had[number] = now

    tasks = [asyncio.create_task(take(number)) for number in range(count)]
    loop.call_soon(tick)
    await asyncio.sleep(0)
    if cancelled is not None:
        tasks[cancelled].cancel()
    await asyncio.wait(tasks)
    assert list(had) == [number for number in range(count) if number != cancelled]
    return list(had.values())


async def test_so_many_have_their_turn_in_each_round_and_the_others_in_their_order() -> None:
    turns = PerTickLimiter(3)
    rounds = await rounds_of(turns, 10)
    assert max(Counter(rounds).values()) == 3
    assert max(rounds) - min(rounds) <= 4
    assert len(set(await rounds_of(turns, 3))) == 1  # few need not wait, also not after many


async def test_one_that_is_cancelled_as_it_waits_takes_no_turn() -> None:
    turns = PerTickLimiter(1)
    assert max(Counter(await rounds_of(turns, 4, cancelled=2)).values()) == 1
    await turns.wait_tick()
