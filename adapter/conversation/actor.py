"""Carries out what `rules.step` decides for one conversation, and feeds what comes of it back.

Everything that a conversation waits for (a message of the user, a binding, a slot, an upload, an answer, time) is an
input in its mailbox. One task works the mailbox off and ends when it is empty. What is out (a request, an upload, a
read-back) has one task of its own, so that a message of the user is heard although a request hangs. The actor is the
only writer of the conversation's record.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import structlog

from adapter.conversation import rules
from adapter.conversation.effects import EffectRunner
from adapter.conversation.memory import ConversationMemory
from adapter.conversation.rules import Activity, Conversation, QueuedCommand
from adapter.conversation.shard import ConversationDeps, ShardPort
from adapter.conversation.work import OutstandingWork
from adapter.errors import BusRefused, LeaseLost, Temporary

log = structlog.get_logger()

LONGEST_TIMER_S = 3600.0
"""The clock is looked at again after so long: it may be set, and the machine may sleep."""
SHORTEST_TIMER_S = 0.01
STORED_WITHIN_S = 1.0
"""What the user said is stored after so long: once for all that is said until then, and the inbox has by then."""


class _Mail(NamedTuple):
    event: rules.Input
    done: asyncio.Future[None] | None
    is_wanted: Callable[[], bool] | None


class ConversationActor:
    """One conversation at work."""

    def __init__(self, conversation: Conversation, revision: int, shard: ShardPort, deps: ConversationDeps) -> None:
        self._memory = ConversationMemory(conversation, revision, shard, deps.store)
        self._shard = shard
        self._deps = deps
        self._work = OutstandingWork(self._memory, shard, deps, self.put)
        self._effects = EffectRunner(self._memory, shard, deps, self._work, self.put)
        self._mailbox: deque[_Mail] = deque()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._store_timer: asyncio.TimerHandle | None = None
        """Set while what the user said is not stored."""
        self._undispatched: dict[str, int] = {}
        """By bot: the newest sequence of its journal that was heard and is not in the inbox as a whole."""
        self._stopped = False

    @property
    def state(self) -> Conversation:
        return self._memory.state

    # what others say --------------------------------------------------------------------------------

    def put(
        self,
        event: rules.Input,
        done: asyncio.Future[None] | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        """Queues an input. `done` is set once what follows from it has happened, but for what is out then.
        `is_wanted`: see work.Put."""
        if self._stopped:
            _fail_waiter(done, self.state.sandbox)
            return
        self._mailbox.append(_Mail(event, done, is_wanted))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

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
        if self._task is not None:  # behind what it has heard
            self.put(rules.Dispatched(bot, sequence))
        elif not self._stopped:
            self._memory.state = rules.note_dispatched(self.state, bot, sequence)
            self._store_soon()

    def has_dispatched_to(self, bot: str, sequence: int) -> bool:
        """Whether the inbox has everything up to there."""
        return self.state.record.dispatched_to.get(bot, 0) >= sequence

    def is_stored_to(self, bot: str, sequence: int) -> bool:
        """Whether the stored record says so."""
        return self._memory.stored_dispatched_to(bot) >= sequence

    async def hand_over(self) -> tuple[QueuedCommand, ...]:
        """Ends the conversation behind what its mailbox holds, and hands over its commands, in order. Cut off, a
        receipt that cannot be stored yet would be lost."""
        try:
            while self._task is not None:
                await asyncio.wait([self._task])
            return self.state.queue
        finally:
            self.stop()

    def try_stop(self) -> bool:
        """Ends the conversation if nothing waits, is out or is due, to be read back when it is needed. What was not
        stored is stored first, which takes a call more."""
        if self.tasks or self._mailbox or self.state.queue or self._timer or self._undispatched:
            return False
        if self._memory.is_dirty:
            self.put(rules.Rested())
            return False
        self.stop()
        return True

    @property
    def tasks(self) -> int:
        """How many work for it."""
        return self._work.tasks + (self._task is not None)

    async def drain(self, grace_s: float) -> None:
        """Starts no request any more; one that is out gets `grace_s` seconds. Then the record is stored."""
        await self._work.drain(grace_s)
        if self._task is not None:  # the answer is worked off, its receipt published
            await asyncio.wait([self._task], timeout=grace_s)
        is_wanted = self._memory.has_record or not self._memory.is_inbound_stored
        if is_wanted and self._memory.is_dirty and not self._stopped:
            try:
                async with asyncio.timeout(grace_s):
                    await self._memory.save()
            except (Temporary, LeaseLost, BusRefused) as exc:
                log.warning("conversation.not_stored", sandbox=self.state.sandbox, reason=exc.reason)
            except TimeoutError:
                log.warning("conversation.not_stored", sandbox=self.state.sandbox, reason="timeout")
        self.stop()

    def stop(self) -> None:
        """The shard is lost, or given away: everything ends now."""
        self._stopped = True
        self._set_timer(math.inf)
        if self._store_timer is not None:
            self._store_timer.cancel()
        self._work.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        for mail in self._mailbox:
            _fail_waiter(mail.done, self.state.sandbox)
        self._mailbox.clear()

    # the mailbox ------------------------------------------------------------------------------------

    async def _run(self) -> None:
        done: asyncio.Future[None] | None = None
        try:
            while self._mailbox:
                await self._deps.turns.wait_turn()
                event, done, is_wanted = self._mailbox.popleft()
                if is_wanted is not None and not is_wanted():
                    continue
                try:
                    await self._handle(event)
                except Exception as exc:  # what is behind in the mailbox goes on
                    log.exception("conversation.crashed", sandbox=self.state.sandbox, input=type(event).__name__)
                    if done is not None and not done.done():
                        done.set_exception(exc)
                if done is not None and not done.done():
                    done.set_result(None)
        finally:
            self._task = None
            _fail_waiter(done, self.state.sandbox)
        if not self._stopped:
            now_ms = self._deps.clock.now_ms()
            self._set_timer(rules.next_deadline_ms(self.state, now_ms, self._deps.policy) - now_ms)
            self._store_soon()

    def _store_soon(self) -> None:
        if self._store_timer is None and not self._memory.is_inbound_stored:
            self._store_timer = asyncio.get_running_loop().call_later(STORED_WITHIN_S, self._store_dispatched)

    def _store_dispatched(self) -> None:
        """Stores what the user said, unless a send has stored it meanwhile."""
        self._store_timer = None
        if not self._memory.is_inbound_stored:
            self.put(rules.Rested())

    def _set_timer(self, in_ms: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if in_ms < math.inf:
            seconds = min(LONGEST_TIMER_S, max(SHORTEST_TIMER_S, in_ms / 1000))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.refresh_bot()
        self.put(rules.Deadline())

    async def _handle(self, event: rules.Input) -> None:
        """One step. An input that makes the rules raise ends the commands that it is about as dead letters."""
        try:
            await self._effects.apply_event(event)
        except Exception as exc:
            log.exception("conversation.crashed", sandbox=self.state.sandbox, input=type(event).__name__)
            if isinstance(event, rules.Stored):  # they are in no queue yet
                for command in event.commands:
                    await self._effects.end_crashed(command, exc)
            elif isinstance(event, rules.Answer) and self.state.activity is Activity.SENDING:
                await self._effects.apply_event(rules.Unanswered())  # no other answer comes
            else:
                await self._effects.apply_event(rules.Crashed(type(exc).__name__))
                if isinstance(event, rules.InboundReceived):  # its sender counts on it that it is stored
                    await self._effects.apply_event(event)


def _fail_waiter(done: asyncio.Future[None] | None, sandbox: str) -> None:
    if done is not None and not done.done():
        done.set_exception(LeaseLost("shard_lost", sandbox))
