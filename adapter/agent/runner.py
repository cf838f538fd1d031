"""Connects an agent that exists to a sandbox: one conversation per user, and the two words that steer it.

`/new` begins a new session, in its turn behind the messages before it. `/stop` ends what is in work for its user at
once, and what waits goes on. A session's name is made of the user and of the id of their last `/new`, so that only
these ids are kept, in a file; without that file a user is back in their first session after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import NAMESPACE_URL, uuid5

import msgspec
import structlog
from nats.errors import Error as NatsError

from adapter.agent.sandbox import Message, Sandbox
from adapter.contract.messages import OutItem
from adapter.contract.names import digest
from adapter.errors import AdapterError, Temporary
from adapter.kit.timing import backoff

log = structlog.get_logger()

NEW, STOP = "/new", "/stop"
STARTED_ANEW = "A new conversation begins."
STOPPED = "Stopped."
IDLE = "There is nothing to stop."
SORRY = "That did not work. Please try again."
TYPING_AFTER_S, TYPING_S = 0.5, 240.0
"""When typing is shown, and again: WeChat's lasts for five minutes, and a quick answer needs none."""

GIVE_UP_S = 3600.0
"""After so long a message is given up, and its user told so: their next ones wait behind it."""
CUT = "…"


class Answer(NamedTuple):
    """What an agent has to say; nothing: no answer now."""

    text: str = ""
    items: tuple[OutItem, ...] = ()


class Turn(NamedTuple):
    """A message for an agent."""

    message: Message
    session: str
    ask: Callable[[str, Sequence[OutItem], str], Awaitable[str]]
    """Puts a question (text, items, its id) to the user, and returns the text of their next message."""


Agent = Callable[[Turn], Awaitable[Answer]]
"""Answers a message. Raises AdapterError, whose `reason` and `detail` go to the log."""


def cut(output: bytes, most: int) -> str:
    """Text of at most so many bytes, and a sign where there is more."""
    if len(output) > most:
        return output[:most].decode(errors="ignore") + CUT
    return output.decode(errors="replace")


async def until_answered(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """What `ask` returns once it raises Temporary no more. Raises Temporary after GIVE_UP_S."""
    failures, began = 0, time.monotonic()
    while True:
        try:
            return await ask()
        except Temporary as exc:
            failures += 1
            wait_s = exc.retry_after_s or backoff(failures)
            if time.monotonic() + wait_s - began > GIVE_UP_S:
                raise
            log.info("agent.retrying", reason=exc.reason, detail=exc.detail, wait_s=wait_s)
            await asyncio.sleep(wait_s)


class Sessions:
    """The name of each user's session: a UUID, the same for as long as the user does not begin a new one."""

    def __init__(self, sandbox: str, file: Path | None = None) -> None:
        """`file`: where the ids of the last `/new` are kept; None: nowhere. Raises OSError, UNDECODABLE."""
        self._sandbox = sandbox
        self._file = file
        self._begun: dict[str, str] = {}
        if file is not None and file.exists():
            self._begun = msgspec.json.decode(file.read_bytes(), type=dict[str, str])

    def session_of(self, user: str) -> str:
        return str(uuid5(NAMESPACE_URL, f"wechat-nats:{self._sandbox}:{user}:{self._begun.get(user, '')}"))

    def begin(self, user: str, message_id: str) -> None:
        """Raises OSError; the session is the former one then."""
        begun = self._begun | {user: message_id}
        if self._file is not None:
            with self._file.with_suffix(".new").open("wb") as file:
                file.write(msgspec.json.encode(begun))
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self._file)
        self._begun = begun


class Runner:
    """Hands the messages of a sandbox to an agent, and its answers back."""

    def __init__(self, sandbox: Sandbox, agent: Agent, sessions: Sessions) -> None:
        self._sandbox = sandbox
        self._agent = agent
        self._sessions = sessions
        self._at_work: dict[str, asyncio.Future[Answer]] = {}
        """By user."""
        self._questions: dict[str, asyncio.Future[str]] = {}
        """What waits for the next message of a user."""
        self._answered: set[str] = set()
        """Ids of messages that were such answers, until they are finished."""

    async def run(self) -> None:
        """Runs until cancelled. Raises what `Sandbox.run` raises."""
        await self._sandbox.run(self._handle, lane=self._lane)

    def _lane(self, message: Message) -> Hashable:
        """What steers or answers waits for nobody."""
        word, question = message.text.strip(), self._questions.get(message.user)
        if question is not None and not question.done() and word not in (NEW, STOP):
            question.set_result(message.text)
            self._answered.add(message.id)
        return message.user, word == STOP or (message.id in self._answered and message.id)

    async def _handle(self, message: Message) -> None:
        word = message.text.strip()
        if message.id in self._answered:
            self._answered.discard(message.id)
        elif word == STOP:
            await message.reply(STOPPED if await self._stop(message.user) else IDLE)
        elif word == NEW:
            await message.reply(self._begin_session(message))
        else:
            await self._answer(message)

    def _begin_session(self, message: Message) -> str:
        try:
            self._sessions.begin(message.user, message.id)
        except OSError as exc:
            log.error("agent.session_not_stored", detail=str(exc))
            return SORRY
        return STARTED_ANEW

    async def _stop(self, user: str) -> bool:
        """Ends the work for a user, and returns once it has ended; whether there was any."""
        task = self._at_work.get(user)
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _answer(self, message: Message) -> None:
        async def ask(question: str, items: Sequence[OutItem], ident: str) -> str:
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._questions[message.user] = answer
            try:
                await message.reply(question, items, key=f"q-{digest(ident.encode())}")
                return await answer
            finally:
                del self._questions[message.user]

        turn = Turn(message, self._sessions.session_of(message.user), ask)
        task = asyncio.ensure_future(self._agent(turn))
        self._at_work[message.user] = task
        typing = asyncio.create_task(_type_forever(message))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            typing.cancel()
            await asyncio.wait({task, typing})
            del self._at_work[message.user]
        answer = Answer() if task.cancelled() else _answer_of(task, message)
        if answer.text.strip() or answer.items:
            await message.reply(answer.text.strip(), answer.items)
        else:
            await message.typing("off")


def _answer_of(task: asyncio.Future[Answer], message: Message) -> Answer:
    try:
        return task.result()
    except AdapterError as exc:
        log.warning("agent.failed", reason=exc.reason, detail=exc.detail, message=message.id)
    except Exception:
        log.exception("agent.crashed", message=message.id)
    return Answer(SORRY)


async def _type_forever(message: Message) -> None:
    """Until cancelled, or the bus does not take it: an answer does not depend on it."""
    with contextlib.suppress(NatsError):
        await asyncio.sleep(TYPING_AFTER_S)
        while True:
            await message.typing()
            await asyncio.sleep(TYPING_S)
