"""The console of two replicas, under the permissions that are shipped: each shows the whole platform."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import httpx
from nats.aio.client import Client

from adapter.simulator import Simulator
from tests.bus.guarded import NAMES, WITNESS, guarded
from tests.e2e.world import World, environ_of, eventually, fast, free_port, stream, until

TOKEN = "the token of the console"


async def test_any_replica_shows_and_does_all(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    async with (
        guarded(tmp_path) as server,
        Simulator(fast(qr_hold_ms=300)) as sim,
        httpx.AsyncClient(trust_env=False, verify=False) as browser,
    ):
        environ = environ_of(server.url, sim) | server.users["adapter"].environ
        world = World(tmp_path, sim, server.url, environ | {"WECHAT_NATS_CONSOLE_TOKEN": TOKEN})
        try:
            for port in ports:
                await world.add_adapter(WECHAT_NATS_CONSOLE_ADDR=f"127.0.0.1:{port}")
            await until(lambda: all(b"adapter.started" in a.log.read_bytes() for a in world.adapters), "they run")
            platform, witness = await server.connect("platform"), await server.connect(WITNESS)
            for number in range(8):
                await world.bind(platform.nc, f"s{number}", sim.add_bot())
            world.say("s3", "hello")
            first, second = (f"http://127.0.0.1:{port}" for port in ports)
            assert (await browser.post(f"{first}/signin", data={"token": TOKEN})).status_code == 303
            await _each_shows_all(browser, [first, second])
            await _dead_letters(browser, second, witness.nc)
            await _login(browser, first, second, sim)
        finally:
            await world.close()
    for adapter in world.adapters:
        log = adapter.log.read_text()
        assert "console.signed_in" in log or adapter is not world.adapters[0]
        assert "console.crashed" not in log
        assert "ermissions" not in log
        assert TOKEN not in log


async def _each_shows_all(browser: httpx.AsyncClient, consoles: list[str]) -> None:
    """The session counts at both; the polls of one are known to the other."""

    async def all_is_known(console: str) -> bool:
        page = (await browser.get(f"{console}/")).text
        names = re.findall(r"<b>(s\d)</b>", page)
        polled = len(re.findall(r'<td data-name="Last poll" class="tight"><time', page))
        spread = page.count(f"<b>{socket.gethostname()}</b>") == 2
        return names == [f"s{n}" for n in range(8)] and polled == 8 and spread and "10 sends left" in page

    for console in consoles:
        await eventually(lambda console=console: all_is_known(console), "all is shown")  # type: ignore[misc]


async def _dead_letters(browser: httpx.AsyncClient, console: str, witness: Client) -> None:
    body = b'{"sandbox":"s1","user":"u1@im.wechat","text":5}'  # unreadable, and it says for whom it is
    for subject in (NAMES.out("s1"), NAMES.out_plain):
        await witness.jetstream().publish(subject, body)

    async def both() -> bool:
        return (await browser.get(f"{console}/dead")).text.count("Try again") == 2

    await eventually(both, "they are dead letters")
    for do in ("retry", "drop"):
        page = (await browser.get(f"{console}/dead")).text
        proof = re.findall(r'name="proof" value="(\w+)"', page)[0]
        number = min(int(found) for found in re.findall(r"/dead/(\d+)", page))
        assert (await browser.post(f"{console}/dead/{number}", data={"proof": proof, "do": do})).status_code == 200

    async def retried() -> bool:
        """The command was read again, and is as broken as before."""
        numbers = [data for _, data in await stream(witness, NAMES.stream_dead, NAMES.dead_letters("*"))]
        return len(numbers) == 1

    await eventually(retried, "one is dead again, the other is gone")


async def _login(browser: httpx.AsyncClient, first: str, second: str, sim: Simulator) -> None:
    page = (await browser.get(f"{first}/logins")).text
    proof = re.findall(r'name="proof" value="(\w+)"', page)[0]
    place = (await browser.post(f"{first}/logins", data={"proof": proof, "sandbox": "new"})).headers["Location"]

    async def shown() -> bool:
        return "<svg" in (await browser.get(f"{second}{place}")).text

    await eventually(shown, "the other replica shows the code")
    sim.confirm(sim.qrcodes()[-1].qrcode)

    async def bound() -> bool:
        return "Bound" in (await browser.get(f"{second}{place}")).text

    await eventually(bound, "the bot is bound")
