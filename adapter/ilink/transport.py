"""Exchanges requests with iLink over kept connections, shared by all bots.

`HotCalls` and `PlainCalls` say what a connection is. Here is what both have in common: which one a request goes
over, when one is closed, and what is asked once more.
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
"""What ends sooner without an answer, over a connection that was kept: the server had closed it when the
request came. Some close after each answer, and announce it in none."""
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": AGENT, "Accept": "*/*", "Accept-Encoding": "gzip, deflate"}
"""Of every request."""


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    host: str
    port: int


class Base(NamedTuple):
    """A base URL, taken apart."""

    url: str
    origin: Origin
    path: str
    host: str
    """The header."""


class Line(Protocol):
    """What requests go over, one after the other."""

    idle_since: float
    """When its last answer ended, by the loop's clock."""

    @property
    def is_usable(self) -> bool:
        """Whether the next request may go over it."""

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come in answer to the last request, or no whole head of an answer."""

    @property
    def tls(self) -> ssl.SSLObject | None:
        """That of the connection, once it stands."""

    def close(self) -> None:
        """Closes it, at once or soon."""


L = TypeVar("L", bound=Line)


class Transport(ABC, Generic[L]):
    """Exchanges a request for its answer. Follows no redirects, and keeps no cookies."""

    def __init__(self, *, tls: ResumingContext, budget: ByteBudget) -> None:
        self._tls = tls
        self._budget = budget
        self._idle: dict[Origin, list[L]] = {}
        """The one that was used last is used first, so that those that are not needed grow old and are closed."""
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
        """`fresh`: over a connection of its own, to a name that is resolved anew. `check`: see ports.Chat.

        A repeatable request that met a stale connection is sent once more, over a fresh connection.
        Cancelled once the answer is there, it works on that for a moment more: see budget.GRACE_S.
        Raises TimeoutError, Temporary("network") (it did not leave), Uncertain (it left, or may have).
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
            self._close_idle(base.origin, began)  # it may be as dead, and a repeat is to meet another
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
        """Closes all connections that are kept."""
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
        """The answer, packed as it came. Calls `check` before the request leaves. Raises as `exchange`."""

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
        """Closes what was not used for long."""
        loop = asyncio.get_running_loop()
        self._cleanup_timer = None
        for origin in list(self._idle):
            self._close_idle(origin, loop.time() - KEPT_S)
        if self._idle:
            self._cleanup_timer = loop.call_later(KEPT_S / 4, self._close_unused)

    def _close_idle(self, origin: Origin, since: float) -> None:
        """Closes what was not used after `since`, by the loop's clock."""
        idle = self._idle.get(origin, [])
        old = sum(line.idle_since <= since for line in idle)
        for line in idle[:old]:
            line.close()
        del idle[:old]
        if not idle:
            self._idle.pop(origin, None)


@functools.lru_cache(maxsize=256)  # the same few at every request
def _parse_base_url(url: str) -> Base:
    """Takes a URL apart that was checked."""
    parts = urlsplit(url)
    scheme, host = parts.scheme, parts.hostname or ""
    port = parts.port or PORTS[scheme]
    named = f"[{host}]" if ":" in host else host
    return Base(url, Origin(scheme, host, port), parts.path, named if port == PORTS[scheme] else f"{named}:{port}")
