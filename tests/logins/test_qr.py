"""QR codes as they are shown: read back, they are the code that was made."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest
import segno

from adapter.ilink.protocol import QR_CHARS
from adapter.logins.qr import (
    DARK_ON_LIGHT,
    PIXELS,
    PLAIN,
    png_base64,
    terminal_text,
)

TEXTS = ["https://liteapp.weixin.qq.com/q/7GiQu1?qrcode=abcdef0123456789&bot_type=3", "x", "https://a/" + "y" * 2943]
HALVES = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}


def wanted(text: str) -> list[list[int]]:
    """The modules with four light ones around; dark is 1."""
    rows = segno.make(text, error="l", micro=False).matrix_iter(border=4)
    return [[int(module) for module in row] for row in rows]


@pytest.mark.parametrize("text", TEXTS, ids=["usual", "short", "longest"])
def test_the_terminal_shows_every_module_dark_on_light(text: str) -> None:
    rows: list[list[int]] = []
    for line in terminal_text(text).split("\n"):
        assert line.startswith(DARK_ON_LIGHT)
        assert line.endswith(PLAIN)
        halves = [HALVES[char] for char in line.removeprefix(DARK_ON_LIGHT).removesuffix(PLAIN)]
        rows += [[upper for upper, _ in halves], [lower for _, lower in halves]]
    code = wanted(text)
    assert rows[: len(code)] == code
    assert all(not any(row) for row in rows[len(code) :])
    assert DARK_ON_LIGHT == "\x1b[38;5;16;48;5;231m"  # black as foreground, white as background


@pytest.mark.parametrize("text", TEXTS, ids=["usual", "short", "longest"])
def test_the_picture_shows_every_module(text: str) -> None:
    data = base64.b64decode(png_base64(text))
    code = wanted(text)
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (len(code) * PIXELS,) * 2
    dark = pixels(data, width, height)
    middle = PIXELS // 2
    assert [
        [dark[y * PIXELS + middle][x * PIXELS + middle] for x in range(len(code))] for y in range(len(code))
    ] == code


def pixels(data: bytes, width: int, height: int) -> list[list[int]]:
    """The dots of a PNG of one bit per pixel, 1 where it is black."""
    assert data[24:26] == b"\x01\x00"
    body, at = b"", 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            body += data[at + 8 : at + 8 + size]
        at += size + 12
    raw, line = zlib.decompress(body), (width + 7) // 8 + 1
    rows, above = [], bytes(line - 1)
    for y in range(height):
        row = raw[y * line + 1 : (y + 1) * line]
        assert raw[y * line] in (0, 2)  # as it is, or as the difference to the row above
        above = bytes((a + b) % 256 for a, b in zip(row, above, strict=True)) if raw[y * line] else row
        bits = "".join(f"{byte:08b}" for byte in above)
        rows.append([int(bit == "0") for bit in bits[:width]])
    return rows


def test_the_longest_content_that_ilink_may_give_is_shown() -> None:
    assert terminal_text("y" * QR_CHARS)
