"""Whether a bot's session with iLink is alive, as its poller knows or `notifystart` tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapter.bindings.registry import Bindings
from adapter.errors import Refused, SessionExpired
from adapter.ports import Account, Chat
from adapter.records import Binding


class Pollers(Protocol):
    """The pollers of this replica."""

    def is_stale(self, bot: str) -> bool:
        """Whether iLink has refused the bot's token, and it is being tried again."""

    def poll_now(self, bot: str) -> None:
        """Ends the bot's long poll, so that the next one shows what iLink thinks of its token."""


class BotSessions:
    """Implements processor.Sessions."""

    def __init__(
        self,
        bindings: Bindings,
        chat: Chat,
        account: Callable[[Binding], Account],
        pollers: Callable[[], Pollers],
    ) -> None:
        self._bindings = bindings
        self._chat = chat
        self._account = account
        self._pollers = pollers

    def is_recovering(self, bot: str) -> bool:
        return self._pollers().is_stale(bot)

    async def is_alive(self, bot: str) -> bool:
        """-14 to one send is no proof (ilink-protocol 15.3). Where `notifystart` says it, too, the poller is asked to
        look at once, and begins the recovery. Raises Temporary."""
        binding = self._bindings.get(bot)
        if binding is None or binding.state == "needs_login" or self.is_recovering(bot):
            return False
        try:
            await self._chat.notify(self._account(binding), start=True)
        except SessionExpired:
            self._pollers().poll_now(bot)
            return False
        except Refused:
            pass  # an answer all the same: iLink did not say -14
        return True
