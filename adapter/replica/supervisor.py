"""Starts and stops the pollers and shards of a replica as leases and bindings change.

`run` reconciles what runs with what should run. Each owned shard has a `Shard` with its consumers,
and each binding of an owned shard has a poller. Bindings that changed are collected in `_dirty` and followed in
batches; changes of the leases are followed in every round:

- A new shard is opened, and its bots are polled.
- A lost shard is dropped at once.
- A surplus shard, which another replica should own, is handed over in this order: its consumers stop, its requests in
  flight end, the claim is released. A poll that waits is not cut. Its answer is stored, and the next owner finds it
  in the inbox.
- When the lease pauses, polls are cancelled. When it is valid again without a change of owner, the cancellation is
  withdrawn.

`drain` hands over all shards when the replica stops. The supervisor never writes to the bus itself, and never moves a
claim except by `Leases.release`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.names import shard_of
from adapter.contract.records import Binding
from adapter.inbound.poller import BotPoller
from adapter.kit.timing import ChangeSignal, wait_any
from adapter.outbound.shard import Shard
from adapter.ownership.leases import Leases
from adapter.replica.pollers import BotPollers
from adapter.replica.shards import OwnedShards, ShardWork

log = structlog.get_logger()

HANDED_AT_ONCE = 16
"""Shards that are handed over at the same time. Users of these wait for the requests in flight; the others do not."""
CUT_S = 1.0
"""Time for what is cut to end."""
SEND_GRACE_S = 20.0
"""Time for requests in flight during a handover; longer than a send may take."""


class Supervisor:
    """Starts and stops pollers and shards as leases and bindings change."""

    def __init__(
        self,
        *,
        bindings: Bindings,
        leases: Leases,
        new_poller: Callable[[str], BotPoller],
        work: ShardWork,
        publish_released: Callable[[], Awaitable[None]],
        is_connecting: Callable[[str], bool],
        capacity: int,
        follow_closing: Callable[[str], None],
    ) -> None:
        """`follow_closing` is called for each bot of this replica whose binding changed or whose shard is new."""
        self.bindings = bindings
        self.leases = leases
        self.pollers = BotPollers(leases, new_poller, self._is_wanted, self._retry, capacity)
        self.shards = OwnedShards(work)
        self._follow_closing = follow_closing
        self._publish_released = publish_released
        """Announces to the other replicas that a shard was released. Never raises."""
        self._is_connecting = is_connecting
        """Whether a bot's poll has not left yet, so that no answer to it can be missed."""
        self._dirty: set[str] = set()
        self._owned: set[int] = set()
        self._changed = ChangeSignal()
        self._leaving: dict[int, asyncio.Task[None]] = {}
        """Shards that are being handed over."""
        self._handing = asyncio.Semaphore(HANDED_AT_ONCE)
        self._draining = False
        bindings.add_listener(self._on_binding)

    async def open_shard(self, sandbox: str) -> Shard | None:
        """The shard of a sandbox once it works; None: this replica does not own it."""
        number = shard_of(sandbox)
        while (shard := self.shards.get(number)) is None:
            if number not in self.leases.owned or number in self._leaving or self._draining:
                return None
            await self.shards.opened.wait_until(lambda: number in self.shards or number not in self.leases.owned, 0.5)
        return shard

    def _retry(self, bot: str) -> None:
        self._dirty.add(bot)
        self._changed.notify_all()

    # reconciliation ---------------------------------------------------------------------------------

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        self.shards.on_binding(bot, before, after)
        poller = self.pollers.get(bot)
        if poller is not None and (
            after is None
            or after.closing
            or (before is not None and (before.token, before.base_url) != (after.token, after.base_url))
        ):
            poller.cancel_poll()  # it polls with an outdated token or URL
        self._retry(bot)

    async def run(self) -> None:
        """Reconciles until cancelled; `drain` then stops what runs."""
        await self.bindings.changed.wait_until(lambda: self.bindings.is_loaded)
        self._dirty.update(binding.bot for binding in self.bindings)
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
        owned = set(self.leases.owned)

        def leases_changed() -> bool:
            return (
                self.leases.owned != owned
                or not self.leases.surplus <= self._leaving.keys()
                or self.pollers.is_lease_changed()
            )

        await wait_any(
            self._changed.wait_until(lambda: bool(self._dirty)),
            self.leases.changed.wait_until(leases_changed),
            timeout_s=1.0,
        )

    def _follow_leases(self) -> None:
        owned = set(self.leases.owned)
        self.pollers.follow_lease()
        for shard in self.leases.surplus - self._leaving.keys():
            leaving = asyncio.get_running_loop().create_task(self._hand_over(shard), name=f"leave.{shard}")
            self._leaving[shard] = leaving
            leaving.add_done_callback(self.shards.report)
        for shard in self._owned - owned:
            self.shards.drop(shard)
        for shard in owned - self._owned:
            self.shards.open(shard)
        changed, self._owned = owned ^ self._owned, owned
        for shard in changed:
            self._dirty.update(binding.bot for binding in self.bindings.of_shard(shard))

    def _is_wanted(self, bot: str) -> bool:
        binding = self.bindings.serving(bot)
        if binding is None or binding.state == "too_new" or self._draining:
            return False
        shard = shard_of(binding.sandbox)
        return shard in self._owned and shard not in self._leaving

    def _follow(self, bot: str) -> None:
        self._follow_closing(bot)
        poller = self.pollers.get(bot)
        if poller is None:
            if self._is_wanted(bot):
                self.pollers.start(bot)
            return
        binding = self.bindings.serving(bot)
        if binding is None:
            poller.stop(immediately=True)
        elif not self._is_wanted(bot):
            # moved or handed over: at the boundary, so that the poll's answer is not lost; shard lost: at once
            moved = poller.last_binding is not None and poller.last_binding.sandbox != binding.sandbox
            poller.stop(immediately=not poller.is_handed_over and not moved)

    # handing over -----------------------------------------------------------------------------------

    async def _hand_over(self, shard: int) -> None:
        """Hands a shard over: requests end first, then the claim is released; polls end at their boundaries."""
        async with self._handing:
            try:
                await self._give_away(shard, SEND_GRACE_S)
            finally:
                del self._leaving[shard]
                self._dirty.update(binding.bot for binding in self.bindings.of_shard(shard))
                self._changed.notify_all()

    async def _give_away(self, shard: int, grace_s: float) -> None:
        self.shards.stop_consumers(shard)
        await self.shards.drain(shard, grace_s)
        if not self._draining:  # otherwise `_drain` has stopped all pollers
            for binding in self.bindings.of_shard(shard):
                if poller := self.pollers.get(binding.bot):
                    poller.is_handed_over = True
                    poller.stop(immediately=False)
        await self.leases.release(shard)
        await self._publish_released()

    # draining ---------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Gives everything back in order, for at most `seconds` and while the lease is valid. Then cuts what is left,
        as nothing more can be gained; only an answer of iLink that is not stored yet may use up the time."""
        self._draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        giving = loop.create_task(self._give_all_away(seconds))
        lost = loop.create_task(self.leases.changed.wait_until(lambda: not self.leases.is_valid))
        await asyncio.wait({giving, lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if giving.done():
            return giving.result()
        for task in (giving, *self._leaving.values()):
            task.cancel()
        await asyncio.wait({giving, *self._leaving.values()})
        for shard in list(self.shards):
            self.shards.drop(shard)
        log.info("polls.cancelled", polls=len(self.pollers))
        for poller in self.pollers.values():
            poller.stop(immediately=True)
        await self.pollers.wait_ended(CUT_S)
        self.pollers.cancel(lambda poller: not poller.has_answer)
        await self.pollers.wait_ended(max(CUT_S, deadline - loop.time()))
        self.pollers.cancel(lambda poller: True)
        await self.pollers.wait_ended(CUT_S)

    async def _give_all_away(self, seconds: float) -> None:
        """No new commands, requests in flight end, polls end at their boundary."""
        await self.leases.drain()
        for task in self._leaving.values():
            task.cancel()
        if self._leaving:
            await asyncio.wait(list(self._leaving.values()))
        for poller in self.pollers.values():
            poller.is_handed_over = True
            poller.stop(immediately=self._is_connecting(poller.bot))
        while owned := sorted(self.leases.owned):  # a claim in flight may still land
            await asyncio.gather(*(self._give_away(shard, max(1.0, seconds - 1.0)) for shard in owned))
        await self.pollers.wait_ended(seconds)
