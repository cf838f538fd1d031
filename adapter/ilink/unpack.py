"""Decompresses answers (Content-Encoding) with a bound on their size: a few bytes can stand for gigabytes. No I/O."""

from __future__ import annotations

import zlib

_GZIP, _ZLIB, _BARE = 31, 15, -15
PLAIN = ("", "identity", "none", "utf-8")
"""Not packed. The last two are no encodings, but servers are seen to say so, and browsers to overlook it."""


class PackedBadly(Exception):
    """The answer is too large, or cannot be unpacked; the text says which."""


class Unpacker:
    """Unpacks one answer of at most `most` bytes. Everything raises PackedBadly."""

    def __init__(self, encoding: str, most: int) -> None:
        self._left = most
        self._most = most
        self._begun = False
        self._raw = b""
        """The first bytes of a deflate, as long as nobody knows whether it has zlib's head (RFC 9110, 8.4.1.2)."""
        self._encoding = encoding.strip().lower()
        if self._encoding not in (*PLAIN, "gzip", "x-gzip", "deflate"):
            raise PackedBadly("The answer is packed in a way that was not asked for.")
        self._work = zlib.decompressobj(_GZIP) if "gzip" in self._encoding else None

    def feed(self, piece: bytes) -> bytes:
        """What these bytes stand for."""
        self._begun = self._begun or bool(piece)
        if self._encoding in PLAIN:
            return self._counted(piece)
        if self._work is None:
            self._raw += piece
            if len(self._raw) < 2:
                return b""
            piece, self._raw = self._raw, b""
            has_head = piece[0] & 15 == 8 and int.from_bytes(piece[:2], "big") % 31 == 0
            self._work = zlib.decompressobj(_ZLIB if has_head else _BARE)
        if self._work.eof:
            return b""
        try:
            return self._counted(self._work.decompress(piece, self._left + 1))
        except zlib.error:
            raise PackedBadly("The answer cannot be unpacked.") from None

    def finish(self) -> None:
        """The answer has ended: what is packed in it must have, too."""
        packed = self._begun and self._encoding not in PLAIN
        if packed and (self._work is None or not self._work.eof):
            raise PackedBadly("The packed answer ends early.")

    def _counted(self, plain: bytes) -> bytes:
        self._left -= len(plain)
        if self._left < 0:
            raise PackedBadly(f"the answer exceeds {self._most} bytes")
        return plain
