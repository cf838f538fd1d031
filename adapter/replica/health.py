"""How this replica is: the answers of the probes, the gauges, and whether the bus takes what polls may bring."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

import msgspec
import structlog

from adapter.bridge.partitions import Partitions
from adapter.bridge.poller import State
from adapter.contract.names import Names
from adapter.errors import UNDECODABLE, BusRefused, Temporary
from adapter.jetstream import topology
from adapter.jetstream.inspector import Inspector
from adapter.replica.edges import Edges
from adapter.tools.metrics import PARKED, STATES, Metrics
from adapter.tools.permissions import USER_INFO, required, user_of
from adapter.tools.timing import ChangeSignal, Clock

log = structlog.get_logger()

STUCK_S = 30.0
"""Age of a heartbeat at which the event loop counts as stuck."""
BUS_GRACE_S = 10.0
"""Longest NATS outage during which the replica stays ready: it keeps its bindings and reconnects."""
TICK_S = 0.5
"""Interval between two heartbeats."""
OBSERVED_EVERY = 8
"""Ticks between two counts of pollers and commands, each of which takes milliseconds with thousands of bots."""
EVICTED_EVERY = 60
"""Ticks between two clean-ups of idle state."""
CHECK_S = 2.0
"""Interval between two checks of JetStream. Every second check includes streams and the router's consumer."""
LISTED = 8
"""Permissions that a sentence names."""
POLLED = (State.POLLING, State.STORING, State.RETRYING, State.STALE, State.PAUSED)
"""States in which iLink should answer polls."""
ASKED = (State.POLLING, State.STORING, State.RETRYING)
"""Those of them in which nothing but iLink is waited for."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an answer. `since_ms`: Unix milliseconds of the first answer with this `ok`."""

    name: str
    ok: bool
    since_ms: int
    detail: str = ""


class Health:
    """How this replica is. The event loop sets it, and the probe thread reads it. Texts are for operators.

    NATS and iLink never affect liveness, since a restart of thousands of long polls repairs neither. Single bindings
    do not count.
    """

    def __init__(self, edges: Edges, names: Names, inspector: Inspector, inbox_prefix: str) -> None:
        self.phase = "starting"
        """What the start waits for; "" once the first connection succeeded with all subscriptions, streams and
        buckets are verified, and loops run."""
        self.draining = False
        """SIGTERM was received."""
        self.clock = edges.clock
        self._edges = edges
        self._names = names
        self._inbox_prefix = inbox_prefix
        self._inspector = inspector
        self._polls_need = (
            names.stream_in,
            *(f"KV_{bucket}" for bucket in (names.bindings, names.persons)),
        )
        self._heartbeat_at = self.clock.monotonic()
        self._failed_loops: dict[str, str] = {}
        self._down_since: float | None = None
        """When the connection was lost; None while it is connected."""
        self.lacks = ""
        """Permissions that the user of this connection has not; "": none is known."""
        self.jetstream_problem = "JetStream does not answer"
        """What was wrong with JetStream at the last check; "": nothing."""
        self._healthy_at = self.clock.monotonic()
        """Time of the last check without a problem."""
        self._missing: list[str] = []
        """Streams and buckets that were deleted."""
        self._altered: list[str] = []
        """Streams that were changed, and how."""
        self._paused: list[str] = []
        """Paused consumers with their streams."""
        self._checked = ChangeSignal()
        """Notified when streams were checked."""
        self._in_flight = 0
        """Commands in flight at the last count."""
        self._since_ms: dict[tuple[str, bool], int] = {}
        """By check and its result: when it was first answered."""

    def on_started(self) -> None:
        """The service has started with verified streams."""
        self.jetstream_problem = self.phase = ""
        self._healthy_at = self.clock.monotonic()

    def report_failed_loop(self, name: str, detail: str) -> None:
        """Reports that a loop ended for good, so that only a restart helps. `detail` must not contain secrets."""
        self._failed_loops = {**self._failed_loops, name: detail}

    # for the probes ---------------------------------------------------------------------------------

    def check_started(self) -> list[Check]:
        """/startupz: once true, true for good."""
        return [self._check("started", self.phase)]

    def check_live(self) -> list[Check]:
        """/livez: whether a restart would help."""
        silent_s = self.clock.monotonic() - self._heartbeat_at
        stuck = f"no heartbeat for {silent_s:.0f} s" if silent_s >= STUCK_S else ""
        return [
            self._check("event_loop", stuck),
            *(self._check(name, detail) for name, detail in self._failed_loops.items()),
        ]

    def check_ready(self) -> list[Check]:
        """/readyz: whether this replica can take over bindings."""
        down_s = 0.0 if self._down_since is None else self.clock.monotonic() - self._down_since
        outage = f"disconnected for {down_s:.0f} s" if down_s else ""
        return [
            *self.check_started(),
            self._check("nats", outage, ok=down_s <= BUS_GRACE_S),
            self._check("permissions", self.lacks),
            self._check("jetstream", self.jetstream_problem),
            self._check("streams", self._stream_problems()),
            self._check("not_draining", "shutting down" if self.draining else ""),
        ]

    def _stream_problems(self) -> str:
        """What is wrong with the streams and what helps; "": nothing."""
        troubles = (
            ("deleted", self._missing, "restore from the backup, or create empty by `wechat-nats doctor --fix`"),
            ("incomplete", self._inspector.incomplete, "restore from the backup"),
            ("altered", self._altered, "`wechat-nats doctor --fix`"),
        )
        sentences = [f"{problem}: {', '.join(names)}; {advice}" for problem, names, advice in troubles if names]
        return "; ".join(sentences + [f"paused: `nats consumer resume {consumer}`" for consumer in self._paused])

    def _check(self, name: str, problem: str, *, ok: bool | None = None) -> Check:
        """`ok`: by default, whether there is no problem."""
        ok = not problem if ok is None else ok
        since_ms = self._since_ms.setdefault((name, ok), self.clock.now_ms())
        self._since_ms.pop((name, not ok), None)
        return Check(name=name, ok=ok, since_ms=since_ms, detail=problem)

    # whether the bus takes what is done -------------------------------------------------------------

    def is_writable(self) -> bool:
        """Whether the bus accepts what a poll may bring."""
        edges, streams = self._edges, self._polls_need
        return edges.connection.is_connected and edges.bus.is_writable(streams) and self._is_complete(streams)

    async def wait_writable(self) -> None:
        """Returns when the bus accepts what a poll may bring."""
        await self._edges.connection.wait_connected()
        await self._edges.bus.wait_writable(self._polls_need)
        await self.wait_complete(self._polls_need)

    async def wait_complete(self, streams: Collection[str]) -> None:
        """Returns when these streams exist with all their keys, as far as known."""
        await self._checked.wait_until(lambda: self._is_complete(streams))

    def _is_complete(self, streams: Collection[str]) -> bool:
        return not any(name in streams for name in (*self._missing, *self._inspector.incomplete))

    # loops ------------------------------------------------------------------------------------------

    async def heartbeat_forever(self, here: Partitions) -> None:
        """Reports heartbeats to the probes, and sets the sampled gauges, until cancelled."""
        loop, edges, metrics = asyncio.get_running_loop(), self._edges, self._edges.metrics
        ticks = 0
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            metrics.event_loop_lag.observe(max(0.0, loop.time() - due))
            self.on_heartbeat(is_connected=edges.connection.is_connected)
            metrics.nats_publish_oldest.set(max(edges.bus.waiting_s, edges.media_bus.waiting_s))
            ticks += 1
            if ticks % OBSERVED_EVERY == 0:
                metrics.ready.set(all(check.ok for check in self.check_ready()))
                self._in_flight = observe(here, self.clock, metrics, len(asyncio.all_tasks()))
            if ticks % EVICTED_EVERY == 0:
                for partition in here.working.values():
                    partition.evict_idle()

    def on_heartbeat(self, *, is_connected: bool) -> None:
        """The event loop runs; far more often than every STUCK_S seconds."""
        self._heartbeat_at = self.clock.monotonic()
        self._edges.metrics.nats_connected.set(1 if is_connected else 0)
        if is_connected:
            self._down_since = None
        elif self._down_since is None:
            self._down_since = self._heartbeat_at

    async def check_jetstream_forever(self) -> None:
        """Checks until cancelled that JetStream answers and accepts writes, and that its streams exist; beside the
        heartbeat, since its answers may take long."""
        connection, rounds = self._edges.connection, 0
        while True:
            await self.clock.sleep(CHECK_S)
            if self.phase or not connection.is_connected:
                continue  # a lost connection has its own check and grace time
            rounds += 1
            try:
                await connection.api_request("INFO", timeout_s=1.0)
                if rounds % 2 == 0:
                    await self.check_permissions()
                if rounds % 2 == 1 or self.jetstream_problem:  # after an outage something may be missing
                    await self._check_streams()
                    await self._check_consumers()
            except (Temporary, BusRefused) as exc:
                if connection.is_connected:
                    self._report_problem(f"JetStream does not answer: {exc.detail or exc.reason}"[:200])
            else:
                self._report_problem(self._current_problem()[:200])

    def _current_problem(self) -> str:
        """Why this replica cannot work although JetStream answers; "": it can."""
        bus, leases = self._edges.bus, self._edges.leases
        if bus.waiting_s > BUS_GRACE_S:
            return f"JetStream takes nothing for {bus.last_error}"
        return "" if leases.is_working else f"no lease can be renewed: {leases.last_error}"

    def _report_problem(self, problem: str) -> None:
        """Reports a problem after BUS_GRACE_S: an election takes seconds, and moves nothing."""
        now = self.clock.monotonic()
        self._healthy_at = self._healthy_at if problem else now
        if not problem or now - self._healthy_at > BUS_GRACE_S:
            self.jetstream_problem = problem

    async def check_permissions(self) -> None:
        """Asks the server what the user of this connection may. Nothing changes where it does not say."""
        try:
            answer = await self._edges.connection.request(USER_INFO, b"", timeout_s=2.0)
            may = user_of(answer.data).permissions
        except (Temporary, *UNDECODABLE):
            return  # not permitted to ask, or a server without an answer
        missing = may.missing(required(self._names, self._inbox_prefix))
        names = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if missing[LISTED:] else "")
        lacks = f"NATS permissions are missing: {names}; `wechat-nats doctor` lists all." if missing else ""
        if lacks and lacks != self.lacks:
            log.error("permissions.missing", lacks=names, count=len(missing))
        self.lacks = lacks

    async def _check_streams(self) -> None:
        """Raises Temporary, BusRefused."""
        metrics, inspector = self._edges.metrics, self._inspector
        self._missing = await inspector.inspect_streams(self._edges.connection)
        altered = inspector.altered.items()
        self._altered = [f"{name} ({', '.join(d.field for d in found)})" for name, found in altered]
        metrics.nats_streams_missing.set(len({*self._missing, *inspector.incomplete}))
        metrics.nats_streams_altered.set(len(self._altered) + len(self._paused))
        metrics.nats_streams_degraded.set(len({each.stream for each in inspector.lacking}))
        self._checked.notify_all()

    async def _check_consumers(self) -> None:
        """Raises Temporary."""
        names, metrics = self._names, self._edges.metrics
        before, paused = self._paused, []
        stream, consumer = names.stream_out, topology.ROUTER
        name = f"{stream} {consumer}"
        try:
            info = await self._edges.connection.api_request(f"CONSUMER.INFO.{stream}.{consumer}")
        except BusRefused as exc:  # deleted by an operator; its owner recreates it
            log.warning("consumer.missing", consumer=consumer, detail=exc.detail)
        else:
            if info.get("paused"):
                paused.append(name)
                if name not in before:
                    log.error("consumer.paused", consumer=consumer, detail="It delivers nothing until it is resumed.")
            elif name in before:
                log.info("consumer.resumed", consumer=consumer)
            metrics.nats_consumer_pending.labels(consumer=consumer).set(info["num_pending"])
            metrics.nats_consumer_ack_pending.labels(consumer=consumer).set(info["num_ack_pending"])
        self._paused = paused
        waiting = max(0, self._inspector.message_count(names.stream_out) - self._in_flight)
        metrics.nats_consumer_pending.labels(consumer="out").set(waiting)
        metrics.nats_consumer_ack_pending.labels(consumer="out").set(self._in_flight)


def observe(here: Partitions, clock: Clock, metrics: Metrics, tasks: int) -> int:
    """Sets the gauges that are counted over all pollers and partitions. `tasks`: those of the whole event loop.
    Returns the number of commands in flight."""
    working = here.working.values()
    _observe_polls(here, metrics, clock.monotonic())
    parked: Counter[str] = Counter()
    counted = [partition.queue_depths(parked) for partition in working]
    for reason in PARKED.split():
        metrics.outbound_parked.labels(reason=reason).set(parked[reason])
    in_flight = sum(number for number, _ in counted)
    metrics.outbound_in_flight.set(in_flight)
    now_ms = clock.now_ms()
    oldest_ms = min((stored_ms for _, stored_ms in counted if stored_ms is not None), default=now_ms)
    metrics.outbound_oldest_pending.set(max(0.0, (now_ms - oldest_ms) / 1000))
    senders = sum(partition.tasks for partition in working)
    metrics.tasks.labels(kind="poller").set(len(here.pollers))
    metrics.tasks.labels(kind="sender").set(senders)
    metrics.tasks.labels(kind="other").set(tasks - len(here.pollers) - senders)
    return in_flight


def _observe_polls(here: Partitions, metrics: Metrics, now: float) -> None:
    throttled = {bot for partition in here.working.values() for bot in partition.throttled_bots}
    pollers = here.pollers.values()
    states = Counter(
        "throttled" if poller.state is State.POLLING and poller.bot in throttled else poller.state.value
        for poller in pollers
        if not poller.is_given_away  # who has the partition counts it
    )
    for state in STATES.split():
        metrics.bindings.labels(state=state).set(states[state])
    polled = [poller for poller in pollers if poller.state in POLLED]
    ages = [now - poller.unanswered_since for poller in polled if poller.unanswered_since]
    metrics.oldest_poll_age.set(max(ages, default=0.0))
    asked = [poller for poller in polled if poller.state in ASKED and poller.unanswered_since]
    metrics.newest_poll_age.set(min((now - poller.unanswered_since for poller in asked), default=0.0))
    # every replica reports partitions without an owner, since it may be the only one left
    open_to_us = here.leases.owned.keys() | here.leases.ownerless
    metrics.bindings_unowned.set(
        sum(
            binding.bot not in here.pollers for number in open_to_us for binding in here.bindings.of_partition(number)
        )
    )
