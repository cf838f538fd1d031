"""`mcp`: the person of a sandbox as tools for an agent that speaks the Model Context Protocol."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import msgspec
from cyclopts import Parameter, validators
from nats.errors import Error as NatsError

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.connection import Connection
from adapter.agent.reader import read_inbound
from adapter.cli.bus import settings_here
from adapter.cli.exits import OK, USAGE, Failed
from adapter.cli.options import Sandbox as SandboxName
from adapter.cli.options import new_id
from adapter.cli.send import Unanswered, wait_outcome
from adapter.contract.messages import Inbound, Outbound, OutText, Receipt, WindowQuery
from adapter.errors import UNDECODABLE, AdapterError

RECEIPT_S = 60.0
"""Longest wait for a receipt. Clients give a tool about as long."""
INSTRUCTIONS = """\
These tools write to a person in WeChat. Each result of `send`, `send_file` and `ask` tells what became of it:
`accepted` is with WeChat, `parked` is not sent yet, and waits for the person to write, `refused` will not be sent.
WeChat takes about ten messages after each message of the person; `window` has what is left."""
Answer = dict[str, Any]
P = ParamSpec("P")


async def mcp(
    sandbox: SandboxName,
    /,
    *,
    wait: Annotated[
        float,
        Parameter(
            validator=validators.Number(gt=0, lte=86_400),
            metavar="SECONDS",
            help="Longest time for which `ask` waits for the person.",
        ),
    ] = 300.0,
) -> int:
    """Serve a sandbox's person as tools of the Model Context Protocol, on standard input and output.

    The tools are send, send_file, ask and window; the result of a send is its receipt. An agent's client starts this
    command, which ends with it. It reads no inbox: who else answers the sandbox has every message, too.
    """
    try:
        from mcp.server.mcpserver import MCPServer  # noqa: PLC0415 -- an extra
    except ImportError:
        raise Failed(USAGE, "This needs an extra: pip install '.[mcp]' in the checkout.") from None
    async with Connection(settings_here(), sandbox) as connection:
        tools = Tools(connection, Sandbox(sandbox, connection=connection), wait)
        server = MCPServer("wechat-nats", instructions=INSTRUCTIONS, version=__version__, log_level="CRITICAL")
        for tool in (tools.send, tools.send_file, tools.ask, tools.window):
            server.tool()(_telling(tool))
        await server.run_stdio_async()
    return OK


def _telling(tool: Callable[P, Awaitable[Answer]]) -> Callable[P, Awaitable[Answer]]:
    """The tool, whose errors the agent reads."""
    from mcp.server.mcpserver.exceptions import ToolError  # noqa: PLC0415 -- an extra

    @functools.wraps(tool)
    async def call(*args: P.args, **kwargs: P.kwargs) -> Answer:
        try:
            return await tool(*args, **kwargs)
        except AdapterError as exc:
            raise ToolError(exc.detail or exc.reason) from None
        except (Failed, OSError, NatsError) as exc:
            raise ToolError(str(exc)) from None

    return call


class Tools:
    """The tools. Their signatures and docstrings are what an agent is shown."""

    def __init__(self, connection: Connection, sandbox: Sandbox, wait_s: float) -> None:
        self._connection = connection
        self._sandbox = sandbox
        self._wait_s = wait_s

    async def send(self, text: str, user: str = "") -> Answer:
        """Send a text to the person, and return its receipt. `user` is needed only where the sandbox has several."""
        return _shown(await self._send(Outbound(id=new_id(), user=user or None, text=text)))

    async def send_file(self, path: str, text: str = "", user: str = "") -> Answer:
        """Send a file of this machine to the person, after a text if there is one, and return the receipt."""
        item = await self._sandbox.item_of(Path(path))
        items = [*([OutText(text=text)] if text else []), item]
        return _shown(await self._send(Outbound(id=new_id(), user=user or None, items=items)))

    async def ask(self, text: str, user: str = "") -> Answer:
        """Send a text to the person, and return their next message. Without an answer in time there is an error."""
        messages: asyncio.Queue[Inbound] = asyncio.Queue()

        async def on_message(msg: Any) -> None:
            try:
                messages.put_nowait(read_inbound(msg.data))
            except UNDECODABLE:
                return  # of a later version

        hearing = await self._connection.nc.subscribe(self._connection.names.live(self._sandbox.name), cb=on_message)
        try:
            command = Outbound(
                id=new_id(), user=user or None, text=text, when_closed="refuse", expires_in_s=RECEIPT_S / 2
            )
            receipt = await self._send(command)
            if not receipt.outcome.startswith("accepted"):
                raise Failed(OK, f"The question is not sent: {receipt.outcome}, {receipt.reason}. {receipt.detail}")
            async with asyncio.timeout(self._wait_s):
                while (message := await messages.get()).user != receipt.user:
                    pass
        except TimeoutError:
            raise Failed(OK, f"The question is sent. There was no answer within {self._wait_s:g} s.") from None
        finally:
            await hearing.unsubscribe()
        return _shown(message)

    async def window(self, user: str = "") -> Answer:
        """What may still be sent to the person until they write again."""
        query = msgspec.json.encode(WindowQuery(user=user or None))
        answer, _ = await self._connection.request(f"window.{self._sandbox.name}", query, {})
        return dict(msgspec.json.decode(answer))

    async def _send(self, command: Outbound) -> Receipt:
        """Raises Failed where no receipt comes in time, and what `Sandbox.send` raises."""
        receipts = await self._connection.nc.subscribe(
            self._connection.names.receipt(self._sandbox.name, command.id or "")
        )
        try:
            await self._sandbox.send(command)
            return await wait_outcome(receipts, command.id or "", RECEIPT_S, wait_final=False)
        except Unanswered as exc:
            raise Failed(exc.code, f"{exc} It is tried on: do not send it again.") from None
        finally:
            await receipts.unsubscribe()


def _shown(message: Receipt | Inbound) -> Answer:
    shown: Answer = msgspec.to_builtins(message)
    return shown
