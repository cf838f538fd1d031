"""What sandboxes are told of their users' windows: by quota, by -2, by time, and after kill -9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import Window, WindowEvent, WindowQuery
from adapter.simulator import FaultRule
from tests.e2e.world import NAMES, World, eventually, stream, world


async def told(nc: Client, sandbox: str = "s1") -> list[tuple[str, str, int | None]]:
    found = await stream(nc, NAMES.stream_event, NAMES.event(sandbox, "window"))
    events = [msgspec.json.decode(data, type=WindowEvent) for _, data in found]
    return [(event.change, event.reason, event.window.remaining) for event in events]


async def comes(nc: Client, *expected: tuple[str, str, int | None], sandbox: str = "s1") -> None:
    """Waits until these, and no others, are told."""

    async def is_told() -> bool:
        return len(await told(nc, sandbox)) >= len(expected)

    await eventually(is_told, f"{len(expected)} events are told")
    assert await told(nc, sandbox) == list(expected)


async def commands(made: World, nc: Client, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        await made.command(nc, "s1", f"c{number}")


async def shown(nc: Client, sandbox: str = "s1") -> Window:
    """What wechat.svc.window says."""
    query = msgspec.json.encode(WindowQuery(sandbox=sandbox))
    return msgspec.json.decode((await nc.request(NAMES.svc("window"), query, timeout=10)).data, type=Window)


OPENED, LOW, QUOTA = ("opened", "", 10), ("low", "", 3), ("closed", "quota", 0)


async def test_by_quota_and_by_minus_2(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, bot = await made.begun()
        await comes(nc, OPENED)
        await commands(made, nc, 12)
        await comes(nc, OPENED, LOW, QUOTA)
        assert (await shown(nc)).remaining == 0
        made.say("s1", "go on")
        await made.settle(nc)
        assert len(made.sim.phone(bot.user)) == 11, "the parked ones came in one message"
        await comes(nc, OPENED, LOW, QUOTA, OPENED)
        made.sim.set_fault(FaultRule(fault="F11", bot=bot.bot, count=1))
        await commands(made, nc, 1, first=12)
        await comes(nc, OPENED, LOW, QUOTA, OPENED, ("closed", "throttled", 0))
        made.say("s1", "and on")
        await made.settle(nc)
        await comes(nc, OPENED, LOW, QUOTA, OPENED, ("closed", "throttled", 0), OPENED)
        assert made.sim.violations(kind="quota_exceeded") == []


async def test_by_time_while_nothing_happens(tmp_path: Path) -> None:
    """A window of four seconds; the user writes again after it."""
    async with world(tmp_path, environ={"WECHAT_NATS_WINDOW_HOURS": "0.00111"}) as made:
        await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        for number in range(2):
            made.say("s1", f"hello {number}")
            await comes(nc, *[OPENED, ("closed", "window_closed", 0)] * (number + 1))
            assert await shown(nc) == Window(remaining=0)
        await commands(made, nc, 1)

        async def is_parked() -> bool:
            return [r.reason for r in await made.receipts(nc) if r.outcome == "parked"] == ["window_closed"]

        await eventually(is_parked, "the command waits")


@pytest.mark.slow
async def test_kill_minus_9_neither_hides_nor_repeats_anything(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        await comes(nc, OPENED)
        await first.kill()
        second = await made.add_adapter()
        await commands(made, nc, 8)
        await made.settle(nc)
        await comes(nc, OPENED, LOW)
        await second.kill()
        third = await made.add_adapter()
        await commands(made, nc, 3, first=8)
        await comes(nc, OPENED, LOW, QUOTA)
        await third.kill()
        await made.add_adapter()
        made.say("s1", "go on")
        await made.settle(nc)
        await comes(nc, OPENED, LOW, QUOTA, OPENED)


async def test_time_that_passes_while_nobody_runs_is_told(tmp_path: Path) -> None:
    environ: dict[str, Any] = {"WECHAT_NATS_WINDOW_HOURS": "0.00111"}
    async with world(tmp_path, environ=environ) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        await comes(nc, OPENED)

        async def is_stored() -> bool:
            return bool(await stream(nc, f"KV_{NAMES.conversations}", ">"))

        await eventually(is_stored, "the window is stored")
        await first.kill()
        await made.add_adapter()
        await comes(nc, OPENED, ("closed", "window_closed", 0))
