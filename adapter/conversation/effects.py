"""Applies inputs to a conversation, and carries out their effects in order."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from adapter.conversation import rules, window
from adapter.conversation.memory import ConversationMemory
from adapter.conversation.rules import Activity, CommandResult, QueuedCommand
from adapter.conversation.shard import ConversationDeps, ShardPort
from adapter.conversation.work import OutstandingWork, repeat_until_done
from adapter.errors import Temporary

log = structlog.get_logger()

_WAITS = (Activity.LOADING, Activity.UPLOADING, Activity.AWAITING_SLOT, Activity.CHECKING_SESSION)


class EffectRunner:
    """Runs effects. One that raises an unexpected error several times ends its command."""

    def __init__(
        self,
        memory: ConversationMemory,
        shard: ShardPort,
        deps: ConversationDeps,
        work: OutstandingWork,
        put: Callable[[rules.Input], None],
    ) -> None:
        self._memory = memory
        self._shard = shard
        self._deps = deps
        self._work = work
        self._put = put
        self._unreceipted: set[int] = set()
        """Sequences of commands whose receipts could not be made; they are not acknowledged."""

    async def handle_event(self, event: rules.Input) -> None:
        """Processes one input. If the rules raise on it, its commands end as dead letters."""
        try:
            await self._apply_event(event)
        except Exception as exc:
            log.exception("conversation.crashed", sandbox=self._memory.state.sandbox, input=type(event).__name__)
            if isinstance(event, rules.Stored):  # they are not in the queue
                for command in event.commands:
                    await self._end_crashed(command, exc)
            elif isinstance(event, rules.Answer) and self._memory.state.activity is Activity.SENDING:
                await self._apply_event(rules.Unanswered())  # the request gets no other answer
            else:
                await self._apply_event(rules.Crashed(type(exc).__name__))
                if isinstance(event, rules.InboundReceived):
                    await self._apply_event(event)

    def apply_at_once(self, event: rules.Input) -> bool:
        """Applies an input that has no effects, as most messages of users. False: nothing is changed, and
        `handle_event` has to process the input."""
        try:
            state, effects = rules.step(self._memory.state, event, self._deps.clock.now_ms(), self._deps.policy)
        except Exception:  # noqa: BLE001 - handle_event meets it again, and reports it
            return False
        if effects:
            return False
        self._memory.state = state
        return True

    async def _apply_event(self, event: rules.Input) -> None:
        """Applies one input and carries out its effects. Long ones continue in the background (OutstandingWork)."""
        if isinstance(event, rules.Stored):
            await self._look_behind()
        now_ms, state = self._deps.clock.now_ms(), self._memory.state
        has_slot = isinstance(event, rules.Stored) and self._acquires_slot_for(event)
        try:
            state, effects = rules.step(
                rules.with_slot(state) if has_slot else state, event, now_ms, self._deps.policy
            )
        except Exception:
            if has_slot:
                self._work.release_slot()
            raise
        self._memory.state = state
        if self._memory.state.activity not in _WAITS:
            self._work.cancel_wait()
        for effect in effects:
            if (crash := await self._perform_until_done(effect)) is None:
                continue
            if not isinstance(effect, rules.Save):
                await self._on_effect_crashed(effect, crash)
            elif any(isinstance(effect, rules.Post) for effect in effects):
                self._work.release_slot()
                self._put(rules.NotTaken("", 0, is_unreached=True))
                self._put(rules.Crashed(type(crash).__name__))
                return  # a request must not be made before it is stored

    async def _look_behind(self) -> None:
        """Before a command is parked or refused for want of a window: another replica may have published what opens
        it."""
        state, policy = self._memory.state, self._deps.policy.window
        if not window.send_blocker(state.record, self._deps.clock.now_ms(), policy):
            return
        try:
            newest = await self._shard.newest_inbound(state)
        except Temporary as exc:
            log.info("conversation.retrying", sandbox=state.sandbox, work="look", reason=exc.reason)
            return
        if newest is not None:
            await self._apply_event(newest)

    def _acquires_slot_for(self, stored: rules.Stored) -> bool:
        """Takes a slot before the step that would ask for it, if there is one at once."""
        try:
            return rules.may_send_at_once(self._memory.state, stored) and self._work.try_acquire_slot()
        except Exception:  # a bug: the step asks for the slot
            log.exception("conversation.crashed", sandbox=self._memory.state.sandbox, work="slot")
            return False

    async def _on_effect_crashed(self, effect: rules.Effect, crash: Exception) -> None:
        """Ends the command of an effect that a bug prevents, as a dead letter."""
        match effect:
            case rules.PublishReceipt(command, result):
                if result.outcome == "parked":  # the command is still in the queue
                    self._put(rules.Crashed(type(crash).__name__, command.sequence))
                    return
                if result.reason != "crashed":
                    await self._end_crashed(command, crash, result)
                self._unreceipted.add(command.sequence)  # ended by `_end_crashed`, or not at all
                self._shard.release_body(command)  # frees its share of the memory for other commands
            case rules.RequestSlot() | rules.Load() | rules.Upload() | rules.CheckSession() | rules.Post():
                self._put(rules.Crashed(type(crash).__name__))
            case _:
                pass  # the head does not wait for this effect

    async def _end_crashed(
        self, command: QueuedCommand, crash: Exception, undelivered: CommandResult | None = None
    ) -> None:
        """`undelivered`: the result that could not be published. A command that may be sent is no dead letter."""
        result = CommandResult("dead_lettered", "crashed", type(crash).__name__)
        if undelivered is not None and undelivered.may_be_sent:
            result = CommandResult(
                undelivered.outcome, message_ids=undelivered.message_ids, attempts=undelivered.attempts
            )
        if await self._perform_until_done(rules.PublishReceipt(command, result)) is None:
            await self._perform_until_done(rules.Acknowledge(command))

    async def _perform_until_done(self, effect: rules.Effect) -> Exception | None:
        """None: done. The exception, if a bug raised it in every attempt."""
        return await repeat_until_done(
            type(effect).__name__,
            lambda: self._perform_effect(effect),
            self._memory.state.sandbox,
            self._shard,
            self._deps.clock,
        )

    async def _perform_effect(self, effect: rules.Effect) -> None:
        """Raises Temporary, LeaseLost, BusRefused."""
        shard, state = self._shard, self._memory.state
        match effect:
            case rules.Save():
                await self._memory.save()
            case rules.PublishReceipt(command, result):
                if not result.is_sent:
                    shard.ensure_owner()  # another owner may still send it
                await shard.publish_receipt(command, result, state)
            case rules.Acknowledge(command, is_duplicate):
                if command.sequence not in self._unreceipted:
                    await shard.acknowledge(command, is_duplicate=is_duplicate)
            case rules.ReleaseSlot():
                self._work.release_slot()
            case rules.ReleaseBody(command):
                shard.release_body(command)
            case rules.SetTyping(is_on=True):
                shard.show_typing(state.sandbox, self._memory.serving_bot, state.user, state.record.token)
            case rules.SetTyping():
                shard.hide_typing(state.sandbox, state.user)
            case _:
                self._work.start(effect)
