"""Exchanges requests with iLink over kept connections, which all bots share.

This is the common part of `HotCalls` and `PlainCalls`, which define what a connection is: it chooses the connection
for a request, closes idle ones, and repeats requests that met a closed connection.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from adapter.errors import Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget
from adapter.ilink.network import KEPT_S
from adapter.ilink.protocol import AGENT, Reply, Request
from adapter.ilink.tls import ResumingContext

STALE_S = 1.0
"""A request over a kept connection that ends without an answer within this time met a connection that the server had
closed before. Some servers close after each answer without announcing it."""
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": AGENT, "Accept": "*/*", "Accept-Encoding": "gzip, deflate"}
"""Headers of every request."""


class Origin(NamedTuple):
    """The endpoint of a connection."""

    scheme: str
    host: str
    port: int


class Base(NamedTuple):
    """A parsed base URL."""

    url: str
    origin: Origin
    path: str
    host: str
    """Value of the Host header."""


class Line(Protocol):
    """A connection that carries one request at a time."""

    idle_since: float
    """End of the last answer, by the loop's clock."""

    @property
    def is_usable(self) -> bool:
        """Whether the connection can carry another request."""

    @property
    def is_silent(self) -> bool:
        """Whether no byte, or no complete head, came in answer to the last request."""

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The connection's TLS object, once it is open."""

    def close(self) -> None:
        """Closes the connection, at once or soon."""


L = TypeVar("L", bound=Line)


class Transport(ABC, Generic[L]):
    """Exchanges requests for answers. Follows no redirects and keeps no cookies."""

    def __init__(self, *, tls: ResumingContext, budget: ByteBudget) -> None:
        self._tls = tls
        self._budget = budget
        self._idle: dict[Origin, list[L]] = {}
        """The connection used last is taken first, so that surplus ones stay idle and are closed."""
        self._cleanup_timer: asyncio.TimerHandle | None = None

    async def exchange(
        self,
        base_url: str,
        request: Request,
        timeout_s: float,
        *,
        fresh: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Reply:
        """`fresh`: use a new connection, and resolve the name again. `check`: see ports.Chat.

        Repeats a repeatable request once over a new connection if the kept one was closed. When it is cancelled after
        the answer arrived, it processes the answer for up to budget.GRACE_S.
        Raises TimeoutError, Temporary("network") (not sent), Uncertain (sent, or possibly sent).
        """
        base = _parse_base_url(base_url)
        clock = asyncio.get_running_loop().time
        began = clock()
        kept = None if fresh else self._take_idle(base.origin)
        line = kept or await self._open(base, timeout_s, fresh=fresh)
        reply = None
        try:
            reply = await self._send_request(line, base, request, timeout_s, check, fresh=fresh)
        except (TimeoutError, Uncertain) as exc:
            line.close()
            if kept is None:
                self._tls.forget_session(base.origin.host)
                raise
            self._close_idle(base.origin, began)  # older connections are probably dead, too
            closed = isinstance(exc, Uncertain) and line.is_silent and clock() - began < STALE_S
            if not (closed and request.repeatable):
                raise
        except BaseException as exc:
            line.close()
            if isinstance(exc, Temporary):
                self._tls.forget_session(base.origin.host)
            raise
        if reply is None:
            return await self.exchange(base_url, request, timeout_s, fresh=True, check=check)
        if kept is None and line.tls is not None:
            self._tls.store_session(base.origin.host, line.tls)
        if line.is_usable and not fresh:
            self._store_idle(base.origin, line)
        else:
            line.close()
        if len(reply.body) <= SMALL and "content-encoding" not in reply.headers:
            return reply
        return await self._budget.unpack(reply, request.largest)

    async def close(self) -> None:
        """Closes all idle connections."""
        if self._cleanup_timer is not None:
            self._cleanup_timer.cancel()
            self._cleanup_timer = None
        for lines in self._idle.values():
            for line in lines:
                line.close()
        self._idle.clear()

    @abstractmethod
    async def _open(self, base: Base, timeout_s: float, *, fresh: bool) -> L:
        """Raises Temporary("network")."""

    @abstractmethod
    def _send_request(
        self,
        line: L,
        base: Base,
        request: Request,
        timeout_s: float,
        check: Callable[[], None] | None,
        *,
        fresh: bool,
    ) -> Awaitable[Reply]:
        """The answer, still compressed. Calls `check` before it sends the request. Raises as `exchange`."""

    def _take_idle(self, origin: Origin) -> L | None:
        idle = self._idle.get(origin)
        while idle:
            line = idle.pop()
            if line.is_usable:
                return line
        return None

    def _store_idle(self, origin: Origin, line: L) -> None:
        self._idle.setdefault(origin, []).append(line)
        if self._cleanup_timer is None:
            self._cleanup_timer = asyncio.get_running_loop().call_later(KEPT_S, self._close_unused)

    def _close_unused(self) -> None:
        """Closes connections that were idle for KEPT_S."""
        loop = asyncio.get_running_loop()
        self._cleanup_timer = None
        for origin in list(self._idle):
            self._close_idle(origin, loop.time() - KEPT_S)
        if self._idle:
            self._cleanup_timer = loop.call_later(KEPT_S / 4, self._close_unused)

    def _close_idle(self, origin: Origin, since: float) -> None:
        """Closes connections that were idle since `since`, by the loop's clock."""
        idle = self._idle.get(origin, [])
        old = sum(line.idle_since <= since for line in idle)
        for line in idle[:old]:
            line.close()
        del idle[:old]
        if not idle:
            self._idle.pop(origin, None)


@functools.lru_cache(maxsize=256)  # few different URLs
def _parse_base_url(url: str) -> Base:
    """Parses a checked URL."""
    parts = urlsplit(url)
    scheme, host = parts.scheme, parts.hostname or ""
    port = parts.port or PORTS[scheme]
    named = f"[{host}]" if ":" in host else host
    return Base(url, Origin(scheme, host, port), parts.path, named if port == PORTS[scheme] else f"{named}:{port}")
