"""Core NATS: unstored publishes and queries to all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.names import is_inbox
from adapter.jetstream.managed_connection import ManagedConnection, temporary_inbox
from adapter.kit.timing import wait_event


class CoreNats:
    """Implements ports.CoreBus."""

    def __init__(self, connection: ManagedConnection) -> None:
        self._connection = connection

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        await self._connection.publish(subject, payload, headers=headers)

    def subscribe(self, subject: str, on_message: Callable[[bytes], None]) -> None:
        """Subscribes on every connection. Messages that arrive while there is none are lost."""

        async def receive(msg: Msg) -> None:
            on_message(msg.data)

        self._on_each(subject, receive)

    def respond(self, subject: str, make: Callable[[bytes], bytes | None]) -> None:
        """Answers queries to all replicas, if the reply subject is an inbox; None: no answer."""

        async def receive(msg: Msg) -> None:
            reply = make(msg.data) if is_inbox(msg.reply) else None
            if reply is not None:
                await msg.respond(reply)

        self._on_each(subject, receive)

    def _on_each(self, subject: str, receive: Callable[[Msg], Awaitable[None]]) -> None:
        async def subscribe(nc: Client) -> None:
            await nc.subscribe(subject, cb=receive)

        self._connection.on_connect(subscribe)

    async def query_replicas(self, subject: str, payload: bytes, *, count: int, within_s: float) -> list[bytes]:
        answers: list[bytes] = []
        enough = asyncio.Event()

        async def receive(msg: Msg) -> None:
            if "Status" not in (msg.headers or {}):  # otherwise the server reports no subscribers
                answers.append(msg.data)
            if len(answers) >= count or "Status" in (msg.headers or {}):
                enough.set()

        async with temporary_inbox(self._connection.client(), receive) as inbox:
            await self._connection.publish(subject, payload, reply=inbox)
            await wait_event(enough, within_s)
        return answers
