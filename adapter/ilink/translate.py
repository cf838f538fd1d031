"""iLink's inbound messages in the words of the bus, pure (ilink-protocol chapters 4 and 7.3). No I/O, no clock."""

from __future__ import annotations

import hashlib

import msgspec

from adapter import contract
from adapter.dedup import Keys
from adapter.errors import Unreadable
from adapter.ilink import wire
from adapter.ilink.references import Quoted, item_ids, read_reference
from adapter.ports import Said
from adapter.quotes import as_id

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
MAX_ID = 128
"""A longer user id is none: it would not fit into a subject."""


def read_message(raw: bytes) -> Said:
    """Translates one message. Raises Unreadable for what is no JSON object or names no user."""
    try:
        message = msgspec.json.decode(raw, type=wire.Message)
    except UNDECODABLE as exc:
        return _salvage(raw, str(exc)[:200])
    user = message.from_user_id or ""
    if not 0 < len(user) <= MAX_ID:
        raise Unreadable("unreadable", "The message names no sender.")
    sent_at_ms = _time(message.create_time_ms)
    items: list[contract.InboundItem] = []
    texts: list[str] = []
    quoted: Quoted | None = None
    broken = ""
    for raw_item in message.item_list or []:
        item, text, ref = _read_item(bytes(raw_item))
        items.append(item)
        if isinstance(item, contract.UnsupportedItem) and item.reason == "malformed":
            broken = "item"
        if text:
            texts.append(text)
        quoted = quoted or ref
    return Said(
        keys=keys_of(message, user, sent_at_ms, content_of(raw)),
        user=user,
        sent_at_ms=sent_at_ms,
        context_token=message.context_token or "",
        text="\n".join(texts),
        items=items,
        quote=quoted[0] if quoted else None,
        echo=message.message_type == wire.BOT,
        raw=raw,
        broken=broken,
        kind=_kind(items),
        reference=quoted[1] if quoted else None,
        item_ids=item_ids([bytes(item) for item in message.item_list or []], as_id(message.message_id)),
    )


def _kind(items: list[contract.InboundItem]) -> str:
    """The kind that counts in the metrics: text wherever there is some."""
    kinds = {"text": contract.TextItem, "voice": contract.VoiceItem}
    return next(
        (name for name, kind in kinds.items() if any(isinstance(item, kind) for item in items)), "unsupported"
    )


def _read_item(raw: bytes) -> tuple[contract.InboundItem, str, Quoted | None]:
    try:
        item = msgspec.json.decode(raw, type=wire.Item)
    except UNDECODABLE:
        return contract.UnsupportedItem(type=0, reason="malformed"), "", None
    quote = read_reference(bytes(item.ref_msg))
    match item.type:
        case wire.TEXT if item.text_item is not None:
            return contract.TextItem(text=item.text_item.text), item.text_item.text, quote
        case wire.VOICE if item.voice_item is not None:
            voice = item.voice_item
            said = voice.text or (voice.text_item.text if voice.text_item else "")
            if said:
                return contract.VoiceItem(transcript=said, duration_ms=voice.playtime), said, quote
        case _:
            pass
    return contract.UnsupportedItem(type=item.type), "", quote


def _salvage(raw: bytes, why: str) -> Said:
    """A message with a field of a wrong type: told as unsupported, kept whole as a dead letter."""
    try:
        rest = msgspec.json.decode(raw, type=wire.Envelope)
    except UNDECODABLE as exc:
        raise Unreadable("unreadable", why) from exc
    user = rest.from_user_id if isinstance(rest.from_user_id, str) else ""
    if not 0 < len(user) <= MAX_ID:
        raise Unreadable("unreadable", why)
    sent = _time(rest.create_time_ms)
    return Said(
        keys=keys_of(rest, user, sent, content_of(raw)),
        user=user,
        sent_at_ms=sent,
        context_token=rest.context_token if isinstance(rest.context_token, str) else "",
        text="",
        items=[contract.UnsupportedItem(type=0, reason="malformed")],
        quote=None,
        echo=rest.message_type == wire.BOT,
        raw=raw,
        broken=why,
        kind="unsupported",
    )


def _time(value: object) -> int:
    """Unix milliseconds; 0 for what cannot be a time."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def keys_of(message: wire.Message | wire.Envelope, user: str, sent_at_ms: int, content: str) -> Keys:
    """The layered keys of 7.3; absent, empty and 0 ids count as none."""

    def known(value: object) -> str:
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        return "" if text in ("", "0") else text

    return Keys(known(message.message_id), known(message.client_id), known(message.seq), user, sent_at_ms, content)


def content_of(raw: bytes) -> str:
    """A hash of what the user said: the items without their ids and times."""
    try:
        items = msgspec.json.decode(raw).get("item_list") or []
    except (*UNDECODABLE, AttributeError):
        items = []
    if not isinstance(items, list):
        items = [items]
    bare = [
        {k: v for k, v in item.items() if k not in ("create_time_ms", "update_time_ms", "msg_id", "is_completed")}
        if isinstance(item, dict)
        else item
        for item in items
    ]
    return hashlib.blake2b(msgspec.json.encode(bare, order="deterministic"), digest_size=6).hexdigest()
