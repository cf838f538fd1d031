"""HTTP requests to iLink, over a pool of connections that is cheap with thousands of parked polls.

A bot costs a poll every half minute, a message a poll and a send, so the cost of one request decides that of a
platform: these calls use no HTTP client library (`CONTRIBUTING.md`, 59, has the figures). Libraries resolve, connect
and parse; ours is the choice of the connection. A proxy is spoken with by aiohttp (`proxied`).
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import urllib.request
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohappyeyeballs

from adapter.errors import Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget
from adapter.ilink.connection import Connection
from adapter.ilink.network import CONNECT_S, KEPT_S, CheckedResolver
from adapter.ilink.protocol import AGENT, Reply, Request
from adapter.ilink.proxied import Proxied
from adapter.ilink.tls import ResumingContext

TLS_S = 30.0
"""Longer than CONNECT_S, since a process that starts with thousands of bots is busy with as many handshakes."""
RESOLVED_S = 10.0
"""A name is asked for again after so long."""
STALE_S = 1.0
"""What ends sooner without a byte of an answer, over a connection that was kept: the server had closed it when the
request came. Some close after each answer, and announce it in none."""
STAGGER_S = 0.25
"""The next address of a name is tried after so long without an answer of the one before (RFC 8305, 5)."""
PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    host: str
    port: int


class Target(NamedTuple):
    """A URL without its query, taken apart."""

    origin: Origin
    path: str
    host: str
    """The header."""
    by_proxy: bool


class Transport:
    """Exchanges a request for its answer over pooled connections, shared by all bots. Follows no redirects."""

    def __init__(self, *, tls: ResumingContext, budget: ByteBudget, resolver: CheckedResolver) -> None:
        self._tls = tls
        self._resolver = resolver
        self._budget = budget
        self._always = f"User-Agent: {AGENT}\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        self._idle: dict[Origin, list[Connection]] = {}
        """The one that was used last is used first, so that those that are not needed grow old and are closed."""
        self._tidying: asyncio.TimerHandle | None = None
        self._found: dict[Origin, tuple[float, asyncio.Task[list[aiohappyeyeballs.AddrInfoType] | Exception]]] = {}
        self._proxied = Proxied(tls=tls, budget=budget, resolver=resolver)

    async def exchange(
        self,
        base_url: str,
        request: Request,
        timeout_s: float,
        *,
        afresh: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Reply:
        """`afresh`: over a connection of its own, to a name that is resolved anew. `check`: see ports.Chat.

        A repeatable request that met a stale connection is asked once more, afresh.
        Cancelled once the answer is there, it works on that for a moment more: see budget.GRACE_S.
        Raises TimeoutError, Temporary("network") (it did not leave), Uncertain (it left, or may have).
        """
        path, mark, query = request.path.partition("?")
        target = _target(base_url + path)
        if target.by_proxy:
            return await self._proxied.exchange(base_url, request, timeout_s, afresh=afresh, check=check)
        written = self._written(request, target, mark + query, close=afresh)
        clock = asyncio.get_running_loop().time
        began = clock()
        kept = None if afresh else self._kept(target.origin)
        connection = kept or await self._connect(target.origin, timeout_s, afresh=afresh)
        try:
            if check is not None:
                check()
        except BaseException:
            connection.close()
            raise
        reply = None
        try:
            reply = await connection.ask(written, timeout_s, request.largest)
        except (TimeoutError, Uncertain) as exc:
            if kept is None:
                self._tls.forget(target.origin.host)
                raise
            self._close_idle(target.origin, began)  # it may be as dead, and a repeat is to meet another (10.4)
            closed = isinstance(exc, Uncertain) and connection.silent and clock() - began < STALE_S
            if not (closed and request.repeatable):
                raise
        if reply is None:
            return await self.exchange(base_url, request, timeout_s, afresh=True, check=check)
        if kept is None and connection.tls is not None:
            self._tls.keep(target.origin.host, connection.tls)
        if afresh:
            connection.close()
        elif connection.usable:
            self._keep(target.origin, connection)
        if len(reply.body) <= SMALL and "content-encoding" not in reply.headers:
            return reply
        return await self._budget.unpack(reply, request.largest)

    async def close(self) -> None:
        """Closes all connections."""
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        await self._proxied.close()

    def _written(self, request: Request, target: Target, query: str, *, close: bool) -> bytes:
        """Raises Temporary for what would be another request than is meant."""
        headers, body = request.headers, request.body
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
            raise Temporary("network", "a header has a line break in it")
        first = f"{request.method} {target.path}{query} HTTP/1.1\r\nHost: {target.host}\r\n{self._always}"
        if close:
            lines += "Connection: close\r\n"
        if body or request.method != "GET":
            lines += f"Content-Length: {len(body)}\r\n"
        return f"{first}{lines}\r\n".encode() + body

    def _kept(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def _keep(self, origin: Origin, connection: Connection) -> None:
        self._idle.setdefault(origin, []).append(connection)
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().call_later(KEPT_S, self._tidy)

    def _tidy(self) -> None:
        """Closes what was not used for long."""
        loop = asyncio.get_running_loop()
        self._tidying = None
        for origin in list(self._idle):
            self._close_idle(origin, loop.time() - KEPT_S)
        if self._idle:
            self._tidying = loop.call_later(KEPT_S / 4, self._tidy)

    def _close_idle(self, origin: Origin, since: float) -> None:
        """Closes what was not used after `since`, by the loop's clock."""
        idle = self._idle.get(origin, [])
        old = sum(connection.idle_since <= since for connection in idle)
        for connection in idle[:old]:
            connection.close()
        del idle[:old]
        if not idle:
            self._idle.pop(origin, None)

    async def _connect(self, origin: Origin, timeout_s: float, *, afresh: bool) -> Connection:
        """Raises Temporary("network")."""
        connection, transport = Connection(self._budget), None
        try:
            async with asyncio.timeout(min(CONNECT_S, timeout_s)):
                transport = await _reach(await self._addresses(origin, afresh=afresh))
            if transport.is_closing():
                raise ConnectionResetError
            if origin.scheme == "https":
                async with asyncio.timeout(min(TLS_S, timeout_s)):
                    connection.connection_made(await _encrypted(transport, connection, self._tls, origin.host))
            else:
                transport.set_protocol(connection)
                connection.connection_made(transport)
        except BaseException as exc:
            if transport is not None:
                transport.abort()
            if not isinstance(exc, OSError | ssl.CertificateError):  # also TimeoutError
                raise
            self._tls.forget(origin.host)
            exc.__traceback__ = None  # in it is who keeps it: both would wait for the garbage collector
            raise Temporary("network", type(exc).__name__) from exc
        return connection

    async def _addresses(self, origin: Origin, *, afresh: bool) -> list[aiohappyeyeballs.AddrInfoType]:
        """Where a name leads, asked for once for all who want to know. Raises Temporary("network")."""
        loop = asyncio.get_running_loop()
        since, asking = self._found.get(origin, (0.0, None))
        if asking is None or afresh or (asking.done() and loop.time() - since > RESOLVED_S):
            asking = loop.create_task(self._resolve(origin))
            self._found[origin] = loop.time(), asking
        found = await asyncio.shield(asking)
        if isinstance(found, list):
            return found
        if self._found.get(origin, (0.0, None))[1] is asking:
            del self._found[origin]
        raise Temporary("network", type(found).__name__)

    async def _resolve(self, origin: Origin) -> list[aiohappyeyeballs.AddrInfoType] | Exception:
        """An error is returned: many wait for the same, and each raises its own."""
        try:
            return [
                (one["family"], socket.SOCK_STREAM, one["proto"], "", (one["host"], one["port"]))
                for one in await self._resolver.resolve(origin.host, origin.port)
            ]
        except (OSError, UnicodeError) as exc:
            return exc


async def _reach(addresses: list[aiohappyeyeballs.AddrInfoType]) -> asyncio.Transport:
    """A connection to whichever of the addresses answers first. Raises OSError.

    Nobody listens to it yet: uvloop does not tell a protocol whose task is cancelled meanwhile, which would know its
    transport, as that knows it, and wait for the garbage collector.
    """
    loop = asyncio.get_running_loop()
    if len(addresses) == 1:  # no race: the loop's own way takes half of the CPU
        host, port = addresses[0][4][:2]
        transport, _ = await loop.create_connection(asyncio.Protocol, host, port)
    else:
        reached = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=STAGGER_S)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=reached)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return transport


async def _encrypted(
    transport: asyncio.Transport, protocol: asyncio.Protocol, tls: ssl.SSLContext, host: str
) -> asyncio.Transport:
    """What speaks TLS over a connection, for `protocol` from now on. Raises OSError, ssl.CertificateError."""
    encrypted = await asyncio.get_running_loop().start_tls(transport, protocol, tls, server_hostname=host)
    if encrypted is None:  # it was lost meanwhile
        raise ConnectionResetError
    return encrypted


@functools.lru_cache(maxsize=256)  # the same few at every request
def _target(url: str) -> Target:
    """Takes a URL apart that was checked."""
    parts = urlsplit(url)
    scheme, host = parts.scheme, parts.hostname or ""
    port = parts.port or PORTS[scheme]
    named = f"[{host}]" if ":" in host else host
    by_proxy = scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    return Target(
        Origin(scheme, host, port), parts.path or "/", named if port == PORTS[scheme] else f"{named}:{port}", by_proxy
    )
