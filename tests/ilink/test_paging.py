"""Lists of messages cut into pages: nothing is lost, doubled or read, and no page is larger than it may be."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.ilink.paging import MESSAGES, PAGE_BYTES, WHOLE_BYTES, pages_of

TEXT = st.text(st.sampled_from('"\\[]{},:\n é字🙂a'), max_size=12)
VALUE: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def elements(messages: bytes) -> list[bytes]:
    return [bytes(raw) for raw in msgspec.json.decode(messages, type=list[msgspec.Raw])]


@given(st.lists(VALUE, min_size=1, max_size=20), st.integers(1, 6), st.booleans(), st.sampled_from([None, 1]))
def test_pages_are_the_list(values: list[Any], page: int, ascii_only: bool, indent: int | None) -> None:
    """However it is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapter.ilink.paging.MESSAGES", page)
        messages = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode()
        pages = list(pages_of(messages))
        assert [raw for one in pages for raw in one] == elements(messages)
        assert [len(one) for one in pages[:-1]] == [page] * (len(pages) - 1)
        assert 0 < len(pages[-1]) <= page


@pytest.mark.parametrize("unit", [b"{}", b"0", b'""', b"[]", b'{"a":[{"b":"]},["}]}'])
def test_a_page_has_a_bounded_number_of_messages(unit: bytes) -> None:
    messages = b"[" + b",".join([unit] * 10_500) + b"]"
    pages = list(pages_of(messages))
    assert [len(page) for page in pages] == [MESSAGES] * 10 + [500]


def test_a_page_has_a_bounded_number_of_bytes_unless_a_message_has_more() -> None:
    sizes = [WHOLE_BYTES, 5 * PAGE_BYTES, *[PAGE_BYTES // 3] * 7]
    messages = b"[" + b",".join(b'{"text":"%b"}' % (b"x" * size) for size in sizes) + b"]"
    pages = list(pages_of(messages))
    assert [raw for one in pages for raw in one] == elements(messages)
    assert [len(page) for page in pages] == [2, 3, 3, 1]


def test_pages_are_cut_one_after_the_other() -> None:
    """The list as it came is all that is in memory beside the page that is worked on."""
    pages = pages_of(b"[" + b",".join([b"{}"] * 100_000) + b"]")
    assert iter(pages) is pages
    assert len(next(pages)) == MESSAGES
