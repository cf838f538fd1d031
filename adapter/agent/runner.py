"""Connects an existing agent to a sandbox: one session per user, and three commands for the user.

`/new` starts a new session when its turn comes, after the messages before it. `/stop` ends the current run of its
user at once; later messages follow. A file without words waits a moment for them, and both are one turn.
The name of a session derives from the user and the id of their last `/new`. A file keeps these ids; without it, users
return to their first session after a restart, and are welcomed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import NAMESPACE_URL, uuid5

import msgspec
import structlog
from nats.errors import Error as NatsError

from adapter.agent.reader import retry
from adapter.agent.sandbox import Message, Sandbox
from adapter.agent.texts import Command, command_of
from adapter.bridge.texts import closing_fence
from adapter.contract.messages import Outbound, OutItem, Receipt
from adapter.contract.names import digest
from adapter.contract.quotes import kind_of
from adapter.errors import AdapterError, Temporary
from adapter.tools.timing import wait_event

log = structlog.get_logger()

T = TypeVar("T")

TYPING_AFTER_S, TYPING_S = 0.5, 30.0
"""Delay before typing is shown, so that a quick answer shows none, and its interval: it is shown for a minute."""
WORKING_AFTER = 2
"""Intervals after which the person is told that the agent is still at work."""

GIVE_UP_S = 3600.0
"""Time after which a message is given up with an answer to the user, whose next messages wait for it."""
LONGEST = 16_000
"""Most characters of an answer. So many fit into the parts of a text, wherever it is cut (bridge/commands.py)."""
CLOSING_CHARS = 16
"""Room behind an answer that is cut: an ellipsis, line breaks and the end of a code fence."""
GATHER_S = 3.0
"""Default time for which a file waits for the person's words about it."""
FILES = frozenset({"image", "video", "file"})
"""Kinds of items that a person sends alone, and then says something about."""
UNSEEN = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
"""Colours and other control characters for a terminal."""
UNFIT = ("too_long", "invalid", "media")
"""Why an answer is refused that could be sent if it were another one."""


class Answer(NamedTuple):
    """An answer of an agent. An empty one means that no answer is sent now."""

    text: str = ""
    items: tuple[OutItem, ...] = ()
    left_out: str = ""
    """Why a file is not among the items, as a sentence."""
    is_cut: bool = False
    """The text is only the beginning of what the agent says."""


class TurnEnd(NamedTuple):
    """How a message was handled, for those who watch."""

    message: Message
    seconds: float
    chars: int = 0
    """Length of the text that is sent."""
    items: int = 0
    reason: str = ""
    """Why the agent failed, in a word; "" if it did not."""
    detail: str = ""
    """The same as a sentence."""
    said: str = ""
    """The last line of the output of a program that failed: for the terminal of whoever runs it, and for no log."""


class Turn(NamedTuple):
    """A message for an agent."""

    message: Message
    session: str
    ask: Callable[[str, Sequence[OutItem], str], Awaitable[str]]
    """Sends a question (text, items, id) to the user, and returns the text of their next message."""
    on_retry: Callable[[Temporary], None] = lambda _: None
    """Called when the agent has failed, and is asked again."""


Agent = Callable[[Turn], Awaitable[Answer]]
"""Answers a message. Raises AdapterError, whose `reason` and `detail` go to the log."""


def cut(text: str, most: int) -> tuple[str, bool]:
    """The first `most` bytes of the text, and whether there are more."""
    data = text.encode(errors="replace")
    return data[:most].decode(errors="ignore"), len(data) > most


async def until_answered(turn: Turn, ask: Callable[[], Awaitable[T]]) -> T:
    """Repeats `ask` while it raises Temporary, which is told once. Raises Temporary after GIVE_UP_S."""
    told = False

    async def ask_once() -> T:
        nonlocal told
        try:
            return await ask()
        except Temporary as exc:
            if not told:
                turn.on_retry(exc)
            told = True
            raise

    return await retry(ask_once, first_s=1.0, longest_s=60.0, give_up_s=GIVE_UP_S)


def replace_json(file: Path, value: object) -> None:
    """Writes a file as a whole or not at all. Raises OSError."""
    with file.with_suffix(".new").open("wb") as new:
        new.write(msgspec.json.encode(value))
        new.flush()
        os.fsync(new.fileno())
    os.replace(new.name, file)


class Gathering:
    """Files without words, until the person says something about them, or nothing for a while."""

    def __init__(self, first: Message) -> None:
        self.parts = [first]
        self.is_whole = False
        self.changed = asyncio.Event()

    def add(self, message: Message) -> None:
        self.parts.append(message)
        self.is_whole = bool(message.text)
        self.changed.set()

    def end(self) -> None:
        self.is_whole = True
        self.changed.set()

    async def wait(self, quiet_s: float) -> Message:
        """All as one message, once there are words, or nothing has come for `quiet_s`."""
        try:
            while not self.is_whole and await wait_event(self.changed, quiet_s):
                self.changed.clear()
        finally:
            self.is_whole = True  # what comes later is another turn
        return Message.joined(self.parts)


class Sessions:
    """The name of each user's session: a UUID that stays the same until the user starts a new session."""

    def __init__(self, sandbox: str, file: Path | None = None) -> None:
        """`file`: keeps the ids of each user's last `/new`; None: they are not kept. Raises OSError, UNDECODABLE."""
        self._sandbox = sandbox
        self._file = file
        self._begun: dict[str, str] = {}
        """Of each user who has been welcomed; "": there was no `/new`."""
        if file is not None and file.exists():
            self._begun = msgspec.json.decode(file.read_bytes(), type=dict[str, str])

    def session_of(self, user: str) -> str:
        return str(uuid5(NAMESPACE_URL, f"wechat-nats:{self._sandbox}:{user}:{self._begun.get(user, '')}"))

    def begin(self, user: str, message_id: str) -> None:
        """Starts a session. Raises OSError, after which the former session continues."""
        begun = self._begun | {user: message_id}
        self._store(begun)
        self._begun = begun

    def is_known(self, user: str) -> bool:
        return user in self._begun

    def note(self, user: str) -> None:
        """Remembers a user who has been welcomed. Raises OSError, after which that is remembered until the end."""
        self._begun.setdefault(user, "")
        self._store(self._begun)

    def _store(self, begun: dict[str, str]) -> None:
        if self._file is not None:
            replace_json(self._file, begun)


class Runner:
    """Gives the messages of a sandbox to an agent, and sends its answers."""

    def __init__(
        self,
        sandbox: Sandbox,
        agent: Agent,
        sessions: Sessions,
        on_end: Callable[[TurnEnd], None] | None = None,
        *,
        welcome: str | None = None,
        gather_s: float = GATHER_S,
    ) -> None:
        """`on_end` is called after each message that was given to the agent, and where it failed and is asked again;
        default: a line of the log. `welcome`: goes before the first answer to a person; None: that of the language,
        "": none. `gather_s`: how long files without words wait for them; 0: not at all."""
        self._on_end = on_end or log_end
        self._texts = sandbox.texts
        self._welcome = self._texts.welcome if welcome is None else welcome
        self._sandbox = sandbox
        self._agent = agent
        sandbox.on_receipt = self._on_receipt
        self._sessions = sessions
        self._at_work: dict[str, asyncio.Future[Answer]] = {}
        """The current run, by user."""
        self._questions: dict[str, asyncio.Future[str]] = {}
        """Questions that wait for the next message of a user."""
        self._gather_s = gather_s
        self._newest: dict[str, Gathering] = {}
        """Each user's newest files without words."""
        self._gathering: dict[str, Gathering] = {}
        """The same by the first one's message, until its turn comes."""
        self._taken: set[str] = set()
        """Ids of messages that answered a question, or joined an earlier one, until they are finished."""

    async def run(self) -> None:
        """Runs until cancelled. Raises what `Sandbox.run` raises."""
        await self._sandbox.run(self._handle, lane=self._lane)

    def _lane(self, message: Message) -> Hashable:
        """The lane of a message. A command, and what is a part of an earlier turn, wait for no other message."""
        command, question = command_of(message.text), self._questions.get(message.user)
        if question is not None and not question.done() and (command == "new" or (message.text and not command)):
            if command:
                question.cancel()  # and so the run that has asked it
            else:
                question.set_result(message.text)
                self._taken.add(message.id)
        elif self._gather_s:
            self._gather(message, command)
        return message.user, command in ("help", "stop") or (message.id in self._taken and message.id)

    def _gather(self, message: Message, command: Command | None) -> None:
        """Joins a message to the user's files that wait for it, or lets it be the first that waits."""
        newest = self._newest.get(message.user)
        are_files = not message.text and any(kind_of(item) in FILES for item in message.inbound.items)
        if newest is not None and not newest.is_whole and not command and (are_files or message.text):
            newest.add(message)
            self._taken.add(message.id)
        elif are_files:
            self._newest[message.user] = self._gathering[message.id] = Gathering(message)
        elif newest is not None:
            newest.end()

    async def _handle(self, message: Message) -> None:
        command = command_of(message.text)
        if message.id in self._taken:
            self._taken.discard(message.id)
        elif command == "help":
            await message.reply(self._texts.help)
        elif command == "stop":
            await message.reply(self._texts.stopped if await self._stop(message.user) else self._texts.idle)
        elif command == "new":
            answer = self._texts.new
            try:
                self._sessions.begin(message.user, message.id)
            except OSError as exc:
                log.error("agent.session_not_stored", detail=str(exc))
                answer = self._texts.sorry
            await message.reply(answer)
        else:
            await self._greet(message)
            await self._answer(message)

    async def _greet(self, message: Message) -> None:
        """Welcomes a person once. After a crash in between the same command is stored again, and sent once."""
        if self._welcome and not self._sessions.is_known(message.user):
            await message.reply(self._welcome, key="welcome")
            try:
                self._sessions.note(message.user)
            except OSError as exc:
                log.error("agent.session_not_stored", detail=str(exc))

    async def _stop(self, user: str) -> bool:
        """Ends the current run of a user. Returns whether there was one."""
        task = self._at_work.get(user)
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _answer(self, message: Message) -> None:
        began = time.monotonic()

        async def ask(question: str, items: Sequence[OutItem], ident: str) -> str:
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._questions[message.user] = answer
            try:
                await message.reply(question, items, key=f"q-{digest(ident.encode())}")
                return await answer
            finally:
                del self._questions[message.user]

        def on_retry(exc: Temporary) -> None:
            detail = f"{exc.detail.rstrip('.')}. The agent is asked again, for an hour."
            self._on_end(TurnEnd(message, time.monotonic() - began, reason=exc.reason, detail=detail))

        async def answer_whole() -> Answer:
            nonlocal message, began
            if (gathering := self._gathering.pop(message.id, None)) is not None:
                message = await gathering.wait(self._gather_s)
                if self._newest.get(message.user) is gathering:
                    del self._newest[message.user]
                began = time.monotonic()
            return await self._agent(Turn(message, self._sessions.session_of(message.user), ask, on_retry))

        task = asyncio.ensure_future(answer_whole())
        self._at_work[message.user] = task
        typing = asyncio.create_task(self._accompany(message))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            typing.cancel()
            await asyncio.wait({task, typing})
            del self._at_work[message.user]
        answer, end = Answer(), TurnEnd(message, time.monotonic() - began)
        try:
            answer = Answer() if task.cancelled() else task.result()
            answer = answer._replace(text=self._text_of(answer, message))
            end = end._replace(chars=len(answer.text), items=len(answer.items), detail=answer.left_out)
        except AdapterError as exc:
            said = exc.said if isinstance(exc, Temporary) else ""
            answer, end = Answer(self._texts.sorry), end._replace(reason=exc.reason, detail=exc.detail, said=said)
        except Exception as exc:
            log.exception("agent.crashed", message=message.id)
            answer, end = Answer(self._texts.sorry), end._replace(reason="crashed", detail=type(exc).__name__)
        self._on_end(end)
        if answer.text or answer.items:
            await message.reply(answer.text, answer.items)
        else:
            with contextlib.suppress(NatsError):  # typing ends by itself
                await message.typing("off")

    def _text_of(self, answer: Answer, message: Message) -> str:
        """The text to send. One that is cut, or lacks a file, says so at its end."""
        text, notes = UNSEEN.sub("", answer.text).strip(), [self._texts.no_file] if answer.left_out else []
        room = LONGEST - sum(map(len, notes))
        if answer.is_cut or len(text) > room:
            text = text[: room - len(self._texts.cut) - CLOSING_CHARS].rstrip()
            log.warning("agent.cut", message=message.id, chars=len(text))
            text, notes = f"{text}…\n{closing_fence(text)}".rstrip(), [self._texts.cut, *notes]
        return "\n\n".join(filter(None, (text, *notes)))

    async def _on_receipt(self, receipt: Receipt) -> None:
        """Apologizes for an answer that cannot be sent as it is."""
        command, is_ours = receipt.command, receipt.command.startswith("agent-")
        if receipt.outcome == "refused" and receipt.reason in UNFIT and is_ours and not command.endswith("-sorry"):
            log.warning("agent.refused", reason=receipt.reason, message=receipt.reply_to)
            said = self._texts.no_file if receipt.reason == "media" else self._texts.sorry
            apology = Outbound(id=f"{command}-sorry", user=receipt.user or None, text=said)
            await self._sandbox.send(apology)

    async def _accompany(self, message: Message) -> None:
        """Shows typing, and says once that the agent is still at work, unless it waits for the person. Until
        cancelled, or until the bus refuses it: the answer does not depend on it."""
        with contextlib.suppress(NatsError, AdapterError):
            await asyncio.sleep(TYPING_AFTER_S)
            for interval in itertools.count():
                if interval == WORKING_AFTER and message.user not in self._questions:
                    await message.reply(self._texts.working, key="still")
                await message.typing()
                await asyncio.sleep(TYPING_S)


def log_end(end: TurnEnd) -> None:
    """Logs a failure, without texts."""
    if end.reason:
        log.warning("agent.failed", reason=end.reason, detail=end.detail, message=end.message.id)
