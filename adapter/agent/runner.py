"""Connects an agent that exists to a sandbox: one conversation per user, and the two words that steer it.

`/new` begins a new session, in its turn behind the messages before it. `/stop` ends what is in work for its user at
once, and what waits goes on. A session's name is made of the user and of the id of their last `/new`, so that only
these ids are kept, in a file; without that file a user is back in their first session after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Hashable
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import structlog
from nats.errors import Error as NatsError

from adapter.agent.sandbox import Message, Sandbox
from adapter.errors import AdapterError

log = structlog.get_logger()

NEW, STOP = "/new", "/stop"
STARTED_ANEW = "A new conversation begins."
STOPPED = "Stopped."
IDLE = "There is nothing to stop."
SORRY = "That did not work. Please try again."
TYPING_AFTER_S, TYPING_S = 0.5, 240.0
"""When typing is shown, and again: WeChat's lasts for five minutes, and a quick answer needs none."""

Agent = Callable[[Message, str], Awaitable[str]]
"""Answers a message of a session. "": no answer now. Raises AdapterError, whose `reason` goes to the log."""


class Sessions:
    """The name of each user's session: a UUID, the same for as long as the user does not begin a new one."""

    def __init__(self, sandbox: str, file: Path | None = None) -> None:
        """`file`: where the ids of the last `/new` are kept; None: nowhere. Raises OSError, ValueError."""
        self._sandbox = sandbox
        self._file = file
        self._begun: dict[str, str] = json.loads(file.read_text("utf-8")) if file and file.exists() else {}

    def session_of(self, user: str) -> str:
        return str(uuid5(NAMESPACE_URL, f"wechat-nats:{self._sandbox}:{user}:{self._begun.get(user, '')}"))

    def begin(self, user: str, message_id: str) -> None:
        """Raises OSError; the session is the former one then."""
        begun = self._begun | {user: message_id}
        if self._file is not None:
            written = self._file.with_suffix(".new")
            written.write_text(json.dumps(begun), "utf-8")
            written.replace(self._file)
        self._begun = begun


class Runner:
    """Hands the messages of a sandbox to an agent, and its answers back."""

    def __init__(self, sandbox: Sandbox, agent: Agent, sessions: Sessions) -> None:
        self._sandbox = sandbox
        self._agent = agent
        self._sessions = sessions
        self._at_work: dict[str, asyncio.Task[str]] = {}
        """By user."""

    async def run(self) -> None:
        """Runs until cancelled. Raises what `Sandbox.run` raises."""
        await self._sandbox.run(self._handle, lane=_lane)

    async def _handle(self, message: Message) -> None:
        word = message.text.strip()
        if word == STOP:
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
        task = asyncio.ensure_future(self._agent(message, self._sessions.session_of(message.user)))
        self._at_work[message.user] = task
        typing = asyncio.create_task(_type_forever(message))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            typing.cancel()
            await asyncio.wait({task, typing})
            del self._at_work[message.user]
        if answer := "" if task.cancelled() else _answer_of(task, message):
            await message.reply(answer)
        else:
            await message.typing("off")


def _answer_of(task: asyncio.Future[str], message: Message) -> str:
    try:
        return task.result().strip()
    except AdapterError as exc:
        log.warning("agent.failed", reason=exc.reason, detail=exc.detail, message=message.id)
    except Exception:
        log.exception("agent.crashed", message=message.id)
    return SORRY


def _lane(message: Message) -> Hashable:
    return message.user, message.text.strip() == STOP


async def _type_forever(message: Message) -> None:
    """Until cancelled, or the bus does not take it: an answer does not depend on it."""
    with contextlib.suppress(NatsError):
        await asyncio.sleep(TYPING_AFTER_S)
        while True:
            await message.typing()
            await asyncio.sleep(TYPING_S)
