"""Quotes: the quoted message, the quoted part of it, and summaries of media. Pure."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from adapter.contract import messages as contract
from adapter.contract.messages import Quote

MAX_TEXT = 65_536
"""Characters in which a part is searched, which bounds the work. WeChat allows no longer texts."""


class Part(NamedTuple):
    """iLink's `partial_text`: beginning and end of the part, and its MD5 as lower-case hex ("": none)."""

    start: str
    end: str
    start_index: int
    end_index: int
    md5: str


class Reference(NamedTuple):
    """The quoted message, as iLink identifies it."""

    ids: tuple[str, ...]
    """Its possible ids, best first; empty: it cannot be looked up."""
    part: Part | None
    text: str
    """Its text from iLink; "": it has to be looked up."""


def as_id(value: object) -> str:
    """An iLink id as text, without loss; "" for no id (absent, 0, neither number nor text)."""
    if type(value) is int:  # a bool is an int, too
        return str(value) if value else ""
    text = value.strip() if isinstance(value, str) else ""
    return "" if text == "0" else text


def choose_part(text: str, part: Part) -> str | None:
    """The quoted part of `text`; None: it is not found.

    The end is counted over the whole text or from just after the start. The MD5 decides which is meant; without one
    the whole text is tried first. Occurrences are numbered from 0 and do not overlap.
    """
    text = text[:MAX_TEXT]
    begin = _find_occurrence(text, part.start, part.start_index, 0)
    if begin is None:
        return None
    for counted_from in (0, begin + len(part.start)):
        end = _find_occurrence(text, part.end, part.end_index, counted_from)
        if end is None or end < begin:
            continue
        chosen = text[begin : end + len(part.end)]
        if not part.md5 or _md5(chosen) == part.md5:
            return chosen
    return None


def _find_occurrence(text: str, wanted: str, number: int, since: int) -> int | None:
    """Position of the `number`-th occurrence of `wanted` after `since`."""
    if not wanted or not 0 <= number <= len(text) // len(wanted):
        return None  # more than possible: bounds the search
    at = since - len(wanted)
    for _ in range(number + 1):
        at = text.find(wanted, at + len(wanted))
        if at < 0:
            return None
    return at


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def cut_to_part(text: str, part: Part | None) -> str:
    """The quoted part of `text`, or the whole text if no part is meant or found.

    If the MD5 shows that the start is the whole part, no text is needed.
    """
    if part is None:
        return text
    chosen = choose_part(text, part)
    if chosen is None and part.md5 and _md5(part.start[:MAX_TEXT]) == part.md5:
        return part.start
    return text if chosen is None else chosen


def placeholder_summary(kind: str, name: str = "") -> str:
    """Summary of an item without text; "" for a kind without one."""
    return f"[{kind}] {name}".rstrip() if kind in ("image", "voice", "file", "video") else ""


def kind_of(item: contract.InboundItem) -> str:
    """The item's tag on the bus."""
    return str(item.__struct_config__.tag)


def resolve_quote(quote: Quote, reference: Reference, *, sent: str = "", kind: str = "") -> Quote:
    """The quote with what is known. iLink's own text has priority, then that which the bot sent, then the title.

    `sent`, `kind`: of the bot's message that is quoted; "": it is not known.
    """
    known = msgspec.structs.replace(quote, kind=kind, said_by="bot") if kind else quote
    shown = cut_to_part(reference.text or sent, reference.part)
    return msgspec.structs.replace(known, text=shown) if shown else known
