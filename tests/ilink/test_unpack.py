"""Packed answers: unpacked as they come, and never into more than is allowed."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.ilink.unpack import Unpacker, UnpackFailed

MOST = 1_000_000
TEXT = b'{"ret":0,"msgs":[]}' * 100


def headed(data: bytes) -> bytes:
    return zlib.compress(data)


def bare(data: bytes) -> bytes:
    work = zlib.compressobj(wbits=-15)
    return work.compress(data) + work.flush()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "identity": lambda data: data,
    "UTF-8": lambda data: data,
    "none": lambda data: data,
    "gzip": gzip.compress,
    "X-GZIP": gzip.compress,
    "deflate": headed,
    " Deflate": bare,
}


def unpacked(encoding: str, *pieces: bytes, limit: int = MOST) -> bytes:
    unpacker = Unpacker(encoding, limit)
    whole = b"".join([unpacker.feed(piece) for piece in pieces])
    unpacker.finish()
    return whole


@pytest.mark.parametrize("encoding", PACKED)
def test_an_answer_is_the_same_however_it_is_packed_and_cut(encoding: str) -> None:
    packed = PACKED[encoding](TEXT)
    assert unpacked(encoding, packed) == TEXT
    assert unpacked(encoding, *(packed[at : at + 1] for at in range(len(packed)))) == TEXT
    assert unpacked(encoding) == b""


@pytest.mark.parametrize("encoding", PACKED)
def test_an_answer_that_is_too_large_is_refused_and_one_that_just_fits_is_not(encoding: str) -> None:
    assert unpacked(encoding, PACKED[encoding](TEXT), limit=len(TEXT)) == TEXT
    with pytest.raises(UnpackFailed, match="exceeds"):
        unpacked(encoding, PACKED[encoding](TEXT), limit=len(TEXT) - 1)


def test_a_bomb_is_never_unpacked() -> None:
    """A gigabyte in a megabyte, and once more packed: what is held stays near what is allowed."""
    work = zlib.compressobj(wbits=31)
    bomb = b"".join([work.compress(bytes(1 << 20)) for _ in range(256)]) + work.flush()
    assert len(bomb) < 300_000
    tracemalloc.start()
    with pytest.raises(UnpackFailed, match="exceeds 1000000 bytes"):
        unpacked("gzip", bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MOST


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "gzip;q=1"])
def test_what_was_not_asked_for_is_refused(encoding: str) -> None:
    with pytest.raises(UnpackFailed, match="not asked for"):
        Unpacker(encoding, MOST)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_is_cut_is_not_taken_for_a_whole_one(encoding: str) -> None:
    with pytest.raises(UnpackFailed, match="ends early"):
        unpacked(encoding, PACKED[encoding](TEXT)[:-3])


@pytest.mark.parametrize("end", [b"", bytes(100), b"\r\n", b"\x1f", b"junk \x1f\x8b"])
def test_an_answer_of_several_gzip_members_is_read_whole(end: bytes) -> None:
    """RFC 1952, 2.2. What follows the last one and is none, such as zeros that fill a block, says nothing."""
    packed = b"".join(gzip.compress(part) for part in (TEXT, b"", TEXT[:7], TEXT)) + end
    whole = TEXT + TEXT[:7] + TEXT
    assert unpacked("gzip", packed) == whole
    assert unpacked("gzip", *(packed[at : at + 1] for at in range(len(packed)))) == whole
    assert unpacked("gzip", packed, limit=len(whole)) == whole
    with pytest.raises(UnpackFailed, match="exceeds"):
        unpacked("gzip", packed, limit=len(whole) - 1)


def test_a_last_gzip_member_that_is_cut_is_not_taken_for_an_end() -> None:
    with pytest.raises(UnpackFailed, match="ends early"):
        unpacked("gzip", gzip.compress(TEXT) + gzip.compress(TEXT)[:-3])


def test_members_without_end_are_refused() -> None:
    """20 bytes each that stand for nothing: each costs as much as a whole answer."""
    with pytest.raises(UnpackFailed, match="members"):
        unpacked("gzip", gzip.compress(b"") * 100_000)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", " Deflate"])
@pytest.mark.parametrize("at_once", [1, 7, 64, 900])
def test_what_is_unpacked_comes_in_pieces_of_a_bounded_size(encoding: str, at_once: int) -> None:
    plain = bytes(900) + TEXT
    unpacker = Unpacker(encoding, MOST)
    pieces = list(unpacker.unpack(PACKED[encoding](plain), at_once))
    unpacker.finish()
    assert b"".join(pieces) == plain
    assert max(map(len, pieces)) <= at_once


@given(st.sampled_from(sorted(PACKED)), st.lists(st.binary(max_size=200), max_size=20))
def test_whatever_comes_is_bytes_or_a_refusal(encoding: str, pieces: list[bytes]) -> None:
    with contextlib.suppress(UnpackFailed):
        assert len(unpacked(encoding, *pieces, limit=10_000)) <= 10_000
