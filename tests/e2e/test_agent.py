"""`wechat-nats agent` as a process, with a real nats-server, adapter and simulator, and the deaths of each."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError

from adapter.agent.texts import TEXTS
from adapter.bridge.entries import messages_of
from adapter.contract.names import read_position
from adapter.contract.records import ReaderRecord
from tests.cli.process import alive
from tests.e2e.world import NAMES, World, eventually, time_ms, until, world
from tests.forks import Forked, fork

PROGRAM = """
import json, os, pathlib, sys, time
text, folder = sys.stdin.read(), pathlib.Path(sys.argv[1])
with (folder / "runs").open("a") as runs:
    run = {"pid": os.getpid(), "at": time.time(), "text": text, "session": os.environ["WECHAT_SESSION"]}
    run["position"] = os.environ["WECHAT_POSITION"]
    runs.write(json.dumps(run) + "\\n")
word = text.partition(" ")[0]
while word == "wait" and not (folder / "go").exists():
    time.sleep(0.01)
if word == "fail":
    sys.exit(3)
if word == "flood":
    print("```" + "\\nx" * 1_000_000)
if word == "environment":
    print(*sorted(name for name in os.environ if "NATS" in name), json.loads(os.environ["WECHAT_MESSAGE"])["user"])
if word != "quiet":
    print("done:", text)
"""


class Agent:
    """The command; with nothing else, with a program that waits for the file `go` where its text says so."""

    def __init__(self, made: World, *options: str, name: str = "agent", serves: str = "s1", **environ: str) -> None:
        self.folder = made.folder / name
        self.folder.mkdir()
        script = self.folder / "program.py"
        script.write_text(PROGRAM)
        program = (
            []
            if {"--acp", "--agent", "--exec", "--http", "--nats-agent", "--openai"} & set(options)
            else [f"--exec={sys.executable} '{script}' '{self.folder}'"]
        )
        self._options = [*program, *([] if "--welcome" in " ".join(options) else ["--welcome="]), *options]
        here = {"NATS_URL": made.url, "WECHAT_NATS_DATA_DIR": str(self.folder), "WECHAT_NATS_LANGUAGE": "en"}
        self._environ = {**here, **environ}
        self._serves = serves
        self.log = self.folder / "log"
        self.process: Forked | None = None

    async def start(self) -> None:
        with self.log.open("ab") as out:
            environ = {**os.environ, **self._environ}
            arguments = ("adapter", "agent", self._serves, *self._options)
            self.process = await fork(*arguments, env=environ, stdout=out, stderr=out)

    async def start_unless_running(self) -> None:
        if self.process is None or self.process.returncode is not None:
            await self.start()

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()

    async def ended(self) -> int:
        """The exit code, once it ends by itself."""
        assert self.process is not None
        return await self.process.wait()

    @property
    def runs(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "runs").read_text().splitlines()]
        return []

    def go(self) -> None:
        (self.folder / "go").touch()


@contextlib.asynccontextmanager
async def agent_running(
    folder: Path, *options: str, mode: str = "ack_on_delivery", **environ: str
) -> AsyncIterator[tuple[World, Agent]]:
    """One adapter, sandbox s1 with the user of a bot, and the command for it. `mode`: what iLink repeats."""
    async with world(folder, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "0"}, quota=0, cursor_mode=mode) as made:
        await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        await nc.close()
        agent = Agent(made, *options, **environ)
        await agent.start()
        try:
            yield made, agent
        except BaseException:
            print(agent.log.read_text(), agent.runs)
            raise
        finally:
            await agent.end(signal.SIGKILL)


async def shows(made: World, *texts: str) -> None:
    """The phone of the user shows these, and nothing else, in this order."""

    def answers() -> list[str]:
        return [text for text in made.phone_texts("s1") if text != TEXTS["en"].working]  # of a minute of work

    await until(lambda: len(answers()) >= len(texts), f"the phone shows {texts}")
    assert answers() == list(texts)


async def settled(made: World) -> None:
    """Every message is confirmed."""
    nc = await made.nc()

    async def all_are() -> bool:
        last = await nc.jetstream().get_last_msg(NAMES.stream_in, NAMES.inbox("s1"))
        return await confirmed(nc) >= (last.seq, len(messages_of(last.data or b"")) - 1)

    await eventually(all_are, "all is confirmed")


async def confirmed(nc: Client) -> tuple[int, int]:
    """The position up to which all messages are, once the server answers."""
    while True:
        try:
            readers = await nc.jetstream().key_value(NAMES.readers)
            return msgspec.json.decode((await readers.get("s1")).value or b'{"v":1}', type=ReaderRecord).place
        except KeyNotFoundError:
            return 0, 0
        except (NatsError, TimeoutError):
            await asyncio.sleep(0.1)


async def test_answers_come_in_order_and_steer_by_two_words(tmp_path: Path) -> None:
    async with agent_running(tmp_path, "--max-output", "100", "--state", str(tmp_path / "state")) as (made, agent):
        for text in ("one", "fail now", "quiet", "flood", "environment", "/new", "two"):
            made.say("s1", text)
        answers = [
            "done: one",
            "That did not work. Please try again.",
            "```\n" + "x\n" * 47 + "x…\n```",
            TEXTS["en"].cut,
            f"{made.bots['s1'].user}\ndone: environment",
            "A new conversation begins.",
            "done: two",
        ]
        await shows(made, *answers)
        made.say("s1", "/stop")
        await shows(made, *answers, "There is nothing to stop.")
        await settled(made)
        sessions = [run["session"] for run in agent.runs]
        assert len(set(sessions[:5])) == 1
        assert sessions[5] not in sessions[:5]
        assert await agent.end() == 0
        await agent.start()
        positions = [read_position(run["position"]) for run in agent.runs]
        assert positions == sorted(set(positions))
        made.say("s1", "three")
        await until(lambda: len(agent.runs) == 7, "the program runs")
        assert agent.runs[6]["session"] == sessions[5]
        assert "done" not in agent.log.read_text()
        assert "exit code 3" in agent.log.read_text()


async def test_a_person_is_welcomed_once_and_told_what_to_write(tmp_path: Path) -> None:
    """In the language of the terminal, and also where the agent is killed in between."""
    async with agent_running(tmp_path, "--welcome=Hi!", WECHAT_NATS_LANGUAGE="", LC_ALL="zh_CN") as (made, agent):
        made.say("s1", "wait for it")
        await shows(made, "Hi!")
        await agent.end(signal.SIGKILL)
        agent.go()
        await agent.start()
        await shows(made, "Hi!", "done: wait for it")
        for text in ("、HELP", "新对话", "／stop ", "/model"):
            made.say("s1", text)
        answers = ["Hi!", "done: wait for it", "已开始新对话。", "当前没有正在处理的内容。", "done: /model"]
        answers += TEXTS["zh"].help.split("\n\n")
        await until(lambda: len(made.phone_texts("s1")) == len(answers), "all are answered")
        assert sorted(made.phone_texts("s1")) == sorted(answers)
        await settled(made)
        nc, other = await made.nc(), made.sim.add_bot()
        await made.bind(nc, "s1", other)
        made.sim.say(other.bot, "hello")
        await until(lambda: len(made.sim.phone(other.user)) == 2, "another person is welcomed, too")
        assert [shown.text for shown in made.sim.phone(other.user)] == ["Hi!", "done: hello"]
        await nc.close()


@pytest.mark.parametrize(("most", "lines"), [(1000, 498), (40_000, 7966)], ids=["bytes", "characters"])
async def test_the_person_is_told_that_an_answer_is_cut(tmp_path: Path, most: int, lines: int) -> None:
    async with agent_running(tmp_path, "--max-output", str(most)) as (made, agent):
        made.say("s1", "flood")
        await until(lambda: TEXTS["en"].cut in made.phone_texts("s1"), "its end is shown")
        *shown, said = made.phone_texts("s1")
        assert (said, shown[-1][-6:], "".join(shown).count("x")) == (TEXTS["en"].cut, "x…\n```", lines)
        assert len(made.sim.phone(made.bots["s1"].user)) <= 10
        (line,) = [line for line in agent.log.read_text().splitlines() if "agent.cut" in line]
        assert "x\\nx" not in line


async def test_stop_ends_the_run_under_way_and_what_waits_goes_on(tmp_path: Path) -> None:
    async with agent_running(tmp_path) as (made, agent):
        made.say("s1", "wait for it")
        await until(lambda: len(agent.runs) == 1, "the program runs")
        made.say("s1", "next")
        made.say("s1", "/stop")
        await until(lambda: len(made.phone_texts("s1")) == 2, "both are answered")
        assert sorted(made.phone_texts("s1")) == ["Stopped.", "done: next"]
        assert not alive(int(agent.runs[0]["pid"]))
        await settled(made)


async def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async with agent_running(tmp_path, "--timeout", "0.5") as (made, agent):
        made.say("s1", "wait for it")
        await shows(made, "That did not work. Please try again.")
        assert not alive(int(agent.runs[0]["pid"]))
        assert '"reason":"timeout"' in agent.log.read_text()


async def test_what_was_in_work_when_the_command_ended_is_answered_once(tmp_path: Path) -> None:
    async with agent_running(tmp_path) as (made, agent):
        made.say("s1", "wait for it")
        made.say("s1", "second")
        await until(lambda: len(agent.runs) == 1, "the program runs")
        await agent.end(signal.SIGTERM)
        await until(lambda: not alive(int(agent.runs[0]["pid"])), "its program ends with it")
        agent.go()
        await agent.start()
        await shows(made, "done: wait for it", "done: second")
        await settled(made)
        await shows(made, "done: wait for it", "done: second")


async def test_after_a_kill_the_next_start_goes_on_at_once_behind_what_was_confirmed(
    tmp_path: Path,
) -> None:
    async with agent_running(tmp_path) as (made, agent):
        for text in ("one", "two"):
            made.say("s1", text)
        await shows(made, "done: one", "done: two")
        await settled(made)
        made.say("s1", "wait for it")
        await until(lambda: len(agent.runs) == 3, "the program runs")
        await agent.end(signal.SIGKILL)
        agent.go()
        await agent.start()
        await shows(made, "done: one", "done: two", "done: wait for it")
        assert [run["text"] for run in agent.runs] == ["one", "two", "wait for it", "wait for it"]
        (line,) = [line for line in agent.log.read_text().splitlines() if '"agent.started"' in line][1:]
        assert agent.runs[-1]["at"] * 1000 - time_ms(json.loads(line)) < 1000


async def test_of_two_commands_the_newer_one_goes_on_and_the_other_says_why_it_ends(tmp_path: Path) -> None:
    async with agent_running(tmp_path) as (made, agent):
        made.say("s1", "wait for it")
        await until(lambda: len(agent.runs) == 1, "the program runs")
        newer = Agent(made, name="newer")
        newer.go()
        await newer.start()
        try:
            await shows(made, "done: wait for it")
            made.say("s1", "two")
            assert agent.process is not None
            assert await agent.process.wait() == 1
            assert "Another agent reads this sandbox now." in agent.log.read_text()
            await until(lambda: not alive(int(agent.runs[0]["pid"])), "its program ends with it")
            await shows(made, "done: wait for it", "done: two")
            await settled(made)
            assert [run["text"] for run in newer.runs] == ["wait for it", "two"]
            assert len(agent.runs) == 1
        finally:
            await newer.end(signal.SIGKILL)


async def test_a_server_that_dies_meanwhile_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async with agent_running(tmp_path) as (made, agent):
        made.say("s1", "wait for it")
        made.say("s1", "second")
        await until(lambda: len(agent.runs) == 1, "the program runs")
        made.server.kill()
        agent.go()
        await until(lambda: not alive(int(agent.runs[0]["pid"])), "the program ends while there is no bus")
        await made.server.start()
        made.say("s1", "third")
        await shows(made, "done: wait for it", "done: second", "done: third")
        await settled(made)
        await shows(made, "done: wait for it", "done: second", "done: third")


class Receiver:
    """A webhook. `responses` are given one after the other, and then an answer to each text."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self.requests: list[web.Request] = []
        self.events: list[dict[str, Any]] = []
        self.responses: list[web.Response] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    @property
    def secret(self) -> str:
        return f"whsec_{base64.b64encode(self.key).decode()}"

    async def on_request(self, request: web.Request) -> web.Response:
        body = await request.read()
        ident, timestamp = request.headers["webhook-id"], request.headers["webhook-timestamp"]
        mac = hmac.new(self.key, f"{ident}.{timestamp}.{body.decode()}".encode(), "sha256").digest()
        assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
        assert abs(int(timestamp) - time.time()) < 60
        self.requests.append(request)
        self.events.append(json.loads(body))
        await self.gate.wait()
        if self.responses:
            return self.responses.pop(0)
        return web.json_response({"reply": f"done: {self.events[-1]['data']['text']}"})

    @property
    def texts(self) -> list[str]:
        return [event["data"]["text"] for event in self.events]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_post("/agent", made.on_request)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/agent"))
        yield made


async def test_a_url_answers_now_later_or_after_it_was_asked_again(tmp_path: Path, receiver: Receiver) -> None:
    receiver.responses = [
        web.Response(status=503),
        web.Response(status=429, headers={"retry-after": "1"}),
        web.json_response({"reply": "first"}),
        web.Response(text="plain"),
        web.Response(status=202),
        web.Response(status=404),
        web.json_response(["no", "such", "thing"]),
    ]
    environ = {"WECHAT_WEBHOOK_SECRET": receiver.secret}
    async with agent_running(tmp_path, "--http", receiver.url, **environ) as (made, agent):
        for text in ("1", "2", "3", "4", "5", "6"):
            made.say("s1", text)
        sorry = "That did not work. Please try again."
        await shows(made, "first", "plain", sorry, sorry, "done: 6")
        await settled(made)
        assert receiver.texts == ["1", "1", "1", "2", "3", "4", "5", "6"]
        ids = [request.headers["webhook-id"] for request in receiver.requests]
        assert len(set(ids[:3])) == 1
        assert ids[0] == receiver.events[0]["data"]["id"]
        assert len(set(ids)) == 6
        assert len({event["session"] for event in receiver.events}) == 1
        positions = [read_position(event["position"]) for event in receiver.events]
        assert positions == sorted(positions)
        assert len(set(positions)) == 6
        log = agent.log.read_text()
        assert receiver.secret not in log
        assert (log.count("agent.failed"), log.count("HTTP 503. The agent is asked again")) == (3, 1)


@pytest.mark.parametrize("victim", ["command", "server", "receiver"])
async def test_a_url_is_asked_again_after_a_death_and_answers_once(
    tmp_path: Path, receiver: Receiver, victim: str
) -> None:
    environ = {"WECHAT_WEBHOOK_SECRET": receiver.secret}
    async with agent_running(tmp_path, "--http", receiver.url, **environ) as (made, agent):
        receiver.gate.clear()
        made.say("s1", "one")
        made.say("s1", "two")
        await until(lambda: len(receiver.requests) == 1, "it is asked")
        if victim == "command":
            await agent.end(signal.SIGKILL)
        elif victim == "server":
            made.server.kill()
        else:
            transport = receiver.requests[0].transport
            assert transport is not None
            transport.abort()
        receiver.gate.set()
        if victim == "command":
            await agent.start()
        elif victim == "server":
            await made.server.start()
        await shows(made, "done: one", "done: two")
        await settled(made)
        await shows(made, "done: one", "done: two")
        assert receiver.texts == (["one", "two"] if victim == "server" else ["one", "one", "two"])


@pytest.mark.slow  # they talk for a minute
async def test_whatever_dies_each_person_has_each_answer_once_and_in_order(tmp_path: Path) -> None:
    """And nothing is given to the program again that was confirmed."""
    rng = random.Random(int(os.environ.get("SEED", "7")))
    # what an adapter has in hand that is killed is lost where iLink does not repeat it
    async with agent_running(tmp_path, mode="cursor_replay") as (made, agent):
        nc, first, other = await made.nc(), made.bots["s1"], made.sim.add_bot()
        await made.bind(nc, "s1", other)
        users = [first, other]
        said: dict[str, list[str]] = {user.user: [] for user in users}
        deaths: list[tuple[tuple[int, int], int]] = []
        """What was confirmed before each death of the command, and how many runs there were."""

        async def talk() -> None:
            for number in range(50):
                user = rng.choice(users)
                for word in range(rng.randint(1, 5)):
                    said[user.user].append(f"done: {number}.{word}")
                    made.sim.say(user.bot, f"{number}.{word}")
                await asyncio.sleep(rng.uniform(0, 1.5))

        async with asyncio.TaskGroup() as group:
            talking = group.create_task(talk())
            while not talking.done():
                await asyncio.sleep(rng.uniform(0.2, 3))
                match rng.choice(["command", "command", "terminated", "server", "adapter"]):
                    case "server":
                        made.server.kill()
                        await made.server.start()
                    case "adapter":
                        await made.adapters[0].kill()
                    case way:
                        place = await confirmed(nc)
                        await agent.end(signal.SIGKILL if way == "command" else signal.SIGTERM)
                        deaths.append((place, len(agent.runs)))
                await agent.start_unless_running()
                await made.adapters[0].start()
        for user, texts in said.items():
            # a send that had no answer is repeated after five minutes at the latest
            await until(lambda: len(made.sim.phone(user)) >= len(texts), "all are answered", patience_s=400)  # noqa: B023
        await settled(made)
        for user, texts in said.items():
            assert [shown.text for shown in made.sim.phone(user)] == texts
        assert len(deaths) > 3
        for place, count in deaths:
            assert all(read_position(run["position"]) > place for run in agent.runs[count:])
