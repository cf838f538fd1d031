"""What a user quotes: which message is meant, which part of it, and what stands for media. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from adapter.contract import messages as contract
from adapter.contract.messages import Quote

MAX_TEXT = 65_536
"""Characters in which a part is looked for: bounds the work, and is more than WeChat lets anybody write."""


class Part(NamedTuple):
    """iLink's `partial_text`: where the part begins and ends, and its MD5 as lower-case hex ("": none given)."""

    start: str
    end: str
    start_index: int
    end_index: int
    md5: str


class Reference(NamedTuple):
    """The message that a quote points to, as iLink names it."""

    ids: tuple[str, ...]
    """Ids under which it may be known, best first; none: it cannot be looked up."""
    part: Part | None
    text: str
    """Its words, where iLink gave them; "" where they have to be looked up."""


class QuotedText(NamedTuple):
    """What is known of a quoted message."""

    text: str
    kind: str
    said_by: Literal["user", "bot"]


def as_id(value: object) -> str:
    """An id of iLink as text, losslessly; "" for what is none (absent, 0, not a number or a text)."""
    if type(value) is int:  # as most are
        return str(value) if value else ""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, str)):
        return ""
    text = str(value).strip()
    return "" if text in ("", "0") else text


def choose_part(text: str, part: Part) -> str | None:
    """The part of `text` that is quoted; None where it is not to be found.

    The end is counted over the whole text or from just after the start: the MD5 decides which is meant, and
    without one the whole text counts first. Occurrences are numbered from 0 and do not overlap.
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
    """Where the `number`-th occurrence of `wanted` begins, looked for from `since`."""
    if not wanted or not 0 <= number <= len(text) // len(wanted):
        return None  # more than there can be: a short quote is no endless search
    at = since - len(wanted)
    for _ in range(number + 1):
        at = text.find(wanted, at + len(wanted))
        if at < 0:
            return None
    return at


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def cut_to_part(text: str, part: Part | None) -> str:
    """The quoted part of `text`, or all of it where no part is meant or found.

    A part whose start is all of it, as its MD5 shows, needs no text to be told.
    """
    if part is None:
        return text
    chosen = choose_part(text, part)
    if chosen is None and part.md5 and _md5(part.start[:MAX_TEXT]) == part.md5:
        return part.start
    return text if chosen is None else chosen


def placeholder_summary(kind: str, name: str = "") -> str:
    """Stands for what has no text of its own; "" for a kind that has no summary."""
    return f"[{kind}] {name}".rstrip() if kind in ("image", "voice", "file", "video") else ""


def quoted_text_of(text: str, items: Sequence[contract.InboundItem], item: int | None = None) -> QuotedText:
    """What a user said: the whole message, or only one of its items."""
    meant = items if item is None else items[item : item + 1]
    if item is not None:
        text = _item_text(meant[0]) if meant else ""
    kind = next((kind for one in meant if (kind := kind_of(one)) != "unsupported"), "")
    if not text:
        text = next((shown for one in meant if (shown := _item_summary(one))), "")
    return QuotedText(text, kind, "user")


def kind_of(item: contract.InboundItem) -> str:
    """Its tag on the bus."""
    return str(item.__struct_config__.tag)


def _item_text(item: contract.InboundItem) -> str:
    match item:
        case contract.TextItem():
            return item.text
        case contract.VoiceItem():
            return item.transcript
        case _:
            return ""


def _item_summary(item: contract.InboundItem) -> str:
    return placeholder_summary(kind_of(item), item.name if isinstance(item, contract.FileItem) else "")


def resolve_quote(quote: Quote, reference: Reference, words: QuotedText | None) -> Quote:
    """The quote with what was found out. iLink's own words count more than ours, ours more than its title."""
    known = quote if words is None else msgspec.structs.replace(quote, kind=words.kind, said_by=words.said_by)
    text = reference.text or (words.text if words else "")
    shown = cut_to_part(text, reference.part)
    return msgspec.structs.replace(known, text=shown) if shown else known
