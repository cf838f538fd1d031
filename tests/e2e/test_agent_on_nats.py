"""`wechat-nats agent --nats-agent` before a real agent of the Synadia agent protocol, on a server of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from synadia_ai.agent_service import AgentService, PromptStream
from synadia_ai.agents import Attachment, Envelope, ResponseChunk

from adapter.bridge.media import WHY
from adapter.cli.embedded import EmbeddedNats
from adapter.simulator import FaultRule
from tests.e2e.test_agent import agent_running, settled, shows
from tests.e2e.waiting import free_port
from tests.e2e.world import until

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
SORRY = "That did not work. Please try again."


class Host:
    """An agent on a server of its own. It does what the prompt says."""

    def __init__(self, nc: Client) -> None:
        self.prompts: list[Envelope] = []
        self.go = asyncio.Event()
        self.service = AgentService(
            agent="tester", owner="wechat", session_name="main", nc=nc, max_concurrent_prompts=2
        )
        self.service.on_prompt(self._on_prompt)

    async def _on_prompt(self, envelope: Envelope, stream: PromptStream) -> None:
        self.prompts.append(envelope)
        match envelope.prompt:
            case "ask":
                asking = asyncio.create_task(stream.ask("Which one?", timeout=60))
                ended = asyncio.create_task(self.go.wait())
                await asyncio.wait({asking, ended}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                if asking.done():
                    await stream.send(f"You chose {asking.result().prompt}.")
                asking.cancel()
            case "wait":
                await self.go.wait()
                await stream.send("done: wait")
            case "fail":
                raise ValueError("the agent's own fault")
            case "picture":
                await stream.send(ResponseChunk(text="Here: ", attachments=[Attachment.from_bytes("chart.png", PNG)]))
            case _:
                for piece in ("done: ", *envelope.prompt):
                    await stream.send(piece)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedNats]:
    """The agents' own NATS; the sandboxes' is another."""
    async with EmbeddedNats(port=free_port()) as made:
        yield made


@contextlib.asynccontextmanager
async def serving(server: EmbeddedNats) -> AsyncIterator[Host]:
    nc = await nats.connect(server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    host = Host(nc)
    await host.service.start()
    try:
        yield host
    finally:
        host.go.set()
        await host.service.stop()
        await nc.close()


async def test_an_answer_is_one_message_and_a_question_goes_to_the_person(
    tmp_path: Path, server: EmbeddedNats
) -> None:
    options = ("--nats-agent", "tester/wechat")
    async with serving(server) as host, agent_running(tmp_path, *options, AGENTS_NATS_URL=server.url) as (made, _):
        made.say("s1", "hello")
        await shows(made, "done: hello")
        made.say("s1", "ask")
        await shows(made, "done: hello", "Which one?")
        made.say("s1", "the red one")
        made.say("s1", "next")
        shown = ["done: hello", "Which one?", "You chose the red one.", "done: next"]
        await shows(made, *shown)
        made.say("s1", "fail")
        await shows(made, *shown, SORRY)
        assert [envelope.prompt for envelope in host.prompts] == ["hello", "ask", "next", "fail"]
        assert {envelope.extras["wechat_user"] for envelope in host.prompts} == {made.bots["s1"].user}
        assert len({envelope.extras["wechat_session"] for envelope in host.prompts}) == 1
        await settled(made)


async def test_stop_ends_a_question_and_the_next_message_is_a_prompt(tmp_path: Path, server: EmbeddedNats) -> None:
    options = ("--nats-agent", "tester")
    async with serving(server) as host, agent_running(tmp_path, *options, AGENTS_NATS_URL=server.url) as (made, _):
        made.say("s1", "ask")
        await shows(made, "Which one?")
        made.say("s1", "/stop")
        await shows(made, "Which one?", "Stopped.")
        made.say("s1", "hello")
        await shows(made, "Which one?", "Stopped.", "done: hello")
        assert [envelope.prompt for envelope in host.prompts] == ["ask", "hello"]


async def test_media_go_both_ways(tmp_path: Path, server: EmbeddedNats) -> None:
    options = ("--nats-agent", "tester")
    async with serving(server) as host, agent_running(tmp_path, *options, AGENTS_NATS_URL=server.url) as (made, _):
        made.sim.say_media(made.bots["s1"].bot, "image", PNG)
        await until(lambda: len(host.prompts) == 1, "the agent is asked")
        assert host.prompts[0].prompt == "[image]"
        (attached,) = host.prompts[0].attachments or []
        assert (attached.filename, attached.to_bytes()) == ("image.png", PNG)
        made.say("s1", "picture")
        await until(lambda: len(made.sim.phone(made.bots["s1"].user)) == 3, "the phone shows the picture")
        text, picture = made.sim.phone(made.bots["s1"].user)[1:]
        assert text.text == "Here:"
        assert [(view.kind, view.md5) for view in picture.media] == [("image", hashlib.md5(PNG).hexdigest())]


async def test_media_that_cannot_be_had_are_left_out(tmp_path: Path, server: EmbeddedNats) -> None:
    options = ("--nats-agent", "tester")
    async with (
        serving(server) as host,
        agent_running(tmp_path, *options, AGENTS_NATS_URL=server.url) as (made, agent),
    ):
        made.sim.set_fault(FaultRule(fault="F25", endpoint="cdn/download", params={"status": 403}))
        made.sim.say_media(made.bots["s1"].bot, "image", PNG)
        await shows(made, "done: [image]")
        assert [envelope.attachments or [] for envelope in host.prompts] == [[]]
        (line,) = [line for line in agent.log.read_text().splitlines() if '"agent.no_media"' in line]
        assert WHY["unavailable"].removesuffix(".") in line


@pytest.mark.parametrize(
    "victim",
    [
        "command",
        "bus",
        pytest.param("agents' server", marks=pytest.mark.slow),  # a silent agent is waited for, for a minute
        "agent",
    ],
)
async def test_after_a_death_the_prompt_is_answered_once(tmp_path: Path, server: EmbeddedNats, victim: str) -> None:
    options = ("--nats-agent", "tester/wechat/main", "--timeout", "120")
    environ = {"AGENTS_NATS_URL": server.url}
    async with contextlib.AsyncExitStack() as stack:
        hosting = contextlib.AsyncExitStack()
        host = await hosting.enter_async_context(serving(server))
        made, agent = await stack.enter_async_context(agent_running(tmp_path, *options, **environ))
        made.say("s1", "wait")
        made.say("s1", "two")
        await until(lambda: len(host.prompts) == 1, "the agent is asked")
        if victim == "command":
            await agent.end(signal.SIGKILL)
            host.go.set()
            await agent.start()
        elif victim == "bus":
            made.server.kill()
            host.go.set()
            await made.server.start()
        elif victim == "agents' server":
            server.kill()
            await server.start()
            host.go.set()
        else:
            await hosting.aclose()
            host = await stack.enter_async_context(serving(server))
            host.go.set()
        await shows(made, "done: wait", "done: two")
        await settled(made)
        await shows(made, "done: wait", "done: two")
        await hosting.aclose()


async def test_an_agent_that_is_not_there_yet_is_waited_for(tmp_path: Path, server: EmbeddedNats) -> None:
    async with agent_running(tmp_path, "--nats-agent", "tester", AGENTS_NATS_URL=server.url) as (made, agent):
        made.say("s1", "hello")
        await until(lambda: '"reason":"no_agent"' in agent.log.read_text(), "it is looked for")
        async with serving(server):
            await shows(made, "done: hello")
