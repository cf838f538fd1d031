"""Ten thousand bots, each with a poll parked, in one process."""

import asyncio
import json
import random
import resource
from collections.abc import Iterator

import httpx
import pytest

from tests.simulator.test_process import admin, look, running

BOTS = 10_000
LUCKY = 200


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < BOTS + 500:
        pytest.skip(f"needs {BOTS + 500} open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request(token: str) -> bytes:
    body = b'{"get_updates_buf":"","base_info":{"channel_version":"2.4.9"}}'
    head = (
        "POST /ilink/bot/getupdates HTTP/1.1\r\nHost: sim\r\nContent-Type: application/json\r\n"
        f"AuthorizationType: ilink_bot_token\r\nAuthorization: Bearer {token}\r\n"
        f"X-WECHAT-UIN: MA==\r\niLink-App-Id: bot\r\niLink-App-ClientVersion: 132105\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def poll(host: str, port: int, token: str, turn: asyncio.Semaphore) -> list[str]:
    """The message ids of one poll on a bare connection; a client library would cost more than the server."""
    async with turn:
        reader, writer = await asyncio.open_connection(host, port, limit=2**16)
        writer.write(request(token))
        await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    answer = json.loads(await reader.readexactly(length))
    writer.close()
    return [str(message["message_id"]) for message in answer["msgs"]]


@pytest.mark.slow
async def test_ten_thousand_polls_are_parked_and_some_get_a_message(many_files: None) -> None:
    async with running("--hold-ms", "600000") as (url, process), httpx.AsyncClient(timeout=60) as http:
        bots = await admin(http, url, "add_bots", count=BOTS)
        parts = httpx.URL(url)
        turn = asyncio.Semaphore(500)
        polls = {
            bot["bot"]: asyncio.create_task(poll(parts.host, parts.port or 0, bot["token"], turn)) for bot in bots
        }
        while (await look(http, url, "stats"))["parked"] < BOTS:
            await asyncio.sleep(0.05)

        said = {}
        for bot in random.Random(1).sample(bots, LUCKY):
            record = await admin(http, url, "say", to=bot["bot"], text="hello")
            said[bot["bot"]] = record["message_id"]

        assert await asyncio.gather(*(polls[bot] for bot in said)) == [[i] for i in said.values()]
        stats = await look(http, url, "stats")
        assert (stats["parked"], stats["delivered"]) == (BOTS - LUCKY, LUCKY)
        assert (stats["poll_overlaps"], stats["pending"]) == (0, 0)

        process.terminate()
        rest = await asyncio.gather(*(poll for bot, poll in polls.items() if bot not in said))
        assert rest == [[]] * (BOTS - LUCKY)
        assert await process.wait() == 0
