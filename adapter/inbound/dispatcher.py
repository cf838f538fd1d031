"""Dispatches the records of a bot's journal: each message to its inbox once and in order, beside the next poll.

A record goes through these steps. Each step can be repeated, and what a replica leaves undone is in the journal.

1. Triage. The messages are translated, and duplicates are dropped. Messages for no inbox become dead letters.
2. Conversations. The user's conversation gets token and window first, so that a fast answer finds them.
3. Media. A few messages download their media at once. A message waits for its media for a bounded time, and delays
   only later messages of its own bot.
4. Publishing. Messages that are ready are published in order.
5. Closing. When all messages of a record are published, the conversations note its sequence. `done_to` is the
   sequence up to which they have also stored it; the poller writes it into the journal.

A new owner starts with `catch_up`. It reads the records after `done_to` and drops the messages that the inbox has.
Such records are "left over". The poller calls `offer` for each new record, and stops polling while `has_room` is
false. A dispatcher never writes to the journal, and never publishes without the lease (`_ensure_owner`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import msgspec
import structlog

from adapter.content.dedup import DedupWindow
from adapter.contract.records import Binding
from adapter.errors import AdapterError, LeaseLost
from adapter.inbound import inbox
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.dispatch_state import DispatchDeps, OpenRecord, PendingMessage
from adapter.inbound.inbox import AddressedMessage
from adapter.inbound.journal import Written
from adapter.inbound.left_over import LeftOver
from adapter.inbound.media_downloads import MediaDownloads
from adapter.inbound.recipients import Recipients
from adapter.inbound.rejects import Rejects
from adapter.inbound.triage import TriagedMessage
from adapter.kit.crashes import ATTEMPTS
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import LEASE_RETRY_S, ChangeSignal, backoff

log = structlog.get_logger()

PUBLISH_BATCH = 256
"""Most messages in one batch of publishes; bounds the memory that a huge answer takes."""
MAX_BACKLOG = 64
"""Records that are not dispatched at which the poller pauses."""
MAX_BACKLOG_BYTES = 1024 * 1024
"""Bytes of such records at which the poller pauses."""
CANCEL_GRACE_S = 1.0
"""Time for cancelled tasks to end."""
STORED_CHECK_S = 0.1
MAX_UNSAVED = 256
"""Most dispatched records that wait for their conversations to be stored."""


class Dispatcher:
    """Dispatches for one bot. Implements bot_journal.Progress. Has a task only while there is work."""

    def __init__(self, journal: BotJournal, deps: DispatchDeps, on_caught_up: Callable[[], None]) -> None:
        """`on_caught_up`: called once the conversations know the records that the previous owner left over."""
        self.bot = journal.bot
        self._journal = journal
        self._deps = deps
        self._publishing = deps.publishing._replace(ensure_owner=self._ensure_owner)
        self._clock = deps.publishing.clock
        self._on_caught_up = on_caught_up
        self.is_catching_up = False
        self._seen: DedupWindow | None = None
        """Loaded with the first message, since most bots are silent for long after a takeover."""
        self._inherited: int | None = None
        """Sequence of the newest record with messages of earlier owners; None: the first record of this owner has
        it."""
        self._records: deque[OpenRecord] = deque()
        """Records that are not triaged."""
        self._open: deque[OpenRecord] = deque()
        """All records that are not dispatched, in order."""
        self._waiting: deque[PendingMessage] = deque()
        self._unsaved: deque[OpenRecord] = deque()
        """Dispatched records whose conversations are not known to be stored."""
        self._unsaved_keys = 0
        """Messages that these records, and the open ones, added to the dedup window."""
        self._done_to = journal.done_to
        self.changed = ChangeSignal()
        self._tasks = TaskSet(partial(_crashed, self.bot))
        self._left_over = LeftOver(journal, deps)
        self._rejects = Rejects(self.bot, self._publishing)
        self._recipients = Recipients(self.bot, deps.bindings, self._publishing, self._rejects)
        self._downloads = MediaDownloads(
            self.bot, self._waiting, deps, self._tasks, lambda: self._stopped, self.changed.notify_all
        )
        self._task: asyncio.Task[None] | None = None
        self._is_one_by_one = False
        """Publish single messages, since a batch raised an unexpected error."""
        self._stopped = False

    # for the poller -------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Dispatches what the previous owner stored and did not dispatch."""
        self._inherited = self._journal.stored.last_heard
        if self._journal.stored.last_heard > self._journal.done_to:
            self.is_catching_up = True
            self._wake()
        else:
            self._on_caught_up()

    def offer(self, written: Written) -> None:
        """Queues the next stored record with messages."""
        if self._stopped:
            return
        opened = OpenRecord(written)
        self._records.append(opened)
        self._open.append(opened)
        self._wake()

    def has_room(self) -> bool:
        """Whether the poller may poll again. `changed` is notified of it."""
        is_full = len(self._open) >= MAX_BACKLOG or sum(opened.size for opened in self._open) >= MAX_BACKLOG_BYTES
        return self._stopped or not is_full

    @property
    def is_done(self) -> bool:
        """Whether all messages are in their inboxes. `changed` is notified of it."""
        return not self._open and not self.is_catching_up

    async def drain(self, seconds: float) -> bool:
        """Stops after at most `seconds` for messages that are nearly published. Returns whether all messages are in
        their inboxes; the journal has the others."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait_until(lambda: self._stopped or self.is_done)
        is_done = self.is_done
        if not is_done:
            log.info("dispatch.abandoned", bot=self.bot, records=len(self._open))
        self.stop()
        await self._tasks.wait_ended(CANCEL_GRACE_S)
        return is_done

    def stop(self) -> None:
        """Stops at once, since the bot is lost or released."""
        self._stopped = True
        self._tasks.cancel_all()
        self.changed.notify_all()

    # bot_journal.Progress ---------------------------------------------------------------------------

    def done_to(self) -> int:
        whole = 0
        """Dispatched records at whose end no message continues."""
        for number, opened in enumerate(self._unsaved, 1):
            if not opened.is_stored(self.bot):
                break
            if not opened.is_continued:  # a new owner needs the beginning of the message, too
                whole = number
        for _ in range(whole):
            self._done_to = self._forget_oldest().sequence
        return self._done_to

    def _forget_oldest(self) -> OpenRecord:
        oldest = self._unsaved.popleft()
        self._unsaved_keys -= oldest.added_keys
        return oldest

    async def wait_stored(self, seconds: float) -> None:
        """Waits at most `seconds` for the conversations to store the dispatched sequence."""
        until = self._clock.monotonic() + seconds
        self.done_to()
        while self._unsaved and self._clock.monotonic() < until:
            await self._clock.sleep(STORED_CHECK_S)
            self.done_to()

    async def load_dedup_window(self) -> None:
        """Loads the dedup window if no message has done so. Raises Temporary."""
        if self._seen is None:
            if self._inherited is None and not self._records:
                self._inherited = self._journal.stored.last_heard
            await self._read_back()

    def dedup_snapshot(self, *, new: int) -> list[str] | None:
        seen = self._seen
        if seen is None or self.is_catching_up:
            return None
        later = self._unsaved_keys
        if seen.unsaved - later < new:
            return None
        seen.unsaved = later
        lines = seen.fingerprints()
        return lines[: len(lines) - later]

    # dispatching ------------------------------------------------------------------------------------

    def _ensure_owner(self) -> None:
        """Raises LeaseLost."""
        if self._stopped:
            raise LeaseLost("dispatch_stopped", self.bot)
        self._journal.ensure_owner()

    def _wake(self) -> None:
        self.changed.notify_all()
        if self._task is None and not self._stopped:
            self._task = self._tasks.spawn(self._run())

    async def _run(self) -> None:
        failures = 0
        try:
            while not self._stopped and (self._records or self._waiting or self.is_catching_up):
                try:
                    await self._do_next()
                    failures = 0
                    continue
                except LeaseLost:
                    for waiting in self._waiting:
                        waiting.is_suspect = True  # the publish may have succeeded
                    await self._wait_for_lease()
                    pause_s = LEASE_RETRY_S
                except AdapterError as exc:
                    failures += 1
                    log.warning("dispatch.retrying", bot=self.bot, reason=exc.reason, failures=failures)
                    pause_s = backoff(failures, first_s=0.05, longest_s=5.0)
                except Exception:
                    failures += 1
                    log.exception("dispatch.crashed", bot=self.bot, failures=failures)
                    pause_s = backoff(failures, first_s=0.2, longest_s=30.0)
                await self._clock.sleep(pause_s)
        finally:
            self._task = None

    async def _wait_for_lease(self) -> None:
        """Returns when the lease may be valid again; stops the dispatcher if it is another incarnation's."""
        leases = self._publishing.leases
        await leases.changed.wait_until(lambda: self._stopped or leases.is_valid, 1.0)
        if leases.incarnation != self._journal.owner:
            self.stop()

    async def _do_next(self) -> None:
        """One unit of work. Raises Temporary, LeaseLost, BusRefused."""
        if self._seen is None:
            await self._read_back()
        if self._records:
            await self._triage(self._records[0])
            self._records.popleft()
            self._close_done()
        elif self.is_catching_up:
            self._finish_catch_up()
        elif self._waiting[0].is_suspect or self._waiting[-1].is_suspect:
            await self._drop_published()
        else:
            await self._publish_ready()

    def _finish_catch_up(self) -> None:
        if self.is_catching_up and not any(opened.is_left_over for opened in self._records):
            self.is_catching_up = False
            self.changed.notify_all()
            self._on_caught_up()

    async def _read_back(self) -> None:
        """Loads the dedup window, and puts the left-over records before all others. Raises Temporary."""
        newest = self._records[0].written.record.last_heard if self._inherited is None else self._inherited
        self._seen, records = await self._left_over.read_back(newest, self._done_to)
        self._records.extendleft(reversed(records))
        self._open.extendleft(reversed(records))

    async def _triage(self, opened: OpenRecord) -> None:
        """Triages a record and queues its messages for the inbox. Can be repeated if it raises Temporary, LeaseLost
        or BusRefused."""
        record = opened.written.record
        assert self._seen is not None
        if opened.messages is None:
            opened.messages = self._left_over.complete_messages(record)
        if opened.triaged is None:
            known = self._seen.added_count
            opened.triaged = await self._deps.triage.classify(
                self.bot, opened.messages, record.place, record.first, self._seen, record.received_ms
            )
            opened.added_keys = self._seen.added_count - known
            self._unsaved_keys += opened.added_keys
        binding = await self._recipients.find_binding()
        try:
            await self._queue_messages(opened, opened.triaged, binding)
        except AdapterError:
            raise
        except Exception:
            opened.crashes += 1
            if opened.crashes < ATTEMPTS:
                raise
            log.exception("inbound.crashed", bot=self.bot, messages=len(opened.triaged))
            for message in opened.triaged:
                await self._rejects.end_crashed(message.raw, binding.sandbox if binding else "", message.inbound)
        opened.is_triaged = True
        self._finish_catch_up()

    async def _queue_messages(
        self, opened: OpenRecord, triaged: Sequence[TriagedMessage], binding: Binding | None
    ) -> None:
        """Gives messages to their conversations and queues them, or ends them. Raises Temporary, LeaseLost."""
        addressed: list[AddressedMessage] = []
        if binding is not None:
            triaged = [
                message
                if message.inbound is None
                or message.outcome != "new"
                or self._recipients.has_room_for(message.inbound.user, binding)
                else msgspec.structs.replace(message, outcome="stranger", detail="The bot has too many other users.")
                for message in triaged
            ]
            addressed = [
                self._recipients.address(opened, message, binding) for message in triaged if message.outcome == "new"
            ]
            addressed = await self._recipients.update_conversations(binding, opened, addressed)
        for message in triaged:
            if message.outcome != "new" or binding is None:
                await self._rejects.end_unpublished(message, binding)
            elif message.inbound is not None and message.inbound.broken:
                await self._rejects.dead_letter(binding, message.raw, message.inbound, message.inbound.broken)
        until = self._clock.monotonic() + self._deps.media_wait_s
        self._waiting.extend(
            PendingMessage(message, opened, until, is_suspect=opened.is_left_over) for message in addressed
        )
        opened.unpublished = len(addressed)
        if any(message.inbound.fetches for message in addressed):
            self._downloads.start()

    # publishing -------------------------------------------------------------------------------------

    async def _publish_ready(self) -> None:
        """Publishes the messages that are ready, in order. If the first pending is not, waits for its media or for
        another record."""
        first = self._waiting[0]
        if not first.is_ready:
            self._downloads.start()
            await self.changed.wait_until(lambda: bool(self._records) or self._stopped or first.is_ready)
            return
        if first.crashes >= ATTEMPTS:
            await self._rejects.end_crashed(first.message.inbound.raw, first.message.sandbox, first.message.inbound)
            self._remove_finished([first])
            return
        if self._recipients.has_left(first.message):
            self._rejects.count(first.message.inbound.kind, "unbound")
            inbound, why = first.message.inbound, "No bot of the sandbox serves its author any more."
            await self._rejects.dead_letter(None, inbound.raw, inbound, why, reason="not_bound")
            self._remove_finished([first])
            return
        ready = self._next_batch()
        try:
            await inbox.publish([pending.with_media() for pending in ready], self._publishing)
        except AdapterError:
            raise
        except Exception:
            if len(ready) == 1:
                first.crashes += 1
                first.work = None  # the downloaded media may be at fault
            self._is_one_by_one = True
            raise
        if not first.record.is_left_over:
            took_s = (self._clock.now_ms() - first.message.received_ms) / 1000
            # the objective counts messages, not batches
            self._publishing.metrics.inbound_publish_duration.observe(max(0.0, took_s), len(ready))
        self._remove_finished(ready)

    def _next_batch(self) -> list[PendingMessage]:
        """The first pending messages, as far as they are ready and for the same recipient as the first."""
        first = self._waiting[0].message
        recipient = first.sandbox, first.inbound.user
        batch: list[PendingMessage] = []
        for pending in islice(self._waiting, 1 if self._is_one_by_one else PUBLISH_BATCH):
            if not pending.is_ready or (pending.message.sandbox, pending.message.inbound.user) != recipient:
                break
            batch.append(pending)
        return batch

    def _remove_finished(self, finished: Sequence[PendingMessage]) -> None:
        """Removes the first messages of the queue, which are in the inbox or dead letters."""
        for pending in finished:
            self._waiting.popleft()
            pending.record.unpublished -= 1
        self._is_one_by_one = self._is_one_by_one and bool(self._waiting)
        self._close_done()

    def _close_done(self) -> None:
        """Closes the records whose messages are all in their inboxes."""
        while self._open and self._open[0].is_triaged and not self._open[0].unpublished:
            opened = self._open.popleft()
            for actor in opened.actors:
                actor.note_dispatched(self.bot, opened.sequence)
            self._unsaved.append(opened)
            opened.drop_messages()
            if len(self._unsaved) > MAX_UNSAVED:
                self._forget_oldest()
        self.changed.notify_all()

    async def _drop_published(self) -> None:
        """Drops suspect messages that are in their inbox. Raises Temporary, LeaseLost."""
        suspects = [waiting for waiting in self._waiting if waiting.is_suspect]
        self._ensure_owner()  # otherwise a new owner may publish after this read
        places, ids = await self._left_over.find_published(suspects)
        for waiting in suspects:
            waiting.is_suspect = False
            if waiting.message.place in places or waiting.message.id in ids:
                log.info("inbound.recovered", bot=self.bot, place=waiting.message.place)
                self._waiting.remove(waiting)
                waiting.record.unpublished -= 1
        self._close_done()
        self._downloads.start()


def _crashed(bot: str, exc: BaseException) -> None:
    log.error("task.crashed", bot=bot, exc_info=exc)
