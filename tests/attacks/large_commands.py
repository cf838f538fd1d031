"""A sandbox publishes the largest commands that the server takes, nonsense and well-formed ones in turn.

They fill its own queue and the dead letters, which end at their size. JetStream's storage does not: inbound messages
and leases go on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from tests.attacks.rig import ATTACKER, NAMES, WITNESS, Rig, publish

SIZES = (999_000, 512_000, 300_000, 250_000)
"""What a server takes from anybody, what it takes from a sandbox, and what a command may have."""
ENVIRON = {"WECHAT_NATS_IN_MAX_BYTES": str(6 << 30)}


async def attack(rig: Rig) -> None:
    for size in SIZES:
        done = await rig.flood(_commands(size), seconds=rig.seconds / len(SIZES))
        refused = f" ({sum(done.heard.values())} times cut off)" if done.heard else ""
        rig.note(f"{size // 1000} kB: {done.written / rig.seconds * len(SIZES) / 1e6:,.0f} MB/s{refused}")
    witness = await rig.connect(WITNESS)
    for name in (NAMES.stream_out, NAMES.stream_dead):
        info = json.loads((await witness.nc.request(f"$JS.API.STREAM.INFO.{name}", timeout=30)).data)
        rig.note(f"{name} {info['state']['bytes'] / 1e6:,.0f} MB")


def _commands(size: int) -> Iterator[bytes]:
    subject = NAMES.out(ATTACKER)
    well = json.dumps({"text": "x" * (size - 12)}).encode()
    for command in itertools.cycle((b"x" * size, well)):
        yield publish(subject, command)
