"""Records in the adapter's buckets. They are private, not part of the contract.

Each carries the version of its form in `v`, and is read by `tools.decoding.decode_record`.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

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
"""Time to live (s) of the delete markers of bindings and records, which late writes of former owners meet."""


class PrivateRecord(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    """A record with its version. A record whose form changes gets another `tag` of its own.

    Every version of a record has these fields, so that an older replica knows what it leaves alone: a binding its
    `sandbox`, `user`, `person`, `since` and `bound`.
    """


class PersonKey(NamedTuple):
    """Names a person: the tokens of their subject, and the sequence of the bind that began their time."""

    sandbox: str
    person: str
    since: int

    @property
    def key(self) -> str:
        """Of the record."""
        return f"{self.sandbox}.{self.person}"


class Binding(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `bindings`, key: the bot. The sandbox that a bot serves, and how to call the bot."""

    sandbox: str
    bot: str
    token: Annotated[str, Meta(description="The bot's token, sealed; see adapter/tools/seal.py.")]
    user: str = ""
    base_url: str = ""
    options: Options = Options()
    state: BindingState = "active"
    reason: str = ""
    since_ms: int = 0
    bound: int = 0
    """Sequence of the bind command that wrote it last."""
    start_cursor: str | None = None
    """Start cursor of the bind request, sealed. It counts while the bot has no other."""
    person: str = ""
    """Token of the person in subjects (`names.person_token`), kept by every later bind of the same user."""
    since: int = 0
    """Sequence of the bind that began the person's time: no command that was stored before is theirs."""
    event_pending: bool = False
    """The event of a lost or recovered login may not be stored yet; the bot's poller publishes it."""

    def __repr__(self) -> str:
        return (
            f"Binding({self.sandbox!r}, {self.bot!r}, {self.state!r})"  # a token never gets into a log or traceback
        )

    @property
    def key(self) -> PersonKey:
        """The person whom the bot serves."""
        return PersonKey(self.sandbox, self.person, self.since)

    def info(self) -> BindingInfo:
        """The public part of the binding."""
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

    def event(self, change: BindingChange, *, reason: str = "", detail: str = "", request: str = "") -> BindingEvent:
        """An event of this binding."""
        return BindingEvent(
            sandbox=self.sandbox,
            bot=self.bot,
            user=self.user,
            change=change,
            reason=reason[:200],
            detail=detail,
            request=request,
        )


class LoginRecord(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `logins`, key: the login's id. What readers know of a QR login, and what they want of it: its flow runs
    in the memory of `owner`."""

    owner: str = ""
    """The replica that started the login, without which it is lost; then who found that."""
    sandbox: str
    status: LoginStatus = "wait"
    step: int = 1
    """Number of steps with an event; the event of each step is published once."""
    number: int = 1
    """Number of the newest code, from 1."""
    url: str = ""
    """Text of the code to show, sealed, since it gives access to the token; "" once it is not needed."""
    digits: str = ""
    """Digits from the phone, sealed: sent by somebody, and not checked yet."""
    until_ms: int = 0
    changed_ms: int = 0
    """Time of the last step."""
    bot: str = ""
    """Set at the end, and while the confirmed bot is being bound."""
    user: str = ""
    former_user: str = ""
    """The person bound to the sandbox before, if it is another one than `user`."""
    reason: str = ""
    detail: str = ""

    def __repr__(self) -> str:
        return f"LoginRecord({self.sandbox!r}, {self.status!r}, {self.step})"

    @property
    def is_over(self) -> bool:
        return self.status in FINAL_STATUSES


ALL = 999_999
"""As the number of a message: the last of its entry, and larger than any. Positions have so many digits."""


class ReaderRecord(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `readers`, key: the sandbox. How far it has handled its inbox, and who reads it."""

    handled: int = 0
    """Sequence of the entry up to which the sandbox has handled all its messages; 0: none."""
    number: int = ALL
    """The last message of that entry that is handled."""
    reader: int = 0
    """The number of who reads; 0 in the record that made a new reader, whose number is that record's revision."""
    written_ms: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """The position up to which everything is handled."""
        return self.handled, self.number


class Lease(PrivateRecord, frozen=True, kw_only=True, omit_defaults=True):
    """Bucket `leases`, key: the partition. Who owns it. This form never changes."""

    owner: str = ""
    """The replica that owns the partition; "": it was released."""
    former: tuple[str, ...] = ()
    """Replicas that may still poll or send there."""
