"""`wechat.svc.next.<sandbox>` on a server without an adapter: what a reader asks, and answers that a real one rarely
gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.messages import Handed, NextPage, NextQuery
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_POSITION, Names, position, read_position


class NextStandIn:
    """Has the messages of one sandbox in memory, and rings for each."""

    def __init__(self, nc: Client, names: Names, sandbox: str) -> None:
        self._nc = nc
        self._names = names
        self._sandbox = sandbox
        self.stored: dict[int, bytes] = {}
        self.queries: list[NextQuery] = []
        self.under_way = self.most_under_way = 0
        self.reader = self.handled = 0
        """`handled`: the sequence up to which all are confirmed. Each message is an entry of its own."""
        self.first = ""
        self.opened_by: list[int] = []
        self.delay_s = 0.0
        self.disturb: Callable[[int, Msg], bool] = lambda number, msg: False
        """Gets the number of a request, from one on; True: it is not answered."""

    async def start(self) -> None:
        await self._nc.subscribe(self._names.svc(f"next.{self._sandbox}"), cb=self._on_request)
        await self._nc.flush()

    async def store(self, sequence: int, data: bytes, *, ring: bool = True) -> None:
        self.stored[sequence] = data
        if ring:
            await self._nc.publish(self._names.live(self._sandbox), data, headers={H_POSITION: position(sequence, 0)})

    async def refuse(self, msg: Msg, code: str, sentence: str) -> None:
        await self._nc.publish(msg.reply, headers={H_ERROR_CODE: code, H_ERROR: sentence})

    async def _on_request(self, msg: Msg) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        asyncio.get_running_loop().call_later(self.delay_s, lambda: asyncio.ensure_future(self._answer(msg)))

    async def _answer(self, msg: Msg) -> None:
        self.under_way -= 1
        query = msgspec.json.decode(msg.data, type=NextQuery)
        self.queries.append(query)
        if self.disturb(len(self.queries), msg):
            return
        if query.reader is None:
            self.reader += 1
        elif query.reader != self.reader:
            await self.refuse(msg, "409", "Another agent reads this sandbox now.")
            return
        if query.after is not None:
            self.handled = max(self.handled, read_position(query.after)[0])
        left = sorted(sequence for sequence in self.stored if sequence > self.handled)[: query.max]
        messages = [
            Handed(position=position(sequence, 0), message=msgspec.Raw(self.stored[sequence])) for sequence in left
        ]
        page = NextPage(reader=self.reader, messages=messages, first=self.first)
        await self._nc.publish(msg.reply, msgspec.json.encode(page))
