"""Everything that may go wrong at once: replicas and NATS nodes killed, frozen and restarted at random while iLink
misbehaves and people talk; then one table of what was promised and what came.

`python -m tests.e2e.chaos --minutes 15 --seed 1`. The same seed gives the same plan of events;
what meets what in time is still the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from adapter.simulator import FaultRule
from tests.e2e.world import Audit, World, audit, until, world

FAULTS = ("F1", "F2", "F3", "F6", "F8", "F16", "F18", "F19", "F20", "F21")
ADAPTERS = 3
HOLD_MS = 5000


class Happening(msgspec.Struct):
    """One thing that went wrong, and how long it took until every bot was polled again."""

    at_s: float
    what: str
    from_ms: float
    """By the simulator's clock."""
    to_ms: float = 0.0
    recovered_s: float | None = None


class Report(msgspec.Struct):
    """What a run found."""

    seed: int
    minutes: float
    bots: int
    said: int
    sent: int
    happenings: list[Happening]
    found: Audit
    suppressed: int
    forced_overlaps: int
    """Polls that overlap with one of a frozen replica: its socket stays open, and iLink keeps it."""

    def table(self) -> str:
        """The figures as a Markdown table, then the recovery times by kind of event."""
        found = self.found
        rows: list[tuple[str, Any]] = [
            ("seed", self.seed),
            ("minutes", f"{self.minutes:g}"),
            ("bots", self.bots),
            ("events", len(self.happenings)),
            ("messages said by users", self.said),
            ("of these lost", len(found.lost)),
            ("of these doubled", len(found.doubled)),
            ("users out of order", len(found.disordered)),
            ("commands sent", self.sent),
            ("of these accepted", found.outcomes.get("accepted", 0)),
            ("of these uncertain", found.outcomes.get("uncertain", 0)),
            ("without exactly one final receipt", len(found.receipts)),
            ("wrong on the phones (missing, twice, order)", len(found.phone)),
            ("repeats that iLink suppressed by client_id", self.suppressed),
            ("overlapping polls", len(found.manners)),
            ("overlaps with a poll of a frozen replica", self.forced_overlaps),
        ]
        lines = ["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        lines += ["", "| event | times | recovered, median s | worst s |", "|---|---|---|---|"]
        for what in sorted({happening.what for happening in self.happenings}):
            times = [h.recovered_s for h in self.happenings if h.what == what and h.recovered_s is not None]
            count = sum(h.what == what for h in self.happenings)
            median, worst = (f"{statistics.median(times):.1f}", f"{max(times):.1f}") if times else ("–", "–")
            lines.append(f"| {what} | {count} | {median} | {worst} |")
        return "\n".join(lines)


async def run(folder: Path, *, seed: int, minutes: float, bots: int, environ: dict[str, str] | None = None) -> Report:
    """One run. What iLink forgets when it counts a message as delivered is excluded by `cursor_replay`."""
    rng = random.Random(seed)
    settings: dict[str, Any] = {"seed": seed, "cursor_mode": "cursor_replay", "hold_ms": HOLD_MS}
    async with world(folder, clustered=True, environ=environ, **settings) as made:
        for _ in range(ADAPTERS):
            await made.add_adapter()
        nc = await made.nc()
        for first in range(0, bots, 50):
            names = [f"s{number}" for number in range(first, min(bots, first + 50))]
            await asyncio.gather(*(made.bind(nc, name, made.sim.add_bot()) for name in names))
        await until(lambda: made.sim.stats().parked == bots, "all are polled")
        happenings: list[Happening] = []
        end = time.monotonic() + minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(talk(made, nc, rng=random.Random(seed + 1), until_s=end))
            group.create_task(disturb(made, happenings, rng=rng, until_s=end))
        made.sim.clear_faults()
        with contextlib.suppress(TimeoutError):  # what is missing then is in the audit
            await made.settle(nc, patience_s=240)
        found = await audit(made, nc)
        found.manners, forced = overlaps(made, happenings)
        for sandbox in {fault.split(":")[0] for fault in found.phone + found.disordered}:
            if sandbox in made.bots:
                found.phone.append(f"{sandbox}: sent {made.sent[sandbox]}, shown {made.phone_texts(sandbox)}")
        await nc.close()
        return Report(
            seed=seed,
            minutes=minutes,
            bots=bots,
            said=sum(map(len, made.said.values())),
            sent=sum(map(len, made.sent.values())),
            happenings=happenings,
            found=found,
            suppressed=made.sim.stats().duplicates_suppressed,
            forced_overlaps=forced,
        )


def overlaps(made: World, happenings: list[Happening]) -> tuple[list[str], int]:
    """Overlapping polls as sentences, and how many of them a frozen replica explains.

    The poll that it had out stays with iLink for one hold; one that was about to leave leaves when it thaws. It
    starts no other, so that an overlap later than that is a fault.
    """
    frozen = [(h.from_ms, h.to_ms) for h in happenings if h.what == "adapter frozen"]
    wrong, forced = [], 0
    for violation in made.sim.violations(kind="concurrent_polls"):
        if any(from_ms <= violation.at_ms <= to_ms + HOLD_MS for from_ms, to_ms in frozen):
            forced += 1
        else:
            wrong.append(f"{violation.bot} was polled twice at once at {violation.at_ms:.0f}")
    return wrong, forced


async def talk(made: World, nc: Client, *, rng: random.Random, until_s: float) -> None:
    """About ten messages and ten commands a second, over users picked by chance."""
    number = 0
    while time.monotonic() < until_s:
        for sandbox in rng.sample(sorted(made.bots), k=min(5, len(made.bots))):
            number += 1
            made.say(sandbox, f"message {number}")
            await made.command(nc, sandbox, f"{sandbox}.{number}")
        await asyncio.sleep(0.5)


async def disturb(made: World, happenings: list[Happening], *, rng: random.Random, until_s: float) -> None:
    """One event after another; most begin before the one before has healed."""
    began = time.monotonic()
    events = {
        "adapter killed": kill_adapter,
        "adapter frozen": freeze_adapter,
        "adapter restarted": restart_adapter,
        "node killed": kill_node,
        "node frozen": freeze_node,
        "node restarted": restart_node,
        "iLink faulty": spoil,
        "polls cut": cut,
    }
    healing: set[asyncio.Task[None]] = set()
    busy: set[int] = set()
    while time.monotonic() < until_s - 10:
        what = rng.choice(sorted(events))
        pause_s = rng.uniform(3.0, 12.0)
        happening = Happening(round(time.monotonic() - began, 1), what, made.sim.now_ms)
        happenings.append(happening)
        print(f"{happening.at_s:7.1f} s  {what}", file=sys.stderr, flush=True)
        task = asyncio.create_task(events[what](made, rng, busy))
        task.add_done_callback(functools.partial(ended, made, happening))
        healing |= {task, asyncio.create_task(recovery(made, happening, task))}
        await asyncio.sleep(pause_s)
    await asyncio.gather(*healing)


def ended(made: World, happening: Happening, _: asyncio.Task[None]) -> None:
    happening.to_ms = made.sim.now_ms


async def recovery(made: World, happening: Happening, healing: asyncio.Task[None]) -> None:
    """Until every bot has been polled since the event, or has a poll out."""
    began = time.monotonic()

    def polled(bot: str) -> bool:
        view = made.sim.polls(bot)
        return bool(view.now) or bool(view.records and view.records[-1].start_ms > happening.from_ms)

    left = [record.bot for record in made.bots.values()]
    while left:
        await asyncio.sleep(0.2)
        left = [bot for bot in left if not polled(bot)]
        if healing.done() and time.monotonic() - began > 120:
            return
    happening.recovered_s = round(time.monotonic() - began, 1)


async def kill_adapter(made: World, rng: random.Random, busy: set[int]) -> None:
    adapter, dead_s = rng.choice(made.adapters), rng.uniform(0.5, 10)
    if adapter.running:
        await adapter.kill()
        await asyncio.sleep(dead_s)
        await adapter.start()


async def freeze_adapter(made: World, rng: random.Random, busy: set[int]) -> None:
    adapter, frozen_s = rng.choice(made.adapters), rng.uniform(1, 20)
    adapter.signal(signal.SIGSTOP)
    await asyncio.sleep(frozen_s)
    adapter.signal(signal.SIGCONT)


async def restart_adapter(made: World, rng: random.Random, busy: set[int]) -> None:
    adapter = rng.choice(made.adapters)
    if adapter.running:
        adapter.signal(signal.SIGTERM)
        await adapter.ended()
        await adapter.start()


async def kill_node(made: World, rng: random.Random, busy: set[int]) -> None:
    node, dead_s = rng.choice(made.cluster.nodes), rng.uniform(1, 10)
    if busy:  # two of three away at once is another story: nothing is writable
        return
    busy.add(id(node))
    node.kill()
    await asyncio.sleep(dead_s)
    node.start()
    await made.cluster.healthy()
    busy.discard(id(node))


async def freeze_node(made: World, rng: random.Random, busy: set[int]) -> None:
    node, frozen_s = rng.choice(made.cluster.nodes), rng.uniform(1, 10)
    if busy:
        return
    busy.add(id(node))
    node.send(signal.SIGSTOP)
    await asyncio.sleep(frozen_s)
    node.send(signal.SIGCONT)
    await made.cluster.healthy()
    busy.discard(id(node))


async def restart_node(made: World, rng: random.Random, busy: set[int]) -> None:
    node = rng.choice(made.cluster.nodes)
    if busy:
        return
    busy.add(id(node))
    await node.leave()
    node.start()
    await made.cluster.healthy()
    busy.discard(id(node))


async def spoil(made: World, rng: random.Random, busy: set[int]) -> None:
    rule = made.sim.set_fault(FaultRule(fault=rng.choice(FAULTS), probability=rng.uniform(0.02, 0.2)))
    await asyncio.sleep(rng.uniform(2, 15))
    made.sim.clear_faults(rule_id=rule.id)


async def cut(made: World, rng: random.Random, busy: set[int]) -> None:
    made.sim.cut_polls()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills and freezes everything at random, then counts.")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--bots", type=int, default=500)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {given.seed}, everything is in {folder}", file=sys.stderr)
    report = asyncio.run(run(folder, seed=given.seed, minutes=given.minutes, bots=given.bots))
    print(report.table())
    faults = report.found.faults()
    print("\n".join(faults[:50]))
    print(dict(Counter(fault.split(":", 1)[0] for fault in faults)) if faults else "no fault found")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
