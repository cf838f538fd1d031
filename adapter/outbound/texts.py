"""Texts as WeChat shows them: long ones are split into parts, literal ones show as they are written. Pure."""

from __future__ import annotations

import re

_FENCE = re.compile(r"(`{3,6}|~{3,6}(?!~))([^`\n]*)")
"""A fence of more than six marks counts as text, since it would be repeated in every part."""
_INFO_CHARS = 32
"""Most characters of a fence's info string that are repeated."""
_CLOSING_ROOM = 8
"""Room for a line break and the closing marks of a fence at the end of a part."""

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？；])")


def split(text: str, max_chars: int, max_bytes: int, filled: float = 1 / 3) -> list[str]:
    """Splits `text` into parts, at paragraphs, else lines, sentences or words. Each part costs a send.

    A code fence that is cut is closed at the end of the part and reopened in the next. `filled`: share of a part
    that is filled, even if that cuts a word.
    """
    if _is_within_limits(text, max_chars, max_bytes):
        return [text]
    parts: list[str] = []
    fence = ""
    rest = text
    while rest:
        opening = f"{fence}\n" if fence else ""
        room_chars = max(1, max_chars - len(opening) - _CLOSING_ROOM)
        room_bytes = max(4, max_bytes - len(opening.encode()) - _CLOSING_ROOM)
        if _is_within_limits(opening + rest, max_chars, max_bytes):
            parts.append(opening + rest)
            break
        cut = _cut_position(rest, room_chars, room_bytes, filled)
        piece, rest = rest[:cut], rest[cut:]
        part = opening + piece.rstrip("\n" if fence else " \n")
        fence = _open_fence(piece, fence)
        # spaces at the start of a line are significant
        rest = rest.lstrip("\n" if fence or piece.endswith("\n") else " \n")
        if fence:
            part += "\n" + _fence_marker(fence)
        if part.strip():
            parts.append(part)
    return parts


def is_open(text: str) -> bool:
    """Whether the text ends inside a code fence, so that appended text would become code."""
    return bool(_open_fence(text, ""))


def _is_within_limits(text: str, max_chars: int, max_bytes: int) -> bool:
    return len(text) <= max_chars and len(text.encode()) <= max_bytes


def _cut_position(text: str, chars: int, size: int, filled: float) -> int:
    """The last good place to cut within the limits, at least one character in."""
    limit = min(chars, len(text))
    while len(text[:limit].encode()) > size:
        limit -= max(1, (len(text[:limit].encode()) - size) // 4)
    head = text[:limit]
    least = int(limit * filled)  # rather cut a line than make many tiny parts
    for mark in ("\n\n", "\n"):
        at = head.rfind(mark)
        if at > least:
            return at + len(mark)
    sentences = [match.end() for match in _SENTENCE.finditer(head) if match.end() > least]
    if sentences:
        return sentences[-1]
    at = head.rfind(" ")
    return at + 1 if at > least else max(1, limit)


def _open_fence(piece: str, fence: str) -> str:
    """The fence line that is open at the end of `piece`; "": none."""
    for line in map(str.strip, piece.split("\n")):
        if fence:
            if line.startswith(_fence_marker(fence)) and not line.strip(fence[0]):
                fence = ""
        elif match := _FENCE.fullmatch(line):
            fence = match[1] + match[2][:_INFO_CHARS].rstrip()
    return fence


def _fence_marker(fence: str) -> str:
    return fence[: len(fence) - len(fence.lstrip(fence[0]))]


# literal texts ----------------------------------------------------------------------------------------
#
# WeChat reads every text as Markdown and knows no escapes, so full-width forms replace the characters that have a
# meaning (docs/reference/ilink-protocol.md, "Rules for outbound messages"). A NUL is put before most of them first: a
# function called for each of thousands would take too long.

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
