"""A sandbox asks its own services as fast as the server reads, tiny requests, with and without somewhere to answer.

Requests that nobody can serve must delay neither what others hear nor their sends: JetStream's connection carries
none of them. The services of others answer late, or not at all while their connection is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

from nats.errors import Error as NatsError

from tests.attacks.rig import ATTACKER, NAMES, VICTIM, Rig, percentile, publish

TOGETHER = 1000
ASKED_S = 0.2
"""Between two requests of the victim."""
PATIENCE_S = 10.0


async def attack(rig: Rig) -> None:
    subject = NAMES.svc(f"window.{ATTACKER}")
    request = publish(subject, b"{}", reply=f"_INBOX_{ATTACKER}.x")
    chunk = request * (TOGETHER - 10) + publish(subject, b"{}") * 10
    asking = asyncio.create_task(_ask(rig))
    done = await rig.flood(itertools.repeat(chunk))
    rig.note(f"{done.chunks * TOGETHER / rig.seconds:,.0f} requests/s")
    answered, unanswered = await asking
    p50, p99 = percentile(answered, 50), percentile(answered, 99)
    rig.note(f"victim's own requests {p50:,.0f}/{p99:,.0f} ms, {unanswered} unanswered")


async def _ask(rig: Rig) -> tuple[list[float], int]:
    """The victim asks for its window: milliseconds of what was answered, and how many were not."""
    victim = await rig.connect(VICTIM)
    took: list[float] = []
    asked = []

    async def ask() -> None:
        began = time.monotonic()
        with contextlib.suppress(NatsError):  # counted as unanswered
            await victim.nc.request(NAMES.svc(f"window.{VICTIM}"), b"{}", timeout=PATIENCE_S)
            took.append((time.monotonic() - began) * 1000)

    end = time.monotonic() + rig.seconds
    while time.monotonic() < end:
        asked.append(asyncio.create_task(ask()))
        await asyncio.sleep(ASKED_S)
    await asyncio.gather(*asked)
    return took, len(asked) - len(took)
