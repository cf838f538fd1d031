"""What publishes control commands, for each test anew."""

from __future__ import annotations

import pytest

from tests.bindings.test_control import Platform


@pytest.fixture
async def platform() -> Platform:
    return Platform()
