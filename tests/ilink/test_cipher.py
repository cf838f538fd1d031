"""Encryption of media and its keys (docs/reference/ilink-protocol.md, "Encryption", "Test vectors")."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.errors import Refused
from adapter.ilink.cipher import Decryption, Encryption, cipher_size, read_key, write_key
from adapter.simulator.aes import encrypt

KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
ODD = b"\xfb\xff" * 8
RAW = "ABEiM0RVZneImaq7zN3u/w=="
LONG = "MDAxMTIyMzM0NDU1NjY3Nzg4OTlhYWJiY2NkZGVlZmY="
VECTORS = [
    (b"Hello, iLink!\n", "2885903dc8e9b6789c026204471849a2"),
    (b"", "00657ea140655a44782747705d422fad"),
    (b"0123456789abcdef", "aebdd39b144089d5e31cacd35b7a113a00657ea140655a44782747705d422fad"),
    ("你好，微信".encode(), "cca2d43e89ec974f3d24abf2c42b994c"),
]


def encrypted(pieces: list[bytes], key: bytes = KEY) -> bytes:
    work = Encryption(key)
    return b"".join([*(work.update(piece) for piece in pieces), work.finish()])


def decrypted(pieces: list[bytes], key: bytes = KEY) -> bytes:
    work = Decryption(key)
    return b"".join([*(work.update(piece) for piece in pieces), work.finish()])


@pytest.mark.parametrize(("plain", "cipher"), VECTORS, ids=["A", "B", "C", "D"])
def test_the_vectors_of_9_3_cut_anywhere(plain: bytes, cipher: str) -> None:
    data = bytes.fromhex(cipher)
    for cut in range(len(plain) + 1):
        assert encrypted([plain[:cut], plain[cut:]]) == data
    for cut in range(len(data) + 1):
        assert decrypted([data[:cut], data[cut:]]) == plain
    assert cipher_size(len(plain)) == len(data)


@pytest.mark.parametrize(
    ("size", "becomes"),
    [(0, 16), (1, 16), (15, 16), (16, 32), (17, 32), (31, 32), (32, 48), (1000, 1008), (1048576, 1048592)],
)
def test_the_sizes_of_9_2(size: int, becomes: int) -> None:
    assert cipher_size(size) == becomes


@given(st.lists(st.binary(max_size=40), max_size=8), st.binary(min_size=16, max_size=16), st.data())
def test_pieces_of_any_size_come_back_as_they_were(pieces: list[bytes], key: bytes, data: st.DataObject) -> None:
    plain = b"".join(pieces)
    cipher = encrypted(pieces, key)
    assert cipher == encrypt(plain, key), "another implementation agrees"
    assert len(cipher) == cipher_size(len(plain))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(cipher)), max_size=5)))
    parts = [cipher[a:b] for a, b in zip([0, *cuts], [*cuts, len(cipher)], strict=True)]
    assert decrypted(parts, key) == plain


@pytest.mark.parametrize("data", [b"", b"x", bytes(15), bytes(16), bytes(17), encrypted([b"x"])[:-1]])
def test_what_cannot_be_decrypted_is_corrupt(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        decrypted([data])
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize(
    ("aes_key", "hex_key", "key"),
    [
        pytest.param(None, KEY.hex(), KEY, id="hex"),
        pytest.param(None, KEY.hex().upper(), KEY, id="upper"),
        pytest.param(RAW, None, KEY, id="raw"),
        pytest.param(LONG, "", KEY, id="long"),
        pytest.param(RAW.rstrip("="), None, KEY, id="raw_unpadded"),
        pytest.param(LONG.rstrip("="), None, KEY, id="long_unpadded"),
        pytest.param(base64.urlsafe_b64encode(ODD).decode(), None, ODD, id="other_alphabet"),
        pytest.param(base64.b64encode(bytes(16)).decode(), KEY.hex(), KEY, id="hex_preferred"),
        pytest.param(LONG, "not hex", KEY, id="the_other_one"),
        pytest.param(None, None, None, id="none"),
        pytest.param("", "", None, id="empty"),
    ],
)
def test_keys_stand_in_four_ways(aes_key: str | None, hex_key: str | None, key: bytes | None) -> None:
    assert read_key(aes_key, hex_key) == key


@pytest.mark.parametrize(
    ("aes_key", "hex_key"),
    [
        ("AAAA", None),
        ("?", None),
        ("é", None),
        (base64.b64encode(b"g" * 32).decode(), None),
        (base64.b64encode(b"\xff" * 32).decode(), None),
        (base64.b64encode((KEY.hex() + "00").encode()).decode(), None),
        (None, KEY.hex()[:-1]),
        (None, "0" * 32 + "\n"),
    ],
)
def test_a_key_of_no_known_form_is_an_error_that_does_not_show_it(aes_key: str | None, hex_key: str | None) -> None:
    with pytest.raises(Refused) as caught:
        read_key(aes_key, hex_key)
    assert caught.value.reason == "corrupt"
    assert (aes_key or hex_key or "") not in str(caught.value)
    assert caught.value.__cause__ is None


def test_outbound_keys_have_44_characters() -> None:
    assert write_key(KEY) == LONG
    assert read_key(write_key(KEY)) == KEY
