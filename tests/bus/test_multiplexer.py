"""Requests over a connection: their replies in order, and none for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.cli.embedded import EmbeddedNats
from adapter.errors import Temporary
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.multiplexer import Reply
from adapter.settings import Settings
from tests.e2e.waiting import until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with EmbeddedNats(tmp_path) as server:
        yield server


@pytest.fixture
async def connection(server: EmbeddedNats) -> AsyncIterator[ManagedConnection]:
    connection = ManagedConnection(Settings(nats_url=(server.url,)), "test")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(connection.run())
        await connection.wait_connected(10)
        yield connection
        running.cancel()


@pytest.fixture
async def echo(server: EmbeddedNats) -> AsyncIterator[Client]:
    """Answers on `echo` three times, and on `silence` never."""
    nc = await nats.connect(server.url)

    async def three_times(msg: Msg) -> None:
        for number in range(3):
            await nc.publish(msg.reply, msg.data + b"%d" % number, headers={"N": str(number)})

    async def never(_: Msg) -> None:
        return None

    await nc.subscribe("echo", cb=three_times)
    await nc.subscribe("silence", cb=never)
    await nc.flush()
    yield nc
    await nc.close()


@pytest.mark.usefixtures("echo")
async def test_each_gets_its_own_answers_in_their_order(connection: ManagedConnection) -> None:
    async def ask(name: bytes) -> None:
        with connection.open_request() as question:
            await connection.publish("echo", name, reply=question.reply)
            answers = [await connection.next_reply(question) for _ in range(3)]
        assert [answer.data for answer in answers] == [name + b"0", name + b"1", name + b"2"]
        assert [answer.headers["N"] for answer in answers] == ["0", "1", "2"]

    await asyncio.gather(*(ask(b"%d." % number) for number in range(200)))
    assert not connection._multiplexer.pending


async def test_where_nobody_listens_it_is_said_at_once(connection: ManagedConnection) -> None:
    with pytest.raises(Temporary, match="no responders"):
        await connection.request("nobody", b"")


@pytest.mark.usefixtures("echo")
async def test_where_nobody_answers_the_time_ends_it(connection: ManagedConnection) -> None:
    with pytest.raises(Temporary) as raised:
        await connection.request("silence", b"", timeout_s=0.05)
    assert raised.value.reason == "bus_timeout"
    assert not connection._multiplexer.pending


@pytest.mark.usefixtures("echo")
async def test_a_lost_connection_ends_what_waits(connection: ManagedConnection, server: EmbeddedNats) -> None:
    """It could wait out its time, but nothing can come any more."""
    asking = asyncio.create_task(connection.request("silence", b"", timeout_s=3600))
    await until(lambda: bool(connection._multiplexer.pending), "it is asked")
    server.kill()
    with pytest.raises(Temporary) as raised:
        await asking
    assert raised.value.reason == "bus_down"


@pytest.mark.usefixtures("echo")
async def test_a_cancellation_that_meets_the_answer_is_not_forgotten(connection: ManagedConnection) -> None:
    """As it is by nats-py's request in Python 3.11, for its wait_for: a loop would then run on for ever."""
    asking = asyncio.create_task(connection.request("silence", b""))
    await until(lambda: bool(connection._multiplexer.pending), "it is asked")
    (question,) = connection._multiplexer.pending.values()
    question.replies.put_nowait(Reply(b"", {}))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not connection._multiplexer.pending
