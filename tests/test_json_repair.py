"""Invalid JSON of others, repaired: what is whole stays as it is, and the work is that of one pass."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from adapter.tools.decoding import as_utf8, without_controls, without_halves

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
