"""`bind`, `unbind`, `bindings`."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from adapter.cli.bus import BusConnection
from adapter.contract.messages import (
    Bind,
    BindingHealth,
    BindingInfo,
    BotStatus,
    Receipt,
    Unbind,
    Window,
)
from adapter.contract.names import H_MSG_ID, H_REPLY_TO
from adapter.simulator import Simulator
from tests.cli.conftest import Command
from tests.cli.process import on_terminal, seen, started
from tests.cli.standin import answering

TOKEN = "bot1@im.bot:secret-of-the-bot"
UNBOUND = Receipt(command="r1", sandbox="s1", outcome="applied", bots=["bot1@im.bot"])


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


async def test_bind_without_an_adapter_is_stored_and_says_so(
    cli: Command, bus: BusConnection, token_file: str
) -> None:
    result = await cli("bind", "s1", "bot1@im.bot", "--token-file", token_file, "--timeout", "0.1")
    assert result.code == 4
    assert "Stored" in result.err
    assert "takes effect when an adapter runs" in result.err
    stored = await bus.nc.jetstream().get_last_msg(bus.names.stream_out, ">")
    assert (stored.subject or "").endswith(".bind.s1")
    request = msgspec.json.decode(stored.data or b"", type=Bind)
    assert (request.bot, request.bot_token) == ("bot1@im.bot", TOKEN)
    assert (stored.headers or {})[H_MSG_ID] == request.id
    assert (stored.headers or {})[H_REPLY_TO].startswith("_INBOX.")


async def test_bind_shows_what_it_has_done(cli: Command, bus: BusConnection, token_file: str, tmp_path: Path) -> None:
    async with answering(bus) as adapter:
        adapter.control = Receipt(command="r1", sandbox="s1", outcome="applied", bots=["bot0@im.bot"])
        options = (
            "--user",
            "user1@im.wechat",
            "--base-url",
            "https://x.weixin.qq.com",
            "--auto-typing",
        )
        result = await cli("bind", "s1", "bot1@im.bot", "--token-file", token_file, *options)
    assert result.code == 0
    assert result.out == "replaced  bot0@im.bot\nbot1@im.bot serves s1.\n"
    assert "secret" not in result.out + result.err
    (asked,) = adapter.asked
    assert isinstance(asked, Bind)
    assert (asked.user, asked.options.auto_typing) == ("user1@im.wechat", True)


async def test_the_same_id_again_has_no_second_effect(cli: Command, bus: BusConnection, token_file: str) -> None:
    async with answering(bus):
        arguments = ("bind", "s1", "bot1@im.bot", "--token-file", token_file, "--id", "r1")
        assert (await cli(*arguments)).code == 0
        again = await cli(*arguments)
    assert again.code == 4
    assert "Request r1 was stored before" in again.err


async def test_a_token_is_never_an_argument_and_not_repeated(cli: Command, bus: BusConnection) -> None:
    result = await cli("bind", "s1", "bot1@im.bot", "--token", TOKEN)
    assert result.code == 2
    assert "secret" not in result.err
    assert "--token-file" in result.err


@pytest.mark.parametrize(
    "options",
    [("--token", "-", "--token-file", "/dev/null"), ("--token-file", "/nowhere"), ("--token-file", "/dev/null")],
    ids=["both", "no file", "empty"],
)
async def test_a_token_that_cannot_be_had_is_2(cli: Command, bus: BusConnection, options: tuple[str, ...]) -> None:
    assert (await cli("bind", "s1", "bot1@im.bot", *options)).code == 2


async def test_the_token_may_come_from_standard_input(bus: BusConnection) -> None:
    async with answering(bus) as adapter, started("bind", "s1", "bot1@im.bot", "--token", "-") as process:
        _, err = await process.communicate(TOKEN.encode() + b"\n")
        assert (process.returncode, err) == (
            0,
            b"wechat-nats: iLink gave no answer: whether it takes the token is not known.\n",
        )
    (asked,) = adapter.asked
    assert isinstance(asked, Bind)
    assert asked.bot_token == TOKEN


async def test_an_unbind_of_what_is_not_bound_does_not_say_that_it_unbound(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        assert (await cli("unbind", "s1", "--all")).out == "No such bot is bound here.\n"
        adapter.control = UNBOUND
        assert (await cli("unbind", "s1", "--all")).out == "unbound  bot1@im.bot\nUnbound.\n"


async def test_without_a_terminal_nobody_is_asked_for_the_token(bus: BusConnection) -> None:
    async with started("bind", "s1", "bot1@im.bot") as process:
        _, err = await process.communicate(b"")
        assert process.returncode == 2
        assert b"--token -" in err


async def test_on_a_terminal_the_token_is_asked_for_and_not_shown(bus: BusConnection) -> None:
    async with answering(bus) as adapter, on_terminal("bind", "s1", "bot1@im.bot") as (process, main):
        shown = await seen(main, b"not shown")
        os.write(main, TOKEN.encode() + b"\n")
        shown += await seen(main, b"bot1@im.bot serves s1.")
        assert await process.wait() == 0
    (asked,) = adapter.asked
    assert isinstance(asked, Bind)
    assert asked.bot_token == TOKEN
    assert b"secret" not in shown


async def test_unbind_one_or_all(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.control = UNBOUND
        assert (await cli("unbind", "s1", "--all")).code == 0
        result = await cli("unbind", "s1", "bot1@im.bot", "--json")
        for neither in ((), ("bot1@im.bot", "--all")):
            assert (await cli("unbind", "s1", *neither)).code == 2
    assert result.rows[0]["bots"] == ["bot1@im.bot"]
    one, other = adapter.asked
    assert isinstance(one, Unbind)
    assert isinstance(other, Unbind)
    assert ((one.bot, one.all), (other.bot, other.all)) == ((None, True), ("bot1@im.bot", False))


async def test_a_bind_that_is_refused_is_1_and_says_what_to_do(
    cli: Command, bus: BusConnection, token_file: str
) -> None:
    async with answering(bus) as adapter:
        advice = "The bot serves another sandbox: unbind it there first."
        adapter.control = Receipt(
            command="r1", sandbox="s1", outcome="refused", reason="bound_elsewhere", detail=advice
        )
        result = await cli("bind", "s1", "bot1@im.bot", "--token-file", token_file)
    assert (result.code, result.out, advice in result.err) == (1, "", True)


async def test_bindings_come_in_pages_and_are_shown_whole(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.bindings = [BindingInfo(sandbox=f"s{i % 2}", bot=f"bot{i}@im.bot") for i in range(5)]
        result = await cli("bindings", "--json")
        assert [row["bot"] for row in result.rows] == [f"bot{i}@im.bot" for i in (0, 2, 4, 1, 3)]
        assert result.rows[0]["state"] == "active"
        result = await cli("bindings", "--sandbox", "s1")
    assert result.out.splitlines()[0].split("  ")[:2] == ["SANDBOX", "BOT"]
    assert [line.split()[1] for line in result.out.splitlines()[1:]] == ["bot1@im.bot", "bot3@im.bot"]


def bot(number: int, status: BotStatus, sandbox: str = "s1", **health: Any) -> BindingInfo:
    """A bot as the adapter says that it fares."""
    return BindingInfo(
        sandbox=sandbox,
        bot=f"b{number}@im.bot",
        user=f"u{number}@im.wechat",
        health=BindingHealth(status=status, **health),
    )


async def test_bindings_are_shown_with_what_runs_the_worst_first(cli: Command, bus: BusConnection) -> None:
    now_ms = int(time.time() * 1000)
    window = Window(remaining=7, closes_at_ms=now_ms + 3 * 3600_000 + 5000)
    async with answering(bus) as adapter:
        adapter.bindings = [
            bot(1, "polling", answered_ms=now_ms - 3000, inbound_ms=now_ms - 120_000, window=window),
            bot(2, "not_polled", "team-a", detail="no capacity: add replicas"),
            bot(3, "failing", "team-b", answered_ms=now_ms - 4 * 60_000, window=Window(remaining=0)),
            bot(4, "retrying", "team-b", detail="timeout", since_ms=now_ms - 7000),
            bot(5, "stale", "team-b"),
        ]
        shown = (await cli("bindings")).out.splitlines()
        assert [line.split()[1] for line in shown[1:]] == [
            "b2@im.bot",
            "b3@im.bot",
            "b5@im.bot",
            "b4@im.bot",
            "b1@im.bot",
        ]
        assert "no capacity: add replicas" in shown[1]
        assert "4 min ago  -           closed" in shown[2]
        assert re.search(r"retrying +7 s ago .* timeout", shown[4])
        assert "2 min ago   7 left, 3 h" in shown[5]
        for options, bots in [
            (("--state", "trouble"), [2, 3, 5]),
            (("--state", "retrying", "--state", "polling"), [4, 1]),
            (("--sandbox", "team-*"), [2, 3, 5, 4]),
            (("--sandbox", "team-b", "--user", "*4@*"), [4]),
            (("--user", "u1@im.wechat"), [1]),
            (("--user", "nobody"), []),
        ]:
            rows = (await cli("bindings", "--json", *options)).rows
            assert [row["bot"] for row in rows] == [f"b{number}@im.bot" for number in bots]
        assert (await cli("bindings", "--user", "nobody")).out == "Nothing matches.\n"
        assert (await cli("bindings", "--state", "wrong")).code == 2


async def test_a_token_that_ilink_refuses_is_not_bound(
    cli: Command, bus: BusConnection, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WECHAT_NATS_ILINK_BASE_URL", simulator.url)
    monkeypatch.setenv("WECHAT_NATS_ALLOWED_HOSTS", urlsplit(simulator.url).netloc)
    known, file = simulator.add_bot(), tmp_path / "token"
    arguments = ("bind", "s1", known.bot, "--token-file", str(file))
    async with answering(bus) as adapter:
        file.write_text(f"{known.bot}:wrong")
        refused = await cli(*arguments)
        assert (refused.code, adapter.asked) == (1, [])
        assert f"{urlsplit(simulator.url).netloc} refuses the bot's token (-14): nothing was bound" in refused.err
        file.write_text(known.token)
        assert (await cli(*arguments)).err == ""
    assert len(adapter.asked) == 1


async def test_a_token_that_ilink_did_not_look_at_is_said_to_be_unchecked(
    cli: Command, bus: BusConnection, token_file: str
) -> None:
    async with answering(bus) as adapter:
        arguments = ("bind", "s1", "bot1@im.bot", "--token-file", token_file)
        assert "iLink gave no answer" in (await cli(*arguments)).err
        assert (await cli(*arguments, "--no-check")).err == ""
    assert [asked.check for asked in adapter.asked if isinstance(asked, Bind)] == [True, False]
