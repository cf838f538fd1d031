"""The consumers of a shard: one that keeps crashing is reported, for a restart of the process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs

from adapter.jetstream import topology
from adapter.kit.persist import ATTEMPTS
from adapter.replica.consumers import consume
from tests.fakes import Bench

VIRTUAL_TIME = True


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
        ticks=bench.replica.ticks,
        health=SimpleNamespace(report_failed_loop=lambda name, detail: failed.append((name, detail))),
    )
    shard = bench.shard("s1")
    assert shard.number > 0
    with capture_logs() as logs:
        await consume(replica, shard)
    assert failed == [(topology.out_consumer(shard.number), "crashed: ValueError")]
    assert connection.met == ATTEMPTS
    assert [line["crashes"] for line in logs if line["event"] == "work.crashed"] == [1, 2, 3]
