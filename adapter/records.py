"""What the adapter keeps in its buckets: private, not part of the contract."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from adapter.contract import (
    FINAL_STATUSES,
    BindingChange,
    BindingEvent,
    BindingInfo,
    BindingState,
    LoginStatus,
    Options,
)


class Binding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `bindings`, key: the bot. Which sandbox a bot serves, and how it is reached."""

    sandbox: str
    bot: str
    token: Annotated[str, Meta(description="The bot's token, sealed; see adapter/seal.py.")]
    user: str = ""
    base_url: str = ""
    options: Options = Options()
    state: BindingState = "active"
    reason: str = ""
    since_ms: int = 0
    request: str = ""
    start_cursor: str | None = None
    """A cursor given by the bind request, to be used once; sealed."""
    in_after: int = 0
    """Sequence in WECHAT_IN up to which the sandbox's messages are of persons who were bound before."""
    out_after: int = 0
    """Sequence in WECHAT_OUT up to which commands that name nobody were meant for those; 0: there were none."""
    untold: bool = False
    """The event of its login's loss, or return, may not be stored yet: whoever polls the bot tells it."""

    def __repr__(self) -> str:
        return (
            f"Binding({self.sandbox!r}, {self.bot!r}, {self.state!r})"  # a token never gets into a log or traceback
        )

    def info(self) -> BindingInfo:
        """What others may see of it."""
        return BindingInfo(
            sandbox=self.sandbox,
            bot=self.bot,
            user=self.user,
            base_url=self.base_url,
            state=self.state,
            reason=self.reason,
            since_ms=self.since_ms,
            options=self.options,
        )

    def event(
        self,
        change: BindingChange,
        *,
        reason: str = "",
        detail: str = "",
        request: str = "",
        replay_after: int | None = None,
    ) -> BindingEvent:
        """Something happened to it."""
        return BindingEvent(
            sandbox=self.sandbox,
            bot=self.bot,
            user=self.user,
            change=change,
            reason=reason[:200],
            detail=detail,
            request=request,
            replay_after=replay_after,
        )


class Cursor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `cursors`, key: the bot. Where to poll from, what was seen, and who polls."""

    cursor: str = ""
    """iLink's; sealed, where it is stored."""
    seen: list[str] = []
    """Records of adapter.dedup, oldest first: the newest ones, as far as they are not stored apart."""
    apart: int = 0
    """Revision of the key `<bot>/seen`, which has the older records as a JSON list; 0: there are none. So a message
    costs a short write, and only some dozens together a long one."""
    last_seq: int = 0
    """Sequence in WECHAT_IN of the newest message that is among those seen; later ones were published without it."""
    owner: str = ""
    """Incarnation of the replica that polls; "" when nobody does. The epoch of the compare-and-set: writing one's
    own name raises the revision, so that every write of the owner before is refused."""
    start: str | None = None
    """A digest of the bind request's start cursor that was applied, so that it is applied once; "" is the start."""


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """A command whose text goes out in the message of another."""

    command: str
    client: str


class Hand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of the command that is being sent: written before each request, so that a crash leaves a trace."""

    command: str
    client: str
    """Base of the client_ids of its parts."""
    sandbox: str = ""
    part: int = 0
    attempts: int = 0
    tried: int = 0
    """Requests for this part that may have left and have no answer, the one that is leaving now included."""
    counted_in: str = ""
    """The window (its inbound message) in which the request for this part counts."""
    message_ids: list[str] = []
    unconfirmed: bool = False
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""
    """As iLink last answered; of the first answer without an id, if there was one."""
    throttled_in: str = ""
    """The window (its inbound message) in which iLink last refused it with -2."""
    tail: str | None = None
    """What is appended to this part, so that a repeat says the same; None: not decided yet."""
    merged: list[Merged] = []
    """The commands behind it whose texts are in its only part: a repeat must hold the very same ones."""

    @property
    def is_begun(self) -> bool:
        """Part of it may have been sent."""
        return bool(self.part or self.tried)

    @property
    def all(self) -> list[Merged]:
        """Every command in hand, the first one first."""
        return [Merged(command=self.command, client=self.client), *self.merged]

    def holds(self, client: str) -> bool:
        """Whether a command is in hand, alone or with others."""
        return any(one.client == client for one in self.all)

    def is_any(self, clients: Collection[str]) -> bool:
        """Whether it holds one of them."""
        return any(one.client in clients for one in self.all)


class Context(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `context`, key: bot and user. The newest context token and the user's window."""

    token: str = ""
    inbound_ms: int = 0
    """When the user's newest message arrived here; 0: never."""
    inbound_id: str = ""
    used: int = 0
    """Sends since then, counted before they leave."""
    sent_ms: list[int] = []
    """When each of these left."""
    blocked_ms: int = 0
    """When the request left to which iLink said -2; 0: not blocked."""
    hand: Hand | None = None
    left: Hand | None = None
    """What was begun as another command took its place, and may still have to end: its owner may die before it tells
    how that ended. Of another sandbox, which the bot served before; or one that is not delivered again yet."""
    done: list[str] = []
    """Sandbox/id of the last commands that were sent, or may have been, against a second publish with the same id."""
    told: Literal["", "open", "low", "closed"] = ""
    """What the sandbox had been told of a window before this write; later events may be on the bus."""
    told_in: str = ""
    """That window: its inbound message."""
    followed_ms: int = 0
    """The binding's `since_ms` when it was last looked what was sent to the user over the bots before."""

    def __repr__(self) -> str:
        return f"Context(used={self.used}, inbound_ms={self.inbound_ms})"

    def hand_of(self, sandbox: str) -> Hand | None:
        """What was last in hand for one of the sandboxes that the bot has served."""
        return next((hand for hand in (self.hand, self.left) if hand and hand.sandbox == sandbox), None)


class Spoken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `quotes`, key: bot and iLink's message id. What was sent to a user, so that a quote of it has words."""

    sandbox: str
    user: str
    kind: str
    text: str

    def __repr__(self) -> str:
        return f"Spoken({self.sandbox!r}, {self.kind!r})"  # a text never gets into a log or traceback


class Typing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `typing`, key: shard, then bot and user. The bot may be shown typing; who takes the shard hides it."""

    sandbox: str = ""
    since_ms: int = 0


class LoginCode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One QR code of a login. Handle and URL are sealed: who has them can fetch the token."""

    number: int
    handle: str
    url: str
    made_ms: int

    def __repr__(self) -> str:
        return f"LoginCode({self.number})"


class LoginRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `logins`, key: the login's id. A QR login; its secrets are gone once it is over."""

    sandbox: str
    options: Options = Options()
    status: LoginStatus = "wait"
    step: int = 1
    """Rises whenever there is something to tell: the event of a step is published once."""
    number: int = 0
    """Of the newest code, from 1."""
    codes: list[LoginCode] = []
    """Codes that may still be scanned, oldest first: the newest and the one before it. A code that was scanned is
    alone. Empty: a new one is to be fetched."""
    ended: int = 0
    """Codes that expired or were blocked; a code that was replaced before that does not count."""
    base_url: str = ""
    """Where the codes are asked for; "": the service's default."""
    digits: str = ""
    """What the phone shows, sealed: sent, and not judged yet."""
    until_ms: int = 0
    changed_ms: int = 0
    """When `step` rose last."""
    bot: str = ""
    user: str = ""
    token: str = ""
    """Of a bot that was confirmed and is to be bound: sealed for the bind command."""
    bot_base_url: str = ""
    former_user: str = ""
    """Who was bound to the sandbox before that bot, if it was another person than `user`."""
    reason: str = ""
    detail: str = ""

    def __repr__(self) -> str:
        return f"LoginRecord({self.sandbox!r}, {self.status!r}, {self.step})"

    @property
    def over(self) -> bool:
        return self.status in FINAL_STATUSES


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `claims`, key: the shard. Which incarnation owns it; "" when it was released."""

    owner: str = ""


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `members`, key: the incarnation. Renewed as long as it lives."""

    instance: str
    draining: bool = False
