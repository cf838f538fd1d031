"""`adapter.agent` and a server: outages, deaths and loops that are left. Nobody sends what the sandbox stores."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from adapter.agent import Sandbox
from adapter.agent import inbox as inbox_module
from adapter.contract.messages import Inbound, InboundItem, TextItem
from adapter.jetstream.core import CoreNats
from adapter.jetstream.managed_connection import connect_options
from tests.bus.rig import NAMES, Rig


class Person:
    """Writes to sandbox s1, which has a durable consumer."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.said = 0

    async def say(self, count: int = 1) -> None:
        """Texts are the sequences of the stream."""
        nc = await self.rig.bus.client()
        for number in range(self.said + 1, self.said + count + 1):
            text = str(number)
            items: list[InboundItem] = [TextItem(text=text)]
            message = Inbound(
                id=text, sandbox="s1", bot="b1", user="u1", sent_at_ms=0, received_at_ms=0, text=text, items=items
            )
            await nc.publish(NAMES.inbox("s1"), msgspec.json.encode(message))
        await nc.flush()
        await nc.close()
        self.said += count

    async def commands(self) -> list[dict[str, Any]]:
        """What the sandbox has stored."""
        return [msgspec.json.decode(data) for data in await self.rig.read(NAMES.stream_out, ">")]


@pytest.fixture
async def person(rig: Rig) -> Person:
    await CoreNats(rig.connection, NAMES).make_durable("s1", 0)
    return Person(rig)


async def test_a_reply_waits_for_the_bus_however_long_it_is_away(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a try or a pull that the client keeps for later: its buffer would be full at some time."""
    lost = asyncio.Event()

    async def on_lost() -> None:
        lost.set()

    monkeypatch.setattr(
        "adapter.agent.sandbox.connect_options",
        lambda *arguments: connect_options(*arguments) | {"pending_size": 10, "disconnected_cb": on_lost},
    )
    monkeypatch.setattr(inbox_module, "EXPIRES_S", 0.1)
    monkeypatch.setattr(inbox_module, "TICK_S", 0.1)
    await person.say()
    bus = person.rig.bus
    async with Sandbox("s1", bus.settings) as sandbox:
        messages = aiter(sandbox)
        message = await anext(messages)
        bus.kill()
        await lost.wait()
        replying = asyncio.create_task(message.reply("x" * 200))
        await bus.start()
        await replying
        await person.say()
        assert (await anext(messages)).text == "2"
    assert [command["text"] for command in await person.commands()] == ["x" * 200]
