"""What an iLink that means ill makes of the process that reads it: its memory stays bounded, and its loop alive."""

from __future__ import annotations

import asyncio
import json
import sys

from tests.attacks.hostile_answers import LARGEST, HostileServer

WORST = ("lists in the words", "plain items", "no UTF-8", "many users", "a list of numbers", "control characters")
BOTS = 24
PEAK_MIB = 320
"""8 for each of the answers that are read, as much again for the messages of many users, and what is unpacked and
decoded one at a time."""

READ = """
import asyncio, contextlib, json, sys
from adapter.errors import Temporary, Unreadable
from adapter.ilink.client import ILink
from adapter.ilink.translate import read_message
from adapter.tools.metrics import Metrics
from adapter.ports import Account

url, bots = sys.argv[1], int(sys.argv[2])
seen = {"messages": 0, "refused": 0}

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

async def poll(ilink, bot):
    try:
        polled = await ilink.poll(Account(bot, "token", url), "", 60_000)
    except Temporary as exc:
        assert exc.reason == "unreadable", exc
        seen["refused"] += 1
        return
    for raw in polled.messages[:10]:
        with contextlib.suppress(Unreadable):
            read_message(raw)
    seen["messages"] += len(polled.messages)

async def main():
    ilink = ILink(
        Metrics(), default_base_url=url, allowed_hosts=("127.0.0.1",), poll_margin_s=60, send_timeout_s=60
    )
    before = peak()
    await asyncio.gather(*(poll(ilink, f"b{number}@im.bot") for number in range(bots)))
    await ilink.close()
    print(json.dumps(seen | {"grown_mib": peak() - before}))

asyncio.run(main())
"""


async def test_what_hostile_answers_take_of_memory_is_bounded() -> None:
    async with HostileServer(LARGEST - 64, names=WORST, dribbles=False) as server:
        reading = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READ, server.url, str(BOTS), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await reading.communicate()
    seen = json.loads(out)
    assert seen["grown_mib"] < PEAK_MIB
    assert seen["messages"] > 50_000
    assert seen["refused"] == 5 * BOTS // (len(WORST) + 2), "also those of millions of lists or numbers"
