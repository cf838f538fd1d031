"""Requests over one inbox of a client, each with one answer or many.

nats-py's own ways cost a subscription with a task for each, or know of one answer only and take a stranger's header
`Status` for the server's word. A start makes thousands.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from types import TracebackType
from typing import NamedTuple

from adapter.errors import Temporary
from adapter.jetstream.client import BusClient, is_unheard


class Answer(NamedTuple):
    """One answer to a question."""

    data: bytes
    headers: dict[str, str]
    """The server's own word is called `Status`, as in nats-py."""
    unheard: bool = False
    """A server says that nobody listens to what was asked."""


class Question:
    """`with questions.new() as question`: what comes for `question.reply`, in its order, until the block ends."""

    def __init__(self, questions: Questions, number: str, reply: str) -> None:
        self.reply = reply
        self._questions = questions
        self._number = number
        self._come: deque[tuple[bytes, bytes]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Question:
        self._questions.open[self._number] = self
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._questions.open.pop(self._number, None)

    def take(self, data: bytes, headers: bytes) -> None:
        self._come.append((data, headers))
        self._wake()

    def lost(self) -> None:
        """Nothing more can come."""
        self._questions.open.pop(self._number, None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def answer(self, timeout_s: float) -> Answer:
        """The next one. Raises Temporary("bus_down"), TimeoutError."""
        if not self._come:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            late = loop.call_later(timeout_s, self._wake)
            try:
                if self._number in self._questions.open:
                    await waiter
            finally:
                late.cancel()
                self._waiter = None
            if not self._come:
                if self._number not in self._questions.open:
                    raise Temporary("bus_down", "the connection was lost")
                raise TimeoutError
        data, headers = self._come.popleft()
        if not headers:
            return Answer(data, {})
        return Answer(data, await self._questions.client.headers(headers), is_unheard(headers))


class Questions:
    """The open requests of one connection, told apart by the last token of the reply subject."""

    def __init__(self) -> None:
        self.open: dict[str, Question] = {}
        self.client = BusClient()
        self._prefix = ""
        self._numbers = itertools.count(1)

    async def hear(self, nc: BusClient) -> None:
        """For each new client, before anybody asks."""
        self.client = nc
        self._prefix = nc.new_inbox() + "."
        await nc.hear(self._prefix + "*", self._take)

    def lost(self) -> None:
        """The client is gone, and with it every answer that has not come."""
        for question in list(self.open.values()):
            question.lost()

    def new(self) -> Question:
        number = str(next(self._numbers))
        return Question(self, number, self._prefix + number)

    def _take(self, subject: str, data: bytes, headers: bytes) -> None:
        question = self.open.get(subject[len(self._prefix) :])
        if question is not None:  # else it came too late
            question.take(data, headers)
