"""The recipients of a bot's messages: the sandbox that it serves, and the conversations of its users."""

from __future__ import annotations

from functools import partial

import msgspec

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.conversation.actor import ConversationActor
from adapter.errors import Crashed
from adapter.inbound import inbox
from adapter.inbound.dispatch_state import OpenRecord
from adapter.inbound.inbox import AddressedMessage, PublishDeps
from adapter.inbound.rejects import Rejects
from adapter.inbound.triage import TriagedMessage
from adapter.kit.crashes import retry_on_bug

OTHER_USERS = 8
"""Most users of a bot beside its own, for each owner: iLink binds a bot to one user, and each user costs a
conversation."""


class Recipients:
    """The recipients of one bot's messages."""

    def __init__(self, bot: str, bindings: Bindings, publishing: PublishDeps, rejects: Rejects) -> None:
        self._bot = bot
        self._bindings = bindings
        self._publishing = publishing
        self._rejects = rejects
        self._others: set[str] = set()
        """Users who are not the binding's."""

    def has_room_for(self, user: str, binding: Binding) -> bool:
        """Whether a user is the bot's own, or among the first others."""
        if user != binding.user and len(self._others) < OTHER_USERS:
            self._others.add(user)
        return user == binding.user or user in self._others

    async def find_binding(self) -> Binding | None:
        """The bot's binding, or None if the bus has none, even when asked directly. Raises Temporary."""
        bindings = self._bindings
        if bindings.get(self._bot) is None:
            await bindings.refresh(self._bot)
        return bindings.get(self._bot)

    def address(self, opened: OpenRecord, triaged: TriagedMessage, binding: Binding) -> AddressedMessage:
        inbound = triaged.inbound
        assert inbound is not None
        if inbound.fetches and not binding.options.media:
            inbound = inbox.without_media(inbound, "off")
        place = f"{opened.written.sequence}.{triaged.number}"
        record = opened.written.record
        sandbox = record.sandbox or binding.sandbox
        return AddressedMessage(
            inbound, sandbox, self._bot, record.received_ms, inbound.keys.id_for(self._bot), place
        )

    async def update_conversations(
        self, binding: Binding, opened: OpenRecord, addressed: list[AddressedMessage]
    ) -> list[AddressedMessage]:
        """Gives token and window to the users' conversations. Returns the messages that may be missing in the inbox.
        Raises Temporary, LeaseLost."""
        sequence = opened.written.sequence
        if opened.written.record.sandbox not in ("", binding.sandbox):
            return addressed  # messages from before the bot moved open no window in the new sandbox
        actors: list[ConversationActor] = []
        for user in dict.fromkeys(message.inbound.user for message in addressed):
            messages = [message for message in addressed if message.inbound.user == user]
            update = partial(self._update_conversation, binding, user, messages, sequence)
            try:
                actor = await retry_on_bug(update, self._publishing.clock.sleep, "inbound.crashed", bot=self._bot)
            except Crashed:
                for message in messages:
                    await self._rejects.end_crashed(message.inbound.raw, message.sandbox, message.inbound)
            else:
                actors.append(actor)
                if not (opened.is_left_over and actor.memory.has_dispatched_to(self._bot, sequence)):
                    continue
            addressed = [message for message in addressed if message.inbound.user != user]
        opened.actors = actors
        return addressed

    async def _update_conversation(
        self, binding: Binding, user: str, messages: list[AddressedMessage], sequence: int
    ) -> ConversationActor:
        """Raises Temporary, LeaseLost."""
        if not binding.user:
            await self._learn_user(binding, user)
        return await self._publishing.conversations.on_inbound(
            self._bindings.get(self._bot) or binding,
            user,
            message=messages[-1].id,
            token=next(
                (message.inbound.context_token for message in reversed(messages) if message.inbound.context_token), ""
            ),
            written_ms=messages[-1].inbound.sent_at_ms,
            received_ms=messages[-1].received_ms,
            sequence=sequence,
        )

    async def _learn_user(self, binding: Binding, user: str) -> None:
        """Adds the user to a binding without one, and removes an older bot of the same user in the sandbox. Raises
        Temporary."""
        bindings = self._bindings
        bound = bindings.of_sandbox(binding.sandbox)
        older = [other for other in bound if other.user == user and other.bot != binding.bot]

        def with_user(now: Binding) -> Binding | None:
            if now.user:
                return None
            known = older[0] if older else now
            return msgspec.structs.replace(now, user=user, out_after=known.out_after)

        await bindings.update(binding.bot, with_user)
        for other in older:  # WeChat has disabled it: one user has one bot
            detail = "The user is served by another bot now."
            await self._publishing.access.events.publish_binding_event(other.event("replaced", detail=detail))
            await bindings.remove(other.bot)

    def has_left(self, message: AddressedMessage) -> bool:
        """Whether the message's person is not served in its sandbox any more, whose inbox may be another person's."""
        serves = self._bindings.get(self._bot)
        is_served = serves is not None and serves.sandbox == message.sandbox
        return not (is_served or self._bindings.serving_user(message.sandbox, message.inbound.user))  # by a new bot
