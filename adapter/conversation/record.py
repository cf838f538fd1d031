"""The stored state of a conversation: bucket `wechat_conversations`, key `<sandbox>.<user>`.

The conversation's actor is the only writer. A record survives its replica: whoever owns the shard next reads it and
goes on from there.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

VERSION = 1
"""Of the record's form. A replica leaves a record with a higher one alone."""
RECENT_COMMANDS = 32
DISPATCHED_BOTS_KEPT = 4
"""Bots of a user of which it is known how far they are dispatched: the last ones."""
SENT_TEXTS = 8
SENT_TEXT_CHARS = 200
"""Characters of a sent text that are kept for quotes of it."""

WindowPhase: TypeAlias = Literal["", "open", "low", "closed"]
"""What a sandbox knows of a window; "": it was never told of one."""


class SendWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """iLink's window for sends, which each message of the user opens anew.

    Ten sends in 24 hours, as far as is known (docs/reference/ilink-protocol.md, "Known numbers").
    """

    id: str = ""
    """The inbound message that opened it."""
    sequence: int = 0
    """Of the journal record that has that message: what is read back from the journal once more opens no window."""
    opened_ms: int = 0
    """When that message arrived here; 0: never."""
    sends_used: int = 0
    """Counted before they leave."""
    sent_at_ms: list[int] = []
    """When each of these left, oldest first."""
    throttled_at_ms: int = 0
    """When the request left to which iLink said -2; 0: it has not."""


class CommandRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identifies a command: its stored sequence and time. `id` is the author's, who may use it again."""

    sequence: int
    stored_ms: int
    id: str


class SendProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of the send under way. It is stored before each request, so that a crash leaves a trace."""

    commands: list[CommandRef]
    """Those whose texts are in the message; more than one: they were merged."""
    client_id_base: str
    bot: str
    """Over which the last request went."""
    digest: str = ""
    """Of the merged text; "" where nothing was merged. A repeat must have the same."""
    part: int = 0
    attempts: int = 0
    unanswered_attempts: int = 0
    """Requests for this part that may have left and have no answer, the one that is leaving now included."""
    counted_in_window: str = ""
    throttled_in_window: str = ""
    message_ids: list[str] = []
    unconfirmed: bool = False
    """iLink gave no id for one of the parts."""
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""
    """As iLink last answered; of the first answer without an id, if there was one."""

    @property
    def is_partially_sent(self) -> bool:
        """Part of it may be on the phone."""
        return bool(self.part or self.unanswered_attempts)

    def has_command(self, sequence: int) -> bool:
        """Whether a command is in the message."""
        return any(command.sequence == sequence for command in self.commands)


class SentText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The beginning of what was sent, so that a quote of it has words."""

    id: str
    """iLink's message id."""
    kind: str
    text: str

    def __repr__(self) -> str:
        return f"SentText({self.kind!r})"  # a text never gets into a log or traceback


class ConversationRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is stored of one sandbox and one user."""

    v: int = VERSION
    bot: str = ""
    """The bot over which the user was last heard or served."""
    token: str = ""
    """The newest context token."""
    window: SendWindow = SendWindow()
    dispatched_to: dict[str, int] = {}
    """By bot: the sequence in its journal up to which the inbox and this record have everything of this user."""
    head: SendProgress | None = None
    recent: list[str] = []
    """Ids of the last commands that were sent, or may have been: a second publish of one is dropped."""
    sent: list[SentText] = []
    announced: WindowPhase = ""
    """What the sandbox was told of the window."""
    announced_window: str = ""
    """Of which window: its inbound message."""
    unserved: bool = False
    """No bot of the sandbox serves the user: the record is kept for a time only."""
    typing: bool = False
    """Typing was shown to the user: a new owner hides it once with the first answer."""

    def __repr__(self) -> str:
        return f"ConversationRecord(bot={self.bot!r}, used={self.window.sends_used})"  # no token gets into a log
