"""A QR code as a picture and for a terminal: dark on light, with the quiet zone that scanners need."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import segno

QUIET = 4
"""Light modules around the code, as the standard asks for."""
PIXELS = 8
"""Pixels of a module in the picture."""
DARK_ON_LIGHT, PLAIN = "\x1b[38;5;16;48;5;231m", "\x1b[0m"
"""Black on white whatever the terminal's colours: many scanners do not read a light code on a dark ground."""

_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
"""Upper and lower module of a character; true is dark."""


@lru_cache(maxsize=64)
def terminal_text(content: str) -> str:
    """Lines of half blocks, two modules high each, in colours of their own."""
    rows = [tuple(map(bool, row)) for row in _made(content).matrix_iter(border=QUIET)]
    if len(rows) % 2:
        rows.append((False,) * len(rows[0]))
    lines = (
        "".join(_HALVES[halves] for halves in zip(upper, lower, strict=True))
        for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    )
    return "\n".join(f"{DARK_ON_LIGHT}{line}{PLAIN}" for line in lines)


@lru_cache(maxsize=64)
def png(content: str) -> str:
    """The picture, in base64."""
    out = io.BytesIO()
    _made(content).save(out, kind="png", scale=PIXELS, border=QUIET)
    return base64.b64encode(out.getvalue()).decode()


@lru_cache(maxsize=64)
def svg(content: str) -> str:
    """The picture as an element to put into a page: as large as its box, dark on light in a dark page, too."""
    return _made(content).svg_inline(border=QUIET, light="white", omitsize=True)


def _made(content: str) -> segno.QRCode:
    return segno.make(content, error="l", micro=False, boost_error=True)
