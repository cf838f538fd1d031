"""iLink's CDN over HTTP: downloads and uploads encrypted media in pieces, never a whole file in memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
import time
from collections.abc import Callable, Iterator

import httpx

from adapter.errors import AdapterError, Refused, Temporary, Unreadable
from adapter.ilink import protocol, urls
from adapter.ilink.cipher import BLOCK, KEY_BYTES, Decryption, Encryption, cipher_size
from adapter.ilink.client import ILink
from adapter.ilink.network import CONNECT_S, KEPT_S, CheckedNetwork, Resolver, with_checked_network
from adapter.ilink.unpack import PACKED, PLAIN, Oversized, Unpacker, UnpackFailed
from adapter.observability.metrics import Metrics
from adapter.ports import Account, MediaKind, MediaRef, Pieces, Uploaded

STALL_S = 30.0
"""A transfer ends when no byte has moved for this long."""
SLOWEST = 4096
"""Bytes a second. A transfer that is slower ends, apart from STALL_S for an upload and GRACE_S for a download: its
user waits for it, and other transfers for its slot."""
GRACE_S = 10.0
"""A message waits a minute for its media. In that time several slow downloads have to release their slots."""
TRANSFERS = 8
"""Concurrent transfers of a replica, for all users. Each takes CPU time, and more would delay messages."""
ATTEMPTS = 3
PIECE = 64 * 1024
PARAM = "x-encrypted-param"

Read = Callable[[], Pieces]


class CdnClient:
    """Implements ports.Cdn."""

    def __init__(
        self,
        ilink: ILink,
        metrics: Metrics,
        *,
        base_url: str,
        allowed_hosts: tuple[str, ...],
        max_bytes: int,
        stall_s: float = STALL_S,
        grace_s: float = GRACE_S,
        network: CheckedNetwork | None = None,
    ) -> None:
        self._ilink = ilink
        self._metrics = metrics
        self._base_url = base_url
        self._allowed_hosts = allowed_hosts
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._grace_s = grace_s
        transport = httpx.AsyncHTTPTransport(  # no proxy: the environment's proxies are for iLink's API
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=TRANSFERS, keepalive_expiry=KEPT_S),
        )
        self._client = httpx.AsyncClient(
            transport=with_checked_network(transport, network or CheckedNetwork(Resolver(allowed_hosts), fresh=True)),
            timeout=httpx.Timeout(stall_s, connect=CONNECT_S),
            follow_redirects=False,
            trust_env=False,
            # compression is not requested: a small answer must not unpack into a huge one
            headers={"User-Agent": protocol.AGENT, "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def download(self, fetch: MediaRef) -> Pieces:
        url = self._download_url(fetch)
        with self._counted_transfer("in") as moved:
            async with contextlib.aclosing(self._decrypt_pieces(url, fetch.key)) as pieces:
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
        key, filekey = secrets.token_bytes(KEY_BYTES), secrets.token_hex(16)
        with self._counted_transfer("out") as moved:
            url = await self._ilink.upload_url(
                account,
                user=user,
                kind=kind,
                size=size,
                md5=md5,
                filekey=filekey,
                key=key,
                cdn_base_url=self._base_url,
            )
            try:
                urls.check_link(url, self._allowed_hosts)
            except Refused as exc:
                raise Refused("media", f"iLink gave an upload URL that is not allowed. {exc.detail}") from None
            reference = await self._post(url, key, size, read)
            moved[0] = size
        return Uploaded(kind, name, size, cipher_size(size), reference, key)

    # down -------------------------------------------------------------------------------------------

    def _download_url(self, fetch: MediaRef) -> str:
        """Raises Refused("reference")."""
        if not fetch.url and not fetch.reference:
            raise Refused("reference", "iLink gave neither a URL nor a reference.")
        try:
            url = fetch.url or protocol.download_url(self._base_url, fetch.reference)
            return urls.check_link(url, self._allowed_hosts)
        except Refused as exc:
            raise Refused("reference", exc.detail) from None

    async def _decrypt_pieces(self, url: str, key: bytes | None) -> Pieces:
        async with contextlib.aclosing(self._fetch_pieces(url, encrypted=key is not None)) as pieces:
            if key is None:
                async for piece in pieces:
                    yield piece
                return
            work = Decryption(key)
            async for piece in pieces:
                yield work.update(piece)
            yield work.finish()

    async def _fetch_pieces(self, url: str, *, encrypted: bool) -> Pieces:
        with self._counted_request("cdn_download"):
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._grace_s):
                    response = await stack.enter_async_context(self._client.stream("GET", url))
                if response.status_code == 429 or response.status_code >= 500:
                    reason = "http_5xx" if response.status_code >= 500 else "http_4xx"
                    raise Temporary(reason, f"HTTP {response.status_code} from the CDN")
                encoding = response.headers.get("content-encoding", "").strip().lower()
                if response.status_code != 200 or encoding not in (*PLAIN, *PACKED):
                    raise Refused("unavailable", f"HTTP {response.status_code} from the CDN")
                if encoding in PACKED:
                    async with contextlib.aclosing(
                        self._unpack_pieces(response, encoding, encrypted=encrypted)
                    ) as pieces:
                        async for piece in pieces:
                            yield piece
                    return
                if "transfer-encoding" not in response.headers:  # chunks override it (RFC 9112, 6.3)
                    self._check_length(response.headers.get("content-length", ""), encrypted=encrypted)
                async with contextlib.aclosing(self._body_pieces(response)) as pieces:
                    async for piece in pieces:
                        yield piece

    async def _body_pieces(self, response: httpx.Response) -> Pieces:
        """The body as it arrives. Raises TimeoutError. The consumer's time does not count."""
        clock = asyncio.get_running_loop().time
        pieces, size, waited_s = response.aiter_raw(), 0, 0.0
        while True:
            began = clock()
            async with asyncio.timeout(_transfer_timeout_s(self._grace_s, size) - waited_s):
                piece = await anext(pieces, b"")
            if not piece:
                return
            waited_s += clock() - began
            size += len(piece)
            yield piece

    async def _unpack_pieces(self, response: httpx.Response, encoding: str, *, encrypted: bool) -> Pieces:
        """The body of an answer that is compressed although that was not requested."""
        unpacker = Unpacker(encoding, self._max_body_bytes(encrypted=encrypted))
        try:
            async with contextlib.aclosing(self._body_pieces(response)) as received:
                async for packed in received:
                    for piece in unpacker.unpack(packed, PIECE):
                        yield piece
            unpacker.finish()
        except Oversized:
            raise self._too_large() from None
        except UnpackFailed as exc:
            raise Refused("corrupt", str(exc)) from None

    def _check_length(self, length: str, *, encrypted: bool) -> None:
        if not (length.isascii() and length.isdigit()):
            return  # unknown: the bytes are counted as they arrive
        if int(length) > self._max_body_bytes(encrypted=encrypted):
            raise self._too_large()
        if encrypted and int(length) % BLOCK:
            raise Refused("corrupt", f"The media cannot be decrypted: {length} bytes are no whole blocks.")

    def _max_body_bytes(self, *, encrypted: bool) -> int:
        return cipher_size(self._max_bytes) if encrypted else self._max_bytes

    def _too_large(self) -> Refused:
        return Refused("too_large", f"The media exceed {self._max_bytes} bytes.")

    # up ---------------------------------------------------------------------------------------------

    async def _post(self, url: str, key: bytes, size: int, read: Read) -> str:
        """Uploads and returns the reference. Retries without pauses, as the official client does."""
        failures = 0
        while True:
            try:
                return await self._post_once(url, key, size, read)
            except Temporary as exc:
                if exc.reason == SOURCE:
                    raise
                failures += 1
                if failures == ATTEMPTS:
                    detail = f"The upload failed {ATTEMPTS} times, at last: {exc.detail}"
                    raise Refused("media", detail) from exc

    async def _post_once(self, url: str, key: bytes, size: int, read: Read) -> str:
        headers = {
            "Content-Type": "application/octet-stream",
            # h11 checks the body against it, httpx then sends no chunks, and the CDN compares it with `filesize`
            "Content-Length": str(cipher_size(size)),
        }
        with self._counted_request("cdn_upload"):
            body = _encrypt_pieces(read, key, size)
            async with (
                asyncio.timeout(_transfer_timeout_s(self._stall_s, size)),
                contextlib.aclosing(body),
                self._client.stream("POST", url, headers=headers, content=body) as response,
            ):
                status, reference = response.status_code, str(response.headers.get(PARAM, ""))
                if 400 <= status < 500:
                    raise protocol.cdn_refusal(status, dict(response.headers))
                if status != 200:
                    reason = "http_5xx" if status >= 500 else "unreadable"
                    raise Temporary(reason, f"HTTP {status} from the CDN")
                if not reference:
                    raise Temporary("unreadable", f"The CDN answered success without {PARAM}.")
        return reference

    # counting ---------------------------------------------------------------------------------------

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
        """Counts one request, and turns httpx's errors into Temporary."""
        started, outcome = time.monotonic(), "network"
        try:
            yield
            outcome = "ok"
        except httpx.TimeoutException as exc:
            outcome = "timeout"
            raise Temporary("timeout", f"{type(exc).__name__}: nothing moved") from exc
        except TimeoutError as exc:
            outcome = "timeout"
            raise Temporary("timeout", "it took too long") from exc
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as exc:
            raise Temporary("network", type(exc).__name__) from exc
        except AdapterError as exc:
            outcome = _outcome_label(exc)
            raise
        finally:
            self._metrics.upstream_requests.labels(endpoint=endpoint, outcome=outcome).inc()
            took_s = time.monotonic() - started
            self._metrics.upstream_request_duration.labels(endpoint=endpoint).observe(took_s)


SOURCE = "source"
"""Reason of an error that is the source's, not the CDN's."""


async def _encrypt_pieces(read: Read, key: bytes, size: int) -> Pieces:
    """The body of an upload. Raises Temporary("source"), Refused("media") if the source differs from what was
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
    except Temporary as exc:
        raise Temporary(SOURCE, exc.detail or exc.reason) from exc
    except Unreadable as exc:
        raise Refused("media", f"The media cannot be read: {exc.detail}") from exc
    if remaining:
        raise Refused("media", f"The media have not the announced size of {size} bytes.")
    yield work.finish()


def _transfer_timeout_s(grace_s: float, size: int) -> float:
    """Longest time for a transfer of `size` bytes."""
    return grace_s + size / SLOWEST


def _outcome_label(exc: AdapterError) -> str:
    match exc:
        case Refused(reason="unavailable" | "media"):
            return "http_4xx"
        case Temporary(reason="http_4xx" | "http_5xx" | "unreadable"):
            return exc.reason
        case _:
            return "unreadable"
