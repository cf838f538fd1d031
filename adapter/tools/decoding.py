"""Decodes foreign JSON, private records and requests.

Foreign invalid JSON is repaired (cut surrogate pairs, control characters, broken UTF-8, fields of a wrong type), so
that one bad text does not cost the whole message.

Each pattern matches all valid text up to the next place to repair or the end in one step, so that time and memory are
those of one pass for any input.
"""

from __future__ import annotations

import functools
import re
from typing import Any, TypeVar, get_args

import msgspec
import structlog

from adapter.contract.names import in_words
from adapter.contract.records import PrivateRecord
from adapter.errors import UNDECODABLE, RecordTooNew, Refused
from adapter.tools.metrics import Metrics

log = structlog.get_logger()

S = TypeVar("S", bound=msgspec.Struct)
R = TypeVar("R", bound=PrivateRecord)
Q = TypeVar("Q", bound=msgspec.Struct)

SAID_KEPT = 10_000
"""Most lines about records of which a replica remembers that it has logged them."""

_HALF = rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
_PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rb"((?:[^\\]++|%b|(?!%b)\\.)*+(?:\\\Z)?)(?:(%b)|\Z)" % (_PAIR, _HALF, _HALF), re.DOTALL)
"""Valid text, then half a surrogate pair."""
_WHOLE = rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"'
_STRINGS = re.compile(rb'((?:[^"]++|%b)*+)("(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|\Z)' % _WHOLE, re.DOTALL)
"""Valid text, then a string with control characters."""
_CONTROL = re.compile(rb"[\x00-\x1f]")
_ESCAPED = [b"\\u%04x" % number for number in range(0x20)]
_INTEGER = re.compile(rb"(-?\d+)\.0+")
"""An integer written as a fraction."""


def as_utf8(raw: bytes) -> bytes:
    """`raw` with the replacement character for invalid UTF-8, such as a cut character or text in GBK.

    JavaScript, and so the official client, reads it the same way, so that no message is lost.
    """
    return raw.decode("utf-8", "replace").encode()


def without_halves(text: bytes) -> bytes:
    """JSON with the replacement character for each lone escaped surrogate, as a cut emoji leaves it."""
    return _HALVES.sub(lambda found: found[1] + b"\\ufffd" if found[2] else found[1], text)


def without_controls(text: bytes) -> bytes:
    """JSON with the control characters in its strings escaped."""
    if not _CONTROL.search(text):
        return text
    return _STRINGS.sub(lambda found: found[1] + _CONTROL.sub(_escape_control, found[2]), text)


def _escape_control(control: re.Match[bytes]) -> bytes:
    return _ESCAPED[control[0][0]]


def decode_fields(raw: bytes, kind: type[S]) -> tuple[S, list[str]]:
    """Decodes a JSON object field by field. Also returns the paths of fields with unsuitable values, which stay
    unset.

    A number is accepted for a text. Raises UNDECODABLE if it is no object.
    """
    fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    values: dict[str, Any] = {}
    misfits: list[str] = []
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in fields:
            continue
        value = bytes(fields[field.encode_name])
        try:
            values[field.name], inner = _decode_value(value, field.type)
            misfits += [f"{field.encode_name}.{path}" for path in inner]
        except UNDECODABLE:
            misfits.append(field.encode_name)
    return kind(**values), misfits


def _decode_value(value: bytes, kind: Any) -> tuple[Any, list[str]]:
    """Decodes the value of a field, with paths as in `decode_fields`. Raises UNDECODABLE."""
    kinds = get_args(kind)
    if int in kinds and (whole := _INTEGER.fullmatch(value)):
        value = whole[1]  # a float would have only 53 bits
    try:
        return msgspec.json.decode(value, type=kind, strict=False), []
    except msgspec.ValidationError:
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                return decode_fields(value, inner)
        if value[:1] in b"-0123456789" and str in kinds and int not in kinds:
            return value.decode(), []
        raise


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
