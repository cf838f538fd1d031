"""iLink's calls: how long each waits, and by what outcome it is counted, which alerts and the runbook ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from adapter.errors import AdapterError, Temporary, Throttled, Uncertain
from adapter.ilink.client import ILink
from adapter.ilink.protocol import Declared, IlinkReply, IlinkRequest, Upload
from adapter.ports import HOLD_MS, Account
from adapter.tools.metrics import Metrics

BASE = "https://ilinkai.weixin.qq.com"
ACCOUNT = Account("b1@im.bot", "token", BASE)
DECLARED = Declared("3.0.1", "Platform/2.0", "gray")
CALLS: dict[str, Callable[[ILink], Awaitable[object]]] = {
    "getupdates": lambda ilink: ilink.poll(ACCOUNT, "", 20_000),
    "sendmessage": lambda ilink: ilink.send(ACCOUNT, user="u", client_id="c", context_token="t", content="hi"),
    "getconfig": lambda ilink: ilink.typing_ticket(ACCOUNT, "u", "t"),
    "sendtyping": lambda ilink: ilink.show_typing(ACCOUNT, "u", "t", on=True),
    "get_bot_qrcode": lambda ilink: ilink.fetch_code(()),
    "get_qrcode_status": lambda ilink: ilink.read_code("handle", BASE, ""),
}
OTHERS: dict[str, Callable[[ILink], Awaitable[object]]] = {
    "notifystart": lambda ilink: ilink.notify(ACCOUNT, start=True),
    "getuploadurl": lambda ilink: ilink.upload_url(ACCOUNT, Upload("u", "file", 1, "md5", "key", bytes(16)), BASE),
}


class Answering:
    """An `ILink` whose every request gets the same answer, or the one that `answer` gives."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: IlinkReply | Exception | Callable[[IlinkRequest], IlinkReply]
    ) -> None:
        self.metrics = Metrics()
        self.successes: list[tuple[str, bool, float]] = []
        self.ilink = ILink(
            self.metrics,
            default_base_url=BASE,
            allowed_hosts=(),
            poll_margin_s=7.0,
            send_timeout_s=15.0,
            on_success=lambda *told: self.successes.append(told),
            declared=DECLARED,
        )
        self.repeatable = False
        self.timeout_s = 0.0
        self.requests: list[IlinkRequest] = []

        async def exchange(_url: str, request: IlinkRequest, timeout_s: float, _check: object) -> IlinkReply:
            self.repeatable = request.repeatable
            self.timeout_s = timeout_s
            self.requests.append(request)
            if isinstance(answer, Exception):
                raise answer
            return answer(request) if callable(answer) else answer

        monkeypatch.setattr(self.ilink._pool, "exchange", exchange)


def reply(body: Any, status: int = 200, **headers: str) -> IlinkReply:
    return IlinkReply(status, headers, msgspec.json.encode(body))


@pytest.mark.parametrize("endpoint", CALLS)
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (TimeoutError(), "timeout"),
        (Uncertain("network", "cut"), "network"),
        (Temporary("network", "not there"), "network"),
        (reply({}, 502), "http_5xx"),
        (reply({}, 404), "http_4xx"),
        (reply({"ret": -9}), "ret_other"),
    ],
    ids=["no answer", "cut", "not there", "502", "404", "refused"],
)
async def test_each_call_that_fails_is_counted_by_how(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, answer: IlinkReply | Exception, outcome: str
) -> None:
    answering = Answering(monkeypatch, answer)
    with contextlib.suppress(AdapterError):
        await CALLS[endpoint](answering.ilink)
    assert answering.metrics.value("upstream_requests_total", endpoint=endpoint, outcome=outcome) == 1
    assert answering.successes == []


@pytest.mark.parametrize("endpoint", [*CALLS, *OTHERS])
async def test_each_call_that_succeeds_is_told(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """A send that had no answer is repeated then."""
    body = {"typing_ticket": "t", "qrcode": "q", "qrcode_img_content": "https://q", "status": "wait"}
    answering = Answering(monkeypatch, reply({"ret": 0, "upload_param": "p", **body}))
    await (CALLS | OTHERS)[endpoint](answering.ilink)
    ((base_url, is_send, took_s),) = answering.successes
    assert (base_url, is_send) == (BASE, endpoint == "sendmessage")
    assert 0 <= took_s < 60


@pytest.mark.parametrize("endpoint", [*CALLS, *OTHERS])
async def test_each_call_declares_what_the_settings_say(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The two about a QR code have no base_info, as in the official client."""
    answering = Answering(monkeypatch, reply({}, 404))
    with contextlib.suppress(AdapterError):
        await (CALLS | OTHERS)[endpoint](answering.ilink)
    (request,) = answering.requests
    assert request.endpoint == endpoint
    headers = request.headers.split("\r\n")
    assert {"iLink-App-Id: bot", f"iLink-App-ClientVersion: {3 << 16 | 1}", "SKRouteTag: gray"} <= {*headers}
    base_info = msgspec.json.decode(request.body or b"{}").get("base_info")
    has_none = endpoint in ("get_bot_qrcode", "get_qrcode_status")
    assert base_info == (None if has_none else {"channel_version": "3.0.1", "bot_agent": "Platform/2.0"})


@pytest.mark.parametrize("endpoint", ["getupdates", "sendmessage", "getconfig"])
async def test_dead_tokens_are_counted_apart(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    answering = Answering(monkeypatch, reply({"ret": -14}))
    with pytest.raises(AdapterError):
        await CALLS[endpoint](answering.ilink)
    assert answering.metrics.value("upstream_requests_total", endpoint=endpoint, outcome="ret_14") == 1


@pytest.mark.parametrize(
    ("endpoint", "timeout_s"),
    [("getupdates", 27.0), ("sendmessage", 15.0), ("get_qrcode_status", HOLD_MS / 1000 + 7.0)],
)
async def test_a_call_that_ilink_holds_is_given_longer_than_that(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, timeout_s: float
) -> None:
    answering = Answering(monkeypatch, TimeoutError())
    with contextlib.suppress(AdapterError):
        await CALLS[endpoint](answering.ilink)
    assert answering.timeout_s == timeout_s


@pytest.mark.parametrize("endpoint", CALLS)
async def test_a_send_alone_may_not_be_asked_twice(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """It may count twice in the user's window, and be shown twice."""
    answering = Answering(monkeypatch, Temporary("network", "not there"))
    with contextlib.suppress(AdapterError):
        await CALLS[endpoint](answering.ilink)
    assert answering.repeatable == (endpoint != "sendmessage")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TimeoutError(), (Uncertain, "timeout", 0)),
        (Uncertain("network", "cut"), (Uncertain, "network", 0)),
        (Temporary("network", "refused"), (Temporary, "network", 0)),
        (IlinkReply(503, {"content-encoding": "br"}, b"?"), (Temporary, "http_5xx", 503)),
        (IlinkReply(403, {"content-encoding": "gzip"}, b"?"), (Temporary, "http_4xx", 403)),
        (IlinkReply(502, {"content-encoding": "gzip"}, b"?"), (Uncertain, "http_5xx", 502)),
        (IlinkReply(200, {"content-encoding": "gzip"}, b"?"), (Uncertain, "unreadable", 200)),
        (reply({"ret": -2}, 429), (Throttled, "throttled", 429)),
    ],
    ids=[
        "no answer",
        "cut",
        "refused",
        "503 in br",
        "403 in broken gzip",
        "502 in broken gzip",
        "200 in broken gzip",
        "-2 beside 429",
    ],
)
async def test_failures_of_a_send_say_whether_it_may_have_arrived(
    monkeypatch: pytest.MonkeyPatch, answer: IlinkReply | Exception, expected: object
) -> None:
    answering = Answering(monkeypatch, answer)
    with pytest.raises(AdapterError) as caught:
        await CALLS["sendmessage"](answering.ilink)
    assert (type(caught.value), caught.value.reason, caught.value.http_status) == expected
