"""An agent behind any server with OpenAI's chat interface: `POST <URL>/chat/completions`, without streaming.

The server remembers nothing, so each request has the latest turns of the person's conversation, from a file for each
person. Pictures go along as data URLs, once: the history has only that there was one.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import structlog

from adapter.agent.runner import Answer, Turn, cut, replace_json, until_answered
from adapter.agent.webhook import CHECK_S, INLINE_BYTES, WITH_MEDIA, check_status, read_body
from adapter.contract.names import digest
from adapter.contract.quotes import kind_of
from adapter.errors import UNDECODABLE, Refused, Temporary
from adapter.tools.media_types import identify

log = structlog.get_logger()

RESPONSE_BYTES = 4 * 1024 * 1024
"""Largest response: beside the text it may have what the model was thinking."""


class History(msgspec.Struct):
    """A person's conversation."""

    session: str = ""
    """The turns are of this one. In another session the conversation begins anew."""
    turns: list[tuple[str, str, str]] = []
    """Id of the message, what the person said, what the model said."""


class ChatAgent:
    """Asks a model for each answer. A call raises Refused for a response that a repeat would not change, and
    Temporary after GIVE_UP_S of repeats."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        model: str,
        folder: Path,
        *,
        key: str,
        system: str,
        turns: int,
        timeout_s: float,
        max_output: int,
    ) -> None:
        """`url`: with the version, as in https://api.openai.com/v1. `folder`: for the conversations. `key`: "": none.
        `system`: what the model is told first. `turns`: most earlier turns in a request. `timeout_s`: for a response.
        `max_output`: most bytes of an answer."""
        self._http = http
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        self._model = model
        self._folder = folder
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns = turns
        self._timeout_s = timeout_s
        self._max_output = max_output
        self._with_media = asyncio.Semaphore(WITH_MEDIA)

    async def check(self) -> None:
        """Raises Temporary if nothing answers, Refused if the server refuses the key."""
        try:
            async with asyncio.timeout(CHECK_S):
                answer = await self._http.get(f"{self._url}/models", headers=self._headers)
        except (httpx.TransportError, TimeoutError) as exc:
            raise Temporary("unreachable", f"No answer at {self._url}: {str(exc) or 'timeout'}.") from exc
        if answer.status_code in (401, 403):
            raise Refused("key", f"The server refuses the key (HTTP {answer.status_code}): see OPENAI_API_KEY.")

    async def __call__(self, turn: Turn) -> Answer:
        message, file = turn.message, self._folder / f"{digest(turn.message.user.encode())}.json"
        turns = _read(file, turn.session)
        if turns and turns[-1][0] == message.id:  # it comes again after a crash
            return Answer(turns[-1][2])
        pictured = any(kind_of(item) == "image" for item in message.inbound.items)
        others = [f"[{kind}]" for kind in map(kind_of, message.inbound.items) if kind not in ("text", "voice")]
        words = "\n".join(filter(None, (message.text, *others))) or "[voice]"

        async def ask() -> str:
            if not pictured:
                return await self._ask(turns, words)
            async with self._with_media:  # fetched for each try: kept for an hour, they would take memory
                pictures = [_shown(file.data) async for file in message.media(INLINE_BYTES) if file.kind == "image"]
                try:
                    return await self._ask(turns, [{"type": "text", "text": words}, *filter(None, pictures)])
                except Refused as exc:
                    if exc.reason != "status":
                        raise
            return await self._ask(turns, words)  # the model may take no pictures

        text, is_cut = cut(await until_answered(turn, ask), self._max_output)
        turns.append((message.id, words, text))
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_json(file, History(turn.session, turns[-max(self._turns, 1) :]))
        except OSError as exc:
            log.error("agent.session_not_stored", detail=str(exc))
        return Answer(text, is_cut=is_cut)

    async def _ask(self, turns: Sequence[tuple[str, str, str]], content: str | list[dict[str, Any]]) -> str:
        """The text of the answer. Raises Refused, Temporary."""
        messages: list[dict[str, Any]] = [*self._system]
        for _, user, assistant in turns[-self._turns :] if self._turns else ():
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages.append({"role": "user", "content": content})
        body = {"model": self._model, "messages": messages}
        try:
            async with asyncio.timeout(self._timeout_s):
                request = self._http.stream("POST", f"{self._url}/chat/completions", json=body, headers=self._headers)
                async with request as response:
                    answer = await read_body(response, RESPONSE_BYTES)
        except (httpx.TransportError, TimeoutError) as exc:
            raise Temporary("unreachable", type(exc).__name__) from exc
        check_status(response, _code(answer))
        try:
            text = msgspec.json.decode(answer)["choices"][0]["message"]["content"]
        except (*UNDECODABLE, KeyError, IndexError, TypeError):
            raise Refused("response", "The response is none of OpenAI's chat interface.") from None
        if not isinstance(text, str) or not text.strip():
            raise Refused("response", "The model has said nothing.")
        return text


def _read(file: Path, session: str) -> list[tuple[str, str, str]]:
    """The turns of this session. A file that cannot be read is as none: the conversation begins anew."""
    try:
        history = msgspec.json.decode(file.read_bytes(), type=History)
    except (OSError, *UNDECODABLE):
        return []
    return history.turns if history.session == session else []


def _shown(data: bytes) -> dict[str, Any] | None:
    """A picture as a part of a request; None: there is none."""
    mime = identify(data).mime if data else ""
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}} if mime.startswith("image/") else None


def _code(body: bytes) -> str:
    """The code of an error. No more of it: its text may have the key, or what the person said."""
    found = re.search(rb'"code"\s*:\s*"([a-z0-9_]{1,60})"', body)
    return found[1].decode() if found else ""
