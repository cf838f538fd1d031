"""What goes wrong in a chaos run: one event after another, most of them before the one before has healed."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec

from adapter.simulator import FaultRule
from adapter.simulator.world import Bot
from tests.e2e.cluster import Node
from tests.e2e.world import AdapterProcess, World

FAULTS = ("F1", "F2", "F3", "F4", "F6", "F8", "F11", "F13", "F16", "F18", "F19", "F20", "F21")
"""Of the simulator; none of them takes a message away that no poll has brought."""
PATIENCE_S = 120.0


class Happening(msgspec.Struct):
    """One thing that went wrong, by the simulator's clock, and how long it took until every bot was polled again."""

    at_s: float
    what: str
    from_ms: float
    to_ms: float = float("inf")
    whom: str = ""
    """The adapter or server that it befell; "": nobody, or it was away already."""
    recovered_s: float | None = None


class Troubles:
    """Befall a world. `rng` decides what, when and whom."""

    def __init__(self, made: World, rng: random.Random) -> None:
        self.happened: list[Happening] = []
        self._made = made
        self._rng = rng
        self._ill: set[str] = set()
        """Servers that are away: two of three at once would be another story, in which nothing is writable."""
        self._events: dict[str, Callable[[Happening], Awaitable[None]]] = {
            "adapter killed": self._kill_adapter,
            "adapter frozen": self._freeze_adapter,
            "adapter restarted": self._restart_adapter,
            "server killed": self._kill_node,
            "server frozen": self._freeze_node,
            "server restarted": self._restart_node,
            "iLink faulty": self._spoil,
            "polls cut": self._cut,
        }

    async def befall(self, until_s: float, pause_s: tuple[float, float] = (3.0, 12.0)) -> None:
        """Until that moment of `time.monotonic`; then until all has healed."""
        began = time.monotonic()
        healing: list[asyncio.Task[None]] = []
        while (left_s := until_s - time.monotonic()) > 0:
            what = self._rng.choice(sorted(self._events))
            happening = Happening(round(time.monotonic() - began, 1), what, self._made.sim.now_ms)
            self.happened.append(happening)
            print(f"{happening.at_s:7.1f} s  {what}", file=sys.stderr, flush=True)
            task = asyncio.ensure_future(self._events[what](happening))
            task.add_done_callback(functools.partial(self._ended, happening))
            healing += [task, asyncio.ensure_future(self._recovery(happening, task))]
            await asyncio.sleep(min(left_s, self._rng.uniform(*pause_s)))
        await asyncio.gather(*healing)

    def _ended(self, happening: Happening, _: object) -> None:
        happening.to_ms = self._made.sim.now_ms

    async def _recovery(self, happening: Happening, healing: asyncio.Future[None]) -> None:
        """Until every bot has a poll out: where an adapter was frozen, one that began since then."""
        began = time.monotonic()
        bots = [self._made.sim.world.bots[record.bot] for record in self._made.bots.values()]
        await asyncio.sleep(0.5)  # by then the polls of one that was killed are gone
        while bots:
            if happening.what == "adapter frozen":
                bots = [bot for bot in bots if not _polled_since(bot, happening.from_ms)]
            else:
                bots = [bot for bot in bots if not bot.polls]
            await asyncio.sleep(0.1)
            if healing.done() and time.monotonic() - began > PATIENCE_S:
                return
        happening.recovered_s = round(time.monotonic() - began, 1)

    # adapters -----------------------------------------------------------------------------------------

    def _adapter(self, happening: Happening) -> AdapterProcess | None:
        adapter = self._rng.choice(self._made.adapters)
        if not adapter.running:
            return None
        happening.whom = adapter.log.stem
        return adapter

    async def _kill_adapter(self, happening: Happening) -> None:
        dead_s = self._rng.uniform(0.5, 10)
        if adapter := self._adapter(happening):
            await adapter.kill()
            await asyncio.sleep(dead_s)
            await adapter.start()

    async def _freeze_adapter(self, happening: Happening) -> None:
        frozen_s = self._rng.uniform(1, 20)
        if adapter := self._adapter(happening):
            adapter.signal(signal.SIGSTOP)
            await asyncio.sleep(frozen_s)
            adapter.signal(signal.SIGCONT)

    async def _restart_adapter(self, happening: Happening) -> None:
        if adapter := self._adapter(happening):
            adapter.signal(signal.SIGTERM)
            await adapter.ended()
            await adapter.start()

    # servers ------------------------------------------------------------------------------------------

    def _node(self, happening: Happening) -> Node | None:
        node = self._rng.choice(self._made.cluster.nodes)
        if self._ill:
            return None
        self._ill.add(node.name)
        happening.whom = node.name
        return node

    async def _well(self, node: Node) -> None:
        await self._made.cluster.healthy()
        self._ill.discard(node.name)

    async def _kill_node(self, happening: Happening) -> None:
        dead_s = self._rng.uniform(1, 10)
        if node := self._node(happening):
            node.kill()
            await asyncio.sleep(dead_s)
            node.start()
            await self._well(node)

    async def _freeze_node(self, happening: Happening) -> None:
        frozen_s = self._rng.uniform(1, 10)
        if node := self._node(happening):
            node.send(signal.SIGSTOP)
            await asyncio.sleep(frozen_s)
            node.send(signal.SIGCONT)
            await self._well(node)

    async def _restart_node(self, happening: Happening) -> None:
        if node := self._node(happening):
            await node.leave()
            node.start()
            await self._well(node)

    # iLink --------------------------------------------------------------------------------------------

    async def _spoil(self, happening: Happening) -> None:
        fault, probability = self._rng.choice(FAULTS), self._rng.uniform(0.02, 0.2)
        count = None if fault == "F8" else -1  # -14 many times over would need a login
        happening.whom = fault
        rule = self._made.sim.set_fault(FaultRule(fault=fault, probability=probability, count=count))
        await asyncio.sleep(self._rng.uniform(2, 15))
        self._made.sim.clear_faults(rule_id=rule.id)

    async def _cut(self, happening: Happening) -> None:
        self._made.sim.cut_polls()


class Recovery(NamedTuple):
    """How long it took to heal from one kind of event."""

    what: str
    times: int
    median_s: float | None
    worst_s: float | None


def recoveries(happened: Sequence[Happening]) -> list[Recovery]:
    """By kind of event, those that befell nobody left out."""
    found = []
    for what in sorted({happening.what for happening in happened}):
        met = [one for one in happened if one.what == what and (one.whom or what == "polls cut")]
        times = [one.recovered_s for one in met if one.recovered_s is not None]
        found.append(
            Recovery(what, len(met), statistics.median(times) if times else None, max(times) if times else None)
        )
    return found


def _polled_since(bot: Bot, since_ms: float) -> bool:
    records = [*(poll.record for poll in bot.polls), *list(bot.poll_records)[-1:]]
    return any(record.start_ms > since_ms for record in records)
