"""Bots of the fakes being polled, for tests of what comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from adapter.bridge.poller import BotPoller
from adapter.contract.names import H_MSG_ID, H_REASON
from adapter.errors import SessionExpired
from adapter.ports import StoredMessage
from adapter.tools.seal import dead_context
from tests.fakes import Bench, raw_message, settle

BOT, USER = "b1@im.bot", "u1@im.wechat"
STALE = SessionExpired("needs_login", "iLink answered -14", errcode=-14, errmsg="session timeout")
NOTHING: dict[str, Any] = {"message_id": None, "client_id": None, "seq": None, "create_time_ms": None}
"""Neither an id nor a time."""


def raw(text: str = "hello", number: int = 1, **fields: Any) -> bytes:
    """A message as iLink sends it."""
    return raw_message(number, {"type": 1, "text_item": {"text": text}}, **fields)


def start_poller(bench: Bench, **changes: Any) -> tuple[BotPoller, asyncio.Task[None]]:
    """A poller as `Partitions` runs it."""
    session = bench.new_poller(BOT, **changes)
    return session, asyncio.get_running_loop().create_task(session.run())


async def polls(bench: Bench, **changes: Any) -> BotPoller:
    """Polls until the script ends, and leaves. `bench.bus.writes` begins after the taking."""
    ends_at = len(bench.chat.asked) + len(bench.chat.polls) + 1
    session, task = start_poller(bench, **changes)
    while not bench.chat.polling:
        await asyncio.sleep(0.01)
    bench.bus.writes.clear()
    while len(bench.chat.asked) < ends_at:
        await asyncio.sleep(0.01)
    session.stop(immediately=True)
    await task
    return session


Poller = Callable[..., BotPoller]
"""The fixture `poller` of conftest.py."""


class Replica:
    """A replica that polls the bot."""

    def __init__(self, bench: Bench, **changes: Any) -> None:
        self.bench = bench
        self.session, self.poller = start_poller(bench, **changes)

    async def leave(self) -> None:
        self.session.stop(immediately=True)
        await self.poller

    async def die(self) -> None:
        """As kill -9 does: nothing is finished, nothing given back."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for partition in self.bench.partitions.values():
            partition.stop()
        self.bench.leases.has_lease = False
        await settle()


def successor_of(bench: Bench, name: str = "next") -> Bench:
    """Another replica of the world, after the server has forgotten all ids (its window is two minutes)."""
    bench.bus.forget_ids()
    return Bench(bench, instance=name)


def texts(bench: Bench) -> list[str]:
    return [inbound.text for inbound in bench.bus.inbound()]


def opened(bench: Bench, letter: StoredMessage) -> bytes:
    """What is sealed in an inbound dead letter."""
    return bench.sealer.open_bytes(dead_context(letter.headers[H_MSG_ID]), letter.data)


def dead(bench: Bench) -> list[tuple[str, bytes]]:
    """Reason and bytes of each dead letter."""
    return [(letter.headers[H_REASON], opened(bench, letter)) for letter in bench.bus.found("DEAD")]
