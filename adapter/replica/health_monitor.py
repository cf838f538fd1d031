"""Health checks of this replica and its bus, for the probes and the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from adapter.contract.names import Names
from adapter.errors import BusRefused, Temporary
from adapter.jetstream import topology
from adapter.jetstream.inspector import Inspector
from adapter.kit.timing import ChangeSignal, Clock
from adapter.observability.metrics import Metrics
from adapter.replica.connections import Connections
from adapter.replica.gauges import observe
from adapter.replica.probes import BUS_GRACE_S, Health
from adapter.replica.supervisor import Supervisor

log = structlog.get_logger()

TICK_S = 0.5
"""Interval between two heartbeats."""
OBSERVED_EVERY = 8
"""Ticks between two counts of pollers and commands, each of which takes milliseconds with thousands of bots."""
EVICTED_EVERY = 60
"""Ticks between two clean-ups of idle state."""
CHECK_S = 2.0
"""Interval between two checks of JetStream. Every second check includes streams and consumers."""


class HealthMonitor:
    """Runs two loops: a heartbeat of the event loop, and checks of JetStream, whose answers may take long."""

    def __init__(
        self,
        *,
        connections: Connections,
        inspector: Inspector,
        set_back: Callable[[], str],
        supervisor: Supervisor,
        names: Names,
        health: Health,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._connection = connections.connection
        self._publishers = connections.bus, connections.media_bus
        self._inspector = inspector
        self._set_back = set_back
        """What is wrong where positions are above the inboxes; "": nothing."""
        self._supervisor = supervisor
        self._names = names
        self._health = health
        self._clock = clock
        self._metrics = metrics
        self._healthy_at = clock.monotonic()
        """Time of the last check without a problem."""
        self._missing: set[str] = set()
        """Deleted streams, and buckets that lacked keys, at the last check."""
        self._checked = ChangeSignal()

    async def wait_complete(self, streams: Iterable[str]) -> None:
        """Returns when these streams exist with all their keys, as far as known."""
        await self._checked.wait_until(lambda: self.is_complete(streams))

    def is_complete(self, streams: Iterable[str]) -> bool:
        """Whether `wait_complete` would return at once."""
        return self._missing.isdisjoint(streams)

    def on_started(self) -> None:
        """Called when the service has started with verified streams."""
        self._health.jetstream_problem = self._health.phase = ""
        self._healthy_at = self._clock.monotonic()

    async def heartbeat_forever(self) -> None:
        """Reports heartbeats to the probes, and sets the sampled gauges, until cancelled."""
        loop, metrics = asyncio.get_running_loop(), self._metrics
        ticks = 0
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            metrics.event_loop_lag.observe(max(0.0, loop.time() - due))
            self._health.record_heartbeat()
            metrics.nats_connected.set(1 if self._connection.is_connected else 0)
            self._health.set_connected(self._connection.is_connected)
            metrics.nats_publish_oldest.set(max(bus.waiting_s for bus in self._publishers))
            ticks += 1
            if ticks % OBSERVED_EVERY == 0:
                observe(self._supervisor, self._clock, metrics, len(asyncio.all_tasks()))
            if ticks % EVICTED_EVERY == 0:
                self._supervisor.shards.evict_idle()

    async def check_jetstream_forever(self) -> None:
        """Checks until cancelled that JetStream answers and accepts writes, and that its streams exist."""
        rounds = 0
        while True:
            await self._clock.sleep(CHECK_S)
            if not (self._health.started and self._connection.is_connected):
                continue  # a lost connection has its own check and grace time
            rounds += 1
            try:
                await self._connection.api_request("INFO", timeout_s=1.0)
                if rounds % 2 == 1 or self._health.jetstream_problem:  # after an outage something may be missing
                    await self._check_streams()
                    await self._check_consumers()
            except (Temporary, BusRefused) as exc:
                if self._connection.is_connected:
                    self._report_problem(f"JetStream does not answer: {exc.detail or exc.reason}"[:200])
            else:
                self._report_problem(self._current_problem()[:200])

    def _current_problem(self) -> str:
        """Why this replica cannot work although JetStream answers; "": it can."""
        bus, leases = self._publishers[0], self._supervisor.leases
        if set_back := self._set_back():
            return set_back
        if bus.waiting_s > BUS_GRACE_S:
            return f"JetStream takes nothing for {bus.last_error}"
        return "" if leases.is_valid else f"the lease cannot be renewed: {leases.last_error}"

    def _report_problem(self, problem: str) -> None:
        """Reports a problem after BUS_GRACE_S, since an election takes seconds and this replica keeps its shards."""
        now = self._clock.monotonic()
        self._healthy_at = self._healthy_at if problem else now
        if not problem or now - self._healthy_at > BUS_GRACE_S:
            self._health.jetstream_problem = problem

    async def _check_streams(self) -> None:
        """Raises Temporary, BusRefused."""
        missing = await self._inspector.inspect_streams(self._connection)
        incomplete = self._inspector.incomplete
        self._missing = {*missing, *incomplete}
        self._metrics.nats_streams_missing.set(len(self._missing))
        altered = [f"{name} ({', '.join(d.field for d in found)})" for name, found in self._inspector.altered.items()]
        self._metrics.nats_streams_altered.set(len(altered) + len(self._health.paused))
        self._health.missing, self._health.altered = ", ".join(missing), ", ".join(altered)
        self._health.incomplete = ", ".join(incomplete)
        self._checked.notify_all()

    async def _check_consumers(self) -> None:
        """Raises Temporary."""
        names, metrics = self._names, self._metrics
        before, paused = self._health.paused, []
        for label, stream, consumer in (
            ("router", names.stream_out, topology.ROUTER),
            ("control", names.stream_ctl, topology.CONTROL),
        ):
            try:
                info = await self._connection.api_request(f"CONSUMER.INFO.{stream}.{consumer}")
            except BusRefused as exc:  # deleted by an operator; its owner recreates it
                log.warning("consumer.missing", consumer=consumer, detail=exc.detail)
                continue
            name = f"{stream} {consumer}"
            if info.get("paused"):
                paused.append(name)
                if name not in before:
                    log.error("consumer.paused", consumer=consumer, detail="It delivers nothing until it is resumed.")
            elif name in before:
                log.info("consumer.resumed", consumer=consumer)
            metrics.nats_consumer_pending.labels(consumer=label).set(info["num_pending"])
            metrics.nats_consumer_ack_pending.labels(consumer=label).set(info["num_ack_pending"])
        self._health.paused = paused
        waiting, in_flight = self._inspector.message_count(names.stream_out), self._supervisor.shards.in_flight
        metrics.nats_consumer_pending.labels(consumer="out").set(max(0, waiting - in_flight))
        metrics.nats_consumer_ack_pending.labels(consumer="out").set(in_flight)
