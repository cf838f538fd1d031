"""Bots of the fakes being polled, for tests of what comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.errors import SessionExpired
from adapter.inbound.poller import BotPoller
from tests.fakes import Bench, EndOfScript, raw_message

BOT, USER = "b1@im.bot", "u1@im.wechat"
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")


def raw(text: str = "hello", number: int = 1, **fields: Any) -> bytes:
    """A message as iLink sends it."""
    return raw_message(number, {"type": 1, "text_item": {"text": text}}, **fields)


async def polls(bench: Bench, **changes: Any) -> BotPoller:
    """Polls until the script ends."""
    bench.chat.script_ends = True
    session = bench.new_poller(BOT, **changes)
    checkpoint = await session._take()
    assert checkpoint is not None
    await session._fold(checkpoint)
    bench.bus.writes.clear()
    with pytest.raises(EndOfScript):
        await session._poll_forever(checkpoint)
    return session


def tended(bench: Bench, **changes: Any) -> tuple[BotPoller, asyncio.Task[None]]:
    """A poller as the supervisor runs it."""
    session = bench.new_poller(BOT, **changes)
    return session, asyncio.get_running_loop().create_task(session.run())


Poller = Callable[..., BotPoller]
"""The fixture `poller` of conftest.py."""


def texts(bench: Bench) -> list[str]:
    return [inbound.text for inbound in bench.bus.inbound()]
