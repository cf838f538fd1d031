"""A sandbox writes commands that end at once: unreadable, repeated, without media, to somebody else's sandbox.

What the adapter writes into its log about one sandbox is bounded, however many its commands are.
"""

from __future__ import annotations

import itertools

from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

BODIES = (
    b"x",
    b'{"id":"d","text":"hi"}',
    b'{"items":[{"kind":"file","media":{"object":"attacker/nothing"}}]}',
    b'{"text":"x","sandbox":"other"}',
)
TOGETHER = 50
BYTES_PER_S = 100_000
LINES_PER_MINUTE = 300
"""Of all events about the attacker."""


async def attack(rig: Rig) -> None:
    (adapter,) = rig.world.adapters
    before, chunk = len(adapter.log.read_bytes()), publish_all() * TOGETHER
    done = await rig.flood(itertools.repeat(chunk), bytes_per_s=BYTES_PER_S)
    text = adapter.log.read_bytes()[before:]
    lines = sum(f'{ATTACKER}"'.encode() in line for line in text.splitlines())
    rig.note(f"{lines} lines of the log for {done.chunks * TOGETHER * len(BODIES):,} commands")
    if lines > LINES_PER_MINUTE * (1 + rig.seconds / 60):
        rig.fail(f"{lines} lines of the log")


def publish_all() -> bytes:
    return b"".join(publish(NAMES.out(ATTACKER), body) for body in BODIES)
