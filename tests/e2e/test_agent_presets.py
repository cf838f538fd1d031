"""`--agent NAME` as a process, with a stand-in for the agent."""

from __future__ import annotations

from pathlib import Path

from tests.cli import known_agents
from tests.e2e.test_agent import agent_running, settled, shows
from tests.e2e.test_agent_files import shown
from tests.e2e.world import until


async def test_a_known_agent_remembers_each_conversation_and_sends_files(tmp_path: Path) -> None:
    environ, state = known_agents.install(tmp_path), tmp_path / "state"
    async with agent_running(tmp_path, "--agent", "claude", "--state", str(state), **environ) as (made, agent):
        made.say("s1", "one")
        made.say("s1", "two")
        await shows(made, "one", "one, two")
        await settled(made)
        await agent.end()
        await agent.start()
        made.say("s1", "three")
        await shows(made, "one", "one, two", "one, two, three")
        made.say("s1", "/new")
        made.say("s1", "write:$WECHAT_OUT/report.txt")
        await until(lambda: len(shown(made)) == 6, "all are answered")
        assert shown(made)[4:] == [
            ("text", "write:$WECHAT_OUT/report.txt", b""),
            ("file", "report.txt", b"written"),
        ]
