"""One agent for many people: `wechat-nats agent --all`, and `Sandboxes` in Python."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from nats.aio.client import Client

from adapter.agent import Sandbox, Sandboxes
from adapter.agent import sandboxes as sandboxes_module
from adapter.contract.messages import Unbind
from adapter.errors import Refused
from adapter.settings import read_settings
from adapter.simulator import BotRecord, Simulator
from tests.bus.guarded import guarded
from tests.e2e.test_agent import Agent
from tests.e2e.world import NAMES, World, environ_of, eventually, fast, until, world

SETTINGS = {"WECHAT_NATS_SENDS_PER_WINDOW": "0"}


class Town:
    """A bridge with some sandboxes."""

    def __init__(self, made: World, platform: Client, environ: dict[str, str]) -> None:
        self.made = made
        self.platform = platform
        self.environ = environ
        """Of the agent."""
        self.agents: list[Agent] = []

    async def person(self, sandbox: str) -> BotRecord:
        bot = self.made.sim.add_bot()
        assert (await self.made.bind(self.platform, sandbox, bot)).outcome == "applied"
        return bot

    async def agent(
        self, serves: str = "--all", *options: str, name: str = "agent", takes: Sequence[str] = ()
    ) -> Agent:
        """`takes`: sandboxes that another agent has answered in, and that this one has opened on return."""
        before = {sandbox: await self.reader_of(sandbox, 0) for sandbox in takes}
        self.agents.append(Agent(self.made, *options, name=name, serves=serves, **self.environ))
        await self.agents[-1].start()
        for sandbox, number in before.items():
            await self.reader_of(sandbox, number)
        return self.agents[-1]

    async def reader_of(self, sandbox: str, before: int) -> int:
        """What the bucket says of the reader once it is another than before; 0: right after its opening."""
        readers = await self.platform.jetstream().key_value(NAMES.readers)
        found = before

        async def is_another() -> bool:
            nonlocal found
            nonlocal found
            found = json.loads((await readers.get(sandbox)).value or b"{}").get("reader", 0)
            return bool(found != before)

        await eventually(is_another, f"the reader of {sandbox} changes")
        return found

    def shows(self, person: BotRecord, *texts: str) -> bool:
        return [shown.text for shown in self.made.sim.phone(person.user)] == list(texts)

    async def says(self, person: BotRecord, text: str) -> None:
        """And has the answer."""
        before = [shown.text for shown in self.made.sim.phone(person.user)]
        self.made.sim.say(person.bot, text)
        await until(lambda: self.shows(person, *before, f"done: {text}"), f"{text} is answered")


@contextlib.asynccontextmanager
async def built(made: World, platform: Client, environ: dict[str, str]) -> AsyncIterator[Town]:
    town = Town(made, platform, environ)
    try:
        await made.add_adapter()
        yield town
    except BaseException:
        for agent in town.agents:
            print(agent.log.read_text(), agent.runs)
        raise
    finally:
        for agent in town.agents:
            await agent.end(signal.SIGKILL)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with world(tmp_path, environ=SETTINGS, quota=0) as made, built(made, await made.nc(), {}) as town:
        yield town


@pytest.mark.parametrize("template", ["passwords", "jwt-each"])
async def test_one_process_serves_all_at_once_with_the_rights_of_its_role(tmp_path: Path, template: str) -> None:
    """Also a sandbox that is bound later, after a second or two at most."""
    async with guarded(tmp_path, template) as server, Simulator(fast(quota=0)) as sim:
        environs = environ_of(server.url, sim) | server.users["adapter"].environ | SETTINGS
        made = World(tmp_path, sim, server.url, environs)
        environ = dict(server.users["agents"].environ)
        del environ["NATS_INBOX_PREFIX"]
        platform = (await server.connect("platform")).nc
        try:
            async with built(made, platform, environ) as town:
                people = [await town.person(sandbox) for sandbox in ("s1", "s1", "s2")]
                agent = await town.agent()
                for person in people:
                    sim.say(person.bot, "wait for it")
                await until(lambda: len(agent.runs) == 3, "all three are in work at once")
                later = await town.person("team-3")
                began = time.monotonic()
                await town.says(later, "hello")
                assert time.monotonic() - began < 5
                agent.go()
                for person in people:
                    await until(lambda: town.shows(person, "done: wait for it"), "it is answered")  # noqa: B023
                assert len({run["session"] for run in agent.runs}) == 4
                assert await agent.end() == 0
        finally:
            await made.close()


async def test_more_programs_than_may_run_at_once_wait_for_each_other(town: Town) -> None:
    people = [await town.person(sandbox) for sandbox in ("s1", "s2", "s3")]
    agent = await town.agent("--all", "--at-once=2")
    for person in people:
        town.made.sim.say(person.bot, "wait for it")
    await until(lambda: len(agent.runs) == 2, "two are in work")
    began = time.time()
    agent.go()
    for person in people:
        await until(lambda: town.shows(person, "done: wait for it"), "it is answered")  # noqa: B023
    assert agent.runs[2]["at"] > began


async def test_of_two_for_all_the_newer_has_everything_and_the_other_says_so(town: Town) -> None:
    people = [await town.person(sandbox) for sandbox in ("s1", "s2")]
    older = await town.agent()
    for person in people:
        await town.says(person, "one")
    newer = await town.agent(name="newer", takes=("s1", "s2"))
    for person in people:
        await town.says(person, "two")
    assert await older.ended() == 1
    assert "Another agent reads this sandbox now." in older.log.read_text().splitlines()[-1]
    assert [run["text"] for run in older.runs] == ["one", "one"]
    assert [run["text"] for run in newer.runs] == ["two", "two"]


async def test_a_sandbox_that_another_agent_takes_is_left_to_it_and_the_others_go_on(town: Town) -> None:
    special, other, stranger = [await town.person(sandbox) for sandbox in ("team-1", "team-2", "else")]
    everyone = await town.agent("team-*")
    await town.says(special, "one")
    await town.agent("team-1", name="special", takes=["team-1"])
    await town.says(special, "two")
    await town.says(other, "three")
    rebound = await town.made.bind(town.platform, "team-1", special)
    assert rebound.outcome == "applied", "the person has scanned again"
    await town.says(special, "four")
    assert [run["text"] for run in everyone.runs] == ["one", "three"]
    assert '"agent.left"' in everyone.log.read_text()
    town.made.sim.say(stranger.bot, "hello")
    await town.says(other, "five")
    assert town.shows(stranger)


async def test_processes_with_patterns_of_their_own_share_no_folder(town: Town, tmp_path: Path) -> None:
    """Each removes at its start what a kill has left in its own."""
    town.environ = {"WECHAT_NATS_DATA_DIR": str(tmp_path / "shared")}
    one, other = [await town.person(sandbox) for sandbox in ("a1", "b1")]
    first = await town.agent("a*")
    town.made.sim.say(one.bot, "wait for it")
    await until(lambda: len(first.runs) == 1, "the program runs")
    (folder,) = (tmp_path / "shared").glob("*/files/*/out")
    await town.agent("b*", name="second")
    await town.says(other, "hello")
    assert folder.exists()


async def test_what_is_bound_is_served_though_its_event_was_missed_and_no_longer(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandboxes_module, "LIST_S", 0.2)

    async def deaf(*_: object) -> None:
        """Hears no event."""

    monkeypatch.setattr(Sandboxes, "_on_binding", deaf)
    serving: list[str] = []

    async def serve(sandbox: Sandbox) -> None:
        serving.append(sandbox.name)
        try:
            await sandbox.run(lambda message: message.reply(f"done: {message.text}"))  # type: ignore[arg-type, return-value]
        finally:
            serving.remove(sandbox.name)

    settings = read_settings({"NATS_URL": town.made.url})
    running = asyncio.create_task(Sandboxes(settings=settings).run(serve))
    try:
        person = await town.person("s1")
        await until(lambda: serving == ["s1"], "it is served")
        await town.says(person, "hello")
        assert (await town.made.control(town.platform, "s1", Unbind(all=True))).outcome == "applied"
        await until(lambda: serving == [], "it is no longer served")
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_the_credentials_of_a_sandbox_do_not_open_all(tmp_path: Path) -> None:
    async with guarded(tmp_path, "passwords") as server:
        settings = read_settings({"NATS_URL": server.url, **server.users["s1"].environ})
        with pytest.raises(Refused, match="use the credentials of the role agents"):
            await Sandboxes(settings=settings).run(lambda sandbox: sandbox.run(lambda _: asyncio.sleep(0)))
