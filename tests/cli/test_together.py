"""The commands against the real adapter and a simulated iLink: what a person does on the first day."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from adapter.cli.bus import BusConnection
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import adapter_running
from adapter.cli.exits import Failed
from adapter.contract.messages import NextPage, NextQuery
from adapter.simulator import Simulator
from tests.cli.conftest import START_S, Command, Result, stored


async def test_bind_send_look_and_unbind(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, tmp_path: Path
) -> None:
    bot = simulator.add_bot()
    token = tmp_path / "token"
    token.write_text(bot.token)

    bound = await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user, "--json")
    assert (bound.code, bound.rows[0]["outcome"]) == (0, "applied")

    parked = await cli("send", "s1", "too early", "--id", "c1")
    assert (parked.code, parked.out.split()[0]) == (0, "parked")

    simulator.say(bot.user, "hello")
    await simulator.until(lambda: [shown.text for shown in simulator.phone(bot.user)] == ["too early"], START_S)
    assert (await stored("s1"))[0]["text"] == "hello"

    sent = await cli("send", "s1", "an answer")
    assert (sent.code, sent.out.split()[0]) == (0, "accepted")
    again = await cli("send", "s1", "too early", "--id", "c1")
    assert (again.code, again.out.split()[0]) == (0, "accepted")

    listed = await cli("bindings", "--json")
    assert [(row["sandbox"], row["bot"], row["state"]) for row in listed.rows] == [("s1", bot.bot, "active")]
    health = listed.rows[0]["health"]
    assert (health["status"], health["answered_ms"] > 0, health["inbound_ms"] > 0) == ("polling", True, True)
    assert bot.token not in bound.out + listed.out

    assert (await cli("doctor", "--json")).code == 0

    assert (await cli("unbind", "s1", "--all")).code == 0
    assert (await cli("bindings")).out == "Nothing is bound.\n"
    refused = await cli("send", "s1", "nobody")
    assert (refused.code, "not_bound" in refused.out) == (1, True)


async def test_a_bot_in_use_is_moved_only_on_purpose_and_never_lost_to_a_wrong_token(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, tmp_path: Path
) -> None:
    bot = simulator.add_bot()
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text(bot.token)
    wrong.write_text(f"{bot.bot}:wrong")

    async def bind(sandbox: str, file: Path, *options: str) -> Result:
        return await cli("bind", sandbox, bot.bot, "--token-file", str(file), *options)

    refused = await bind("s1", wrong)
    assert (refused.code, "-14" in refused.err) == (1, True)
    assert (await bind("s1", token)).code == 0
    assert "-14" in (await bind("s1", wrong)).err

    asked = await bind("s2", token)
    said = "wechat-nats: The bot serves another sandbox: unbind it there first.\n"
    assert (asked.code, asked.err) == (1, said)
    assert (await cli("unbind", "s1", bot.bot)).code == 0
    assert (await bind("s2", token)).code == 0
    listed = await cli("bindings", "--json")
    assert [(row["sandbox"], row["bot"], row["state"]) for row in listed.rows] == [("s2", bot.bot, "active")]


async def test_an_inbox_of_an_old_backup_gives_its_reader_nothing_until_doctor_resets_it(
    cli: Command, bus: BusConnection, simulator: Simulator, tmp_path: Path
) -> None:
    settings, bot, names = demo_settings(bus.settings.nats_url[0], simulator.url), simulator.add_bot(), bus.names
    settings = msgspec.structs.replace(settings, partitions=bus.settings.partitions)
    token = tmp_path / "token"
    token.write_text(bot.token)

    async def handed(query: NextQuery) -> NextPage:
        return await bus.request_service("next.s1", query, NextPage)

    async with adapter_running(settings, start_s=START_S, drain_s=START_S):
        assert (await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
        simulator.say(bot.user, "one")
        assert (await stored("s1"))[0]["text"] == "one"
        page = await handed(NextQuery())
        page = await handed(NextQuery(reader=page.reader, after=page.messages[-1].position))
    config = (await bus.api_request(f"STREAM.INFO.{names.stream_in}"))["config"]
    await bus.api_request(f"STREAM.DELETE.{names.stream_in}")
    await bus.api_request(f"STREAM.CREATE.{names.stream_in}", config | {"first_seq": 100})

    async with adapter_running(settings, start_s=START_S, drain_s=START_S):
        with pytest.raises(Failed, match="doctor --fix"):
            await handed(NextQuery(reader=page.reader))
    assert "to the last sequence of WECHAT_IN" in (await cli("doctor", "--fix")).out
    simulator.say(bot.user, "two")
    async with adapter_running(settings, start_s=START_S, drain_s=START_S):
        assert (await stored("s1"))[0]["text"] == "two"
        (found,) = (await handed(NextQuery(reader=page.reader))).messages
        assert msgspec.json.decode(found.message)["text"] == "two"


async def test_a_picture_and_a_file_are_sent_and_media_fetched(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, tmp_path: Path
) -> None:
    bot = simulator.add_bot()
    token, picture, report, copy = (tmp_path / name for name in ("token", "cat.png", "report.pdf", "copy"))
    token.write_text(bot.token)
    png = b"\x89PNG\r\n\x1a\n" + bytes(600_000)
    picture.write_bytes(png)
    report.write_bytes(b"%PDF-1.4 report")
    assert (await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
    simulator.say(bot.user, "hello")
    await stored("s1")

    sent = await cli("send", "s1", "here", "--image", str(picture), "--file", str(report), "--json")
    assert (sent.code, sent.rows[0]["outcome"], len(sent.rows[0]["message_ids"])) == (0, "accepted", 3)
    assert [(each.text, len(each.media)) for each in simulator.phone(bot.user)] == [("here", 0), ("", 1), ("", 1)]
    assert (await cli("send", "s1", "--file", str(tmp_path / "none"))).code == 2
    assert (await cli("send", "s1")).code == 2

    put = await cli("media", "put", "s1", str(picture), "--json")
    name = put.rows[0]["object"]
    assert (put.rows[0]["mime"], put.rows[0]["size"]) == ("image/png", len(png))
    got = await cli("media", "get", name, str(copy))
    assert (got.code, copy.read_bytes() == png) == (0, True)
    again = await cli("media", "get", name, str(copy))
    assert (again.code, "--force" in again.err) == (2, True)
    assert (await cli("media", "get", name, str(copy), "--force")).code == 0
    missing = await cli("media", "get", "s1/in/none", str(tmp_path / "missing"))
    assert (missing.code, "no such object" in missing.err) == (1, True)
    assert (await cli("media", "get", "Not a sandbox/x", "-")).code == 2
