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

from adapter.ilink.unpack import PackedBadly, Unpacker

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


def unpacked(encoding: str, *pieces: bytes, most: int = MOST) -> bytes:
    unpacker = Unpacker(encoding, most)
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
    assert unpacked(encoding, PACKED[encoding](TEXT), most=len(TEXT)) == TEXT
    with pytest.raises(PackedBadly, match="exceeds"):
        unpacked(encoding, PACKED[encoding](TEXT), most=len(TEXT) - 1)


def test_a_bomb_is_never_unpacked() -> None:
    """A gigabyte in a megabyte, and once more packed: what is held stays near what is allowed."""
    work = zlib.compressobj(wbits=31)
    bomb = b"".join([work.compress(bytes(1 << 20)) for _ in range(256)]) + work.flush()
    assert len(bomb) < 300_000
    tracemalloc.start()
    with pytest.raises(PackedBadly, match="exceeds 1000000 bytes"):
        unpacked("gzip", bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MOST


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "gzip;q=1"])
def test_what_was_not_asked_for_is_refused(encoding: str) -> None:
    with pytest.raises(PackedBadly, match="not asked for"):
        Unpacker(encoding, MOST)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_is_cut_is_not_taken_for_a_whole_one(encoding: str) -> None:
    with pytest.raises(PackedBadly, match="ends early"):
        unpacked(encoding, PACKED[encoding](TEXT)[:-3])


@given(st.sampled_from(sorted(PACKED)), st.lists(st.binary(max_size=200), max_size=20))
def test_whatever_comes_is_bytes_or_a_refusal(encoding: str, pieces: list[bytes]) -> None:
    with contextlib.suppress(PackedBadly):
        assert len(unpacked(encoding, *pieces, most=10_000)) <= 10_000
