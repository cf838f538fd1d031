"""`--agent NAME`: each run resumes the person's conversation. Stand-ins have the command lines of the real agents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapter.agent.presets import PRESETS, PresetAgent
from adapter.agent.runner import Answer, Turn
from adapter.contract.messages import Media, OutFile
from adapter.errors import SettingsError, Temporary
from tests.cli import known_agents
from tests.cli.test_agent import turn

FAILED = {
    "claude": "Not logged in · Please run /login",
    "codex": "Missing environment variable: `OPENAI_API_KEY`.",
    "gemini": "[API Error: no such key]",
    "opencode": "no such key",
}
every_preset = pytest.mark.parametrize("name", PRESETS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the agents' conversations."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, value in known_agents.install(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def agent(command: str, folder: Path, most: int = 1000) -> PresetAgent:
    return PresetAgent(command, folder, timeout_s=30, max_output=most)


def said(text: str, session: int = 1) -> Turn:
    return turn(text)._replace(session=f"00000000-0000-4000-8000-{session:012}")


@every_preset
async def test_an_agent_remembers_each_conversation_over_restarts(name: str, tmp_path: Path) -> None:
    first = agent(name, tmp_path)
    assert (await first(said("one"))).text == "one"
    assert (await first(said("two"))).text == "one, two"
    assert (await first(said("other", session=2))).text == "other"
    assert await agent(name, tmp_path, most=10)(said("three")) == Answer("one, two, ", is_cut=True)


@every_preset
async def test_a_conversation_that_the_agent_has_lost_begins_anew(name: str, tmp_path: Path, home: Path) -> None:
    await agent(name, tmp_path)(said("one"))
    (conversation,) = list(home.glob("conversation-*"))  # noqa: ASYNC240
    conversation.unlink()
    again = agent(name, tmp_path)
    assert (await again(said("two"))).text == "two"
    assert (await again(said("three"))).text == "two, three"


@every_preset
async def test_without_its_file_an_agent_goes_on_if_it_takes_our_name(name: str, tmp_path: Path) -> None:
    await agent(name, tmp_path)(said("one"))
    (tmp_path / f"{name}.json").write_text("no JSON")
    goes_on = PRESETS[name].takes_name
    assert (await agent(name, tmp_path)(said("two"))).text == ("one, two" if goes_on else "two")


@every_preset
async def test_a_failure_is_told_in_the_words_of_the_agent_and_costs_no_history(name: str, tmp_path: Path) -> None:
    first = agent(name, tmp_path)
    await first(said("one"))
    with pytest.raises(Temporary, match=f"{name} ended with exit code") as failure:
        await first(said("fail"))
    assert failure.value.said == FAILED[name]
    assert (await first(said("two"))).text == "one, fail, two"


@every_preset
async def test_an_agent_writes_into_the_folder_of_its_message_alone(name: str, tmp_path: Path) -> None:
    sent = []

    async def item_of(file: Path) -> OutFile:
        sent.append(file)
        return OutFile(media=Media(object="o", mime="text/plain", size=1))

    out, elsewhere = tmp_path / "files" / f"7.0-{os.getpid()}" / "out" / "report.txt", tmp_path / "report.txt"
    for path in (out, elsewhere):
        asked = said(f"write:{path}")
        asked.message.sandbox.item_of = item_of  # type: ignore[method-assign, assignment]
        await agent(name, tmp_path)(asked)
    assert sent == [out]
    assert not elsewhere.exists()


async def test_options_reach_the_agent_and_those_it_does_not_know_are_told(tmp_path: Path) -> None:
    assert (await agent("codex -m o3", tmp_path)(said("one"))).text == "one"
    with pytest.raises(Temporary) as failure:
        await agent("claude --modle opus", tmp_path)(said("one"))
    assert "unrecognized arguments: --modle opus" in failure.value.said


def test_an_agent_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="claude, codex, gemini, opencode"):
        agent("cloud", tmp_path)
