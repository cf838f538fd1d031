"""What a message on wechat.out asks for: read, checked and cut, or refused with a reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from adapter.commands import Command, Limits, client_id, command_id, peek, read_command, sandbox_of
from adapter.contract import Outbound
from adapter.errors import Refused, Unreadable

NOW = 1_789_000_000_000
HOUR = 3_600_000
LIMITS = Limits(command_bytes=262_144, text_chars=4000, parts=10, park_ms=72 * HOUR)


def read(
    *, sandbox: str = "s1", ident: str = "c1", stored_ms: int = NOW, limits: Limits = LIMITS, **body: Any
) -> Command:
    outbound = peek(msgspec.json.encode(body), limits)
    return read_command(outbound, sandbox=sandbox, ident=ident, stored_ms=stored_ms, limits=limits)


def items(*texts: str) -> list[dict[str, str]]:
    return [{"kind": "text", "text": text} for text in texts]


PARTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("short-form", {"text": "hi"}, ["hi"]),
    ("one-item", {"items": items("hi")}, ["hi"]),
    ("several-items-are-several-messages", {"items": items("one", "two")}, ["one", "two"]),
    ("markdown-stays", {"text": "**hi**"}, ["**hi**"]),
    ("plain", {"text": "**hi**", "format": "plain"}, ["hi"]),
    ("unknown-fields", {"text": "hi", "colour": "red"}, ["hi"]),
    ("long", {"text": "a" * 3000 + "\n\n" + "b" * 3000}, ["a" * 3000, "b" * 3000]),
    ("emoji", {"text": "👩‍👩‍👧‍👦"}, ["👩‍👩‍👧‍👦"]),
    ("spaces-around", {"text": " hi "}, [" hi "]),
]


@pytest.mark.parametrize(("body", "parts"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])
def test_a_command_becomes_its_messages(body: dict[str, Any], parts: list[str]) -> None:
    assert read(**body).parts == parts


def test_the_rest_is_defaults() -> None:
    command = read(text="hi")
    assert (command.id, command.sandbox, command.bot, command.user) == ("c1", "s1", "", "")
    assert (command.when_closed, command.stored_ms, command.patient) == ("park", NOW, True)


def test_bot_user_and_patience_can_be_named() -> None:
    command = read(text="hi", bot="b@im.bot", user="u@im.wechat", when_closed="refuse", reply_to="m1", sandbox_="s1")
    assert (command.bot, command.user, command.when_closed) == ("b@im.bot", "u@im.wechat", "refuse")


def test_a_typing_command_has_no_parts_and_never_waits_for_the_user() -> None:
    on, off = read(typing="on", limits=LIMITS._replace(typing_ms=60_000)), read(typing="off", when_closed="park")
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
    ("plain-of-nothing", {"text": " \n ", "format": "plain"}, "invalid"),
    ("too-many-parts", {"text": "a" * 40_001}, "too_long"),
    ("too-many-parts-in-all", {"items": items(*["a" * 5000] * 6)}, "too_long"),
    ("far-too-long", {"text": "a" * 250_000}, "too_long"),
    ("far-too-long-in-plain", {"text": "![" * 100_000, "format": "plain"}, "too_long"),
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
        read_command(body, sandbox="s1", ident="c", stored_ms=NOW, limits=LIMITS)
    assert read_command(
        Outbound(sandbox="s1", text="hi"), sandbox="s1", ident="c", stored_ms=NOW, limits=LIMITS
    ).parts == ["hi"]


@pytest.mark.parametrize("name", ["S1", "a.b", "", "a b", "ä", "a" * 65, "s1\n", "*", ">"])
def test_a_sandbox_that_is_none_is_refused_and_never_rewritten(name: str) -> None:
    with pytest.raises(Refused, match="invalid"):
        read(sandbox=name, text="hi")
    with pytest.raises((Refused, Unreadable)):
        sandbox_of(peek(msgspec.json.encode({"sandbox": name, "text": "hi"}), LIMITS))


def test_plain_wechat_out_needs_the_sandbox_in_the_body() -> None:
    assert sandbox_of(Outbound(sandbox="s1", text="hi")) == "s1"
    with pytest.raises(Refused, match="invalid"):
        sandbox_of(Outbound(text="hi"))


UNREADABLE = [
    ("no-json", b"hi", "unreadable"),
    ("empty", b"", "unreadable"),
    ("a-list", b"[]", "unreadable"),
    ("truncated", b'{"text":"hi', "unreadable"),
    ("not-utf-8", b'{"text":"\xff"}', "unreadable"),
    ("half-an-emoji", rb'{"text":"\ud83d"}', "unreadable"),
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
        peek(data, LIMITS)
    assert caught.value.reason == reason


def test_the_complaint_never_repeats_the_text() -> None:
    for data in (b'{"text":"hi","when_closed":"my \'secret\'"}', b'{"items":[{"kind":"my secret"}]}'):
        with pytest.raises(Unreadable) as caught:
            peek(data, LIMITS)
        assert "secret" not in str(caught.value)
        assert "at `$." in str(caught.value)


@pytest.mark.parametrize(
    ("body", "routed", "msg_id", "expected"),
    [
        ("b", "r", "h", "b"),
        (None, "r", "h", "r"),
        (None, "", "h", "h"),
        (None, "", "", "7"),
        (None, "", "h" * 500, "h" * 128),
        (None, "r" * 500, "h", "r" * 128),
    ],
    ids=["body", "router", "header", "sequence", "long-header", "long-router"],
)
def test_the_id_is_the_first_of_body_router_header_and_sequence(
    body: str | None, routed: str, msg_id: str, expected: str
) -> None:
    assert command_id(body, routed, msg_id, 7) == expected


def test_a_client_id_is_the_same_for_the_same_command_and_another_for_any_other() -> None:
    """WeChat shows a client_id once: the same after a redelivery, never shared by two messages."""
    command = read(items=items("one", "two"))
    again = read(items=items("one", "two"))
    assert client_id(command, 0) == client_id(again, 0)
    others = [read(text="x", ident="c2"), read(text="x", sandbox="s2"), read(text="x", stored_ms=NOW + 1)]
    ids = [client_id(command, 0), client_id(command, 1), *(client_id(other, 0) for other in others)]
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
    assert command.patient is (expires_in_s is None)
