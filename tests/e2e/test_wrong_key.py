"""A replica with another key than the bus has: it takes no bot, and its probes say why."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx

from tests.e2e.waiting import free_port
from tests.e2e.world import TOKEN_KEY, until, world

OTHER_KEY = base64.b64encode(bytes(32)).decode()


async def test_a_wrong_key_is_not_ready_and_takes_no_bot(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        first = await made.add_adapter()
        nc = await made.nc()
        for number in range(8):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
        port = free_port()
        second = await made.add_adapter(WECHAT_NATS_TOKEN_KEY=OTHER_KEY, WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{port}")
        await until(lambda: second.said("start.waits") > 0, "it says what it waits for")
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.get(f"http://127.0.0.1:{port}/readyz")
        assert answer.status_code == 503
        (started,) = [check for check in answer.json() if check["name"] == "started"]
        assert "opens 0 of 8 bot tokens" in started["detail"]
        await first.kill()  # not even now
        third = await made.add_adapter(WECHAT_NATS_TOKEN_KEY=f"{OTHER_KEY},{TOKEN_KEY}")
        for sandbox, bot in made.bots.items():
            made.say(sandbox, f"hello {bot.bot}")
        await made.settle(nc)
        assert third.said("adapter.started") == 1
        assert second.said("adapter.started") == 0
