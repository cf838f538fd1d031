"""`wechat-nats mcp` as a client of the Model Context Protocol starts it, under the permissions that are shipped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters

from adapter.simulator import BotRecord
from tests.e2e.test_agent_module import Place
from tests.e2e.test_agent_module import place as place  # noqa: PLC0414
from tests.e2e.world import eventually, until


@contextlib.asynccontextmanager
async def served(place: Place, wait_s: float = 30.0) -> AsyncIterator[Client]:
    program = StdioServerParameters(
        command=sys.executable,
        args=["-m", "adapter", "mcp", "s1", "--wait", str(wait_s)],
        env={"PATH": os.environ["PATH"]} | place.environs["s1"],
    )
    async with Client(program) as client:
        yield client


async def told(client: Client, tool: str, **given: Any) -> tuple[bool, Any]:
    """Whether it went well, and what the agent is told."""
    result = await client.call_tool(tool, given)
    return not result.is_error, result.structured_content or result.content[0].text  # type: ignore[union-attr]


async def may_send(client: Client, user: BotRecord) -> None:
    """Waits until the person's message has opened the window."""

    async def is_open() -> bool:
        return bool((await told(client, "window", user=user.user))[1].get("remaining"))

    await eventually(is_open, "the window is open")


async def test_each_tool_tells_what_became_of_it(place: Place, tmp_path: Path) -> None:
    first = place.users[0]
    async with served(place) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert sorted(tools) == ["ask", "send", "send_file", "window"]
        assert "receipt" in (tools["send"].description or "")
        went_well, said = await told(client, "send", text="hello")
        assert (went_well, said["outcome"], said["reason"]) == (True, "refused", "ambiguous_bot")
        went_well, said = await told(client, "send", text="hello", user=first.user)
        assert (went_well, said["outcome"]) == (True, "parked")
        place.world.sim.say(first.bot, "hi")
        await until(lambda: place.texts(first) == ["hello"], "what waited is sent")
        went_well, said = await told(client, "send", text="again", user=first.user)
        assert (went_well, said["outcome"]) == (True, "accepted")
        went_well, said = await told(client, "window", user=first.user)
        assert (went_well, said["remaining"]) == (True, 8)

        file = tmp_path / "report.pdf"
        file.write_bytes(b"%PDF-1.4 report")
        went_well, said = await told(client, "send_file", path=str(file), text="See:", user=first.user)
        assert (went_well, said["outcome"]) == (True, "accepted")
        assert place.texts(first) == ["hello", "again", "See:", ""]
        (view,) = place.world.sim.phone(first.user)[-1].media
        assert (view.file_name, view.md5) == ("report.pdf", hashlib.md5(file.read_bytes()).hexdigest())
        assert await told(client, "send_file", path=str(tmp_path / "none"), user=first.user) == (
            False,
            f"Error executing tool send_file: [Errno 2] No such file or directory: '{tmp_path / 'none'}'",
        )


async def test_a_question_has_the_next_message_of_the_person_who_was_asked(place: Place) -> None:
    asked, other = place.users
    async with served(place) as client:
        for user in (asked, other):
            place.world.sim.say(user.bot, "hi")
        await may_send(client, asked)
        asking = asyncio.create_task(told(client, "ask", text="Which?", user=asked.user))
        await until(lambda: place.texts(asked) == ["Which?"], "the phone shows it")
        place.world.sim.say(other.bot, "not mine")
        place.world.sim.say(asked.bot, "both")
        went_well, said = await asking
        assert (went_well, said["text"], said["user"]) == (True, "both", asked.user)


async def test_a_question_without_an_answer_is_an_error_that_says_why(place: Place) -> None:
    user, other = place.users
    async with served(place, 0.5) as client:
        went_well, said = await told(client, "ask", text="Which?", user=other.user)
        assert (went_well, "not sent: refused, window_closed" in said) == (False, True)
        place.world.sim.say(user.bot, "hi")
        await may_send(client, user)
        went_well, said = await told(client, "ask", text="Which?", user=user.user)
        assert (went_well, said) == (
            False,
            "Error executing tool ask: The question is sent. There was no answer within 0.5 s.",
        )
        went_well, said = await told(client, "send", text="x" * 400_000, user=user.user)
        assert (went_well, "bytes" in said) == (False, True)
