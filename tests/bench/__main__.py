"""What the bridge costs, beside a bridge that promises nothing: `make bench`, `python -m tests.bench in out`.

The CPU is the bridge's own process; messages per second are what two cores that
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
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.messages import Bind, Inbound
from adapter.contract.names import Names
from tests.bench.peer import HOLD_S
from tests.bench.plot import bars
from tests.bench.rig import Process, Received, Rig, rig
from tests.e2e.asker import Asker, AskRefused

NAMES = Names()
KINDS = ("floor", "adapter")
SETTLE_S = 8.0
"""After the last bot's first poll, for what else a start leaves to be done."""
TAIL_S = 0.3
"""After the last of a few messages, for what the bridge does when they have arrived."""
MANY = 5000
"""Bots after whose start, or first messages, there is something left to be done."""
CROWD = 10_000
TIMES = {"cpu": "cpu_s", "mib": "mib"}
"""What of idle bridges is compared."""
REUSED = 0.01
"""New connections for each poll, at most."""
PLOT = Path(__file__).with_name("bench.svg")

COLUMNS = {
    "per s": "per s",
    "share": "of the floor's",
    "cpu_us": "CPU µs each",
    "server_us": "server's CPU µs each",
    "both": "CPU of both, times the floor's",
    "warm": "CPU of a later one, of a first one's",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "worst_ms": "worst ms",
    "p50_times": "p50, times the floor's",
    "polled_s": "all polled after s",
    "cpu_s": "CPU s/min",
    "cpu_times": "CPU, times the floor's",
    "server_s": "server's CPU s/min",
    "mib": "private MiB",
    "mib_times": "MiB, times the floor's",
    "kib": "KiB/bot",
    "server_kib": "server's KiB/bot",
}
PERCENT = {"share", "warm"}


def _cell(name: str, value: float) -> str:
    if name in PERCENT:
        return f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Row(NamedTuple):
    """What one bridge did in one measurement; a figure for some of COLUMNS."""

    what: str
    bots: int
    how: str
    bridge: str
    figures: dict[str, float]


class Line(NamedTuple):
    """A line of the table that is read first: one figure of the adapter's rows, and what it should be."""

    label: str
    what: str
    how: str
    figure: str
    aims: dict[int, float]
    """For each number of bots."""
    at_most: bool = False

    def cell(self, row: Row | None) -> str:
        if row is None or self.figure not in row.figures:
            return ""
        value, aim = row.figures[self.figure], self.aims.get(row.bots)
        if aim is None:
            return _cell(self.figure, value)
        return f"{_cell(self.figure, value)} {'✓' if (value <= aim if self.at_most else value >= aim) else '✗'}"

    @property
    def aim(self) -> str:
        """`65%, 90%`: in the order of the columns."""
        values = dict.fromkeys(_cell(self.figure, value) for value in self.aims.values())
        return f"{'≤' if self.at_most else '≥'} {', '.join(values)}"


ONE, BATCH, FIRST, ALWAYS = "1 per answer", "20 per answer", "first messages", "sync always, "
OUT = ("no receipts", "receipts")
"""The floor gives none."""
LINES = (
    Line("inbound, one per answer", "inbound", ONE, "share", dict.fromkeys((1, 100, 1000, 5000), 1.0)),
    Line("inbound, 20 per answer", "inbound", BATCH, "share", {100: 0.65, 1000: 0.9}),
    Line("the same with `sync_interval: always`: one", "inbound", ALWAYS + ONE, "share", {100: 0.95, 1000: 0.75}),
    Line("… 20 per answer", "inbound", ALWAYS + BATCH, "share", {100: 0.7}),
    Line("cold: CPU of a later message, of a first one's", "inbound", FIRST, "warm", {100: 0.8, 1000: 0.8}),
    Line("outbound", "outbound", "receipts", "share", {100: 0.8, 1000: 0.8}),
    Line("… CPU with the server's, times", "outbound", "receipts", "both", {100: 1.3, 1000: 1.3}, at_most=True),
    Line("… with `sync_interval: always`", "outbound", ALWAYS + "receipts", "share", {100: 0.2}),
    Line("latency in, p50, times", "latency in", "100/s", "p50_times", {100: 1.2}, at_most=True),
    Line("idle: CPU, times", "idle", "plain", "cpu_times", {MANY: 1.3, CROWD: 1.3}, at_most=True),
    Line("idle: memory, times", "idle", "plain", "mib_times", {MANY: 1.1, CROWD: 1.1}, at_most=True),
    Line("idle: KiB for a bot, TLS", "idle", "TLS", "kib", {1000: 70, MANY: 70, CROWD: 70}, at_most=True),
    Line("start: all polled after s, TLS", "idle", "TLS", "polled_s", {CROWD: 29}, at_most=True),
    Line("binds a second", "bind", "all polled", "per s", {CROWD: 1000}),
)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest)) + "\n"


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over several turns."""
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


class Bench:
    """Runs measurements in folders of its own, and says what it does."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder = folder
        self.turns = 1 if quick else 3
        """Runs of each bridge in a row that compares them; the row has the medians."""
        self.part = 10 if quick else 1
        """Of the messages, and of the bots where there are thousands, only this part."""
        self.number = 0
        self.rows: list[Row] = []
        self._stores: dict[int, Path] = {}
        """What a server has once so many bots were bound and each person wrote and was answered."""
        self._empty: dict[bool, tuple[float, float]] = {}

    def add(self, what: str, bots: int, how: str, bridge: str, **figures: float) -> None:
        self.rows.append(Row(what, bots, how, bridge, figures))
        told = ", ".join(f"{COLUMNS[name]} {_cell(name, value)}" for name, value in figures.items())
        sys.stderr.write(f"  {what}, {bots:,} bots, {how}, {bridge}: {told}\n")

    def summary(self) -> str:
        """One figure of each measurement, for each number of bots."""
        found = {(row.what, row.how, row.bots): row for row in self.rows if row.bridge == "adapter"}
        sizes = sorted({row.bots for row in self.rows})
        lines = [[line.label, *(line.cell(found.get((line.what, line.how, bots))) for bots in sizes), line.aim]
                 for line in LINES]  # fmt: skip
        return _markdown(
            [["bots", *(f"{bots:,}" for bots in sizes), "aim"], *filter(lambda line: any(line[1:-1]), lines)]
        )

    def tables(self) -> str:
        """All figures, a table for each measurement."""
        tables = []
        for _, group in groupby(self.rows, lambda row: row.what):
            rows = list(group)
            used = [name for name in COLUMNS if any(name in row.figures for row in rows)]
            lines = [["what", "bots", "how", "bridge", *(COLUMNS[name] for name in used)]]
            for row in rows:
                cells = [_cell(name, row.figures[name]) if name in row.figures else "" for name in used]
                lines.append([row.what, f"{row.bots:,}", row.how, row.bridge, *cells])
            tables.append(_markdown(lines))
        return "\n".join(tables)

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
            async with self.rig(f"({bots} bots are bound, and each person writes and is answered)") as (made, nc):
                adapter = made.adapter()  # the streams are its to make
                await made.taken(nc)
                made.drop(adapter)
                await made.bind(nc, bots)
                adapter = await bridge_in(made, "adapter", bots)
                await said_once(made, await read_inboxes(nc), bots)
                await sent(made, nc, await read_receipts(nc), bots, bots, adapter)
                made.drop(adapter)
                await nc.close()
                await asyncio.to_thread(made.server.stop, signal.SIGTERM)
                self._stores[bots] = self.folder / f"bound{bots}"
                await asyncio.to_thread(shutil.move, made.store, self._stores[bots])
        return self._stores[bots]

    async def empty_mib(self, *, tls: bool) -> tuple[float, float]:
        """The memory of an adapter with one bot, and of its server."""
        if tls not in self._empty:
            async with self.rig("memory with 1 bot", bound=1, tls=tls) as (made, _):
                self._empty[tls] = (await bridge_in(made, "adapter", 1)).memory_mib(), made.server.memory_mib()
        return self._empty[tls]

    async def memory(self, made: Rig, process: Process, bots: int) -> dict[str, float]:
        empty, server_empty = await self.empty_mib(tls=made.tls)
        mib = process.memory_mib()
        server_kib = (made.server.memory_mib() - server_empty) * 1024 / bots
        return {"mib": mib, "kib": (mib - empty) * 1024 / bots, "server_kib": server_kib}


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
    """Of both bridges: the adapter publishes each message live once it is stored, the floor stores it by itself."""
    received = await _read(nc, NAMES.live("*"), Received(timed=timed, numbered=True))
    return await _read(nc, NAMES.inbox("*", "floor"), received)


async def read_receipts(nc: Client) -> Received:
    return await _read(nc, "wechat.event.*.receipt.>", Received())


async def _read(nc: Client, subject: str, received: Received) -> Received:
    await nc.subscribe(subject, cb=received.on_message, pending_msgs_limit=0, pending_bytes_limit=0)
    await nc.flush()
    return received


async def said_once(made: Rig, received: Received, bots: int) -> None:
    """Every bot's user writes."""
    enough = received.count + bots
    await made.ask("feed", bots=list(range(bots)), count=1, per_answer=1)
    await received.until(enough)


async def later_of_first(made: Rig, received: Received, bots: int, process: Process) -> dict[str, float]:
    """What a message of each person costs, their first one since the start, and what a later one, of that."""
    spent_s = []
    for _ in range(4):
        before = process.cpu_s()
        await said_once(made, received, bots)
        await asyncio.sleep(TAIL_S)
        spent_s.append(process.cpu_s() - before)
    return {"cpu_us": spent_s[0] / bots * 1e6, "warm": statistics.median(spent_s[1:]) / spent_s[0]}


class Spent:
    """What a bridge and its server spend on each of so many messages, and how many go through in a second."""

    def __init__(self, server: Process, bridge: Process) -> None:
        self._processes = (bridge, server)
        self._before = [process.cpu_s() for process in self._processes]
        self.began = time.monotonic()

    def cpu_s(self) -> list[float]:
        """Of the bridge, and of the server."""
        return [process.cpu_s() - before for process, before in zip(self._processes, self._before, strict=True)]

    def on(self, count: int, until: float) -> dict[str, float]:
        bridge_s, server_s = self.cpu_s()
        rate = count / (until - self.began)
        return {"per s": rate, "cpu_us": bridge_s / count * 1e6, "server_us": server_s / count * 1e6}

    def a_minute(self) -> dict[str, float]:
        minutes = (time.monotonic() - self.began) / 60
        bridge_s, server_s = self.cpu_s()
        return {"cpu_s": bridge_s / minutes, "server_s": server_s / minutes}


async def fed(
    made: Rig, received: Received, bots: int, total: int, per_answer: int, process: Process
) -> dict[str, float]:
    """`total` messages in all come in for so many bots; what that costs."""
    spent, count, before = Spent(made.server, process), total // bots * bots, received.count
    await made.ask("feed", bots=list(range(bots)), count=total // bots, per_answer=per_answer)
    await received.until(before + count)
    check(received.disordered, received.count - before - count)
    return spent.on(count, received.when)


def compared(figures: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """A bridge's figures, with what they are of the floor's."""
    spent = (figures["cpu_us"] + figures["server_us"]) / (floor["cpu_us"] + floor["server_us"])
    return figures | {"share": figures["per s"] / floor["per s"], "both": spent}


async def inbound(bench: Bench) -> None:
    """Floor and adapter in turns."""
    for bots, single, batched, sync in (
        (1, 3000, 20_000, ""),
        (100, 10_000, 40_000, ""),
        (1000, 10_000, 40_000, ""),
        (MANY, 10_000, 100_000, ""),
        (100, 3000, 10_000, "always"),
        (1000, 4000, 0, "always"),
    ):
        found = defaultdict[tuple[str, str], list[dict[str, float]]](list)
        for _ in range(bench.turns):
            for kind in KINDS:
                bound = bots if kind == "adapter" else 1
                async with bench.rig(f"in: {kind}, {bots} bots", bound=bound, sync=sync) as (made, nc):
                    process = await bridge_in(made, kind, bots)
                    received = await read_inboxes(nc)
                    await asyncio.sleep(SETTLE_S if bots >= MANY and kind == "adapter" else TAIL_S)
                    if kind == "floor" or sync or bots not in (100, 1000):
                        await said_once(made, received, bots)
                    else:
                        found[FIRST, kind].append(await later_of_first(made, received, bots, process))
                    for how, per_answer, total in ((ONE, 1, single), (BATCH, 20, batched)):
                        if total := max(total // bench.part, bots) if total else 0:
                            found[how, kind].append(await fed(made, received, bots, total, per_answer, process))
        for (how, kind), turns in found.items():
            figures = medians(turns)
            if kind == "adapter" and how != FIRST:
                figures = compared(figures, medians(found[how, "floor"]))
            bench.add("inbound", bots, ALWAYS + how if sync else how, kind, **figures)


def ages(found: list[float]) -> dict[str, float]:
    found.sort()
    return {"p50_ms": statistics.median(found), "p99_ms": found[int(len(found) * 0.99)], "worst_ms": found[-1]}


async def latency(bench: Bench) -> None:
    """Floor and adapter in turns, a hundred messages a second."""
    bots, found = 100, defaultdict[str, list[dict[str, float]]](list)
    for _ in range(bench.turns):
        for kind in KINDS:
            bound = bots if kind == "adapter" else 1
            async with bench.rig(f"latency in: {kind}, {bots} bots", bound=bound) as (made, nc):
                await bridge_in(made, kind, bots)
                received = await read_inboxes(nc, timed=True)
                await said_once(made, received, bots)
                received.ages_ms.clear()
                count = 600 // bench.part
                await made.ask("trickle", bots=bots, count=count, per_s=100)
                await received.until(bots + count)
                check(received.disordered)
                found[kind].append(ages(received.ages_ms))
    for kind in KINDS:
        figures = medians(found[kind])
        if kind == "adapter":
            figures["p50_times"] = figures["p50_ms"] / medians(found["floor"])["p50_ms"]
        bench.add("latency in", bots, "100/s", kind, **figures)


async def push(nc: Client, bots: int, count: int, *, first: int = 0) -> None:
    """Commands to all sandboxes in turn, as fast as the server takes them; numbers in their texts grow."""
    for number in range(first, first + count):
        await nc.publish(f"wechat.out.s{number % bots}", b'{"text":"hello there %d"}' % number)
        if number % 200 == 199:
            await nc.flush()


async def sent(
    made: Rig, nc: Client, receipts: Received, bots: int, count: int, process: Process, *, first: int = 0
) -> dict[str, float]:
    """So many commands get their receipts; what that costs."""
    enough, before = receipts.count + count, (await made.ask("stats"))["sends"]
    spent = Spent(made.server, process)
    await push(nc, bots, count, first=first)
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
    for bots, total, sync in ((100, 10_000, ""), (1000, 10_000, ""), (100, 2000, "always")):
        count = total // bench.part
        found = defaultdict[str, list[dict[str, float]]](list)
        for _ in range(bench.turns):
            async with bench.rig(f"out: floor, {bots} bots", bound=1, sync=sync) as (made, nc):
                found["floor"].append(await sent_by_floor(made, nc, bots, count))
            async with bench.rig(f"out: adapter, {bots} bots", bound=bots, sync=sync) as (made, nc):
                process = await bridge_in(made, "adapter", bots)
                await said_once(made, await read_inboxes(nc), bots)
                receipts = await read_receipts(nc)
                await sent(made, nc, receipts, bots, bots, process)
                found["adapter"].append(await sent(made, nc, receipts, bots, count, process, first=bots))
        floor, prefix = medians(found["floor"]), ALWAYS if sync else ""
        bench.add("outbound", bots, f"{prefix}no receipts", "floor", **floor)
        bench.add("outbound", bots, f"{prefix}receipts", "adapter", **compared(medians(found["adapter"]), floor))


class Agent:
    """Reads as `wechat-nats agent` does: at each ring, after what it has answered, and every half a minute."""

    def __init__(self, nc: Client, sandbox: str) -> None:
        self.nc = nc
        self.asker = Asker(nc, sandbox)
        self.asking = asyncio.Lock()
        self.ages_ms: list[float] = []
        """From iLink's answer with a message to the agent's having it."""

    async def begin(self) -> None:
        while await self.take():  # of earlier runs
            pass
        await self.nc.subscribe(NAMES.live(self.asker.sandbox), cb=self.look)

    async def take(self) -> list[Inbound]:
        while True:
            try:
                return await self.asker.take()
            except AskRefused:  # for the moment, as is said
                await asyncio.sleep(1)

    async def look(self, _: Msg | None = None) -> None:
        async with self.asking:
            while messages := await self.take():
                for message in messages:
                    self.ages_ms.append((time.monotonic_ns() - int(message.text.removeprefix("at "))) / 1e6)
                    command = b'{"id":"at %d","text":"hello there"}' % time.monotonic_ns()
                    await self.nc.publish(NAMES.out(self.asker.sandbox), command)


async def minute(bench: Bench) -> None:
    """Thousands of people, each with an agent, who write once in a minute, or not at all: for the model."""
    bots = MANY // bench.part
    await bench.empty_mib(tls=True)
    async with bench.rig(f"a minute of {bots} people", bound=bots, tls=True) as (made, nc):
        process = await bridge_in(made, "adapter", bots)
        agents = [Agent(nc, f"s{number}") for number in range(bots)]
        await _all_of(agents, Agent.begin)
        receipts, back_ms = await read_receipts(nc), list[float]()

        async def on_receipt(msg: Msg) -> None:
            command = msgspec.json.decode(msg.data)["command"]
            back_ms.append((time.monotonic_ns() - int(command.removeprefix("at "))) / 1e6)

        await nc.subscribe("wechat.event.*.receipt.>", cb=on_receipt)
        await asyncio.sleep(SETTLE_S)
        # After the first message of each person, their checkpoints are due in the minute that is measured.
        for how, seconds, count in (
            ("nobody writes", 30, 0),
            ("", 60, bots),
            ("each writes and is answered", 60, bots),
        ):
            ages_ms, enough, spent = list[float](), receipts.count + count, Spent(made.server, process)
            back_ms.clear()
            for agent in agents:
                agent.ages_ms = ages_ms
            await made.ask("trickle", bots=bots, count=count, per_s=bots / seconds)
            for number in range(10 * seconds):  # each agent asks twice a minute
                await asyncio.sleep(max(0.0, spent.began + number / 10 - time.monotonic()))
                await _all_of(agents[number % 300 :: 300], Agent.look)
            await receipts.until(enough)
            figures = spent.a_minute() | await bench.memory(made, process, bots)
            if how:
                bench.add("a minute", bots, how, "adapter", **figures, **(ages(ages_ms) if count else {}))
        bench.add("a minute", bots, "from the command to the receipt", "adapter", **ages(back_ms))


async def _all_of(items: Iterable[Any], act: Callable[[Any], Awaitable[object]]) -> None:
    """For each, 64 at the same time."""
    slots = asyncio.Semaphore(64)

    async def one(item: Any) -> None:
        async with slots:
            await act(item)

    await asyncio.gather(*map(one, items))


async def idle(bench: Bench) -> None:
    """All of them at the same time, since waiting costs little: one after the other takes four minutes more."""
    plan = [("floor", bots, False) for bots in (CROWD, MANY)]
    plan += [("adapter", bots, tls) for bots in (CROWD, MANY, 1000) for tls in (True, False)]
    for tls in (True, False):
        await bench.empty_mib(tls=tls)
    async with contextlib.AsyncExitStack() as stack:
        rigs = []
        for kind, bots, tls in plan:
            what = f"idle: {kind}, {bots} bots{', TLS' if tls else ''}"
            bound = bots // bench.part if kind == "adapter" else 1
            made, _ = await stack.enter_async_context(bench.rig(what, bound=bound, tls=tls))
            began = time.monotonic()
            process = await bridge_in(made, kind, bots // bench.part)
            rigs.append((made, process, time.monotonic() - began))
        await asyncio.sleep(SETTLE_S)
        before = [(await made.ask("stats"), Spent(made.server, process)) for made, process, _ in rigs]
        await asyncio.sleep(HOLD_S + 1)  # so that each bot polls again
        floors: dict[int, dict[str, float]] = {}
        for given, (made, process, polled_s), (stats, spent) in zip(plan, rigs, before, strict=True):
            kind, bots, tls = given
            figures = {"polled_s": polled_s} | spent.a_minute()
            after = await made.ask("stats")
            opened = (after["connections"] - stats["connections"]) / (after["polls"] - stats["polls"])
            if opened > REUSED:
                raise RuntimeError(f"{opened:.2g} new connections for each poll")
            if kind == "floor":
                figures["mib"] = process.memory_mib()
                floors[bots] = figures
            else:
                figures |= await bench.memory(made, process, bots // bench.part)
                if not tls and (floor := floors.get(bots)):
                    figures |= {f"{name}_times": figures[key] / floor[key] for name, key in TIMES.items()}
            bench.add("idle", bots, "TLS" if tls else "plain", kind, **figures)


async def bound(bench: Bench) -> None:
    """Bots come by binds, published without a pause, while the same process polls them."""
    bots = CROWD // bench.part
    async with bench.rig(f"{bots} binds") as (made, nc):
        process = made.adapter()
        await made.taken(nc)
        await asyncio.sleep(SETTLE_S)  # all partitions are taken
        last = (await nc.jetstream().stream_info("WECHAT_OUT")).state.last_seq + bots
        spent = Spent(made.server, process)
        for number in range(bots):
            bot, user = f"{number}@im.bot", f"user{number}@im.wechat"
            asked = Bind(bot=bot, bot_token=f"{bot}:0600abcd", user=user)
            await nc.publish(f"wechat.bind.s{number}", msgspec.json.encode(asked), headers={"Nats-Msg-Id": bot})
            if number % 100 == 99:
                await nc.flush()
        js = nc.jetstream(timeout=60)  # the answer waits behind the deletions of the binds that are applied
        while (state := (await js.stream_info("WECHAT_OUT")).state).messages or state.last_seq < last:
            await asyncio.sleep(0.02)
        figures = spent.on(bots, time.monotonic())
        await made.polled(bots)
        bench.add("bind", bots, "all polled", "adapter", **figures, polled_s=time.monotonic() - spent.began)


def plot(rows: list[Row]) -> str:
    """CPU per message of both bridges, and of their servers."""
    found = defaultdict[str, dict[str, tuple[float, ...]]](dict)
    for label, hows in (("inbound, one per answer", {ONE}), ("inbound, 20 per answer", {BATCH}), ("outbound", OUT)):
        for row in rows:
            if row.how in hows:
                group = found[f"{label}, {row.bots:,} bot{'s' if row.bots > 1 else ''}"]
                group[row.bridge] = (row.figures["cpu_us"], row.figures["server_us"])
    return bars("CPU per message, µs: bridge + nats-server", found)


SUITES: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "in": inbound,
    "latency": latency,
    "out": outbound,
    "minute": minute,
    "bind": bound,
    "idle": idle,
}


async def run(names: list[str], *, quick: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    bench, began = Bench(folder, quick=quick), time.monotonic()
    try:
        for name in names:
            await SUITES[name](bench)
    finally:
        print(f"{bench.summary()}\n{bench.tables()}", flush=True)
        await asyncio.to_thread(shutil.rmtree, folder)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    sys.stderr.write(f"{minutes} min {seconds} s\n")
    if {"in", "out"} <= set(names) and not quick:
        await asyncio.to_thread(PLOT.write_text, plot(bench.rows))
        sys.stderr.write(f"{PLOT}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="all of them, if none is named")
    parser.add_argument("--quick", action="store_true", help="whether it runs at all: the figures are worth nothing")
    given = parser.parse_args()
    asyncio.run(run(given.suites or list(SUITES), quick=given.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
