"""Foreign bytes of every kind, by chance: a reader refuses them in its own words, or reads them. See tests/fuzz."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import costs
from tests.fuzz.targets import TARGETS, seeds

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2**63,
        2**64,
        1e308,
        float("nan"),
        "",
        "0",
        "\x00",
        "\ud800",
        "a" * 5000,
        "𝕳",
        "\n",
        "|",
        [],
        {},
    ]
)
NAMES = st.sampled_from(
    [
        "id",
        "sandbox",
        "bot",
        "user",
        "text",
        "items",
        "kind",
        "media",
        "object",
        "data",
        "name",
        "caption",
        "typing",
        "expires_in_s",
        "when_closed",
        "bot_token",
        "base_url",
        "options",
        "cursor",
        "ret",
        "errcode",
        "errmsg",
        "msgs",
        "message_id",
        "from_user_id",
        "item_list",
        "type",
        "text_item",
        "context_token",
        "get_updates_buf",
        "longpolling_timeout_ms",
        "status",
        "redirect_host",
        "baseurl",
        "qrcode",
        "ref_msg",
        "svr_id",
    ]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    ODD | st.text(max_size=20) | st.integers(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=6),
    max_leaves=20,
)


def encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def mangled(draw: st.DrawFn, name: str) -> bytes:
    """A sample with one field replaced, or cut, or spliced."""
    known = draw(st.sampled_from([*seeds(name), b"{}"]))
    try:
        fields = json.loads(known)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and draw(st.booleans()):
        return encoded(fields | draw(st.dictionaries(NAMES | st.sampled_from([*fields, "x"]), JSON, max_size=3)))
    start, end = sorted((draw(st.integers(0, len(known))), draw(st.integers(0, len(known)))))
    return known[:start] + draw(st.binary(max_size=20)) + known[end:]


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_read_or_refused(name: str) -> None:
    @settings(max_examples=40)
    @given(st.binary(max_size=300) | JSON.map(encoded) | st.text(max_size=300).map(str.encode) | mangled(name))
    def read(data: bytes) -> None:
        TARGETS[name].read(data)

    read()


DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"items":' + b"[" * 50_000, b'{"item_list":[' + b'{"ref_msg":' * 30_000]
WIDE = [
    b'{"text":"' + b"\\u0041" * 10_000 + b'"}',
    b"{" + b",".join(b'"k%d":0' % number for number in range(10_000)) + b"}",
    b'{"msgs":[' + b",".join([b"{}"] * 30_000) + b"]}",
    b'{"item_list":[' + b",".join([b'{"type":1}'] * 10_000) + b"]}",
    b'{"ret":' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("data", [*DEEP, *WIDE], ids=lambda data: repr(data[:12]))
@pytest.mark.parametrize("name", ["command", "routed", "control", "service", "message", "reply", "login"])
def test_what_is_deep_or_wide_is_read_or_refused(name: str, data: bytes) -> None:
    TARGETS[name].read(data)


COSTLY = ("texts", "names", "logged")
"""Targets that read a text many times over: of them it is a short one."""


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "texts"])
def test_no_text_takes_a_reader_long_or_much_memory(name: str) -> None:
    costs.worst(name, 1000 if name in COSTLY else 15_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_long_text_takes_a_reader_long_or_much_memory(name: str) -> None:
    print(name, costs.worst(name, 3000 if name in COSTLY else 30_000))
