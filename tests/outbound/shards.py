"""A shard of the fakes with one bound user, for tests of what goes out."""

from __future__ import annotations

from typing import Any

from adapter.contract import FINAL_OUTCOMES, Receipt
from adapter.errors import SessionExpired, Throttled, Uncertain
from adapter.names import H_COMMAND
from adapter.outbound.shard import Shard
from adapter.ports import Accepted
from tests.fakes import Bench

BOT, USER = "b1@im.bot", "u1@im.wechat"
THROTTLED = Throttled("throttled", "iLink answered -2", ret=-2, errmsg="prepare failed")
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")
TIMEOUT = Uncertain("timeout", "no answer")
FIRST = Accepted("m1", 0, None, "")
THREE = ("A" * 3000 + "\n\n") * 3
"""A text of three parts."""


async def ready(*, is_open: bool = True, **changes: Any) -> tuple[Bench, Shard]:
    """One bound user; by default with an open window."""
    bench = Bench()
    await bench.bind()
    if is_open:
        bench.hears()
    return bench, bench.shard(**changes)


def keeping_back(bench: Bench) -> Shard:
    """A shard that keeps two sends of each window back for last words."""
    return bench.shard(sending=bench.sending(rules=bench.sending().rules._replace(reserve=2)))


async def user_writes(bench: Bench, shard: Shard, *, bot: str = BOT, user: str = USER, sandbox: str = "s1") -> None:
    """What a poller does with a message: a new window, then the news for the lanes."""
    await bench.wrote(bot, user, f"in:{bench.clock.now_ms()}")
    shard.heard(sandbox, bot, user)


def finals(bench: Bench) -> list[Receipt]:
    return [receipt for receipt in bench.bus.receipts() if receipt.outcome in FINAL_OUTCOMES]


def outcomes(bench: Bench) -> list[tuple[str, str, str]]:
    return [(receipt.command, receipt.outcome, receipt.reason) for receipt in bench.bus.receipts()]


def parked(bench: Bench) -> list[str]:
    return [stored.headers[H_COMMAND] for stored in bench.bus.found("PARKED")]
