"""What the bridge costs, beside a bridge that promises nothing: `make bench`, or `python -m tests.bench in out idle`.

Each row starts everything afresh. The CPU is the bridge's own process; messages per second are what two cores that
the server, iLink's stand-in and the reader share give together, so compare them within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.windows import LOOKS_PER_S
from tests.bench.plot import bars
from tests.bench.rig import Process, Received, Rig, rig

Cell = str | float

HOLD_S = 35.0
SETTLE_S = 10.0
"""After the last bot's first poll, and the looks at their users' windows, for what else a start leaves to be done."""
WRITING = "floor that writes"
PLOT = Path(__file__).with_name("bench.svg")


class Table(NamedTuple):
    """One table of the report."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def text(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.head) + " |", "|---" * len(self.head) + "|"]
        return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in self.rows])


class Rows(list[tuple[Cell, ...]]):
    """Rows that are also said as they come: a whole run takes minutes."""

    def append(self, row: tuple[Cell, ...]) -> None:
        super().append(row)
        sys.stderr.write("  " + ", ".join(map(_cell, row)) + "\n")


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Bench:
    """Runs measurements in folders of its own, and says what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    @contextlib.asynccontextmanager
    async def rig(self, what: str, **options: Any) -> Any:
        self.number += 1
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what} …\n")
        folder = self.folder / str(self.number)
        await asyncio.to_thread(folder.mkdir)
        async with rig(folder, **options) as made:
            nc = await made.connect()
            try:
                yield made, nc
            finally:
                await nc.close()
        await asyncio.to_thread(shutil.rmtree, folder)


async def bridge_in(made: Rig, nc: Client, kind: str, bots: int) -> Process:
    """A bridge whose polls all wait: the adapter, or a floor on the adapter's streams."""
    adapter = made.adapter()
    if kind == "adapter":
        await made.bind(nc, bots)
        await made.polled(bots)
        return adapter
    await made.bind(nc, 1)  # the streams are there once this is answered
    made.drop(adapter)
    floor = made.floor("in", bots, writes=kind == WRITING)
    await made.polled(bots)
    return floor


def check(disordered: int, more: int = 0) -> None:
    """What was waited for is complete; it must have come in order and once, too, or the figures are worth nothing."""
    if disordered or more:
        raise RuntimeError(f"{disordered} came twice or out of order, {more} more than were asked for")


async def heard(nc: Client, *, timed: bool = False) -> Received:
    received = Received(timed=timed, numbered=True)
    await nc.subscribe("wechat.in.*", cb=received.on_message, pending_msgs_limit=0, pending_bytes_limit=0)
    await nc.flush()
    return received


async def said_once(made: Rig, received: Received, bots: int) -> None:
    """Every bot's user writes, so that what is read of each but once, at their first message, is read."""
    await made.ask("feed", bots=list(range(bots)), count=1, per_answer=1)
    await received.until(bots)


async def inbound(bench: Bench) -> Table:
    head = ("bots", "per answer", "bridge", "sync", "messages/s", "CPU µs/message", "of the floor's rate")
    rows = Rows()
    plan = [
        (1, 1, 4000, ""),
        (1, 20, 40_000, ""),
        (100, 1, 10_000, ""),
        (100, 20, 40_000, ""),
        (1000, 1, 10_000, ""),
        (1000, 20, 40_000, ""),
        (5000, 1, 10_000, ""),
        (5000, 20, 100_000, ""),
        (100, 1, 3000, "always"),
    ]
    for bots, per_answer, total, sync in plan:
        rates: dict[str, float] = {}
        bridges = ("floor", WRITING, "adapter") if bots == 1 or per_answer > 1 else ("floor", "adapter")
        for kind in bridges:
            async with bench.rig(f"in: {kind}, {bots} bots, {per_answer} per answer", sync=sync) as (made, nc):
                process = await bridge_in(made, nc, kind, bots)
                received = await heard(nc)
                await said_once(made, received, bots)
                before, began = process.cpu_s(), time.monotonic()
                count = total // bots * bots
                await made.ask("feed", bots=list(range(bots)), count=total // bots, per_answer=per_answer)
                await received.until(bots + count)
                check(received.disordered)
                rates[kind] = count / (received.when - began)
                cpu_us = (process.cpu_s() - before) / count * 1e6
                share = f"{rates[kind] / rates['floor']:.0%}" if kind != "floor" else ""
                rows.append((bots, per_answer, kind, sync or "default", rates[kind], cpu_us, share))
    return Table("Inbound: iLink's answer to the subscriber", head, rows)


async def latency(bench: Bench) -> Table:
    head = ("what", "bridge", "p50 ms", "p99 ms", "worst ms", "CPU µs/message")
    rows = Rows()

    def add(what: str, kind: str, ages: list[float], cpu_s: float) -> None:
        ages.sort()
        p99 = ages[int(len(ages) * 0.99)]
        rows.append((what, kind, statistics.median(ages), p99, ages[-1], cpu_s / len(ages) * 1e6))

    for kind in ("floor", "adapter"):
        async with bench.rig(f"latency in: {kind}") as (made, nc):
            process = await bridge_in(made, nc, kind, 100)
            received = await heard(nc, timed=True)
            before = process.cpu_s()
            await made.ask("trickle", bots=100, count=1000, per_s=100)
            await received.until(1000)
            check(received.disordered)
            add("iLink's answer to subscriber", kind, received.ages_ms, process.cpu_s() - before)
    async with bench.rig("latency out: adapter") as (made, nc):
        process = await ready_to_send(made, nc, 100)
        before = process.cpu_s()
        add("command to receipt", "adapter", await asked(nc, 100, count=1000, per_s=100), process.cpu_s() - before)
    return Table("Latency at 100 messages/s, 100 bots, idle cost included", head, rows)


async def asked(nc: Client, bots: int, *, count: int, per_s: float) -> list[float]:
    """Milliseconds from each command to its receipt, for commands that are sent evenly in time."""
    sent: dict[str, float] = {}
    ages: list[float] = []
    done = asyncio.Event()

    async def on_receipt(msg: Msg) -> None:
        ages.append((time.monotonic() - sent[msgspec.json.decode(msg.data)["command"]]) * 1000)
        if len(ages) == count:
            done.set()

    await nc.subscribe("wechat.event.*.receipt", cb=on_receipt)
    await nc.flush()
    began = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
        sent[f"c{number}"] = time.monotonic()
        await nc.publish(f"wechat.out.s{number % bots}", b'{"id":"c%d","text":"hello there"}' % number)
    await done.wait()
    return ages


async def ready_to_send(made: Rig, nc: Client, bots: int) -> Process:
    """An adapter whose users have all written, so that each may be answered."""
    adapter = made.adapter()
    await made.bind(nc, bots)
    await made.polled(bots)
    await said_once(made, await heard(nc), bots)
    return adapter


async def push(nc: Client, bots: int, count: int) -> None:
    """Commands to all sandboxes in turn, as fast as the server takes them."""
    for number in range(count):
        await nc.publish(f"wechat.out.s{number % bots}", b'{"text":"hello there %d"}' % number)
        if number % 200 == 199:
            await nc.flush()


async def outbound(bench: Bench) -> Table:
    head = ("bots", "bridge", "sync", "commands/s", "CPU µs/command", "of the floor's rate")
    rows = Rows()
    for bots, count, sync in ((100, 8000, ""), (1000, 8000, ""), (100, 3000, "always")):
        async with bench.rig(f"out: floor, {bots} bots", sync=sync) as (made, nc):
            adapter = made.adapter()
            await made.bind(nc, 1)
            made.drop(adapter)
            js = nc.jetstream()
            await js.delete_stream("WECHAT_OUT")
            await js.add_stream(name="WECHAT_OUT", subjects=["wechat.out.*"], retention="workqueue")
            await js.add_consumer("WECHAT_OUT", durable_name="floor", ack_policy="explicit", max_ack_pending=5000)
            process = made.floor("out", bots)
            before, began = process.cpu_s(), time.monotonic()
            await push(nc, bots, count)
            while (await made.ask("stats"))["sends"] < count:
                await asyncio.sleep(0.02)
            floor = count / (time.monotonic() - began)
            rows.append((bots, "floor", sync or "default", floor, (process.cpu_s() - before) / count * 1e6, ""))
        async with bench.rig(f"out: adapter, {bots} bots", sync=sync) as (made, nc):
            process = await ready_to_send(made, nc, bots)
            receipts = await told(nc)
            before, began = process.cpu_s(), time.monotonic()
            await push(nc, bots, count)
            await receipts.until(count)
            stats = await made.ask("stats")
            check(stats["disordered"], stats["sends"] - count)
            rate = count / (receipts.when - began)
            cpu_us = (process.cpu_s() - before) / count * 1e6
            rows.append((bots, "adapter", sync or "default", rate, cpu_us, f"{rate / floor:.0%}"))
    return Table("Outbound: command to receipt", head, rows)


async def told(nc: Client) -> Received:
    received = Received()
    await nc.subscribe("wechat.event.*.receipt", cb=received.on_message, pending_msgs_limit=0, pending_bytes_limit=0)
    await nc.flush()
    return received


async def started(made: Rig, nc: Client, kind: str, bots: int) -> tuple[Process, float, float]:
    """A bridge that starts with all its bots bound; its MiB with none, and seconds until all of them are polled."""
    if kind == "adapter":
        process = made.adapter()
        await made.bind(nc, 1)
        empty = process.memory_mib()
        await made.bind(nc, bots)
        await made.polled(bots)
    else:
        process = await bridge_in(made, nc, "floor", 1)
        empty = process.memory_mib()
    made.drop(process)
    began = time.monotonic()
    process = made.adapter() if kind == "adapter" else made.floor("in", bots)
    await made.polled(bots)
    return process, empty, time.monotonic() - began


async def idle(bench: Bench) -> Table:
    """All of them at the same time, since waiting costs little: one after the other takes four minutes more."""
    head = ("bots", "bridge", "TLS", "all polled after, s", "CPU s/min", "private MiB", "KiB/bot", "connections/poll")
    rows = Rows()
    plan = [("adapter", bots, tls) for tls in (True, False) for bots in (10_000, 5000, 1000)]
    plan.append(("floor", 5000, False))
    async with contextlib.AsyncExitStack() as stack:
        rigs, settled = [], 0.0
        for kind, bots, tls in plan:
            what = f"idle: {kind}, {bots} bots{', TLS' if tls else ''}"
            made, nc = await stack.enter_async_context(bench.rig(what, tls=tls))
            rigs.append((made, *await started(made, nc, kind, bots)))
            settled = max(settled, time.monotonic() + SETTLE_S + (bots / LOOKS_PER_S if kind == "adapter" else 0))
        await asyncio.sleep(settled - time.monotonic())
        before = [(await made.ask("stats"), process.cpu_s(), time.monotonic()) for made, process, _, _ in rigs]
        await asyncio.sleep(HOLD_S + 1)  # so that each bot polls again
        for given, (made, process, empty, polled_s), (stats, cpu_s, began) in zip(plan, rigs, before, strict=True):
            kind, bots, tls = given
            cpu = (process.cpu_s() - cpu_s) * 60 / (time.monotonic() - began)
            after, memory = await made.ask("stats"), process.memory_mib()
            reused = (after["connections"] - stats["connections"]) / max(1, after["polls"] - stats["polls"])
            row = (bots, kind, "yes" if tls else "no", polled_s, cpu, memory, (memory - empty) * 1024 / bots, reused)
            rows.append(row)
    return Table("Idle bots, and a start with all of them bound", head, rows)


async def shared(bench: Bench) -> Table:
    """Two processes on the machine's cores, and what is left when one is killed."""
    head = ("bots", "messages/s", "CPU µs/message", "shares", "after a kill -9 all polled by the other, s")
    rows = Rows()
    for bots, total in ((100, 10_000), (10_000, 10_000)):
        async with bench.rig(f"two adapters, {bots} bots") as (made, nc):
            both = [made.adapter(), made.adapter()]
            await made.split(nc, len(both))
            await made.bind(nc, bots)
            await made.polled(bots)
            received = await heard(nc)
            before, began = [process.cpu_s() for process in both], time.monotonic()
            await made.ask("feed", bots=list(range(bots)), count=total // bots, per_answer=1)
            await received.until(total)
            check(received.disordered)
            rate = total / (received.when - began)
            spent = [process.cpu_s() - cpu_s for process, cpu_s in zip(both, before, strict=True)]
            await made.polled(bots)
            shares = " : ".join(f"{cpu_s / sum(spent):.0%}" for cpu_s in spent)
            both[0].stop()
            killed = time.monotonic()
            await made.fewer(bots)
            await made.polled(bots)
            rows.append((bots, rate, sum(spent) / total * 1e6, shares, time.monotonic() - killed))
    return Table("Two adapters: shares of the CPU spent, and a take-over", head, rows)


def plot(inbound: Table, outbound: Table) -> str:
    """CPU per message of both bridges, of every row."""
    found: dict[str, dict[str, float]] = {}
    for bots, per, kind, sync, _, cpu_us, _ in inbound.rows:
        found.setdefault(f"in: {bots} bots, {per} per answer, sync {sync}", {})[str(kind)] = float(cpu_us)
    for bots, kind, sync, _, cpu_us, _ in outbound.rows:
        found.setdefault(f"out: {bots} bots, sync {sync}", {})[str(kind)] = float(cpu_us)
    return bars("CPU per message, µs", found)


SUITES: dict[str, Callable[[Bench], Awaitable[Table]]] = {
    "in": inbound,
    "latency": latency,
    "out": outbound,
    "two": shared,
    "idle": idle,
}


async def run(names: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    bench = Bench(folder)
    tables = {}
    for name in names:
        tables[name] = await SUITES[name](bench)
        print(tables[name].text() + "\n", flush=True)
    await asyncio.to_thread(shutil.rmtree, folder)
    if {"in", "out"} <= tables.keys():
        await asyncio.to_thread(PLOT.write_text, plot(tables["in"], tables["out"]))
        sys.stderr.write(f"{PLOT}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="all of them, if none is named")
    given = parser.parse_args()
    asyncio.run(run(given.suites or list(SUITES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
