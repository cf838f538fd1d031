"""`adapter.agent` and a server: outages, deaths and loops that are left. Nobody sends what the sandbox stores."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from nats.errors import ConnectionClosedError

from adapter.agent import Message, Sandbox
from adapter.agent import inbox as inbox_module
from adapter.agent.inbox import IN_FLIGHT, Inbox
from adapter.contract.messages import Inbound, InboundItem, TextItem
from adapter.jetstream.client import BusClient
from adapter.jetstream.managed_connection import connect_options
from tests.bus.rig import NAMES, PATIENCE_S, Rig
from tests.e2e.waiting import eventually


class Person:
    """Writes to sandbox s1, which has a durable consumer."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.said = 0

    async def say(self, count: int = 1) -> None:
        """Texts are the numbers from one on."""
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


class Agent:
    """A process that holds messages of the sandbox. `kill` leaves them to the server, as `kill -9` does."""

    def __init__(self, person: Person) -> None:
        self._bus = person.rig.bus
        self._nc = BusClient()
        self.inbox = Inbox(self._nc, NAMES, "s1", lambda: None)

    async def start(self) -> None:
        await self._nc.connect(self._bus.server.url)
        self._pulling = asyncio.create_task(self.inbox.run())

    async def kill(self) -> None:
        await self._nc.close()
        with pytest.raises(ConnectionClosedError):
            await self._pulling

    async def stop(self) -> bool:
        """As SIGTERM does; whether all was given back."""
        self._pulling.cancel()
        await asyncio.wait({self._pulling})
        given_back = await self.inbox.give_back()
        await self._nc.close()
        return given_back

    async def taken(self, count: int) -> list[int]:
        """The texts of so many deliveries, each acknowledged."""
        texts = []
        for _ in range(count):
            delivery = await self.inbox.next_delivery()
            texts.append(int(delivery.inbound.text))
            await self.inbox.finish(delivery)
        return texts


@pytest.fixture
async def person(rig: Rig) -> Person:
    config = {"durable_name": "s1", "ack_policy": "explicit", "filter_subject": NAMES.inbox("s1")}
    body = {"stream_name": NAMES.stream_in, "config": config}
    await rig.connection.api_request(f"CONSUMER.CREATE.{NAMES.stream_in}.s1", body)
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


async def shorten_ack_wait(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second instead of half a minute."""
    monkeypatch.setattr(inbox_module, "ACK_WAIT_S", 1.0)
    monkeypatch.setattr(inbox_module, "KEEP_ALIVE_S", 0.2)
    nc = await person.rig.bus.client()
    info = await nc.jetstream().consumer_info(NAMES.stream_in, "s1")
    info.config.ack_wait = 1.0
    await nc.jetstream().add_consumer(NAMES.stream_in, info.config)
    await nc.close()


async def in_work(person: Person, count: int) -> None:
    """Returns once so many deliveries are not acknowledged."""
    nc = await person.rig.bus.client()

    async def as_many() -> bool:
        info = await nc.jetstream().consumer_info(NAMES.stream_in, "s1")
        return bool(info.num_ack_pending == count)

    await eventually(as_many, f"{count} are in work")
    await nc.close()


async def test_the_order_holds_where_a_process_dies_with_all_that_it_may_hold(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shorten_ack_wait(person, monkeypatch)
    await person.say(IN_FLIGHT * 3)
    first, second = Agent(person), Agent(person)
    await first.start()
    await in_work(person, IN_FLIGHT)
    await first.kill()
    second.inbox.hold("The first one died.")
    await second.start()
    assert await second.taken(IN_FLIGHT * 3) == list(range(1, IN_FLIGHT * 3 + 1))
    await second.kill()


async def test_what_arrives_while_a_process_ends_is_given_back(person: Person) -> None:
    first, second = Agent(person), Agent(person)
    await first.start()
    await person.say(200)
    await first.inbox.next_delivery()
    assert await first.stop()
    await person.say()
    await second.start()
    assert await second.taken(201) == list(range(1, 202))
    await second.kill()


async def test_a_loop_that_is_left_has_its_message_delivered_again_and_first(person: Person) -> None:
    await person.say(3)
    texts = []
    async with asyncio.timeout(PATIENCE_S), Sandbox("s1", person.rig.bus.settings) as sandbox:
        for _ in range(2):
            async for message in sandbox:
                texts.append(message.text)
                break

        async def fail(message: Message) -> None:
            texts.append(message.text)
            raise ZeroDivisionError

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await sandbox.run(fail)
        async for message in sandbox:
            texts.append(message.text)
            if message.text == "3":
                break
    assert texts == ["1", "1", "1", "1", "1", "2", "3"]
