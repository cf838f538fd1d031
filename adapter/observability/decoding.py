"""Reads the private records of the buckets, and says which of them a newer version has written; reads requests."""

from __future__ import annotations

import functools
from typing import TypeVar

import msgspec
import structlog

from adapter.contract.names import in_words
from adapter.contract.records import PrivateRecord
from adapter.errors import UNDECODABLE, RecordTooNew, Refused
from adapter.observability.metrics import Metrics

log = structlog.get_logger()

SAID_KEPT = 10_000
"""Most lines about records of which a replica remembers that it has logged them."""
R = TypeVar("R", bound=PrivateRecord)
Q = TypeVar("Q", bound=msgspec.Struct)


class _Version(msgspec.Struct):
    v: int = 0


def decode_record(value: bytes, kind: type[R], **names: str) -> R:
    """Raises RecordTooNew, which is logged once for each record, and UNDECODABLE for what the adapter has not
    written. `names`: the fields of the log line, which name the record."""
    try:
        return msgspec.json.decode(value, type=kind)
    except UNDECODABLE as exc:
        version, known = _version_in(value), int(kind.__struct_config__.tag or 0)
        if version <= known:
            raise
        log_once("record.too_new", record=kind.__name__, version=version, known=known, **names)
        raise RecordTooNew("record_too_new", f"A record has version {version}, this replica knows {known}.") from exc


@functools.lru_cache(maxsize=SAID_KEPT)
def log_once(event: str, **fields: str | int) -> None:
    """Logs an error, once with the same fields."""
    log.error(event, **fields)


def _version_in(value: bytes) -> int:
    try:
        return msgspec.json.decode(value, type=_Version).v
    except UNDECODABLE:
        return 0


def read_request(data: bytes, kind: type[Q], metrics: Metrics) -> Q:
    """Decodes a request of `wechat.svc.*`; an empty one has no fields. Raises Refused("invalid"), and counts that."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except UNDECODABLE as exc:
        raise invalid_request(exc, metrics) from exc


def invalid_request(exc: Exception, metrics: Metrics) -> Refused:
    """The error for a request that does not match its schema; counts it."""
    metrics.schema_violations.labels(kind="svc").inc()
    return Refused("invalid", in_words(exc))
