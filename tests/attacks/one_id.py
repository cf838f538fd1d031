"""A sandbox sends refused commands with one id: once, all their receipts were on one subject, and each was compared
with all others.

Each command has its receipt, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import time

from tests.attacks.rig import ATTACKER, NAMES, WITNESS, Rig, publish
from tests.e2e.waiting import eventually

COMMANDS = 300
SUBJECT = NAMES.out(ATTACKER)
BODY = b'{"id":"x","sandbox":"other","text":"t"}'


async def attack(rig: Rig) -> None:
    await flood(rig, SUBJECT, BODY, sender=ATTACKER, told_as=ATTACKER)


async def flood(rig: Rig, subject: str, body: bytes, *, sender: str, told_as: str) -> None:
    """Sends the commands at once, and waits until each has its receipt. `told_as`: the sandbox of these."""
    chunks = itertools.chain([publish(subject, body) * COMMANDS], itertools.repeat(b"PING\r\n"))
    witness = await rig.server.connect(WITNESS)
    receipts = NAMES.receipt(told_as, "x")

    async def have_receipts() -> bool:
        found = await witness.nc.jetstream().stream_info(NAMES.stream_event, subjects_filter=receipts)
        return len(found.state.subjects or {}) == COMMANDS

    began = time.monotonic()
    flooding = asyncio.create_task(rig.flood(chunks, sandbox=sender))
    await eventually(have_receipts, "each command has its receipt")
    rig.note(f"{COMMANDS} receipts after {time.monotonic() - began:.1f} s")
    await flooding
