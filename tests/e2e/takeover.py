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
from itertools import pairwise
from pathlib import Path

from adapter.simulator.world import Bot
from tests.e2e.world import AdapterProcess, World, until, world

HOLD_MS = 3000
ADAPTERS = 3


def unpolled_s(bot: Bot, since_ms: float) -> float:
    """How long a bot had no poll out since the event; one that a stopped replica has counts until its hold ends."""
    records = sorted([*bot.poll_records, *(poll.record for poll in bot.polls)], key=lambda record: record.start_ms)
    gaps_ms = [0.0]
    for before, after in pairwise(records):
        if after.start_ms > since_ms:
            gaps_ms.append(after.start_ms - (before.end_ms or since_ms))
    return max(gaps_ms) / 1000


async def measure(made: World, adapter: AdapterProcess, number: int) -> float:
    """The longest time in seconds for which any bot was not polled after the event."""
    bots = [made.sim.world.bots[record.bot] for record in made.bots.values()]
    await until(lambda: all(bot.polls for bot in bots), "all are polled")
    since_ms = made.sim.world.clock.exact_ms()
    adapter.signal(number)
    if number != signal.SIGSTOP:
        await adapter.ended()

    def anew() -> bool:
        return all(bot.polls and bot.polls[-1].record.start_ms > since_ms for bot in bots)

    await until(anew, "all are polled anew")
    found = max(unpolled_s(bot, since_ms) for bot in bots)
    adapter.signal(signal.SIGCONT)
    await adapter.start()
    return found


async def shares(made: World) -> None:
    """Until every adapter owns something again, by its own word."""
    for adapter in made.adapters:
        before = len(adapter.lines("adapter.started"))
        await until(
            lambda adapter=adapter, before=before: len(adapter.lines("partitions.taken")) >= before,  # type: ignore[misc]
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
    parser = argparse.ArgumentParser(description="Measures takeovers.")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--bots", type=int, default=200)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="takeover-"))
    print(asyncio.run(run(folder, times=given.times, bots=given.bots)))


if __name__ == "__main__":
    main()
