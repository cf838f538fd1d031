"""Messages with media, and the replica that tells them, for tests of what a dispatcher does."""

from __future__ import annotations

import asyncio
from typing import Any

from adapter.contract.messages import FileItem, ImageItem, Inbound, TextItem, VideoItem, VoiceItem
from adapter.inbound.bot_poller import BotPoller
from adapter.inbound.poller import run_poller
from adapter.simulator import samples
from tests.fakes import Bench, raw_message, settle

BOT, USER = "b1@im.bot", "u1@im.wechat"
PNG = samples.png()
WAIT_S = 60.0
NOTHING: dict[str, Any] = {"message_id": None, "client_id": None, "seq": None, "create_time_ms": None}
"""Neither an id nor a time."""


def words(number: int, **fields: Any) -> bytes:
    return raw_message(number, {"type": 1, "text_item": {"text": f"t{number}"}}, **fields)


def image(number: int, **fields: Any) -> bytes:
    """A picture, whose reference is `p<number>`."""
    return raw_message(number, {"type": 2, "image_item": {"media": {"encrypt_query_param": f"p{number}"}}}, **fields)


class Replica:
    """A poller of a bot and its dispatcher, as the supervisor runs them."""

    def __init__(self, bench: Bench, bot: str, **changes: Any) -> None:
        self.bench = bench
        self.session = BotPoller(bot)
        self.poller = asyncio.get_running_loop().create_task(run_poller(self.session, bench.inbound_deps(**changes)))

    async def leave(self) -> None:
        self.session.stop(immediately=True)
        await self.poller

    async def die(self) -> None:
        """As kill -9 does: nothing is finished, nothing given back."""
        self.bench.leases.has_lease = False  # else what is cancelled would be finished
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for processor in self.bench.processors.values():
            processor.stop()
        await settle()


def run(bench: Bench, *, bot: str = BOT, **changes: Any) -> Replica:
    return Replica(bench, bot, **changes)


def heir_to(bench: Bench, name: str = "heir-1") -> Bench:
    """Another replica of the world, after the server has forgotten all ids (its window is five minutes)."""
    bench.bus.forget_ids()
    heir = Bench(bench, incarnation=name)
    heir.leases.proven_dead.add(bench.leases.incarnation)
    return heir


def said(bench: Bench) -> list[str]:
    """What the sandboxes read, in order: texts, and of media `+` or the reason why they are missing."""
    return [_short(inbound) for inbound in bench.bus.inbound()]


def _short(inbound: Inbound) -> str:
    parts = []
    for item in inbound.items:
        if isinstance(item, TextItem):
            parts.append(item.text)
        else:
            assert isinstance(item, ImageItem | FileItem | VideoItem | VoiceItem)
            parts.append("+" if item.media else item.reason)
    return " ".join(parts)
