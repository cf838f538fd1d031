"""What a conversation needs from its shard (`ShardPort`) and from the replica (`ConversationDeps`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from adapter.conversation.rules import (
    Body,
    Bot,
    CommandResult,
    Conversation,
    InboundReceived,
    QueuedCommand,
    SendPolicy,
)
from adapter.conversation.store import ConversationStore
from adapter.conversation.uploads import Uploads
from adapter.kit.slots import FairSlots
from adapter.kit.timing import Clock, PerTickLimiter
from adapter.observability.metrics import Metrics
from adapter.ports import Account, Chat


class ShardPort(Protocol):
    """The shard of a conversation."""

    def ensure_owner(self) -> None:
        """Raises LeaseLost unless this replica owns the shard now."""

    async def wait_owned(self) -> None:
        """Returns when the replica may own the shard again, or after some seconds."""

    def bot_of(self, sandbox: str, user: str, bot: str) -> Bot | None:
        """The bot that serves the user now. `bot`: the last one."""

    def account_of(self, sandbox: str, bot: str) -> Account:
        """The iLink account of a bot of the sandbox. Raises Refused."""

    async def is_session_alive(self, bot: str) -> bool:
        """Whether iLink accepts the bot's token in another call after a -14. Raises Temporary."""

    async def newest_inbound(self, conversation: Conversation) -> InboundReceived | None:
        """A message that a former owner, which may still poll, has published behind what the conversation knows.
        Raises Temporary."""

    async def load_bodies(self, sandbox: str, sequences: Sequence[int]) -> dict[int, Body]:
        """Reads the parts of commands from the bus. Raises Temporary."""

    async def publish_receipt(self, command: QueuedCommand, result: CommandResult, state: Conversation) -> None:
        """Raises Temporary, LeaseLost."""

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        """Removes an ended command from the bus."""

    def release_body(self, command: QueuedCommand) -> None:
        """Drops the body of a command from memory."""

    def show_typing(self, sandbox: str, bot: str, user: str, context_token: str) -> None:
        """Shows the typing indicator. Best effort."""

    def hide_typing(self, sandbox: str, user: str) -> None:
        """Hides it if it is shown."""


class Folds(Protocol):
    """What the inboxes of a shard have that its conversations may not know."""

    async def newest_of(self, sandbox: str, user: str, after: int, *, again: bool = False) -> InboundReceived | None:
        """The user's newest message after a sequence of the inbox, with the newest token, as far as it was published
        before this replica took the shard. `again`: or since then. Raises Temporary."""

    async def prints_of(self, sandbox: str, bot: str, after: int) -> tuple[list[bytes], int]:
        """The fingerprints of a bot's messages after a sequence of the inbox as it is now, and the sequence up to
        which it was read. Open conversations have got what is new. Raises Temporary."""

    def forget(self, sandbox: str) -> None:
        """Drops what the inbox had, since a bot serves the sandbox no more; who needs the rest reads it again."""

    def stop(self) -> None:
        """Tells no conversation any more."""


class ConversationDeps(NamedTuple):
    """Dependencies of all conversations of a replica."""

    store: ConversationStore
    chat: Chat
    uploads: Uploads
    slots: FairSlots
    policy: SendPolicy
    clock: Clock
    metrics: Metrics
    turns: PerTickLimiter
