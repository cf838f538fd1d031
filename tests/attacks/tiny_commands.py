"""A sandbox publishes tiny commands as fast as the server reads: all sandboxes' commands pass one stream.

Commands of others are delayed and refused by the server with 10167; who publishes again with the same id loses
nothing. What users write, and leases, pass other streams.
"""

from __future__ import annotations

import itertools

from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

TOGETHER = 1000


async def attack(rig: Rig) -> None:
    chunk = publish(NAMES.out(ATTACKER), b'{"text":"x"}') * TOGETHER
    done = await rig.flood(itertools.repeat(chunk))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} commands/s")
