"""The data of a dispatcher: its dependencies, records, and pending messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from adapter.bindings.registry import Bindings
from adapter.contract.messages import InboundItem
from adapter.conversation.actor import ConversationActor
from adapter.inbound.download import DownloadDeps
from adapter.inbound.inbox import AddressedMessage, PublishDeps
from adapter.inbound.journal import Journal, JournalRecord, Written
from adapter.inbound.triage import Triage, TriagedMessage


class DispatchDeps(NamedTuple):
    """Dependencies of all dispatchers of a replica."""

    journal: Journal
    triage: Triage
    publishing: PublishDeps
    bindings: Bindings
    downloading: DownloadDeps
    media_wait_s: float
    """How long a message waits for its media after its arrival."""
    media_writable: Callable[[], Awaitable[None]]
    """Returns when the bus accepts messages and media."""


class PendingMessage:
    """A message that is not known to be in its inbox."""

    __slots__ = ("crashes", "is_suspect", "message", "record", "until", "work")

    def __init__(self, message: AddressedMessage, record: OpenRecord, until: float, *, is_suspect: bool) -> None:
        self.message = message
        self.record = record
        self.until = until
        """Monotonic time at which it is published without its missing media."""
        self.is_suspect = is_suspect
        """The message may be in its inbox: it is left over, or its publish lost the lease."""
        self.crashes = 0
        """Publishes of this message alone that raised an unexpected error."""
        self.work: asyncio.Task[list[InboundItem]] | None = None
        """The download of its media."""

    @property
    def is_ready(self) -> bool:
        """Whether the message waits for no media."""
        return not self.message.inbound.fetches or (self.work is not None and self.work.done())

    def with_media(self) -> AddressedMessage:
        """The message to publish. Re-raises an unexpected error of the download."""
        if self.work is None:
            return self.message
        inbound = msgspec.structs.replace(self.message.inbound, items=self.work.result())
        return msgspec.structs.replace(self.message, inbound=inbound)


_DISPATCHED = Written(0, "", JournalRecord())


class OpenRecord:
    """A record that is being dispatched."""

    __slots__ = (
        "actors",
        "added_keys",
        "crashes",
        "is_continued",
        "is_left_over",
        "is_triaged",
        "messages",
        "sequence",
        "size",
        "triaged",
        "unpublished",
        "written",
    )

    def __init__(self, written: Written, *, is_left_over: bool = False) -> None:
        self.written = written
        self.sequence = written.sequence
        self.is_continued = written.record.is_continued
        self.size = sum(map(len, written.record.messages))
        self.is_left_over = is_left_over
        """A previous owner stored it and may have published some of it."""
        self.messages: list[bytes] | None = None
        """The messages, completed by the pieces in earlier records."""
        self.triaged: list[TriagedMessage] | None = None
        self.added_keys = 0
        """Messages that the record added to the dedup window."""
        self.is_triaged = False
        self.unpublished = 0
        """Messages of the record that are not in their inbox."""
        self.actors: list[ConversationActor] = []
        """Conversations of the users in the record."""
        self.crashes = 0

    def is_stored(self, bot: str) -> bool:
        """Whether the conversations have stored that the record is dispatched."""
        return all(actor.memory.is_stored_to(bot, self.sequence) for actor in self.actors)

    def drop_messages(self) -> None:
        """Frees the messages of a dispatched record, since the bot may be silent for long."""
        self.messages = self.triaged = None
        self.written = _DISPATCHED
