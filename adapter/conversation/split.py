"""Splits long texts into parts, and converts Markdown to plain text. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

MAX_BYTES = 16_384
"""Longest text that iLink accepts (docs/reference/ilink-protocol.md, "Known numbers")."""

_FENCE = re.compile(r"(`{3,6}|~{3,6}(?!~))([^`\n]*)")
"""A fence of more than six marks counts as text, since it would be repeated in every part."""
_INFO_CHARS = 32
"""Most characters of a fence's info string that are repeated."""
_CLOSING_ROOM = 8
"""Room for a line break and the closing marks of a fence at the end of a part."""

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？；])")


def split(text: str, max_chars: int, max_bytes: int = MAX_BYTES) -> list[str]:
    """Splits `text` into as few parts as fit, at paragraphs, else lines, sentences or words.

    A code fence that is cut is closed at the end of the part and reopened in the next. Each part costs a send.
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
        cut = _cut_position(rest, room_chars, room_bytes)
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


def _cut_position(text: str, chars: int, size: int) -> int:
    """The last good place to cut within the limits, at least one character in."""
    limit = min(chars, len(text))
    while len(text[:limit].encode()) > size:
        limit -= max(1, (len(text[:limit].encode()) - size) // 4)
    head = text[:limit]
    least = limit // 3  # rather cut a line than make many tiny parts
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


_MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_BLOCKS = MarkdownIt("commonmark").enable(["table"]).disable("inline")
"""Parses paragraphs, lists and tables; `_MARKDOWN` parses their content."""
_MARK = re.compile(r"[\[\]!*_~`<&\\]")
_MARKS_READ = 5000
"""Most marks of a text that are parsed; the rest stays as it is. A mark can cost as much as a hundred words."""
_MARKS_AT_ONCE = re.compile(r"(?:[^\[\]!*_~`<&\\]*[\[\]!*_~`<&\\]){100}")
"""A hundred marks, the most that are parsed together in a paragraph: the cost of unmatched brackets and stars grows
with the square of their number."""
_HEAD = re.compile(r"[\s>*+\-0-9.)]*+")
"""The longest possible prefix of a line that opens nested containers."""
_NESTED: int = _MARKDOWN.options["maxNesting"]
"""Deepest nesting that is parsed; the parser drops what is deeper."""
_CELLS_READ = 50_000
"""Lines of a text times the containers or table cells of each: about a second of work."""
_GROWTH = 8
"""Largest growth of a text: a link's address is repeated wherever its name stands."""


_STOP = re.compile(r"[\n!#$%&*+\-:<=>@\[\]\\^_`{}~]")
"""Characters at which the parser stops."""
_NAME = re.compile(r"(?://|mailto:)[^\s/:]*[^\x00-\x7F]", re.IGNORECASE)
"""A host that is not ASCII; encoding it takes the square of its length."""
_QUICK_CHARS, _QUICK_STOPS, _QUICK_CELLS = 8000, 600, 1000


def is_quick(text: str) -> bool:
    """Whether `to_plain` takes a few milliseconds, at most twenty, as for most agents' answers."""
    return (
        len(text) <= _QUICK_CHARS
        and len(_STOP.findall(text)) <= _QUICK_STOPS
        and _estimate_cells(text) <= _QUICK_CELLS
        and not _NAME.search(text)
    )


def to_plain(text: str) -> str:
    """Converts Markdown to plain text: what a reader would see, without the marks. Links keep their address.

    A text that is too expensive or too deeply nested stays as it is.
    """
    if _estimate_cells(text) > _CELLS_READ:
        return text
    out: list[str] = []
    room = _GROWTH * len(text) + 1000
    numbers: list[int | None] = []
    env: dict[str, Any] = {}
    marks = 0
    for token in _BLOCKS.parse(text, env):
        if room < 0 or (token.nesting == 1 and token.level >= _NESTED - 1):
            return text
        match token.type:
            case "inline":
                marks += 1 + len(_MARK.findall(token.content))
                texts = list(_read(token.content, env)) if marks <= _MARKS_READ else [token.content]
                room -= sum(map(len, texts))
                out += texts
            case "fence" | "code_block" | "html_block":
                out.append(token.content.rstrip("\n") + "\n\n")
            case "hr":
                out.append("----------\n\n")
            case "ordered_list_open":
                numbers.append(int(token.attrGet("start") or 1))
            case "bullet_list_open":
                numbers.append(None)
            case "ordered_list_close" | "bullet_list_close":
                numbers.pop()
                out.append("" if numbers else "\n")
            case "list_item_open":
                out.append("  " * (len(numbers) - 1) + _bullet_text(numbers))
            case "paragraph_close":
                out.append("\n" if token.hidden or numbers else "\n\n")
            case "heading_close":
                out.append("\n\n")
            case "th_close" | "td_close":
                out.append("  ")
            case "tr_close":
                out.append("\n")
            case "table_close":
                out.append("\n")
            case _:
                pass
    plain = "\n".join(line.rstrip(" \t") for line in "".join(out).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", plain).strip() or text


def _estimate_cells(text: str) -> int:
    """Upper bound of the lines in containers and the table cells of a text."""
    lines = text.replace("\r", "\n").split("\n")
    nested = max(len(head[0]) for line in lines if (head := _HEAD.match(line)))
    return len(lines) * (1 + min(nested, _NESTED) + max(line.count("|") for line in lines))


def _read(text: str, env: dict[str, Any]) -> Iterator[str]:
    """The content of a paragraph in pieces that end at a line or a word if possible. `env`: link definitions."""
    start = 0
    while start < len(text):
        marks = _MARKS_AT_ONCE.match(text, start)
        end = len(text) if marks is None else marks.end()
        if marks is not None and (space := max(text.rfind("\n", start, end), text.rfind(" ", start, end))) > start:
            end = space + 1
        for token in _MARKDOWN.parseInline(text[start:end], env):
            yield _inline_text(token.children or [])
        start = end


def _bullet_text(numbers: list[int | None]) -> str:
    number = numbers[-1]
    if number is None:
        return "- "
    numbers[-1] = number + 1
    return f"{number}. "


def _inline_text(children: list[Token]) -> str:
    out: list[str] = []
    links: list[tuple[str, int]] = []
    for child in children:
        match child.type:
            case "text" | "code_inline" | "html_inline":
                out.append(child.content)
            case "softbreak" | "hardbreak":
                out.append("\n")
            case "image":
                source = str(child.attrGet("src") or "")
                out.append(f"{child.content} ({source})" if child.content else source)
            case "link_open":
                links.append((str(child.attrGet("href") or ""), len(out)))
            case "link_close":
                href, start = links.pop()
                if href and "".join(out[start:]) != href:
                    out.append(f" ({href})")
            case _:
                pass
    return "".join(out)
