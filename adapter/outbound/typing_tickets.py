"""The tickets that iLink wants with each sendtyping, cached for each user, and the calls with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from weakref import WeakValueDictionary

from adapter.errors import Refused, SessionExpired, Temporary
from adapter.kit.timing import Clock, backoff
from adapter.ports import Account, Chat

TICKET_S = 600.0
"""How long a ticket is used. Two other clients use it as long, the official one for up to a day."""
NO_TICKET_S = (2.0, 3600.0)
"""Pause after a failed getconfig, which doubles from the first value to the second."""
REST_S = 1.0
"""Shortest pause before it is shown again. Fast switching flickers and may be throttled."""


class Ticket:
    """A user's typing ticket, failures to get one, and its last use."""

    __slots__ = ("failures", "got_at", "hidden", "retry_at", "token", "unknown", "used_at", "value")

    def __init__(self) -> None:
        self.value = ""
        self.token = ""
        """The bot's token with which it was requested."""
        self.got_at = 0.0
        self.failures = 0
        self.retry_at = 0.0
        self.unknown = False
        """iLink has no ticket for this user; the next request is made when the user writes."""
        self.used_at = -REST_S
        self.hidden = False
        """The last call was an accepted status 2."""

    def is_old(self, now: float) -> bool:
        """Whether neither the ticket nor its failures matter to the next caller."""
        return now >= max(self.got_at + TICKET_S, self.retry_at + NO_TICKET_S[1], self.used_at + REST_S)


class Tickets:
    """The tickets of one shard's bots and users."""

    def __init__(self, chat: Chat, clock: Clock) -> None:
        self._chat = chat
        self._clock = clock
        self._known: dict[tuple[str, str], Ticket] = {}
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """A lock for each bot, held during a call, so that hanging calls do not use up the bot's connections."""

    def of(self, bot: str, user: str) -> Ticket:
        return self._known.setdefault((bot, user), Ticket())

    def retry(self, bot: str, user: str) -> None:
        """The user wrote, so iLink may have a ticket for them now."""
        ticket = self._known.get((bot, user))
        if ticket is not None and ticket.unknown:
            ticket.retry_at = 0.0

    def evict(self, used: Collection[tuple[str, str]], bound: Callable[[str], object]) -> None:
        """Drops tickets that are not needed. `used`: bots and users with active indicators."""
        now = self._clock.monotonic()
        for bot, user in self._known.keys() - used:
            if bound(bot) is None or self._known[bot, user].is_old(now):
                del self._known[bot, user]

    async def get(self, account: Account, user: str, context_token: str) -> str:
        """The user's ticket, requested if there is none or it is too old. Raises Refused, Temporary."""
        clock, ticket = self._clock, self.of(account.bot, user)
        if ticket.value and ticket.token == account.token and clock.monotonic() < ticket.got_at + TICKET_S:
            return ticket.value
        if clock.monotonic() < ticket.retry_at:
            raise Refused("typing", "iLink gave no ticket; the next request is made later.")
        try:
            async with self._line(account.bot):
                value = await self._chat.typing_ticket(account, user, context_token)
        except SessionExpired:
            raise
        except (Refused, Temporary) as exc:
            ticket.failures += 1
            first_s, longest_s = NO_TICKET_S
            pause_s = backoff(ticket.failures, first_s=first_s, longest_s=longest_s)
            ticket.retry_at, ticket.unknown = clock.monotonic() + pause_s, isinstance(exc, Refused)
            raise
        ticket.value, ticket.token, ticket.got_at = value, account.token, clock.monotonic()
        ticket.failures, ticket.unknown = 0, False
        return value

    async def use(
        self, account: Account, user: str, value: str, context_token: str, *, on: bool, check: Callable[[], None]
    ) -> None:
        """Calls sendtyping, and repeats it with a new ticket if iLink refused this one. Calls `check` before each.

        Raises what `check`, Chat and `get` raise.
        """
        for attempt in range(2):
            check()
            ticket = self.of(account.bot, user)
            ticket.used_at, ticket.hidden = self._clock.monotonic(), False
            try:
                async with self._line(account.bot):
                    await self._chat.show_typing(account, user, value, on=on)
            except Refused as exc:
                if attempt or exc.reason != "typing":
                    raise
                ticket.value = ""
                value = await self.get(account, user, context_token)
            else:
                ticket.hidden = not on
                return

    def _line(self, bot: str) -> asyncio.Lock:
        return self._lines.setdefault(bot, asyncio.Lock())
