"""A sandbox sends commands whose texts cost a reader of Markdown the square of their
length: tabs, quotes in quotes, brackets, tables, and every other text of `tests/hostile.py`, long and short.

No lease may be lost, and the victim must not wait.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import msgspec

from adapter.contract.messages import FINAL_OUTCOMES
from tests.attacks.rig import NAMES, WITNESS, Rig
from tests.hostile import TEXTS

SIZES = (39_990, 8000, 1000)
BYTES_PER_S = 1_500_000
"""Ten times of what can be read. A flood of bytes alone is another attack."""
LONGEST = 250_000
"""Bytes of a command that is read."""


def commands(rng: random.Random, sandbox: str) -> Iterator[bytes]:
    """As they are published, for ever."""
    texts = [make(size) for make in TEXTS.values() for size in SIZES]
    bodies = [msgspec.json.encode({"text": text}) for text in texts if "\ud83d" not in text]
    bodies = [body for body in bodies if len(body) <= LONGEST]
    rng.shuffle(bodies)
    subject = NAMES.out(sandbox)
    return itertools.cycle(f"PUB {subject} {len(body)}\r\n".encode() + body + b"\r\n" for body in bodies)


async def attack(rig: Rig) -> None:
    (attacker,) = rig.attackers
    done = await rig.flood(commands(rig.rng, attacker), bytes_per_s=BYTES_PER_S)
    witness = await rig.server.connect(WITNESS)
    told = Counter(
        receipt.outcome
        for receipt in await rig.world.receipts(witness.nc)
        if receipt.sandbox == attacker and receipt.outcome in FINAL_OUTCOMES
    )
    rig.note(f"{done.chunks / rig.seconds:,.0f} commands/s, of which {sum(told.values())} have ended: {dict(told)}")
