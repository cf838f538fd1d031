"""Asks iLink whether it takes the tokens that binds bring, ahead of the binds themselves.

`notifystart` asks: unlike a poll it takes no messages. A slow answer holds up its own bind, and those behind it that
are of the same sandbox or bot, but no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum

from adapter.contract.messages import Bind
from adapter.errors import Refused, SessionExpired, Temporary, Uncertain
from adapter.ports import Account, Chat
from adapter.security.seal import Sealer, bind_context

CHECK_S = 5.0
"""How long iLink may take to answer."""


class Verdict(Enum):
    """What iLink says of a token."""

    TAKEN = "an answer that is not -14"
    DEAD = "-14"
    SILENT = "no answer"


class TokenChecks:
    """The checks under way, by the sequence of their commands."""

    def __init__(self, chat: Chat, sealer: Sealer) -> None:
        self._chat = chat
        self._sealer = sealer
        self._running: dict[int, asyncio.Task[Verdict]] = {}

    def is_pending(self, sequence: int, command: object, on_done: Callable[[], None]) -> bool:
        """Whether a bind waits for iLink's answer. iLink is asked at the first call; `on_done` tells of the end."""
        if not isinstance(command, Bind) or not command.check:
            return False
        if sequence not in self._running:
            task = self._running[sequence] = asyncio.get_running_loop().create_task(self._ask(command))
            task.add_done_callback(lambda _: on_done())
        return not self._running[sequence].done()

    def is_known(self, sequence: int) -> bool:
        """Whether iLink was asked for a command, at an earlier look at it."""
        return sequence in self._running

    async def verdict(self, sequence: int, command: Bind) -> Verdict:
        """The answer that was asked for, or one that is asked for now."""
        running = self._running.get(sequence)
        return await (self._ask(command) if running is None else asyncio.shield(running))

    def forget(self, sequence: int) -> None:
        """The command is done."""
        if (task := self._running.pop(sequence, None)) is not None:
            task.cancel()

    def forget_all(self) -> None:
        for sequence in list(self._running):
            self.forget(sequence)

    async def _ask(self, command: Bind) -> Verdict:
        try:
            token = self._sealer.open(bind_context(command.sandbox, command.bot), command.bot_token)
            base_url = self._chat.check_base_url(command.base_url) if command.base_url else ""
            async with asyncio.timeout(CHECK_S):
                await self._chat.notify(Account(command.bot, token, base_url), start=True)
        except SessionExpired:
            return Verdict.DEAD
        except (Temporary, Uncertain, TimeoutError):
            return Verdict.SILENT
        except Refused:  # by iLink, or here, which the bind is told too
            return Verdict.TAKEN
        return Verdict.TAKEN
