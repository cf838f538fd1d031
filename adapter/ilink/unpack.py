"""Decompresses answers (Content-Encoding) up to a bound, since a few bytes can expand to gigabytes. No I/O."""

from __future__ import annotations

import zlib

_GZIP_OR_ZLIB = 47
PACKED = ("gzip", "x-gzip", "deflate")


class UnpackFailed(Exception):
    """The answer is too large or cannot be decompressed; the text says which."""


class Oversized(UnpackFailed):
    """The answer is too large."""


def unpack(encoding: str, body: bytes, limit: int) -> bytes:
    """The decompressed body of an answer. Raises UnpackFailed, and Oversized above `limit` bytes."""
    if not body or encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() not in PACKED:
        raise UnpackFailed("The answer is packed in a way that was not asked for.")
    work = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = work.decompress(body, limit + 1)
    except zlib.error:
        raise UnpackFailed("The answer cannot be unpacked.") from None
    if len(plain) > limit:
        raise Oversized(f"the answer exceeds {limit} bytes")
    if not work.eof:
        raise UnpackFailed("The packed answer ends early.")
    return plain
