"""Requests with one or many replies over one inbox of a client.

nats-py needs a subscription and a task for each request with many replies, or supports only one reply and takes a
header `Status` of another client for the server's. A start makes thousands of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
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
    """The replies to one request, in order. The request is published with the reply subject `reply`."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        """None: no more can come."""

    async def next_reply(self, timeout_s: float) -> Reply:
        """The next reply. Raises Temporary("bus_down"), TimeoutError."""
        async with asyncio.timeout(timeout_s):
            found = await self.replies.get()
        if found is None:
            raise Temporary("bus_down", "the connection was lost")
        return found


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
        for request in self.pending.values():
            request.replies.put_nowait(None)

    @contextlib.contextmanager
    def new_request(self) -> Iterator[PendingRequest]:
        """A request that collects replies until the block ends."""
        number = str(next(self._numbers))
        request = self.pending[number] = PendingRequest(self._prefix + number)
        try:
            yield request
        finally:
            del self.pending[number]

    def _on_reply(self, subject: str, _: bytes, data: bytes, headers: bytes) -> None:
        request = self.pending.get(subject[len(self._prefix) :])
        if request is not None:  # otherwise it is late
            found = parse_headers(headers) if headers else {}
            request.replies.put_nowait(Reply(data, found, has_no_responders(headers)))
