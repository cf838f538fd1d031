"""QR logins over the bus: a real server, the simulated iLink over sockets, adapters that die in between."""

from __future__ import annotations

import base64
import os
import secrets
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from adapter.contract.messages import (
    BindingsPage,
    BindingsQuery,
    Login,
    LoginEvent,
    LoginQuery,
    LoginStart,
    LoginVerify,
    Options,
)
from adapter.simulator import FaultRule
from tests.e2e.reading import inbox
from tests.e2e.test_bindings import ask, changes
from tests.e2e.world import NAMES, SOON, AdapterProcess, World, eventually, stream, until, world
from tests.forks import fork

FAST: dict[str, Any] = {"qr_hold_ms": 300, "token_death_delay_s": 0}


async def start(nc: Client, sandbox: str = "s1", **fields: Any) -> Login:
    login = await ask(nc, "login.start", LoginStart(sandbox=sandbox, **fields), Login)
    assert isinstance(login, Login), login
    return login


async def status(nc: Client, login: Login) -> Login:
    answer = await ask(nc, "login.status", LoginQuery(login=login.login), Login)
    assert isinstance(answer, Login), answer
    return answer


async def reaches(nc: Client, login: Login, *statuses: str, reason: str = "") -> Login:
    """Waits until the login stands so."""
    found = login

    async def there() -> bool:
        nonlocal found
        try:
            found = await status(nc, login)
        except (NatsError, TimeoutError):  # the replica that would have answered is dead
            return False
        return found.status in statuses and reason in ("", found.reason)

    await eventually(there, f"{login.sandbox} is {statuses} {reason}")
    return found


async def events(nc: Client, sandbox: str = "s1") -> list[LoginEvent]:
    stored = await stream(nc, NAMES.stream_event, NAMES.event(sandbox, "login"))
    return [msgspec.json.decode(data, type=LoginEvent) for _, data in stored]


async def ready(made: World, *adapters: AdapterProcess) -> Client:
    """A connection, once the adapters run and own all partitions."""
    await until(lambda: all(b"adapter.started" in a.log.read_bytes() for a in adapters), "they run")
    await until(lambda: sum(owned(a) for a in adapters) >= NAMES.partitions, "all partitions are owned")
    return await made.nc()


def owned(adapter: AdapterProcess) -> int:
    lines = [
        msgspec.json.decode(line) for line in adapter.log.read_bytes().splitlines() if b"partitions.taken" in line
    ]
    return int(lines[-1]["owned"]) if lines else 0


def newest(made: World) -> str:
    return made.sim.qrcodes()[-1].qrcode


async def test_a_login_from_the_first_code_to_the_first_message(tmp_path: Path) -> None:
    """With digits, wrong ones first, and a redirect to another host."""
    async with world(tmp_path, **FAST) as made:
        nc = await ready(made, await made.add_adapter())
        login = await start(nc, png=True, options=Options(auto_typing=True))
        code = newest(made)
        assert code in login.qrcode_url
        assert base64.b64decode(login.qrcode_png).startswith(b"\x89PNG")
        assert "█" in login.qrcode_text
        made.sim.require_verify(code, "4711")
        made.sim.scan(code)
        await reaches(nc, login, "need_verify_code")
        polls = made.sim.qrcodes()[0].polls
        answer = await ask(nc, "login.verify", LoginVerify(login=login.login, code="1111"), Login)
        assert (answer.status, answer.reason) == ("need_verify_code", "checking")
        await reaches(nc, login, "need_verify_code", reason="wrong_code")
        assert made.sim.qrcodes()[0].polls == polls + 1  # while digits are awaited nothing is asked
        await ask(nc, "login.verify", LoginVerify(login=login.login, code="4711"), Login)
        await reaches(nc, login, "scanned")
        await made.sim.redirect(code)
        made.sim.confirm(code)
        done = await reaches(nc, login, "confirmed")
        (bot,) = made.sim.bots()
        assert (done.bot, done.user, done.qrcode_url, done.qrcode_text) == (bot.bot, bot.user, "", "")
        assert "first message" in done.detail
        await until(lambda: made.sim.polls(bot.bot).total > 0, "the bot is polled")
        page = await ask(nc, "bindings.get", BindingsQuery(bot=bot.bot), BindingsPage)
        (binding,) = page.bindings
        assert (binding.sandbox, binding.user) == ("s1", bot.user)
        assert (binding.base_url, binding.options.auto_typing) == (made.sim.second_url, True)
        made.bots["s1"] = bot
        made.say("s1", "hello")
        await made.command(nc, "s1", "c1")
        await made.settle(nc)
        told = await events(nc)
        assert [(event.status, event.reason) for event in told] == [
            ("wait", ""),
            ("need_verify_code", ""),
            ("need_verify_code", "wrong_code"),
            ("scanned", ""),
            ("confirmed", ""),
        ]
        assert (told[-1].bot, told[-1].user, told[-1].code) == (bot.bot, bot.user, 1)
        assert made.sim.violations() == []
        asked = made.sim.requests("get_qrcode_status")
        assert {request.method for request in asked} == {"GET"}


async def test_a_login_that_nobody_scans_gets_new_codes_and_the_one_before_still_counts(tmp_path: Path) -> None:
    async with world(tmp_path, parts={"login_refresh_s": 1}, **FAST) as made:
        nc = await ready(made, await made.add_adapter())
        login = await start(nc)
        await until(lambda: len(made.sim.qrcodes()) == 3, "two codes more")
        before = made.sim.qrcodes()[-2].qrcode
        made.sim.confirm(before)
        done = await reaches(nc, login, "confirmed")
        assert done.bot == made.sim.bots()[0].bot
        numbers = [event.code for event in await events(nc) if event.status == "wait"]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= 3


async def test_what_goes_wrong_on_the_way_is_survived_or_said(tmp_path: Path) -> None:
    async with world(tmp_path, **FAST) as made:
        nc = await ready(made, await made.add_adapter())
        made.sim.set_fault(FaultRule(fault="F2", endpoint="get_qrcode_status", count=2, params={"after_ms": 0}))
        made.sim.set_fault(FaultRule(fault="F3", endpoint="get_qrcode_status", count=1))
        login = await start(nc)
        made.sim.confirm(newest(made))
        await reaches(nc, login, "confirmed")

        # not once: an answer to a poll that is asked again may get lost
        made.sim.set_fault(FaultRule(fault="F27", endpoint="get_qrcode_status", params={"kind": "no_bot_id"}))
        login = await start(nc, "s2")
        made.sim.confirm(newest(made))
        assert (await reaches(nc, login, "failed")).reason == "no_bot_id"
        made.sim.clear_faults()

        params = {"baseurl": "https://evil.example"}
        made.sim.set_fault(FaultRule(fault="F23", endpoint="get_qrcode_status", count=1, params=params))
        login = await start(nc, "s3")
        made.sim.confirm(newest(made))
        assert (await reaches(nc, login, "failed")).reason == "url"

        params = {"redirect_host": "evil.example"}
        made.sim.set_fault(FaultRule(fault="F23", endpoint="get_qrcode_status", count=1, params=params))
        login = await start(nc, "s4")
        await made.sim.redirect(newest(made))
        assert (await reaches(nc, login, "failed")).reason == "url"

        made.sim.set_fault(FaultRule(fault="F1", endpoint="get_bot_qrcode", count=1))
        assert await ask(nc, "login.start", LoginStart(sandbox="s5"), Login) == "503"
        page = await ask(nc, "bindings.list", BindingsQuery(), BindingsPage)
        assert [binding.sandbox for binding in page.bindings] == ["s1"]


@pytest.mark.parametrize("when", ["wait", "need_verify_code", "scanned"])
async def test_a_login_whose_only_replica_was_killed_is_lost_and_another_binds(tmp_path: Path, when: str) -> None:
    """The code that was on the screen is of no use: who confirms it binds nobody."""
    async with world(tmp_path, **FAST) as made:
        adapter = await made.add_adapter()
        nc = await ready(made, adapter)
        login = await start(nc)
        code = newest(made)
        if when == "need_verify_code":
            made.sim.require_verify(code, "4711")
        if when != "wait":
            made.sim.scan(code)
            await reaches(nc, login, when)
        await adapter.kill()
        await adapter.start()
        lost = await reaches(nc, login, "lost")
        assert (lost.qrcode_url, "start another" in lost.detail) == ("", True)
        assert await ask(nc, "login.verify", LoginVerify(login=login.login, code="4711"), Login) == "400"
        again = await start(nc)
        made.sim.confirm(newest(made))
        done = await reaches(nc, again, "confirmed")
        assert await changes(nc, "s1") == ["bound"]
        statuses = [event.status for event in await events(nc)]
        assert statuses == ["wait", *([when] if when != "wait" else []), "lost", "wait", "confirmed"]
        assert done.bot in {bot.bot for bot in made.sim.bots()}


async def test_the_command_shows_a_new_code_where_the_replica_of_the_first_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path, **FAST) as made:
        adapter = await made.add_adapter()
        nc = await ready(made, adapter)
        environ = {**os.environ, "NATS_URL": made.url}
        command = await fork("adapter", "login", "s1", "--url", env=environ, stdout=PIPE, stderr=PIPE)
        assert command.stdout is not None
        first = await command.stdout.readline()
        await adapter.kill()
        await adapter.start()
        second = await command.stdout.readline()
        assert first != second
        made.sim.confirm(second.decode().strip().rpartition("=")[2])
        _, said = await command.communicate()
        assert (await command.wait(), b"is gone" in said, b"serves s1" in said) == (0, True, True)
        assert await changes(nc, "s1") == ["bound"]


async def test_two_replicas_answer_for_each_other_and_lose_only_the_logins_of_the_dead(tmp_path: Path) -> None:
    async with world(tmp_path, **FAST) as made:
        first = await made.add_adapter()
        nc = await ready(made, first)
        second = await made.add_adapter()
        await until(lambda: b"adapter.started" in second.log.read_bytes(), "the second runs")
        logins = [await start(nc, f"s{n}") for n in range(8)]
        codes = [record.qrcode for record in made.sim.qrcodes()]
        for code in codes:
            made.sim.require_verify(code, "4711")
            made.sim.scan(code)
        for login in logins:  # any replica takes the digits
            await reaches(nc, login, "need_verify_code")
            await ask(nc, "login.verify", LoginVerify(login=login.login, code="4711"), Login)
            await reaches(nc, login, "scanned")
        await first.kill()
        for code in codes:
            made.sim.confirm(code)
        ended = [await reaches(nc, login, "lost", "confirmed") for login in logins]
        lost = [login.sandbox for login in ended if login.status == "lost"]
        assert 0 < len(lost) < len(logins)
        page = await ask(nc, "bindings.list", BindingsQuery(), BindingsPage)
        assert {binding.sandbox for binding in page.bindings} == {login.sandbox for login in ended} - {*lost}
        for login in ended:
            told = [event.status for event in await events(nc, login.sandbox)]
            assert told == ["wait", "need_verify_code", "scanned", login.status]


async def test_what_was_parked_for_a_user_is_sent_by_the_bot_of_their_next_login(tmp_path: Path) -> None:
    async with world(tmp_path, parts=SOON, **FAST) as made:
        nc = await ready(made, await made.add_adapter())
        old = made.sim.add_bot()
        await made.bind(nc, "s1", old)
        await until(lambda: made.sim.polls(old.bot).total > 0, "the old bot is polled")
        await made.command(nc, "s1", "waiting")
        made.sim.kill_token(old.bot)

        async def dead() -> bool:
            return "needs_login" in await changes(nc, "s1")

        await eventually(dead, "the old login is dead")
        login = await start(nc)
        made.sim.confirm(newest(made), old.user)
        done = await reaches(nc, login, "confirmed")
        assert done.bot != old.bot
        made.bots["s1"] = next(bot for bot in made.sim.bots() if bot.bot == done.bot)
        made.say("s1", "I am back")
        await made.settle(nc)
        assert [shown.text for shown in made.sim.phone(old.user)] == ["answer waiting"]
        assert {send.client_id for send in made.sim.sends(old.bot)} == set()
        assert {message.bot for message in await inbox(nc, "s1")} == {done.bot}
        page = await ask(nc, "bindings.list", BindingsQuery(), BindingsPage)
        assert [binding.bot for binding in page.bindings] == [done.bot]
        assert made.sim.polls(done.bot).records[0].cursor == ""


async def test_no_secret_of_a_login_is_in_a_log_an_event_or_on_disk(tmp_path: Path) -> None:
    environ = {
        "WECHAT_NATS_TOKEN_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
        "WECHAT_NATS_LOG": "debug",
    }
    async with world(tmp_path, environ=environ, **FAST) as made:
        adapter = await made.add_adapter()
        nc = await ready(made, adapter)
        login = await start(nc)
        made.sim.require_verify(newest(made), "471147114711")
        made.sim.scan(newest(made))
        await reaches(nc, login, "need_verify_code")
        await ask(nc, "login.verify", LoginVerify(login=login.login, code="471147114711"), Login)
        await reaches(nc, login, "scanned")
        made.sim.confirm(newest(made))
        await reaches(nc, login, "confirmed")
        (bot,) = made.sim.bots()
        await until(lambda: made.sim.polls(bot.bot).total > 0, "the bot is polled, so the token is whole")
        await nc.close()
        secrets_ = [newest(made), bot.token, bot.token.partition(":")[2], "471147114711"]
        on_disk = [path for path in (tmp_path / "nats").rglob("*") if path.is_file()]
        files = [adapter.log, *(path for path in on_disk if path.suffix != ".tmp")]  # the server renames those
        assert any(b"wechat_logins" in path.read_bytes() for path in files)
        for path in files:
            data = path.read_bytes()
            assert [secret for secret in secrets_ if secret.encode() in data] == [], path
