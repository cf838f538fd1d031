"""Requests over real sockets to servers that misbehave: what left and what did not must never be confused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import inspect
import itertools
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import hypothesis
import pytest
import uvloop
from hypothesis import strategies as st

from adapter.errors import LeaseLost, Refused, Temporary, Uncertain
from adapter.ilink.client import ILink
from adapter.ilink.connection import Connection, ConnectionPool
from adapter.ilink.network import Resolver, ResumingContext
from adapter.ilink.protocol import AGENT, IlinkReply, IlinkRequest
from adapter.ports import Account
from adapter.tools.metrics import Metrics
from tests.authority import Authority
from tests.e2e.waiting import free_port, until
from tests.fakes import Wire

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 7\r\n\r\n{}"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
"""The service runs on uvloop; where that is missing, on asyncio's own."""

LARGEST = 100_000
RESOLVER = Resolver(("127.0.0.1", "localhost"))
PIECES = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nRetry-After: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
)


class Server:
    """Reads requests and answers each as the test says."""

    def __init__(self) -> None:
        self.connections = 0
        self.open = 0
        self.heads: list[bytes] = []
        self.answer: Callable[[asyncio.StreamWriter], Awaitable[None]] = self.say(OK)
        self.url = ""

    @staticmethod
    def say(raw: bytes, *, close: bool = False) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(raw)
            await writer.drain()
            if close:
                writer.close()

        return answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                self.heads.append(head)
                await self.answer(writer)
        self.open -= 1
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0, backlog=1000)
    made.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/ilink/bot/x"
    async with listening:
        yield made
        listening.close()


@pytest.fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    made = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
    yield made
    await made.close()


async def post(pool: ConnectionPool, url: str, *, timeout_s: float = 30.0) -> IlinkReply:
    request = IlinkRequest("x", "", "X-One: 1\r\n", b"{}", largest=LARGEST)
    return await pool.exchange(url, request, timeout_s)


async def test_an_answer_is_read_whole_with_its_headers(server: Server, pool: ConnectionPool) -> None:
    reply = await post(pool, server.url)
    assert (reply.status, reply.headers["retry-after"], reply.body) == (200, "7", b"{}")
    (head,) = server.heads
    assert head.startswith(b"POST /ilink/bot/x HTTP/1.1\r\n")
    assert f"User-Agent: {AGENT}\r\n".encode() in head
    assert b"X-One: 1\r\n" in head
    assert head.count(b"Content-Length: 2\r\n") == 1


async def test_each_post_has_a_random_number_of_its_own(server: Server, pool: ConnectionPool) -> None:
    for _ in range(3):
        await post(pool, server.url)
    numbers = [head.partition(b"X-WECHAT-UIN: ")[2].partition(b"\r\n")[0] for head in server.heads]
    assert len({int(base64.b64decode(number)) for number in numbers}) == 3
    assert all(len(base64.b64decode(number)) <= len(str(2**32)) for number in numbers)


async def test_what_nobody_took_did_not_leave(pool: ConnectionPool) -> None:
    with pytest.raises(Temporary) as caught:
        await post(pool, f"http://127.0.0.1:{free_port()}/")
    assert caught.value.reason == "network"
    with pytest.raises(Temporary):
        await post(pool, "http://no-such-host.invalid/")


async def test_no_tls_where_it_is_asked_for_means_that_nothing_left(pool: ConnectionPool) -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
        with pytest.raises(Temporary):
            await post(pool, f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/")


@pytest.mark.parametrize(
    ("answer", "is_cut"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Le", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False),
        (b"220 mail.example ESMTP\r\n\r\n", False),
        (b"\x00\xff\r\n\r\n", False),
    ],
    ids=["nothing", "half a head", "half a body", "wrong chunks", "another protocol", "no text"],
)
async def test_what_was_taken_and_not_answered_well_may_have_been_done(
    server: Server, pool: ConnectionPool, answer: bytes, *, is_cut: bool
) -> None:
    server.answer = Server.say(answer, close=True)
    with pytest.raises(Uncertain) as caught:
        await post(pool, server.url)
    assert caught.value.reason == ("network" if is_cut else "unreadable")
    assert len(server.heads) == 1, "it is not repeated by itself"


async def test_an_answer_of_unknown_length_whose_connection_breaks_is_not_whole(
    server: Server, pool: ConnectionPool
) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.05)  # what was written is read before the reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    server.answer = answer
    with pytest.raises(Uncertain):
        await post(pool, server.url)


async def test_a_silent_server_is_a_timeout_and_costs_the_connection(server: Server, pool: ConnectionPool) -> None:
    async def nothing(_: asyncio.StreamWriter) -> None: ...

    server.answer = nothing
    with pytest.raises(TimeoutError):
        await post(pool, server.url, timeout_s=0.5)  # in which it connects, also on a busy machine
    await until(lambda: server.open == 0, "the connection is closed")
    server.answer = Server.say(OK)
    assert (await post(pool, server.url)).status == 200
    assert server.connections == 2


async def test_a_cancelled_request_costs_its_connection(server: Server, pool: ConnectionPool) -> None:
    async def nothing(_: asyncio.StreamWriter) -> None: ...

    server.answer = nothing
    work = asyncio.create_task(post(pool, server.url))
    await until(lambda: len(server.heads) == 1, "it has left")
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await until(lambda: server.open == 0, "the connection is closed")


async def test_an_answer_above_the_limit_is_not_read(server: Server, pool: ConnectionPool) -> None:
    body = b"x" * 2 * LARGEST
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(Uncertain) as caught:
        await post(pool, server.url)
    assert caught.value.reason == "unreadable"


async def test_a_long_header_does_not_cost_the_answer(server: Server, pool: ConnectionPool) -> None:
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nX-Long: %b\r\nContent-Length: 2\r\n\r\n{}" % (b"x" * 40_000))
    assert (await post(pool, server.url)).body == b"{}"


def ilink_at(base: str) -> ILink:
    return ILink(
        Metrics(),
        default_base_url=base,
        allowed_hosts=("127.0.0.1",),
        poll_margin_s=1.0,
        send_timeout_s=10.0,
    )


async def test_what_an_answer_quotes_of_its_request_is_no_secret_any_more(server: Server) -> None:
    base, _, _ = server.url.rpartition("/ilink")
    ilink = ilink_at(base)
    body = b'{"ret":-1,"errmsg":"odd token, odd context"}'
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    account = Account("b1@im.bot", "odd token", base)
    with pytest.raises(Refused) as caught:
        await ilink.send(account, user="u", client_id="c", context_token="odd context", content="hi")
    await ilink.close()
    assert caught.value.errmsg == "***, ***"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\nX-Sum: 1\r\n\r\n", b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nRetry-After: 9\r\n\r\n" + OK, b"{}"),
        (b"HTTP/1.1 204 No Content\r\nRetry-After: 7\r\n\r\n", b""),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
        (b"HTTP/1.1 200 OK\r\nX-Folded: 1\r\n 2\r\n\t3\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}", b"{}"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\n{}\r\n0\r\n\r\n", b"{}"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"{}",
        ),
    ],
    ids=[
        "chunks and a trailer",
        "status 1xx before",
        "no body",
        "no reason phrase",
        "a folded header",
        "lines that end in LF",
        "a blank behind a chunk's size",
        "a length beside chunks",
    ],
)
async def test_every_form_of_an_answer_is_read_and_its_connection_kept(
    server: Server, pool: ConnectionPool, answer: bytes, body: bytes
) -> None:
    server.answer = Server.say(answer)
    for _ in range(3):
        reply = await post(pool, server.url)
        assert reply.body == body
        assert reply.headers.get("retry-after") in (None, "7")
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        OK + OK,
        OK + b"\x00nonsense",
    ],
    ids=["up to the end", "HTTP/1.0", "said to close", "two answers", "something after it"],
)
async def test_after_some_answers_the_connection_is_not_used_again(
    server: Server, pool: ConnectionPool, answer: bytes
) -> None:
    until_the_end = b"Length" not in answer
    server.answer = Server.say(answer, close=until_the_end)
    assert [(await post(pool, server.url)).body for _ in range(2)] == [b"{}", b"{}"]
    assert server.connections == 2
    await until(lambda: server.open == 0, "nothing stays open")


async def test_what_comes_unasked_answers_nothing(
    server: Server, pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that closes an idle connection may say so (408); no request must take that for its answer."""
    monkeypatch.setattr("adapter.ilink.connection.KEPT_S", 3600.0)
    writers: list[asyncio.StreamWriter] = []
    crashes: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashes.append(context))

    async def answer(writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(OK)

    server.answer = answer
    await post(pool, server.url)
    writers[0].write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    await until(lambda: server.open == 0, "the connection is closed")
    assert (await post(pool, server.url)).status == 200
    assert crashes == []


@pytest.mark.parametrize("together", [True, False])
async def test_what_comes_unasked_answers_nothing_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """It may be behind an answer in the same bytes, in another record of TLS, or come later."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue("ilink"))
    evil, ended = OK.replace(b"{}", b"[]"), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"{}"):
                writer.write(OK)
                if not together:
                    await writer.drain()
                    await asyncio.sleep(0.05)
                writer.write(evil)
        writer.close()
        nonlocal ended
        ended += 1

    made = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as listening:
        url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
        for number in range(1, 4):
            assert (await post(made, url)).body == b"{}"
            await until(lambda number=number: ended == number, "the connection is closed")  # type: ignore[misc]
        await made.close()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("cancelled", [True, False])
def test_a_call_that_is_given_up_in_its_handshake_leaves_no_connection(loop: str, cancelled: bool) -> None:
    connections: list[asyncio.StreamWriter] = []
    ended = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        connections.append(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1000):
                pass
        ended += 1
        writer.close()

    async def talk() -> None:
        made = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
            asking = asyncio.create_task(post(made, url, timeout_s=10 if cancelled else 0.3))
            await until(lambda: len(connections) == 1, "it has connected")
            if cancelled:
                asking.cancel()
            with pytest.raises(asyncio.CancelledError if cancelled else Temporary):
                await asking
            await until(lambda: ended == 1, "it is closed")
        await made.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(talk())


async def test_a_kept_connection_that_the_server_closed_is_not_used(server: Server, pool: ConnectionPool) -> None:
    """Else a send would be uncertain for nothing."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await writer.drain()
        writer.close()

    server.answer = answer
    for number in range(1, 4):
        await post(pool, server.url)
        await until(lambda: not any(c.is_usable for idle in pool._idle.values() for c in idle), "the close is seen")
        assert server.connections == number


@pytest.mark.parametrize(
    ("repeatable", "fresh_s"), [(True, -1.0), (False, 1.0), (False, -1.0)], ids=["a poll", "a send", "a later send"]
)
async def test_what_meets_a_connection_that_closes_is_asked_once_more(
    server: Server, pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch, repeatable: bool, fresh_s: float
) -> None:
    """A server may close after each answer and say so in none. Polls failed then, and the tries of a dead token, of
    which each begins with a notifystart, for ever. A send may count twice: it is the sender's to repeat it, and takes
    no connection that was idle for long."""
    monkeypatch.setattr("adapter.ilink.connection.FRESH_S", fresh_s)

    async def answer(writer: asyncio.StreamWriter) -> None:
        if len(server.heads) == 2 and server.connections == 1:
            writer.close()
        else:
            await Server.say(OK)(writer)

    server.answer = answer
    request = IlinkRequest("x", "", "", b"{}", repeatable=repeatable)
    await pool.exchange(server.url, request, 5)
    if repeatable or fresh_s < 0:
        assert (await pool.exchange(server.url, request, 5)).status == 200
    else:
        with pytest.raises(Uncertain):
            await pool.exchange(server.url, request, 5)
    assert server.connections == (1 if fresh_s > 0 else 2)


async def test_what_meets_nothing_but_closed_doors_is_not_asked_for_ever(
    server: Server, pool: ConnectionPool
) -> None:
    await post(pool, server.url)
    server.answer = hang_up
    with pytest.raises(Uncertain):
        await post(pool, server.url)
    assert len(server.heads) == 3


@pytest.mark.parametrize("how", ["late", "half answered"])
async def test_what_was_being_answered_is_not_asked_once_more(
    monkeypatch: pytest.MonkeyPatch, server: Server, pool: ConnectionPool, how: str
) -> None:
    """A poll that is cut in its hold was no stale connection's: it fails, and the next one waits for its turn."""
    await post(pool, server.url)
    if how == "late":
        monkeypatch.setattr("adapter.ilink.connection.STALE_S", 0.0)
        server.answer = hang_up
    else:
        server.answer = Server.say(b"HTTP/1.1 200", close=True)
    with pytest.raises(Uncertain):
        await post(pool, server.url)
    assert len(server.heads) == 2


async def test_a_kept_connection_without_an_answer_makes_idle_ones_of_its_age_doubtful(
    server: Server, pool: ConnectionPool
) -> None:
    """A box on the way may have forgotten them all, without a word: the repeat of a send would be lost, too."""
    together = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        if server.connections == 2:
            together.set()
        await together.wait()
        await Server.say(OK)(writer)

    async def nothing(_: asyncio.StreamWriter) -> None: ...

    server.answer = answer
    await asyncio.gather(post(pool, server.url), post(pool, server.url))
    server.answer = nothing
    with pytest.raises(TimeoutError):
        await post(pool, server.url, timeout_s=0.05)
    server.answer = Server.say(OK)
    await post(pool, server.url)
    assert server.connections == 3
    await post(pool, server.url)
    assert server.connections == 3, "one that was used since is kept"


async def test_idle_connections_are_closed_in_time(
    server: Server, pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter.ilink.connection.KEPT_S", 0.05)
    await asyncio.gather(*(post(pool, server.url) for _ in range(5)))
    assert 1 <= server.connections <= 5
    await until(lambda: server.open == 0, "they are closed")
    assert not pool._idle, "of what they led to nothing is kept"
    assert (await post(pool, server.url)).status == 200


async def test_a_head_without_end_is_not_read(server: Server, pool: ConnectionPool) -> None:
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\n" + b"X-Filler: 0123456789\r\n" * 10_000)
    with pytest.raises(Uncertain):
        await post(pool, server.url)


@pytest.mark.parametrize("more", [b"X-%d: 1\r\n", b"X: " + b"x" * 50_000], ids=["many", "long"])
async def test_trailers_without_end_are_not_read(server: Server, pool: ConnectionPool, more: bytes) -> None:
    sent = 0

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        while not writer.transport.is_closing():
            writer.write(more.replace(b"%d", b"%d" % sent))
            sent += len(more)
            await asyncio.sleep(0)

    server.answer = pour
    with pytest.raises(Uncertain):
        await post(pool, server.url, timeout_s=5.0)


async def test_a_body_without_end_is_not_read(server: Server, pool: ConnectionPool) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    server.answer = drip
    with pytest.raises(Uncertain) as caught:
        await post(pool, server.url)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rb", "a\0b"])
async def test_a_header_cannot_become_two(server: Server, pool: ConnectionPool, token: str) -> None:
    with pytest.raises(Temporary):
        await pool.exchange(server.url, IlinkRequest("x", "", "", b"{}", token=token), 5)
    assert server.heads == []


@pytest.mark.parametrize("kept", [False, True])
async def test_what_may_not_be_sent_any_more_does_not_leave(server: Server, kept: bool) -> None:
    """Connecting takes its time, in which a partition may be lost: asked once the connection is there."""
    asked: list[str] = []

    async def look_up(host: str, port: int) -> list[str]:
        asked.append("address")
        return ["127.0.0.1"]

    def check() -> None:
        asked.append("check")
        raise LeaseLost("lease_lost")

    resolver = Resolver(("one.example",), look_up=look_up)
    made = ConnectionPool(tls=ResumingContext(), resolver=resolver)
    url = server.url.replace("127.0.0.1", "one.example")
    try:
        if kept:
            await post(made, url)
        with pytest.raises(LeaseLost):
            await made.exchange(url, IlinkRequest("x", "", "", b"{}"), 5, check=check)
    finally:
        await made.close()
    assert asked == ["address", "check"]
    assert len(server.heads) == kept


async def test_a_query_is_sent_as_it_is_and_a_get_has_no_body(server: Server) -> None:
    made = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
    await made.exchange(server.url, IlinkRequest("x", "?qrcode=a%2Fb&x=1?2", "", b"", "GET"), 5)
    await made.close()
    (head,) = server.heads
    assert head.startswith(b"GET /ilink/bot/x?qrcode=a%2Fb&x=1?2 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Content-" not in head


async def test_the_next_address_is_tried_where_one_does_not_take_the_connection(server: Server) -> None:
    async def look_up(host: str, port: int) -> list[str]:
        return ["::1", "127.0.0.1"]

    resolver = Resolver(("two.example",), look_up=look_up)
    made = ConnectionPool(tls=ResumingContext(), resolver=resolver)
    try:
        assert (await post(made, server.url.replace("127.0.0.1", "two.example"))).status == 200
    finally:
        await made.close()
    assert b"\r\nHost: two.example:" in server.heads[0]


async def test_a_name_is_asked_for_once_by_many_and_again_after_a_failure(server: Server) -> None:
    asked: list[str] = []

    async def look_up(host: str, port: int) -> list[str]:
        asked.append(host)
        await asyncio.sleep(0)
        if len(asked) == 1:
            raise OSError("Name or service not known")
        return ["127.0.0.1"]

    resolver = Resolver(("one.example",), look_up=look_up)
    made = ConnectionPool(tls=ResumingContext(), resolver=resolver)
    url = server.url.replace("127.0.0.1", "one.example")
    try:
        failed = await asyncio.gather(*(post(made, url) for _ in range(5)), return_exceptions=True)
        assert [type(problem) for problem in failed] == [Temporary] * 5
        assert len({id(problem) for problem in failed}) == 5
        replies = await asyncio.gather(*(post(made, url) for _ in range(5)))
        assert [reply.status for reply in replies] == [200] * 5
        assert len(asked) == 2
    finally:
        await made.close()


async def test_a_server_that_does_not_take_the_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full, so that nothing answers."""
    monkeypatch.setattr("adapter.ilink.connection.CONNECT_S", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        made = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        try:
            with pytest.raises(Temporary) as caught:
                await post(made, f"http://127.0.0.1:{port}/")
            assert (caught.value.reason, caught.value.detail) == (
                "network",
                "TimeoutError: no connection to 127.0.0.1",
            )
        finally:
            await made.close()
            for filler in fillers:
                filler.close()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def keep_silent(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.5)


@pytest.mark.parametrize("fault", ["refused", "hung up", "silent", "no TLS", "no time to connect"])
async def test_a_request_that_fails_leaves_no_garbage(server: Server, pool: ConnectionPool, fault: str) -> None:
    """What refers to itself waits for the collector, and thousands of bots fail again and again in an outage."""
    url, timeout_s = server.url, 0.05
    match fault:
        case "no time to connect":
            timeout_s, server.answer = 1e-5, keep_silent
        case "refused":
            url = f"http://127.0.0.1:{free_port()}/"
        case "hung up":
            server.answer = hang_up
        case "silent":
            server.answer = keep_silent
        case _:
            url = url.replace("http:", "https:")
            server.answer = hang_up

    async def fail() -> None:
        with pytest.raises((Temporary, Uncertain, TimeoutError)):
            await post(pool, url, timeout_s=timeout_s)
        await asyncio.sleep(0)

    await fail()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(5):
            await fail()
        await until(lambda: server.open == 0, "the server's ends are closed, too")
        gc.collect()
        ours = [
            thing
            for thing in gc.garbage
            if isinstance(thing, Connection) or (inspect.isframe(thing) and "/adapter/" in thing.f_code.co_filename)
        ]
        assert ours == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("answered", [True, False])
def test_a_process_that_was_stopped_reads_the_answer_that_came_meanwhile(loop: str, *, answered: bool) -> None:
    """The time of its request is over by then, too."""

    async def ask() -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            transport, connection = await asyncio.get_running_loop().create_connection(Connection, sock=ours)
            asking = asyncio.ensure_future(connection.send_request(b"request", 0.05, LARGEST))
            await asyncio.sleep(0)
            if answered:
                theirs.send(OK)
            time.sleep(0.3)  # noqa: ASYNC251 stands for the stop: nothing of the process runs
            try:
                return (await asking).body
            except TimeoutError:
                return b"late"
            finally:
                transport.abort()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(ask()) == (b"{}" if answered else b"late")


@hypothesis.given(cuts=st.lists(st.integers(1, len(PIECES) - 1), max_size=6))
def test_an_answer_may_come_in_any_pieces(cuts: list[int]) -> None:
    async def ask() -> tuple[IlinkReply, bool]:
        connection = Connection()
        wire = Wire()
        connection.connection_made(wire)
        asking = asyncio.ensure_future(connection.send_request(b"request", 5, LARGEST))
        await asyncio.sleep(0)
        edges = [0, *sorted(set(cuts)), len(PIECES)]
        for begin, end in itertools.pairwise(edges):
            connection.data_received(PIECES[begin:end])
        return await asking, connection.is_usable

    reply, usable = asyncio.run(ask())
    assert (reply.status, reply.body, reply.headers["retry-after"]) == (200, b"hello world", "1")
    assert usable


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_was_spoken_with_need_not_show_its_certificates_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loop: str,
    newest: ssl.TLSVersion,
) -> None:
    """Over TLS: the first connection, one that resumes it, and after each that fails one that begins anew."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.maximum_version = newest
    tls.load_cert_chain(*authority.issue("ilink"))
    resumed: list[bool] = []
    answer = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        resumed.append(writer.get_extra_info("ssl_object").session_reused)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    failing = [(None, Temporary), (tls, Uncertain)]
    """Of connections that fail, one in its handshake, one after it."""

    async def talk() -> None:
        pool = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
        port = free_port()
        url = f"https://127.0.0.1:{port}/"
        async with await asyncio.start_server(serve, "127.0.0.1", port, ssl=tls):
            for _ in range(2):
                await post(pool, url)
        for context, error in failing:
            async with await asyncio.start_server(refuse, "127.0.0.1", port, ssl=context):
                with pytest.raises(error):
                    await post(pool, url)
            async with await asyncio.start_server(serve, "127.0.0.1", port, ssl=tls):
                await post(pool, url)
        await pool.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(talk())
    assert resumed == [False, True, False, False]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "no TLS"])
@pytest.mark.parametrize("hangs_up", [True, False])
def test_tls_that_does_not_come_about_is_one_failure_and_no_crash(
    loop: str, begins: bytes, *, hangs_up: bool
) -> None:
    """The loop logs what a callback raises: in an outage, for each of thousands of bots."""
    crashes: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(begins)
        if not hangs_up:
            await reader.read()
        writer.close()

    async def talk() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: crashes.append(str(what["exception"])))
        pool = ConnectionPool(tls=ResumingContext(), resolver=RESOLVER)
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            with pytest.raises(Temporary):
                await post(pool, f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/", timeout_s=0.1)
            for _ in range(10):  # rounds, in which the connection's end is told
                await asyncio.sleep(0)
        await pool.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(talk())
    assert crashes == []
