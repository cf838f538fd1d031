"""Bots of the fakes being polled, for tests of what comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.errors import SessionExpired
from adapter.inbound.bot_poller import BotPoller
from adapter.inbound.poller import poll_forever, run_poller
from adapter.inbound.taking import take_bot
from tests.fakes import Bench, EndOfScript, raw_message

BOT, USER = "b1@im.bot", "u1@im.wechat"
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")


def raw(text: str = "hello", number: int = 1, **fields: Any) -> bytes:
    """A message as iLink sends it."""
    return raw_message(number, {"type": 1, "text_item": {"text": text}}, **fields)


async def polls(bench: Bench, **changes: Any) -> BotPoller:
    """Polls until the script ends."""
    bench.chat.script_ends = True
    session = BotPoller(BOT)
    deps = bench.inbound_deps(**changes)
    journal = await take_bot(session, deps)
    assert journal is not None
    bench.bus.writes.clear()
    with pytest.raises(EndOfScript):
        await poll_forever(session, journal, deps)
    await dispatched(session)
    return session


async def dispatched(session: BotPoller) -> None:
    """Waits until everything that was stored is in the inboxes."""
    if (dispatcher := session.dispatcher) is not None:
        await dispatcher.changed.wait_until(lambda: dispatcher.is_done)


def tended(bench: Bench, **changes: Any) -> tuple[BotPoller, asyncio.Task[None]]:
    """A poller as the supervisor runs it."""
    session = BotPoller(BOT)
    return session, asyncio.get_running_loop().create_task(run_poller(session, bench.inbound_deps(**changes)))


Poller = Callable[..., BotPoller]
"""The fixture `poller` of conftest.py."""


def texts(bench: Bench) -> list[str]:
    return [inbound.text for inbound in bench.bus.inbound()]
