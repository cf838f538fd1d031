"""What the bridge costs, beside a bridge that promises nothing: `make bench`, or `python -m tests.bench in out idle`.

Each row starts everything afresh. The CPU is the bridge's own process; messages per second are what two cores that
the server, iLink's stand-in and the reader share give together, so compare them within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from adapter.contract.messages import Bind, Unbind
from adapter.contract.names import Names
from tests.bench.plot import bars
from tests.bench.rig import Process, Received, Rig, rig
from tests.e2e.asker import Asker

NAMES = Names()
HOLD_S = 35.0
LONG_S = 60.0
"""How long a poll may be said to wait."""
START_S = 12.0
"""How long polls wait while more bots start than one process polls well."""
SHORT_S = 1.0
"""How long a poll waits while bots are shared: one moves at its next."""
BRIEF_S = 0.6
"""How long a poll waits while as many are made as may be; iLink's are not answered at once, else they are paced."""
SETTLE_S = 8.0
"""After the last bot's first poll, and the looks at their users' windows, for what else a start leaves to be done."""
MANY = 5000
"""Bots after whose start, or first messages, there is something left to be done."""
CROWD = 10_000
"""Bots that are bound by control commands; sandboxes that read."""
RUNG = 1000
"""Messages that are fetched at a ring."""
TURNS = 3
"""Runs of each bridge in a row that compares them; the row has the medians."""
REUSED = 0.01
"""New connections for each poll, at most."""
PLOT = Path(__file__).with_name("bench.svg")

COLUMNS = {
    "per s": "per s",
    "share": "of the floor's",
    "cpu_us": "CPU µs each",
    "server_us": "server's CPU µs each",
    "written": "bytes written each",
    "both": "CPU of both, of the floor's",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "worst_ms": "worst ms",
    "p50_share": "p50, of the floor's",
    "p99_share": "p99, of the floor's",
    "polled_s": "all polled after s",
    "busiest": "requests in the busiest s",
    "cpu_s": "CPU s/min",
    "cpu_share": "CPU, of the floor's",
    "server_s": "server's CPU s/min",
    "mib": "private MiB",
    "mib_share": "MiB, of the floor's",
    "kib": "KiB/bot",
    "server_kib": "server's KiB/bot",
}


class Row(NamedTuple):
    """What one bridge did in one measurement; a figure for some of COLUMNS."""

    what: str
    bots: int
    how: str
    bridge: str
    figures: dict[str, float]

    def cells(self) -> list[str]:
        found = [_cell(name, self.figures[name]) if name in self.figures else "" for name in COLUMNS]
        return [self.what, f"{self.bots:,}", self.how, self.bridge, *found, reached(self)]


def _cell(name: str, value: float) -> str:
    if name == "share":
        return f"{value:.0%}"
    if name == "both":
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Aim(NamedTuple):
    """What is to be reached by some of the adapter's rows."""

    what: str
    bots: tuple[int, ...]
    how: str
    """It begins so."""
    figure: str
    bound: float
    at_most: bool = True


AIMS = (
    Aim("inbound", (1, 100, 1000, 5000), "1 per answer", "share", 0.95, at_most=False),
    Aim("inbound", (1, 5000), "20 per answer", "share", 0.65, at_most=False),
    Aim("inbound", (100,), "20 per answer", "share", 0.55, at_most=False),
    Aim("inbound", (1000,), "20 per answer", "share", 0.80, at_most=False),
    Aim("inbound", (100,), "sync always", "share", 0.55, at_most=False),
    Aim("outbound", (100, 1000), "with receipts", "share", 0.55, at_most=False),
    Aim("outbound", (100, 1000), "with receipts", "both", 2.0),
    Aim("latency in", (100,), "100/s", "p50_share", 1.3),
    Aim("latency in", (100,), "100/s", "p99_share", 2.0),
    Aim("bind", (10_000,), "wechat.ctl.bind", "per s", 1000, at_most=False),
    Aim("bind", (10_000,), "wechat.ctl.bind", "polled_s", 25),
    Aim("idle", (1000, 5000, 10_000), "TLS", "kib", 70),
    Aim("idle", (5000, 10_000), "plain", "cpu_share", 1.3),
    Aim("idle", (5000, 10_000), "plain", "mib_share", 1.1),
)


def reached(row: Row) -> str:
    """What was aimed at in this row, and whether it was reached."""
    found = []
    for aim in AIMS:
        if row.bridge != "adapter" or aim.what != row.what or row.bots not in aim.bots:
            continue
        if not row.how.startswith(aim.how) or aim.figure not in row.figures:
            continue
        value, sign = row.figures[aim.figure], "≤" if aim.at_most else "≥"
        is_reached = value <= aim.bound if aim.at_most else value >= aim.bound
        found.append(f"{sign} {_cell(aim.figure, aim.bound)} {'✓' if is_reached else '✗'}")
    return ", ".join(found)


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over several turns."""
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


class Bench:
    """Runs measurements in folders of its own, and says what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.rows: list[Row] = []
        self._stores: dict[int, Path] = {}
        """What a server has once so many bots were bound and polled."""

    def add(self, what: str, bots: int, how: str, bridge: str, **figures: float) -> None:
        self.rows.append(Row(what, bots, how, bridge, figures))
        sys.stderr.write("  " + ", ".join(filter(None, self.rows[-1].cells())) + "\n")

    def table(self) -> str:
        used = [name for name in COLUMNS if any(name in row.figures for row in self.rows)]
        kept = [0, 1, 2, 3, *(4 + list(COLUMNS).index(name) for name in used), 4 + len(COLUMNS)]
        head = ["what", "bots", "how", "bridge", *COLUMNS.values(), "aimed at"]
        lines = [[head[at] for at in kept], ["---"] * len(kept)]
        lines += [[row.cells()[at] for at in kept] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    @contextlib.asynccontextmanager
    async def rig(self, what: str, *, bound: int | None = None, **options: Any) -> AsyncIterator[tuple[Rig, Client]]:
        """`bound`: so many bots are, from the start."""
        if bound is not None:
            options["store"] = await self._store(bound)
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

    async def _store(self, bots: int) -> Path:
        if bots not in self._stores:
            fewer = max((made for made in self._stores if made < bots), default=0)
            async with self.rig(f"({bots} bots are bound)", store=self._stores.get(fewer)) as (made, nc):
                if not fewer:  # the streams are an adapter's to make
                    adapter = made.adapter()
                    await made.claimed(nc)
                    made.drop(adapter)
                await made.bind(nc, bots, first=fewer)
                await nc.close()
                await asyncio.to_thread(made.server.stop, signal.SIGTERM)
                self._stores[bots] = self.folder / f"bound{bots}"
                await asyncio.to_thread(shutil.move, made.store, self._stores[bots])
        return self._stores[bots]


async def bridge_in(made: Rig, kind: str, bots: int) -> Process:
    """A bridge whose polls all wait: the adapter, or a floor on the adapter's streams."""
    bridge = made.adapter() if kind == "adapter" else made.floor("in", bots)
    await made.polled(bots)
    return bridge


def check(disordered: int, more: int = 0) -> None:
    """What was waited for is complete; it must have come in order and once, too, or the figures are worth nothing."""
    if disordered or more:
        raise RuntimeError(f"{disordered} came twice or out of order, {more} more than were asked for")


async def read_inboxes(nc: Client, *, timed: bool = False) -> Received:
    received = Received(timed=timed, numbered=True)
    await nc.subscribe("wechat.in.*", cb=received.on_message, pending_msgs_limit=0, pending_bytes_limit=0)
    await nc.flush()
    return received


async def read_receipts(nc: Client) -> Received:
    received = Received()
    await nc.subscribe(
        "wechat.event.*.receipt.>", cb=received.on_message, pending_msgs_limit=0, pending_bytes_limit=0
    )
    await nc.flush()
    return received


async def said_once(made: Rig, received: Received, bots: Iterable[int]) -> None:
    """Every bot's user writes, so that what is read of each but once, at their first message, is read."""
    bots = list(bots)
    enough = received.count + len(bots)
    await made.ask("feed", bots=bots, count=1, per_answer=1)
    await received.until(enough)


class Spent:
    """What bridges and their server spend on each of so many messages, and how many go through in a second."""

    def __init__(self, server: Process, *bridges: Process) -> None:
        self._processes = (server, *bridges)
        self._before = [process.cpu_s() for process in self._processes]
        self._written = server.written()
        self.began = time.monotonic()

    def each_s(self) -> list[float]:
        """CPU seconds of each bridge."""
        return self._each_s()[1:]

    def _each_s(self) -> list[float]:
        return [process.cpu_s() - before for process, before in zip(self._processes, self._before, strict=True)]

    def on(self, count: int, until: float) -> dict[str, float]:
        server_s, *bridges_s = self._each_s()
        return {
            "per s": count / (until - self.began),
            "cpu_us": sum(bridges_s) / count * 1e6,
            "server_us": server_s / count * 1e6,
            "written": (self._processes[0].written() - self._written) / count,
        }


async def fed(
    made: Rig, received: Received, bots: int, total: int, per_answer: int, *bridges: Process
) -> tuple[dict[str, float], list[float]]:
    """`total` messages in all come in for so many bots; what that costs, and each bridge's CPU seconds."""
    spent, count, before = Spent(made.server, *bridges), total // bots * bots, received.count
    await made.ask("feed", bots=list(range(bots)), count=total // bots, per_answer=per_answer)
    await received.until(before + count)
    check(received.disordered, received.count - before - count)
    return spent.on(count, received.when), spent.each_s()


def compared(figures: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """A bridge's figures, with what they are of the floor's."""
    spent = (figures["cpu_us"] + figures["server_us"]) / (floor["cpu_us"] + floor["server_us"])
    return figures | {"share": figures["per s"] / floor["per s"], "both": spent}


async def inbound(bench: Bench) -> None:
    """Floor and adapter in turns."""
    for bots, single, batched, sync in (
        (1, 3000, 30_000, ""),
        (100, 12_000, 60_000, ""),
        (1000, 12_000, 60_000, ""),
        (MANY, 10_000, 60_000, ""),
        (100, 3000, 0, "always"),
    ):
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(TURNS):
            for kind in ("floor", "adapter"):
                bound = bots if kind == "adapter" else 1
                async with bench.rig(f"in: {kind}, {bots} bots", bound=bound, sync=sync) as (made, nc):
                    process = await bridge_in(made, kind, bots)
                    received = await read_inboxes(nc)
                    await said_once(made, received, range(bots))
                    await asyncio.sleep(SETTLE_S if bots >= MANY and kind == "adapter" else 0)
                    for per_answer, total in ((1, single), (20, batched)):
                        if total:
                            figures, _ = await fed(made, received, bots, total, per_answer, process)
                            found.setdefault((per_answer, kind), []).append(figures)
        for (per_answer, kind), turns in sorted(found.items(), key=lambda item: item[0][0]):
            how, figures = f"{per_answer} per answer", medians(turns)
            if kind != "floor":
                figures = compared(figures, medians(found[per_answer, "floor"]))
            bench.add("inbound", bots, f"sync always, {how}" if sync else how, kind, **figures)


def ages(found: list[float], spent: Spent) -> dict[str, float]:
    found.sort()
    p50, p99 = statistics.median(found), found[int(len(found) * 0.99)]
    cpu_us = sum(spent.each_s()) / len(found) * 1e6
    return {"cpu_us": cpu_us, "p50_ms": p50, "p99_ms": p99, "worst_ms": found[-1]}


async def latency(bench: Bench) -> None:
    """Also with thousands of bots, whose polls make the garbage collector's work long."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(TURNS):
        plan = [("floor", 100, 100), ("adapter", 100, 100), *([] if turn else [("adapter", MANY, 1000)])]
        for kind, bots, per_s in plan:
            bound = bots if kind == "adapter" else 1
            async with bench.rig(f"latency in: {kind}, {bots} bots", bound=bound) as (made, nc):
                process = await bridge_in(made, kind, bots)
                received = await read_inboxes(nc, timed=True)
                await said_once(made, received, range(bots))
                await asyncio.sleep(SETTLE_S if bots >= MANY else 0)
                before, spent, count = received.count, Spent(made.server, process), 10 * per_s
                received.ages_ms.clear()
                await made.ask("trickle", bots=bots, count=count, per_s=per_s)
                await received.until(before + count)
                check(received.disordered)
                found.setdefault((kind, bots), []).append(ages(received.ages_ms, spent))
    floor = medians(found["floor", 100])
    for (kind, bots), turns in found.items():
        figures = medians(turns)
        if kind == "adapter" and bots == 100:
            figures |= {f"{name}_share": figures[f"{name}_ms"] / floor[f"{name}_ms"] for name in ("p50", "p99")}
        bench.add("latency in", bots, "100/s" if bots == 100 else "1,000/s", kind, **figures)
    async with bench.rig("latency out: adapter", bound=100) as (made, nc):
        process = await ready_to_send(made, nc, 100)
        spent = Spent(made.server, process)
        asked_ms = await asked(nc, 100, count=1000, per_s=100)
        bench.add("latency out", 100, "100/s", "adapter", **ages(asked_ms, spent))


async def asked(nc: Client, bots: int, *, count: int, per_s: float) -> list[float]:
    """Milliseconds from each command to its receipt, for commands that are sent evenly in time."""
    sent: dict[str, float] = {}
    ages: list[float] = []
    done = asyncio.Event()

    async def on_receipt(msg: Msg) -> None:
        ages.append((time.monotonic() - sent[msgspec.json.decode(msg.data)["command"]]) * 1000)
        if len(ages) == count:
            done.set()

    await nc.subscribe("wechat.event.*.receipt.>", cb=on_receipt)
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
    adapter = await bridge_in(made, "adapter", bots)
    await said_once(made, await read_inboxes(nc), range(bots))
    return adapter


async def push(nc: Client, bots: int, count: int, *, first: int = 0, plain: bool = False) -> None:
    """Commands to all sandboxes in turn, as fast as the server takes them; numbers in their texts grow.

    `plain`: they name their sandbox, and find their way to its subject through the adapter's router.
    """
    for number in range(first, first + count):
        if plain:
            await nc.publish("wechat.out", b'{"sandbox":"s%d","text":"hello there %d"}' % (number % bots, number))
        else:
            await nc.publish(f"wechat.out.s{number % bots}", b'{"text":"hello there %d"}' % number)
        if number % 200 == 199:
            await nc.flush()


async def sent(
    made: Rig,
    nc: Client,
    receipts: Received,
    bots: int,
    count: int,
    process: Process,
    *,
    first: int = 0,
    plain: bool = False,
) -> dict[str, float]:
    """So many commands get their receipts; what that costs."""
    enough, before = receipts.count + count, (await made.ask("stats"))["sends"]
    spent = Spent(made.server, process)
    await push(nc, bots, count, first=first, plain=plain)
    await receipts.until(enough)
    stats = await made.ask("stats")
    check(stats["disordered"], stats["sends"] - before - count)
    return spent.on(count, receipts.when)


async def sent_by_floor(made: Rig, nc: Client, bots: int, count: int) -> dict[str, float]:
    """So many commands reach iLink; the floor has started by then."""
    js = nc.jetstream()
    await js.delete_stream("WECHAT_OUT")
    await js.add_stream(name="WECHAT_OUT", subjects=["wechat.out.*"], retention="workqueue")
    await js.add_consumer("WECHAT_OUT", durable_name="floor", ack_policy="explicit", max_ack_pending=5000)
    process = made.floor("out", bots)
    await push(nc, bots, bots)
    while (await made.ask("stats"))["sends"] < bots:
        await asyncio.sleep(0.02)
    spent = Spent(made.server, process)
    await push(nc, bots, count)
    while (await made.ask("stats"))["sends"] < bots + count:
        await asyncio.sleep(0.02)
    return spent.on(count, time.monotonic())


async def outbound(bench: Bench) -> None:
    """Floor and adapter in turns."""
    for bots, count, sync in ((100, 12_000, ""), (1000, 12_000, ""), (100, 2000, "always")):
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(TURNS):
            async with bench.rig(f"out: floor, {bots} bots", bound=1, sync=sync) as (made, nc):
                found.setdefault("floor", []).append(await sent_by_floor(made, nc, bots, count))
            async with bench.rig(f"out: adapter, {bots} bots", bound=bots, sync=sync) as (made, nc):
                process = await ready_to_send(made, nc, bots)
                receipts = await read_receipts(nc)
                await sent(made, nc, receipts, bots, bots, process)
                figures = await sent(made, nc, receipts, bots, count, process, first=bots)
                found.setdefault("adapter", []).append(figures)
                if bots == 100 and not sync:
                    first = bots + count
                    figures = await sent(made, nc, receipts, bots, count // 4, process, first=first, plain=True)
                    found.setdefault("plain", []).append(figures)
        floor = medians(found["floor"])
        prefix = "sync always, " if sync else ""
        bench.add("outbound", bots, f"{prefix}no receipts", "floor", **floor)
        bench.add("outbound", bots, f"{prefix}with receipts", "adapter", **compared(medians(found["adapter"]), floor))
        if "plain" in found:
            bench.add("outbound", bots, "plain wechat.out, with receipts", "adapter", **medians(found["plain"]))


async def grown(bench: Bench) -> None:
    """What a hundred users cost who write and are answered, beside others whose polls wait all the time."""
    bots, active, silent = MANY, 100, 1000
    async with bench.rig("as state grows", bound=bots, hold_s=LONG_S) as (made, nc):
        process = await bridge_in(made, "adapter", bots)
        received, receipts = await read_inboxes(nc), await read_receipts(nc)
        await said_once(made, received, range(active))
        await fed(made, received, active, 6000, 1, process)  # as the others will come after some
        pushed = waiting = 0
        for users, parked in (
            (active, 0),
            (bots - silent, 0),
            (bots - silent, 5 * silent),
            (bots - silent, 95 * silent),
        ):
            waiting += parked
            how = f"{active} of them active, {users:,} users with state, {waiting:,} parked"
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {how} …\n")
            if users > active and not parked:
                await said_once(made, received, range(active, users))
            enough = receipts.count + parked
            for number in range(parked):
                await nc.publish(f"wechat.out.s{bots - 1 - number % silent}", b'{"text":"they never wrote"}')
            await receipts.until(enough)
            await asyncio.sleep(SETTLE_S / 2)  # all is over before the first of those polls is
            figures, _ = await fed(made, received, active, 6000, 1, process)
            bench.add("inbound", bots, how, "adapter", **figures)
            figures = await sent(made, nc, receipts, active, 6000, process, first=pushed)
            bench.add("outbound", bots, how, "adapter", **figures)
            pushed += 6000


async def idle(bench: Bench) -> None:
    """All of them at the same time, since waiting costs little: one after the other takes four minutes more."""
    # first those that take longest to come to rest
    plan = [("adapter", bots, tls) for bots in (10_000, 5000, 1000) for tls in (True, False)]
    plan += [("floor", bots, False) for bots in (10_000, 5000)]
    empty = {tls: await _empty_mib(bench, tls=tls) for tls in (True, False)}
    async with contextlib.AsyncExitStack() as stack:
        rigs, settled = [], 0.0
        for kind, bots, tls in plan:
            what = f"idle: {kind}, {bots} bots{', TLS' if tls else ''}"
            bound = bots if kind == "adapter" else 1
            made, _ = await stack.enter_async_context(bench.rig(what, bound=bound, tls=tls))
            began = time.monotonic()
            process = await bridge_in(made, kind, bots)
            figures = {"polled_s": time.monotonic() - began, "busiest": (await made.ask("busiest"))["requests"]}
            rigs.append((made, process, figures))
            settled = max(settled, time.monotonic() + SETTLE_S)
        await asyncio.sleep(settled - time.monotonic())
        before = [
            (await made.ask("stats"), process.cpu_s(), made.server.cpu_s(), time.monotonic())
            for made, process, _ in rigs
        ]
        await asyncio.sleep(HOLD_S + 1)  # so that each bot polls again
        for given, (made, process, figures), (stats, cpu_s, server_s, began) in zip(plan, rigs, before, strict=True):
            kind, bots, tls = given
            a_minute = 60 / (time.monotonic() - began)
            figures["cpu_s"] = (process.cpu_s() - cpu_s) * a_minute
            figures["server_s"] = (made.server.cpu_s() - server_s) * a_minute
            after, figures["mib"] = await made.ask("stats"), process.memory_mib()
            if kind == "adapter":
                figures["kib"] = (figures["mib"] - empty[tls][0]) * 1024 / bots
                figures["server_kib"] = (made.server.memory_mib() - empty[tls][1]) * 1024 / bots
            opened = (after["connections"] - stats["connections"]) / (after["polls"] - stats["polls"])
            if opened > REUSED:
                raise RuntimeError(f"{opened:.2g} new connections for each poll")
        measured = [(given, figures) for given, (_, _, figures) in zip(plan, rigs, strict=True)]
        floors = {bots: figures for (kind, bots, _), figures in measured if kind == "floor"}
        for (kind, bots, tls), figures in measured:
            if kind == "adapter" and not tls and (floor := floors.get(bots)):
                figures["cpu_share"] = figures["cpu_s"] / floor["cpu_s"]
                figures["mib_share"] = figures["mib"] / floor["mib"]
            bench.add("idle", bots, "TLS" if tls else "plain", kind, **figures)


async def _empty_mib(bench: Bench, *, tls: bool) -> tuple[float, float]:
    """The memory of an adapter with one bot, and of its server."""
    async with bench.rig("idle: adapter, 1 bot", bound=1, tls=tls) as (made, _):
        return (await bridge_in(made, "adapter", 1)).memory_mib(), made.server.memory_mib()


async def shared(bench: Bench) -> None:
    """Several processes on the machine's cores, and what is left when one is killed."""
    for replicas, bots in ((2, 100), (3, 100), (2, 10_000)):
        async with bench.rig(f"{replicas} adapters, {bots} bots", bound=bots, hold_s=SHORT_S) as (made, nc):
            group = [made.adapter() for _ in range(replicas)]
            await made.split(nc, replicas)
            await made.ask("hold", seconds=HOLD_S)
            await asyncio.sleep(2 * SHORT_S)
            await made.polled(bots)
            received = await read_inboxes(nc)
            await said_once(made, received, range(bots))
            figures, each_s = await fed(made, received, bots, 10_000, 1, *group)
            await made.polled(bots)
            shares = " : ".join(f"{cpu_s / sum(each_s):.0%}" for cpu_s in each_s)
            bench.add("inbound", bots, f"1 per answer, shared {shares}", f"{replicas} adapters", **figures)
            group[0].stop()
            killed = time.monotonic()
            await made.fewer(bots)
            await made.polled(bots)
            bench.add(
                "kill -9", bots, "the others poll all", f"{replicas} adapters", polled_s=time.monotonic() - killed
            )
    await _polls_add_up(bench)


async def _polls_add_up(bench: Bench) -> None:
    """Polls that wait for half a second: more are due than one process makes. What two make.

    Nothing comes, so that hardly anybody else works, and there is nearly a core for each.
    """
    bots, alone = 12_000, 0.0
    async with bench.rig("polls: one adapter, then two", bound=bots, hold_s=START_S) as (made, nc):
        adapters = [await bridge_in(made, "adapter", bots)]
        await made.ask("hold", seconds=BRIEF_S)
        await asyncio.sleep(START_S)
        for how in ("one adapter", "two adapters"):
            if alone:
                adapters.append(made.adapter())
                await made.split(nc, 2)
            await asyncio.sleep(SETTLE_S if alone else SETTLE_S / 2)  # half of the bots have moved
            before, spent = (await made.ask("stats"))["polls"], Spent(made.server, *adapters)
            await asyncio.sleep(SETTLE_S / 2)
            polls, now = (await made.ask("stats"))["polls"] - before, time.monotonic()
            figures = spent.on(polls, now)
            bench.add("empty polls", bots, "as fast as may be", how, **figures)
            alone = figures["per s"]


async def bound(bench: Bench) -> None:
    """Bots come and go by control commands, published without a pause, while the same process polls them."""
    for checked, how in ((None, "wechat.ctl.bind"), (True, "wechat.ctl.bind, each token checked")):
        async with bench.rig(f"{how}, {CROWD} bots") as (made, nc):
            process = made.adapter()
            await made.claimed(nc)
            await asyncio.sleep(SETTLE_S)  # all shards are claimed
            last = (await nc.jetstream().stream_info("WECHAT_CTL")).state.last_seq
            spent = Spent(made.server, process)
            for number in range(CROWD):
                bot, user = f"{number}@im.bot", f"user{number}@im.wechat"
                asked = Bind(sandbox=f"s{number}", bot=bot, bot_token=f"{bot}:0600abcd", user=user, check=checked)
                await command(nc, "wechat.ctl.bind", asked)
            figures = spent.on(CROWD, await executed(nc, last + CROWD))
            await made.polled(CROWD)
            bench.add("bind", CROWD, how, "adapter", **figures, polled_s=time.monotonic() - spent.began)
            if checked:
                continue
            await asyncio.sleep(SETTLE_S)
            spent = Spent(made.server, process)
            for number in range(CROWD):
                await command(nc, "wechat.ctl.unbind", Unbind(sandbox=f"s{number}"))
            bench.add(
                "unbind",
                CROWD,
                "wechat.ctl.unbind",
                "adapter",
                **spent.on(CROWD, await executed(nc, last + 2 * CROWD)),
            )


async def command(nc: Client, subject: str, asked: Bind | Unbind) -> None:
    await nc.publish(subject, msgspec.json.encode(asked), headers={"Nats-Msg-Id": f"{subject} {asked.sandbox}"})
    if asked.sandbox.endswith("00"):
        await nc.flush()


async def executed(nc: Client, last: int) -> float:
    """When no control command up to this one waits any more."""
    while (state := (await nc.jetstream().stream_info("WECHAT_CTL")).state).messages or state.last_seq < last:
        await asyncio.sleep(0.02)
    return time.monotonic()


async def silent(bench: Bench) -> None:
    """Bots write, and then fall silent, so that a minute later all their checkpoints are written."""
    bots, messages, bucket = MANY, 5, "KV_wechat_checkpoints"
    async with bench.rig(f"{bots} bots fall silent", bound=bots) as (made, nc):
        process = await bridge_in(made, "adapter", bots)
        received, js = await read_inboxes(nc), nc.jetstream()
        await asyncio.sleep(SETTLE_S)
        first = (await js.stream_info(bucket)).state.last_seq
        for _ in range(messages):
            await said_once(made, received, range(bots))
        while (last := (await js.stream_info(bucket)).state.last_seq) == first:
            spent = Spent(made.server, process)
            await asyncio.sleep(0.02)
        while last < first + bots:
            await asyncio.sleep(0.02)
            last = (await js.stream_info(bucket)).state.last_seq
        figures = spent.on(bots, time.monotonic())
        bench.add("checkpoint written", bots, f"{messages} messages of each", "adapter", **figures)


async def reading(bench: Bench) -> None:
    """Sandboxes that wait at a doorbell and ask, and the durable consumers that would take the place of that."""
    async with bench.rig(f"{CROWD} durables", bound=1) as (made, nc):
        await bridge_in(made, "adapter", 1)
        before, began = made.server.memory_mib(), time.monotonic()
        await _all_of(range(CROWD), partial(_make_durable, nc))
        made_s = time.monotonic() - began
        await asyncio.sleep(SETTLE_S)
        figures = {"per s": CROWD / made_s, "server_kib": (made.server.memory_mib() - before) * 1024 / CROWD}
        bench.add("read", CROWD, "a durable each", "none", **figures)
    async with bench.rig(f"{CROWD} doorbells", bound=1) as (made, nc):
        process, took = await bridge_in(made, "adapter", 1), list[float]()
        askers = [Asker(nc, f"s{number}") for number in range(CROWD)]
        texts: list[int] = []

        async def ring(asker: Asker, _: Msg) -> None:
            began = time.monotonic()
            texts.extend([len(await asker.take())])
            took.append((time.monotonic() - began) * 1000)

        before = made.server.memory_mib()
        for how in ("each begins", "each asks in vain"):
            spent = Spent(made.server, process)
            await _all_of(askers, Asker.take)
            figures = spent.on(CROWD, time.monotonic())
            if how == "each begins":
                for asker in askers:
                    await nc.subscribe(NAMES.live(asker.sandbox), cb=partial(ring, asker))
                await asyncio.sleep(SETTLE_S)
                figures["server_kib"] = (made.server.memory_mib() - before) * 1024 / CROWD
            bench.add("read", CROWD, how, "adapter", **figures)
        said = next((Path(__file__).parents[2] / "schemas/samples/valid").glob("inbound-*.json")).read_bytes()
        spent = Spent(made.server, process)
        for number in range(RUNG):
            await nc.publish(NAMES.inbox(f"s{number * 7}"), said)
            await asyncio.sleep(max(0.0, spent.began + number / 100 - time.monotonic()))
        while len(took) < RUNG:
            await asyncio.sleep(0.02)
        check(sum(count != 1 for count in texts))
        bench.add("read", CROWD, "100/s, from the ring to the message", "adapter", **ages(took, spent))


async def _make_durable(nc: Client, number: int) -> None:
    config = ConsumerConfig(durable_name=f"s{number}", filter_subject=NAMES.inbox(f"s{number}"), num_replicas=1)
    await nc.jetstream(timeout=60).add_consumer(NAMES.stream_in, config)


async def _all_of(items: Iterable[Any], act: Callable[[Any], Awaitable[object]]) -> None:
    """For each, 64 at the same time."""
    slots = asyncio.Semaphore(64)

    async def one(item: Any) -> None:
        async with slots:
            await act(item)

    await asyncio.gather(*map(one, items))


def plot(rows: list[Row]) -> str:
    """CPU per message of all bridges."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.what in ("inbound", "outbound") and row.bridge in ("floor", "adapter"):
            how = "" if row.what == "outbound" else f", {row.how}"
            if "active" not in row.how:
                group = (
                    f"{row.what}, {row.bots:,} bots{how}{', sync always' if 'sync' in row.how and not how else ''}"
                )
                found.setdefault(group, {})[row.bridge] = row.figures["cpu_us"]
    return bars("CPU per message, µs", found)


SUITES: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "in": inbound,
    "latency": latency,
    "out": outbound,
    "grown": grown,
    "two": shared,
    "bind": bound,
    "silent": silent,
    "read": reading,
    "idle": idle,
}


async def run(names: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    bench, began = Bench(folder), time.monotonic()
    try:
        for name in names:
            await SUITES[name](bench)
    finally:
        print(bench.table(), flush=True)
        await asyncio.to_thread(shutil.rmtree, folder)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    sys.stderr.write(f"{minutes} min {seconds} s\n")
    if {"in", "out"} <= set(names):
        await asyncio.to_thread(PLOT.write_text, plot(bench.rows))
        sys.stderr.write(f"{PLOT}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="all of them, if none is named")
    given = parser.parse_args()
    asyncio.run(run(given.suites or list(SUITES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
