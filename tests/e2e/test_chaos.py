"""The short form of `make chaos`: everything goes wrong at once, and the audit finds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.chaos import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "minutes"), [("cursor_replay", 2.2), ("ack_on_delivery", 1.2)])
async def test_two_minutes_of_chaos_lose_double_and_disorder_nothing(
    tmp_path: Path, mode: str, minutes: float
) -> None:
    """Where iLink forgets what it has delivered, what was in the hands of an adapter that is killed may be lost."""
    report = await run(tmp_path, command="", mode=mode, seed=1, minutes=minutes, bots=60)
    print(report.table())
    assert report.found.faults() == []
    assert report.found.stored + report.found.excused_lost == report.said
    assert report.found.excused_lost <= report.found.may_be_lost
    assert sum(report.found.outcomes.values()) == report.sent
    assert {"adapter killed", "adapter frozen", "server killed"} & {one.what for one in report.happened}
