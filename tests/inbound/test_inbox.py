"""What cannot be stored at once is tried again, and the log names its bot."""

from __future__ import annotations

from structlog.testing import capture_logs

from adapter.errors import BusRefused, Temporary
from adapter.inbound.inbox import retry
from tests.fakes import FakeClock

VIRTUAL_TIME = True


async def test_what_is_tried_again_names_its_bot() -> None:
    problems = [BusRefused(10054, "too large"), Temporary("bus_down")]

    async def store() -> str:
        if problems:
            raise problems.pop()
        return "stored"

    with capture_logs() as logs:
        assert await retry(store, FakeClock(), "b1@im.bot") == "stored"
    assert [(line["event"], line["bot"], line["reason"]) for line in logs] == [
        ("inbound.retrying", "b1@im.bot", "bus_down"),
        ("inbound.retrying", "b1@im.bot", "bus_refused"),
    ]
