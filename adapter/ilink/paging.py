"""Cuts a JSON list of messages into pages without decoding it, so that memory has one page of messages. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

MESSAGES = 1000
PAGE_BYTES = 262_144
"""A page ends with the message that reaches one of the two limits."""
WHOLE_BYTES = 32_768
"""A list up to this size is one page."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_BETWEEN = re.compile(rb'(?:[^"\[\]{},]++|%b)*+([\[\]{},])' % _STRING, re.DOTALL)
"""Up to the next bracket or comma."""
_WITHIN = re.compile(rb'(?:[^"\[\]{}]++|%b)*+([\[\]{}])' % _STRING, re.DOTALL)
"""Up to the next bracket."""
_PAGE = msgspec.json.Decoder(list[msgspec.Raw])


def pages_of(messages: bytes) -> Iterator[list[bytes]]:
    """The elements of a valid JSON list in pages. The ends of all pages are found first."""
    ends = _page_ends(messages)
    starts = [1, *(end + 1 for end in ends)]
    return (read_page(b"[%b]" % messages[start:end]) for start, end in zip(starts, ends, strict=False))


def read_page(page: bytes) -> list[bytes]:
    """The elements of a valid JSON list."""
    return [bytes(raw) for raw in _PAGE.decode(page)]


def _page_ends(messages: bytes) -> list[int]:
    """The end of each page: a comma, or the list's last bracket."""
    ends, start, count, depth, at = [], 1, 0, 0, 1
    while found := (_WITHIN if depth else _BETWEEN).match(messages, at):
        at = found.end()
        match messages[at - 1 : at]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
            case _:
                count += 1
                if count == MESSAGES or at - start >= PAGE_BYTES:
                    ends.append(at - 1)
                    start, count = at, 0
        if depth < 0:
            break
    return [*ends, at - 1]
