"""What a message on wechat.out asks for: read, checked and cut, or refused with a reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from adapter.bridge.commands import (
    Command,
    Limits,
    MediaPart,
    client_id,
    client_id_base,
    command_id,
    decode_command,
    identity_of,
    read_command,
    sandbox_of,
)
from adapter.bridge.record import CommandRef
from adapter.contract.messages import Outbound
from adapter.contract.names import H_COMMAND, H_ORIGINAL, forwardable_headers
from adapter.errors import Refused, Unreadable

NOW = 1_789_000_000_000
HOUR = 3_600_000
LIMITS = Limits(park_ms=72 * HOUR, part_chars=1800, part_bytes=16_384)


def read(*, sandbox: str = "s1", stored_ms: int = NOW, limits: Limits = LIMITS, **body: Any) -> Command:
    outbound = decode_command(msgspec.json.encode(body), limits)
    return read_command(outbound, sandbox=sandbox, stored_ms=stored_ms, limits=limits)


def items(*texts: str) -> list[dict[str, str]]:
    return [{"kind": "text", "text": text} for text in texts]


KEPT: list[tuple[str, dict[str, str], dict[str, str]]] = [
    ("traceparent", {"traceparent": "00-1"}, {"traceparent": "00-1"}),
    ("ours", {"Wechat-Schema": "1"}, {"Wechat-Schema": "1"}),
    ("the-servers", {"Nats-Msg-Id": "a", "nats-rollup": "all", "KV-Operation": "DEL"}, {}),
    ("a-status", {"Status": "409", "status": "409", "Description": "Consumer Deleted"}, {}),
    ("no-token", {"(a)": "x", "a b": "x", "": "x", "a\r\nb": "x", "é": "x"}, {}),
    ("too-long", {"a" * 65: "x", "b": "x" * 1025, "c": "x" * 1024}, {"c": "x" * 1024}),
    ("too-many", {f"h{n}": "x" for n in range(40)}, {f"h{n}": "x" for n in range(32)}),
]


@pytest.mark.parametrize(("headers", "kept"), [row[1:] for row in KEPT], ids=[row[0] for row in KEPT])
def test_of_a_strangers_headers_only_harmless_ones_are_copied(headers: dict[str, str], kept: dict[str, str]) -> None:
    assert forwardable_headers(headers) == kept


PARTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("short-form", {"text": "hi"}, ["hi"]),
    ("one-item", {"items": items("hi")}, ["hi"]),
    ("several-items-are-several-messages", {"items": items("one", "two")}, ["one", "two"]),
    ("markdown-stays", {"text": "**hi**"}, ["**hi**"]),
    ("no-tags", {"items": [*items("1 < 2"), {"kind": "text", "text": "`a<b` > c"}]}, ["1 ＜ 2", "`a<b` ＞ c"]),
    ("code-that-is-cut", {"text": f"`{'a' * 1799}< b` < c"}, [f"`{'a' * 1791}", "aaaaaaaa＜ b` ＜ c"]),
    ("unknown-fields", {"text": "hi", "colour": "red"}, ["hi"]),
    ("long", {"text": "a" * 1500 + "\n\n" + "b" * 1500}, ["a" * 1500, "b" * 1500]),
    ("emoji", {"text": "👩‍👩‍👧‍👦"}, ["👩‍👩‍👧‍👦"]),
    ("spaces-around", {"text": " hi "}, [" hi "]),
]


@pytest.mark.parametrize(("body", "parts"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])
def test_a_command_becomes_its_messages(body: dict[str, Any], parts: list[str]) -> None:
    assert read(**body).parts == parts


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uDE00", rb"\ud83d\ud83d"])
def test_half_an_emoji_at_the_end_of_a_cut_text_costs_only_itself(half: bytes) -> None:
    """`text.slice(0, n)` in JavaScript, and json.dumps of the like in Python: one answer in thousands."""
    body = decode_command(rb'{"id":"c1","text":"\ud83d\ude00 \\ud83d hi' + half + rb'"}', LIMITS)
    assert body.id == "c1"
    assert body.text == "\U0001f600 \\ud83d hi" + "\ufffd" * (len(half) // 6)


def test_a_typing_command_has_no_parts_and_never_waits_for_the_user() -> None:
    on, off = read(typing="on"), read(typing="off", when_closed="park")
    assert [(command.typing, command.parts, command.when_closed) for command in (on, off)] == [
        ("on", [], "refuse"),
        ("off", [], "refuse"),
    ]
    assert on.expires_ms == NOW + 60_000  # later it is pointless; to hide it never is
    assert off.expires_ms == NOW + LIMITS.park_ms


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("neither-text-nor-items", {}, "invalid"),
    ("both-text-and-items", {"text": "hi", "items": items("hi")}, "invalid"),
    ("both-text-and-typing", {"text": "hi", "typing": "on"}, "invalid"),
    ("empty-text", {"text": ""}, "invalid"),
    ("blank-text", {"text": " \n\t"}, "invalid"),
    ("blank-item", {"items": items("hi", " ")}, "invalid"),
    ("too-many-parts", {"text": "a" * 18_001}, "too_long"),
    ("too-many-parts-in-all", {"items": items(*["a" * 2000] * 6)}, "too_long"),
    ("far-too-long", {"text": "a" * 250_000}, "too_long"),
    ("user-longer-than-any", {"text": "hi", "user": "u" * 129}, "invalid"),
    ("user-with-a-space", {"text": "hi", "user": "u v"}, "invalid"),
    ("user-with-a-line-break", {"text": "hi", "user": "u\r\nPUB x 0"}, "invalid"),
    ("user-not-ascii", {"text": "hi", "user": "用户"}, "invalid"),
    ("bot-longer-than-any", {"text": "hi", "bot": "b" * 129}, "invalid"),
]


@pytest.mark.parametrize(("body", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_sent_is_refused(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        read(**body)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_a_body_for_another_sandbox_is_refused() -> None:
    body = Outbound(sandbox="s2", text="hi")
    with pytest.raises(Refused, match="invalid"):
        read_command(body, sandbox="s1", stored_ms=NOW, limits=LIMITS)
    own = Outbound(sandbox="s1", text="hi")
    assert read_command(own, sandbox="s1", stored_ms=NOW, limits=LIMITS).parts == ["hi"]


@pytest.mark.parametrize("name", ["S1", "a.b", "", "a b", "ä", "a" * 65, "s1\n", "*", ">"])
def test_a_sandbox_that_is_none_is_refused_and_never_rewritten(name: str) -> None:
    with pytest.raises(Refused, match="invalid"):
        read(sandbox=name, text="hi")
    with pytest.raises((Refused, Unreadable)):
        sandbox_of(decode_command(msgspec.json.encode({"sandbox": name, "text": "hi"}), LIMITS))


UNREADABLE = [
    ("no-json", b"hi", "unreadable"),
    ("empty", b"", "unreadable"),
    ("a-list", b"[]", "unreadable"),
    ("truncated", b'{"text":"hi', "unreadable"),
    ("not-utf-8", b'{"text":"\xff"}', "unreadable"),
    ("text-a-number", b'{"text":5}', "unreadable"),
    ("unknown-kind", b'{"items":[{"kind":"hologram"}]}', "unreadable"),
    ("no-items", b'{"items":[]}', "unreadable"),
    ("21-items", msgspec.json.encode({"items": items(*["x"] * 21)}), "unreadable"),
    ("when-closed-unknown", b'{"text":"hi","when_closed":"later"}', "unreadable"),
    ("expires-0", b'{"text":"hi","expires_in_s":0}', "unreadable"),
    ("expires-negative", b'{"text":"hi","expires_in_s":-1}', "unreadable"),
    ("id-empty", b'{"text":"hi","id":""}', "unreadable"),
    ("id-too-long", msgspec.json.encode({"text": "hi", "id": "x" * 129}), "unreadable"),
    ("nested-without-end", b'{"text":' + b"[" * 5000, "unreadable"),
    ("too-large", b'{"text":"' + b"a" * 262_144 + b'"}', "too_large"),
]


@pytest.mark.parametrize(("data", "reason"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_what_is_no_command_is_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        decode_command(data, LIMITS)
    assert caught.value.reason == reason


def test_the_complaint_never_repeats_the_text() -> None:
    for data in (b'{"text":"hi","when_closed":"my \'secret\'"}', b'{"items":[{"kind":"my secret"}]}'):
        with pytest.raises(Unreadable) as caught:
            decode_command(data, LIMITS)
        assert "secret" not in str(caught.value)
        assert "at `$." in str(caught.value)


@pytest.mark.parametrize(
    ("body", "routed", "msg_id", "expected"),
    [
        ("b", "r", "h", "b"),
        (None, "r", "h", "r"),
        (None, "", "h", "h"),
        (None, "", "", "7"),
        (None, "", "h" * 128, "h" * 128),
    ],
    ids=["body", "router", "header", "sequence", "long-header"],
)
def test_the_id_is_the_first_of_body_router_header_and_sequence(
    body: str | None, routed: str, msg_id: str, expected: str
) -> None:
    assert command_id(body, routed, msg_id, 7) == expected


def test_ids_that_are_too_long_and_begin_alike_are_two() -> None:
    """Cut off alone they were one: the second command was dropped as a repeat, without a receipt."""
    long = ["é" * 500 + end for end in ("a", "b", "a")]
    ids = [command_id(None, "", ident, 7) for ident in long]
    assert ids[0] == ids[2] != ids[1]
    assert all(len(ident) == 128 and ident.startswith("é" * 95 + "~") for ident in ids)
    assert [identity_of({H_ORIGINAL: "1.1", H_COMMAND: ident}, 7, NOW).id for ident in long] == ids


def test_a_copy_is_what_its_original_was() -> None:
    headers = {H_ORIGINAL: f"99.{NOW}", H_COMMAND: "c1"}
    assert identity_of(headers, 100, NOW) == CommandRef(sequence=99, stored_ms=NOW, id="c1")
    assert identity_of({H_ORIGINAL: "99.1"}, 100, NOW) == CommandRef(sequence=99, stored_ms=1, id="99")


NAMES_NOTHING = [
    *("", "soon", "1", "1.", ".1", "1.1.1", "1,1", "1.x", "0.1", "-1.1", "1.-1", "+1.1", "1e1.1", "0x1.1", " 1.1"),
    *("1.1\n", "\u0664.1", "1.\u0664", "1\u00b2.1"),
    *("100.1", "101.1", f"{2**63}.1", f"{10**40}.1", f"99.{NOW + 1}", f"99.{10**40}", "9" * 60_000 + ".1"),
]


@pytest.mark.parametrize("said", NAMES_NOTHING, ids=[repr(said[:20]) for said in NAMES_NOTHING])
def test_an_original_that_is_none_or_not_before_its_copy_is_ignored(said: str) -> None:
    """Anybody may write the header."""
    found = identity_of({H_ORIGINAL: said, H_COMMAND: "theirs"}, 100, NOW)
    assert found == CommandRef(sequence=100, stored_ms=NOW, id="")


def test_a_client_id_is_the_same_for_the_same_command_and_another_for_any_other() -> None:
    """WeChat shows a client_id once: the same after a redelivery, never shared by two messages."""
    base = client_id_base("s1", 7, NOW)
    assert client_id(base, 0) == client_id(client_id_base("s1", 7, NOW), 0)
    others = [client_id_base("s1", 8, NOW), client_id_base("s2", 7, NOW), client_id_base("s1", 7, NOW + 1)]
    ids = [client_id(base, part) for part in range(2)] + [client_id(other, 0) for other in others]
    assert len(set(ids)) == len(ids)
    assert all(len(ident) <= 64 and ident.isascii() for ident in ids)


@pytest.mark.parametrize(
    ("expires_in_s", "expires_ms"),
    [
        (None, 72 * HOUR),
        (60, 60_000),
        (0.5, 500),
        (1e9, 72 * HOUR),
        (1e308, 72 * HOUR),
    ],
    ids=["default", "own", "fraction", "beyond-the-services", "beyond-any-integer"],
)
def test_a_command_expires_after_its_own_time_but_never_later_than_the_services(
    expires_in_s: float | None, expires_ms: int
) -> None:
    own: dict[str, Any] = {} if expires_in_s is None else {"expires_in_s": expires_in_s}
    command = read(text="hi", **own)
    assert command.expires_ms == NOW + expires_ms


# media ---------------------------------------------------------------------------------------------------


def one(**item: Any) -> list[dict[str, Any]]:
    return [item]


MEDIA: list[tuple[str, list[dict[str, Any]], list[str | MediaPart]]] = [
    ("object", one(kind="image", media={"object": "s1/a"}), [MediaPart("image", "", "s1/a", b"")]),
    ("bytes", one(kind="file", data="aGVsbG8=", name="a.txt"), [MediaPart("file", "a.txt", "", b"hello")]),
    ("no-bytes-at-all", one(kind="file", data=""), [MediaPart("file", "", "", b"")]),
    ("video", one(kind="video", media={"object": "s1/a/b"}), [MediaPart("video", "", "s1/a/b", b"")]),
    ("voice-is-a-file", one(kind="voice", media={"object": "s1/v"}), [MediaPart("file", "", "s1/v", b"")]),
    (
        "name-of-the-object",
        one(kind="file", media={"object": "s1/a", "name": "b.pdf", "mime": "x", "size": 7}),
        [MediaPart("file", "b.pdf", "s1/a", b"")],
    ),
    (
        "name-of-the-item-wins",
        one(kind="file", media={"object": "s1/a", "name": "b.pdf"}, name="c.pdf"),
        [MediaPart("file", "c.pdf", "s1/a", b"")],
    ),
    (
        "caption-first",
        one(kind="image", media={"object": "s1/a"}, caption="look"),
        ["look", MediaPart("image", "", "s1/a", b"")],
    ),
    (
        "blank-caption",
        one(kind="image", media={"object": "s1/a"}, caption=" \n"),
        [MediaPart("image", "", "s1/a", b"")],
    ),
    (
        "long-caption",
        one(kind="image", media={"object": "s1/a"}, caption="a" * 1500 + "\n\n" + "b" * 1500),
        ["a" * 1500, "b" * 1500, MediaPart("image", "", "s1/a", b"")],
    ),
    (
        "in-the-order-of-the-items",
        [*items("one"), *one(kind="file", data="aGVsbG8="), *items("two")],
        ["one", MediaPart("file", "", "", b"hello"), "two"],
    ),
]


@pytest.mark.parametrize(("length", "character", "part_bytes"), [(900, "a", 16_384), (225, "好", 2000)])
def test_text_for_ten_parts_fits_whatever_its_paragraphs(length: int, character: str, part_bytes: int) -> None:
    """Each paragraph alone would leave a third of its part empty."""
    paragraphs = [character * length + " end."] * 16
    text = "\n\n".join(paragraphs)
    limits = msgspec.structs.replace(LIMITS, part_bytes=part_bytes, part_chars=2 * length)
    parts = read(text=text, limits=limits).parts
    assert len(parts) <= 10
    assert all(isinstance(part, str) and len(part.encode()) <= part_bytes for part in parts)
    assert "".join(map(str, parts)).replace("\n", "") == "".join(paragraphs)


@pytest.mark.parametrize(("body", "parts"), [row[1:] for row in MEDIA], ids=[row[0] for row in MEDIA])
def test_media_become_parts_and_a_caption_a_part_before(
    body: list[dict[str, Any]], parts: list[str | MediaPart]
) -> None:
    assert read(items=body).parts == parts


@pytest.mark.parametrize(
    "item",
    [
        {"kind": "image"},
        {"kind": "image", "media": {"object": "s1/a"}, "data": "aGVsbG8="},
        {"kind": "image", "media": {"object": "s2/a"}},
        {"kind": "image", "media": {"object": "s1"}},
        {"kind": "image", "media": {"object": "s1/"}},
        {"kind": "image", "media": {"object": "s1a/x"}},
        {"kind": "image", "media": {"object": "/s1/a"}},
        {"kind": "image", "media": {"object": "a"}},
    ],
    ids=["neither", "both", "of-another", "no-folder", "no-name", "of-a-namesake", "rooted", "of-nobody"],
)
def test_media_of_another_sandbox_or_of_nothing_are_refused(item: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        read(items=[item])
    assert (caught.value.reason, bool(caught.value.detail)) == ("invalid", True)


def test_too_many_captions_are_too_long() -> None:
    with pytest.raises(Refused, match="too_long"):
        read(items=one(kind="file", data="", caption="x") * 11)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("report.pdf", "report.pdf"),
        ("报告.pdf", "报告.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\a\\b.txt", "b.txt"),
        ("a\r\nb.txt", "ab.txt"),
        ("gpj.\u202eexe", "gpj.exe"),
        ("..", ""),
        (" a ", "a"),
        ("x" * 200 + ".pdf", "x" * 124 + ".pdf"),
        ("x" * 200, "x" * 128),
    ],
    ids=["plain", "chinese", "folders", "backslashes", "breaks", "reversed", "dots", "spaces", "long", "no-ending"],
)
def test_a_file_name_names_no_folder_and_hides_nothing(name: str, shown: str) -> None:
    (part,) = read(items=one(kind="file", data="", name=name)).parts
    assert isinstance(part, MediaPart)
    assert part.name == shown


def test_neither_name_nor_bytes_of_media_are_in_a_repr() -> None:
    command = read(items=one(kind="file", data="c2VjcmV0", name="secret.txt"))
    assert "secret" not in repr(command)


def test_a_merged_message_has_a_client_id_of_its_own() -> None:
    """Alone, or with fewer others, the same command is another message; iLink shows each id once."""
    assert len({client_id("k", 0, merged) for merged in range(3)}) == 3
