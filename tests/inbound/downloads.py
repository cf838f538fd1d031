"""A poller and the downloads of its shard, as the supervisor runs them, for tests of messages with media."""

from __future__ import annotations

import asyncio
from typing import Any

from adapter.contract import FileItem, ImageItem, Inbound, TextItem, VideoItem, VoiceItem
from adapter.inbound.fetching import Downloads
from adapter.inbound.poller import tend
from adapter.inbound.sessions import Session
from adapter.names import token_of
from adapter.simulator import samples
from tests.fakes import Bench, raw_message, settle

BOT, USER = "b1@im.bot", "u1@im.wechat"
KEY = token_of(BOT)
RECORD = f"{'a' * 12}|{'b' * 12}|{'c' * 12}|{'d' * 12}|1|2"
PNG = samples.png()
WAIT_S = 60.0


def words(number: int, **fields: Any) -> bytes:
    return raw_message(number, {"type": 1, "text_item": {"text": f"t{number}"}}, **fields)


def image(number: int, **fields: Any) -> bytes:
    """A picture, whose reference is `p<number>`."""
    return raw_message(number, {"type": 2, "image_item": {"media": {"encrypt_query_param": f"p{number}"}}}, **fields)


class Replica:
    """A poller of the bot, and the downloads of its sandbox's shard, as the supervisor runs them."""

    def __init__(self, bench: Bench, downloads: Downloads, **changes: Any) -> None:
        self.bench = bench
        self.downloads = downloads
        self.session = Session(BOT)
        loop = asyncio.get_running_loop()
        self.poller = loop.create_task(tend(self.session, bench.incoming(**changes)))

    async def leave(self) -> None:
        self.session.leave(now=True)
        await self.poller
        self.downloads.stop()

    async def die(self) -> None:
        """As kill -9 does: nothing is finished, nothing given back."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        self.downloads.stop()
        await settle()


async def run(bench: Bench, *, wait_s: float = WAIT_S, **changes: Any) -> Replica:
    return Replica(bench, await bench.downloads(wait_s=wait_s, **changes), **changes)


async def heir_of(bench: Bench) -> Replica:
    """Another replica takes over, after the server has forgotten all ids (its window is five minutes)."""
    bench.bus._ids.clear()
    heir = Bench(bench, incarnation="heir-1")
    heir.leases.proven_dead.add("me-1")
    return await run(heir)


def said(bench: Bench) -> list[str]:
    """What the sandbox read, in order: texts, and of media `+` or the reason why they are missing."""
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


def waiting(bench: Bench) -> int:
    return len(bench.bus.found("RAW"))
