"""`dead`: bodies only on request and without secrets, retries only where they make sense."""

from __future__ import annotations

import base64
import re

import pytest

from adapter.cli.bus import BusConnection
from adapter.contract.names import (
    H_BODY,
    H_COMMAND,
    H_DETAIL,
    H_MSG_ID,
    H_ORIGINAL,
    H_REASON,
    H_SANDBOX,
    H_SUBJECT,
    H_TIME_MS,
    H_TRACEPARENT,
    H_USER,
)
from adapter.jetstream.client import parse_headers
from adapter.tools.seal import Sealer, dead_context
from tests.cli.conftest import Command

OUT, IN = "WECHAT_OUT", "WECHAT_IN"
KEY = bytes(32)


@pytest.fixture(autouse=True)
def _token_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the adapter."""
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", base64.b64encode(KEY).decode())


async def die(bus: BusConnection, stream: str, subject: str, body: bytes, **extra: str) -> int:
    """A dead letter as the adapter leaves it, sealed if it is an inbound one."""
    headers = {
        H_SUBJECT: subject,
        H_REASON: "unreadable",
        H_DETAIL: "Not JSON.",
        H_TIME_MS: "1760000000000",
        H_MSG_ID: f"original-{subject}-{len(body)}",
        H_TRACEPARENT: "00-x",
        **({H_SANDBOX: subject.split(".")[2]} if subject.count(".") > 1 else {}),
        **extra,
    }
    if stream == IN:
        body = Sealer((KEY,)).seal_bytes(dead_context(headers[H_MSG_ID]), body)
    return (await bus.nc.jetstream().publish(bus.names.dead_letters(stream), body, headers=headers)).seq


async def test_ls_shows_no_bodies(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.out.s1", b"private words")
    await die(bus, IN, "wechat.inbox.s1.0123456789abcdef", b"private words too")
    result = await cli("dead", "ls")
    head, first, second = result.out.splitlines()
    assert head.split() == ["SEQ", "TIME", "SANDBOX", "STREAM", "REASON", "DETAIL", "SIZE"]
    assert re.split("  +", first)[2:] == ["s1", OUT, "unreadable", "Not JSON.", "13"]
    assert re.split("  +", second)[2:4] == ["s1", IN]
    assert "private" not in result.out
    (row,) = (await cli("dead", "ls", "--stream", IN, "--json")).rows
    assert (row["seq"], row["detail"], row["time_ms"]) == (2, "Not JSON.", 1_760_000_000_000)


async def test_show_prints_headers_and_body(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.out.s1", b'{"text": "private\x1b[2J" ')
    result = await cli("dead", "show", "1")
    assert result.code == 0
    assert "Wechat-Reason: unreadable" in result.out
    assert "may hold message text" in result.out
    assert r"private\x1b[2J" in result.out


async def test_show_opens_what_ilink_sent(cli: Command, bus: BusConnection) -> None:
    await die(bus, IN, "wechat.inbox.s1.0123456789abcdef", b'{"text":"private"}', **{H_BODY: "sealed"})
    result = await cli("dead", "show", "1")
    assert (result.code, result.err) == (0, "")
    assert "Wechat-Body: sealed" in result.out
    assert '{"text":"private"}' in result.out
    (row,) = (await cli("dead", "show", "1", "--json")).rows
    assert row["body"] == '{"text":"private"}'


@pytest.mark.parametrize(
    "key",
    ["", base64.b64encode(b"1" * 32).decode()],
    ids=["none", "another"],
)
async def test_without_the_key_a_sentence_stands_for_what_ilink_sent(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", key)
    await die(bus, IN, "wechat.inbox.s1.0123456789abcdef", b"private")
    await die(bus, OUT, "wechat.out.s1", b"clear")
    letter, command = (await cli("dead", "show", "1", "2", "--json")).rows
    assert re.fullmatch(
        r"\(withheld: It was sealed with a key \(\w{8}\) that is not in WECHAT_NATS_TOKEN_KEY.\)", letter["body"]
    )
    assert (letter["headers"][H_REASON], command["body"]) == ("unreadable", "clear")


async def test_an_authors_header_hides_no_command(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.out.s1", b"clear", **{H_BODY: "sealed"})
    (row,) = (await cli("dead", "show", "1", "--json")).rows
    assert row["body"] == "clear"


@pytest.mark.parametrize(
    ("stream", "body"),
    [
        (OUT, b'{"sandbox":"s1","bot_token":"sesame"}'),
        (IN, b'{"msgs":[{"context_token":"sesame", "text":"\xff'),
        (IN, b'{"msgs":[{"media":{"aes_key":"sesame"}}]}'),
        (OUT, b'{"Authorization":"sesame'),
        (OUT, rb'{"token":"a\"sesame'),
        (OUT, b"{'token':'sesame'}"),
        (OUT, b'{"token":"sesame","x":' + b"[" * 5000),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
async def test_show_masks_what_opens_something(
    cli: Command, bus: BusConnection, stream: str, body: bytes, options: tuple[str, ...]
) -> None:
    await die(bus, stream, "wechat.unbind.s1", body)
    result = await cli("dead", "show", "1", *options)
    assert result.code == 0
    assert "sesame" not in result.out


@pytest.mark.parametrize("body", [b'{"text":"\xff"}', b"[" * 5000, b"[" * 970 + b"]" * 970], ids=range(3))
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
async def test_show_prints_whatever_a_sandbox_made_a_dead_letter(
    cli: Command, bus: BusConnection, body: bytes, options: tuple[str, ...]
) -> None:
    await die(bus, OUT, "wechat.out.s1", body)
    result = await cli("dead", "show", "1", *options)
    assert result.code == 0
    assert body.decode(errors="backslashreplace") in result.out.replace("\\\\", "\\").replace('\\"', '"')


async def test_headers_that_are_not_ascii_are_shown_and_kept_by_a_retry(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.out.s1", b"{}", kind="Gr\u00fc\u00dfe \u4f60", **{H_USER: "u1@im.wechat"})
    (row,) = (await cli("dead", "show", "1", "--json")).rows
    assert row["headers"]["kind"] == "Gr\u00fc\u00dfe \u4f60"
    assert "kind: Gr\u00fc\u00dfe \u4f60" in (await cli("dead", "show", "1")).out
    assert (await cli("dead", "retry", "1")).code == 0
    stored = await bus.nc.jetstream().get_last_msg(OUT, bus.names.out_of_sandbox("s1"))
    assert stored.hdrs is not None
    assert parse_headers(base64.b64decode(stored.hdrs))["kind"] == "Gr\u00fc\u00dfe \u4f60"


async def test_retry_stores_the_command_again_and_deletes_the_letter(cli: Command, bus: BusConnection) -> None:
    about = {H_COMMAND: "c1", H_ORIGINAL: "7.1760000000000", H_USER: "u1@im.wechat"}
    await die(bus, OUT, "wechat.out.s1", b'{"text":"hi"}', **about)
    result = await cli("dead", "retry", "1")
    assert result.code == 0
    assert "stored again on wechat.out.s1" in result.out
    stored = await bus.nc.jetstream().get_last_msg(bus.names.stream_out, ">")
    assert stored.data == b'{"text":"hi","user":"u1@im.wechat"}'
    kept = {H_COMMAND: "c1", H_SANDBOX: "s1", H_TRACEPARENT: "00-x", H_MSG_ID: "retry-1-1760000000000"}
    assert stored.headers == kept
    assert (await cli("dead", "ls")).out == "No dead letters.\n"


async def test_a_command_of_which_nobody_knows_whom_it_was_for_is_not_retried(
    cli: Command, bus: BusConnection
) -> None:
    """Another person may be bound by now."""
    await die(bus, OUT, "wechat.out.s1", b'{"text":"hi"}')
    result = await cli("dead", "retry", "1")
    assert (result.code, "for whom" in result.err) == (1, True)
    assert (await cli("dead", "show", "1")).code == 0


async def test_an_unbind_can_be_retried_too(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.unbind.s1", b'{"all":true}')
    assert (await cli("dead", "retry", "1")).code == 0
    stored = await bus.nc.jetstream().get_last_msg(bus.names.stream_out, ">")
    assert ((stored.subject or "").endswith(".unbind.s1"), stored.data) == (True, b'{"all":true}')


async def test_a_retry_cut_half_way_and_repeated_stores_once(cli: Command, bus: BusConnection) -> None:
    await die(bus, OUT, "wechat.out.s1", b'{"text":"hi","user":"u1@im.wechat"}')
    await bus.nc.jetstream().publish("wechat.out.s1", b'{"text":"hi"}', headers={H_MSG_ID: "retry-1-1760000000000"})
    assert (await cli("dead", "retry", "1")).code == 0
    assert (await bus.nc.jetstream().stream_info(bus.names.stream_out)).state.messages == 1


@pytest.mark.parametrize(
    "subject",
    ["wechat.inbox.s1.0123456789abcdef", "", "$KV.wechat_bindings.b", "wechat.bind.s1", "wechat.erase.s1"],
)
async def test_what_is_no_command_cannot_be_retried_and_stays(cli: Command, bus: BusConnection, subject: str) -> None:
    await die(bus, IN, subject, b"{}")
    result = await cli("dead", "retry", "1")
    assert result.code == 1
    assert "cannot be retried" in result.err
    assert (await cli("dead", "show", "1")).code == 0


async def test_drop_deletes_several(cli: Command, bus: BusConnection) -> None:
    for n in range(3):
        await die(bus, OUT, "wechat.out.s1", b"x" * n)
    result = await cli("dead", "drop", "1", "3", "9")
    assert (result.code, result.out) == (1, "1  dropped\n3  dropped\n")
    assert [row["seq"] for row in (await cli("dead", "ls", "--json")).rows] == [2]
