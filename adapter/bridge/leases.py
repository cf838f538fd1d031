"""Which partitions this replica owns: each has one key in `wechat_leases`, which its owner writes each second.

No wall clocks are compared. The owner acts for a partition until HOLDER_FRACTION of a lease after the *start* of the
last renewal that was acknowledged. An observer takes a key whose revision has not changed for a whole lease of its
own clock, by compare-and-set on that revision, so that only one of several gets it, and none by a stale read. Time
counts only while the bucket's leader answers: after 1.5 s without such an answer the count begins anew, so that
owners who could not renew come first. A key that was released is taken at once.

The key of an owner is written by compare-and-set, too. After a write without an answer the key is read: what names
this replica was written by it, since nobody else writes that name.

How many partitions a replica takes, and which it gives away, is decided in `presence`. A partition is given with the
replicas that may still poll or send there (`handover`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import structlog

from adapter.bridge.presence import Free, Presence, share
from adapter.contract.records import Lease
from adapter.errors import UNDECODABLE, Conflict, LeaseLost, Temporary
from adapter.ports import BucketEntry, LeaderBucket
from adapter.tools.metrics import Metrics
from adapter.tools.tasks import TaskSet, persist
from adapter.tools.timing import ChangeSignal, Clock

log = structlog.get_logger()

T = TypeVar("T")

HOLDER_FRACTION = 0.8
"""Fraction of the lease after which the holder stops. The rest allows for clocks that differ and answers in
flight."""
LOOK_FRACTION = 1 / 8
"""Interval between two observations, as a fraction of the lease."""
ANSWER_S = 1.0
"""Longest wait for the bucket's leader."""
ALIVE_S = 60
"""Time to live of the key of a replica that owns nothing. Nobody reads it: writing it shows that this can be done."""
START_S = 0.3
"""Time in which a replica that starts hears of the others, before it takes what is free."""


class Tenure:
    """This replica's right to act for one partition, from its taking until it is given away or lost. Implements
    tools.tasks.Owner. It may pause, while the key cannot be renewed."""

    def __init__(
        self, number: int, former: Sequence[str], clock: Clock, wait_tick: Callable[[], Awaitable[None]]
    ) -> None:
        """`wait_tick`: awaited after a pause, so that thousands do not go on at the same time."""
        self.number = number
        self.former = tuple(former)
        """Replicas that may still poll or send there. The next renewal stores them for a later owner."""
        self.since = clock.monotonic()
        self.until = 0.0
        """Monotonic time at which it pauses unless it is renewed."""
        self.is_over = False
        self.is_given = False
        """It is being given away: nothing is begun any more."""
        self.is_paused = False
        """As it was announced last."""
        self.changed = ChangeSignal()
        """It has paused, goes on, or is over."""
        self.revision = 0
        self.writing = asyncio.Lock()
        self._clock = clock
        self._wait_tick = wait_tick

    @property
    def is_valid(self) -> bool:
        """Whether `check` would pass."""
        return not self.is_over and self._clock.monotonic() < self.until

    def is_settled(self) -> bool:
        """Whether it does not pause."""
        return self.is_over or self.is_valid

    def check(self) -> None:
        """Raises LeaseLost unless this replica may act for the partition now."""
        if self.is_over or self._clock.monotonic() >= self.until:
            raise LeaseLost("lease_lost", f"partition {self.number}")

    async def valid(self) -> None:
        """Waits out a pause. Raises LeaseLost once the tenure is over."""
        while not self.is_over:
            await self.changed.wait_until(self.is_settled)
            await self._wait_tick()
            if self.is_valid:  # else it has paused again, or is over
                return
            await asyncio.sleep(0)
        raise LeaseLost("lease_lost", f"partition {self.number}")

    def persist(self, work: Callable[[], Awaitable[T]], name: str, **fields: Any) -> Awaitable[T]:
        """The result of work that has to succeed while the tenure lasts: see `tools.tasks.persist`."""
        return persist(work, self, self._clock, name, **fields)

    def renewed(self, until: float, revision: int) -> None:
        """Is valid until then."""
        was_valid = self.is_valid
        self.until, self.revision = until, revision
        if self.is_valid and not was_valid:  # somebody may wait, also where the pause was not announced yet
            self.is_paused = False
            self.changed.notify_all()

    def end(self) -> None:
        """Makes every later check fail."""
        self.is_over = True
        self.changed.notify_all()


class Leases:
    """The partitions of this replica."""

    def __init__(
        self,
        bucket: LeaderBucket,
        presence: Presence,
        clock: Clock,
        metrics: Metrics,
        wait_tick: Callable[[], Awaitable[None]],
        *,
        partitions: int,
        lease_s: float,
    ) -> None:
        self.owned: dict[int, Tenure] = {}
        """By partition; some may pause."""
        self.ownerless: set[int] = set()
        """Partitions without a living owner at the last look."""
        self.changed = ChangeSignal()
        """A partition has come or gone, or a tenure pauses or goes on."""
        self.draining = False
        """Nothing is taken any more, but what is being taken."""
        self.taking = asyncio.Lock()
        """Held while partitions are being taken."""
        self.last_error = "no answer yet"
        """Cause of the last write that failed, for operators."""
        self._bucket = bucket
        self._presence = presence
        self._clock = clock
        self._metrics = metrics
        self._wait_tick = wait_tick
        self._partitions = partitions
        self._lease_s = lease_s
        self._tasks = TaskSet("lease")
        self._written_at = -lease_s
        """When the bucket was written last."""
        self._free: dict[int, Free] = {}
        """By partition that is not owned here: what its key was, and since when."""
        self._looked_at = 0.0
        """When the leader answered last."""
        self._given: dict[int, float] = {}
        """When a partition was given away here last."""
        self._releasing: set[int] = set()
        """Partitions that are being released."""
        self._look_soon = ChangeSignal()
        self._is_due = False
        presence.on_released = self.look_now

    @property
    def replica(self) -> str:
        """The name of this replica, which no other process has had."""
        return self._presence.replica

    @property
    def is_working(self) -> bool:
        """Whether the bucket was written lately, so that this replica can own partitions."""
        return self._clock.monotonic() - self._written_at < HOLDER_FRACTION * self._lease_s

    def look_now(self) -> None:
        """Looks for partitions at once, since one was released."""
        self._is_due = True
        self._look_soon.notify_all()

    async def run(self, give: Callable[[int], Awaitable[None]]) -> None:
        """Renews, observes and takes until cancelled. `give`: ends the work for a partition and calls `release`."""
        try:
            await self._show_that_it_writes()  # so that its first word says that it counts
            async with asyncio.TaskGroup() as group:
                group.create_task(self._presence.run(self._about), name="presence")
                group.create_task(self._watch_forever(), name="leases.watch")
                group.create_task(self._look_forever(give), name="leases.look")
        finally:
            self._tasks.cancel_all()

    def _about(self) -> tuple[int, bool]:
        """What the others are told: the number of owned partitions, and whether this replica counts."""
        return len(self.owned), self.is_working and not self.draining

    # the own keys -----------------------------------------------------------------------------------

    async def _write(self, number: int, lease: Lease, revision: int) -> int:
        """Raises Temporary, Conflict."""
        try:
            written = await self._bucket.write(str(number), msgspec.json.encode(lease), revision)
        except (Temporary, Conflict) as exc:
            self.last_error = exc.detail or exc.reason
            raise
        self._written_at = self._clock.monotonic()
        return written

    async def _hold(self, tenure: Tenure) -> None:
        """Renews the key of a partition until it is given away or lost."""
        while not tenure.is_over:
            began = self._clock.monotonic()
            await self._renew(tenure)
            pause_s = self._lease_s / 4 if tenure.is_valid else 0.1
            await self._clock.sleep(max(0.02, began + pause_s - self._clock.monotonic()))

    async def _renew(self, tenure: Tenure) -> None:
        async with tenure.writing:
            if tenure.is_over:
                return
            sent, lease = self._clock.monotonic(), Lease(owner=self.replica, former=tenure.former)
            try:
                revision = await self._write(tenure.number, lease, tenure.revision)
            except (Temporary, Conflict) as exc:
                if not await self._is_still_own(tenure):
                    log.error("lease.lost", partition=tenure.number, reason=exc.reason)
                    self._metrics.lease_changes.labels(reason="lost").inc()
                    self._end(tenure)
                return
            tenure.renewed(sent + self._lease_s * HOLDER_FRACTION, revision)

    async def _is_still_own(self, tenure: Tenure) -> bool:
        """Reads the own key after a write that failed: whether it is still this replica's, as far as is known."""
        try:
            entry = await self._bucket.get(str(tenure.number))
        except Temporary:
            return True
        if entry is None or entry.value is None:  # deleted, or the bucket is gone: nobody else has it
            log.error("lease.missing", partition=tenure.number, detail="The key, or its bucket, was deleted.")
        elif _decode(entry).owner != self.replica:
            return False
        tenure.revision = entry.revision if entry is not None else 0
        return True

    def _end(self, tenure: Tenure) -> None:
        tenure.end()
        if self.owned.get(tenure.number) is tenure:
            del self.owned[tenure.number]
        self._free.pop(tenure.number, None)
        self._metrics.partitions_owned.set(len(self.owned))
        self.changed.notify_all()

    async def release(self, number: int) -> None:
        """Gives a partition away at once; this replica may still poll and send there, and says so in the key."""
        tenure = self.owned.get(number)
        if tenure is None:
            return
        self._end(tenure)
        self._given[number] = self._clock.monotonic()
        self._releasing.add(number)
        try:
            async with tenure.writing:
                await self._store(tenure, Lease(former=tuple(dict.fromkeys((*tenure.former, self.replica)))))
        finally:
            self._releasing.discard(number)
        self._metrics.lease_changes.labels(reason="released").inc()
        await self._presence.tell_released()

    async def clear_former(self, number: int) -> None:
        """Takes this replica's name from a released key that nobody has taken: nothing of it is open there."""
        with contextlib.suppress(Temporary, Conflict):  # best effort: who takes it asks
            entry = await self._bucket.get(str(number))
            if entry is not None and entry.value is not None:
                lease = _decode(entry)
                if not lease.owner and self.replica in lease.former:
                    former = tuple(name for name in lease.former if name != self.replica)
                    await self._write(number, Lease(former=former), entry.revision)

    async def _store(self, tenure: Tenure, lease: Lease) -> None:
        """Writes the key of a tenure that is over, unless somebody else has. Tries for a lease; once, if that of the
        tenure is over already."""
        now = self._clock.monotonic()
        until = now + self._lease_s if now < tenure.until else now
        while True:
            try:
                tenure.revision = await self._write(tenure.number, lease, tenure.revision)
                return
            except (Temporary, Conflict):
                if not await self._is_still_own(tenure) or self._clock.monotonic() >= until:
                    return
            await self._clock.sleep(0.1)

    async def _watch_forever(self) -> None:
        """Announces a pause at once, since a renewal may hang."""
        while True:
            now, owned = self._clock.monotonic(), [*self.owned.values()]
            was_paused = any(tenure.is_paused for tenure in owned)
            for tenure in owned:
                if tenure.until <= now and not tenure.is_paused:
                    tenure.is_paused = True
                    tenure.changed.notify_all()
                    self.changed.notify_all()
            if not was_paused and any(tenure.is_paused for tenure in owned):
                log.warning("lease.paused", reason=self.last_error, partitions=len(owned))
            ends = [tenure.until for tenure in owned if tenure.until > now]
            await self._clock.sleep(max(0.02, min([now + 0.5, *ends]) - now))

    # the others' keys -------------------------------------------------------------------------------

    async def _look_forever(self, give: Callable[[int], Awaitable[None]]) -> None:
        await self._clock.sleep(START_S)
        while True:
            if not self.owned and self._clock.monotonic() - self._written_at > self._lease_s / 4:
                await self._show_that_it_writes()
            try:
                await self._look(give)
            except Temporary as exc:
                self.last_error = exc.detail or exc.reason
                log.debug("lease.unread", reason=exc.reason)
            await self._look_soon.wait_until(lambda: self._is_due, LOOK_FRACTION * self._lease_s)
            self._is_due = False

    async def _show_that_it_writes(self) -> None:
        try:
            await self._bucket.write(f"alive-{self.replica}", b"", None, ttl_s=ALIVE_S)
        except (Temporary, Conflict) as exc:
            self.last_error = exc.detail or exc.reason
        else:
            self._written_at = self._clock.monotonic()

    async def _look(self, give: Callable[[int], Awaitable[None]]) -> None:
        """Reads all keys, and takes or gives a share of the partitions. Raises Temporary."""
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                entries = await self._bucket.get_all([str(number) for number in range(self._partitions)])
        except TimeoutError:
            raise Temporary("bus_timeout", f"{ANSWER_S:g} s without an answer of the leases' leader") from None
        now = self._clock.monotonic()
        # where this replica cannot write, owners may not be able to renew
        is_blind = not self.is_working or began - self._looked_at > ANSWER_S + LOOK_FRACTION * self._lease_s
        self._looked_at = now
        found = {int(entry.key): entry for entry in entries if entry.key.isdecimal()}
        ownerless = dict[int, Free]()
        for number in range(self._partitions):
            if number in self.owned or number in self._releasing:
                continue
            entry = found.get(number)
            seen = self._observe(number, entry, now, is_blind=is_blind)
            if seen.is_released or began - seen.since >= self._lease_s:
                ownerless[number] = seen
        self.ownerless = {*ownerless}
        step = share(
            partitions=self._partitions,
            owned=[*self.owned],
            free={number: now - seen.free_since(self._lease_s) for number, seen in ownerless.items()},
            given={number: now - at for number, at in self._given.items()},
            others=self._presence.counting(),
            replica=self.replica,
        )
        async with self.taking:
            if self.draining or not self.is_working:
                return
            taken = await asyncio.gather(*(self._take(number, ownerless[number]) for number in step.take))
        if any(taken):
            self._is_due = not all(taken)  # others wanted the same, and may have left some
            log.info("partitions.taken", taken=sum(taken), owned=len(self.owned))
        if step.give is not None:
            log.info("partition.given", partition=step.give, owned=len(self.owned))
            await give(step.give)
            self._is_due = len(self.owned) > step.fair

    def _observe(self, number: int, entry: BucketEntry | None, now: float, *, is_blind: bool) -> Free:
        revision = entry.revision if entry is not None else 0
        seen = self._free.get(number)
        if seen is None or seen.revision != revision:
            if entry is not None and entry.value is not None:
                lease = _decode(entry)
                # what names this replica is of a taking whose answer was lost
                is_released = lease.owner in ("", self.replica)
            else:  # an owner who lives puts back what was deleted
                lease, is_released = Lease(), entry is None and seen is None
            seen = self._free[number] = Free(revision, now, is_released, lease.former, lease.owner)
        elif is_blind and not seen.is_released:
            seen = self._free[number] = seen._replace(since=now)
        return seen

    async def _take(self, number: int, seen: Free) -> bool:
        sent = self._clock.monotonic()
        try:
            revision = await self._write(number, Lease(owner=self.replica, former=seen.former), seen.revision)
        except (Temporary, Conflict):
            return False  # another replica was first, or the next look shows whether it is this one's
        tenure = self.owned[number] = Tenure(number, seen.former, self._clock, self._wait_tick)
        tenure.renewed(sent + self._lease_s * HOLDER_FRACTION, revision)
        self._tasks.spawn(self._hold(tenure))
        if seen.is_released:
            self._metrics.lease_changes.labels(reason="acquired").inc()
        else:
            log.warning("lease.expired", partition=number, owner=seen.owner)
            self._metrics.lease_changes.labels(reason="taken").inc()
        self._metrics.partitions_owned.set(len(self.owned))
        self.changed.notify_all()
        return True


def _decode(entry: BucketEntry) -> Lease:
    """Of what cannot be read: one that nobody has released."""
    try:
        return msgspec.json.decode(entry.value or b"", type=Lease)
    except UNDECODABLE:
        return Lease(owner="?")
