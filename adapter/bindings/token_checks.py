"""Checks at iLink whether the tokens of waiting binds are alive.

The check is a `notifystart`, which consumes no messages, unlike a poll. A slow answer delays its own bind and later
commands for the same sandbox or bot, and no others.
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
"""Time limit of a check."""


class Verdict(Enum):
    """Result of a check."""

    TAKEN = "an answer that is not -14"
    DEAD = "-14"
    SILENT = "no answer"


class TokenChecks:
    """The running checks, by the sequence of their commands."""

    def __init__(self, chat: Chat, sealer: Sealer) -> None:
        self._chat = chat
        self._sealer = sealer
        self._running: dict[int, asyncio.Task[Verdict]] = {}

    def is_pending(self, sequence: int, command: object, on_done: Callable[[], None]) -> bool:
        """Whether a bind waits for its check. The first call starts the check, which calls `on_done` at its end."""
        if not isinstance(command, Bind) or not command.check:
            return False
        if sequence not in self._running:
            task = self._running[sequence] = asyncio.get_running_loop().create_task(self._check(command))
            task.add_done_callback(lambda _: on_done())
        return not self._running[sequence].done()

    def is_known(self, sequence: int) -> bool:
        """Whether the check of a command was started before."""
        return sequence in self._running

    async def verdict(self, sequence: int, command: Bind) -> Verdict:
        """The result of the running check, or of a new one."""
        running = self._running.get(sequence)
        return await (self._check(command) if running is None else asyncio.shield(running))

    def forget(self, sequence: int) -> None:
        """Ends the check of a finished command."""
        if (task := self._running.pop(sequence, None)) is not None:
            task.cancel()

    def forget_all(self) -> None:
        for sequence in list(self._running):
            self.forget(sequence)

    async def _check(self, command: Bind) -> Verdict:
        try:
            token = self._sealer.open_given(bind_context(command.sandbox, command.bot), command.bot_token)
            base_url = self._chat.check_base_url(command.base_url) if command.base_url else ""
            async with asyncio.timeout(CHECK_S):
                await self._chat.notify(Account(command.bot, token, base_url), start=True)
        except SessionExpired:
            return Verdict.DEAD
        except Temporary as exc:
            return Verdict.TAKEN if exc.reason == "ret_other" else Verdict.SILENT
        except (Uncertain, TimeoutError):
            return Verdict.SILENT
        except Refused:  # the bind itself will fail
            return Verdict.TAKEN
        return Verdict.TAKEN
