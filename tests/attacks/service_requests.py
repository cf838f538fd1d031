"""A sandbox asks its own services as fast as the server reads, tiny requests, with and without somewhere to answer.

Requests that nobody can serve must delay neither what others hear nor their sends: JetStream's connection carries
none of them.
"""

from __future__ import annotations

import itertools

from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

TOGETHER = 1000


async def attack(rig: Rig) -> None:
    subject = NAMES.svc(f"window.{ATTACKER}")
    request = publish(subject, b"{}", reply=f"_INBOX_{ATTACKER}.x")
    chunk = request * (TOGETHER - 10) + publish(subject, b"{}") * 10
    done = await rig.flood(itertools.repeat(chunk))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} requests/s")
