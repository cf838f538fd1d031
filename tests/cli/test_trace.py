"""`trace`: the story of one message, as a real adapter writes it, and of what only the bus knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from adapter.cli.bus import BusConnection
from adapter.cli.embedded import EmbeddedNats
from adapter.contract.names import H_COMMAND, H_REASON, H_SANDBOX, H_TRACEPARENT, derive_traceparent
from adapter.simulator import BotRecord, Simulator
from tests.cli.conftest import START_S, Command, stored

AUTHORS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""A traceparent of an agent that has traces of its own."""


async def bound(cli: Command, simulator: Simulator, tmp_path: Path) -> BotRecord:
    bot = simulator.add_bot()
    token = tmp_path / "token"
    token.write_text(bot.token)
    assert (await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
    return bot


async def answer(bus: BusConnection, ident: str, headers: dict[str, str] | None = None, **body: str) -> None:
    payload = msgspec.json.encode({"id": ident, "text": f"answer {ident}", **body})
    await bus.nc.jetstream().publish(bus.names.out("s1"), payload, headers=headers)


async def test_the_story_of_a_message_from_the_phone_to_the_answers(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, bus: BusConnection, tmp_path: Path
) -> None:
    bot = await bound(cli, simulator, tmp_path)
    simulator.say(bot.user, "private words")
    (message,) = await stored("s1")
    trace = derive_traceparent(message["id"])
    await answer(bus, "named", reply_to=message["id"])
    await answer(bus, "traced", {H_TRACEPARENT: trace})
    await answer(bus, "apart", {H_TRACEPARENT: AUTHORS})
    await answer(bus, "own", {H_TRACEPARENT: AUTHORS}, reply_to=message["id"])
    await answer(bus, "broken", reply_to=message["id"], when_closed="none of these")
    await simulator.until(lambda: len(simulator.phone(bot.user)) == 4, START_S)
    story = await cli("trace", "s1", message["id"], "--json")
    while sum(row["step"] == "receipt" for row in story.rows) < 4:  # shown before its receipt is stored
        story = await cli("trace", "s1", message["id"], "--json")

    steps = [(row["step"], row["id"]) for row in story.rows]
    assert steps[:2] == [("said", message["id"]), ("published", message["id"])]
    assert {ident for step, ident in steps if step == "command"} == {"named", "traced", "own", "broken"}
    assert {ident for step, ident in steps if step == "receipt"} == {"named", "traced", "own", "broken"}
    assert [ident for step, ident in steps if step == "dead"] == ["broken"]
    assert [row["at_ms"] for row in story.rows[2:]] == sorted(row["at_ms"] for row in story.rows[2:])
    published = [row for row in story.rows if row["step"] in ("published", "receipt")]
    traces = {row["id"]: row["traceparent"] for row in published}
    assert traces["own"] == AUTHORS
    assert {traces[ident][:36] for ident in (message["id"], "named", "traced")} == {trace[:36]}
    assert traces["named"] != trace

    assert "private" not in story.out
    assert {row["text"] for row in story.rows} == {None}
    lines = await cli("trace", "s1", message["id"])
    assert lines.out.splitlines()[0].split() == ["TIME", "STEP", "ID", "SEQ", "WHAT"]
    assert "private" not in lines.out
    assert "private words" in (await cli("trace", "s1", message["id"], "--texts")).out


async def test_the_story_of_a_command_that_was_parked_and_of_one_that_is_dead(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, bus: BusConnection, tmp_path: Path
) -> None:
    bot = await bound(cli, simulator, tmp_path)
    await cli("send", "s1", "too early", "--id", "c1")
    waits = await cli("trace", "s1", "c1", "--json", "--texts")
    assert [(row["step"], row["what"].partition(" ")[0]) for row in waits.rows] == [
        ("command", "waits"),
        ("receipt", "parked"),
    ]
    assert "too early" in waits.rows[0]["text"]
    simulator.say(bot.user, "hello")
    await cli("send", "s1", "and now", "--id", "c2")  # behind c1
    story = await cli("trace", "s1", "c1")
    assert [line.split()[2] for line in story.out.splitlines()[1:]] == ["command", "receipt", "receipt"]
    assert "accepted" in story.out.splitlines()[-1]

    await bus.nc.jetstream().publish(bus.names.out("s1"), b'{"id":"c3","text":1}')
    while (await cli("trace", "s1", "c3")).out.count("receipt") < 1:
        await asyncio.sleep(0.05)
    dead = await cli("trace", "s1", "c3", "--json")
    assert [row["step"] for row in dead.rows] == ["command", "dead", "receipt"]
    assert dead.rows[1]["traceparent"] == dead.rows[2]["traceparent"]


@pytest.mark.parametrize("ident", ["nobody-knows", "*", "a.b"])
async def test_what_the_bus_does_not_know_is_said(cli: Command, bus: BusConnection, ident: str) -> None:
    result = await cli("trace", "s1", ident)
    assert (result.code, result.out) == (1, "")
    assert "has nothing of" in result.err


async def test_a_message_that_became_a_dead_letter_is_found_by_its_trace(cli: Command, bus: BusConnection) -> None:
    """And nobody else's: not that of a command of the same id in another sandbox."""
    headers = {H_REASON: "too_large", H_TRACEPARENT: derive_traceparent("in:b:m1")}
    await bus.nc.jetstream().publish(bus.names.dead_letters("WECHAT_IN"), b"s1.01234567.\xff\x00", headers=headers)
    elsewhere = {H_COMMAND: "in:b:m1", H_SANDBOX: "s2", H_REASON: "unreadable"}
    await bus.nc.jetstream().publish(bus.names.dead_letters("WECHAT_OUT"), b"{}", headers=elsewhere)
    (row,) = (await cli("trace", "s1", "in:b:m1", "--json")).rows
    assert (row["step"], row["what"], row["sequence"]) == ("dead", "too_large", 1)


async def test_a_bus_without_streams_is_said(cli: Command, server: EmbeddedNats) -> None:
    result = await cli("trace", "s1", "m1")
    assert result.code == 3
    assert "WECHAT_EVENT" in result.err
