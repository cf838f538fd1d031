"""A sandbox publishes tiny commands, each with an id of 60 kB of its own: the server remembers ids in memory.

The server's memory is bounded by its rate and by how long the stream remembers ids.
"""

from __future__ import annotations

from collections.abc import Iterator

from adapter.contract.names import H_MSG_ID
from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

LONG = 60_000
BYTES_PER_S = 18e6


async def attack(rig: Rig) -> None:
    done = await rig.flood(_commands(rig), bytes_per_s=BYTES_PER_S)
    rig.note(f"{done.written / rig.seconds / 1e6:,.0f} MB/s of ids")


def _commands(rig: Rig) -> Iterator[bytes]:
    subject, number = NAMES.out(ATTACKER), rig.rng.randrange(1 << 60)
    while True:
        number += 1
        yield publish(subject, b"x", headers={H_MSG_ID: f"{number}".ljust(LONG, "x")})
