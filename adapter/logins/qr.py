"""A QR code as a picture and for a terminal: dark on light, with the quiet zone that scanners need.

The content is a text to encode, or the `data:` URL of a picture of a code, which is shown as it is.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from functools import lru_cache
from typing import NamedTuple

import segno

from adapter.content.media import identify
from adapter.errors import Temporary

QUIET = 4
"""Light modules around the code, as the standard requires."""
PIXELS = 8
"""Pixels of a module in a picture."""
DARK_ON_LIGHT, PLAIN = "\x1b[38;5;16;48;5;231m", "\x1b[0m"
"""Black on white for any colours of the terminal: many scanners cannot read a light code on a dark ground."""

PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")
PICTURE_PIXELS = 4096
"""Most pixels in a row or column of a picture, since a few bytes can expand to gigabytes."""
_DATA_URL = re.compile(r"data:[a-z0-9.+-]+/[a-z0-9.+-]+(?:;[a-z0-9=._-]+)*;base64,([A-Za-z0-9+/]+={0,2})")

_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
"""Upper and lower module of a character; true is dark."""


class Picture(NamedTuple):
    """A picture of a code."""

    mime: str
    content: bytes


def check_content(content: str) -> None:
    """Raises Temporary for content that no code can show."""
    try:
        if picture_of(content) is None:
            _make_qr(content)
    except segno.DataOverflowError:
        detail = f"iLink gave no QR code: {len(content)} bytes do not fit into one."
        raise Temporary("unreadable", detail) from None


@lru_cache(maxsize=64)
def picture_of(content: str) -> Picture | None:
    """The picture in a content; None: it is a text to encode. Raises Temporary for invalid content."""
    if not content.startswith("data:"):
        return None
    found = _DATA_URL.fullmatch(content)
    try:
        picture = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        picture = b""
    kind = identify(picture)
    if kind.mime not in PICTURES or not 0 < max(kind.width or 0, kind.height or 0) <= PICTURE_PIXELS:
        raise Temporary("unreadable", "iLink gave no QR code: its data are no picture that can be shown.")
    return Picture(kind.mime, picture)


@lru_cache(maxsize=64)
def terminal_text(content: str) -> str:
    """Lines of half blocks, two modules high each, in fixed colours; for a picture, a sentence."""
    if picture := picture_of(content):
        return (
            f"iLink gave this code as a picture ({picture.mime}): `wechat-nats login` writes a PNG to a file with "
            "--png, and a browser shows the URL that it prints with --url."
        )
    rows = [tuple(map(bool, row)) for row in _make_qr(content).matrix_iter(border=QUIET)]
    if len(rows) % 2:
        rows.append((False,) * len(rows[0]))
    lines = (
        "".join(_HALVES[halves] for halves in zip(upper, lower, strict=True))
        for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    )
    return "\n".join(f"{DARK_ON_LIGHT}{line}{PLAIN}" for line in lines)


@lru_cache(maxsize=64)
def png_base64(content: str) -> str:
    """The picture in base64; "" if iLink gave it in another format."""
    if picture := picture_of(content):
        return base64.b64encode(picture.content).decode() if picture.mime == "image/png" else ""
    out = io.BytesIO()
    _make_qr(content).save(out, kind="png", scale=PIXELS, border=QUIET)
    return base64.b64encode(out.getvalue()).decode()


@lru_cache(maxsize=64)
def html_element(content: str) -> str:
    """An HTML element with the picture, as large as its box, dark on light even on a dark page."""
    if picture := picture_of(content):
        data = base64.b64encode(picture.content).decode()
        return f'<img src="data:{picture.mime};base64,{data}" alt="QR code">'
    return _make_qr(content).svg_inline(border=QUIET, light="white", omitsize=True)


@lru_cache(maxsize=64)
def _make_qr(content: str) -> segno.QRCode:
    return segno.make(content, error="l", micro=False, boost_error=True)
