"""Builds requests to iLink and interprets its answers. No I/O, no clock.

docs/reference/ilink-protocol.md has what is known of each call ("Endpoints"), and how certain it is.
"""

from __future__ import annotations

import binascii
import contextlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args
from urllib.parse import quote

import msgspec

from adapter import __version__
from adapter.contract.quotes import as_id
from adapter.errors import Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ilink import wire
from adapter.ilink.cipher import cipher_size, write_key
from adapter.ports import HOLD_MS, Accepted, MediaKind, Polled, QrCode, Scan, ScanStatus, Uploaded
from adapter.settings import NEWEST_ILINK_VERSION
from adapter.tools.decoding import as_utf8, without_controls, without_halves
from adapter.tools.logs import HIDDEN, hide_secrets

AGENT = f"wechat-nats/{__version__}"

_BOM = b"\xef\xbb\xbf"

A = TypeVar("A", bound=wire.WireReply)

ANSWER_BYTES = 8 << 20
"""Largest unpacked answer to a poll: some thousand messages of about a kilobyte."""
COMMAS = 500_000
"""Most commas of an answer, since a list of millions of messages takes a second and hundreds of megabytes; 8 MiB of
ordinary messages have fewer."""
OTHER_BYTES = 262_144
"""Largest answer to any other call."""
REPAIRED_BYTES = 262_144
"""Largest invalid answer that is repaired, which takes up to 75 ms of the event loop. With 1 MiB, a server that makes
such answers delayed the messages of others by 0.4 s."""
WORDS_CHARS = 200
"""Most characters of iLink's error text that are passed on."""
WORDS_BYTES = 4096
"""Largest error text that is decoded if it is no string."""
SECRET_CHARS = 6
"""A shorter string is no secret, and would be found inside words."""
ID_CHARS = 128
"""Longest message id; a uint64 has 20 digits."""
QR_CHARS = 2953
"""Longest content that every QR code can hold."""
TOKENS_LISTED = 10
"""Most tokens in `local_token_list`."""
STATUSES: tuple[str, ...] = get_args(ScanStatus)

HOLD_RANGE_MS = (5_000, 60_000)
"""Limits of the server's hint for the next poll; 0 and less mean no hint."""

IDLE_S = 1.0
"""A poll answered sooner was not idle."""
IDLE_AFTER_S = 10.0
"""An answer without content after this time of a poll means that there were no messages."""
EDGE_TIMEOUT = 524
CONTENT_TOO_LARGE = 413
"""The one status of a gateway that is about this request alone, so that a repeat cannot help."""
BUSY = (429, 503)
"""HTTP statuses of a server without room: the request was not processed, whatever the body says of it (RFC 6585,
RFC 9110)."""
UNREACHED = (521, 523, 525, 526)
"""HTTP statuses of an edge that had no connection to iLink: refused, no route, no TLS, a wrong certificate."""


class IlinkRequest(msgspec.Struct, frozen=True):
    """One request. Token, body and path contain secrets."""

    endpoint: str
    path: str
    headers: str
    """Lines of headers, beside those that `connection` adds."""
    body: bytes
    method: str = "POST"
    token: str = ""
    """For the header Authorization; "": the request has none."""
    secret: str = ""
    """A secret in the body beside the token."""
    repeatable: bool = True
    """Whether the request may be repeated."""
    largest: int = OTHER_BYTES
    """Largest unpacked answer in bytes."""


class IlinkReply(msgspec.Struct):
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    """Those of `connection.READ_HEADERS` alone, in lower case."""
    body: bytes
    secrets: tuple[str, ...] = ()
    """Those of its request, which are removed from its error text (`_decode`)."""


def uin(number: int) -> str:
    """The header X-WECHAT-UIN: base64 of the decimal text of a random uint32."""
    return binascii.b2a_base64(b"%d" % number, newline=False).decode()


class Declared:
    """What each request tells iLink of this client."""

    def __init__(self, version: str = NEWEST_ILINK_VERSION, agent: str = AGENT, route_tag: str = "") -> None:
        """`version`: major.minor.patch of the official client whose behaviour this one follows."""
        major, minor, patch = map(int, version.split("."))
        self.base_info = {"channel_version": version, "bot_agent": agent}
        self.app_headers = f"iLink-App-Id: bot\r\niLink-App-ClientVersion: {major << 16 | minor << 8 | patch}\r\n"
        """Those of every request, and the only ones of get_qrcode_status."""
        if route_tag:
            self.app_headers += f"SKRouteTag: {route_tag}\r\n"
        kind = "Content-Type: application/json\r\nAuthorizationType: ilink_bot_token\r\n"
        self.post_headers = kind + self.app_headers
        """Those of a POST that differ neither between calls nor between bots."""


NEWEST = Declared()


def _request(
    name: str, token: str, declared: Declared, body: dict[str, Any], secret: str = "", repeatable: bool = True,
    largest: int = OTHER_BYTES,
) -> IlinkRequest:  # fmt: skip
    body["base_info"] = declared.base_info
    endpoint, path, headers = name.rpartition("/")[2], f"/ilink/bot/{name}", declared.post_headers
    return IlinkRequest(
        endpoint, path, headers, msgspec.json.encode(body), "POST", token, secret, repeatable, largest
    )


def updates_request(token: str, cursor: str, declared: Declared) -> IlinkRequest:
    """getupdates. `cursor` is "" at the start; iLink's cursors contain the bot's token in base64."""
    return _request("getupdates", token, declared, {"get_updates_buf": cursor}, cursor, largest=ANSWER_BYTES)


def message_request(
    token: str, declared: Declared, item: dict[str, Any], *, user: str, client_id: str, context_token: str
) -> IlinkRequest:
    """sendmessage with one item, in the official form. An empty `context_token` is omitted."""
    msg: dict[str, Any] = {
        "from_user_id": "",
        "to_user_id": user,
        "client_id": client_id,
        "message_type": wire.BOT,
        "message_state": wire.FINISH,
        "item_list": [item],
    }
    if context_token:
        msg["context_token"] = context_token
    return _request("sendmessage", token, declared, {"msg": msg}, context_token, repeatable=False)


def text_item(text: str) -> dict[str, Any]:
    return {"type": wire.TEXT, "text_item": {"text": text}}


def media_item(media: Uploaded) -> dict[str, Any]:
    """The minimal official form. Additional fields were linked to messages that vanished."""
    link = {"encrypt_query_param": media.reference, "aes_key": write_key(media.key), "encrypt_type": 1}
    match media.kind:
        case "image":
            return {"type": wire.IMAGE, "image_item": {"media": link, "mid_size": media.cipher_size}}
        case "video":
            return {"type": wire.VIDEO, "video_item": {"media": link, "video_size": media.cipher_size}}
        case "file":
            payload = {"media": link, "file_name": media.name, "len": str(media.size)}
            return {"type": wire.FILE, "file_item": payload}


MEDIA_TYPES: dict[MediaKind, int] = {"image": 1, "video": 2, "file": 3}
"""`media_type` of getuploadurl, whose numbers differ from those of items."""


class Upload(NamedTuple):
    """An upload as it is announced to iLink."""

    user: str
    kind: MediaKind
    size: int
    """Of the plain bytes, as `md5` (lower-case hex)."""
    md5: str
    filekey: str
    """32 hex digits."""
    key: bytes

    def __repr__(self) -> str:
        return f"Upload({self.kind!r}, size={self.size})"  # keeps the key out of logs and tracebacks


def upload_request(token: str, declared: Declared, upload: Upload) -> IlinkRequest:
    """getuploadurl."""
    body = {
        "filekey": upload.filekey,
        "media_type": MEDIA_TYPES[upload.kind],
        "to_user_id": upload.user,
        "rawsize": upload.size,
        "rawfilemd5": upload.md5,
        "filesize": cipher_size(upload.size),
        "no_need_thumb": True,
        "aeskey": upload.key.hex(),
    }
    return _request("getuploadurl", token, declared, body, upload.key.hex())


def read_upload_url(reply: IlinkReply, *, cdn_base_url: str, filekey: str) -> str:
    """The upload URL, unchecked. A place to upload to counts, whatever the code, as for the official client.

    Raises SessionExpired (-14), Refused("media"), Temporary.
    """
    if refusal := _find_refusal(reply):
        raise _refused_upload(refusal)
    answer = _read_answer(reply, wire.UploadUrl)
    if answer.upload_full_url:
        return answer.upload_full_url
    if answer.upload_param:
        param = quote(answer.upload_param, safe="")
        return f"{cdn_base_url}/upload?encrypted_query_param={param}&filekey={quote(filekey, safe='')}"
    if answer.code:
        raise _refused_upload(answer)
    raise Refused("media", "iLink answered success, but no place to upload to.")


def _refused_upload(answer: wire.WireReply) -> Refused:
    return Refused("media", f"No upload: {_error_text(answer)}", **_diagnostics(answer))


def download_url(cdn_base_url: str, reference: str) -> str:
    """The URL of media that iLink names only by a reference."""
    return f"{cdn_base_url}/download?encrypted_query_param={quote(reference, safe='')}"


_CONTROL = re.compile(r"[^ -~]+")
_LONG = re.compile(r"[A-Za-z0-9+/=_%-]{24,}")


def cdn_refusal(status: int, headers: Mapping[str, str]) -> Refused:
    """The refusal (4xx) of an upload with the CDN's error text: printable, short, and without possible keys."""
    texts = [headers.get("x-error-code", ""), headers.get("x-error-message", "")]
    words = _LONG.sub("…", _CONTROL.sub(" ", " ".join(texts))).strip()[:200]
    return Refused("media", f"The CDN refused the upload: HTTP {status} {words}".strip())


def config_request(token: str, declared: Declared, *, user: str, context_token: str) -> IlinkRequest:
    """getconfig for the user's typing ticket."""
    body: dict[str, Any] = {"ilink_user_id": user}
    if context_token:
        body["context_token"] = context_token
    return _request("getconfig", token, declared, body, context_token)


def typing_request(token: str, declared: Declared, *, user: str, ticket: str, on: bool) -> IlinkRequest:
    """sendtyping."""
    body: dict[str, Any] = {"ilink_user_id": user, "typing_ticket": ticket, "status": 1 if on else 2}
    return _request("sendtyping", token, declared, body, ticket)


def notify_request(token: str, declared: Declared, *, start: bool) -> IlinkRequest:
    """msg/notifystart or msg/notifystop."""
    return _request("msg/notifystart" if start else "msg/notifystop", token, declared, {})


def qrcode_request(declared: Declared, tokens: Sequence[str]) -> IlinkRequest:
    """get_bot_qrcode, without authorization and base_info. `tokens`: newest first; the first ten are sent."""
    body = msgspec.json.encode({"local_token_list": list(tokens[:TOKENS_LISTED])})
    path = "/ilink/bot/get_bot_qrcode?bot_type=3"
    return IlinkRequest("get_bot_qrcode", path, declared.post_headers, body)


def qrcode_status_request(declared: Declared, handle: str, verify_code: str) -> IlinkRequest:
    """get_qrcode_status: a GET with only the app headers. `verify_code`: "" if none is required."""
    path = f"/ilink/bot/get_qrcode_status?qrcode={quote(handle, safe='')}"
    if verify_code:
        path += f"&verify_code={quote(verify_code, safe='')}"
    return IlinkRequest("get_qrcode_status", path, declared.app_headers, b"", "GET")


def hold_ms(hint: bytes) -> int:
    """The server's hint for the next poll, as JSON, within HOLD_RANGE_MS; HOLD_MS if it is no positive number."""
    digits = hint.strip(b'"')
    number = int(digits) if digits.isdigit() and len(digits) < 10 else 0
    low, high = HOLD_RANGE_MS
    return min(max(number, low), high) if number else HOLD_MS


_GZIP_OR_ZLIB = 47


class Oversized(Uncertain):
    """The answer is too large."""


def unpack(reply: IlinkReply, limit: int) -> IlinkReply:
    """The answer with its body decompressed, if that has at most `limit` bytes: a few can expand to gigabytes.

    The body of an error page that cannot be unpacked is empty. Raises Uncertain("unreadable"), Oversized.
    """
    body, problem = reply.body, ""
    encoding = reply.headers.get("content-encoding")
    if encoding and body and encoding.strip().lower() not in ("", "identity"):
        work = zlib.decompressobj(_GZIP_OR_ZLIB)
        try:
            body = work.decompress(body, limit + 1)
        except zlib.error:
            problem = "the answer cannot be unpacked"
        else:
            problem = "" if work.eof or len(body) > limit else "the packed answer ends early"
    if is_oversized := len(body) > limit:
        problem = f"the answer exceeds {limit} bytes"
    if problem and 200 <= reply.status < 300:
        raise (Oversized if is_oversized else Uncertain)("unreadable", problem)
    reply.body = b"" if problem else body
    return reply


def read_updates(reply: IlinkReply, *, polled_s: float) -> Polled:
    """Raises SessionExpired (-14), and Temporary otherwise, since a poll may always be repeated.

    524 late in a poll is how the edge ends an idle poll, and an empty body is accepted by all clients: both are an
    empty answer. `polled_s`: duration of the poll.
    """
    if reply.status == EDGE_TIMEOUT:
        _find_refusal(reply)
    elif reply.body.strip() or not 200 <= reply.status < 300:
        if reply.body.count(b",") > COMMAS:
            raise Temporary("unreadable", "the answer has too many messages")
        updates = _read_answer(reply, wire.Updates)
        if code := updates.code:
            if code == -1 and polled_s >= IDLE_S:  # an idle timeout, as one client interprets it
                return Polled([], None, HOLD_MS)
            raise Temporary("ret_2" if code in wire.THROTTLED else "ret_other", _error_text(updates))
        cursor = str(updates.get_updates_buf or "")
        overlong = len(cursor) if len(cursor) > wire.OPAQUE_CHARS else 0
        kept = None if overlong else cursor or None
        messages = list(map(bytes, updates.msgs or ()))
        return Polled(messages, kept, hold_ms(bytes(updates.longpolling_timeout_ms)), overlong)
    if polled_s >= IDLE_AFTER_S:
        return Polled([], None, HOLD_MS)
    reason = "http_5xx" if reply.status == EDGE_TIMEOUT else "unreadable"
    raise Temporary(reason, "an empty answer, too early for an idle poll")


def read_sent(reply: IlinkReply) -> Accepted:
    """Raises SessionExpired (-14), Throttled (-2 and its like), Refused for other codes and 413, Temporary if nothing
    was taken, and Uncertain if something may have been taken: "http_5xx", or "unreadable" for a 2xx.

    An error status is a gateway's, whatever stands beside it but -14 and -2: 4xx, and 5xx of one that did not reach
    iLink (BUSY, UNREACHED), mean that nothing was taken; after any other 5xx iLink may have the request.
    """
    if not 200 <= reply.status < 300:
        if refusal := _find_refusal(reply):
            _check_sent(refusal)
        if reply.status == CONTENT_TOO_LARGE:
            raise Refused("rejected", f"HTTP {reply.status}")
        if reply.status >= 500 and reply.status not in (*BUSY, *UNREACHED):
            raise Uncertain("http_5xx", f"HTTP {reply.status}")
        _check_status(reply)
    if not reply.body.strip():
        return Accepted(None, None, None, "")
    try:
        sent = _decode(reply, wire.Sent)
    except ValueError as exc:
        raise Uncertain("unreadable", str(exc)[:200]) from exc
    if sent.code:
        _check_sent(sent)
    ident = as_id(sent.message_id)
    # any other text is no id, and may be too long for a receipt
    is_number = ident.isascii() and ident.isdigit() and len(ident) <= ID_CHARS
    return Accepted(ident if is_number else None, sent.ret, sent.errcode, _server_message(sent))


def _check_sent(answer: wire.WireReply) -> None:
    """Raises what a code of sendmessage other than 0 means: SessionExpired, Throttled, Refused."""
    match answer.code:
        case wire.STALE_TOKEN:
            raise _session_expired(answer)
        case code if code in wire.THROTTLED:
            raise Throttled("throttled", _error_text(answer), **_diagnostics(answer))
        case -3:
            raise Refused("invalid", "iLink does not know this user id.", **_diagnostics(answer))
        case _:
            raise Refused("rejected", _error_text(answer), **_diagnostics(answer))


def read_notified(reply: IlinkReply) -> None:
    """Raises SessionExpired, Temporary. The caller logs errors, since the call is best effort."""
    answer = _read_answer(reply, wire.WireReply)
    if answer.code:
        raise Temporary("ret_other", _error_text(answer))


def read_ticket(reply: IlinkReply) -> str:
    """Raises SessionExpired (-14), Refused("typing") for other codes, Temporary without a usable answer."""
    config = _read_answer(reply, wire.Config)
    if not config.code and config.typing_ticket:
        return config.typing_ticket
    why = {0: "iLink gave no typing ticket.", -4: "The user has not written to this bot yet."}
    raise Refused("typing", why.get(config.code) or _error_text(config), **_diagnostics(config))


def read_typing(reply: IlinkReply) -> None:
    """Raises SessionExpired (-14), Refused("typing") for other codes, Temporary without a usable answer."""
    answer = _read_answer(reply, wire.WireReply)
    if answer.code:
        raise Refused("typing", _error_text(answer), **_diagnostics(answer))


def read_qrcode(reply: IlinkReply) -> QrCode:
    """Raises Temporary for any answer without a code."""
    answer = _read_login(reply, wire.WireQrCode)
    handle, url = answer.qrcode or "", answer.qrcode_img_content or ""
    if not 0 < len(handle) <= wire.URL_CHARS or not wire.PLAIN_URL.fullmatch(url) or len(url) > QR_CHARS:
        raise Temporary("unreadable", "the answer holds no QR code")
    return QrCode(handle, url)


def read_qrcode_status(reply: IlinkReply) -> Scan:
    """An unknown status counts as `wait`. Raises Temporary without a status; the caller asks again."""
    answer = _read_login(reply, wire.QrStatus)
    if answer.status not in STATUSES:
        return Scan("wait")
    return Scan(
        answer.status,  # type: ignore[arg-type] # one of STATUSES
        redirect_host=answer.redirect_host or "",
        bot=answer.ilink_bot_id or "",
        user=answer.ilink_user_id or "",
        token=answer.bot_token or "",
        base_url=answer.baseurl or "",
    )


def _read_login(reply: IlinkReply, kind: type[A]) -> A:
    _check_status(reply)
    try:
        answer = _decode(reply, kind)
    except ValueError:  # its text may quote the answer, which has a token
        raise Temporary("unreadable", "the answer cannot be read") from None
    if answer.code:
        raise Temporary("ret_other", f"iLink answered {answer.code}")
    return answer


def _read_answer(reply: IlinkReply, kind: type[A]) -> A:
    """The answer to a call that may be repeated, with any code but -14.

    Raises SessionExpired (-14), and Temporary without a usable answer.
    """
    if not 200 <= reply.status < 300:
        _find_refusal(reply)
        _check_status(reply)
    if kind is wire.WireReply and not reply.body.strip():  # of no other kind is this a usable answer
        reply.body = b"{}"
    try:
        answer = _decode(reply, kind)
    except ValueError as exc:
        with contextlib.suppress(ValueError):  # what stands beside a code may be of any type
            if (bare := _decode(reply, wire.WireReply)).code == wire.STALE_TOKEN:
                raise _session_expired(bare) from None
        raise Temporary("unreadable", str(exc)[:200]) from exc
    if answer.code == wire.STALE_TOKEN:
        raise _session_expired(answer)
    return answer


def _decode(reply: IlinkReply, kind: type[A]) -> A:
    """Decodes an answer, and removes the request's secrets from its error text. Raises ValueError.

    One bad text or number would cost the whole answer at every repeat. So a lone surrogate (a cut emoji) and invalid
    UTF-8 become the replacement character, a control character is read as if it were escaped, and a number in quotes
    is read as a number, as protobuf's JSON writes long ones.
    """
    try:
        try:
            answer = msgspec.json.decode(reply.body, type=kind)
        except ValueError:  # includes UnicodeDecodeError
            if len(reply.body) > REPAIRED_BYTES:
                raise
            mended = without_controls(without_halves(as_utf8(reply.body.removeprefix(_BOM))))
            answer = msgspec.json.decode(mended, type=kind, strict=False)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if (errmsg := bytes(answer.errmsg)) != b"null":
        words = _decode_error_text(errmsg)
        for secret in reply.secrets:
            for part in (secret, secret.rpartition(":")[2]):  # a token begins with the bot's id
                if len(part) >= SECRET_CHARS:
                    words = words.replace(part, HIDDEN)
        words = _LONG.sub(HIDDEN, words)[:WORDS_CHARS]  # context tokens in the answer to a poll, for one
        answer.errmsg = msgspec.Raw(msgspec.json.encode(words))
    return answer


def _decode_error_text(errmsg: bytes) -> str:
    is_text = errmsg.startswith(b'"')
    return str(msgspec.json.decode(as_utf8(errmsg)) or "") if is_text or len(errmsg) <= WORDS_BYTES else ""


def _find_refusal(reply: IlinkReply) -> wire.WireReply | None:
    """iLink's own -2 beside an error status. None: the status alone counts. Raises SessionExpired (-14).

    Any other code there is a gateway's: 500 with `{"ret":-1}` would otherwise end every command that waits.
    """
    if 200 <= reply.status < 300 or reply.body[:1] != b"{":
        return None
    try:
        answer = _decode(reply, wire.WireReply)
    except ValueError:
        return None
    if answer.code == wire.STALE_TOKEN:
        raise _session_expired(answer)
    return answer if answer.code == wire.THROTTLE else None


def _check_status(reply: IlinkReply) -> None:
    if reply.status == 429 or reply.status >= 500:
        raise Temporary(
            "http_5xx" if reply.status >= 500 else "http_4xx",
            f"HTTP {reply.status}",
            retry_after_s=retry_after(reply.headers),
        )
    if not 200 <= reply.status < 300:
        raise Temporary("http_4xx", f"HTTP {reply.status}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in the Retry-After header, at most 300; None: the header is missing or a date."""
    value = headers.get("retry-after", "")
    return min(float(value), 300.0) if value.isascii() and value.isdigit() else None


def _error_text(answer: wire.WireReply) -> str:
    return f"iLink answered {answer.code} {_server_message(answer)}".strip()


def _server_message(answer: wire.WireReply) -> str:
    """iLink's error text, which goes onto the bus, without anything that looks like a secret."""
    errmsg = bytes(answer.errmsg)
    return "" if errmsg == b"null" else hide_secrets(msgspec.json.decode(errmsg, type=str))


def _diagnostics(answer: wire.WireReply) -> dict[str, Any]:
    return {"ret": answer.ret, "errcode": answer.errcode, "errmsg": _server_message(answer)}


def _session_expired(answer: wire.WireReply) -> SessionExpired:
    return SessionExpired("needs_login", _error_text(answer), **_diagnostics(answer))
