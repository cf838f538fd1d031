"""What the adapter keeps in its buckets: private, not part of the contract."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from adapter.contract.messages import (
    FINAL_STATUSES,
    BindingChange,
    BindingEvent,
    BindingInfo,
    BindingState,
    LoginStatus,
    Options,
)

UNBOUND_S = 72 * 3600
"""How long a bot's place and its users' windows are kept after it was unbound: bound again in time, it goes on there.
iLink repeats messages for an hour or so, and a user's window is open for a day."""


class Binding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `bindings`, key: the bot. Which sandbox a bot serves, and how it is reached."""

    sandbox: str
    bot: str
    token: Annotated[str, Meta(description="The bot's token, sealed; see adapter/security/seal.py.")]
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
    event_pending: bool = False
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
    def is_over(self) -> bool:
        return self.status in FINAL_STATUSES


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `claims`, key: the shard. Which incarnation owns it; "" when it was released."""

    owner: str = ""


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `members`, key: the incarnation. Renewed as long as it lives."""

    instance: str
    draining: bool = False
