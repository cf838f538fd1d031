"""`--acp COMMAND` as a process: questions to a person, stop, and restarts."""

from __future__ import annotations

import sys
from pathlib import Path

from adapter.simulator import samples
from tests.cli import acp_agent as stand_in
from tests.e2e.test_agent import agent_running, settled, shows
from tests.e2e.world import until

QUESTION = [
    "May I?",
    "```\n`rm`\n```",
    "1. Always allow",
    "2. Allow once",
    "3. Reject",
    "Please answer with a number.",
]


async def test_an_agent_asks_the_person_and_is_stopped_by_them(tmp_path: Path) -> None:
    options = ("--acp", f"{sys.executable} {stand_in.__file__}", "--state", str(tmp_path / "state"))
    environ = {"AGENT_HOME": str(tmp_path), "WECHAT_NATS_LANGUAGE": "en"}
    async with agent_running(tmp_path, *options, **environ) as (made, agent):
        made.say("s1", "tools `rm`")
        await shows(made, *QUESTION)
        picture = samples.jpeg()  # which is no answer, and waits
        made.sim.say_media(made.bots["s1"].bot, "image", picture)
        made.say("s1", "2")
        texts = [*QUESTION, "Let me see.", "I may: `rm` once", f"image/jpeg {len(picture)}"]
        made.say("s1", "/new")
        texts += ["A new conversation begins."]
        await shows(made, *texts)
        made.say("s1", "tools `rm`")
        await shows(made, *texts, *QUESTION)
        made.say("s1", "/stop")
        made.say("s1", "wait")
        await until((tmp_path / "waits").exists, "the agent works")
        made.say("s1", "/stop")
        made.say("s1", "1")
        texts += [*QUESTION, "Stopped.", "Stopped.", "tools `rm`, wait, 1"]
        await shows(made, *texts)
        assert (tmp_path / "stopped").exists()
        await settled(made)
        assert await agent.end() == 0
        await agent.start()
        made.say("s1", "again")
        await shows(made, *texts, f"{texts[-1]}, again")
        assert "rm" not in agent.log.read_text()
