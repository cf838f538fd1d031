"""Reads the quote on an item, in all known shapes. Pure."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from adapter.content.quotes import Part, Reference, as_id, placeholder_summary, resolve_quote
from adapter.contract.messages import Quote
from adapter.errors import UNDECODABLE
from adapter.ilink import wire

T = TypeVar("T")
Quoted: TypeAlias = tuple[Quote, Reference]

KINDS = {wire.TEXT: "text", wire.IMAGE: "image", wire.VOICE: "voice", wire.FILE: "file", wire.VIDEO: "video"}


def read_reference(raw: bytes) -> Quoted | None:
    """The quote, and where to find the rest of its text; None: no quote. Never raises."""
    ref = _decode_or_none(raw, wire.RefMessage) if raw not in (b"", b"null") else None
    if ref is None:
        return None
    item = _decode_or_none(bytes(ref.message_item), wire.Item) or wire.Item()
    partial = _decode_or_none(bytes(ref.partial_text), wire.PartialText)
    ids = tuple(dict.fromkeys(ident for ident in (as_id(ref.svr_id), as_id(item.msg_id)) if ident))
    kind = KINDS.get(item.type or 0, "")
    text = _text_of(item)
    part = _read_part(partial)
    shown = (
        text_or_empty(ref.title)
        or placeholder_summary(kind, text_or_empty(item.file_item.file_name) if item.file_item else "")
        or _describe_span(part)
    )
    if not (ids or text or shown):
        return None
    quote = Quote(id=ids[0] if ids else "", text=shown, kind=kind or ("text" if text else ""))
    reference = Reference(ids, part, text)
    return resolve_quote(quote, reference), reference


def _decode_or_none(raw: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(raw, type=kind, strict=False)
    except UNDECODABLE:
        return None


def _text_of(item: wire.Item) -> str:
    if item.text_item is not None:
        return item.text_item.text or ""
    return transcript_of(item.voice_item) if item.voice_item is not None else ""


def transcript_of(voice: wire.VoicePayload) -> str:
    """WeChat's speech-to-text from either of its two places; "": none."""
    nested = voice.text_item.get("text") if isinstance(voice.text_item, dict) else ""
    return next((text for text in map(text_or_empty, (voice.text, nested)) if text), "")


def text_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def _read_part(partial: wire.PartialText | None) -> Part | None:
    if partial is None or not partial.start or not partial.end:
        return None
    return Part(
        partial.start,
        partial.end,
        partial.startindex or 0,
        partial.endindex or 0,
        (partial.quotemd5 or "").strip().lower(),
    )


def _describe_span(part: Part | None) -> str:
    """Beginning and end of the quoted part, shown if its text is unknown."""
    return f"{part.start}…{part.end}" if part is not None else ""
