"""How long bots are not polled when a replica is killed, stopped or told to end: a table. Nothing else goes wrong.

`python -m tests.e2e.takeover --times 10 --bots 200`; what happens when everything goes wrong, `chaos` shows.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.world import AdapterProcess, World, until, world

HOLD_MS = 3000
ADAPTERS = 3


async def measure(made: World, adapter: AdapterProcess, number: int) -> float:
    """Seconds from the event until every bot is polled again, by a poll that began since."""
    await until(lambda: made.sim.stats().parked == len(made.bots), "all are polled")
    bots = [made.sim.world.bots[record.bot] for record in made.bots.values()]
    mine = {bot.id: bot.polls[-1].record.start_ms for bot in bots if bot.polls}
    began = time.monotonic()
    adapter.signal(number)
    if number != signal.SIGSTOP:
        await adapter.ended()
    await asyncio.sleep(0.1)
    while not all(bot.polls for bot in bots):
        await asyncio.sleep(0.01)
    gone = time.monotonic() - began
    if number == signal.SIGSTOP:  # its polls stay with iLink for one hold: only a later one is another's
        while not all(bot.polls and bot.polls[-1].record.start_ms > mine.get(bot.id, 0.0) for bot in bots):
            await asyncio.sleep(0.01)
        gone = time.monotonic() - began
        adapter.signal(signal.SIGCONT)
    await adapter.start()
    return gone


async def shares(made: World) -> None:
    """Until every adapter owns something again, by its own word."""
    for adapter in made.adapters:
        before = len(adapter.lines("adapter.started"))
        await until(
            lambda adapter=adapter, before=before: len(adapter.lines("shards.claimed")) >= before,  # type: ignore[misc]
            "it owns something",
        )
    await asyncio.sleep(3)  # trades in progress end


async def run(folder: Path, *, times: int, bots: int) -> str:
    rows = ["| event | times | median s | worst s |", "|---|---|---|---|"]
    environ = {"WECHAT_NATS_LEASE_S": "4"}
    async with world(folder, environ=environ, cursor_mode="cursor_replay", hold_ms=HOLD_MS) as made:
        for _ in range(ADAPTERS):
            await made.add_adapter()
        nc = await made.nc()
        for number in range(bots):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
        for what, sent in (("kill -9", signal.SIGKILL), ("SIGTERM", signal.SIGTERM), ("SIGSTOP", signal.SIGSTOP)):
            took = []
            for number in range(times):
                await shares(made)
                took.append(await measure(made, made.adapters[number % ADAPTERS], sent))
                print(f"{what}: {took[-1]:.1f} s", file=sys.stderr, flush=True)
            rows.append(f"| {what} | {times} | {statistics.median(took):.1f} | {max(took):.1f} |")
        overlaps = len(made.sim.violations(kind="concurrent_polls"))
        await nc.close()
    return "\n".join([*rows, "", f"{overlaps} polls overlapped."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures take-overs.")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--bots", type=int, default=200)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="takeover-"))
    print(asyncio.run(run(folder, times=given.times, bots=given.bots)))


if __name__ == "__main__":
    main()
