"""iLink's JSON under its own names. All fields are optional: the server omits unset fields and adds unknown ones.

docs/reference/ilink-protocol.md, "Endpoints" and "Messages", has the tables of fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

STALE_TOKEN: Final = -14
THROTTLE: Final = -2
THROTTLED: Final = (THROTTLE, -12, -13)
"""The code of the official client, and two that other projects report for the same refusal."""

OPAQUE_CHARS: Final = 131_072
"""Longest cursor and context token that are kept. Some 130 characters are usual. The bus has room for 1 MiB in a
message: a character may take six bytes of a record, and sealing adds a third."""

URL_CHARS: Final = 8192
"""Longest URL that is called. Upload URLs have a long parameter."""
PLAIN_URL: Final = re.compile(r"[!-~]+")

USER: Final = 1
BOT: Final = 2
FINISH: Final = 2

TEXT: Final = 1
IMAGE: Final = 2
VOICE: Final = 3
FILE: Final = 4
VIDEO: Final = 5


class WireReply(msgspec.Struct, kw_only=True):
    """Fields of every answer. Either `ret` or `errcode` may have the code."""

    ret: int | None = None
    errcode: int | None = None
    errmsg: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def code(self) -> int:
        """The decisive code; 0 is success. A stale token or a throttle in either field is decisive."""
        if not (self.ret or self.errcode):
            return 0
        codes = (self.ret, self.errcode)
        known = (code for code in (STALE_TOKEN, *THROTTLED) if code in codes)
        return next(known, self.errcode or self.ret or 0)


class Updates(WireReply, kw_only=True):
    """Answer of getupdates. The messages stay raw, so that a broken one does not spoil the batch."""

    msgs: list[msgspec.Raw] | None = None
    get_updates_buf: str | int | None = None
    longpolling_timeout_ms: msgspec.Raw = msgspec.Raw(b"null")


class Sent(WireReply, kw_only=True):
    """Answer of sendmessage. `message_id` is a uint64 as number or string. Its type is Any, since another form must
    not make an accepted send fail."""

    message_id: Any = None


class UploadUrl(WireReply, kw_only=True):
    """Answer of getuploadurl. Usually only the first field is set."""

    upload_full_url: str | None = None
    upload_param: str | None = None


class Config(WireReply, kw_only=True):
    """Answer of getconfig."""

    typing_ticket: str | None = None


class WireQrCode(WireReply, kw_only=True):
    """Answer of get_bot_qrcode. `qrcode_img_content` is the URL to encode; one client treats it as an image."""

    qrcode: str | None = None
    qrcode_img_content: str | None = None


class QrStatus(WireReply, kw_only=True):
    """Answer of get_qrcode_status."""

    status: str | None = None
    redirect_host: str | None = None
    bot_token: str | None = None
    ilink_bot_id: str | None = None
    ilink_user_id: str | None = None
    baseurl: str | None = None


class TextPayload(msgspec.Struct):
    text: str | None = None


class WireMedia(msgspec.Struct):
    """Location and key of media. The types are Any, since a wrong type must cost the media only, not the message."""

    encrypt_query_param: Any = None
    aes_key: Any = None
    full_url: Any = None


class MediaPayload(msgspec.Struct):
    """What all media have. `aeskey` is hex, and preferred to the key in `media`."""

    media: Any = None
    aeskey: Any = None


class VoicePayload(MediaPayload):
    text: Any = None
    text_item: Any = None
    playtime: Any = None


class FilePayload(MediaPayload):
    file_name: Any = None
    len: Any = None


class VideoPayload(MediaPayload):
    play_length: Any = None
    video_size: Any = None


class PartialText(msgspec.Struct):
    start: str | None = None
    end: str | None = None
    startindex: int | None = None
    endindex: int | None = None
    quotemd5: str | None = None


class RefMessage(msgspec.Struct):
    """A quote. Each field is decoded alone, so that an unreadable one does not cost the message."""

    title: Any = None
    message_item: msgspec.Raw = msgspec.Raw(b"null")
    svr_id: Any = None
    partial_text: msgspec.Raw = msgspec.Raw(b"null")


class Item(msgspec.Struct):
    """One item of a message. In protobuf, null is the same as unset."""

    type: int | None = None
    msg_id: int | str | None = None
    text_item: TextPayload | None = None
    image_item: MediaPayload | None = None
    voice_item: VoicePayload | None = None
    file_item: FilePayload | None = None
    video_item: VideoPayload | None = None
    ref_msg: msgspec.Raw = msgspec.Raw(b"null")


Nothing: TypeAlias = Annotated[list[Any], msgspec.Meta(max_length=0)] | None
"""A list that has only been seen empty."""


class PlainText(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class PlainItem(msgspec.Struct, forbid_unknown_fields=True):
    """An item that is only a text, as nearly all are. Several projects have captured both lists, and ids such as
    `v1:14778023042603769070`, since summer 2026."""

    type: Literal[1]
    text_item: PlainText
    msg_id: int | str | None = None
    create_time_ms: Any = None
    update_time_ms: Any = None
    is_completed: Any = None
    button_item_list: Nothing = None
    at_bot_username_list: Nothing = None


class Head(msgspec.Struct, kw_only=True):
    """Fields of an inbound message except sender and items."""

    message_id: int | str | None = None
    client_id: str | int | None = None
    seq: int | str | None = None
    create_time_ms: int | None = None
    message_type: int | None = None
    context_token: str | None = None
    group_id: int | str | None = None
    """Empty for a direct chat."""


class PlainMessage(Head, kw_only=True):
    """A message with one plain item, as nearly all are."""

    from_user_id: str
    item_list: tuple[PlainItem]


class WireMessage(Head, kw_only=True):
    """Any inbound message."""

    from_user_id: str | None = None
    item_list: list[msgspec.Raw] | None = None


def as_count(value: object) -> int | None:
    """A number, perhaps as text: milliseconds, bytes. None: it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**53 else None  # a bool is an int, too
