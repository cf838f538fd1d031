"""Calls to iLink over httpx: all except the hot ones, and those through a proxy.

httpx walks its whole pool at every request. Each connection is therefore a pool of its own, and `transport` keeps the
idle ones: ten thousand notifications or parked polls cost ten thousand times one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import httpcore
import httpx
import structlog

from adapter.errors import Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget, Share
from adapter.ilink.network import KEPT_S, TLS_S, CheckedNetwork, Resolver, has_more, proxy_of, with_checked_network
from adapter.ilink.protocol import Reply, Request
from adapter.ilink.tls import ResumingContext
from adapter.ilink.transport import HEADERS, Base, Transport
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import TolerantTimeout

log = structlog.get_logger()

PIECES = 64
"""Pieces of an answer after which the event loop gets a turn, since a server may send one byte at a time."""


class Line:
    """A connection of httpx, opened for its first request, and reopened if the server has closed it."""

    def __init__(self, transport: httpx.AsyncHTTPTransport, budget: ByteBudget, closing: TaskSet) -> None:
        self._transport = transport
        self._budget = budget
        self._closing = closing
        self._check: Callable[[], None] | None = None
        self._remaining = False
        """Whether a byte of the last request may have been sent."""
        self._stream: httpcore.AsyncNetworkStream | None = None
        self.is_usable = True
        self.is_silent = True
        self.tls: ssl.SSLObject | None = None
        self.idle_since = 0.0

    async def send_request(
        self, url: str, request: Request, timeout_s: float, check: Callable[[], None] | None
    ) -> Reply:
        """Connects if necessary, sends the request and reads the answer. The wait of a large answer for its share of
        the budget counts. Raises as Transport.exchange."""
        self._check, self._remaining, self.is_silent = check, False, True
        try:
            async with TolerantTimeout(timeout_s):
                return await self._stream_request(url, request)
        except TimeoutError as exc:
            if self._remaining:
                raise
            raise Temporary("network", "TimeoutError") from exc
        except httpx.LocalProtocolError as exc:  # not valid HTTP: nothing was written
            raise Temporary("network", type(exc).__name__) from exc
        # OSError: from TLS, which anyio lets through
        except (httpx.TransportError, httpx.InvalidURL, OSError) as exc:
            raise (Uncertain if self._remaining else Temporary)("network", type(exc).__name__) from exc
        finally:
            self._check = None
            self.idle_since = asyncio.get_running_loop().time()

    def close(self) -> None:
        """Closes the connection in the background."""
        self.is_usable = False
        self._closing.spawn(self._close())

    async def _stream_request(self, url: str, request: Request) -> Reply:
        headers = {name.encode(): value.encode() for name, value in (HEADERS | request.headers).items()}
        extensions = {"timeout": {"connect": TLS_S}, "trace": self._on_trace_event}
        http_request = httpx.Request(
            request.method, url, headers=headers, content=request.body or None, extensions=extensions
        )
        response = await self._transport.handle_async_request(http_request)
        self.is_silent = False
        self.tls = response.extensions["network_stream"].get_extra_info("ssl_object")
        try:
            body, share = await self._read(response, request.largest)
            self.is_usable = not has_more(response)
        finally:
            await response.aclose()
        return Reply(response.status_code, dict(response.headers), body, share=share)

    async def _read(self, response: httpx.Response, limit: int) -> tuple[bytes, Share | None]:
        """Raises Uncertain("unreadable") if the answer is too large."""
        read, share, pieces = bytearray(), None, 0
        try:
            async for piece in response.aiter_raw():
                read += piece
                if len(read) > limit:
                    raise Uncertain("unreadable", f"the answer exceeds {limit} bytes")
                if share is None and len(read) > SMALL:
                    share = await self._budget.reserve(limit * (2 if "content-encoding" in response.headers else 1))
                pieces += 1
                if pieces % PIECES == 0:
                    await asyncio.sleep(0)
        except BaseException:
            if share is not None:
                share.release()
            raise
        return bytes(read), share

    async def _on_trace_event(self, event: str, about: dict[str, Any]) -> None:
        """Records the progress of the request, as httpcore reports it."""
        if event == "connection.connect_tcp.complete":
            self._stream = about["return_value"]
        elif event == "http11.send_request_headers.started" and about["request"].method != b"CONNECT":
            if self._check is not None:
                self._check()
            self._remaining = True

    async def _close(self) -> None:
        await self._transport.aclose()
        if self._stream is not None:  # httpcore leaks one whose TLS handshake is cancelled
            await self._stream.aclose()


class PlainCalls(Transport[Line]):
    """Any request, through the proxy in the environment if there is one."""

    def __init__(self, *, tls: ResumingContext, budget: ByteBudget, resolver: Resolver) -> None:
        super().__init__(tls=tls, budget=budget)
        self._networks = {fresh: CheckedNetwork(resolver, fresh=fresh) for fresh in (False, True)}
        self._closing = TaskSet(_not_closed)

    async def close(self) -> None:
        await super().close()
        await self._closing.wait_ended()

    async def _open(self, base: Base, timeout_s: float, *, fresh: bool) -> Line:
        """Makes a connection object; it connects with its first request."""
        transport = httpx.AsyncHTTPTransport(
            verify=self._tls,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=KEPT_S),
            proxy=self._proxy(proxy_of(base.url)),
        )
        return Line(with_checked_network(transport, self._networks[fresh]), self._budget, self._closing)

    def _proxy(self, url: str) -> httpx.Proxy | None:
        """Raises Temporary."""
        scheme = url.partition("://")[0]
        if scheme not in ("", "http", "https"):
            raise Temporary("network", f"a proxy that speaks {scheme!r} cannot be used")
        try:
            return httpx.Proxy(url, ssl_context=self._tls if scheme == "https" else None) if url else None
        except httpx.InvalidURL as exc:
            raise Temporary("network", "the URL of the proxy cannot be read") from exc

    def _send_request(
        self,
        line: Line,
        base: Base,
        request: Request,
        timeout_s: float,
        check: Callable[[], None] | None,
        *,
        fresh: bool,
    ) -> Awaitable[Reply]:
        return line.send_request(base.url + request.path, request, timeout_s, check)


def _not_closed(exc: BaseException) -> None:
    log.warning("connection.not_closed", detail=type(exc).__name__)
