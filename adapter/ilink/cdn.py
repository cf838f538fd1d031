"""iLink's CDN over HTTP: downloads and uploads encrypted media in pieces, never a whole file in memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx

from adapter.errors import Refused, Temporary, Unreadable
from adapter.ilink import protocol
from adapter.ilink.cipher import BLOCK, KEY_BYTES, Decryption, Encryption, cipher_size
from adapter.ilink.client import CountedCall, ILink, answered
from adapter.ilink.network import CONNECT_S, NEXT_S, PORTS, Proxy, Resolver, check_link, proxy_of
from adapter.ports import Account, MediaKind, MediaRef, Pieces, Read, Uploaded
from adapter.tools.metrics import Metrics

STALL_S = 30.0
"""A transfer ends when no byte has moved for this long."""
SLOWEST = 4096
"""Bytes a second. A transfer that is slower ends, apart from STALL_S: its user waits for it, and other transfers for
its slot."""
TRANSFERS = 8
"""Concurrent transfers of a replica, for all users. Each takes CPU time, and more would delay messages."""
ATTEMPTS = 3
PARAM = "x-encrypted-param"
HEADERS = {"User-Agent": protocol.AGENT, "Accept": "*/*"}


class CdnClient:
    """Implements ports.Cdn. Each transfer has a connection of its own, through the proxy that iLink's calls take."""

    def __init__(
        self,
        ilink: ILink,
        metrics: Metrics,
        *,
        base_url: str,
        allowed_hosts: tuple[str, ...],
        max_bytes: int,
        stall_s: float = STALL_S,
        resolver: Resolver | None = None,
    ) -> None:
        self._ilink = ilink
        self._metrics = metrics
        self._base_url = base_url
        self._allowed_hosts = allowed_hosts
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._resolver = resolver or Resolver(allowed_hosts)
        self._tls = ssl.create_default_context()
        self._transports: dict[Proxy | None, httpx.AsyncHTTPTransport] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for transport in self._transports.values():
            await transport.aclose()

    async def download(self, fetch: MediaRef) -> Pieces:
        if not fetch.url and not fetch.reference:
            raise Refused("reference", "iLink gave neither a URL nor a reference.")
        try:
            url = fetch.url or protocol.download_url(self._base_url, fetch.reference)
            check_link(url, self._allowed_hosts)
        except Refused as exc:
            raise Refused("reference", exc.detail) from None
        with self._counted_transfer("in") as moved:
            async with (
                contextlib.aclosing(self._fetch_pieces(url, encrypted=fetch.key is not None)) as fetched,
                contextlib.aclosing(_decrypt_pieces(fetched, fetch.key)) as pieces,
            ):
                async for piece in pieces:
                    moved[0] += len(piece)
                    if moved[0] > self._max_bytes:
                        raise self._too_large()
                    if piece:
                        yield piece

    async def upload(
        self, account: Account, *, user: str, kind: MediaKind, name: str, size: int, md5: str, read: Read
    ) -> Uploaded:
        if size > self._max_bytes:
            raise Refused("media", f"The media exceed {self._max_bytes} bytes.")
        key = secrets.token_bytes(KEY_BYTES)
        upload = protocol.Upload(user, kind, size, md5, secrets.token_hex(16), key)
        with self._counted_transfer("out") as moved:
            url = await self._ilink.upload_url(account, upload, self._base_url)
            try:
                check_link(url, self._allowed_hosts)
            except Refused as exc:
                raise Refused("media", f"iLink gave an upload URL that is not allowed. {exc.detail}") from None
            reference = await self._post(url, key, size, read)
            moved[0] = size
        return Uploaded(kind, name, size, cipher_size(size), reference, key)

    async def _fetch_pieces(self, url: str, *, encrypted: bool) -> Pieces:
        """The body as it arrives. The time of the consumer does not count."""
        clock = asyncio.get_running_loop().time
        size, waited_s = 0, 0.0
        with self._counted_request("cdn_download"):
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._stall_s):
                    # compression is not requested: a small answer must not unpack into a huge one
                    headers = {**HEADERS, "Accept-Encoding": "identity"}
                    response = await stack.enter_async_context(self._exchange("GET", url, headers))
                self._check_head(response, encrypted=encrypted)
                pieces = response.aiter_raw()
                while True:
                    began = clock()
                    async with asyncio.timeout(self._longest_s(size) - waited_s):
                        piece = await anext(pieces, b"")
                    if not piece:
                        return
                    waited_s += clock() - began
                    size += len(piece)
                    yield piece

    def _check_head(self, response: httpx.Response, *, encrypted: bool) -> None:
        """Raises Temporary, Refused."""
        status, headers = response.status_code, response.headers
        if status == 429 or status >= 500:
            raise Temporary("http_5xx" if status >= 500 else "http_4xx", f"HTTP {status} from the CDN")
        if status != 200 or headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise Refused("unavailable", f"HTTP {status} from the CDN")
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return  # unknown (RFC 9112, 6.3): the bytes are counted as they arrive
        if int(length) > (cipher_size(self._max_bytes) if encrypted else self._max_bytes):
            raise self._too_large()
        if encrypted and int(length) % BLOCK:
            raise Refused("corrupt", f"The media cannot be decrypted: {length} bytes are no whole blocks.")

    def _too_large(self) -> Refused:
        return Refused("too_large", f"The media exceed {self._max_bytes} bytes.")

    async def _post(self, url: str, key: bytes, size: int, read: Read) -> str:
        """Uploads and returns the reference. Without a usable answer it is tried again without pauses, as by the
        official client. Any other failure is the caller's to try again, by a new URL."""
        failures = 0
        while True:
            try:
                return await self._post_once(url, key, size, read)
            except Temporary as exc:
                failures += 1
                if exc.reason != "unreadable":
                    raise
                if failures == ATTEMPTS:
                    detail = f"The upload failed {ATTEMPTS} times, at last: {exc.detail}"
                    raise Refused("media", detail) from exc

    async def _post_once(self, url: str, key: bytes, size: int, read: Read) -> str:
        asked = {
            **HEADERS,
            "Content-Type": "application/octet-stream",
            # h11 checks the body against it, httpx then sends no chunks, and the CDN compares it with `filesize`
            "Content-Length": str(cipher_size(size)),
        }
        with self._counted_request("cdn_upload"):
            body = _encrypt_pieces(read, key, size)
            async with (
                asyncio.timeout(self._longest_s(size)),
                contextlib.aclosing(body),
                self._exchange("POST", url, asked, body) as response,
            ):
                status, headers = response.status_code, response.headers
            with answered(status):
                if 400 <= status < 500:
                    raise protocol.cdn_refusal(status, headers)
                if status != 200:
                    raise Temporary("http_5xx" if status >= 500 else "unreadable", f"HTTP {status} from the CDN")
                if not headers.get(PARAM):
                    raise Temporary("unreadable", f"The CDN answered success without {PARAM}.")
            return headers[PARAM]

    def _longest_s(self, size: int) -> float:
        """Longest time for a transfer of `size` bytes."""
        return self._stall_s + size / SLOWEST

    @contextlib.asynccontextmanager
    async def _exchange(
        self, method: str, url: str, headers: dict[str, str], content: Pieces | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer of an address that was checked, its body unread. The request still names the host."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        proxy = proxy_of(f"{parts.scheme}://{parts.netloc}")
        # a proxy resolves the name itself
        *others, last = [host] if proxy else await self._resolver.addresses(host, port)
        for address in (*others, last):
            connect_s = CONNECT_S if address == last else NEXT_S
            timeout = {"connect": connect_s, "read": self._stall_s, "write": self._stall_s}
            request = httpx.Request(
                method,
                httpx.URL(url).copy_with(host=address),
                headers={"Host": parts.netloc, **headers},
                content=content,
                extensions={"timeout": timeout, "sni_hostname": None if proxy else host},
            )
            try:
                response = await self._transport(proxy).handle_async_request(request)
                break
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if address == last:
                    raise
        try:
            yield response
        finally:
            await response.aclose()

    def _transport(self, proxy: Proxy | None) -> httpx.AsyncHTTPTransport:
        """No client of httpx, which would keep cookies, follow redirects and unpack."""
        if proxy not in self._transports:
            tls = self._tls if proxy and proxy.scheme == "https" else None
            through = httpx.Proxy(proxy.url, ssl_context=tls) if proxy else None
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._transports[proxy] = httpx.AsyncHTTPTransport(
                verify=self._tls, trust_env=False, limits=limits, proxy=through
            )
        return self._transports[proxy]

    @contextlib.contextmanager
    def _counted_transfer(self, direction: str) -> Iterator[list[int]]:
        """Counts one transfer. The list holds the number of plain bytes."""
        metrics, started, moved, outcome = self._metrics, time.monotonic(), [0], "failed"
        try:
            yield moved
            outcome = "ok"
            metrics.media_bytes.labels(direction=direction).inc(moved[0])
        finally:
            metrics.media_transfers.labels(direction=direction, outcome=outcome).inc()
            metrics.media_duration.labels(direction=direction).observe(time.monotonic() - started)

    @contextlib.contextmanager
    def _counted_request(self, endpoint: str) -> Iterator[None]:
        """Counts one request, and turns httpx' errors into Temporary."""
        with CountedCall(self._metrics, endpoint):
            try:
                yield
            except (httpx.TimeoutException, TimeoutError) as exc:
                raise Temporary("timeout", f"{type(exc).__name__}: it took too long") from exc
            except (httpx.TransportError, OSError) as exc:
                raise Temporary("network", type(exc).__name__) from exc


async def _decrypt_pieces(pieces: Pieces, key: bytes | None) -> Pieces:
    work = Decryption(key) if key is not None else None
    async for piece in pieces:
        yield work.update(piece) if work else piece
    if work:
        yield work.finish()


async def _encrypt_pieces(read: Read, key: bytes, size: int) -> Pieces:
    """The body of an upload. Raises what the source raises, and Refused("media") if that differs from what was
    announced."""
    work, remaining = Encryption(key), size
    try:
        async with contextlib.aclosing(read()) as pieces:
            async for piece in pieces:
                remaining -= len(piece)
                if remaining < 0:
                    break
                if cipher := work.update(piece):
                    yield cipher
    except Unreadable as exc:
        raise Refused("media", f"The media cannot be read: {exc.detail}") from exc
    if remaining:
        raise Refused("media", f"The media have not the announced size of {size} bytes.")
    yield work.finish()
