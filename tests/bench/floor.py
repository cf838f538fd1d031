"""The floor: a bridge that promises nothing, for comparison: `python -m tests.bench.floor in|out`.

What arrives is published and acknowledged before the next poll, what is to go is posted and acknowledged: no state,
no repeats found, no order kept, no window, no receipt, no retry. aiohttp on uvloop, one task per bot.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import random
import sys

import aiohttp
import msgspec
import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

STARTS_PER_S = 3000
"""First polls, as the adapter spreads them: polls that begin together end together."""
TIMEOUT = aiohttp.ClientTimeout(total=60)


def asked_with(bot: int) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "AuthorizationType": "ilink_bot_token",
        "X-WECHAT-UIN": base64.b64encode(str(random.getrandbits(32)).encode()).decode(),
        "iLink-App-Id": "bot",
        "iLink-App-ClientVersion": "132105",
        "Authorization": f"Bearer {bot}@im.bot:0600abcd",
    }


class Acks:
    """Publishes that are acknowledged together."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.prefix = nc.new_inbox() + "."
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.numbers = itertools.count()

    async def start(self) -> None:
        await self.nc.subscribe(self.prefix + "*", cb=self.on_ack)

    async def on_ack(self, msg: Msg) -> None:
        if b'"error"' in msg.data:
            raise RuntimeError(msg.data.decode())  # it is never stored then, and the run does not end
        self.waiting.pop(msg.subject).set_result(None)

    async def publish(self, subject: str, payload: bytes) -> asyncio.Future[None]:
        reply = f"{self.prefix}{next(self.numbers)}"
        future = self.waiting[reply] = asyncio.get_running_loop().create_future()
        await self.nc.publish(subject, payload, reply=reply)
        return future


async def poll(http: aiohttp.ClientSession, base: str, acks: Acks, bot: int) -> None:
    cursor = ""
    await asyncio.sleep(bot / STARTS_PER_S)
    while True:
        body = json.dumps({"get_updates_buf": cursor, "base_info": {"channel_version": "2.4.9"}}).encode()
        async with http.post(f"{base}/ilink/bot/getupdates", headers=asked_with(bot), data=body) as response:
            raw = await response.read()
        answer = msgspec.json.decode(raw)
        cursor = answer["get_updates_buf"]
        waiting = []
        for message in answer["msgs"]:
            text = message["item_list"][0]["text_item"]["text"]
            inbound = {"id": str(message["message_id"]), "sandbox": f"s{bot}", "text": text}
            waiting.append(await acks.publish(f"wechat.inbox.s{bot}.floor", msgspec.json.encode(inbound)))
        for future in waiting:
            await future


async def inbound(base: str, url: str, bots: int, connector: aiohttp.TCPConnector) -> None:
    nc = await nats.connect(url)
    acks = Acks(nc)
    await acks.start()
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as http:
        await asyncio.gather(*(poll(http, base, acks, bot) for bot in range(bots)))


async def outbound(base: str, url: str, connector: aiohttp.TCPConnector) -> None:
    nc = await nats.connect(url)
    js = nc.jetstream()
    pulls = await js.pull_subscribe_bind("floor", "WECHAT_OUT")
    slots = asyncio.Semaphore(256)
    tasks: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as http:

        async def send(msg: Msg) -> None:
            bot = int(msg.subject.rpartition("s")[2])
            text = msgspec.json.decode(msg.data)["text"]
            item = {"type": 1, "text_item": {"text": text}}
            message = {
                "from_user_id": "",
                "to_user_id": f"user{bot}@im.wechat",
                "client_id": msg.reply,
                "message_type": 2,
                "message_state": 2,
                "item_list": [item],
            }
            body = json.dumps({"msg": message}).encode()
            async with http.post(f"{base}/ilink/bot/sendmessage", headers=asked_with(bot), data=body) as response:
                await response.read()
            await msg.ack()
            slots.release()

        while True:
            try:
                fetched = await pulls.fetch(200, timeout=1)
            except nats.errors.TimeoutError:
                continue
            for msg in fetched:
                await slots.acquire()
                task = asyncio.create_task(send(msg))
                tasks.add(task)
                task.add_done_callback(tasks.discard)


async def run(given: argparse.Namespace) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    if given.direction == "in":
        await inbound(given.ilink, given.nats, given.bots, connector)
    else:
        await outbound(given.ilink, given.nats, connector)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("direction", choices=["in", "out"])
    parser.add_argument("--ilink", required=True)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--bots", type=int, default=100)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
