"""A QR code as a picture and for a terminal: dark on light, with the quiet zone that scanners need."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import segno

QUIET = 4
"""Light modules around the code, as the standard requires."""
PIXELS = 8
"""Pixels of a module in a picture."""
DARK_ON_LIGHT, PLAIN = "\x1b[38;5;16;48;5;231m", "\x1b[0m"
"""Black on white for any colours of the terminal: many scanners cannot read a light code on a dark ground."""

_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
"""Upper and lower module of a character; true is dark."""


@lru_cache(maxsize=64)
def terminal_text(content: str) -> str:
    """Lines of half blocks, two modules high each, in fixed colours."""
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
    """The picture in base64."""
    out = io.BytesIO()
    _make_qr(content).save(out, kind="png", scale=PIXELS, border=QUIET)
    return base64.b64encode(out.getvalue()).decode()


@lru_cache(maxsize=64)
def html_element(content: str) -> str:
    """An HTML element with the picture, as large as its box, dark on light even on a dark page."""
    return _make_qr(content).svg_inline(border=QUIET, light="white", omitsize=True)


@lru_cache(maxsize=64)
def _make_qr(content: str) -> segno.QRCode:
    return segno.make(content, error="l", micro=False, boost_error=True)
