"""Which part of a text a quote means, and whose words count."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.contract.messages import Quote
from adapter.contract.quotes import (
    MAX_TEXT,
    Part,
    Reference,
    as_id,
    choose_part,
    cut_to_part,
    resolve_quote,
)


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


PARTS: list[tuple[str, str, Part, str | None]] = [
    ("one-word", "hello world", Part("world", "world", 0, 0, md5("world")), "world"),
    ("start-and-end", "a b c d", Part("b", "c", 0, 0, ""), "b c"),
    ("end-overlaps-start", "abc", Part("ab", "bc", 0, 0, ""), "abc"),
    ("from-0", "x y x y", Part("x", "y", 0, 0, ""), "x y"),
    ("second-start", "x y x z y", Part("x", "y", 1, 1, ""), "x z y"),
    ("whole-text-reading", "y x y y", Part("x", "y", 0, 1, ""), "x y"),
    ("after-start-reading-by-hash", "y x y y", Part("x", "y", 0, 1, md5("x y y")), "x y y"),
    ("after-start-where-the-other-is-before-it", "y x y", Part("x", "y", 0, 0, ""), "x y"),
    ("no-overlapping-occurrences", "aaaa", Part("aa", "aa", 1, 1, ""), "aa"),
    ("chinese", "你好，世界", Part("好", "世", 0, 0, md5("好，世")), "好，世"),
    ("wrong-hash", "a b c", Part("a", "b", 0, 0, md5("other")), None),
    ("no-start", "a b c", Part("z", "b", 0, 0, ""), None),
    ("no-end", "a b c", Part("a", "z", 0, 0, ""), None),
    ("start-too-far", "a b c", Part("a", "b", 5, 0, ""), None),
    ("negative", "a b c", Part("a", "b", -1, 0, ""), None),
    ("empty-start", "a b c", Part("", "b", 0, 0, ""), None),
    ("empty-text", "", Part("a", "b", 0, 0, ""), None),
    ("huge-index", "a" * 1000, Part("a", "a", 2**63, 2**63, ""), None),
]


@pytest.mark.parametrize(("text", "part", "expected"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])
def test_a_part_is_found_by_its_ends_and_its_hash(text: str, part: Part, expected: str | None) -> None:
    assert choose_part(text, part) == expected


def occurrences(text: str, wanted: str, since: int = 0) -> list[int]:
    """Where `wanted` begins, again and again, none overlapping the one before."""
    found = []
    at = text.find(wanted, since)
    while at >= 0:
        found.append(at)
        at = text.find(wanted, at + len(wanted))
    return found


few = st.text(alphabet="ab好", max_size=30)
word = st.text(alphabet="ab好", min_size=1, max_size=3)


@given(text=few, start=word, end=word, i=st.integers(-1, 12), j=st.integers(-1, 12), hashed=st.booleans())
def test_the_choice_is_that_of_the_two_readings(
    text: str, start: str, end: str, i: int, j: int, hashed: bool
) -> None:
    begins = occurrences(text, start)
    readings: list[str] = []
    if 0 <= i < len(begins):
        for since in (0, begins[i] + len(start)):
            ends = occurrences(text, end, since)
            if 0 <= j < len(ends) and ends[j] >= begins[i]:
                readings.append(text[begins[i] : ends[j] + len(end)])
    for wanted in readings if hashed else readings[:1]:
        assert choose_part(text, Part(start, end, i, j, md5(wanted) if hashed else "")) == wanted
    if not readings:
        assert choose_part(text, Part(start, end, i, j, "")) is None
    assert choose_part(text, Part(start, end, i, j, "0" * 32)) is None


@given(st.text(), st.text(), st.text(), st.integers(), st.integers(), st.text())
def test_nothing_that_ilink_may_say_of_a_part_fails(
    text: str, start: str, end: str, i: int, j: int, digest: str
) -> None:
    part = Part(start, end, i, j, digest)
    assert choose_part(text, part) is None or start in text
    assert isinstance(cut_to_part(text, part), str)


@given(st.text(min_size=1), st.data())
def test_a_part_that_a_user_marks_is_found_again(text: str, data: st.DataObject) -> None:
    """WeChat counts the occurrences of what it marks; so does this."""
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, len(text)))
    marked = text[begin:end]
    number = occurrences(text, marked).index(begin) if begin in occurrences(text, marked) else None
    if number is not None:
        assert choose_part(text, Part(marked, marked, number, number, md5(marked))) == marked


def test_the_work_is_bounded() -> None:
    """Only so much of a text is looked at."""
    text = "a" * MAX_TEXT + "b"
    assert choose_part(text, Part("b", "b", 0, 0, "")) is None
    assert choose_part(text, Part("a", "a", MAX_TEXT - 1, MAX_TEXT - 1, "")) == "a"


def test_a_part_that_is_not_found_leaves_the_whole_text() -> None:
    assert cut_to_part("a b c", Part("x", "y", 0, 0, "")) == "a b c"
    assert cut_to_part("a b c", None) == "a b c"


def test_a_part_that_its_hash_proves_needs_no_text() -> None:
    assert cut_to_part("", Part("world", "world", 0, 0, md5("world"))) == "world"
    assert cut_to_part("", Part("wor", "ld", 0, 0, md5("world"))) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7497484083968569737, "7497484083968569737"), ("5", "5"), (" 5 ", "5"), (0, ""), ("0", ""), ("", ""), (None, ""),
     (True, ""), (1.5, ""), ({}, "")],
)  # fmt: skip
def test_an_id_is_a_number_or_a_text_that_says_something(value: object, expected: str) -> None:
    assert as_id(value) == expected


def test_ilinks_own_words_count_more_than_ours_and_ours_more_than_its_title() -> None:
    ours = {"sent": "ours", "kind": "text"}
    titled = Quote(id="1", text="title")
    assert resolve_quote(titled, Reference(("1",), None, "given"), **ours) == Quote(
        id="1", text="given", said_by="bot", kind="text"
    )
    assert resolve_quote(titled, Reference(("1",), None, ""), **ours) == Quote(
        id="1", text="ours", said_by="bot", kind="text"
    )
    assert resolve_quote(titled, Reference(("1",), None, "")) == titled
    part = Part("u", "s", 0, 0, md5("urs"))
    assert resolve_quote(titled, Reference(("1",), part, ""), **ours).text == "urs"
