"""`--acp COMMAND`, with an agent of the protocol's library as a child process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from adapter.agent import Message, Sandbox
from adapter.agent.acp import AcpAgent
from adapter.agent.runner import Turn
from adapter.contract.messages import ImageItem, Inbound, Media, OutItem
from adapter.errors import Temporary
from adapter.settings import Settings
from adapter.simulator import samples
from tests.cli import acp_agent as stand_in
from tests.cli.process import until
from tests.cli.test_agent import turn

COMMAND = f"{sys.executable} {stand_in.__file__}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
async def agent(home: Path) -> AsyncIterator[AcpAgent]:
    made = AcpAgent(COMMAND, home, timeout_s=30, max_output=1000)
    yield made
    await made.close()


def said(text: str, *answers: str, asked: list[tuple[str, str]] | None = None) -> Turn:
    """A message of a person who answers questions like this, and then no more."""
    left = list(answers)

    async def ask(question: str, _items: Sequence[OutItem], ident: str) -> str:
        (asked if asked is not None else []).append((question, ident))
        return left.pop(0) if left else await asyncio.Future()

    return turn(text)._replace(ask=ask)


async def test_each_question_is_asked_until_it_is_answered(agent: AcpAgent) -> None:
    """One after the other, although the agent asks them at once and of one tool call."""
    asked: list[tuple[str, str]] = []
    answer = await agent(said("tools one two three four", "what?", "１", "allow once", "reject", "3。", asked=asked))
    assert answer.text == "Let me see.\n\nI may: one always, two once, three no, four no"
    assert asked[0][0] == (
        "May I?\n\n```\none\n```\n\n1. Always allow\n\n2. Allow once\n\n3. Reject\n\nPlease answer with a number."
    )
    assert [question.split()[3] for question, _ in asked] == ["one", "one", "two", "three", "four"]
    assert len({ident for _, ident in asked}) == len(asked)


async def test_the_end_of_an_answer_is_that_of_its_question(agent: AcpAgent) -> None:
    asked: list[tuple[str, str]] = []
    run = asyncio.ensure_future(agent(said("tools one", asked=asked)))
    await until(lambda: asked)
    run.cancel()
    await asyncio.wait({run})
    assert run.cancelled()
    assert (await agent(said("next"))).text == "tools one, next"


async def test_the_end_of_an_agent_is_that_of_its_question(agent: AcpAgent, home: Path) -> None:
    """Otherwise the person's next message would be taken for the answer."""
    ended = asyncio.Event()

    async def ask(_question: str, _items: Sequence[OutItem], _ident: str) -> str:
        (home / "asked").touch()
        try:
            return await asyncio.Future()
        finally:
            ended.set()

    with pytest.raises(Temporary, match="The agent has ended"):
        await agent(said("ask and die")._replace(ask=ask))
    await asyncio.wait_for(ended.wait(), 10)


async def test_a_person_does_not_wait_for_the_answer_of_another(agent: AcpAgent) -> None:
    asked: list[tuple[str, str]] = []
    first = asyncio.ensure_future(agent(said("tools one", asked=asked)))
    await until(lambda: asked)
    other = said("hello")
    other = other._replace(session="other", message=Message(other.message.sandbox, "8.0", other.message.inbound))
    assert (await agent(other)).text == "hello"
    assert not first.done()
    first.cancel()


async def test_a_picture_is_part_of_the_prompt(agent: AcpAgent) -> None:
    picture = samples.jpeg()
    media = Media(object="o", mime="image/jpeg", size=len(picture))
    about = {"id": "m", "sandbox": "s1", "bot": "b", "user": "u", "sent_at_ms": 0, "received_at_ms": 0, "text": ""}
    inbound = msgspec.convert(about | {"items": [ImageItem(media=media)]}, Inbound)
    sandbox = Sandbox("s1", Settings())

    async def read_media(*_: object) -> bytes:
        return picture

    sandbox.read_media = read_media  # type: ignore[method-assign, assignment]
    asked = said("")._replace(message=Message(sandbox, "7.0", inbound))
    assert (await agent(asked)).text == f"image/jpeg {len(picture)}"


async def test_an_agent_that_ends_is_started_again_with_the_session(agent: AcpAgent, home: Path) -> None:
    assert (await agent(said("one"))).text == "one"
    with pytest.raises(Temporary, match="The agent has ended") as failure:
        await agent(said("die"))
    assert failure.value.said == "out of memory"
    assert (await agent(said("two"))).text == "one, die, two"
    with pytest.raises(Temporary, match="error -32000") as failure:
        await agent(said("refuse"))
    assert failure.value.said == "Authentication required"
    await agent.close()
    for session in home.glob("*-*-*-*-*"):  # noqa: ASYNC240
        session.unlink()
    assert (await agent(said("three"))).text == "three"


async def test_a_program_that_does_not_speak_the_protocol_is_told(home: Path) -> None:
    agent = AcpAgent("sh -c 'echo no such option >&2'", home, timeout_s=30, max_output=1000)
    with pytest.raises(Temporary, match="does not speak the Agent Client Protocol") as failure:
        await agent(said("one"))
    assert failure.value.said == "no such option"
