"""iLink's calls through a proxy of the environment, over real sockets: all of them go there, nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter.errors import LeaseLost, Temporary, Uncertain
from adapter.ilink.cdn import CdnClient
from adapter.ilink.client import ILink
from adapter.ilink.network import Resolver, proxy_of
from adapter.ports import Account, MediaRef
from adapter.tools.metrics import Metrics
from tests.authority import Authority
from tests.e2e.waiting import free_port, until
from tests.ilink.test_connection import Server, server

__all__ = ["server"]

SENT = b'{"ret":0,"message_id":"1"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(SENT), SENT)
NAMES = [name for kind in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{kind}_PROXY", f"{kind}_proxy".lower())]
NAME = "ilink.test"
"""Leads to this machine, and is no loopback address by its name."""
ALLOWED = (NAME, "127.0.0.1", "localhost")


class Proxy:
    """Opens tunnels, and passes plain requests on."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.open = 0
        self.refuses = False
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            method, target, *_ = head.split()
            if self.refuses:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            else:
                place = target if method == b"CONNECT" else target.split(b"/")[2]
                further, back = await asyncio.open_connection("127.0.0.1", int(place.rpartition(b":")[2]))
                if method == b"CONNECT":
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    back.write(head)
                await asyncio.gather(_pass_on(reader, back), _pass_on(further, writer))
        self.open -= 1
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    made = Proxy()
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    proxy_of.cache_clear()
    async with listening:
        yield made
        listening.close()
    proxy_of.cache_clear()


async def here(_host: str, _port: int) -> list[str]:
    return ["127.0.0.1"]


def client(url: str) -> ILink:
    return ILink(
        Metrics(),
        default_base_url=url,
        allowed_hosts=ALLOWED,
        poll_margin_s=5.0,
        send_timeout_s=5.0,
        look_up=here,
    )


async def call_all(ilink: ILink, account: Account) -> None:
    """Hot calls and others, and media."""
    await ilink.send(account, user="u", client_id="c", context_token="t", content="hi")
    assert await ilink.poll(account, "", 1000) is not None
    await ilink.notify(account, start=True)
    cdn = CdnClient(
        ilink,
        Metrics(),
        base_url=account.base_url,
        allowed_hosts=ALLOWED,
        max_bytes=100,
        resolver=Resolver(ALLOWED, look_up=here),
    )
    assert b"".join([piece async for piece in cdn.download(MediaRef(0, "", "reference", None, ""))]) == SENT
    await cdn.close()


@pytest.mark.parametrize(
    ("environment", "host", "goes_there"),
    [
        ({}, NAME, False),
        ({"HTTPS_PROXY": "http://127.0.0.1:{}"}, NAME, False),
        ({"HTTP_PROXY": "http://127.0.0.1:{}"}, NAME, True),
        ({"HTTP_PROXY": "127.0.0.1:{}"}, NAME, True),
        ({"ALL_PROXY": "http://127.0.0.1:{}"}, NAME, True),
        ({"HTTP_PROXY": "http://127.0.0.1:{}", "NO_PROXY": NAME}, NAME, False),
        ({"HTTP_PROXY": "http://127.0.0.1:{}"}, "127.0.0.1", False),
        ({"ALL_PROXY": "http://127.0.0.1:{}"}, "localhost", False),
    ],
    ids=["none", "of another scheme", "one", "without a scheme", "of all", "not for this host", "here", "by name"],
)
async def test_a_proxy_is_asked_where_the_environment_names_one(
    server: Server,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    host: str,
    goes_there: bool,
) -> None:
    """A loopback address has none: the simulator, whose host NO_PROXY often lacks."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(proxy.port))
    server.answer = Server.say(ANSWER)
    base = server.url.removesuffix("/ilink/bot/x").replace("127.0.0.1", host)
    ilink = client(base)
    await call_all(ilink, Account("b1@im.bot", "token", base))
    await ilink.close()
    assert len(server.heads) == 4
    assert bool(proxy.heads) == goes_there
    assert any(b"/download" in head for head in proxy.heads) == goes_there, "media do the same"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_https_goes_through_a_tunnel_that_is_kept_and_its_proxy_sees_no_token(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    tls, of_proxy = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue("ilink", NAME))
    of_proxy.load_cert_chain(*authority.issue("proxy"))
    made = Server()
    made.answer = Server.say(ANSWER)
    async with (
        await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls) as listening,
        await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=of_proxy if scheme == "https" else None) as open_,
    ):
        port, proxy_port = (each.sockets[0].getsockname()[1] for each in (listening, open_))
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://someone:secret@127.0.0.1:{proxy_port}")
        base = f"https://{NAME}:{port}"
        ilink, account = client(base), Account("b1@im.bot", "token", base)
        for _ in range(2):
            await call_all(ilink, account)
        await ilink.close()
        await until(lambda: proxy.open == 0, "nothing stays open")
    assert len(made.heads) == 8
    assert len(proxy.heads) == 3, "one for all calls, and one for each transfer"
    for head in proxy.heads:
        assert head.startswith(f"CONNECT {NAME}:{port} HTTP/1.1\r\n".encode())
        assert b"\r\nProxy-Authorization: Basic c29tZW9uZTpzZWNyZXQ=\r\n" in head
        assert b"token" not in head
    assert all(b"Proxy-" not in head for head in made.heads)


async def test_what_a_proxy_does_not_let_through_has_not_left(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A send may be tried again. Its lease is looked at once the tunnel stands, which takes its time."""
    base = f"https://{NAME}:{free_port()}"
    account = Account("b1@im.bot", "token", base)
    checks: list[str] = []
    proxy.refuses = True
    urls = (f"http://127.0.0.1:{proxy.port}", f"http://127.0.0.1:{free_port()}", "socks5://127.0.0.1:1")
    for url in urls:
        monkeypatch.setenv("HTTPS_PROXY", url)
        proxy_of.cache_clear()
        ilink = client(base)
        with pytest.raises(Temporary):
            await ilink.send(
                account, user="u", client_id="c", context_token="t", content="hi", check=lambda: checks.append("")
            )
        await ilink.close()
    assert checks == []


@pytest.mark.parametrize("lost", [True, False])
async def test_a_send_whose_answer_is_lost_behind_a_proxy_may_have_been_done(
    server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
    base = server.url.removesuffix("/ilink/bot/x").replace("127.0.0.1", NAME)
    server.answer = Server.say(b"HTTP/1.1 200 OK\r\n", close=True)

    def check() -> None:
        if lost:
            raise LeaseLost("lease_lost")

    ilink = client(base)
    with pytest.raises(LeaseLost if lost else Uncertain):
        await ilink.send(
            Account("b1@im.bot", "token", base),
            user="u",
            client_id="c",
            context_token="t",
            content="hi",
            check=check,
        )
    await ilink.close()
    assert len(server.heads) == (0 if lost else 1)
