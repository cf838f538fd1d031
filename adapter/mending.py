"""Repairs invalid JSON of others (cut surrogate pairs, control characters, broken UTF-8): one text must not cost the
whole message. Pure.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""An escape in a JSON string; the group: half a surrogate pair."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_CONTROLS = re.compile(rb"[\x00-\x1f]")


def as_utf8(raw: bytes) -> bytes:
    """`raw` with the replacement character for what is no UTF-8: a character that somebody cut, words in GBK.

    JavaScript reads so, and with it the official client: no code and no message gets lost by such words.
    """
    return raw.decode("utf-8", "replace").encode()


def without_halves(text: bytes) -> bytes:
    """JSON with the replacement character for each escaped half of a surrogate pair: an emoji that somebody cut."""
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], text)


def without_controls(text: bytes) -> bytes:
    """JSON with the control characters in its strings escaped, as they should have been."""
    if not _CONTROLS.search(text):
        return text
    return _STRING.sub(lambda found: _CONTROLS.sub(_escaped, found[0]), text)


def _escaped(control: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % control[0][0]
