"""Encodings that a server can check: X-WECHAT-UIN, the version number, cursors, uint64 ids."""

import base64
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.simulator import ids


@pytest.mark.parametrize(
    ("header", "number"), [("MzA1NDE5ODk2", 305419896), ("MA==", 0), ("NDI5NDk2NzI5NQ==", 4294967295)]
)
def test_s3_examples_of_the_protocol(header: str, number: int) -> None:
    assert ids.read_uin(header) == number


@pytest.mark.parametrize(
    "header",
    [
        "",
        "!!",
        base64.b64encode(b"4294967296").decode(),
        base64.b64encode(b"007").decode(),
        base64.b64encode(bytes.fromhex("12345678")).decode(),
        "305419896",
        base64.b64encode(b"9" * 5_000).decode(),
    ],
)
def test_s3_anything_else_is_not(header: str) -> None:
    assert ids.read_uin(header) is None


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("132105", (2, 4, 9)),
        ("65547", (1, 0, 11)),
        ("0", None),
        ("", None),
        ("2.4.9", None),
        (str(2**24), None),
        ("9" * 5_000, None),
    ],
)
def test_s3_version_numbers(header: str, version: tuple[int, int, int] | None) -> None:
    assert ids.read_version(header) == version


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_s7_a_cursor_means_something_to_its_bot_and_its_server_only(position: int, salt: int) -> None:
    cursors = ids.Cursors(random.Random(1))
    cursor = cursors.write("a@im.bot", "a@im.bot:06secret", position, salt)

    assert cursors.read("a@im.bot", cursor) == position
    assert cursors.read("b@im.bot", cursor) is None
    assert ids.Cursors(random.Random(2)).read("a@im.bot", cursor) is None
    assert b"a@im.bot:06secret" in base64.b64decode(cursor)


@given(st.integers(0, 2**32))
def test_s10_no_message_id_survives_a_double(seed: int) -> None:
    number = next(ids.message_ids(random.Random(seed)))

    assert 2**53 < number < 2**64
    assert int(float(number)) != number
