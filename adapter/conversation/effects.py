"""Makes the steps of a conversation, and carries their effects out in order."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from adapter.conversation import rules
from adapter.conversation.memory import ConversationMemory
from adapter.conversation.rules import Activity, CommandResult, QueuedCommand
from adapter.conversation.shard import ConversationDeps, ShardPort
from adapter.conversation.work import OutstandingWork, repeat_until_done

log = structlog.get_logger()

_WAITS = (Activity.LOADING, Activity.UPLOADING, Activity.AWAITING_SLOT, Activity.CHECKING_SESSION)


class EffectRunner:
    """An effect that raises what nobody expects, several times, ends the command that it was for."""

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
        """Sequences of commands whose receipts could not even be made: they are not acknowledged."""

    async def handle_event(self, event: rules.Input) -> None:
        """One step. An input that makes the rules raise ends the commands that it is about as dead letters."""
        try:
            await self._apply_event(event)
        except Exception as exc:
            log.exception("conversation.crashed", sandbox=self._memory.state.sandbox, input=type(event).__name__)
            if isinstance(event, rules.Stored):  # they are in no queue yet
                for command in event.commands:
                    await self._end_crashed(command, exc)
            elif isinstance(event, rules.Answer) and self._memory.state.activity is Activity.SENDING:
                await self._apply_event(rules.Unanswered())  # no other answer comes
            else:
                await self._apply_event(rules.Crashed(type(exc).__name__))
                if isinstance(event, rules.InboundReceived):  # its sender counts on it that it is stored
                    await self._apply_event(event)

    async def _apply_event(self, event: rules.Input) -> None:
        """What the rules make of an input, and all that follows from it, but for what is out then."""
        now_ms = self._deps.clock.now_ms()
        self._memory.state, effects = rules.step(self._memory.state, event, now_ms, self._deps.policy)
        if self._memory.state.activity not in _WAITS:
            self._work.cancel_wait()
        for effect in effects:
            if (crash := await self._perform_until_done(effect)) is None:
                continue
            if not isinstance(effect, rules.Save):
                await self._on_effect_crashed(effect, crash)
            elif any(isinstance(one, rules.Post) for one in effects):
                self._work.release_slot()
                self._put(rules.NotTaken("", 0, is_unreached=True))
                self._put(rules.Crashed(type(crash).__name__))
                return  # a request must not leave that is not stored

    async def _on_effect_crashed(self, effect: rules.Effect, crash: Exception) -> None:
        """What a bug keeps from being done: the command that it was for ends as a dead letter."""
        match effect:
            case rules.PublishReceipt(command, result):
                if result.outcome == "parked":  # it is in the queue yet
                    self._put(rules.Crashed(type(crash).__name__, command.sequence))
                    return
                if result.reason != "crashed":
                    await self._end_crashed(command, crash, result)
                self._unreceipted.add(command.sequence)  # ended just now, or not at all
                self._shard.release_body(command)  # those behind it need its share of the memory
            case rules.SetTyping(rules.QueuedCommand() as command):  # it is in the queue no more
                await self._end_crashed(command, crash)
            case rules.RequestSlot() | rules.Load() | rules.Upload() | rules.CheckSession() | rules.Post():
                self._put(rules.Crashed(type(crash).__name__))
            case _:
                pass  # the first command of the queue does not wait for it

    async def _end_crashed(
        self, command: QueuedCommand, crash: Exception, undelivered: CommandResult | None = None
    ) -> None:
        """`undelivered`: its result that could not be published. What may be on the phone is not called dead."""
        result = CommandResult("dead_lettered", "crashed", type(crash).__name__)
        if undelivered is not None and undelivered.may_be_sent:
            result = CommandResult(
                undelivered.outcome, message_ids=undelivered.message_ids, attempts=undelivered.attempts
            )
        if await self._perform_until_done(rules.PublishReceipt(command, result)) is None:
            await self._perform_until_done(rules.Acknowledge(command))

    async def _perform_until_done(self, effect: rules.Effect) -> Exception | None:
        """None once it is done; what it raised several times, if that is a bug."""
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
                    shard.ensure_owner()  # only the owner may say so: the next one may have more luck
                await shard.publish_receipt(command, result, state)
            case rules.Acknowledge(command, is_duplicate):
                if command.sequence not in self._unreceipted:
                    await shard.acknowledge(command, is_duplicate=is_duplicate)
            case rules.ReleaseSlot():
                self._work.release_slot()
            case rules.ReleaseBody(command):
                shard.release_body(command)
            case rules.SetTyping(typed, is_on):
                shard.set_typing(state, typed, is_on=is_on)
            case rules.Announce():
                shard.announce(state, effect)
            case _:
                self._work.start(effect)
