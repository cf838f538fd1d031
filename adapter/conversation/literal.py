"""Makes WeChat show a text as it is written, although it reads every text as Markdown and knows no escapes. Pure.

Full-width forms replace the characters that have a meaning (docs/reference/ilink-protocol.md, "Rules for outbound
messages").
"""

from __future__ import annotations

import re

_ANYWHERE = re.compile(
    r"[*_`~\[\]]"  # emphasis, code, struck text, links, and WeChat's names of emoji
    r"|<(?=[A-Za-z/!?])|&(?=#?[0-9A-Za-z]{1,32};)"  # HTML and its entities
    r"|\\(?=[!-/:-@\[-`{-~\n]|\Z)"  # escapes
)
_LINE_START = re.compile(
    r"^(?=[ \t0-9#>|=:+-])([ \t]*+)"  # indented code
    r"([0-9]{1,9}(?=[.)](?:\s|\Z)))?"  # numbers, which would be counted anew
    r"((?<=[0-9])[.)]|[#>|]|=(?==*+(?:\s|\Z))"  # lists with numbers, titles, quotes, tables
    r"|[-+](?=-*+(?:[\s|:]|\Z))|:(?=-))?",  # lists, rules, and the line below the head of a table
    re.MULTILINE,
)
_LINE_BREAK = re.compile(r"(?<![ \n]) *+\n(?!\n)")
"""A line break alone may be shown as a space; it stays behind two spaces."""


def to_literal(text: str) -> str:
    """The text with the characters replaced that WeChat would leave out, or show as something else."""
    text = _LINE_START.sub(_widen_start, text.replace("\r\n", "\n").replace("\r", "\n"))
    return _LINE_BREAK.sub("  \n", _ANYWHERE.sub(lambda mark: _widen(mark[0]), text))


def _widen_start(start: re.Match[str]) -> str:
    indent, number, mark = start.groups(default="")
    if start[0] == indent and start.string[start.end() : start.end() + 1] in ("", "\n"):
        return ""  # an empty line
    return indent.replace("\t", "  ").replace(" ", "\N{NO-BREAK SPACE}") + number + _widen(mark)


def _widen(mark: str) -> str:
    """The full-width form of a character of ASCII, or nothing for none."""
    return chr(ord(mark) + 0xFEE0) if mark else ""
