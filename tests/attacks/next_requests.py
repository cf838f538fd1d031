"""A sandbox with a full inbox asks for its next messages as fast as the server reads, each time as a new reader.

So each request is a write to the readers' bucket, and an answer of a hundred messages. Every tenth confirms what does
not exist.
"""

from __future__ import annotations

import itertools

from tests.attacks.replays import TOGETHER, prepare
from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

__all__ = ["attack", "prepare"]


async def attack(rig: Rig) -> None:
    subject, reply = NAMES.svc(f"next.{ATTACKER}"), f"_INBOX_{ATTACKER}.x"
    begin = publish(subject, b'{"max":100}', reply=reply)
    confirm = publish(subject, b'{"reader":1,"after":"9007199254740991.0"}', reply=reply)
    done = await rig.flood(itertools.repeat((begin * 9 + confirm) * (TOGETHER // 10)))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} requests/s")
