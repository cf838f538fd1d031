"""Publishes window events: something can be sent to a user, little is left, or nothing. No send waits for it.

What was told is kept in the user's record, written with whatever is written next; after a crash the newest event on
the bus says what was told last. Time closes windows while nothing happens, so open ones lie in a heap.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import Any

import msgspec
import structlog

from adapter import window
from adapter.bindings.registry import Bindings
from adapter.contexts import Contexts, Peer
from adapter.contract import WindowEvent
from adapter.errors import UNDECODABLE, AdapterError, LeaseLost, Temporary
from adapter.events import Events
from adapter.names import Names, peer_key, peer_of, shard_of
from adapter.ports import History, Stored
from adapter.records import Binding, Context
from adapter.replicas.leases import Leases
from adapter.tasks import Tasks
from adapter.timing import Clock, first_of

log = structlog.get_logger()

LOOKS_PER_S = 200
"""Users looked at after a start or a take-over; thousands at once would hold up what people wait for."""
LONGEST_S = 60.0
"""A look at the clock at least so often: it may be set, and the machine may sleep."""
LEFT_OVER = 8
"""Entries of users who are gone that the heap may hold besides as many as count; then it is made anew."""
KEPT_HOURS = 25
"""No window is open longer, so that no event which still counts is older."""


class WindowEvents:
    """The windows of the users that this replica works for, and what their sandboxes know of them."""

    def __init__(
        self,
        *,
        contexts: Contexts,
        bindings: Bindings,
        leases: Leases,
        events: Events,
        history: History,
        names: Names,
        clock: Clock,
        rules: window.Rules,
    ) -> None:
        self._contexts = contexts
        self._bindings = bindings
        self._leases = leases
        self._events = events
        self._history = history
        self._names = names
        self._clock = clock
        self._rules = rules
        self._due: list[tuple[int, str]] = []
        """Heap of the times at which windows close."""
        self._watched: dict[str, int] = {}
        """By user: the entry of the heap that counts."""
        self._throttled: set[str] = set()
        self._unseen: dict[str, None] = {}
        """Bots to be looked at, the oldest first."""
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._tasks = Tasks(_unsaved)
        bindings.listen(self._on_binding)

    # what others say --------------------------------------------------------------------------------

    def look(self, peer: Peer) -> None:
        """The user's record changed, and no request of theirs waits for its answer: tells what there is to tell."""
        binding = self._bindings.get(peer.bot)
        if binding is None:
            return
        found = window.phase(peer.context, self._clock.now_ms(), self._rules)
        if found.reason == "throttled":
            self._throttled.add(peer.bot)
        else:
            self._throttled.discard(peer.bot)
        if found.name != "closed":
            self._watch(peer)
        if not peer.told_sure:
            if (peer.telling, peer.told_in) != (found.name, peer.context.inbound_id):
                self._tasks.spawn(self._make_sure(peer, binding))
            return
        change = window.change(peer.telling, found.name)
        knows: window.Name = found.name if change or peer.telling else ""
        if change:
            self._tasks.spawn(self._tell(peer, peer.context, self._event(peer, binding, change, found.reason), knows))
        elif peer.telling == peer.told:
            peer.told, peer.told_in = knows, peer.context.inbound_id
        peer.telling = knows

    def adopt(self, bot: str) -> None:
        """This replica polls the bot from now on: queues a look at its user's window."""
        self._unseen[bot] = None
        self._taken.set()

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        """Forgets a bot that is bound no more: nothing is told of its user."""
        if after is not None:
            return
        self._throttled.discard(bot)
        if before is not None:
            self._watched.pop(peer_key(bot, before.user), None)
        if len(self._due) > 2 * len(self._watched) + LEFT_OVER:
            self._due = [(due_ms, key) for key, due_ms in self._watched.items()]
            heapq.heapify(self._due)

    def throttled(self, bot: str) -> bool:
        """Whether iLink takes no messages to the bot's user (-2)."""
        return bot in self._throttled

    async def flush(self) -> None:
        """Returns once everything that was seen is told."""
        await self._tasks.ended()

    # telling ----------------------------------------------------------------------------------------

    def _event(self, peer: Peer, binding: Binding, change: Any, reason: str) -> WindowEvent:
        shown = window.shown(peer.context, self._clock.now_ms(), self._rules)
        return WindowEvent(
            sandbox=binding.sandbox, bot=peer.bot, user=peer.user, change=change, reason=reason, window=shown
        )

    async def _tell(self, peer: Peer, context: Context, event: WindowEvent, knows: window.Name) -> None:
        key = peer_key(peer.bot, peer.user)
        ident = f"window:{key}:{context.inbound_id}:{event.change}:{event.reason}:{context.used}"
        await self._events.window(event, msg_id=ident)
        peer.told, peer.told_in = knows, context.inbound_id
        log.debug("window.told", bot=peer.bot, change=event.change, reason=event.reason)
        if event.reason == "window_closed":  # nothing else will be written for a while
            await self._contexts.save(peer, lambda now: now)

    async def _make_sure(self, peer: Peer, binding: Binding) -> None:
        """Asks the bus what was told last, as the record may be older."""
        while not peer.told_sure:
            try:
                last = await self._last_told(peer, binding)
            except Temporary as exc:
                log.info("window.waits", bot=peer.bot, reason=exc.reason)
                await self._clock.sleep(0.5)
                continue
            if not peer.told_sure:
                peer.told = peer.telling = last or peer.told
                peer.told_sure = True
        self.look(peer)

    async def _last_told(self, peer: Peer, binding: Binding) -> window.Name:
        stream, subject = self._names.stream_event, self._names.event(binding.sandbox, "window")
        stored = await self._history.last(stream, subject)
        if stored is None:
            return ""
        told = _told(stored, peer)
        if told:
            return told
        found: window.Name = ""
        since_ms = self._clock.now_ms() - KEPT_HOURS * 3_600_000
        async for stored in self._history.read(stream, subject, since_ms=since_ms):
            found = _told(stored, peer) or found
        return found

    # time -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_forever())
            group.create_task(self._adopt_forever())

    def _watch(self, peer: Peer) -> None:
        """A later closing needs no second entry: the first one finds that it is too early."""
        key = peer_key(peer.bot, peer.user)
        due_ms = window.closes_at_ms(peer.context, self._rules)
        if key not in self._watched or due_ms < self._watched[key]:
            self._watched[key] = due_ms
            heapq.heappush(self._due, (due_ms, key))
            self._news.set()

    async def _watch_forever(self) -> None:
        while True:
            self._news.clear()
            while self._due and self._due[0][0] <= self._clock.now_ms():
                due_ms, key = heapq.heappop(self._due)
                if self._watched.get(key) == due_ms:
                    del self._watched[key]
                    await self._look_at(*peer_of(key))
            wait_s = LONGEST_S
            if self._due:
                wait_s = min(LONGEST_S, max(0.001, (self._due[0][0] - self._clock.now_ms()) / 1000))
            await first_of(self._news, wait_s)

    async def _adopt_forever(self) -> None:
        while True:
            self._taken.clear()
            while self._unseen:
                bot = next(iter(self._unseen))
                del self._unseen[bot]
                binding = self._bindings.get(bot)
                if binding is not None and binding.user:
                    await self._look_at(bot, binding.user)
                    await self._clock.sleep(1 / LOOKS_PER_S)
            await first_of(self._taken, None)

    async def _look_at(self, bot: str, user: str) -> None:
        """A look from outside; nothing where another replica works for the bot."""
        while True:
            binding = self._bindings.get(bot)
            try:
                if binding is None:
                    return
                self._leases.check(shard_of(binding.sandbox))
                self.look(await self._contexts.peer(bot, user))
            except LeaseLost:
                return
            except Temporary as exc:
                log.info("window.waits", bot=bot, reason=exc.reason)
                await self._clock.sleep(0.5)
            else:
                return


def _told(stored: Stored, peer: Peer) -> window.Name:
    """What the peer's sandbox knows after a message among its events; "": it speaks of another, or is not ours."""
    try:
        event = msgspec.json.decode(stored.data, type=WindowEvent)
    except UNDECODABLE:
        return ""
    return window.told_by(event.change) if (event.bot, event.user) == (peer.bot, peer.user) else ""


def _unsaved(exc: BaseException) -> None:
    if isinstance(exc, AdapterError):
        log.info("window.unsaved", reason=exc.reason)  # the bus says what was told
    else:
        log.error("task.crashed", task="windows", exc_info=exc)
