"""A server for each test that wants one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bus.rig import Bus, Rig, rig_on
from tests.e2e.memory import in_memory


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    with in_memory(tmp_path / "nats"):
        made = Bus(tmp_path / "nats")
        await made.start()
        yield made
        made.kill()


@pytest.fixture
async def rig(bus: Bus) -> AsyncIterator[Rig]:
    async with rig_on(bus) as made:
        yield made
