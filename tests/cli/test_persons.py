"""`erase` and `export`: after a real adapter has served two people, nothing of one is left, and all of the other."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg

from adapter.bridge.persons import seal_state
from adapter.bridge.record import PersonState, SentText
from adapter.cli.bus import BusConnection
from adapter.contract.messages import Erase, Receipt
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_USER, person_token, to_subject_token
from adapter.contract.records import LoginRecord, PersonKey
from adapter.jetstream import topology
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.ports import StoredMessage
from adapter.settings import Settings
from adapter.simulator import BotRecord, Simulator, samples
from adapter.tools.seal import Sealer, dead_context
from tests.cli.conftest import Command, stored
from tests.cli.process import TOKEN_KEY, on_terminal, seen

KINDS = {"person", "login", "message", "event", "receipt", "dead_letter", "media"}
"""All that is there once a person's bots are unbound and their commands have ended."""


async def everything(bus: BusConnection, settings: Settings) -> list[StoredMessage]:
    """What is in all streams, but for the marks of deleted keys."""
    connection = ManagedConnection(settings, "test")
    await connection.adopt_client(bus.nc)
    found: list[StoredMessage] = []
    for wanted in topology.wanted_streams(bus.names, settings):
        found += [stored async for stored in StreamHistory(connection).read(wanted.name, ">")]
    return [each for each in found if "KV-Operation" not in each.headers]


def naming(stored: list[StoredMessage], *words: str) -> list[StoredMessage]:
    """Those that have one of the words in subject, headers or body."""

    def text(one: StoredMessage) -> str:
        return f"{one.subject} {one.headers} {one.data.decode(errors='replace')}"

    return [
        one for one in stored if any(word in text(one) or to_subject_token(word) in one.subject for word in words)
    ]


async def serve(
    cli: Command,
    simulator: Simulator,
    bus: BusConnection,
    tmp_path: Path,
    sandbox: str,
    *,
    bot: BotRecord | None = None,
) -> BotRecord:
    """A person writes, sends a picture and is answered; one command is dead, one login is known."""
    bot = bot or simulator.add_bot()
    token = tmp_path / sandbox
    token.write_text(bot.token)
    assert (await cli("bind", sandbox, bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
    simulator.say(bot.user, f"secret of {sandbox}")
    await stored(sandbox)
    simulator.say_media(bot.bot, "image", samples.png(20, 10))
    await stored(sandbox, 2)
    assert (await cli("send", sandbox, f"answer for {sandbox}")).code == 0
    assert (await cli("send", sandbox, "x", "--id", f"typed-{sandbox}", "--when-closed", "refuse")).code == 0
    await bus.nc.jetstream().publish(
        bus.names.out(sandbox), msgspec.json.encode({"id": f"dead-{sandbox}", "text": 1, "user": bot.user})
    )
    login = LoginRecord(sandbox=sandbox, status="confirmed", bot=bot.bot, user=bot.user)
    await bus.nc.jetstream().publish(f"$KV.{bus.names.logins}.login-{sandbox}", msgspec.json.encode(login))
    while not any(
        letter["seq"] for letter in (await cli("dead", "ls", "--json")).rows if sandbox in letter["subject"]
    ):
        await asyncio.sleep(0.05)
    return bot


async def test_nothing_of_an_erased_person_is_left_and_all_of_another(
    cli: Command,
    adapter: asyncio.Task[None],
    simulator: Simulator,
    bus: BusConnection,
    settings: Settings,
    tmp_path: Path,
) -> None:
    gone = await serve(cli, simulator, bus, tmp_path, "s1")
    stays = await serve(cli, simulator, bus, tmp_path, "s2")
    words = (gone.user, gone.bot, "secret of s1", "answer for s1")
    others = (stays.user, stays.bot, "secret of s2", "answer for s2")
    of_others = {(one.subject, one.seq) for one in naming(await everything(bus, settings), *others)}

    counted = await cli("erase", "--user", gone.user, "--dry-run", "--json")
    assert (counted.code, counted.rows[0]["left"]) == (0, {})
    assert KINDS | {"binding"} == set(counted.rows[0]["counts"])
    assert len(naming(await everything(bus, settings), *words)) >= sum(counted.rows[0]["counts"].values()) - 2
    assert [row["bot"] for row in (await cli("bindings", "--sandbox", "s1", "--json")).rows] == [gone.bot]

    parked = await cli("send", "s1", "too much", "--id", "parked", "--timeout", "0.01")  # it may be on its way
    assert parked.code in (0, 4)
    named = ("--user", gone.user, "--bot", stays.bot, "--when-closed", "refuse")
    assert (await cli("send", "s2", "a sandbox may name anybody", *named)).code == 1
    for number in range(5):
        simulator.say(stays.user, f"meanwhile {number}")
    erased = await cli("erase", "--user", gone.user, "--id", "request-1", "--json", "--yes")
    (answer,) = erased.rows
    assert (erased.code, answer["outcome"], answer["left"]) == (0, "applied", {})
    assert set(answer["counts"]) == KINDS - {"person"}, "it goes with the unbind"
    left = await everything(bus, settings)
    assert naming(left, *words) == []
    kept = {(one.subject, one.seq) for one in naming(left, *others)}
    assert {subject for subject, _ in of_others - kept} <= {
        f"$KV.{bus.names.persons}.s2.{person_token('s2', stays.user)}"
    }
    (audit,) = [one for one in left if one.subject.startswith(bus.names.event("s1", "erase."))]
    receipt = msgspec.json.decode(audit.data, type=Receipt)
    assert (receipt.command, receipt.counts["message"], receipt.user) == ("request-1", 2, "")

    again = await cli("erase", "--user", gone.user, "--yes")
    assert (again.code, again.out) == (0, "Nothing is there of this person.\n")
    simulator.say(stays.user, "still here")
    assert (await stored("s2", 8))[7]["text"] == "still here"


async def test_a_person_who_comes_back_after_an_erasure_begins_anew(
    cli: Command,
    adapter: asyncio.Task[None],
    simulator: Simulator,
    bus: BusConnection,
    settings: Settings,
    tmp_path: Path,
) -> None:
    bot = await serve(cli, simulator, bus, tmp_path, "s1")
    assert (await cli("erase", "--user", bot.user, "--yes")).code == 0
    token = tmp_path / "again"
    token.write_text(bot.token)
    assert (await cli("bind", "s1", bot.bot, "--token-file", str(token), "--user", bot.user)).code == 0
    simulator.say(bot.user, "back again")
    assert [row["text"] for row in await stored("s1")] == ["back again"]
    assert (await cli("send", "s1", "welcome")).code == 0
    assert naming(await everything(bus, settings), "secret of s1", "answer for s1") == []


async def test_one_sandbox_of_a_person_is_erased_and_the_other_stays(
    cli: Command,
    adapter: asyncio.Task[None],
    simulator: Simulator,
    bus: BusConnection,
    settings: Settings,
    tmp_path: Path,
) -> None:
    bot = await serve(cli, simulator, bus, tmp_path, "s1")
    await serve(cli, simulator, bus, tmp_path, "s2", bot=simulator.add_bot(user=bot.user))
    erased = await cli("erase", "--user", bot.user, "--sandbox", "s1", "--json", "--yes")
    assert (erased.code, erased.rows[0]["counts"]["message"]) == (0, 2)
    left = await everything(bus, settings)
    assert naming(left, "secret of s1", "answer for s1") == []
    assert naming(left, "secret of s2")
    assert [row["sandbox"] for row in (await cli("bindings", "--json")).rows] == ["s2"]


async def test_an_export_has_every_message_and_no_secret(
    cli: Command, adapter: asyncio.Task[None], simulator: Simulator, bus: BusConnection, tmp_path: Path
) -> None:
    bot = await serve(cli, simulator, bus, tmp_path, "s1")
    await serve(cli, simulator, bus, tmp_path, "s2")
    exported = await cli("export", "--user", bot.user)
    counted = (await cli("erase", "--user", bot.user, "--dry-run", "--json")).rows[0]["counts"]
    assert {kind: sum(row["kind"] == kind for row in exported.rows) for kind in counted} == counted
    (first, *_) = [row["content"] for row in exported.rows if row["kind"] == "message"]
    assert (first["messages"][0]["text"], first["sealed"]) == ("secret of s1", "***")
    assert bot.token not in exported.out
    assert "secret of s2" not in exported.out
    assert [row["content"][:10] for row in exported.rows if row["kind"] == "person"] == ["(withheld:"]


PERSON = PersonKey("s1", person_token("s1", "u1@im.wechat"), 1)
SENT = [SentText(id="m1", kind="text", text="what was sent")]


@pytest.mark.parametrize("has_key", [True, False])
async def test_an_export_opens_what_is_sealed_with_the_key_and_says_where_it_lacks(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch, has_key: bool
) -> None:
    headers, sealer = {H_MSG_ID: "dead:b1@im.bot:x", H_USER: "u1@im.wechat"}, Sealer((bytes(32),))
    sealed = sealer.seal_bytes(dead_context(headers[H_MSG_ID]), b'{"text":"hi","context_token":"sesame"}')
    await bus.nc.jetstream().publish(bus.names.dead_letters("WECHAT_IN"), sealed, headers=headers)
    state = PersonState(token="sesame", cursor="sesame too", sent=SENT)
    await bus.store(f"$KV.{bus.names.persons}.{PERSON.key}", seal_state(PERSON, "u1@im.wechat", state, sealer), {})
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", TOKEN_KEY if has_key else "")
    rows = {row["kind"]: row["content"] for row in (await cli("export", "--user", "u1@im.wechat")).rows}
    if has_key:
        assert rows == {
            "person": {
                "token": "***",
                "cursor": "***",
                "sent": [{"id": "m1", "kind": "text", "text": "what was sent"}],
            },
            "dead_letter": {"text": "hi", "context_token": "***"},
        }
    else:
        assert rows.keys() == {"person", "dead_letter"}
        assert all("that is not in WECHAT_NATS_TOKEN_KEY" in content for content in rows.values())


async def test_an_export_shows_nothing_of_a_record_that_a_newer_version_wrote(
    cli: Command, bus: BusConnection
) -> None:
    newer = b'{"v":2,"user":"u1@im.wechat","token":"sesame"}'
    await bus.store(f"$KV.{bus.names.persons}.{PERSON.key}", newer, {})
    (row,) = (await cli("export", "--user", "u1@im.wechat")).rows
    assert (row["kind"], row["content"]) == (
        "person",
        "(withheld: a newer version wrote it, or it is damaged)",
    )


@pytest.mark.parametrize("command", ["erase", "export"])
async def test_nobody_is_named_in_what_a_stranger_asks(cli: Command, bus: BusConnection, command: str) -> None:
    """Without an adapter an erasure waits on the bus, and an export finds nothing."""
    result = await cli(
        command, "--user", "nobody@im.wechat", *(["--timeout", "0.5", "--yes"] if command == "erase" else [])
    )
    assert (result.code, result.out) == ((4, "") if command == "erase" else (0, ""))


async def test_without_a_terminal_and_without_yes_nothing_is_asked_of_anybody(
    cli: Command, bus: BusConnection
) -> None:
    result = await cli("erase", "--user", "u@im.wechat", "--timeout", "0.5")
    assert (result.code, result.out) == (2, "")
    assert "give --yes" in result.err
    assert (await bus.nc.jetstream().stream_info(bus.names.stream_out)).state.messages == 0


@pytest.mark.parametrize("said", ["y", "n"])
async def test_at_a_terminal_the_counts_are_shown_before_a_person_is_erased(bus: BusConnection, said: str) -> None:
    asked: list[Erase] = []

    async def answer(msg: Msg) -> None:
        asked.append(msgspec.json.decode(msg.data, type=Erase))
        found = Receipt(command="e1", sandbox="_", outcome="applied", counts={"message": 17})
        await bus.nc.publish((msg.headers or {})[H_REPLY_TO], msgspec.json.encode(found))

    await bus.nc.subscribe(bus.names.said("erase", "_"), cb=answer)
    await bus.nc.flush()
    async with on_terminal("erase", "--user", "u@im.wechat") as (process, main):
        assert re.search(rb"message +17", await seen(main, b"[y/N]"))
        assert [each.dry_run for each in asked] == [True]
        os.write(main, said.encode() + b"\n")
        assert await process.wait() == (0 if said == "y" else 1)
    assert [each.dry_run for each in asked] == [True, False][: 2 if said == "y" else 1]
    assert len({each.id for each in asked}) == len(asked)
