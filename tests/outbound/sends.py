"""One command on its way to its user, for tests of `sending`."""

from __future__ import annotations

from typing import Any

from adapter.contexts import Peer
from adapter.contract import Outbound, OutText
from adapter.errors import Uncertain
from adapter.outbound.commands import Command, read_command
from adapter.outbound.endings import Apart, Ending, Repeat, Wait
from adapter.ports import Accepted, Account
from adapter.records import Hand
from tests.fakes import LIMITS, Bench

BOT, USER = "b1@im.bot", "u1@im.wechat"
ACCOUNT = Account(BOT, "secret", "")
TIMEOUT = Uncertain("timeout", "no answer within 15 s")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
NO_ID = Accepted("", 0, None, "")


def command(bench: Bench, *texts: str, ident: str = "c1", **fields: Any) -> Command:
    body = Outbound(items=[OutText(text=text) for text in texts or ("hi",)], **fields)
    return read_command(body, sandbox="s1", ident=ident, time_ms=bench.clock.now_ms(), limits=LIMITS)


async def ready(**context: Any) -> tuple[Bench, Peer]:
    """A bound user with an open window."""
    bench = Bench()
    await bench.bind()
    bench.hears(**context)
    return bench, await bench.contexts.peer(BOT, USER)


async def sent(
    bench: Bench, peer: Peer, what: Command | None = None, **changes: Any
) -> Ending | Wait | Repeat | Apart:
    return await bench.send(what or command(bench), peer, **changes).run()


def in_hand(what: Command, **fields: Any) -> Hand:
    return Hand(
        **{
            "command": what.id,
            "client": what.client,
            "sandbox": what.sandbox,
            "attempts": 1,
            "tried": 1,
            "counted_in": "in:1",
            **fields,
        }
    )
