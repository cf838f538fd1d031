"""Whether a bot's session with iLink is alive, by its poller or by `notifystart`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.errors import Refused, SessionExpired, Temporary, Uncertain
from adapter.kit.timing import Clock
from adapter.ports import Account, Chat

LOOK_S = 0.2
POLLED_WITHIN_S = 90.0
"""A bot that is not polled for so long, for instance while a stream is full, counts as not alive for now."""


class Pollers(Protocol):
    """The pollers of this replica."""

    def is_stale(self, bot: str) -> bool:
        """Whether iLink has refused the bot's token and the poller retries it."""

    def is_taken(self, bot: str) -> bool:
        """Whether this replica has taken the bot, and read what its former owners published."""

    def poll_now(self, bot: str) -> None:
        """Ends the bot's long poll, so that the next one tests the token."""

    def has_polled_since(self, bot: str, since: float) -> bool:
        """Whether a poll of the bot was answered after the monotonic time `since`."""


class BotSessions:
    """Implements shard.Sessions."""

    def __init__(
        self,
        bindings: Bindings,
        chat: Chat,
        account: Callable[[Binding], Account],
        pollers: Callable[[], Pollers],
        clock: Clock,
    ) -> None:
        self._bindings = bindings
        self._chat = chat
        self._account = account
        self._pollers = pollers
        self._clock = clock

    def is_recovering(self, bot: str) -> bool:
        return self._pollers().is_stale(bot)

    def is_polled_here(self, bot: str) -> bool:
        return self._pollers().is_taken(bot)

    async def is_alive(self, bot: str) -> bool:
        """Tests the token after -14 to a send, which is no proof: iLink answers a malformed body with -14, too
        (docs/reference/ilink-protocol.md, "Stale token"). If `notifystart` fails, a new poll decides, and its poller
        starts the recovery if it is refused."""
        binding = self._bindings.serving(bot)
        if binding is None or binding.state == "needs_login" or self.is_recovering(bot):
            return False
        try:
            await self._chat.notify(self._account(binding), start=True)
        except (SessionExpired, Temporary, Uncertain):
            pass
        except Refused:
            return True  # any answer but -14
        else:
            return True
        return await self._polls(bot)

    async def _polls(self, bot: str) -> bool:
        """Whether iLink accepts the token in a poll that begins now. An earlier poll is no proof."""
        pollers, since = self._pollers(), self._clock.monotonic()
        pollers.poll_now(bot)
        while not pollers.has_polled_since(bot, since):
            if self._clock.monotonic() - since > POLLED_WITHIN_S:
                return False
            binding = self._bindings.serving(bot)
            if binding is None or binding.state == "needs_login" or pollers.is_stale(bot):
                return False
            await self._clock.sleep(LOOK_S)
        return True
