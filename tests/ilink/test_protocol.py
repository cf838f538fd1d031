"""iLink's rules, row by row: which bytes go out, and what each answer makes the adapter do."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from adapter.errors import AdapterError, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ilink import protocol
from adapter.ilink.protocol import (
    IlinkReply,
    hold_ms,
    read_notified,
    read_qrcode,
    read_qrcode_status,
    read_sent,
    read_updates,
    retry_after,
)
from adapter.ports import HOLD_MS, Accepted, MediaKind, MediaRef, Polled, QrCode, Scan, Uploaded

DECLARED = protocol.Declared()
BIG = 7497484083968569736
"""Beyond 2^53: a double would make 7497484083968569344 of it."""

IDLE = Polled([], None, HOLD_MS)
HTML = b"<html><head><title>502 Bad Gateway</title></head></html>"
JSON = {"content-type": "application/json"}


def reply(body: bytes | dict[str, Any], status: int = 200, **headers: str) -> IlinkReply:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return IlinkReply(status, {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}, data)


APP_HEADERS = {"iLink-App-Id": "bot", "iLink-App-ClientVersion": "132105"}
POST_HEADERS = {"Content-Type": "application/json", "AuthorizationType": "ilink_bot_token"} | APP_HEADERS


def headers_of(request: protocol.IlinkRequest) -> dict[str, str]:
    """The headers of a request beside those that the connection adds."""
    return dict(line.split(": ") for line in request.headers.removesuffix("\r\n").split("\r\n"))


def outcome(read: Callable[[], object]) -> object:
    """What a reader returns; for an error its class, its reason and how long to wait."""
    try:
        return read()
    except Temporary as exc:
        return Temporary, exc.reason, exc.retry_after_s
    except AdapterError as exc:
        return type(exc), exc.reason


# sendmessage ---------------------------------------------------------------------------------------------


SENT = [
    ("ret-0-and-a-string-id", reply({"ret": 0, "message_id": str(BIG)}), Accepted(str(BIG), 0, None, "")),
    ("largest-uint64", reply({"message_id": 2**64 - 1}), Accepted(str(2**64 - 1), None, None, "")),
    ("ret-missing", reply({"message_id": "1"}), Accepted("1", None, None, "")),
    ("unknown-fields", reply({"ret": 0, "message_id": "1", "new": [1]}), Accepted("1", 0, None, "")),
    ("ret-0-without-id-is-unconfirmed", reply({"ret": 0}), Accepted(None, 0, None, "")),
    ("id-0-is-none", reply({"ret": 0, "message_id": 0}), Accepted(None, 0, None, "")),
    ("id-0-as-text-is-none", reply({"ret": 0, "message_id": "0"}), Accepted(None, 0, None, "")),
    ("id-longer-than-any-is-none", reply({"ret": 0, "message_id": "9" * 129}), Accepted(None, 0, None, "")),
    ("id-that-is-no-number-is-none", reply({"ret": 0, "message_id": "7\x1b[2J"}), Accepted(None, 0, None, "")),
    ("id-in-other-digits-is-none", reply({"ret": 0, "message_id": "\u0667"}), Accepted(None, 0, None, "")),
    ("id-below-0-is-none", reply({"ret": 0, "message_id": -7}), Accepted(None, 0, None, "")),
    ("id-of-no-known-form-is-none", reply({"ret": 0, "message_id": {"low": 1}}), Accepted(None, 0, None, "")),
    ("id-rounded-is-none", reply(b'{"ret":0,"message_id":7.5e18}'), Accepted(None, 0, None, "")),
    ("empty-object-is-unconfirmed", reply({}), Accepted(None, None, None, "")),
    ("empty-body-is-unconfirmed", reply(b""), Accepted(None, None, None, "")),
    ("wrong-content-type-is-judged-by-its-body", reply({"message_id": "1"}, content_type="text/html"),
     Accepted("1", None, None, "")),
    ("-1", reply({"ret": -1}), (Refused, "rejected")),
    ("-2-prepare-failed", reply({"ret": -2, "errmsg": "prepare failed"}), (Throttled, "throttled")),
    ("-2-without-errmsg", reply({"ret": -2}), (Throttled, "throttled")),
    ("-2-in-errcode-beside-ret-0", reply({"ret": 0, "errcode": -2}), (Throttled, "throttled")),
    ("-2-in-ret-beside-another-errcode", reply({"ret": -2, "errcode": -3}), (Throttled, "throttled")),
    ("-2-in-errcode-beside-another-ret", reply({"ret": 1, "errcode": -2}), (Throttled, "throttled")),
    ("-14-beside-2", reply({"ret": -2, "errcode": -14}), (SessionExpired, "needs_login")),
    ("-2-with-an-id-is-no-success", reply({"ret": -2, "message_id": "1"}), (Throttled, "throttled")),
    ("-3-bad-user", reply({"ret": -3}), (Refused, "invalid")),
    ("-4-elsewhere-seen-in-getconfig", reply({"ret": -4}), (Refused, "rejected")),
    ("-13-like-a-throttle", reply({"ret": -13, "errmsg": "rate"}), (Throttled, "throttled")),
    ("-13-in-errcode-beside-another-ret", reply({"ret": 1, "errcode": -13}), (Throttled, "throttled")),
    ("-14-in-errcode", reply({"errcode": -14, "errmsg": "session timeout"}), (SessionExpired, "needs_login")),
    ("-14-in-ret-beside-another-errcode", reply({"ret": -14, "errcode": -1}), (SessionExpired, "needs_login")),
    ("-14-in-errcode-beside-another-ret", reply({"ret": -1, "errcode": -14}), (SessionExpired, "needs_login")),
    ("unknown-code", reply({"ret": -9999}), (Refused, "rejected")),
    ("truncated-may-have-been-taken", reply(b'{"ret":0,"messa'), (Uncertain, "unreadable")),
    ("a-list-may-have-been-taken", reply(b"[]"), (Uncertain, "unreadable")),
    ("not-utf-8-is-read-all-the-same", reply(b'{"errmsg":"\xff","ret":0}'), Accepted(None, 0, None, "\ufffd")),
    ("-2-in-words-of-gbk", reply('{"ret":-2,"errmsg":"频率限制"}'.encode("gbk")), (Throttled, "throttled")),
    ("-14-in-words-of-gbk", reply('{"errcode":-14,"errmsg":"会话"}'.encode("gbk")), (SessionExpired, "needs_login")),
    ("nested-without-end", reply(b'{"a":' * 5000), (Uncertain, "unreadable")),
    ("503-took-nothing", reply(HTML, 503), (Temporary, "http_5xx", None)),
    ("503-says-when", reply(HTML, 503, retry_after="7"), (Temporary, "http_5xx", 7.0)),
    ("429-took-nothing", reply(b"", 429, retry_after="30"), (Temporary, "http_4xx", 30.0)),
    *((f"{status}-of-an-edge-without-ilink", reply(HTML, status), (Temporary, "http_5xx", None))
      for status in (521, 523, 525, 526)),
    *((f"{status}-may-have-been-taken", reply(HTML, status), (Uncertain, "http_5xx"))
      for status in (500, 502, 504, 520, 522, 524, 599)),
    *((f"{status}-of-a-gateway-took-nothing", reply(HTML, status), (Temporary, "http_4xx", None))
      for status in (400, 401, 403, 404, 407, 408, 499)),
    ("413-is-about-this-text", reply(HTML, 413), (Refused, "rejected")),
    ("302-is-not-followed", reply(b"", 302, location="https://evil.example"), (Temporary, "http_4xx", None)),
    ("json-of-a-gateway-beside-404", reply({"message": "no Route matched"}, 404), (Temporary, "http_4xx", None)),
    ("json-of-a-gateway-beside-500", reply({"error": "internal", "code": 7}, 500), (Uncertain, "http_5xx")),
    ("-14-beside-401", reply({"errcode": -14}, 401), (SessionExpired, "needs_login")),
    ("-14-beside-503", reply({"ret": -14}, 503), (SessionExpired, "needs_login")),
    ("-2-beside-429", reply({"ret": -2, "errmsg": "rate limited"}, 429), (Throttled, "throttled")),
    ("-2-beside-500", reply({"errcode": -2}, 500), (Throttled, "throttled")),
    ("-3-beside-400", reply({"ret": -3}, 400), (Temporary, "http_4xx", None)),
    ("-13-beside-429", reply({"ret": -13}, 429), (Temporary, "http_4xx", None)),
    ("another-code-beside-413", reply({"ret": -1}, 413), (Refused, "rejected")),
    ("another-code-beside-500", reply({"ret": -1}, 500), (Uncertain, "http_5xx")),
    ("another-code-beside-503", reply({"ret": -1}, 503), (Temporary, "http_5xx", None)),
    ("another-code-beside-429", reply({"errcode": 429}, 429), (Temporary, "http_4xx", None)),
    ("0-beside-500", reply({"ret": 0, "message_id": "1"}, 500), (Uncertain, "http_5xx")),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in SENT], ids=[row[0] for row in SENT])
def test_an_answer_to_a_send_has_one_meaning(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: read_sent(answer)) == expected


def test_a_refusal_keeps_what_ilink_said() -> None:
    """For the receipt: the raw codes beside our own word (lesson 6 of the protocol)."""
    with pytest.raises(Throttled) as caught:
        read_sent(reply({"ret": -2, "errcode": 0, "errmsg": "prepare failed"}))
    assert (caught.value.ret, caught.value.errcode, caught.value.errmsg) == (-2, 0, "prepare failed")


def test_a_long_errmsg_is_cut() -> None:
    with pytest.raises(Refused) as caught:
        read_sent(reply({"ret": -7, "errmsg": "words " * 20_000}))
    assert len(caught.value.errmsg) == 200
    assert len(caught.value.detail) < 300


# getupdates ----------------------------------------------------------------------------------------------


MESSAGE = {"message_id": BIG, "from_user_id": "u@im.wechat"}
RAW = msgspec.json.encode(MESSAGE)

UPDATES = [
    ("messages", reply({"ret": 0, "msgs": [MESSAGE], "get_updates_buf": "b"}), 1, Polled([RAW], "b", 35_000)),
    ("ret-missing", reply({"msgs": [MESSAGE], "get_updates_buf": "b"}), 1, Polled([RAW], "b", 35_000)),
    ("several-in-order", reply({"msgs": [1, 2, 3], "get_updates_buf": "b"}), 1,
     Polled([b"1", b"2", b"3"], "b", 35_000)),
    ("idle", reply({"msgs": [], "sync_buf": "C", "get_updates_buf": "b", "longpolling_timeout_ms": 20_000}), 35,
     Polled([], "b", 20_000)),
    ("msgs-absent", reply({"get_updates_buf": "b"}), 35, Polled([], "b", 35_000)),
    ("empty-cursor-keeps-the-old", reply({"msgs": [MESSAGE], "get_updates_buf": ""}), 1, Polled([RAW], None, 35_000)),
    ("null-cursor-keeps-the-old", reply({"msgs": [MESSAGE], "get_updates_buf": None}), 1,
     Polled([RAW], None, 35_000)),
    ("empty-object-is-idle", reply({}), 35, Polled([], None, 35_000)),
    ("empty-body-late-in-a-poll-is-idle", reply(b""), 10, Polled([], None, 35_000)),
    ("endless-cursor-keeps-the-old", reply({"msgs": [MESSAGE], "get_updates_buf": "b" * 131_073}), 1,
     Polled([RAW], None, 35_000, overlong=131_073)),
    ("longest-cursor", reply({"get_updates_buf": "b" * 131_072}), 1, Polled([], "b" * 131_072, 35_000)),
    ("wrong-content-type-is-judged-by-its-body", reply({"get_updates_buf": "b"}, content_type="text/plain"), 1,
     Polled([], "b", 35_000)),
    ("-1-is-idle", reply({"ret": -1}), 35, IDLE),
    ("-1-at-once-is-trouble", reply({"ret": -1}), 0.9, (Temporary, "ret_other", None)),
    ("-2", reply({"ret": -2}), 1, (Temporary, "ret_2", None)),
    ("-2-in-errcode", reply({"errcode": -2, "ret": 0}), 1, (Temporary, "ret_2", None)),
    ("-3", reply({"ret": -3}), 1, (Temporary, "ret_other", None)),
    ("-13", reply({"errcode": -13}), 1, (Temporary, "ret_2", None)),
    ("an-error-hides-no-messages", reply({"ret": -9, "msgs": [MESSAGE]}), 1, (Temporary, "ret_other", None)),
    ("-14-in-ret", reply({"ret": -14}), 1, (SessionExpired, "needs_login")),
    ("-14-in-errcode-ret-absent", reply({"errcode": -14, "errmsg": "session timeout"}), 1,
     (SessionExpired, "needs_login")),
    ("-14-in-ret-beside-another-errcode", reply({"ret": -14, "errcode": -1}), 1, (SessionExpired, "needs_login")),
    ("524-at-ten-seconds-is-idle", reply(HTML, 524), 10, IDLE),
    ("524-early-is-trouble", reply(HTML, 524), 9.9, (Temporary, "http_5xx", None)),
    ("500", reply(HTML, 500), 1, (Temporary, "http_5xx", None)),
    ("502", reply(HTML, 502), 1, (Temporary, "http_5xx", None)),
    ("503-says-when", reply(HTML, 503, retry_after="9"), 1, (Temporary, "http_5xx", 9.0)),
    ("429", reply(b"", 429, retry_after="4"), 1, (Temporary, "http_4xx", 4.0)),
    ("401-of-a-gateway", reply(b"", 401), 1, (Temporary, "http_4xx", None)),
    ("403-of-a-firewall", reply(HTML, 403), 1, (Temporary, "http_4xx", None)),
    ("404", reply(b"", 404), 1, (Temporary, "http_4xx", None)),
    ("-14-beside-401", reply({"errcode": -14}, 401), 1, (SessionExpired, "needs_login")),
    ("-2-beside-429", reply({"ret": -2}, 429), 1, (Temporary, "http_4xx", None)),
    ("302-is-not-followed", reply(b"", 302), 1, (Temporary, "http_4xx", None)),
    ("empty", reply(b""), 9, (Temporary, "unreadable", None)),
    ("truncated", reply(b'{"msgs":[{"message_id":1}],"get_up'), 1, (Temporary, "unreadable", None)),
    ("html", reply(HTML), 1, (Temporary, "unreadable", None)),
    ("a-list", reply(b"[]"), 1, (Temporary, "unreadable", None)),
    ("msgs-no-list", reply({"msgs": {}}), 1, (Temporary, "unreadable", None)),
    ("nested-without-end", reply(b'{"msgs":[' + b'{"a":' * 5000), 1, (Temporary, "unreadable", None)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "polled_s", "expected"), [row[1:] for row in UPDATES], ids=[row[0] for row in UPDATES]
)
def test_an_answer_to_a_poll_has_one_meaning(answer: IlinkReply, polled_s: float, expected: object) -> None:
    assert outcome(lambda: read_updates(answer, polled_s=polled_s)) == expected


def test_only_an_answer_of_bounded_size_is_repaired() -> None:
    for size, readable in ((protocol.REPAIRED_BYTES, True), (protocol.REPAIRED_BYTES + 1, False)):
        head, tail = b'{"msgs":[{"a":"', b'\x01"}]}'
        answer = reply(head + b"x" * (size - len(head) - len(tail)) + tail)
        expected = (Temporary, "unreadable", None)
        assert (outcome(lambda: read_updates(answer, polled_s=1)) != expected) is readable  # noqa: B023 -- called at once


@pytest.mark.parametrize(
    "said",
    [["x"] * 3000, {"a": "token-of-bot" * 1000}, "x" * 3000, 5, "token-of-bot"],
    ids=["list", "object", "text", "number", "secret"],
)
def test_error_messages_are_short_and_without_the_secrets_of_the_request(said: object) -> None:
    with pytest.raises(Temporary) as caught:
        read_updates(replace(reply({"ret": -9, "errmsg": said}), secrets=("token-of-bot",)), polled_s=1)
    assert len(caught.value.detail) < 250
    assert "token" not in caught.value.detail


@pytest.mark.parametrize(
    "escape",
    [rb"\ud83d", rb"\udc00", rb"cut \ud83d", rb"\ud83d\ud83d\ude00", rb"\ud83d\u0041", rb"\\\ud83d"],
    ids=["high", "low", "at-the-end", "before-a-pair", "before-a-letter", "after-a-backslash"],
)
def test_half_an_emoji_does_not_spoil_the_batch(escape: bytes) -> None:
    """JSON of half a surrogate pair is no Unicode; a decoder refuses the whole answer, and so would every repeat."""
    body = rb'{"msgs":[{"t":"%s"},{"t":"\ud83d\ude00"},{"t":"\\ud83d"}],"get_updates_buf":"b"}' % escape

    polled = read_updates(reply(body), polled_s=1)

    assert polled.cursor == "b"
    texts = [msgspec.json.decode(raw)["t"] for raw in polled.messages]
    assert "\N{REPLACEMENT CHARACTER}" in texts[0]
    assert texts[1:] == ["😀", r"\ud83d"]


WRITTEN_OTHERWISE = {
    "numbers-in-quotes": b'{"ret":"0","errcode":"0","msgs":[{"a":1}],"get_updates_buf":"c"}',
    "a-cursor-that-is-a-number": b'{"ret":0,"msgs":[{"a":1}],"get_updates_buf":7}',
    "an-error-message-that-is-none": b'{"ret":0,"errmsg":{"zh":""},"msgs":[{"a":1}],"get_updates_buf":"c"}',
    "a-line-break-in-a-text": b'{"ret":0,"x":"one\ntwo",\n"msgs":[{"a":1}],"get_updates_buf":"c"}',
    "a-byte-order-mark": b'\xef\xbb\xbf{"ret":0,"msgs":[{"a":1}],"get_updates_buf":"c"}',
}


@pytest.mark.parametrize("body", WRITTEN_OTHERWISE.values(), ids=WRITTEN_OTHERWISE)
def test_an_answer_that_is_written_otherwise_loses_no_message(body: bytes) -> None:
    """As protobuf's JSON writes 64 bits, or an encoder that is no encoder."""
    polled = read_updates(reply(body), polled_s=1)
    assert (polled.messages, polled.cursor) == ([b'{"a":1}'], "7" if b":7}" in body else "c")


@pytest.mark.parametrize("secret", ["no-usual-token:0b1c2d", "0b1c2d", "any context"])
def test_an_error_message_has_no_secret_of_its_request_whatever_it_looks_like(secret: str) -> None:
    request = protocol.message_request(
        "no-usual-token:0b1c2d", DECLARED, {}, user="u", client_id="c", context_token="any context"
    )
    answer = replace(
        reply({"ret": -1, "errmsg": f"{'x' * 190} {secret} is wrong, {secret}"}),
        secrets=(request.token, request.secret),
    )
    with pytest.raises(Refused) as caught:
        read_sent(answer)
    assert secret[:4] not in caught.value.detail + caught.value.errmsg


def test_an_error_message_that_quotes_the_cursor_has_no_token() -> None:
    """It stands in there, in base64."""
    cursor = base64.b64encode(b"\n\x02\x08\x01\x12\x16b1@im.bot:060000secret").decode()
    request = protocol.updates_request("b1@im.bot:060000secret", cursor, DECLARED)
    answer = replace(
        reply({"ret": -2, "errmsg": f"bad get_updates_buf {cursor}"}), secrets=(request.token, request.secret)
    )
    with pytest.raises(Temporary) as caught:
        read_updates(answer, polled_s=1)
    assert cursor[:20] not in caught.value.detail


@pytest.mark.parametrize("status", [200, 401])
def test_an_error_message_of_a_poll_has_no_token_of_a_user(status: int) -> None:
    """The request has none of them, and their form is iLink's to choose."""
    with pytest.raises(SessionExpired) as caught:
        read_updates(reply({"errcode": -14, "errmsg": f"context {'qZ8+' * 30}== is dead"}, status), polled_s=1)
    assert "qZ8" not in caught.value.detail + caught.value.errmsg
    assert caught.value.detail == "iLink answered -14 context *** is dead"


def test_an_error_message_that_quotes_the_request_has_no_secret() -> None:
    with pytest.raises(SessionExpired) as caught:
        read_updates(reply({"errcode": -14, "errmsg": "token b1@im.bot:060000secret is dead"}), polled_s=1)
    assert "secret" not in caught.value.detail + caught.value.errmsg
    assert "is dead" in caught.value.detail


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (0, 35_000),
        (-1, 35_000),
        (5_000, 5_000),
        (4_999, 5_000),
        (1, 5_000),
        (60_000, 60_000),
        (120_000, 60_000),
        (10**18, 35_000),
        (25_000.7, 35_000),
        ("20000", 20_000),
        ("-5", 35_000),
        ("９９９９", 35_000),
        (True, 35_000),
        ([], 35_000),
    ],
)
def test_the_hold_is_clamped(hint: object, expected: int) -> None:
    """5 to 60 seconds; no positive number is no hint."""
    assert hold_ms(msgspec.json.encode(hint)) == expected


@pytest.mark.parametrize("hint", [b"1e999", b"9" * 5000, b'{"a":[1]}'])
def test_a_hint_that_is_no_number_costs_no_message(hint: bytes) -> None:
    body = b'{"ret":0,"msgs":[{"message_id":1}],"get_updates_buf":"c","longpolling_timeout_ms":%b}' % hint
    assert read_updates(reply(body), polled_s=1) == Polled([b'{"message_id":1}'], "c", HOLD_MS)


@pytest.mark.parametrize("body", [{"errcode": -14, "msgs": ""}, {"ret": -14, "msgs": {}}])
def test_a_stale_token_is_seen_whatever_stands_beside_it(body: dict[str, Any]) -> None:
    with pytest.raises(SessionExpired):
        read_updates(reply(body), polled_s=1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5", 5.0), ("0", 0.0), ("99999", 300.0), ("", None), ("soon", None), ("-1", None), ("1.5", None), ("٣", None),
     ("Wed, 21 Oct 2026 07:28:00 GMT", None)],
)  # fmt: skip
def test_retry_after_is_seconds_up_to_five_minutes(value: str, expected: float | None) -> None:
    assert retry_after({"retry-after": value}) == expected


# notifystart, notifystop ---------------------------------------------------------------------------------


NOTIFIED = [
    ("ret-0", reply({"ret": 0}), None),
    ("empty-object", reply({}), None),
    ("empty-body", reply(b""), None),
    ("ret-and-errmsg", reply({"ret": 3, "errmsg": "no"}), (Temporary, "ret_other", None)),
    ("-14", reply({"errcode": -14}), (SessionExpired, "needs_login")),
    ("-14-beside-401", reply({"errcode": -14}, 401), (SessionExpired, "needs_login")),
    ("html", reply(HTML), (Temporary, "unreadable", None)),
    ("nested-without-end", reply(b'{"a":' * 5000), (Temporary, "unreadable", None)),
    ("500", reply(b"", 500), (Temporary, "http_5xx", None)),
    ("404", reply(b"", 404), (Temporary, "http_4xx", None)),
]


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in NOTIFIED], ids=[row[0] for row in NOTIFIED])
def test_an_answer_to_a_notification_has_one_meaning(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: read_notified(answer)) == expected


# getconfig, sendtyping -----------------------------------------------------------------------------------


TICKETS = [
    ("success", reply({"ret": 0, "typing_ticket": "AART=="}), "AART=="),
    ("ret-missing", reply({"typing_ticket": "AART=="}), "AART=="),
    ("errcode-beside-a-ticket", reply({"ret": 0, "errcode": 7, "typing_ticket": "AART=="}), (Refused, "typing")),
    ("empty-object", reply({}), (Refused, "typing")),
    ("no-ticket", reply({"ret": 0}), (Refused, "typing")),
    ("empty-ticket", reply({"ret": 0, "typing_ticket": ""}), (Refused, "typing")),
    ("-4", reply({"ret": -4, "errmsg": "GetTypingTicket rpc failed"}), (Refused, "typing")),
    ("-2", reply({"ret": -2, "errmsg": "ilink_user_id required"}), (Refused, "typing")),
    ("-14", reply({"ret": -14}), (SessionExpired, "needs_login")),
    ("-14-as-errcode", reply({"errcode": -14}), (SessionExpired, "needs_login")),
    ("empty-body", reply(b""), (Temporary, "unreadable", None)),
    ("html", reply(HTML), (Temporary, "unreadable", None)),
    ("500", reply(HTML, 500), (Temporary, "http_5xx", None)),
    ("404", reply(HTML, 404), (Temporary, "http_4xx", None)),
    ("-14-beside-401", reply({"errcode": -14}, 401), (SessionExpired, "needs_login")),
]


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in TICKETS], ids=[row[0] for row in TICKETS])
def test_a_ticket_is_there_only_where_ilink_says_so(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: protocol.read_ticket(answer)) == expected


REFUSED_TICKETS = [
    ({"ret": -4, "errmsg": "GetTypingTicket rpc failed"}, "The user has not written to this bot yet."),
    ({"ret": 0, "errcode": 7, "errmsg": "no"}, "iLink answered 7 no"),
    ({"ret": 0}, "iLink gave no typing ticket."),
    ({"typing_ticket": ""}, "iLink gave no typing ticket."),
]


@pytest.mark.parametrize(("body", "detail"), REFUSED_TICKETS)
def test_why_there_is_no_ticket_is_said(body: dict[str, Any], detail: str) -> None:
    with pytest.raises(Refused) as caught:
        protocol.read_ticket(reply(body))
    assert caught.value.detail == detail


TYPED = [
    ("success", reply({"ret": 0}), None),
    ("ret-missing", reply({}), None),
    ("empty-body", reply(b""), None),
    ("-2", reply({"ret": -2, "errmsg": "typing_ticket expired"}), (Refused, "typing")),
    ("errcode-beside-ret-0", reply({"ret": 0, "errcode": 7}), (Refused, "typing")),
    ("html", reply(HTML), (Temporary, "unreadable", None)),
    ("-14", reply({"errcode": -14}), (SessionExpired, "needs_login")),
    ("-14-beside-401", reply({"errcode": -14}, 401), (SessionExpired, "needs_login")),
    ("500", reply(HTML, 500), (Temporary, "http_5xx", None)),
]


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in TYPED], ids=[row[0] for row in TYPED])
def test_an_answer_to_typing_says_whether_it_was_done(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: protocol.read_typing(answer)) == expected


# what goes out -------------------------------------------------------------------------------------------


KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
FILEKEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"


def upload_request(kind: MediaKind = "file") -> protocol.IlinkRequest:
    upload = protocol.Upload("o9Cq@im.wechat", kind, 14, "7d36e586ba5d45ede81619df48a3d898", FILEKEY, KEY)
    return protocol.upload_request("bot:secret", DECLARED, upload)


def send_request() -> protocol.IlinkRequest:
    return protocol.message_request(
        "bot:secret", DECLARED, protocol.text_item("on it 😀"),
        user="o9Cq@im.wechat", client_id="c-1", context_token="AARz",
    )  # fmt: skip


def test_a_send_without_a_context_token_leaves_it_out() -> None:
    request = protocol.message_request("bot:secret", DECLARED, {}, user="u", client_id="c", context_token="")
    assert "context_token" not in msgspec.json.decode(request.body)["msg"]


@pytest.mark.parametrize(
    ("number", "header"), [(305419896, "MzA1NDE5ODk2"), (0, "MA=="), (4294967295, "NDI5NDk2NzI5NQ==")]
)
def test_the_uin_is_the_decimal_text_in_base64(number: int, header: str) -> None:
    assert protocol.uin(number) == header


@pytest.mark.parametrize(
    "request_",
    [
        send_request(),
        protocol.updates_request("bot:secret", "", DECLARED),
        protocol.notify_request("bot:secret", DECLARED, start=True),
        protocol.notify_request("bot:secret", DECLARED, start=False),
        upload_request(),
    ],
    ids=lambda request: request.endpoint,
)
def test_every_post_carries_all_headers(request_: protocol.IlinkRequest) -> None:
    """Exactly these headers; no Content-Length by hand."""
    assert (headers_of(request_), request_.token) == (POST_HEADERS, "bot:secret")
    assert msgspec.json.decode(request_.body)["base_info"] == {
        "channel_version": "2.4.9",
        "bot_agent": protocol.AGENT,
    }


def test_a_send_has_the_official_shape() -> None:
    """Exactly these fields, one item."""
    request = send_request()
    assert request.path == "/ilink/bot/sendmessage"
    assert msgspec.json.decode(request.body)["msg"] == {
        "from_user_id": "",
        "to_user_id": "o9Cq@im.wechat",
        "client_id": "c-1",
        "message_type": 2,
        "message_state": 2,
        "item_list": [{"type": 1, "text_item": {"text": "on it 😀"}}],
        "context_token": "AARz",
    }


def test_a_poll_sends_the_cursor_and_nothing_deprecated() -> None:
    request = protocol.updates_request("t", "CAES", DECLARED)
    assert request.path == "/ilink/bot/getupdates"
    assert msgspec.json.decode(request.body).keys() == {"get_updates_buf", "base_info"}
    assert msgspec.json.decode(request.body)["get_updates_buf"] == "CAES"


def test_typing_names_the_user_as_ilink_wants_it() -> None:
    """One client called the field `user_id` (13, row 8); another wrote `command` for `status`."""
    config = protocol.config_request("t", DECLARED, user="u", context_token="AARz")
    bare = protocol.config_request("t", DECLARED, user="u", context_token="")
    on = protocol.typing_request("t", DECLARED, user="u", ticket="AART", on=True)
    off = protocol.typing_request("t", DECLARED, user="u", ticket="AART", on=False)
    info = {"channel_version": "2.4.9", "bot_agent": protocol.AGENT}
    assert [(r.endpoint, r.path) for r in (config, on)] == [
        ("getconfig", "/ilink/bot/getconfig"),
        ("sendtyping", "/ilink/bot/sendtyping"),
    ]
    assert [msgspec.json.decode(r.body) for r in (config, bare, on, off)] == [
        {"ilink_user_id": "u", "context_token": "AARz", "base_info": info},
        {"ilink_user_id": "u", "base_info": info},
        {"ilink_user_id": "u", "typing_ticket": "AART", "status": 1, "base_info": info},
        {"ilink_user_id": "u", "typing_ticket": "AART", "status": 2, "base_info": info},
    ]


# media ---------------------------------------------------------------------------------------------------


CDN = "https://novac2c.cdn.weixin.qq.com/c2c"


def test_getuploadurl_is_asked_as_in_the_example_of_3_5() -> None:
    body = msgspec.json.decode(upload_request().body)
    assert body.pop("base_info")["channel_version"] == "2.4.9"
    assert body == {
        "filekey": FILEKEY,
        "media_type": 3,
        "to_user_id": "o9Cq@im.wechat",
        "rawsize": 14,
        "rawfilemd5": "7d36e586ba5d45ede81619df48a3d898",
        "filesize": 16,
        "no_need_thumb": True,
        "aeskey": "00112233445566778899aabbccddeeff",
    }


def test_media_types_are_numbered_otherwise_than_items() -> None:
    kinds: list[MediaKind] = ["image", "video", "file"]
    assert [msgspec.json.decode(upload_request(kind).body)["media_type"] for kind in kinds] == [1, 2, 3]


FULL = f"{CDN}/upload?encrypted_query_param=OPAQUE&filekey={FILEKEY}&taskid=demo"
UPLOAD_URLS = [
    ("the-whole-url", reply({"upload_full_url": FULL}), FULL),
    ("the-whole-url-is-preferred", reply({"ret": 0, "upload_full_url": FULL, "upload_param": "x"}), FULL),
    ("a-parameter", reply({"upload_full_url": "", "upload_param": "a+b/c=="}),
     f"{CDN}/upload?encrypted_query_param=a%2Bb%2Fc%3D%3D&filekey={FILEKEY}"),
    ("a-place-counts-whatever-the-code", reply({"ret": -1, "upload_full_url": FULL}), FULL),
    ("neither", reply({"ret": 0}), (Refused, "media")),
    ("-1", reply({"ret": -1}), (Refused, "media")),
    ("-2", reply({"ret": -2}), (Refused, "media")),
    ("2", reply({"ret": 2}), (Refused, "media")),
    ("-14", reply({"errcode": -14}), (SessionExpired, "needs_login")),
    ("400-of-a-gateway", reply(b"", 400), (Temporary, "http_4xx", None)),
    ("-1-beside-400", reply({"ret": -1}, 400), (Temporary, "http_4xx", None)),
    ("-2-beside-400", reply({"ret": -2}, 400), (Refused, "media")),
    ("-14-beside-400", reply({"ret": -14}, 400), (SessionExpired, "needs_login")),
    ("403-of-a-firewall", reply(HTML, 403), (Temporary, "http_4xx", None)),
    ("429", reply(b"", 429, retry_after="3"), (Temporary, "http_4xx", 3.0)),
    ("500", reply(HTML, 500), (Temporary, "http_5xx", None)),
    ("524", reply(HTML, 524), (Temporary, "http_5xx", None)),
    ("empty", reply(b""), (Temporary, "unreadable", None)),
    ("html", reply(HTML), (Temporary, "unreadable", None)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"), [row[1:] for row in UPLOAD_URLS], ids=[row[0] for row in UPLOAD_URLS]
)
def test_an_answer_to_getuploadurl_has_one_meaning(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: protocol.read_upload_url(answer, cdn_base_url=CDN, filekey=FILEKEY)) == expected


MEDIA = {
    "encrypt_query_param": "REF",
    "aes_key": "MDAxMTIyMzM0NDU1NjY3Nzg4OTlhYWJiY2NkZGVlZmY=",
    "encrypt_type": 1,
}


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("image", {"type": 2, "image_item": {"media": MEDIA, "mid_size": 16}}),
        ("video", {"type": 5, "video_item": {"media": MEDIA, "video_size": 16}}),
        ("file", {"type": 4, "file_item": {"media": MEDIA, "file_name": "hello.txt", "len": "14"}}),
    ],
)
def test_media_go_out_in_the_official_least_shape(kind: MediaKind, item: dict[str, Any]) -> None:
    """As the protocol's pages on outbound items and test vectors have them."""
    media = Uploaded(kind, "hello.txt", 14, 16, "REF", KEY)
    request = protocol.message_request(
        "bot:secret",
        DECLARED,
        protocol.media_item(media),
        user="o9Cq@im.wechat",
        client_id="c-1",
        context_token="AARz",
    )
    text = msgspec.json.decode(send_request().body)["msg"]
    assert (request.endpoint, request.path) == (send_request().endpoint, send_request().path)
    assert msgspec.json.decode(request.body)["msg"] == text | {"item_list": [item]}


def test_the_cdns_error_message_is_cut_to_what_may_be_shown() -> None:
    headers = {
        "x-error-code": "-5102031",
        "x-error-message": "illegal\x1b[2J content " + "A" * 40 + " é " + "b " * 500,
    }
    refusal = protocol.cdn_refusal(400, headers)
    assert (refusal.reason, len(refusal.detail) < 300) == ("media", True)
    assert refusal.detail.startswith("The CDN refused the upload: HTTP 400 -5102031 illegal [2J content …")
    assert protocol.cdn_refusal(403, {}).detail == "The CDN refused the upload: HTTP 403"


def test_keys_and_links_are_in_no_repr() -> None:
    shown = repr(Uploaded("file", "n", 14, 16, "REF", KEY)) + repr(MediaRef(0, "https://x/LINK", "REF", KEY, "n"))
    assert not any(secret in shown for secret in ("REF", "LINK", repr(KEY)))


# QR logins -----------------------------------------------------------------------------------------------


def test_a_qr_code_is_asked_for_without_authorization_and_base_info() -> None:
    """Ten tokens at most, the newest."""
    request = protocol.qrcode_request(DECLARED, [f"token-{n}" for n in range(12)])
    assert (request.method, request.path) == ("POST", "/ilink/bot/get_bot_qrcode?bot_type=3")
    assert (headers_of(request), request.token) == (POST_HEADERS, "")
    assert msgspec.json.decode(request.body) == {"local_token_list": [f"token-{n}" for n in range(10)]}


def test_a_status_is_asked_for_by_get_with_the_app_headers_alone() -> None:
    request = protocol.qrcode_status_request(DECLARED, "a/b&c=1 é", "")
    assert (request.method, request.body) == ("GET", b"")
    assert request.path == "/ilink/bot/get_qrcode_status?qrcode=a%2Fb%26c%3D1%20%C3%A9"
    assert headers_of(request) == APP_HEADERS
    assert protocol.qrcode_status_request(DECLARED, "q", "4711").path.endswith("?qrcode=q&verify_code=4711")


QR_URL = "https://liteapp.weixin.qq.com/q/demo?qrcode=qr-demo-1"
QRCODES = [
    ("a-code", reply({"ret": 0, "qrcode": "qr-1", "qrcode_img_content": QR_URL}), QrCode("qr-1", QR_URL)),
    ("ret-missing", reply({"qrcode": "qr-1", "qrcode_img_content": QR_URL}), QrCode("qr-1", QR_URL)),
    ("no-handle", reply({"ret": 0, "qrcode_img_content": QR_URL}), (Temporary, "unreadable", None)),
    ("no-url", reply({"ret": 0, "qrcode": "qr-1"}), (Temporary, "unreadable", None)),
    ("handle-longer-than-any-url", reply({"qrcode": "q" * 8193, "qrcode_img_content": QR_URL}),
     (Temporary, "unreadable", None)),
    ("url-with-controls", reply({"qrcode": "q", "qrcode_img_content": "https://a\x1b[31m"}),
     (Temporary, "unreadable", None)),
    ("longest-content", reply({"qrcode": "q", "qrcode_img_content": "A" * 2953}), QrCode("q", "A" * 2953)),
    ("content-too-long", reply({"qrcode": "q", "qrcode_img_content": "A" * 2954}),
     (Temporary, "unreadable", None)),
    ("refused", reply({"ret": -2, "errmsg": "no"}), (Temporary, "ret_other", None)),
    ("html", reply(HTML, 502), (Temporary, "http_5xx", None)),
    ("busy", reply(b"", 429, retry_after="7"), (Temporary, "http_4xx", 7.0)),
    ("not-found", reply(HTML, 404), (Temporary, "http_4xx", None)),
    ("empty", reply(b""), (Temporary, "unreadable", None)),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in QRCODES], ids=[row[0] for row in QRCODES])
def test_an_answer_to_the_wish_for_a_code_has_one_meaning(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: read_qrcode(answer)) == expected


CONFIRMED = {
    "ret": 0,
    "status": "confirmed",
    "bot_token": "b0f5860fdecb@im.bot:0600abcd",
    "ilink_bot_id": "b0f5860fdecb@im.bot",
    "ilink_user_id": "o9cq80demoUser@im.wechat",
    "baseurl": "https://ilinkai.weixin.qq.com",
}
SCANS = [
    *((status, reply({"ret": 0, "status": status}), Scan(status)) for status in (
        "wait", "scaned", "need_verifycode", "verify_code_blocked", "expired", "binded_redirect")),
    ("redirect", reply({"status": "scaned_but_redirect", "redirect_host": "a.weixin.qq.com"}),
     Scan("scaned_but_redirect", redirect_host="a.weixin.qq.com")),
    ("redirect-without-host", reply({"status": "scaned_but_redirect"}), Scan("scaned_but_redirect")),
    ("confirmed", reply(CONFIRMED), Scan("confirmed", bot="b0f5860fdecb@im.bot", user="o9cq80demoUser@im.wechat",
     token="b0f5860fdecb@im.bot:0600abcd", base_url="https://ilinkai.weixin.qq.com")),
    ("confirmed-with-nothing", reply({"status": "confirmed"}), Scan("confirmed")),
    ("unknown-status-is-wait", reply({"status": "something_new"}), Scan("wait")),
    ("no-status-is-wait", reply({"ret": 0}), Scan("wait")),
    ("524", reply(HTML, 524), (Temporary, "http_5xx", None)),
    ("-2", reply({"ret": -2, "status": "confirmed"}), (Temporary, "ret_other", None)),
    ("a-number-as-token", reply({**CONFIRMED, "bot_token": 5}), (Temporary, "unreadable", None)),
    ("truncated", reply(b'{"status":"confir'), (Temporary, "unreadable", None)),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in SCANS], ids=[row[0] for row in SCANS])
def test_an_answer_about_a_code_has_one_meaning(answer: IlinkReply, expected: object) -> None:
    assert outcome(lambda: read_qrcode_status(answer)) == expected


def test_what_is_read_of_a_login_shows_no_secret() -> None:
    scan = read_qrcode_status(reply(CONFIRMED))
    assert "0600abcd" not in repr(scan)
    assert "qr-1" not in repr(QrCode("qr-1", QR_URL))
    with pytest.raises(Temporary) as caught:
        read_qrcode_status(reply({**CONFIRMED, "baseurl": ["0600abcd"]}))
    assert "0600abcd" not in str(caught.value)
