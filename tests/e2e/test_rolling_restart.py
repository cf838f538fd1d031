"""All replicas are replaced, one after the other, under load: nobody notices."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from tests.e2e.world import World, until, world

BOTS, REPLICAS = 500, 3
HOLD_MS = 8_000
EVERY_S = 0.01
"""Interval between two messages, and between two commands."""
LATE_S = 3.0

pytestmark = pytest.mark.slow


class Traffic:
    """When something was said or asked for, and when its message or receipt came."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}
        self.took_s: dict[str, float] = {}

    def ended(self, ident: str) -> None:
        if ident in self.begun and ident not in self.took_s:
            self.took_s[ident] = time.monotonic() - self.begun[ident]

    async def on_message(self, msg: Msg) -> None:
        self.ended(json.loads(msg.data)["text"])

    async def on_receipt(self, msg: Msg) -> None:
        self.ended(json.loads(msg.data)["command"])

    @property
    def missing(self) -> set[str]:
        return self.begun.keys() - self.took_s.keys()


async def keep_talking(made: World, traffic: Traffic, stop: asyncio.Event) -> None:
    nc, rng, number = await made.nc(), random.Random(1), 0
    sandboxes = list(made.bots)
    while not stop.is_set():
        number += 1
        said, asked = f"said {number}", f"asked-{number}"
        traffic.begun[said] = traffic.begun[asked] = time.monotonic()
        made.say(rng.choice(sandboxes), said)
        await nc.publish(f"wechat.out.{rng.choice(sandboxes)}", json.dumps({"id": asked, "text": asked}).encode())
        await asyncio.sleep(EVERY_S)  # the pace of the load, not a wait for something


async def test_nothing_waits_for_a_rolling_restart(tmp_path: Path) -> None:
    """No poll is cut, no bot is polled twice at once, and nothing takes longer than three seconds."""
    environ = {"WECHAT_NATS_SEND_GAP_MS": "0", "WECHAT_NATS_SENDS_PER_WINDOW": "0"}
    async with world(tmp_path, hold_ms=HOLD_MS, environ=environ) as made:
        adapters = [await made.add_adapter() for _ in range(REPLICAS)]
        nc = await made.nc()
        for number in range(BOTS):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
            made.say(f"s{number}", "opens the window")
        await made.settle(nc)
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        traffic, stop = Traffic(), asyncio.Event()
        await nc.subscribe("wechat.in.*", cb=traffic.on_message)
        await nc.subscribe("wechat.event.*.receipt.>", cb=traffic.on_receipt)
        await nc.flush()
        talking = asyncio.create_task(keep_talking(made, traffic, stop))
        for adapter in adapters:
            before = len(adapter.lines("partitions.taken"))
            adapter.signal(signal.SIGTERM)
            assert await adapter.ended() == 0
            await adapter.start()
            await until(
                lambda adapter=adapter, before=before: len(adapter.lines("partitions.taken")) > before,  # type: ignore[misc]
                "it has a share again",
            )
        stop.set()
        await talking
        await until(lambda: not traffic.missing, "all has arrived")
        late = {ident: took_s for ident, took_s in traffic.took_s.items() if took_s > LATE_S}
        print(f"{len(traffic.took_s)} in all, the slowest took {max(traffic.took_s.values()):.2f} s")
        assert late == {}
        assert made.sim.violations(kind="concurrent_polls") == []
        assert made.sim.stats().duplicates_suppressed == 0, "no command was sent by two"
        for adapter in adapters:
            assert "polls.cancelled" not in adapter.log.read_text()
        outcomes = Counter(record.outcome for bot in made.bots.values() for record in made.sim.polls(bot.bot).records)
        assert outcomes["disconnected"] == 0, "no poll was cut"
