"""The state of a person: bucket `wechat_persons`, key `<sandbox>.<person>`, sealed.

The record is written by sends alone, each before its request and where that was not taken, and once a day for the
cursor of a silent person. The newest entry of the person's subject has what came in; of both the newer window counts
(`window.newer_window`).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from adapter.contract.records import PrivateRecord

RECENT_COMMANDS = 32
BOTS_KEPT = 4
"""Most former bots of a person: the latest ones."""
SENT_TEXTS = 8
SENT_TEXT_CHARS = 200
"""Characters of a sent text that are kept for quotes of it."""

Gone: TypeAlias = Literal["", "not_bound", "erased"]
"""Why a person's time is over: nobody polls for them or sends to them, and nothing of theirs is stored. "": it is
not."""


class SendWindow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """iLink's send window, which each message of the user opens anew.

    It allows ten sends in 24 hours as far as is known (docs/reference/ilink-protocol.md, "Known numbers").
    """

    id: str = ""
    """Id of the inbound message that opened it."""
    written_ms: int = 0
    """When that message was written, by WeChat's clock; 0: unknown."""
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

    def has_command(self, ref: CommandRef) -> bool:
        """Whether a command is in the message."""
        return ref in self.commands


class SentText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The beginning of a sent message, for quotes of it."""

    id: str
    """iLink's message id."""
    kind: str
    text: str

    def __repr__(self) -> str:
        return f"SentText({self.kind!r})"  # keeps the text out of logs and tracebacks


class PersonState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What memory has of a person, and the record of it."""

    bot: str = ""
    """The bot of token and cursor; those of another one are forgotten, the window stays."""
    bots: tuple[str, ...] = ()
    """Former bots of the person, the latest last: a command may answer a message that one of them brought."""
    token: str = ""
    """The newest context token."""
    cursor: str | None = None
    """iLink's cursor for the next poll; None: the bot was never answered."""
    cursor_after: int = 0
    """The entry behind which the cursor was read: a newer entry has a newer one."""
    window: SendWindow = SendWindow()
    progress: SendProgress | None = None
    recent: list[CommandRef] = []
    """The last commands with an id of their author that ended, and not as refused. Another one with such an id is a
    repeat."""
    sent: list[SentText] = []

    def __repr__(self) -> str:
        return f"PersonState(bot={self.bot!r}, used={self.window.sends_used})"  # no token gets into a log


class PersonRecord(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """The value in the bucket. Its version is also that of the state in it."""

    since: int = 0
    """Sequence of the bind that began the person's time. A record of another time counts as none."""
    user: str = ""
    """Whom it is about, in clear: an erasure finds the record by it."""
    sealed: bytes = b""
    """The state, sealed, since it holds the context token and texts."""
