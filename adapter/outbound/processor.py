"""One shard while this replica owns it: its commands, its conversations, and its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract import messages as contract
from adapter.contract.records import Binding
from adapter.conversation import rules, window
from adapter.conversation.actor import ConversationActor
from adapter.conversation.commands import Limits
from adapter.conversation.rules import CommandResult, Conversation, InboundReceived
from adapter.conversation.shard import ConversationDeps, Folds
from adapter.errors import Crashed, RecordTooNew
from adapter.kit.tasks import TaskSet
from adapter.observability.events import BusAccess
from adapter.outbound.endings import CommandEndings, Draining
from adapter.outbound.intake import CommandIntake
from adapter.outbound.ledger import CommandLedger
from adapter.outbound.open_conversations import OpenConversations
from adapter.outbound.placement import CommandPlacement
from adapter.outbound.reading import BodyLoader, CommandReader
from adapter.outbound.receipts import Address, Receipts
from adapter.outbound.shard import OwnedShard, Sessions, ShardBots, ShardLease
from adapter.outbound.typing_indicator import TypingIndicators
from adapter.ownership.leases import Leases
from adapter.ports import Account

log = structlog.get_logger()

TYPING_DRAIN_S = 5.0
"""Time to hide typing indicators at the end."""
CANCEL_GRACE_S = 1.0
"""Time for cancelled tasks to end."""


class OutboundDeps(NamedTuple):
    """What the shards of a replica need."""

    access: BusAccess
    conversation: ConversationDeps
    limits: Limits
    receipts: Receipts
    bindings: Bindings
    leases: Leases
    sessions: Sessions
    account: Callable[[Binding], Account]
    """Raises Refused("token_key")."""
    new_folds: Callable[[Callable[[str, str, InboundReceived], None]], Folds]
    """Called for each shard that is taken, see `inbound.fold.Folds`."""


class ShardCommandProcessor:
    """Builds the parts of a shard, passes changes on to its conversations, and stops them."""

    def __init__(self, shard: int, deps: OutboundDeps) -> None:
        self.shard = shard
        self._deps = deps
        self._tasks = TaskSet(partial(_report, shard))
        self._draining = asyncio.Event()
        self._lease = ShardLease(shard, deps.leases, self._draining)
        self.typing = TypingIndicators(deps.conversation.chat, deps.conversation.clock, self._lease.check)
        clock, metrics = deps.conversation.clock, deps.conversation.metrics
        access = deps.access
        self.commands = CommandLedger(deps.receipts, access.events, access.history, access.names, clock, metrics)
        self._endings = CommandEndings(self.commands, self._lease.check, self._draining, self._tasks)

        def shown(state: Conversation) -> contract.Window:
            return window.visible_window(state.record, clock.now_ms(), deps.conversation.policy.window)

        self.folds = deps.new_folds(self._on_folded)
        self.owned = OwnedShard(
            self._lease,
            ShardBots(deps.bindings, deps.sessions, deps.account),
            deps.sessions,
            self.folds,
            self.commands,
            BodyLoader(access.history, access.names, deps.limits, clock),
            self._endings,
            self.typing,
            shown,
            self._tasks,
        )
        self._conversations = OpenConversations(self.owned, self.folds, deps.conversation, self._draining)
        reader = CommandReader(deps.limits, metrics)
        self.intake = CommandIntake(
            self.commands, reader, access.history, access.names, clock, metrics, self._draining, self._tasks
        )
        self.placement = CommandPlacement(
            self._conversations,
            deps.bindings,
            deps.conversation.store,
            deps.receipts,
            self.commands,
            self._endings,
            self._tasks,
        )
        reader.on_command = self.placement.put
        reader.on_unreadable = self._endings.end_soon

    # changes ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ConversationActor]:
        return iter(self._conversations)

    async def conversation(self, binding: Binding, user: str) -> ConversationActor:
        """The conversation of a bot's user, loaded the first time. Raises Temporary."""
        return await self._conversations.open(binding.sandbox, user, binding.bot)

    def show_typing(self, binding: Binding, user: str, context_token: str) -> None:
        self.owned.show_typing(binding.sandbox, binding.bot, user, context_token)

    def _on_folded(self, sandbox: str, user: str, newest: InboundReceived) -> None:
        """Another owner published a message, and the conversation may be open here already."""
        if actor := self._conversations.get(sandbox, user):
            actor.on_inbound(newest)

    async def _wake(self, binding: Binding) -> None:
        """Has the conversation of a bot look at its binding. A record that only a newer replica knows stays as it is.
        Raises Temporary."""
        if binding.user:
            with contextlib.suppress(RecordTooNew):
                (await self.conversation(binding, binding.user)).refresh_bot()

    def on_binding(self, sandbox: str, bot: str, users: Collection[str]) -> None:
        """Handles a changed binding, or a change of its token's state. `users`: its users before and after."""
        binding = self._deps.bindings.serving(bot)
        if binding is None or binding.sandbox != sandbox:
            self.folds.forget(sandbox)
        else:
            self._conversations.forget_unserved(sandbox)
        if binding is not None and binding.sandbox == sandbox and binding.user:
            unknown = self._conversations.take_unknown(sandbox, bot)
            if unknown is not None:
                self._tasks.spawn(self._move(binding, unknown))
        for actor in self._conversations.of_sandbox(sandbox):  # a sandbox may have thousands of users
            state = actor.state
            if state.user in users or bot in (state.record.bot, state.bot and state.bot.id):
                actor.refresh_bot()

    async def end_service(self, binding: Binding) -> None:
        """Ends the commands of a bot whose binding is closing; `is_service_ended` tells when. Raises Temporary."""
        await self._wake(binding)
        for actor in self._conversations_of(binding):
            actor.refresh_bot()

    def is_service_ended(self, binding: Binding) -> bool:
        """Whether the conversations of a bot that serves nobody have no command and nothing in flight, and their
        records are stored. Has them stored otherwise."""
        idle = [actor for actor in self._conversations_of(binding) if not (actor.tasks or actor.state.queue)]
        dirty = [actor for actor in idle if actor.memory.is_dirty]
        for actor in dirty:
            actor.put(rules.Rested())
        return not dirty and len(idle) == len(self._conversations_of(binding))

    def _conversations_of(self, binding: Binding) -> list[ConversationActor]:
        """Those of the bot's users, without users whom another bot serves."""
        return [
            actor
            for actor in self._conversations.of_sandbox(binding.sandbox)
            if (binding.bot == actor.state.record.bot or binding.user == actor.state.user != "")
            and self.owned.bot_of(binding.sandbox, actor.state.user, actor.state.record.bot) is None
        ]

    def ensure_owner(self) -> None:
        """Raises LeaseLost unless this replica owns the shard now."""
        self._lease.check()

    async def _move(self, binding: Binding, unknown: ConversationActor) -> None:
        """Moves the commands of a bot without a known user to the conversation of its user."""
        queue = await unknown.hand_over()
        if not queue:
            return
        try:
            actor = await self._endings.retry(binding.sandbox, lambda: self.conversation(binding, binding.user))
        except Crashed as exc:
            result = CommandResult("dead_lettered", exc.reason, exc.detail)
            for command in queue:
                self._endings.end_soon(command, result, Address(binding.sandbox, binding.bot, binding.user))
        else:
            actor.put(rules.Stored(queue))

    # the end ------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Starts nothing more, gives requests `grace_s` seconds, and stops."""
        self._draining.set()
        self._tasks.spawn(self.typing.drain(min(grace_s, TYPING_DRAIN_S)))
        await asyncio.gather(*(actor.drain(grace_s) for actor in self))
        if not await self._tasks.wait_ended(grace_s):
            log.warning("commands.cancelled", shard=self.shard, tasks=len(self._tasks))
        self.stop()
        await self._tasks.wait_ended(CANCEL_GRACE_S)

    def stop(self) -> None:
        """Stops at once, since the shard is lost."""
        self._lease.give_up()
        self._draining.set()
        self.typing.stop()
        self._conversations.stop()
        self.folds.stop()
        self.intake.stop()
        self._tasks.cancel_all()

    # memory and metrics -------------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self._tasks) + sum(actor.tasks for actor in self)

    @property
    def throttled_bots(self) -> set[str]:
        """Bots with a throttled window (-2)."""
        records = (actor.state.record for actor in self)
        return {record.bot for record in records if record.window.throttled_at_ms}

    def evict_idle(self) -> None:
        """Drops state that can be loaded again."""
        self._conversations.evict_idle()
        self.owned.bots.forget_unbound()
        self.typing.evict_idle(lambda bot: self._deps.bindings.get(bot) is not None)

    def queue_depths(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Adds the parked commands to `parked`, by reason. Returns the number of other commands in flight, and when
        the oldest of them was stored."""
        waiting = 0
        for actor in self:
            count = sum(1 for command in actor.state.queue if command.parked) if actor.state.reason else 0
            parked[actor.state.reason] += count
            waiting += count
        in_flight, oldest_ms = self.commands.depth()
        return in_flight - waiting, oldest_ms


def _report(shard: int, exc: BaseException) -> None:
    if not isinstance(exc, Draining):
        log.error("task.crashed", shard=shard, exc_info=exc)
