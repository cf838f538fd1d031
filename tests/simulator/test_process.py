"""The simulator as a process of its own, and its API over HTTP."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter.simulator import SimulatorSettings
from adapter.simulator.process import explanations, run
from tests.simulator.client import Client, headers
from tests.simulator.conftest import MakeClient

Process = asyncio.subprocess.Process


@asynccontextmanager
async def running(*options: str) -> AsyncIterator[tuple[str, Process]]:
    """The base URL of a simulator in another process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapter.simulator", *options, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        yield json.loads(line)["url"], process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def admin(http: httpx.AsyncClient, url: str, call: str, **arguments: Any) -> Any:
    response = await http.post(f"{url}/_sim/{call}", json=arguments)
    assert response.status_code == 200, response.text
    return response.json()


async def look(http: httpx.AsyncClient, url: str, call: str, **query: str) -> Any:
    response = await http.get(f"{url}/_sim/{call}", params=query)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_conversation_over_http(http: httpx.AsyncClient, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    async with running("--hold-ms", "50", "--seed", "7", "--port-file", str(port_file)) as (url, _):
        assert url.endswith(f":{port_file.read_text()}")
        bot = await admin(http, url, "add_bot")
        said = await admin(http, url, "say", to=bot["user"], text="ping", overrides={"seq": 9})

        poll = await http.post(
            f"{url}/ilink/bot/getupdates",
            json={"get_updates_buf": "", "base_info": {"channel_version": "2.4.9"}},
            headers=headers(bot["token"]),
        )
        message = poll.json()["msgs"][0]
        assert str(message["message_id"]) == said["message_id"]
        assert message["seq"] == said["seq"] == 9

        answer = {
            "from_user_id": "",
            "to_user_id": bot["user"],
            "client_id": "c1",
            "message_type": 2,
            "message_state": 2,
            "item_list": [{"type": 1, "text_item": {"text": "pong"}}],
            "context_token": message["context_token"],
        }
        await http.post(
            f"{url}/ilink/bot/sendmessage",
            json={"msg": answer, "base_info": {"channel_version": "2.4.9"}},
            headers=headers(bot["token"]),
        )

        assert [shown["text"] for shown in await look(http, url, "phone", user=bot["user"])] == ["pong"]
        assert (await look(http, url, "sends", bot=bot["bot"]))[0]["why"] == "shown"
        assert (await look(http, url, "polls", bot=bot["bot"]))["records"][0]["ids"] == [said["message_id"]]
        assert (await look(http, url, "stats"))["violations"] == {}


async def parked_poll(http: httpx.AsyncClient, url: str, token: str) -> asyncio.Task[httpx.Response]:
    """A poll that the simulator holds."""
    body = {"base_info": {"channel_version": "2.4.9"}}
    poll = asyncio.create_task(http.post(f"{url}/ilink/bot/getupdates", json=body, headers=headers(token)))
    while not (await look(http, url, "stats"))["parked"]:
        pass
    return poll


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_and_answers_its_parked_polls(
    http: httpx.AsyncClient, number: signal.Signals
) -> None:
    async with running("--hold-ms", "600000") as (url, process):
        bot = await admin(http, url, "add_bot")
        poll = await parked_poll(http, url, bot["token"])

        os.kill(process.pid, number)

        assert (await poll).json()["msgs"] == []
        assert await process.wait() == 0


async def test_a_signal_ends_the_process_while_a_fault_keeps_requests_hanging(
    http: httpx.AsyncClient,
) -> None:
    async with running() as (url, process):
        bot = await admin(http, url, "add_bot")
        await admin(http, url, "set_fault", fault="F5")
        poll = await parked_poll(http, url, bot["token"])

        process.terminate()

        assert await process.wait() == 0
        with pytest.raises(httpx.TransportError):
            await poll


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quota", "many"),
        ("port", "99999"),
        ("qr_ttl_s", "nan"),
        ("public_url", "sim.internal"),
        ("cursor_mode", "none"),
    ],
)
def test_an_option_that_cannot_be_is_named(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run([f"--{name.replace('_', '-')}={value}"])

    assert ended.value.code == 2
    assert f"{name}: " in capsys.readouterr().err


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--help"])

    told = "".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert [name for name, text in explanations().items() if text.replace(" ", "") not in told] == []
    assert explanations().keys() == set(SimulatorSettings.__struct_fields__)
    assert "{refuse,drop,deliver}" in told
    assert "[35000]" in told


async def test_what_cannot_be_is_answered_with_400(client: Client) -> None:
    for call, arguments in {
        "say": {"to": "nobody", "text": "x"},
        "set_fault": {"fault": "F99"},
        "configure": {"cursor_mode": "none"},
        "add_bot": {"nonsense": 1},
        "repeat": {"to": client.bot.bot, "message_id": "none"},
        "add_bots": {"count": 1_000_001},
    }.items():
        response = await client.http.post(f"{client.sim.admin_url}/{call}", json=arguments)
        assert response.status_code == 400, call
        assert response.json()["error"]
    for content in (b"{", b"[" * 100_000):
        assert (await client.http.post(f"{client.sim.admin_url}/say", content=content)).status_code == 400


async def test_every_read_answers(client: Client) -> None:
    bot, user = client.bot.bot, client.bot.user
    client.sim.say(user, "hello")
    await client.poll()
    await client.send()
    queries: dict[str, dict[str, str]] = {
        "bots": {},
        "calls": {},
        "faults": {},
        "inbound": {"bot": bot},
        "now": {},
        "online": {"bot": bot},
        "phone": {"user": user},
        "polls": {"bot": bot},
        "qrcodes": {},
        "requests": {},
        "sends": {"bot": bot},
        "settings": {"bot": bot},
        "stats": {},
        "typing": {"user": user},
        "violations": {"kind": "x"},
    }
    for call, query in queries.items():
        await look(client.http, client.sim.url, call, **query)


async def test_settings_change_while_running_for_all_or_for_one(make: MakeClient) -> None:
    client = await make()
    other = client.sim.add_bot()
    await admin(client.http, client.sim.url, "configure", bot=client.bot.bot, quota=1)
    await admin(client.http, client.sim.url, "configure", hint_ms=None)

    settings = [client.sim.world.settings_of(client.sim.world.find(b.bot)) for b in (client.bot, other)]

    assert [(s.quota, s.hint_ms) for s in settings] == [(1, 35_000), (10, None)]
