"""The agent of all sandboxes in one program: it answers each message, and says what became of each answer.

    python many.py

Its user is that of the role `agents` in `helm/nats/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from bus import connect, store
from echo import answer, ask
from nats.aio.client import Client
from nats.aio.msg import Msg

ASK_S = 30.0
"""A ring, an event or a receipt may get lost: then it takes so long until it is known."""


class Agents:
    """One task for each sandbox, and one for each command whose receipt is awaited."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.rings: dict[str, asyncio.Event] = {}
        self.tasks = asyncio.TaskGroup()  # what fails ends the program, and says why
        self.awaited: dict[tuple[str, str], asyncio.Future[dict[str, Any]]] = {}
        """By sandbox and id of the command."""

    async def run(self) -> None:
        """Two subscriptions for all sandboxes; the subjects say which one it is."""
        async with self.tasks:
            await self.nc.subscribe("wechat.in.*", cb=self.on_ring)
            await self.nc.subscribe("wechat.event.*.receipt.>", cb=self.on_receipt)
            while True:
                after = ""
                while True:
                    page = json.loads((await ask(self.nc, "bindings.list", {"after": after})).data)
                    for binding in page["bindings"]:
                        self.serve(binding["sandbox"])
                    if not (after := page.get("next", "")):
                        break
                await asyncio.sleep(ASK_S)  # a new sandbox is known earlier, by its first ring

    def serve(self, sandbox: str) -> asyncio.Event:
        if sandbox not in self.rings:
            self.rings[sandbox] = asyncio.Event()
            self.tasks.create_task(self.read(sandbox))
            print(f"{sandbox}: ready", flush=True)
        return self.rings[sandbox]

    async def on_ring(self, msg: Msg) -> None:
        self.serve(msg.subject.split(".")[2]).set()

    async def on_receipt(self, msg: Msg) -> None:
        receipt = json.loads(msg.data)
        awaited = self.awaited.get((receipt["sandbox"], receipt["command"]))
        if awaited is not None and not awaited.done() and receipt["outcome"] != "parked":  # which is not final
            awaited.set_result(receipt)

    async def read(self, sandbox: str) -> None:
        """The loop of echo.py."""
        request: dict[str, Any] = {}
        while True:
            self.rings[sandbox].clear()
            try:
                page = json.loads((await ask(self.nc, f"next.{sandbox}", request)).data)
            except RuntimeError as why:  # another program reads this sandbox now: it goes on there
                print(f"{sandbox}: {why}", flush=True)
                return
            request = {"reader": page["reader"]}
            for handed in page.get("messages", ()):
                command = await answer(self.nc, sandbox, handed["position"], handed["message"])
                self.awaited[sandbox, command["id"]] = asyncio.get_running_loop().create_future()
                await store(self.nc, f"wechat.out.{sandbox}", command)
                self.tasks.create_task(self.tell(sandbox, command["id"]))
                request["after"] = handed["position"]
            if "after" not in request:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.rings[sandbox].wait(), ASK_S)

    async def tell(self, sandbox: str, command: str) -> None:
        """Waits for the final receipt. Nobody waits for it meanwhile: a parked command may take days."""
        receipt = await self.receipt(sandbox, command)
        print(f"{sandbox}: {command}: {receipt['outcome']} {receipt.get('reason', '')}", flush=True)

    async def receipt(self, sandbox: str, command: str) -> dict[str, Any]:
        awaited = self.awaited[sandbox, command]
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(asyncio.shield(awaited), ASK_S)
                with contextlib.suppress(RuntimeError):  # 404: there is none yet
                    receipt: dict[str, Any] = json.loads(
                        (await ask(self.nc, f"receipt.{sandbox}", {"command": command})).data
                    )
                    if receipt["outcome"] != "parked":
                        return receipt
        finally:
            del self.awaited[sandbox, command]


async def main() -> None:
    await Agents(await connect("_INBOX_agents")).run()


if __name__ == "__main__":
    asyncio.run(main())
