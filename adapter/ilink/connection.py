"""Exchanges requests with iLink over kept connections, which all bots share.

A bot costs a poll every half minute, a message a poll and a send, so the cost of one request decides the cost of a
platform. The calls therefore use no HTTP client library (docs/decisions/0034-own-connections-to-ilink.md has the
figures), only httptools, which parses. No redirects, no cookies, no pipelining.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import ssl
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from adapter.errors import Temporary, Uncertain
from adapter.ilink.network import CONNECT_S, NEXT_S, PORTS, TLS_S, Proxy, Resolver, ResumingContext, proxy_of
from adapter.ilink.protocol import AGENT, IlinkReply, IlinkRequest, uin

KEPT_S = 20.0
"""Time for which an idle connection is kept. It is shorter than what most servers allow."""
FRESH_S = 1.0
"""A request that may not be repeated takes a connection that was idle for less than this, else a new one: it must not
meet one that the server is just closing, since nothing tells whether it was read."""
STALE_S = 1.0
"""A request over a kept connection that ends without an answer within this time met a connection that the server had
closed before. Some servers close after each answer without announcing it."""
READ_GRACE_S = 0.5
"""Time to read an answer that is in the socket when its time is over. A process that continues after a stop runs its
timers before it reads its sockets."""
HEAD_BYTES = 65_536
"""What an answer may have beside as many bytes as its body may have: its head, chunk sizes and trailers."""
PARSER_LENIENCIES = {
    "lenient_headers": True,
    "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
    "lenient_chunked_length": True,
}
"""Deviations that a client must or may accept: folded headers, lines that end in LF, a length beside chunks, which
the chunks override (RFC 9112, 5.2, 2.2, 6.3). iLink may count the messages in such an answer as delivered. The
deviations are dangerous only in a proxy, which passes them on."""
_ALWAYS = f"User-Agent: {AGENT}\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
"""Headers of every request."""
READ_HEADERS = {
    name.encode(): name for name in ("content-length", "transfer-encoding", "content-encoding", "retry-after")
}
"""The headers of an answer that are read."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection: a request, its answer, the next request."""

    __slots__ = ("_body", "_framed", "_has_head", "_headers", "_is_complete", "_keeps", "_limit", "_loop", "_parser",
                 "_read", "_result", "_status", "_timer", "_transport", "began", "idle_since", "tls")  # fmt: skip

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser
        self._transport: asyncio.Transport | None = None
        self._result: asyncio.Future[IlinkReply] | None = None
        self._timer: asyncio.TimerHandle
        self._keeps = True
        """Whether another answer may follow."""
        self._begin(0)
        self.began = self.idle_since = 0.0
        """Begin of the last request and end of its answer, by the loop's clock."""
        self.tls: ssl.SSLObject | None = None

    def _begin(self, limit: int) -> None:
        """Prepares for an answer of at most `limit` bytes, and HEAD_BYTES around its body."""
        self._limit = limit
        self._read = self._status = 0
        self._headers: dict[str, str] = {}
        self._body = bytearray()  # of small chunks a list would take many times as much
        self._has_head = self._is_complete = False
        self._framed = True
        """Whether the answer tells its own end."""

    @property
    def is_usable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._transport is not None and not self._transport.is_closing() and self._keeps

    @property
    def was_closed(self) -> bool:
        """Whether the last request met a connection that the server had closed (STALE_S)."""
        return self._read == 0 and self.idle_since - self.began < STALE_S

    async def send_request(self, request: bytes, timeout_s: float, limit: int) -> IlinkReply:
        """Sends the request and reads its answer, still compressed. Closes the connection if it is cancelled or
        fails.

        Raises TimeoutError; Temporary: the connection was closed before; Uncertain("network"): the connection was
        lost before the end of an answer; Uncertain("unreadable"): invalid HTTP, or much more than `limit` bytes.
        """
        if self._transport is None or self._transport.is_closing():
            raise Temporary("network", "the connection is closed")
        self._begin(limit)
        self.began = self._loop.time()
        self._result = result = self._loop.create_future()
        self._timer = self._loop.call_later(timeout_s, self._on_deadline)
        self._transport.write(request)
        del request
        try:
            reply: IlinkReply = await result
            return reply
        except BaseException:
            self._abort()
            raise
        finally:
            self._timer.cancel()
            self._body = bytearray()
            self._result = None
            del result  # an error in it refers to this frame
            self.idle_since = self._loop.time()

    def close(self) -> None:
        """Closes the connection as TLS requires."""
        if self._transport is not None:
            self._transport.close()

    def _on_deadline(self) -> None:
        self._timer = self._loop.call_later(READ_GRACE_S, self._fail, TimeoutError())

    def _fail(self, problem: Exception) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_exception(problem)
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        if self._result is None or self._result.done():
            return
        self._result.set_result(IlinkReply(self._status, self._headers, bytes(self._body)))
        if not self._keeps:
            self.close()

    # for the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**PARSER_LENIENCIES)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        self.tls = transport.get_extra_info("ssl_object")

    def data_received(self, data: bytes) -> None:
        """Takes a piece of the answer. Data without a request close the connection."""
        if self._result is None or self._result.done():
            self._abort()
            return
        self._read += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._keeps = False
            if not self._is_complete:
                self._fail(Uncertain("unreadable", type(exc).__name__))
        if self._read > self._limit + HEAD_BYTES:
            self._fail(Uncertain("unreadable", f"the answer exceeds {self._limit} bytes"))
        elif self._is_complete:
            self._finish()

    def eof_received(self) -> None:
        """The server closes its side, so this side closes, too; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Finishes an answer that the end of the connection delimits; any other unfinished answer is lost."""
        if self._transport is None:  # the TLS handshake failed
            return
        self._transport = None
        self._keeps = False
        del self._parser  # which refers to the connection
        if exc is None and self._has_head and not self._framed:
            self._finish()
        else:
            self._fail(Uncertain("network", type(exc).__name__ if exc else "the server closed the connection"))

    # for the parser -----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Starts another head: after an answer with status 1xx, or after the answer, where it is unexpected."""
        if self._is_complete:
            self._keeps = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps the first of each name in READ_HEADERS. A trailer may not change the head (RFC 9110, 6.5.1)."""
        if (read := READ_HEADERS.get(name.lower())) and not self._has_head:
            self._headers.setdefault(read, value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        if not self._is_complete and (status := self._parser.get_status_code()) >= 200:
            self._status, self._has_head = status, True
            self._framed = "content-length" in self._headers or "transfer-encoding" in self._headers

    def on_body(self, body: bytes) -> None:
        if not self._is_complete:
            self._body += body

    def on_message_complete(self) -> None:
        """An answer is complete; one with status 1xx does not count."""
        if not self._has_head:
            self._headers = {}
        elif not self._is_complete:
            self._is_complete = True
            self._keeps = self._keeps and self._parser.should_keep_alive()


class Base(NamedTuple):
    """A parsed base URL."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    named: str
    """Value of the Host header."""


class ConnectionPool:
    """Exchanges requests for answers. With a proxy in the environment, each connection is a tunnel through it."""

    def __init__(self, *, tls: ResumingContext, resolver: Resolver) -> None:
        self._tls = tls
        self._resolver = resolver
        self._idle: dict[str, list[Connection]] = {}
        """By base URL. The connection used last is taken first, so that surplus ones stay idle and are closed."""
        self._cleanup_timer: asyncio.TimerHandle | None = None

    async def exchange(
        self, base_url: str, request: IlinkRequest, timeout_s: float, check: Callable[[], None] | None = None
    ) -> IlinkReply:
        """The answer, which may be compressed. `check`: see ports.Chat.

        Repeats a repeatable request once over a new connection if the kept one was closed.
        Raises TimeoutError, Temporary("network") (not sent), and Uncertain (sent, or possibly sent), for the reasons
        of `Connection.send_request`.
        """
        base = _parse_base_url(base_url)
        connection = kept = self._take_idle(base_url, KEPT_S if request.repeatable else FRESH_S)
        while True:
            if connection is None:
                connection = await self._open(base, timeout_s)
            try:
                if check is not None:
                    check()
                # the bytes are in no variable, since a poll waits for half a minute
                reply = await connection.send_request(_encode_request(request, base), timeout_s, request.largest)
                break
            except (TimeoutError, Uncertain) as exc:
                if connection is not kept:
                    self._tls.forget_session(base.host)
                    raise
                self._close_idle(base_url, kept.began)  # older connections are probably dead, too
                if not (request.repeatable and kept.was_closed and isinstance(exc, Uncertain)):
                    raise
                connection = None
            except BaseException:
                connection.close()
                raise
        if connection.is_usable:
            self._store_idle(base_url, connection)
        if connection is not kept and connection.tls is not None:
            self._tls.store_session(base.host, connection.tls)
        reply.secrets = request.token, request.secret
        return reply

    async def close(self) -> None:
        """Closes all idle connections."""
        if self._cleanup_timer is not None:
            self._cleanup_timer.cancel()
            self._cleanup_timer = None
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    async def _open(self, base: Base, timeout_s: float) -> Connection:
        """Raises Temporary("network")."""
        connection, transport = Connection(), None
        proxy = proxy_of(base.url)
        host, port = (proxy.host, proxy.port) if proxy else (base.host, base.port)
        try:
            async with asyncio.timeout(min(CONNECT_S, timeout_s)):
                transport = await _connect_tcp(await self._resolver.addresses(host, port), port)
                if proxy:
                    if proxy.scheme == "https":
                        transport = await _start_tls(transport, asyncio.Protocol(), self._tls, proxy.host)
                    await _open_tunnel(transport, base, proxy)
            if transport.is_closing():
                raise ConnectionResetError
            if base.scheme == "https":
                async with asyncio.timeout(min(TLS_S, timeout_s)):
                    connection.connection_made(await _start_tls(transport, connection, self._tls, base.host))
            else:
                transport.set_protocol(connection)
                connection.connection_made(transport)
        except BaseException as exc:
            if transport is not None:
                transport.abort()
            if not isinstance(exc, OSError | ssl.CertificateError):  # includes TimeoutError
                raise
            self._tls.forget_session(base.host)
            exc.__traceback__ = None  # breaks a reference cycle
            through = " through the proxy" if proxy else ""
            raise Temporary("network", f"{type(exc).__name__}: no connection to {base.host}{through}") from exc
        return connection

    def _take_idle(self, base_url: str, longest_s: float) -> Connection | None:
        """The connection that was used last, unless it was idle for longer."""
        idle, since = self._idle.get(base_url), asyncio.get_running_loop().time() - longest_s
        while idle and idle[-1].idle_since >= since:
            connection = idle.pop()
            if connection.is_usable:
                return connection
        return None

    def _store_idle(self, base_url: str, connection: Connection) -> None:
        self._idle.setdefault(base_url, []).append(connection)
        if self._cleanup_timer is None:
            self._cleanup_timer = asyncio.get_running_loop().call_later(KEPT_S, self._close_unused)

    def _close_unused(self) -> None:
        """Closes connections that were idle for KEPT_S."""
        loop = asyncio.get_running_loop()
        self._cleanup_timer = None
        for base_url in list(self._idle):
            self._close_idle(base_url, loop.time() - KEPT_S)
        if self._idle:
            self._cleanup_timer = loop.call_later(KEPT_S / 4, self._close_unused)

    def _close_idle(self, base_url: str, since: float) -> None:
        """Closes connections that were idle since `since`, by the loop's clock."""
        idle = self._idle.get(base_url, [])
        old = sum(connection.idle_since <= since for connection in idle)
        for connection in idle[:old]:
            connection.close()
        del idle[:old]
        if not idle:
            self._idle.pop(base_url, None)


@functools.lru_cache(maxsize=256)  # few different URLs
def _parse_base_url(url: str) -> Base:
    """Parses a checked URL."""
    parts = urlsplit(url)
    scheme, host = parts.scheme, parts.hostname or ""
    port = parts.port or PORTS[scheme]
    named = f"[{host}]" if ":" in host else host
    return Base(url, scheme, host, port, parts.path, named if port == PORTS[scheme] else f"{named}:{port}")


def _encode_request(request: IlinkRequest, base: Base) -> bytes:
    """Raises Temporary for a token that would form another header."""
    head = f"{request.method} {base.path}{request.path} HTTP/1.1\r\nHost: {base.named}\r\n{_ALWAYS}{request.headers}"
    if token := request.token:
        if not token.isprintable():
            raise Temporary("network", "the token has a character that no header may have")
        head += f"Authorization: Bearer {token}\r\n"
    if request.method == "POST":
        head += f"X-WECHAT-UIN: {uin(random.getrandbits(32))}\r\nContent-Length: {len(request.body)}\r\n"
    return f"{head}\r\n".encode() + request.body


async def _connect_tcp(addresses: list[str], port: int) -> asyncio.Transport:
    """Connects to the first address that answers. Raises OSError.

    The protocol is set later: if the task is cancelled meanwhile, uvloop does not notify the protocol, and protocol
    and transport would be a reference cycle.
    """
    loop = asyncio.get_running_loop()
    *others, last = addresses
    transport: asyncio.Transport | None = None
    for address in others:
        with contextlib.suppress(OSError):  # includes TimeoutError
            async with asyncio.timeout(NEXT_S):
                transport, _ = await loop.create_connection(asyncio.Protocol, address, port)
                break
    if transport is None:
        transport, _ = await loop.create_connection(asyncio.Protocol, last, port)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return transport


async def _open_tunnel(transport: asyncio.Transport, base: Base, proxy: Proxy) -> None:
    """Makes a connection to a proxy one to `base`. Raises OSError."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    target = f"[{base.host}]:{base.port}" if ":" in base.host else f"{base.host}:{base.port}"
    lines = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: {AGENT}\r\n"
    if proxy.authorization:
        lines += f"Proxy-Authorization: {proxy.authorization}\r\n"
    transport.write(f"{lines}\r\n".encode())
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise ConnectionResetError from None
    if head.split(maxsplit=2)[1:2] != [b"200"]:
        raise ConnectionRefusedError


async def _start_tls(
    transport: asyncio.Transport, protocol: asyncio.Protocol, tls: ssl.SSLContext, host: str
) -> asyncio.Transport:
    """Starts TLS on a connection, for `protocol`. Raises OSError, ssl.CertificateError."""
    encrypted = await asyncio.get_running_loop().start_tls(transport, protocol, tls, server_hostname=host)
    if encrypted is None:  # the connection was lost meanwhile
        raise ConnectionResetError
    return encrypted
