"""A partition of the fakes with one bound user, for tests of what goes out."""

from __future__ import annotations

from typing import Any

import pytest

from adapter.bridge.partition import Partition
from adapter.contract.messages import FINAL_OUTCOMES, Receipt
from adapter.errors import SessionExpired, Throttled, Uncertain
from adapter.ports import Accepted
from tests.fakes import Bench

BOT, USER = "b1@im.bot", "u1@im.wechat"
THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")
TIMEOUT = Uncertain("timeout", "no answer")
FIRST = Accepted("m1", 0, None, "")
THREE = ("A" * 1500 + "\n\n") * 3
"""A text of three parts."""


async def ready(*, is_open: bool = True, **changes: Any) -> tuple[Bench, Partition]:
    """One bound user; by default with an open window."""
    bench = Bench()
    await bench.bind()
    if is_open:
        bench.hears()
    return bench, bench.partition(**changes)


async def user_writes(bench: Bench, *, bot: str = BOT, user: str = USER) -> None:
    """What a poller tells the conversation of a message."""
    await bench.wrote(f"in:{bench.clock.now_ms()}", bot=bot, user=user)


def free_slots(bench: Bench) -> int:
    """How many requests more may be out at once."""
    taken = 0
    while bench.slots.try_acquire("probe"):
        taken += 1
    for _ in range(taken):
        bench.slots.release("probe")
    return taken


def finals(bench: Bench) -> list[Receipt]:
    return [receipt for receipt in bench.bus.receipts() if receipt.outcome in FINAL_OUTCOMES]


def outcomes(bench: Bench) -> list[tuple[str, str, str]]:
    return [(receipt.command, receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()]


def parked(bench: Bench) -> list[str]:
    """Commands that were parked and have no final receipt yet."""
    over = {receipt.command for receipt in finals(bench)}
    return [r.command for r in bench.bus.receipts() if r.outcome == "parked" and r.command not in over]


def rows(names: str, table: dict[str, tuple[Any, ...]]) -> pytest.MarkDecorator:
    """The rows of a table by the sentences that they show."""
    return pytest.mark.parametrize(names, [pytest.param(*row, id=sentence) for sentence, row in table.items()])
