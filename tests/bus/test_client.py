"""The short way of adapter.jetstream.client: the same bytes, and the same answers, as nats-py's own."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from adapter.cli.embedded import EmbeddedNats
from adapter.jetstream.client import BusClient, has_no_responders, parse_headers
from tests.e2e.waiting import free_port

WORD = st.text(st.characters(codec="utf-8"), max_size=12)
SUBJECT = st.one_of(st.just("wechat.inbox.s1.p"), WORD)
NAME = st.one_of(st.sampled_from(["Nats-Msg-Id", "Wechat-Position", " A ", "B:", ""]), WORD)
HEADERS = st.one_of(st.none(), st.dictionaries(NAME, WORD, max_size=3))


async def written(client: Client, *given: object) -> bytes | type[Exception]:
    """What a client that is connected would write next."""
    client._status = client.CONNECTED
    client._flush_queue = asyncio.Queue()
    client._flush_queue.put_nowait(asyncio.get_running_loop().create_future())  # it flushes already
    try:
        await client.publish(*given)  # type: ignore[arg-type]
    except (NatsError, ValueError) as exc:
        return type(exc)
    return b"".join(client._pending)


@given(SUBJECT, st.binary(max_size=12), st.one_of(st.just(""), SUBJECT), HEADERS)
@example("wechat.inbox.s1.p", b"hello", "_INBOX.a.1", {"Nats-Msg-Id": "in:b:m1", "Wechat-Position": "7.0"})
@example("wechat.inbox.s1.p", b"hello", "_INBOX.a.1", {"Nats-Msg-Id": "in:b\r\nEvil: 1"})
@example("wechat.inbox.s1.p 5\r\nPUB other 0", b"hello", "", None)
@example("s ", b"", "", None)
@example("s", b"", " r", {"A": "1"})
@example("s", b"", "r", {})
@example("s", b"", "", {"A": " space before"})
@example("s", b"", "", {"A": "and after "})
async def test_it_writes_what_nats_py_writes(
    subject: str, payload: bytes, reply: str, headers: dict[str, str] | None
) -> None:
    expected = await written(Client(), subject, payload, reply, headers)
    assert await written(BusClient(), subject, payload, reply, headers) == expected


async def test_the_usual_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing is gained with this version of nats-py."""

    async def publish(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(Client, "publish", publish)
    headers = {
        "Nats-Msg-Id": "in:5=40im=2Ebot:m7497484083968569000",
        "Wechat-Schema": "1",
        "Wechat-Position": "123.7",
    }
    assert await written(BusClient(), "wechat.inbox.s1.p", '{"text":"你好"}'.encode(), "_INBOX.a.1", headers)


VALUE = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]), max_size=12)
LINE = st.builds(
    lambda name, value: f"{name}: {value}".encode(), st.from_regex(r"[A-Za-z-]{1,9}", fullmatch=True), VALUE
)
FIRST = st.sampled_from([b"NATS/1.0", b"NATS/1.0 404 Message Not Found", b"NATS/1.0 100 Idle"])


@given(FIRST, st.lists(LINE, max_size=4, unique_by=lambda line: line.partition(b":")[0]))
@example(b"NATS/1.0", [b"a:b", b"c:  d ", b"E: ", b"Status: 409"])
async def test_it_reads_the_headers_that_nats_py_reads(first: bytes, lines: list[bytes]) -> None:
    raw = b"".join(line + b"\r\n" for line in [first, *lines, b""])
    expected = await Client()._process_headers(raw) or {}
    if len(first) > len("NATS/1.0"):
        expected.setdefault("Description", "")
    assert parse_headers(raw) == expected


@pytest.mark.parametrize("line", [b" folded", b"no colon", b"(odd): 1", b"\xff: 1", b": 1", b""])
def test_of_headers_what_could_not_be_written_again_is_left_out(line: bytes) -> None:
    assert parse_headers(b"NATS/1.0\r\nA: 1\r\n" + line + b"\r\n\r\n") == {"A": "1"}


def test_the_servers_headers_count_which_it_adds_behind_those_of_the_author() -> None:
    assert parse_headers(b"NATS/1.0\r\nNats-Sequence: 77\r\nNats-Sequence: 5\r\n\r\n") == {"Nats-Sequence": "5"}


async def test_what_is_too_large_is_refused_as_ever() -> None:
    client = BusClient()
    client._max_payload = 4
    assert await written(client, "s", b"hello") is MaxPayloadError


async def test_publishes_by_both_paths_are_written_in_one_order(server: EmbeddedNats) -> None:
    client = BusClient()
    await client.connect(server.url)
    try:
        inbox, received, enough = client.new_inbox(), list[bytes](), asyncio.Event()

        def take(_: str, reply: bytes, data: bytes, headers: bytes) -> None:
            received.append(data)
            if len(received) == 300:
                enough.set()

        await client.subscribe_raw(inbox, take)
        await client.flush()
        for number in range(0, 300, 2):
            assert client.try_publish(inbox, b"%d" % number, "", None)
            await client.publish(inbox, b"%d" % (number + 1), "", {"A": " 1"})  # nats-py's own path
            if number % 3:
                await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await enough.wait()
        assert received == [b"%d" % number for number in range(300)]
    finally:
        await client.close()


async def test_a_flush_is_answered_after_what_was_subscribed_before() -> None:
    """nats-py's own ping overtakes it, and what somebody else publishes after the flush is not heard."""
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"s","version":"2.14.0","max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            said.append(line.split()[0])
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    client = BusClient()
    await client.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
    await client.subscribe("news")
    await client.flush()
    await client.close()
    listening.close()
    assert said[:4] == [b"CONNECT", b"PING", b"SUB", b"PING"]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_connection_that_broke_with_something_to_write_is_closed_all_the_same(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """nats-py fails to write the rest, by an error of uvloop's own, which ended the whole adapter; and what waits for
    messages was left behind.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"s","version":"2.14.0","max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    async def on_message(_: Msg) -> None:
        raise AssertionError("nothing was said")

    async def broken() -> set[str]:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        before = asyncio.all_tasks()
        client = BusClient()
        await client.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
        await client.subscribe("news", cb=on_message)
        await client.flush()
        assert isinstance(client._transport, TcpTransport)
        assert client._transport._io_writer is not None
        assert client.try_publish("s", b"the rest", "", None)
        client._transport._io_writer.transport.abort()
        await client.close()
        assert client.is_closed
        listening.close()
        await asyncio.sleep(0)
        return {repr(task) for task in asyncio.all_tasks() - before if "serve" not in repr(task)}

    with asyncio.Runner(loop_factory=loop) as runner:
        assert not runner.run(broken())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nothing_is_left_of_a_connection_that_broke_after_its_flusher_had_ended(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """uvloop's error for a broken socket ends the flusher."""

    async def broken() -> set[str]:
        closed = asyncio.Event()

        async def on_closed() -> None:
            closed.set()

        async def on_message(_: Msg) -> None:
            raise AssertionError("nothing was said")

        async with EmbeddedNats() as server:
            before = asyncio.all_tasks()
            client = BusClient()
            await client.connect(server.url, allow_reconnect=False, closed_cb=on_closed)
            await client.subscribe("news", cb=on_message)
            await client.flush()
            assert client._flusher_task is not None
            assert isinstance(client._transport, TcpTransport)
            assert client._transport._io_writer is not None
            client._flusher_task.cancel()
            await asyncio.wait([client._flusher_task])
            client._transport._io_writer.transport.abort()
            await asyncio.wait_for(closed.wait(), 30)
            await asyncio.sleep(0)
            return {repr(task) for task in asyncio.all_tasks() - before}

    with asyncio.Runner(loop_factory=loop) as runner:
        assert not runner.run(broken())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_server_that_breaks_off_behind_its_first_word_is_a_break_like_any_other(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """uvloop's error for it ended the whole adapter."""

    async def refused() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            client = BusClient()
            url = f"nats://127.0.0.1:{listening.getsockname()[1]}"
            connecting = asyncio.create_task(client.connect(url, allow_reconnect=False))
            accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
            while not (isinstance(client._transport, TcpTransport) and _listens(client._transport)):
                await asyncio.sleep(0)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.send(b'INFO {"server_id":"s","version":"2.14.0","max_payload":1048576,"headers":true}\r\n')
            accepted.close()
            with pytest.raises(ConnectionError):
                await connecting

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(refused())


def _listens(transport: TcpTransport) -> bool:
    """Whether it waits for the server's first word."""
    return transport._io_reader is not None and getattr(transport._io_reader, "_waiter", None) is not None


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("is_noticed", [False, True])
def test_a_socket_that_breaks_while_something_is_written_raises_an_error_of_nats_py(
    loop: Callable[[], asyncio.AbstractEventLoop], is_noticed: bool
) -> None:
    """nats-py lets the socket's error through once its flusher has ended, and does not reconnect if its reader has
    ended, too; callers expect an error of NATS, and a connection that comes back."""

    async def broken() -> None:
        reconnected = asyncio.Event()

        async def on_reconnect() -> None:
            reconnected.set()

        async with EmbeddedNats(port=free_port()) as server:
            client = BusClient()
            await client.connect(server.url, reconnected_cb=on_reconnect, reconnect_time_wait=0)
            assert client._flusher_task is not None
            assert client._reading_task is not None
            assert isinstance(client._transport, TcpTransport)
            assert client._transport._io_writer is not None
            ended = [client._flusher_task, client._reading_task]
            for task in ended:
                task.cancel()
            await asyncio.wait(ended)
            subscription = await client.subscribe("news")
            client._transport._io_writer.transport.abort()
            for _ in range(3 if is_noticed else 0):  # turns in which the loop tells the connection's end
                await asyncio.sleep(0)
            with pytest.raises(NatsError):
                await subscription.unsubscribe()
            await asyncio.wait_for(reconnected.wait(), 30)
            await client.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(broken())


async def test_without_a_connection_nothing_is_queued(server: EmbeddedNats) -> None:
    client = BusClient()
    await client.connect(server.url, allow_reconnect=False)
    assert client.try_publish("s", b"before", "", None)
    assert client._transport is not None
    client._transport.close()  # type: ignore[no-untyped-call]
    await asyncio.sleep(0)  # it is written now
    await client.close()
    assert not client.try_publish("s", b"after", "", None)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    server = EmbeddedNats(tmp_path)
    await server.start()
    yield server
    server.kill()


async def test_messages_arrive_in_order_and_a_callback_that_raises_ends_nothing(server: EmbeddedNats) -> None:
    received: list[tuple[str, bytes, bool]] = []
    errors: list[Exception] = []
    enough = asyncio.Event()

    def take(subject: str, reply: bytes, data: bytes, headers: bytes) -> None:
        received.append((subject, data, has_no_responders(headers)))
        if data == b"bad":
            raise ValueError
        if len(received) == 102:
            enough.set()

    async def on_error(exc: Exception) -> None:
        errors.append(exc)

    client = BusClient()
    await client.connect(server.url, error_cb=on_error)
    try:
        inbox = client.new_inbox()
        await client.subscribe_raw(f"{inbox}.*", take)
        await client.publish(f"{inbox}.bad", b"bad", headers={"A": "1"})
        for number in range(100):
            await client.publish(f"{inbox}.{number}", b"%d" % number)
        await client.publish("nobody.listens", b"", f"{inbox}.asked")
        async with asyncio.timeout(30):
            await enough.wait()
    finally:
        await client.close()
    numbers = [(f"{inbox}.{number}", b"%d" % number, False) for number in range(100)]
    assert received == [(f"{inbox}.bad", b"bad", False), *numbers, (f"{inbox}.asked", b"", True)]
    assert [type(exc) for exc in errors] == [ValueError]


async def test_a_flood_on_a_guarded_connection_leaves_others_their_turn() -> None:
    """nats-py parses all that has come without a pause; and what is not admitted is not even read."""
    nc, seen, turns = BusClient(), Counter[str](), 0

    def admit(subject: str, reply: str, size: int) -> bool:
        seen[f"{subject} {reply} {size}"] += 1
        return False

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    nc.set_admission(admit)
    flood = b"MSG wechat.svc.window.bad 1 _R_.x 2\r\n{}\r\n" * 20_000
    other = asyncio.create_task(take_turns())
    await nc._ps.parse(flood)
    other.cancel()
    assert seen == {"wechat.svc.window.bad _R_.x 2": 20_000}
    assert turns > 10
