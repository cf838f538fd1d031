"""Texts as WeChat shows them: long ones are split into parts, `<` and `>` outside code become full-width. Pure."""

from __future__ import annotations

import re

_FENCE = re.compile(r"(?:(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)*(`{3,6}|~{3,6}(?!~))([^`\n]*)")
"""A fence of more than six marks counts as text, since it would be repeated in every part."""
_INFO_CHARS = 32
"""Most characters of a fence's info string that are repeated."""
_CLOSING_ROOM = 8
"""Room for a line break and the closing marks of a fence at the end of a part."""

_WIDE = str.maketrans("<>", "＜＞")
_BACKTICKS = re.compile(r"(`+)")

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？；])")


def split(text: str, max_chars: int, max_bytes: int, filled: float = 1 / 3) -> list[str]:
    """Splits `text` into parts, at paragraphs, else lines, sentences or words. Each part costs a send.

    A code fence that is cut is closed at the end of the part and reopened in the next. `filled`: share of a part
    that is filled, even if that cuts a word. `max_bytes`: of a part whose `<` and `>` may all become full-width.
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


def closing_fence(text: str) -> str:
    """What ends the code fence inside which the text ends, so that appended text does not become code; "": none."""
    fence = _open_fence(text, "")
    return fence and _fence_marker(fence)


def widen(text: str) -> str:
    """The text with `<` and `>` full-width where they are not code: a bare `<` hides the rest of its line
    (docs/reference/ilink-protocol.md, "Rules for outbound messages").

    Code in a line ends in it: behind backticks that are not closed there, all is widened up to the paragraph's end.
    """
    if "<" not in text and ">" not in text:
        return text
    lines, fence, is_unsure = [], "", False
    for line in text.split("\n"):
        before, fence = fence, _open_fence(line, fence)
        is_unsure = is_unsure and not before and bool(line.strip())
        if before:
            lines.append(line)
        elif fence or is_unsure:
            lines.append(line.translate(_WIDE))
        else:
            widened, is_unsure = _widen_line(line)
            lines.append(widened)
    return "\n".join(lines)


def _widen_line(line: str) -> tuple[str, bool]:
    """A line that is in no fence, and whether it leaves backticks open."""
    pieces, at = _BACKTICKS.split(line), 0  # text, backticks, text, ...
    is_row = line.lstrip().startswith("|")
    while at + 1 < len(pieces):
        pieces[at] = pieces[at].translate(_WIDE)
        try:
            end = pieces.index(pieces[at + 1], at + 2)
        except ValueError:
            break
        if pieces[at].endswith("\\") or (is_row and any("|" in piece for piece in pieces[at + 2 : end])):
            break  # the backtick is escaped, or the cell of a table ends
        at = end + 1
    return "".join(pieces[:at]) + "".join(pieces[at:]).translate(_WIDE), at + 1 < len(pieces)


def _is_within_limits(text: str, max_chars: int, max_bytes: int) -> bool:
    return len(text) <= max_chars and _widest(text) <= max_bytes


def _widest(text: str) -> int:
    """Bytes of the text if none of it is code: `＜` has two more than `<`."""
    return len(text.encode()) + 2 * (text.count("<") + text.count(">"))


def _cut_position(text: str, chars: int, size: int, filled: float) -> int:
    """The last good place to cut within the limits, at least one character in."""
    limit = min(chars, len(text))
    while (excess := _widest(text[:limit]) - size) > 0:
        limit -= max(1, excess // 4)
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
