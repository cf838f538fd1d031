"""JetStream's answers: decoding them, and its error codes as our errors. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import TypeVar

import msgspec

from adapter.errors import STORE_FAILED, UNDECODABLE, BusRefused, Conflict, Temporary

T = TypeVar("T")

# JetStream's `err_code` (server/errors.json of nats-server):
CONFLICT_CODES = (10071, 10164)
"""Wrong last sequence; another compare-and-set on this subject is in process."""
BUSY_CODES = (10008, 10009, 10023, 10158, 10167)
"""JetStream, or the cluster, is not available for a moment; a duplicate is in process; the stream has more to write
than it takes in (somebody floods it)."""
LEADERLESS_CODES = (10008, 10009)
"""What a server says that is cut off from the others."""
ACCOUNT_FULL = 10002
"""The account has used up its storage: no stream of it takes anything before something is removed."""
NO_STREAM = 10059
NO_CONSUMER = 10014
"""An operator deleted what was there at the start."""
MESSAGE_GONE = (10037, 10043, 10057)
"""Answers to a deletion. The last one, a deletion that failed, is said of a sequence that the stream never had."""
CONSUMER_EXISTS = 10148
"""With another configuration; the same one is no error."""


class ApiError(msgspec.Struct):
    """JetStream's error: an HTTP-like code, its own (`err_code`), and words."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class ApiReply(msgspec.Struct):
    """What every answer of JetStream may say."""

    error: ApiError | None = None


def error_of(error: ApiError) -> BusRefused | Temporary:
    """What JetStream's error means for the caller."""
    code, words = error.err_code, error.description
    if code in CONFLICT_CODES:
        return Conflict(code, words)
    if code == STORE_FAILED and words.startswith("maximum"):
        return BusRefused(code, words)  # waiting for room would hold up every other message
    if code in BUSY_CODES or error.code == 503:
        return Temporary("bus_busy", f"{code} {words}")
    return BusRefused(code, words)


def write_error_of(error: ApiError) -> BusRefused | Temporary:
    """As refusal, for a write: storage that is used up comes back when an operator has made room."""
    if error.err_code == ACCOUNT_FULL:
        return Temporary("bus_full", f"{error.err_code} {error.description}")
    return error_of(error)


def decode_reply(data: bytes, kind: type[T], asked: str) -> T:
    """What JetStream says to `asked`. Raises Temporary: a server could not say it, or a stranger may answer there."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE as exc:
        raise Temporary("bus_unreadable", f"JetStream's answer to {asked}: {type(exc).__name__}") from exc


def unix_ms(rfc3339: str) -> int:
    """A time as JetStream writes it, in Unix milliseconds."""
    return int(datetime.fromisoformat(rfc3339).timestamp() * 1000)


def is_leaderless(data: bytes) -> bool:
    """Whether this is the answer of a server that knows of no leader: it lives, and is good for nothing."""
    try:
        error = msgspec.json.decode(data, type=ApiReply).error
    except UNDECODABLE:  # not JetStream's
        return False
    return error is not None and error.err_code in LEADERLESS_CODES
