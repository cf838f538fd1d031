"""Logging: the shape of a line, and that no secret comes through, whichever way it went in."""

from __future__ import annotations

import base64
import logging
import re
import uuid
import warnings
from collections import Counter
from typing import Any

import pytest
import structlog

from adapter.contract.messages import Bind
from adapter.tools import logs
from tests.capture import Capture

TOKEN = "b0f5860fdecb@im.bot:0600abcdCANARY"
CONTEXT = "AARzJWCANARY+x/y="
SEED = "SUACANARY" + "A" * 49


def test_a_line_has_the_names_of_the_log_model(captured: Capture) -> None:
    structlog.get_logger().warning("poll.delayed", sandbox="s1", reason="timeout", wait_s=1.5)
    (line,) = captured.lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "severity_text": "WARNING",
        "body": "poll.delayed",
        "service.name": "wechat-nats",
        "service.version": "1.2.3",
        "sandbox": "s1",
        "reason": "timeout",
        "wait_s": 1.5,
    }


@pytest.mark.parametrize(
    "key",
    [
        "bot_token",
        "token",
        "Authorization",
        "context_token",
        "text",
        "get_updates_buf",
        "cursor",
        "qrcode",
        "password",
        "token_key",
        "transcript",
        "nats_token",
        "aes_key",
    ],
)
def test_a_field_with_the_name_of_a_secret_is_hidden(captured: Capture, key: str) -> None:
    structlog.get_logger().info("x.happened", **{key: "CANARY"}, nested={"a": [{key: "CANARY"}]})
    assert b"CANARY" not in captured.getvalue()
    assert captured.lines()[0][key] == "***"


@pytest.mark.parametrize(
    "text",
    [
        f"refused {TOKEN}",
        "Authorization: Bearer CANARY",
        f"stale {CONTEXT}",
        '{"msg":{"context_token":"CANARY","item_list":[{"text":"say \\"CANARY\\" CANARY"}]}}',
        "{'get_updates_buf': 'CANARY'}",
        "{'text': 'CANARY is cut here",
        '"{\\"bot_token\\":\\"CANARY\\"}"',
        'body=b\'{"cursor": "CANARY"}\'',
        "GET https://cdn.example/c2c/download?encrypted_query_param=CANARY&x=1",
        "connect nats://me:CANARY@nats:4222",
        f"seed {SEED}",
        "jwt eyJ0eXAiOiJKV1QCANARY.eyJqdGkiCANARY.c2lnCANARY",
    ],
)
def test_what_looks_like_a_secret_is_hidden_in_any_text(
    captured: Capture, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """In a field, in the event, in an exception, in a library's message and in an object's repr."""
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if type(handler).__module__ == logs.__name__]
    monkeypatch.setattr(root, "handlers", ours)  # pytest's own hide nothing: tests/conftest.py would find the secrets
    structlog.get_logger().info("x.happened", detail=text, several=[text], by={"k": text}, exc=ValueError(text))
    structlog.get_logger().info(text)
    logging.getLogger("httpx").warning("request: %s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        structlog.get_logger().exception("x.failed")
        logging.getLogger("nats").exception("failed")
    assert len(captured.lines()) == 5
    assert b"CANARY" not in captured.getvalue()
    assert b"RuntimeError" in captured.getvalue()


@pytest.mark.parametrize("before", ["", "x", "xx"])
@pytest.mark.parametrize("words", ["{}", "invalid get_updates_buf {} for this bot"])
def test_a_token_in_base64_is_hidden_as_it_stands_in_cursors(captured: Capture, before: str, words: str) -> None:
    cursor = base64.b64encode(f"{before}b@im.bot:06secret".encode()).decode()
    structlog.get_logger().info("x.happened", detail=words.format(cursor))
    (line,) = captured.lines()
    assert cursor[-12:].encode() not in captured.getvalue()
    assert "***" in line["detail"]


def test_a_chained_exception_is_redacted_too(captured: Capture) -> None:
    try:
        try:
            raise ValueError(f"inner {TOKEN}")
        except ValueError as exc:
            raise RuntimeError(f"outer {CONTEXT}") from exc
    except RuntimeError:
        structlog.get_logger().exception("x.failed")
    assert "inner b0f5860fdecb@im.bot:***" in captured.lines()[0]["exception"]
    assert b"CANARY" not in captured.getvalue()


def test_a_struct_as_a_field_shows_no_secret(captured: Capture) -> None:
    structlog.get_logger().info(
        "x.happened", bind=Bind(sandbox="s1", bot="b@im.bot", bot_token="CANARY", cursor="CANARY")
    )
    assert b"CANARY" not in captured.getvalue()
    assert "sandbox='s1'" in captured.lines()[0]["bind"]


def test_ids_of_bots_and_users_stay_readable(captured: Capture) -> None:
    structlog.get_logger().info("x.happened", bot="b0f5860fdecb@im.bot", user="o9cq@im.wechat", detail=TOKEN)
    (line,) = captured.lines()
    assert (line["bot"], line["user"]) == ("b0f5860fdecb@im.bot", "o9cq@im.wechat")
    assert line["detail"] == "b0f5860fdecb@im.bot:***"


def test_foreign_text_is_cut(captured: Capture) -> None:
    structlog.get_logger().info("x.happened", errmsg="长" * 5000, raw=b"x" * 5000)
    (line,) = captured.lines()
    assert line["errmsg"] == "长" * 200 + "…"
    assert line["raw"] == "<5000 bytes>"


def test_nothing_that_a_caller_passes_breaks_a_line(captured: Capture) -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    structlog.get_logger().info(
        "x.happened", big=2**70, lone="\ud800", nan=float("nan"), kind=ValueError, loop=loop, keys={1: 2}, none=None
    )
    (line,) = captured.lines()
    assert line["none"] is None
    assert line["keys"] == {"1": 2}


@pytest.mark.parametrize(
    "ident",
    [
        *(
            "in:b0f5860fdecb@im.bot:m7497484083968569737",
            "in:b0f5860fdecb@im.bot:cweb-1_2",
            "in:b@im.bot:s12-0a1b2c3d",
        ),
        *("in:b@im.bot:f0a1b2c3d4e5f", "agent-in:b0f5860fdecb@im.bot:m7497484083968569737-2", "order 66"),
        *(str(uuid.UUID(int=2**127)), "refused: in:b@im.bot:m7, again"),
    ],
)
def test_ids_of_messages_and_commands_are_shown(captured: Capture, ident: str) -> None:
    structlog.get_logger().info("x.happened", message=ident, several=[ident])
    (line,) = captured.lines()
    assert (line["message"], line["several"]) == (ident, [ident])


def test_a_token_behind_the_beginning_of_an_id_is_hidden() -> None:
    assert "CANARY" not in logs.redact_text(f"in:{TOKEN}")


# floods --------------------------------------------------------------------------------------------------


def test_lines_about_a_sandbox_are_limited_and_those_about_others_are_not(captured: Capture) -> None:
    log = structlog.get_logger()
    for number in range(1000):
        log.info("receipt.stored", sandbox="s1", command=f"c{number}")
        log.warning("command.retrying", subject="wechat.out.7.s1", reason="bus_down")
        log.warning("stream.altered", stream=f"S{number}")  # about no sandbox
        log.debug("receipt.seen", sandbox="s1")
    log.warning("command.retrying", subject="wechat.out.7.s1", reason="record_too_new")
    log.info("receipt.stored", sandbox="s2", command="c")
    counted = Counter(line["body"] for line in captured.lines())
    assert counted == {
        "receipt.stored": logs.INFO_PER_MINUTE + 1,
        "command.retrying": logs.OTHERS_PER_MINUTE + 1,
        "stream.altered": 1000,
        "receipt.seen": 1000,
    }


class Minute:
    """A flood limit, and lines about sandboxes at a time of its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._limit = logs.FloodLimit(lambda: self.now)

    def says(self, sandbox: str, event: str = "x.failed") -> dict[str, Any] | None:
        """None: it is dropped."""
        try:
            return dict(self._limit(None, "error", {"event": event, "sandbox": sandbox}))
        except structlog.DropEvent:
            return None


def test_the_first_line_after_a_minute_says_how_many_were_dropped() -> None:
    minute = Minute()
    said = [minute.says("s1") for _ in range(100)]
    assert sum(line is not None for line in said) == logs.OTHERS_PER_MINUTE
    minute.now = 61.0
    first, second = minute.says("s1"), minute.says("s1")
    assert first
    assert first["suppressed"] == 100 - logs.OTHERS_PER_MINUTE
    assert second == {"event": "x.failed", "sandbox": "s1"}


def test_only_the_latest_sandboxes_are_counted() -> None:
    minute = Minute()
    for _ in range(logs.OTHERS_PER_MINUTE):
        minute.says("s1")
    for number in range(logs.KEPT_COUNTS - 1):
        minute.says(f"other{number}")
    assert minute.says("s1") is None
    for number in range(logs.KEPT_COUNTS):
        minute.says(f"another{number}")
    assert minute.says("s1") is not None


def test_what_fails_for_all_bots_is_a_line_a_minute(captured: Capture) -> None:
    log = structlog.get_logger()
    for number in range(200):
        log.warning("poll.failed", bot=f"b{number}", host="ilink", reason="network")
        log.warning("session.stale", bot=f"b{number}")  # somebody's
    log.warning("poll.failed", bot="b7", host="elsewhere", reason="network")
    log.warning("poll.failed", bot="b7", host="ilink", reason="http_5xx")
    log.info("notify.failed", bot="b7", host="ilink")
    log.info("notify.failed", bot="b8", host="ilink")
    assert Counter(line["body"] for line in captured.lines()) == {
        "poll.failed": 3,
        "session.stale": 200,
        "notify.failed": 1,
    }


def test_the_next_line_of_an_outage_says_how_many_were_dropped() -> None:
    minute = Minute()
    said = [minute.says(f"s{number}", "poll.failed") for number in range(100)]
    assert sum(line is not None for line in said) == 1
    minute.now = 61.0
    assert (minute.says("s1", "poll.failed") or {})["suppressed"] == 99


def test_libraries_are_logged_from_warning_on(captured: Capture) -> None:
    """httpx logs whole URLs at INFO."""
    logging.getLogger("httpx").info("HTTP Request: GET https://ilink.example")
    logging.getLogger("nats.aio").warning("slow consumer")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    first, second = captured.lines()
    assert (first["body"], first["logger"], first["message"]) == ("library.reported", "nats.aio", "slow consumer")
    assert (second["logger"], second["severity_text"]) == ("py.warnings", "WARNING")


def test_a_terminal_gets_lines_for_people_without_secrets(captured: Capture) -> None:
    people = Capture()
    logs.configure("info", people, console=True)
    try:
        raise RuntimeError(TOKEN)
    except RuntimeError:
        structlog.get_logger().exception("x.failed", bot_token="CANARY")
    text = people.getvalue().decode()
    assert "x.failed" in text
    assert "RuntimeError" in text
    assert "CANARY" not in text


@pytest.mark.parametrize("console", [True, False])
def test_what_a_bug_says_is_left_out_and_where_it_is_shown(captured: Capture, console: bool) -> None:
    """It may be the text of the message in hand."""
    out = Capture()
    logs.configure("info", out, console=console)
    words = "".join(["hel", "lo"])  # the traceback shows this line
    try:
        try:
            raise KeyError(words)
        except KeyError as exc:
            raise ValueError(words) from exc
    except ValueError as exc:
        structlog.get_logger().exception("x.crashed", bot="b1")
        structlog.get_logger().error("y.crashed", exc_info=exc)
    text = out.getvalue().decode()
    assert words not in text
    assert text.count("test_logs.py") == 4
    assert text.index("raise KeyError") < text.index("raise ValueError")
    for one in ("KeyError", "ValueError"):
        assert text.count(one) == 4  # each by its line and by its type, twice


@pytest.mark.parametrize("console", [True, False])
def test_what_others_write_moves_no_cursor(captured: Capture, console: bool) -> None:
    """iLink's words, for one, may reach the terminal of who runs the adapter or reads its log."""
    said = "s\x1b]0;t\x07\x9b2J\u202e\u2028"
    out = Capture()
    logs.configure("info", out, console=console)
    structlog.get_logger().info("x.y", detail=said, worse=f"{said} {said}")
    try:
        raise ValueError(said)
    except ValueError:
        structlog.get_logger().exception("x.failed")
    ours = re.sub(r"\x1b\[\d+m", "", out.getvalue().decode())
    assert ours.count(r"2J") == 4
    assert ours.replace("\n", "").isprintable()
