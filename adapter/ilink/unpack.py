"""Decompresses answers (Content-Encoding) up to a bound, since a few bytes can expand to gigabytes. No I/O."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_GZIP, _ZLIB, _BARE = 31, 15, -15
_MEMBER = b"\x1f\x8b"
"""Start of a gzip member (RFC 1952, 2.3.1)."""
MEMBERS = 4096
"""Most gzip members of an answer, each of which costs a decompressor. Tools that write several use some 64 KiB
each."""
BLOCK = 65_536
"""Compressed bytes given to a decompressor at once. It copies the remaining ones at the end of each member."""
PLAIN = ("", "identity", "none", "utf-8")
"""Values for an uncompressed body. The last two are no encodings, but some servers send them."""
PACKED = ("gzip", "x-gzip", "deflate")


class UnpackFailed(Exception):
    """The answer is too large or cannot be decompressed; the text says which."""


class Oversized(UnpackFailed):
    """The answer is too large."""


class Unpacker:
    """Decompresses one answer of at most `limit` bytes. All methods raise UnpackFailed."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._remaining = limit
        self._limit = limit
        self._begun = False
        self._members = 0
        self._ended = False
        """Whether the remaining bytes are not part of the answer."""
        self._raw = b""
        """The first bytes of a deflate body until it is known whether it has a zlib header (RFC 9110, 8.4.1.2), or
        the first byte after a gzip member."""
        self._encoding = encoding.strip().lower()
        if self._encoding not in (*PLAIN, *PACKED):
            raise UnpackFailed("The answer is packed in a way that was not asked for.")
        self._work = zlib.decompressobj(_GZIP) if "gzip" in self._encoding else None

    def feed(self, piece: bytes) -> bytes:
        """The decompressed bytes."""
        return b"".join(self.unpack(piece, self._limit + 1))

    def unpack(self, piece: bytes, at_once: int) -> Iterator[bytes]:
        """The decompressed bytes, in pieces of at most `at_once` bytes."""
        self._begun = self._begun or bool(piece)
        if self._encoding in PLAIN:
            yield self._count_bytes(piece)
            return
        for start in range(0, len(piece), BLOCK):
            remaining, plain = piece[start : start + BLOCK], b""
            while remaining or len(plain) == at_once:  # the decompressor may hold more output
                plain, remaining = self._unpack_step(remaining, at_once)
                if plain:
                    yield self._count_bytes(plain)

    def finish(self) -> None:
        """Ends the answer. Compressed data must be complete."""
        packed = self._begun and self._encoding not in PLAIN
        if packed and (self._work is None or not self._work.eof):
            raise UnpackFailed("The packed answer ends early.")

    def _unpack_step(self, packed: bytes, at_once: int) -> tuple[bytes, bytes]:
        """Some decompressed bytes, and the compressed bytes that remain."""
        if self._work is None or self._work.eof:
            packed, self._raw = self._raw + packed, b""
            if len(packed) < 2:
                self._raw = packed
                return b"", b""
            if self._work is None:
                has_head = packed[0] & 15 == 8 and int.from_bytes(packed[:2], "big") % 31 == 0
                self._work = zlib.decompressobj(_ZLIB if has_head else _BARE)
            elif self._ended or self._encoding == "deflate" or packed[:2] != _MEMBER:
                self._ended = True
                return b"", b""
            else:
                self._members += 1
                if self._members == MEMBERS:
                    raise UnpackFailed("The answer is packed in too many members.")
                self._work = zlib.decompressobj(_GZIP)
        try:
            plain = self._work.decompress(packed, min(at_once, self._remaining + 1))
        except zlib.error:
            raise UnpackFailed("The answer cannot be unpacked.") from None
        return plain, self._work.unconsumed_tail or self._work.unused_data

    def _count_bytes(self, plain: bytes) -> bytes:
        self._remaining -= len(plain)
        if self._remaining < 0:
            raise Oversized(f"the answer exceeds {self._limit} bytes")
        return plain
