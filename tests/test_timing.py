"""Loops that crash: again and again for a while, then somebody is told."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from adapter.timing import restarted
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
        last = await restarted(loop.run, "out", loop.clock, restarts=3, steady_s=60)
    assert str(last) == "run 4"
    assert [(line["event"], line["loop"], line["crashes"]) for line in logs] == [
        ("loop.crashed", "out", number) for number in (1, 2, 3, 4)
    ]


async def test_a_long_run_begins_a_new_count() -> None:
    loop = Crashing(0, 0, 61, 0)
    with capture_logs():
        await restarted(loop.run, "out", loop.clock, restarts=2, steady_s=60)
    assert loop.runs == 5


async def test_a_loop_that_ends_although_it_should_not_has_crashed() -> None:
    async def end() -> None:
        return

    with capture_logs():
        last = await restarted(end, "out", FakeClock(), restarts=0, steady_s=60)
    with pytest.raises(RuntimeError, match="out ended"):
        raise last
