"""Messages with media: they wait in WECHAT_RAW until their media are downloaded, then go to their inboxes.

So a slow CDN costs neither safety nor the next poll. Per bot, downloads run ahead, messages are published one after
the other, and none waits longer than a bounded time. The shard's owner does it; what it leaves undone is in the
stream, for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from adapter.contract import InboundItem
from adapter.crashes import TRIES, attempt_now
from adapter.errors import Crashed, LeaseLost, Temporary, Unreadable
from adapter.inbound import inbox
from adapter.inbound.download import Downloading, Got, Missing, download, filled
from adapter.inbound.inbox import Heard
from adapter.inbound.sessions import Incoming
from adapter.names import H_MSG_ID, H_SANDBOX, H_SEQUENCE, text_of
from adapter.ports import Fetch, Stored
from adapter.tasks import Tasks
from adapter.timing import Condition, backoff

log = structlog.get_logger()

AHEAD = 4
"""Messages of one bot whose media are downloaded at once."""
SWEEP_S = 60.0
"""How often the stream is searched for what another replica left there in its last moments."""
DONE_KEPT = 100
"""A message that is done is gone from the stream; only a reading that began before may still bring it."""
CUT_S = 1.0


class Fetching(NamedTuple):
    """What the downloads need."""

    incoming: Incoming
    downloading: Downloading
    wait_s: float
    """How long a message waits for its media, from its arrival on."""


class Waiter:
    """A message that waits for its media, or behind one that does."""

    __slots__ = ("after", "crashes", "heard", "seq", "suspect", "told", "until", "work")

    def __init__(self, seq: int, heard: Heard, after: int, until: float, *, suspect: bool) -> None:
        self.seq = seq
        """In WECHAT_RAW."""
        self.heard = heard
        self.after = after
        """It is in the inbox behind this sequence, if it is there."""
        self.until = until
        """Monotonic time at which it goes on without what is missing."""
        self.suspect = suspect
        """It may be in its inbox already."""
        self.told = False
        self.crashes = 0
        """How often the code has raised on it as the first one of its queue."""
        self.work: asyncio.Task[list[InboundItem]] | None = None


class Queue:
    """The waiting messages of one bot for one sandbox, in order."""

    def __init__(self) -> None:
        self.waiters: deque[Waiter] = deque()
        self.task: asyncio.Task[None] | None = None


class Downloads:
    """Implements sessions.Waiting for one shard, as long as this replica owns it."""

    def __init__(self, number: int, needs: Fetching) -> None:
        self.number = number
        self._needs = needs
        self._incoming = needs.incoming
        self._queues: dict[tuple[str, str], Queue] = {}
        self._waiting: set[int] = set()
        """Sequences in the queues."""
        self._done: deque[int] = deque(maxlen=DONE_KEPT)
        self._swept_to = 0
        self._changed = Condition()
        self._tasks = Tasks(partial(_crashed, number))
        self._stopped = False

    async def load(self) -> None:
        """Finds what waits in the stream; from then on looks for more now and then. Raises Temporary."""
        await self._sweep()
        self._tasks.spawn(self._sweep_forever())

    async def _sweep(self) -> None:
        names = self._incoming.names
        subject = names.raw(self.number, "*")
        found = [
            stored async for stored in self._incoming.history.read(names.stream_raw, subject, after=self._swept_to)
        ]
        for stored in found:
            self.add(stored, suspect=True)
            self._swept_to = stored.seq

    async def _sweep_forever(self) -> None:
        while True:
            await self._incoming.clock.sleep(SWEEP_S + self._incoming.clock.jitter(SWEEP_S / 4))
            try:
                await self._sweep()
            except Temporary as exc:
                log.info("raw.unread", shard=self.number, reason=exc.reason)

    # sessions.Waiting -------------------------------------------------------------------------------

    def holds(self, sandbox: str, bot: str) -> bool:
        return (sandbox, bot) in self._queues

    def add(self, stored: Stored, *, suspect: bool = False) -> None:
        if stored.seq in self._waiting or stored.seq in self._done or self._stopped:
            return
        try:
            after = int(stored.headers.get(H_SEQUENCE, "0"))
            read = partial(inbox.read_raw, stored, self._incoming.read_message)
            heard = attempt_now(read, "raw.crashed", shard=self.number, sequence=stored.seq)
        except Crashed as exc:
            self._tasks.spawn(self._bury(stored, exc.detail, reason=exc.reason))
            return
        except (Unreadable, ValueError) as exc:
            log.error("raw.unreadable", shard=self.number, sequence=stored.seq, reason=type(exc).__name__)
            self._tasks.spawn(self._bury(stored, "It cannot be read back from WECHAT_RAW."))
            return
        self._waiting.add(stored.seq)
        until = self._incoming.clock.monotonic() + self._needs.wait_s
        queue = self._queues.setdefault((heard.sandbox, heard.bot), Queue())
        queue.waiters.append(Waiter(stored.seq, heard, after, until, suspect=suspect))
        if queue.task is None:
            queue.task = self._tasks.spawn(self._run(queue, heard.sandbox, heard.bot))
        elif not suspect:
            self._ahead(queue)

    async def passed(self, sandbox: str, bot: str) -> None:
        await self._changed.until(lambda: self._stopped or not self.holds(sandbox, bot))

    # one bot ----------------------------------------------------------------------------------------

    async def _run(self, queue: Queue, sandbox: str, bot: str) -> None:
        """Works until nothing waits. One unit of work per turn; what fails unexpectedly is tried a few times."""
        failures = 0
        while queue.waiters:
            first = queue.waiters[0]
            try:
                await (self._turn(queue) if first.crashes < TRIES else self._set_aside(queue))
                failures = 0
                continue
            except LeaseLost:  # it may come back; where it does not, `stop` follows
                await self._incoming.leases.held(self.number, 1.0)
                continue
            except Temporary as exc:
                failures += 1
                log.warning("raw.waits", sandbox=sandbox, reason=exc.reason, failures=failures)
            except Exception:
                failures += 1
                first.crashes += 1
                if first.work is not None and first.work.done():
                    first.work = None  # it may be what raised
                log.exception("raw.crashed", sandbox=sandbox, failures=failures)
            await self._incoming.clock.sleep(backoff(failures, first_s=0.2, longest_s=30.0))
        del self._queues[sandbox, bot]
        self._changed.notify()

    async def _turn(self, queue: Queue) -> None:
        """One step for a bot. Raises Temporary, LeaseLost."""
        if any(waiter.suspect for waiter in queue.waiters):
            self._incoming.leases.check(self.number)  # else the owner of now may tell it after this look
            await self._clear(queue)
            return
        self._ahead(queue)
        first = queue.waiters[0]
        if not first.told:
            heard = first.heard
            if first.work is not None:
                items = await asyncio.shield(first.work)
                said = msgspec.structs.replace(heard.said, items=items)
                heard = msgspec.structs.replace(heard, said=said)
            fenced = self._incoming._replace(fence=partial(self._incoming.leases.check, self.number))
            fenced.check_fence()
            try:
                await inbox.publish([heard], fenced)
            except LeaseLost:
                first.suspect = True  # it may have been stored all the same
                raise
            first.told = True
        await self._forget(first)
        queue.waiters.popleft()

    async def _clear(self, queue: Queue) -> None:
        """Drops what is in the inbox already: a crash came between publishing it and deleting it from WECHAT_RAW."""
        suspects = {waiter.heard.id: waiter for waiter in queue.waiters if waiter.suspect}
        names = self._incoming.names
        (subject,) = {names.inbox(waiter.heard.sandbox) for waiter in suspects.values()}
        after = min(waiter.after for waiter in suspects.values())
        told: set[str] = set()
        async for stored in self._incoming.history.read(names.stream_in, subject, after=after):
            told.add(stored.headers.get(H_MSG_ID, ""))
        for waiter in list(queue.waiters):
            if waiter.heard.id not in suspects:
                continue
            if waiter.heard.id in told:
                log.info("raw.told_before", bot=waiter.heard.bot, sequence=waiter.seq)
                await self._forget(waiter)
                queue.waiters.remove(waiter)
            waiter.suspect = False

    async def _set_aside(self, queue: Queue) -> None:
        """The first message raises at every try: it becomes a dead letter, unless it is in the inbox. Raises
        LeaseLost."""
        first, crashed = queue.waiters[0], Crashed()
        if not first.told:
            self._incoming.leases.check(self.number)
            heard = first.heard
            inbox.count(self._incoming, heard.said.kind, "dead_lettered")
            await inbox.bury(
                heard.bot, heard.sandbox, heard.said.raw, crashed.detail, self._incoming, reason=crashed.reason
            )
            first.told = True
        queue.waiters.popleft()
        self._done_with(first)
        self._tasks.spawn(self._delete(first.seq))

    async def _forget(self, waiter: Waiter) -> None:
        await self._incoming.history.delete(self._incoming.names.stream_raw, waiter.seq)
        self._done_with(waiter)

    def _done_with(self, waiter: Waiter) -> None:
        self._done.append(waiter.seq)
        self._waiting.discard(waiter.seq)

    async def _bury(self, stored: Stored, why: str, *, reason: str = "unreadable") -> None:
        """Nobody can read it, also not at the next start."""
        bot = text_of(stored.subject.rpartition(".")[2])
        sandbox = stored.headers.get(H_SANDBOX, "")
        await inbox.bury(bot, sandbox, stored.data, why, self._incoming, reason=reason)
        await self._delete(stored.seq)

    async def _delete(self, seq: int) -> None:
        stream = self._incoming.names.stream_raw
        await inbox.retry(lambda: self._incoming.history.delete(stream, seq), self._incoming)

    # downloads --------------------------------------------------------------------------------------

    def _ahead(self, queue: Queue) -> None:
        """Starts downloads, the oldest messages first."""
        busy = sum(1 for waiter in queue.waiters if waiter.work is not None and not waiter.work.done())
        for waiter in queue.waiters:
            if busy >= AHEAD or waiter.suspect:
                return
            if waiter.work is None and waiter.heard.said.fetches:
                waiter.work = self._tasks.spawn(self._fetch_all(waiter))
                waiter.work.add_done_callback(lambda _: None if self._stopped else self._ahead(queue))
                busy += 1

    async def _fetch_all(self, waiter: Waiter) -> list[InboundItem]:
        """The items of a message with their media, or with why they are missing."""
        said = waiter.heard.said
        found = await asyncio.gather(*(self._fetch(waiter, fetch) for fetch in said.fetches))
        items = list(said.items)
        for fetch, got in zip(said.fetches, found, strict=True):
            items[fetch.item] = filled(items[fetch.item], got)
        return items

    async def _fetch(self, waiter: Waiter, fetch: Fetch) -> Got:
        """One item's media. While the bus is away nobody misses them, so that time does not count."""
        while True:
            left_s = waiter.until - self._incoming.clock.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    return await download(waiter.heard, fetch, self._needs.downloading)
            except TimeoutError:
                missing = Missing("timeout", again=True)
            except Missing as exc:
                missing = exc
            if missing.reason not in ("timeout", "store") or not missing.again or not await self._bus_was_away():
                log.info("media.missing", bot=waiter.heard.bot, reason=missing.reason)
                return Got(reason=missing.reason)
            waiter.until = self._incoming.clock.monotonic() + self._needs.wait_s

    async def _bus_was_away(self) -> bool:
        """Waits until the bus is there; whether it was not."""
        began = self._incoming.clock.monotonic()
        await self._incoming.writable()
        return self._incoming.clock.monotonic() > began + 0.01

    # ending -----------------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Waits a little for what is nearly done; the rest stays in the stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.until(lambda: not self._queues)
        if self._queues:
            log.info("raw.left", shard=self.number, bots=len(self._queues))
        self.stop()
        await self._tasks.ended(CUT_S)

    def stop(self) -> None:
        """The shard is lost: everything ends now. A message cut between telling and forgetting is looked up by
        the next owner."""
        self._stopped = True
        self._tasks.cancel()
        self._changed.notify()


def _crashed(shard: int, exc: BaseException) -> None:
    log.error("task.crashed", shard=shard, exc_info=exc)
