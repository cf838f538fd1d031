"""An agent that speaks the Agent Client Protocol: one process for all persons, with a session for each.

Its questions for permission go to the person. It gets no file system and no terminal of ours.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import mimetypes
import unicodedata
from asyncio.subprocess import Process
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import acp
from acp import RequestError, schema
from acp.client.connection import ClientSideConnection

from adapter import __version__
from adapter.agent.presets import HINT, Names
from adapter.agent.program import GRACE_S, STDERR, Program, end, last_line
from adapter.agent.runner import Turn
from adapter.errors import Temporary

TITLE_CHARS = 1000
"""Longest name of a tool call in a question; it may be a whole command."""
START_S = 60.0
"""Longest time from the start of the process to its first answer."""


@dataclass
class Conversation:
    """A message that the agent answers."""

    turn: Turn
    said: str = ""
    asked: int = 0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """A person gets one question after the other."""
    questions: set[asyncio.Task[str]] = field(default_factory=set)


@dataclass
class AgentProcess:
    """The agent's process."""

    process: Process
    connection: ClientSideConnection
    can: schema.AgentCapabilities
    copying: asyncio.Task[None]
    """Of its standard error to ours."""
    sessions: set[str] = field(default_factory=set)
    """Those that it has open."""


class AcpAgent(Program):
    """Prompts the agent for each message. A call raises Temporary. `close` ends the process."""

    def __init__(
        self, command: str, folder: Path, *, timeout_s: float, max_output: int, stderr: int = STDERR
    ) -> None:
        """As a Program; `folder`: for what survives a restart."""
        super().__init__(command, folder / "files", timeout_s=timeout_s, max_output=max_output, stderr=stderr)
        self._names = Names(folder / "acp.json")
        self._answering: dict[str, Conversation] = {}
        """By the agent's session."""
        self._peer: asyncio.Task[AgentProcess] | None = None
        self._errors = bytearray()
        logging.getLogger().addFilter(_without_traceback)

    async def close(self) -> None:
        """Ends the process."""
        opening, self._peer = self._peer, None
        if opening is not None:
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled() and opening.exception() is None:
                peer = opening.result()
                await end(peer.process)
                with contextlib.suppress(ConnectionError):  # of what was still to be written
                    await peer.connection.close()
                peer.copying.cancel()

    async def _run(self, turn: Turn, text: str, given: dict[str, str]) -> str:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._prompt(turn, text, given)
        except TimeoutError:
            raise Temporary("timeout", f"The agent took more than {self._timeout_s:g} s.") from None
        except RequestError as exc:
            raise Temporary("agent_error", f"The agent answered with error {exc.code}.", said=str(exc)) from exc
        except ConnectionError as exc:
            await self.close()
            raise Temporary("agent_ended", "The agent has ended.", said=last_line(self._errors)) from exc

    async def _prompt(self, turn: Turn, text: str, given: dict[str, str]) -> str:
        """Raises RequestError, ConnectionError, Temporary."""
        peer = await self._connected()
        session = await self._session(peer, turn.session)
        prompt: list[Any] = [acp.text_block(f"{text}\n\n{HINT.format(out=given['WECHAT_OUT'])}")]
        if peer.can.prompt_capabilities and peer.can.prompt_capabilities.image:
            prompt += await asyncio.to_thread(_images, Path(given["WECHAT_FILES"]))
        conversation = self._answering[session] = Conversation(turn)
        prompting = asyncio.create_task(peer.connection.prompt(session_id=session, prompt=prompt))
        try:
            await asyncio.shield(prompting)
        finally:
            for question in conversation.questions:
                question.cancel()
            if not prompting.done():  # the person, or the time, has ended it
                with contextlib.suppress(ConnectionError):
                    await peer.connection.cancel(session_id=session)
                await asyncio.wait({prompting}, timeout=GRACE_S)
                prompting.cancel()
            del self._answering[session]
        return conversation.said

    async def _connected(self) -> AgentProcess:
        """The running process; another one where it has ended."""
        opening = self._peer
        if opening and opening.done() and (opening.exception() or opening.result().process.returncode is not None):
            await self.close()
        if self._peer is None:
            self._peer = asyncio.create_task(self._open())
        return await asyncio.shield(self._peer)

    async def _open(self) -> AgentProcess:
        """Raises Temporary."""
        process = await self._start(self._command, {})
        assert process.stderr is not None
        self._errors.clear()
        copying = asyncio.create_task(self._copy(process.stderr, self._errors))
        make: Any = lambda _agent: self  # which has what an agent asks for of what it is offered  # noqa: E731
        connection = acp.connect_to_agent(make, process.stdin, process.stdout)
        me = schema.Implementation(name="wechat-nats", version=__version__)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(end, process)
            try:
                async with asyncio.timeout(START_S):
                    about = await connection.initialize(acp.PROTOCOL_VERSION, schema.ClientCapabilities(), me)
            except (TimeoutError, ConnectionError, RequestError) as exc:
                detail = "The program does not speak the Agent Client Protocol."
                raise Temporary("not_started", detail, said=last_line(self._errors)) from exc
            undo.pop_all()
        return AgentProcess(process, connection, about.agent_capabilities or schema.AgentCapabilities(), copying)

    async def _session(self, peer: AgentProcess, ours: str) -> str:
        """The agent's session, loaded or new."""
        folder, session = str(Path.cwd()), self._names.get(ours)
        if session in peer.sessions:
            return session
        if session and peer.can.load_session:
            with contextlib.suppress(RequestError):  # it does not know the session any more
                await peer.connection.load_session(cwd=folder, session_id=session, mcp_servers=[])
                peer.sessions.add(session)
                return session
        session = (await peer.connection.new_session(cwd=folder, mcp_servers=[])).session_id
        self._names.keep(ours, session)
        peer.sessions.add(session)
        return session

    async def session_update(self, session_id: str, update: object, **_: object) -> None:
        """The agent says something. What a session says while it is loaded has been said before."""
        if (conversation := self._answering.get(session_id)) is None:
            return
        match update:
            case schema.AgentMessageChunk(content=schema.TextContentBlock(text=text)):
                conversation.said += text
            case schema.ToolCallStart() if conversation.said:
                conversation.said = conversation.said.rstrip() + "\n\n"

    async def request_permission(
        self, session_id: str, tool_call: schema.ToolCallUpdate, options: list[schema.PermissionOption], **_: object
    ) -> schema.RequestPermissionResponse:
        """The agent asks whether it may use a tool. The end of the answer is the end of the question."""
        conversation = self._answering.get(session_id)
        if conversation is not None and options:
            question = asyncio.create_task(_ask(conversation, tool_call, options))
            conversation.questions.add(question)
            await asyncio.wait({question})
            if not question.cancelled():
                outcome = schema.AllowedOutcome(option_id=question.result(), outcome="selected")
                return schema.RequestPermissionResponse(outcome=outcome)
        return schema.RequestPermissionResponse(outcome=schema.DeniedOutcome(outcome="cancelled"))


async def _ask(
    conversation: Conversation, tool_call: schema.ToolCallUpdate, options: list[schema.PermissionOption]
) -> str:
    """Asks the person until the answer is one of the options, by its number or words: the option's id."""
    texts = conversation.turn.message.sandbox.texts
    kinds = [option.kind for option in options]
    # the agent's words where ours do not tell the options apart
    names = [texts.options[option.kind] if kinds.count(option.kind) == 1 else option.name for option in options]
    title = (tool_call.title or tool_call.kind or "?")[:TITLE_CHARS].replace("```", "` ` `")
    lines = [f"{number}. {name}" for number, name in enumerate(names, 1)]
    # WeChat reads a text as Markdown: outside of a fence it would not show all characters of a command
    question = "\n\n".join([texts.may, f"```\n{title}\n```", *lines, texts.choose])
    async with conversation.asking:
        while True:
            conversation.asked += 1  # several questions may be about one tool call
            ident = f"{tool_call.tool_call_id}-{conversation.asked}"
            answer = unicodedata.normalize("NFKC", await conversation.turn.ask(question, (), ident)).strip(" .。、")
            for number, (name, option) in enumerate(zip(names, options, strict=True), 1):
                if answer.casefold() in (name.casefold(), option.name.casefold(), str(number)):
                    return option.option_id


def _images(folder: Path) -> list[schema.ImageContentBlock]:
    found = []
    for file in sorted(folder.iterdir()):
        mime = mimetypes.guess_type(file.name)[0] or ""
        if mime.startswith("image/"):
            found.append(acp.image_block(base64.b64encode(file.read_bytes()).decode(), mime))
    return found


def _without_traceback(record: logging.LogRecord) -> bool:
    """For what the library logs by the root logger: its errors may have the words of a message."""
    record.exc_info = None
    return True
