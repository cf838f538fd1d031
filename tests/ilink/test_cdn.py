"""Media to and from the CDN, over real sockets: the simulator's, and servers that misbehave in ways of their own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from adapter.errors import AdapterError, Refused, SessionExpired, Temporary, Unreadable
from adapter.ilink.cdn import SLOWEST, CdnClient
from adapter.ilink.cipher import cipher_size, read_key
from adapter.ilink.client import ILink
from adapter.ports import Account, MediaKind, MediaRef, Pieces, Uploaded
from adapter.simulator import BotRecord, FaultRule, Simulator, SimulatorSettings
from adapter.simulator.aes import encrypt
from adapter.tools.metrics import Metrics

KEY = bytes(range(16))
HELLO = b"Hello, iLink!\n"
LARGEST = 300_000
KINDS: list[MediaKind] = ["image", "video", "file"]


class Rig:
    """The simulator, one bot whose user has spoken, and our client."""

    def __init__(self, sim: Simulator, **changes: Any) -> None:
        self.sim = sim
        self.bot: BotRecord = sim.add_bot()
        self.account = Account(self.bot.bot, self.bot.token, sim.url)
        self.metrics = Metrics()
        host = sim.url.removeprefix("http://")
        self.ilink = ILink(
            self.metrics,
            default_base_url=sim.url,
            allowed_hosts=(host,),
            poll_margin_s=1.0,
            send_timeout_s=10.0,
        )
        options: dict[str, Any] = {
            "base_url": sim.cdn_url,
            "allowed_hosts": (host,),
            "max_bytes": LARGEST,
        } | changes
        self.cdn = CdnClient(self.ilink, self.metrics, **options)

    async def close(self) -> None:
        await self.ilink.close()
        await self.cdn.close()

    async def receive(self, kind: str, content: bytes, **fields: Any) -> MediaRef:
        """A medium of the user, as the poll brings it."""
        self.sim.say_media(self.bot.user, kind, content, **fields)
        polled = await self.ilink.poll(self.account, "", 1000)
        assert polled is not None
        payload = msgspec.json.decode(polled.messages[-1])["item_list"][0][f"{kind}_item"]
        media = payload["media"]
        key = read_key(media.get("aes_key"), payload.get("aeskey"))
        return MediaRef(0, media.get("full_url", ""), media.get("encrypt_query_param", ""), key, "")

    async def upload(self, content: bytes, kind: MediaKind = "file", **changes: Any) -> Uploaded:
        given: dict[str, Any] = {
            "user": self.bot.user,
            "kind": kind,
            "name": "a.bin",
            "size": len(content),
            "md5": hashlib.md5(content).hexdigest(),
            "read": source(content),
        } | changes
        return await self.cdn.upload(self.account, **given)

    def requests(self, endpoint: str, outcome: str) -> float:
        return self.metrics.value("upstream_requests_total", endpoint=endpoint, outcome=outcome)

    def transfers(self, direction: str, outcome: str) -> float:
        return self.metrics.value("media_transfers_total", direction=direction, outcome=outcome)


def source(content: bytes, piece: int = 70_001) -> Callable[[], Pieces]:
    async def read() -> Pieces:
        for start in range(0, len(content), piece):
            yield content[start : start + piece]

    return read


async def whole(pieces: Pieces) -> bytes:
    return b"".join([piece async for piece in pieces])


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Simulator(SimulatorSettings(hold_ms=50, seed=1, token_death_delay_s=0)) as sim:
        made = Rig(sim)
        sim.say(made.bot.user, "hello")
        yield made
        await made.close()
        assert not {
            kind for kind in sim.stats().violations if kind in ("token_on_cdn", "wrong_ciphertext", "wrong_upload")
        }


# down ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "voice", "file", "video"])
@pytest.mark.parametrize("key_form", ["usual", "hex", "raw_base64", "hex_base64", "none"])
async def test_media_of_every_kind_and_key_come_down(rig: Rig, kind: str, key_form: str) -> None:
    fetch = await rig.receive(kind, HELLO, key_form=key_form)
    assert await whole(rig.cdn.download(fetch)) == HELLO
    assert await whole(rig.cdn.download(fetch._replace(url=""))) == HELLO, "by reference"


@pytest.mark.parametrize("size", [0, 1, 16, 65_535, 65_536, LARGEST])
async def test_media_of_any_size_come_down(rig: Rig, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    assert await whole(rig.cdn.download(await rig.receive("file", content))) == content
    assert rig.metrics.value("media_bytes_total", direction="in") == size
    assert rig.transfers("in", "ok") == rig.requests("cdn_download", "ok") == 1
    assert rig.metrics.value("media_duration_seconds_count", direction="in") == 1


@pytest.mark.parametrize("key_form", ["usual", "none"])
async def test_media_above_the_limit_are_not_fetched(rig: Rig, key_form: str) -> None:
    fetch = await rig.receive("file", bytes(LARGEST + 1), key_form=key_form)
    assert await failure(whole(rig.cdn.download(fetch))) == (Refused, "too_large")
    assert rig.transfers("in", "failed") == 1


@pytest.mark.parametrize(
    ("params", "expected", "outcome"),
    [
        ({"status": 403}, (Refused, "unavailable"), "http_4xx"),
        ({"status": 404}, (Refused, "unavailable"), "http_4xx"),
        ({"status": 500}, (Temporary, "http_5xx"), "http_5xx"),
        ({"kind": "wrong_key"}, (Refused, "corrupt"), "ok"),
        ({"kind": "odd_length"}, (Refused, "corrupt"), "unreadable"),
    ],
)
async def test_f25_a_download_fails(
    rig: Rig, params: dict[str, Any], expected: tuple[type[AdapterError], str], outcome: str
) -> None:
    fetch = await rig.receive("file", HELLO)
    rig.sim.set_fault(FaultRule(fault="F25", params=params))
    assert await failure(whole(rig.cdn.download(fetch))) == expected
    assert rig.requests("cdn_download", outcome) == 1


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    """A server that does with a connection what it likes. Yields host:port."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()

    made = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{made.sockets[0].getsockname()[1]}"
    finally:
        made.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fetch_from(rig: Rig, serve: Serve, *, key: bytes | None = None, **changes: float) -> bytes:
    async with server(serve) as host:
        other = Rig(rig.sim, allowed_hosts=(host,), **changes)
        try:
            return await whole(other.cdn.download(MediaRef(0, f"http://{host}/c2c/download?x=1", "", key, "")))
        finally:
            await other.close()


def answering(head: str, *bodies: bytes, then: Callable[[], Awaitable[object]] | None = None) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        for body in bodies:
            writer.write(body)
            await writer.drain()
        if then is not None:
            await then()

    return serve


async def test_a_body_without_a_length_is_counted(rig: Rig) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            writer.write(bytes(10_000))
            await writer.drain()
            sent += 10_000

    assert await failure(fetch_from(rig, serve)) == (Refused, "too_large")
    assert await failure(fetch_from(rig, serve, key=KEY)) == (Refused, "too_large")
    assert sent < 100 * LARGEST, "it hung up"


async def test_a_length_beside_chunks_does_not_count(rig: Rig) -> None:
    """What packs answers on the way may leave the length of another body there."""
    cipher = encrypt(b"hello", KEY)
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(cipher), cipher)
    serve = answering("HTTP/1.1 200 OK\nContent-Length: 23\nTransfer-Encoding: chunked", chunk)
    assert await fetch_from(rig, serve, key=KEY) == b"hello"


async def test_a_body_that_breaks_off_is_tried_again_by_the_caller(rig: Rig) -> None:
    serve = answering("HTTP/1.1 200 OK\nContent-Length: 64", bytes(32))
    assert await failure(fetch_from(rig, serve)) == (Temporary, "network")


async def test_a_redirect_is_not_followed(rig: Rig) -> None:
    followed = asyncio.Event()

    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        followed.set()

    async with server(elsewhere) as host:
        serve = answering(f"HTTP/1.1 302 Found\nLocation: http://{host}/\nContent-Length: 0")
        assert await failure(fetch_from(rig, serve)) == (Refused, "unavailable")
    assert not followed.is_set()


async def test_bytes_that_are_said_not_to_be_packed_are_taken(rig: Rig) -> None:
    serve = answering("HTTP/1.1 200 OK\nContent-Encoding: Identity\nContent-Length: 5", b"plain")
    assert await fetch_from(rig, serve) == b"plain"


@pytest.mark.parametrize("encoding", ["gzip", "br"])
async def test_bytes_that_somebody_has_packed_on_the_way_are_no_media(rig: Rig, encoding: str) -> None:
    serve = answering(f"HTTP/1.1 200 OK\nContent-Encoding: {encoding}\nContent-Length: 5", b"bytes")
    assert await failure(fetch_from(rig, serve)) == (Refused, "unavailable")


async def test_a_stall_ends_a_download(rig: Rig) -> None:
    serve = answering("HTTP/1.1 200 OK\nContent-Length: 64", bytes(32), then=asyncio.Event().wait)
    assert await failure(fetch_from(rig, serve, stall_s=0.05)) == (Temporary, "timeout")


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nx-slow: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
async def test_a_download_that_comes_byte_by_byte_ends(rig: Rig, begun: bytes) -> None:
    """No pause is a stall, and the place is held for others."""
    sent, bytes_told = 0, 300

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begun)
        for _ in range(bytes_told):
            writer.write(b"a")
            await writer.drain()
            sent += 1
            await asyncio.sleep(0.01)

    assert await failure(fetch_from(rig, serve, stall_s=0.2)) == (Temporary, "timeout")
    assert sent < bytes_told


async def test_a_download_may_take_long_where_bytes_come_or_nobody_takes_them(rig: Rig) -> None:
    """What is bounded is the wait for the CDN, from the beginning on and in proportion to what came."""
    pieces, piece = 8, bytes(int(0.2 * SLOWEST))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(pieces):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    async with server(serve) as host:
        other = Rig(rig.sim, allowed_hosts=(host,), stall_s=0.5)
        came, began = 0, asyncio.get_running_loop().time()
        async for got in other.cdn.download(MediaRef(0, f"http://{host}/", "", None, "")):
            if not came:
                await asyncio.sleep(0.6 + pieces * 0.2)  # longer than all of it may take
            came += len(got)
        assert came == pieces * len(piece)
        assert asyncio.get_running_loop().time() > began + 0.5
        await other.close()


async def test_what_is_asked_of_the_cdn_names_no_bot(rig: Rig) -> None:
    """No iLink headers."""
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    assert await fetch_from(rig, serve) == b"ok"
    (head,) = heads
    assert head.startswith("get /c2c/download?x=1 http/1.1\r\n")
    names = {line.partition(":")[0] for line in head.splitlines()[1:] if line}
    assert names == {"host", "accept", "accept-encoding", "user-agent"}


async def test_a_download_that_is_closed_early_hangs_up(rig: Rig) -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(80_000))
        await writer.drain()
        await reader.read()
        gone.set()

    async with server(serve) as host:
        other = Rig(rig.sim, allowed_hosts=(host,))
        async with contextlib.aclosing(other.cdn.download(MediaRef(0, f"http://{host}/", "", None, ""))) as download:
            await anext(download)
        await asyncio.wait_for(gone.wait(), 20)
        assert other.transfers("in", "failed") == 1
        await other.close()


# up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upload_url", ["full_url", "param", "both"])
@pytest.mark.parametrize("kind", KINDS)
async def test_media_of_every_kind_appear_on_the_phone(rig: Rig, kind: MediaKind, upload_url: str) -> None:
    rig.sim.configure(upload_url=upload_url)
    media = await rig.upload(HELLO, kind)
    assert (media.kind, media.size, media.cipher_size) == (kind, 14, 16)
    accepted = await rig.ilink.send(
        rig.account,
        user=rig.bot.user,
        client_id="c-1",
        context_token=rig.sim.inbound(rig.bot.bot)[-1].context_token,
        content=media,
    )
    assert accepted.message_id
    (shown,) = rig.sim.phone(rig.bot.user)
    (seen,) = shown.media
    assert (seen.kind, seen.viewable, seen.size) == (kind, True, 14)
    assert seen.file_name == ("a.bin" if kind == "file" else "")
    assert rig.sim.stats().violations == {}


@pytest.mark.parametrize("size", [0, 1, 15, 16, 65_536, LARGEST])
async def test_media_of_any_size_go_up(rig: Rig, size: int) -> None:
    content = bytes(i % 253 for i in range(size))
    media = await rig.upload(content)
    assert rig.sim.media_content(media.reference) == content
    assert rig.metrics.value("media_bytes_total", direction="out") == size
    assert rig.transfers("out", "ok") == rig.requests("cdn_upload", "ok") == rig.requests("getuploadurl", "ok") == 1


async def test_every_upload_has_a_key_of_its_own(rig: Rig) -> None:
    assert len({(await rig.upload(HELLO)).key for _ in range(3)}) == 3


async def test_f24_a_refused_upload_is_not_repeated_and_says_why(rig: Rig) -> None:
    rig.sim.set_fault(FaultRule(fault="F24", params={"kind": "rejected"}))
    with pytest.raises(Refused) as caught:
        await rig.upload(HELLO)
    assert caught.value.reason == "media"
    assert caught.value.detail == "The CDN refused the upload: HTTP 400 -5102031 illegal content"
    assert caught.value.http_status == 400
    assert rig.requests("cdn_upload", "http_4xx") == 1
    assert rig.transfers("out", "failed") == 1


@pytest.mark.parametrize(
    ("kind", "expected", "status"),
    [("error", (Temporary, "http_5xx"), 500), ("down", (Temporary, "network"), 0)],
)
async def test_f24_an_upload_that_fails_is_the_callers_to_try_again_by_a_new_url(
    rig: Rig, kind: str, expected: tuple[type[AdapterError], str], status: int
) -> None:
    rig.sim.set_fault(FaultRule(fault="F24", count=1, params={"kind": kind}))
    with pytest.raises(expected[0]) as caught:
        await rig.upload(HELLO)
    assert (caught.value.reason, caught.value.http_status) == (expected[1], status)
    assert rig.requests("cdn_upload", expected[1]) == 1
    assert rig.sim.media_content((await rig.upload(HELLO)).reference) == HELLO


async def test_f24_an_upload_without_a_reference_is_tried_three_times(rig: Rig) -> None:
    rig.sim.set_fault(FaultRule(fault="F24", count=2, params={"kind": "no_header"}))
    media = await rig.upload(HELLO)
    assert rig.sim.media_content(media.reference) == HELLO
    assert (rig.requests("cdn_upload", "unreadable"), rig.requests("cdn_upload", "ok")) == (2, 1)

    rig.sim.set_fault(FaultRule(fault="F24", params={"kind": "no_header"}))
    assert await failure(rig.upload(HELLO)) == (Refused, "media")
    assert rig.requests("cdn_upload", "unreadable") == 5


async def test_a_stale_token_raises_session_expired(rig: Rig) -> None:
    rig.sim.kill_token(rig.bot.bot)
    assert await failure(rig.upload(HELLO)) == (SessionExpired, "needs_login")


async def test_a_medium_above_the_limit_is_not_announced(rig: Rig) -> None:
    assert await failure(rig.upload(b"", size=LARGEST + 1)) == (Refused, "media")
    assert rig.sim.calls(rig.bot.bot, "getuploadurl") == []


@pytest.mark.parametrize("size", [13, 15, 1000])
async def test_a_source_of_another_size_is_refused(rig: Rig, size: int) -> None:
    assert await failure(rig.upload(HELLO, size=size)) == (Refused, "media")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [(Temporary("bus_down"), (Temporary, "bus_down")), (Unreadable("object"), (Refused, "media"))],
)
async def test_a_source_that_fails_is_not_the_cdns_fault(
    rig: Rig, problem: AdapterError, expected: tuple[type[AdapterError], str]
) -> None:
    reads = 0

    async def read() -> Pieces:
        nonlocal reads
        reads += 1
        yield HELLO[:5]
        raise problem

    assert await failure(rig.upload(HELLO, read=read)) == expected
    assert reads == 1


async def test_the_body_has_its_length_and_no_chunks(rig: Rig) -> None:
    """The CDN compares the length with `filesize`."""
    content = bytes(200_000)
    heads, bodies = [], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        bodies.append(await reader.readexactly(cipher_size(len(content))))
        writer.write(b"HTTP/1.1 200 OK\r\nx-encrypted-param: REF\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with server(serve) as host:
        rig.sim.configure(upload_url="param")
        other = Rig(rig.sim, allowed_hosts=(host,), base_url=f"http://{host}/c2c")
        rig.sim.say(other.bot.user, "hello")
        media = await other.upload(content)
        await other.close()
    assert media.reference == "REF"
    assert bodies == [encrypt(content, media.key)]
    (head,) = heads
    assert head.startswith("post /c2c/upload?encrypted_query_param=")
    assert "\r\ncontent-length: 200016\r\n" in head
    assert "\r\ncontent-type: application/octet-stream\r\n" in head
    assert "transfer-encoding" not in head
    assert "authorization" not in head


async def test_an_upload_is_read_as_fast_as_it_is_sent(rig: Rig) -> None:
    """A server that takes nothing stops the source: the file is never in memory."""
    given = 0
    size = 64_000_000

    async def read() -> Pieces:
        nonlocal given
        while given < size:
            given += 64_000
            yield bytes(64_000)

    async with server(answering("", then=asyncio.Event().wait)) as host:
        rig.sim.configure(upload_url="param")
        other = Rig(rig.sim, allowed_hosts=(host,), base_url=f"http://{host}/c2c", max_bytes=size, stall_s=0.2)
        rig.sim.say(other.bot.user, "hello")
        assert await failure(other.upload(b"", size=size, read=read)) == (Temporary, "timeout")
        await other.close()
    assert given < size


async def test_an_upload_that_is_answered_byte_by_byte_ends(rig: Rig) -> None:
    """No pause is a stall, and the answer has no end in sight."""
    sent, bytes_told = 0, 300

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        for _ in range(bytes_told):
            writer.write(b"a")
            await writer.drain()
            sent += 1
            await asyncio.sleep(0.01)

    async with server(serve) as host:
        rig.sim.configure(upload_url="param")
        other = Rig(rig.sim, allowed_hosts=(host,), base_url=f"http://{host}/c2c", stall_s=0.2)
        rig.sim.say(other.bot.user, "hello")
        assert await failure(other.upload(HELLO)) == (Temporary, "timeout")
        assert other.requests("cdn_upload", "timeout") == 1
        await other.close()
    assert sent < bytes_told


async def failure(work: Awaitable[object]) -> tuple[type[AdapterError], str]:
    try:
        await work
    except AdapterError as exc:
        return type(exc), exc.reason
    raise AssertionError("it succeeded")
