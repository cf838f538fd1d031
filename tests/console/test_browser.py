"""The console in a real headless Chromium: what a person sees on a desk and on a phone, and that it lives."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from adapter.contract.messages import Options
from tests.e2e.world import World, free_port, until, world

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".pytest_cache" / "console"
"""To look at."""
TOKEN = "the token of the console"


@pytest.fixture
def chromium() -> str:
    """Debian's, installed where that can be done."""
    if shutil.which("chromium") is None:
        done = subprocess.run([ROOT / ".ci" / "need", "chromium", "fonts-noto-cjk"], check=False, timeout=600)
        if done.returncode:
            pytest.skip("chromium is missing; on Debian: apt-get install chromium fonts-noto-cjk")
    found = shutil.which("chromium")
    assert found is not None
    return found


async def test_a_person_uses_the_console(chromium: str, npm: Path, tmp_path: Path) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environ = {"WECHAT_NATS_CONSOLE_ADDR": f"127.0.0.1:{port}", "WECHAT_NATS_CONSOLE_TOKEN": TOKEN}
    async with world(tmp_path, environ=environ, qr_hold_ms=300) as made:
        adapter = await made.add_adapter()
        await until(lambda: b"adapter.started" in adapter.log.read_bytes(), "the adapter runs")
        arguments = (chromium, f"http://127.0.0.1:{port}", TOKEN, made.sim.admin_url, PICTURES)
        process = await asyncio.create_subprocess_exec(
            *("node", Path(__file__).with_name("browse.mjs"), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "NPM": str(npm)},
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            while line := (await process.stdout.readline()).decode().strip():
                await (fill(made) if line == "fill" else outage(made))
                process.stdin.write(b"done\n")
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert b"console.crashed" not in adapter.log.read_bytes()


async def fill(made: World) -> None:
    """120 bindings, some of whose users wrote, two of which lost their login, and three dead letters."""
    nc = await made.nc()
    for number in range(120):
        bot = made.sim.add_bot(bot=f"agent-{number:03d}@im.bot")
        await made.bind(nc, f"agent-{number:03d}", bot, options=Options(auto_typing=number % 2 == 0))
        if number % 3 == 0:
            made.say(f"agent-{number:03d}", "你好")
    for number in (30, 60):
        made.sim.kill_token(made.bots[f"agent-{number:03d}"].bot)
    body = b'{"user":"u1@im.wechat","text":5}'  # unreadable, and it says for whom it is
    for number in range(3):
        await nc.jetstream().publish("wechat.out.agent-000", body, headers={"Nats-Msg-Id": f"broken-{number}"})


async def outage(made: World) -> None:
    made.server.kill()
