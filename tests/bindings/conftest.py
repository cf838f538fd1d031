"""What says binds, unbinds and erases, for each test anew."""

from __future__ import annotations

import pytest

from tests.bindings.platform import Platform


@pytest.fixture
async def platform() -> Platform:
    return Platform()
