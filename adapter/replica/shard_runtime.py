"""The loops of each shard that this replica owns: its consumer, and for shard 0 the router and the control
commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import structlog

from adapter.bindings.control import Control
from adapter.jetstream import topology
from adapter.jetstream.consumer import Consumer
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.kit.timing import run_with_restarts
from adapter.outbound.router import Router
from adapter.outbound.shard import OutboundDeps, Shard
from adapter.ownership.tenure import Tenure
from adapter.ports import Delivery

log = structlog.get_logger()

RESTARTS, STEADY_S = 5, 60.0
"""Crashes in a row after which a loop counts as broken, and the run time after which a crash starts a new row."""
MAX_IN_FLIGHT = 512
"""Commands of a consumer that are delivered and not settled; for shards, commands that are requested at once."""


class ShardRuntime(NamedTuple):
    """Implements shards.ShardWork."""

    connection: ManagedConnection
    outbound: OutboundDeps
    new_router: Callable[[Tenure], Router]
    control: Control
    on_failed: Callable[[str, str], None]

    def new_shard(self, number: int) -> Shard:
        return Shard(number, self.outbound)

    def consumer_loops(self, shard: Shard) -> list[Coroutine[Any, Any, None]]:
        number, out = shard.number, topology.out_consumer(shard.number)
        loops = {out: lambda: self._consume(number, out, shard.on_delivery)}
        if number == 0:  # the owner of shard 0 also runs router and control
            loops[topology.ROUTER] = self._route
            loops[topology.CONTROL] = lambda: self._consume_commands(number)
        return [self._run_with_restarts(name, loop) for name, loop in loops.items()]

    async def _run_with_restarts(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Restarts a loop that crashed. One that keeps crashing fails /livez."""
        clock = self.outbound.clock
        last = await run_with_restarts(run, name, clock, restarts=RESTARTS, steady_s=STEADY_S)
        self.on_failed(name, f"crashed {RESTARTS + 1} times in a row: {type(last).__name__}")

    async def _consume(self, shard: int, name: str, on_delivery: Callable[[Delivery], None]) -> None:
        deps = self.outbound
        is_out = name not in (topology.ROUTER, topology.CONTROL)
        redeliveries = deps.metrics.nats_redeliveries.labels(consumer="out" if is_out else name)

        def take_delivery(delivery: Delivery) -> None:
            if delivery.redelivered:
                redeliveries.inc()
            try:
                on_delivery(delivery)
            except Exception:  # a bug: the message stays unsettled, and others are delivered
                log.exception("delivery.crashed", consumer=name, sequence=delivery.seq)

        consumer = Consumer(
            self.connection,
            topology.wanted_consumer(deps.names, name),
            room=MAX_IN_FLIGHT,
            # a shard bounds its deliveries itself; otherwise one sandbox could fill its consumer
            until_acked=not is_out,
            confirm_acks=name == topology.CONTROL,  # processed again, an old bind would undo a later unbind
            check=lambda: deps.leases.ensure_owned(shard),
            turn=deps.turns.wait_turn,
        )
        await consumer.run(take_delivery)

    async def _route(self) -> None:
        tenure = Tenure(0, self.outbound.leases)
        router = self.new_router(tenure)
        try:
            await self._consume(0, topology.ROUTER, router.on_delivery)
        finally:
            tenure.end()
            router.stop()

    async def _consume_commands(self, shard: int) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._consume(shard, topology.CONTROL, self.control.enqueue))
            group.create_task(self.control.run())
