"""The conversation of `demo`: a simulated phone on one side, an agent on the other, the bus in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

import msgspec
from nats.aio.msg import Msg

from adapter.cli.bus import Bus
from adapter.cli.exit_codes import NO, OK, TIMEOUT, Failed
from adapter.cli.screen import Screen
from adapter.cli.send import describe
from adapter.contract.messages import FINAL_OUTCOMES, Inbound, Outbound, Receipt
from adapter.kit.timing import raise_if_cancelled
from adapter.simulator import BotRecord, Simulator

SANDBOX = "demo"
UNANSWERED = 5
"""Lines that may be on their way at once. Fewer than the sends of a window: each line opens it anew, but ten lines
in one go leave room for ten answers only, and more would be parked until the next."""


class TalkDeps(NamedTuple):
    """What the conversation needs."""

    bus: Bus
    simulator: Simulator
    bot: BotRecord
    screen: Screen
    patience_s: float
    """Nothing may stand still for longer while an answer is due."""


class Chat:
    """Lines go in by `say`, everything that follows is shown; `settle` ends when all is answered."""

    def __init__(self, stage: TalkDeps) -> None:
        self._stage = stage
        self._free_slots = asyncio.Semaphore(UNANSWERED)
        self._receipts: asyncio.Queue[Receipt] = asyncio.Queue()
        self._progressed = asyncio.Condition()
        self._moved_at = time.monotonic()
        self.said = 0
        self.answered = 0
        self.failed = 0

    @property
    def open(self) -> int:
        """Lines without an answer."""
        return self.said - self.answered - self.failed

    async def run(self, lines: AsyncIterator[str], agent: Callable[[], Coroutine[Any, Any, None]] | None) -> int:
        """Holds the conversation, beside `agent` if it is ours, until the lines end and all are answered. Raises
        Failed if it stands still, and what the agent raises."""
        await self._listen()
        try:
            async with asyncio.TaskGroup() as group:
                loops = (agent, self._receipts_forever, self._wait_progress)
                tasks = [group.create_task(loop()) for loop in loops if loop is not None]
                code = await self._talk(lines)
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return code

    async def _talk(self, lines: AsyncIterator[str]) -> int:
        self._stage.screen.prompt()
        async for line in lines:
            self._stage.screen.on_line_typed()
            if line.strip():
                await self.say(line)
            else:
                self._stage.screen.prompt()
        return await self.settle()

    async def say(self, line: str) -> None:
        """The user writes `line` on the phone."""
        await self._free_slots.acquire()
        screen = self._stage.screen
        if not screen.is_prompting:
            screen.show("you", line)
        self.said += 1
        self._stage.simulator.say(self._stage.bot.user, line)
        await self._progress()

    async def settle(self) -> int:
        """Waits until every line is answered, and returns the exit code."""
        async with self._progressed:
            await self._progressed.wait_for(lambda: self.open == 0)
        return NO if self.failed else OK

    async def _listen(self) -> None:
        names, nc = self._stage.bus.names, self._stage.bus.nc
        await nc.subscribe(names.live(SANDBOX), cb=self._on_inbound)
        await nc.subscribe(names.out(SANDBOX), cb=self._on_command)
        await nc.subscribe(names.receipts(SANDBOX), cb=self._on_receipt)
        await nc.flush()
        raise_if_cancelled()

    async def _on_inbound(self, msg: Msg) -> None:
        message = msgspec.json.decode(msg.data, type=Inbound)
        left = message.window.remaining
        budget = "" if left is None else f", {left} sends left"
        self._stage.screen.show(msg.subject, f'"{message.text}"  (id {message.id[-12:]}{budget})')
        await self._progress()

    async def _on_command(self, msg: Msg) -> None:
        command = msgspec.json.decode(msg.data, type=Outbound)
        if command.typing == "off":  # the agent is done, and has nothing to say
            await self._close(True)
        elif not command.typing:
            said = f'"{command.text}"' if command.text else f"{len(command.items or [])} items"
            self._stage.screen.show(msg.subject, said)
            await self._progress()

    async def _on_receipt(self, msg: Msg) -> None:
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        if receipt.reason != "typing" and (receipt.message_ids or receipt.outcome != "accepted"):
            self._receipts.put_nowait(receipt)

    async def _receipts_forever(self) -> None:
        """Shows what became of each answer, then what the phone shows of it."""
        screen = self._stage.screen
        while True:
            receipt = await self._receipts.get()
            screen.show("receipt", describe(receipt))
            if receipt.outcome == "accepted":
                for message_id in receipt.message_ids:
                    screen.show("phone", await self._on_phone(message_id))
            if receipt.outcome in FINAL_OUTCOMES:
                await self._close(receipt.outcome == "accepted")

    async def _on_phone(self, message_id: str) -> str:
        """The text of a message, once the phone shows it. Waits as long as `_wait_progress` allows."""
        while True:
            for shown in reversed(self._stage.simulator.phone(self._stage.bot.user)):
                if shown.message_id == message_id:
                    return shown.text
            await asyncio.sleep(0.01)

    async def _close(self, good: bool) -> None:
        """A line is dealt with, unless that was one answer more to a line that is closed."""
        if self.open:
            self.answered += good
            self.failed += not good
            self._free_slots.release()
        await self._progress()
        if self.open == 0:
            self._stage.screen.prompt()

    async def _progress(self) -> None:
        async with self._progressed:
            self._moved_at = time.monotonic()
            self._progressed.notify_all()

    async def _wait_progress(self) -> None:
        """Raises Failed once nothing has moved for too long."""
        while True:
            await asyncio.sleep(0.2)
            if self.open and time.monotonic() - self._moved_at > self._stage.patience_s:
                raise Failed(
                    TIMEOUT,
                    f"{self.open} of {self.said} lines are not answered, nothing happened for"
                    f" {self._stage.patience_s:g} s.",
                )
