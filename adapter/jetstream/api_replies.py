"""JetStream's answers: decoding, and translation of its error codes. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar

import msgspec

from adapter.errors import STORE_FAILED, UNDECODABLE, BusRefused, Conflict, Temporary
from adapter.ports import PubAck

T = TypeVar("T")

# JetStream's `err_code` (server/errors.json of nats-server):
CONFLICT_CODES = (10071, 10164)
"""Wrong last sequence; another compare-and-set on this subject is in progress."""
BUSY_CODES = (10008, 10009, 10023, 10158, 10167)
"""JetStream or the cluster is unavailable for a moment; a duplicate is in progress; the stream receives more than it
can write (a flood)."""
LEADERLESS_CODES = (10008, 10009)
"""Errors of a server that is cut off from the cluster."""
ONLY_LEADER_NS = 3_000_000_000
"""Silence of its followers up to which a leader is the only one. They elect another after 4 s at the earliest
(nats-server, `minElectionTimeout`); it may not notice for minutes."""
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


def decode_reply(data: bytes, kind: type[T], verb: str) -> T:
    """Decodes the answer to `verb`. Raises Temporary: the server may be broken, or another client may have
    answered."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE as exc:
        raise Temporary("bus_unreadable", f"JetStream's answer to {verb}: {type(exc).__name__}") from exc


class _PublishReply(PubAck):
    error: ApiError | None = None


def decode_ack(data: bytes) -> PubAck:
    """JetStream's answer to a publish. Raises Conflict, BusRefused, Temporary: also where not JetStream answers, and
    for full storage, since an operator can make room."""
    ack = decode_reply(data, _PublishReply, "a publish")
    if (error := ack.error) is not None:
        is_full = error.err_code == ACCOUNT_FULL
        raise Temporary("bus_full", f"{ACCOUNT_FULL} {error.description}") if is_full else error_of(error)
    if not ack.seq:
        raise Temporary("no_answer", "Not JetStream has answered.")
    return ack


def unix_ms(rfc3339: str) -> int:
    """A time of JetStream in Unix milliseconds."""
    return int(datetime.fromisoformat(rfc3339).timestamp() * 1000)


class _Answer(ApiReply):
    cluster: dict[str, Any] | None = None


def is_leaderless(data: bytes) -> bool:
    """Whether a server answered that knows no leader, or a leader that may be none any more. Such a server is alive
    but useless."""
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except UNDECODABLE:  # not JetStream's
        return False
    if answer.error is not None:
        return answer.error.err_code in LEADERLESS_CODES
    return not is_only_leader(answer.cluster)


def is_only_leader(cluster: dict[str, Any] | None) -> bool:
    """Whether the leader that describes its cluster has heard from a majority lately. None: a server of its own."""
    followers: list[dict[str, Any]] = (cluster or {}).get("replicas") or []
    heard = sum(0 < each.get("active", 0) < ONLY_LEADER_NS for each in followers)  # 0: never
    return bool(2 * (heard + 1) > len(followers) + 1)
