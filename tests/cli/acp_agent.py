"""An agent that speaks the Agent Client Protocol, by the agent's side of the library. A session is a file of texts in
$AGENT_HOME, and the answer is all of them; some texts do something else."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import acp
from acp.schema import (
    AgentCapabilities,
    InitializeResponse,
    LoadSessionResponse,
    NewSessionResponse,
    PermissionOption,
    PromptCapabilities,
    PromptResponse,
    ToolCallUpdate,
)

HOME = Path(os.environ.get("AGENT_HOME", "."))
OPTIONS = [
    PermissionOption(option_id="always", name="Always Allow", kind="allow_always"),
    PermissionOption(option_id="once", name="Allow", kind="allow_once"),
    PermissionOption(option_id="no", name="Reject", kind="reject_once"),
]


class Agent:
    def __init__(self) -> None:
        self._client: Any = None
        self._sessions: set[str] = set()
        self._stopped = asyncio.Event()

    def on_connect(self, client: Any) -> None:
        self._client = client

    async def initialize(self, protocol_version: int, **_: Any) -> InitializeResponse:
        can = AgentCapabilities(load_session=True, prompt_capabilities=PromptCapabilities(image=True))
        return InitializeResponse(protocol_version=protocol_version, agent_capabilities=can)

    async def new_session(self, **_: Any) -> NewSessionResponse:
        session = str(uuid4())
        (HOME / session).touch()
        self._sessions.add(session)
        return NewSessionResponse(session_id=session)

    async def load_session(self, session_id: str, **_: Any) -> LoadSessionResponse:
        if not (HOME / session_id).exists():
            raise acp.RequestError.resource_not_found(session_id)
        self._sessions.add(session_id)
        await self._say(session_id, "what was said before")
        return LoadSessionResponse()

    async def cancel(self, **_: Any) -> None:
        self._stopped.set()

    async def prompt(self, prompt: list[Any], session_id: str, **_: Any) -> PromptResponse:
        assert session_id in self._sessions
        text = prompt[0].text.partition("\n\n[Files that you write into ")[0]
        with (HOME / session_id).open("a") as history:
            history.write(text + "\n")
        match text.split():
            case ["tools", *titles]:
                await self._say(session_id, "Let me see.")
                asked = [self._may(session_id, title) for title in titles]
                await self._say(session_id, "I may: " + ", ".join(await asyncio.gather(*asked)))
            case ["wait"]:
                await self._say(session_id, "I begin")
                self._stopped.clear()
                (HOME / "waits").touch()
                await self._stopped.wait()
                (HOME / "stopped").touch()
                return PromptResponse(stop_reason="cancelled")
            case ["die"]:
                print("out of memory", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["ask", "and", "die"]:
                question = asyncio.create_task(self._may(session_id, "one"))
                while not (HOME / "asked").exists():
                    await asyncio.wait({question}, timeout=0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["refuse"]:
                raise acp.RequestError.auth_required()
            case ["[image:", _]:
                (image,) = prompt[1:]
                await self._say(session_id, f"{image.mime_type} {len(base64.b64decode(image.data))}")
            case _:
                texts = ", ".join((HOME / session_id).read_text().splitlines())
                await self._say(session_id, texts[:2])
                await self._say(session_id, texts[2:])
        return PromptResponse(stop_reason="end_turn")

    async def _say(self, session: str, text: str) -> None:
        await self._client.session_update(session, acp.update_agent_message_text(text))

    async def _may(self, session: str, title: str) -> str:
        await self._client.session_update(session, acp.start_tool_call("call_1", title))
        call = ToolCallUpdate(tool_call_id="call_1", title=title)
        outcome: Any = (
            await self._client.request_permission(session_id=session, tool_call=call, options=OPTIONS)
        ).outcome
        return f"{title} {getattr(outcome, 'option_id', outcome.outcome)}"


if __name__ == "__main__":
    agent: Any = Agent()
    asyncio.run(acp.run_agent(agent))
