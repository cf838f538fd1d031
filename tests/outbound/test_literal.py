"""`format: literal`: WeChat, which reads every text as Markdown, shows it as it is written."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adapter.outbound.texts import split, to_literal, to_literal_start

INDENT = "\N{NO-BREAK SPACE}"
TABLE = [
    ("prose", "Tomorrow, 10:30 - don't be late! (50 % off; 3 > 2, a = b, 2 + 2, x | y)", None),
    ("a name", "a_b_c.pdf", "a＿b＿c.pdf"),
    ("emphasis", "**a** *b* __c__ ~~d~~", "＊＊a＊＊ ＊b＊ ＿＿c＿＿ ～～d～～"),
    ("code", "run `make`", "run ｀make｀"),
    ("a fence", "```py\nx\n```", "｀｀｀py  \nx  \n｀｀｀"),
    ("a link", "[a](http://b)", "［a］(http://b)"),
    ("an emoji of WeChat", "[Smile]", "［Smile］"),
    ("escapes", r"\_ \a C:\temp", r"＼＿ \a C:\temp"),
    ("a break", "a\\\nb\\", "a＼  \nb＼"),
    ("HTML", "<b>a</b> <!-- x --> 1 < 2", "＜b>a＜/b> ＜!-- x --> 1 < 2"),
    ("entities", "&amp; &#38; a & b", "＆amp; ＆#38; a & b"),
    ("titles", "# a\n###### b\n#c", "＃ a  \n＃##### b  \n＃c"),
    ("underlined", "a\n===\nb\n---", "a  \n＝==  \nb  \n－--"),
    ("quotes", "> a\n  >> b", f"＞ a  \n{INDENT * 2}＞> b"),
    ("bullets", "- a\n+ b\n* c\n-5 and --help", "－ a  \n＋ b  \n＊ c  \n-5 and --help"),
    ("numbers", "2. a\n1) b\n1.5\n3.", "2． a  \n1） b  \n1.5  \n3．"),
    ("a rule", "- - -", "－ - -"),
    ("a table", "| a | b |\n|---|:-:|\n| 1 | 2 |", "｜ a | b |  \n｜---|:-:|  \n｜ 1 | 2 |"),
    ("a table without edges", "a | b\n-- | --\n:-|-", "a | b  \n－- | --  \n：-|-"),
    ("indented", "    a\n\tb", f"{INDENT * 4}a  \n{INDENT * 2}b"),
    ("lines", "a\nb\r\nc\rd", "a  \nb  \nc  \nd"),
    ("paragraphs", "a\n\nb\n \t\nc", "a\n\nb\n\nc"),
    ("other letters", "你好，世界 😀", None),
    ("nothing", "", None),
]


@pytest.mark.parametrize(("written", "sent"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_has_a_meaning_becomes_full_width(written: str, sent: str | None) -> None:
    assert to_literal(written) == (written if sent is None else sent)


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKED = st.text(alphabet=st.sampled_from(list("ab 12\n\t\r#*_`>-+=[]()!|~:.;<&/\\")), max_size=80)


def narrow(text: str) -> str:
    """With full-width forms as the characters that they stand for, and without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@given(MARKED | st.text(st.characters(exclude_characters="\0"), max_size=80))  # a parser replaces NUL
def test_a_reader_of_markdown_finds_nothing_but_the_text(written: str) -> None:
    sent = to_literal(written)
    shown = []
    for token in PARSER.parse(sent):
        assert token.type in ("paragraph_open", "inline", "paragraph_close")
        for child in token.children or []:
            assert child.type in ("text", "softbreak", "hardbreak")
            shown.append(child.content)
    assert narrow("".join(shown)) == narrow(written)


@given(MARKED, st.integers(20, 40))
def test_so_does_a_reader_of_each_part(written: str, chars: int) -> None:
    for part in split(to_literal(written), chars, 16_384):
        assert {token.type for token in PARSER.parse(to_literal_start(part))} <= {
            "paragraph_open",
            "inline",
            "paragraph_close",
        }
