"""Control commands that wait together: those of one sandbox or bot in order, all others at the same time."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import msgspec
import pytest

from adapter.errors import Temporary
from tests.bindings.test_control import Platform

VIRTUAL_TIME = True


async def test_a_bind_that_waits_for_the_bus_does_not_delay_those_of_other_sandboxes(platform: Platform) -> None:
    stuck = asyncio.Event()

    async def on_write(key: str) -> None:
        if key.startswith("b0"):
            await stuck.wait()

    platform.bench.bindings_bucket.on_write = on_write
    first, same, other = (
        platform.publish("bind", msgspec.json.encode({"sandbox": sandbox, "bot": bot, "bot_token": "t"}))
        for sandbox, bot in (("s0", "b0@im.bot"), ("s0", "b2@im.bot"), ("s1", "b1@im.bot"))
    )
    await asyncio.sleep(10)
    assert (first.acks, same.acks, other.acks) == (0, 0, 1)
    stuck.set()
    await asyncio.sleep(10)
    assert (first.acks, same.acks) == (1, 1)


async def _outcome(seed: int, pause_s: float) -> tuple[object, object]:
    """What is bound, and each sandbox's events, after commands by chance on few sandboxes and bots."""
    chance = random.Random(seed)
    platform = Platform()
    failing = random.Random(f"{seed} {pause_s}")

    async def on_write(_: str) -> None:
        await asyncio.sleep(failing.random())
        if failing.random() < 0.1:
            raise Temporary("bus_down")

    platform.bench.bindings_bucket.on_write = on_write
    for number in range(60):
        platform.bench.chat.notify_took_s = failing.random() * 2
        sandbox, bot = f"s{chance.randrange(12)}", f"b{chance.randrange(16)}@im.bot"
        body: dict[str, object] = {"sandbox": sandbox, "id": f"r{number}"}
        if chance.random() < 0.7:
            body |= {"check": chance.random() < 0.5}
            user = f"u{chance.randrange(3)}@im.wechat" if chance.random() < 0.8 else None
            platform.publish("bind", msgspec.json.encode(body | {"bot": bot, "bot_token": "t", "user": user}))
        else:
            platform.publish("unbind", msgspec.json.encode(body | ({"bot": bot} if chance.random() < 0.5 else {})))
        await asyncio.sleep(pause_s)
    await asyncio.sleep(3600)
    assert [delivery.acks for delivery in platform.deliveries] == [1] * 60
    events: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for event in platform.bench.bus.events():
        events[event.sandbox].append((event.bot, event.change, event.request))
    return platform.bound, events


@pytest.mark.parametrize("seed", range(6))
async def test_commands_together_come_to_the_same_as_one_after_another(seed: int) -> None:
    assert await _outcome(seed, 0.05) == await _outcome(seed, 600)
