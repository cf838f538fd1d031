"""Https, and addresses that clients elsewhere can reach: they follow a login to `https://<redirect_host>`."""

import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from adapter.simulator.process import run
from tests.authority import Authority
from tests.e2e.waiting import free_port
from tests.simulator.client import Client, headers
from tests.simulator.conftest import MakeClient
from tests.simulator.test_login import qrcode, status


@pytest.fixture
async def secure(make: MakeClient, tmp_path: Path) -> AsyncIterator[Client]:
    """A client that trusts the simulator's certificate, and nobody else's."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("simulator")
    client = await make(tls_cert=str(cert), tls_key=str(key))
    context = ssl.create_default_context(cafile=str(authority.file))
    async with httpx.AsyncClient(timeout=60, verify=context) as http:
        client.http = http
        yield client


async def test_a_redirected_login_is_followed_by_https(secure: Client) -> None:
    code = await qrcode(secure)
    secure.sim.scan(code)
    await secure.sim.redirect(code)
    second = f"https://{(await status(secure, code))['redirect_host']}"
    secure.sim.confirm(code)

    answer = await status(secure, code, second)

    assert (answer["status"], answer["baseurl"]) == ("confirmed", second)
    poll = await secure.http.post(
        f"{answer['baseurl']}/ilink/bot/getupdates", json={"base_info": {}}, headers=headers(answer["bot_token"])
    )
    assert poll.json()["msgs"] == []


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_both_hosts_can_be_named_as_clients_reach_them(make: MakeClient, scheme: str) -> None:
    public, second = f"{scheme}://sim.internal:8080", f"{scheme}://second.internal"
    client = await make(public_url=public, second_public_url=f"{second}/", second_port=free_port())
    own, other = (f"http://127.0.0.1:{port}" for port in (client.sim.port, client.sim.world.settings.second_port))
    code = str((await client.http.get(f"{own}/ilink/bot/get_bot_qrcode?bot_type=3")).json()["qrcode"])
    client.sim.scan(code)
    await client.sim.redirect(code)

    assert (client.sim.url, client.sim.second_url) == (public, second)
    assert (await status(client, code, own))["redirect_host"] == "second.internal"
    client.sim.confirm(code)
    assert (await status(client, code, other))["baseurl"] == second


async def test_the_cdn_can_be_named_as_clients_reach_it(make: MakeClient) -> None:
    cdn = "https://cdn.sim.internal/c2c"
    client = await make(cdn_public_url=f"{cdn}/")
    client.sim.say_media(client.bot.user, "file", b"hello")

    (message,) = await client.follow()
    url = message["item_list"][0]["file_item"]["media"]["full_url"]
    request = {"media_type": 3, "to_user_id": client.bot.user, "rawsize": 5, "filesize": 16, "no_need_thumb": True}
    hashes = {"filekey": "0" * 32, "rawfilemd5": "0" * 32, "aeskey": "0" * 32}
    offer = await client.call("getuploadurl", request | hashes)

    assert client.sim.cdn_url == cdn
    assert url.startswith(f"{cdn}/download?")
    assert offer["upload_full_url"].startswith(f"{cdn}/upload?")
    own = f"http://127.0.0.1:{client.sim.port}/c2c"
    assert (await client.http.get(url.replace(cdn, own))).status_code == 200


async def test_a_second_port_that_is_taken_ends_the_start_and_leaves_nothing_open(make: MakeClient) -> None:
    first = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        await make(port=first, second_port=taken.getsockname()[1])

    socket.create_server(("127.0.0.1", first)).close()


@pytest.mark.parametrize(
    ("cert", "key"), [("", "key.pem"), ("absent.pem", ""), ("junk.pem", ""), ("simulator.pem", "other-key.pem")]
)
def test_a_certificate_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cert: str, key: str
) -> None:
    authority = Authority(tmp_path)
    authority.issue("simulator")
    authority.issue("other")
    (tmp_path / "junk.pem").write_text("junk")
    files = [str(tmp_path / name) if name else "" for name in (cert, key)]

    with pytest.raises(SystemExit) as ended:
        run(["--tls-cert", files[0], "--tls-key", files[1]])

    assert ended.value.code == 2
    assert "tls_cert" in capsys.readouterr().err
