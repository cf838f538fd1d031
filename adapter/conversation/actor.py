"""The actor of one conversation: it applies inputs by `rules.step` and carries out the effects.

Everything that happens to a conversation is an input in its mailbox: a message of the user, a stored command, a
change of the binding, a slot, an upload, an answer, a deadline. One task processes the mailbox and ends when it is
empty; an idle conversation has no task. A request, an upload or a read of bodies runs in a task of its own
(`OutstandingWork`), so that an inbound message is processed while a request hangs. Its result is another input.

Placement calls `put`, the pollers call `on_inbound`. The shard ends the actor with `try_stop` when
it is idle, `drain` when the shard is handed over, and `stop` when the shard is lost. The actor is the only writer of
the conversation's record, and never acts without the shard's lease.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import structlog

from adapter.conversation import rules
from adapter.conversation.effects import EffectRunner
from adapter.conversation.mailbox import Mailbox
from adapter.conversation.memory import ConversationMemory
from adapter.conversation.rules import Conversation, QueuedCommand
from adapter.conversation.shard import ConversationDeps, ShardPort
from adapter.conversation.work import OutstandingWork
from adapter.errors import BusRefused, LeaseLost, Temporary

log = structlog.get_logger()

LONGEST_TIMER_S = 3600.0
"""Longest timer, since the clock may be set and the machine may sleep."""
SHORTEST_TIMER_S = 0.01
STORED_WITHIN_S = 1.0
"""Delay before an inbound message is stored in the record. It covers later messages."""


class _Alarm:
    """Calls a function once, at the time that was set last."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._due = math.inf
        """By the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        """It may expire before `_due`, since most alarms are put off again and again."""

    @property
    def is_set(self) -> bool:
        return self._due < math.inf

    def set(self, in_s: float) -> None:
        """`in_s`: seconds from now; inf: never."""
        if in_s == math.inf:
            self._due = in_s
            return
        loop = asyncio.get_running_loop()
        self._due = loop.time() + min(LONGEST_TIMER_S, max(SHORTEST_TIMER_S, in_s))
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = loop.call_at(self._due, self._on_time)

    def stop(self) -> None:
        """Never rings again, and lets go of the function."""
        self._due, self._ring = math.inf, _ignore
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        if self._due == math.inf:
            return
        if loop.time() < self._due:
            self._timer = loop.call_at(self._due, self._on_time)
            return
        self._due = math.inf
        self._ring()


def _ignore() -> None: ...


class ConversationActor:
    """Processes the inputs of one conversation."""

    def __init__(self, conversation: Conversation, revision: int, shard: ShardPort, deps: ConversationDeps) -> None:
        self.memory = ConversationMemory(conversation, revision, shard, deps.store)
        self._shard = shard
        self._deps = deps
        self._mailbox = Mailbox(conversation.sandbox, self._on_empty, deps.turns)
        self._work = OutstandingWork(self.memory, shard, deps, self._mailbox.put)
        effects = EffectRunner(self.memory, shard, deps, self._work, self._mailbox.put)
        self._mailbox.handle = effects.handle_event
        self._apply_at_once = effects.apply_at_once
        self._deadline = _Alarm(self._on_deadline)
        self._store_alarm = _Alarm(self._store_inbound)
        """Set while the record lacks an inbound message."""
        self.holds = 0
        """Pollers that are publishing a message of the user, which the conversation takes then."""

    @property
    def state(self) -> Conversation:
        return self.memory.state

    # for others -------------------------------------------------------------------------------------

    def put(self, event: rules.Input, done: asyncio.Future[None] | None = None) -> None:
        """Queues an input; see Mailbox.put."""
        self._mailbox.put(event, done)

    def on_inbound(self, inbound: rules.InboundReceived) -> None:
        """Takes a message of the user: at once if nothing else is to be done."""
        if not self._mailbox.is_busy and not self._mailbox.is_stopped and self._apply_at_once(inbound):
            self._store_soon()  # a message that has no effects puts no deadline forward
        else:
            self.put(inbound)

    def on_repeat(self, message: str, token: str) -> None:
        """iLink has repeated a message, possibly with a newer token."""
        self.memory.state = rules.renew_token(self.state, message, token)
        self._store_soon()

    @property
    def is_stopped(self) -> bool:
        """It takes nothing any more: the shard is another replica's, or the user is silent."""
        return self._mailbox.is_stopped

    def refresh_bot(self) -> None:
        """Checks which bot serves the user now."""
        state = self.state
        self.put(rules.Bound(self._shard.bot_of(state.sandbox, state.user, state.record.bot)))

    async def hand_over(self) -> tuple[QueuedCommand, ...]:
        """Stops after the mailbox is processed, and returns the commands in order. A sudden stop would lose a receipt
        that cannot be stored yet."""
        try:
            while self._mailbox.is_busy:
                await self._mailbox.wait_empty()
            return self.state.queue
        finally:
            self.stop()

    def try_stop(self) -> bool:
        """Stops if nothing waits, is under way or is due. An unsaved record is stored first; then another call is
        needed."""
        if self.tasks or self.state.queue or self._deadline.is_set or self.holds:
            return False
        if self.memory.is_dirty:
            self.put(rules.Rested())
            return False
        self.stop()
        return True

    @property
    def tasks(self) -> int:
        """Number of tasks that work for the conversation."""
        return self._work.tasks + self._mailbox.is_busy

    async def drain(self, grace_s: float) -> None:
        """Starts no more requests, gives the current one `grace_s` seconds, stores the record, and stops."""
        await self._work.drain(grace_s)
        await self._mailbox.wait_empty(grace_s)  # the answer is processed and its receipt published
        is_wanted = self.memory.has_record or not self.memory.is_inbound_stored
        if is_wanted and self.memory.is_dirty and not self._mailbox.is_stopped:
            try:
                async with asyncio.timeout(grace_s):
                    await self.memory.save()
            except (Temporary, LeaseLost, BusRefused) as exc:
                log.warning("conversation.not_stored", sandbox=self.state.sandbox, reason=exc.reason)
            except TimeoutError:
                log.warning("conversation.not_stored", sandbox=self.state.sandbox, reason="timeout")
        self.stop()

    def stop(self) -> None:
        """Stops at once, since the shard is lost or handed over."""
        self._mailbox.stop()
        self._deadline.stop()
        self._store_alarm.stop()
        self._work.cancel()

    def _on_empty(self) -> None:
        now_ms = self._deps.clock.now_ms()
        self._deadline.set((rules.next_deadline_ms(self.state, now_ms, self._deps.policy) - now_ms) / 1000)
        self._store_soon()

    def _store_soon(self) -> None:
        if not self._mailbox.is_stopped and not self._store_alarm.is_set and not self.memory.is_inbound_stored:
            self._store_alarm.set(STORED_WITHIN_S)

    def _store_inbound(self) -> None:
        """Stores an inbound message, unless a send has stored it meanwhile."""
        if not self.memory.is_inbound_stored:
            self.put(rules.Rested())

    def _on_deadline(self) -> None:
        self.refresh_bot()
        self.put(rules.Deadline())
