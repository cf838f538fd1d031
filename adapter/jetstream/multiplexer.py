"""Requests with one or many replies over one inbox of a client.

nats-py needs a subscription and a task for each request with many replies, or supports only one reply and takes a
header `Status` of another client for the server's. A start makes thousands of requests.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from types import TracebackType
from typing import NamedTuple

from adapter.errors import Temporary
from adapter.jetstream.client import BusClient, has_no_responders, parse_headers


class Reply(NamedTuple):
    """One reply to a request."""

    data: bytes
    headers: dict[str, str]
    """The server's status is called `Status`, as in nats-py."""
    no_responders: bool = False
    """The server reports that no subscriber exists for the subject."""


class PendingRequest:
    """`with multiplexer.new_request() as request` collects the replies to `request.reply`, in order, until the block
    ends."""

    def __init__(self, multiplexer: RequestMultiplexer, number: str, reply: str) -> None:
        self.reply = reply
        self._multiplexer = multiplexer
        self._number = number
        self._replies: deque[tuple[bytes, bytes]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> PendingRequest:
        self._multiplexer.pending[self._number] = self
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._multiplexer.pending.pop(self._number, None)

    def append_reply(self, data: bytes, headers: bytes) -> None:
        self._replies.append((data, headers))
        self._wake()

    def fail(self) -> None:
        """Ends the request, since no more replies can come."""
        self._multiplexer.pending.pop(self._number, None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_reply(self, timeout_s: float) -> Reply:
        """The next reply. Raises Temporary("bus_down"), TimeoutError."""
        if not self._replies:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                if self._number in self._multiplexer.pending:
                    await waiter
            finally:
                timer.cancel()
                self._waiter = None
            if not self._replies:
                if self._number not in self._multiplexer.pending:
                    raise Temporary("bus_down", "the connection was lost")
                raise TimeoutError
        data, headers = self._replies.popleft()
        if not headers:
            return Reply(data, {})
        return Reply(data, parse_headers(headers), has_no_responders(headers))


class RequestMultiplexer:
    """The open requests of one connection, by the last token of the reply subject."""

    def __init__(self) -> None:
        self.pending: dict[str, PendingRequest] = {}
        self._prefix = ""
        self._numbers = itertools.count(1)

    async def subscribe(self, nc: BusClient) -> None:
        """Called for each new client before its use."""
        self._prefix = nc.new_inbox() + "."
        await nc.subscribe_raw(self._prefix + "*", self._on_reply)

    def fail_all(self) -> None:
        """Fails all requests, since the client is closed."""
        for request in list(self.pending.values()):
            request.fail()

    def new_request(self) -> PendingRequest:
        number = str(next(self._numbers))
        return PendingRequest(self, number, self._prefix + number)

    def _on_reply(self, subject: str, data: bytes, headers: bytes) -> None:
        request = self.pending.get(subject[len(self._prefix) :])
        if request is not None:  # otherwise it is late
            request.append_reply(data, headers)
