"""JetStream's answers: decoding, and translation of its error codes. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import TypeVar

import msgspec

from adapter.errors import STORE_FAILED, UNDECODABLE, BusRefused, Conflict, Temporary

T = TypeVar("T")

# JetStream's `err_code` (server/errors.json of nats-server):
CONFLICT_CODES = (10071, 10164)
"""Wrong last sequence; another compare-and-set on this subject is in progress."""
BUSY_CODES = (10008, 10009, 10023, 10158, 10167)
"""JetStream or the cluster is unavailable for a moment; a duplicate is in progress; the stream receives more than it
can write (a flood)."""
LEADERLESS_CODES = (10008, 10009)
"""Errors of a server that is cut off from the cluster."""
ACCOUNT_FULL = 10002
"""The account has no storage left. Its streams accept nothing until something is removed."""
NO_STREAM = 10059
NO_CONSUMER = 10014
MESSAGE_GONE = (10037, 10043, 10057)
"""Answers to a deletion of a missing message. The last code, a failed deletion, also means a sequence that never
existed."""


class ApiError(msgspec.Struct):
    """JetStream's error: an HTTP-like code, its own code (`err_code`), and a description."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class ApiReply(msgspec.Struct):
    """Fields of every answer of JetStream."""

    error: ApiError | None = None


def error_of(error: ApiError) -> BusRefused | Temporary:
    """Translates JetStream's error for callers."""
    code, words = error.err_code, error.description
    if code in CONFLICT_CODES:
        return Conflict(code, words)
    if code == STORE_FAILED and words.startswith("maximum"):
        return BusRefused(code, words)  # waiting for room would delay all other messages
    if code in BUSY_CODES or error.code == 503:
        return Temporary("bus_busy", f"{code} {words}")
    return BusRefused(code, words)


def write_error_of(error: ApiError) -> BusRefused | Temporary:
    """As error_of, for a write. Full storage is temporary, since an operator can make room."""
    if error.err_code == ACCOUNT_FULL:
        return Temporary("bus_full", f"{error.err_code} {error.description}")
    return error_of(error)


def decode_reply(data: bytes, kind: type[T], verb: str) -> T:
    """Decodes the answer to `verb`. Raises Temporary: the server may be broken, or another client may have
    answered."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE as exc:
        raise Temporary("bus_unreadable", f"JetStream's answer to {verb}: {type(exc).__name__}") from exc


def unix_ms(rfc3339: str) -> int:
    """A time of JetStream in Unix milliseconds."""
    return int(datetime.fromisoformat(rfc3339).timestamp() * 1000)


def is_leaderless(data: bytes) -> bool:
    """Whether a server answered that knows no leader. Such a server is alive but useless."""
    try:
        error = msgspec.json.decode(data, type=ApiReply).error
    except UNDECODABLE:  # not JetStream's
        return False
    return error is not None and error.err_code in LEADERLESS_CODES
