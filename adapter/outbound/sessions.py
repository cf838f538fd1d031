"""Whether a bot's session with iLink is alive, by its poller or by `notifystart`, and when iLink accepts sends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.errors import AdapterError, Refused, SessionExpired, Temporary, Uncertain
from adapter.kit.tasks import TaskSet
from adapter.kit.timing import ChangeSignal, Clock
from adapter.ports import Account, Chat

log = structlog.get_logger()

LOOK_S = 0.2
RESTART_EVERY_S = 60.0
"""Shortest time between two restarts of a bot's session."""
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
    """Whether sends may go through a bot."""

    def __init__(
        self,
        bindings: Bindings,
        chat: Chat,
        account: Callable[[Binding], Account],
        pollers: Pollers,
        clock: Clock,
    ) -> None:
        self._bindings = bindings
        self._chat = chat
        self._account = account
        self._pollers = pollers
        self._clock = clock
        self._restarts = TaskSet(_report)
        self._restarted: dict[str, float] = {}
        """Monotonic times by bot, oldest first, of the last RESTART_EVERY_S."""

    def is_recovering(self, bot: str) -> bool:
        return self._pollers.is_stale(bot)

    def is_polled_here(self, bot: str) -> bool:
        return self._pollers.is_taken(bot)

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
        pollers, since = self._pollers, self._clock.monotonic()
        pollers.poll_now(bot)
        while not pollers.has_polled_since(bot, since):
            if self._clock.monotonic() - since > POLLED_WITHIN_S:
                return False
            binding = self._bindings.serving(bot)
            if binding is None or binding.state == "needs_login" or pollers.is_stale(bot):
                return False
            await self._clock.sleep(LOOK_S)
        return True

    def restart_soon(self, bot: str) -> None:
        """Announces the bot by `notifystart`, at most once a minute: iLink may refuse the sends of a degraded session
        until then (docs/reference/ilink-protocol.md, "Refused sends"). Best effort."""
        now = self._clock.monotonic()
        while self._restarted and now - self._restarted[oldest := next(iter(self._restarted))] >= RESTART_EVERY_S:
            del self._restarted[oldest]
        binding = self._bindings.serving(bot)
        if bot not in self._restarted and binding is not None:
            self._restarted[bot] = now
            self._restarts.spawn(self._restart(binding))

    async def _restart(self, binding: Binding) -> None:
        try:
            await self._chat.notify(self._account(binding), start=True)
        except AdapterError as exc:
            log.debug("restart.failed", bot=binding.bot, reason=exc.reason)


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="restart", exc_info=exc)


class AcceptedSends:
    """When iLink last accepted a send, by base URL. Nothing else is shared between tenants: a send without an answer
    is repeated once anybody's send to the same place was accepted."""

    def __init__(self, clock: Clock) -> None:
        self.changed = ChangeSignal()
        self._clock = clock
        self._last: dict[str, float] = {}

    def note(self, base_url: str) -> None:
        """iLink answered `ret` 0."""
        self._last[base_url] = self._clock.monotonic()
        self.changed.notify_all()

    def since(self, base_url: str, monotonic: float) -> bool:
        """Whether a send was accepted there at that time or later."""
        return self._last.get(base_url, -math.inf) >= monotonic
