"""Shares of what is done at once: nobody has more than a share, and those who wait take turns."""

from __future__ import annotations

import asyncio

from adapter.tools.concurrency import FairSlots

VIRTUAL_TIME = True


class Work:
    """Holds slots until told to end; knows who works and in what order they began."""

    def __init__(self, slots: FairSlots) -> None:
        self._slots = slots
        self.began: list[str] = []
        self.working: list[str] = []
        self.limit = 0

    async def do(self, sandbox: str, took_s: float) -> None:
        async with self._slots.slot(sandbox):
            self.began.append(sandbox)
            self.working.append(sandbox)
            self.limit = max(self.limit, len(self.working))
            try:
                await asyncio.sleep(took_s)
            finally:
                self.working.remove(sandbox)


async def test_a_sandbox_has_no_more_than_its_share_and_others_begin_at_once() -> None:
    work = Work(FairSlots(4, share=2))
    async with asyncio.TaskGroup() as group:
        for sandbox in ("bad", "bad", "bad", "bad", "good", "good"):
            group.create_task(work.do(sandbox, 60))
        await asyncio.sleep(1)
        assert work.working == ["bad", "bad", "good", "good"]
    assert work.began == ["bad", "bad", "good", "good", "bad", "bad"]


async def test_those_who_wait_take_turns() -> None:
    work = Work(FairSlots(1, share=1))
    async with asyncio.TaskGroup() as group:
        for sandbox in ("a", "a", "a", "b", "c", "b"):
            group.create_task(work.do(sandbox, 1))
    assert work.began == ["a", "a", "b", "c", "a", "b"]
    assert work.limit == 1


async def test_who_is_stopped_gives_the_slot_back_also_while_waiting_for_it() -> None:
    slots = FairSlots(1, share=1)
    work = Work(slots)
    holding = asyncio.create_task(work.do("a", 60))
    waiting = [asyncio.create_task(work.do(sandbox, 60)) for sandbox in ("b", "c")]
    await asyncio.sleep(1)
    holding.cancel()
    waiting[0].cancel()
    await asyncio.sleep(1)
    assert work.working == ["c"]
    slots.release("c")
    assert slots.try_acquire("d")
    waiting[1].cancel()
