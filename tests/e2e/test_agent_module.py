"""`adapter.agent` as a sandbox's program uses it, under the permissions that are shipped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapter.agent.texts import TEXTS
from adapter.contract.messages import Outbound, OutFile
from adapter.errors import Refused
from adapter.settings import read_settings
from adapter.simulator import BotRecord, Simulator
from tests.bus.guarded import guarded
from tests.e2e.world import World, environ_of, fast, until
from tests.forks import fork
from wechat_nats import Message, Sandbox


class Place:
    """A bridge in which s1 has two users."""

    def __init__(self, world: World, users: list[BotRecord], environs: dict[str, dict[str, str]]) -> None:
        self.world = world
        self.users = users
        self.environs = environs
        """By sandbox: its own rights, and no word of an inbox prefix."""
        self.settings = {name: read_settings(environ) for name, environ in environs.items()}

    def texts(self, user: BotRecord) -> list[str]:
        return [shown.text for shown in self.world.sim.phone(user.user)]


@pytest.fixture(params=["passwords", "jwt-each"])
async def place(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with guarded(tmp_path, request.param) as server, Simulator(fast()) as sim:
        world = World(tmp_path, sim, server.url, environ_of(server.url, sim) | server.users["adapter"].environ)
        try:
            await world.add_adapter()
            platform = await server.connect("platform")
            users = [sim.add_bot(), sim.add_bot()]
            for bot in users:
                assert (await world.bind(platform.nc, "s1", bot)).outcome == "applied"
            environs = {name: {"NATS_URL": server.url, **server.users[name].environ} for name in ("s1", "s2")}
            for environ in environs.values():
                del environ["NATS_INBOX_PREFIX"]
            yield Place(world, users, environs)
        finally:
            await world.close()


@contextlib.asynccontextmanager
async def beside(work: Any) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_users_have_their_answers_in_order_and_wait_for_nobody(place: Place) -> None:
    slow, quick = place.users
    gate = asyncio.Event()

    async def handle(message: Message) -> None:
        if message.text == "slow":
            await message.typing()
            await gate.wait()
        await message.reply(f"1 {message.text}")
        await message.reply(f"2 {message.text}")

    async with Sandbox("s1", place.settings["s1"]) as sandbox, beside(sandbox.run(handle)) as running:
        for text in ("slow", "next"):
            place.world.sim.say(slow.bot, text)
        for text in ("a", "b", "c"):
            place.world.sim.say(quick.bot, text)
        await until(lambda: len(place.texts(quick)) == 6, "the other user is answered")
        assert place.texts(quick) == ["1 a", "2 a", "1 b", "2 b", "1 c", "2 c"]
        assert place.texts(slow) == []
        gate.set()
        await until(lambda: len(place.texts(slow)) == 4, "the first one is, too")
        assert place.texts(slow) == ["1 slow", "2 slow", "1 next", "2 next"]
        assert not running.done()


async def test_media_come_and_go(place: Place, tmp_path: Path) -> None:
    user, sent = place.users[0], secrets.token_bytes(600_000)
    picture = b"\x89PNG\r\n\x1a\n" + sent
    place.world.sim.say_media(user.bot, "image", picture)
    async with Sandbox("s1", place.settings["s1"]) as sandbox:
        async for message in sandbox:
            (item,) = message.inbound.items
            assert await message.read_media(item) == picture
            saved = [await message.save_media(tmp_path) for _ in range(2)]
            assert saved == [[tmp_path / "image.png"], [tmp_path / "image-2.png"]]
            assert saved[1][0].read_bytes() == picture
            media = await sandbox.put_media(sent, "back again.bin")
            await message.reply("Here:", [OutFile(media=media)], files=[*saved[0], sent])
            break
        await until(lambda: len(place.world.sim.phone(user.user)) == 4, "the phone shows it")
        text, *files = place.world.sim.phone(user.user)
        assert text.text == "Here:"
        shown = [(view.kind, view.md5, view.file_name) for file in files for view in file.media]
        digests = [hashlib.md5(data).hexdigest() for data in (sent, picture)]
        assert shown[:2] == [("file", digests[0], "back again.bin"), ("image", digests[1], "")]
        assert shown[2][:2] == ("file", digests[0])
        with pytest.raises(Refused, match="no message with this object"):
            await sandbox.read_media("s1/out/nothing", message.position)
        with pytest.raises(Refused, match="is empty"):
            await message.reply("And nothing:", files=[b""])


async def test_windows_are_known_and_a_closing_one_is_reported_once(place: Place) -> None:
    """A window is open for 23 hours, so `before_s` is over three seconds after a message."""
    first, second = place.users
    before_s = 23 * 3600 - 3.0

    async def echo(message: Message) -> None:
        await message.reply(f"You said: {message.text}")

    def closes_ms(sandbox: Sandbox) -> int:
        return sandbox.window.closes_at_ms or 0 if sandbox.window else 0

    async with Sandbox("s1", place.settings["s1"]) as sandbox, beside(sandbox.run(echo)):
        assert (sandbox.window, sandbox.windows) == (None, {})
        place.world.sim.say(first.bot, "hello")
        await until(
            lambda: sandbox.window is not None and sandbox.window.remaining == 9, "a receipt says what is left"
        )
        known_ms = closes_ms(sandbox)
        place.world.sim.say(first.bot, "and")
        await until(lambda: closes_ms(sandbox) > known_ms, "the next message opens another window")
        due_ms = closes_ms(sandbox) - before_s * 1000
        assert await sandbox.closing(before_s) == first.user
        assert time.time() * 1000 >= due_ms
        place.world.sim.say(second.bot, "hi")
        assert await sandbox.closing(before_s) == second.user
        assert sandbox.windows.keys() == {first.user, second.user}
        assert sandbox.window == sandbox.windows[second.user]
        await sandbox.send(Outbound(id="bye", user=second.user, text="See you"))
        await until(lambda: "See you" in place.texts(second), "the last word is said")


async def test_another_sandbox_is_closed_and_that_is_said(place: Place) -> None:
    async with Sandbox("s1", place.settings["s2"]) as sandbox:
        with pytest.raises(Refused, match="This user may not"):
            await anext(aiter(sandbox))


async def test_a_message_is_answered_again_under_the_same_ids_until_it_was_finished(place: Place) -> None:
    user = place.users[0]
    place.world.sim.say(user.bot, "hello")
    ids: list[list[str]] = []
    for _ in range(2):  # a program that dies after its answers, and one that lives on
        async with Sandbox("s1", place.settings["s1"]) as sandbox:
            async for message in sandbox:
                ids.append([await message.reply("one"), await message.reply("two")])
                break
    async with Sandbox("s1", place.settings["s1"]) as sandbox:

        async def echo() -> None:
            async for message in sandbox:
                await message.reply(f"at last: {message.text}")

        async with beside(echo()):
            place.world.sim.say(user.bot, "next")
            await until(lambda: "at last: next" in place.texts(user), "the next one is answered")
    assert ids[0] == ids[1]
    assert place.texts(user) == ["one", "two", "at last: next"]


async def test_the_command_needs_no_other_rights(place: Place, tmp_path: Path) -> None:
    environ = {**os.environ, **place.environs["s1"], "WECHAT_NATS_DATA_DIR": str(tmp_path)}
    process = await fork("adapter", "agent", "s1", "--exec", "tr a-z A-Z", env=environ)
    try:
        place.world.sim.say(place.users[0].bot, "hello")
        await until(lambda: "HELLO" in place.texts(place.users[0]), "it is answered")
        assert place.texts(place.users[0]) == [TEXTS["en"].welcome, "HELLO"]
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert list((tmp_path / "agent-s1" / "files").iterdir()) == []
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
