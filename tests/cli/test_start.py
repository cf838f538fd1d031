"""`start`, from nothing to an answer on the phone, and after each way in which it may end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nats
import pytest
from rich.cells import cell_len
from synadia_ai.agent_service import AgentService

from adapter.cli.embedded import EmbeddedNats
from adapter.simulator import FaultRule, Simulator, SimulatorSettings
from tests.cli.process import Running, alive, children, on_terminal, printed, seen, started, until
from tests.e2e.memory import SMALL, in_memory

READY = b"Write to the bot now."
PROGRAM = """\
read -r text
echo run >>{folder}/runs
case "$text" in
wait) until [ -e {folder}/go ]; do sleep 0.02; done ;;
fail) echo "Invalid API key" >&2; exit 3 ;;
esac
echo "done: $text"
"""
SECRET = "whsec_" + "A" * 43 + "="


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorSettings(hold_ms=300, hint_ms=300, qr_hold_ms=300)) as running:
        yield running


@pytest.fixture
def agent(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The arguments of `start`, which finds this WeChat and an empty data folder."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "agent.sh").write_text(PROGRAM.format(folder=tmp_path))
    given = {"DATA_DIR": str(data), "ILINK_BASE_URL": sim.url, "CDN_BASE_URL": sim.url, "LANGUAGE": "en"}
    given |= {"ALLOWED_HOSTS": urlsplit(sim.url).netloc, "LEASE_S": "1", "SEND_GAP_MS": "0"}
    for name, value in {**SMALL, **{f"WECHAT_NATS_{name}": value for name, value in given.items()}}.items():
        monkeypatch.setenv(name, value)
    with in_memory(data / "nats"):
        yield "start", "--exec", f"sh {tmp_path}/agent.sh", "--welcome", ""


async def scanned(sim: Simulator, process: Running, user: str | None = None) -> bytes:
    """What is printed until somebody has scanned the code, and may write."""
    shown = await printed(process, b"Scan this")
    sim.confirm(sim.qrcodes()[-1].qrcode, user)
    return shown + await printed(process, READY)


def short(user: str) -> str:
    """The characters of a user that `start` shows."""
    return user.partition("@")[0][-8:]


async def answered(sim: Simulator, user: str, *texts: str) -> None:
    """Waits until the phone shows exactly these."""
    await until(lambda: len(sim.phone(user)) >= len(texts))
    assert [shown.text for shown in sim.phone(user)] == list(texts)


async def test_from_nothing_to_an_answer_and_again_without_a_code(sim: Simulator, agent: tuple[str, ...]) -> None:
    began = time.monotonic()
    async with started(*agent) as process:
        await scanned(sim, process)
        (bot,) = sim.bots()
        sim.say(bot.user, "hello")
        await answered(sim, bot.user, "done: hello")
        print(f"from nothing to the first answer: {time.monotonic() - began:.1f} s")
        sim.say(bot.user, "fail")
        out = await printed(process, b"Invalid API key\n")
        await answered(sim, bot.user, "done: hello", "That did not work. Please try again.")
        sim.set_fault(FaultRule(fault="F11", endpoint="sendmessage", count=1, params={"errmsg": None}))
        sim.say(bot.user, "hello")
        assert f"…{short(bot.user)}  answer parked  (".encode() in await printed(process, b"answer")
        sim.say(bot.user, "hello")
        await until(lambda: "done: hello" in sim.phone(bot.user)[-1].text)
        process.send_signal(signal.SIGINT)
        rest, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert b"The next start goes on" in rest
    who = f"…{short(bot.user)}"
    assert re.fullmatch(
        rf"\n*\d\d:\d\d:\d\d  {who}  5 characters → 11 characters, \d+\.\d s\n"
        rf"\d\d:\d\d:\d\d  {who}  4 characters → failed, \d+\.\d s\n"
        r" {10}The program ended with exit code 3\.\n"
        r" {10}Invalid API key\n",
        out.decode(),
    )
    sim.say(bot.user, "are you there?")
    async with started(*agent) as process:
        out = await printed(process, READY)
        assert f"{bot.bot} serves s1.".encode() in out
        assert b"Scan" not in out
        await until(lambda: sim.phone(bot.user)[-1].text == "done: are you there?")
    log = (Path(os.environ["WECHAT_NATS_DATA_DIR"]) / "adapter.log").read_text()
    assert "adapter.started" in log
    assert "hello" not in log
    assert "Invalid API key" not in log


async def test_killed_while_a_message_is_in_work_it_is_answered_once(
    sim: Simulator, agent: tuple[str, ...], tmp_path: Path
) -> None:
    async with started(*agent) as process:
        await scanned(sim, process)
        (bot,) = sim.bots()
        (server,) = children(process.pid)
        sim.say(bot.user, "wait")
        await until((tmp_path / "runs").exists)
        process.kill()
        await process.wait()
    await until(lambda: not alive(server))
    async with started(*agent) as process:
        await printed(process, READY)
        await until(lambda: (tmp_path / "runs").read_text() == "run\nrun\n")
        (tmp_path / "go").touch()
        await answered(sim, bot.user, "done: wait")
        sim.say(bot.user, "again")
        await answered(sim, bot.user, "done: wait", "done: again")


async def test_it_says_that_nats_has_ended_and_goes_on_at_the_next_start(
    sim: Simulator, agent: tuple[str, ...]
) -> None:
    async with started(*agent) as process:
        await scanned(sim, process)
        (bot,) = sim.bots()
        (server,) = children(process.pid)
        began = time.monotonic()
        os.kill(server, signal.SIGKILL)
        _, err = await process.communicate()
        assert (process.returncode, time.monotonic() - began < 10) == (3, True)
        assert re.search(rb"NATS server ended by itself: see \S+\.log\.\nThe next start goes on from here\.\n", err)
    sim.say(bot.user, "hello")
    async with started(*agent) as process:
        await answered(sim, bot.user, "done: hello")


async def test_two_people_at_once_in_one_sandbox(sim: Simulator, agent: tuple[str, ...], tmp_path: Path) -> None:
    async with started(*agent) as process:
        await scanned(sim, process)
        (one,) = sim.bots()
        async with started("login", "s1") as login:
            await printed(login, b"Scan this")
            sim.confirm(sim.qrcodes()[-1].qrcode)
            assert await login.wait() == 0
        (other,) = (bot for bot in sim.bots() if bot.user != one.user)
        sim.say(one.user, "wait")
        await until((tmp_path / "runs").exists)
        sim.say(other.user, "hello")
        await answered(sim, other.user, "done: hello")
        (tmp_path / "go").touch()
        await answered(sim, one.user, "done: wait")
        shown = await printed(process, short(one.user).encode())
        assert short(other.user).encode() in shown


@pytest.mark.slow  # a refused token is tried again for half a minute
async def test_a_session_that_wechat_has_ended_is_begun_anew_by_a_code(
    sim: Simulator, agent: tuple[str, ...]
) -> None:
    async with started(*agent) as process:
        await scanned(sim, process)
        (bot,) = sim.bots()
        sim.kill_token(bot.bot)
        shown = await scanned(sim, process, bot.user)
        assert f"WeChat has ended the session of {bot.bot}: scan a new code.".encode() in shown
        sim.say(bot.user, "hello")
        await answered(sim, bot.user, "done: hello")


async def test_it_ends_with_a_login_that_has_failed(sim: Simulator, agent: tuple[str, ...]) -> None:
    """And a second start beside the first one leaves that alone."""
    sim.set_fault(FaultRule(fault="F27", endpoint="get_qrcode_status", count=1, params={"kind": "no_bot_id"}))
    async with started(*agent) as process:
        await printed(process, b"Scan this")
        async with started(*agent) as second:
            _, err = await second.communicate()
            assert (second.returncode, b"Another server uses" in err) == (1, True)
        sim.confirm(sim.qrcodes()[-1].qrcode)
        _, err = await process.communicate()
        assert (process.returncode, b"without naming the bot" in err) == (1, True)


async def test_what_a_terminal_shows_fits_into_it(sim: Simulator, agent: tuple[str, ...]) -> None:
    async with on_terminal(*agent) as (process, main):
        shown = await seen(main, b"Scan this code with WeChat.")
        sim.confirm(sim.qrcodes()[-1].qrcode)
        shown += await seen(main, READY)
        sim.say(sim.bots()[0].user, "fail")
        shown += await seen(main, b"Invalid API key")
        os.write(main, b"\x03")
        shown += await seen(main, b"The next start goes on from here.")
        assert await process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;]*[mK]", "", shown.decode())
    log = f"Log: {os.environ['WECHAT_NATS_DATA_DIR']}/adapter.log"
    assert log in plain
    assert max(cell_len(line) for line in re.split(r"[\r\n]+", plain) if line != log) <= 80


async def ignore(*_: object) -> None:
    """Nobody prompts it."""


@contextlib.asynccontextmanager
async def other_agents() -> AsyncIterator[str]:
    """A server on which another agent is: its URL."""
    async with EmbeddedNats() as server, await nats.connect(server.url) as nc:
        service = AgentService(agent="helper", owner="acme", session_name="main", nc=nc)
        service.on_prompt(ignore)
        await service.start()
        yield server.url
        await service.stop()


@pytest.mark.parametrize("command", ["start", "demo"])
async def test_an_agent_that_is_not_there_is_the_first_thing_that_is_said(
    command: str, agent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WECHAT_WEBHOOK_SECRET", SECRET)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/wechat?key=1"
        async with other_agents() as agents:
            monkeypatch.setenv("AGENTS_NATS_URL", agents)
            for options, code, said in (
                (("--exec", "claud -p"), 2, "There is no program `claud` on the PATH."),
                (("--exec", "./claud -p"), 2, "There is no program `./claud`."),
                (("--http", url), 3, f"No answer at {url.partition('?')[0]}: "),
                (("--nats-agent", "x"), 3, "There is no agent x. Those that are there: helper/acme/main."),
            ):
                async with started(command, *options) as process:
                    out, err = await process.communicate()
                    assert (process.returncode, out) == (code, b"")
                    assert err.decode().startswith(f"wechat-nats: {said}")


async def test_as_a_service_an_agent_waits_for_a_url_that_is_away(
    server: EmbeddedNats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WECHAT_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("WECHAT_NATS_DATA_DIR", str(tmp_path))
    async with started("agent", "s1", "--http", "http://127.0.0.1:1/") as process:
        await printed(process, b"agent.started")
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
        assert process.returncode == 0
    assert b"No answer at http://127.0.0.1:1/: " in err
    assert b"Messages wait for it." in err
