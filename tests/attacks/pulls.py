"""A sandbox asks its own durable consumer for messages as fast as the server reads.

The server keeps few of such requests, and answers the others at once.
"""

from __future__ import annotations

import itertools

from adapter.contract.messages import Options
from tests.attacks.rig import ATTACKER, NAMES, Rig, publish
from tests.bus.guarded import Player

OPEN = "no limit of the server's bounds the rate of pulls"
TOGETHER = 500
PULL = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.stream_in}.{ATTACKER}"
INBOX = f"_INBOX_{ATTACKER}"


async def prepare(rig: Rig) -> None:
    platform: Player = await rig.server.connect("platform")
    answer = await rig.world.bind(platform.nc, ATTACKER, rig.world.bots[ATTACKER], options=Options(durable=True))
    assert answer.ok, answer


async def attack(rig: Rig) -> None:
    chunk = publish(PULL, b'{"batch":1,"expires":60000000000}', reply=f"{INBOX}.r") * TOGETHER
    done = await rig.flood(itertools.chain([f"SUB {INBOX}.> 1\r\n".encode()], itertools.repeat(chunk)))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} requests/s")
