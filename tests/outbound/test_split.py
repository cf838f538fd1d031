"""Long texts in parts that read well, with nothing lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.bridge.texts import split

FENCED = "```py\n" + "\n".join(f"    line({number})" for number in range(12)) + "\n```"

SPLITS = [
    ("short", "hello", 20, ["hello"]),
    ("exactly", "12345", 5, ["12345"]),
    ("paragraphs", "One one.\n\nTwo two.\n\nThree three three.", 30, ["One one.\n\nTwo two.", "Three three three."]),
    ("a-paragraph-before-a-line", "aaa aaa\n\nbbb\nccc ccc ccc ccc", 25, ["aaa aaa", "bbb\nccc ccc ccc ccc"]),
    ("lines", "first line\nsecond line\nthird line", 32, ["first line\nsecond line", "third line"]),
    ("sentences", "This is one. This is two! This is three? Four.", 40,
     ["This is one. This is two!", "This is three? Four."]),
    ("chinese-sentences", "今天天气很好。我们去公园吧！你想去吗？好的。", 21,
     ["今天天气很好。", "我们去公园吧！你想去吗？好的。"]),
    ("words", "alpha beta gamma delta epsilon", 26, ["alpha beta gamma", "delta epsilon"]),
    ("one-long-word", "x" * 50, 28, ["x" * 20, "x" * 20, "x" * 10]),
    ("chinese-without-punctuation", "好" * 50, 28, ["好" * 20, "好" * 20, "好" * 10]),
    ("indentation-after-a-line", "- one one one\n  - two\n  - three three", 35,
     ["- one one one\n  - two", "  - three three"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "chars", "parts"), [row[1:] for row in SPLITS], ids=[row[0] for row in SPLITS])
def test_a_long_text_is_cut_where_a_reader_would(text: str, chars: int, parts: list[str]) -> None:
    assert split(text, chars, 16_384) == parts


def test_a_fence_that_is_cut_is_closed_and_opened_again() -> None:
    parts = split("Look:\n\n" + FENCED + "\n\nDone.", 100, 16_384)
    assert len(parts) > 1
    for part in parts:
        marks = [line for line in part.splitlines() if line.startswith("```")]
        assert len(marks) % 2 == 0
        assert marks[::2] == ["```py"] * (len(marks) // 2)
    assert parts[-1].endswith("Done.")


def test_code_keeps_its_indentation_where_it_is_cut() -> None:
    """In Python it is meaning."""
    lines = [line for part in split(FENCED, 60, 16_384) for line in part.splitlines() if not line.startswith("```")]
    assert lines == [f"    line({number})" for number in range(12)]


def test_a_fence_of_tildes_is_closed_with_tildes() -> None:
    parts = split("~~~\n" + "code code\n" * 20 + "~~~", 60, 16_384)
    assert all(part.startswith("~~~\n") and part.endswith("\n~~~") for part in parts)


def test_backticks_within_a_line_open_no_fence() -> None:
    parts = split("use ```x``` here " * 20, 60, 16_384)
    assert not any(part.endswith("\n```") for part in parts)


def test_a_fence_with_an_endless_info_string_costs_no_more_than_its_text() -> None:
    """Anybody on the bus may write one: it is not repeated in every part."""
    parts = split("```" + "x" * 5000 + "\n" + "code\n" * 2000 + "```", 4000, 16_384)
    assert len(parts) < 10
    assert all(len(part) <= 4000 for part in parts)


def test_bytes_are_bounded_too() -> None:
    """4 bytes per emoji: 16,384 bytes come before 16,384 characters."""
    parts = split("😀" * 10_000, 16_384, 16_384)
    assert all(len(part.encode()) <= 16_384 for part in parts)
    assert "".join(parts) == "😀" * 10_000
    assert len(parts) == 3


def test_many_parts_are_not_tiny() -> None:
    """Each costs a send: a cut near the start of a part is worse than a cut word."""
    parts = split("a\n\n" + "b" * 300, 100, 16_384)
    assert len(parts) == 4


words = st.sampled_from(
    ["a", "b ", "c. ", " ", "\n", "\n\n", "```", "~~~", "\n```py\n", "\n```\n", "好", "。", "😀", "\n    x", "!", "é"]
)
texts = st.lists(words, max_size=150).map("".join)


def bare(text: str) -> str:
    """Without what a cut may add or take: whitespace and fence marks."""
    return re.sub(r"\s|```+|~~~+", "", text)


@given(texts, st.integers(20, 80))
def test_nothing_is_lost(text: str, chars: int) -> None:
    parts = split(text, chars, 16_384)
    found, wanted = bare("\n".join(parts)), bare(text)
    # a fence that is opened again repeats its info string, so the original is a subsequence
    rest = iter(found)
    assert all(letter in rest for letter in wanted)
    if "```" not in text and "~~~" not in text:
        assert found == wanted


@given(texts, st.integers(64, 200), st.integers(256, 800))
def test_every_part_fits(text: str, chars: int, size: int) -> None:
    for part in split(text, chars, size):
        assert len(part) <= chars
        assert len(part.encode()) <= size


@given(st.text(max_size=400), st.integers(1, 50))
def test_any_text_is_cut_in_the_end(text: str, chars: int) -> None:
    assert bare("".join(split(text, chars, 64))) or not bare(text)
