"""Users who come and go, and a server that does: after each round the adapter holds what it held before.

Everything that the garbage collector knows is counted, so that what a later feature forgets to clear up shows here
without anybody having thought of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import nats
import pytest
from nats.aio.client import Client

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import FINAL_OUTCOMES, Bind, Options, Receipt, Unbind
from adapter.contract.names import Names
from adapter.replica.app import run_replica
from adapter.replica.wiring import Replica
from adapter.settings import Settings
from tests.e2e.waiting import eventually, free_port, until
from tests.growth import census, growing

NAMES = Names()
USERS = 12


@contextlib.asynccontextmanager
async def simulator() -> AsyncIterator[str]:
    """Its URL. A process of its own: what it remembers is not the adapter's."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapter.simulator", "--hold-ms", "500", "--seed", "1", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield json.loads(await process.stdout.readline())["url"]
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def adapter_of(settings: Settings) -> AsyncIterator[Replica]:
    """In this process, so that it can be looked into. What it keeps of unbound bots goes after a second."""
    adapter, stop, ready = Replica(settings, unbound_s=1), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(run_replica(adapter, stop, ready.set))
    try:
        await ready.wait()
        yield adapter
    finally:
        stop.set()
        await running


class Visitors:
    """People who come, say something, are answered and go."""

    def __init__(self, adapter: Replica, sim: str, url: str) -> None:
        self.adapter = adapter
        self.sim = sim
        self.url = url
        self.number = 0
        self.rounds = 0

    async def come_and_go(self) -> None:
        async with httpx.AsyncClient(base_url=f"{self.sim}/_sim/", timeout=30) as http:
            nc = await nats.connect(self.url)
            try:
                await self._visit(http, nc)
            finally:
                await nc.close()
        await eventually(self._is_empty, "nobody is served any more, and nothing of them is in the buckets")

    async def _visit(self, http: httpx.AsyncClient, nc: Client) -> None:
        self.rounds += 1
        # of one partition, so that what it keeps of each shows
        names = (f"s{self.rounds}-{number}" for number in itertools.count())
        sandboxes = list(itertools.islice((name for name in names if NAMES.partition_of(name) == 1), USERS))
        open_: set[str] = set()

        async def on_receipt(msg: Any) -> None:
            receipt = msgspec.json.decode(msg.data, type=Receipt)
            if receipt.outcome in FINAL_OUTCOMES:
                assert receipt.outcome == "accepted", receipt
                open_.discard(receipt.command)

        await nc.subscribe(NAMES.receipts("*"), cb=on_receipt)
        heard = await nc.subscribe(NAMES.live("*"))
        for sandbox in sandboxes:
            bot = (await http.post("add_bot", json={})).json()
            options = Options(auto_typing=True)
            bind = Bind(bot=bot["bot"], bot_token=bot["token"], user=bot["user"], options=options)
            await control(nc, sandbox, bind)
            for kind in ("image", "quote_full"):
                await http.post("say_kind", json={"to": bot["bot"], "kind": kind})
        for _ in range(2 * USERS):
            await heard.next_msg(timeout=60)
        for sandbox in sandboxes:
            for body in ({"text": "hello"}, {"typing": "on"}, {"items": [{"kind": "file", "data": "aGVsbG8="}]}):
                self.number += 1
                open_.add(f"c{self.number}")
                data = msgspec.json.encode({"id": f"c{self.number}", **body})
                await nc.jetstream().publish(NAMES.out(sandbox), data)
        await until(lambda: not open_, "every command has its receipt")
        for sandbox in sandboxes:
            await control(nc, sandbox, Unbind(all=True))

    async def _is_empty(self) -> bool:
        adapter = self.adapter
        for partition in adapter.partitions.working.values():
            partition.evict_idle()
        keys, _ = await adapter.edges.bucket(adapter.names.bindings).stream_state()
        return keys == 1 and not adapter.partitions.pollers  # the layout key


def subscriptions(adapter: Replica) -> int:
    """0 while there is no connection. Each reading of a stream has one for as long as it lasts."""
    return len(adapter.edges.connection.nc._subs) if adapter.edges.connection.nc is not None else 0


async def close_unused(adapter: Replica) -> None:
    """Closes connections to iLink that wait for their next use: how many there are is chance."""
    await adapter.edges.chat._pool.close()


def forget_the_last(adapter: Replica) -> None:
    """Empties what is bounded by a number that is higher than what happens here: the last so many of a kind."""
    adapter.bindings._deleted.clear()


async def calm(adapter: Replica, *, wanted: int = 0) -> int:
    """Returns once nothing is read any more: as many subscriptions as `wanted` (0: any number), look after look."""
    gc.collect()  # readings that were left in the middle end now
    looks, seen = 0, 0

    def is_calm() -> bool:
        nonlocal looks, seen
        now = subscriptions(adapter)
        looks = looks + 1 if now and now == seen and now == (wanted or now) else 0
        seen = now
        return looks > 20

    await until(is_calm, "it has read everything that it has to read")
    return seen


async def control(nc: Client, sandbox: str, said: Bind | Unbind) -> None:
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox, max_msgs=1)
    headers = {"Reply-To": inbox, "Nats-Msg-Id": inbox}
    subject = NAMES.said(type(said).__name__.lower(), sandbox)
    await nc.jetstream().publish(subject, msgspec.json.encode(said), headers=headers)
    receipt = msgspec.json.decode((await answers.next_msg(timeout=60)).data, type=Receipt)
    assert receipt.outcome == "applied", receipt


@pytest.mark.slow
async def test_what_comes_and_goes_leaves_nothing_in_the_adapter(tmp_path: Path) -> None:
    async with simulator() as sim, EmbeddedNats(tmp_path, free_port()) as server:
        settings = Settings(
            nats_url=(server.url,),
            ilink_base_url=sim,
            cdn_base_url=f"{sim}/c2c",
            allowed_hosts=("127.0.0.1",),
            send_gap_ms=0,
            http_addr="127.0.0.1:0",
            drain_s=5,
            token_key=(bytes(32),),
        )
        async with adapter_of(settings) as adapter:
            visitors = Visitors(adapter, sim, server.url)
            await until(lambda: len(adapter.partitions.working) == NAMES.partitions, "it works every partition")
            await visitors.come_and_go()
            served = await calm(adapter)
            counts = []
            for _ in range(3):
                await visitors.come_and_go()
                await server.stop()  # killed, it would bring back the marks of unbound bots, and keep them
                await until(lambda: subscriptions(adapter) == 0, "it knows that the server is away")
                await server.start()
                await close_unused(adapter)
                await calm(adapter, wanted=served)
                forget_the_last(adapter)
                counts.append(census())
        assert growing(*counts, by=USERS) == []
        server.kill()  # a clean stop takes 10 ms for each of the 34 consumers
