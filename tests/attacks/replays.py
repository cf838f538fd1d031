"""A sandbox with a full inbox asks to have all of it again, page after page, in as many requests as the server reads.

What is read for it comes over other connections than the messages and sends of the others.
"""

from __future__ import annotations

import itertools
import json

from tests.attacks.rig import ATTACKER, NAMES, Rig, publish
from tests.e2e.waiting import until

INBOX = 1000
"""Messages of a kilobyte: one page."""
TOGETHER = 100


async def prepare(rig: Rig) -> None:
    for number in range(INBOX):
        rig.world.say(ATTACKER, f"{number} ".ljust(1000, "x"))
    await until(lambda: not rig.sim.stats().pending, "all is polled")


async def attack(rig: Rig) -> None:
    query = json.dumps({"since_ms": 0, "limit": 500}).encode()
    chunk = publish(NAMES.svc(f"replay.{ATTACKER}"), query, reply=f"_INBOX_{ATTACKER}.x") * TOGETHER
    done = await rig.flood(itertools.repeat(chunk))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} requests/s")
