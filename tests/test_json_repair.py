"""Invalid JSON of others, repaired: what is whole stays as it is, and the work is that of one pass."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.tools.decoding import as_utf8, without_controls, without_halves

SIZE = 1 << 20
PARTS = [
    '"',
    "\\",
    '\\"',
    "\x01",
    "\n",
    "a",
    "{",
    "]",
    ",",
    "\\ud83d",
    "\\ude00",
    "\\uD83D\\uDE00",
    "\\u0041",
    "\\ud8",
]


def repaired(text: bytes) -> bytes:
    return without_controls(without_halves(as_utf8(text)))


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_valid_json_stays_as_it_is(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        raw = text.encode("utf-8", "replace")
        assert repaired(raw) == raw


@given(st.lists(st.text(st.sampled_from('a\x00\x1f\n\t\\"é🙂'), max_size=8)), st.booleans())
def test_control_characters_are_read_as_if_they_were_escaped(texts: list[str], indent: bool) -> None:
    raw = json.dumps(texts, indent=1 if indent else None)
    for code in range(0x20):
        short = json.dumps(chr(code))[1:-1]
        raw = raw.replace("\\\\", "\0\0").replace(short, chr(code)).replace("\0\0", "\\\\") if code else raw
    assert json.loads(repaired(raw.encode())) == texts


@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_a_repair_needs_no_other(text: str) -> None:
    once = repaired(text.encode())
    assert repaired(once) == once


UNITS = {
    "control characters": b'"' + b"\x01" * SIZE + b'"',
    "strings with one each": b"[" + b'"\x01",' * (SIZE // 4) + b"0]",
    "one after many strings": b"[" + b'"a",' * (SIZE // 4) + b'"\x01"]',
    "empty strings": b'["\x01",' + b'"",' * (SIZE // 3) + b"0]",
    "escapes": b'"\x01' + rb"\n" * (SIZE // 2) + b'"',
    "halves": b'"' + rb"\ud800" * (SIZE // 6) + b'"',
    "halves of halves": b'"' + rb"\ud8" * (SIZE // 4) + b'"',
    "backslashes": b'\x01"' + b"\\" * SIZE,
    "an odd backslash": b'\x01"' + b"\\" * (SIZE + 1),
    "quotes": b"\x01" + b'"' * SIZE,
    "an open string": b'"\x01' + b"a" * SIZE,
    "an open string that is whole": b'\x01,"' + b"a" * SIZE,
    "no UTF-8": b'"' + b"\xff" * SIZE + b'"',
}


@pytest.mark.parametrize("name", UNITS)
def test_a_megabyte_of_anything_is_one_pass(name: str) -> None:
    """Two would be no matter; one for each character would not end today."""
    repaired(UNITS[name])


def test_the_memory_of_a_repair_is_some_times_what_is_repaired() -> None:
    tracemalloc.start()
    try:
        for raw in UNITS.values():
            repaired(raw[: SIZE // 4])
        assert tracemalloc.get_traced_memory()[1] < 32 * SIZE
    finally:
        tracemalloc.stop()
