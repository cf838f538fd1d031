"""Failures, named by what the caller does next. Imports nothing of ours."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a stranger's bytes: no such type or no JSON, no UTF-8, nested too deep."""
STORE_FAILED = 10077
"""JetStream's `err_code` where a stream did not take a message: it is full (which JetStream calls 503 too), or the
disk fails."""


class AdapterError(Exception):
    """An expected failure; anything else is a bug.

    `reason` is its log field and metric label (a short enum-like word), `detail` a sentence for people
    that never holds a secret or a message's text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Temporary(AdapterError):
    """Try again, not before `retry_after_s` seconds (None: the caller's backoff)."""

    def __init__(self, reason: str, detail: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(reason, detail)
        self.retry_after_s = retry_after_s


class Uncertain(AdapterError):
    """The request was sent and no usable answer came: it may have taken effect. Repeat only with the same id."""


class Refused(AdapterError):
    """Trying again cannot help: give the command up. Carries iLink's raw answer where there was one."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        ret: int | None = None,
        errcode: int | None = None,
        errmsg: str = "",
    ) -> None:
        super().__init__(reason, detail)
        self.ret = ret
        self.errcode = errcode
        self.errmsg = errmsg


class Throttled(Refused):
    """iLink said -2: stay quiet towards this user until they write
    (docs/reference/ilink-protocol.md, "Refused sends")."""


class SessionExpired(Refused):
    """iLink said -14, or HTTP forbids the poll: the bot's token is stale
    (docs/reference/ilink-protocol.md, "Stale token")."""


class Unreadable(AdapterError):
    """The bytes are not what they should be: keep them for a person (dead letter) and go on."""


class Crashed(AdapterError):
    """The code raised at every try: keep the message or command as a dead letter and go on."""

    def __init__(self) -> None:
        super().__init__("crashed", "The adapter failed on it at every try; the traceback is in its log.")


class LeaseLost(AdapterError):
    """Another replica owns this now, or may own it: stop polling and sending at once."""


class SettingsError(AdapterError):
    """The service cannot start. The text names every variable at fault."""


class BusRefused(AdapterError):
    """JetStream refused a publish or an API call for good. `code` is its err_code (0: none given)."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__("bus_refused", f"{code} {detail}".strip())
        self.code = code

    @property
    def is_full(self) -> bool:
        """The stream has no room, for this subject or at all: there may be some later."""
        return self.code == STORE_FAILED


class Conflict(BusRefused):
    """A compare-and-set met another revision (err 10071, 10164)."""
