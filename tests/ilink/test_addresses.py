"""Where a host of iLink may lead: to public addresses alone, however written, and not elsewhere a moment later."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.errors import Refused, Temporary
from adapter.ilink.cdn import CdnClient
from adapter.ilink.client import ILink
from adapter.ilink.network import LookUpHost, Resolver, is_exempt, is_public, proxy_of, resolve_host
from adapter.ports import Account, MediaRef, Pieces
from adapter.tools.metrics import Metrics
from tests.authority import Authority
from tests.e2e.waiting import free_port, until

HOST = "ilinkai.weixin.qq.com"
BASE = f"https://{HOST}"
ACCOUNT = Account("b1@im.bot", "b1@im.bot:06ff", BASE)
PUBLIC = "203.0.114.7"

ADDRESSES: list[tuple[str, str, bool]] = [
    ("public", "8.8.8.8", True),
    ("public-v6", "2606:4700:4700::1111", True),
    ("loopback", "127.0.0.1", False),
    ("loopback-elsewhere", "127.8.7.6", False),
    ("any", "0.0.0.0", False),
    ("this-network", "0.1.2.3", False),
    ("private-10", "10.1.2.3", False),
    ("private-172", "172.31.255.1", False),
    ("not-private-172", "172.32.0.1", True),
    ("private-192", "192.168.1.1", False),
    ("link-local-metadata", "169.254.169.254", False),
    ("a-clouds-wire-server", "168.63.129.16", False),
    ("carrier-nat", "100.64.0.1", False),
    ("benchmark", "198.18.0.1", False),
    ("documentation", "203.0.113.1", False),
    ("protocol-assignments", "192.0.0.8", False),
    ("6to4-relay", "192.88.99.1", False),
    ("multicast", "224.0.0.1", False),
    ("reserved", "240.0.0.1", False),
    ("broadcast", "255.255.255.255", False),
    ("loopback-v6", "::1", False),
    ("any-v6", "::", False),
    ("mapped-loopback", "::ffff:127.0.0.1", False),
    ("mapped-hex", "::ffff:7f00:1", False),
    ("mapped-metadata", "::ffff:169.254.169.254", False),
    ("mapped-public", "::ffff:8.8.8.8", True),
    ("compatible-loopback", "::127.0.0.1", False),
    ("translated", "::ffff:0:127.0.0.1", False),
    ("nat64-loopback", "64:ff9b::7f00:1", False),
    ("nat64-metadata", "64:ff9b::a9fe:a9fe", False),
    ("nat64-public", "64:ff9b::808:808", True),
    ("nat64-local", "64:ff9b:1::808:808", False),
    ("6to4", "2002:7f00:1::1", False),
    ("6to4-public", "2002:808:808::1", False),
    ("teredo", "2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ("link-local-v6", "fe80::1", False),
    ("with-a-scope", "fe80::1%eth0", False),
    ("public-with-a-scope", "2606:4700::1%eth0", False),
    ("site-local", "fec0::1", False),
    ("unique-local", "fd00::1", False),
    ("multicast-v6", "ff02::1", False),
    ("documentation-v6", "2001:db8::1", False),
    ("documentation-v6-new", "3fff::1", False),
    ("segments", "5f00::1", False),
    ("discard", "100::1", False),
    ("octal", "0177.0.0.1", False),
    ("decimal", "2130706433", False),
    ("hex", "0x7f000001", False),
    ("short", "127.1", False),
    ("name", "localhost", False),
    ("empty", "", False),
    ("brackets", "[::1]", False),
]


@pytest.mark.parametrize(("address", "public"), [row[1:] for row in ADDRESSES], ids=[row[0] for row in ADDRESSES])
def test_an_address_is_public_or_not(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("host", "port", "exempt"),
    [
        ("simulator", 1, True),
        ("127.0.0.1", 8080, True),
        ("127.0.0.1", 8081, False),
        ("::1", 8080, True),
        ("::1", 8081, False),
        ("::2", 9, True),
        ("simulator.", 1, False),
        ("xsimulator", 1, False),
    ],
)
def test_a_host_may_be_anywhere_only_if_the_operator_names_it(host: str, port: int, exempt: bool) -> None:
    assert is_exempt(host, port, ("simulator", "127.0.0.1:8080", "[::1]:8080", "[::2]")) is exempt


def leads_to(*turns: list[str]) -> tuple[LookUpHost, list[tuple[str, int]]]:
    """A name server that answers one after another; the last answer stays. And what it was asked."""
    asked: list[tuple[str, int]] = []

    async def look_up(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return turns[min(len(asked), len(turns)) - 1]

    return look_up, asked


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:10.0.0.1"]], ids=["one", "one-of-two", "mapped"]
)
async def test_a_host_with_an_address_that_is_not_public_is_not_called(addresses: list[str]) -> None:
    look_up, _ = leads_to(addresses)
    with capture_logs() as logs, pytest.raises(Temporary, match="is not public"):
        await Resolver((), look_up=look_up).addresses(HOST, 443)
    assert [(line["event"], line["host"]) for line in logs] == [("address.refused", HOST)]
    assert await Resolver((HOST,), look_up=look_up).addresses(HOST, 443) == addresses


async def test_the_system_says_where_a_name_leads() -> None:
    assert "127.0.0.1" in await resolve_host("localhost", 80)
    with pytest.raises(Temporary, match="is not public"):
        await Resolver(()).addresses("localhost", 80)


async def test_a_name_that_cannot_be_resolved_is_a_failed_connection() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with pytest.raises(Temporary, match=f"{HOST} cannot be resolved"):
        await Resolver((), look_up=unknown).addresses(HOST, 443)


# the whole way, by TLS -----------------------------------------------------------------------------------


class TlsServer:
    """Answers every request over TLS, under one name, and remembers for whom it was taken."""

    def __init__(self, folder: Path, name: str, answer: str) -> None:
        self.names: list[str | None] = []
        self.requests: list[str] = []
        self.port = 0
        self._answer = answer.replace("\n", "\r\n").encode() + b"\r\n\r\n"
        authority = Authority(folder)
        self.authority = authority.file
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(*authority.issue("server", name))
        self._tls.sni_callback = lambda _, asked, __: self.names.append(asked)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
                writer.write(self._answer)
                await writer.drain()
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield


@contextlib.asynccontextmanager
async def tls(folder: Path, name: str, answer: str) -> AsyncIterator[TlsServer]:
    server = TlsServer(folder, name, answer)
    async with server.serving():
        yield server


def client(
    server: TlsServer, addresses: list[str], monkeypatch: pytest.MonkeyPatch, *, exempt: bool = True
) -> tuple[ILink, Account]:
    """iLink's client, for which the name leads to `addresses`, and which may call this machine if `exempt`."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.authority))
    base = f"{BASE}:{server.port}"
    ilink = ILink(
        Metrics(),
        default_base_url=base,
        allowed_hosts=(f"{HOST}:{server.port}",) if exempt else (),
        poll_margin_s=5.0,
        send_timeout_s=10.0,
        look_up=leads_to(addresses)[0],
    )
    return ilink, ACCOUNT._replace(base_url=base)


EMPTY = "HTTP/1.1 200 OK\nContent-Type: application/json\nConnection: close\nContent-Length: 2\n\n{}"


async def test_the_name_stays_in_sni_certificate_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tls(tmp_path, HOST, EMPTY) as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch)
        assert await ilink.poll(account, "", 1000) is not None
        await ilink.close()
    assert server.names == [HOST]
    assert f"\r\nHost: {HOST}:{server.port}\r\n" in server.requests[0]


async def test_a_certificate_of_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tls(tmp_path, "evil.example", EMPTY) as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch)
        with pytest.raises(Temporary):
            await ilink.poll(account, "", 1000)
        await ilink.close()
    assert server.requests == []


async def test_a_name_that_leads_inside_gets_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of polls, sends, codes and their redirects: all of them are failures of the network, to be tried again."""
    async with tls(tmp_path, HOST, EMPTY) as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch, exempt=False)
        with pytest.raises(Temporary):
            await ilink.poll(account, "", 1000)
        with pytest.raises(Temporary):
            await ilink.send(account, user="u", client_id="c", context_token="t", content="hi")
        with pytest.raises(Temporary):
            await ilink.fetch_code([])
        redirected = ilink.redirect_base_url(f"{HOST}:{server.port}", account.base_url)
        assert await ilink.read_code("qr", redirected, "") is None
        await ilink.close()
    assert (server.names, server.requests) == ([], [])


async def test_a_call_goes_where_the_one_look_at_the_name_led(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the same name leads elsewhere a moment later (DNS rebinding)."""
    heads: list[tuple[str, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((writer.get_extra_info("sockname")[0], await reader.readuntil(b"\r\n\r\n")))
        writer.write(EMPTY.replace("\n", "\r\n").encode())
        writer.close()

    server = await asyncio.start_server(serve, ["127.0.0.1", "127.0.0.2"], free_port())
    port = server.sockets[0].getsockname()[1]
    look_up, asked = leads_to(["127.0.0.1"], ["127.0.0.2"])
    base = f"http://rebinding.example:{port}"
    ilink = ILink(
        Metrics(),
        default_base_url=base,
        allowed_hosts=(f"rebinding.example:{port}",),
        poll_margin_s=5.0,
        send_timeout_s=10.0,
        look_up=look_up,
    )
    async with server:
        await ilink.poll(ACCOUNT._replace(base_url=base), "", 1000)
        await ilink.close()
    assert asked == [("rebinding.example", port)]
    assert [address for address, _ in heads] == ["127.0.0.1"]


async def test_an_answer_that_redirects_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = "HTTP/1.1 307 Moved\nLocation: http://169.254.169.254/latest/\nConnection: close\nContent-Length: 0"
    async with tls(tmp_path, HOST, moved) as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch)
        with pytest.raises(Temporary):
            await ilink.poll(account, "", 1000)
        with pytest.raises(Temporary):
            await ilink.send(account, user="u", client_id="c", context_token="t", content="hi")
        await ilink.close()
    assert [request.split()[1] for request in server.requests] == ["/ilink/bot/getupdates", "/ilink/bot/sendmessage"]


# every URL that comes from outside -----------------------------------------------------------------------

INSIDE = [
    "https://127.0.0.1/c2c",
    "https://2130706433/c2c",
    "https://0x7f.1/c2c",
    "https://0177.0.0.1/c2c",
    "https://127.1/c2c",
    "https://0/c2c",
    "https://[::1]/c2c",
    "https://[::ffff:127.0.0.1]/c2c",
    "https://[64:ff9b::7f00:1]/c2c",
    "https://[fe80::1%25eth0]/c2c",
    "https://localhost/c2c",
    "https://localhost./c2c",
    "https://LOCALHOST/c2c",
    "https://metadata.google.internal/c2c",
    "https://127.0.0.1.nip.io/c2c",
    "https://weixin.qq.com.nip.io/c2c",
    "https://xweixin.qq.com/c2c",
    f"https://{HOST}./c2c",
    f"https://{HOST}.evil.example/c2c",
    f"https://{HOST}@evil.example/c2c",
    f"https://{HOST}:443@evil.example/c2c",
    f"https://{HOST}%40evil.example/c2c",
    f"https://evil.example%2f.{HOST}/c2c",
    f"https://evil.example\\@{HOST}/c2c",
    f"https://evil.example\\.{HOST}/c2c",
    f"https://evil.example\t.{HOST}/c2c",
    f"https://evil.example\n.{HOST}/c2c",
    f"https://evil.example\r\n.{HOST}/c2c",
    f"https://evil.example\x00.{HOST}/c2c",
    f"https://{HOST}/c2c\r\nHost: evil.example",
    f"\thttps://{HOST}/c2c",
    f"https://evil.example#{HOST}/c2c",
    f"https://evil.example?.{HOST}",
    f"https://evil.example;.{HOST}/c2c",
    "https://ilinkai。weixin。qq。com/c2c",
    "https://ilinkai.weixin.qq.com\u3002evil.example/c2c",
    "https://ｉｌｉｎｋａｉ.weixin.qq.com/c2c",
    "https://ilinkai.we\u0131xin.qq.com/c2c",
    "https://ilinkai.weixin.qq.c\u043em/c2c",
    "https://ilinkai.xn--wexin-0za.qq.com/c2c",
    f"https://{HOST}:0/c2c",
    f"https://{HOST}:65536/c2c",
    f"https://{HOST}:-1/c2c",
    f"https://{HOST}:４４３/c2c",
    f"https://{HOST}:443:80/c2c",
    f"http://{HOST}/c2c",
    f"HTTP://{HOST}/c2c",
    f"ftp://{HOST}/c2c",
    f"gopher://{HOST}/c2c",
    f"file://{HOST}/etc/passwd",
    f"//{HOST}/c2c",
    f"https:/{HOST}/c2c",
    f"https:{HOST}/c2c",
    f"https:///{HOST}/c2c",
    f"https://{'a' * 9000}.weixin.qq.com/c2c",
]


class Untouched:
    """Clients in a world where every name is public; no name may be asked for."""

    def __init__(self) -> None:
        look_up, self.asked = leads_to([PUBLIC])
        self.ilink = ILink(
            Metrics(),
            default_base_url=BASE,
            allowed_hosts=(),
            poll_margin_s=0.0,
            send_timeout_s=1.0,
            look_up=look_up,
        )
        self.cdn = CdnClient(
            self.ilink,
            Metrics(),
            base_url=f"{BASE}/c2c",
            allowed_hosts=(),
            max_bytes=100,
            resolver=Resolver((), look_up=look_up),
        )

    def check(self) -> None:
        assert self.asked == []


@pytest.fixture(scope="module")
def untouched() -> Untouched:
    return Untouched()  # once: it reads the system's certificates


@pytest.mark.parametrize("url", INSIDE)
async def test_a_base_url_of_a_binding_is_not_called(url: str, untouched: Untouched) -> None:
    """`base_url` of a bind command, `baseurl` of a login."""
    with pytest.raises(Refused):
        untouched.ilink.check_base_url(url)
    account = Account("b1@im.bot", "b1@im.bot:06ff", url)  # one that got into the bucket all the same
    with pytest.raises(Refused):
        await untouched.ilink.poll(account, "", 0)
    with pytest.raises(Refused):
        await untouched.ilink.send(account, user="u", client_id="c", context_token="t", content="hi")
    untouched.check()


@pytest.mark.parametrize("url", INSIDE)
async def test_a_login_is_redirected_to_no_such_host(url: str, untouched: Untouched) -> None:
    """`redirect_host`."""
    for host in {url, url.partition("//")[2], url.partition("//")[2].removesuffix("/c2c")} - {HOST}:
        with pytest.raises(Refused):
            untouched.ilink.redirect_base_url(host, BASE)
    with pytest.raises(Refused):
        await untouched.ilink.read_code("qr", url, "")
    untouched.check()


@pytest.mark.parametrize("url", INSIDE)
async def test_media_are_fetched_from_and_brought_to_no_such_place(
    url: str, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`full_url` of a medium, `upload_full_url` of an upload."""

    async def place(*_: Any, **__: Any) -> str:
        return url

    async def read() -> Pieces:
        yield b"x"

    with pytest.raises(Refused):
        [piece async for piece in untouched.cdn.download(MediaRef(0, url, "", None, ""))]
    monkeypatch.setattr(untouched.ilink, "upload_url", place)  # what iLink answers
    with pytest.raises(Refused):
        await untouched.cdn.upload(ACCOUNT, user="u", kind="file", name="", size=1, md5="", read=read)
    untouched.check()


async def test_media_of_a_host_that_leads_inside_are_not_fetched(untouched: Untouched) -> None:
    cdn = CdnClient(
        untouched.ilink,
        Metrics(),
        base_url=f"{BASE}/c2c",
        allowed_hosts=(),
        max_bytes=100,
        resolver=Resolver((), look_up=leads_to(["10.0.0.7"])[0]),
    )
    with pytest.raises(Temporary, match="is not public"):
        [piece async for piece in cdn.download(MediaRef(0, "", "reference", None, ""))]
    await cdn.close()


async def test_media_come_from_the_address_that_was_checked_under_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the name has an address that does not answer."""
    async with tls(tmp_path, HOST, "HTTP/1.1 200 OK\nSet-Cookie: who=bot1\nContent-Length: 2\n\nhi") as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch)
        allowed = (f"{HOST}:{server.port}",)
        look_up, asked = leads_to(["127.0.0.2", "127.0.0.1"], ["127.0.0.3"])
        resolver = Resolver(allowed, look_up=look_up)
        cdn = CdnClient(
            ilink, Metrics(), base_url=account.base_url, allowed_hosts=allowed, max_bytes=100, resolver=resolver
        )
        for _ in range(2):
            assert b"".join([piece async for piece in cdn.download(MediaRef(0, "", "a b", None, ""))]) == b"hi"
        await cdn.close()
    assert (asked, server.names) == ([(HOST, server.port)], [HOST, HOST])
    assert f"\r\nhost: {HOST}:{server.port}\r\n" in server.requests[0].lower()
    assert "/download?encrypted_query_param=a%20b " in server.requests[0]
    assert "cookie" not in server.requests[1].lower()


async def test_media_of_a_host_with_a_certificate_of_another_name_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls(tmp_path, "evil.example", EMPTY) as server:
        ilink, account = client(server, ["127.0.0.1"], monkeypatch)
        allowed = (f"{HOST}:{server.port}",)
        resolver = Resolver(allowed, look_up=leads_to(["127.0.0.1"])[0])
        cdn = CdnClient(
            ilink, Metrics(), base_url=account.base_url, allowed_hosts=allowed, max_bytes=100, resolver=resolver
        )
        with pytest.raises(Temporary):
            [piece async for piece in cdn.download(MediaRef(0, "", "reference", None, ""))]
        await cdn.close()
    assert server.requests == []


async def test_a_proxy_of_the_environment_may_be_inside_and_resolves_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connects: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connects.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://proxy.internal:{port}")
    monkeypatch.setenv("NO_PROXY", "localhost,::1")
    proxy_of.cache_clear()
    look_up, asked = leads_to(["127.0.0.1"])
    ilink = ILink(
        Metrics(),
        default_base_url=BASE,
        allowed_hosts=(),
        poll_margin_s=5.0,
        send_timeout_s=1.0,
        look_up=look_up,
    )
    async with server:
        with pytest.raises(Temporary):
            await ilink.poll(ACCOUNT, "", 1000)
        await until(lambda: bool(connects), "the proxy has read what it was asked")
        await ilink.close()
    assert connects[0].startswith(f"CONNECT {HOST}:443 ".encode())
    assert set(asked) == {("proxy.internal", port)}
    assert is_exempt("proxy.internal", port, ()) is False
