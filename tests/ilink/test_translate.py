"""Inbound messages as iLink sends them (`samples/`), and what the bus gets to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.contract.messages import (
    FileItem,
    ImageItem,
    InboundItem,
    Quote,
    TextItem,
    UnsupportedItem,
    VideoItem,
    VoiceItem,
)
from adapter.errors import Unreadable
from adapter.ilink import wire
from adapter.ilink.translate import LARGEST, MOST_ITEMS, content_of, read_message
from adapter.ports import InboundMessage, MediaRef

SAMPLES = Path(__file__).parents[1] / "samples"
USER = "o9cq80demoUser@im.wechat"
BIG = 7497484083968569736
HELLO = TextItem(text="hello")
THIS_ONE = TextItem(text="this one")
QUOTED = str(BIG - 1)


def sample(name: str) -> bytes:
    return (SAMPLES / f"{name}.json").read_bytes()


def said(name: str) -> InboundMessage:
    return read_message(sample(name))


def changed(name: str, **fields: Any) -> bytes:
    """A sample with other fields; None takes one away."""
    message = msgspec.json.decode(sample(name)) | fields
    return msgspec.json.encode({key: value for key, value in message.items() if value is not None})


class Row(NamedTuple):
    name: str
    text: str
    items: list[InboundItem]
    kind: str = "text"
    quote: Quote | None = None


ROWS = [
    Row("text", "hello", [HELLO]),
    Row("emoji", "好的 👩‍👩‍👧‍👦 🇨🇳 e\u0301", [TextItem(text="好的 👩‍👩‍👧‍👦 🇨🇳 e\u0301")]),
    Row("empty-text", "", [TextItem(text="")]),
    Row(
        "multi-item",
        "look\nat this",
        [TextItem(text="look"), ImageItem(), TextItem(text="at this")],
    ),
    Row(
        "voice-with-transcript",
        "turn on the light",
        [VoiceItem(transcript="turn on the light", duration_ms=2300)],
        "voice",
    ),
    Row("voice-with-nested-transcript", "yes", [VoiceItem(transcript="yes", duration_ms=900)], "voice"),
    Row("voice-without-transcript", "", [VoiceItem(duration_ms=2300)], "voice"),
    Row("image", "", [ImageItem()], "image"),
    Row("file", "", [FileItem(name="hello.txt")], "file"),
    Row("video", "", [VideoItem(duration_ms=5000)], "video"),
    Row("unknown-type", "", [UnsupportedItem(type=23)], "unsupported"),
    Row("no-items", "", [], "unsupported"),
    Row("quote-with-text", "this one", [THIS_ONE], quote=Quote(id=QUOTED, text="pick one", kind="text")),
    Row("quote-of-a-bot-message", "this one", [THIS_ONE], quote=Quote(id=QUOTED, text="pick one")),
    Row("quote-type-0", "this one", [THIS_ONE], quote=Quote(id=QUOTED)),
    Row("quote-svr-id", "this one", [THIS_ONE], quote=Quote(id=QUOTED)),
    Row("quote-partial", "this one", [THIS_ONE], quote=Quote(id=QUOTED, text="pi…ne")),
    Row(
        "quote-on-a-voice",
        "this one",
        [VoiceItem(transcript="this one", reason="reference")],
        "voice",
        Quote(id=QUOTED),
    ),
    Row("no-context-token", "hello", [HELLO]),
    Row("no-message-id", "hello", [HELLO]),
    Row("largest-ids", "hello", [HELLO]),
    Row("nulls", "hello", [HELLO]),
    Row("type-0", "hello", [HELLO]),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_message_is_translated_to_that_of_the_bus(row: Row) -> None:
    found = said(row.name)
    assert (found.text, found.items, found.kind, found.quote) == (row.text, row.items, row.kind, row.quote)
    assert (found.user, found.echo, found.broken) == (USER, False, "")
    assert found.raw == sample(row.name)


def test_a_message_keeps_its_time_and_token() -> None:
    assert (said("text").sent_at_ms, said("text").context_token) == (1789000000000, "AARzJWdemo")


@pytest.mark.parametrize("more", [{}, {"seq": "42"}, {"item_list": 5}], ids=["plain", "whole", "malformed"])
@pytest.mark.parametrize(("chars", "kept"), [(131_072, 131_072), (131_073, 0)], ids=["longest", "longer"])
def test_a_token_for_which_the_bus_has_no_room_is_none(chars: int, kept: int, more: dict[str, Any]) -> None:
    """It was tried to be stored for ever, and the bot was heard no more."""
    assert len(read_message(changed("text", context_token="c" * chars, **more)).context_token) == kept


def test_the_bots_own_words_are_an_echo() -> None:
    """Filtered out, so that no bot answers itself."""
    assert said("bot-echo").echo


@pytest.mark.parametrize("fields", [{}, {"item_list": []}, {"context_token": 5}], ids=["plain", "whole", "malformed"])
@pytest.mark.parametrize("sender", ["", None])
def test_an_echo_needs_no_sender(sender: str | None, fields: dict[str, Any]) -> None:
    """A bot's message is sent with an empty one."""
    assert read_message(changed("bot-echo", from_user_id=sender, **fields)).echo


@pytest.mark.parametrize("more", [{}, {"seq": "42"}, {"context_token": 5}], ids=["plain", "whole", "malformed"])
@pytest.mark.parametrize(
    ("fields", "group"),
    [
        ({"group_id": "12345@chatroom"}, True),
        ({"group_id": 12345}, True),
        ({"from_user_id": "12345@chatroom"}, True),
        ({"group_id": ""}, False),
        ({"group_id": 0}, False),
        ({"group_id": "0"}, False),
        ({}, False),
    ],
    ids=["named", "number", "sender", "empty", "zero", "zero as text", "none"],
)
def test_what_was_written_in_a_group_is_known(fields: dict[str, Any], group: bool, more: dict[str, Any]) -> None:
    assert read_message(changed("text", **fields, **more)).group == group


KEYS = [
    ("text", (str(BIG), "wx-demo-1", "42")),
    ("message-id-as-text", (str(BIG), "wx-demo-1", "42")),
    ("largest-ids", (str(2**64 - 1), "wx-demo-1", str(2**63))),
    ("no-message-id", ("", "wx-demo-1", "42")),
    ("message-id-0", ("", "wx-demo-1", "42")),
    ("message-id-0-as-text", ("", "wx-demo-1", "42")),
    ("no-ids", ("", "", "")),
    ("nulls", ("", "", "")),
]


@pytest.mark.parametrize(("name", "ids"), KEYS, ids=[name for name, _ in KEYS])
def test_ids_are_exact_and_0_is_none(name: str, ids: tuple[str, str, str]) -> None:
    keys = said(name).keys
    assert (keys.message, keys.client, keys.seq) == ids
    assert (keys.user, keys.content) == (USER, said("text").keys.content)


@pytest.mark.parametrize(
    ("name", "bus_id"),
    [
        ("text", f"in:b@im.bot:m{BIG}"),
        ("no-message-id", "in:b@im.bot:cwx-demo-1"),
    ],
)
def test_the_id_on_the_bus_is_the_first_that_is_known(name: str, bus_id: str) -> None:
    assert said(name).keys.id_for("b@im.bot") == bus_id


def test_the_id_on_the_bus_is_never_random() -> None:
    """CW #925: a random id makes a stranger of every repeat."""
    assert said("no-ids").keys.id_for("b") == said("no-ids").keys.id_for("b")
    later = read_message(changed("no-ids", create_time_ms=1789000000001))
    assert later.keys.id_for("b") != said("no-ids").keys.id_for("b")


def test_the_same_words_have_the_same_content_whatever_their_ids() -> None:
    items = msgspec.json.decode(sample("text"))["item_list"]
    items[0] |= {"msg_id": 5, "create_time_ms": 7, "update_time_ms": 8, "is_completed": False}
    again = read_message(changed("text", message_id=1, seq=2, client_id="other", context_token="x", item_list=items))
    assert again.keys.content == said("text").keys.content


AS_CAPTURED: dict[str, Any] = {
    "type": 1,
    "create_time_ms": 1789000000000,
    "update_time_ms": 1789000000000,
    "is_completed": True,
    "msg_id": "v1:14778023042603769070",
    "button_item_list": [],
    "at_bot_username_list": [],
    "text_item": {"text": "hello"},
}
"""An item as several projects have captured it from iLink, from summer 2026 on."""


def test_a_text_with_the_fields_that_ilink_sends_takes_the_short_way() -> None:
    raw = changed(
        "text", item_list=[AS_CAPTURED], root_id=0, parent_id=0, delete_time_ms=0, group_id="", session_id=""
    )
    assert msgspec.json.decode(raw, type=wire.PlainMessage).item_list[0].text_item.text == "hello"
    again, before = read_message(raw), said("text")
    assert again.items == before.items
    assert again.keys == before.keys, "with these fields or without, it is the same message"
    assert not again.group


@pytest.mark.parametrize("name", ["button_item_list", "at_bot_username_list"])
def test_a_list_that_was_always_empty_counts_once_it_is_not(name: str) -> None:
    item = AS_CAPTURED | {name: [{"something": 1}]}
    message = read_message(changed("text", item_list=[item]))
    assert message.text == "hello"
    assert message.keys.content != said("text").keys.content


@given(st.text())
def test_a_plain_text_has_the_content_of_any_item(text: str) -> None:
    raw = msgspec.json.encode({"from_user_id": "u", "item_list": [{"type": 1, "text_item": {"text": text}}]})
    assert read_message(raw).keys.content == content_of(raw)


IDS = st.one_of(st.none(), st.integers(0, 2**64 - 1), st.text(max_size=8))


@given(
    st.fixed_dictionaries(
        {"from_user_id": st.one_of(st.text(max_size=8), st.just("u" * 200))},
        optional={
            "message_id": IDS,
            "client_id": st.one_of(st.none(), st.text(max_size=8)),
            "seq": IDS,
            "create_time_ms": st.one_of(st.none(), st.integers(-1, 2**60)),
            "message_type": st.one_of(st.none(), st.integers(0, 3)),
            "context_token": st.one_of(st.none(), st.text(max_size=8)),
            "to_user_id": st.one_of(st.none(), st.integers(), st.text(max_size=8)),
        },
    ),
    st.text(max_size=8),
    IDS,
)
def test_a_plain_text_is_read_as_any_message(message: dict[str, Any], text: str, ident: object) -> None:
    """Plain ones take a short way; an item with one more field takes the long one."""
    item = {"type": 1, "text_item": {"text": text}, "msg_id": ident}
    raw, other = (msgspec.json.encode(message | {"item_list": [one]}) for one in (item, item | {"another": 1}))
    try:
        expected = read_message(other)
    except Unreadable:
        with pytest.raises(Unreadable):
            read_message(raw)
        return
    keys = msgspec.structs.replace(expected.keys, content=content_of(raw))
    assert read_message(raw) == msgspec.structs.replace(expected, keys=keys, raw=raw)


# media ---------------------------------------------------------------------------------------------------


AES = bytes.fromhex("00112233445566778899aabbccddeeff")
RAW_KEY = "ABEiM0RVZneImaq7zN3u/w=="
TEXT_KEY = "MDAxMTIyMzM0NDU1NjY3Nzg4OTlhYWJiY2NkZGVlZmY="
URL = "https://novac2c.cdn.weixin.qq.com/c2c/download?encrypted_query_param=OPAQUE&taskid=demo"
PAYLOADS = {
    "image": (2, "image_item"),
    "voice": (3, "voice_item"),
    "file": (4, "file_item"),
    "video": (5, "video_item"),
}


def with_media(kind: str, media: Any, **fields: Any) -> InboundMessage:
    """A message of one media item."""
    number, name = PAYLOADS[kind]
    return read_message(changed("text", item_list=[{"type": number, name: {"media": media, **fields}}]))


@pytest.mark.parametrize(
    ("name", "fetches"),
    [
        ("image", (MediaRef(0, URL, "OPAQUE", AES, ""),)),
        ("voice-without-transcript", (MediaRef(0, URL, "OPAQUE", AES, ""),)),
        ("voice-with-transcript", (MediaRef(0, URL, "OPAQUE", AES, ""),)),
        ("file", (MediaRef(0, URL, "OPAQUE", AES, "hello.txt", 14),)),
        ("video", (MediaRef(0, URL, "OPAQUE", AES, "", 1048592),)),
        ("multi-item", (MediaRef(1, URL, "OPAQUE", AES, ""),)),
        ("text", ()),
        ("unknown-type", ()),
    ],
)
def test_media_are_named_with_their_key_and_their_item(name: str, fetches: tuple[MediaRef, ...]) -> None:
    assert said(name).fetches == fetches


KEY_FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("raw-base64", {"aes_key": RAW_KEY}, {}),
    ("hex-base64", {"aes_key": TEXT_KEY}, {}),
    ("hex", {}, {"aeskey": AES.hex()}),
    ("base64-beside-broken-hex", {"aes_key": RAW_KEY}, {"aeskey": "00"}),
]


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize(("media", "fields"), [row[1:] for row in KEY_FORMS], ids=[row[0] for row in KEY_FORMS])
def test_a_key_is_read_in_every_form(kind: str, media: dict[str, Any], fields: dict[str, Any]) -> None:
    (fetch,) = with_media(kind, {"full_url": URL, **media}, **fields).fetches
    assert fetch.key == AES


@pytest.mark.parametrize(
    ("given", "size"), [("14", 14), (14, 14), ("", 0), (-1, 0), ("-1", 0), ("1e3", 0), (True, 0), ([], 0), (2**53, 0)]
)
def test_a_size_that_cannot_be_read_is_left_out(given: Any, size: int) -> None:
    """And costs the message nothing."""
    for kind, field in (("file", "len"), ("video", "video_size")):
        found = with_media(kind, {"full_url": URL}, **{field: given})
        assert ([fetch.size for fetch in found.fetches], found.broken) == ([size], "")


@pytest.mark.parametrize("kind", PAYLOADS)
def test_media_without_a_key_are_plain(kind: str) -> None:
    (fetch,) = with_media(kind, {"encrypt_query_param": "OPAQUE"}).fetches
    assert fetch == MediaRef(0, "", "OPAQUE", None, "")


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("key", ["AAAA", "no base64", RAW_KEY[:-4], 5, [RAW_KEY], True], ids=str)
def test_a_key_that_cannot_be_read_makes_the_media_corrupt(kind: str, key: Any) -> None:
    found = with_media(kind, {"full_url": URL, "aes_key": key})
    assert (found.fetches, found.broken, found.kind) == ((), "", kind)
    assert getattr(found.items[0], "reason", None) == "corrupt"


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize(
    "media",
    [None, {}, {"full_url": "", "encrypt_query_param": ""}, {"full_url": 5}, "OPAQUE", 5, [URL]],
    ids=["null", "empty", "empty-texts", "a-number", "media-a-text", "media-a-number", "media-a-list"],
)
def test_media_that_nobody_can_find_have_no_reference(kind: str, media: Any) -> None:
    found = with_media(kind, media)
    assert (found.fetches, found.broken, found.kind) == ((), "", kind)
    assert getattr(found.items[0], "reason", None) == "reference"


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_media_item_without_its_payload_is_unsupported(kind: str) -> None:
    number, _ = PAYLOADS[kind]
    for beside in ({}, {"text_item": {"text": "hi"}}):
        found = read_message(changed("text", item_list=[{"type": number, **beside}]))
        assert (found.items, found.kind) == ([UnsupportedItem(type=number)], "unsupported")


@pytest.mark.parametrize(
    ("value", "duration_ms"),
    [
        *[(1500, 1500), ("1500", 1500), (0, 0), (-1, None), ("soon", None), ([1], None), (True, None), (2**60, None)],
        pytest.param("²", None, id="superscript"),
        pytest.param("9" * 5000, None, id="more digits than Python reads"),
    ],
    ids=str,
)
def test_a_duration_is_what_can_be_one(value: Any, duration_ms: int | None) -> None:
    media = {"full_url": URL}
    assert with_media("voice", media, playtime=value).items == [VoiceItem(duration_ms=duration_ms)]
    assert with_media("video", media, play_length=value).items == [VideoItem(duration_ms=duration_ms)]


def test_text_beside_media_counts_as_text() -> None:
    assert said("multi-item").kind == "text"


def test_the_same_picture_under_another_url_is_the_same_content() -> None:
    """A ready-made URL holds the id of a task, the reference does not."""
    other = with_media("image", {"full_url": URL + "2", "encrypt_query_param": "OPAQUE"})
    assert other.keys.content == with_media("image", {"full_url": URL, "encrypt_query_param": "OPAQUE"}).keys.content
    assert other.keys.content != with_media("image", {"full_url": URL, "encrypt_query_param": "X"}).keys.content
    assert with_media("image", {"full_url": URL}).keys.content != with_media("image", {"full_url": "x"}).keys.content


def test_a_text_that_was_cut_in_the_middle_of_a_character_is_translated() -> None:
    """The official client reads it so: JavaScript's decoder never fails."""
    raw = sample("text").replace(b'"hello"', b'"hello \xe4\xbd","ref_msg":{"title":"\xe4\xbd"}')
    found = read_message(raw)
    assert (found.text, found.items, found.broken) == ("hello \ufffd", [TextItem(text="hello \ufffd")], "")
    assert found.raw == raw


def test_null_is_as_good_as_unset() -> None:
    """iLink's JSON mirrors protobuf's, where it is."""
    quoted = {"type": None, "msg_id": QUOTED, "text_item": {"text": None}, "file_item": {"file_name": None}}
    part = {"start": "pi", "end": "ne", "startindex": None, "endindex": "0", "quotemd5": None}
    ref = {"title": None, "svr_id": None, "message_item": quoted, "partial_text": part}
    items = [{"type": 1, "text_item": {"text": None}, "ref_msg": ref}, {"type": None, "text_item": None}]
    found = read_message(changed("text", item_list=items))
    assert found.items == [TextItem(text=""), UnsupportedItem(type=0)]
    assert found.quote == Quote(id=QUOTED, text="pi…ne")
    assert not found.broken


# broken --------------------------------------------------------------------------------------------------


def test_a_malformed_item_does_not_take_the_others_with_it() -> None:
    found = said("malformed-item")
    broken = UnsupportedItem(type=0, reason="malformed")
    assert found.items == [TextItem(text="before"), broken, TextItem(text="7"), TextItem(text="after")]
    assert found.text == "before\n7\nafter"
    assert found.broken == "Of a wrong type: item_list.1"


VALUES = {
    "number": b"5",
    "beyond-53-bits": b"7497484083968569737",
    "whole-float": b"5.0",
    "fraction": b"1.5",
    "endless": b"1e400",
    "string": b'"word"',
    "digits": b'"5"',
    "null": b"null",
    "true": b"true",
    "list": b'["x"]',
    "object": b'{"low":1}',
}
NUMBERS = ("number", "beyond-53-bits", "whole-float", "digits")
HEAD = ["message_id", "client_id", "seq", "create_time_ms", "update_time_ms", "delete_time_ms", "to_user_id",
        "session_id", "group_id", "message_type", "message_state", "context_token", "run_id"]  # fmt: skip
ITEM = ["type", "msg_id", "create_time_ms", "update_time_ms", "is_completed", "ref_msg", "button_item_list",
        "at_bot_username_list", "image_item", "voice_item", "file_item", "video_item",
        "tool_call_start_item"]  # fmt: skip


def spoilt(field: str, value: bytes, *, of_item: bool = False) -> bytes:
    """The message "hello" with another value in a field of the message, or of its only item."""
    message = msgspec.json.decode(sample("text"))
    (message["item_list"][0] if of_item else message)[field] = msgspec.Raw(value)
    return msgspec.json.encode(message)


@pytest.mark.parametrize("value", VALUES)
def test_a_field_of_a_wrong_type_costs_no_words(value: str) -> None:
    for field, of_item in [*((field, False) for field in HEAD), *((field, True) for field in ITEM)]:
        if field == "type" and value in NUMBERS:
            continue
        raw = spoilt(field, VALUES[value], of_item=of_item)
        found = read_message(raw)
        assert (found.user, found.text, found.items, found.echo) == (USER, "hello", [HELLO], False), field
        assert found.raw == raw


def value_of(field: str, found: InboundMessage) -> Any:
    read = {
        "message_id": found.keys.message,
        "client_id": found.keys.client,
        "seq": found.keys.seq,
        "create_time_ms": found.sent_at_ms,
        "context_token": found.context_token,
        "group_id": found.group,
    }
    return read[field]


ID = {"number": "5", "beyond-53-bits": "7497484083968569737", "whole-float": "5", "string": "word", "digits": "5"}
AS_WRITTEN = ID | {"whole-float": "5.0", "fraction": "1.5", "endless": "1e400"}
TAKEN: dict[str, tuple[dict[str, Any], Any]] = {
    "message_id": (ID, ""),
    "client_id": (ID, ""),
    "seq": (ID, ""),
    "create_time_ms": ({"number": 5, "whole-float": 5, "digits": 5}, 0),
    "context_token": (AS_WRITTEN, ""),
    "group_id": (dict.fromkeys(ID, True), False),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in TAKEN for value in VALUES])
def test_a_field_of_a_wrong_type_takes_its_obvious_value_or_none(field: str, value: str) -> None:
    """Ids of 64 bits are kept exactly, also as a float."""
    values, default = TAKEN[field]
    assert value_of(field, read_message(spoilt(field, VALUES[value]))) == values.get(value, default)


@pytest.mark.parametrize("value", VALUES)
def test_a_sender_of_a_wrong_type_is_who_it_says_or_nobody(value: str) -> None:
    raw = spoilt("from_user_id", VALUES[value])
    if value in AS_WRITTEN:
        assert (read_message(raw).user, read_message(raw).text) == (AS_WRITTEN[value], "hello")
    else:
        with pytest.raises(Unreadable):
            read_message(raw)


@pytest.mark.parametrize("value", VALUES)
def test_a_text_of_a_wrong_type_is_passed_on_as_written(value: str) -> None:
    """Words that cannot be read are told as such, and kept whole for a person."""
    payload = b'{"text":%b}' % VALUES[value]
    found = read_message(spoilt("text_item", payload, of_item=True))
    if value in ("true", "list", "object"):
        assert found.items == [UnsupportedItem(type=0, reason="malformed")]
        assert (found.text, found.broken) == ("", "Of a wrong type: item_list.0.text_item.text")
    else:
        assert found.items == [TextItem(text=AS_WRITTEN.get(value, ""))]
        assert (found.text, found.broken) == (AS_WRITTEN.get(value, ""), "")


@pytest.mark.parametrize("value", VALUES)
def test_a_payload_of_a_wrong_type_costs_no_other_item(value: str) -> None:
    (item,) = msgspec.json.decode(sample("text"))["item_list"]
    other = item | {"text_item": msgspec.Raw(VALUES[value])}
    found = read_message(changed("text", item_list=[other, item, msgspec.Raw(VALUES[value])]))
    assert (found.text, found.items[1], len(found.items)) == ("hello", HELLO, 3)


@pytest.mark.parametrize("value", [value for value in VALUES if value not in ("null", "list")])
def test_items_of_a_wrong_type_become_unsupported_items(value: str) -> None:
    found = read_message(spoilt("item_list", VALUES[value]))
    assert (found.user, found.text, found.kind) == (USER, "", "unsupported")
    assert found.items == [UnsupportedItem(type=0, reason="malformed")]
    assert found.broken == "Of a wrong type: item_list"


@pytest.mark.parametrize(
    ("number", "payload", "expected"),
    [
        (1, {"text_item": {"text": "hello"}}, HELLO),
        (3, {"voice_item": {"text": "5"}}, VoiceItem(transcript="5", reason="reference")),
        (4, {"file_item": {"file_name": "a.txt"}}, FileItem(name="a.txt", reason="reference")),
        (4, {"file_item": {"file_name": ".."}}, FileItem(name="", reason="reference")),
    ],
    ids=["text", "voice", "file", "folder"],
)
def test_an_item_of_no_type_is_what_it_holds(number: int, payload: dict[str, Any], expected: InboundItem) -> None:
    for named in (number, None, 0, "new", [number]):
        assert read_message(changed("text", item_list=[payload | {"type": named}])).items == [expected]


def test_what_was_lost_of_a_message_is_named() -> None:
    """It is kept whole for a person; what could be taken is no loss."""
    items = [{"type": "new", "msg_id": [1], "text_item": {"text": "hello"}}]
    found = read_message(changed("text", seq=5.0, create_time_ms="yesterday", context_token=[1], item_list=items))
    lost = ["create_time_ms", "context_token", "item_list.0.type", "item_list.0.msg_id"]
    assert found.broken == f"Of a wrong type: {', '.join(lost)}"
    assert read_message(changed("text", seq=5.0, context_token=5, client_id=7)).broken == ""


def test_a_message_that_is_too_large_or_of_very_many_items_is_not_read() -> None:
    items = [{"type": 1, "text_item": {"text": str(number)}} for number in range(MOST_ITEMS + 1)]
    for fields in ({"x": "y" * LARGEST}, {"item_list": items}):
        with pytest.raises(Unreadable):
            read_message(msgspec.json.encode({"from_user_id": "u1"} | fields))
    found = read_message(msgspec.json.encode({"from_user_id": "u1", "item_list": items[1:]}))
    assert len(found.items) == MOST_ITEMS


def test_a_malformed_message_keeps_the_ids_that_are_sound() -> None:
    keys = said("malformed-field").keys
    assert (keys.message, keys.client) == (str(BIG), "wx-demo-1")
    assert keys.content == said("text").keys.content


UNREADABLE = [
    *(sample(name) for name in ("no-sender", "empty-sender", "sender-too-long")),
    *(sample(name) for name in ("a-list", "a-string", "a-null")),
    b"",
    b"{",
    b"\xff",
    sample("text")[:100],
    b'{"from_user_id":"u","item_list":' + b"[" * 5000,
]


@pytest.mark.parametrize("raw", UNREADABLE, ids=lambda raw: raw[:24].decode("ascii", "replace").strip() or "empty")
def test_what_names_no_user_is_unreadable(raw: bytes) -> None:
    with pytest.raises(Unreadable):
        read_message(raw)


DEEP = b'{"type":1,"text_item":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"from_user_id":"u","item_list":[' + DEEP + b"]}",
        b'{"from_user_id":"u","item_list":[{"type":1,"text_item":{"text":"\xff"}}]}',
        b'{"from_user_id":"u","item_list":[{"type":99999999999999999999999999}]}',
        b'{"from_user_id":"u","item_list":[],"create_time_ms":99999999999999999999999999}',
        b'{"from_user_id":"u","item_list":[],"create_time_ms":-1}',
        b'{"from_user_id":"u","item_list":[null,[],5]}',
        b'{"from_user_id":"u","item_list":[{"ref_msg":{"message_item":{"ref_msg":{"message_item":{}}}}}]}',
        b'{"from_user_id":"u","extra":' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=[
        "deep",
        "not-utf-8",
        "huge-type",
        "huge-time",
        "negative-time",
        "not-objects",
        "quote-in-quote",
        "deep-extra",
    ],
)
def test_nothing_that_names_a_user_stops_the_bot(raw: bytes) -> None:
    """Whatever it holds, it is told, or unreadable; any other exception would come again with every poll."""
    try:
        found = read_message(raw)
    except Unreadable:
        return
    assert found.user == "u"
    msgspec.json.encode(found.items)
    assert isinstance(content_of(raw), str)
    assert 0 <= found.sent_at_ms < 2**53


# quotes --------------------------------------------------------------------------------------------------


def quoting(ref: Any, **item: Any) -> InboundMessage:
    """A message whose only item quotes."""
    whole = {"type": 1, "text_item": {"text": "this"}, "ref_msg": ref} | item
    return read_message(msgspec.json.encode({"from_user_id": "u", "message_id": 7, "item_list": [whole]}))


QUOTES: list[tuple[str, Any, Quote | None, tuple[str, ...]]] = [
    ("svr-id-first", {"svr_id": 9007199254740993, "message_item": {"msg_id": "5"}}, Quote(id="9007199254740993"),
     ("9007199254740993", "5")),
    ("id-0-is-none", {"svr_id": 0, "message_item": {"msg_id": "5"}}, Quote(id="5"), ("5",)),
    ("id-twice", {"svr_id": "5", "message_item": {"msg_id": 5}}, Quote(id="5"), ("5",)),
    ("title-only", {"title": "an old one"}, Quote(text="an old one"), ()),
    ("text-before-title", {"title": "t", "message_item": {"type": 1, "text_item": {"text": "words"}}},
     Quote(text="words", kind="text"), ()),
    ("image", {"svr_id": 1, "message_item": {"type": 2}}, Quote(id="1", text="[image]", kind="image"), ("1",)),
    ("file", {"svr_id": 1, "message_item": {"type": 4, "file_item": {"file_name": "a b.pdf"}}},
     Quote(id="1", text="[file] a b.pdf", kind="file"), ("1",)),
    ("transcript", {"svr_id": 1, "message_item": {"type": 3, "voice_item": {"text": "said"}}},
     Quote(id="1", text="said", kind="voice"), ("1",)),
    ("part-of-its-text", {"svr_id": 1, "message_item": {"type": 1, "text_item": {"text": "one two three"}},
                          "partial_text": {"start": "two", "end": "th"}},
     Quote(id="1", text="two th", kind="text"), ("1",)),
    ("nothing", {}, None, ()),
    ("null", None, None, ()),
    ("not-an-object", [1], None, ()),
    ("odd-id", {"svr_id": {"low": 1}, "title": "t"}, Quote(text="t"), ()),
    ("odd-title", {"svr_id": 1, "title": 5}, Quote(id="1"), ("1",)),
    ("odd-item", {"svr_id": 1, "message_item": {"type": "new"}}, Quote(id="1"), ("1",)),
    ("odd-part", {"svr_id": 1, "partial_text": {"start": "a", "end": "b", "startindex": "x"}}, Quote(id="1"), ("1",)),
]  # fmt: skip


@pytest.mark.parametrize(("ref", "quote", "ids"), [row[1:] for row in QUOTES], ids=[row[0] for row in QUOTES])
def test_a_quote_has_what_is_known_and_costs_no_message_its_text(
    ref: Any, quote: Quote | None, ids: tuple[str, ...]
) -> None:
    found = quoting(ref)
    assert (found.text, found.broken) == ("this", "")
    assert found.quote == quote
    assert (found.reference.ids if found.reference else ()) == ids


def test_numbers_in_quotes_cost_no_text() -> None:
    """As protobuf's JSON writes 64 bits."""
    (item,) = msgspec.json.decode(sample("text"))["item_list"]
    read = read_message(
        changed(
            "text", create_time_ms="1789000000000", message_type="1", client_id=7, item_list=[item | {"type": "1"}]
        )
    )
    assert (read.text, read.broken, read.sent_at_ms) == (item["text_item"]["text"], "", 1789000000000)
    assert read.keys.client == "7"
    assert read_message(changed("text", message_type="2")).echo
