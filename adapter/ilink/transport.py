"""Exchanges requests with iLink over kept connections, which all bots share.

A bot costs a poll every half minute, a message a poll and a send, so the cost of one request decides the cost of a
platform. The calls therefore use no HTTP client library (docs/decisions/0034-own-connections-to-ilink.md has the
figures), only libraries that resolve, connect and parse.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohappyeyeballs

from adapter.errors import Temporary, Uncertain
from adapter.ilink.connection import Connection
from adapter.ilink.network import CONNECT_S, KEPT_S, PORTS, TLS_S, Proxy, Resolver, proxy_of
from adapter.ilink.protocol import AGENT, IlinkReply, IlinkRequest
from adapter.ilink.tls import ResumingContext

STALE_S = 1.0
"""A request over a kept connection that ends without an answer within this time met a connection that the server had
closed before. Some servers close after each answer without announcing it."""
STAGGER_S = 0.25
"""Delay before the next address of a name is tried (RFC 8305, 5)."""
_ALWAYS = f"User-Agent: {AGENT}\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
"""Headers of every request."""


class Base(NamedTuple):
    """A parsed base URL."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    named: str
    """Value of the Host header."""


class Transport:
    """Exchanges requests for answers. Follows no redirects and keeps no cookies.

    With a proxy in the environment, each connection is a tunnel through it.
    """

    def __init__(self, *, tls: ResumingContext, resolver: Resolver) -> None:
        self._tls = tls
        self._resolver = resolver
        self._idle: dict[str, list[Connection]] = {}
        """By base URL. The connection used last is taken first, so that surplus ones stay idle and are closed."""
        self._cleanup_timer: asyncio.TimerHandle | None = None

    async def exchange(
        self,
        base_url: str,
        request: IlinkRequest,
        timeout_s: float,
        *,
        fresh: bool = False,
        check: Callable[[], None] | None = None,
    ) -> IlinkReply:
        """`fresh`: use a new connection, and resolve the name again. `check`: see ports.Chat.

        Repeats a repeatable request once over a new connection if the kept one was closed. The answer may be
        compressed.
        Raises TimeoutError, Temporary("network") (not sent), Uncertain (sent, or possibly sent).
        """
        base = _parse_base_url(base_url)
        clock = asyncio.get_running_loop().time
        began = clock()
        kept = None if fresh else self._take_idle(base_url)
        line = kept or await self._open(base, timeout_s, fresh=fresh)
        reply = None
        try:
            encoded = _encode_request(request, base, close=fresh)
            if check is not None:
                check()
            sending = line.send_request(encoded, timeout_s, request.largest)
            del encoded  # a poll waits for half a minute
            reply = await sending
        except (TimeoutError, Uncertain) as exc:
            line.close()
            if kept is None:
                self._tls.forget_session(base.host)
                raise
            self._close_idle(base_url, began)  # older connections are probably dead, too
            closed = isinstance(exc, Uncertain) and line.is_silent and clock() - began < STALE_S
            if not (closed and request.repeatable):
                raise
        except BaseException:
            line.close()
            raise
        if reply is None:
            return await self.exchange(base_url, request, timeout_s, fresh=True, check=check)
        if kept is None and line.tls is not None:
            self._tls.store_session(base.host, line.tls)
        if line.is_usable and not fresh:
            self._store_idle(base_url, line)
        else:
            line.close()
        return reply

    async def close(self) -> None:
        """Closes all idle connections."""
        if self._cleanup_timer is not None:
            self._cleanup_timer.cancel()
            self._cleanup_timer = None
        for lines in self._idle.values():
            for line in lines:
                line.close()
        self._idle.clear()

    async def _open(self, base: Base, timeout_s: float, *, fresh: bool) -> Connection:
        """Raises Temporary("network")."""
        connection, transport = Connection(), None
        proxy = proxy_of(base.url)
        host, port = (proxy.host, proxy.port) if proxy else (base.host, base.port)
        try:
            async with asyncio.timeout(min(CONNECT_S, timeout_s)):
                transport = await _connect_tcp(await self._resolver.addresses(host, port, fresh=fresh), port)
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
            raise Temporary("network", type(exc).__name__) from exc
        return connection

    def _take_idle(self, base_url: str) -> Connection | None:
        idle = self._idle.get(base_url)
        while idle:
            line = idle.pop()
            if line.is_usable:
                return line
        return None

    def _store_idle(self, base_url: str, line: Connection) -> None:
        self._idle.setdefault(base_url, []).append(line)
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
        old = sum(line.idle_since <= since for line in idle)
        for line in idle[:old]:
            line.close()
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


def _encode_request(request: IlinkRequest, base: Base, *, close: bool) -> bytes:
    """Raises Temporary for headers that would form another request."""
    headers, body = request.headers, request.body
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise Temporary("network", "a header has a line break in it")
    if close:
        lines += "Connection: close\r\n"
    if request.method == "POST":
        lines += f"Content-Length: {len(body)}\r\n"
    first = f"{request.method} {base.path}{request.path} HTTP/1.1\r\nHost: {base.named}\r\n{_ALWAYS}"
    return f"{first}{lines}\r\n".encode() + body


async def _connect_tcp(addresses: list[str], port: int) -> asyncio.Transport:
    """Connects to the address that answers first. Raises OSError.

    The protocol is set later: if the task is cancelled meanwhile, uvloop does not notify the protocol, and protocol
    and transport would be a reference cycle.
    """
    loop = asyncio.get_running_loop()
    if len(addresses) == 1:  # a single address needs no race, and half of the CPU
        transport, _ = await loop.create_connection(asyncio.Protocol, addresses[0], port)
    else:
        kind = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        infos: list[aiohappyeyeballs.AddrInfoType] = [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, *kind, (address, port)) for address in addresses
        ]
        reached = await aiohappyeyeballs.start_connection(infos, happy_eyeballs_delay=STAGGER_S)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=reached)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return transport


async def _open_tunnel(transport: asyncio.Transport, base: Base, proxy: Proxy) -> None:
    """Makes a connection to a proxy one to `base`. Raises OSError."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    place = f"[{base.host}]:{base.port}" if ":" in base.host else f"{base.host}:{base.port}"
    lines = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\nUser-Agent: {AGENT}\r\n{proxy.authorization}\r\n"
    transport.write(lines.encode())
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
