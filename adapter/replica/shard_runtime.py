"""The loops of each shard that this replica owns: its consumer, and for shard 0 the router and the control
commands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import structlog

from adapter.bindings.control import Control
from adapter.contract.names import Names
from adapter.errors import LeaseLost
from adapter.jetstream import topology
from adapter.jetstream.consumer import Consumer
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.kit.timing import Clock, run_with_restarts
from adapter.observability.metrics import Metrics
from adapter.outbound.processor import OutboundDeps, ShardCommandProcessor
from adapter.outbound.router import Router
from adapter.ownership.leases import Leases
from adapter.ports import Delivery
from adapter.replica.probes import Health

log = structlog.get_logger()

RESTARTS, STEADY_S = 5, 60.0
"""Crashes in a row after which a loop counts as broken, and the run time after which a crash starts a new row."""
MAX_IN_FLIGHT = 512
"""Commands of a consumer that are delivered and not settled; for shards, commands that are requested at once."""


async def _on_reset_ignored() -> None:
    return None


class ShardRuntime(NamedTuple):
    """Implements supervisor.ShardWork."""

    connection: ManagedConnection
    outbound: OutboundDeps
    router: Router
    control: Control
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    """Runs work that must not end with its shard: the routing of a command in flight."""
    leases: Leases
    names: Names
    health: Health
    clock: Clock
    metrics: Metrics

    def new_processor(self, shard: int) -> ShardCommandProcessor:
        return ShardCommandProcessor(shard, self.outbound)

    def on_failed(self, name: str, detail: str) -> None:
        self.health.report_failed_loop(name, detail)

    def consumer_loops(self, shard: int, processor: ShardCommandProcessor) -> list[Coroutine[Any, Any, None]]:
        out = topology.out_consumer(shard)
        work = [
            self._run_with_restarts(out, lambda: self._run_consumer(shard, out, "out", processor.intake.on_delivery))
        ]
        if shard == 0:  # the owner of shard 0 also runs router and control
            work += [
                self._run_with_restarts(
                    "router", lambda: self._run_consumer(shard, topology.ROUTER, "router", self._route)
                ),
                self._run_with_restarts("control", lambda: self._consume_commands(shard)),
            ]
        return work

    async def _run_with_restarts(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Restarts a loop that crashed. One that keeps crashing fails /livez."""
        last = await run_with_restarts(run, name, self.clock, restarts=RESTARTS, steady_s=STEADY_S)
        self.on_failed(name, f"crashed {RESTARTS + 1} times in a row: {type(last).__name__}")

    async def _run_consumer(
        self,
        shard: int,
        name: str,
        label: str,
        on_delivery: Callable[[Delivery], None],
        on_reset: Callable[[], Awaitable[None]] = _on_reset_ignored,
    ) -> None:
        def take_delivery(delivery: Delivery) -> None:
            if delivery.redelivered:
                self.metrics.nats_redeliveries.labels(consumer=label).inc()
            try:
                on_delivery(delivery)
            except Exception:  # a bug: the message stays unsettled, and others are delivered
                log.exception("delivery.crashed", consumer=name, sequence=delivery.seq)

        # a shard bounds its deliveries itself; otherwise one sandbox could fill its consumer
        until_acked, check = label != "out", lambda: self.leases.ensure_owned(shard)
        wanted = topology.wanted_consumer(self.names, name)
        turn = self.outbound.conversation.turns.wait_turn
        confirm_acks = label == "control"  # `wait_for_pending_binds` relies on it
        consumer = Consumer(
            self.connection,
            wanted,
            room=MAX_IN_FLIGHT,
            until_acked=until_acked,
            confirm_acks=confirm_acks,
            check=check,
            turn=turn,
        )
        await consumer.run(take_delivery, on_reset)

    def _route(self, delivery: Delivery) -> None:
        self.spawn(self._route_delivery(delivery))

    async def _route_delivery(self, delivery: Delivery) -> None:
        try:
            await self.router.route(delivery)
        except LeaseLost as exc:
            log.info("routing.fenced", reason=exc.reason)
        except Exception:  # a bug: the message stays unsettled, and others are delivered
            log.exception("delivery.crashed", consumer=topology.ROUTER, sequence=delivery.seq)

    async def _consume_commands(self, shard: int) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_consumer(shard, topology.CONTROL, "control", self.control.enqueue))
            group.create_task(self.control.run())
