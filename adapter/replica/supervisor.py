"""What runs in this replica: its shards with their consumers, a poller for each of their bots, and the ends of
bindings.

`run` reconciles what runs with what should run. Bindings that changed are collected in `_dirty` and followed in
batches; changes of the leases are followed in every round:

- A new shard is opened, and its bots are polled.
- A lost shard is dropped at once.
- A surplus shard, which another replica should own, is handed over in this order: its consumers stop, its requests in
  flight end, the claim is released. A poll that waits is not cut. Its answer is stored, and the next owner reads it
  when it is told.
- When the lease pauses, polls are cancelled, unless it is valid again a moment later.
- A binding that the applier of control commands has marked as closing is confirmed once the bot is released, nothing
  more can come of its commands, and the end of its person is stored. If the owner dies, the next one confirms.

`drain` hands over all shards when the replica stops. The supervisor never moves a claim except by `Leases.release`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.bridge.partition import Partition
from adapter.bridge.person import Person
from adapter.bridge.poller import BotPoller
from adapter.contract.records import Binding
from adapter.errors import Crashed, LeaseLost, RecordTooNew, Refused, Temporary
from adapter.kit.persist import persist
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import ChangeSignal, Clock, backoff, wait_any
from adapter.ownership.leases import Leases
from adapter.ownership.polls import Polls
from adapter.ownership.replica_status import OtherReplicas
from adapter.ports import Chat

log = structlog.get_logger()

HANDED_AT_ONCE = 16
"""Shards that are handed over at the same time. Users of these wait for the requests in flight; the others do not."""
CUT_S = 1.0
"""Time for what is cut to end."""
SEND_GRACE_S = 20.0
"""Time for requests in flight during a handover; longer than a send may take."""
RESTART_S = 0.2
"""Pause before a poller that ended although it should run is started again."""
ASK_EVERY = 8
"""Looks at a bot whose binding is closing after which the replica is asked whose name the bot has: it may have none
any more after a restore."""
CLOSE_AGAIN_S = 30.0
"""Pause before a binding is closed again whose end has crashed, or needs a newer version."""


class Supervisor:
    """Starts and stops pollers and shards as leases and bindings change."""

    def __init__(
        self,
        bindings: Bindings,
        leases: Leases,
        polls: Polls,
        others: OtherReplicas,
        chat: Chat,
        clock: Clock,
        *,
        capacity: int,
        on_failed: Callable[[str, str], None],
    ) -> None:
        """`capacity`: most pollers. `on_failed(name, detail)`: a shard cannot be worked or handed over, so that only
        a restart of the process helps."""
        self.shards: dict[int, Partition] = {}
        """Those that work here, by number."""
        self.pollers: dict[str, BotPoller] = {}
        """Those that run here, by bot."""
        self.bindings = bindings
        self.leases = leases
        self._polls = polls
        self._others = others
        self._chat = chat
        self._clock = clock
        self._capacity = capacity
        self._on_failed = on_failed
        self._owned: set[int] = set()
        """Shards that were owned at the last look at the leases."""
        self._opened = ChangeSignal()
        self._consuming: dict[int, asyncio.Task[None]] = {}
        """The consumers of each shard."""
        self._leaving: dict[int, asyncio.Task[None]] = {}
        """Shards that are being handed over."""
        self._handing = asyncio.Semaphore(HANDED_AT_ONCE)
        self._polling: dict[asyncio.Task[None], BotPoller] = {}
        self._crowded: set[str] = set()
        """Bots without room here, which are tried again when a poller ends."""
        self._closing: set[str] = set()
        """Bots whose bindings are being closed."""
        self._tasks = TaskSet("closing")
        self._dirty: set[str] = set()
        """Bots to be followed in the next round."""
        self._changed = ChangeSignal()
        self._departures = 0
        self._valid_as = ""
        """The incarnation whose lease was valid at the last look; "": none."""
        bindings.add_listener(self._on_binding)

    # reconciliation ---------------------------------------------------------------------------------

    async def run(
        self,
        new_shard: Callable[[int], Partition],
        consume: Callable[[Partition], Coroutine[Any, Any, None]],
        new_poller: Callable[[str], BotPoller],
    ) -> None:
        """Reconciles until cancelled; `drain` then stops what runs. `consume`: the endless work for a shard."""
        await self.bindings.changed.wait_until(lambda: self.bindings.is_loaded)
        self._dirty.update(binding.bot for binding in self.bindings)
        while True:
            self._follow_lease()
            self._follow_shards(new_shard, consume)
            bots, self._dirty = self._dirty, set()
            for number, bot in enumerate(sorted(bots)):
                self._follow(bot, new_poller)
                if number % 200 == 199:
                    await asyncio.sleep(0)  # thousands must not delay the renewal
            await wait_any(
                self._changed.wait_until(lambda: bool(self._dirty)),
                self.leases.changed.wait_until(self._is_lease_changed),
                timeout_s=1.0,
            )

    def _is_lease_changed(self) -> bool:
        """Whether `_follow_lease` or `_follow_shards` has something to do."""
        leases = self.leases
        return (
            leases.owned != self._owned
            or not leases.surplus <= self._leaving.keys()
            or leases.is_valid != bool(self._valid_as)
            or leases.membership_epoch != self._departures
        )

    def _follow_lease(self) -> None:
        """Cancels polls when the lease pauses."""
        now_as = self.leases.incarnation if self.leases.is_valid else ""
        if self._valid_as not in ("", now_as):
            for poller in self.pollers.values():
                poller.cancel_poll(for_lease=True)  # stop before another replica may start
        self._valid_as = now_as
        if self._departures != self.leases.membership_epoch:
            self._departures = self.leases.membership_epoch
            for poller in self.pollers.values():
                if poller.person is None:
                    poller.on_polled()

    def _follow_shards(
        self, new_shard: Callable[[int], Partition], consume: Callable[[Partition], Coroutine[Any, Any, None]]
    ) -> None:
        owned, loop = set(self.leases.owned), asyncio.get_running_loop()
        for number in self.leases.surplus - self._leaving.keys():
            self._leaving[number] = leaving = loop.create_task(self._hand_over(number), name=f"leave.{number}")
            leaving.add_done_callback(self._report_failed)
        for number in self._owned - owned:
            self._drop(number)
        # also one that was released and claimed again since the last look
        for number in owned - self.shards.keys() - self._leaving.keys():
            shard = self.shards[number] = new_shard(number)
            self._consuming[number] = consuming = loop.create_task(consume(shard), name=f"shard.{number}")
            consuming.add_done_callback(self._report_failed)
        changed, self._owned = owned ^ self._owned, owned
        for number in changed:
            self._dirty.update(binding.bot for binding in self.bindings.of_partition(number))
        if changed:
            self._opened.notify_all()

    def _is_wanted(self, bot: str) -> bool:
        """Whether this replica should poll a bot."""
        binding = self.bindings.serving(bot)
        if binding is None or binding.state == "too_new" or self.leases.draining:
            return False
        shard = self.bindings.partition_of(binding.sandbox)
        return shard in self._owned and shard not in self._leaving

    def _follow(self, bot: str, new_poller: Callable[[str], BotPoller]) -> None:
        self.close(bot)
        poller = self.pollers.get(bot)
        if poller is None:
            if self._is_wanted(bot):
                self._start(bot, new_poller)
            return
        binding = self.bindings.serving(bot)
        if binding is None:
            poller.stop(immediately=True)
        elif self.bindings.partition_of(binding.sandbox) in self._leaving:
            pass  # it polls until the shard's turn: `_give_away` ends it
        elif not self._is_wanted(bot):
            # handed over: at the boundary, so that the poll's answer is not lost; shard lost: at once
            poller.stop(immediately=not poller.is_handed_over)

    def _start(self, bot: str, new_poller: Callable[[str], BotPoller]) -> None:
        """Starts a poller. If there is no room, a bot that still wants it gets the room of the next that ends."""
        if len(self.pollers) >= self._capacity:
            self._crowded.add(bot)
            return
        poller = self.pollers[bot] = new_poller(bot)
        task = asyncio.get_running_loop().create_task(poller.run(), name=f"poller.{bot}")
        self._polling[task] = poller
        task.add_done_callback(self._on_poller_ended)

    def _on_poller_ended(self, task: asyncio.Task[None]) -> None:
        bot = self._polling.pop(task).bot
        if not task.cancelled() and (exc := task.exception()):
            log.error("poller.crashed", bot=bot, exc_info=exc)
        self.pollers.pop(bot, None)
        if self._is_wanted(bot):
            asyncio.get_running_loop().call_later(RESTART_S, self._follow_soon, bot)
        if self._crowded:
            self._dirty |= self._crowded
            self._crowded.clear()
            self._changed.notify_all()

    def _follow_soon(self, bot: str) -> None:
        self._dirty.add(bot)
        self._changed.notify_all()

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        sides = [binding for binding in (before, after) if binding is not None]
        for number in {self.bindings.partition_of(binding.sandbox) for binding in sides}:
            if shard := self.shards.get(number):
                is_here = [
                    binding is not None and self.bindings.partition_of(binding.sandbox) == number
                    for binding in (before, after)
                ]
                shard.on_binding(before if is_here[0] else None, after if is_here[1] else None)
        if (poller := self.pollers.get(bot)) and (
            after is None
            or after.closing
            or (before is not None and (before.token, before.base_url) != (after.token, after.base_url))
        ):
            poller.cancel_poll()  # it polls with an outdated token or URL
        self._follow_soon(bot)

    def _report_failed(self, task: asyncio.Task[None]) -> None:
        """Reports a shard that cannot be worked or handed over: /livez fails, since only a restart helps."""
        if not task.cancelled() and (exc := task.exception()):
            log.error("task.crashed", task=task.get_name(), exc_info=exc)
            self._on_failed(task.get_name(), f"crashed: {type(exc).__name__}")

    # for others -------------------------------------------------------------------------------------

    async def open_shard(self, sandbox: str) -> Partition | None:
        """The shard of a sandbox once it works; None: this replica does not own it."""
        number, leases = self.bindings.partition_of(sandbox), self.leases
        while (shard := self.shards.get(number)) is None:
            if number not in leases.owned or number in self._leaving or leases.draining:
                return None
            await self._opened.wait_until(lambda: number in self.shards or number not in leases.owned, 0.5)
        return shard

    async def open_person(self, binding: Binding) -> Person | None:
        """The person of a binding once their shard works; None: this replica does not own it."""
        shard = await self.open_shard(binding.sandbox)
        return None if shard is None else shard.person(binding)

    def on_session_changed(self, binding: Binding) -> None:
        """A refused token is retried, or no longer: the person is told."""
        if shard := self.shards.get(self.bindings.partition_of(binding.sandbox)):
            shard.on_binding(None, binding)

    def on_polled(self, bot: str) -> None:
        """A poll of a bot has ended at another replica, perhaps with an entry; without a bot: a shard is free."""
        if not bot:
            self.leases.claim_now()
        elif poller := self.pollers.get(bot):
            poller.on_polled()
        binding = self.bindings.serving(bot)
        shard = self.shards.get(self.bindings.partition_of(binding.sandbox)) if binding is not None else None
        if binding is not None and shard is not None:
            self._tasks.spawn(self._look(binding, shard))

    async def _look(self, binding: Binding, shard: Partition) -> None:
        """Reads the newest entry of a person, beside the poll that waits."""
        person = shard.person(binding)

        async def read_newest() -> None:
            shard.tenure.check()
            with contextlib.suppress(Refused):  # no known key opens the entry: the person says so
                await person.read_newest()

        with contextlib.suppress(LeaseLost, Crashed, RecordTooNew):
            await persist(read_newest, shard.tenure, self._clock, "look", bot=binding.bot)

    async def is_released(self, bot: str, *, ask: bool) -> bool:
        """Whether no living replica polls a bot. `ask`: also ask the one whose name the bot's poll key has, which
        it may not know any more. Raises Temporary."""
        if bot in self.pollers:
            return False
        owner = await self._polls.owner(bot)
        if owner in ("", self.leases.incarnation):
            return True
        return await self.leases.revoke_if_expired(owner) or (ask and await self._others.is_idle(owner, bot))

    # bindings that end ------------------------------------------------------------------------------

    def close(self, bot: str) -> None:
        """Starts to close a bot's binding if it has to be closed."""
        if self._to_close(bot) is not None and bot not in self._closing:
            self._closing.add(bot)
            self._tasks.spawn(self._close(bot))

    def _to_close(self, bot: str) -> Binding | None:
        binding = self.bindings.get(bot)
        return binding if binding is not None and binding.closing != binding.closed else None

    async def _close(self, bot: str) -> None:
        try:
            while (binding := self._to_close(bot)) and (shard := await self.open_shard(binding.sandbox)):
                try:
                    work = partial(self._confirm_close, binding, shard)
                    await persist(work, shard.tenure, self._clock, "binding.close", bot=bot)
                except LeaseLost:  # if it is another replica's, that one confirms
                    pass
                except (Crashed, RecordTooNew) as exc:  # nobody else tries again while this replica has the shard
                    log.warning("binding.unclosed", bot=bot, sandbox=binding.sandbox, reason=exc.reason)
                    await self._clock.sleep(CLOSE_AGAIN_S)
        finally:
            self._closing.discard(bot)

    async def _confirm_close(self, binding: Binding, shard: Partition) -> None:
        """Writes this replica's name into a binding that is closing, once its bot is released, the commands of its
        user have ended, and no request is in flight. Raises Temporary, LeaseLost."""

        def confirmed(now: Binding) -> Binding | None:
            shard.tenure.check()
            is_same = now.closing == binding.closing
            return structs.replace(now, closed=now.closing, closed_by=self.leases.incarnation) if is_same else None

        await shard.end_service(binding)
        for looks in itertools.count(1):
            if self._to_close(binding.bot) != binding:
                return  # it was opened again, or is closed anew
            if shard.is_service_ended(binding) and await self.is_released(binding.bot, ask=looks % ASK_EVERY == 0):
                break
            await self._clock.sleep(backoff(looks, first_s=0.05, longest_s=1.0))
            shard.tenure.check()
        await shard.end_person(binding)
        if await self.bindings.update(binding.bot, confirmed) is None and self._to_close(binding.bot) == binding:
            raise Temporary("binding_gone")  # or nobody can read it

    # handing over -----------------------------------------------------------------------------------

    async def _hand_over(self, number: int) -> None:
        """Hands a shard over: requests end first, then the claim is released; polls end at their boundaries."""
        async with self._handing:
            try:
                await self._give_away(number, SEND_GRACE_S)
            finally:
                del self._leaving[number]
                self._dirty.update(binding.bot for binding in self.bindings.of_partition(number))
                self._changed.notify_all()

    async def _give_away(self, number: int, grace_s: float) -> None:
        self._stop_consumers(number)
        if shard := self.shards.pop(number, None):
            try:
                await shard.drain(grace_s)
            except asyncio.CancelledError:
                self.shards[number] = shard  # another call ends its requests
                raise
        if not self.leases.draining:  # otherwise `drain` has stopped all pollers
            for binding in self.bindings.of_partition(number):
                if poller := self.pollers.get(binding.bot):
                    poller.is_handed_over = True
                    poller.stop(immediately=False)
        await self.leases.release(number)
        await self._others.publish_polled("")

    def _stop_consumers(self, number: int) -> None:
        if consuming := self._consuming.pop(number, None):
            consuming.cancel()

    def _drop(self, number: int) -> None:
        """Stops a shard at once."""
        self._stop_consumers(number)
        if shard := self.shards.pop(number, None):
            shard.stop()

    # draining ---------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Gives everything back in order, for at most `seconds` and while the lease is valid. Then cuts what is left,
        as nothing more can be gained; only an answer of iLink that is not stored yet may use up the time."""
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
        for number in list(self.shards):
            self._drop(number)
        log.info("polls.cancelled", polls=len(self.pollers))
        for poller in self.pollers.values():
            poller.stop(immediately=True)
        await self._wait_pollers(CUT_S)
        for task, poller in self._polling.items():
            if not poller.has_answer:
                task.cancel()
        await self._wait_pollers(max(CUT_S, deadline - loop.time()))
        for task in self._polling:
            task.cancel()
        await self._wait_pollers(CUT_S)

    async def _give_all_away(self, seconds: float) -> None:
        """No new commands, requests in flight end, polls end at their boundary."""
        await self.leases.drain()
        for task in self._leaving.values():
            task.cancel()
        if self._leaving:
            await asyncio.wait(list(self._leaving.values()))
        for poller in self.pollers.values():
            poller.is_handed_over = True
            poller.stop(immediately=self._chat.is_connecting(poller.bot))  # no answer to it can be missed
        while owned := sorted(self.leases.owned):  # a claim in flight may still land
            await asyncio.gather(*(self._give_away(number, max(1.0, seconds - 1.0)) for number in owned))
        await self._wait_pollers(seconds)

    async def _wait_pollers(self, within_s: float) -> None:
        """Returns when all pollers have ended, or after so many seconds."""
        if self._polling:
            await asyncio.wait(set(self._polling), timeout=within_s)
