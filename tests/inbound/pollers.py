"""Bots of the fakes being polled, for tests of what comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.errors import SessionExpired
from adapter.inbound.cursors import acquire
from adapter.inbound.poller import poll_forever, tend
from adapter.inbound.sessions import Session
from adapter.names import token_of
from tests.fakes import Bench, EndOfScript, raw_message

BOT, USER = "b1@im.bot", "u1@im.wechat"
KEY = token_of(BOT)
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")


def raw(text: str = "hello", number: int = 1, **fields: Any) -> bytes:
    """A message as iLink sends it."""
    return raw_message(number, {"type": 1, "text_item": {"text": text}}, **fields)


async def polls(bench: Bench, **changes: Any) -> Session:
    """Polls until the script ends."""
    bench.chat.script_ends = True
    session = Session(BOT)
    needs = bench.incoming(**changes)
    place = await acquire(session, needs)
    assert place is not None
    bench.bus.writes.clear()
    with pytest.raises(EndOfScript):
        await poll_forever(session, place, needs)
    return session


def tended(bench: Bench, **changes: Any) -> tuple[Session, asyncio.Task[None]]:
    """A poller as the supervisor runs it."""
    session = Session(BOT)
    return session, asyncio.get_running_loop().create_task(tend(session, bench.incoming(**changes)))


Poller = Callable[..., Session]
"""The fixture `poller` of conftest.py."""


def texts(bench: Bench) -> list[str]:
    return [inbound.text for inbound in bench.bus.inbound()]
