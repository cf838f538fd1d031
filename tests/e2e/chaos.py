"""Everything that may go wrong at once: replicas and NATS servers killed, frozen and restarted at random while iLink
misbehaves and people talk; then one table of what was promised and what came.

`python -m tests.e2e.chaos --minutes 15 --seed 1`: so many minutes in all, the start, the healing and the audit
included. The same seed gives the same plan of events; what meets what in time is still the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from tests.e2e.audit import Audit, Said, audit
from tests.e2e.reading import Listener
from tests.e2e.troubles import Happening, Troubles, recoveries
from tests.e2e.world import World, time_ms, until, world

ADAPTERS = 3
HOLD_MS = 5000
"""Of the simulator's polls."""
TAIL = 0.25
"""This part of the time is kept for healing, settling and the audit."""
LEAST_S = 40.0
"""Of trouble, however long the start took: on a slow machine a short run would else meet nothing that matters."""
IN_HAND_MS = 1000
"""So long a batch may be in an adapter's hands, as long as the bus takes it."""
ELECTION_MS = 10_000
"""So long the bus may be away after a server went or came."""
LONGEST_LOSS_MS = 40_000
"""No adapter is stopped, or cut off, for longer."""
PER_S = 10
"""Messages, and commands, per second over all users."""


class Report(msgspec.Struct):
    """What a run found."""

    command: str
    mode: str
    seed: int
    bots: int
    troubled_s: float
    took_s: float
    happened: list[Happening]
    said: int
    sent: int
    found: Audit
    suppressed: int
    forced_overlaps: int
    """Polls, or sends, that overlap with one of a frozen replica: its socket stays open, and iLink keeps it."""

    def table(self) -> str:
        """The figures as one Markdown table."""
        found = self.found
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(found.outcomes.items()))
        rows: list[tuple[str, Any]] = [
            ("command", f"`{self.command}`"),
            ("iLink", self.mode),
            ("adapters, NATS servers, bots", f"{ADAPTERS}, 3, {self.bots}"),
            ("seconds in all, of them with trouble", f"{self.took_s:.0f}, {self.troubled_s:.0f}"),
            ("events", len(self.happened)),
            ("messages sent by users", self.said),
            ("received on the bus", found.stored),
            ("told to live subscribers (once more by a server)", f"{found.live} ({found.repeated_live})"),
            ("commands sent", self.sent),
            ("received on the phones", found.shown),
            ("final receipts", outcomes),
            ("**messages lost**", len(found.lost)),
            ("**duplicates** on the bus, or told live", len(found.doubled)),
            ("**duplicates** on the phones", len(found.shown_twice)),
            ("**out of order** on the bus (users)", len(found.disordered)),
            ("**out of order** on the phones (users)", len(found.shown_disordered)),
            ("**in another's sandbox, receipt or phone**", len(found.astray)),
            ("**receipts missing**, or more than one", len(found.receipts)),
            ("**accepted, and not on the phone**", len(found.unseen)),
            ("**polls or sends overlapping**", len(found.manners)),
            ("overlaps with what a frozen adapter had out", self.forced_overlaps),
            ("repeats that iLink suppressed by their client_id", self.suppressed),
        ]
        if self.mode == "ack_on_delivery":
            rows += [
                (
                    "lost with an adapter that was killed (could have been)",
                    f"{found.excused_lost} ({found.may_be_lost})",
                ),
                ("late from an adapter that had been stopped or cut off", found.excused_late),
            ]
        for what, times, median_s, worst_s in recoveries(self.happened):
            figures = f"{median_s:.1f}, {worst_s:.1f}" if median_s is not None else "–"
            rows.append((f"recovered after {times} × {what}: median s, worst s", figures))
        return "\n".join(["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


async def run(folder: Path, *, command: str, mode: str, seed: int, minutes: float, bots: int) -> Report:
    """One run."""
    began = time.monotonic()
    end = began + minutes * 60 * (1 - TAIL)
    settings: dict[str, Any] = {"seed": seed, "cursor_mode": mode, "hold_ms": HOLD_MS}
    async with world(folder, clustered=True, environ={"WECHAT_NATS_LEASE_S": "4"}, **settings) as made:
        for _ in range(ADAPTERS):
            await made.add_adapter()
        nc = await made.nc()
        for first in range(0, bots, 50):
            names = [f"s{number}" for number in range(first, min(bots, first + 50))]
            await asyncio.gather(*(made.bind(nc, name, made.sim.add_bot()) for name in names))
        await until(lambda: made.sim.stats().parked == bots, "all are polled")
        listener = Listener()
        ears = await made.nc()
        await listener.listen(ears)
        troubles = Troubles(made, random.Random(seed))
        troubled = time.monotonic()
        end = max(end, troubled + LEAST_S)
        async with asyncio.TaskGroup() as group:
            group.create_task(talk(made, nc, rng=random.Random(seed + 1), until_s=end))
            group.create_task(troubles.befall(end))
        troubled_s = end - troubled
        made.sim.clear_faults()
        lossy = mode == "ack_on_delivery"
        try:
            await made.settle(nc, patience_s=max(400.0, began + minutes * 60 - time.monotonic() - 10), lossy=lossy)
        except TimeoutError as exc:
            print(f"it did not settle: {exc}", file=sys.stderr)
        lost = in_killed_hands(made, troubles.happened) if lossy else set()
        late = in_hand_at_a_loss(made) if lossy else set()
        found = await audit(made, nc, listener=listener, may_be_lost=lost, may_be_late=late)
        found.manners, forced = overlaps(made, troubles.happened)
        await ears.close()
        await nc.close()
        return Report(
            command=command,
            mode=mode,
            seed=seed,
            bots=bots,
            troubled_s=troubled_s,
            took_s=time.monotonic() - began,
            happened=troubles.happened,
            said=sum(map(len, made.said.values())),
            sent=sum(map(len, made.sent.values())),
            found=found,
            suppressed=made.sim.stats().duplicates_suppressed,
            forced_overlaps=forced,
        )


async def talk(made: World, nc: Client, *, rng: random.Random, until_s: float) -> None:
    """Messages and commands of users picked by chance. Every third sandbox is served over plain wechat.out."""
    number = 0
    while time.monotonic() < until_s:
        for sandbox in rng.sample(sorted(made.bots), k=min(PER_S // 2, len(made.bots))):
            number += 1
            made.say(sandbox, f"message {number}")
            await made.command(nc, sandbox, f"{sandbox}.{number}", plain=sandbox[-1] in "369")
        await asyncio.sleep(0.5)


def overlaps(made: World, happened: list[Happening]) -> tuple[list[str], int]:
    """Overlapping polls and sends as sentences, and how many of them a frozen replica explains.

    What it had out stays with iLink for one hold; what was about to leave leaves when it thaws. It starts nothing
    else, so that an overlap later than that is a fault.
    """
    frozen = [(one.from_ms, one.to_ms) for one in happened if one.what == "adapter frozen" and one.whom]
    wrong, forced = [], 0
    for kind in ("concurrent_polls", "concurrent_sends"):
        for violation in made.sim.violations(kind=kind):
            if any(from_ms <= violation.at_ms <= to_ms + HOLD_MS for from_ms, to_ms in frozen):
                forced += 1
            else:
                wrong.append(f"{kind} of {violation.bot} at {violation.at_ms:.0f}: {violation.detail}")
    return wrong, forced


def in_killed_hands(made: World, happened: list[Happening]) -> set[Said]:
    """Messages that iLink counts as delivered and that were in an adapter's hands when it was killed.

    They are there as long as they are being stored: that is short, unless the bus is away or the adapter is frozen.
    """
    windows = []
    for kill in (one for one in happened if one.what == "adapter killed" and one.whom):
        since_ms = kill.from_ms
        for other in happened:
            away = other.what.startswith("server") and other.whom and kill.from_ms <= other.to_ms + ELECTION_MS
            stopped = other.what == "adapter frozen" and other.whom == kill.whom and kill.from_ms <= other.to_ms
            if (away or stopped) and other.from_ms <= kill.from_ms:
                since_ms = min(since_ms, other.from_ms)
        windows.append((since_ms - IN_HAND_MS, kill.from_ms + IN_HAND_MS))
    delivered = deliveries(made)
    return {said for said, at_ms in delivered.items() if any(first <= at_ms <= last for first, last in windows)}


def in_hand_at_a_loss(made: World) -> set[Said]:
    """Messages that iLink counts as delivered and that an adapter had in hand when it had lost the bot.

    It had been stopped, or cut off from the bus, and says so when it goes on. It tells them then: late.
    """
    sandboxes = {record.bot: sandbox for sandbox, record in made.bots.items()}
    delivered = deliveries(made)
    late: set[Said] = set()
    for adapter in made.adapters:
        for line in adapter.lines("inbound.fenced"):
            at_ms, sandbox = time_ms(line), sandboxes[line["bot"]]
            late |= {
                said for said, when_ms in delivered.items()
                if said.sandbox == sandbox and at_ms - LONGEST_LOSS_MS <= when_ms <= at_ms
            }  # fmt: skip
    return late


def deliveries(made: World) -> dict[Said, float]:
    """When iLink gave each message away, as it counts."""
    at_ms: dict[str, float] = {}
    for bot in made.sim.world.bots.values():
        for poll in bot.poll_records:
            at_ms |= dict.fromkeys(poll.ids, poll.end_ms)
    return {Said(*said): at_ms[ident] for said, ident in made.said_ids.items() if ident in at_ms}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills and freezes everything at random, then counts.")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--minutes", type=float, default=15.0, help="wall clock, all in all")
    parser.add_argument("--bots", type=int, default=500)
    parser.add_argument("--mode", choices=("cursor_replay", "ack_on_delivery"), default="cursor_replay")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    command = f"python -m tests.e2e.chaos --minutes {given.minutes:g} --seed {given.seed} --bots {given.bots}"
    command += f" --mode {given.mode}"
    print(f"{command}\nthe adapters' logs are in {folder}", file=sys.stderr)
    report = asyncio.run(
        run(folder, command=command, mode=given.mode, seed=given.seed, minutes=given.minutes, bots=given.bots)
    )
    print(report.table())
    faults = report.found.faults()
    print("\n".join(fault[:500] for fault in faults[:50]) if faults else "no fault found")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
