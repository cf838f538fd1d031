"""`queue`: what waits to be sent is listed without its words, and can be deleted."""

from __future__ import annotations

import re

from adapter.cli.bus import BusConnection
from adapter.contract.names import H_COMMAND, H_MSG_ID
from tests.cli.conftest import Command


async def queue(bus: BusConnection, subject: str, body: bytes, **headers: str) -> int:
    return (await bus.js.publish(subject, body, headers=headers)).seq


async def test_ls_shows_what_waits_in_order_and_no_words(cli: Command, bus: BusConnection) -> None:
    seqs = [
        await queue(bus, "wechat.out.s1", b'{"id":"c1","text":"private"}'),
        await queue(bus, "wechat.out", b'{"sandbox":"s2","text":"private"}', **{H_MSG_ID: "m2"}),
        await queue(bus, "wechat.out.s2", b'{"text":"private"}', **{H_COMMAND: "c3", H_MSG_ID: "routed"}),
        await queue(bus, "wechat.out.s2", b"private nonsense"),
        await queue(bus, "wechat.out", b"private nonsense"),
    ]
    result = await cli("queue", "ls")
    head, *rows = [re.split("  +", line.strip()) for line in result.out.splitlines()]
    assert head == ["SEQ", "SANDBOX", "ID", "AGE", "SIZE"]
    assert [row[0] for row in rows] == [str(seq) for seq in seqs]
    assert rows[0][1:3] == ["s1", "c1"]
    assert rows[0][4] == "28"
    assert "private" not in result.out

    found = (await cli("queue", "ls", "--json")).rows
    assert [row["seq"] for row in found] == seqs
    assert [row["sandbox"] for row in found] == ["s1", "s2", "s2", "s2", ""]
    assert [row["id"] for row in found] == ["c1", "m2", "c3", str(seqs[3]), str(seqs[4])]
    assert {row["body"] for row in found} == {None}
    assert all(0 <= row["age_s"] < 600 for row in found)


async def test_ls_of_one_sandbox_and_with_bodies(cli: Command, bus: BusConnection) -> None:
    await queue(bus, "wechat.out.s1", b'{"text":"a\x1b[2J\xff"}')
    first = await queue(bus, "wechat.out", b'{"sandbox":"s2","text":"b"}')
    second = await queue(bus, "wechat.out.s2", b'{"text":"c"}')
    found = (await cli("queue", "ls", "--sandbox", "s2", "--bodies", "--json")).rows
    assert [(row["seq"], row["body"]) for row in found] == [
        (first, '{"sandbox":"s2","text":"b"}'),
        (second, '{"text":"c"}'),
    ]
    shown = await cli("queue", "ls", "--bodies")
    assert r"a\x1b[2J\xff" in shown.out


async def test_more_than_a_page_is_listed(cli: Command, bus: BusConnection) -> None:
    for number in range(450):
        await bus.nc.publish(f"wechat.out.s{number % 7}", b'{"text":"hi"}')
    await bus.nc.flush()
    assert len((await cli("queue", "ls", "--json")).rows) == 450


async def test_drop_deletes_several(cli: Command, bus: BusConnection) -> None:
    seqs = [await queue(bus, "wechat.out.s1", b'{"text":"hi"}') for _ in range(3)]
    result = await cli("queue", "drop", str(seqs[0]), str(seqs[2]), "9")
    assert (result.code, result.out) == (1, f"{seqs[0]}  dropped\n{seqs[2]}  dropped\n")
    assert result.err == "wechat-nats: There is no waiting command 9.\n"
    assert [row["seq"] for row in (await cli("queue", "ls", "--json")).rows] == [seqs[1]]
    assert (await cli("queue", "drop")).code == 2


async def test_without_the_stream_it_is_3(cli: Command, server: object) -> None:
    result = await cli("queue", "ls")
    assert result.code == 3
    assert "WECHAT_OUT" in result.err
