"""The consumers of a partition: one that keeps crashing is reported, for a restart; else it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.jetstream import topology
from adapter.replica import consumers
from adapter.replica.consumers import consume
from adapter.tools.tasks import ATTEMPTS
from tests.fakes import Bench

VIRTUAL_TIME = True

DAY_S = 86_400.0


class Broken:
    """A connection with a bug."""

    def __init__(self) -> None:
        self.met = 0

    async def wait_connected(self) -> None:
        self.met += 1
        raise ValueError("a bug")


async def test_a_consumer_that_keeps_crashing_is_reported_and_ends(bench: Bench) -> None:
    connection, failed = Broken(), list[tuple[str, str]]()
    replica: Any = SimpleNamespace(
        edges=SimpleNamespace(connection=connection),
        names=bench.names,
        metrics=bench.metrics,
        clock=bench.clock,
        health=SimpleNamespace(report_failed_loop=lambda name, detail: failed.append((name, detail))),
    )
    partition = bench.partition("s1")
    assert partition.number > 0
    with capture_logs() as logs:
        await consume(replica, partition)
    assert failed == [(topology.partition_consumer(partition.number), "crashed: ValueError")]
    assert connection.met == ATTEMPTS
    assert [line["crashes"] for line in logs if line["event"] == "work.crashed"] == [1, 2, 3]


class Crashing:
    """In place of a consumer: each works for a day, then it crashes."""

    def __init__(self) -> None:
        self.begun = 0

    def __call__(self, *_: Any, **__: Any) -> Crashing:
        self.begun += 1
        return self

    async def run(self, on_delivery: Callable[[Any], None]) -> None:
        await asyncio.sleep(DAY_S)
        raise KeyError("a bug")


async def test_a_consumer_that_crashes_now_and_then_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = Crashing()
    monkeypatch.setattr(consumers, "Consumer", crashing)
    running = asyncio.create_task(consume(bench.replica, bench.partition("s1")))
    await asyncio.sleep(9.9 * DAY_S)
    assert [check.name for check in bench.replica.health.check_live()] == ["event_loop"]
    assert crashing.begun == 10
    running.cancel()
