"""The values that the simulator records and returns: plain values, which the admin API writes as JSON.

Times ending `_ms` are Unix milliseconds of the simulator's clock, with fractions where order matters.
"""

from typing import Any

from msgspec import Struct, field

Json = dict[str, Any]


class SimulatorError(Exception):
    """A call of the simulator's own API is invalid; the text says why."""


class BotRecord(Struct, frozen=True):
    """The credentials that a QR login hands out."""

    bot: str
    user: str
    token: str


class InboundRecord(Struct, frozen=True, kw_only=True):
    """A message put into a bot's queue. `deliveries` counts the answers that carried it."""

    bot: str
    message_id: str
    client_id: str
    seq: int
    create_time_ms: int
    context_token: str
    position: int
    deliveries: int = 0


class MediaView(Struct, frozen=True, kw_only=True):
    """What a phone makes of a media item: `viewable`, or `why` not (`unknown_reference`, `short_key`, `wrong_key`).
    Size and MD5 are those of the decrypted content."""

    kind: str
    reference: str
    file_name: str
    size: int
    md5: str
    viewable: bool
    why: str


class Shown(Struct, frozen=True, kw_only=True):
    """A message on a user's phone. `text` is the text of its text items, joined."""

    bot: str
    client_id: str
    message_id: str
    text: str
    items: list[Any]
    at_ms: float
    media: list[MediaView] = field(default_factory=list)


class SendRecord(Struct, kw_only=True):
    """One attempt at `sendmessage`. `why` is `shown`, or the reason why the phone does not show it."""

    bot: str
    user: str
    client_id: str
    text: str
    start_ms: float
    end_ms: float = 0.0
    status: int = 200
    ret: int | None = None
    errmsg: str | None = None
    message_id: str = ""
    shown: bool = False
    why: str = "in_progress"
    overlapped: bool = False
    context_token: str = ""
    run_id: str = ""
    items: list[Any] = field(default_factory=list)


class PollRecord(Struct, kw_only=True):
    """One `getupdates`. `outcome`: messages, empty, stale, refused, malformed, disconnected, cut, or the id of
    the fault."""

    start_ms: float
    cursor: str
    end_ms: float = 0.0
    outcome: str = "parked"
    next_cursor: str = ""
    ids: list[str] = field(default_factory=list)


class PollsView(Struct, frozen=True, kw_only=True):
    """The latest polls of one bot, and counts of all its polls. `most` is the greatest number at once."""

    records: list[PollRecord]
    total: int
    now: int
    most: int
    overlaps: int


class CallView(Struct, frozen=True, kw_only=True):
    """Count and latest times of one bot's calls of an endpoint. `bot` is empty for calls without a known token."""

    bot: str
    endpoint: str
    count: int
    times_ms: list[float]


class Violation(Struct, frozen=True, kw_only=True):
    """A mistake of a client that does not change the answer to its request."""

    kind: str
    endpoint: str
    bot: str
    at_ms: float
    detail: str = ""


class RequestRecord(Struct, frozen=True, kw_only=True):
    """Headers of one request, without `Authorization`."""

    endpoint: str
    bot: str
    method: str
    at_ms: float
    headers: dict[str, str]


class TypingView(Struct, frozen=True, kw_only=True):
    """Whether a user sees "typing", and how often it went on and off."""

    on: bool
    on_calls: int
    off_calls: int


class OnlineView(Struct, frozen=True, kw_only=True):
    """Whether the bot reported that it runs, and each change as [time in ms, online]."""

    online: bool
    timeline: list[tuple[float, bool]]


class QrRecord(Struct, frozen=True, kw_only=True):
    """The present state of a QR login. `bot` is set once the user confirms. `phone` is what the phone shows if it
    refuses the client's version."""

    qrcode: str
    status: str
    user: str
    bot: str
    created_ms: int
    polls: int
    phone: str = ""


class Stats(Struct, frozen=True, kw_only=True):
    """Counts since the start. `pending` messages were in no answer that was written whole; `in_flight` messages are
    in an answer that is being written. `delivered` counts messages, and `redelivered` their repetitions."""

    bots: int
    dead: int
    injected: int
    pending: int
    in_flight: int
    delivered: int
    redelivered: int
    polls: int
    parked: int
    poll_overlaps: int
    sends: int
    shown: int
    duplicates_suppressed: int
    dropped: int
    refused: int
    send_overlaps: int
    violations: dict[str, int]
