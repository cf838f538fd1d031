"""An agent that asks for the next messages of a sandbox, without a doorbell."""

from __future__ import annotations

import asyncio

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError

from adapter.contract.messages import Inbound, NextPage, NextQuery
from adapter.contract.names import H_ERROR, H_ERROR_CODE, Names

NAMES = Names()


class AskRefused(Exception):
    """An error of the service. `code`: 400, 409, 503 …"""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code


class Asker:
    """Confirms with each request what the one before has brought, as an agent does that has handled it."""

    def __init__(self, nc: Client, sandbox: str = "s1") -> None:
        self.nc = nc
        self.sandbox = sandbox
        self.reader: int | None = None
        self.handled: str | None = None
        """Position of the last message that was taken."""

    async def ask(self, query: NextQuery, timeout_s: float = 10.0) -> NextPage:
        """Raises AskRefused, NatsError."""
        subject = NAMES.svc(f"next.{self.sandbox}")
        answer = await self.nc.request(subject, msgspec.json.encode(query), timeout=timeout_s)
        if answer.headers and H_ERROR in answer.headers:
            raise AskRefused(answer.headers[H_ERROR_CODE], answer.headers[H_ERROR])
        return msgspec.json.decode(answer.data, type=NextPage)

    async def take(self, most: int = 100, timeout_s: float = 10.0) -> list[Inbound]:
        """The next messages. Raises as `ask`."""
        if self.reader is None:
            self.handled = None
        page = await self.ask(NextQuery(reader=self.reader, after=self.handled, max=most), timeout_s)
        self.reader = page.reader
        if page.messages:
            self.handled = page.messages[-1].position
        return [msgspec.json.decode(handed.message, type=Inbound) for handed in page.messages]

    async def take_patiently(self, most: int = 100) -> list[Inbound]:
        """As `take`, repeated as long as there is no answer, or the adapter says that it should be."""
        while True:
            try:
                return await self.take(most, timeout_s=1.0)
            except AskRefused as exc:
                if exc.code not in ("429", "503"):
                    raise
            except NatsError:
                pass
            await asyncio.sleep(0.1)
