"""Logging: one JSON line per event on stdout, without secrets or message text. Imports no other module of the
adapter.

At `info` there is a line with the ids of the messages of an answer of iLink, and one for each receipt and each
repeated command. A sandbox decides how often that is, so the lines about one sandbox are limited (`FloodLimit`). In
an outage the same fails for each of thousands of bots: that is a line a minute (`OUTAGE`).

Field names follow OpenTelemetry's log model: `timestamp`, `severity_text`, `body` (the event), `service.*`, then the
event's own. Tokens and texts must not be fields at all; redaction is only a safety net.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

SERVICE = "wechat-nats"
FOREIGN_CHARS = 200
"""Longest text in a field. A longer text is probably foreign, and is cut."""
TRACEBACK_CHARS = 8000
HIDDEN = "***"
INFO_PER_MINUTE, OTHERS_PER_MINUTE = 60, 5
"""Most lines of one event about one sandbox: with ids, as much as a person and an agent write; and about trouble, of
one reason."""
OUTAGE = frozenset(
    {
        "bus.unreachable",
        "person.retrying",
        "login.retrying",
        "notify.failed",
        "poll.dead_path",
        "poll.failed",
        "poller.fenced",
        "send.retrying",
        "work.retrying",
    }
)
"""Events that iLink or the bus causes for all bots at once."""
KEPT_COUNTS = 4096
"""Most events of sandboxes whose lines are counted, the latest ones: about 1 MB."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_SECRET_NAMES = (
    "token|bot_token|context_token|nats_token|token_key|authorization|password|nats_password|secret|seed|nkey|jwt"
    "|text|transcript|get_updates_buf|cursor|qrcode|qrcode_url|qrcode_img_content|verify_code"
    "|aes_key|aeskey|encrypt_query_param|encrypted_query_param|upload_param"
)
_SECRET_KEY = re.compile(rf"(?:{_SECRET_NAMES}|.*_(?:token|password|secret))\Z", re.IGNORECASE)
_PACKED = "QGltLmJvdD|BpbS5ib3Q6|AaW0uYm90O"
"""`@im.bot:` in base64 at each possible offset: a bot's token follows, as in iLink's cursors."""


def _keep_id(found: re.Match[str]) -> str:
    return found[1] or f"{found[2]}{HIDDEN}"


_SECRET_TEXT = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        # not the id of an inbound message, `in:<bot>:m749…`; a token begins with a digit
        (r"(\bin:[\w.-]{1,64}@im\.bot:[cfms][\w.-]+)|(@im\.bot:)[0-9a-z_+/=-]+", _keep_id),
        (r"\b(Bearer|Basic)\s+[^\s\"',]+", rf"\1 {HIDDEN}"),
        (r"AARzJW[0-9a-z+/=_-]*", HIDDEN),
        (rf"(?:{_PACKED})[0-9a-z+/=_-]*", HIDDEN),
        # {"text": "…"}, {'text': '…'}, Bind(bot_token='…'); a text that was cut has no closing quote
        (
            rf"((?:\b|_)(?:{_SECRET_NAMES})\\*[\"']?\s*[:=]\s*b?)"
            r"(?:\\*\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?)",
            rf"\1{HIDDEN}",
        ),
        # also matches without a query; otherwise every start within it would be searched to the end
        (r"\b(https?://[^\s?\"'<>]+)(?:\?[^\s\"'<>]+)?", lambda m: m[1] + (f"?{HIDDEN}" if m[0] != m[1] else "")),
        (r"//[^\s/@\"']+@", f"//{HIDDEN}@"),
        (r"\bS[ACNOUX][A-Z2-7]{56}\b", HIDDEN),
        (r"\beyJ[0-9a-z_-]{10,}(?:\.[0-9a-z_-]+)*", HIDDEN),
    )
)
UNSEEN = (
    "\x7f-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""For a regular expression: Unicode's controls, formats and line ends, and what has no picture (fillers, selectors of
variants but those of emoji, tags): they move the cursor, change the direction, or are seen by nobody."""
_CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f{UNSEEN}]")
"""Characters that move a terminal's cursor or are invisible; a traceback keeps its lines."""
_HARMLESS = re.compile(
    rf"(?!.*(?:AARzJW|eyJ|{_PACKED}))"
    r"(?:[a-z0-9_.@-]{0,40}|(?:agent-)?in:[a-z0-9_.-]{1,64}@im\.bot:[cfms][a-z0-9_.-]{1,70}|[0-9tz:.-]{0,32})\Z",
    re.IGNORECASE | re.ASCII,
)
"""Names, ids, times and words, which are most logged values, and match no pattern above."""


def configure(
    level: str = "info", stream: BinaryIO | None = None, *, version: str = "", console: bool | None = None
) -> None:
    """Sends structlog's events and, from WARNING on, those of the standard library to `stream` (default: stdout).

    `console` selects lines for people instead of JSON; None: if `stream` is a terminal. May be called again.
    """
    out = stream if stream is not None else sys.stdout.buffer
    service = {"service.name": SERVICE, "service.version": version}
    people = out.isatty() if console is None else console
    render: list[Processor] = (
        [_to_console]
        if people
        else [_common_fields({name: value for name, value in service.items() if value}), _to_json]
    )
    structlog.configure(
        processors=[
            FloodLimit(),
            _strip_exception_texts,
            structlog.processors.format_exc_info,
            redact,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(out),
        cache_logger_on_first_use=stream is None,  # a logger that is made for each event takes 3 µs
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward(logging.WARNING))
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


class FloodLimit:
    """Drops lines about a sandbox (`sandbox`, or `subject` of its commands) that come too often; `suppressed` in the
    first line after a minute says how many. Lines of severity `debug` are not limited. Of an event of `OUTAGE`, a
    line a minute is written for each reason and host, whomever it is about.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[tuple[object, ...], tuple[float, int]] = {}
        """By event, reason and what they are about: the end of the minute, and the lines in it."""

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        is_outage = event["event"] in OUTAGE
        about = (event.get("work"), event.get("host")) if is_outage else event.get("sandbox") or event.get("subject")
        if method == "debug" or not about:
            return event
        most, reason = (INFO_PER_MINUTE, "") if method == "info" else (OTHERS_PER_MINUTE, event.get("reason"))
        if is_outage:
            most, reason = 1, event.get("reason")
        key, now = (event["event"], reason, str(about)[:FOREIGN_CHARS]), self._clock()
        until, lines = self._lines.pop(key, (now + 60, 0))
        suppressed = max(0, lines - most)
        if now >= until:
            until, lines = now + 60, 0
        self._lines[key] = until, lines + 1
        if len(self._lines) > KEPT_COUNTS:
            del self._lines[next(iter(self._lines))]
        if lines >= most:
            raise structlog.DropEvent
        return {**event, "suppressed": suppressed} if suppressed else event


def _strip_exception_texts(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Shows where and with which types an exception and its causes were raised, the first cause first. The texts of
    exceptions are left out for bugs (`….crashed`), since they may contain the text of a message."""
    if not str(event.get("event")).endswith(".crashed") or not (info := event.pop("exc_info", None)):
        return event
    exc = info if isinstance(info, BaseException) else sys.exc_info()[1]
    found: list[str] = []
    chain: list[BaseException] = []
    while exc is not None and exc not in chain:
        chain.append(exc)
        found.append("".join(traceback.format_tb(exc.__traceback__)) + type(exc).__qualname__)
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return {**event, "exception": "\n\n".join(reversed(found))}


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The last processor of what may be foreign: hides secrets by key and by pattern, cuts long text, makes values
    plain."""
    return {
        key: _to_plain_value(value, key, TRACEBACK_CHARS if key in ("exception", "stack") else FOREIGN_CHARS)
        for key, value in event.items()
    }


def redact_text(text: str, longest: int = FOREIGN_CHARS) -> str:
    """`text` without anything that looks like a secret, cut to `longest` characters, with visible controls."""
    if _HARMLESS.match(text):
        return text
    text = text[: 2 * TRACEBACK_CHARS]  # bounds the work, not the result
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
    text = escape_invisible(hide_secrets(text))
    return text if len(text) <= longest else text[:longest] + "…"


def escape_invisible(text: str) -> str:
    """`text` with invisible and cursor-moving characters escaped; lines and tabs stay."""
    return _CONTROLS.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


def hide_secrets(text: str) -> str:
    """`text` with stars for anything that looks like a secret."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


@functools.lru_cache(maxsize=256)
def _is_secret(key: str) -> bool:
    return _SECRET_KEY.match(key) is not None


def _to_plain_value(value: Any, key: str, longest: int, depth: int = 0) -> Any:
    if _is_secret(key):
        return HIDDEN if value else value
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return redact_text(value, longest)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping() if depth < 3:
            return {
                redact_text(str(name)): _to_plain_value(inner, str(name), longest, depth + 1)
                for name, inner in list(value.items())[:50]
            }
        case list() | tuple() | set() | frozenset() if depth < 3:
            return [_to_plain_value(inner, "", longest, depth + 1) for inner in list(value)[:50]]
        case BaseException():
            return redact_text(f"{type(value).__name__}: {value}", longest)
        case _:
            return redact_text(repr(value), longest)


def _common_fields(service: Mapping[str, str]) -> Processor:
    """Puts the common fields first, with the names of the log model."""

    def shape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {
            "timestamp": event.pop("timestamp"),
            "severity_text": event.pop("level").upper(),
            "body": event.pop("event"),
            **service,
            **event,
        }

    return shape


def _to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    return msgspec.json.encode(event)


_console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)


def _to_console(logger: WrappedLogger, method: str, event: EventDict) -> bytes:
    return _console(logger, method, event).encode()


class _Forward(logging.Handler):
    """Passes the log records of libraries to structlog, which shapes and redacts them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                min(record.levelno, logging.ERROR),
                "library.reported",
                logger=record.name,
                message=record.getMessage(),
                exc_info=record.exc_info or None,
            )
        except Exception:  # noqa: BLE001  the convention of logging.Handler: never fail the caller
            self.handleError(record)
