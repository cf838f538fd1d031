"""Failures, named by what the caller does next. Imports no other module of the adapter."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of msgspec for foreign bytes: another type, invalid JSON or UTF-8, or nested too deep."""
STORE_FAILED = 10077
"""JetStream's `err_code` for a message that the stream did not store: the stream is full (also reported as 503), or
the disk fails."""


class AdapterError(Exception):
    """An expected failure; anything else is a bug.

    `reason` is a short enum-like word for log field and metric label. `detail` is a sentence for people, without
    secrets and message text.
    """

    http_status = 0
    """That of the answer of iLink or its CDN; 0: there was none."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Temporary(AdapterError):
    """Try again, not before `retry_after_s` seconds (None: the caller's backoff)."""

    def __init__(self, reason: str, detail: str = "", *, retry_after_s: float | None = None, said: str = "") -> None:
        """`said`: the last words of a program that failed, for the terminal of whoever runs it, and for no log."""
        super().__init__(reason, detail)
        self.retry_after_s = retry_after_s
        self.said = said


class RecordTooNew(Temporary):
    """A private record has a version that only a newer replica knows: leave it alone."""


class StaleRead(Temporary):
    """A record, or a receipt, is newer than what was read. Nothing that was decided by the older one counts."""


class Uncertain(AdapterError):
    """The request was sent without a usable answer, so it may have taken effect. Repeat it only with the same id."""


class Refused(AdapterError):
    """A retry cannot help: end the command. Carries iLink's raw answer, if any."""

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
    """iLink answered -2, or -12 or -13: send nothing to this user until they write
    (docs/reference/ilink-protocol.md, "Refused sends")."""


class SessionExpired(Refused):
    """iLink answered -14: the bot's token is stale
    (docs/reference/ilink-protocol.md, "Stale token")."""


class Unreadable(AdapterError):
    """The bytes are invalid: keep them as a dead letter and continue."""


class Crashed(AdapterError):
    """The code raised in every attempt: keep the message or command as a dead letter and continue."""

    def __init__(self) -> None:
        super().__init__("crashed", "The adapter failed in every attempt. Its log has the traceback.")


class LeaseLost(AdapterError):
    """Another replica owns or may own this: stop polling and sending at once."""


class PersonGone(AdapterError):
    """The person's time in the sandbox is over: what was received or asked for them belongs to nobody."""


class SettingsError(AdapterError):
    """The service cannot start. The text names every variable at fault."""


class BusRefused(AdapterError):
    """JetStream refused a publish or an API call for good. `code` is its err_code (0: none given)."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__("bus_refused", f"{code} {detail}".strip())
        self.code = code

    @property
    def is_full(self) -> bool:
        """Whether the stream has no room, for this subject or at all. There may be room later."""
        return self.code == STORE_FAILED


class Conflict(BusRefused):
    """A compare-and-set met another revision (err 10071, 10164)."""
