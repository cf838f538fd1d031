"""Decompresses answers (Content-Encoding) up to a bound, since a few bytes can expand to gigabytes. No I/O."""

from __future__ import annotations

import zlib

from adapter.errors import Uncertain

_GZIP_OR_ZLIB = 47
PACKED = ("gzip", "x-gzip", "deflate")


class Oversized(Uncertain):
    """The answer is too large."""


def unpack(encoding: str, body: bytes, limit: int) -> bytes:
    """The decompressed body of an answer, of at most `limit` bytes. Raises Uncertain("unreadable"), Oversized."""
    if not body or encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() not in PACKED:
        raise Uncertain("unreadable", "the answer is packed in a way that was not asked for")
    work = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = work.decompress(body, limit + 1)
    except zlib.error:
        raise Uncertain("unreadable", "the answer cannot be unpacked") from None
    if len(plain) > limit:
        raise Oversized("unreadable", f"the answer exceeds {limit} bytes")
    if not work.eof:
        raise Uncertain("unreadable", "the packed answer ends early")
    return plain
