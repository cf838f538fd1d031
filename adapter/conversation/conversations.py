"""The conversations of a replica, as the inbound side uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from adapter.contract import messages as contract
from adapter.contract.records import Binding
from adapter.conversation import window
from adapter.conversation.actor import ConversationActor
from adapter.conversation.record import ConversationRecord, SentText
from adapter.conversation.rules import InboundReceived, SendPolicy
from adapter.conversation.store import ConversationStore
from adapter.errors import LeaseLost, Temporary
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import Clock

log = structlog.get_logger()

INBOUND_WAIT_S = 1.0
"""Longest wait of an inbox for a conversation, which itself may wait for a receipt that cannot be stored."""
MAX_WAKING = 8
"""Conversations loaded at the same time after a start or a takeover, so that thousands do not delay other work."""


class ConversationShard(Protocol):
    """A shard that this replica owns."""

    async def conversation(self, binding: Binding, user: str) -> ConversationActor:
        """Raises Temporary."""

    async def wake(self, binding: Binding) -> None:
        """Raises Temporary."""

    def show_typing(self, binding: Binding, user: str, context_token: str) -> None:
        """Shows the typing indicator. Best effort."""

    def record_in_memory(self, sandbox: str, user: str) -> ConversationRecord | None:
        """The record in memory; None: the conversation is not loaded."""


class Conversations:
    """Gives inbound messages to conversations, and answers questions about their records."""

    def __init__(
        self,
        store: ConversationStore,
        open_shard: Callable[[str], Awaitable[ConversationShard | None]],
        clock: Clock,
        policy: SendPolicy,
    ) -> None:
        self._store = store
        self._open_shard = open_shard
        """The shard of a sandbox once it works; None: another replica owns it."""
        self._clock = clock
        self._policy = policy
        self._to_wake: dict[str, Binding] = {}
        self._waking = TaskSet(_report)

    async def on_inbound(
        self,
        binding: Binding,
        user: str,
        *,
        message: str,
        token: str,
        written_ms: int,
        received_ms: int | None = None,
        sequence: int,
    ) -> ConversationActor:
        """Gives a message of the user to their conversation, and returns the conversation once it has processed the
        message, or after INBOUND_WAIT_S; a delayed conversation processes the message later. `sequence`: that of
        the message's journal record. Raises Temporary, LeaseLost.
        """
        shard = await self._open_shard(binding.sandbox)
        if shard is None:
            raise LeaseLost("shard_lost", binding.sandbox)
        actor = await shard.conversation(binding, user)
        if binding.options.auto_typing and not actor.memory.has_dispatched_to(binding.bot, sequence):
            shard.show_typing(binding, user, token)
        inbound = InboundReceived(message, token, binding.bot, written_ms, sequence, received_ms)
        if (done := actor.on_inbound(inbound)) is None:
            return actor
        done.add_done_callback(_retrieve_exception)
        await asyncio.sleep(0)  # usually enough, and cheaper than a timeout
        if not done.done():
            await asyncio.wait([done], timeout=INBOUND_WAIT_S)
        if done.done():
            done.result()
        else:
            done.cancel()  # the message stays in the mailbox; only the wait ends
        return actor

    async def shown_window(self, sandbox: str, user: str) -> contract.Window:
        """The user's send window. Raises Temporary."""
        return window.visible_window(await self._record(sandbox, user), self._clock.now_ms(), self._policy.window)

    async def find_sent(self, sandbox: str, user: str, ids: Sequence[str]) -> SentText | None:
        """The recently sent message with one of these iLink ids. Raises Temporary."""
        record = await self._record(sandbox, user)
        return next((sent for sent in record.sent if sent.id in ids), None)

    async def _record(self, sandbox: str, user: str) -> ConversationRecord:
        shard = await self._open_shard(sandbox)
        if shard is not None:
            known = shard.record_in_memory(sandbox, user)
            if known is not None:
                return known
        return (await self._store.load(sandbox, user))[0]

    def wake_soon(self, binding: Binding) -> None:
        """Makes the bot's conversation check in the background what changed before this replica polled the bot."""
        self._to_wake[binding.bot] = binding
        if len(self._waking) < MAX_WAKING:
            self._waking.spawn(self._wake_all())

    async def _wake_all(self) -> None:
        while self._to_wake:
            binding = self._to_wake.pop(next(iter(self._to_wake)))
            shard = await self._open_shard(binding.sandbox)
            if shard is None:
                continue
            try:
                await shard.wake(binding)
            except Temporary as exc:
                log.info("conversation.retrying", bot=binding.bot, reason=exc.reason)
                self._to_wake[binding.bot] = binding
                await self._clock.sleep(0.5)

    def stop(self) -> None:
        self._waking.cancel_all()


def _retrieve_exception(done: asyncio.Future[None]) -> None:
    """Marks an exception as seen when the dispatcher that waited was cancelled."""
    if not done.cancelled():
        done.exception()


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="waking", exc_info=exc)
