"""As `test_leases`, by chance: hypothesis decides what happens to the replicas."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter.contract.records import Lease
from tests.fakes import VirtualLoop
from tests.ownership.cluster import LEASE_S, PARTITIONS, Cluster, Replica

MOST = 5
"""Replicas that live at the same time."""

Fault = Callable[[Replica], None]


def _set(name: str, value: Any) -> Fault:
    def fault(replica: Replica) -> None:
        setattr(replica.line, name, value)

    return fault


FAULTS: dict[str, tuple[Fault, Fault]] = {
    "down": (_set("down", True), _set("down", False)),
    "mute": (_set("mute", True), _set("mute", False)),
    "unwritable": (_set("writes_fail", True), _set("writes_fail", False)),
    "deaf": (_set("deaf", True), _set("deaf", False)),
    "blind": (_set("reads_fail", True), _set("reads_fail", False)),
    "slow": (_set("late_s", 0.9), _set("late_s", 0.0)),
    "very-late": (_set("late_s", 4.5), _set("late_s", 0.0)),
    "unsteady": (_set("unsteady", True), _set("unsteady", False)),
}


class Owning(RuleBasedStateMachine):
    """Replicas that come, go, stop for a while, cannot write or read, or do not hear of it. While time passes,
    `Cluster` looks every 20 ms that no partition has two who work for it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.leaving: list[asyncio.Task[None]] = []
        self.run(self.begin())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    async def begin(self) -> None:
        self.cluster = Cluster()
        for number in range(3):
            self.cluster.start(rate=(1.0, 0.97, 1.03)[number], ahead_s=1000.0 * number)

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.cluster.replicas if not replica.task.done()]

    def some(self, number: int) -> Replica:
        return self.alive[number % len(self.alive)] if self.alive else self.cluster.start()

    @precondition(lambda self: len(self.alive) < MOST)  # more take longer, and show nothing else
    @rule(rate=st.sampled_from([0.97, 1.0, 1.03]))
    def one_comes(self, rate: float) -> None:
        async def happen() -> None:
            self.cluster.start(rate=rate, ahead_s=-500.0)

        self.run(happen())

    @rule(number=st.integers(0, 2))
    def one_is_killed(self, number: int) -> None:
        async def happen() -> None:
            await self.some(number).kill()

        self.run(happen())

    @rule(number=st.integers(0, 2))
    def one_leaves(self, number: int) -> None:
        async def happen() -> None:
            self.leaving.append(asyncio.get_running_loop().create_task(self.some(number).leave()))

        self.run(happen())

    @rule(number=st.integers(0, 2), what=st.sampled_from(sorted(FAULTS)))
    def one_has_trouble(self, number: int, what: str) -> None:
        async def happen() -> None:
            FAULTS[what][0](self.some(number))

        self.run(happen())

    @rule(number=st.integers(0, 2))
    def one_is_stopped(self, number: int) -> None:
        async def happen() -> None:
            self.some(number).life.stop()

        self.run(happen())

    @rule(number=st.integers(0, 2))
    def one_is_well_again(self, number: int) -> None:
        async def happen() -> None:
            self.heal(self.some(number))

        self.run(happen())

    @rule(seconds=st.sampled_from([0.3, 1.1, 2.0, 3.3, 5.0, 9.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(self.cluster.run(seconds))

    def heal(self, replica: Replica) -> None:
        replica.life.go_on()
        for _, heal in FAULTS.values():
            heal(replica)

    @invariant()
    def whoever_works_has_the_key(self) -> None:
        """As the store has it, not as it believes."""
        self.run(self.look())

    async def look(self) -> None:
        keys = self.cluster.store.entries
        for replica in self.cluster.replicas:
            for number in replica.working:
                value = keys[str(number)].value
                assert value is not None
                assert msgspec.json.decode(value, type=Lease).owner == replica.leases.replica

    def teardown(self) -> None:
        self.run(self.end())
        self.runner.close()

    async def end(self) -> None:
        """All is well: each partition has an owner, nobody has more than a fair share, and nothing moves."""
        for replica in self.cluster.replicas:
            self.heal(replica)
        if self.leaving:
            await self.cluster.run(5)
            await asyncio.wait(self.leaving)
        if all(replica.task.done() for replica in self.cluster.replicas):
            self.cluster.start()
        await self.cluster.run(20)
        assert self.cluster.worked_for == PARTITIONS
        fair = math.ceil(PARTITIONS / len(self.alive))
        assert max(len(replica.working) for replica in self.alive) <= fair
        before = [replica.working for replica in self.alive]
        await self.cluster.run(LEASE_S)
        assert [replica.working for replica in self.alive] == before
        self.cluster.stop()
        await asyncio.sleep(0)


class OwningForLong(Owning):
    """The same, ten times as many courses."""


Owning.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestOwning = Owning.TestCase
OwningForLong.TestCase.settings = settings(max_examples=200, stateful_step_count=20)
TestOwningForLong = pytest.mark.slow(OwningForLong.TestCase)
