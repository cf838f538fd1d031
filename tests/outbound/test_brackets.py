"""`<` and `>` outside code are full-width: WeChat takes a bare `<` for a tag, and hides the rest of the line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adapter.bridge.texts import split, widen

TABLE = [
    ("the report", "CPU使用率<80%时属于**正常范围**", "CPU使用率＜80%时属于**正常范围**"),
    ("a tag and a link", "<b>a</b> <https://a.b> x -> y", "＜b＞a＜/b＞ ＜https://a.b＞ x -＞ y"),
    ("a quote", "> a\n>> b", "＞ a\n＞＞ b"),
    ("code in a line", "`a < b` < ``c ` > d`` > e", "`a < b` ＜ ``c ` > d`` ＞ e"),
    ("a fence", "1 < 2\n```py\nif a < b:\n```\n3 > 2", "1 ＜ 2\n```py\nif a < b:\n```\n3 ＞ 2"),
    ("a fence that stays open", "~~~ <\na < b\n\n`c", "~~~ ＜\na < b\n\n`c"),
    ("a fence in a list", "- ```\n  a < b\n  ```\n- c < d", "- ```\n  a < b\n  ```\n- c ＜ d"),
    ("a backtick alone", "a ` b < c\nd ` e < f `\n\n`g < h`", "a ` b ＜ c\nd ` e ＜ f `\n\n`g < h`"),
    ("escaped", "\\`a < b` < c", "\\`a ＜ b` ＜ c"),
    ("a cell of a table", "| `a < b` | `c|d < e` |", "| `a < b` | `c|d ＜ e` |"),
]


@pytest.mark.parametrize(("written", "sent"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_not_code_becomes_full_width(written: str, sent: str) -> None:
    assert widen(written) == sent


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PROSE = ("a < b", "> c", "`d < e`", "f ` g < h", "\\`i < j`", "``k ` < l``", "# `m` < n `", "<o>p</o>", "1. x < `y`")
CELLS = ("| `q<r` | s<t |", "| `u|v<w` |", "|---|---|")
LINES = ("", "```", "~~~", "```py", "[<](z<z>)", "![`<`](<`>)", "---", "===")


CODE = "code_inline", "fence", "code_block"


@given(st.lists(st.sampled_from(PROSE + CELLS + LINES), max_size=12).map("\n".join), st.integers(24, 200))
def test_a_reader_of_markdown_finds_none_outside_code_in_any_part(written: str, chars: int) -> None:
    for part in split(written, chars, 16_384):
        sent = widen(part)
        assert len(sent) == len(part)
        for token in PARSER.parse(sent):
            for one in token.children or [token]:
                assert one.type in (*CODE, "image") or not {*"<>"} & {*one.content}, sent
                assert one.type not in ("blockquote_open", "html_block", "html_inline")


def test_a_part_has_room_for_what_becomes_full_width() -> None:
    parts = split("a < b > c\n" * 60, 100, 60)
    assert "".join(part.replace("\n", "") for part in parts) == "a < b > c" * 60
    assert max(len(widen(part).encode()) for part in parts) <= 60
