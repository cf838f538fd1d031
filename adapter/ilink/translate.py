"""Translates iLink's inbound messages and their quotes into the contract's items. Pure.

docs/reference/ilink-protocol.md, "Messages", has their fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec

from adapter.contract import messages as contract
from adapter.contract.quotes import Part, Reference, as_id, kind_of, placeholder_summary, resolve_quote
from adapter.contract.repeats import MessageKeys
from adapter.errors import UNDECODABLE, Refused, Unreadable
from adapter.ilink import wire
from adapter.ilink.cipher import read_key
from adapter.ports import InboundMessage, MediaRef
from adapter.tools.decoding import as_utf8, decode_fields
from adapter.tools.media_types import NO_NAMES

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")
Quoted: TypeAlias = tuple[contract.Quote, Reference]

KINDS = {wire.TEXT: "text", wire.IMAGE: "image", wire.VOICE: "voice", wire.FILE: "file", wire.VIDEO: "video"}

_PLAIN = msgspec.json.Decoder(wire.PlainMessage)
_WHOLE = msgspec.json.Decoder(wire.WireMessage, strict=False)
_ITEM = msgspec.json.Decoder(wire.Item, strict=False)
MAX_ID = 128
"""A longer user id is invalid, since it does not fit into a subject."""
NOBODY = ("", "0")
"""User ids of unset fields."""
CHATROOM_SUFFIX = "@chatroom"
"""Suffix of group ids."""
LARGEST = 262_144
"""Largest message that is decoded, in bytes: sixteen times the longest text that WeChat is known to send."""
MOST_ITEMS = 1000
MAX_FILE_NAME = 255
"""Characters; phones' file systems allow no longer names."""
PASSING = frozenset({"create_time_ms", "update_time_ms", "msg_id", "is_completed"})
"""Fields that may differ when iLink repeats an item."""
PAYLOADS = {
    wire.TEXT: "text_item",
    wire.IMAGE: "image_item",
    wire.VOICE: "voice_item",
    wire.FILE: "file_item",
    wire.VIDEO: "video_item",
}
"""The field of an item with the content for its type."""
IDLE = frozenset({"button_item_list", "at_bot_username_list"})
"""Lists of an item that are meaningless while they are empty, as they have always been."""


def read_message(raw: bytes) -> InboundMessage:
    """Translates one message, with defaults for fields of a wrong type.

    Raises Unreadable for a message that is too large, has too many items, is no JSON object or has no user, unless it
    is an echo.
    """
    if len(raw) > LARGEST:
        raise Unreadable("unreadable", f"The message has {len(raw)} bytes.")
    try:
        return _read_plain(raw, _PLAIN.decode(raw))
    except UNDECODABLE:
        return _read_whole(raw)


def _read_plain(raw: bytes, message: wire.PlainMessage) -> InboundMessage:
    """Fast path for nearly all messages, with the same result as `_read_whole` in half the time."""
    user = message.from_user_id
    if user in NOBODY or len(user) > MAX_ID:
        user = _sender_of(message)
    sent_at_ms = _time_ms(message.create_time_ms)
    (item,) = message.item_list
    text = item.text_item.text
    content = b'{"text_item":{"text":%b},"type":1}' % msgspec.json.encode(text)
    return InboundMessage(
        keys=keys_of(message, user, sent_at_ms, content.decode()),
        user=user,
        sent_at_ms=sent_at_ms,
        context_token=_context_token(message.context_token),
        text=text,
        items=[contract.TextItem(text=text)],
        quote=None,
        echo=message.message_type == wire.BOT,
        group=_is_group(message, user),
        raw=raw,
        broken="",
        kind="text",
    )


def _read_whole(raw: bytes) -> InboundMessage:
    readable = as_utf8(raw)
    try:
        message, misfits = _decode_fast(readable, _WHOLE, wire.WireMessage)
    except UNDECODABLE as exc:
        raise Unreadable("unreadable", str(exc)[:200]) from exc
    if len(message.item_list or ()) > MOST_ITEMS:
        raise Unreadable("unreadable", "The message has too many items.")
    user = _sender_of(message)
    sent_at_ms = _time_ms(message.create_time_ms)
    read = [_read_item(raw_item, index) for index, raw_item in enumerate(message.item_list or ())]
    if "item_list" in misfits:
        malformed = contract.UnsupportedItem(type=0, reason="malformed")
        read = [_TranslatedItem(malformed, content=content_of(readable).encode())]
    for index, item in enumerate(read):
        misfits += [f"item_list.{index}{path and '.'}{path}" for path in item.misfits]
    items = [item.item for item in read]
    quoted = next((item.quote for item in read if item.quote), None)
    return InboundMessage(
        keys=keys_of(message, user, sent_at_ms, b",".join([item.content for item in read]).decode()),
        user=user,
        sent_at_ms=sent_at_ms,
        context_token=_context_token(message.context_token),
        text="\n".join([item.text for item in read if item.text]),
        items=items,
        quote=quoted[0] if quoted else None,
        echo=message.message_type == wire.BOT,
        group=_is_group(message, user),
        raw=raw,
        broken=f"Of a wrong type: {', '.join(misfits)}"[:200] if misfits else "",
        kind=_metric_kind(items),
        fetches=tuple([item.fetch for item in read if item.fetch is not None]),
        reference=quoted[1] if quoted else None,
    )


def _metric_kind(items: list[contract.InboundItem]) -> str:
    """Kind for the metrics: text if there is any, else that of the first media."""
    found = [kind for item in items if (kind := kind_of(item)) != "unsupported"]
    return "text" if "text" in found else next(iter(found), "unsupported")


class _TranslatedItem(NamedTuple):
    """A translated item: its text, quote, media and id, its part of `content_of`, and the paths of fields with a
    wrong type ("": the whole item)."""

    item: contract.InboundItem
    text: str = ""
    quote: Quoted | None = None
    fetch: MediaRef | None = None
    content: bytes = b""
    misfits: Sequence[str] = ()


def _read_item(raw: msgspec.Raw, index: int) -> _TranslatedItem:
    content = _content(raw)
    try:
        item, misfits = _decode_fast(bytes(raw), _ITEM, wire.Item)
    except UNDECODABLE:
        malformed = contract.UnsupportedItem(type=0, reason="malformed")
        return _TranslatedItem(malformed, content=content, misfits=[""])
    quote = read_reference(bytes(item.ref_msg))
    read = _translate_item(item, index)
    lost = contract.TextItem if "text_item.text" in misfits else contract.UnsupportedItem
    if misfits and isinstance(read.item, lost):
        read = _TranslatedItem(contract.UnsupportedItem(type=0, reason="malformed"))
    return read._replace(quote=quote, content=content, misfits=misfits)


def _decode_fast(raw: bytes, decoder: msgspec.json.Decoder[S], kind: type[S]) -> tuple[S, list[str]]:
    """As `decode_fields`, but fast if all fields fit. Raises UNDECODABLE."""
    try:
        return decoder.decode(raw), []
    except UNDECODABLE:
        return decode_fields(raw, kind)


def _translate_item(item: wire.Item, index: int) -> _TranslatedItem:
    kind = item.type or next((number for number, name in PAYLOADS.items() if getattr(item, name) is not None), 0)
    match kind:
        case wire.TEXT if item.text_item is not None:
            text = item.text_item.text or ""
            return _TranslatedItem(contract.TextItem(text=text), text)
        case wire.IMAGE if item.image_item is not None:
            fetch, reason = _read_media(item.image_item, index)
            return _TranslatedItem(contract.ImageItem(reason=reason), fetch=fetch)
        case wire.VOICE if item.voice_item is not None:
            voice = item.voice_item
            transcript = transcript_of(voice)
            fetch, reason = _read_media(voice, index)
            length = wire.as_count(voice.playtime)
            return _TranslatedItem(
                contract.VoiceItem(transcript=transcript, duration_ms=length, reason=reason), transcript, fetch=fetch
            )
        case wire.FILE if item.file_item is not None:
            name = text_or_empty(item.file_item.file_name)[:MAX_FILE_NAME]
            name = "" if name in NO_NAMES else name
            fetch, reason = _read_media(item.file_item, index, name, item.file_item.len)
            return _TranslatedItem(contract.FileItem(name=name, reason=reason), fetch=fetch)
        case wire.VIDEO if item.video_item is not None:
            fetch, reason = _read_media(item.video_item, index, size=item.video_item.video_size)
            length = wire.as_count(item.video_item.play_length)
            return _TranslatedItem(contract.VideoItem(duration_ms=length, reason=reason), fetch=fetch)
        case _:
            return _TranslatedItem(contract.UnsupportedItem(type=kind))


def _read_media(
    payload: wire.MediaPayload, index: int, name: str = "", size: object = None
) -> tuple[MediaRef | None, str]:
    """The location of the media; or None and the reason why they cannot be downloaded."""
    try:
        media = msgspec.convert(payload.media, wire.WireMedia)
    except msgspec.ValidationError:
        return None, "reference"
    url, reference = text_or_empty(media.full_url), text_or_empty(media.encrypt_query_param)
    if not url and not reference:
        return None, "reference"
    try:
        key = read_key(_key_or_none(media.aes_key), _key_or_none(payload.aeskey))
    except Refused as exc:
        return None, exc.reason
    return MediaRef(index, url, reference, key, name, wire.as_count(size) or 0), ""


def _key_or_none(value: object) -> str | None:
    """A key of a wrong type still says that the bytes are encrypted, so it becomes an invalid key."""
    return value if isinstance(value, str) or value is None else "?"


def _context_token(value: str | None) -> str:
    """The context token; "" if it is missing or too long for the bus, which would refuse its record for ever."""
    return value if value and len(value) <= wire.OPAQUE_CHARS else ""


def _sender_of(message: wire.PlainMessage | wire.WireMessage) -> str:
    """Raises Unreadable if there is no sender, unless the message is an echo."""
    user = message.from_user_id or ""
    if message.message_type != wire.BOT and (user in NOBODY or len(user) > MAX_ID):
        raise Unreadable("unreadable", "The message names no sender.")
    return user


def _is_group(message: wire.Head, user: str) -> bool:
    """Whether the message is from a group. An empty id, or 0, means a direct chat."""
    return message.group_id not in (None, "", 0, "0") or user.endswith(CHATROOM_SUFFIX)


def _time_ms(value: int | None) -> int:
    """Unix milliseconds; 0: no valid time."""
    return value if value and 0 <= value < 2**53 else 0


def keys_of(message: wire.Head, user: str, sent_at_ms: int, content: str) -> MessageKeys:
    """What tells a repeat (`contract.repeats`). Absent, empty and 0 ids count as none."""
    return MessageKeys(
        as_id(message.message_id), as_id(message.client_id), as_id(message.seq), user, sent_at_ms, content
    )


def content_of(raw: bytes) -> str:
    """The content of the items without their ids and times."""
    try:
        items = msgspec.json.decode(raw).get("item_list") or []
    except (*UNDECODABLE, AttributeError):
        items = []
    return b",".join(map(_encode_bare, items if isinstance(items, list) else [items])).decode()


def _content(raw_item: msgspec.Raw) -> bytes:
    try:
        return _encode_bare(msgspec.json.decode(raw_item))
    except UNDECODABLE:
        return b""


def _encode_bare(item: object) -> bytes:
    return msgspec.json.encode(_without_volatile_fields(item), order="deterministic")


def _without_volatile_fields(item: object) -> object:
    """An item without the fields that may differ when iLink repeats it. A complete URL contains a task id."""
    if not isinstance(item, dict):
        return item
    bare = {k: v for k, v in item.items() if k not in PASSING and (v or k not in IDLE)}
    for name, payload in bare.items():
        media = payload.get("media") if isinstance(payload, dict) else None
        if isinstance(media, dict) and media.get("encrypt_query_param"):
            kept = {k: v for k, v in media.items() if k != "full_url"}
            bare[name] = {k: v for k, v in payload.items() if k != "thumb_media"} | {"media": kept}
    return bare


# quotes -----------------------------------------------------------------------------------------------------


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
    quote = contract.Quote(id=ids[0] if ids else "", text=shown, kind=kind or ("text" if text else ""))
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
