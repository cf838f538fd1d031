"""The consumers of a partition that this replica owns; for partition 0 also that of the router."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from adapter.bridge.partition import Partition
from adapter.errors import Crashed, LeaseLost
from adapter.jetstream import topology
from adapter.jetstream.consumer import Consumer
from adapter.ports import Delivery
from adapter.replica.wiring import Replica

log = structlog.get_logger()

BROKEN_S = 600.0
"""Time within which a consumer crashes as often as `persist` lets it, if only a restart helps."""


async def consume(replica: Replica, partition: Partition) -> None:
    """Runs until cancelled, or until the partition is lost. A consumer that keeps crashing fails /livez."""

    async def keep(name: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            began = replica.clock.monotonic()
            try:
                await partition.tenure.persist(work, name)
            except LeaseLost:
                log.debug("consumer.ended", consumer=name)
                return
            except Crashed as exc:
                if replica.clock.monotonic() - began < BROKEN_S:
                    replica.health.report_failed_loop(name, f"crashed: {type(exc.__cause__).__name__}")
                    return

    out = topology.partition_consumer(partition.number)
    async with asyncio.TaskGroup() as group:
        group.create_task(keep(out, partial(_consume, replica, partition, out, partition.on_delivery)))
        if partition.number == 0:
            group.create_task(keep(topology.ROUTER, partial(_route, replica, partition)))


async def _route(replica: Replica, partition: Partition) -> None:
    router = replica.new_router(partition.tenure)
    try:
        await _consume(replica, partition, topology.ROUTER, router.on_delivery)
    finally:
        router.stop()


async def _consume(
    replica: Replica, partition: Partition, name: str, on_delivery: Callable[[Delivery], None]
) -> None:
    label = name if name == topology.ROUTER else "out"
    redeliveries = replica.metrics.nats_redeliveries.labels(consumer=label)

    def take_delivery(delivery: Delivery) -> None:
        if delivery.redelivered:
            redeliveries.inc()
        try:
            on_delivery(delivery)
        except Exception:  # a bug: the message stays unsettled, and others are delivered
            log.exception("delivery.crashed", consumer=name, sequence=delivery.seq)

    consumer = Consumer(
        replica.edges.connection,
        *topology.consumer_config(replica.names, name),
        check=partition.tenure.check,
    )
    await consumer.run(take_delivery)
