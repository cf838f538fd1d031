"""The frequent calls (client.HOT) over own connections, which stay cheap with thousands of parked polls.

A bot costs a poll every half minute, a message a poll and a send, so the cost of one request decides the cost of a
platform. These calls therefore use no HTTP client library (docs/decisions/0034-own-connections-to-ilink.md has the
figures), only libraries that resolve, connect and parse. All other calls, and these through a proxy, are
`plain_calls`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

import aiohappyeyeballs

from adapter.errors import Temporary
from adapter.ilink.budget import ByteBudget
from adapter.ilink.connection import Connection
from adapter.ilink.network import CONNECT_S, TLS_S, Resolver
from adapter.ilink.protocol import Reply, Request
from adapter.ilink.tls import ResumingContext
from adapter.ilink.transport import HEADERS, Base, Transport

STAGGER_S = 0.25
"""Delay before the next address of a name is tried (RFC 8305, 5)."""

_ALWAYS = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())


class HotCalls(Transport[Connection]):
    """POST requests without a proxy."""

    def __init__(self, *, tls: ResumingContext, budget: ByteBudget, resolver: Resolver) -> None:
        super().__init__(tls=tls, budget=budget)
        self._resolver = resolver

    def _send_request(
        self,
        line: Connection,
        base: Base,
        request: Request,
        timeout_s: float,
        check: Callable[[], None] | None,
        *,
        fresh: bool,
    ) -> Awaitable[Reply]:
        written = _encode_request(request, base, close=fresh)
        if check is not None:
            check()
        return line.send_request(written, timeout_s, request.largest)

    async def _open(self, base: Base, timeout_s: float, *, fresh: bool) -> Connection:
        origin, connection, transport = base.origin, Connection(self._budget), None
        try:
            async with asyncio.timeout(min(CONNECT_S, timeout_s)):
                transport = await _connect_tcp(
                    await self._resolver.addresses(origin.host, origin.port, fresh=fresh), origin.port
                )
            if transport.is_closing():
                raise ConnectionResetError
            if origin.scheme == "https":
                async with asyncio.timeout(min(TLS_S, timeout_s)):
                    connection.connection_made(await _start_tls(transport, connection, self._tls, origin.host))
            else:
                transport.set_protocol(connection)
                connection.connection_made(transport)
        except BaseException as exc:
            if transport is not None:
                transport.abort()
            if not isinstance(exc, OSError | ssl.CertificateError):  # includes TimeoutError
                raise
            self._tls.forget_session(origin.host)
            exc.__traceback__ = None  # breaks a reference cycle
            raise Temporary("network", type(exc).__name__) from exc
        return connection


def _encode_request(request: Request, base: Base, *, close: bool) -> bytes:
    """Raises Temporary for headers that would form another request."""
    headers, body = request.headers, request.body
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise Temporary("network", "a header has a line break in it")
    if close:
        lines += "Connection: close\r\n"
    first = f"POST {base.path}{request.path} HTTP/1.1\r\nHost: {base.host}\r\n{_ALWAYS}"
    return f"{first}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _connect_tcp(addresses: list[str], port: int) -> asyncio.Transport:
    """Connects to the address that answers first. Raises OSError.

    The protocol is set later: if the task is cancelled meanwhile, uvloop does not notify the protocol, and protocol
    and transport would be a reference cycle.
    """
    loop = asyncio.get_running_loop()
    if len(addresses) == 1:  # a single address needs no race, and half of the CPU
        transport, _ = await loop.create_connection(asyncio.Protocol, addresses[0], port)
    else:
        infos: list[aiohappyeyeballs.AddrInfoType] = [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                (address, port),
            )
            for address in addresses
        ]
        reached = await aiohappyeyeballs.start_connection(infos, happy_eyeballs_delay=STAGGER_S)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=reached)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return transport


async def _start_tls(
    transport: asyncio.Transport, protocol: asyncio.Protocol, tls: ssl.SSLContext, host: str
) -> asyncio.Transport:
    """Starts TLS on a connection, for `protocol`. Raises OSError, ssl.CertificateError."""
    encrypted = await asyncio.get_running_loop().start_tls(transport, protocol, tls, server_hostname=host)
    if encrypted is None:  # the connection was lost meanwhile
        raise ConnectionResetError
    return encrypted
