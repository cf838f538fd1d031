"""Carries out what `rules.step` decides for one conversation, and feeds what comes of it back.

Everything that a conversation waits for (a message of the user, a binding, a slot, an upload, an answer, time) is an
input in its mailbox. One task works the mailbox off and ends when it is empty. What is out (a request, an upload, a
read-back) has one task of its own, so that a message of the user is heard although a request hangs. The actor is the
only writer of the conversation's record.
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
"""The clock is looked at again after so long: it may be set, and the machine may sleep."""
SHORTEST_TIMER_S = 0.01
STORED_WITHIN_S = 1.0
"""What the user said is stored after so long: once for all that is said until then, and the inbox has by then."""


class _Alarm:
    """Calls a function once, at the time that was set last."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._handle is not None

    def set(self, in_s: float) -> None:
        """`in_s`: infinite for never."""
        self.cancel()
        if in_s < math.inf:
            in_s = min(LONGEST_TIMER_S, max(SHORTEST_TIMER_S, in_s))
            self._handle = asyncio.get_running_loop().call_later(in_s, self._on_time)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _on_time(self) -> None:
        self._handle = None
        self._ring()


class ConversationActor:
    """One conversation at work."""

    def __init__(self, conversation: Conversation, revision: int, shard: ShardPort, deps: ConversationDeps) -> None:
        self.memory = ConversationMemory(conversation, revision, shard, deps.store)
        self._shard = shard
        self._deps = deps
        self._work = OutstandingWork(self.memory, shard, deps, self.put)
        effects = EffectRunner(self.memory, shard, deps, self._work, self.put)
        self._mailbox = Mailbox(conversation.sandbox, effects.handle_event, self._on_empty, deps.turns)
        self._deadline = _Alarm(self._on_deadline)
        self._store_alarm = _Alarm(self._store_inbound)
        """Set while what the user said is not stored."""
        self._undispatched: dict[str, int] = {}
        """By bot: the newest sequence of its journal that was heard and is not in the inbox as a whole."""

    @property
    def state(self) -> Conversation:
        return self.memory.state

    # what others say --------------------------------------------------------------------------------

    def put(
        self,
        event: rules.Input,
        done: asyncio.Future[None] | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        """Queues an input; see Mailbox.put."""
        self._mailbox.put(event, done, is_wanted)

    def on_inbound(self, inbound: rules.InboundReceived) -> asyncio.Future[None]:
        """The user wrote: done once the conversation knows it. It raises LeaseLost, and what the rules raise."""
        self._undispatched[inbound.bot] = inbound.sequence
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.put(inbound, done)
        return done

    def refresh_bot(self) -> None:
        """Looks which bot serves the user now."""
        state = self.state
        self.put(rules.Bound(self._shard.bot_of(state.sandbox, state.user, state.record.bot)))

    def note_dispatched(self, bot: str, sequence: int) -> None:
        """The inbox has everything that the user said up to a sequence of the bot's journal."""
        if self._undispatched.get(bot, 0) <= sequence:
            self._undispatched.pop(bot, None)
        if self._mailbox.is_busy:  # behind what it has heard
            self.put(rules.Dispatched(bot, sequence))
        elif not self._mailbox.is_stopped:
            self.memory.state = rules.note_dispatched(self.state, bot, sequence)
            self._store_soon()

    async def hand_over(self) -> tuple[QueuedCommand, ...]:
        """Ends the conversation behind what its mailbox holds, and hands over its commands, in order. Cut off, a
        receipt that cannot be stored yet would be lost."""
        try:
            while self._mailbox.is_busy:
                await self._mailbox.wait_empty()
            return self.state.queue
        finally:
            self.stop()

    def try_stop(self) -> bool:
        """Ends the conversation if nothing waits, is out or is due, to be read back when it is needed. What was not
        stored is stored first, which takes a call more."""
        if self.tasks or self.state.queue or self._deadline.is_set or self._undispatched:
            return False
        if self.memory.is_dirty:
            self.put(rules.Rested())
            return False
        self.stop()
        return True

    @property
    def tasks(self) -> int:
        """How many work for it."""
        return self._work.tasks + self._mailbox.is_busy

    async def drain(self, grace_s: float) -> None:
        """Starts no request any more; one that is out gets `grace_s` seconds. Then the record is stored."""
        await self._work.drain(grace_s)
        await self._mailbox.wait_empty(grace_s)  # the answer is worked off, its receipt published
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
        """The shard is lost, or given away: everything ends now."""
        self._mailbox.stop()
        self._deadline.cancel()
        self._store_alarm.cancel()
        self._work.cancel()

    def _on_empty(self) -> None:
        now_ms = self._deps.clock.now_ms()
        self._deadline.set((rules.next_deadline_ms(self.state, now_ms, self._deps.policy) - now_ms) / 1000)
        self._store_soon()

    def _store_soon(self) -> None:
        if not self._store_alarm.is_set and not self.memory.is_inbound_stored:
            self._store_alarm.set(STORED_WITHIN_S)

    def _store_inbound(self) -> None:
        """Stores what the user said, unless a send has stored it meanwhile."""
        if not self.memory.is_inbound_stored:
            self.put(rules.Rested())

    def _on_deadline(self) -> None:
        self.refresh_bot()
        self.put(rules.Deadline())
