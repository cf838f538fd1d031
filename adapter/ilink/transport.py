"""Requests to iLink by the thousand: one connection pool for all bots, in which a parked poll costs next to nothing.

httpx's own pool is walked at every request and every answer, which with thousands of parked polls costs more than
everything else; a client per bot, which avoids that, costs ten times as much per request. So what is called for
each bot goes to aiohttp directly, prepared; `CONTRIBUTING.md` has the figures.
"""

from __future__ import annotations

import ssl
import urllib.request

import aiohttp
from yarl import URL

from adapter.errors import Temporary, Uncertain
from adapter.ilink.network import CheckedResolver
from adapter.ilink.protocol import Reply
from adapter.ilink.unpack import PackedBadly, Unpacker
from adapter.timing import AnsweredWithin

CONNECT_S = 10.0
KEPT_S = 20.0
"""An idle connection is kept for so long: shorter than what servers allow, so that no request meets a closing one."""


class Transport:
    """Exchanges one request for one answer, without following redirects, whatever the bot."""

    def __init__(self, *, tls: ssl.SSLContext, agent: str, max_answer_bytes: int, resolver: CheckedResolver) -> None:
        self._tls = tls
        self._resolver = resolver
        self._headers = {"User-Agent": agent, "Accept-Encoding": "gzip, deflate"}
        self._max_answer_bytes = max_answer_bytes
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def exchange(
        self, method: str, url: str, headers: dict[str, str], body: bytes, timeout_s: float, *, afresh: bool = False
    ) -> Reply:
        """`afresh`: over a connection of its own, to a name that is resolved anew.

        Raises TimeoutError, Temporary("network") (it did not leave), Uncertain (it left, or may have).
        """
        session = self._sessions.get(afresh) or self._open(afresh)
        try:
            async with (
                AnsweredWithin(timeout_s),
                session.request(
                    method, URL(url, encoded=True), headers=headers, data=body or None, allow_redirects=False
                ) as response,
            ):
                read = await self._read(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as exc:
            raise Temporary("network", type(exc).__name__) from exc
        except (aiohttp.ClientError, ValueError) as exc:  # ValueError: bytes that are no HTTP at all
            raise Uncertain("network", type(exc).__name__) from exc
        return Reply(response.status, response.headers, read)

    async def close(self) -> None:
        """Closes all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """Raises Uncertain("unreadable") for an answer that is too large, once unpacked, or cannot be unpacked."""
        try:
            unpacker = Unpacker(response.headers.get("Content-Encoding", ""), self._max_answer_bytes)
            chunks = []
            while chunk := await response.content.readany():
                chunks.append(unpacker.feed(chunk))
            unpacker.finish()
        except PackedBadly as exc:
            raise Uncertain("unreadable", str(exc)) from exc
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

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
            auto_decompress=False,  # a few bytes can stand for gigabytes: see Unpacker
            cookie_jar=aiohttp.DummyCookieJar(),  # iLink sets none, and bots must not share any
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=bool(urllib.request.getproxies()),  # looked for once: at every request it would cost as much
        )
        return session
