"""`login` against the real adapter and a simulated iLink: what the person at the terminal sees and types."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from adapter.cli.bus import connected_bus
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, adapter_running
from adapter.logins.qr import DARK_ON_LIGHT, PLAIN, terminal_text
from adapter.simulator import FaultRule, Simulator, SimulatorSettings
from tests.cli.conftest import Command
from tests.cli.process import Running, on_terminal, printed, seen, started, until

START_S = 60.0
DIGITS = b"Digits shown on the phone: "


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorSettings(hold_ms=300, hint_ms=300, qr_hold_ms=300)) as running:
        yield running


@pytest.fixture(autouse=True)
async def adapter(server: EmbeddedNats, sim: Simulator) -> AsyncIterator[None]:
    settings = demo_settings(server.url, sim.url)
    settings = msgspec.structs.replace(settings, ilink_version="2.5.0", ilink_route_tag="gray")
    async with adapter_running(settings, start_s=START_S, drain_s=START_S):
        yield


async def code_of(sim: Simulator) -> str:
    """The code that the command has asked for."""
    await until(lambda: bool(sim.qrcodes()))
    return sim.qrcodes()[-1].qrcode


def type_(process: Running, line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)


async def test_a_person_scans_types_digits_and_is_bound(sim: Simulator, cli: Command) -> None:
    async with started("login", "s1", "--auto-typing") as process:
        code = await code_of(sim)
        shown = await printed(process, b"Scan this code")
        drawn = terminal_text(f"https://liteapp.weixin.qq.com/q/sim?qrcode={code}")
        assert drawn.replace(DARK_ON_LIGHT, "").replace(PLAIN, "") in shown.decode()
        assert b"\x1b" not in shown
        sim.require_verify(code, "4711")
        sim.scan(code)
        await printed(process, DIGITS, errors=True)
        type_(process, b"not digits\n1111\n")
        await printed(process, b"Wrong. The digits shown on the phone: ", errors=True)
        type_(process, b"47 11\n")
        await printed(process, b"Confirm on the phone.\n")
        sim.confirm(code)
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
    (bot,) = sim.bots()
    said = " ".join(out.decode().split())
    assert said.startswith(f"{bot.bot} serves s1. ")
    assert "first message" in said
    (row,) = (await cli("bindings", "--json")).rows
    assert (row["bot"], row["options"]) == (bot.bot, {"auto_typing": True, "media": True})
    await until(lambda: bool(sim.requests("getupdates")))
    declared = {(it.headers["iLink-App-ClientVersion"], it.headers["SKRouteTag"]) for it in sim.requests()}
    assert declared == {(str(2 << 16 | 5 << 8), "gray")}
    assert "declare plugin version 2.5.0 to iLink" in (await cli("doctor")).out


async def test_a_user_who_has_a_bot_gets_that_message(sim: Simulator) -> None:
    async with started("login", "s1") as process:
        sim.confirm(await code_of(sim))
        await process.communicate()
    (bot,) = sim.bots()
    async with started("login", "s1") as process:
        await until(lambda: len(sim.qrcodes()) == 2)
        sim.scan(await code_of(sim), bot.user)
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
    assert b"serves this user already" in out


async def test_a_code_that_is_refused_for_the_tokens_listed_is_asked_for_without(sim: Simulator) -> None:
    async with started("login", "s1") as process:
        sim.confirm(await code_of(sim))
        await process.communicate()
    sim.configure(listed_tokens="refused")
    async with started("login", "s1") as process:
        await until(lambda: len(sim.qrcodes()) == 2)
        sim.confirm(await code_of(sim))
        await process.communicate()
        assert process.returncode == 0
    assert len(sim.bots()) == 2
    assert len(sim.requests("get_bot_qrcode")) == 3


async def test_another_person_who_is_bound_is_noticed(sim: Simulator) -> None:
    async with started("login", "s1") as process:
        sim.confirm(await code_of(sim))
        out, _ = await process.communicate()
    (first,) = sim.bots()
    assert b"Another person" not in out
    async with started("login", "s1") as process:
        await until(lambda: len(sim.qrcodes()) == 2)
        sim.confirm(await code_of(sim))
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
    assert f"Another person is bound to this sandbox, too: {first.user}.".encode() in b" ".join(out.split())


async def test_the_url_alone_for_a_program_that_draws_it(sim: Simulator) -> None:
    """Also of the next code."""
    async with started("login", "s1", "--url") as process:
        sim.expire(await code_of(sim))
        await until(lambda: len(sim.qrcodes()) >= 2)
        sim.confirm(sim.qrcodes()[1].qrcode)
        out, err = await process.communicate()
        assert process.returncode == 0
    urls = out.decode().splitlines()
    codes = [qr.qrcode for qr in sim.qrcodes()]
    assert urls[:1] == [f"https://liteapp.weixin.qq.com/q/sim?qrcode={codes[0]}"]
    assert {url.partition("?qrcode=")[2] for url in urls} <= set(codes)
    assert b"serves s1" in err


async def test_a_picture_that_only_its_owner_can_read(sim: Simulator, tmp_path: Path) -> None:
    picture = tmp_path / "code.png"
    picture.touch(0o644)
    async with started("login", "s1", "--png", str(picture)) as process:
        shown = await printed(process, b"Scan this code")
        assert b"code.png" in shown
        assert "█" not in shown.decode()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert stat.S_IMODE(picture.stat().st_mode) == 0o600
        sim.confirm(await code_of(sim))
        await process.communicate()
        assert process.returncode == 0


async def test_json_has_every_state(sim: Simulator) -> None:
    async with started("login", "s1", "--json") as process:
        await printed(process, b"\n")
        sim.scan(await code_of(sim))
        await printed(process, b"\n")
        sim.confirm(await code_of(sim))
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
    last = msgspec.json.decode(out)
    assert (last["status"], last["bot"], last["qrcode_url"]) == ("confirmed", sim.bots()[0].bot, "")


async def test_a_login_that_fails_is_1_with_a_sentence(sim: Simulator) -> None:
    sim.set_fault(FaultRule(fault="F27", endpoint="get_qrcode_status", count=1, params={"kind": "no_bot_id"}))
    async with started("login", "s1") as process:
        sim.confirm(await code_of(sim))
        _, err = await process.communicate()
        assert process.returncode == 1
    assert re.fullmatch(rb"wechat-nats: .*without naming the bot.*\n", err)


async def test_an_ilink_without_a_code_is_1_with_a_sentence(sim: Simulator, cli: Command) -> None:
    sim.set_fault(FaultRule(fault="F1", endpoint="get_bot_qrcode", count=1))
    result = await cli("login", "s1")
    assert (result.code, result.out) == (1, "")
    assert "iLink gave no QR code: " in result.err


async def test_a_person_whose_phone_calls_the_version_old_reads_what_that_means(sim: Simulator) -> None:
    """iLink tells nothing of such a scan, so the code expires as if nobody had scanned."""
    sim.configure(oldest_version="2.5.1")
    async with started("login", "s1") as process:
        await printed(process, b"Scan this code")
        for _ in range(2):
            code = await code_of(sim)
            assert "请在OpenClaw中升级微信接口版本" in sim.scan(code).phone
            sim.expire(code)
            await printed(process, "请在OpenClaw中升级微信接口版本".encode())  # with each new code
        sim.expire(await code_of(sim))
        _, err = await process.communicate()
        assert process.returncode == 1
    assert "3 codes expired" in err.decode()
    assert "has to raise WECHAT_NATS_ILINK_VERSION" in err.decode()


async def test_digits_that_nobody_can_type_end_it(sim: Simulator) -> None:
    async with started("login", "s1", stdin=asyncio.subprocess.DEVNULL) as process:
        code = await code_of(sim)
        sim.require_verify(code, "4711")
        sim.scan(code)
        _, err = await process.communicate()
        assert process.returncode == 1
    assert b"no digits on standard input" in err
    await nobody_asks(sim)


async def nobody_asks(sim: Simulator) -> None:
    """The login was cancelled: no request about its code is out."""
    await until(lambda: not any(qr.waiting for qr in sim.logins.codes.values()))


@pytest.mark.parametrize("number", [2, 15], ids=["ctrl-C", "SIGTERM"])
async def test_a_signal_cancels_the_login(sim: Simulator, number: int) -> None:
    async with started("login", "s1") as process:
        await printed(process, b"Scan this code")
        process.send_signal(number)
        _, err = await process.communicate()
        assert (process.returncode, err) == (130, b"")
    await nobody_asks(sim)
    async with connected_bus() as bus:
        told: list[str] = []
        while len(told) < 2:
            place = bus.names.stream_event, bus.names.event("s1", "login")
            told = await bus.read_stored(*place, keep=lambda one: str(msgspec.json.decode(one.data)["status"]))
    assert told == ["wait", "cancelled"]


async def test_at_a_terminal_the_code_has_colours_of_its_own(sim: Simulator) -> None:
    async with on_terminal("login", "s1") as (process, main):
        shown = await seen(main, b"Scan this code")
        code = await code_of(sim)
        drawn = terminal_text(f"https://liteapp.weixin.qq.com/q/sim?qrcode={code}")
        assert drawn in shown.decode().replace("\r\n", "\n")
        sim.require_verify(code, "4711")
        sim.scan(code)
        await seen(main, DIGITS)
        os.write(main, b"4711\n")
        await seen(main, b"Confirm on the phone.")
        os.write(main, b"\x03")
        assert await process.wait() == 130
    await nobody_asks(sim)
