"""Loops that crash: again and again for a while, then somebody is told. Answers that are there when time is up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable

import pytest
import uvloop
from structlog.testing import capture_logs

from adapter.kit.timing import (
    Deadline,
    Flag,
    PerTickLimiter,
    RateLimiter,
    WakeupBatcher,
    complete_with_grace,
    raise_if_cancelled,
    run_with_restarts,
    shield_with_grace,
)
from tests.fakes import FakeClock

VIRTUAL_TIME = True


class Crashing:
    """Crashes at each run, after so many seconds."""

    def __init__(self, *after_s: float) -> None:
        self.clock = FakeClock()
        self.after_s = list(after_s)
        self.runs = 0

    async def run(self) -> None:
        self.runs += 1
        await self.clock.sleep(self.after_s.pop(0) if self.after_s else 0.0)
        raise ValueError(f"run {self.runs}")


async def test_a_loop_that_crashes_in_a_row_is_given_up_with_its_last_crash() -> None:
    loop = Crashing()
    with capture_logs() as logs:
        last = await run_with_restarts(loop.run, "out", loop.clock, restarts=3, steady_s=60)
    assert str(last) == "run 4"
    assert [(line["event"], line["loop"], line["crashes"]) for line in logs] == [
        ("loop.crashed", "out", number) for number in (1, 2, 3, 4)
    ]


async def test_a_long_run_begins_a_new_count() -> None:
    loop = Crashing(0, 0, 61, 0)
    with capture_logs():
        await run_with_restarts(loop.run, "out", loop.clock, restarts=2, steady_s=60)
    assert loop.runs == 5


async def test_a_loop_that_ends_although_it_should_not_has_crashed() -> None:
    async def end() -> None:
        return

    with capture_logs():
        last = await run_with_restarts(end, "out", FakeClock(), restarts=0, steady_s=60)
    with pytest.raises(RuntimeError, match="out ended"):
        raise last


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("stopped_s", [0.3, 0.06], ids=["late", "hardly late"])
@pytest.mark.parametrize("answered", [True, False])
def test_a_process_that_was_stopped_reads_the_answer_that_came_meanwhile(
    answered: bool, stopped_s: float, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Its time is over by then, too."""

    async def ask() -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                asking = asyncio.ensure_future(reader.readexactly(2))
                Deadline(asyncio.get_running_loop(), 0.05, asking.cancel)  # type: ignore[arg-type]
                await asyncio.sleep(0)
                if answered:
                    theirs.send(b"hi")
                time.sleep(stopped_s)  # noqa: ASYNC251 stands for the stop: nothing of the process runs
                return await asking
            except asyncio.CancelledError:
                return b"late"
            finally:
                writer.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(ask()) == (b"hi" if answered else b"late")


async def test_a_cancellation_that_was_swallowed_is_heeded_all_the_same() -> None:
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


async def test_at_a_beat_all_go_on_together_and_one_that_is_cancelled_holds_nobody_up() -> None:
    beat, passed = WakeupBatcher(0.01), list[int]()

    async def wait(number: int) -> None:
        await beat.wait_for_batch()
        passed.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert passed == []
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert passed == [0, 2]
    await asyncio.wait_for(beat.wait_for_batch(), 10)  # and there is another one


async def test_what_is_finished_gives_its_result_or_its_error() -> None:
    async def work(problem: Exception | None) -> str:
        await asyncio.sleep(1)
        if problem is not None:
            raise problem
        return "done"

    assert await shield_with_grace(work(None), 5) == "done"
    with pytest.raises(ValueError, match="broken"):
        await shield_with_grace(work(ValueError("broken")), 5)


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


@pytest.mark.parametrize("problem", [None, ValueError("broken")])
async def test_what_is_completed_counts_for_more_than_a_cancellation(problem: Exception | None) -> None:
    async def work() -> str:
        await asyncio.sleep(3)
        if problem is not None:
            raise problem
        return "done"

    for cancels in (False, True):
        caller = asyncio.create_task(complete_with_grace(work(), 5))
        await asyncio.sleep(1)
        if cancels:
            caller.cancel()
        await asyncio.wait([caller])
        assert (caller.exception() or caller.result()) == (problem or "done")


async def test_what_is_not_completed_in_time_is_cancelled_with_its_caller() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    for times in (1, 2):
        caller = asyncio.create_task(complete_with_grace(work(), 5))
        await asyncio.sleep(1)
        for _ in range(times):  # once more, and there is no grace
            caller.cancel()
            await asyncio.sleep(1)
        assert caller.done() is (times == 2)
        await asyncio.wait([caller])
        assert caller.cancelled()
        await asyncio.sleep(0)
        assert len(ended) == times


async def test_a_pace_holds_back_only_who_comes_too_soon() -> None:
    pace = RateLimiter(4)
    assert [pace.reserve_delay_s() for _ in range(3)] == [0.0, 0.25, 0.5]
    await asyncio.sleep(0.5)
    assert pace.reserve_delay_s() == 0.25
    await asyncio.sleep(10)
    assert [pace.reserve_delay_s() for _ in range(2)] == [0.0, 0.25]


async def rounds_of(turns: PerTickLimiter, count: int, *, cancelled: int | None = None) -> list[int]:
    """In which round of the event loop each of so many had its turn."""
    loop, now, had = asyncio.get_running_loop(), 0, dict[int, int]()

    def tick() -> None:
        nonlocal now
        now += 1
        if len(had) + (cancelled is not None) < count:
            loop.call_soon(tick)

    async def take(number: int) -> None:
        await turns.wait_turn()
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
    await turns.wait_turn()


async def test_a_flag_wakes_all_that_wait_even_if_it_is_cleared_at_once() -> None:
    flag = Flag()
    waits = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await asyncio.sleep(0)
    flag.set()
    flag.clear()
    await asyncio.gather(*waits[1:])
    assert waits[0].cancelled()
    assert not flag.is_set()
    flag.set()
    await flag.wait()
