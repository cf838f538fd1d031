"""The whole bridge under the permissions that are shipped: each role can work, and nobody gets at another's.

The adapter has the adapter's user, the platform the platform's, and so on; nothing here is more than an operator
hands out.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.agent import Sandbox as Agent
from adapter.cli.bus import connected_bus
from adapter.cli.exits import Failed
from adapter.cli.permission_checks import Finding, check_acknowledged
from adapter.contract.messages import BindingsPage, Inbound, Login, Media, ReplayPage, Unbind, Window
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_LAST, H_MSG_ID, H_NAME, H_POSITION, H_SHA256, H_UPLOAD
from adapter.settings import read_settings
from adapter.simulator import Simulator, samples
from adapter.tools.permissions import streams
from tests import canary
from tests.bus.guarded import NAMES, NEW_ACKS, TEMPLATES, UNTRUSTED, WITNESS, Guarded, Player, guarded
from tests.e2e.asker import Asker
from tests.e2e.world import AdapterProcess, World, environ_of, eventually, fast, free_port, stream, until

OURS = {H_MSG_ID, H_POSITION}
"""On what the adapter writes for a sandbox: an event, a live message."""


class Sandbox:
    """A program with a sandbox's credentials. Keeps every message that ever reaches it."""

    def __init__(self, name: str, player: Player) -> None:
        self.name, self.nc, self.refusals = name, player.nc, player.refusals
        self.got: list[Msg] = []

    async def listen(self) -> None:
        for subject in (NAMES.live(self.name), NAMES.event(self.name, "*"), NAMES.receipts(self.name)):
            await self.nc.subscribe(subject, cb=self._on_message)
        await self.nc.flush()

    async def _on_message(self, msg: Msg) -> None:
        self.got.append(msg)

    def genuine(self) -> list[Msg]:
        """As `schemas/README.md` tells authors to read: by subject, and the header of what the adapter writes."""
        mine = NAMES.live(self.name), NAMES.event(self.name, "")
        return [m for m in self.got if _is_of(m, *mine) and OURS & set(m.headers or {})]

    def received(self) -> list[str]:
        """The texts of its users."""
        live = [m for m in self.genuine() if m.subject == NAMES.live(self.name)]
        return [msgspec.json.decode(m.data, type=Inbound).text for m in live]

    def outcomes(self) -> list[tuple[str, str]]:
        """Command and outcome of each receipt."""
        subjects = NAMES.receipts(self.name).removesuffix(">")
        receipts = [json.loads(m.data) for m in self.genuine() if m.subject.startswith(subjects)]
        return [(receipt["command"], receipt["outcome"]) for receipt in receipts]

    async def ask(self, verb: str, body: bytes = b"", **headers: str) -> Msg:
        """A request on a subject of its own."""
        msg = await self.nc.request(NAMES.svc(f"{verb}.{self.name}"), body, timeout=10, headers=headers or None)
        self.got.append(msg)
        return msg

    async def bring(self, upload: str, data: bytes) -> Media:
        msg = await self.ask("media.put", data, **{H_UPLOAD: upload, H_LAST: "true", H_NAME: "x.bin"})
        assert H_ERROR not in (msg.headers or {}), msg.headers
        return msgspec.json.decode(msg.data, type=Media)


def _is_of(msg: Msg, live: str, events: str) -> bool:
    return msg.subject == live or msg.subject.startswith(events)


class Scene(NamedTuple):
    """A bridge with two sandboxes that have a bot each."""

    server: Guarded
    world: World
    platform: Player
    service: Player
    witness: Player
    s1: Sandbox
    s2: Sandbox


THOROUGH = ("passwords", "jwt-each")
"""Where what a sandbox can reach is tried at length; `tests/bus/test_permissions.py` tries every subject on all."""


@pytest.fixture(params=(*TEMPLATES, NEW_ACKS))
async def scene(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    async with guarded(tmp_path, request.param) as server, Simulator(fast()) as sim:
        environ = environ_of(server.url, sim) | server.users["adapter"].environ
        world = World(tmp_path, sim, server.url, environ)
        try:
            await world.add_adapter()
            platform, service, witness = [await server.connect(who) for who in ("platform", "service", WITNESS)]
            s1, s2 = [Sandbox(name, await server.connect(name)) for name in ("s1", "s2")]
            for sandbox in (s1, s2):
                await sandbox.listen()
                answer = await world.bind(platform.nc, sandbox.name, sim.add_bot())
                assert answer.outcome == "applied", answer
            leaks: list[str] = []
            yield Scene(server, world, platform, service, witness, s1, s2)
            leaks = await world.leaks()
        finally:
            await world.close()
    assert leaks + canary.leaks_on_disk(tmp_path / "data", world.texts()) == []
    log = (tmp_path / "adapter-0.log").read_text()
    assert "adapter.started" in log
    assert "ermissions" not in log


async def talk(scene: Scene) -> None:
    """Each user writes, and each sandbox hears its own."""
    for sandbox in (scene.s1, scene.s2):
        scene.world.say(sandbox.name, f"hello {sandbox.name}")
    for sandbox in (scene.s1, scene.s2):
        await until(lambda sandbox=sandbox: sandbox.received() == [f"hello {sandbox.name}"], "it hears its user")  # type: ignore[misc]


async def test_every_role_can_do_its_work(scene: Scene) -> None:
    s1, s2, world = scene.s1, scene.s2, scene.world
    await talk(scene)
    # a sandbox: its next messages, replay, window, commands with receipts, media both ways
    assert [message.text for message in await Asker(s1.nc).take()] == ["hello s1"]
    page = msgspec.json.decode((await s1.ask("replay", b"{}")).data, type=ReplayPage)
    assert [msgspec.json.decode(r.message, type=Inbound).text for r in page.messages] == ["hello s1"]

    async def is_open() -> bool:  # it is stored behind the message
        return msgspec.json.decode((await s1.ask("window")).data, type=Window).remaining == 10

    await eventually(is_open, "the window is open")
    world.sim.say_media(world.bots["s1"].bot, "image", samples.png())
    await until(lambda: len(s1.received()) == 2, "the picture comes")
    live = [m for m in s1.genuine() if m.subject == NAMES.live("s1")][-1]
    image, position = json.loads(live.data)["items"][0]["media"], (live.headers or {})[H_POSITION]
    query = {"object": image["object"], "position": position, "wait_s": 8}
    piece = await s1.ask("media.get", json.dumps(query).encode())
    assert hashlib.sha256(piece.data).hexdigest() == (piece.headers or {})[H_SHA256]
    media = await s1.bring("report", b"r" * 100_000)
    command = {"id": "c1", "items": [{"kind": "file", "media": {"object": media.object}, "name": "r.bin"}]}
    await s1.nc.jetstream().publish(NAMES.out("s1"), json.dumps(command).encode())
    await until(lambda: ("c1", "accepted") in s1.outcomes(), "the file is sent")
    # a service: a command for any sandbox, and its receipt
    receipts = await scene.service.nc.subscribe(NAMES.receipts("*"))
    spoken = b'{"id":"c2","sandbox":"s2","text":"from the service"}'
    await scene.service.nc.jetstream().publish(NAMES.out_plain, spoken)
    assert json.loads((await receipts.next_msg(timeout=30)).data)["command"] == "c2"
    await until(lambda: s2.outcomes() == [("c2", "accepted")], "s2 gets the receipt, too")
    assert world.phone_texts("s2") == ["from the service"]
    # the platform: which bindings there are, a login, an end
    ask = scene.platform.nc.request
    listed = msgspec.json.decode((await ask(NAMES.svc("bindings.list"), timeout=10)).data, type=BindingsPage)
    assert {info.sandbox for info in listed.bindings} == {"s1", "s2"}
    login = await ask(NAMES.svc("login.start"), b'{"sandbox":"s3"}', timeout=20)
    assert msgspec.json.decode(login.data, type=Login).qrcode_url
    assert (await world.control(scene.platform.nc, "s2", Unbind(all=True))).outcome == "applied"
    for player in (s1, s2, scene.service, scene.platform):
        assert player.refusals == []
    # what the service says of itself to those who may ask names nobody
    operator = await scene.server.connect("operator")
    described = (await operator.nc.request("$SRV.INFO.wechat-nats", timeout=10)).data
    assert b"wechat.svc.replay.*" in described
    assert not re.search(rb"\bs[12]\b|im\.bot|im\.wechat", described)


@pytest.mark.parametrize("scene", [*THOROUGH, NEW_ACKS], indirect=True)
async def test_who_is_not_trusted_has_commands_stored_by_a_request(scene: Scene) -> None:
    """By itself, or by the library, which finds out what it may; nothing of the headers but the trace is stored."""
    world, user = scene.world, scene.server.users[UNTRUSTED]
    answer = await world.bind(scene.platform.nc, UNTRUSTED, world.sim.add_bot())
    assert answer.outcome == "applied"
    world.say(UNTRUSTED, "hello")
    sandbox = Sandbox(UNTRUSTED, await scene.server.connect(UNTRUSTED))
    await sandbox.listen()
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    hostile = {"traceparent": trace, "Nats-Expected-Last-Msg-Id": "x", "Wechat-Original": "1.1", "Nats-Rollup": "all"}
    stored = json.loads((await sandbox.ask("send", b'{"id":"c1","text":"one"}', **hostile)).data)
    await until(lambda: ("c1", "accepted") in sandbox.outcomes(), "it is sent")
    receipt = [msg for msg in sandbox.genuine() if ".receipt." in msg.subject][-1]
    assert (stored["command"], stored["sequence"]) == ("c1", json.loads(receipt.data)["sequence"])
    assert (receipt.headers or {})["traceparent"] == trace
    unnamed = json.loads((await sandbox.ask("send", b'{"text":"two"}')).data)
    await until(lambda: (unnamed["command"], "accepted") in sandbox.outcomes(), "it has an id")
    for body, code in ((b"{", "400"), (b'{"text":1}', "400"), (bytes(300_000), "400")):
        assert ((await sandbox.ask("send", body)).headers or {})[H_ERROR_CODE] == code
    assert sandbox.refusals == []
    environ = {"NATS_URL": scene.server.url, **user.environ}
    async with Agent(UNTRUSTED, read_settings(environ)) as agent:
        message = await anext(aiter(agent))
        await message.reply("three")
        await message.typing()
        await message.reply("four")
    await until(lambda: sum(outcome == "accepted" for _, outcome in sandbox.outcomes()) >= 5, "all are sent")
    assert world.phone_texts(UNTRUSTED) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("scene", THOROUGH, indirect=True)
async def test_a_sandbox_learns_nothing_of_others_whatever_it_asks(scene: Scene) -> None:
    """Not their names, bots or users; what is theirs and what does not exist look the same."""
    s1, world = scene.s1, scene.world
    await talk(scene)
    other, user = world.bots["s2"].bot, world.bots["s2"].user
    await scene.s2.bring("secret", b"of s2")
    bodies: list[dict[str, Any]] = [
        {},
        *({key: value} for key in ("sandbox", "bot", "user", "object") for value in ("s2", other, user)),
        {"sandbox": "s2", "bot": other, "user": user, "after": 0},
        {"object": "s2/out/secret"},
        {"object": "s1/../s2/out/secret"},
        {"bot": world.bots["s1"].bot, "user": user},
        {"since_ms": 0, "limit": 500},
    ]
    for verb in ("next", "replay", "window", "media.get", "media.put"):
        for body in bodies:
            await s1.ask(verb, json.dumps(body).encode())
    await Asker(s1.nc).take()
    for ident, named in (("c1", {"sandbox": "s2"}), ("c2", {"bot": other}), ("c3", {"user": user}), ("c4", {})):
        command = json.dumps({"id": ident, "text": "hi", **named}).encode()
        await s1.nc.jetstream().publish(NAMES.out("s1"), command)
    await until(lambda: {"c1", "c2", "c3", "c4"} <= {ident for ident, _ in s1.outcomes()}, "all have a receipt")
    outcomes = dict(s1.outcomes())
    assert (outcomes["c1"], outcomes["c2"], outcomes["c4"]) == ("refused", "refused", "accepted")
    assert world.phone_texts("s2") == []
    # no address of another comes back, but where the sandbox said it itself
    said = {msg.data for msg in s1.genuine() if json.loads(msg.data).get("command") in ("c1", "c2", "c3")}
    received = b"\n".join(_whole(msg) for msg in s1.got if msg.data not in said)
    assert b"hello s1" in received
    assert re.findall(rb"""["'./]s2\b|hello s2|of s2""", received) == []
    assert other.encode() not in received
    assert user.encode() not in received
    # its errors are those of nobody
    codes = [(await s1.ask("window", json.dumps({"bot": bot}).encode())).headers for bot in (other, "no@im.bot")]
    assert codes[0] == codes[1]
    assert (codes[0] or {})[H_ERROR_CODE] == "404"
    # the server tells the last Nats-Msg-Id of all to who expects another: in a copy's is nothing of its command
    spoken = b'{"id":"private","sandbox":"s2","text":"from the service"}'
    await scene.service.nc.jetstream().publish(NAMES.out_plain, spoken)
    await until(lambda: ("private", "accepted") in scene.s2.outcomes(), "it is sent")
    expecting = {"Nats-Expected-Last-Msg-Id": "another"}
    answer = (await s1.nc.request(NAMES.out("s1"), b'{"text":"hi"}', timeout=10, headers=expecting)).data
    assert re.search(rb"wrong last msg ID: routed:[0-9a-f]{32}\W", answer), answer
    assert s1.refusals == []


def _whole(msg: Msg) -> bytes:
    return msg.subject.encode() + repr(msg.headers).encode() + msg.data


REPLIES = [
    *("wechat.out.s2", "wechat.out", "wechat.in.s2", "wechat.inbox.s2", "wechat.event.s2.receipt.c1.1"),
    *("wechat.bind.s1", "wechat.unbind.s1", "wechat.erase.s1", "wechat.raw.7.x", "wechat.dead.WECHAT_OUT"),
    *("wechat.adapter.here", "wechat.adapter.polled", "wechat.adapter.polls.x"),
    *("wechat.svc.replay", "wechat.svc.replay.s2", "wechat.svc.bindings.list", "wechat.svc.login.start"),
    *("$KV.wechat_bindings.x", "$KV.wechat_leases.7", "$O.wechat_media.C.x", "$O.wechat_media.M.x"),
    *("$JS.API.STREAM.PURGE.WECHAT_IN", "$JS.API.STREAM.DELETE.WECHAT_DEAD", "$JS.API.STREAM.CREATE.STOLEN"),
    *("$JS.API.CONSUMER.DELETE.WECHAT_IN.s2", "$JS.API.CONSUMER.CREATE.WECHAT_IN.thief"),
    *("$JS.API.CONSUMER.MSG.NEXT.WECHAT_IN.s2", "$JS.ACK.WECHAT_IN.s2.1.2.1.1.0", "$SRV.INFO", "_INBOX_platform.x"),
    *("_INBOX_adapter.x", "_R_.x.y", "$SYS.REQ.USER.INFO"),
]
"""Where the server or the adapter shall write in the place of a sandbox."""


@pytest.mark.parametrize("scene", THOROUGH, indirect=True)
async def test_no_reply_subject_makes_others_write_where_a_sandbox_may_not(scene: Scene) -> None:
    """Its requests have answers that it chose itself: media that read like a command, a message, a binding."""
    s1, s2, world = scene.s1, scene.s2, scene.world
    await talk(scene)
    evil = b'{"sandbox":"s2","text":"evil","bot":"x@im.bot","bot_token":"t","config":{},"id":"evil"}'
    media = await s1.bring("evil", evil)
    world.say("s1", evil.decode())
    await until(lambda: len(s1.received()) == 2, "the user's words come")
    before = await _state(scene.witness.nc)
    received = len(s2.got)
    for subject, body in [
        (NAMES.svc("media.get.s1"), json.dumps({"object": media.object}).encode()),
        (NAMES.svc("replay.s1"), b"{}"),
        (NAMES.svc("window.s1"), b"{}"),
        (NAMES.svc("next.s1"), b"{}"),
        (NAMES.out("s1"), evil),
    ]:
        for reply in REPLIES:
            await s1.nc.publish(subject, body, reply=reply)
    await s1.nc.jetstream().publish(NAMES.out("s1"), b'{"id":"last","text":"the last"}')
    await until(lambda: ("last", "accepted") in s1.outcomes(), "all before it is settled")
    await s1.ask("window")
    await s2.nc.flush()
    assert await _state(scene.witness.nc) == before
    assert world.phone_texts("s2") == []
    foreign = s2.got[received:]
    assert [msg for msg in foreign if scene.server.each or OURS & set(msg.headers or {})] == []
    assert [msg.subject for msg in foreign if msg in s2.genuine()] == []
    assert s2.received() == ["hello s2"]
    assert {text for text in s1.refusals if "publish with reply of" not in text} == set()


async def _state(nc: Client) -> dict[str, Any]:
    """What no sandbox may change: all but its own commands, and what the adapter notes of them and of itself."""
    found: dict[str, Any] = {}
    own = {NAMES.stream_out, NAMES.stream_event, NAMES.stream_in}
    ours = {f"KV_{bucket}" for bucket in (NAMES.persons, NAMES.readers, NAMES.leases)}
    names = json.loads((await nc.request("$JS.API.STREAM.NAMES", timeout=10)).data)["streams"]
    assert set(names) == set(streams(NAMES))
    for name in names:
        if name not in own | ours:
            info = json.loads((await nc.request(f"$JS.API.STREAM.INFO.{name}", timeout=10)).data)
            found[name] = (info["state"]["last_seq"], info["state"]["messages"], info["config"])
    for name, subject in (
        (NAMES.stream_in, NAMES.inbox("*")),
        (NAMES.stream_event, NAMES.event("s2", ">")),
        (f"KV_{NAMES.leases}", f"$KV.{NAMES.leases}.>"),
        (f"KV_{NAMES.bindings}", f"$KV.{NAMES.bindings}.>"),
    ):
        found[subject] = sorted(await stream(nc, name, subject))  # an owner writes its keys again and again
    found["out of others"] = [s for s, _ in await stream(nc, NAMES.stream_out, ">") if not s.endswith(".s1")]
    consumers = json.loads((await nc.request("$JS.API.CONSUMER.NAMES.WECHAT_IN", timeout=10)).data)["consumers"]
    return found | {"consumers": sorted(consumers)}


SERVED, CLOSED = '"wechat.svc.>", "wechat.kv.>"', '"wechat.kv.>"'


async def test_an_adapter_without_a_subscribe_permission_waits_until_it_has_it(tmp_path: Path) -> None:
    """It says what is missing, and is neither started nor ready; once the user may, it starts by itself."""
    port = free_port()

    def status(path: str) -> int:
        with httpx.Client(trust_env=False, timeout=20) as http:
            return http.get(f"http://127.0.0.1:{port}{path}").status_code

    def narrow(text: str) -> str:
        assert text.count(SERVED) == 1
        return text.replace(SERVED, CLOSED)

    async with guarded(tmp_path, edit=narrow) as server, Simulator(fast()) as sim:
        environ = environ_of(server.url, sim) | server.users["adapter"].environ
        adapter = AdapterProcess(environ | {"WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{port}"}, tmp_path / "adapter.log")
        await adapter.start()
        try:

            def reasons() -> list[str]:
                return [line["reason"] for line in adapter.lines("bus.unreachable")]

            await until(lambda: any("may not subscribe wechat.svc." in said for said in reasons()), "it says why")
            for path in ("/startupz", "/readyz"):
                assert await asyncio.to_thread(status, path) == 503
            server.amend(lambda text: text.replace(CLOSED, SERVED, 1))
            await until(lambda: bool(adapter.http_port()), "it starts")
            assert await asyncio.to_thread(status, "/startupz") == 200
        finally:
            await adapter.kill()


async def lacking(port: int | None) -> str:
    """What /readyz says of permissions; "": none is missing."""
    async with httpx.AsyncClient(trust_env=False) as http:
        checks = (await http.get(f"http://127.0.0.1:{port}/readyz")).json()
    return next((check["detail"] for check in checks if check["name"] == "permissions" and not check["ok"]), "")


async def test_a_permission_that_is_taken_away_shows_in_readyz_and_doctor(tmp_path: Path) -> None:
    """Here that to acknowledge in the layout of this server: all else works, and no command ends."""
    acks = '              "$JS.ACK.*.*.WECHAT_OUT.>"\n'

    def narrow(text: str) -> str:
        assert text.count(acks) == 1
        return text.replace(acks, "# none\n")

    async def acknowledged() -> Finding:
        async with connected_bus(read_settings({"NATS_URL": server.url, **server.users["operator"].environ})) as bus:
            (found,) = await check_acknowledged(bus)
            return found

    async with guarded(tmp_path, NEW_ACKS) as server, Simulator(fast()) as sim:
        environ = environ_of(server.url, sim) | server.users["adapter"].environ
        adapter = AdapterProcess(environ, tmp_path / "adapter.log")
        await adapter.start()
        try:
            await until(lambda: bool(adapter.http_port()), "it starts")
            assert await lacking(adapter.http_port()) == ""
            server.amend(narrow)
            await until(lambda: adapter.said("permissions.missing") > 0, "it is told")
            (line,) = adapter.lines("permissions.missing")
            assert "publish $JS.ACK.*.*.WECHAT_OUT.>" in await lacking(adapter.http_port())
            assert (line["severity_text"], line["lacks"]) == ("ERROR", "publish $JS.ACK.*.*.WECHAT_OUT.>")
            found = await acknowledged()
            assert (found.state, "$JS.ACK.*.*.WECHAT_OUT.>" in found.say) == ("fail", True), found
            server.amend(lambda text: text.replace("# none\n", acks))

            async def is_well() -> bool:
                try:
                    return (await acknowledged()).state == "ok"
                except Failed:  # the server has not read its users again yet
                    return False

            await eventually(is_well, "it acknowledges")

            async def is_ready() -> bool:
                return await lacking(adapter.http_port()) == ""

            await eventually(is_ready, "it is ready again")
        finally:
            await adapter.kill()
