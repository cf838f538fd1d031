"""Sets the gauges that are counted over all pollers and shards of a replica."""

from __future__ import annotations

from collections import Counter

from adapter.contract.names import SHARDS, shard_of
from adapter.inbound.poller import State
from adapter.kit.timing import Clock
from adapter.observability.metrics import PARKED, STATES, Metrics
from adapter.replica.supervisor import Supervisor

POLLED = (State.POLLING, State.STORING, State.RETRYING, State.STALE, State.PAUSED)
"""States in which iLink should answer polls."""


def observe(supervisor: Supervisor, clock: Clock, metrics: Metrics, tasks: int) -> None:
    """`tasks`: tasks of the whole event loop."""
    _observe_polls(supervisor, metrics, clock.monotonic())
    _observe_commands(supervisor, metrics, clock.now_ms())
    pollers, conversations = supervisor.pollers.tasks, sum(shard.tasks for shard in supervisor.shards.values())
    metrics.tasks.labels(kind="poller").set(pollers)
    metrics.tasks.labels(kind="conversation").set(conversations)
    metrics.tasks.labels(kind="other").set(tasks - pollers - conversations)


def _observe_polls(supervisor: Supervisor, metrics: Metrics, now: float) -> None:
    throttled = {bot for shard in supervisor.shards.values() for bot in shard.throttled_bots}
    pollers = supervisor.pollers.values()
    states = Counter(
        "throttled" if poller.state is State.POLLING and poller.bot in throttled else poller.state.value
        for poller in pollers
    )
    for state in STATES.split():
        metrics.bindings.labels(state=state).set(states[state])
    polled = [poller for poller in pollers if poller.state in POLLED]
    ages = [now - poller.unanswered_since for poller in polled if poller.unanswered_since]
    metrics.oldest_poll_age.set(max(ages, default=0.0))
    # every replica reports shards without an owner, since it may be the only one left
    open_to_us = supervisor.leases.owned | supervisor.leases.orphans
    everything = len(open_to_us) == SHARDS
    unpolled = (binding for binding in supervisor.bindings if binding.bot not in supervisor.pollers)
    unowned = sum(1 for binding in unpolled if everything or shard_of(binding.sandbox) in open_to_us)
    metrics.bindings_unowned.set(unowned)


def _observe_commands(supervisor: Supervisor, metrics: Metrics, now_ms: int) -> None:
    parked: Counter[str] = Counter()
    counted = [shard.queue_depths(parked) for shard in supervisor.shards.values()]
    for reason in PARKED.split():
        metrics.outbound_parked.labels(reason=reason).set(parked[reason])
    supervisor.shards.in_flight = sum(in_flight for in_flight, _ in counted)
    metrics.outbound_in_flight.set(supervisor.shards.in_flight)
    oldest_ms = min((stored_ms for _, stored_ms in counted if stored_ms is not None), default=now_ms)
    metrics.outbound_oldest_pending.set(max(0.0, (now_ms - oldest_ms) / 1000))
