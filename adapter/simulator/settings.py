"""The settings of the simulated iLink. Each default is the protocol file's best reading."""

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
"""Settings that cannot change while the simulator runs."""
FOR_ALL = frozenset(
    {
        *("qr_ttl_s", "qr_hold_ms", "verify_attempts", "oldest_version", "listed_tokens"),
        *("media_bytes_kept", "records_per_bot", "sends_per_bot"),
    }
)
"""Settings that exist only for all bots: a login has no bot yet, and memory is shared."""


class SimulatorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any field outside AT_THE_START can change while running (`configure`), for all bots. A field outside FOR_ALL
    can also change for one bot."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Port = 0
    """Port to listen on; 0 picks a free one."""
    second_host: str = "127.0.0.1"
    """Address of the listener that QR logins are redirected to; opened when first needed."""
    second_port: Port = 0
    """Port of the second listener, which is then open from the start; 0 picks a free one."""
    public_url: Url = ""
    """Base URL of this server for clients; empty: made from the listening address."""
    cdn_public_url: Url = ""
    """Base URL of the CDN for clients, including `/c2c`; empty: made from `public_url`. Many clients accept media
    only from a host of Tencent's CDN."""
    second_public_url: Url = ""
    """Base URL of the second listener for clients. Its host is the `redirect_host` of logins, which clients call by
    https."""
    tls_cert: str = ""
    """PEM file of a certificate and its chain: both listeners then speak only https; empty: plain http."""
    tls_key: str = ""
    """PEM file of the certificate's key, without a password; empty: the key is in `tls_cert`."""
    seed: int | None = None
    """Seed of ids, tokens and chance; null: different in every run."""
    frozen_at_ms: int | None = None
    """Unix milliseconds at which business time stands. Only `advance` moves it, and with it all lifetimes and all
    delays of faults in seconds; null: real time."""

    hold_ms: NotNegative = 35_000
    """Time that `getupdates` waits for a message."""
    hint_ms: int | None = 35_000
    """`longpolling_timeout_ms` of the answers; null leaves it out."""
    json_type: Literal["application/json", "application/octet-stream"] = "application/json"
    """Content type of answers. Clients in Python, Go and C# report `application/octet-stream` of iLink; a client that
    insists on `application/json` then understands no answer."""
    ret_style: Literal["absent", "zero", "alternate"] = "absent"
    """Whether successful polls carry `ret`."""
    send_ret_style: Literal["zero", "absent", "alternate"] = "zero"
    """Whether answers to accepted sends carry `ret`."""
    idle_style: Literal["full", "bare", "ret_-1"] = "full"
    """Answer to a poll without news: like any other; without `msgs`, cursor and hint; or with -1."""
    stale_style: Literal["errcode", "ret", "both"] = "errcode"
    """Field that carries -14."""
    inbound_id_style: Literal["number", "string", "alternate"] = "number"
    """Form of ids in inbound messages, and of `svr_id` in quotes: JSON number above 2^53, string, or in turn."""
    quoted_id_style: Literal["string", "number"] = "string"
    """Form of the `msg_id` of a quoted message: a string, as in all captures and in the official client's types; or a
    JSON number, which breaks clients in Go, Rust and C#."""
    id_style: Literal["alternate", "number", "string"] = "alternate"
    """Form of ids in answers of `sendmessage`. `alternate` changes the form with each answer to the bot."""
    zero_timeout: Literal["held", "instant"] = "held"
    """A poll with `timeout` 0, which one client sends to get an answer at once: held like any other, or not held."""
    batch_max: NotNegative = 100
    """Maximum number of messages per answer; 0: no limit."""

    strict_headers: bool = False
    """A request without `iLink-App-*` is answered with -14."""
    require_authorization_type: bool = True
    """A request without `AuthorizationType: ilink_bot_token` is answered with -14."""
    malformed: Literal["ret", "http400"] = "ret"
    """Answer to bad JSON, a missing `msg` or a wrong method: HTTP 200 with -2, or HTTP 400 and 405."""

    cursor_mode: Literal["ack_on_delivery", "cursor_replay"] = "ack_on_delivery"
    """Messages are consumed once the answer is written, or sent again to a client that presents an older cursor."""
    unknown_cursor: Literal["current", "refuse", "replay"] = "current"
    """A cursor that this server never issued stands for the current position, is answered with -2, or stands for the
    start."""
    idle_cursor_changes: bool = False
    """Whether an empty answer carries a new cursor."""
    concurrent_polls: Literal["split", "newest_wins", "loser_-14"] = "split"
    """Two polls on one token: they share the messages at random (with `cursor_replay` both get each message, as each
    reads from its own cursor); or the older poll is answered empty; or with -14."""
    overlap_grace_ms: NotNegative = 50
    """Time that the older poll's client has to hang up before two polls count as overlapping."""

    context_check: Literal["window_only", "must_match_any_issued_within_24h", "must_be_latest", "ignored"] = (
        "window_only"
    )
    """What the context token of a send is compared with. `window_only` accepts any token except one of a superseded
    bot; `ignored` also accepts a send without a token."""
    tokenless: Literal["refuse", "drop", "deliver"] = "refuse"
    """Outcome of a send without a context token: -2, success without delivery, or delivery."""
    window_hours: Duration = 24.0
    """Time after a user's message in which the bot may send."""
    quota: NotNegative = 10
    """Accepted sends per window; 0: no limit."""
    client_message_id: Literal["ignored", "kept"] = "ignored"
    """The `message_id` in a send is replaced by a new one; or it is kept, as one project saw, and answers and quotes
    name it."""
    duplicate_counts: bool = False
    """Whether a repeated `client_id` counts against the quota. If not, it always gets success."""
    strict_client_id: bool = False
    """After a send without `client_id`, later sends under the same context token disappear."""
    tool_calls: Literal["hidden", "shown"] = "hidden"
    """Items of types 11 and 12: answered with an empty body and not shown, as one project saw; or like others."""
    several_items: Literal["shown", "refused"] = "shown"
    """A message with several items, which the official client never sends: handled like others, or -2."""
    incomplete_sends: Literal["-2", "-14"] = "-2"
    """Code of the refusal of a send without items, or with an item that lacks its content. One project saw -14 while
    the session lived; with it, an empty text is refused too."""
    typing_counts: bool = False
    """Whether each accepted `sendtyping` uses up one send of the window."""
    max_text_bytes: NotNegative = 16_384
    """Longest text in UTF-8 bytes."""
    cut_chars: NotNegative = 0
    """If not 0, the phone shows so many characters of a text, although the answer is like any other. Reports say
    about 2,000."""
    cut_bytes: NotNegative = 0
    """The same in UTF-8 bytes. One report says 2,048."""
    require_notifystart: bool = False
    """Whether sends are refused before `msg/notifystart` is called."""
    send_latency_ms: NotNegative = 0
    """Pause between the processing of a send and its answer. It makes overlapping sends visible."""

    token_death_delay_s: Duration = 29.0
    """Time that the token of a superseded bot stays valid."""
    idle_death_hours: Duration = 0.0
    """If not 0, a token dies once its bot's user has not written for this time. A login counts as a message."""
    ticket_ttl_s: Duration = 86_400.0
    """Lifetime of a typing ticket."""
    bad_ticket: Literal["refuse", "accept"] = "refuse"
    """Answer to `sendtyping` with an unknown or expired ticket: -2, or success. Neither switches typing. No source
    tells what iLink does."""
    typing_timeout_s: Duration = 0.0
    """Time after which typing ends by itself; 0: never."""

    upload_url: Literal["full_url", "param", "both"] = "full_url"
    """Form of the address in the answer of `getuploadurl`."""
    upload_ret: int = 0
    """If not 0, `getuploadurl` answers this in `ret`, as for accounts that may not send media."""
    stranger_upload: Literal["refused", "taken"] = "refused"
    """`getuploadurl` for a user that is no peer of the bot: -1, as one project saw, or accepted."""
    own_download: Literal["refused", "served"] = "refused"
    """Download of a bot's own upload by its reference: 400, as one project saw, or the bytes."""
    param_upload_limit: NotNegative = 0
    """If not 0, a larger upload gets 500, unless it goes to the `upload_full_url`."""
    voice_sends: Literal["hidden", "shown", "refused"] = "hidden"
    """A voice from the bot: accepted and not shown; shown; or refused by `getuploadurl` with `ret` 2."""
    media_bytes_kept: Annotated[int, Meta(ge=1)] = 2**30
    """Maximum number of bytes on the CDN over all bots. The oldest media are removed first."""

    qr_ttl_s: Duration = 120.0
    """Lifetime of a QR code."""
    qr_hold_ms: NotNegative = 30_000
    """Time that `get_qrcode_status` waits for a change."""
    verify_attempts: Annotated[int, Meta(ge=1)] = 3
    """Number of wrong codes before `verify_code_blocked`."""
    oldest_version: Annotated[str, Meta(pattern=r"^(\d{1,2}\.\d{1,2}\.\d{1,2})?$")] = ""
    """If set, the phone refuses the code of a client that declares an older `iLink-App-ClientVersion`, or none: it
    shows a sentence, and the status stays `wait` until the code expires."""
    listed_tokens: Literal["read", "refused"] = "read"
    """A request for a code that lists tokens: answered, or refused with -2. One project saw such requests fail."""

    records_per_bot: Annotated[int, Meta(ge=20)] = 1_000
    """Polls and calls remembered per bot. With many bots it is less, but at least 20."""
    sends_per_bot: Annotated[int, Meta(ge=1)] = 10_000
    """Send attempts remembered per bot, and messages shown per phone. With many bots it is less."""
    history: Annotated[int, Meta(ge=1)] = 10_000
    """Delivered messages kept per bot for repetition and replay. With many bots it is less."""
