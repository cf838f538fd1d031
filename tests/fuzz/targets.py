"""What reads foreign bytes, each as a function of bytes that raises nothing but what its callers expect.

Used twice: by Hypothesis in every run of the tests (tests/test_fuzz.py), and coverage-guided by `make fuzz`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from adapter.bridge.commands import (
    Limits,
    client_id,
    command_id,
    decode_command,
    read_command,
    salvage_ids,
    sandbox_of,
)
from adapter.bridge.texts import closing_fence, split, widen
from adapter.console import server
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, Inbound, MediaPiece, MediaQuery, Unbind
from adapter.contract.names import (
    HEADER_CHARS,
    HEADERS_KEPT,
    Names,
    forwardable_headers,
    from_subject_token,
    is_inbox,
    person_token,
    read_position,
    to_subject_token,
)
from adapter.contract.repeats import SIZE, DedupWindow
from adapter.errors import AdapterError, Refused, Uncertain, Unreadable
from adapter.ilink import network, protocol
from adapter.ilink.cipher import Decryption, read_key
from adapter.ilink.connection import Connection
from adapter.ilink.protocol import IlinkReply, unpack
from adapter.ilink.translate import read_message
from adapter.logins.qr import html_element, terminal_text
from adapter.ports import Scan
from adapter.tools import logs, media_types
from adapter.tools.seal import Sealer
from tests.fakes import Wire

ROOT = Path(__file__).parents[2]
NAMES = Names()
LIMITS = Limits(command_bytes=65_536, part_chars=400, part_bytes=16_384, parts=10, park_ms=1000)
SEALER = Sealer((bytes(32),))
LOOP = asyncio.new_event_loop()
ANSWER_BYTES = 1000
NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises, and each reader of the bus expects."""
SECRET = "b0f5860fdecb@im.bot:06canarycanarycanary"


class Target(NamedTuple):
    """A reader."""

    read: Callable[[bytes], None]
    seeds: tuple[str, ...] = ()
    """Samples that it reads, as patterns."""
    around: tuple[bytes, bytes] = (b"", b"")
    """What stands around a text that it reads."""
    ms_per_100kb: float = 50.0
    """Processor time that an input may take; see tests/fuzz/costs.py."""


def command(data: bytes) -> None:
    """wechat.out.<sandbox>, and what is parked: read, cut, merged; its parts fit into one request each."""
    try:
        body = decode_command(data, LIMITS)
        read = read_command(body, sandbox="s1", stored_ms=1, limits=LIMITS)
    except (Unreadable, Refused) as exc:
        assert len(exc.detail) < 1000
        contract.Receipt(command="c", sandbox="s1", outcome="refused", reason=exc.reason, detail=exc.detail)
        return
    texts = [part for part in read.parts if isinstance(part, str)]
    assert all(
        part.strip() and len(part) <= LIMITS.part_chars and len(part.encode()) <= LIMITS.part_bytes for part in texts
    )
    assert len(texts) <= LIMITS.parts
    assert read.expires_ms - 1 <= LIMITS.park_ms
    item = protocol.text_item("".join(texts))
    protocol.message_request(
        "t", protocol.Declared(), item, user=read.user, client_id=client_id("base", 0), context_token="c"
    )
    NAMES.receipt("s1", command_id(body.id, "", "", 7), 1).encode("ascii")


def routed(data: bytes) -> None:
    """Plain wechat.out."""
    try:
        sandbox = sandbox_of(decode_command(data, LIMITS))
    except Refused:
        return
    except Unreadable:
        left = salvage_ids(data, LIMITS)
        assert len(left.id or "") <= 128
        sandbox = left.sandbox or "none"
    assert re.fullmatch(r"[a-z0-9_-]{1,64}", sandbox)


def headers(data: bytes) -> None:
    """Of a command: what is copied can be written again by any client."""
    lines = [line.partition(":") for line in data.decode("utf-8", "replace").split("\n")]
    kept = forwardable_headers({name: value for name, _, value in lines})
    assert len(kept) <= HEADERS_KEPT
    assert all(re.fullmatch(r"[!-9;-~]+", name) and len(value) <= HEADER_CHARS for name, value in kept.items())
    assert not any(name.lower().startswith(("nats-", "status")) for name in kept)


def control(data: bytes) -> None:
    """wechat.bind.<sandbox> and wechat.unbind.<sandbox>."""
    for kind in (Bind, Unbind):
        try:
            read = msgspec.json.decode(data, type=kind)
        except NOT_JSON:
            continue
        if isinstance(read, Bind):
            assert "canary" not in repr(msgspec.structs.replace(read, bot_token="canary")) or b"canary" in data
            try:
                token = SEALER.open_given(read.bot, read.bot_token)
            except Refused:
                continue
            assert SEALER.open(read.bot, SEALER.seal(read.bot, token)) == token


def service(data: bytes) -> None:
    """Requests to wechat.svc.*; of media.put the headers."""
    for kind in (contract.BindingsQuery, contract.WindowQuery, contract.ReplayQuery, contract.LoginStart, MediaQuery):
        try:
            msgspec.json.decode(data or b"{}", type=kind)
        except NOT_JSON:
            continue
    pairs = data.decode("utf-8", "replace").split("\n")
    given = {name: value for name, _, value in (pair.partition(":") for pair in pairs)}
    try:
        piece = msgspec.convert(given, MediaPiece, strict=False)
    except msgspec.ValidationError:
        return
    assert piece.offset >= 0
    assert re.fullmatch(r"[A-Za-z0-9_-]+", piece.upload)


def message(data: bytes) -> None:
    """A message of a user, as iLink writes it: it can always be told, or is kept as it is."""
    try:
        said = read_message(data)
    except Unreadable:
        return
    told = Inbound(
        id=said.keys.id_for("b1@im.bot"), sandbox="s1", bot="b1@im.bot", user=said.user, sent_at_ms=said.sent_at_ms,
        received_at_ms=1, text=said.text, items=said.items, quote=said.quote,
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(told), type=Inbound) == told
    assert all(0 <= fetch.item < len(said.items) for fetch in said.fetches)
    to_subject_token(said.user).encode("ascii")
    seen = DedupWindow()
    seen.add([said.keys.fingerprint(1)])
    if said.keys.message or said.sent_at_ms:
        assert seen.is_repeat(said.keys)
        assert DedupWindow(seen.kept(1)).is_repeat(said.keys)
    assert len(seen.kept(1)) == SIZE


def reply(data: bytes) -> None:
    """iLink's answers, of every endpoint and with any status and headers: an AdapterError, or what was said."""
    number, _, body = data.partition(b"\n")
    status = int(number[:3]) if number[:3].isdigit() else 200
    name, _, value = number[3:].decode("latin-1").partition(":")
    answer = IlinkReply(status, {name.lower(): value.strip()}, body)
    readers: list[Callable[[], Any]] = [
        lambda: protocol.read_updates(answer, polled_s=20.0),
        lambda: protocol.read_updates(answer, polled_s=1.0),
        lambda: protocol.read_sent(answer),
        lambda: protocol.read_notified(answer),
        lambda: protocol.read_ticket(answer),
        lambda: protocol.read_typing(answer),
        lambda: protocol.read_upload_url(answer, cdn_base_url="https://c.weixin.qq.com/c2c", filekey="f"),
    ]
    for read in readers:
        try:
            read()
        except AdapterError as exc:
            assert len(exc.detail) < 1000
            assert getattr(exc, "retry_after_s", None) is None or 0 <= exc.retry_after_s <= 300  # type: ignore[attr-defined]
    polled = None
    with contextlib.suppress(AdapterError):
        polled = protocol.read_updates(answer, polled_s=20.0)
    for raw in polled.messages[:20] if polled else ():
        message(raw)


def login(data: bytes) -> None:
    """Answers about QR codes: they may hold a token, which no error may repeat."""
    answer = IlinkReply(200, {}, data.replace(b"SECRET", SECRET.encode()))
    for read in (protocol.read_qrcode, protocol.read_qrcode_status):
        try:
            found = read(answer)
        except AdapterError as exc:
            assert "canary" not in "".join(traceback.format_exception(exc))
            continue
        assert "canary" not in repr(found)
        if isinstance(found, Scan):
            for host in (found.redirect_host, found.base_url):
                _url(host)
        else:
            assert html_element(found.url).startswith("<img src=" if found.url.startswith("data:") else "<svg")
            assert terminal_text(found.url)


def url(data: bytes) -> None:
    """URLs from outside: what is let through leads, by every reader of URLs that we use, to a host of iLink."""
    _url(data.decode("utf-8", "replace"))


def _url(text: str) -> None:
    allowed: list[str] = []
    checks: list[Callable[[], str]] = [
        lambda: network.check_url(text, ()),
        lambda: network.check_link(text, ()),
        lambda: network.redirect_url(text, "https://ilinkai.weixin.qq.com", ()),
    ]
    for check in checks:
        try:
            allowed.append(check())
        except Refused as exc:
            assert exc.reason == "url"
    for one in allowed:
        host = urlsplit(one).hostname or ""
        assert host.endswith((".weixin.qq.com", ".wechat.com"))
        assert urlsplit(one).scheme == "https"
        assert urlsplit(one).username is None
        assert not network.is_public(host)  # a name, no address
        assert httpx.URL(one).host.lower() == host
        assert httpx.URL(one).scheme == "https"


def texts(data: bytes) -> None:
    """Long texts and Markdown."""
    text = data.decode("utf-8", "replace")
    for chars, size in ((100, 16_384), (7, 40)):
        assert all(len(widen(part).encode()) <= 16_384 for part in split(text, chars, size))
    closing_fence(text)


def answer(data: bytes) -> None:
    """iLink's side of a connection up to its end, in pieces of as many bytes as the first byte says: then there is an
    answer that keeps the limit, or a failure."""

    async def ask() -> None:
        connection, wire = Connection(), Wire()
        connection.connection_made(wire)
        asking = asyncio.ensure_future(connection.send_request(b"", 3600, ANSWER_BYTES))
        await asyncio.sleep(0)
        size = data[0] + 1 if data else 1
        for begin in range(1, len(data), size):
            if not wire.closing:
                connection.data_received(data[begin : begin + size])
        connection.connection_lost(None)
        assert not connection.is_usable
        with contextlib.suppress(Uncertain):
            reply = await asking
            assert reply.status >= 200
            assert len(unpack(reply, ANSWER_BYTES).body) <= ANSWER_BYTES

    LOOP.run_until_complete(ask())


def packed(data: bytes) -> None:
    """Packed answers."""
    encoding, _, body = data.partition(b"\n")
    try:
        reply = IlinkReply(200, {"content-encoding": encoding.decode("latin-1")}, body)
        assert len(unpack(reply, max(10_000, len(body))).body) <= max(10_000, len(body))
    except Uncertain:
        return


def medium(data: bytes) -> None:
    """Media: what they are, how large, how long."""
    name, _, content = data.partition(b"\n")
    kind = media_types.identify(content[: media_types.HEAD], name.decode("utf-8", "replace"))
    assert kind.mime.isascii()
    assert all(size is None or 0 <= size < 2**63 for size in (kind.width, kind.height))
    for duration in (media_types.silk_duration_ms(content), media_types.wav_duration_ms(content)):
        assert duration is None or 0 <= duration < 2**53
    msgspec.json.encode(kind)


def voice(data: bytes) -> None:
    """WeChat's voice format, which a library in C decodes: WAV, or None; never more than ten minutes of it."""
    wav = media_types.silk_to_wav(data)
    longest = media_types.SILK_MAX_FRAMES * media_types.SILK_RATE // 1000 * 2 * media_types.SILK_FRAME_MS
    assert wav is None or len(wav) <= longest + 100


def cipher(data: bytes) -> None:
    """Keys and bytes of media."""
    key, _, content = data.partition(b"\n")
    for text in (key.decode("utf-8", "replace"), content.decode("latin-1")):
        for given in ((text, None), (None, text)):
            try:
                read = read_key(*given)
            except Refused:
                continue
            assert read is None or len(read) == 16
    work = Decryption(bytes(16))
    try:
        plain = work.update(content) + work.finish()
    except Refused:
        return
    assert len(plain) < len(content)


def names(data: bytes) -> None:
    """Subjects, keys and tokens."""
    text = data.decode("utf-8", "replace")
    assert from_subject_token(to_subject_token(text)) == text
    assert len(person_token("s1", text)) == 16
    with contextlib.suppress(Refused):
        sequence, number = read_position(text)
        assert (sequence, number) >= (0, 0)
    if is_inbox(text):
        assert text.startswith("_INBOX")
        assert not set(text) & set(" \t\r\n*>\x00")
    with contextlib.suppress(ValueError):
        from_subject_token(text)
    for stored in (text, f"s1.{text}"):
        with contextlib.suppress(Refused):
            SEALER.open_given("b1@im.bot", stored)


def logged(data: bytes) -> None:
    """The net below the logs: a bot's token is found in whatever surrounds it."""
    text = data.decode("utf-8", "replace")
    shown = logs.redact_text(f"{text} {SECRET} {text}", 100_000)
    assert "canarycanary" not in shown
    logs.redact(None, "info", {"detail": text, "fields": {"token": text, "list": [text, data]}})


def console(data: bytes) -> None:
    """A request to the console, as a WSGI server hands it over: five lines of its head, and a form."""
    head, _, form = data.partition(b"\n\n")
    method, length, query, cookie, origin = (head.decode("latin-1").split("\n") + [""] * 5)[:5]
    environ = {
        "REQUEST_METHOD": method,
        "CONTENT_LENGTH": length,
        "QUERY_STRING": query,
        "HTTP_COOKIE": cookie,
        "HTTP_ORIGIN": origin,
        "wsgi.input": io.BytesIO(form),
    }
    request = server.read_request(environ, "nonce")
    if isinstance(request, server.Response):
        assert request.status.startswith("4")
    else:
        assert not (request.form and method != "POST")
        server.is_same_origin(request)


OUTBOUND = ("schemas/samples/valid/outbound-*.json", "schemas/samples/invalid/outbound-*.json")
BINDS = ("schemas/samples/valid/*bind-*.json", "schemas/samples/invalid/*bind-*.json")
QUERIES = ("schemas/samples/*/*_query-*.json", "schemas/samples/*/login_*.json")
ANSWERS = ("tests/samples/*.json",)

TARGETS: dict[str, Target] = {
    "console": Target(console),
    "command": Target(command, OUTBOUND, (b'{"text":', b"}")),
    "routed": Target(routed, OUTBOUND, (b'{"sandbox":"s1","text":', b"}")),
    "headers": Target(headers),
    "control": Target(control, BINDS, (b'{"bot":"b","bot_token":', b"}")),
    "service": Target(service, QUERIES, (b'{"sandbox":', b"}")),
    "message": Target(
        message, ANSWERS, (b'{"from_user_id":"u","item_list":[{"type":1,"text_item":{"text":', b"}}]}")
    ),
    "reply": Target(reply, ANSWERS, (b'200\n{"ret":-1,"errmsg":', b"}")),
    "login": Target(login, ANSWERS, (b'{"ret":0,"qrcode":"q","qrcode_img_content":', b"}")),
    "url": Target(url),
    "texts": Target(texts, ms_per_100kb=10_000.0),  # Markdown: the service reads it for ten seconds at most
    "packed": Target(packed),
    "answer": Target(answer),
    "medium": Target(medium),
    "voice": Target(voice),
    "cipher": Target(cipher),
    "names": Target(names, ms_per_100kb=500.0),  # eight ways of a name, which has 128 characters in the service
    "logged": Target(
        logged, ms_per_100kb=600.0
    ),  # four lines of a log, each with 14 patterns, and cut in the service
}


def seeds(name: str) -> Iterator[bytes]:
    """What a target is known to read, to begin with."""
    for pattern in TARGETS[name].seeds:
        for path in sorted(ROOT.glob(pattern)):
            yield path.read_bytes()
    yield from _SEEDS.get(name, ())


_SEEDS: dict[str, tuple[bytes, ...]] = {
    "console": (
        b"POST\n10\npage=2\nsession=abc\nhttp://console\n\nbot=b1&x=%C3%BC",
        b"POST\n999999999999",
        b"GET\n\na=1&a=2",
    ),
    "headers": (b"traceparent:00-1\nStatus:409\nNats-Msg-Id:1",),
    "reply": (
        b"200\n{}",
        b'200\n{"ret":0,"msgs":[{"message_id":1}]}',
        b'429retry-after:7\n{"errcode":-14}',
        b"524\n",
    ),
    "login": (
        b'{"ret":0,"qrcode":"SECRET","qrcode_img_content":"https://liteapp.weixin.qq.com/q/x"}',
        b'{"ret":0,"status":"confirmed","bot_token":"SECRET","baseurl":"https://ilinkai.wechat.com"}',
        b'{"status":"scaned_but_redirect","redirect_host":"a.weixin.qq.com:443"}',
    ),
    "url": (
        b"https://ilinkai.weixin.qq.com/a?b=c",
        b"https://a.weixin.qq.com:443@evil.example",
        b"https://[::ffff:127.0.0.1].weixin.qq.com",
        "https://a。weixin.qq.com".encode(),
    ),
    "texts": (b"# a\n\n- **b** `c` [d](e)\n\n```py\nf\n```\n| a | b |\n|---|---|\n| c | d |",),
    "answer": (
        b"\xffHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"\x07HTTP/1.1 103 Early Hints\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"\xffHTTP/1.0 500\r\nContent-Encoding: deflate\r\n\r\nx\x9c",
    ),
    "packed": (b"gzip\n\x1f\x8b\x08\x00", b"deflate\nx\x9c", b"\nplain"),
    "medium": (
        b"a.png\n\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"a.wav\nRIFF\x24\x00\x00\x00WAVEfmt ",
        b"a.jpg\n\xff\xd8\xff\xe0",
    ),
    "voice": (b"\x02#!SILK_V3\x01\x00a", b"#!SILK_V3\x14\x00" + bytes(20)),
    "cipher": (b"AAAAAAAAAAAAAAAAAAAAAA==\n" + bytes(16),),
    "names": (b"_INBOX.a.b", b"o9cq80@im.wechat/b=40", b"s1.0011.AAAA"),
    "logged": (b'{"bot_token": "', b"Bearer ", b"https://u:p@h/?a=b"),
}
