"""Repairs invalid JSON of others (cut surrogate pairs, control characters, broken UTF-8): one text must not cost the
whole message. Pure.

Each pattern takes what is whole in one step, up to the next place to repair or the end: time and memory are those of
one pass, whatever the JSON is.
"""

from __future__ import annotations

import re

_HALF = rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
_PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALVES = re.compile(rb"((?:[^\\]++|%b|(?!%b)\\.)*+(?:\\\Z)?)(?:(%b)|\Z)" % (_PAIR, _HALF, _HALF), re.DOTALL)
"""What is whole, and then half a surrogate pair."""
_WHOLE = rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"'
_STRINGS = re.compile(rb'((?:[^"]++|%b)*+)("(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|\Z)' % _WHOLE, re.DOTALL)
"""What is whole, and then a string with control characters."""
_CONTROL = re.compile(rb"[\x00-\x1f]")
_ESCAPED = [b"\\u%04x" % number for number in range(0x20)]


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
    return _STRINGS.sub(lambda found: found[1] + _CONTROL.sub(_escaped, found[2]), text)


def _escaped(control: re.Match[bytes]) -> bytes:
    return _ESCAPED[control[0][0]]
