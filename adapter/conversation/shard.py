"""What conversations need of their shard and of the replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from adapter.conversation import rules
from adapter.conversation.commands import Part
from adapter.conversation.rules import Bot, CommandResult, Conversation, QueuedCommand, SendPolicy
from adapter.conversation.store import ConversationStore
from adapter.conversation.uploads import Uploads
from adapter.kit.slots import FairSlots
from adapter.kit.timing import Clock, PerTickLimiter
from adapter.observability.metrics import Metrics
from adapter.ports import Account, Chat


class ShardPort(Protocol):
    """What a conversation needs of the shard that it belongs to."""

    def ensure_owner(self) -> None:
        """Raises LeaseLost unless this replica may work for the shard at this moment."""

    async def wait_owned(self) -> None:
        """Returns when it may again, or after some seconds."""

    def bot_of(self, sandbox: str, user: str, bot: str) -> Bot | None:
        """The bot that serves the user now; `bot`: the one that did last."""

    def account_of(self, sandbox: str, bot: str) -> Account:
        """How a bot of the sandbox is called. Raises Refused."""

    async def is_session_alive(self, bot: str) -> bool:
        """Whether iLink takes the bot's token elsewhere, although it said -14 to a send. Raises Temporary."""

    async def wait_caught_up(self, bot: str) -> None:
        """Returns once the conversations have heard what a bot's owner before has stored: a send counts in the window
        that the user's last message opened."""

    def is_catching_up(self, bot: str) -> bool:
        """Whether that is still to be waited for."""

    async def load_bodies(self, sandbox: str, sequences: Sequence[int]) -> dict[int, list[Part] | None]:
        """Parts of commands, read back from the bus; None: it has the command no more. Raises Temporary."""

    async def publish_receipt(self, command: QueuedCommand, result: CommandResult, state: Conversation) -> None:
        """Raises Temporary, LeaseLost."""

    async def acknowledge(self, command: QueuedCommand, *, is_duplicate: bool = False) -> None:
        """The command has ended."""

    def release_body(self, command: QueuedCommand) -> None:
        """Its body is not held in memory any more."""

    def set_typing(self, state: Conversation, command: QueuedCommand | None, *, is_on: bool) -> None:
        """Shows or hides that the bot types."""

    def announce(self, state: Conversation, effect: rules.Announce) -> None:
        """Publishes a window event, in the background."""


class ConversationDeps(NamedTuple):
    """What every conversation of a replica needs."""

    store: ConversationStore
    chat: Chat
    uploads: Uploads
    slots: FairSlots
    policy: SendPolicy
    clock: Clock
    metrics: Metrics
    turns: PerTickLimiter
