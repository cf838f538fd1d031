"""Connections that break as they are made, and answers that nobody can read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from adapter.errors import Temporary
from adapter.jetstream.api_replies import is_leaderless
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.history import direct_get_one, get_from_leader
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.multiplexer import Reply
from adapter.ports import BusMessage
from adapter.settings import Settings
from tests.bus.rig import NAMES, PATIENCE_S, Bus, Rig
from tests.e2e.waiting import until


async def test_a_cancellation_that_is_swallowed_while_it_connects_still_ends_the_link(bus: Bus) -> None:
    """nats-py does so in places; the connection ran on, and the process that should end waited for it."""
    connection, connecting = ManagedConnection(bus.settings, "test"), asyncio.Event()

    async def swallow(_: Client) -> None:
        connecting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    connection.on_connect(swallow)
    running = asyncio.get_running_loop().create_task(connection.run())
    await connecting.wait()
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=PATIENCE_S)
    assert done, "it ends"
    assert not connection.is_connected


async def why_not(url: str) -> list[str]:
    """What the log says until it has given up once, of this host."""
    with capture_logs() as logs:
        running = asyncio.get_running_loop().create_task(ManagedConnection(Settings(nats_url=(url,)), "test").run())
        await until(lambda: any(line["event"] == "bus.unreachable" for line in logs), "it has given up once")
        running.cancel()
        await asyncio.wait([running])
    host = url.rpartition("/")[2].rpartition("@")[2]
    return [line["reason"] for line in logs if line["event"] == "bus.unreachable" and line["host"] == host]


async def test_the_reason_for_having_no_connection_is_given() -> None:
    """Where nobody listened the log said TimeoutError, of our own patience."""
    for url in ("nats://127.0.0.1:1", "nats://me:secret@127.0.0.1:1"):
        assert await why_not(url) == ["[Errno 111] Connect call failed ('127.0.0.1', 1)"]


@pytest.mark.parametrize(
    ("answer", "leaderless"),
    [
        (b'{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}', True),
        (b'{"error":{"code":404,"err_code":10059,"description":"stream not found"}}', False),
        (b'{"stream":"WECHAT_IN","seq":1}', False),
        (
            b'{"cluster":{"leader":"n0","replicas":[{"name":"n1","active":9000000000},{"name":"n2","active":0}]}}',
            True,
        ),
        (b"no JSON", False),
        (b"", False),
    ],
)
def test_a_server_that_knows_no_leader_counts_as_silent(answer: bytes, leaderless: bool) -> None:
    assert is_leaderless(answer) == leaderless


@pytest.mark.parametrize("said", [b"", b"[]", b'{"error":5}', b"\xff"])
async def test_an_answer_that_nobody_can_read_is_an_outage_and_no_end(rig: Rig, said: bytes) -> None:
    """As a server gives it that cannot put what it knows into words: its clock stood at the year 10,000."""
    nc = await rig.bus.client()

    async def answer(msg: Msg) -> None:
        await msg.respond(said)

    await nc.subscribe("$JS.API.STRANGER", cb=answer)
    await nc.flush()
    with pytest.raises(Temporary, match="bus_unreadable"):
        await rig.connection.api_request("STRANGER")
    await nc.close()


@pytest.mark.parametrize("said", [b"", b"[]", b"{}", b'{"error":5}', b"\xff"])
async def test_an_answer_about_a_lease_that_nobody_can_read_is_an_outage_and_no_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    async def request(*_: Any, **__: Any) -> Reply:
        return Reply(said, {})

    monkeypatch.setattr(rig.connection, "request", request)
    bucket = KvBucket(rig.connection, NAMES.leases)
    with pytest.raises(Temporary):
        await bucket.get("me")
    if said != b"{}":
        with pytest.raises(Temporary):
            await bucket.write("me", b"x", 0)


async def test_a_server_that_answers_direct_gets_alone_is_left(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is cut off from the others does, from its copy. A lease was not renewed through it for minutes."""
    monkeypatch.setattr("adapter.jetstream.managed_connection.SUSPECT_AFTER_S", 0.2)
    nc = await rig.bus.client()

    async def answer(msg: Msg) -> None:
        await msg.respond(b'{"error":{"code":503,"err_code":10008,"description":"unavailable"}}')

    async def ask() -> None:
        while True:
            await asyncio.sleep(0.01)
            with contextlib.suppress(Temporary):
                await direct_get_one(rig.connection, NAMES.stream_in, {"last_by_subj": ">"})
                await rig.connection.api_request("LEADERLESS")

    await nc.subscribe("$JS.API.LEADERLESS", cb=answer)
    await nc.flush()
    rig.spawn(ask())
    await until(lambda: rig.connection.epoch > 1, "it is left")
    await nc.close()


@pytest.mark.parametrize(
    "stored",
    [b'{"error":{"err_code":10008}}', b'{"text":1,"cluster":{"replicas":[1]}}', b'{"cluster":{"replicas":[{}]}}'],
)
async def test_what_is_stored_is_data_whatever_it_looks_like(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, stored: bytes
) -> None:
    """A tenant's command, or a file of a WeChat user, looked like an answer of a server without a leader. Reading it
    made the adapter leave its server, again and again, or raise."""
    monkeypatch.setattr("adapter.jetstream.managed_connection.SUSPECT_AFTER_S", 0.0)
    subject = NAMES.out("s1")
    ack = await rig.publisher.store(BusMessage("out", subject, stored, {}))
    kept = NAMES.out_of_sandbox("s1")
    for _ in range(5):
        found = [
            await rig.history.get(NAMES.stream_out, ack.seq),
            await rig.history.read_last(NAMES.stream_out, kept),
        ]
        assert [one.data for one in found if one] == [stored, stored]
        assert await rig.read(NAMES.stream_out, kept) == [stored]
    assert await get_from_leader(rig.connection, NAMES.stream_out, {"seq": ack.seq}) is not None
    await rig.connection.api_request("INFO")
    assert (rig.connection.is_connected, rig.connection.epoch) == (True, 1)


async def test_who_asks_for_a_connection_that_is_being_made_does_not_spoil_it(rig: Rig) -> None:
    rig.bus.kill()
    await until(lambda: not rig.connection.is_connected, "the connection is gone")

    async def ask() -> None:
        while True:
            with contextlib.suppress(Temporary):
                rig.connection.client()
            await asyncio.sleep(0)

    rig.spawn(ask())
    await rig.bus.start()
    await rig.connection.wait_connected(PATIENCE_S)
    for _ in range(20):
        await rig.connection.api_request("INFO")
    assert rig.connection.epoch == 2
