"""The examples in other languages as strangers on the bus: their processes, a real server, adapter and simulator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import nats
import nkeys
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.cli.embedded import EmbeddedNats, find_server
from adapter.contract.messages import Inbound, Outbound, TextItem
from adapter.simulator import Simulator
from tests.authority import Authority
from tests.bus.guarded import guarded
from tests.clients import examples
from tests.clients.examples import ROOT, Language
from tests.e2e.waiting import free_port
from tests.e2e.world import NAMES, World, environ_of, eventually, fast, until, world
from tests.next_standin import NextStandIn

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Cast(NamedTuple):
    """Two sandboxes, and how each program connects."""

    sandbox: str
    second: str
    platform: dict[str, str]
    service: dict[str, str]
    agent: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bridge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One for all languages: each has sandboxes of its own. The server asks for a token, as the embedded one does."""
    folder = tmp_path_factory.mktemp("bridge")
    server = EmbeddedNats(folder / "nats", free_port(), token="a1b2")
    async with world(folder, bus=server, qr_hold_ms=300) as made:
        await started(made)
        yield made


async def started(bridge: World) -> None:
    adapter = await bridge.add_adapter()
    await until(lambda: b"adapter.started" in adapter.log.read_bytes(), "the adapter runs")


async def test_python(bridge: World, tmp_path: Path) -> None:
    await converse(bridge, examples.python(tmp_path))


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/howto/agent.md", "schemas/README.md"])
async def test_the_agent_on_a_page_answers(bridge: World, tmp_path: Path, page: str) -> None:
    """As it is printed, but for the sandbox's name."""
    sandbox = page.partition(".")[0].replace("/", "-").lower()
    (printed,) = [
        one
        for one in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        if "asyncio.run(" in one
    ]
    (tmp_path / "agent.py").write_text(printed.replace("s1", sandbox))
    nc = await bridge.nc()
    bot = bridge.sim.add_bot()
    await bridge.bind(nc, sandbox, bot)
    commands = await listening(nc, sandbox)
    agent = Language(page, tmp_path, {"agent": (sys.executable, str(tmp_path / "agent.py"))})
    async with agent.run("agent", NATS_URL=bridge.url):

        async def answered() -> bool:
            bridge.sim.say(bot.user, "hello")  # until it listens: it hears what is said from then on
            await asyncio.sleep(0.3)
            return "You said: hello" in [shown.text for shown in bridge.sim.phone(bot.user)]

        await eventually(answered, "it answers")
    assert {command.user for command in commands} == {bot.user}
    await nc.close()


async def listening(nc: Client, sandbox: str) -> list[Outbound]:
    """The commands that the sandbox sends from now on."""
    commands: list[Outbound] = []

    async def received(msg: Msg) -> None:
        commands.append(msgspec.json.decode(msg.data, type=Outbound))

    await nc.subscribe(NAMES.out(sandbox), cb=received)
    await nc.flush()
    return commands


async def test_typescript(bridge: World, tmp_path: Path, npm: Path) -> None:
    await converse(bridge, examples.typescript(tmp_path, npm))


async def test_c(bridge: World, tmp_path: Path) -> None:
    await converse(bridge, examples.c(tmp_path))


def made(name: str, folder: Path, request: pytest.FixtureRequest) -> Language:
    """The programs of a language. Skips where what it needs is missing."""
    if name == "typescript":
        return examples.typescript(folder, request.getfixturevalue("npm"))
    build: Callable[[Path], Language] = {"python": examples.python, "c": examples.c, "go": examples.go}[name]
    return build(folder)


GO = pytest.param("go", marks=pytest.mark.slow)  # the first build of the client takes a minute


@pytest.mark.parametrize("name", ["python", "typescript", "c", GO])
@pytest.mark.parametrize("template", ["passwords", "jwt"])
async def test_each_needs_no_more_than_its_role_may(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, template: str
) -> None:
    """A server with the permissions that are shipped; the programs differ in their users only."""
    language = made(name, tmp_path, request)
    async with guarded(tmp_path, template) as server, Simulator(fast(qr_hold_ms=300)) as sim:

        def environ(name: str) -> dict[str, str]:
            return {"NATS_URL": server.url, **server.users[name].environ}

        bridge = World(tmp_path, sim, server.url, environ_of(server.url, sim) | server.users["adapter"].environ)
        try:
            await started(bridge)
            cast = Cast("s1", "s2", environ("platform"), environ("service"), environ("s1"))
            await converse(bridge, language, cast)
        finally:
            await bridge.close()


async def test_one_program_is_the_agent_of_all_sandboxes(tmp_path: Path) -> None:
    """With the rights of its role. A sandbox that is bound later is served, too, and each answer has its receipt."""
    language = examples.python(tmp_path)
    async with guarded(tmp_path, "passwords") as server, Simulator(fast()) as sim:
        bridge = World(tmp_path, sim, server.url, environ_of(server.url, sim) | server.users["adapter"].environ)
        try:
            await started(bridge)
            platform = {"NATS_URL": server.url, **server.users["platform"].environ}

            async def bind(sandbox: str) -> None:
                bot = bridge.bots[sandbox] = sim.add_bot()
                async with language.run("onboard", "bind", sandbox, bot.bot, BOT_TOKEN=bot.token, **platform) as one:
                    assert await one.ended() == 0, one.said

            await bind("a1")
            await bind("a2")
            bridge.say("a1", "before it ran")
            async with language.run("many", NATS_URL=server.url, **server.users["agents"].environ) as many:
                await many.says("a2: ready")
                await bind("a3")
                for sandbox in ("a2", "a3"):
                    bridge.say(sandbox, "hello")
                for sandbox in ("a1", "a2", "a3"):
                    await many.says(f"{sandbox}: {sandbox}.echo.")
                assert many.said.count(": accepted") == 3
            assert bridge.phone_texts("a1") == ["You said: before it ran"]
            assert bridge.phone_texts("a3") == ["You said: hello"]
        finally:
            await bridge.close()


@pytest.mark.slow
async def test_go(bridge: World, tmp_path: Path) -> None:
    await converse(bridge, examples.go(tmp_path))


@pytest.mark.parametrize("name", ["python", "typescript", "c", GO])
async def test_each_connects_by_tls_and_by_token_or_key(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """As the NATS tools do; only the C client cannot tell the public key from the seed."""
    language = made(name, tmp_path, request)
    authority = Authority(tmp_path)
    (own, own_key), (cert, key) = authority.issue("server"), authority.issue("client")
    pair = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    (tmp_path / "seed").write_bytes(pair.seed)
    tls = {"NATS_CA": str(authority.file), "NATS_CERT": str(cert), "NATS_KEY": str(key)}
    asks = '{ token: "t1" }' if name == "c" else f"{{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
    says = {"NATS_TOKEN": "t1"} if name == "c" else {"NATS_NKEY": str(tmp_path / "seed")}
    port = free_port()
    (tmp_path / "server.conf").write_text(
        f'listen: "127.0.0.1:{port}"\nauthorization {asks}\n'
        f'tls {{ cert_file: "{own}", key_file: "{own_key}", ca_file: "{authority.file}", verify: true }}\n'
    )
    server = await asyncio.create_subprocess_exec(
        find_server(), "-c", tmp_path / "server.conf", stderr=asyncio.subprocess.DEVNULL
    )

    async def listens() -> bool:
        with contextlib.suppress(OSError):
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            return True
        return False

    try:
        await eventually(listens, "the server listens")
        async with language.run("echo", "s1", NATS_URL=f"tls://127.0.0.1:{port}", **says, **tls) as echo:
            await echo.says("echo agent of s1: ready")
    finally:
        server.kill()
        await server.wait()


async def converse(bridge: World, language: Language, cast: Cast | None = None) -> None:
    """From the QR code to the phone, and everything that an example says of itself."""
    if cast is None:
        cast, nc = Cast(language.name, f"{language.name}-2", *([{"NATS_URL": bridge.url}] * 3)), await bridge.nc()
        commands = await listening(nc, language.name)
        user = await logs_in(bridge, language, cast)
        await answers(bridge, language, cast, user)
        assert {command.user for command in commands} == {user}  # another person may be bound by then
        await nc.close()
    else:
        user = await logs_in(bridge, language, cast)
        await answers(bridge, language, cast, user)
    await sends(bridge, language, cast, user)
    await binds(bridge, language, cast)
    await repeats(language, bridge.folder / f"{cast.sandbox}-repeats")
    assert bridge.sim.violations() == []


async def logs_in(bridge: World, language: Language, cast: Cast) -> str:
    """With the wrong digits first. Returns the user."""
    before = len(bridge.sim.qrcodes())
    async with language.run("onboard", "login", cast.sandbox, **cast.platform) as onboard:
        await until(lambda: len(bridge.sim.qrcodes()) > before, "there is a code")
        code = bridge.sim.qrcodes()[-1].qrcode
        bridge.sim.require_verify(code, "4711")
        await onboard.says("wait: ")
        assert onboard.said.count("█") > 100  # the code itself
        user = bridge.sim.scan(code).user
        await onboard.says("need_verify_code: ")
        onboard.type("1111")
        await onboard.says("need_verify_code wrong_code: ")
        onboard.type("4711")
        await onboard.says("scanned: ")
        bridge.sim.confirm(code)
        await onboard.says("confirmed: ")
        assert await onboard.ended() == 0
    return user


async def answers(bridge: World, language: Language, cast: Cast, user: str) -> None:
    """Each message once, also what was said while it was away; of two programs the newer one goes on."""
    async with language.run("echo", cast.sandbox, **cast.agent) as echo:
        bridge.sim.say(user, "hello 你好")
        await shows(bridge, user, ["You said: hello 你好"])
        await echo.says("answered ", 1)
    bridge.sim.say(user, "are you there?")
    async with language.run("echo", cast.sandbox, **cast.agent) as echo:
        bridge.sim.say_media(user, "image", b"\x89PNG\r\n\x1a\n" + bytes(600_000))
        before = ["You said: hello 你好", "You said: are you there?", "You sent: image (600008 bytes)"]
        await shows(bridge, user, before)
        await echo.says("answered ", 2)
        async with language.run("echo", cast.sandbox, **cast.agent) as newer:
            await newer.says("ready")
            bridge.sim.say(user, "which of you?")
            await newer.says("answered ", 1)
            await until(lambda: len(bridge.sim.phone(user)) == 4, "the phone shows the answer")
            bridge.sim.say(user, "and now?")
            assert await echo.ended() != 0
            assert "reads" in echo.said.splitlines()[-1]
            assert "Traceback" not in echo.said
            await shows(bridge, user, [*before, "You said: which of you?", "You said: and now?"])


async def sends(bridge: World, language: Language, cast: Cast, user: str) -> None:
    async with language.run("send", cast.sandbox, "from a service 😀", **cast.service) as send:
        assert await send.ended() == 0, send.said
        assert send.said.startswith("accepted")
    assert bridge.sim.phone(user)[-1].text == "from a service 😀"
    async with language.run("send", f"{cast.sandbox}-nobody", "hello?", **cast.service) as send:
        assert await send.ended() == 1
        assert send.said.startswith("refused not_bound")


async def repeats(language: Language, folder: Path) -> None:
    """A stream that is flooded by others refuses a publish (10167): it is made again, with the same id."""
    published: dict[str, list[str]] = {}

    async def on_publish(msg: Msg) -> None:
        tries = published.setdefault(msg.subject, [])
        tries.append(json.loads(msg.data)["id"])
        if len(tries) == 1:
            await msg.respond(b'{"error":{"code":429,"err_code":10167,"description":"too many requests"}}')
            return
        await msg.respond(b'{"stream":"WECHAT_OUT","seq":1}')
        receipt = {"command": tries[0], "outcome": "accepted"}
        await nc.publish(NAMES.receipt("s1", tries[0], 1), json.dumps(receipt).encode())

    said = Inbound(
        id="in-1",
        sandbox="s1",
        bot="b1",
        user="u1@im.wechat",
        sent_at_ms=0,
        received_at_ms=0,
        text="hello",
        items=[TextItem(text="hello")],
    )
    async with EmbeddedNats(folder) as server:
        nc = await nats.connect(server.url)
        adapter = NextStandIn(nc, NAMES, "s1")
        await adapter.store(1, msgspec.json.encode(said))
        await adapter.start()
        await nc.subscribe("wechat.out", cb=on_publish)
        await nc.subscribe("wechat.out.s1", cb=on_publish)
        await nc.flush()
        async with language.run("send", "s1", "hello", NATS_URL=server.url) as send:
            assert await send.ended() == 0, send.said
        async with language.run("echo", "s1", NATS_URL=server.url) as echo:
            await echo.says("answered in-1")
            await until(lambda: adapter.handled == 1, "it is confirmed")
        await nc.close()
    assert [len(tries) for tries in published.values()] == [2, 2]
    assert all(first == second for first, second in published.values())


async def binds(bridge: World, language: Language, cast: Cast) -> None:
    bot = bridge.sim.add_bot()
    environ = {**cast.platform, "BOT_TOKEN": bot.token}
    async with language.run("onboard", "bind", cast.second, bot.bot, **environ) as bind:
        assert await bind.ended() == 0, bind.said
        assert bind.said == "bound\n"
    await until(lambda: bridge.sim.polls(bot.bot).total > 0, "the bot is polled")
    async with language.run("onboard", "bind", "No-1", bot.bot, **environ) as bind:
        assert await bind.ended() == 1
        assert "sandbox" in bind.said
        assert "Traceback" not in bind.said


async def shows(bridge: World, user: str, texts: list[str]) -> None:
    """All of them, in this order, each once."""
    await until(lambda: len(bridge.sim.phone(user)) >= len(texts), "the phone shows the answers")
    assert [shown.text for shown in bridge.sim.phone(user)] == texts
