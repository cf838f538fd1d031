"""Commands of a sandbox that wait for their time, `send_at_ms`, outside of their persons' queues."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapter.bridge.sender import Sender
from adapter.bridge.sending import QueuedCommand
from adapter.tools.timing import Clock

LONGEST_S = 60.0
"""Longest timer, since the clock may be set and the machine may sleep."""


class Schedule:
    """Hands each command over when it is due. Nothing of it is stored: a command is in `WECHAT_OUT` meanwhile."""

    def __init__(self, clock: Clock, on_due: Callable[[QueuedCommand], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._waiting: dict[int, tuple[QueuedCommand, Sender, asyncio.TimerHandle]] = {}
        """By sequence; with that of the person for whom it was stored."""

    def __len__(self) -> int:
        return len(self._waiting)

    def is_due(self, command: QueuedCommand) -> bool:
        return command.send_at_ms <= self._clock.now_ms()

    def add(self, command: QueuedCommand, sender: Sender) -> None:
        """Takes a command that is not due."""
        wait_s = min((command.send_at_ms - self._clock.now_ms()) / 1000, LONGEST_S)
        timer = asyncio.get_running_loop().call_later(wait_s, self._look, command, sender)
        self._waiting[command.sequence] = command, sender, timer

    def _look(self, command: QueuedCommand, sender: Sender) -> None:
        if self.is_due(command):
            del self._waiting[command.sequence]
            self._on_due(command)
        else:
            self.add(command, sender)

    def move(self, is_meant: Callable[[QueuedCommand, Sender], bool]) -> None:
        """Puts commands into their persons' queues before they are due, since they end."""
        for command, sender, timer in [*self._waiting.values()]:
            if is_meant(command, sender):
                timer.cancel()
                del self._waiting[command.sequence]
                sender.enqueue(command)

    def stop(self) -> None:
        """Hands over nothing more."""
        for _, _, timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
