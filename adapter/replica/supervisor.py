"""Starts and stops the pollers and shards of a replica as leases and bindings change.

`run` reconciles what runs with what should run. Each owned shard has a `ShardCommandProcessor` with its consumers,
and each binding of an owned shard has a poller. Bindings that changed are collected in `_dirty` and followed in
batches; changes of the leases are followed in every round:

- A new shard is opened, and its bots are polled.
- A lost shard is dropped at once.
- A surplus shard, which another replica should own, is handed over in this order: its consumers stop, its dispatchers
  end, its requests in flight end, the claim is released. A poll that waits is not cut; it stores its answer, and the
  next owner dispatches it.
- When the lease pauses, polls are cancelled. When it is valid again without a change of owner, the cancellation is
  withdrawn.

`drain` hands over all shards when the replica stops. The supervisor never writes to the bus itself, and never moves a
claim except by `Leases.release`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.names import SHARDS, shard_of
from adapter.contract.records import Binding
from adapter.inbound.bot_poller import BotPoller, State
from adapter.inbound.taking import DISPATCH_DRAIN_S
from adapter.kit.timing import ChangeSignal, Clock, wait_any
from adapter.observability.metrics import PARKED, STATES, Metrics
from adapter.outbound.processor import ShardCommandProcessor
from adapter.ownership.leases import Leases

log = structlog.get_logger()

HANDED_AT_ONCE = 16
"""Shards that are handed over at the same time. Users of these wait for the requests in flight; the others do not."""
SEND_GRACE_S = 20.0
"""Time for requests in flight during a handover; longer than a send may take."""


class ShardWork(Protocol):
    """What the composition root builds for an owned shard."""

    def new_processor(self, shard: int) -> ShardCommandProcessor: ...

    def on_failed(self, name: str, detail: str) -> None:
        """A required loop ended for good, so that only a restart of the process helps."""

    def consumer_loops(self, shard: int, processor: ShardCommandProcessor) -> list[Coroutine[Any, Any, None]]:
        """The pull loops of a shard. What is parked is loaded before the first delivery."""


class Supervisor:
    """Starts and stops pollers and shards as leases and bindings change."""

    def __init__(
        self,
        *,
        bindings: Bindings,
        leases: Leases,
        run_poller: Callable[[BotPoller], Coroutine[Any, Any, None]],
        work: ShardWork,
        publish_released: Callable[[], Awaitable[None]],
        clock: Clock,
        metrics: Metrics,
        capacity: int,
    ) -> None:
        self.pollers: dict[str, BotPoller] = {}
        self.in_hand = 0
        """Commands in flight at the last observation."""
        self._bindings = bindings
        self._leases = leases
        self._run_poller = run_poller
        self._work = work
        self._publish_released = publish_released
        """Announces to the other replicas that a shard was released. Never raises."""
        self._clock = clock
        self._metrics = metrics
        self._capacity = capacity
        self._poller_tasks: dict[str, asyncio.Task[None]] = {}
        self._shards: dict[int, ShardCommandProcessor] = {}
        self._opened = ChangeSignal()
        self._consumers: dict[int, list[asyncio.Task[None]]] = {}
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._dirty: set[str] = set()
        self._crowded: set[str] = set()
        """Bots without room here, which are tried again when a poller ends."""
        self._owned: set[int] = set()
        self._changed = ChangeSignal()
        self._leaving: dict[int, asyncio.Task[None]] = {}
        """Shards that are being handed over."""
        self._handing = asyncio.Semaphore(HANDED_AT_ONCE)
        self._departures = 0
        self._draining = False
        self._valid_as = ""
        """The incarnation whose lease was valid at the last check; "": none."""
        self._paused_as = ""
        """The incarnation that last lost its lease."""
        bindings.add_listener(self._on_binding)

    # for others ------------------------------------------------------------------------------------

    def session_changed(self, binding: Binding) -> None:
        """A refused token is retried, or no longer: the bot's conversations are notified."""
        if shard := self._shards.get(shard_of(binding.sandbox)):
            shard.on_binding(binding.sandbox, binding.bot, {binding.user})

    async def open_shard(self, sandbox: str) -> ShardCommandProcessor | None:
        """The shard of a sandbox once it works; None: this replica does not own it."""
        shard = shard_of(sandbox)
        while shard not in self._shards:
            if shard not in self._leases.owned or shard in self._leaving or self._draining:
                return None
            await self._opened.wait_until(lambda: shard in self._shards or shard not in self._leases.owned, 0.5)
        return self._shards[shard]

    def released(self, bot: str) -> None:
        """Another replica has released a bot, or has stored a late record for it, or, without a bot, has released a
        shard."""
        if not bot:
            self._leases.claim_now()
        if poller := self.pollers.get(bot):
            poller.may_have_late_record = True
            poller.bot_released.set()

    def is_stale(self, bot: str) -> bool:
        poller = self.pollers.get(bot)
        return poller is not None and poller.stale

    def is_catching_up(self, bot: str) -> bool:
        poller = self.pollers.get(bot)
        if poller is None:  # it starts soon, unless there is no room
            return self._is_wanted(bot) and bot not in self._crowded
        return poller.is_catching_up

    def poll_now(self, bot: str) -> None:
        """Ends the bot's long poll, so that the next one tests the token."""
        if poller := self.pollers.get(bot):
            poller.cancel_poll()

    def has_polled_since(self, bot: str, since: float) -> bool:
        """Whether a poll of the bot was answered after the monotonic time `since`."""
        poller = self.pollers.get(bot)
        return poller is not None and not poller.stale and poller.polled_at > since

    def polls(self, bots: Sequence[str]) -> dict[str, tuple[State, float | None]]:
        """State of those of `bots` that are polled here, and seconds since iLink's last answer (None: none yet)."""
        now = self._clock.monotonic()
        found = {bot: poller for bot in bots if (poller := self.pollers.get(bot)) is not None}
        return {
            bot: (poller.state, now - poller.unanswered_since if poller.unanswered_since else None)
            for bot, poller in found.items()
        }

    # reconciliation ---------------------------------------------------------------------------------

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        self._dirty.add(bot)
        sides = [binding for binding in (before, after) if binding is not None]
        users = {binding.user for binding in sides}
        for sandbox in {binding.sandbox for binding in sides}:
            if shard := self._shards.get(shard_of(sandbox)):
                shard.on_binding(sandbox, bot, users)
        if (
            before is not None
            and (after is None or after.sandbox != before.sandbox)
            and (shard := self._shards.get(shard_of(before.sandbox)))
        ):
            shard.on_unbound(before)
        poller = self.pollers.get(bot)
        if poller is not None and (after is None or (before is not None and _is_elsewhere(before, after))):
            poller.cancel_poll()  # it polls with an outdated token or URL
        self._changed.notify_all()

    async def run(self) -> None:
        """Reconciles until cancelled; `drain` then stops what runs."""
        await self._bindings.changed.wait_until(lambda: self._bindings.is_loaded)
        self._dirty.update(binding.bot for binding in self._bindings)
        while True:
            self._follow_leases()
            if self._dirty:
                bots, self._dirty = self._dirty, set()
                for number, bot in enumerate(sorted(bots)):
                    self._follow(bot)
                    if number % 200 == 199:
                        await asyncio.sleep(0)  # thousands must not delay the renewal
            await self._wait()

    async def _wait(self) -> None:
        owned, valid = set(self._leases.owned), bool(self._valid_as)

        def leases_changed() -> bool:
            return (
                self._leases.owned != owned
                or self._leases.is_valid != valid
                or not self._leases.surplus <= self._leaving.keys()
                or self._leases.membership_epoch != self._departures
            )

        await wait_any(
            self._changed.wait_until(lambda: bool(self._dirty)),
            self._leases.changed.wait_until(leases_changed),
            timeout_s=1.0,
        )

    def _follow_leases(self) -> None:
        owned = set(self._leases.owned)
        self._follow_validity()
        if self._departures != self._leases.membership_epoch:
            self._departures = self._leases.membership_epoch
            for poller in self.pollers.values():
                poller.bot_released.set()
        for shard in self._leases.surplus - self._leaving.keys():
            leaving = asyncio.get_running_loop().create_task(self._hand_over(shard), name=f"leave.{shard}")
            self._leaving[shard] = leaving
            leaving.add_done_callback(self._report)
        for shard in self._owned - owned:
            self._drop(shard)
        for shard in owned - self._owned:
            self._adopt(shard)
        if owned != self._owned:
            changed = owned ^ self._owned
            self._owned = owned
            for shard in changed:
                self._dirty.update(binding.bot for binding in self._bindings.of_shard(shard))

    def _follow_validity(self) -> None:
        now_as = self._leases.incarnation if self._leases.is_valid else ""
        if self._valid_as not in ("", now_as):
            self._paused_as = self._valid_as
            for poller in self.pollers.values():
                poller.cancel_poll(for_lease=True)  # stop before another replica may start
        elif now_as not in ("", self._valid_as) and now_as == self._paused_as:
            for poller in self.pollers.values():
                poller.withdraw_cancel()  # no shard was taken: that would revoke the incarnation first
        self._valid_as = now_as

    async def _follow_validity_forever(self) -> None:
        while True:
            self._follow_validity()
            await self._leases.changed.wait_until(lambda: self._leases.is_valid != bool(self._valid_as), 1.0)

    def _is_wanted(self, bot: str) -> bool:
        binding = self._bindings.get(bot)
        if binding is None or self._draining:
            return False
        shard = shard_of(binding.sandbox)
        return shard in self._owned and shard not in self._leaving

    def _follow(self, bot: str) -> None:
        poller = self.pollers.get(bot)
        if poller is None:
            if self._is_wanted(bot):
                if len(self.pollers) < self._capacity:
                    self._start(bot)
                else:
                    self._crowded.add(bot)
            return
        binding = self._bindings.get(bot)
        if binding is None:
            poller.stop(immediately=True)
        elif not self._is_wanted(bot):
            # moved or handed over: at the boundary, so that the poll's answer is not lost; shard lost: at once
            moved = poller.last_binding is not None and poller.last_binding.sandbox != binding.sandbox
            poller.stop(immediately=not poller.draining_after_handover and not moved)

    def _start(self, bot: str) -> None:
        poller = self.pollers[bot] = BotPoller(bot)
        task = asyncio.get_running_loop().create_task(self._run_poller(poller), name=f"poller.{bot}")
        self._poller_tasks[bot] = task

        def ended(done: asyncio.Task[None]) -> None:
            if self.pollers.get(bot) is poller:
                del self.pollers[bot]
                del self._poller_tasks[bot]
            if not done.cancelled() and (exc := done.exception()):
                log.error("poller.crashed", bot=bot, exc_info=exc)
            if self._is_wanted(bot):
                asyncio.get_running_loop().call_later(0.2, self._retry_start, bot)
            while self._crowded:
                if self._is_wanted(waits := self._crowded.pop()):
                    self._retry_start(waits)
                    break

        task.add_done_callback(ended)

    def _retry_start(self, bot: str) -> None:
        self._dirty.add(bot)
        self._changed.notify_all()

    # shards -----------------------------------------------------------------------------------------

    def _adopt(self, shard: int) -> None:
        load = asyncio.get_running_loop().create_task(self._open(shard), name=f"shard.{shard}")
        self._loads[shard] = load
        load.add_done_callback(self._report)

    async def _open(self, shard: int) -> None:
        """Starts a shard and its consumers."""
        processor = self._shards[shard] = self._work.new_processor(shard)
        self._opened.notify_all()
        loop = asyncio.get_running_loop()
        self._consumers[shard] = [loop.create_task(work) for work in self._work.consumer_loops(shard, processor)]
        for task in self._consumers[shard]:
            task.add_done_callback(self._report)

    def _close(self, shard: int) -> None:
        """Stops the consumers of a shard."""
        if load := self._loads.pop(shard, None):
            load.cancel()
        for task in self._consumers.pop(shard, []):
            task.cancel()

    def _drop(self, shard: int) -> None:
        self._close(shard)
        if processor := self._shards.pop(shard, None):
            processor.stop()

    async def _hand_over(self, shard: int) -> None:
        """Hands a shard over: requests end first, then the claim is released; polls end at their boundaries."""
        async with self._handing:
            try:
                await self._give_away(shard, SEND_GRACE_S)
            finally:
                del self._leaving[shard]
                self._dirty.update(binding.bot for binding in self._bindings.of_shard(shard))
                self._changed.notify_all()

    async def _give_away(self, shard: int, grace_s: float) -> None:
        self._close(shard)
        await self._end_dispatch(shard)
        if processor := self._shards.pop(shard, None):
            try:
                await processor.drain(grace_s)
            except asyncio.CancelledError:
                self._shards[shard] = processor  # `drain` ends its requests and releases it
                raise
        if not self._draining:  # otherwise `_drain` has stopped all pollers
            for binding in self._bindings.of_shard(shard):
                if poller := self.pollers.get(binding.bot):
                    poller.draining_after_handover = True
                    poller.stop(immediately=poller.has_undispatched)
        await self._leases.release(shard)
        await self._publish_released()

    async def _end_dispatch(self, shard: int) -> None:
        """Ends the dispatchers. Polls continue and store their answers, which the next owner dispatches."""
        bots = [binding.bot for binding in self._bindings.of_shard(shard)]
        pollers = [poller for bot in bots if (poller := self.pollers.get(bot)) is not None]

        async def end(poller: BotPoller) -> None:
            if poller.dispatcher is not None and not await poller.dispatcher.drain(DISPATCH_DRAIN_S):
                poller.stop(immediately=True)  # the next owner can dispatch the rest at once

        for poller in pollers:
            poller.is_handed_over = True
        await asyncio.gather(*(end(poller) for poller in pollers))

    # draining ---------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Stops everything in order: no new commands, requests in flight end, polls end at their boundary or are
        cut."""
        self._draining = True
        following = asyncio.get_running_loop().create_task(self._follow_validity_forever())
        try:
            await self._drain(seconds)
        finally:
            following.cancel()

    async def _drain(self, seconds: float) -> None:
        deadline = self._clock.monotonic() + seconds
        if leaving := list(self._leaving.values()):
            for task in leaving:
                task.cancel()
            await asyncio.wait(leaving)
        for poller in self.pollers.values():
            poller.draining_after_handover = True
            poller.stop(immediately=False)
        grace_s = max(1.0, seconds - 1.0)
        while owned := sorted(self._leases.owned):  # a claim in flight may still land
            await asyncio.gather(*(self._give_away(shard, grace_s) for shard in owned))
        tasks = set(self._poller_tasks.values())
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=max(0.1, deadline - self._clock.monotonic()))
        if tasks:
            log.info("polls.cancelled", polls=len(tasks))
            for poller in self.pollers.values():
                poller.stop(immediately=True)
            _, tasks = await asyncio.wait(tasks, timeout=3.0)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    # memory and metrics -----------------------------------------------------------------------------

    def evict_idle(self) -> None:
        """Drops state that can be loaded again."""
        for shard in self._shards.values():
            shard.evict_idle()

    def observe(self, tasks: int) -> None:
        """Sets the gauges that are counted. `tasks`: tasks of the whole event loop."""
        self._observe_polls()
        self._observe_commands()
        pollers, conversations = len(self._poller_tasks), sum(shard.tasks for shard in self._shards.values())
        for kind, count in (
            ("poller", pollers),
            ("conversation", conversations),
            ("other", tasks - pollers - conversations),
        ):
            self._metrics.tasks.labels(kind=kind).set(count)

    def _observe_polls(self) -> None:
        metrics, now = self._metrics, self._clock.monotonic()
        throttled = {bot for shard in self._shards.values() for bot in shard.throttled_bots}
        states = Counter(
            "throttled" if poller.state == "polling" and poller.bot in throttled else str(poller.state)
            for poller in self.pollers.values()
        )
        for state in STATES:
            metrics.bindings.labels(state=state).set(states[state])
        polled = [s for s in self.pollers.values() if s.state in ("polling", "error", "paused")]
        ages = [now - poller.unanswered_since for poller in polled if poller.unanswered_since]
        metrics.oldest_poll_age.set(max(ages, default=0.0))
        # every replica reports shards without an owner, since it may be the only one left
        open_to_us = self._owned | self._leases.orphans
        everything = len(open_to_us) == SHARDS
        unpolled = (binding for binding in self._bindings if binding.bot not in self.pollers)
        unowned = sum(1 for binding in unpolled if everything or shard_of(binding.sandbox) in open_to_us)
        metrics.bindings_unowned.set(unowned)

    def _observe_commands(self) -> None:
        metrics, now_ms = self._metrics, self._clock.now_ms()
        parked: Counter[str] = Counter()
        counted = [shard.queue_depths(parked) for shard in self._shards.values()]
        for reason in PARKED:
            metrics.outbound_parked.labels(reason=reason).set(parked[reason])
        self.in_hand = sum(in_hand for in_hand, _ in counted)
        metrics.outbound_in_flight.set(self.in_hand)
        oldest_ms = min((stored_ms for _, stored_ms in counted if stored_ms is not None), default=now_ms)
        metrics.outbound_oldest_pending.set(max(0.0, (now_ms - oldest_ms) / 1000))

    def _report(self, task: asyncio.Task[None]) -> None:
        """Reports a shard that cannot be opened, worked or handed over: /livez fails, since only a restart helps."""
        if not task.cancelled() and (exc := task.exception()):
            log.error("task.crashed", task=task.get_name(), exc_info=exc)
            self._work.on_failed(task.get_name(), f"crashed: {type(exc).__name__}")


def _is_elsewhere(before: Binding, after: Binding) -> bool:
    """Whether token or base URL of a bot changed."""
    return (before.token, before.base_url) != (after.token, after.base_url)
