"""What runs in this replica: its partitions with their consumers, and a poller for each of their bots.

`run` reconciles what runs with what should run, as tenures begin, pause and end, and as bindings change.

- A partition begins once the bindings that are known here are as new as those of the bucket's leader were after its
  taking, and its persons are read. Then its consumers and pollers start.
- One that is lost is dropped at once: consumers and sends stop, polls are cut.
- One that is given away stops its consumers, starts no poll and no send any more, and is released at once. What is
  out goes on (`handover`).
- While its lease pauses, polls are cut, unless it is valid again a moment later.

`drain` gives everything away when the replica stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog

from adapter.bridge.bindings import Bindings
from adapter.bridge.handover import CUT_DEAF_S, StillOpen, answer, read_polled
from adapter.bridge.leases import Leases, Tenure
from adapter.bridge.partition import Partition
from adapter.bridge.parts import Parts
from adapter.bridge.person import Person
from adapter.bridge.poller import BotPoller, State
from adapter.bridge.presence import ReplicaStatus
from adapter.contract.records import Binding
from adapter.errors import Crashed, LeaseLost, RecordTooNew, Refused
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import ChangeSignal, wait_any

log = structlog.get_logger()

CUT_S = 1.0
"""Time for what is cut to end."""
LOOK_S = 0.1
"""Interval between two looks at the polls that are left in a partition that was given away."""
RESTART_S = 0.2
"""Pause before a poller that ended although it should run is started again."""


class _Owned(msgspec.Struct, eq=False):
    """What runs for a partition from its taking until it is given away or lost."""

    tenure: Tenure
    work: asyncio.Task[None]
    """Its consumers, or their start."""
    is_paused: bool = False
    """As it was when the tenures were followed last."""
    told: set[str] = msgspec.field(default_factory=set)
    """Bots of which former owners told while it began here."""


class Unstored(NamedTuple):
    """Answers of iLink that a drain had to drop."""

    bots: int = 0
    messages: int = 0
    """At least so many: an answer may not even be read."""


class Partitions:
    """Starts and stops partitions and pollers."""

    def __init__(
        self,
        parts: Parts,
        leases: Leases,
        *,
        capacity: int,
        on_failed: Callable[[str, str], None],
        status: Callable[[Sequence[str]], ReplicaStatus],
    ) -> None:
        """`capacity`: most pollers. `on_failed(name, detail)`: a partition cannot be worked or given away, so that
        only a restart of the process helps. `status`: how this replica is, and how it polls these bots."""
        self.working: dict[int, Partition] = {}
        """Those that have begun here, by number."""
        self.pollers: dict[str, BotPoller] = {}
        """Those that run here, by bot."""
        self.unstored = Unstored()
        """Set by `drain`."""
        self.bindings: Bindings = parts.bindings
        self.leases = leases
        self._parts = parts
        self._capacity = capacity
        self._on_failed = on_failed
        self._owned: dict[int, _Owned] = {}
        """By partition."""
        self._leaving: list[Partition] = []
        """Partitions that were given away while requests were out."""
        self._polling: dict[asyncio.Task[None], BotPoller] = {}
        self._crowded: set[str] = set()
        """Bots without room here, which are tried again when a poller ends."""
        self._dirty: set[str] = set()
        """Bots to be followed in the next round."""
        self._changed = ChangeSignal()
        self._tasks = TaskSet("partitions")
        self.bindings.add_listener(self._on_binding)
        parts.core.subscribe(parts.names.polled(), self._on_polled)
        own = parts.names.polls_of(leases.replica)
        parts.core.respond(own, partial(answer, still_open=self._still_open, status=status))

    # reconciliation ---------------------------------------------------------------------------------

    async def run(self, consume: Callable[[Partition], Coroutine[Any, Any, None]]) -> None:
        """Reconciles until cancelled; `drain` then stops what runs. `consume`: the endless work for a partition."""
        await self.bindings.changed.wait_until(lambda: self.bindings.is_loaded)
        while True:
            self._follow_tenures(consume)
            bots, self._dirty = self._dirty, set()
            for number, bot in enumerate(sorted(bots)):
                self._follow(bot)
                if number % 200 == 199:
                    await asyncio.sleep(0)  # thousands must not delay the renewal
            await wait_any(
                self._changed.wait_until(lambda: bool(self._dirty)),
                self.leases.changed.wait_until(self._is_lease_changed),
                timeout_s=1.0,
            )

    def _is_lease_changed(self) -> bool:
        """Whether `_follow_tenures` has something to do."""
        followed = {number: each.tenure for number, each in self._owned.items()}
        is_changed = any(each.is_paused != each.tenure.is_paused for each in self._owned.values())
        return is_changed or followed != self._tenures()

    def _tenures(self) -> dict[int, Tenure]:
        return {number: tenure for number, tenure in self.leases.owned.items() if not tenure.is_given}

    def _follow_tenures(self, consume: Callable[[Partition], Coroutine[Any, Any, None]]) -> None:
        loop, tenures = asyncio.get_running_loop(), self._tenures()
        for number, owned in [*self._owned.items()]:
            if tenures.get(number) is not owned.tenure:
                self._drop(number)
        for number, tenure in tenures.items():
            if number not in self._owned:
                begin = self._begin(Partition(tenure, self._parts), consume)
                work = loop.create_task(begin, name=f"partition.{number}")
                work.add_done_callback(self._report_failed)
                self._owned[number] = _Owned(tenure, work)
        paused = set()
        for number, owned in self._owned.items():
            if owned.tenure.is_paused and not owned.is_paused:
                paused.add(number)
            owned.is_paused = owned.tenure.is_paused
        for poller in self._pollers_of(paused):
            poller.cancel_poll(for_lease=True)  # stop before another replica may start

    async def _begin(self, partition: Partition, consume: Callable[[Partition], Coroutine[Any, Any, None]]) -> None:
        """Begins a partition, and works for it until cancelled, or until it is lost."""
        tenure, number = partition.tenure, partition.number
        told = self._owned[number].told
        try:
            await tenure.persist(self.bindings.catch_up, "partition.bindings", partition=number)
            # what is delivered again may belong to whom a record names
            await tenure.persist(partition.open, "partition.open", partition=number)
        except LeaseLost:
            return
        for person in partition:
            person.check_binding()  # it may have changed while they were read
        self.working[number] = partition
        for bot in told:  # there may be an entry behind those that were read
            if (binding := self.bindings.get(bot)) is not None and self._number(binding) == number:
                await self._read_newest(binding, partition)
        self._follow_soon(*(binding.bot for binding in self.bindings.of_partition(number)))
        async with asyncio.TaskGroup() as group:
            group.create_task(partition.handover.run(), name="handover")
            group.create_task(consume(partition), name="consume")

    def _number(self, binding: Binding) -> int:
        """The partition of a binding."""
        return self._parts.names.partition_of(binding.sandbox)

    def _is_wanted(self, bot: str) -> bool:
        """Whether this replica should poll a bot."""
        binding = self.bindings.get(bot)
        if binding is None or binding.state == "too_new" or self.leases.draining:
            return False
        return self._number(binding) in self.working

    def _follow(self, bot: str) -> None:
        poller = self.pollers.get(bot)
        if poller is None:
            if self._is_wanted(bot):
                self._start(bot)
        elif (binding := self.bindings.get(bot)) is None or binding.state == "too_new":
            poller.stop(immediately=True)

    def _start(self, bot: str) -> None:
        """Starts a poller. If there is no room, a bot that still wants it gets the room of the next that ends."""
        if len(self.pollers) >= self._capacity:
            self._crowded.add(bot)
            return
        poller = self.pollers[bot] = BotPoller(bot, self._parts, self._person_of, self._on_session_changed)
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
            self._follow_soon(*self._crowded)
            self._crowded.clear()

    def _follow_soon(self, *bots: str) -> None:
        self._dirty.update(bots)
        self._changed.notify_all()

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        sides = [binding for binding in (before, after) if binding is not None]
        for number in {self._number(binding) for binding in sides}:
            if partition := self.working.get(number):
                partition.on_binding(
                    *(each if each is not None and self._number(each) == number else None for each in (before, after))
                )
        if (poller := self.pollers.get(bot)) and (
            after is None or (before is not None and (before.token, before.base_url) != (after.token, after.base_url))
        ):
            poller.cancel_poll()  # it polls with an outdated token or URL
        self._follow_soon(bot)

    def _report_failed(self, task: asyncio.Task[None]) -> None:
        """Reports a partition that cannot be worked: /livez fails, since only a restart helps."""
        if not task.cancelled() and (exc := task.exception()):
            log.error("task.crashed", task=task.get_name(), exc_info=exc)
            self._on_failed(task.get_name(), f"crashed: {type(exc).__name__}")

    def _pollers_of(self, numbers: set[int]) -> list[BotPoller]:
        """The pollers whose bots belong to these partitions, or did when they were taken."""
        if not numbers:
            return []
        waiting = {each.bot for number in numbers for each in self.bindings.of_partition(number)}
        return [
            poller
            for bot, poller in self.pollers.items()
            if poller.partition in numbers or (poller.person is None and bot in waiting)
        ]

    def _take_away(self, number: int) -> Partition | None:
        """Stops the consumers of a partition, which nothing reaches any more."""
        if (owned := self._owned.pop(number, None)) is not None:
            owned.work.cancel()
        return self.working.pop(number, None)

    def _drop(self, number: int) -> None:
        """Stops a partition at once."""
        if partition := self._take_away(number):
            partition.stop()
        for poller in self._pollers_of({number}):
            poller.stop(immediately=True)

    # for others -------------------------------------------------------------------------------------

    def _person_of(self, binding: Binding) -> Person | None:
        """The person of a binding; None: this replica does not own their partition, or it has not begun."""
        partition = self.working.get(self._number(binding))
        return None if partition is None else partition.person(binding)

    def _on_session_changed(self, binding: Binding) -> None:
        """A refused token is retried, or no longer: the person is told."""
        if partition := self.working.get(self._number(binding)):
            partition.on_binding(None, binding)

    def _on_polled(self, data: bytes) -> None:
        """A poll or send of another replica has ended, perhaps with an entry."""
        if (polled := read_polled(data)) is None:
            return
        if (partition := self.working.get(polled.partition)) is None:
            if (owned := self._owned.get(polled.partition)) is not None:
                owned.told.add(polled.bot)
            return
        partition.handover.on_polled(polled)
        binding = self.bindings.get(polled.bot) if polled.bot else None
        if binding is not None and self._number(binding) == polled.partition:
            self._tasks.spawn(self._read_newest(binding, partition))

    async def _read_newest(self, binding: Binding, partition: Partition) -> None:
        """Reads the newest entry of a person, beside the poll that waits."""
        person = partition.person(binding)

        async def read_newest() -> None:
            partition.tenure.check()
            with contextlib.suppress(Refused):  # no known key opens the entry: the person says so
                await person.read_newest()

        with contextlib.suppress(LeaseLost, Crashed, RecordTooNew):
            await partition.tenure.persist(read_newest, "look", bot=binding.bot)

    def _still_open(self, number: int) -> StillOpen:
        """Whom this replica still polls, and for whom it sends, in a partition that it has given away."""
        bots = {poller.bot for poller in self._pollers_of({number}) if poller.is_out and poller.is_given_away}
        leaving = [partition for partition in self._leaving if partition.number == number]
        persons = {sender.person.key.key for partition in leaving for sender in partition.sending}
        return StillOpen(bots=bots, persons=persons)

    # giving away ------------------------------------------------------------------------------------

    async def give(self, number: int) -> None:
        """Gives a partition away at once; what is out goes on."""
        if (tenure := self.leases.owned.get(number)) is None or tenure.is_given:
            return
        tenure.is_given = True
        owned = self._owned.get(number)
        partition, pollers = self._take_away(number), self._pollers_of({number})
        for poller in pollers:
            poller.stop(immediately=self._parts.chat.is_connecting(poller.bot))  # no answer to it can be missed
        released = asyncio.Event()
        watching = self._tasks.spawn(self._watch_polls(pollers, tenure, released))
        if partition is not None:
            self._leaving.append(partition)
            await partition.leave()
        if owned is not None:  # a pull that is left would take what is delivered to the next owner
            await asyncio.wait([owned.work], timeout=CUT_S)
        release = asyncio.get_running_loop().create_task(self.leases.release(number), name=f"release.{number}")
        release.add_done_callback(lambda _: released.set())
        self._tasks.spawn(self._see_off(number, partition, watching, release))
        await asyncio.wait([release])

    async def _watch_polls(self, pollers: Sequence[BotPoller], tenure: Tenure, released: asyncio.Event) -> None:
        """Returns when the polls that are left have ended. Cuts them when nobody hears this replica, or its lease is
        over before the release is stored."""
        parts = self._parts
        while pollers := [poller for poller in pollers if poller.state is not State.ENDED]:
            is_over = not released.is_set() and parts.clock.monotonic() >= tenure.until
            if is_over or parts.presence.deaf_s > CUT_DEAF_S:
                for poller in pollers:
                    poller.stop(immediately=True)
            await asyncio.sleep(LOOK_S)

    async def _see_off(
        self,
        number: int,
        partition: Partition | None,
        watching: asyncio.Task[None],
        release: asyncio.Task[None],
    ) -> None:
        """Waits for what is out in a partition that is given away."""
        if partition is not None:
            await partition.wait_sent()
            self._leaving.remove(partition)
        await asyncio.wait([watching, release])
        still_open = self._still_open(number)
        if not (still_open.bots or still_open.persons):
            await self.leases.clear_former(number)

    async def drain(self, seconds: float) -> None:
        """Gives everything away, and waits for what is out, at most `seconds`. Then cuts what is left, as nothing
        more can be gained; only an answer of iLink that is not stored yet may use up the time. `unstored` is what
        could not be stored."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        self.leases.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._give_all()
                async with self.leases.taking:  # what was under way has landed
                    await self._give_all()
                await self._tasks.wait_ended()
        except TimeoutError:
            log.info("polls.cancelled", polls=len(self.pollers))
        self._tasks.cancel_all()
        for number in list(self.working):
            self._drop(number)
        for partition in self._leaving:
            partition.stop()
        for poller in self.pollers.values():
            poller.stop(immediately=True)
        try:
            await self._wait_pollers(CUT_S)
            for task, poller in self._polling.items():
                if not poller.has_answer:
                    task.cancel()
            await self._wait_pollers(max(CUT_S, deadline - loop.time()))
        finally:
            left = [poller for poller in self._polling.values() if poller.has_answer]
            self.unstored = Unstored(len(left), sum(poller.unstored for poller in left))
        for task in self._polling:
            task.cancel()
        await self._wait_pollers(CUT_S)

    async def _give_all(self) -> None:
        await asyncio.gather(*(self.give(number) for number in sorted(self.leases.owned)))

    async def _wait_pollers(self, within_s: float) -> None:
        """Returns when all pollers have ended, or after so many seconds."""
        if self._polling:
            await asyncio.wait(set(self._polling), timeout=within_s)
