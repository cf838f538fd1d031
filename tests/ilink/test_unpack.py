"""Packed answers: unpacked whole, and never into more than is allowed."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.errors import Uncertain
from adapter.ilink import protocol
from adapter.ilink.protocol import IlinkReply

MOST = 1_000_000
TEXT = b'{"ret":0,"msgs":[]}' * 100
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "identity": lambda data: data,
    "gzip": gzip.compress,
    "X-GZIP": gzip.compress,
    " Deflate": zlib.compress,
}


def unpack(encoding: str, body: bytes, limit: int) -> bytes:
    return protocol.unpack(IlinkReply(200, {"content-encoding": encoding}, body), limit).body


@pytest.mark.parametrize("encoding", PACKED)
def test_an_answer_is_the_same_however_it_is_packed(encoding: str) -> None:
    assert unpack(encoding, PACKED[encoding](TEXT), MOST) == TEXT
    assert unpack(encoding, b"", MOST) == b""


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_is_too_large_is_refused_and_one_that_just_fits_is_not(encoding: str) -> None:
    packed = gzip.compress(TEXT) if encoding == "gzip" else zlib.compress(TEXT)
    assert unpack(encoding, packed, len(TEXT)) == TEXT
    with pytest.raises(Uncertain, match="exceeds"):
        unpack(encoding, packed, len(TEXT) - 1)


def test_a_bomb_is_never_unpacked() -> None:
    bomb = gzip.compress(bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(Uncertain, match="exceeds"):
            unpack("gzip", bomb, MOST)
        assert tracemalloc.get_traced_memory()[1] < 5 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_what_was_not_asked_for_is_refused(encoding: str) -> None:
    with pytest.raises(Uncertain):
        unpack(encoding, b"x", MOST)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_an_answer_that_is_cut_is_not_taken_for_a_whole_one(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Uncertain):
        unpack("gzip", pack(TEXT)[:-1], MOST)


@given(encoding=st.sampled_from(["gzip", "deflate", "", "br"]), body=st.binary(max_size=300))
def test_whatever_comes_is_bytes_or_a_refusal(encoding: str, body: bytes) -> None:
    with contextlib.suppress(Uncertain):
        assert len(unpack(encoding, body, 1000)) <= 1000
