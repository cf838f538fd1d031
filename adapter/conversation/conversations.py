"""The conversations of a replica, as the side sees them that hears the users."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from adapter import contract
from adapter.conversation import window
from adapter.conversation.actor import ConversationActor
from adapter.conversation.record import ConversationRecord, SentText
from adapter.conversation.rules import Heard, SendPolicy
from adapter.conversation.store import ConversationStore
from adapter.errors import Conflict, LeaseLost, Temporary
from adapter.records import Binding
from adapter.tasks import Tasks
from adapter.timing import Clock

log = structlog.get_logger()

HEARD_WITHIN_S = 1.0
"""No poll waits longer for a conversation, which may wait for a receipt that cannot be stored."""
WOKEN_AT_ONCE = 8
"""Conversations read at once after a start or a take-over; thousands would hold up what people wait for."""


class ConversationShard(Protocol):
    """A shard that this replica works for."""

    async def conversation(self, binding: Binding, user: str) -> ConversationActor:
        """Raises Temporary."""

    async def wake(self, binding: Binding) -> None:
        """Raises Temporary."""

    def on_heard(self, binding: Binding, user: str) -> None:
        """The user writes: iLink may have a typing ticket for them now."""

    def record_in_memory(self, sandbox: str, user: str) -> ConversationRecord | None:
        """The record as the conversation knows it; None where it was not read."""


class Conversations:
    """Tells conversations that their users wrote, and what is known of them."""

    def __init__(
        self,
        store: ConversationStore,
        open_shard: Callable[[str], Awaitable[ConversationShard | None]],
        ensure_served: Callable[[str], None],
        clock: Clock,
        policy: SendPolicy,
    ) -> None:
        self._store = store
        self._open_shard = open_shard
        """The shard of a sandbox, once it works; None where another replica owns it."""
        self._ensure_served = ensure_served
        """Raises LeaseLost where this replica may not work for a bot."""
        self._clock = clock
        self._policy = policy
        self._to_wake: dict[str, Binding] = {}
        self._waking = Tasks(_report)

    async def hear(
        self, binding: Binding, user: str, *, message: str, token: str, written_ms: int
    ) -> contract.Window:
        """The user wrote: returns the window once their record is stored, with the newest token.

        A poll that ends after its shard was handed over, or whose conversation is held up, stores the record by
        itself; the conversation meets that at its next write, or is told once the bot is taken. Raises Temporary,
        LeaseLost.
        """
        heard = Heard(message, token, binding.bot, written_ms, show_typing=binding.options.auto_typing)
        shard = await self._open_shard(binding.sandbox)
        if shard is not None:
            actor = await shard.conversation(binding, user)
            shard.on_heard(binding, user)
            try:
                async with asyncio.timeout(HEARD_WITHIN_S):
                    await actor.hear(heard)
                return window.shown(actor.state.record, self._clock.now_ms(), self._policy.window)
            except LeaseLost:
                self._ensure_served(binding.bot)  # handed over meanwhile: go on as below
            except TimeoutError:
                pass  # it meets the record at its next write; the Heard in its mailbox then changes nothing
        while True:
            record, revision = await self._store.load(binding.sandbox, user)
            self._ensure_served(binding.bot)
            now_ms = self._clock.now_ms()
            in_flight = int(record.head is not None and bool(record.head.unanswered_attempts))
            record = window.on_inbound(
                record,
                message=message,
                token=token,
                bot=binding.bot,
                now_ms=now_ms,
                written_ms=written_ms,
                in_flight=in_flight,
            )
            try:
                await self._store.save(binding.sandbox, user, record, revision)
            except Conflict:
                continue
            return window.shown(record, now_ms, self._policy.window)

    async def shown_window(self, sandbox: str, bot: str, user: str) -> contract.Window:
        """What may be sent to the user now. Raises Temporary."""
        return window.shown(await self._record(sandbox, user), self._clock.now_ms(), self._policy.window)

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
        self._waking.cancel()


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="waking", exc_info=exc)
