"""Long texts in parts that read well, with nothing lost; Markdown as a reader without it would see it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.conversation.split import MAX_BYTES, is_quick, split, to_plain
from tests.hostile import TEXTS, repeated, steps

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
    assert split(text, chars) == parts


def test_a_fence_that_is_cut_is_closed_and_opened_again() -> None:
    parts = split("Look:\n\n" + FENCED + "\n\nDone.", 100)
    assert len(parts) > 1
    for part in parts:
        marks = [line for line in part.splitlines() if line.startswith("```")]
        assert len(marks) % 2 == 0
        assert marks[::2] == ["```py"] * (len(marks) // 2)
    assert parts[-1].endswith("Done.")


def test_code_keeps_its_indentation_where_it_is_cut() -> None:
    """In Python it is meaning."""
    lines = [line for part in split(FENCED, 60) for line in part.splitlines() if not line.startswith("```")]
    assert lines == [f"    line({number})" for number in range(12)]


def test_a_fence_of_tildes_is_closed_with_tildes() -> None:
    parts = split("~~~\n" + "code code\n" * 20 + "~~~", 60)
    assert all(part.startswith("~~~\n") and part.endswith("\n~~~") for part in parts)


def test_backticks_within_a_line_open_no_fence() -> None:
    parts = split("use ```x``` here " * 20, 60)
    assert not any(part.endswith("\n```") for part in parts)


def test_a_fence_with_an_endless_info_string_costs_no_more_than_its_text() -> None:
    """Anybody on the bus may write one: it is not repeated in every part."""
    parts = split("```" + "x" * 5000 + "\n" + "code\n" * 2000 + "```", 4000)
    assert len(parts) < 10
    assert all(len(part) <= 4000 for part in parts)


def test_an_endless_fence_is_bounded() -> None:
    parts = split("`" * 5000 + "\n" + "code\n" * 2000, 4000)
    assert len(parts) < 10
    assert all(len(part) <= 4000 for part in parts)


def test_bytes_are_bounded_too() -> None:
    """4 bytes per emoji: 16,384 bytes come before 16,384 characters."""
    parts = split("😀" * 10_000, 16_384)
    assert all(len(part.encode()) <= MAX_BYTES for part in parts)
    assert "".join(parts) == "😀" * 10_000
    assert len(parts) == 3


def test_many_parts_are_not_tiny() -> None:
    """Each costs a send: a cut near the start of a part is worse than a cut word."""
    parts = split("a\n\n" + "b" * 300, 100)
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
    parts = split(text, chars)
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


def test_the_largest_command_is_cut_at_once() -> None:
    began = time.process_time()
    parts = split("word " * 52_000, 4000)
    assert len(parts) == 66
    assert time.process_time() - began < 1.0


# plain ---------------------------------------------------------------------------------------------------


PLAIN = [
    ("plain", "hello", "hello"),
    ("bold-and-italic", "**bold** and *italic* and __both__", "bold and italic and both"),
    ("strike", "~~gone~~ here", "gone here"),
    ("heading", "# Title\n\nText", "Title\n\nText"),
    ("setext-heading", "Title\n=====\nText", "Title\n\nText"),
    ("paragraphs", "One\n\n\n\nTwo", "One\n\nTwo"),
    ("soft-break", "one\ntwo", "one\ntwo"),
    ("hard-break", "one  \ntwo", "one\ntwo"),
    ("inline-code", "run `make test` now", "run make test now"),
    ("fence", "```py\nprint(1)\n    x\n```", "print(1)\n    x"),
    ("indented-code", "text\n\n    code", "text\n\ncode"),
    ("link", "see [the docs](https://a.example/x)", "see the docs (https://a.example/x)"),
    ("link-that-says-its-address", "<https://a.example>", "https://a.example"),
    ("image", "![a cat](https://a.example/c.png)", "a cat (https://a.example/c.png)"),
    ("image-without-words", "![](https://a.example/c.png)", "https://a.example/c.png"),
    ("bullets", "- one\n- two\n* three", "- one\n- two\n\n- three"),
    ("numbers", "3. three\n4. four", "3. three\n4. four"),
    ("nested", "- one\n  - two\n  - three\n- four", "- one\n  - two\n  - three\n- four"),
    ("list-then-text", "- one\n\ntext", "- one\n\ntext"),
    ("quote", "> said\n> so", "said\nso"),
    ("rule", "a\n\n---\n\nb", "a\n\n----------\n\nb"),
    ("table", "| a | b |\n|---|---|\n| 1 | 2 |", "a  b\n1  2"),
    ("escapes", r"2 \* 3 \* 4", "2 * 3 * 4"),
    ("entity", "a &amp; b", "a & b"),
    ("chinese", "**重要**：今天", "重要：今天"),
    ("only-marks", "**", "**"),
    ("underscores-in-a-name", "snake_case_name", "snake_case_name"),
    ("html", "a <b>c</b>", "a <b>c</b>"),
]


@pytest.mark.parametrize(("markdown", "plain"), [row[1:] for row in PLAIN], ids=[row[0] for row in PLAIN])
def test_markdown_reads_as_plain_text(markdown: str, plain: str) -> None:
    assert to_plain(markdown) == plain


@given(st.text(alphabet=st.sampled_from(list("ab \n#*_`>-[]()!|~1.<&\\")), max_size=200))
def test_any_markdown_becomes_some_text(markdown: str) -> None:
    assert bool(to_plain(markdown).strip()) or not markdown.strip()


HOSTILE = [
    "[",
    "![",
    "[](",
    "[x",
    "*",
    "*a ",
    "_a",
    "**_",
    "~~a",
    "<",
    "[a](<b",
    "&",
    "\\",
    "> ",
    "- ",
    "`",
    "|-",
    "[a]: b\n",
    "a|",
]


@pytest.mark.parametrize("many", [80_000, 4_900], ids=["nothing-else", "in-prose"])
@pytest.mark.parametrize("marks", HOSTILE)
def test_reading_marks_that_lead_nowhere_takes_bounded_work(marks: str, many: int) -> None:
    """Some cost the square of their number, and the whole service waits meanwhile. Counted in calls, not in time."""
    text = (marks * many)[:many] + "\n\n" + "word " * ((80_000 - many) // 5)
    plain: list[str] = []
    assert steps(lambda text: plain.append(to_plain(text)), text) < 4_500_000
    assert plain[0]


def test_many_marks_in_one_paragraph_are_read_as_in_several() -> None:
    words = [f"**b{number}** and [l{number}](https://e.x/{number})" for number in range(300)]
    expected = [f"b{number} and l{number} (https://e.x/{number})" for number in range(300)]
    assert to_plain(" ".join(words)) == " ".join(expected)
    assert to_plain("\n".join(words)) == "\n".join(expected)


def test_more_marks_than_anybody_writes_are_shown_as_they_are() -> None:
    text = "**b** " * 2000
    assert to_plain(text) == text.strip()


DEEP = {
    "lists": "".join("  " * depth + f"- item {depth}\n" for depth in range(15)),
    "quotes": "".join("> " * depth + f"quote {depth}\n\n" for depth in range(30)),
    "both": "> - " * 12 + "the end",
}


@pytest.mark.parametrize("markdown", DEEP.values(), ids=DEEP)
def test_nothing_is_lost_however_deep_it_lies(markdown: str) -> None:
    """The parser drops what is nested deeper than it goes."""
    plain = to_plain(markdown)
    assert all(word in plain.split() for word in re.findall(r"\w+", markdown))


@pytest.mark.parametrize(
    "markdown",
    [
        ">" * 19 + "a\n" + "b\n" * 39_990,
        "- " * 9 + "a\r" + "b\r" * 39_990,
        "|a" * 100 + "\n" + "|-" * 100 + "\n" + "a\n" * 30_000,
    ],
    ids=["quotes", "lists", "table"],
)
def test_more_lines_in_more_containers_than_anybody_writes_are_shown_as_they_are(markdown: str) -> None:
    """Each line costs as much as it has containers or cells."""
    assert to_plain(markdown) == markdown


def test_an_address_is_not_repeated_without_end() -> None:
    """A thousand names of one long address were fifty million characters."""
    markdown = f"[a]: http://x/{'y' * 40_000}\n\n{'[a] ' * 1250}"
    assert to_plain(markdown) == markdown
    assert to_plain("[a]: http://x/y\n\n[a] and [a]") == "a (http://x/y) and a (http://x/y)"


def test_what_people_write_is_read() -> None:
    """The bounds are far above it."""
    steps = [f"{n}. **step {n}**: `x = {n}`\n     - see [docs](https://e.x/{n})" for n in range(1, 301)]
    table = "| a | b | c | d |\n|---|---|---|---|\n" + "| **1** | 2 | 3 | 4 |\n" * 60
    plain = to_plain("\n".join(steps) + "\n\n" + table)
    assert "300. step 300: x = 300\n  - see docs (https://e.x/300)" in plain
    assert "**" not in plain


SHAPES = {**TEXTS, "an answer": repeated("Some **words** and `code`, see [here](https://e.x/a).\n- one\n- two\n\n")}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_read_at_once_takes_few_steps(shape: str) -> None:
    """Whatever it holds: all others wait meanwhile. The longest of each kind that counts as quick."""
    make = SHAPES[shape]
    text = next((text for size in (8000, 4000, 2000, 1000, 500, 200, 50) if is_quick(text := make(size))), "")
    assert steps(to_plain, text) < 400_000


def test_an_answer_of_an_agent_is_read_at_once() -> None:
    assert is_quick(SHAPES["an answer"](2000))
    assert not is_quick("a\t" * 40_000)
