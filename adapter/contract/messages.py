"""Messages of the bus: the source of `schemas/`. No I/O, no clock.

Fields ending in `_ms` are Unix milliseconds. Ids are strings, because iLink's uint64 exceeds 2^53. Readers ignore
unknown fields, so optional fields may be added. Any other change is a new major version, which the header
`Wechat-Schema` has.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from adapter.contract.names import SANDBOX_PATTERN

SCHEMA_VERSION = "1"
COMMAND_BYTES = 256 * 1024
"""Largest command in bytes. With its headers it fits into the largest message of a sandbox. Media go by object."""

SandboxId = Annotated[str, Meta(pattern=rf"^{SANDBOX_PATTERN}\Z", description="Name of a sandbox.")]
CommandId = Annotated[str, Meta(min_length=1, max_length=128, description="Idempotency key of a command.")]


class Window(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What may still be sent to the user before they write again."""

    remaining: Annotated[
        int | None,
        Meta(
            description="Sends left; 0 also if the window is over or WeChat accepts no more; null: sends are not"
            " counted. Each part of a long text, each media item and each caption is a send."
        ),
    ] = None
    closes_at_ms: Annotated[int | None, Meta(description="When the window closes; null: it is not open.")] = None


# Inbound ---------------------------------------------------------------------------------------------


class TextItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """Text, as the user wrote it."""

    text: str


class Media(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An object in the store `wechat_media`. A sandbox reads its objects by wechat.svc.media.get.<sandbox>.

    In an inbound message the object is named before its bytes are fetched, with what iLink tells of it. The answer of
    media.get has the rest.
    """

    object: Annotated[str, Meta(min_length=1, max_length=200, description="Its name: <sandbox>/…")]
    name: Annotated[
        str,
        Meta(description="File name from the sender; of an upload without one, generated. Empty: iLink told none."),
    ] = ""
    mime: Annotated[str, Meta(description="Type, detected from the content; empty before it is fetched.")] = ""
    size: Annotated[
        int,
        Meta(
            description="Bytes. In an inbound message as iLink tells them, of a video up to 16 more than it has; 0:"
            " not told."
        ),
    ] = 0
    sha256: Annotated[str, Meta(description="Lower-case hex.")] = ""
    width: Annotated[int | None, Meta(description="Pixels, if known.")] = None
    height: Annotated[int | None, Meta(description="Pixels, if known.")] = None
    duration_ms: Annotated[int | None, Meta(description="If known.")] = None


MediaReason = Annotated[
    str,
    Meta(
        description="Why there are no `media`: off (the binding's option), reference (iLink did not say where they"
        " are), corrupt (nor how to decrypt them). Empty: `media` names them."
    ),
]


class ImageItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="image", omit_defaults=True):
    """A picture."""

    media: Media | None = None
    reason: MediaReason = ""


class VoiceItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="voice", omit_defaults=True):
    """A voice message."""

    transcript: Annotated[str, Meta(description="WeChat's speech-to-text; may be wrong, may be empty.")] = ""
    duration_ms: int | None = None
    media: Annotated[Media | None, Meta(description="As recorded, usually SILK.")] = None
    wav: Annotated[
        Media | None,
        Meta(description="The recording as WAV, where the adapter converts it. If it cannot, media.get answers 404."),
    ] = None
    reason: MediaReason = ""


class FileItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="file", omit_defaults=True):
    """A file."""

    name: Annotated[str, Meta(description="File name from the sender.")] = ""
    media: Media | None = None
    reason: MediaReason = ""


class VideoItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="video", omit_defaults=True):
    """A video."""

    duration_ms: int | None = None
    media: Media | None = None
    reason: MediaReason = ""


class UnsupportedItem(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="unsupported", omit_defaults=True
):
    """Something that the adapter cannot translate (yet)."""

    type: Annotated[int, Meta(description="iLink's item type; 0: unknown.")]
    reason: Annotated[str, Meta(description="The cause: kind, malformed or too_large.")] = "kind"


InboundItem: TypeAlias = TextItem | ImageItem | VoiceItem | FileItem | VideoItem | UnsupportedItem


class Quote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The quoted message."""

    id: Annotated[str, Meta(description="iLink's id of the quoted message; empty if it gave none.")] = ""
    text: Annotated[str, Meta(description="The quoted text or a summary, if known.")] = ""
    said_by: Annotated[Literal["", "bot"], Meta(description="bot: the bot sent it lately; empty: unknown.")] = ""
    kind: Annotated[str, Meta(description="Quoted kind: text, image, voice, file, video; empty: unknown.")] = ""


class Inbound(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's message to the bot of one sandbox. Subject: wechat.in.<sandbox>."""

    id: Annotated[str, Meta(description="Unique.")]
    sandbox: SandboxId
    bot: str
    user: str
    sent_at_ms: Annotated[int, Meta(description="Unix milliseconds, WeChat's clock; 0 if it gave none.")]
    received_at_ms: Annotated[int, Meta(description="Unix milliseconds, the adapter's clock.")]
    text: Annotated[str, Meta(description='All text and transcripts, one per line; "" if none.')]
    items: list[InboundItem]
    quote: Quote | None = None
    window: Window = Window()


# Outbound --------------------------------------------------------------------------------------------


class OutText(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """Text to send."""

    text: Annotated[str, Meta(min_length=1)]


class _OutMedia(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    media: Annotated[
        Media | None, Meta(description="An object of this sandbox; only `object` and `name` are used.")
    ] = None
    data: Annotated[bytes | None, Meta(description="The bytes of a small item, instead of `media`.")] = None
    name: Annotated[str, Meta(max_length=255, description="File name that the user sees.")] = ""
    caption: Annotated[str, Meta(description="Text sent before the item as a message of its own.")] = ""


class OutImage(_OutMedia, frozen=True, kw_only=True, tag_field="kind", tag="image", omit_defaults=True):
    """A picture to send."""


class OutVideo(_OutMedia, frozen=True, kw_only=True, tag_field="kind", tag="video", omit_defaults=True):
    """A video to send."""


class OutFile(_OutMedia, frozen=True, kw_only=True, tag_field="kind", tag="file", omit_defaults=True):
    """A file to send."""


class OutVoice(_OutMedia, frozen=True, kw_only=True, tag_field="kind", tag="voice", omit_defaults=True):
    """Audio to send. It arrives as a file, because WeChat shows no voice messages of bots."""


OutItem: TypeAlias = OutText | OutImage | OutVideo | OutFile | OutVoice


class Outbound(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command to send a message. Subject: wechat.out.<sandbox>, or wechat.out with `sandbox`. Least:
    {"text":"hi"}."""

    id: Annotated[
        CommandId | None,
        Meta(
            description="Idempotency key: a command with the `id` of one of its user's last 32 that ended, and not as"
            " refused, is not sent; its receipt has `repeat_of`. Default: the header Nats-Msg-Id, else the stream"
            " sequence, which only name the command."
        ),
    ] = None
    sandbox: Annotated[
        SandboxId | None,
        Meta(description="Required on plain wechat.out; elsewhere it must equal the sandbox in the subject."),
    ] = None
    bot: Annotated[str | None, Meta(description="Required only if the sandbox has several bots.")] = None
    user: Annotated[
        str | None,
        Meta(
            description="Default: the bot's user. An answer names the `user` of the message that it answers, because"
            " another person may be bound by then."
        ),
    ] = None
    text: Annotated[str | None, Meta(description="Short form of one text item.")] = None
    items: Annotated[list[OutItem], Meta(min_length=1, max_length=20)] | None = None
    reply_to: Annotated[
        str | None,
        Meta(
            description="Id of the inbound message that this answers. The command is refused (other_user) if that"
            " message is from another person than the command goes to."
        ),
    ] = None
    when_closed: Annotated[
        Literal["park", "refuse"],
        Meta(description="If nothing may be sent now: wait for the user's next message, or refuse at once."),
    ] = "park"
    expires_in_s: (
        Annotated[float, Meta(gt=0, description="Seconds after storing; if unsent by then, it is refused.")] | None
    ) = None
    send_at_ms: Annotated[
        int | None,
        Meta(
            description="Not before this time (Unix milliseconds), at most WECHAT_NATS_PARK_HOURS less an hour ahead."
            " Until then it is parked as `scheduled`, and nothing waits behind it."
        ),
    ] = None
    typing: Annotated[
        Literal["on", "off"] | None, Meta(description="Instead of text and items: show or hide the typing indicator.")
    ] = None
    cancel: Annotated[
        CommandId | None,
        Meta(
            description="Instead of text and items: take back the sandbox's earlier command with this id. If it still"
            " waits it ends as refused (cancelled) and this one as applied, else this one as refused (not_found)."
        ),
    ] = None


Outcome: TypeAlias = Literal[
    "accepted", "accepted_unconfirmed", "applied", "refused", "uncertain", "dead_lettered", "parked"
]
FINAL_OUTCOMES = ("accepted", "accepted_unconfirmed", "applied", "refused", "uncertain", "dead_lettered")


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of a command, bind, unbind or erase. Each gets exactly one final receipt; `parked` is not final.

    Subject: wechat.event.<sandbox>.receipt.<command>.<sequence>; of a bind, unbind or erase that word stands for
    `receipt`, and the header Reply-To gets it, too, if it names an inbox. `<command>` is the command's id: letters,
    digits, `-` and `_` stay, each other byte becomes =XX (upper-case hex). If that has more than 64 characters, it is
    `==` and the first 32 hex digits of the id's SHA-256. `<sequence>` is the field `sequence`.
    """

    command: Annotated[str, Meta(description="The command's id.")]
    sandbox: Annotated[str, Meta(description="`_` if the command has none that can be read.")]
    sequence: Annotated[
        int,
        Meta(description="The command's sequence in WECHAT_OUT, as in its publish ack; an id may be used again."),
    ] = 0
    reply_to: Annotated[str, Meta(description="As the command named it; empty where it is not known.")] = ""
    repeat_of: Annotated[
        int,
        Meta(
            description="Sequence of the earlier command with the same `id`, whose outcome this is: this one is not"
            " sent. 0: it is no repeat."
        ),
    ] = 0
    outcome: Annotated[
        Outcome,
        Meta(
            description="accepted: iLink answered with a message id. accepted_unconfirmed: success without an id;"
            " WeChat often drops it, and it is never resent. applied: the bind, unbind, erase or cancel is done."
            " refused: will not be sent, or was not applied. uncertain: sent without an"
            " answer, also to one repeat with the same client_id. dead_lettered: unreadable, or the adapter failed on"
            " it; see WECHAT_DEAD. parked (not final): waits for the user, the login or its time."
        ),
    ]
    reason: Annotated[
        str,
        Meta(
            description="invalid, not_bound, ambiguous_bot, other_user, window_closed, quota, throttled, needs_login,"
            " scheduled, cancelled, too_long, expired, rejected, unreadable, too_large, crashed, media, of a bind"
            " bound_elsewhere, url, token_key, too_new, of a cancel not_found. Empty if accepted or applied."
        ),
    ] = ""
    detail: Annotated[str, Meta(description="One sentence for people.")] = ""
    bot: str = ""
    user: str = ""
    message_ids: Annotated[list[str], Meta(description="iLink's ids, one per message sent.")] = []
    ret: Annotated[int | None, Meta(description="From iLink's answer.")] = None
    errcode: Annotated[int | None, Meta(description="From iLink's answer.")] = None
    errmsg: Annotated[str, Meta(description="From iLink's answer.")] = ""
    http_status: Annotated[
        int,
        Meta(
            description="Of the last answer of iLink, its CDN or a gateway that refused the command or held it up."
            " 0: there was none, or it is accepted."
        ),
    ] = 0
    window: Window = Window()
    attempts: Annotated[int, Meta(description="Requests to sendmessage for this command.")] = 0
    received_at_ms: Annotated[
        int, Meta(description="When the command was stored, on `wechat.out` or its sandbox's subject.")
    ] = 0
    at_ms: Annotated[int, Meta(description="When this receipt was created.")] = 0
    bots: Annotated[
        list[str],
        Meta(description="Bots that serve nobody any more: replaced by the bind, or unbound. An erase names none."),
    ] = []
    counts: Annotated[
        dict[str, int], Meta(description="erase: how many messages were found of each kind, and erased.")
    ] = {}
    left: Annotated[
        dict[str, int], Meta(description="erase: how many are there all the same, so erase again; empty: none are.")
    ] = {}
    unlearned: Annotated[
        int,
        Meta(
            description="erase: bots of the sandbox, or of all, whose users are not known yet. Nothing is found by"
            " them: unbind the one whose user this is."
        ),
    ] = 0


# Bindings --------------------------------------------------------------------------------------------


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of a binding."""

    auto_typing: Annotated[
        bool, Meta(description="Show the typing indicator from each inbound message to the answer.")
    ] = False
    media: Annotated[bool, Meta(description="Download the user's media; false: messages only mention them.")] = True


SandboxNamed = Annotated[SandboxId | None, Meta(description="If it is there, it is the subject's.")]
ControlId = Annotated[
    CommandId | None, Meta(description="Names it in its receipt. Default: the header Nats-Msg-Id, else its sequence.")
]


class Bind(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bind a bot to a sandbox. Subject: wechat.bind.<sandbox>."""

    sandbox: SandboxNamed = None
    bot: Annotated[str, Meta(min_length=1, max_length=128, description="iLink's bot id, …@im.bot.")]
    bot_token: Annotated[str, Meta(min_length=1, max_length=2048, description="Secret of the bot.")]
    id: ControlId = None
    base_url: Annotated[str | None, Meta(description="iLink API base of this bot. Default: the service's.")] = None
    user: (
        Annotated[str, Meta(max_length=128, description="The WeChat user, …@im.wechat; learned if absent.")] | None
    ) = None
    cursor: Annotated[
        str | None,
        Meta(
            description="Cursor to poll from; an empty one is none. Default: the current one, or the start. A secret:"
            " iLink's cursors contain the bot's token."
        ),
    ] = None
    options: Options = Options()
    check: Annotated[
        bool,
        Meta(
            description="Whether ids have to end as those of iLink do; false: they are taken as they are. iLink is"
            " not asked about the token: the events `stale` and `needs_login` follow the first poll."
        ),
    ] = True

    def __repr__(self) -> str:
        # keeps the token out of logs and tracebacks
        return f"Bind(sandbox={self.sandbox!r}, bot={self.bot!r}, id={self.id!r})"


class Unbind(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Unbind a bot, or all bots of a sandbox. Subject: wechat.unbind.<sandbox>."""

    sandbox: SandboxNamed = None
    bot: Annotated[str, Meta(description="The bot; else `all` is true.")] | None = None
    all: Annotated[bool, Meta(description="All bots of the sandbox.")] = False
    id: ControlId = None


class Erase(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Unbind a person, and erase everything of theirs. Subject: wechat.erase.<sandbox>, or wechat.erase._ for all
    sandboxes. It may be repeated."""

    user: Annotated[str, Meta(min_length=1, max_length=128, description="The WeChat user, …@im.wechat.")]
    sandbox: SandboxNamed = None
    id: ControlId = None
    dry_run: Annotated[bool, Meta(description="Only count what there is, and leave the person bound.")] = False

    def __repr__(self) -> str:
        return f"Erase(sandbox={self.sandbox!r}, id={self.id!r})"  # whom it names is to be forgotten


BindingState: TypeAlias = Literal["active", "needs_login", "too_new"]
"""too_new: a newer version wrote the binding, and this one does not use it."""


BotStatus: TypeAlias = Literal[
    "not_polled",
    "too_new",
    "failing",
    "needs_login",
    "unknown",
    "stale",
    "paused",
    "retrying",
    "waiting",
    "storing",
    "polling",
]
"""In a word how a bot fares, what is worst first."""
BOT_STATUSES: tuple[BotStatus, ...] = get_args(BotStatus)


class BindingHealth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a bot fares now. Times are Unix milliseconds, 0: never, or not known."""

    status: Annotated[
        BotStatus,
        Meta(
            description="not_polled: no replica polls it. too_new: a newer version wrote the binding, or what is"
            " stored of its person, and no replica that knows it polls the bot. failing: for a minute iLink has"
            " answered no poll, or the answer cannot be stored. unknown: a replica gave no answer."
            " stale: iLink refuses its token, which is tried again. paused: NATS or the lease is away."
            " retrying: the last poll failed. waiting: another replica may still poll it. storing: an answer"
            " of iLink is being stored."
        ),
    ]
    detail: Annotated[str, Meta(description="Why, in a few words.")] = ""
    since_ms: Annotated[int, Meta(description="Since when, as its replica says.")] = 0
    replica: Annotated[str, Meta(description="Which polls it.")] = ""
    answered_ms: Annotated[int, Meta(description="When iLink last answered a poll.")] = 0
    inbound_ms: Annotated[int, Meta(description="When its user wrote last.")] = 0
    sent_ms: Annotated[int, Meta(description="When something was last sent in the user's window.")] = 0
    window: Annotated[Window | None, Meta(description="What may be sent now; null where it was never open.")] = None
    is_unread: Annotated[
        bool, Meta(description="What is kept of its user was written by a newer version, and is not read.")
    ] = False


class BindingInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A binding without its token: answer of wechat.svc.bindings.get and .list."""

    sandbox: str
    bot: str
    user: str = ""
    base_url: str = ""
    state: BindingState = "active"
    reason: Annotated[str, Meta(description="Why it needs a login; empty otherwise.")] = ""
    since_ms: Annotated[int, Meta(description="Start of this state.")] = 0
    options: Options = Options()
    health: Annotated[BindingHealth | None, Meta(description="Only where the request asks for it.")] = None


BindingChange: TypeAlias = Literal["bound", "replaced", "unbound", "stale", "recovered", "needs_login"]


class BindingEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A binding changed. Subject: wechat.event.<sandbox>.binding."""

    sandbox: str
    bot: str
    change: Annotated[
        BindingChange,
        Meta(
            description="replaced: another bot of the same user took its place."
            " stale: iLink answered -14, and the token is retried for a short time. needs_login: the retries failed;"
            " scan a new QR code. recovered: iLink accepts the token again, also after needs_login."
        ),
    ]
    user: str = ""
    reason: Annotated[
        str,
        Meta(description="stale and needs_login: iLink's error text, if any."),
    ] = ""
    detail: Annotated[str, Meta(description="One sentence that says what to do.")] = ""
    request: Annotated[str, Meta(description="Id of the bind or unbind that caused it.")] = ""
    at_ms: int = 0


CHECKING = "checking"
"""Reason in an answer while digits are being checked."""
LoginStatus: TypeAlias = Literal[
    "wait", "scanned", "need_verify_code", "confirmed", "already_bound", "expired", "failed", "cancelled", "lost"
]
FINAL_STATUSES = ("confirmed", "already_bound", "expired", "failed", "cancelled", "lost")
"""Statuses of a finished login."""


LoginReason = Annotated[
    str,
    Meta(
        description="need_verify_code: wrong_code; in an answer also checking, while digits are being checked."
        " expired: time, or codes (too many expired). failed: blocked (too many wrong digits), bus, url, crashed,"
        " stale_token, or why the bind was refused."
    ),
]


FormerUser = Annotated[
    str,
    Meta(description="confirmed: the person bound to the sandbox already, if it is not the one who scanned."),
]


class LoginEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step of a QR login. Subject: wechat.event.<sandbox>.login. It never contains the code, which is a secret."""

    login: str
    sandbox: str
    status: Annotated[
        LoginStatus,
        Meta(
            description="wait: a code, or a new one, is to be scanned, see `code`. scanned: to be confirmed on the"
            " phone. need_verify_code: send the digits shown on the phone by login.verify. confirmed: the bot is"
            " bound. already_bound: a bot of the sandbox already serves this user. expired, failed, cancelled: the"
            " login is over. lost: the replica that ran it is gone; start another login."
        ),
    ]
    code: Annotated[int, Meta(description="Number of the QR code, from 1; request a new one by login.status.")] = 1
    bot: str = ""
    user: str = ""
    former_user: FormerUser = ""
    reason: LoginReason = ""
    detail: Annotated[str, Meta(description="One sentence that says what to do.")] = ""
    at_ms: int = 0


# Services --------------------------------------------------------------------------------------------


class LoginStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.login.start: a QR code that binds the user who scans it to `sandbox`."""

    sandbox: SandboxId
    options: Options = Options()
    png: Annotated[bool, Meta(description="Also return the code as PNG.")] = False


class LoginQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.login.status and .cancel."""

    login: Annotated[str, Meta(min_length=1, max_length=64)]
    png: Annotated[bool, Meta(description="Also return the code as PNG.")] = False


class LoginVerify(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.login.verify."""

    login: Annotated[str, Meta(min_length=1, max_length=64)]
    code: Annotated[str, Meta(pattern=r"^[0-9]{1,12}\Z", description="The digits shown on the phone.")]


class Login(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of wechat.svc.login.*: a QR login with its code, which is a secret until the login is over."""

    login: Annotated[str, Meta(description="Id for login.status, .verify and .cancel.")]
    sandbox: str
    status: LoginStatus
    code: Annotated[int, Meta(description="Number of the QR code, from 1.")] = 1
    qrcode_url: Annotated[str, Meta(description="The text to encode as a QR code; empty at the end.")] = ""
    qrcode_text: Annotated[str, Meta(description="The code drawn for a terminal, dark on light by ANSI colours.")] = (
        ""
    )
    qrcode_png: Annotated[str, Meta(description="The code as base64 PNG, if requested.")] = ""
    expires_at_ms: Annotated[int, Meta(description="When the whole login ends.")] = 0
    bot: str = ""
    user: str = ""
    former_user: FormerUser = ""
    reason: LoginReason = ""
    detail: Annotated[str, Meta(description="One sentence that says what to do.")] = ""


class MediaQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.media.get.<sandbox>: the next piece of an object, which is the answer's payload."""

    object: Annotated[str, Meta(min_length=1, max_length=200, description="`media.object` of an item.")]
    after: Annotated[int, Meta(ge=0, description="0, then the header Wechat-Next of the previous answer.")] = 0
    position: Annotated[
        str,
        Meta(
            description="Place of the inbound message with the item, so that its media can be fetched if the store"
            " does not have them (yet); empty: only what is stored is given.",
        ),
    ] = ""
    wait_s: Annotated[
        float,
        Meta(
            ge=0,
            le=60,
            description="Longest wait for media that are being fetched, then the answer is 503: ask again. 0: only"
            " what is stored is given.",
        ),
    ] = 0


def _header_of(field: str) -> str:
    """The header (in `names`) that has a field: Wechat-Duration-Ms for `duration_ms`."""
    return "-".join(part.capitalize() for part in ("wechat", *field.split("_")))


class MediaBytes(msgspec.Struct, frozen=True, kw_only=True, rename=_header_of):
    """Headers of the answer of wechat.svc.media.get.<sandbox>, whose payload is the piece. The first piece has those
    that describe the content, as far as it shows them."""

    size: Annotated[int, Meta(ge=0, description="Bytes of the whole object.")]
    sha256: Annotated[str, Meta(description="Hash of the whole object, lower-case hex.")]
    next: Annotated[int | None, Meta(description="`after` for the next piece; absent: this is the last.")] = None
    name: Annotated[str, Meta(description="File name, percent-encoded; from the sender, or for the type.")] = ""
    mime: Annotated[str, Meta(description="Type, detected from the content.")] = ""
    width: Annotated[int | None, Meta(description="Pixels of a picture.")] = None
    height: Annotated[int | None, Meta(description="Pixels of a picture.")] = None
    duration_ms: Annotated[int | None, Meta(description="Length of a recording.")] = None


class MediaPiece(msgspec.Struct, frozen=True, kw_only=True, rename=_header_of):
    """Headers of wechat.svc.media.put.<sandbox>, whose payload is a piece of 16 KiB (the last may be shorter) to 512
    KiB. The answer is a Media, complete after the last piece. A piece may be repeated."""

    upload: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z", description="Your unique id of the upload.")]
    offset: Annotated[int, Meta(ge=0, description="Bytes before this piece; the first has 0.")] = 0
    last: Annotated[bool, Meta(description="This is the last piece.")] = False
    name: Annotated[str, Meta(max_length=1000, description="File name, percent-encoded; on the last piece.")] = ""
    sha256: Annotated[
        str,
        Meta(pattern=r"^([0-9a-f]{64})?\Z", description="Hash of the whole, on the last piece; checked if given."),
    ] = ""


class BindingsQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.bindings.list (all filters optional) and .get (by `bot`, or by `sandbox`)."""

    sandbox: str | None = None
    bot: str | None = None
    after: Annotated[str, Meta(description="Continue after this bot: `next` of the previous page.")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000, description="Page size.")] = 500
    health: Annotated[bool, Meta(description="Say how each bot fares; all replicas are asked. Only of .list.")] = (
        False
    )


class BindingsPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of wechat.svc.bindings.list and .get, in the order of bot ids."""

    bindings: list[BindingInfo]
    next: Annotated[str, Meta(description="Value of `after` for the next page; empty: this is the last.")] = ""


SandboxAsked = Annotated[
    SandboxId | None,
    Meta(description="Required if the subject has none. It must not differ from the subject's."),
]


class WindowQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.window.<sandbox>, and for the platform of wechat.svc.window."""

    sandbox: SandboxAsked = None
    bot: Annotated[str | None, Meta(description="Required only if the sandbox has several bots.")] = None
    user: Annotated[str | None, Meta(description="Default: the bot's user.")] = None


class ReceiptQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.receipt.<sandbox>, and for the platform of wechat.svc.receipt: a command's last
    receipt."""

    sandbox: SandboxAsked = None
    command: CommandId
    sequence: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="The command's sequence in WECHAT_OUT. Default: the newest receipt of this id."),
    ] = None


class CommandStored(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of wechat.svc.send.<sandbox>: the command is stored, as after the acknowledgement of a publish."""

    command: Annotated[str, Meta(description="Its id, as `command` in its receipts: the body's, else a new one.")]
    sequence: Annotated[int, Meta(ge=1, description="Its sequence in WECHAT_OUT, as in its receipts.")]


class NextQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.next.<sandbox>: the inbound messages that the sandbox has not handled yet.

    Without `reader` it makes the asker the sandbox's reader; the former one gets an error (409) from then on.
    """

    reader: Annotated[int, Meta(ge=1, description="`reader` of the first answer; absent: a new reader.")] | None = (
        None
    )
    after: (
        Annotated[str, Meta(description="All messages up to this position are handled; only with `reader`.")] | None
    ) = None
    max: Annotated[int, Meta(ge=1, le=100, description="Most messages of the answer.")] = 10


Position = Annotated[
    str, Meta(description="Its place in the inbox, opaque: as the header Wechat-Position of the live message.")
]


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """One message of wechat.svc.next.<sandbox>."""

    position: Position
    message: Annotated[msgspec.Raw, Meta(description="The inbound message, unchanged.")]


class NextPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of wechat.svc.next.<sandbox>, at once and oldest first: the messages that are not confirmed, again until
    they are."""

    reader: Annotated[int, Meta(description="Names this reader in its next requests.")]
    messages: list[Handed]
    first: Annotated[
        str, Meta(description="The position of the message before which others are gone unread; empty: none are.")
    ] = ""


class ReplayQuery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request of wechat.svc.replay.<sandbox>, and for the platform of wechat.svc.replay: inbound messages again."""

    sandbox: SandboxAsked = None
    after: Annotated[str, Meta(description="Position; messages after it. Empty: from the oldest one on.")] = ""
    since_ms: Annotated[
        int | None, Meta(description="Messages stored since this time, in milliseconds; only if `after` is empty.")
    ] = None
    limit: Annotated[int, Meta(ge=1, le=500, description="Page size.")] = 100


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a replay."""

    position: Position
    message: Annotated[msgspec.Raw, Meta(description="The inbound message, unchanged.")]


class ReplayPage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of wechat.svc.replay.<sandbox>, oldest first."""

    messages: list[Replayed]
    next: Annotated[str, Meta(description="Value of `after` for the next page; empty: this is the last.")] = ""


MESSAGES: dict[str, type[msgspec.Struct]] = {
    "".join(f"_{char.lower()}" if char.isupper() else char for char in kind.__name__)[1:]: kind
    for kind in (
        *(Inbound, Outbound, Receipt, Window, Bind, Unbind, Erase),
        *(BindingEvent, BindingsQuery, BindingsPage),
        *(LoginEvent, LoginStart, LoginQuery, LoginVerify, Login),
        *(Media, MediaQuery, MediaBytes, MediaPiece),
        *(CommandStored, NextQuery, NextPage, WindowQuery, ReceiptQuery, ReplayQuery, ReplayPage),
    )
}
"""Messages of the bus, by the name of their file in `schemas/`."""
