"""The stored state of a conversation: bucket `wechat_conversations`, key `<sandbox>.<user>`, sealed.

The conversation is the only writer. The next owner of the shard reads the record and goes on from there.
"""

from __future__ import annotations

import msgspec

from adapter.contract.records import PrivateRecord

RECENT_COMMANDS = 32
BOTS_KEPT = 4
"""Most bots in `bots`: the latest ones."""
SENT_TEXTS = 8
SENT_TEXT_CHARS = 200
"""Characters of a sent text that are kept for quotes of it."""


class SendWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """iLink's send window, which each message of the user opens anew.

    It allows ten sends in 24 hours as far as is known (docs/reference/ilink-protocol.md, "Known numbers").
    """

    id: str = ""
    """Id of the inbound message that opened it."""
    sequence: int = 0
    """Sequence of that message in the inbox."""
    opened_ms: int = 0
    """When that message arrived; 0: never."""
    sends_used: int = 0
    """Sends, each counted before it is made."""
    sent_at_ms: list[int] = []
    """Times of these sends, oldest first."""
    throttled_at_ms: int = 0
    """When the request to which iLink answered -2 was sent; 0: never."""


class CommandRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """Identifies a command by its stored sequence and time. `id` is its author's, who may use it again."""

    sequence: int
    stored_ms: int
    id: str
    is_named: bool = False
    """The author wrote the id into the body: another command with this id repeats this one."""


class SendProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of the send under way. It is stored before each request, so that a new owner knows of it."""

    commands: list[CommandRef]
    """The commands in the message; more than one if their texts were merged."""
    client_id_base: str
    bot: str
    """The bot of the last request."""
    merged: int = 0
    """Number of commands after the first one whose texts are in the message."""
    part: int = 0
    attempts: int = 0
    unanswered_attempts: int = 0
    """Requests for this part that may have been sent and have no answer, including the one about to be sent."""
    was_reset: bool = False
    """The last of these has lost its connection. Else iLink was silent, or a gateway has answered."""
    counted_in_window: str = ""
    throttled_in_window: str = ""
    message_ids: list[str] = []
    unconfirmed: bool = False
    """iLink gave no id for one of the parts."""
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""
    """iLink's last answer, or its first answer without a message id."""
    http_status: int = 0
    """Of the last answer to this part, if it was not accepted; 0: there was none."""

    @property
    def is_partially_sent(self) -> bool:
        """Part of the message may be on the phone."""
        return bool(self.part or self.unanswered_attempts)

    def has_command(self, sequence: int) -> bool:
        """Whether a command is in the message."""
        return sequence in [command.sequence for command in self.commands]


class SentText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The beginning of a sent message, for quotes of it."""

    id: str
    """iLink's message id."""
    kind: str
    text: str

    def __repr__(self) -> str:
        return f"SentText({self.kind!r})"  # keeps the text out of logs and tracebacks


class SealedConversation(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """The value in the bucket. Its version is also that of the record in it."""

    bots: list[str] = []  # noqa: RUF012 - msgspec copies it
    """`ConversationRecord.bots`, in clear: an erasure finds what a bot has left by it, whatever the key."""
    sealed: bytes = b""
    """The record, sealed (`store.seal_record`), since it holds the context token and texts."""


class ConversationRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is stored for one user of one sandbox."""

    bot: str = ""
    """The bot that last served the user or received a message from them."""
    token: str = ""
    """The newest context token."""
    window: SendWindow = SendWindow()
    inbox_seq: int = 0
    """Sequence of the sandbox's inbox up to which this record has all messages of the user."""
    bots: list[str] = []
    """The bots that have brought messages of the user, the latest last."""
    head: SendProgress | None = None
    recent: list[CommandRef] = []
    """The last commands with an id of their author that ended, and not as refused. Another one with such an id is a
    repeat."""
    sent: list[SentText] = []
    unserved: bool = False
    """No bot of the sandbox serves the user; the record has a time to live."""

    def __repr__(self) -> str:
        return f"ConversationRecord(bot={self.bot!r}, used={self.window.sends_used})"  # no token gets into a log
