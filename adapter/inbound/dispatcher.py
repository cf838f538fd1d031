"""Dispatches the records of a bot's journal: each message to its inbox once and in order, beside the next poll.

A record goes through these steps. Each step can be repeated, and what a replica leaves undone is in the journal.

1. Triage. The messages are translated, and duplicates are dropped. Messages for no inbox become dead letters. 2.
Conversations. The user's conversation gets token and window first, so that a fast answer finds them. 3. Media. Up to
AHEAD messages download their media at once. A message waits for its media for a bounded time, and delays only later
messages of its own bot. 4. Publishing. Messages that are ready are published in order. 5. Closing. When all messages
of a record are published, the conversations note its sequence. `done_to` is the sequence up to which they have also
stored it; the poller writes it into the journal.

A new owner starts with `catch_up`. It reads the records behind `done_to` and drops the messages that the inbox has.
Such records are "left over". The poller calls `offer` for each new record, and stops polling while `has_room` is
false. A dispatcher never writes to the journal, and never publishes without the lease (`_ensure_owner`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import NamedTuple

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.content.dedup import DedupWindow
from adapter.contract.messages import InboundItem
from adapter.contract.names import H_JOURNAL, H_MSG_ID
from adapter.contract.records import Binding
from adapter.conversation.actor import ConversationActor
from adapter.errors import AdapterError, Crashed, LeaseLost
from adapter.inbound import inbox
from adapter.inbound.bot_journal import BotJournal
from adapter.inbound.download import DownloadDeps, DownloadResult, MediaUnavailable, download, with_media
from adapter.inbound.inbox import AddressedMessage, PublishDeps
from adapter.inbound.journal import Journal, JournalRecord, Written
from adapter.inbound.triage import Triage, TriagedMessage
from adapter.kit.crashes import ATTEMPTS, retry_on_bug
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import LEASE_RETRY_S, ChangeSignal, backoff
from adapter.ports import InboundMessage, MediaRef

log = structlog.get_logger()

CONCURRENT_DOWNLOADS = 4
"""Messages of one bot that download their media at the same time."""
PUBLISH_BATCH = 256
"""Most messages in one batch of publishes; bounds the memory that a huge answer takes."""
MAX_BACKLOG = 64
"""Records that are not dispatched at which the poller pauses."""
MAX_BACKLOG_BYTES = 1024 * 1024
"""Bytes of such records at which the poller pauses."""
CANCEL_GRACE_S = 1.0
"""Time for cancelled tasks to end."""
STORED_CHECK_S = 0.1
CLOCK_SKEW_MS = 60_000
"""Largest difference between the clocks of two servers."""
MAX_UNSAVED = 256
"""Most dispatched records that wait for their conversations to be stored."""


class DispatchDeps(NamedTuple):
    """Dependencies of all dispatchers of a replica."""

    journal: Journal
    triage: Triage
    publishing: PublishDeps
    bindings: Bindings
    downloading: DownloadDeps
    media_wait_s: float
    """How long a message waits for its media after its arrival."""
    media_writable: Callable[[], Awaitable[None]]
    """Returns when the bus accepts messages and media."""


class PendingMessage:
    """A message that is not known to be in its inbox."""

    __slots__ = ("crashes", "is_suspect", "message", "record", "until", "work")

    def __init__(self, message: AddressedMessage, record: OpenRecord, until: float, *, is_suspect: bool) -> None:
        self.message = message
        self.record = record
        self.until = until
        """Monotonic time at which it is published without its missing media."""
        self.is_suspect = is_suspect
        """It may be in its inbox: it is left over, or a publish failed with a lost lease."""
        self.crashes = 0
        """Publishes of this message alone that raised an unexpected error."""
        self.work: asyncio.Task[list[InboundItem]] | None = None


class OpenRecord:
    """A record that is being dispatched."""

    __slots__ = (
        "actors",
        "added_keys",
        "crashes",
        "is_left_over",
        "is_triaged",
        "messages",
        "size",
        "triaged",
        "unpublished",
        "written",
    )

    def __init__(self, written: Written, *, is_left_over: bool = False) -> None:
        self.written = written
        self.size = sum(map(len, written.record.messages))
        self.is_left_over = is_left_over
        """A previous owner stored it and may have published some of it."""
        self.messages: list[bytes] | None = None
        """Its messages, completed by the pieces in earlier records."""
        self.triaged: list[TriagedMessage] | None = None
        self.added_keys = 0
        """Messages that it added to the dedup window."""
        self.is_triaged = False
        self.unpublished = 0
        """Messages that are not in their inbox."""
        self.actors: list[ConversationActor] = []
        """Conversations of its users."""
        self.crashes = 0


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
        """Loaded with the first message, since most bots are silent for long after a take-over."""
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
        self._done_to = journal.done_to
        self._pieces: dict[tuple[str, int], bytes] = {}
        """Beginnings of messages that continue in a later record, by iLink's answer and the message's number in it.
        A late record of another replica may lie between the two."""
        self.changed = ChangeSignal()
        self._tasks = TaskSet(partial(_crashed, self.bot))
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
        """Takes the next stored record with messages."""
        if self._stopped:
            return
        opened = OpenRecord(written)
        self._records.append(opened)
        self._open.append(opened)
        self._wake()

    def has_room(self) -> bool:
        """Whether the poller may go on; `changed` notifies."""
        is_full = len(self._open) >= MAX_BACKLOG or sum(opened.size for opened in self._open) >= MAX_BACKLOG_BYTES
        return self._stopped or not is_full

    @property
    def is_done(self) -> bool:
        """Whether all messages are in their inboxes; `changed` notifies."""
        return not self._open and not self.is_catching_up

    async def drain(self, seconds: float) -> bool:
        """Stops after at most `seconds` for what is nearly done. Returns whether all messages are in their inboxes;
        the journal has the others."""
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
        """Stops at once, since the bot is lost or given away."""
        self._stopped = True
        self._tasks.cancel_all()
        self.changed.notify_all()

    # bot_journal.Progress ---------------------------------------------------------------------------

    def done_to(self) -> int:
        whole = 0
        """Dispatched records at whose end no message continues."""
        for number, opened in enumerate(self._unsaved, 1):
            if not all(actor.memory.is_stored_to(self.bot, opened.written.sequence) for actor in opened.actors):
                break
            if not opened.written.record.is_continued:  # a new owner needs the beginning of the message, too
                whole = number
        for _ in range(whole):
            self._done_to = self._unsaved.popleft().written.sequence
        return self._done_to

    async def wait_stored(self, seconds: float) -> None:
        """Waits at most `seconds` for the conversations to store what was dispatched."""
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
        later = sum(opened.added_keys for opened in (*self._unsaved, *self._open))
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
        """Loads the dedup window from earlier owners' records, and puts the left-over ones before all others. Raises
        Temporary."""
        journal, triage = self._journal, self._deps.triage
        known = await self._deps.journal.get(self.bot, journal.stored.seen_at) if journal.stored.seen_at else None
        seen, left = DedupWindow(known.record.seen or () if known else ()), []
        for written in await self._earlier_records(journal.stored.seen_to):
            record = written.record
            if written.sequence > self._done_to:
                left.append(OpenRecord(written, is_left_over=True))
                continue
            whole = self._complete_messages(record)
            await triage.classify(self.bot, whole, record.place, record.first, seen, record.received_ms)
        self._seen = seen
        self._records.extendleft(reversed(left))
        self._open.extendleft(reversed(left))

    async def _earlier_records(self, known_to: int) -> list[Written]:
        """The records with messages that earlier owners stored behind a sequence, oldest first. They are read
        backwards by `last_heard`, since a search by subject would scan the records of all bots. Raises Temporary."""
        sequence = self._records[0].written.record.last_heard if self._inherited is None else self._inherited
        found: list[Written] = []
        while sequence > known_to and (written := await self._deps.journal.get(self.bot, sequence)) is not None:
            found.append(written)
            sequence = written.record.last_heard
        return found[::-1]

    def _complete_messages(self, record: JournalRecord) -> list[bytes]:
        """The messages of a record, each with its pieces from earlier records. An unfinished last message is kept."""
        begun = self._pieces.pop((record.place, record.first), b"")
        messages = list(record.messages)
        if record.is_rest:  # otherwise iLink repeated the answer
            messages[0] = begun + messages[0]
        if record.is_continued:
            last = messages.pop()
            self._pieces[record.place, record.first + len(messages)] = last
        return messages

    async def _triage(self, opened: OpenRecord) -> None:
        """Triages a record and queues its messages for the inbox. Can be repeated if it raises Temporary, LeaseLost
        or BusRefused."""
        record = opened.written.record
        assert self._seen is not None
        if opened.messages is None:
            opened.messages = self._complete_messages(record)
        if opened.triaged is None:
            known = self._seen.added_count
            opened.triaged = await self._deps.triage.classify(
                self.bot, opened.messages, record.place, record.first, self._seen, record.received_ms
            )
            opened.added_keys = self._seen.added_count - known
        binding = await self._find_binding()
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
                await self._end_crashed(message.raw, binding.sandbox if binding else "", message.inbound)
        opened.is_triaged = True
        self._finish_catch_up()

    async def _queue_messages(
        self, opened: OpenRecord, triaged: Sequence[TriagedMessage], binding: Binding | None
    ) -> None:
        """Gives messages to their conversations and queues them, or ends them. Raises Temporary, LeaseLost."""
        addressed: list[AddressedMessage] = []
        if binding is not None:
            addressed = [
                self._address_message(opened, message, binding) for message in triaged if message.outcome == "new"
            ]
            addressed = await self._update_conversations(binding, opened, addressed)
        for message in triaged:
            if message.outcome != "new" or binding is None:
                await self._end_unpublished(message, binding)
            elif message.inbound is not None and message.inbound.broken:
                await self._dead_letter(binding, message.raw, message.inbound, message.inbound.broken)
        until = self._clock.monotonic() + self._deps.media_wait_s
        self._waiting.extend(
            PendingMessage(message, opened, until, is_suspect=opened.is_left_over) for message in addressed
        )
        opened.unpublished = len(addressed)
        self._start_downloads()

    def _address_message(self, opened: OpenRecord, triaged: TriagedMessage, binding: Binding) -> AddressedMessage:
        inbound = triaged.inbound
        assert inbound is not None
        if inbound.fetches and not binding.options.media:
            inbound = inbox.without_media(inbound, "off")
        place = f"{opened.written.sequence}.{triaged.number}"
        record = opened.written.record
        sandbox = record.sandbox or binding.sandbox
        return AddressedMessage(inbound, sandbox, self.bot, record.received_ms, inbound.keys.id_for(self.bot), place)

    async def _end_unpublished(self, message: TriagedMessage, binding: Binding | None) -> None:
        """Counts a message for no inbox, or makes it a dead letter."""
        kind = message.inbound.kind if message.inbound else "unsupported"
        match message.outcome:
            case "echo":
                self._count(kind, "rejected")
            case "duplicate":
                self._count(kind, "duplicate")
                log.info("inbound.duplicate", bot=self.bot)
            case "new":
                self._count(kind, "unbound")
                await self._dead_letter(
                    None, message.raw, message.inbound, f"The bot {self.bot} was not bound when the message arrived."
                )
            case "crashed" | "group":
                self._count(kind, "dead_lettered")
                await self._dead_letter(binding, message.raw, message.inbound, message.detail, reason=message.outcome)
            case _:
                self._count(kind, "dead_lettered")
                await self._dead_letter(binding, message.raw, message.inbound, message.detail)

    def _count(self, kind: str, outcome: str) -> None:
        inbox.count(self._publishing, kind, outcome)

    async def _dead_letter(
        self,
        binding: Binding | None,
        raw: bytes,
        inbound: InboundMessage | None,
        why: str,
        *,
        reason: str = "unreadable",
    ) -> None:
        sandbox, message = binding.sandbox if binding else "", inbound.keys.id_for(self.bot) if inbound else ""
        await inbox.dead_letter(self.bot, sandbox, raw, why, self._publishing, reason=reason, message=message)

    async def _end_crashed(self, raw: bytes, sandbox: str, inbound: InboundMessage | None) -> None:
        """Gives up a message on which the code raises at every attempt."""
        self._ensure_owner()
        crashed = Crashed()
        self._count(inbound.kind if inbound else "unsupported", "dead_lettered")
        message = inbound.keys.id_for(self.bot) if inbound else ""
        why, reason = crashed.detail, crashed.reason
        await inbox.dead_letter(self.bot, sandbox, raw, why, self._publishing, reason=reason, message=message)

    async def _find_binding(self) -> Binding | None:
        """The bot's binding; None: the bus has none, even if asked directly. Raises Temporary."""
        bindings = self._deps.bindings
        if bindings.get(self.bot) is None:
            await bindings.refresh(self.bot)
        return bindings.get(self.bot)

    # conversations ----------------------------------------------------------------------------------

    async def _update_conversations(
        self, binding: Binding, opened: OpenRecord, addressed: list[AddressedMessage]
    ) -> list[AddressedMessage]:
        """Gives token and window to the users' conversations. Returns the messages that may be missing in the inbox.
        Raises Temporary, LeaseLost."""
        sequence = opened.written.sequence
        if opened.written.record.sandbox not in ("", binding.sandbox):
            return addressed  # messages from before the bot moved open no window in the new sandbox
        actors: list[ConversationActor] = []
        for user in dict.fromkeys(message.inbound.user for message in addressed):
            messages = [message for message in addressed if message.inbound.user == user]
            tell = partial(self._update_conversation, binding, user, messages, sequence)
            try:
                actor = await retry_on_bug(tell, self._clock.sleep, "inbound.crashed", bot=self.bot)
            except Crashed:
                for message in messages:
                    await self._end_crashed(message.inbound.raw, message.sandbox, message.inbound)
            else:
                actors.append(actor)
                if not (opened.is_left_over and actor.memory.has_dispatched_to(self.bot, sequence)):
                    continue
            addressed = [message for message in addressed if message.inbound.user != user]
        opened.actors = actors
        return addressed

    async def _update_conversation(
        self, binding: Binding, user: str, messages: list[AddressedMessage], sequence: int
    ) -> ConversationActor:
        """Raises Temporary, LeaseLost."""
        if not binding.user:
            await self._learn_user(binding, user)
        return await self._publishing.conversations.on_inbound(
            self._deps.bindings.get(self.bot) or binding,
            user,
            message=messages[-1].id,
            token=next((one.inbound.context_token for one in reversed(messages) if one.inbound.context_token), ""),
            written_ms=messages[-1].inbound.sent_at_ms,
            received_ms=messages[-1].received_ms,
            sequence=sequence,
        )

    async def _learn_user(self, binding: Binding, user: str) -> None:
        """Adds the user to a binding without one, and removes an older bot of the same user in the sandbox. Raises
        Temporary."""
        bindings = self._deps.bindings
        bound = bindings.of_sandbox(binding.sandbox)
        older = [other for other in bound if other.user == user and other.bot != binding.bot]

        def with_user(now: Binding) -> Binding | None:
            if now.user:
                return None
            known = older[0] if older else now
            return msgspec.structs.replace(now, user=user, in_after=known.in_after, out_after=known.out_after)

        await bindings.update(binding.bot, with_user)
        for other in older:  # WeChat has disabled it: one user has one bot
            detail = "The user is served by another bot now."
            await self._publishing.access.events.publish_binding_event(other.event("replaced", detail=detail))
            await bindings.remove(other.bot)

    # publishing -------------------------------------------------------------------------------------

    async def _publish_ready(self) -> None:
        """Publishes the messages that are ready, in order. If the first pending is not, waits for its media or for
        another record."""
        self._start_downloads()
        first = self._waiting[0]
        if not _is_ready(first):
            await self.changed.wait_until(lambda: bool(self._records) or self._stopped or _is_ready(first))
            return
        if first.crashes >= ATTEMPTS:
            await self._end_crashed(first.message.inbound.raw, first.message.sandbox, first.message.inbound)
            self._remove_finished([first])
            return
        if self._belongs_to_another(first.message):
            self._count(first.message.inbound.kind, "unbound")
            inbound, why = first.message.inbound, "The sandbox serves another user by now."
            await self._dead_letter(None, inbound.raw, inbound, why, reason="not_bound")
            self._remove_finished([first])
            return
        limit = 1 if self._is_one_by_one else PUBLISH_BATCH
        waiting = islice(self._waiting, limit)
        ready = list(
            takewhile(lambda pending: _is_ready(pending) and not self._belongs_to_another(pending.message), waiting)
        )
        try:
            await inbox.publish([_with_media(pending) for pending in ready], self._publishing)
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

    def _belongs_to_another(self, message: AddressedMessage) -> bool:
        """Whether the message's sandbox has only bots of other users by now, who must not see the message."""
        bindings = self._deps.bindings
        serves = bindings.get(self.bot)
        if serves is not None and serves.sandbox == message.sandbox:
            return False
        bound = bindings.of_sandbox(message.sandbox)
        return bool(bound) and all(binding.user not in ("", message.inbound.user) for binding in bound)

    def _remove_finished(self, finished: Sequence[PendingMessage]) -> None:
        """Removes the first messages of the queue, which are in the inbox or dead letters."""
        for pending in finished:
            self._waiting.popleft()
            pending.record.unpublished -= 1
        self._is_one_by_one = self._is_one_by_one and bool(self._waiting)
        self._close_done()

    def _close_done(self) -> None:
        """Closes the records whose messages are all in their inboxes."""
        done = list(takewhile(lambda opened: opened.is_triaged and not opened.unpublished, self._open))
        for opened in done:
            self._open.popleft()
            for actor in opened.actors:
                actor.note_dispatched(self.bot, opened.written.sequence)
            self._unsaved.append(opened)
            opened.messages = opened.triaged = None
            emptied = JournalRecord(is_continued=opened.written.record.is_continued)
            # frees the messages, since the bot may be silent for long
            opened.written = opened.written._replace(record=emptied)
            if len(self._unsaved) > MAX_UNSAVED:
                self._unsaved.popleft()
        self.changed.notify_all()

    async def _drop_published(self) -> None:
        """Drops the messages that are in their inbox, after a crash or a lost lease left that open. Raises Temporary,
        LeaseLost."""
        suspects = [waiting for waiting in self._waiting if waiting.is_suspect]
        self._ensure_owner()  # otherwise a new owner may publish after this read
        places, ids = await self._find_published(suspects)
        for waiting in suspects:
            waiting.is_suspect = False
            if waiting.message.place in places or waiting.message.id in ids:
                log.info("inbound.recovered", bot=self.bot, place=waiting.message.place)
                self._waiting.remove(waiting)
                waiting.record.unpublished -= 1
        self._close_done()

    async def _find_published(self, suspects: Sequence[PendingMessage]) -> tuple[set[str], set[str]]:
        """Journal positions and ids of the messages in the inboxes since the first suspect was stored. Raises
        Temporary."""
        names, history = self._publishing.access.names, self._publishing.access.history
        first = suspects[0].record.written
        if not first.time_ms:
            first = await self._deps.journal.get(self.bot, first.sequence) or first
        since_ms = first.time_ms - CLOCK_SKEW_MS
        places, ids = set(), set()
        for sandbox, count in Counter(pending.message.sandbox for pending in suspects).items():
            subject = names.inbox(sandbox)
            # usually pending message, the newest in its inbox: to read more, the server scans all other inboxes
            newest = await history.read_last_of_each(names.stream_in, [subject]) if count == 1 else []
            found = {stored.headers.get(H_JOURNAL, "") for stored in newest}
            if any(pending.message.place in found for pending in suspects if pending.message.sandbox == sandbox):
                places |= found
                continue
            async for stored in history.read(names.stream_in, subject, since_ms=since_ms):
                places.add(stored.headers.get(H_JOURNAL, ""))
                ids.add(stored.headers.get(H_MSG_ID, ""))
        return places, ids

    # media ------------------------------------------------------------------------------------------

    def _start_downloads(self) -> None:
        """Starts downloads for the oldest messages."""
        busy = sum(1 for waiting in self._waiting if waiting.work is not None and not waiting.work.done())
        for waiting in self._waiting:
            if busy >= CONCURRENT_DOWNLOADS or waiting.is_suspect or self._stopped:
                return
            if waiting.work is None and waiting.message.inbound.fetches:
                waiting.work = self._tasks.spawn(self._download_media(waiting))
                waiting.work.add_done_callback(self._on_downloaded)
                busy += 1

    def _on_downloaded(self, _: object) -> None:
        self._start_downloads()
        self.changed.notify_all()

    async def _download_media(self, waiting: PendingMessage) -> list[InboundItem]:
        """The items of a message, with their media or the reason why media are missing."""
        inbound = waiting.message.inbound
        found = await asyncio.gather(*(self._download_item(waiting, fetch) for fetch in inbound.fetches))
        items = list(inbound.items)
        for fetch, result in zip(inbound.fetches, found, strict=True):
            items[fetch.item] = with_media(items[fetch.item], result)
        return items

    async def _download_item(self, waiting: PendingMessage, fetch: MediaRef) -> DownloadResult:
        """Downloads the media of one item. Time in which the bus is unavailable does not count."""
        while True:
            left_s = waiting.until - self._clock.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    return await download(waiting.message, fetch, self._deps.downloading)
            except TimeoutError:
                missing = MediaUnavailable("timeout", again=True)
            except MediaUnavailable as exc:
                missing = exc
            if missing.reason not in ("timeout", "store") or not missing.again or not await self._wait_for_bus():
                log.info("media.missing", bot=self.bot, reason=missing.reason)
                return DownloadResult(reason=missing.reason)
            waiting.until = self._clock.monotonic() + self._deps.media_wait_s

    async def _wait_for_bus(self) -> bool:
        """Waits until the bus is available. Returns whether it was not."""
        began = self._clock.monotonic()
        await self._deps.media_writable()
        return self._clock.monotonic() > began + 0.01


def _is_ready(waiting: PendingMessage) -> bool:
    """Whether the message waits for no media."""
    return not waiting.message.inbound.fetches or (waiting.work is not None and waiting.work.done())


def _with_media(waiting: PendingMessage) -> AddressedMessage:
    """The message to publish. Re-raises an unexpected error of the download."""
    if waiting.work is None:
        return waiting.message
    inbound = msgspec.structs.replace(waiting.message.inbound, items=waiting.work.result())
    return msgspec.structs.replace(waiting.message, inbound=inbound)


def _crashed(bot: str, exc: BaseException) -> None:
    log.error("task.crashed", bot=bot, exc_info=exc)
