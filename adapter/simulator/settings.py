"""How this iLink behaves: every knob, with the protocol file's best reading as its default."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

NotNegative = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Duration = Annotated[float, Meta(ge=0)]
Url = Annotated[str, Meta(pattern=r"^(https?://\S+)?$")]

AT_THE_START = frozenset(
    {
        *("host", "port", "public_url", "cdn_public_url", "second_host", "second_port", "second_public_url"),
        *("tls_cert", "tls_key", "seed", "frozen_at_ms"),
    }
)
"""What is settled once the simulator runs."""
FOR_ALL = frozenset(
    {
        *("qr_ttl_s", "qr_hold_ms", "verify_attempts", "qr_url"),
        *("media_bytes_kept", "records_per_bot", "sends_per_bot"),
    }
)
"""What no bot has for itself: logins have none yet, and memory is shared."""


class SimulatorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any field but those of AT_THE_START may also be changed while running (`configure`), for all bots or, but for
    those of FOR_ALL, for one."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """Port to listen on; 0 picks a free one."""
    second_host: str = "127.0.0.1"
    """Address of the listener that QR logins are redirected to; opened when first needed."""
    second_port: Port = 0
    """Its port, then open from the start; 0 picks a free one."""
    public_url: Url = ""
    """Base URL that clients reach this server under; empty: made from the listening address."""
    cdn_public_url: Url = ""
    """Base URL that clients reach the CDN under, `/c2c` and all: many take media from a host of Tencent's CDN
    only; empty: made from `public_url`."""
    second_public_url: Url = ""
    """The same for the second listener; its host is the `redirect_host` of logins, to which clients go by https."""
    tls_cert: str = ""
    """PEM file of a certificate and its chain: both listeners speak https, and nothing else; empty: plain http."""
    tls_key: str = ""
    """PEM file of its key, without a password; empty: the key is in `tls_cert`."""
    seed: int | None = None
    """Seeds ids, tokens and chance; null: different in every run."""
    frozen_at_ms: int | None = None
    """Business time stands at this Unix millisecond and moves by `advance` only, and with it all lifetimes and what
    faults delay by seconds; null: real time."""

    hold_ms: NotNegative = 35_000
    """How long `getupdates` waits for a message."""
    hold_min_ms: NotNegative = 0
    """Above 0: each hold is drawn between this and `hold_ms`, as was observed (15 to 35 s)."""
    hint_ms: int | None = 35_000
    """`longpolling_timeout_ms` of the answers; null leaves it out."""
    json_type: Literal["application/json", "application/octet-stream"] = "application/json"
    """What answers call themselves. The second is what clients in Python, Go and C# report of iLink: one that
    asks for `application/json` understands no answer then."""
    ret_style: Literal["absent", "zero", "alternate"] = "absent"
    """Whether successful polls carry `ret`."""
    send_ret_style: Literal["zero", "absent", "alternate"] = "zero"
    """Whether answers to accepted sends carry `ret`."""
    idle_style: Literal["full", "bare", "ret_-1"] = "full"
    """A poll without news is answered like any other; without `msgs`, cursor and hint; or with -1."""
    stale_style: Literal["errcode", "ret", "both"] = "errcode"
    """Which field carries -14."""
    inbound_id_style: Literal["number", "string", "alternate"] = "number"
    """How ids stand in inbound messages, and `svr_id` in quotes: JSON number above 2^53, string, or in turn."""
    quoted_id_style: Literal["string", "number"] = "string"
    """How the `msg_id` of a quoted message stands: a string in all captures of others, and as a string the
    official client declares it; or a JSON number, which may come and breaks clients in Go, Rust and C#."""
    id_style: Literal["alternate", "number", "string"] = "alternate"
    """How the answers of `sendmessage` write theirs; by turns for each bot."""
    zero_timeout: Literal["held", "instant"] = "held"
    """A poll with `timeout` 0, by which one client hopes for an answer at once: held as any other, or not."""
    batch_max: NotNegative = 100
    """Messages per answer at most; 0: all there are."""

    strict_headers: bool = False
    """A request without `iLink-App-*` is answered with -14."""
    require_authorization_type: bool = True
    """A request without `AuthorizationType: ilink_bot_token` is answered with -14."""
    malformed: Literal["ret", "http400"] = "ret"
    """Answer to bad JSON, a missing `msg` or a wrong method: HTTP 200 with -2, or HTTP 400 and 405."""

    cursor_mode: Literal["ack_on_delivery", "cursor_replay"] = "ack_on_delivery"
    """Consumed once written, or returned again to whoever presents an older cursor."""
    unknown_cursor: Literal["current", "refuse", "replay"] = "current"
    """A cursor that this server never issued means: the current position, -2, or the start."""
    idle_cursor_changes: bool = False
    """An empty answer carries a new cursor too."""
    concurrent_polls: Literal["split", "newest_wins", "loser_-14"] = "split"
    """Two polls on one token: share the messages at random (with `cursor_replay` both get each, as each reads on from
    its own cursor); the older is answered empty; or with -14."""
    overlap_grace_ms: NotNegative = 50
    """A poll counts as overlapping only if the older one's client has not hung up within this time."""

    context_check: Literal["window_only", "must_match_any_issued_within_24h", "must_be_latest", "ignored"] = (
        "window_only"
    )
    """What a send's context token is compared with. `window_only` wants one, any but those of a bot that
    was superseded; `ignored` does not even notice that it is missing."""
    tokenless: Literal["refuse", "drop", "deliver"] = "refuse"
    """A send without a context token: -2, success without delivery, or delivery."""
    window_hours: Duration = 24.0
    """How long after a user's message the bot may send."""
    quota: NotNegative = 10
    """Accepted sends per window; 0: unlimited."""
    client_message_id: Literal["ignored", "kept"] = "ignored"
    """The `message_id` that a send brings along: another one is given to it, or it is kept, as one project saw, so
    that answers and quotes name it."""
    duplicate_counts: bool = False
    """A repeated `client_id` meets the quota and uses it up; else it is answered with success in any case."""
    strict_client_id: bool = False
    """After a send without `client_id`, later sends under the same context token disappear."""
    tool_calls: Literal["hidden", "shown"] = "hidden"
    """Items of types 11 and 12: answered empty and not shown, as one project saw; or like others."""
    several_items: Literal["shown", "refused"] = "shown"
    """A message with more than one item, which the official client never sends: as any other, or -2."""
    incomplete_sends: Literal["-2", "-14"] = "-2"
    """The code that refuses a send without items, or with an item that lacks its content. With -14, as one
    project saw while the session lived, an empty text is refused, too."""
    typing_counts: bool = False
    """Each `sendtyping` that is accepted uses up one send of the window."""
    max_text_bytes: NotNegative = 16_384
    """Longest text in UTF-8 bytes."""
    require_notifystart: bool = False
    """Sends are refused until `msg/notifystart` was called."""
    send_latency_ms: NotNegative = 0
    """Pause between processing a send and answering it; makes overlapping sends visible."""

    token_death_delay_s: Duration = 29.0
    """How long a superseded bot's token lives on."""
    idle_death_hours: Duration = 0.0
    """Above 0: a token dies once its bot's user has not written for so long; a login counts as a word."""
    ticket_ttl_s: Duration = 86_400.0
    """Life of a typing ticket."""
    bad_ticket: Literal["refuse", "accept"] = "refuse"
    """`sendtyping` with a ticket that is unknown or expired is answered with -2, or with success; it switches
    nothing in either case. No source tells what iLink does."""
    typing_timeout_s: Duration = 0.0
    """Typing ends by itself after this time; 0: never."""

    upload_url: Literal["full_url", "param", "both"] = "full_url"
    """What `getuploadurl` answers with."""
    upload_ret: int = 0
    """Other than 0: what `getuploadurl` answers in `ret`, as for accounts that may send no media."""
    stranger_upload: Literal["refused", "taken"] = "refused"
    """`getuploadurl` for somebody who is no peer of the bot: -1, as one project saw, or as for any other."""
    own_download: Literal["refused", "served"] = "refused"
    """What a bot has uploaded, asked for by its reference: 400, as one project saw, or the bytes."""
    param_upload_limit: NotNegative = 0
    """Above 0: a larger upload is answered with 500, unless it goes to the `upload_full_url`."""
    voice_sends: Literal["hidden", "shown", "refused"] = "hidden"
    """A voice of the bot: accepted, not shown; or shown; or refused by `getuploadurl` with `ret` 2."""
    media_bytes_kept: Annotated[int, Meta(ge=1)] = 2**30
    """Bytes on the CDN over all bots; the oldest media go first."""

    qr_ttl_s: Duration = 120.0
    """Life of a QR code."""
    qr_hold_ms: NotNegative = 30_000
    """How long `get_qrcode_status` waits for a change."""
    verify_attempts: Annotated[int, Meta(ge=1)] = 3
    """Wrong codes until `verify_code_blocked`."""
    qr_url: str = "https://liteapp.weixin.qq.com/q/sim"
    """Start of `qrcode_img_content`."""

    records_per_bot: Annotated[int, Meta(ge=20)] = 1_000
    """Polls and calls remembered per bot; fewer, but at least 20, when there are many bots."""
    sends_per_bot: Annotated[int, Meta(ge=1)] = 10_000
    """Send attempts remembered per bot, and messages shown per phone; fewer when there are many bots."""
    history: Annotated[int, Meta(ge=1)] = 10_000
    """Delivered messages kept per bot, to be repeated or replayed; fewer when there are many bots."""
