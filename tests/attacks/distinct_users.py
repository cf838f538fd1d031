"""A sandbox sends each command to another user who does not exist: a record is looked for before each is refused.

Only the time of others suffers.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

OPEN = "each command to a user whom no bot serves costs a read and a receipt"
TOGETHER = 10
BYTES_PER_S = 90_000
"""A thousand commands a second."""


async def attack(rig: Rig) -> None:
    done = await rig.flood(_commands(), bytes_per_s=BYTES_PER_S)
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} commands/s")


def _commands() -> Iterator[bytes]:
    number = 0
    while True:
        users = range(number, number := number + TOGETHER)
        bodies = [b'{"user":"u%d","when_closed":"refuse","text":"t"}' % user for user in users]
        yield b"".join(publish(NAMES.out(ATTACKER), body) for body in bodies)
