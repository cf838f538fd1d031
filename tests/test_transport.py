"""Requests over real sockets to servers that misbehave: what left and what did not must never be confused."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from adapter.errors import Temporary, Uncertain
from adapter.ilink.network import CheckedResolver
from adapter.ilink.protocol import Reply
from adapter.ilink.transport import Transport
from tests.e2e.waiting import free_port, until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 7\r\n\r\n{}"
LARGEST = 100_000


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
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/ilink/bot/x"
    async with listening:
        yield made
        listening.close()


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    resolver = CheckedResolver(())
    made = Transport(tls=ssl.create_default_context(), agent="test/1", max_answer_bytes=LARGEST, resolver=resolver)
    yield made
    await made.close()


async def post(transport: Transport, url: str, *, timeout_s: float = 30.0, afresh: bool = False) -> Reply:
    return await transport.exchange("POST", url, {"X-One": "1"}, b"{}", timeout_s, afresh=afresh)


async def test_an_answer_is_read_whole_with_its_headers(server: Server, transport: Transport) -> None:
    reply = await post(transport, server.url)
    assert (reply.status, reply.headers["retry-after"], reply.body) == (200, "7", b"{}")
    (head,) = server.heads
    assert head.startswith(b"POST /ilink/bot/x HTTP/1.1\r\n")
    assert b"User-Agent: test/1\r\n" in head
    assert b"X-One: 1\r\n" in head
    assert head.count(b"Content-Length: 2\r\n") == 1


async def test_requests_in_a_row_need_one_connection(server: Server, transport: Transport) -> None:
    for _ in range(5):
        await post(transport, server.url)
    assert server.connections == 1


async def test_a_request_afresh_gets_a_connection_of_its_own(server: Server, transport: Transport) -> None:
    await post(transport, server.url)
    await post(transport, server.url, afresh=True)
    await post(transport, server.url)
    assert server.connections == 2
    await until(lambda: server.open == 1, "the one of its own is closed")


async def test_what_nobody_took_did_not_leave(transport: Transport) -> None:
    with pytest.raises(Temporary) as caught:
        await post(transport, f"http://127.0.0.1:{free_port()}/")
    assert caught.value.reason == "network"
    with pytest.raises(Temporary):
        await post(transport, "http://no-such-host.invalid/")


async def test_no_tls_where_it_is_asked_for_means_that_nothing_left(transport: Transport) -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
        with pytest.raises(Temporary):
            await post(transport, f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"220 mail.example ESMTP\r\n\r\n",
        b"\x00\xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["nothing", "half a head", "half a body", "wrong chunks", "another protocol", "no text", "wrong gzip"],
)
async def test_what_was_taken_and_not_answered_well_may_have_been_done(
    server: Server, transport: Transport, answer: bytes
) -> None:
    server.answer = Server.say(answer, close=True)
    with pytest.raises(Uncertain) as caught:
        await post(transport, server.url)
    assert caught.value.reason == ("unreadable" if b"gzip" in answer else "network")
    assert len(server.heads) == 1, "it is not repeated by itself"


async def test_a_silent_server_is_a_timeout_and_costs_the_connection(server: Server, transport: Transport) -> None:
    async def nothing(_: asyncio.StreamWriter) -> None: ...

    server.answer = nothing
    with pytest.raises(TimeoutError):
        await post(transport, server.url, timeout_s=0.05)
    await until(lambda: server.open == 0, "the connection is closed")
    server.answer = Server.say(OK)
    assert (await post(transport, server.url)).status == 200
    assert server.connections == 2


async def test_a_cancelled_request_costs_its_connection(server: Server, transport: Transport) -> None:
    async def nothing(_: asyncio.StreamWriter) -> None: ...

    server.answer = nothing
    work = asyncio.create_task(post(transport, server.url))
    await until(lambda: len(server.heads) == 1, "it has left")
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await until(lambda: server.open == 0, "the connection is closed")


async def test_an_answer_above_the_limit_is_not_read(server: Server, transport: Transport) -> None:
    body = b"x" * (LARGEST + 1)
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(Uncertain) as caught:
        await post(transport, server.url)
    assert caught.value.reason == "unreadable"


async def test_a_small_answer_that_unpacks_into_a_huge_one_is_not_read(server: Server, transport: Transport) -> None:
    body = gzip.compress(bytes(50_000_000))
    assert len(body) < LARGEST
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    server.answer = Server.say(head + body)
    with pytest.raises(Uncertain):
        await post(transport, server.url)


async def test_packed_answers_are_unpacked(server: Server, transport: Transport) -> None:
    body = gzip.compress(b'{"ret":0}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    server.answer = Server.say(head + body)
    assert (await post(transport, server.url)).body == b'{"ret":0}'


async def test_a_redirect_is_an_answer_and_not_followed(server: Server, transport: Transport) -> None:
    server.answer = Server.say(
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    )
    assert (await post(transport, server.url)).status == 307
    assert len(server.heads) == 1


async def test_cookies_are_not_kept(server: Server, transport: Transport) -> None:
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\nSet-Cookie: who=bot1\r\nContent-Length: 0\r\n\r\n")
    await post(transport, server.url)
    await post(transport, server.url)
    assert b"ookie" not in server.heads[1]
