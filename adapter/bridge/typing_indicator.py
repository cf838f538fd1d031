"""The typing indicator: shows users that the bot types, and hides it (docs/reference/ilink-protocol.md, "Typing").

It is best effort: no send waits for it, nothing about it is stored, and who stops at once leaves it shown. A person
has a task while it is shown, which makes all requests for it, one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from adapter.errors import AdapterError, Refused, Temporary
from adapter.ports import Account, Chat
from adapter.tools.tasks import TaskSet
from adapter.tools.timing import Clock, wait_event

log = structlog.get_logger()

SHOWN_S = 60.0
"""How long it is shown without another call of `show`, so that it ends when an agent dies."""
RENEW_S = 5.0
"""The pace of the official client."""
REST_S = 1.0
"""Pause before it is shown again. Fast switching flickers and may be throttled."""
TICKET_S = 600.0
"""How long a ticket is used. Two other clients use it as long, the official one for up to a day."""


class _Indicator:
    """What one user is shown."""

    def __init__(self) -> None:
        self.until = 0.0
        """Monotonic time at which it is hidden; 0: now."""
        self.changed = asyncio.Event()


class _Ticket(NamedTuple):
    """What iLink wants with each sendtyping, for a bot and a user."""

    value: str
    good_until: float
    """Monotonic."""


class TypingIndicators:
    """The typing indicators of one partition, by sandbox and user."""

    def __init__(self, chat: Chat, clock: Clock, ensure_owner: Callable[[], None]) -> None:
        """`ensure_owner` raises LeaseLost unless this replica owns the partition."""
        self._chat = chat
        self._clock = clock
        self._ensure_owner = ensure_owner
        self._tasks = TaskSet("typing")
        self._shown: dict[tuple[str, str], _Indicator] = {}
        self._tickets: dict[tuple[str, str], _Ticket] = {}
        self._is_ending = False

    def show(self, account: Account, sandbox: str, user: str, context_token: str) -> None:
        """Shows it, or goes on showing it."""
        if self._is_ending:
            return
        indicator = self._shown.get((sandbox, user))
        if indicator is None:
            indicator = self._shown[sandbox, user] = _Indicator()
            self._tasks.spawn(self._run(indicator, account, sandbox, user, context_token))
        elif not indicator.until:
            indicator.changed.set()
        indicator.until = self._clock.monotonic() + SHOWN_S

    def hide(self, sandbox: str, user: str) -> None:
        """Hides it if it is shown."""
        if indicator := self._shown.get((sandbox, user)):
            indicator.until = 0.0
            indicator.changed.set()

    async def drain(self, within_s: float) -> None:
        """Hides all within so many seconds."""
        self._is_ending = True
        for sandbox, user in self._shown:
            self.hide(sandbox, user)
        await self._tasks.wait_ended(within_s)
        self.stop()

    def stop(self) -> None:
        """Stops at once."""
        self._is_ending = True
        self._tasks.cancel_all()

    def evict_idle(self, is_bound: Callable[[str], bool]) -> None:
        """Drops old tickets, and those of bots that are not bound any more."""
        now = self._clock.monotonic()
        for bot, user in list(self._tickets):
            if now >= self._tickets[bot, user].good_until or not is_bound(bot):
                del self._tickets[bot, user]

    async def _run(self, shown: _Indicator, account: Account, sandbox: str, user: str, context_token: str) -> None:
        clock = self._clock
        try:
            while True:
                ticket = await self._ticket(account, user, context_token)
                shown.changed.clear()
                is_on = clock.monotonic() < shown.until
                if not self._is_ending:  # what is shown may be hidden by who gives the partition away
                    self._ensure_owner()
                try:
                    await self._chat.show_typing(account, user, ticket, on=is_on)
                except Temporary:
                    if not is_on:
                        raise
                if is_on:
                    await wait_event(shown.changed, min(RENEW_S, shown.until - clock.monotonic()))
                    continue
                if not self._is_ending:
                    await clock.sleep(REST_S)
                if clock.monotonic() >= shown.until:
                    return
        except AdapterError as exc:
            if isinstance(exc, Refused):
                self._tickets.pop((account.bot, user), None)
            log.debug("typing.failed", bot=account.bot, sandbox=sandbox, reason=exc.reason, detail=exc.detail)
        finally:
            del self._shown[sandbox, user]

    async def _ticket(self, account: Account, user: str, context_token: str) -> str:
        """Raises Refused, Temporary, LeaseLost."""
        ticket = self._tickets.get((account.bot, user))
        if ticket is None or self._clock.monotonic() >= ticket.good_until:
            self._ensure_owner()
            value = await self._chat.typing_ticket(account, user, context_token)
            ticket = self._tickets[account.bot, user] = _Ticket(value, self._clock.monotonic() + TICKET_S)
        return ticket.value
