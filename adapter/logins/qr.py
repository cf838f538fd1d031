"""A QR code as a picture and for a terminal: dark on light, with the quiet zone that scanners need.

The content is a text to encode, or a `data:` URL of a picture that is the code already and is shown as it is.
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
"""Light modules around the code, as the standard asks for."""
PIXELS = 8
"""Pixels of a module in the picture."""
DARK_ON_LIGHT, PLAIN = "\x1b[38;5;16;48;5;231m", "\x1b[0m"
"""Black on white whatever the terminal's colours: many scanners do not read a light code on a dark ground."""

PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")
PICTURE_PIXELS = 4096
"""Most in a row or column of a picture that is shown: a few bytes can stand for gigabytes."""
_DATA_URL = re.compile(r"data:[a-z0-9.+-]+/[a-z0-9.+-]+(?:;[a-z0-9=._-]+)*;base64,([A-Za-z0-9+/]+={0,2})")

_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
"""Upper and lower module of a character; true is dark."""


class Picture(NamedTuple):
    """A picture of a code."""

    mime: str
    content: bytes


def check_content(content: str) -> None:
    """Raises Temporary for what can be shown as no code."""
    try:
        if picture_of(content) is None:
            _make_qr(content)
    except segno.DataOverflowError:
        detail = f"iLink gave no QR code: its {len(content)} bytes fit into none."
        raise Temporary("unreadable", detail) from None


@lru_cache(maxsize=64)
def picture_of(content: str) -> Picture | None:
    """The picture that a content is; None for a text to encode. Raises Temporary for what is neither."""
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
    """Lines of half blocks, two modules high each, in colours of their own; of a picture, a sentence."""
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
    """The picture, in base64; "" for one that iLink gave in another format."""
    if picture := picture_of(content):
        return base64.b64encode(picture.content).decode() if picture.mime == "image/png" else ""
    out = io.BytesIO()
    _make_qr(content).save(out, kind="png", scale=PIXELS, border=QUIET)
    return base64.b64encode(out.getvalue()).decode()


@lru_cache(maxsize=64)
def html_element(content: str) -> str:
    """The picture as an element to put into a page: as large as its box, dark on light in a dark page, too."""
    if picture := picture_of(content):
        data = base64.b64encode(picture.content).decode()
        return f'<img src="data:{picture.mime};base64,{data}" alt="QR code">'
    return _make_qr(content).svg_inline(border=QUIET, light="white", omitsize=True)


@lru_cache(maxsize=64)
def _make_qr(content: str) -> segno.QRCode:
    return segno.make(content, error="l", micro=False, boost_error=True)
