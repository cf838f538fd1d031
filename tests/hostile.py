"""Texts that mean ill: each makes some reader that is not linear do the square of its length."""

from __future__ import annotations

import sys
from collections.abc import Callable

Make = Callable[[int], str]
"""A text of about so many characters."""


def repeated(unit: str, *, before: str = "", behind: str = "") -> Make:
    """`unit` again and again."""
    return lambda size: before + (unit * (size // len(unit) + 1))[:size] + behind


def _staircase(step: str, mark: str) -> Make:
    """Each line is nested one deeper than the one before, up to twenty, and again."""
    return lambda size: "".join(step * (number % 20) + mark + "a\n" for number in range(size // (10 * len(step) + 4)))


def _reference(size: int) -> str:
    """One address, named as often as there is room for."""
    return f"[a]: http://x/{'y' * (size // 2)}\n\n{'[a] ' * (size // 8)}"


def _table(size: int) -> str:
    """Rows that lack a hundred cells."""
    return "|a" * 100 + "\n" + "|-" * 100 + "\n" + "a\n" * (size // 2)


def _distinct(size: int) -> str:
    """No letter twice, as the name of a host."""
    return "[a](http://" + "".join(chr(0x4E00 + number % 20_000) for number in range(size)) + ")"


_SINGLE = [
    *("\t", " ", "\n", "\r", "\r\n", "`", ">", "*", "_", "[", "]", "(", "<", "|", "#", "-", "=", "~", "!", "&", "\\"),
    *(
        ":",
        ";",
        "/",
        ".",
        "%",
        "@",
        "+",
        "'",
        '"',
        "{",
        "\0",
        "\x0b",
        "\u2028",
        "\u200b",
        "\u202e",
        "\u0301",
        "\x1b[",
    ),
    *("😀", "好", "。", "a", "A", "0", "\ufffd"),
]
_UNITS = [
    *("a ", "a\n", "\t\n", " \n", "\t a", "1. ", "1. a\n", "- ", "- a\n", "* a\n", "> ", "> a\n", "> a\n\n", "# a\n"),
    *("a\n-\n", "a\n=\n", "---\n", "```\n", "~~~\n", "    a\n", "a|b\n", "|-", "|a", "![", "[](", "[x", "[a](b '"),
    *("[a](b) ", "[a](<b", "[a]((((", "[a]: b\n", "[a]: b 'c\n", "[a][", "*a ", "_a", "**_", "***a **b* ", "_a__b_"),
    *(
        "~~a",
        "&#x41;",
        "&#xD800;",
        "&amp;",
        "\\\n",
        "a  \n",
        "<a ",
        "<a b='c",
        "</",
        "<!--",
        "<![CDATA[",
        "<?",
        "<!a ",
    ),
    *("<http://a", "<a@b", "``a`", "//", "http://", "https://a?", "http://a@", "a. ", ".  ", "。 ", "-+", "a-b."),
    *("token", "token:", "token: ", "token='", 'token="', "token\\", "token ", "_token", "Bearer ", "Basic\t", "eyJ"),
    *(
        "eyJ-",
        "eyJa.",
        "AARzJW",
        "@im.bot:",
        "QGltLmJvdD",
        "SA",
        "value '",
        'value "',
        "value ' - at ",
        "\\ud83d",
        "\\u",
    ),
    *(
        "_INBOX",
        "_INBOX.a",
        "/logins/",
        "a: b\r\n",
        "a:  \r\n",
        "permissions violation for publish to ",
        "\x1b[0;",
        "=41",
    ),
]

TEXTS: dict[str, Make] = {
    **{f"many {unit!r}": repeated(unit) for unit in (*_SINGLE, *_UNITS)},
    "tabs between two letters": repeated("\t", before="a", behind="a"),
    "spaces between two letters": repeated(" ", before="a", behind="a"),
    "blanks before a word": repeated(" \t", behind="a"),
    "quotes in quotes, and lazy lines": repeated("b\n", before=">" * 19 + "a\n"),
    "lists in lists, and lazy lines": repeated("b\n", before="- " * 9 + "a\n"),
    "numbers in numbers, and lazy lines": repeated("b\n", before="1. " * 9 + "a\n"),
    "quotes and lists in each other": repeated("b\n", before=">- " * 6 + "a\n"),
    "lines of nested quotes": repeated(">" * 19 + "a\n"),
    "lines of nested lists": repeated("- " * 9 + "a\n"),
    "quotes with tabs": repeated(">\t" * 9 + "a\n"),
    "a staircase of quotes": _staircase("> ", ""),
    "a staircase of lists": _staircase("  ", "- "),
    "tables in quotes": repeated(">" * 9 + "|a|b\n", before=">" * 9 + "|a|b\n" + ">" * 9 + "|-|-\n"),
    "a table": repeated("c|d\n", before="a|b\n-|-\n"),
    "a table of lacking cells": _table,
    "a paragraph before its underline": repeated("a\n", behind="==="),
    "a title that does not end": repeated("c\n", before="[a]: b '"),
    "an address that does not end": repeated("b", before="[a](<"),
    "brackets, and what each looks through": repeated("-", before="[" * 99),
    "brackets, and lines": repeated("a\n", before="[" * 99),
    "images, and what each looks through": repeated("-", before="![" * 49),
    "an address named again and again": _reference,
    "a host of letters none twice": _distinct,
    "backticks of every length": lambda size: "".join("`" * n + "a" for n in range(int((2 * size) ** 0.5))),
    "code of every length": lambda size: "".join("`" * n + "a\n" for n in range(int((2 * size) ** 0.5))),
    "attributes": repeated("b ", before="<a "),
    "attributes and blanks": repeated(" = ", before="<a b"),
    "long lines of blanks": repeated(" " * 100 + "\n", before="a"),
    "half emoji": repeated("\ud83d"),
    "a link at each word": repeated("[a](http://例え.jp/あ) "),
    "of everything": repeated("> - 1. **a** _b [c](d) `e` <f> |g|\t\n\n# ~~h~~ &amp; \\i ![j](k)\u200b\n"),
}


UNSEEN_CHARS = (
    "\u00ad\u034f\u115f\u17b4\u180e\u200b\u200d\u2060\u2064\u2800\u3164\ufe00\ufeff\uffa0\ufff9"
    "\U000e0001\U000e0041\U000e01ef"
)
"""Zero width, tags, fillers, and what selects nothing: words in them are read by programs, and seen by nobody."""


def steps(rule: Callable[[str], object], text: str) -> int:
    """Functions called, those written in C included."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        rule(text)
    finally:
        sys.setprofile(None)
    return calls
