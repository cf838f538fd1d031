"""The conversations of a replica, as the side sees them that hears the users."""

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

HEARD_WITHIN_S = 1.0
"""No inbox waits longer for a conversation, which may wait for a receipt that cannot be stored."""
WOKEN_AT_ONCE = 8
"""Conversations read at once after a start or a take-over; thousands would hold up what people wait for."""


class ConversationShard(Protocol):
    """A shard that this replica works for."""

    async def conversation(self, binding: Binding, user: str) -> ConversationActor:
        """Raises Temporary."""

    async def wake(self, binding: Binding) -> None:
        """Raises Temporary."""

    def on_inbound(self, binding: Binding, user: str) -> None:
        """The user writes: iLink may have a typing ticket for them now."""

    def record_in_memory(self, sandbox: str, user: str) -> ConversationRecord | None:
        """The record as the conversation knows it; None where it was not read."""


class Conversations:
    """Tells conversations that their users wrote, and what is known of them."""

    def __init__(
        self,
        store: ConversationStore,
        open_shard: Callable[[str], Awaitable[ConversationShard | None]],
        clock: Clock,
        policy: SendPolicy,
    ) -> None:
        self._store = store
        self._open_shard = open_shard
        """The shard of a sandbox, once it works; None where another replica owns it."""
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
        """The user wrote: returns their conversation once it knows it. One that is held up, as by a receipt that
        cannot be stored, is waited for a second, and told in its turn. `sequence`: of the journal record that has the
        message. Raises Temporary, LeaseLost.
        """
        shard = await self._open_shard(binding.sandbox)
        if shard is None:
            raise LeaseLost("shard_lost", binding.sandbox)
        actor = await shard.conversation(binding, user)
        shard.on_inbound(binding, user)
        auto_typing = binding.options.auto_typing
        inbound = InboundReceived(
            message, token, binding.bot, written_ms, sequence, received_ms, show_typing=auto_typing
        )
        done = actor.on_inbound(inbound)
        done.add_done_callback(_retrieve_exception)
        await asyncio.sleep(0)  # mostly it does nothing else: a timeout would cost as much as what it does
        if not done.done():
            await asyncio.wait([done], timeout=HEARD_WITHIN_S)
        if done.done():
            done.result()
        else:
            done.cancel()  # it is heard all the same, and nobody waits for it
        return actor

    async def shown_window(self, sandbox: str, bot: str, user: str) -> contract.Window:
        """What may be sent to the user now. Raises Temporary."""
        return window.visible_window(await self._record(sandbox, user), self._clock.now_ms(), self._policy.window)

    async def find_sent(self, sandbox: str, user: str, ids: Sequence[str]) -> SentText | None:
        """What was sent to the user lately under one of iLink's ids. Raises Temporary."""
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
        """The bot is polled here from now on: has its conversation look at what changed meanwhile."""
        self._to_wake[binding.bot] = binding
        if len(self._waking) < WOKEN_AT_ONCE:
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
    """What it raised is nobody's to hear where the dispatcher was cancelled."""
    if not done.cancelled():
        done.exception()


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="waking", exc_info=exc)
