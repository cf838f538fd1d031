"""Repairs invalid JSON of others (cut surrogate pairs, control characters, broken UTF-8, fields of a wrong type): one
text must not cost the whole message. Pure.

Each pattern takes what is whole in one step, up to the next place to repair or the end: time and memory are those of
one pass, whatever the JSON is.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

import msgspec

from adapter.errors import UNDECODABLE

S = TypeVar("S", bound=msgspec.Struct)

_HALF = rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
_PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rb"((?:[^\\]++|%b|(?!%b)\\.)*+(?:\\\Z)?)(?:(%b)|\Z)" % (_PAIR, _HALF, _HALF), re.DOTALL)
"""What is whole, and then half a surrogate pair."""
_WHOLE = rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"'
_STRINGS = re.compile(rb'((?:[^"]++|%b)*+)("(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|\Z)' % _WHOLE, re.DOTALL)
"""What is whole, and then a string with control characters."""
_CONTROL = re.compile(rb"[\x00-\x1f]")
_ESCAPED = [b"\\u%04x" % number for number in range(0x20)]
_INTEGER = re.compile(rb"(-?\d+)\.0+")
"""A whole number that is written as a fraction."""


def as_utf8(raw: bytes) -> bytes:
    """`raw` with the replacement character for what is no UTF-8: a character that somebody cut, words in GBK.

    JavaScript reads so, and with it the official client: no code and no message gets lost by such words.
    """
    return raw.decode("utf-8", "replace").encode()


def without_halves(text: bytes) -> bytes:
    """JSON with the replacement character for each escaped half of a surrogate pair: an emoji that somebody cut."""
    return _HALVES.sub(lambda found: found[1] + b"\\ufffd" if found[2] else found[1], text)


def without_controls(text: bytes) -> bytes:
    """JSON with the control characters in its strings escaped, as they should have been."""
    if not _CONTROL.search(text):
        return text
    return _STRINGS.sub(lambda found: found[1] + _CONTROL.sub(_escape_control, found[2]), text)


def _escape_control(control: re.Match[bytes]) -> bytes:
    return _ESCAPED[control[0][0]]


def decode_fields(raw: bytes, kind: type[S]) -> tuple[S, list[str]]:
    """Decodes a JSON object field by field; also the paths of the fields whose values do not fit, and are not set.

    A number fits a text as it is written. Raises UNDECODABLE for what is no object.
    """
    given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    values: dict[str, Any] = {}
    misfits: list[str] = []
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in given:
            continue
        value = bytes(given[field.encode_name])
        try:
            values[field.name], inner = _decode_value(value, field.type)
            misfits += [f"{field.encode_name}.{path}" for path in inner]
        except UNDECODABLE:
            misfits.append(field.encode_name)
    return kind(**values), misfits


def _decode_value(value: bytes, kind: Any) -> tuple[Any, list[str]]:
    """A value of a field, and the paths in it as of `decode_fields`. Raises UNDECODABLE."""
    kinds = get_args(kind)
    if int in kinds and (whole := _INTEGER.fullmatch(value)):
        value = whole[1]  # not by way of a float, which has 53 bits
    try:
        return msgspec.json.decode(value, type=kind, strict=False), []
    except msgspec.ValidationError:
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                return decode_fields(value, inner)
        if value[:1] in b"-0123456789" and str in kinds and int not in kinds:
            return value.decode(), []
        raise
