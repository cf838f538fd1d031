"""An agent on NATS, by the Synadia agent protocol: each message discovers and prompts it.

The chunks of its response become one answer, which uses few sends. A question of the agent goes to the user, whose
next message answers it.
"""

from __future__ import annotations

import asyncio
import contextlib
from binascii import Error as Base64Error
from collections.abc import Sequence
from json import JSONDecodeError
from typing import Any

from nats.errors import Error as NatsError
from synadia_ai.agents import (
    Agent,
    Agents,
    Attachment,
    DiscoverFilter,
    Envelope,
    NatsAgentError,
    Query,
    ResponseChunk,
)

from adapter.agent.runner import Answer, Turn, cut, until_answered
from adapter.agent.sandbox import Message
from adapter.contract.messages import OutItem
from adapter.contract.quotes import kind_of
from adapter.errors import AdapterError, Refused, Temporary

ITEMS = 10
"""Most attachments of an answer, because a window has no more sends."""
SILENT_S = 90.0
"""Longest time between two chunks: three heartbeats of the protocol. It starts with the first chunk, since a prompt
may wait behind others, and another prompt would only make that queue longer."""
ROOM = 0.7
"""Share of a message for the bytes of attachments, which base64 makes a third larger."""


class NatsAgent:
    """Prompts an agent for each answer. A call raises Refused, and Temporary if no agent was found for GIVE_UP_S."""

    def __init__(self, agents: Agents, address: str, *, timeout_s: float, max_output: int) -> None:
        """`address`: NAME[/OWNER[/SESSION]]. `timeout_s`: for the whole answer, including the time of questions."""
        name, owner, session = [*address.split("/"), "", ""][:3]
        self._address = address
        self._agents = agents
        self._filter = DiscoverFilter(agent=name, owner=owner or None, session_name=session or None)
        self._timeout_s = timeout_s
        self._max_output = max_output

    async def check(self) -> None:
        """Raises Temporary, with the agents that are there, if this one is not, and Refused if several are."""
        try:
            await self._find()
        except Temporary as exc:
            if exc.reason != "no_agent":
                raise
            found = await self._agents.discover()
            names = sorted({"/".join(filter(None, (each.agent, each.owner, each.session_name))) for each in found})
            said = f"Those that are there: {', '.join(names)}." if names else "No agent is there."
            raise Temporary("no_agent", f"There is no agent {self._address}. {said}") from exc

    async def __call__(self, turn: Turn) -> Answer:
        async def ask() -> Answer:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._prompt(await self._find(), turn)
            except TimeoutError:
                raise Refused("timeout", f"There was no answer within {self._timeout_s:g} s.") from None

        return await until_answered(turn, ask)

    async def _find(self) -> Agent:
        """Raises Temporary if there is no agent now, Refused if there are several."""
        try:
            found = {agent.prompt_subject: agent for agent in await self._agents.discover(filter=self._filter)}
        except (NatsError, TimeoutError) as exc:
            raise Temporary("unreachable", type(exc).__name__) from exc
        if not found:
            raise Temporary("no_agent", "No agent of this name is there.")
        if len(found) > 1:
            raise Refused("ambiguous", f"{len(found)} agents have this name: add /OWNER/SESSION.")
        return next(iter(found.values()))

    async def _prompt(self, agent: Agent, turn: Turn) -> Answer:
        """Raises Temporary if the agent has gone away, Refused if it fails."""
        message, text = turn.message, ""
        items: list[OutItem] = []
        prompt = message.text or f"[{', '.join(kind_of(item) for item in message.inbound.items)}]"
        about: dict[str, Any] = {"wechat_session": turn.session, "wechat_user": message.user}
        envelope = Envelope(prompt=prompt, **about)
        try:
            attached = await _attachments(message, agent)
            stream = agent.prompt(envelope, attachments=attached, timeout=self._timeout_s, max_wait_s=self._timeout_s)
            async with contextlib.aclosing(stream) as chunks, asyncio.timeout(None) as silence:  # type: ignore[type-var]
                async for chunk in chunks:
                    silence.reschedule(None)
                    if isinstance(chunk, Query):
                        shown = await _items(message, chunk.attachments)
                        await chunk.reply(await turn.ask(chunk.prompt, shown, chunk.id))
                    elif isinstance(chunk, ResponseChunk):
                        text += chunk.text
                        items += await _items(message, (chunk.attachments or ())[: ITEMS - len(items)])
                        if len(text) > self._max_output:  # the answer ends here, whatever else the agent says
                            break
                    silence.reschedule(asyncio.get_running_loop().time() + SILENT_S)
        except (TimeoutError, NatsError) as exc:
            raise Temporary("unreachable", type(exc).__name__) from exc
        except NatsAgentError as exc:
            if isinstance(exc.__cause__, JSONDecodeError):  # the server's message that nobody listens is no JSON
                raise Temporary("unreachable", "Nobody took the prompt.") from exc
            raise Refused("agent_error", type(exc).__name__) from exc
        text, is_cut = cut(text, self._max_output)
        return Answer(text, tuple(items), is_cut=is_cut)


async def _attachments(message: Message, agent: Agent) -> list[Attachment]:
    """The user's media that the agent accepts, without those that cannot be had."""
    endpoint = agent.prompt_endpoint
    if not endpoint.attachments_ok:
        return []
    room = (endpoint.max_payload_bytes or 0) * ROOM - len(message.text.encode())
    return [Attachment.from_bytes(file.name, file.data) async for file in message.media(room) if file.data]


async def _items(message: Message, attachments: Sequence[Attachment] | None) -> list[OutItem]:
    """The attachments of an agent as items. Raises Refused, Temporary."""
    items: list[OutItem] = []
    for attachment in attachments or ():
        try:
            data = attachment.to_bytes()
        except (Base64Error, ValueError):
            raise Refused("agent_error", "An attachment is no base64.") from None
        try:
            items.append(await message.sandbox.item_of(data, attachment.filename))
        except AdapterError as exc:
            raise Refused("media", exc.detail) from exc
    return items
