"""iLink's calls through an HTTP proxy, by aiohttp, which can ask one for a tunnel.

Three times the cost per call of `transport`'s own connections, which only users of a proxy pay.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

import aiohttp
from yarl import URL

from adapter.errors import Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget, Share
from adapter.ilink.network import CONNECT_S, KEPT_S, CheckedResolver
from adapter.ilink.protocol import AGENT, Reply, Request
from adapter.timing import AnsweredWithin

HEAD_BYTES = 65_536
"""Longest line of an answer's head that is read."""


class Proxied:
    """As Transport, through a proxy."""

    def __init__(self, *, tls: ssl.SSLContext, budget: ByteBudget, resolver: CheckedResolver) -> None:
        self._tls = tls
        self._resolver = resolver
        self._headers = {"User-Agent": AGENT, "Accept-Encoding": "gzip, deflate"}
        self._budget = budget
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def exchange(
        self,
        base_url: str,
        request: Request,
        timeout_s: float,
        *,
        afresh: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Reply:
        """See Transport.exchange. aiohttp connects and asks in one: a check comes before both. The time that
        a large answer waits for its share of the budget counts."""
        if check is not None:
            check()
        session = self._sessions.get(afresh) or self._open(afresh)
        try:
            async with (
                AnsweredWithin(timeout_s),
                session.request(
                    request.method,
                    URL(base_url + request.path, encoded=True),
                    headers=request.headers,
                    data=request.body or None,
                    allow_redirects=False,
                ) as response,
            ):
                body, share = await self._read(response, request.largest)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as exc:
            raise Temporary("network", type(exc).__name__) from exc
        except (aiohttp.ClientError, ValueError) as exc:  # ValueError: bytes that are no HTTP at all
            raise Uncertain("network", type(exc).__name__) from exc
        headers = {name.lower(): value for name, value in response.headers.items()}
        return await self._budget.unpack(Reply(response.status, headers, body, share=share), request.largest)

    async def close(self) -> None:
        """Closes all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _read(self, response: aiohttp.ClientResponse, most: int) -> tuple[bytes, Share | None]:
        """Raises Uncertain("unreadable") for an answer that is too large."""
        read, share = bytearray(), None
        try:
            while chunk := await response.content.readany():
                read += chunk
                if len(read) > most:
                    raise Uncertain("unreadable", f"the answer exceeds {most} bytes")
                if share is None and len(read) > SMALL:
                    share = await self._budget.take(most * (2 if "Content-Encoding" in response.headers else 1))
        except BaseException:
            if share is not None:
                share.release()
            raise
        return bytes(read), share

    def _open(self, afresh: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            ssl=self._tls,
            limit=0,
            use_dns_cache=not afresh,
            resolver=self._resolver,
            **({"force_close": True} if afresh else {"keepalive_timeout": KEPT_S}),
        )
        session = self._sessions[afresh] = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            max_line_size=HEAD_BYTES,  # as connection does; what aiohttp takes by itself, cookies alone can exceed
            max_field_size=HEAD_BYTES,
            auto_decompress=False,  # a few bytes can stand for gigabytes: see Unpacker
            cookie_jar=aiohttp.DummyCookieJar(),  # iLink sets none, and bots must not share any
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=True,
        )
        return session
