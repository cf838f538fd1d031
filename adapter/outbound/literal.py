"""Makes WeChat show a text as it is written, although it reads every text as Markdown and knows no escapes. Pure.

Full-width forms replace the characters that have a meaning (docs/reference/ilink-protocol.md, "Rules for outbound
messages"). A NUL is put before most of them first: a function called for each of thousands would take too long.
"""

from __future__ import annotations

import re

_WIDE = {mark: chr(ord(mark) + 0xFEE0) for mark in r"#>|=-+:.)<&\*_`~[]"}
_ALWAYS = str.maketrans({mark: _WIDE[mark] for mark in "*_`~[]"})
"""Emphasis, code, struck text, links, and WeChat's names of emoji."""
_BEFORE_MARK = re.compile(
    r"(?=<[A-Za-z/!?]|&#?[0-9A-Za-z]{1,32};"  # HTML and its entities
    r"|\\(?:[!-/:-@\[-`{-~\n]|\Z))"  # escapes
)
_BLOCK = r"[#>|]|=(?==*+(?:\s|\Z))|[-+](?=-*+(?:[\s|:]|\Z))|:(?=-)"
"""Titles, quotes, tables, lists and rules."""
_BEFORE_BLOCK = re.compile(rf"^(?={_BLOCK})", re.MULTILINE)
_BEHIND_NUMBER = re.compile(
    rf"(?=[.)](?:\s|\Z))(?:{'|'.join(f'(?<=^[0-9]{{{digits}}})' for digits in range(1, 10))})", re.MULTILINE
)
"""A list is counted anew."""
_INDENTED = re.compile(rf"^([ \t]++)([0-9]{{1,9}}(?=[.)](?:\s|\Z)))?({_BLOCK}|(?<=[0-9])[.)])?", re.MULTILINE)
"""Four spaces are code."""


def to_literal(text: str) -> str:
    """The text with the characters replaced that WeChat would leave out, or show as something else."""
    text = _widen_starts(text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", ""))
    text = _widen_marked(_BEFORE_MARK.sub("\0", text)).translate(_ALWAYS)
    # a line break alone may be shown as a space; it stays behind two spaces
    return text.replace("\n\n", "\0\0").replace("\n", "  \n").replace("\0", "\n")


def to_literal_start(part: str) -> str:
    """A part of such a text, which may begin within a line."""
    first, line_break, rest = part.partition("\n")
    return f"{_widen_starts(first)}{line_break}{rest}"


def _widen_starts(text: str) -> str:
    return _widen_marked(_BEHIND_NUMBER.sub("\0", _BEFORE_BLOCK.sub("\0", _INDENTED.sub(_widen_indented, text))))


def _widen_marked(text: str) -> str:
    for mark, wide in _WIDE.items():
        text = text.replace(f"\0{mark}", wide)
    return text


def _widen_indented(start: re.Match[str]) -> str:
    indent, number, mark = start.groups(default="")
    if start[0] == indent and start.string[start.end() : start.end() + 1] in ("", "\n"):
        return ""  # an empty line
    return indent.replace("\t", "  ").replace(" ", "\N{NO-BREAK SPACE}") + number + _WIDE.get(mark, "")
